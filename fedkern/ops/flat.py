"""flat: a module's parameters and buffers as views into one vector, which clients and server exchange."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor, nn

from fedkern.ops._core.checks import check_dense, memory_ends
from fedkern.ops._core.layout import dense_stride
from fedkern.ops._core.private_torch import functorch_active

ALIGNED = 8  # elements, 16 bytes in 16 bits: at other addresses cuDNN finds no algorithm, or stops with an error

_KINDS = ("parameters", "personal", "frozen", "buffers", "personal_buffers")
# (owner, attribute, qualified name, tensor, is parameter)
Entry = tuple[nn.Module, str, str, Tensor, bool]


class FlatGroup(NamedTuple):
    """The flat tensors of one dtype.

    Attributes:
        vector: ``[N]``, all elements of that dtype; zeros between tensors, so that each begins at a multiple of eight
            elements.
        parameters: ``[P]``, its first elements: the module's parameters in the order of ``module.parameters()``.
        personal: ``[A]``, the trained parameters that are personal, in the order of the names.
        frozen: ``[F]``, the frozen parameters of a module that also has trained ones, in the same order; else empty.
        buffers: ``[Q]``, floating buffers in the order of ``module.buffers()``.
        personal_buffers: ``[B]``, its last elements: the personal floating buffers, in the order of the names.
    """

    vector: Tensor
    parameters: Tensor
    personal: Tensor
    frozen: Tensor
    buffers: Tensor
    personal_buffers: Tensor


class Slot(NamedTuple):
    name: str  # qualified name, as in state_dict
    tensor: Tensor
    kind: str  # the group's vector that it was put into, a name in _KINDS
    stride: tuple[int, ...]
    offset: int  # in elements, within its group's vector


class Expected(NamedTuple):
    """Place and form of a tensor that keeps a module flat (integers, without a place, may be replaced)."""

    owner: nn.Module
    key: str
    name: str
    tensor: Tensor
    dtype: torch.dtype
    stride: tuple[int, ...]
    place: int | None  # in bytes, from the start of its vector
    trained: bool


class FlatParameters:
    """Move the parameters and floating buffers of ``module`` into one vector per dtype.

    They become views into it.

    The tensors stay the same objects (optimisers and hooks keep working) with the same shapes and strides: a
    channels-last weight is still channels-last. The vector holds each tensor's elements in memory order, so that two
    modules of the same architecture, memory format and frozen parameters have the same :meth:`layout`, in any dtype.
    Every tensor begins at a multiple of eight elements, as GPU libraries need it. Zeros lie between: they stay zeros
    in means and in steps (with ``eps`` above 0); noise on a whole vector reaches them, and no tensor has them.
    ``state_dict`` keys, ``load_state_dict``, optimisers, ``copy.deepcopy`` and ``torch.save`` of the module or its
    state behave as before. Shared (tied) tensors appear once.

    Where some parameters are trained and others frozen (``requires_grad`` False), the frozen ones lie in
    :attr:`frozen`, behind the trained ones: :attr:`parameters` and :meth:`gradients` hold the trained ones alone, and
    ``sgd_step`` and ``adamw_step`` leave the others as ``torch.optim`` does. A module that is frozen as a whole has
    the layout of one that is trained as a whole. A parameter that the loss does not use has gradient 0, and steps
    decay it and move it by its momentum, as ``torch.optim`` does after ``zero_grad(set_to_none=False)``; freeze it to
    keep it as it is.

    All tensors of a dtype share the vector's storage, a torch storage: ``untyped_storage().resize_`` frees or
    reallocates the memory of all of them. The tensors of ``module.state_dict()`` view the same memory through
    separate storages, so that every library saves them as those of an ordinary module (unless the module has other
    state-dict hooks); such a state dict is invalid once the memory is freed. Of the module itself ``torch.save``
    writes the vector once, ``pickle.dumps`` and libraries on top (joblib, cloudpickle) once for each tensor, and
    ``torch.save`` of one layer or parameter writes the whole vector: give those ``copy.deepcopy(module)``.
    ``pickle.dumps`` of the FlatParameters writes such a copy: after loading, an optimiser or a module pickled beside it
    does not share its tensors.

    Integer and boolean parameters and buffers keep their dtype and memory; :attr:`integers` copies them into a vector.

    Tensors named in ``personal`` are left out of :attr:`parameters`, :attr:`buffers` and :attr:`integers`, and so of
    what clients exchange; :attr:`personal` and :meth:`personal_gradients` hold those that are trained.

    Operations that replace a module's tensors or layers unflatten the module: ``.to(dtype)``, ``.to(device)``,
    ``.to(memory_format=...)``, ``load_state_dict(assign=True)``, ``p.data = ...``. So does freezing or unfreezing
    single parameters (not a whole module that was trained or frozen as a whole). From then on every attribute and
    method here that reads or writes values raises RuntimeError, until :meth:`flatten` has flattened the module
    again (see :attr:`is_flat` and :meth:`check`). Vectors read before no longer belong to the module. Under
    torch.compile nothing is checked. ``copy.deepcopy`` of the module alone gives an ordinary module,
    ``copy.deepcopy`` of the FlatParameters copies the module with it and flattens the copy.

    Writing to the vectors with torch operations changes the module at once, but autograd cannot see the change. Call
    :meth:`mark_changed` afterwards, or write through :meth:`load`: then a backward pass whose saved tensors were
    overwritten raises instead of giving wrong gradients.

    A FlatParameters is a container, not an operator, and cannot be built or loaded under ``torch.func`` transforms or
    ``torch.compile``; use ``torch.func.functional_call`` with :meth:`views` there.

    Args:
        module: any module whose tensors live on one device.
        personal: qualified names of parameters and buffers, as in ``state_dict``, that do not travel.

    Attributes:
        module: the module.

    Raises:
        TypeError: ``module`` is no ``nn.Module``, or holds a tensor subclass or a tensor that is not strided.
        ValueError: a tensor is uninitialised (lazy), on the meta device or another device, or two tensors overlap in
            memory without being the same.
        RuntimeError: called under ``torch.compile`` or a ``torch.func`` transform, or (all attributes and methods that
            read or write values) the module is no longer flat.
    """

    module: nn.Module

    def __init__(self, module: nn.Module, personal: Collection[str] = ()) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, not {type(module).__name__}")
        self.module, self._personal = module, frozenset(personal)
        self.flatten()

    def flatten(self) -> FlatParameters:
        """Flatten the module (again), with its current values, into new vectors.

        Returns ``self``.
        """
        if torch.compiler.is_compiling() or functorch_active():
            raise RuntimeError(
                "FlatParameters moves memory and cannot be used under torch.compile or a torch.func transform"
            )
        all_entries = list(_tensors_of(self.module))
        _check_tensors(all_entries)
        if unknown := self._personal - {name for _, _, name, _, _ in all_entries}:
            raise ValueError(f"personal must hold names of the module's tensors, which {sorted(unknown)[0]!r} is not")
        floating = [entry for entry in all_entries if _is_inexact(entry[3])]
        self._integers = [row for row in all_entries if not _is_inexact(row[3]) and row[2] not in self._personal]
        # Frozen as a whole, as a teacher or for evaluation, a module keeps its layout.
        self._mixed = len({tensor.requires_grad for _, _, _, tensor, is_parameter in floating if is_parameter}) == 2
        self._slots: dict[torch.dtype, list[Slot]] = {}
        self._groups: dict[torch.dtype, FlatGroup] = {}
        self._gradient: dict[tuple[torch.dtype, str], tuple[Tensor, list[Tensor]]] = {}
        for dtype in dict.fromkeys(entry[3].dtype for entry in floating):
            entries = [entry for entry in floating if entry[3].dtype == dtype]
            # Ordinary tensors: autograd could not save those of inference mode.
            with torch.inference_mode(False):
                self._groups[dtype], self._slots[dtype] = _flatten_group(entries, self._mixed, self._personal)
        places = {id(slot.tensor): slot for slots in self._slots.values() for slot in slots}
        self._expect = [_expect(entry, places.get(id(entry[3]))) for entry in all_entries]
        for owner in self.module.modules():
            if not owner._state_dict_hooks:  # else handles of its hooks would lose them
                owner._state_dict_hooks = _StateDictHooks(owner)
            if owner is self.module and isinstance(owner._state_dict_hooks, _StateDictHooks):
                owner._state_dict_hooks.is_root = True
        return self

    @property
    def groups(self) -> dict[torch.dtype, FlatGroup]:
        """The vectors of each floating dtype."""
        self.check()
        return self._groups

    @property
    def vector(self) -> Tensor:
        """``[N]``: trained parameters, personal ones, frozen ones, then floating buffers, in the module's own memory.

        Raises:
            ValueError: the module has several floating dtypes; use :attr:`groups`.
        """
        return self._only().vector

    @property
    def parameters(self) -> Tensor:
        """``[P]``: the first elements of :attr:`vector`."""
        return self._only().parameters

    @property
    def personal(self) -> Tensor:
        """``[A]``: the trained parameters that are personal, behind the others."""
        return self._only().personal

    @property
    def frozen(self) -> Tensor:
        """``[F]``: the frozen parameters of a module that also has trained ones, between these and the buffers."""
        return self._only().frozen

    @property
    def buffers(self) -> Tensor:
        """``[Q]``: the floating buffers (batch norm's running statistics), the last elements of :attr:`vector`."""
        return self._only().buffers

    @property
    def personal_buffers(self) -> Tensor:
        """``[B]``: the personal floating buffers, behind the others."""
        return self._only().personal_buffers

    @property
    def integers(self) -> Tensor:
        """A copy of all integer and boolean parameters and buffers (``num_batches_tracked``), one int64 vector."""
        self.check()
        tensors = [self._live(entry).detach().reshape(-1).to(torch.int64) for entry in self._integers]
        return torch.cat(tensors) if tensors else torch.empty(0, dtype=torch.int64)

    def load(self, vector: Tensor) -> None:
        """Copy ``vector [N]`` of any floating dtype, device or stride (complex for a complex module) into the module.

        Raises:
            TypeError, ValueError: the vector's type or shape is wrong.
            RuntimeError: the module is no longer flat.
        """
        self._load(vector, self._only().vector, "vector")

    def load_vectors(self, vectors: Mapping[str, Tensor]) -> None:
        """Load the ``parameters``, ``frozen``, ``buffers`` and ``integers`` among ``vectors``, as :meth:`load` does."""
        if not isinstance(vectors, Mapping):
            raise TypeError(f"vectors must map names to tensors, not be a {type(vectors).__name__}")
        group = self._only()  # once for all of them: it looks at every tensor
        for name in ("parameters", "frozen", "buffers"):
            if name in vectors:
                self._load(vectors[name], getattr(group, name), name)
        if "integers" in vectors:
            self._load_integers(vectors["integers"])

    def load_integers(self, vector: Tensor) -> None:
        """Write the values of :attr:`integers`, ``int64 [R]``, back into the module's integer buffers.

        Raises:
            TypeError, ValueError: the vector's type or shape is wrong.
            RuntimeError: the module is no longer flat.
        """
        self.check()
        self._load_integers(vector)

    def _load_integers(self, vector: Tensor) -> None:
        tensors = [self._live(entry) for entry in self._integers]
        total = sum(tensor.numel() for tensor in tensors)
        if not isinstance(vector, Tensor) or _is_inexact(vector):
            kind = vector.dtype if isinstance(vector, Tensor) else type(vector).__name__
            raise TypeError(f"integers must be an int64 tensor, not {kind}")
        _check_values(vector, "integers")
        if vector.shape != (total,):
            raise ValueError(f"integers must have shape [{total}], not {list(vector.shape)}")
        if tensors:
            vector = vector.to(tensors[0].device)  # in one transfer
        with torch.no_grad():
            for tensor, part in zip(tensors, vector.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def copy_(self, other: FlatParameters) -> FlatParameters:
        """Copy every value of another flat module of the same layout, integer buffers included.

        Returns ``self``.

        Raises:
            TypeError: ``other`` is no FlatParameters.
            ValueError: the layouts differ.
        """
        if not isinstance(other, FlatParameters):
            raise TypeError(f"other must be a FlatParameters, not {type(other).__name__}")
        mine, theirs = self.layout(), other.layout()
        if mine != theirs:
            a, b = next(
                ((a, b) for a, b in zip(mine, theirs, strict=False) if a != b), (f"{len(mine)} tensors", len(theirs))
            )
            raise ValueError(f"other must be a module of the same layout: here {a}, there {b}")
        with torch.no_grad():
            for dtype, group in self._groups.items():
                group.vector.copy_(other._groups[dtype].vector)
        self.mark_changed()
        self.load_integers(other.integers)
        return self

    def layout(self) -> list[tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...], int]]:
        """Return (name, dtype, shape, strides, offset) of every tensor, on which client and server must agree."""
        self.check()
        return [
            (slot.name, dtype, tuple(slot.tensor.shape), slot.stride, slot.offset)
            for dtype, slots in self._slots.items()
            for slot in slots
        ]

    def places(self) -> dict[str, dict[str, slice]]:
        """Return where each tensor lies in its vector, by the vector's name.

        :attr:`integers` is one of these.

        Raises:
            ValueError: the module has several floating dtypes; use :meth:`layout`.
        """
        group = self._only()
        slices: dict[str, dict[str, slice]] = {name: {} for name in (*_KINDS, "integers")}
        for slot in (slot for slots in self._slots.values() for slot in slots):
            inside = [name for name in _KINDS[1:] if slot.offset >= getattr(group, name).storage_offset()]
            kind = [name for name in inside if len(getattr(group, name))]
            name = kind[-1] if kind else "parameters"  # also of a buffer that views a parameter
            begin = slot.offset - getattr(group, name).storage_offset()
            slices[name][slot.name] = slice(begin, begin + slot.tensor.numel())
        end = 0
        for _, _, name, tensor, _ in self._integers:
            slices["integers"][name] = slice(end, end := end + tensor.numel())
        return slices

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Return name → view into ``vector [N]`` (or ``[P]``: parameters alone), shaped as the module's tensors.

        Differentiable, for ``torch.func.functional_call(module, flat.views(vector), inputs)``. Where ``vector``
        requires grad and the module has batch norm, give it ``[P]``: torch refuses running statistics that require
        grad.

        Raises:
            TypeError, ValueError: the vector's type or shape is wrong.
        """
        group = self._only()
        if not isinstance(vector, Tensor) or not _is_inexact(vector):
            kind = vector.dtype if isinstance(vector, Tensor) else type(vector).__name__
            raise TypeError(f"vector must be a floating-point tensor, not {kind}")
        check_dense(vector, "vector")
        total, parameters = group.vector.numel(), group.parameters.numel()
        if vector.shape not in ((total,), (parameters,)):
            raise ValueError(f"vector must have shape [{total}] or [{parameters}], not {list(vector.shape)}")
        slots = next(iter(self._slots.values()), [])
        inside = [slot for slot in slots if slot.offset + slot.tensor.numel() <= len(vector)]
        return {
            slot.name: _shape_piece(vector[slot.offset : slot.offset + slot.tensor.numel()], slot) for slot in inside
        }

    def gradients(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return one vector ``[P]`` that the ``.grad`` of every parameter in :attr:`parameters` views.

        For optimisers that work on flat vectors, as ``sgd_step``.

        Existing gradients are copied into the vector; a missing gradient (never computed, or reset to None) is zero.
        Call this once before training. Clear the vector with one ``fill_(0)``, or by ``zero_grad(set_to_none=False)``.
        Call this again after gradients were replaced, to copy the new ones in.

        Args:
            dtype: the floating dtype, for a module that has several.

        Raises:
            TypeError, ValueError: ``dtype`` is none of the module's.
            ValueError: all parameters are frozen.
            ValueError: two parameters share memory (``a.data = b.data``), where each has its own gradient.
            RuntimeError: the module is no longer flat.
        """
        return self._gradients(dtype, "parameters")

    def personal_gradients(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return one vector ``[A]`` of the gradients of :attr:`personal`, as :meth:`gradients` does."""
        return self._gradients(dtype, "personal")

    def _gradients(self, dtype: torch.dtype | None, kind: str) -> Tensor:
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, not {type(dtype).__name__}")
        if dtype is None:
            self._only()
            dtype = next(iter(self._groups), None)
        if dtype is None:
            return torch.empty(0)
        if dtype not in self.groups:
            raise ValueError(f"dtype must be one of {', '.join(map(str, self._groups))}, not {dtype}")
        slots = [slot for slot in self._slots[dtype] if slot.kind == kind]
        if slots and not any(slot.tensor.requires_grad for slot in slots):
            raise ValueError(
                f"{type(self.module).__name__} has no gradients: all its parameters are frozen, and a step would only "
                "decay them; call requires_grad_(True) on those to train"
            )
        if (dtype, kind) not in self._gradient:
            _check_personal([slot for slot in self._slots[dtype] if slot.kind in ("parameters", "personal")])
            part = getattr(self._groups[dtype], kind)
            with torch.inference_mode(False):
                flat = torch.zeros_like(part)
                places = [slot._replace(offset=slot.offset - part.storage_offset()) for slot in slots]
                self._gradient[dtype, kind] = flat, [_view_of(flat, place) for place in places]
        flat, views = self._gradient[dtype, kind]
        with torch.no_grad():
            for slot, view in zip(slots, views, strict=True):
                grad = slot.tensor.grad
                if grad is view:
                    continue
                if grad is None:
                    view.zero_()
                else:
                    view.copy_(grad)
                slot.tensor.grad = view
        return flat

    @property
    def is_flat(self) -> bool:
        """True while every tensor of the module lives in the vectors, at its place."""
        return self._stray() is None

    def check(self) -> None:
        """Raise RuntimeError naming the first tensor that left the vectors, or was frozen or unfrozen."""
        if (change := self._stray()) is not None:
            raise RuntimeError(
                f"the module is no longer flat: {change}; call flatten() to flatten it again with the values it has now"
            )

    def mark_changed(self) -> None:
        """Tell autograd that the vectors were written to directly."""
        self.check()
        self._count_writing()

    def _count_writing(self) -> None:
        tensors = [slot.tensor for slots in self._slots.values() for slot in slots]
        tensors += [tensor for group in self._groups.values() for tensor in group]
        torch.autograd.graph.increment_version(tensors)

    def __deepcopy__(self, memo: dict[int, object]) -> FlatParameters:
        twin = FlatParameters(copy.deepcopy(self.module, memo), self._personal)
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> tuple[type[FlatParameters], tuple[nn.Module, Collection[str]]]:
        # pickle writes each tensor's whole storage, here the vector; a copy's tensors have separate storages.
        return FlatParameters, (copy.deepcopy(self.module), self._personal)

    def __repr__(self) -> str:
        parts = [
            f"{str(dtype).removeprefix('torch.')}: {len(group.parameters)} parameters + "
            + (f"{len(group.frozen)} frozen + " if len(group.frozen) else "")
            + f"{len(group.buffers)} buffers"
            for dtype, group in self._groups.items()
        ]
        return f"FlatParameters({type(self.module).__name__}, {', '.join(parts) or 'empty'})"

    def _only(self) -> FlatGroup:
        self.check()
        if len(self._groups) > 1:
            raise ValueError(
                f"{type(self.module).__name__} has parameters or buffers of several dtypes "
                f"({', '.join(str(dtype) for dtype in self._groups)}); use groups[dtype]"
            )
        if not self._groups:
            return FlatGroup(*[torch.empty(0)] * (1 + len(_KINDS)))
        return next(iter(self._groups.values()))

    def _load(self, vector: Tensor, target: Tensor, name: str) -> None:
        if not isinstance(vector, Tensor) or not (
            vector.is_floating_point() or (vector.is_complex() and target.is_complex())
        ):
            kind = vector.dtype if isinstance(vector, Tensor) else type(vector).__name__
            raise TypeError(f"{name} must be a floating-point tensor, not {kind}")
        _check_values(vector, name)
        if vector.shape != target.shape:
            raise ValueError(f"{name} must have shape {list(target.shape)}, not {list(vector.shape)}")
        with torch.no_grad():
            target.copy_(vector)
        self._count_writing()

    def _live(self, entry: Entry) -> Tensor:
        owner, key, _, tensor, is_parameter = entry
        current = (owner._parameters if is_parameter else owner._buffers).get(key)
        return tensor if current is None else current

    def _stray(self) -> str | None:
        """Describe the first tensor that is not where :meth:`flatten` would put it, or return None."""
        if torch.compiler.is_compiling():  # tensors have no addresses there
            return None
        # Relative to the vectors, whose storage may be freed and reallocated.
        starts = {dtype: group.vector.data_ptr() for dtype, group in self._groups.items()}
        entries = iter(self._expect)
        frozen, trained, changed = 0, 0, None
        for owner, key, name, tensor, is_parameter in _tensors_of(self.module):
            spot = next(entries, None)
            if spot is None or owner is not spot.owner or key != spot.key or tensor.dtype is not spot.dtype:
                return _describe_change(name)
            if spot.place is None:
                continue
            if not (
                tensor is spot.tensor
                and tensor.data_ptr() == starts[spot.dtype] + spot.place
                and tensor.stride() == spot.stride
            ):
                return _describe_change(name)
            if is_parameter:
                trained, frozen = trained + tensor.requires_grad, frozen + (not tensor.requires_grad)
                if tensor.requires_grad is not spot.trained:
                    changed = changed or name
        spot = next(entries, None)
        if spot is not None:
            return _describe_change(spot.name)
        if changed is None or not (self._mixed or (trained and frozen)):
            return None
        return f"requires_grad of {changed!r} was changed, and frozen parameters lie behind the trained ones"


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _describe_change(name: str) -> str:
    return f"{name!r} was replaced, added or removed (.to(...), p.data = ... and load_state_dict(assign=True) replace)"


def _check_values(vector: Tensor, name: str) -> None:
    check_dense(vector, name)
    if vector.is_meta:
        raise ValueError(f"{name} must have values, and a tensor on the meta device has none")


def _expect(entry: Entry, slot: Slot | None) -> Expected:
    owner, key, name, tensor, _ = entry
    place = None if slot is None else slot.offset * tensor.element_size() if tensor.numel() else None
    return Expected(owner, key, name, tensor, tensor.dtype, tensor.stride(), place, tensor.requires_grad)


def _check_personal(slots: list[Slot]) -> None:
    names: dict[int, str] = {}
    for slot in slots:
        if slot.tensor.numel() and names.setdefault(slot.offset, slot.name) != slot.name:
            raise ValueError(
                f"{slot.name!r} shares memory with {names[slot.offset]!r} without being the same parameter, so that "
                "one vector cannot hold both gradients; assign the parameter itself to tie them"
            )


class _StateDictHooks(OrderedDict[int, Any]):
    """Hooks of a flat module. Copies and pickles get only foreign hooks, so that they are ordinary modules.

    Attributes:
        is_root: whether the owner was flattened itself, not only as a part of another module.
    """

    is_root = False

    def __init__(self, owner: nn.Module) -> None:
        super().__init__({0: separate_storages})
        self._owner = weakref.ref(owner)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[object, ...]:
        return self._others().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[Any, Any]) -> OrderedDict[int, object]:
        # torch copies a buffer's whole storage, here the vector: give each copied buffer a separate storage.
        for buffer in () if (owner := self._owner()) is None else owner._buffers.values():
            twin = memo.get(id(buffer))
            if buffer is not None and isinstance(twin, Tensor) and twin.untyped_storage().nbytes() > twin.nbytes:
                place = "fedkern", buffer.data_ptr(), twin.shape
                with torch.no_grad():
                    twin.data = memo.setdefault(place, twin.data.clone())
        return copy.deepcopy(self._others(), memo)

    def _others(self) -> OrderedDict[int, object]:
        return OrderedDict((key, hook) for key, hook in self.items() if hook is not separate_storages)


def separate_storages(module: nn.Module, state: dict[str, object], prefix: str, _metadata: object) -> None:
    """Give the module's tensors in a state dict their own storages over the same memory (tied tensors share one)."""
    if torch.compiler.is_compiling() or functorch_active():
        return
    if prefix and not getattr(module._state_dict_hooks, "is_root", False):
        return  # the module around it does the work for all its parts at once
    live = {id(tensor) for _, _, _, tensor, _ in _tensors_of(module)}  # with keep_vars=True
    storages: dict[tuple[int, int], torch.UntypedStorage] = {}
    for key, tensor in state.items():
        if not key.startswith(prefix) or type(tensor) is not Tensor or id(tensor) in live:
            continue
        if tensor.layout is not torch.strided or not tensor.numel():
            continue
        storage, place = tensor.untyped_storage(), (tensor.data_ptr(), tensor.nbytes)
        if place not in storages:
            if storage.nbytes() > tensor.nbytes:
                if tensor.stride() != dense_stride(tensor):
                    continue
                start = tensor.storage_offset() * tensor.element_size()
                storages[place] = storage[start : start + tensor.nbytes]
            else:
                storages[place] = storage
        if storage is not storages[place]:
            # By .data, which keeps the version counter that the tensor shares with the module's.
            empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            tensor.data = empty.set_(storages[place], 0, tensor.shape, tensor.stride())


def _tensors_of(module: nn.Module) -> Iterator[Entry]:
    """Yield every :data:`Entry`, a shared tensor once, under its first name."""
    seen: set[int] = set()
    owners = list(module.named_modules())
    for is_parameter in (True, False):
        for prefix, owner in owners:
            for key, tensor in (owner._parameters if is_parameter else owner._buffers).items():
                if tensor is None or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                yield owner, key, f"{prefix}.{key}" if prefix else key, tensor, is_parameter


def _check_tensors(entries: list[Entry]) -> None:
    device: torch.device | None = None
    for _, _, name, tensor, is_parameter in entries:
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ValueError(f"{name!r} is not initialised yet; run the lazy module once before flattening it")
        if type(tensor) is not Tensor and not (is_parameter and type(tensor) is nn.Parameter):
            raise TypeError(
                f"{name!r} is a {type(tensor).__name__}; only plain tensors and parameters can be flattened"
            )
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name!r} has layout {tensor.layout}; only strided tensors can be flattened")
        if tensor.device.type == "meta":
            raise ValueError(
                f"{name!r} is on the meta device; give it values (to_empty, load_state_dict) before flattening"
            )
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(
                f"all tensors must be on one device: {name!r} is on {tensor.device}, others are on {device}"
            )


