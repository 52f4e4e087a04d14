"""Choice of the backend (reference, cpu, triton, cuda) of a call.

:func:`select` finds a kernel that fits a call's tensors, or the reference. ``FEDKERN_BACKEND`` or :func:`use_backend`
force a backend; a call without a kernel is then an error, unless the backend ``leaves`` the call to the reference on
purpose. ``FEDKERN_CPU_ISA`` or :func:`use_isa` force an ISA level of the CPU core. CUDA tensors use the CUDA core if
usable, else Triton.

``TRITON_INTERPRET=1``, set before the first call of Triton, lets a forced "triton" compute on CPU tensors.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedkern.ops._core import devices, private_torch
from fedkern.ops._core.loading import REBUILD, Unavailable, Unsuited, is_interpreted, load_core, load_triton, warn_once
from fedkern.ops._core.memory import cache
from fedkern.ops._core.private_torch import dispatch_modes, forward_ad, function_modes, functorch_active, outlived
from fedkern.ops._core.torchscript import refuse

BACKENDS = ("reference", "cpu", "triton", "cuda")
ISAS = ("portable", "avx2", "avx512")

# The numbers are those of csrc/include/fedkern/types.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# The dtypes of kernels that take floating tensors.
FLOATS = frozenset(DTYPES)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


# Looked up once: on small tensors the checks around a kernel take longer than the kernel.
_is_compiling = torch.compiler.is_compiling
_jit_traces = private_torch.is_tracing
_legacy_batched = private_torch.is_legacy_batched
_grad_enabled = torch.is_grad_enabled


@dataclass(frozen=True)
class Kernel:
    """Implementation of one operator by one backend.

    Attributes:
        load: returns the launcher, or raises :class:`Unavailable`.
        leaves: part of the operator that is left to the reference even if this backend is forced, in words.
    """

    load: Callable[[], object]
    dtypes: frozenset[torch.dtype]
    devices: frozenset[str]
    leaves: str = ""


class Row(NamedTuple):
    """Line of ``doctor``'s table: usability of ``backend`` for ``operator``, with a reason or dtypes."""

    operator: str
    backend: str
    serves: bool
    reason: str
    leaves: str = ""


Choice = tuple[Any, frozenset[torch.dtype]]
"""A launcher, or None for the reference, and the dtypes that it takes."""

_kernels: dict[str, dict[str, Kernel]] = {}
_loaded: dict[tuple[str, str], object] = {}
_chosen: dict[tuple[str, str], Choice] = {}
# Of operators whose calls can be ordinary: the name of the CPU core's check (csrc/bindings/cpu_tensors.cpp).
_checks: dict[str, str] = {}
# The same with the function itself, and the launchers by its answer: 0 (something is unusual), 1 (all tensors are on
# the CPU), 2 (on one GPU). Filled when a launcher is first chosen.
_ordinary: dict[str, tuple[Callable[..., int], list[Any]]] = {}
_forced: str | None = None


def register(operator: str, backend: str, kernel: Kernel) -> None:
    """Register ``kernel`` as the implementation of ``operator`` by ``backend``."""
    _kernels.setdefault(operator, {})[backend] = kernel
    _forget()


def add_kernels(
    operator: str,
    *,
    cpu: Callable[[ModuleType], object],
    cuda: Callable[[ModuleType], object] | None = None,
    triton: str = "",
    triton_leaves: str = "",
    dtypes: frozenset[torch.dtype] = FLOATS,
    fits: str = "",
) -> None:
    """Register the implementations of ``operator``.

    Args:
        operator: name of the operator.
        cpu, cuda: launchers, called with ``fedkern._cpu`` or ``fedkern._cuda`` at the first use.
        triton: module of ``fedkern.ops`` and class of the launcher, such as ``"_fuse.triton:TritonFuse"``, imported at
            the first use; "": the reference takes Triton's place.
        triton_leaves: part of the operator that Triton leaves to the reference, in words.
        dtypes: dtypes that the implementations take.
        fits: function of ``fedkern._cpu`` that recognises ordinary calls for :func:`select_ordinary`; "": none.
    """
    if fits:
        _checks[operator] = fits
    module, _, name = triton.partition(":")
    on_cpu, on_cuda = frozenset({"cpu"}), frozenset({"cuda"})
    register(operator, "cpu", Kernel(lambda: cpu(cpu_core()), dtypes, on_cpu))
    if cuda is not None:
        register(operator, "cuda", Kernel(lambda: cuda(cuda_core()), dtypes, on_cuda))
    if triton:
        kernel = Kernel(lambda: getattr(load_triton(module), name)(), dtypes, on_cuda, triton_leaves)
        register(operator, "triton", kernel)


