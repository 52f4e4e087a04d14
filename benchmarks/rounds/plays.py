"""Player of a program in a process of its own: the beginnings of its rounds, its accuracy, its memory."""

import itertools
import json
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.processes import proportional_bytes

from .task import DEVICE

ROOT = Path(__file__).parents[2]
PROC = Path("/proc")
MARK = "FEDKERN_ROUNDS"  # in the environment of a program's processes, with a word of its own
WATCH_SECONDS = 0.1
PATIENCE_SECONDS = 5.0  # for what a program leaves behind


@dataclass(frozen=True)
class Program:
    """Program to play.

    Attributes:
        name: in the table.
        adapter: module in this folder.
        python: interpreter that has the framework.
        threads: torch's threads of a process that trains.
        workers: processes that train at once.
        words: further arguments of the adapter.
        device: "cpu" or "cuda".
    """

    name: str
    adapter: str
    python: Path
    threads: int = 1
    workers: int = 1
    words: tuple[str, ...] = ()
    device: str = "cpu"


class Judged(Protocol):
    """Folder that programs read, and the accuracy of a network that one of them writes."""

    folder: Path

    def accuracy(self, state: Mapping[str, Tensor]) -> float: ...


class Failed(Exception):
    """Error of a program that did not finish, with the reason."""


@dataclass
class Played:
    """Result of one play.

    Attributes:
        startup: seconds until the first round began.
        rounds: seconds of every round but the last, which has no end.
        accuracy: of the last global network.
        peak: bytes of all processes at the highest point seen, if measured and known to /proc.
        said: the adapter's words about itself.
    """

    startup: float
    rounds: list[float]
    accuracy: float
    peak: int | None = None
    said: dict[str, str] = field(default_factory=dict)


def play(program: Program, task: Judged, *, watch: bool = False, limit: float = 3600.0) -> Played:
    """Play the task's rounds.

    Args:
        watch: look at the memory all the time, which costs time: not for the plays that are timed.
        limit: seconds after which a program is ended.

    Raises:
        Failed: the program failed, or took longer than ``limit``.
    """
    word = f"{MARK}={uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="rounds-") as folder:
        out = Path(folder)
        command = [str(program.python), "-m", f"benchmarks.rounds.{program.adapter}", str(task.folder), str(out)]
        command += [str(program.threads), str(program.workers), *program.words]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(program.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            MARK: word.partition("=")[2],
            DEVICE: program.device,
        }
        log = out / "log"
        start = time.monotonic()
        with log.open("wb") as written:
            process = subprocess.Popen(
                command, cwd=out, env=environment, stdout=written, stderr=written, start_new_session=True
            )
        peak = 0
        try:
            while process.poll() is None:
                if time.monotonic() - start > limit:
                    raise Failed(f"it took longer than {limit:.0f} s")
                if watch:
                    peak = max(peak, sum(map(proportional_bytes, family(process.pid, word))))
                time.sleep(WATCH_SECONDS)
        finally:
            end(process, word)
        if process.returncode or not (out / "marks.json").exists():
            raise Failed(last_words(log.read_text(errors="replace")) or f"exit code {process.returncode}")
        answer = json.loads((out / "marks.json").read_text())
        marks = answer["marks"]
        accuracy = task.accuracy(torch.load(out / "final.pt", weights_only=True))
    rounds = [after - before for before, after in itertools.pairwise(marks)]
    return Played(marks[0] - start, rounds, accuracy, peak or None, {k: v for k, v in answer["said"].items() if v})


def last_words(log: str) -> str:
    """Return the last line that a failed program wrote."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def family(pid: int, word: str) -> list[int]:
    """Return a process, its descendants, and all processes with the word in their environment (such as daemons)."""
    parents: dict[int, int] = {}
    members = {pid}
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # Behind the name, which stands in parentheses and may hold anything, come the state and the parent.
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if word.encode() in (entry / "environ").read_bytes().split(b"\0"):
                members.add(int(entry.name))
        except (OSError, IndexError, ValueError):
            continue  # it has ended, or is not ours
    grown = True
    while grown:
        found = {child for child, parent in parents.items() if parent in members} - members
        members |= found
        grown = bool(found)
    return sorted(members)


def end(process: subprocess.Popen[bytes], word: str) -> None:
    """End a program with everything that it started: gently, then not."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            left = [pid for pid in family(process.pid, word) if pid != process.pid or process.poll() is None]
            if not left:
                return
            for pid in left:
                try:
                    os.kill(pid, sign)
                except ProcessLookupError:
                    continue
            time.sleep(WATCH_SECONDS)