def _flatten_group(entries: list[Entry], mixed: bool, personal: Collection[str]) -> tuple[FlatGroup, list[Slot]]:
    """Move tensors into a vector, frozen parameters behind the trained ones if ``mixed``."""

    def kind(entry: Entry) -> str:
        _, _, name, tensor, is_parameter = entry
        if is_parameter and mixed and not tensor.requires_grad:
            return "frozen"
        if name in personal:
            return "personal" if is_parameter else "personal_buffers"
        return "parameters" if is_parameter else "buffers"

    entries = sorted(entries, key=lambda entry: _KINDS.index(kind(entry)))
    # Tensors that view exactly the same memory (weight = other.weight.data) keep sharing it.
    placed: dict[tuple[int, torch.Size, tuple[int, ...]], int] = {}
    offsets, sources, taken, end = [], [], [], 0
    ends = dict.fromkeys(_KINDS, 0)
    for entry in entries:
        _, _, name, tensor, _ = entry
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in placed:
            offsets.append(placed[key])
        else:
            end += -end % ALIGNED
            placed[key] = end
            offsets.append(end)
            sources.append((tensor, end))
            if tensor.numel():
                taken.append((*memory_ends(tensor), name))
            end += tensor.numel()
        ends[kind(entry)] = end
    # Tensors that overlap in part can share no place in the vector.
    taken.sort()
    for (_, stop, name), (start, _, next_name) in itertools.pairwise(taken):
        if start < stop:
            raise ValueError(f"{name!r} and {next_name!r} overlap in memory without being the same tensor")
    template = entries[0][3]
    vector = torch.zeros(end, dtype=template.dtype, device=template.device)
    slots = []
    with torch.no_grad():
        strides = {id(tensor): dense_stride(tensor) for _, _, _, tensor, _ in entries}
        for tensor, offset in sources:
            torch.as_strided(vector, tensor.shape, strides[id(tensor)], offset).copy_(tensor)
        for entry, offset in zip(entries, offsets, strict=True):
            slot = Slot(entry[2], entry[3], kind(entry), strides[id(entry[3])], offset)
            slot.tensor.data = _view_of(vector, slot)
            slots.append(slot)
    # A group's vector begins at its first tensor, past the zeros of alignment.
    parts, before = [], 0
    for name in _KINDS:
        begin = min((slot.offset for slot in slots if slot.kind == name and slot.offset >= before), default=before)
        before = max(before, ends[name])
        parts.append(vector[begin:before])
    return FlatGroup(vector, *parts), slots


def _view_of(flat: Tensor, slot: Slot) -> Tensor:
    return flat[slot.offset : slot.offset + slot.tensor.numel()].as_strided(slot.tensor.shape, slot.stride)


def _shape_piece(piece: Tensor, slot: Slot) -> Tensor:
    """Return a piece in the slot's shape and strides, by differentiable views that vmap supports."""
    order = sorted(range(slot.tensor.dim()), key=lambda axis: (-slot.stride[axis], -slot.tensor.shape[axis]))
    in_memory = piece.view([slot.tensor.shape[axis] for axis in order])
    return in_memory.permute(sorted(range(len(order)), key=order.__getitem__))
