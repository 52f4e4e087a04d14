"""Counter of the floating-point operations that clients compute, for use during a run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KINDS: tuple[Any, ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_counting: list[Counting] = []  # the counters that are entered


class Counting:
    """Counts the floating-point operations of convolutions and linear layers while it is entered.

    A multiplication and an addition are two operations.  If the result of a layer requires a gradient, the backward
    pass is counted with the forward pass: as much again for the weights and for the input, if these require a gradient.
    Not counted are all other computations of a network (normalisation, attention's products, the fused blocks of other
    clients) and those inside ``torch.func`` or ``torch.compile``.

    While a counter is entered, the ``forward`` of the layer classes is replaced.  A global module hook would also do,
    but takes every module off PyTorch's fast path: 30 us a step instead of 10, a hundredth of a small network's step.

    Attributes:
        flops: operations counted so far.
    """

    def __init__(self) -> None:
        self.flops = 0

    def __enter__(self) -> Counting:
        if not _counting:
            for kind, (plain, counted) in _FORWARD.items():
                if kind.forward is plain:  # leaves a forward that someone else replaced
                    kind.forward = counted
        _counting.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _counting.remove(self)
        if not _counting:
            for changed, (plain, counted) in _FORWARD.items():
                if changed.forward is counted:
                    changed.forward = plain


@contextmanager
def uncounted() -> Iterator[None]:
    """Pauses all counters where a cache may have the result, so that counts do not depend on the cache."""
    paused = _counting.copy()
    _counting.clear()
    try:
        yield
    finally:
        _counting.extend(paused)


def _counted(forward: Callable[..., Tensor], *, transposed: bool) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def counted(layer: Any, images: Tensor, *rest: Any, **named: Any) -> Tensor:
        output = forward(layer, images, *rest, **named)
        if not torch.compiler.is_compiling() and not output.is_meta:
            weight = layer.weight
            # Every weight is used once per position of the output (transposed: of the input), whose number of channels
            # is the first dimension of the weight.
            positions = images if transposed else output
            each = 2 * positions.numel() * weight.numel() // weight.shape[0]
            if output.requires_grad:
                each *= 1 + weight.requires_grad + images.requires_grad
            for one in _counting:
                one.flops += each
        return output

    return counted


# Made once: torch.compile would take a new function per client for a new network.
_FORWARD = {kind: (kind.forward, _counted(kind.forward, transposed=kind in _TRANSPOSED)) for kind in _KINDS}
