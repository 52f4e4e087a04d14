"""Standard output and error of a process that must not fail because nobody reads them."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

_NAMES = ("stdin", "stdout", "stderr")
_lost = set[int]()
"""Descriptors with a failed write."""
_out: tuple[int, Any] | None = None
"""Standard output within :func:`results_alone`: a copy of its descriptor, and its stream."""


class _Lossy(io.FileIO):
    """A descriptor whose writes succeed, even on a full disk.

    A closed pipe is still an error: ``| head`` ends the command.
    """

    def write(self, content: Any) -> int:
        try:
            return super().write(content) or 0
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            if self.fileno() == 1 and not has_lost_output():
                with suppress(OSError):
                    os.write(2, f"what is printed is lost: {error.strerror}\n".encode())
            _lost.add(self.fileno())
            return len(content)


def has_lost_output() -> bool:
    return 1 in _lost


def open_closed() -> None:
    """Open the null device where a standard stream is closed, as in daemons.

    Otherwise a later file would get the stream's number and what libraries print.
    """
    for number, name in enumerate(_NAMES):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null == number:
                os.set_inheritable(null, True)
            else:
                os.dup2(null, number)  # the copy is inherited
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: PTH123, SIM115


def tolerate_lost_output() -> None:
    """Let the process continue if standard output or error is closed, cannot be written or cannot encode a letter."""
    open_closed()
    for number, name in enumerate(_NAMES[1:], start=1):
        stream = getattr(sys, name)
        with suppress(OSError, ValueError, AttributeError):  # a replaced stream, such as a notebook's
            if stream.fileno() != number:
                continue
            with suppress(OSError):
                stream.flush()
            raw = _Lossy(number, "w", closefd=False)
            lossy = io.TextIOWrapper(
                raw if stream.write_through else io.BufferedWriter(raw), stream.encoding, "backslashreplace",
                line_buffering=stream.line_buffering, write_through=stream.write_through,
            )  # fmt: skip
            setattr(sys, name, lossy)


@contextmanager
def results_alone() -> Iterator[None]:
    """Let standard output take only :func:`print_result` inside the block.

    Prints of users' code, C libraries and child processes go to standard error.
    """
    global _out
    _out = os.dup(1), sys.stdout
    try:
        with _first_descriptor(2), redirect_stdout(sys.stderr):
            yield
    finally:
        os.close(_out[0])
        _out = None


def print_result(result: object) -> None:
    """Print a command's result on standard output: a text as it is, anything else as JSON."""
    import json

    text = result if isinstance(result, str) else json.dumps(result, indent=2, allow_nan=False)
    number, stream = (1, sys.stdout) if _out is None else _out
    with _first_descriptor(number):
        print(text, file=stream, flush=True)


def flush_c_streams() -> None:
    """Write what C libraries have printed. On Windows each library has streams of its own."""
    import ctypes

    if sys.platform != "win32":
        ctypes.CDLL(None).fflush(None)


@contextmanager
def _first_descriptor(descriptor: int) -> Iterator[None]:
    """Redirect descriptor 1 to another one's file inside the block."""
    before = os.dup(1)
    flush_c_streams()
    os.dup2(descriptor, 1)
    try:
        yield
    finally:
        flush_c_streams()
        os.dup2(before, 1)
        os.close(before)
