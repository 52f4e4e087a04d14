"""The precision that networks compute in: fp32, or bf16 by autocast inside of them.

A network's weights are fp32 in either.  With ``computing("bf16")`` the methods that ``autocasts`` marks, a network's
stages and encoders, run under ``torch.autocast``: convolutions and matrix products in bf16, statistics of norms in
fp32.  What a network answers with (features, logits, embeddings, images) is fp32, and classifiers and whatever is
outside of networks (losses, optimisers, averages, noise) never see autocast.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, fx, nn

DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
PRECISIONS = tuple(DTYPES)

_dtype: ContextVar[torch.dtype | None] = ContextVar("precision", default=None)

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def computing(precision: str) -> Iterator[None]:
    """Networks compute in ``precision``, one of ``PRECISIONS``, inside; also a decorator.

    A caller's own autocast is off inside: its copies of the weights would not follow the steps of a training.
    """
    token = _dtype.set(DTYPES[precision])
    try:
        with ExitStack() as others:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    others.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        _dtype.reset(token)


def lower() -> torch.dtype | None:
    """What networks compute in where that is not fp32; None in fp32."""
    return _dtype.get()


def autocasts(method: Callable[P, T]) -> Callable[P, T]:
    """A method of a network, of a tensor (or what has a ``device``), that computes in the precision of the moment."""

    @functools.wraps(method)
    def called(*args: P.args, **named: P.kwargs) -> T:
        dtype = _dtype.get()
        x: Any = args[1] if len(args) > 1 else next(iter(named.values()))
        if dtype is None or isinstance(x, fx.Proxy):  # what is traced runs later, inside what asked for the trace
            return method(*args, **named)
        # Autocast would keep its copies of the weights until the outermost autocast ends, which may be a caller's, and
        # would not see that a step on the flat vector has changed them.
        with torch.autocast(x.device.type, dtype=dtype, cache_enabled=False):
            return method(*args, **named)

    return called


def full(x: Tensor) -> Tensor:
    """What leaves a network: fp32, where it was computed in less."""
    return x if _dtype.get() is None else x.float()


MATRICES = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
"""The layers whose weights autocast casts."""


def frozen(module: Any) -> Any:
    """A network that nothing trains, with the weights that autocast would cast at every call cast once.

    In fp32 it is ``module`` itself, else a copy that answers with the same bits.  Heads stay fp32, as they are called
    outside of autocast.
    """
    dtype = _dtype.get()
    if dtype is None:
        return module
    made = copy.deepcopy(module)
    for name, layer in made.named_modules():
        if isinstance(layer, MATRICES) and not any(part.endswith("head") for part in name.split(".")):
            layer.weight.data = layer.weight.data.to(dtype)
    return made


def trunk(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``module`` itself with parameters and buffers of ``dtype``, but for batch norms, whose statistics stay fp32."""
    for layer in module.modules():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
                if tensor.dtype is torch.float32:
                    tensor.data = tensor.data.to(dtype)
    return module
