"""Where a sequence of samples is cut into batches."""

from __future__ import annotations


def cuts(count: int, size: int) -> list[slice]:
    """``count`` samples in consecutive batches of ``size``, the last one smaller.

    A last batch of a single sample joins the one before it, which then has ``size + 1``: batch norm cannot normalise a
    single value per channel.  Only ``count`` 1 and ``size`` 1 leave batches of one.
    """
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1 and size > 1:
        starts.pop()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]
