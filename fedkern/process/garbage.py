"""Garbage collector during imports."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

from fedkern.process.interrupts import whole_process


@contextmanager
def without_collection() -> Iterator[None]:
    """Keep the garbage collector off during imports in the block, and away from imported objects afterwards.

    The collector would look through them several times: a quarter of the imports of torch and fedkern. In a process
    that continues after a command, such as a script's or a notebook's, nothing changes.
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
