"""The garbage collector during imports."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

from fedkern.process.interrupts import whole_process


@contextmanager
def without_collection() -> Iterator[None]:
    """Keep the garbage collector off while the block imports modules, and from what was imported ever after.

    The collector would look through objects that stay, several times: a quarter of what the imports of torch and
    fedkern take.  At exit it leaves out what is there by then.  In a process that goes on after a command, such as a
    script's or a notebook's, nothing changes.
    """
    if not whole_process() or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.freeze)
