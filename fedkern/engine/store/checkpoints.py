"""Checkpoints: files of a round, never rewritten once committed by one manifest that is replaced atomically.

One thread writes them while training continues.
"""

from __future__ import annotations

import json
import re
import shlex
import zlib
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from fedkern.engine.store import releases
from fedkern.engine.store.client_table import STATE, TABLE, ClientTable, Place, Row, read_rows, sound_place
from fedkern.errors import OtherFormat, UserError
from fedkern.files import atomic, filesystem
from fedkern.files.filesystem import describe_file_kind, explain_line_ends, open_regular, report_damage
from fedkern.messages import states
from fedkern.messages.states import State
from fedkern.methods.protocol import Message
from fedkern.privacy import server_secret
from fedkern.settings.config import FOLDER, FORMAT, MANIFEST, read_manifest

PENDING_BYTES = 256 << 20
"""Bytes of content that may wait to be written, beyond which a call waits."""


class BackgroundWriter:
    """One thread that runs jobs in order, and none after a failure.

    A job's content must not change any more. A job must not compute with torch: a second thread would have its own
    OpenMP threads.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fedkern-writer")
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._failed: BaseException | None = None

    def give(self, job: Callable[[], object], size: int) -> Future[None]:
        """Add a job with ``size`` bytes of content, and return its future for :meth:`settle`.

        Raises:
            What an earlier job raised; the new job is not run.
        """
        while self._pending and (
            self._pending[0][0].done() or sum(waiting for _, waiting in self._pending) + size > PENDING_BYTES
        ):
            self._first()
        self._check()
        future = self._thread.submit(self._do, job)
        self._pending.append((future, size))
        return future

    def settle(self, until: Future[None] | None = None) -> None:
        """Wait until all jobs, or all jobs up to ``until``, are done."""
        while self._pending and (until is None or not until.done()):
            self._first()
        self._check()

    def _do(self, job: Callable[[], object]) -> None:
        if self._failed is None:
            try:
                job()
            except BaseException as error:
                self._failed = error

    def _first(self) -> None:
        wait([self._pending[0][0]])  # before the job is removed: Ctrl-C may come while waiting
        self._pending.popleft()

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def close(self) -> None:
        self._thread.shutdown(wait=True)


KEEP = 2
_NAMED = ("server", "participation")
_FILES = re.compile(rf"({'|'.join(_NAMED)})-\d{{6,}}\.safetensors")
_MESSAGES = re.compile(r"messages-(\d{6,})\.safetensors")
_TOLD = 3  # most damaged files named in a message


class Entry(TypedDict):
    """A checkpoint in the manifest (see :class:`Checkpoints`)."""

    round: int
    plan: int
    files: dict[str, int]
    server: str
    participation: NotRequired[str]
    table: Place
    info: State
    sum: NotRequired[int]


class Checkpoints:
    """The checkpoint folder of a run.

    A checkpoint is an entry of the manifest:

    * ``round``: communication rounds done.
    * ``plan``: rounds of the method's plan done, one-off rounds included.
    * ``files``: CRC-32, by name, of the files that are new in this checkpoint or belong to no client.
    * ``server``, ``participation``: files of these states. A run may have no participation state.
    * ``table``: place of the :class:`ClientTable`, which names the clients' files with their CRC-32.
    * ``info``: fingerprints that a resumed run is compared with, and the states of the run's parts by name.
    * ``sum``: CRC-32 of all of these.

    Files carry the plan's round in their name and are never rewritten once committed, so a commit writes only what
    has changed, however many clients are absent. A file that no kept entry names is deleted after the next commit.
    Messages in flight are written once, into ``messages-NNNNNN.safetensors`` of the communication round that sent them,
    which later entries name again.

    Attributes:
        skipped: names of damaged parts of checkpoints that are newer than the opened one.
    """

    def __init__(self, out: Path, writer: BackgroundWriter | None = None) -> None:
        # Absolute for a writer in the background: users' code may change the working folder meanwhile.
        self.folder, self._writer = (out if writer is None else out.absolute()) / FOLDER, writer
        self.entries: list[Entry] = []
        self.clients: dict[int, str] = {}
        self.skipped: list[str] = []
        self._sums: dict[str, int] = {}
        self._waiting: dict[str, states.Packed] = {}  # to be written
        self._last: Future[None] | None = None  # the last commit
        self._loose: list[Path] = []  # written, and not yet flushed to the disk
        self._table = ClientTable(self.folder)
        self._touched: set[int] = set()  # clients with another file than in the last commit
        self._unchecked: dict[str, int] = {}  # CRC-32 of files that another process wrote and nobody has read
        self._named: list[str] = []  # files of the last commit that belong to no client
        self._superseded: dict[str, None] = {}  # files written before, which the next commit does not need
        self._due: list[list[str]] = []  # unneeded files, by number of newer entries

    # -- reading ---------------------------------------------------------------------------------------------------

    def open(self, *, fresh: bool = False, begun: bool = False) -> Entry | None:
        """Return the newest intact entry and delete everything newer, or None before the first commit.

        Args:
            fresh: the run is new, so the folder must not exist. Its manifest is written at once, so that a missing one
                is noticed.
            begun: the run has written records, so there must be a manifest.

        Raises:
            UserError: the manifest or all checkpoints are damaged or missing, or the folder is a link or cannot be
                made.
        """
        atomic.make_folder(self.folder, fresh=fresh)
        filesystem.drop_temporaries(self.folder, _ours)
        if (entries := self._read_manifest()) is None:
            if begun or any(self.folder.iterdir()):
                raise UserError(
                    f"{self.folder / MANIFEST} is missing, though the run has begun: put the file back, or start the "
                    "run again with another --out."
                )
            self._write_manifest([])
        if not entries:
            self._collect(())
            return None
        while entries and (damaged := self._find_damaged(entries[-1])):
            self.skipped.append(f"{', '.join(damaged)} of round {entries.pop()['round']}")
        if not entries:
            raise UserError(f"All checkpoints in {self.folder} are damaged: the run cannot be resumed, start it again.")
        self.entries = entries
        self.clients, self._sums = self.files_of(entries[-1])
        self._table.open(entries[-1]["table"])
        self._unchecked = {name: crc for name, crc in self._sums.items() if name not in entries[-1]["files"]}
        needed = [self._list_needed(entry) for entry in entries]
        self._named = [entries[-1]["server"]]
        self._named += [entries[-1]["participation"]] if "participation" in entries[-1] else []
        self._named += filter(_MESSAGES.fullmatch, entries[-1]["files"])
        self._due = [sorted(before - needed[-1]) for before in needed[:-1]]
        self._collect(set().union(*needed))
        return entries[-1]

    def peek(self) -> Entry | None:
        """Return the newest undamaged entry without checking its files, or None."""
        entries = self._read_manifest()
        return entries[-1] if entries else None

    def last_server_state(self) -> State | None:
        """Return the server's state of the last commit without changing the folder, or None before the first."""
        entry = self.peek()
        self._unchecked = {} if entry is None else dict(entry["files"])
        return None if entry is None else self._load(entry["server"])

    def last_client_state(self, client: int) -> State:
        entry = self.peek()
        self.clients, self._unchecked = ({}, {}) if entry is None else self.files_of(entry)
        return self.client_state(client)

    def files_of(self, entry: Entry) -> tuple[dict[int, str], dict[str, int]]:
        """Return the state file of every client, and the CRC-32 of every file of an entry by name."""
        try:
            rows = read_rows(self.folder, entry["table"])
        except ValueError as error:
            raise UserError(f"The checkpoint cannot be read: {error}.") from None
        named = {k: row.file for k, row in rows.items() if row.file is not None}
        sums = {row.file: row.sum for row in rows.values() if row.file is not None and row.sum is not None}
        return named, {**sums, **entry["files"]}

    def _list_needed(self, entry: Entry) -> set[str]:
        try:
            sums = self.files_of(entry)[1]
        except UserError:  # an older entry, which cannot be resumed
            sums = entry["files"]
        return {*sums, entry["table"]["file"]}

    def ledger_rows(self) -> dict[int, Sequence[int]]:
        return {k: row.booked for k, row in self._table.rows.items() if row.booked}

    def _read_manifest(self) -> list[Entry] | None:
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        with report_damage(f"{path} is damaged", "the run cannot be resumed, start it again"):
            entries = list(read_manifest(path)["entries"])
        sound = [entry for entry in entries if _sound(entry)]
        if entries and not sound:
            raise UserError(f"All entries of {path} are damaged: the run cannot be resumed, start it again.")
        self.skipped = [f"the last entry of {MANIFEST}"] if entries and not _sound(entries[-1]) else []
        return sound

    def _find_damaged(self, entry: Entry) -> list[str]:
        """List missing or damaged files.

        Only the entry's new files are read. Older entries need the others too, so reading those early gains nothing.
        """
        bad = [name for name, value in entry["files"].items() if checksum(self.folder / name) != value]
        try:
            rows = read_rows(self.folder, entry["table"])
        except ValueError:
            return [*bad, entry["table"]["file"]]
        present = {path.name for path in self.folder.iterdir()}
        bad += sorted({row.file for row in rows.values() if row.file is not None} - present - set(entry["files"]))
        return bad if len(bad) <= _TOLD else [*bad[:_TOLD], f"{len(bad) - _TOLD:,} more"]

    def server_state(self) -> State:
        return self._load(self.entries[-1]["server"])

    def participation_state(self) -> State:
        return self._load(self.entries[-1]["participation"]) if "participation" in self.entries[-1] else {}

    def messages_in_flight(self) -> dict[int, dict[int, Message]]:
        """Return the messages in flight by communication round, from 0, and by number."""
        names = [name for name in self.entries[-1]["files"] if _MESSAGES.fullmatch(name)]
        contents = {int(name.partition("-")[2].partition(".")[0]) - 1: self._load(name) for name in names}
        return cast(dict[int, dict[int, Message]], contents)

    def client_state(self, client: int) -> State:
        return self._load(self.clients[client]) if client in self.clients else {}

    def reader(self, client: int) -> Callable[[], State]:
        """Return a function that reads the client's present state.

        The function works until the next commit, even after newer writes.
        """
        name = self.clients.get(client)
        return dict if name is None else lambda: self._load(name)

    def oldest(self, client: int) -> int | None:
        """Return the plan round of the client's oldest kept state, or None without a state."""
        named = [self.clients[client]] if client in self.clients else []
        start = f"client-{client:05d}-"  # of files that older entries need
        named += [name for names in (*self._due, self._superseded) for name in names if name.startswith(start)]
        return min((int(name[-len("000000.safetensors") :][:6]) for name in named), default=None)

    def _load(self, name: str) -> State:
        if (waiting := self._waiting.get(name)) is not None:
            return dict(waiting.state())
        if (crc := self._unchecked.pop(name, None)) is not None and checksum(self.folder / name) != crc:
            raise UserError(f"{self.folder / name} is missing or damaged: put the file back, or start the run again.")
        try:
            return states.load(self.folder / name)
        except ValueError as error:
            raise UserError(f"The checkpoint cannot be read: {error}.") from None

    # -- writing ---------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        if self._writer is not None:
            self._writer.settle()

    def write_at_once(self) -> None:
        self.settle()
        self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _do(self, job: Callable[[], object], size: int = 0) -> Future[None] | None:
        if self._writer is not None:
            return self._writer.give(job, size)
        job()
        return None

    def write_client(self, client: int, plan: int, content: State) -> None:
        """Write a client's new state, which the next commit includes."""
        name = f"client-{client:05d}-{plan:06d}.safetensors"
        self.name_client(client, self._write(name, content) if content else None)

    def name_client(self, client: int, file: str | None) -> None:
        """Make a file, which ``clients`` has or had when the round began, the client's state (None: no state)."""
        if (before := self.clients.pop(client, None)) is not None:
            self._superseded[before] = None
        if file is not None:
            self.clients[client] = file
            self._superseded.pop(file, None)
        self._touched.add(client)

    def commit(
        self,
        *,
        round: int,
        plan: int,
        server: State,
        info: State,
        participation: State | None = None,
        messages: Mapping[int, dict[int, Message]] | None = None,
        before: Callable[[], object] = lambda: None,
        booked: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        """Write the server's state and commit it with all client states as the newest checkpoint.

        Args:
            round, plan, info: see :class:`Checkpoints`.
            messages: messages in flight by communication round, from 0. Rounds of the last commit are not written
                again.
            before: called first; makes durable the other files that the entry refers to.
            booked: rows of the byte ledger that have changed since the last commit, by client.
        """
        if self._writer is not None and self._last is not None:
            self._writer.settle(self._last)  # at most one commit waits: a slow disk would fall ever further behind
        contents = {"server": server, **({"participation": participation} if participation else {})}
        named = {key: self._write(f"{key}-{plan:06d}.safetensors", state) for key, state in contents.items()}
        in_flight = {f"messages-{k + 1:06d}.safetensors": content for k, content in (messages or {}).items()}
        for name in in_flight.keys() - set(self._named):
            self._write(name, in_flight[name])
        entry_files = [*named.values(), *in_flight]
        # Only the last commit may need the files that this one names no more.
        files = [name for name in self._superseded | dict.fromkeys(self._named) if name not in entry_files]
        self._named, self._superseded = entry_files, {}
        changed = {k: self.clients.get(k) for k in {*self._touched, *(booked or {})}}
        self._touched.clear()

        def enter() -> None:
            before()
            self._flush()
            known = {**(self.entries[-1]["files"] if self.entries else {}), **self._sums}
            last = self._table.file
            rows = {}
            for k, file in changed.items():
                old = self._table.rows.get(k, Row())
                total = None if file is None else self._sums.get(file, old.sum)
                rows[k] = Row(file, total, tuple((booked or {}).get(k, old.booked)))
            fresh = {file: self._sums[file] for file in changed.values() if file is not None and file in self._sums}
            place = self._table.add(plan, rows)
            if last is not None and last != place["file"]:
                files.append(last)
            sums = {**{name: known[name] for name in entry_files}, **fresh}
            entry: Entry = {
                "round": round, "plan": plan, "files": sums, "server": named["server"], "table": place, "info": info,
            }  # fmt: skip
            if "participation" in named:
                entry["participation"] = named["participation"]
            self._write_manifest([*self.entries, entry][-KEEP:])
            self._sums.clear()  # the table has the clients' sums now
            self._due.append(files)
            while len(self._due) >= KEEP:
                for name in self._due.pop(0):
                    (self.folder / name).unlink(missing_ok=True)

        self._last = self._do(enter)

    def _flush(self) -> None:
        loose, self._loose = self._loose, []
        for path in loose:
            atomic.flush(path)
        if loose:
            filesystem.sync_folder(self.folder)

    def amend(self, info: State) -> None:
        """Replace ``info`` of the newest checkpoint at once, and keep its files."""
        self.settle()
        self._write_manifest([*self.entries[:-1], Entry({**self.entries[-1], "info": info})])

    def _write_manifest(self, entries: list[Entry]) -> None:
        entries = [Entry({**entry, "sum": entry_sum(entry)}) for entry in entries]
        text = json.dumps({"format": FORMAT, "entries": entries}, indent=1)
        atomic.write_bytes(self.folder / MANIFEST, text.encode())
        self.entries = entries

    def _write(self, name: str, content: State | dict[int, Message]) -> str:
        # The background writer waits for the disk once, before the commit, not for every file.
        path, at_once = self.folder / name, self._writer is None
        try:
            packed = states.Packed(content, durable=at_once)
        except TypeError as error:
            raise UserError(f"The {name.partition('-')[0]}'s {error}.") from None
        self._waiting[name] = packed

        def write() -> None:
            packed.save(path)
            if not at_once:
                self._loose.append(path)
            if (crc := checksum(path)) is None:
                raise UserError(f"{path} vanished while it was written.")
            self._sums[name] = crc
            if self._waiting.get(name) is packed:  # not a later state of the same round
                del self._waiting[name]

        self._do(write, packed.size)
        return name

    def _collect(self, needed: Collection[str]) -> None:
        for name in [path.name for path in self.folder.iterdir()]:
            if name not in needed and (_of_state(name) or TABLE.fullmatch(name)):  # other files are left alone
                (self.folder / name).unlink(missing_ok=True)

    def discard(self) -> None:
        if self.folder.is_dir():
            self._collect(())
            for name in (MANIFEST, releases.NAME, server_secret.NAME):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()


def read_newest(out: Path) -> Entry | None:
    """Return the newest checkpoint of a run folder, or None without a readable manifest."""
    try:
        return Checkpoints(out).peek()
    except OtherFormat:
        raise
    except UserError:  # a damaged manifest says nothing about the other files
        return None


def check_results(out: Path, needed: str) -> None:
    """Compare a finished run's final files with the checksums in its checkpoint.

    Raises:
        UserError: a file was changed, or the file ``needed`` is missing.
    """
    if (entry := read_newest(out)) is None or not entry["info"]["finished"]:
        return
    for name, value in entry["info"]["results"].items():
        if checksum(out / name) == value:
            continue
        if describe_file_kind(out / name) != "missing":
            way = explain_line_ends(out / name, zlib.crc32, value)
            raise UserError(f"{out / name} is not what the run wrote{way or f': {advise_rewriting(out)}'}.")
        if name == needed:
            raise UserError(f"{out / name} is missing: --resume {shlex.quote(str(out))} makes it again.")


def advise_rewriting(out: Path | str) -> str:
    """Return advice for a damaged final file, as a part of a sentence."""
    return f"delete it, and --resume {shlex.quote(str(out))} makes it again"


def entry_sum(entry: Mapping[str, object]) -> int:
    return zlib.crc32(json.dumps({k: v for k, v in entry.items() if k != "sum"}, sort_keys=True).encode())


def _of_state(name: object) -> bool:
    """Return whether a name, before it is joined to the folder, is a state file's."""
    return isinstance(name, str) and any(pattern.fullmatch(name) for pattern in (_FILES, _MESSAGES, STATE))


def _ours(name: str) -> bool:
    return _of_state(name) or bool(TABLE.fullmatch(name)) or name in (MANIFEST, releases.NAME, server_secret.NAME)


def _sound(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.get("sum") != entry_sum(entry):
        return False
    info, sums = entry.get("info"), entry.get("files")
    return (
        all(type(entry.get(key)) is int and entry[key] >= 0 for key in ("round", "plan"))
        and isinstance(info, dict)
        and isinstance(results := info.get("results", {}), dict)
        and all(Path(name).name == name for name in results)
        and isinstance(sums, dict)
        and all(_of_state(name) and type(value) is int for name, value in sums.items())
        and all(isinstance(name := entry.get(key, entry.get("server")), str) and name in sums for key in _NAMED)
        and sound_place(entry.get("table"))
    )


def checksum(path: Path) -> int | None:
    try:
        value = 0
        with open_regular(path) as file:
            while block := file.read(1 << 20):
                value = zlib.crc32(block, value)
        return value
    except OSError:
        return None
