"""Table of the clients in the checkpoints: a file that grows by the clients of a round, not by all clients.

A manifest with all clients would be written anew at every commit, however few clients a round has.  The table is a file
of JSON lines instead.  Its first line holds the row of every client that has one, and every commit adds a line with the
rows that have changed.  The manifest says how many bytes of the file belong to a checkpoint.

A table that has grown to twice its first line is begun anew in another file.  On average a commit therefore writes a
few times the rows that have changed, and the file is at most a few times as long as the rows of all clients.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, TypeGuard

from fedkern.files import atomic
from fedkern.files.inputs import line_ends, open_regular, parse_json

SLACK = 1 << 16
"""Bytes of changes that a table may hold whatever the length of its first line."""
TABLE = re.compile(r"clients-\d{6,}\.jsonl")
STATE = re.compile(r"client-\d{5,}-\d{6,}\.safetensors")


class Place(TypedDict):
    """A checkpoint's part of a table: name of the file, bytes of it, and their CRC-32."""

    file: str
    bytes: int
    sum: int


@dataclass(frozen=True)
class Row:
    """What a checkpoint knows of a client.

    Attributes:
        file: name of the file with the client's state; None where the client has no state.
        sum: CRC-32 of that file.
        booked: the client's row of the byte ledger (`fedkern.engine.rounds.ledger.Ledger.changed_rows`).
    """

    file: str | None = None
    sum: int | None = None
    booked: tuple[int, ...] = ()


class ClientTable:
    """The table of a run.

    Args:
        folder: the folder of the checkpoints.

    Attributes:
        rows: the present row of every client that has one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.rows: dict[int, Row] = {}
        self._place: Place | None = None
        self._first = 0  # bytes of the file's first line

    @property
    def file(self) -> str | None:
        """Name of the table's file.

        None where there is none yet.
        """
        return None if self._place is None else self._place["file"]

    def open(self, place: Place) -> None:
        """Take the table as it was at a checkpoint.

        What was added after it is dropped.

        Args:
            place: what :meth:`add` returned.

        Raises:
            ValueError: the file is missing or damaged.
        """
        content = _content(self._folder, place)
        self.rows, self._place = _rows(content, place), place
        self._first = content.find(b"\n") + 1

    def add(self, plan: int, rows: Mapping[int, Row]) -> Place:
        """Add rows that have changed.

        They are on the disk when the call returns.

        Args:
            plan: rounds of the plan done, for the name of a new file.
            rows: the new rows by client.

        Returns:
            ``file``, the name of the file; ``bytes`` of it that belong to the table; ``sum``, their CRC-32.

        Raises:
            UserError: the file cannot be written.
        """
        self.rows.update(rows)
        line = _line(rows)
        place = self._place
        if place is None or place["bytes"] + len(line) > 2 * self._first + SLACK:
            line = _line(self.rows)
            place = {"file": f"clients-{plan:06d}.jsonl", "bytes": 0, "sum": 0}
            atomic.write_bytes(self._folder / place["file"], line)
            self._first = len(line)
        else:
            with atomic.changing(self._folder / place["file"], "r+b", durable=True) as file:
                file.truncate(place["bytes"])  # an interrupted commit may have left a line
                file.seek(place["bytes"])
                file.write(line)
        self._place = {**place, "bytes": place["bytes"] + len(line), "sum": zlib.crc32(line, place["sum"])}
        return self._place


def read_rows(folder: Path, place: Place) -> dict[int, Row]:
    """Return the rows of the table at a checkpoint, read without changing the folder.

    Args:
        folder: the folder of the checkpoints.
        place: the checkpoint's entry ``table``.

    Raises:
        ValueError: the file is missing or damaged.
    """
    return _rows(_content(folder, place), place)


def sound_place(place: object) -> TypeGuard[Place]:
    """Return whether a checkpoint's entry ``table`` names a table's file, with its length and sum."""
    name, size, total = (place.get(key) if isinstance(place, dict) else None for key in ("file", "bytes", "sum"))
    return isinstance(name, str) and bool(TABLE.fullmatch(name)) and type(size) is int and type(total) is int


def _content(folder: Path, place: Place) -> bytes:
    if not sound_place(place):
        raise ValueError(f"{folder / 'clients.jsonl'} is missing or damaged: it is no table of clients")
    name, size, total = place["file"], place["bytes"], place["sum"]
    try:
        with open_regular(folder / name) as file:
            content = file.read(size) if 0 < size <= os.fstat(file.fileno()).st_size else b""
        if not content or zlib.crc32(content) != total:
            way = line_ends(folder / name, zlib.crc32, total, size)
            raise ValueError(f"it is not what the run wrote{way}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / name} is missing or damaged: {error}") from None
    return content


def _rows(content: bytes, place: Place) -> dict[int, Row]:
    rows: dict[int, Row] = {}
    try:
        for line in content.splitlines():
            for client, (file, total, booked) in parse_json(line.decode()).items():
                if file is not None and not (STATE.fullmatch(file) and type(total) is int):
                    raise ValueError(f"{file} is no file of a client's state")
                if len(booked) not in (0, 4):
                    raise ValueError(f"client {client} has no row of the byte ledger")
                rows[int(client)] = Row(file, total, tuple(int(value) for value in booked))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{place['file']} is damaged: {error}") from None
    return rows


def _line(rows: Mapping[int, Row]) -> bytes:
    table = {str(k): [row.file, row.sum, list(row.booked)] for k, row in sorted(rows.items())}
    return (json.dumps(table) + "\n").encode()
