"""All private names of torch that fedkern uses, present in torch 2.11 to 2.15.

Names that would give wrong numbers or memory if torch changed them are tried at their first use.
"""

import contextlib
import ctypes
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.errors import UserError
from fedkern.ops._core.loading import Unsuited

# The logger of the ONNX exporter's lines on packages that it has not found; under another name they are shown.
ONNX_LOG = "torch.onnx._internal.exporter._registration"


def _find(name: str) -> Any:
    try:
        return operator.attrgetter(name)(torch)
    except AttributeError:
        raise UserError(
            f"fedkern uses torch.{name}, which torch {torch.__version__} lacks: install a torch from 2.11 to 2.15."
        ) from None


PYTREE_NODES: dict[Any, Any] = _find("utils._pytree.SUPPORTED_NODES")
"""Functions that flatten and unflatten containers, by type: Python's types, and types that libraries register."""
REGISTER_NODE = "torch.utils._pytree.register_pytree_node"
"""The function that registers another type, for messages."""

sdp_order: Callable[[], list[int]] = _find("_C._get_sdp_priority_order")
set_sdp_order: Callable[[list[int]], Any] = _find("_C._set_sdp_priority_order")
"""The order in which attention on a GPU tries its kernels; torch sets it by a context manager alone."""

# What stands between a call and its tensors' memory.

is_tracing: Callable[[], bool] = _find("_C._is_tracing")
"""Whether ``torch.jit.trace`` is recording."""

functorch_active: Callable[[], bool] = _find("_C._are_functorch_transforms_active")
"""Whether a torch.func transform is active."""

dispatch_modes: Callable[[], int] = _find("_C._len_torch_dispatch_stack")
"""Number of active dispatch modes."""

_function_modes: Callable[[], int] = _find("_C._len_torch_function_stack")
_function_mode: Callable[[int], Any] = _find("_C._get_function_stack_at")


def function_modes() -> bool:
    """Return whether a torch-function mode is active, other than a default device.

    A default device does not count: operators name the device of every tensor that they make.
    """
    count = _function_modes()  # asked at every call of an operator, and nearly always 0
    return count > 0 and any(type(_function_mode(i)).__module__ != "torch.utils._device" for i in range(count))


is_legacy_batched: Callable[[Tensor], bool] = _find("_C._functorch.is_legacy_batchedtensor")
"""Whether ``is_grads_batched=True`` made a tensor."""

is_batched: Callable[[Tensor], bool] = _find("_C._functorch.is_batchedtensor")
"""Whether torch.func.vmap maps over a tensor."""

is_wrapped: Callable[[Tensor], bool] = _find("_C._functorch.is_functorch_wrapped_tensor")
"""Whether a tensor belongs to a torch.func transform."""

unwrapped: Callable[[Tensor], Tensor] = _find("_C._functorch.get_unwrapped")
"""The tensor inside a tensor of a torch.func transform."""

outlived: Callable[[Tensor], bool] = _find("_C._functorch.is_dead_tensor_wrapper")
"""Whether a tensor outlived its torch.func transform. Autograd and the dispatcher unwrap it; its pointer raises."""

_find("autograd.forward_ad._current_level")
forward_ad: Any = torch.autograd.forward_ad
"""torch.autograd.forward_ad; ``_current_level`` is -1 outside of forward-mode AD."""

_guard, _included, _excluded = (
    _find(f"_C.{name}")
    for name in ("_ForceDispatchKeyGuard", "_dispatch_tls_local_include_set", "_dispatch_tls_local_exclude_set")
)


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Let autograd record a graph inside an operator's implementation.

    The dispatcher excludes autograd before it calls an implementation, and ``torch.enable_grad`` alone does not bring
    it back.
    """
    keys, excluded = torch._C.DispatchKey, _excluded()
    for key in (keys.AutogradCPU, keys.AutogradCUDA, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    with _guard(_included(), excluded), torch.enable_grad():
        yield


saved_hooks: Callable[[bool], Any] = _find("_C._autograd._top_saved_tensors_default_hooks")
"""The active hooks of saved tensors, such as torch.utils.checkpoint's, or None."""

WithoutTorchFunction: Any = _find("_C.DisableTorchFunction")
"""A context in which subclasses of Tensor are taken as tensors, and modes see nothing."""


