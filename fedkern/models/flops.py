"""How much clients compute, counted while they do."""

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
_counting: list[Counting] = []  # those that are entered


class Counting:
    """Counts the floating-point operations of convolutions and linear layers while it is entered.

    A multiplication and an addition are two; a layer whose result requires a gradient is taken to get its backward
    pass: as much again for its weights, and for its input, where these require one.  Whatever else a network computes
    (normalisation, attention's products, the fused blocks of other clients) is not counted, nor what happens inside
    ``torch.func`` or ``torch.compile``.

    The layers' ``forward`` is another one meanwhile.  A hook on all modules would do, but it takes every module of a
    network off PyTorch's short way, 30 us a step where this takes 10: a hundredth of a small network's step.

    Attributes:
        flops: so far.
    """

    def __init__(self) -> None:
        self.flops = 0

    def __enter__(self) -> Counting:
        if not _counting:
            for kind, (plain, counted) in _FORWARD.items():
                if kind.forward is plain:  # or somebody else's, which is left alone
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
    """Where a cache may have the answer, so that what is counted does not depend on what was asked before."""
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
            # A weight is used once for every position of what has the other channels than its first dimension.
            positions = images if transposed else output
            each = 2 * positions.numel() * weight.numel() // weight.shape[0]
            if output.requires_grad:
                each *= 1 + weight.requires_grad + images.requires_grad
            for one in _counting:
                one.flops += each
        return output

    return counted


# Made once: torch.compile would take a function of every client's own for another network.
_FORWARD = {kind: (kind.forward, _counted(kind.forward, transposed=kind in _TRANSPOSED)) for kind in _KINDS}
