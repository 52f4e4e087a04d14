"""What fedkern uses of torch that is not public: all in this file, each name tried when the file is imported.

torch may rename or change such names in any release.  Every name is looked up once and tried on a tensor of one
element; all of it takes about a millisecond.  A name that is missing or answers otherwise has a stand-in:

* Where a public call gives the same results, more slowly, that call stands in (:data:`REPLACED`).
* Names that tell ordinary calls from others have none.  Without one of them every operator runs its reference
  (:data:`PROBLEM`), through ``torch.library``, where torch itself takes care of transforms, modes and compilers.

No backward pass runs here: where a GPU is, it would start threads of autograd, and a process with those cannot fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedkern.ops._core.loading import Unsuited, tell

# By name, what is wrong with it: with names that kernels need, and with names that a public call replaces.
_needed: dict[str, str] = {}
_replaced: dict[str, str] = {}


def _find(name: str) -> Any:
    """``torch.<name>``, or None."""
    try:
        return operator.attrgetter(name)(torch)
    except AttributeError:
        return None


def _watched() -> bool:
    """Whether a compiler, a transform or a mode is active, so that trying a name would tell nothing."""
    modes, active = _find("_C._len_torch_dispatch_stack"), _find("_C._are_functorch_transforms_active")
    level = getattr(torch.autograd.forward_ad, "_current_level", -1)
    return bool(torch.compiler.is_compiling() or level >= 0 or (modes and modes()) or (active and active()))


def _take(name: str, works: Callable[[Any], Any], stand_in: Any, wrong: dict[str, str], use: Any = None) -> Any:
    """Returns ``torch.<name>`` if ``works`` says so of it, else ``stand_in``.

    Args:
        name: dotted name below ``torch``.
        works: tries what was found.  An exception counts as a failure.
        stand_in: what is returned otherwise.
        wrong: receives what is wrong, by name.
        use: a function of this file that uses the name; returned in its place.
    """
    found = _find(name)
    if found is None:
        wrong[name] = "is not there"
        return stand_in
    try:
        with torch.inference_mode(False), torch.enable_grad():
            right = _watched() or works(found)
    except Exception as error:
        wrong[name] = f"raises {type(error).__name__}"
        return stand_in
    if not right:
        wrong[name] = "does something else now"
        return stand_in
    return found if use is None else use


def _one(requires_grad: bool = False) -> Tensor:
    return torch.ones(1, dtype=torch.float32, device="cpu", requires_grad=requires_grad)


def _no(_: Any = None) -> bool:
    return False


def _zero() -> int:
    return 0


# 1. Names that kernels need.  They tell what is between a call and its tensors' memory.


def _transformed(look: Callable[[Tensor], Any]) -> tuple[Any, Tensor | None]:
    """What ``look`` says inside of a torch.func transform about a tensor there; and that tensor, which outlived it.

    The tensor is None where torch has not the tools by which this can be tried without a backward pass.
    """
    names = ("_grad_increment_nesting", "_grad_decrement_nesting", "_wrap_for_grad")
    enter, leave, wrap = (_find(f"_C._functorch.{name}") for name in names)
    if None in (enter, leave, wrap):
        return None, None
    outside, level = _one(), enter()
    try:
        inside = wrap(outside, level)
        return look(inside), inside
    finally:
        leave()


def _sees_transforms(active: Callable[[], bool]) -> bool:
    seen, inside = _transformed(lambda _: active())
    return active() is False and (inside is None or seen is True)


def _knows_the_dead(dead: Callable[[Tensor], bool]) -> bool:
    seen, kept = _transformed(dead)
    return dead(_one()) is False and (kept is None or (seen is False and dead(kept) is True))


def _counts_dispatch_modes(modes: Callable[[], int]) -> bool:
    mode = _find("utils._python_dispatch.TorchDispatchMode")
    if mode is None:
        return modes() == 0
    with mode():
        inside = modes()
    return inside == 1 and modes() == 0


def _counts_function_modes(modes: Callable[[], int]) -> bool:
    before = modes()  # torch.set_default_device is such a mode
    with TorchFunctionMode():
        inside = modes()
    return inside == before + 1 and modes() == before


def _knows_former_batches(batched: Callable[[Tensor], bool]) -> bool:
    former, seen = _find("_vmap_internals._vmap"), list[bool]()

    def look(x: Tensor) -> Tensor:
        seen.append(batched(x) or functorch_active())
        return x

    if former is not None:  # what is_grads_batched=True maps by
        former(look)(_one())
    return batched(_one()) is False and all(seen)


def _mapped(look: Callable[[Tensor], Any]) -> Any:
    """What ``look`` says of a tensor inside of torch.func.vmap; True where torch has not the tools to make one."""
    names = ("_vmap_increment_nesting", "_vmap_decrement_nesting", "_add_batch_dim")
    enter, leave, add = (_find(f"_C._functorch.{name}") for name in names)
    if None in (enter, leave, add):
        return True
    outside, level = _one(), enter(1, "error")
    try:
        return look(add(outside, 0, level))
    finally:
        leave()


def _counts_levels(module: Any) -> bool:
    before = module._current_level
    with module.dual_level():
        inside = module._current_level
    return (before, inside, module._current_level) == (-1, 0, -1)


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    keys = torch._C.DispatchKey
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradCPU, keys.AutogradCUDA, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _records(_: Any) -> bool:
    below, x = _find("_C._AutoDispatchBelowAutograd"), _one(requires_grad=True)
    with below() if below is not None else contextlib.nullcontext(), torch.no_grad(), _recording():
        y = x * 2
    return y.requires_grad


functorch_active: Callable[[], bool] = _take("_C._are_functorch_transforms_active", _sees_transforms, _no, _needed)
"""Whether a torch.func transform is active; False where that cannot be told (see :data:`may_be_transformed`)."""

dispatch_modes: Callable[[], int] = _take("_C._len_torch_dispatch_stack", _counts_dispatch_modes, _zero, _needed)
"""Number of active dispatch modes."""

function_modes: Callable[[], int] = _take("_C._len_torch_function_stack", _counts_function_modes, _zero, _needed)
"""Number of active torch-function modes."""

is_legacy_batched: Callable[[Tensor], bool] = _take(
    "_C._functorch.is_legacy_batchedtensor", _knows_former_batches, _no, _needed
)
"""Whether ``is_grads_batched=True`` made a tensor."""

is_batched: Callable[[Tensor], bool] = _take(
    "_C._functorch.is_batchedtensor", lambda f: f(_one()) is False and _mapped(f) is True, _no, _needed
)
"""Whether torch.func.vmap maps over a tensor."""

unwrapped: Callable[[Tensor], Tensor] = _take(
    "_C._functorch.get_unwrapped",
    lambda f: _mapped(lambda x: f(x).shape == (1,) and not is_batched(f(x))),
    lambda _: _one(),  # mapped over by nothing, and without a tangent
    _needed,
)
"""What a tensor holds that vmap maps over."""

outlived: Callable[[Tensor], bool] = _take("_C._functorch.is_dead_tensor_wrapper", _knows_the_dead, _no, _needed)
"""Whether a tensor outlived its torch.func transform.  Autograd and the dispatcher unwrap it; its pointer raises."""

_NO_LEVEL = SimpleNamespace(_current_level=-1, unpack_dual=torch.autograd.forward_ad.unpack_dual)
forward_ad: Any = _take("autograd.forward_ad", _counts_levels, _NO_LEVEL, _needed)
"""torch.autograd.forward_ad; ``_current_level`` is -1 outside of forward-mode AD."""

recording: Callable[[], contextlib.AbstractContextManager[Any]] = _take(
    "_C._ForceDispatchKeyGuard", _records, torch.enable_grad, _needed, _recording
)
"""Lets autograd record a graph inside an operator's implementation.