# Names that do what public ones do, with less around it.


def apply_of(function: Any) -> Callable[..., Any]:
    """Return ``apply`` of an ``autograd.Function`` without its search for transforms."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply
    return apply


graph_is_retained: Callable[[], bool] = _find("_C._autograd._get_current_graph_task_keep_graph")
"""Whether the backward pass under way may be repeated; True outside of one."""

throw_on_data_ptr: Callable[[Tensor], None] = _find("_C._set_throw_on_mutable_data_ptr")
"""Make every read of a tensor's address raise, as for torch's fake tensors."""
increment_version: Callable[[Sequence[Tensor]], None] = _find("_C._increment_version")
"""Takes several tensors; torch.autograd.graph.increment_version adds a check to each call."""

foreach_add: Callable[..., Sequence[Tensor]] = _find("_foreach_add")
foreach_add_: Callable[..., None] = _find("_foreach_add_")

fused_adam: Callable[..., None] = _find("_fused_adam_")
fused_adamw: Callable[..., None] = _find("_fused_adamw_")
"""One step of many tensors, as torch.optim's with ``fused=True``."""

_run_backward: Callable[..., Any] = _find("autograd.Variable._execution_engine.run_backward")


def backward(loss: Tensor) -> None:
    """Call ``loss.backward()``, for a scalar without the engine's checks (45 us of a step)."""
    if type(loss) is Tensor and not loss.dim():
        _run_backward((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)
    else:
        Tensor.backward(loss)


# Names that are tried at their first use: with another meaning they would compute wrong numbers.

raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""Number of torch's current stream on a GPU, in a tenth of the time that torch.cuda takes; None without CUDA."""


def check_stream() -> None:
    """Raise :class:`Unsuited` if :data:`raw_stream` differs from torch.cuda's stream."""
    if raw_stream is not None and torch.version.cuda and torch.cuda.is_available():
        index = torch.cuda.current_device()
        if raw_stream(index) != torch.cuda.current_stream(index).cuda_stream:
            raise Unsuited(f"torch {torch.__version__} has changed torch._C._cuda_getCurrentRawStream")


# The table of functions through which compiled cores read tensors (csrc/bindings/exchange.h).


class _View(ctypes.Structure):
    """DLPack's description of a tensor, as ``TensorView`` of csrc/bindings/exchange.h."""

    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_index", ctypes.c_int32),
        ("dims", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("vector", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


_READ = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(_View))


class _Table(ctypes.Structure):
    """``ExchangeTable`` of csrc/bindings/exchange.h."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        *((name, ctypes.c_void_p) for name in ("older", "allocate", "from_object", "to_object", "view", "stream")),
    ]


# With a separate prototype: the functions of ctypes.pythonapi are shared by all of the process.
_POINTER = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _samples() -> list[Tensor]:
    """Return tensors to try the table on, none under a transform or mode."""
    if dispatch_modes() or functorch_active():
        return []
    with torch.inference_mode(False):
        base = torch.zeros(4, 6, dtype=torch.float16, device="cpu")
        return [base[1:, 2::2], base.to(torch.float64).t()]


def exchange_table() -> object:
    """Return the capsule with torch's table of functions for C extensions, tried on a small tensor.

    A core reads tensors through this table alone, so that one build works with every torch whose table is of DLPack's
    major version 1.

    Raises:
        Unsuited: this torch has no such table, or the table describes tensors otherwise.
    """
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        raise Unsuited(f"torch {torch.__version__} shows no tensors to C extensions, as 2.11 and newer do")
    if problem := table_problem(capsule):
        raise Unsuited(
            f"torch {torch.__version__} shows tensors to C extensions otherwise than fedkern reads them: {problem}"
        )
    return capsule


def table_problem(capsule: object) -> str:
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
        values = tuple(getattr(view, name) for name in names)
        # On the CPU (1), floating (2), one value an element.
        expected: tuple[Any, ...] = (x.data_ptr(), 0, 1, x.dim(), 2, 8 * x.element_size(), 1)
        shape, strides = (tuple(axes[: x.dim()]) if axes else () for axes in (view.shape, view.strides))
        if (*values, shape, strides) != (*expected, tuple(x.shape), x.stride()):
            return "it describes a small tensor wrongly"
    return ""
