"""aggregate: sums of weighted vectors whose rounding errors are kept, so that no bit depends on the order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkern.ops._aggregate.mean import select
from fedkern.ops._aggregate.reference import pieces
from fedkern.ops._core.memory import HUGE, mapped

BLOCK = 256
"""Elements that get memory for their rests together; the same as in csrc/include/fedkern/aggregate.h."""


# Bytes from which sums have memory of their own.
_MAPPED = 1 << 20


class ErrorFreeSum:
    """Exact sum of weighted vectors ``[P]`` on the CPU, in 8 bytes for most elements.

    Every product is rounded to fp64 once, and the sum of the products is exact.  So the order of the vectors changes no
    bit, and neither does how many of them one call adds.

    Numbers of samples have few digits, as fp32 numbers have: mostly their products add up in fp64 without rounding.
    Where a sum is rounded, what rounding takes away (Knuth's TwoSum) is added to a second fp64 number, the element's
    rest.  Rests have memory in blocks of 256 elements, once one of them is not 0.  What a rest cannot hold is noted
    apart.  Compare Ogita, Rump and Oishi, "Accurate sum and dot product", SIAM J. Sci. Comput. 26(6), 2005.

    An :class:`~fedkern.ops.Accumulator` with ``exact=True`` keeps three digits per element, in 25 bytes.  Its range is
    that of fp64, also for infinities, it can be merged and saved, and it may be on a GPU.

    Args:
        size: P.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        blocks = -(-size // BLOCK)
        self._sum: Tensor | None = None
        self._slots = torch.full((blocks,), -1, dtype=torch.int32)
        # Untouched memory takes no pages.  torch.empty may fill it.
        self._rests = torch.from_numpy(np.empty(blocks * BLOCK))
        self._used = torch.zeros(1, dtype=torch.int64)
        self._notes: dict[int, list[float]] = {}

    def add(self, vectors: Sequence[Tensor], weights: Sequence[float]) -> list[int]:
        """Adds ``weights[m] * vectors[m]`` for all m, in one pass where they have one dtype.

        Args:
            vectors: ``[P]`` each, on the CPU; fp32, bf16, fp16 or fp64.  Sums of finite products must be finite, as
                those of fp32 numbers and weights up to 2^53 are.
            weights: finite; below 0 to take out a vector that was added.

        Returns:
            Positions of vectors with products that are not finite, ascending.  Nothing of these is added.
        """
        if len({vector.dtype for vector in vectors}) > 1:
            return self._add_mixed(vectors, weights)
        if not vectors:
            return []
        rows, shares = _rows(vectors), list(map(float, weights))
        fresh = self._sum is None
        if self._sum is None:
            self._sum = _sums(self.size)
        odd = self._run(rows, shares, fresh)
        if odd:  # exact sums can be taken back
            self._run(tuple(rows[m] for m in odd), [-shares[m] for m in odd], False)
        return odd

    def _add_mixed(self, vectors: Sequence[Tensor], weights: Sequence[float]) -> list[int]:
        refused: list[int] = []
        for dtype in dict.fromkeys(vector.dtype for vector in vectors):
            places = [m for m, vector in enumerate(vectors) if vector.dtype == dtype]
            odd = self.add([vectors[m] for m in places], [weights[m] for m in places])
            refused += [places[m] for m in odd]
        return sorted(refused)

    def mean(self, out: Tensor, total: float) -> None:
        """Writes the sum over ``total`` to ``out [P]``: rounded to fp64, divided, and rounded to the dtype of ``out``.

        Args:
            out: fp32, bf16, fp16 or fp64, contiguous.
            total: the sum of the weights.

        Raises:
            ValueError: no vector was added.
        """
        if self._sum is None:
            raise ValueError("nothing to average yet: add a vector before asking for the mean")
        kernel = _kernel(out)
        if kernel is None:
            self._plain_mean(out, total)
        else:
            _advise(kernel, out)
            kernel.core.error_free_sum(
                (), (), False, self._sum, out, total, self._slots, self._rests, self._used, kernel.at(out)
            )
        for i, more in self._notes.items():
            out[i] = math.fsum((float(self._sum[i]), self._rest(i), *more)) / total

    @classmethod
    def mean_at_once(cls, vectors: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> list[int]:
        """The mean of vectors that are all there: the bits of :meth:`add` and :meth:`mean`, without memory for sums.

        Returns:
            As :meth:`add`; where it is not empty, ``out`` holds nothing of use.
        """
        made = cls(len(out))
        kernel = _kernel(vectors[0])
        if kernel is not None and len({vector.dtype for vector in vectors}) == 1:
            _advise(kernel, out)
            refused = made._run(_rows(vectors), list(map(float, weights)), True, out, math.fsum(weights))
            if refused or not made._notes:
                return refused
            made = cls(len(out))  # what was noted needs the sums, too
        refused = made.add(vectors, weights)
        if not refused:
            made.mean(out, math.fsum(weights))
        return refused

    def _run(
        self, rows: tuple[Tensor, ...], weights: list[float], fresh: bool, out: Tensor | None = None, total: float = 1.0
    ) -> list[int]:
        """Adds vectors of one dtype; returns the positions of those with products that are not finite."""
        kernel = _kernel(rows[0])
        if kernel is None:
            return self._plain_add(rows, weights, fresh)
        noted, odd = kernel.core.error_free_sum(
            rows, weights, fresh, self._sum, out, total, self._slots, self._rests, self._used, kernel.at(rows[0])
        )
        self._note(noted)
        refused: list[int] = odd
        return refused

    def _note(self, pairs: Iterable[tuple[int, float]]) -> None:
        for i, value in pairs:
            self._notes.setdefault(i, []).append(value)

    def _rest(self, i: int) -> float:
        slot = int(self._slots[i // BLOCK])
        return 0.0 if slot < 0 else float(self._rests[slot * BLOCK + i % BLOCK])

    # The specification, in plain PyTorch.

    def _plain_add(self, rows: tuple[Tensor, ...], weights: list[float], fresh: bool) -> list[int]:
        assert self._sum is not None
        if fresh:
            self._sum.zero_()
        odd = []
        rests = self._all_rests()
        for m, (row, weight) in enumerate(zip(rows, weights, strict=True)):
            finite = True
            for piece in pieces(self.size):
                product = row[piece].double() * weight
                good = product.isfinite() & (self._sum[piece] + product).isfinite()
                finite &= bool(good.all())
                lost = _two_sum(self._sum[piece], torch.where(good, product, 0.0))
                more = _two_sum(rests[piece], lost)
                places = torch.nonzero(more).flatten()
                self._note(zip((places + piece.start).tolist(), more[places].tolist(), strict=True))
            if not finite:
                odd.append(m)
        return odd

    def _plain_mean(self, out: Tensor, total: float) -> None:
        assert self._sum is not None
        rests = self._all_rests()
        for piece in pieces(self.size):
            out[piece] = (self._sum[piece] + rests[piece]) / total

    def _all_rests(self) -> Tensor:
        """The rests ``[P]``, after giving every block memory of its own."""
        blocks = len(self._slots)
        if int(self._used) < blocks:
            held = self._rests.view(blocks, BLOCK)
            taken = self._slots >= 0
            made = torch.zeros(blocks, BLOCK, dtype=torch.float64)
            made[taken] = held[self._slots[taken].long()]
            self._rests, self._slots = made.flatten(), torch.arange(blocks, dtype=torch.int32)
            self._used.fill_(blocks)
            return self._rests[: self.size]
        order = self._slots.long()
        if not torch.equal(order, torch.arange(blocks)):
            self._rests = self._rests.view(blocks, BLOCK)[order].flatten()
            self._slots = torch.arange(blocks, dtype=torch.int32)
        return self._rests[: self.size]


def _two_sum(total: Tensor, more: Tensor) -> Tensor:
    """``total += more``; returns what rounding took away."""
    rounded = total + more
    own = rounded - more
    lost = (total - own) + (more - (rounded - own))
    total.copy_(rounded)
    return lost


def _rows(vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(vector.detach().contiguous() for vector in vectors)


def _kernel(vector: Tensor) -> Any | None:
    """The launcher of the CPU core where it serves the vector."""
    kernel = select([vector])
    return kernel if hasattr(getattr(kernel, "core", None), "error_free_sum") else None


def _sums(size: int) -> Tensor:
    """Memory for ``size`` sums.  Large ones go back to the system at once when they are freed, not to malloc."""
    if 8 * size < _MAPPED:
        return torch.empty(size, dtype=torch.float64)
    return torch.frombuffer(mapped(8 * size), dtype=torch.float64)


def _advise(kernel: Any | None, memory: Tensor) -> None:
    """Asks for fewer page faults in large memory that is about to be written."""
    if kernel is not None and memory.nbytes >= HUGE:
        kernel.core.advise_huge_pages(memory)
