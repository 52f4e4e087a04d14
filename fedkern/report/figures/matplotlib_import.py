"""Faster import of matplotlib at the end of a command."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fedkern.process.garbage import without_collection
from fedkern.process.interrupts import whole_process


@contextmanager
def without_docstrings() -> Iterator[None]:
    """Import matplotlib inside in two thirds of the time, in a process that ends with its command.

    Matplotlib's import writes property tables into docstrings, which only ``help`` needs. ``MPLBACKEND`` is not read,
    as pictures need no display and a wrong backend would fail the import.
    """
    if not whole_process() or "matplotlib.artist" in sys.modules:
        yield
        return
    backend = os.environ.pop("MPLBACKEND", None)
    with without_collection():
        try:
            from matplotlib import artist
        finally:
            if backend is not None:
                os.environ["MPLBACKEND"] = backend

        table = artist.kwdoc
        artist.kwdoc = lambda artist: ""
        try:
            yield
        finally:
            artist.kwdoc = table
