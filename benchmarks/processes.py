"""Cost of a whole command: seconds, processor seconds and memory of all its processes."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.1
PROC = Path("/proc")


class Failed(Exception):
    """Error of a command with another exit code than 0, whose message repeats its last line."""


@dataclass(frozen=True)
class Cost:
    """Cost of a command.

    Attributes:
        seconds: from its start to its end.
        cpu_seconds: processor time, user and system, of the command and of everything that it started: exact where it
            waited for its children, of others as they were seen last, ten times a second.
        peak_bytes: the most memory that it and its children held at once.  Of one process its largest resident set; of
            several their proportional sets, in which shared pages count once, looked at ten times a second.
        processes: the most that ran at once.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    processes: int


def run(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Cost:
    """Run a command in a session of its own, in ``folder``, and measure it.

    Raises:
        Failed: the command failed.
    """
    errors = folder / "stderr.txt"
    with errors.open("wb") as stderr:
        start = time.perf_counter()
        process = subprocess.Popen(
            list(command), cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=stderr, start_new_session=True,
        )  # fmt: skip
        watch = _Watch(process.pid)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        finally:
            watch.stop()
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = (errors.read_text(errors="replace").strip().splitlines() or [""])[-1]
        raise Failed(f"{' '.join(command)} failed with exit code {process.returncode}: {last}")
    return Cost(
        seconds=seconds,
        cpu_seconds=max(usage.ru_utime + usage.ru_stime, watch.cpu_seconds),
        peak_bytes=max(usage.ru_maxrss * 1024, watch.peak_bytes),
        processes=watch.processes,
    )


def session(leader: int, proc: Path = PROC) -> list[int]:
    """Return the processes of a session, the leader's children that outlived their parents included."""
    members = []
    for entry in proc.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The command's name, in brackets, may hold spaces: state, ppid, pgrp, session follow.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader and fields[0] != "Z":
                    members.append(int(entry.name))
    return members


def proportional_bytes(pid: int, proc: Path = PROC) -> int:
    """Return a process's proportional set, 0 of a process that has ended."""
    with contextlib.suppress(OSError):
        for line in (proc / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def processor_seconds(pid: int, proc: Path = PROC) -> float:
    """Return the processor seconds of a process itself, without its children, 0 of a process that has ended."""
    with contextlib.suppress(OSError):
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


class _Watch:
    """Watcher of a session's processes until it is stopped: of a single process the kernel knows the peak."""

    def __init__(self, leader: int) -> None:
        self.peak_bytes, self.processes = 0, 1
        self._seconds: dict[int, float] = {}
        self._leader, self._over = leader, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            members = session(self._leader)
            self.processes = max(self.processes, len(members))
            for pid in members:
                self._seconds[pid] = max(self._seconds.get(pid, 0.0), processor_seconds(pid))
            if len(members) > 1:
                self.peak_bytes = max(self.peak_bytes, sum(map(proportional_bytes, members)))

    @property
    def cpu_seconds(self) -> float:
        return sum(self._seconds.values())

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
