"""Folder of one client on its node's disk: the states of its last rounds, and the messages of the current round.

A state is written before its answer is sent. The server names the state that a round begins with: its checkpoints keep
the name of the last state whose answer arrived. So a node need not notice that a server was lost and resumed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fedkern.errors import UserError
from fedkern.files import atomic
from fedkern.files.filesystem import hold_lock
from fedkern.files.inputs import open_regular, parse_json
from fedkern.messages import states

KEPT_RUNS = 16
_RUN = re.compile(r"[0-9a-f]{32}")
_STATE = re.compile(r"state-(\d{6})-(\d{6})\.safetensors")
_MESSAGE = re.compile(r"message-(\d{6})-(\d{6})\.packed")


class Version(NamedTuple):
    """Name of a state: round of the plan, from 1, and message number in this round, from 0."""

    plan: int
    number: int


class NodeFolder:
    def __init__(self, base: Path, run: str, client: int) -> None:
        self.path = base / run / f"client-{client:05d}"
        new = not (base / run).exists()
        atomic.make_folder(self.path)
        os.utime(base / run)
        if new:
            _drop_runs(base)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Wait until no other process works for this client."""
        with hold_lock(self.path / "lock"):
            yield

    # -- states ----------------------------------------------------------------------------------------------------

    def read_state(self, version: Version | None) -> dict[str, object]:
        if version is None:
            return {}
        try:
            return states.load(self._state(version))
        except ValueError as error:
            raise UserError(
                f"The client's state cannot be read ({error}): put the folder back, or start the run again."
            ) from None

    def write_state(self, version: Version, content: dict[str, object], oldest: int) -> None:
        """Write a state, and delete states that no server checkpoint can name (of rounds before ``oldest``)."""
        states.save(self._state(version), content)
        names = [Version(*numbers) for numbers in self._list_versions(_STATE)]
        before = max((name for name in names if name.plan == version.plan and name < version), default=None)
        for name in names:
            of_this_round = name.plan == version.plan and name not in (version, before)
            if name.plan < oldest or of_this_round:
                self._state(name).unlink(missing_ok=True)

    def _state(self, version: Version) -> Path:
        return self.path / f"state-{version.plan:06d}-{version.number:06d}.safetensors"

    # -- messages --------------------------------------------------------------------------------------------------

    def keep_message(self, version: Version, header: dict[str, object], packed: bytes) -> None:
        """Store a message, in case another process gets the round's next message."""
        atomic.write_bytes(self._message(version), json.dumps(header).encode() + b"\n" + packed)

    def message(self, version: Version) -> tuple[dict[str, object], bytes]:
        try:
            with open_regular(self._message(version)) as file:
                return parse_json(file.readline().decode()), file.read()
        except (OSError, ValueError) as error:
            raise UserError(f"An earlier message of this round cannot be read ({error}).") from None

    def drop_messages(self, plan: int) -> None:
        for numbers in self._list_versions(_MESSAGE):
            if numbers[0] < plan:
                self._message(Version(*numbers)).unlink(missing_ok=True)

    def _message(self, version: Version) -> Path:
        return self.path / f"message-{version.plan:06d}-{version.number:06d}.packed"

    def _list_versions(self, pattern: re.Pattern[str]) -> list[tuple[int, int]]:
        matches = (pattern.fullmatch(path.name) for path in self.path.iterdir())
        return [(int(match[1]), int(match[2])) for match in matches if match is not None]


def _drop_runs(base: Path) -> None:
    runs = [path for path in base.iterdir() if _RUN.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    for path in sorted(runs, key=lambda path: path.stat().st_mtime_ns)[:-KEPT_RUNS]:
        shutil.rmtree(path, ignore_errors=True)
