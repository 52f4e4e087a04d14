"""Lock of a run folder against a second process, even on file systems without locks between machines.

The lock file names its process and machine, and holds a number that the process raises every few seconds.  Another
process watches that number: while it changes, the holder is alive.  Clocks are not compared, as those of two machines
differ.
"""

from __future__ import annotations

import os
import platform
import secrets
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from fedkern.errors import UserError
from fedkern.files import atomic, filesystem
from fedkern.files.filesystem import fcntl

NAME = ".lock"
BEAT = 3.0
"""Seconds between two changes of the number."""
WATCH = 15.0
"""Seconds without a change after which the holder counts as dead."""
SETTLE = 1.0
"""Seconds after which a process that took the file checks that no other took it at the same time."""


class InUse(UserError):
    """Error of a folder in which another process works."""


class FolderLock:
    """Lock of a run folder, held inside a ``with`` statement, or InUse.

    The lock of an ended process of this machine is free at once.  Otherwise the file is watched for up to `WATCH`
    seconds.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._file: BinaryIO | None = None
        self._end = threading.Event()
        self._beats = 0

    def __enter__(self) -> FolderLock:
        with atomic.report_unwritable(self.path):
            file = filesystem.open_to_change(self.path, "r+b", make=True)
            try:
                sure = self._take_lock(file)
                if not _is_dead(before := self._read()):
                    self._watch(before)
                    sure = False
                self._owner = f"{os.getpid()}\n{platform.node()}\n{_machine()}\n{secrets.token_hex(8)}\n"
                os.ftruncate(file.fileno(), 0)
                self._write(file)
                if not sure:
                    time.sleep(SETTLE)
                    self.check()
            except BaseException:
                file.close()
                raise
        self._file = file
        threading.Thread(target=self._beat, args=(file,), daemon=True, name="fedkern-lock").start()
        return self

    def __exit__(self, *exception: object) -> None:
        file, self._file = self._file, None
        self._end.set()
        if file is not None:
            with suppress(OSError), file:
                if self._ours():
                    os.ftruncate(file.fileno(), 0)

    def check(self) -> None:
        """Raise UserError if another process has taken the folder: this process must stop writing there."""
        if not self._ours():
            raise UserError(f"{_name_process(self._read())} has taken over {self.path.parent}: this one stops here.")

    def _take_lock(self, file: BinaryIO) -> bool:
        """Return whether the system gave its lock, False if the system has no locks."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use(self._read()) from None
        except (AttributeError, OSError):  # AttributeError: this system has no fcntl
            return False
        return True

    def _watch(self, before: bytes) -> None:
        end = time.monotonic() + WATCH
        while time.monotonic() < end:
            time.sleep(min(BEAT, WATCH) / 10)
            if not (current := self._read()):
                return
            if current != before:
                raise self._in_use(current)

    def _in_use(self, content: bytes) -> InUse:
        process = _name_process(content)
        return InUse(
            f"{self.path.parent} is in use by {process[0].lower()}{process[1:]}: wait for it, or choose another --out."
        )

    def _beat(self, file: BinaryIO) -> None:
        while not self._end.wait(BEAT):
            with suppress(OSError, ValueError):  # ValueError: closed meanwhile
                if self._ours():
                    self._write(file)

    def _ours(self) -> bool:
        """Return whether the file names this process or was deleted."""
        content = self._read()
        return not content or content.startswith(self._owner.encode())

    def _read(self) -> bytes:
        # Opened anew each time: only then does a network file system look for writes of other machines.
        try:
            return self.path.read_bytes()
        except OSError:
            return b""

    def _write(self, file: BinaryIO) -> None:
        self._beats += 1
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        os.write(file.fileno(), f"{self._owner}{self._beats:012d}\n".encode())
        os.fsync(file.fileno())


def _machine() -> str:
    """Identify this machine since its boot, and its namespace of process numbers."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 (no path)
    return platform.node()


def _is_dead(content: bytes) -> bool:
    """Return whether a lock file names no process, or an ended process of this machine."""
    if not content:
        return True
    lines = content.decode(errors="replace").splitlines()
    # On Windows os.kill would send a Ctrl-C.
    if len(lines) < 3 or lines[2] != _machine() or not lines[0].isdecimal() or sys.platform == "win32":
        return False
    try:
        os.kill(int(lines[0]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass
    return False


def _name_process(content: bytes) -> str:
    lines = content.decode(errors="replace").splitlines()
    return f"Process {lines[0]} on {lines[1]}" if len(lines) > 1 else "Another process"
