"""Steps of local training, replayed as CUDA graphs.

A step of a small network is some hundred kernels, which the host starts more slowly than the GPU computes. A CUDA graph
starts all of them in one call, in the order of the eager step, so that bits stay.

The first batches of a shape run eagerly, which loads kernels and makes workspaces. Then one step is recorded, which
runs nothing, and replayed for every later batch of the shape, of any client. Batches are laid into a table, as many as
may be made ahead. A recorded step reads its batch from the table and writes its figures into another, so that the host
reads nothing between graphs. If an optimiser has numbers that change from step to step (AdamW), only the forward and
backward pass is recorded.

Built-in methods and networks declare that they can be recorded (:attr:`fedkern.methods.roles.Objective.replayable`).
User code may draw on the host or count, which a recording would repeat. So its eager step is run twice, and a recorded
step is compared bit for bit: on three batches, and on the first of every later exchange. A :class:`Snapshot` is what
steps are compared with, and what a client returns to.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from fedkern.engine.local.first_steps import is_shipped
from fedkern.engine.local.network import Trained
from fedkern.methods.protocol import Batch, Received
from fedkern.methods.roles import Objective
from fedkern.models.precision import reduced_dtype
from fedkern.models.users.python_state import hash_attributes, hash_fields
from fedkern.ops._core.layout import dense_stride
from fedkern.ops._core.private_torch import foreach_add_
from fedkern.streams import forget_spare_number, generator_states, restore_generators


class Snapshot:
    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        self._tensors = tensors
        self._values = [tensor.detach().clone() for tensor in tensors]
        self._gpu = {device: torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
        forget_spare_number()
        self._host = generator_states()

    def moved_generator(self) -> str:
        """Return the name of a host generator that has moved since, or ""."""
        current = generator_states()
        return next((name for name, state in self._host.items() if state != current[name]), "")

    def holds(self) -> bool:
        return all(has_same_bits(x.detach(), value) for x, value in zip(self._tensors, self._values, strict=True))

    def restore(self) -> None:
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.detach().copy_(value)
        for device, state in self._gpu.items():
            torch.cuda.set_rng_state(state, device)
        restore_generators(self._host)


def has_same_bits(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors of one shape, dtype and layout have the same bits."""
    return torch.equal(in_memory(left).view(torch.uint8), in_memory(right).view(torch.uint8))


def in_memory(tensor: Tensor) -> Tensor:
    """Return a tensor's elements [n] in the order of :func:`dense_stride`, if possible as a view."""
    if not tensor.is_contiguous() and (stride := dense_stride(tensor)) != tensor.stride():
        tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


EAGER = 2
"""Batches of a shape that run eagerly before a step is recorded."""
LEAST = 5
"""Fewest remaining batches of a shape in the exchange for which a step is recorded."""
MOST = 16
"""Recordings kept between exchanges, each of which holds a step's batches and results."""
COMPARED = 3
"""Batches on which a recorded step of user code is compared with the step in Python."""
AHEAD, AHEAD_BYTES = 64, 1 << 24
"""Most batches laid into a table at once, and their most bytes."""

T = TypeVar("T")


class Outcome(NamedTuple):
    """Loss, gradient norm and figures of one batch, or of n batches.

    Attributes:
        loss: 0-d, or [n].
        squared_norm: of the gradient, likewise; None before the optimiser's step.
        figures: the method's, one vector [f] or rows [n, f], or none.
    """

    loss: Tensor
    squared_norm: Tensor | None
    figures: tuple[Tensor, ...]
    names: tuple[str, ...]

    def parts(self) -> list[Tensor]:
        return [part for part in (self.loss, self.squared_norm, *self.figures) if part is not None]


class Pass(Protocol):
    """Forward and backward pass of a batch, ``collect``, and possibly the optimiser's step."""

    def __call__(self, batch: Batch, received: Received, *, collect: Callable[[], None] | None = None) -> Outcome: ...


