"""Ctrl-C and SIGTERM: however many arrive, and wherever, what is going on ends once and in order.

Python calls a signal's handler between two lines of whatever runs.  In a weak reference's callback or a finaliser an
exception that the handler raises is printed and lost; in the middle of the clean-up after a first signal a second one
would end the clean-up.  So the handler remembers the first signal, raises nothing while that one's exception is being
handled, and :func:`check` raises it again at the next place where a run can stop.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: like Ctrl-C nothing is finished and the last checkpoint stands; exit code 143."""


class Handler:
    """Handles both signals.

    Attributes:
        pending: the exception of the first signal, once there was one.
        over: whether nothing is left to be ended, so that further signals are ignored.
        last: whether the process ends with what is going on.
    """

    def __init__(self, last: bool = False) -> None:
        self.last = last
        self.pending: KeyboardInterrupt | None = None
        self.over = False

    def __call__(self, number: int, frame: object) -> None:
        if self.over or (self.pending is not None and _handled(self.pending)):
            return
        if self.pending is None:
            self.pending = Terminated("SIGTERM") if number == signal.SIGTERM else KeyboardInterrupt()
        raise self.pending


_current: Handler | None = None


def check() -> None:
    """Raises the exception of a signal whose exception was lost where it arrived."""
    if _current is not None and _current.pending is not None:
        raise _current.pending


def ended() -> None:
    """Says that what was going on has ended because of a signal; further ones are ignored."""
    if _current is not None:
        _current.over = True


def whole_process() -> bool:
    """Whether the process is nothing but what is going on: the command line's, which ends with it."""
    return _current is not None and _current.last


def _handled(exception: BaseException) -> bool:
    """Whether an except or finally block, or a context manager, is at work because of ``exception``."""
    at, seen = sys.exception(), set[int]()
    while at is not None and id(at) not in seen:
        if at is exception:
            return True
        seen.add(id(at))
        at = at.__context__
    return False


@contextmanager
def in_order(*, to_the_end: bool = False) -> Iterator[None]:
    """Inside, SIGTERM raises :class:`Terminated` and Ctrl-C KeyboardInterrupt, each once (in the main thread alone).

    Ctrl-C that is ignored, as in a shell's background jobs, or that has a handler of the caller's, is left alone.

    Args:
        to_the_end: the process ends with this block: after a signal no further one counts.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = Handler(to_the_end)
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    hook = sys.unraisablehook

    def quiet(unraisable: Any) -> None:
        if unraisable.exc_value is None or unraisable.exc_value is not handler.pending:
            hook(unraisable)

    _current = handler
    sys.unraisablehook = quiet
    try:
        for number in numbers:
            signal.signal(number, handler)
        yield
    finally:
        handler.over = to_the_end and handler.pending is not None
        for number in numbers:  # the interpreter takes handlers away before it ends, but leaves what is ignored
            signal.signal(number, signal.SIG_IGN if handler.over else before[number])
        sys.unraisablehook = hook
        _current = None