The dispatcher excludes autograd before it calls an implementation, and ``torch.enable_grad`` alone does not bring
autograd back.  Without this context a backward operator that differentiates the reference would find no graph under
``torch.compile``.
"""


# 2. Names with a public call in their place.


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factor: float, x: Tensor) -> Tensor:
        return x * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad * 2


def _direct(function: Any) -> Callable[..., Any]:
    return super(torch.autograd.Function, function).apply


def _applies(_: Any) -> bool:
    y = _direct(_Doubled)(2.0, _one(requires_grad=True))
    return y.requires_grad and y.item() == 2 and type(y.grad_fn).__name__ == "_DoubledBackward"


def _bumps(increment: Callable[[Sequence[Tensor]], None]) -> bool:
    x, y = _one(), _one()
    before = x._version, y._version
    increment([x, y])
    return (x._version, y._version) == (before[0] + 1, before[1] + 1)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _added(tensors: Sequence[Tensor], others: Sequence[Tensor], *, alpha: float = 1) -> list[Tensor]:
    return [tensor.add(other, alpha=alpha) for tensor, other in zip(tensors, others, strict=True)]


def _add(tensors: Sequence[Tensor], others: Sequence[Tensor] | float, *, alpha: float = 1) -> None:
    all_: Sequence[Any] = others if isinstance(others, Sequence) else [others] * len(tensors)
    for tensor, other in zip(tensors, all_, strict=True):
        tensor.add_(other, alpha=alpha)


def _adds_in_place(add: Callable[..., None]) -> bool:
    x = _one()
    add([x], [_one()], alpha=2)
    add([x], 1)
    return x.item() == 4


class Adam:
    """One step of Adam or, with ``decoupled``, of AdamW by public calls, as ``torch._fused_adam_`` takes it.

    Rounds otherwise than the fused step does.
    """

    def __init__(self, decoupled: bool) -> None:
        self.decoupled = decoupled

    def __call__(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], means: Sequence[Tensor],
        squares: Sequence[Tensor], largest: Sequence[Tensor], steps: Sequence[Tensor], *, lr: float, beta1: float,
        beta2: float, weight_decay: float, eps: float, amsgrad: bool = False, maximize: bool = False,
    ) -> None:  # fmt: skip
        for x, given, m, v, step in zip(parameters, gradients, means, squares, steps, strict=True):
            count, gradient = step.item(), given
            if self.decoupled:
                x.mul_(1 - lr * weight_decay)
            elif weight_decay:
                gradient = gradient.add(x, alpha=weight_decay)
            m.lerp_(gradient, 1 - beta1)
            v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            x.addcdiv_(m, v.sqrt().div_((1 - beta2**count) ** 0.5).add_(eps), value=-lr / (1 - beta1**count))


def _steps(adam: Callable[..., None], decoupled: bool) -> bool:
    """Whether ``adam`` does what the formula says, over two steps with weight decay."""
    both = []
    for step in (adam, Adam(decoupled)):
        x, m, v, count = _one(), _one() * 0, _one() * 0, _one() * 0
        for gradient in (0.5, -2.0):
            count += 1
            with torch.no_grad():
                step([x], [_one() * gradient], [m], [v], [], [count], lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.5,
                     eps=1e-8, amsgrad=False, maximize=False)  # fmt: skip
        both.append((x.item(), m.item(), v.item()))
    return all(abs(a - b) < 1e-5 for a, b in zip(*both, strict=True))


is_tracing: Callable[[], bool] = _take(
    "_C._is_tracing", lambda f: f() is False, _find("jit.is_tracing") or _no, _replaced
)
"""Whether ``torch.jit.trace`` is recording."""

apply_of: Callable[[Any], Callable[..., Any]] = _take(
    "_C._FunctionBase.apply", _applies, operator.attrgetter("apply"), _replaced, _direct
)
"""``apply`` of an ``autograd.Function`` without its search for transforms."""

graph_is_retained: Callable[[], bool] = _take(
    "_C._autograd._get_current_graph_task_keep_graph", lambda f: f() is True, lambda: True, _replaced
)
"""Whether the backward pass under way may be repeated; True outside of one."""

increment_version: Callable[[Sequence[Tensor]], None] = _take(
    "_C._increment_version", _bumps, torch.autograd.graph.increment_version, _replaced
)
"""Takes several tensors; torch.autograd.graph.increment_version adds a check to each call."""

flatten_dense: Callable[[Sequence[Tensor]], Tensor] = _take(
    "_utils._flatten_dense_tensors", lambda f: f([_one(), _one()]).tolist() == [1, 1], _joined, _replaced
)
"""Joins contiguous tensors into one vector."""

foreach_add: Callable[..., Sequence[Tensor]] = _take(
    "_foreach_add", lambda f: f([_one()], [_one()], alpha=2)[0].item() == 3, _added, _replaced
)
foreach_add_: Callable[..., None] = _take("_foreach_add_", _adds_in_place, _add, _replaced)
fused_adam_: Callable[..., None] = _take("_fused_adam_", lambda f: _steps(f, False), Adam(False), _replaced)
fused_adamw_: Callable[..., None] = _take("_fused_adamw_", lambda f: _steps(f, True), Adam(True), _replaced)


def _stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


def _raw_stream() -> Callable[[int], int] | None:
    found = _find("_C._cuda_getCurrentRawStream")
    if found is not None or torch.version.cuda is None:
        return found
    _replaced["_C._cuda_getCurrentRawStream"] = "is not there"
    return _stream


raw_stream: Callable[[int], int] | None = _raw_stream()
"""Number of torch's current stream on a GPU, in a tenth of the time that torch.cuda takes; None without CUDA."""


