"""Process-wide settings of PyTorch: those of a run in place of its caller's, and those for its workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend

from fedkern.ops._core.private_torch import sdp_order, set_sdp_order


@contextmanager
def reproducible() -> Iterator[None]:
    """Protect the bits of the work inside from the caller's settings.

    fp32 is the default dtype and the precision of matrix products, the CPU the default device, gradients are recorded,
    cuDNN is deterministic, and attention on a GPU uses matrix products and a softmax, as fused kernels sum gradients in
    any order. The caller's settings are restored. Deterministic algorithms, anomaly detection and function modes stay.
    """
    with keep_modes(), ExitStack() as modes:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        # Flash stays enabled, as the CPU needs it; only GPUs follow the order.
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_math_sdp(True)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
        set_sdp_order(sorted(sdp_order(), key=lambda kernel: kernel != SDPBackend.MATH.value))
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        if torch.get_default_device() != torch.device("cpu"):
            torch.set_default_device(None)
            if torch.get_default_device() != torch.device("cpu"):
                # A block of the caller's, "with torch.device(...)", cannot be left from within.
                modes.enter_context(torch.device("cpu"))
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        yield


@contextmanager
def keep_modes() -> Iterator[Callable[[], bool]]:
    """Restore modes and working folder at the end of the block.

    Yields a function that restores at once if a frequently changed mode differs, and returns whether it did.
    """
    before, frequent = _read_all(), _read_frequent()

    def restore() -> bool:
        for (get, put), value in zip(_MODES, before, strict=True) if _read_all() != before else ():
            if value is not None and _read(get) != value:
                put(value)
        return True

    try:
        yield lambda: _read_frequent() != frequent and restore()
    finally:
        restore()


def _read_frequent() -> tuple[object, ...]:
    """Read, in half a microsecond, the modes that data sets' items are known to change."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), deterministic


def _read_all() -> list[object]:
    try:
        return [get() for get, _ in _MODES]
    except (RuntimeError, OSError):
        return [_read(get) for get, _ in _MODES]


def _read(get: Callable[[], object]) -> object:
    try:
        return get()
    except (RuntimeError, OSError):  # precision of products that torch.backends has set too; a folder that is gone
        return None


@contextmanager
def current_gpu(device: str) -> Iterator[None]:
    """Make ``cuda`` mean the numbered GPU of ``device``, such as cuda:1."""
    number = torch.device(device).index
    with nullcontext() if number is None else torch.cuda.device(number):
        yield


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run with ``count`` CPU threads, which changes bits, and restore the caller's number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def modes() -> dict[str, Any]:
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
    }


def set_modes(settings: dict[str, Any]) -> None:
    current = modes()
    if (current["deterministic"], current["warn_only"]) != (settings["deterministic"], settings["warn_only"]):
        # Called only for a change: the call imports torch's compiler, which takes a second.
        torch.use_deterministic_algorithms(settings["deterministic"], warn_only=settings["warn_only"])
    torch.backends.mkldnn.enabled = settings["mkldnn"]


_CPU: Any = torch.backends.mkldnn
_CUDA: Any = torch.backends.cuda
_FLAGS: list[tuple[Any, str]] = [
    *((torch.backends.cudnn, name) for name in ("enabled", "deterministic", "benchmark", "allow_tf32")),
    *((where, "fp32_precision") for where in (torch.backends, _CPU, _CPU.matmul, _CPU.conv, _CPU.rnn)),
]
_MODES: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (modes, set_modes),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, lambda device: torch.set_default_device(device if device.type != "cpu" else None)),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.get_num_threads, torch.set_num_threads),
    (lambda: sys.float_info.min / 2 == 0, torch.set_flush_denormal),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),  # sets some of the flags
    *((partial(getattr, *flag), partial(setattr, *flag)) for flag in _FLAGS),
    *(
        (getattr(_CUDA, f"{kernel}_sdp_enabled"), getattr(_CUDA, f"enable_{kernel}_sdp"))
        for kernel in ("flash", "mem_efficient", "math", "cudnn")
    ),
    (_CUDA.fp16_bf16_reduction_math_sdp_allowed, _CUDA.allow_fp16_bf16_reduction_math_sdp),
    (sdp_order, set_sdp_order),
    (np.geterr, lambda errors: np.seterr(**errors)),
    (os.getcwd, os.chdir),
]
"""Readers and setters of process-wide modes, and of the working folder."""
