"""Handler for Ctrl-C and SIGTERM: running work ends once and in order, however many signals arrive and wherever.

Python calls a signal handler between any two lines. In a weak reference's callback or a finaliser, the handler's
exception is printed and lost. During the clean-up after a first signal, a second would cut the clean-up short. So the
handler remembers the first signal and raises nothing while its exception is being handled. :func:`check` raises a lost
exception again at the next place where a run can stop.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: as after Ctrl-C, no work is completed and the last checkpoint stays. Exit code 143."""


class Handler:
    """Signal handler for Ctrl-C and SIGTERM.

    Attributes:
        pending: the exception of the first signal, or None.
        over: whether the interrupted work has ended; further signals are then ignored.
        last: whether the process ends together with the guarded work.
    """

    def __init__(self, last: bool = False) -> None:
        self.last = last
        self.pending: KeyboardInterrupt | None = None
        self.over = False

    def __call__(self, number: int, frame: object) -> None:
        if self.over or (self.pending is not None and _is_handled(self.pending)):
            return
        if self.pending is None:
            self.pending = Terminated("SIGTERM") if number == signal.SIGTERM else KeyboardInterrupt()
        raise self.pending


_current: Handler | None = None


def check() -> None:
    """Raise the pending exception of a signal, in case it was lost where the signal arrived."""
    if _current is not None and _current.pending is not None:
        raise _current.pending


def end_by(stop: KeyboardInterrupt) -> tuple[str, int]:
    """Mark interrupted work as ended, and return a word for its end and the exit code."""
    if _current is not None:
        _current.over = True
    return ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)


def whole_process() -> bool:
    """Return whether the process ends with the guarded work."""
    return _current is not None and _current.last


def _is_handled(exception: BaseException) -> bool:
    at, seen = sys.exception(), set[int]()
    while at is not None and id(at) not in seen:
        if at is exception:
            return True
        seen.add(id(at))
        at = at.__context__
    return False


@contextmanager
def in_order(*, to_the_end: bool = False) -> Iterator[None]:
    """Install the handler for the block: SIGTERM raises :class:`Terminated`, Ctrl-C raises KeyboardInterrupt.

    Outside the main thread, and inside another such block, nothing changes. Ctrl-C is left alone if it is ignored, as
    in a shell's background jobs, or if the caller has a handler.

    Args:
        to_the_end: the process ends with this block: once a signal has arrived, later signals stay ignored.
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

    def quiet(unraisable: sys.UnraisableHookArgs) -> None:
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
        for number in numbers:  # at exit the interpreter removes handlers, but an ignored signal stays ignored
            signal.signal(number, signal.SIG_IGN if handler.over else before[number])
        sys.unraisablehook = hook
        _current = None