def check_stream() -> None:
    """Raises :class:`Unsuited` where :data:`raw_stream` is not what torch.cuda says.

    Not tried on import, where CUDA must not be started.
    """
    if raw_stream is not None and torch.version.cuda and torch.cuda.is_available():
        index = torch.cuda.current_device()
        if raw_stream(index) != _stream(index):
            raise Unsuited(f"kernels need {changes({'_C._cuda_getCurrentRawStream': 'does something else now'})}")


class OneDNN(NamedTuple):
    """oneDNN's convolutions with what follows them, and the layout of their weights.

    Attributes:
        reorder: gives weights the layout that ``convolve`` reads fastest.
        convolve: a convolution and a ReLU.
        convolve_and_add: a convolution, a sum and a ReLU.
        narrow: whether ``convolve_and_add`` takes maps of one channel or one position; in torch 2.11 it does not.
    """

    reorder: Callable[..., Tensor]
    convolve: Callable[..., Tensor]
    convolve_and_add: Any
    narrow: bool = False


@functools.cache
def onednn() -> OneDNN | None:
    """oneDNN's fused convolutions; None where this torch has none, or others than fedkern knows."""
    if not torch.backends.mkldnn.is_available():
        return None
    name, wrong = "ops.mkldnn._convolution_pointwise", dict[str, str]()
    fused: OneDNN | None = _take(name, lambda _: _convolves(2), None, wrong, _fused())
    if fused is None:
        tell(slower(wrong))
        return None
    with contextlib.suppress(RuntimeError):
        return fused._replace(narrow=_convolves(1))
    return fused