def is_replayable(kind: type[Objective], network: nn.Module | None = None) -> bool | None:
    """Return whether recorded steps fit other batches, or None if the classes do not declare it.

    A user-defined ``network`` may compute on the host.
    """
    flag: bool | None = getattr(kind, "replayable", False)
    known = network is None or all(is_shipped(type(module)) for module in network.modules())
    return flag if known or flag is False else None


Play = Callable[[Iterable[Batch]], Iterator[Outcome]]
"""Takes batches through their steps, in order; an outcome may cover several batches."""


class Recorded(NamedTuple):
    """A recorded step.

    Attributes:
        tables: [rows, elements], from which a step reads the tensors of a batch.
        counter: int64 [1], the row of the next replay, which increments it.
        records: fp64 [rows, values], into which it writes a batch's figures.
        outcome: an outcome of one batch, for shapes and names.
        lasting: whether the step is independent of what the client received.
    """

    tables: list[Tensor]
    counter: Tensor
    records: Tensor
    replay: Callable[[], None]
    outcome: Outcome
    lasting: bool

    @property
    def rows(self) -> int:
        return len(self.records)

    def __call__(self, batches: Sequence[Batch]) -> Outcome:
        for table, tensors in zip(self.tables, zip(*map(_tensors, batches), strict=True), strict=True):
            torch.stack([in_memory(tensor) for tensor in tensors], out=table[: len(batches)])
        self.counter.zero_()
        for _ in batches:
            self.replay()
        loss, *columns = self.records[: len(batches)].clone().split([part.numel() for part in self.outcome.parts()], 1)
        squared = None if self.outcome.squared_norm is None else columns.pop(0)[:, 0]
        return self.outcome._replace(loss=loss[:, 0], squared_norm=squared, figures=tuple(columns))