def _forget() -> None:
    _chosen.clear()
    _ordinary.clear()


def _serves(backend: str, kernel: Kernel, device: str) -> bool:
    if backend == "triton" and is_interpreted():
        return device == "cpu"  # the interpreter would copy every CUDA tensor to the host and back
    return device in kernel.devices


def cpu_core() -> ModuleType:
    """Return ``fedkern._cpu`` with the ISA level of ``FEDKERN_CPU_ISA``.

    Raises:
        Unavailable: the core cannot be used.
        ValueError: ``FEDKERN_CPU_ISA`` or ``FEDKERN_CACHE_MB`` is wrong.
    """
    global _isa_applied
    core = load_core("_cpu")
    if not _isa_applied:
        _show_tensors(core, "_cpu")
        cache()  # raises for a wrong FEDKERN_CACHE_MB before a kernel runs
        level = os.environ.get("FEDKERN_CPU_ISA", "")
        if level:
            try:
                core.set_isa(level)
            except ValueError as error:
                raise ValueError(f"FEDKERN_CPU_ISA: {error}") from None
        _isa_applied = True
    return core


_isa_applied = False


def active_isa() -> str:
    try:
        return str(cpu_core().isa())
    except Unavailable:
        return "none"


# A function of each core that earlier builds do not have.
_NEWEST = {"_cpu": "mlp_train", "_cuda": "take_tensors"}


def _show_tensors(core: ModuleType, name: str) -> None:
    """Hand the core the table through which it reads tensors (csrc/bindings/exchange.h)."""
    table = private_torch.exchange_table()
    if not hasattr(core, _NEWEST[name]):
        raise Unavailable(f"fedkern.{name} was built from older sources than these Python files: {REBUILD}")
    core.take_tensors(table, Tensor, torch.nn.Parameter)


def cuda_core() -> ModuleType:
    """Return ``fedkern._cuda``, or raise :class:`Unavailable`."""
    core = load_core("_cuda")
    if private_torch.raw_stream is None:
        lacking = "is a build without CUDA" if torch.version.cuda is None else "lacks _C._cuda_getCurrentRawStream"
        raise Unavailable(f"fedkern._cuda is built, but torch {lacking}")
    devices.check_cuda(core)
    private_torch.check_stream()
    _show_tensors(core, "_cuda")
    return core