def _fused() -> OneDNN | None:
    convolve, reorder = _find("ops.mkldnn._convolution_pointwise"), _find("ops.mkldnn._reorder_convolution_weight")
    return None if convolve is None else OneDNN(reorder, convolve, getattr(convolve, "binary", None))


def _convolves(channels: int) -> bool:
    """Whether convolutions to so many channels are those of conv2d."""
    fused, how = _fused(), ([0, 0], [1, 1], [1, 1], 1)
    assert fused is not None
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        x = torch.arange(-8.0, 8.0, device="cpu", dtype=torch.float32).view(1, 4, 2, 2)
        x = x.contiguous(memory_format=torch.channels_last)
        weight, bias = x.new_tensor([1, -2, 3, 0.5] * channels).view(channels, 4, 1, 1), x.new_tensor([3.0] * channels)
        expected, ready = F.conv2d(x, weight, bias), fused.reorder(weight, *how, list(x.shape))
        plain = fused.convolve(x, ready, bias, *how, "none", [], "")
        summed = fused.convolve_and_add(x, expected, ready, bias, *how, "add", None, "relu", [], None)
        return torch.allclose(plain, expected) and torch.allclose(summed, (2 * expected).relu())


# 3. The table of functions through which compiled cores read tensors (csrc/bindings/exchange.h).


