"""Player of stages, one after another within a time limit, which records each outcome."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages import ROOT, Stage

RECORD = "stages.json"
LEAST = 30.0
"""Seconds of the time given with which a stage is still begun that may take longer."""
PASSED, FAILED, CUT = "passed", "failed", "cut short"


@dataclass
class Playing:
    """State of all stages, in a folder.

    Args:
        out: the folder, which is made if missing.
        facts: of the machine and the versions, written beside the results.
        code: name of the tested code; stages that passed with other code are played again.
        seconds: the time limit; None: no limit.
        patience: seconds between the request to end and the kill: a run writes its checkpoint in them.
    """

    out: Path
    facts: Mapping[str, Any]
    code: str
    seconds: float | None = None
    patience: float = 45.0
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._end = None if self.seconds is None else time.monotonic() + self.seconds
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        path = self.out / RECORD
        if path.exists():
            self.done = json.loads(path.read_text())["stages"]

    def play(self, stages: Sequence[Stage], *, again: bool = False) -> list[Stage]:
        """Play the stages that have not passed yet, and return those for which no time was left.

        Stages that began before with the same code, and did not pass, come after all that did not begin: no failure
        keeps the stages behind it from their turn.

        Args:
            stages: in their order.
            again: whether to play passed stages too.
        """
        stages = sorted(stages, key=self._has_begun)
        for i, stage in enumerate(stages):
            if not again and self._has_passed(stage):
                continue
            left = None if self._end is None else self._end - time.monotonic() - self.patience
            if left is not None and left < min(LEAST, stage.seconds):
                return [stage for stage in stages[i:] if again or not self._has_passed(stage)]
            limit = stage.seconds if left is None else min(stage.seconds, left)
            self._note(stage, self._run(stage, limit, cut=limit < stage.seconds))
        return []

    def _has_begun(self, stage: Stage) -> bool:
        return not stage.ready and self.done.get(stage.name, {}).get("code") == self.code

    def _has_passed(self, stage: Stage) -> bool:
        if stage.ready:
            return not subprocess.run(stage.ready, cwd=ROOT, capture_output=True, check=False).returncode
        known = self.done.get(stage.name, {})
        return known.get("outcome") == PASSED and known.get("code") == self.code

    def _run(self, stage: Stage, limit: float, *, cut: bool) -> dict[str, Any]:
        log = self.out / "logs" / f"{stage.name.replace(' ', '-')}.log"
        begun = time.monotonic()
        print(f"{stage.name} ...", flush=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                stage.command, cwd=ROOT, env={**os.environ, **stage.environment}, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process, self.patience)
        outcome = PASSED if code == 0 else FAILED if code is not None or not (cut or stage.goes_on) else CUT
        last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
        return {
            "outcome": outcome,
            "exit": code,
            "seconds": round(time.monotonic() - begun, 1),
            "last": last[-400:],
            "command": list(stage.command),
            "environment": dict(stage.environment),
            "code": self.code,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _note(self, stage: Stage, entry: dict[str, Any]) -> None:
        self.done[stage.name] = entry
        partial = self.out / f"{RECORD}.partial"
        partial.write_text(json.dumps({"machine": dict(self.facts), "stages": self.done}, indent=1) + "\n")
        partial.replace(self.out / RECORD)
        print(f"{stage.name}: {entry['outcome']} in {entry['seconds']:.0f} s; {entry['last']}", flush=True)


def _end(process: subprocess.Popen[Any], patience: float) -> None:
    """End a process and its children: ask first, as Ctrl-C does, so that runs keep their results."""
    for number, seconds in ((signal.SIGINT, patience), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def wait(process: subprocess.Popen[Any]) -> int:
    """Return a process's exit code, and leave a Ctrl-C that is meant for both to the process."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
