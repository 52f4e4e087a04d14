"""Table of the clients in the checkpoints: a file that grows by the clients of a round, not by all clients.

A manifest with all clients would be rewritten at every commit, however few clients a round has. The first of the
table's JSON lines holds the rows of all clients, and every commit adds a line with changed rows. The manifest has the
table's length at a checkpoint. A table that has grown to twice its first line is started anew in another file, so a
commit writes on average a few times the changed rows.
"""

import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, TypeGuard

from fedkern.files import atomic
from fedkern.files.filesystem import explain_line_ends, open_regular, parse_json

SLACK = 1 << 16
"""Bytes of changes that a table may hold, however short its first line is."""
TABLE = re.compile(r"clients-\d{6,}\.jsonl")
STATE = re.compile(r"client-\d{5,}-\d{6,}\.safetensors")


class Place(TypedDict):
    """A checkpoint's part of a table: name of the file, bytes of it, and their CRC-32."""

    file: str
    bytes: int
    sum: int


@dataclass(frozen=True)
class Row:
    """A client's row in a checkpoint.

    Attributes:
        file: file of the client's state, or None without a state.
        sum: CRC-32 of that file.
        booked: the client's row of the byte ledger (`fedkern.engine.rounds.ledger.Ledger.changed_rows`).
    """

    file: str | None = None
    sum: int | None = None
    booked: tuple[int, ...] = ()


class ClientTable:
    """The table of a run, with the present ``rows`` by client."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.rows: dict[int, Row] = {}
        self._place: Place | None = None
        self._first = 0  # bytes of the file's first line

    @property
    def file(self) -> str | None:
        return None if self._place is None else self._place["file"]

    def open(self, place: Place) -> None:
        """Read the table at a checkpoint, whose ``place`` :meth:`add` returned, and drop later rows."""
        content = _content(self._folder, place)
        self.rows, self._place = _rows(content, place), place
        self._first = content.find(b"\n") + 1

    def add(self, plan: int, rows: Mapping[int, Row]) -> Place:
        """Add changed rows durably, and return the table's new place."""
        self.rows.update(rows)
        line = _line(rows)
        if (place := self._place) is None or place["bytes"] + len(line) > 2 * self._first + SLACK:
            line = _line(self.rows)
            place = {"file": f"clients-{plan:06d}.jsonl", "bytes": 0, "sum": 0}
            atomic.write_bytes(self._folder / place["file"], line)
            self._first = len(line)
        else:
            with atomic.open_in_place(self._folder / place["file"], "r+b", durable=True) as file:
                file.truncate(place["bytes"])  # an interrupted commit may have left a line
                file.seek(place["bytes"])
                file.write(line)
        self._place = {**place, "bytes": place["bytes"] + len(line), "sum": zlib.crc32(line, place["sum"])}
        return self._place


def read_rows(folder: Path, place: Place) -> dict[int, Row]:
    """Return the table's rows at a checkpoint, without changing the folder."""
    return _rows(_content(folder, place), place)


def sound_place(place: object) -> TypeGuard[Place]:
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
            raise ValueError(f"it is not what the run wrote{explain_line_ends(folder / name, zlib.crc32, total, size)}")
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
