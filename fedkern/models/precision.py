"""Precision of networks: fp32, or bf16 by autocast inside the networks.

Weights and outputs of networks (features, logits, embeddings, images) are always fp32.  Under ``compute_in("bf16")``
the methods that ``autocasts`` decorates (stages and encoders) run under ``torch.autocast``: convolutions and matrix
products in bf16, statistics of norms in fp32.  Classifiers, and all code outside networks, never do.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, fx, nn

DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
PRECISIONS = tuple(DTYPES)

_dtype: ContextVar[torch.dtype | None] = ContextVar("precision", default=None)

N = TypeVar("N", bound=nn.Module)
P = ParamSpec("P")
T = TypeVar("T")
Layer = Callable[[Tensor], Tensor]
"""Type of a module from a tensor to a tensor, because ``nn.Module.__call__`` returns Any."""


@contextmanager
def compute_in(precision: str) -> Iterator[None]:
    """Let networks compute in ``precision``, one of ``PRECISIONS`` (a context manager or decorator).

    A caller's own autocast is off inside: its cached copies of the weights would not follow training steps.
    """
    token = _dtype.set(DTYPES[precision])
    try:
        with ExitStack() as callers:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    callers.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        _dtype.reset(token)


def reduced_dtype() -> torch.dtype | None:
    """Return the reduced dtype of networks, or None in fp32."""
    return _dtype.get()


def autocasts(method: Callable[P, T]) -> Callable[P, T]:
    """Decorate a network's method to compute in the current precision, on its first argument's or its own device."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        dtype = _dtype.get()
        x: Any = args[1] if len(args) > 1 else next(iter(kwargs.values()))
        if dtype is None or isinstance(x, fx.Proxy):  # a traced graph runs later, in its caller's precision
            return method(*args, **kwargs)
        device = x.device if isinstance(x, Tensor) else next(args[0].parameters()).device  # type: ignore[attr-defined]
        with autocast_on(device):
            return method(*args, **kwargs)

    return run


def autocast_on(device: torch.device) -> AbstractContextManager[object]:
    # Autocast's cache would keep copies of the weights until the outermost autocast (perhaps a caller's) ends, and
    # would miss an optimiser step on the flat buffer.
    dtype = _dtype.get()
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def to_fp32(x: Tensor) -> Tensor:
    return x if _dtype.get() is None else x.float()


MATRICES = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
"""Layers with weights that autocast casts."""


def cast_frozen(module: N) -> N:
    """Cast the weights of a frozen network once, where autocast would cast them at every call.

    The output bits stay the same.  Heads stay fp32, as they run outside autocast, and so do user-defined modules, which
    may use weights in other ways.
    """
    dtype = _dtype.get()
    if dtype is None or getattr(module, "own", False) is True:
        return module
    twin = copy.deepcopy(module)
    for name, layer in twin.named_modules():
        if isinstance(layer, MATRICES) and not any(part.endswith("head") for part in name.split(".")):
            layer.weight.data = layer.weight.data.to(dtype)
    return twin


def cast_trunk(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast ``module`` to ``dtype`` in place, except for batch norms and their statistics, and return it."""
    for layer in module.modules():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
                if tensor.dtype is torch.float32:
                    tensor.data = tensor.data.to(dtype)
    return module