class _View(ctypes.Structure):
    """DLPack's description of a tensor, as ``TensorView`` of csrc/bindings/exchange.h has it."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("dims", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("vector", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_READ = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(_View))


class _Table(ctypes.Structure):
    """``ExchangeTable`` of csrc/bindings/exchange.h."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        *((name, ctypes.c_void_p) for name in ("older", "allocate", "from_object", "to_object", "view", "stream")),
    ]


# With a prototype of its own: the functions of ctypes.pythonapi are shared by all of the process.
_POINTER = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _samples() -> list[Tensor]:
    """Tensors to try the table on, made on import: a mode that is active later would make others."""
    if _watched():
        return []
    with torch.inference_mode(False):
        base = torch.zeros(4, 6, dtype=torch.float16, device="cpu")
        return [base[1:, 2::2], base.to(torch.float64).t()]


_SAMPLES = _samples()


def exchange_table() -> object:
    """Returns the capsule with torch's table of functions for C extensions, tried on a small tensor.

    A core reads tensors through this table alone.  So one build serves every torch whose table is of DLPack's major
    version 1, which torch 2.11 and newer show.

    Raises:
        Unsuited: this torch has no such table, or the table describes tensors otherwise.
    """
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        raise Unsuited(f"torch {torch.__version__} shows no tensors to C extensions, as 2.11 and newer do")
    problem = table_problem(capsule)
    if problem:
        raise Unsuited(
            f"torch {torch.__version__} shows tensors to C extensions otherwise than fedkern reads them: {problem}"
        )
    return capsule


def table_problem(capsule: object) -> str:
    """What is wrong with an exchange table, or ""."""
    try:
        table = _Table.from_address(_POINTER(capsule, b"dlpack_exchange_api"))
    except ValueError:
        return "the table has another name"
    if table.major != 1:
        return f"the table is of DLPack {table.major}.{table.minor}, not 1"
    if not table.view:
        return "the table cannot describe tensors"
    for x in _SAMPLES:
        view = _View()
        try:
            failed = _READ(table.view)(x, ctypes.byref(view))
        except Exception:
            failed = True
        if failed:
            return "it fails on a tensor of the CPU"
        found: tuple[Any, ...] = (
            view.data,
            view.byte_offset,
            view.device_type,
            view.dims,
            view.code,
            view.bits,
            view.vector,
        )
        # On the CPU (1), floating (2), one value an element.
        expected: tuple[Any, ...] = (x.data_ptr(), 0, 1, x.dim(), 2, 8 * x.element_size(), 1)
        shape = tuple(view.shape[: x.dim()]) if view.shape else ()
        strides = tuple(view.strides[: x.dim()]) if view.strides else ()
        if (*found, shape, strides) != (*expected, tuple(x.shape), x.stride()):
            return "it describes a small tensor wrongly"
    return ""


def changes(wrong: dict[str, str]) -> str:
    """What is wrong with names of torch, as the end of a sentence."""
    named = "; ".join(f"torch.{name} {what}" for name, what in wrong.items())
    return f"what torch {torch.__version__} has changed ({named})"


def slower(wrong: dict[str, str]) -> str:
    """The sentence on names that public calls stand in for."""
    return f"slower public calls stand in for {changes(wrong)}"


PROBLEM = f"kernels need {changes(_needed)}" if _needed else ""
"""Why no kernel may serve with this torch, or ""."""

REPLACED = slower(_replaced) if _replaced else ""
"""Which slower public calls stand in for what, or ""."""

may_be_transformed: Callable[[], bool] = (lambda: True) if PROBLEM else functorch_active
"""Whether a torch.func transform may be active: always where kernels cannot tell."""