def forced_backend() -> str | None:
    if _forced is not None:
        return _forced
    name = os.environ.get("FEDKERN_BACKEND", "")
    if name and name not in BACKENDS:
        raise ValueError(f"FEDKERN_BACKEND is {name!r}; it is one of {', '.join(BACKENDS)}")
    return name or None


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend within a ``with`` block, for all threads of the process.

    The end of a block restores the backend of its beginning. So blocks may be nested, but blocks of several threads
    must not overlap: if the block that began first ends first, the other leaves its backend forced for good.

    Args:
        name: "reference", "cpu", "triton" or "cuda". None lifts an outer ``use_backend``, so that ``FEDKERN_BACKEND``
            or the free choice hold again.

    Raises:
        ValueError: ``name`` is not a backend.
        RuntimeError: raised by an operator inside the block: the backend does not support that call. Calls that
            Triton leaves to the reference (``doctor`` names them) run there.
    """
    global _forced
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; it is one of {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    _forget()
    try:
        yield
    finally:
        _forced = before
        _forget()


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Force one ISA level of the CPU core within a ``with`` block, for all threads of the process.

    As with :func:`use_backend`, blocks of several threads must not overlap.

    Args:
        name: "portable", "avx2" or "avx512".

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: the level is unknown, or this CPU or build does not have it.
        Unavailable: the CPU core is missing.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be one of {', '.join(ISAS)}, not {type(name).__name__}")
    core = cpu_core()
    before = core.isa()
    core.set_isa(name)
    try:
        yield
    finally:
        core.set_isa(before)


def trust_fork() -> None:
    """Let the CPU core use threads in this forked process, whose parent must never have used OpenMP threads.

    Otherwise the core computes on one thread: OpenMP threads do not survive a fork, and a parallel region would wait
    for them. torch's operators do wait, and hang, so a fork also sets torch to one thread (``torch.set_num_threads``
    raises this).
    """
    with contextlib.suppress(Unavailable):
        cpu_core().trust_fork()


# Not around every call of torch: operators, backward passes and FlatParameters would each have to remember it, and
# torch's own calls beside them would still hang. torch does the same in the workers of a DataLoader.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


def is_intercepted() -> bool:
    """Return whether a compiler, a torch.func transform, forward-mode AD or a mode sees calls first.

    Raises:
        RuntimeError: ``torch.jit.trace`` is recording, which cannot see kernels.
    """
    if _is_compiling():
        return True
    if _jit_traces():
        refuse()
    return bool(functorch_active() or dispatch_modes() or function_modes() or forward_ad._current_level >= 0)


def needs_reference(operator: str, *, has_rules: bool = False) -> bool:
    """Return whether only the reference works: in forward-mode AD, or a transform of torch.func without rules."""
    is_forward = forward_ad._current_level >= 0
    if _is_compiling():
        return bool(is_forward)
    if not is_forward and (has_rules or not functorch_active()):
        return False
    only_reference(operator, "forward-mode AD" if is_forward else "torch.func transforms")
    return True


def _lifting() -> str:
    if _forced is None:
        return "unsetting FEDKERN_BACKEND"
    set_too = " and unsetting FEDKERN_BACKEND" if os.environ.get("FEDKERN_BACKEND") else ""
    return f"calling it under use_backend(None){set_too}"


def only_reference(operator: str, where: str) -> None:
    """Raise RuntimeError if a backend is forced, which cannot work under ``where``."""
    forced = forced_backend()
    if forced not in (None, "reference"):
        raise RuntimeError(
            f"backend {forced!r} was forced, but {operator} runs through the reference under {where}; allow it by "
            f"{_lifting()}"
        )


def not_forced(operator: str, backend: str, case: str) -> None:
    """Raise RuntimeError if ``backend`` is forced, which has no kernel for this ``case``."""
    if forced_backend() == backend:
        raise RuntimeError(
            f"backend {backend!r} was forced, but it has no kernel for {operator} {case}; allow another by {_lifting()}"
        )


def has_tangent(values: Iterable[object]) -> bool:
    if forward_ad._current_level < 0 or _is_compiling():
        return False
    for value in values:
        if isinstance(value, Tensor):
            while private_torch.is_batched(value):  # vmap has no batching rule for unpack_dual
                value = private_torch.unwrapped(value)
            if forward_ad.unpack_dual(value).tangent is not None:
                return True
    return False


def is_readable(grad: Tensor) -> bool:
    """Return whether a kernel may read ``grad``: the backward pass is neither recorded nor mapped."""
    # is_grads_batched=True hands a legacy batched tensor to a backward pass.
    if type(grad) is not Tensor or _grad_enabled() or is_intercepted():
        return False
    return not _legacy_batched(grad) and not outlived(grad)


def eager(*tensors: Tensor) -> bool:
    """Return whether kernels may use the pointers: ordinary tensors, no transform, mode or compiler."""
    if is_intercepted():
        return False
    return all(
        # is_grads_batched=True hands a legacy batched tensor to a backward pass.
        (type(tensor) is Tensor or type(tensor) is torch.nn.Parameter)
        and not _legacy_batched(tensor)
        and not outlived(tensor)
        and not tensor.is_meta
        for tensor in tensors
    )


def select_ordinary(operator: str, *arguments: object) -> Any | None:
    """Return the core's launcher for an ordinary call, or None, where :func:`select` decides.

    Nothing intercepts an ordinary call, and ``fits`` accepts its arguments. On small tensors :func:`select` takes
    longer than a kernel.
    """
    if is_intercepted():  # first of all: a compiler would guard on everything that is looked up below
        return None
    entry = _ordinary.get(operator)
    return None if entry is None else entry[1][entry[0](*arguments)]


def settle_choice(operator: str, device: str) -> bool:
    """Make the choice that :func:`select_ordinary` looks up, and return whether it was missing."""
    if (operator, device) in _chosen:
        return False
    _choose(operator, device)
    return True


def select(operator: str, *tensors: Tensor) -> Any | None:
    """Return the kernel object for these tensors, or None for the reference.

    Raises:
        RuntimeError: a backend was forced and cannot take the call.
    """
    device = tensors[0].device.type
    try:
        implementation, dtypes = _chosen[operator, device]
    except KeyError:
        implementation, dtypes = _choose(operator, device)
    if implementation is None:
        return None
    for tensor in tensors:
        if tensor.dtype not in dtypes or tensor.layout is not torch.strided or tensor.is_neg():
            if forced_backend() is not None:
                raise RuntimeError(
                    f"backend {forced_backend()!r} was forced, but it cannot serve {operator} for "
                    f"{_describe(tensor)}; allow another by {_lifting()}"
                )
            return None
    return implementation


def _describe(tensor: Tensor) -> str:
    layout = "" if tensor.layout is torch.strided else f" and layout {tensor.layout}"
    return f"dtype {tensor.dtype}{' and a negated view' if tensor.is_neg() else layout}"


def _load(operator: str, backend: str) -> object:
    if (operator, backend) not in _loaded:
        _loaded[operator, backend] = _kernels[operator][backend].load()
    return _loaded[operator, backend]


def _is_left_by_triton(operator: str) -> bool:
    """Return whether ``operator`` has kernels for GPUs, but none in Triton."""
    kernels = _kernels.get(operator, {})
    return "cuda" in kernels and "triton" not in kernels


def _choose(operator: str, device: str) -> Choice:
    forced = forced_backend()
    if forced == "triton" and _is_left_by_triton(operator):
        forced = "reference"
    serving: str | None = forced
    choice: Choice = None, frozenset()
    if forced is not None and forced != "reference":
        kernel = _kernels.get(operator, {}).get(forced)
        if kernel is None:
            raise RuntimeError(f"backend {forced!r} was forced, but it does not implement {operator}")
        if not _serves(forced, kernel, device):
            hint = ""
            if forced == "triton" and device == "cpu":
                hint = " (with TRITON_INTERPRET=1 in the environment from the start it does, slowly)"
            raise RuntimeError(f"backend {forced!r} was forced, but it does not serve tensors on {device}{hint}")
        try:
            choice = (_load(operator, forced), kernel.dtypes)
        except Unavailable as error:
            raise RuntimeError(f"backend {forced!r} was forced, but it cannot be used because {error}") from error
    elif forced is None:
        serving, choice = _choose_unforced(operator, device)
    _chosen[operator, device] = choice
    if serving in ("cpu", "cuda") and operator in _checks:
        with contextlib.suppress(Unavailable):
            check = getattr(cpu_core(), _checks[operator])
            _ordinary.setdefault(operator, (check, [None] * 3))[1][1 if device == "cpu" else 2] = choice[0]
    return choice


def _choose_unforced(operator: str, device: str) -> tuple[str | None, Choice]:
    """Return the first usable backend, its kernel and its dtypes, or None, None and no dtypes."""
    for name in ("cpu", "cuda", "triton"):
        kernel = _kernels.get(operator, {}).get(name)
        if kernel is None or device not in kernel.devices:
            continue
        if name == "triton" and (is_interpreted() or devices.only_forced(name)):
            continue
        try:
            return name, (_load(operator, name), kernel.dtypes)
        except Unsuited as error:
            if device == "cpu":
                warn_once(f"plain PyTorch serves every operator, because {error}")
        except Unavailable:
            continue
    return None, (None, frozenset())


def status() -> list[Row]:
    """Return, for every operator and backend, whether the backend is usable here, or why not."""
    rows = []
    # Not forced_backend(), which raises for a wrong FEDKERN_BACKEND.
    forced = _forced or os.environ.get("FEDKERN_BACKEND")
    for operator in sorted(_kernels):
        rows.append(Row(operator, "reference", True, "plain PyTorch, any device"))
        for backend in BACKENDS[1:]:
            kernel = _kernels[operator].get(backend)
            if kernel is None:
                is_left = backend == "triton" and _is_left_by_triton(operator)
                serving = "; the reference serves, also where triton is forced" if is_left else ""
                rows.append(Row(operator, backend, False, "not implemented" + serving))
                continue
            try:
                _load(operator, backend)
            except (Unavailable, ValueError, AttributeError) as error:  # AttributeError: an outdated core
                rows.append(Row(operator, backend, False, str(error)))
                continue
            dtypes = ", ".join(sorted(str(d).removeprefix("torch.") for d in kernel.dtypes))
            if backend == "triton" and is_interpreted():
                dtypes += "; interpreted, on CPU tensors, only when forced (TRITON_INTERPRET)"
            elif "cpu" not in kernel.devices and not torch.cuda.is_available():
                have = "installed" if backend == "triton" else "built"
                rows.append(Row(operator, backend, False, f"{have}, but torch sees no CUDA device"))
                continue
            elif backend != forced and (reason := devices.only_forced(backend)):
                rows.append(Row(operator, backend, False, reason))
                continue
            rows.append(Row(operator, backend, True, dtypes, kernel.leaves))
    return rows