class Graphs:
    """The recorded steps of a lane's clients on one GPU.

    All graphs share a pool of memory: they are never replayed side by side, and a graph's outcome is copied before
    another graph runs.

    Attributes:
        off: whether a step could not be recorded; then no other step is.
        held: see :meth:`hold`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.off = False
        self._of: tuple[Any, ...] = ()
        self._recorded: dict[Hashable, Recorded] = {}
        self._eager = Counter[Hashable]()
        self._values: dict[Hashable, int] = {}  # numbers in a batch's record
        self.held: dict[str, Tensor] = {}
        self._unrecordable: set[tuple[Any, type]] = set()  # networks and methods whose steps cannot be recorded
        self._compare: dict[Hashable, int] = {}  # batches on which an unverified step is still compared
        self._fleeting = False  # whether a step of this network and method depends on what was received
        self._last: Any = None  # kept, because torch frees a pool without graphs

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    @cached_property
    def _pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Work on a separate stream, after all earlier and before all later work of the current stream.

        The default stream cannot be recorded, and autograd adds up a parameter's gradient on the stream of its first
        use in a living graph. So eager passes run on the stream of the recorded ones.
        """
        outer = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outer.wait_stream(self._stream)

    @contextmanager
    def ahead(self) -> Iterator[Callable[[], None]]:
        """Work on the separate stream, after all earlier work of the current stream, which continues meanwhile.

        Yields a function that waits until the work is done.
        """
        done = torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield done.synchronize
            done.record(self._stream)

    def lasting(self) -> bool:
        return bool(self._recorded) and not self._fleeting

    def hold(self, name: str, tensor: Tensor) -> Tensor:
        """Copy a tensor to the address of the last one of its name and size, where recorded steps read it."""
        if (buffer := self.held.get(name)) is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            self.held[name] = buffer = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        return buffer.copy_(tensor)

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Record the GPU work that ``work`` starts, without running it.

        Returns a function that runs it, and ``work``'s result.
        """
        if self._last is None:
            torch.cuda.empty_cache()  # recorded passes cannot use memory that eager ones have freed
        graph, pool = torch.cuda.CUDAGraph(), self._pool
        collects, syncs = gc.isenabled(), torch.cuda.get_sync_debug_mode()
        try:
            gc.disable()  # a finaliser may call the driver, which ends the recording
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            _set_sync_debug_mode(2)  # an error instead of waiting, which would break the recording and torch's state
            result = work()
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        finally:
            _set_sync_debug_mode(syncs)
            if collects:
                gc.enable()
        graph.capture_end()
        self._last = graph
        return graph.replay, result

    @contextmanager
    def replaying(
        self,
        network: Trained,
        method: Objective,
        received: Received,
        run: Pass,
        sizes: Mapping[int, int],
        failed: Callable[[Exception], None],
        *,
        ahead: bool,
        settings: Hashable,
        unverified: bool = False,
    ) -> Iterator[Play]:
        """Yield a function that takes an exchange's batches through ``run``, in order, recording steps that pay.

        Args:
            sizes: number of batches of the exchange, by size.
            failed: called with the reason if a step cannot be recorded.
            ahead: whether batches may be made before ``run`` is done with earlier ones, with nothing between two steps.
            unverified: whether nobody declares that ``run`` can be recorded.
        """

        # Recordings hold addresses and settings, so any change makes all of them stale.
        addresses = tuple((name, tensor.data_ptr()) for name, tensor in self.held.items())
        of = (network, method, ahead, settings, addresses, *_state(network))
        if of != self._of:
            self._of, self._fleeting = of, False
            self._recorded.clear()
            self._eager.clear()
            self._values.clear()
            self._compare.clear()
        remaining, owner = dict(sizes), (network, type(method))
        self._compare = {key: max(1, count) for key, count in self._compare.items()}

        def find_recording(batch: Batch, key: Hashable) -> Recorded | None:
            size = len(batch.indices)
            remaining[size] = remaining.get(size, 0) - 1
            if (recording := self._recorded.pop(key, None)) is not None:
                self._recorded[key] = recording  # moved to the end, as the most recent
                return recording
            self._eager[key] += 1
            # Clients of few batches share a lasting recording, and only making it shows whether it lasts.
            worth = remaining[size] + 1 >= LEAST or (self._eager[key] > EAGER + LEAST and not self._fleeting)
            allowed = not self.off and owner not in self._unrecordable
            if allowed and key is not None and self._eager[key] > EAGER and worth and self._room():
                try:
                    if unverified:
                        self._check_repeats(run, batch, received, network, method)
                        self._compare[key] = COMPARED
                    self._recorded[key] = self._record(run, batch, received, network, self._values[key], ahead)
                except Exception as error:
                    give_up(error)
            return self._recorded.get(key)

        def give_up(error: Exception) -> None:
            # If code that declares itself recordable fails, no other step is tried.
            self._unrecordable.add(owner)
            self.off = self.off or not unverified
            failed(error)

        def play(batches: Iterable[Batch]) -> Iterator[Outcome]:
            waiting: list[Batch] = []
            step: Any = None
            last: Hashable = None
            for key, batch in ((_signature(batch, self.device), batch) for batch in batches):
                # Batches wait while the same recording fits, so that one table holds many.
                if waiting and key != last:
                    yield step(waiting)
                    waiting = []
                recording, last = find_recording(batch, key), key
                if recording is None:
                    outcome = run(batch, received)
                    self._values[key] = sum(part.numel() for part in outcome.parts())
                    yield outcome
                    continue
                if unverified and self._compare[key]:
                    self._compare[key] -= 1
                    outcome, is_same = self._compare_step(recording, run, batch, received, network)
                    yield outcome
                    if not is_same:
                        self._recorded.clear()
                        give_up(RuntimeError("a recorded step gives other numbers than the same step in Python"))
                    continue
                step = recording
                waiting.append(batch)
                if len(waiting) == step.rows:
                    yield step(waiting)
                    waiting = []
            if waiting:
                yield step(waiting)

        try:
            with self.stream():
                yield play
        finally:
            # A recording that reads what the client received is stale after the exchange.
            lasting = {key: recording for key, recording in self._recorded.items() if recording.lasting}
            if len(lasting) < len(self._recorded):
                self._fleeting = True
            if self._fleeting:  # the next recording may need an eager pass over the next message
                self._eager.clear()
            self._recorded = dict(list(lasting.items())[-MOST:])

    def _check_repeats(self, run: Pass, batch: Batch, received: Received, network: Trained, method: Objective) -> None:
        """Run a step twice, and undo it.

        Raises:
            RuntimeError: the runs differ, draw on the host or change attributes of the network or the method.
        """
        before = Snapshot(self._list_written(network), self.device)
        fields_before = {**hash_attributes(network.module), **hash_fields(method)}
        objects = [(thing, dict(vars(thing))) for thing in (*network.module.modules(), method)]
        try:
            outcome = run(batch, received)
            if moved := before.moved_generator():
                raise RuntimeError(f"it draws from the generator of {moved} on the host")
            fields_now = {**hash_attributes(network.module), **hash_fields(method)}
            if changed := [name for name, value in fields_now.items() if fields_before.get(name) != value]:
                raise RuntimeError(f"it changes {', '.join(changed)}")
            after = Snapshot(self._list_written(network), self.device)
            before.restore()
            if not (_same(outcome, run(batch, received)) and after.holds()):
                raise RuntimeError("it does not repeat its own bits")
        finally:
            before.restore()
            for thing, values in objects:
                vars(thing).clear()
                vars(thing).update(values)

    def _compare_step(
        self, step: Recorded, run: Pass, batch: Batch, received: Received, network: Trained
    ) -> tuple[Outcome, bool]:
        """Run a step in Python and recorded: return the first outcome, and whether the two agree."""
        before = Snapshot(self._list_written(network), self.device)
        outcome = run(batch, received)
        after = Snapshot(self._list_written(network), self.device)
        before.restore()
        is_same = _same(outcome, step([batch])) and after.holds()
        if not is_same:
            after.restore()
        return outcome, is_same

    def _list_written(self, network: Trained) -> list[Tensor]:
        return [*network.module.parameters(), *network.module.buffers(), *network.gradient_vectors, *self.held.values()]

    def _room(self) -> bool:
        if self.device.type != "cuda":
            return True
        return 2 * torch.cuda.memory_reserved(self.device) < torch.cuda.get_device_properties(self.device).total_memory

    def _record(
        self, run: Pass, batch: Batch, received: Received, network: Trained, values: int, ahead: bool
    ) -> Recorded:
        tensors = [in_memory(tensor) for tensor in _tensors(batch)]
        bytes_each = sum(tensor.nbytes for tensor in tensors)
        rows = max(1, min(AHEAD, AHEAD_BYTES // max(1, bytes_each))) if ahead else 1
        tables = [tensor.new_zeros(rows, len(tensor)) for tensor in tensors]
        counter = torch.zeros(1, dtype=torch.int64, device=self.device)
        marks = torch.arange(rows, device=self.device)[:, None]
        records = torch.zeros(rows, values, dtype=torch.float64, device=self.device)
        # A loss that reads these fails, instead of being replayed with one batch's values.
        unread: Any = {name: _Unread(f"batch.{name}") for name in ("indices", "phase", "epoch", "masks")}
        unread |= {} if batch.raw is None else {"raw": _Unread("batch.data")}
        drawn: dict[str, Any] = {name: _Unread(f'batch.drawn["{name}"]') for name in batch.drawn}
        drawn |= _constants(batch)
        watched = _Watched(received)

        def work() -> Outcome:
            inputs, targets, *drawn_tensors = (
                table.index_select(0, counter).as_strided(like.shape, dense_stride(like))
                for table, like in zip(tables, _tensors(batch), strict=True)
            )
            draws = {**drawn, **dict(zip(_drawn_tensors(batch), drawn_tensors, strict=True))}
            static = replace(batch, inputs=inputs, targets=targets, drawn=draws, **unread)
            with _separate_gradients(network.trained_parameters) as collect:
                outcome = run(static, cast(Received, watched), collect=collect)
            row = torch.cat([part.reshape(-1).double() for part in outcome.parts()])
            torch.where(marks == counter, row, records, out=records)
            counter.add_(1)
            return outcome

        replay, outcome = self.record(work)
        return Recorded(tables, counter, records, replay, outcome, not watched.read)


def _same(left: Outcome, right: Outcome) -> bool:
    pairs = zip(left.parts(), right.parts(), strict=True)
    return left.names == right.names and all(
        has_same_bits(a.double().reshape(-1), b.double().reshape(-1)) for a, b in pairs
    )


class _Unread:
    """Placeholder of a non-tensor batch value that raises when read."""

    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    def _refuse(self, *_: object) -> NoReturn:
        raise RuntimeError(f"a recorded step cannot read {self.__dict__['_name']}")

    __getattr__ = __getitem__ = __eq__ = __bool__ = __index__ = __len__ = __iter__ = __lt__ = __gt__ = _refuse
    __add__ = __radd__ = __mul__ = __rmul__ = __mod__ = __float__ = __array__ = _refuse
    __hash__ = None  # type: ignore[assignment]


class _Watched:
    def __init__(self, received: Received) -> None:
        self._received, self.read = received, False

    def __getattr__(self, name: str) -> Any:
        self.read = True
        return getattr(self._received, name)


def _drawn_tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch.drawn.items() if isinstance(value, Tensor)}


def _tensors(batch: Batch) -> list[Tensor]:
    return [batch.inputs, batch.targets, *_drawn_tensors(batch).values()]


def _constants(batch: Batch) -> dict[str, bool | int | float | str]:
    return {name: value for name, value in batch.drawn.items() if isinstance(value, bool | int | float | str)}


def _signature(batch: Batch, device: torch.device) -> Hashable:
    """Return a key that is equal for batches of one recorded step, or None if no step can be recorded."""
    tensors = _tensors(batch)
    if not all(isinstance(tensor, Tensor) and tensor.device.type == device.type for tensor in tensors):
        return None  # tokens are no tensor, as long as the longest text of a batch
    shapes = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
    constants = tuple((name, type(value), repr(value)) for name, value in _constants(batch).items())
    return shapes, tuple(_drawn_tensors(batch)), tuple(batch.drawn), constants, batch.fresh


@contextmanager
def _separate_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[Callable[[], None]]:
    """Make a backward pass leave separate gradients, which the yielded function adds to the old ones at once.

    Otherwise each is added by its own kernel.
    """
    flat = [parameter.grad for parameter in parameters]

    def put_back() -> None:
        for parameter, gradient in zip(parameters, flat, strict=True):
            parameter.grad = gradient

    def collect() -> None:
        pairs = [(old, own.grad) for old, own in zip(flat, parameters, strict=True) if own.grad is not None]
        put_back()
        if pairs:
            foreach_add_([old for old, _ in pairs], [new for _, new in pairs])

    for parameter in parameters:
        parameter.grad = None
    try:
        yield collect
    finally:
        put_back()


def _state(network: Trained) -> tuple[object, ...]:
    """Return what a recorded step has fixed of the network and the process, besides tensor values."""
    layers = list(network.module.modules())
    modules = tuple((id(module), module.training, getattr(module, "track_running_stats", None)) for module in layers)
    tensors = tuple(
        (id(tensor), tensor.data_ptr(), tensor.requires_grad)
        for module in layers
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )
    return reduced_dtype(), network.gradients.data_ptr(), modules, tensors


def _set_sync_debug_mode(mode: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode(mode)
