"""Import of matplotlib at the end of a command."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fedkern.garbage import uncollected
from fedkern.interrupts import whole_process


@contextmanager
def undocumented() -> Iterator[None]:
    """Has the block import matplotlib in two thirds of the time, in a process that ends with its command.

    Matplotlib writes tables of the properties of its classes into docstrings while it is imported, for ``help`` in
    scripts and notebooks.  The process of a command ends after the pictures.
    """
    if not whole_process() or "matplotlib.artist" in sys.modules:
        yield
        return
    with uncollected():
        from matplotlib import artist

        table = artist.kwdoc
        artist.kwdoc = lambda artist: ""
        try:
            yield
        finally:
            artist.kwdoc = table
