"""What fedkern uses of torch that is not public, all in this file.

torch may rename, drop or change such names in any release.  Where one is missing, every operator runs its reference
(:data:`PROBLEM`), where torch itself takes care of gradients, transforms, modes and compilers; public calls in the
names' places keep the rest running.  What would compute wrong numbers or read wrong memory if torch
changed it is tried on tiny tensors at its first use: the table of tensors, a GPU's stream, oneDNN's convolutions,
Adam's fused steps and the backward pass.
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

from fedkern.ops._core.loading import Unsuited, tell

# The logger of the ONNX exporter's lines on packages that it has not found; under another name they are shown.
ONNX_LOG = "torch.onnx._internal.exporter._registration"
_missing: list[str] = []


def _find(name: str, instead: Any) -> Any:
    """``torch.<name>``; ``instead`` where torch has no such name, and then no kernel serves."""
    try:
        return operator.attrgetter(name)(torch)
    except AttributeError:
        _missing.append(name)
        return instead


def _no(*_: Any) -> bool:
    return False


# The order in which attention on a GPU tries its kernels; torch says it by a context manager alone.

sdp_order: Callable[[], list[int]] = getattr(torch._C, "_get_sdp_priority_order", list)
set_sdp_order: Callable[[list[int]], Any] = getattr(torch._C, "_set_sdp_priority_order", _no)

# Names that tell what is between a call and its tensors' memory.

is_tracing: Callable[[], bool] = _find("_C._is_tracing", _no)
"""Whether ``torch.jit.trace`` is recording."""

functorch_active: Callable[[], bool] = _find("_C._are_functorch_transforms_active", _no)
"""Whether a torch.func transform is active; False where that cannot be told (see :data:`may_be_transformed`)."""

dispatch_modes: Callable[[], int] = _find("_C._len_torch_dispatch_stack", _no)
"""Number of active dispatch modes."""

_function_modes: Callable[[], int] = _find("_C._len_torch_function_stack", _no)
_function_mode: Callable[[int], Any] | None = getattr(torch._C, "_get_function_stack_at", None)


def function_modes() -> bool:
    """Whether a torch-function mode is active.

    A default device (``torch.set_default_device``, ``with torch.device(...)``) does not count: operators name the
    device of every tensor that they make.
    """
    count = _function_modes()
    if not count or _function_mode is None:
        return bool(count)
    return any(type(_function_mode(i)).__module__ != "torch.utils._device" for i in range(count))


is_legacy_batched: Callable[[Tensor], bool] = _find("_C._functorch.is_legacy_batchedtensor", _no)
"""Whether ``is_grads_batched=True`` made a tensor."""

is_batched: Callable[[Tensor], bool] = _find("_C._functorch.is_batchedtensor", _no)
"""Whether torch.func.vmap maps over a tensor."""

unwrapped: Callable[[Tensor], Tensor] = _find("_C._functorch.get_unwrapped", lambda _: torch.ones(1))
"""What a tensor holds that vmap maps over; what stands in is mapped over by nothing and has no tangent."""

outlived: Callable[[Tensor], bool] = _find("_C._functorch.is_dead_tensor_wrapper", _no)
"""Whether a tensor outlived its torch.func transform.  Autograd and the dispatcher unwrap it; its pointer raises."""

_level = _find("autograd.forward_ad._current_level", None)
_NO_LEVEL = SimpleNamespace(_current_level=-1, unpack_dual=torch.autograd.forward_ad.unpack_dual)
forward_ad: Any = _NO_LEVEL if _level is None else torch.autograd.forward_ad
"""torch.autograd.forward_ad; ``_current_level`` is -1 outside of forward-mode AD."""

_guard, _included, _excluded = (
    _find(f"_C.{name}", None)
    for name in ("_ForceDispatchKeyGuard", "_dispatch_tls_local_include_set", "_dispatch_tls_local_exclude_set")
)


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Lets autograd record a graph inside an operator's implementation.

    The dispatcher excludes autograd before it calls an implementation, and ``torch.enable_grad`` alone does not bring
    autograd back.  Without this context a backward operator that differentiates the reference would find no graph under
    ``torch.compile``.
    """
    keys, excluded = torch._C.DispatchKey, _excluded()
    for key in (keys.AutogradCPU, keys.AutogradCUDA, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    with _guard(_included(), excluded), torch.enable_grad():
        yield


saved_hooks: Callable[[bool], Any] = _find("_C._autograd._top_saved_tensors_default_hooks", lambda _: None)
"""The hooks of saved tensors that are active, as those of torch.utils.checkpoint; None without any."""

WithoutTorchFunction: Any = _find("_C.DisableTorchFunctionSubclass", contextlib.nullcontext)
"""A context in which subclasses of Tensor are taken as tensors."""


# Names with a public call in their place.

_apply = _find("_C._FunctionBase.apply", None)


def apply_of(function: Any) -> Callable[..., Any]:
    """``apply`` of an ``autograd.Function`` without its search for transforms."""
    return function.apply if _apply is None else super(torch.autograd.Function, function).apply


graph_is_retained: Callable[[], bool] = _find("_C._autograd._get_current_graph_task_keep_graph", lambda: True)
"""Whether the backward pass under way may be repeated; True outside of one."""

increment_version: Callable[[Sequence[Tensor]], None] = _find(
    "_C._increment_version", torch.autograd.graph.increment_version
)
"""Takes several tensors; torch.autograd.graph.increment_version adds a check to each call."""

flatten_dense: Callable[[Sequence[Tensor]], Tensor] = _find(
    "_utils._flatten_dense_tensors", lambda tensors: torch.cat([tensor.reshape(-1) for tensor in tensors])
)
"""Joins contiguous tensors into one vector."""


def _add(tensors: Sequence[Tensor], others: Sequence[Tensor], *, alpha: float) -> list[Tensor]:
    return [tensor.add(other, alpha=alpha) for tensor, other in zip(tensors, others, strict=True)]


def _add_(tensors: Sequence[Tensor], others: Sequence[Tensor] | float, *, alpha: float = 1) -> None:
    all_: Sequence[Any] = others if isinstance(others, Sequence) else [others] * len(tensors)
    for tensor, other in zip(tensors, all_, strict=True):
        tensor.add_(other, alpha=alpha)


foreach_add: Callable[..., Sequence[Tensor]] = _find("_foreach_add", _add)
foreach_add_: Callable[..., None] = _find("_foreach_add_", _add_)

PROBLEM = (
    f"kernels need what torch {torch.__version__} lacks ({', '.join(f'torch.{name}' for name in _missing)})"
    if _missing
    else ""
)
"""Why no kernel may serve with this torch, or ""."""

may_be_transformed: Callable[[], bool] = (lambda: True) if PROBLEM else functorch_active
"""Whether a torch.func transform may be active: always where kernels cannot tell."""


# What is tried at its first use, because with another meaning it would compute wrong numbers.


def _changed(name: str) -> str:
    """The end of a sentence that names what this torch has changed."""
    return f"torch.{name}, which torch {torch.__version__} lacks or has changed"


def _adam(
    decoupled: bool, parameters: Sequence[Tensor], gradients: Sequence[Tensor], means: Sequence[Tensor],
    squares: Sequence[Tensor], largest: Sequence[Tensor], steps: Sequence[Tensor], *, lr: float, beta1: float,
    beta2: float, weight_decay: float, eps: float, amsgrad: bool = False, maximize: bool = False,
) -> None:  # fmt: skip
    """One step of Adam or, with ``decoupled``, of AdamW by public calls, as ``torch._fused_adam_`` takes it.

    Rounds otherwise than the fused step does.
    """
    for x, given, m, v, step in zip(parameters, gradients, means, squares, steps, strict=True):
        count, gradient = step.item(), given
        if decoupled:
            x.mul_(1 - lr * weight_decay)
        elif weight_decay:
            gradient = gradient.add(x, alpha=weight_decay)
        m.lerp_(gradient, 1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        x.addcdiv_(m, v.sqrt().div_((1 - beta2**count) ** 0.5).add_(eps), value=-lr / (1 - beta1**count))


def _steps_alike(*adams: Callable[..., None]) -> bool:
    """Whether two functions do the same over two steps with weight decay."""
    both = []
    for step in adams:
        x, m, v, count = (torch.full((1,), value, dtype=torch.float32, device="cpu") for value in (1, 0, 0, 0))
        for gradient in (0.5, -2.0):
            count += 1
            step([x], [torch.full_like(x, gradient)], [m], [v], [], [count], lr=0.1, beta1=0.9, beta2=0.99,
                 weight_decay=0.5, eps=1e-8, amsgrad=False, maximize=False)  # fmt: skip
        both.append((x.item(), m.item(), v.item()))
    return all(abs(a - b) < 1e-5 for a, b in zip(*both, strict=True))


@functools.cache
def fused_adam(decoupled: bool) -> Callable[..., None]:
    """torch's fused step of Adam or, with ``decoupled``, of AdamW; public calls where this torch has another."""
    name, plain = "_fused_adamw_" if decoupled else "_fused_adam_", functools.partial(_adam, decoupled)
    fused: Callable[..., None] | None = getattr(torch, name, None)
    with contextlib.suppress(Exception), torch.inference_mode(False), torch.no_grad():
        if fused is not None and _steps_alike(fused, plain):
            return fused
    tell(f"slower public calls stand in for {_changed(name)}")
    return plain


@functools.cache
def _engine() -> Callable[[Tensor], None]:
    """The backward pass of a scalar; ``Tensor.backward`` where this torch has another engine."""
    with contextlib.suppress(Exception), torch.inference_mode(False), torch.enable_grad():
        run = torch.autograd.Variable._execution_engine.run_backward

        def passes(loss: Tensor) -> None:
            run((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)

        x = torch.ones((), dtype=torch.float32, device="cpu", requires_grad=True)
        passes(3 * x)
        if x.grad is not None and x.grad.item() == 3:
            return passes
    tell(f"slower public calls stand in for {_changed('autograd.Variable._execution_engine.run_backward')}")
    return Tensor.backward


def backward(loss: Tensor) -> None:
    """``loss.backward()``; of a scalar without the checks around the engine, which take 45 us of a training step."""
    (_engine() if type(loss) is Tensor and not loss.dim() else Tensor.backward)(loss)


raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""Number of torch's current stream on a GPU, in a tenth of the time that torch.cuda takes; None without CUDA."""


def check_stream() -> None:
    """Raises :class:`Unsuited` where :data:`raw_stream` is not what torch.cuda says."""
    if raw_stream is not None and torch.version.cuda and torch.cuda.is_available():
        index = torch.cuda.current_device()
        if raw_stream(index) != torch.cuda.current_stream(index).cuda_stream:
            raise Unsuited(f"kernels need {_changed('_C._cuda_getCurrentRawStream')}")


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
    with contextlib.suppress(Exception):
        convolve = torch.ops.mkldnn._convolution_pointwise
        fused = OneDNN(torch.ops.mkldnn._reorder_convolution_weight, convolve, convolve.binary)
        if _convolves(fused, 2):
            with contextlib.suppress(RuntimeError):
                return fused._replace(narrow=_convolves(fused, 1))
            return fused
    tell(f"slower public calls stand in for {_changed('ops.mkldnn._convolution_pointwise')}")
    return None


def _convolves(fused: OneDNN, channels: int) -> bool:
    """Whether convolutions to so many channels are those of conv2d."""
    how = [0, 0], [1, 1], [1, 1], 1
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        x = torch.arange(-8.0, 8.0, device="cpu", dtype=torch.float32).view(1, 4, 2, 2)
        x = x.contiguous(memory_format=torch.channels_last)
        weight, bias = x.new_tensor([1, -2, 3, 0.5] * channels).view(channels, 4, 1, 1), x.new_tensor([3.0] * channels)
        expected, ready = F.conv2d(x, weight, bias), fused.reorder(weight, *how, list(x.shape))
        plain = fused.convolve(x, ready, bias, *how, "none", [], "")
        summed = fused.convolve_and_add(x, expected, ready, bias, *how, "add", None, "relu", [], None)
        return torch.allclose(plain, expected) and torch.allclose(summed, (2 * expected).relu())


# The table of functions through which compiled cores read tensors (csrc/bindings/exchange.h).


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
    """Tensors to try the table on; none where a transform or a mode is active, which would make others."""
    if dispatch_modes() or functorch_active():
        return []
    with torch.inference_mode(False):
        base = torch.zeros(4, 6, dtype=torch.float16, device="cpu")
        return [base[1:, 2::2], base.to(torch.float64).t()]


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
    for x in _samples():
        view = _View()
        try:
            failed = _READ(table.view)(x, ctypes.byref(view))
        except Exception:
            failed = True
        if failed:
            return "it fails on a tensor of the CPU"
        names = "data", "byte_offset", "device_type", "dims", "code", "bits", "vector"
        found = tuple(getattr(view, name) for name in names)
        # On the CPU (1), floating (2), one value an element.
        expected: tuple[Any, ...] = (x.data_ptr(), 0, 1, x.dim(), 2, 8 * x.element_size(), 1)
        shape = tuple(view.shape[: x.dim()]) if view.shape else ()
        strides = tuple(view.strides[: x.dim()]) if view.strides else ()
        if (*found, shape, strides) != (*expected, tuple(x.shape), x.stride()):
            return "it describes a small tensor wrongly"
    return ""
