"""A client on its own node: answers the server's messages from its own data, with its state on its own disk.

Only the method's messages travel. Each message names the state that the client's round begins with. A process that has
not seen the round's earlier messages loads that state and replays the messages from its disk. The bits are those of a
client that stays in memory.

Its folder holds the states of its last rounds, and the messages of the current round. A state is written before its
answer is sent. The server names the state that a round begins with: its checkpoints keep the name of the last state
whose answer arrived. So a node need not notice that a server was lost and resumed.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedkern.data.identity import data_fingerprint
from fedkern.engine.client import Client, check_client
from fedkern.engine.context import TAKEN, RunContext
from fedkern.engine.executors.executor import Answer, Handler
from fedkern.engine.executors.serial import Serial
from fedkern.engine.figures.privacy_report import guarantee
from fedkern.engine.local.training import Diverged
from fedkern.engine.marks import PLACES
from fedkern.engine.server import Server
from fedkern.engine.setup import own_model
from fedkern.engine.store.releases import DIVERGED, Releases
from fedkern.errors import ClientFailed, Malformed, UserError, make_printable
from fedkern.files import atomic
from fedkern.files.filesystem import hold_lock, open_regular, parse_json
from fedkern.flower.array_bytes import pack_value, unpack_value
from fedkern.messages import states
from fedkern.methods.base import Message, Phase
from fedkern.methods.common.pooling import Pooling
from fedkern.methods.protocol import BEFORE
from fedkern.models import available
from fedkern.models.precision import compute_in
from fedkern.privacy import LEDGER
from fedkern.privacy.guarantee import Disclosure
from fedkern.process.allocator import keep_freed_memory
from fedkern.process.torch_modes import cpu_threads, reproducible
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import check_data, complete_settings, data_of_one, inspect_items, kept_data, load_data

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


PROTOCOL = 10
"""Version of the messages, which both ends must share."""
CALLEES = ("method", "pooling")
MOST_NAMES, LONGEST_NAME = 256, 200
"""Largest number of a reply's figures and warnings, and longest name of one, in characters."""
LARGEST_FIGURE = 1e100
"""Largest finite figure of a report, because the server adds figures up."""


@dataclass(frozen=True)
class ClientRequest:
    """Header of a server's message, beside the method's message.

    Attributes:
        run: name of the run, 32 hexadecimal digits.
        attempt: name of the server's process, new for a resumed run.
        callee: name of the object whose ``client_update`` is called.
        begin: name of the state that the round begins with.
        oldest: oldest round of the plan whose states the server's checkpoints name.
        threads, client_threads: CPU threads of the run, on which bits depend.
        plan: how far convolutions of a user's network wait (`fedkern.acceleration`), "" to run as written.
        data: fingerprint that the node's data must match, None if nodes have their own data.
    """

    run: str
    attempt: str
    client: int
    callee: str
    phase: Phase
    version: Version
    begin: Version | None
    oldest: int
    last: bool
    threads: int
    client_threads: int
    plan: str
    data: int | None

    def to_dict(self) -> dict[str, object]:
        return {"protocol": PROTOCOL, **vars(self), "phase": [*astuple(self.phase)]}

    @classmethod
    def read(cls, values: object) -> ClientRequest:
        protocol = values.get("protocol") if isinstance(values, dict) else None
        if protocol != PROTOCOL:
            raise Malformed(f"has the form {protocol!r} where this version of fedkern reads {PROTOCOL}")
        table = _check_form(values, _HEADER, "lacks entries of its header, or has others")
        table = {name: value for name, value in table.items() if name != "protocol"}
        if not all(1 <= table[name] <= 1024 for name in ("threads", "client_threads")):
            raise Malformed("has a number out of range")
        if not _RUN.fullmatch(table["run"]):
            raise Malformed("names no run")
        if [type(part) for part in table["phase"]] != [int, str, str] or table["callee"] not in CALLEES:
            raise Malformed("asks for nothing that a client does")
        begin = None if table["begin"] is None else _version(table["begin"])
        return cls(**{**table, "phase": Phase(*table["phase"]), "version": _version(table["version"]), "begin": begin})


_HEADER: dict[str, tuple[type, ...]] = {
    "protocol": (int,), "run": (str,), "attempt": (str,), "client": (int,), "callee": (str,), "phase": (list,),
    "version": (list,), "begin": (list, type(None)), "oldest": (int,), "last": (bool,), "threads": (int,),
    "client_threads": (int,), "plan": (str,), "data": (int, type(None)),
}  # fmt: skip


def _check_form(values: object, form: Mapping[str, tuple[type, ...]], problem: str) -> dict[str, Any]:
    """Return the values, or raise Malformed with ``problem`` unless they have the types of ``form`` (empty: any)."""
    if not isinstance(values, dict) or values.keys() != form.keys():
        raise Malformed(problem)
    if not all(type(values[name]) in kinds for name, kinds in form.items() if kinds):
        raise Malformed(problem)
    return values


def _version(value: list[int]) -> Version:
    is_pair = [type(part) for part in value] == [int, int]
    if not is_pair or not 0 < value[0] < 10**6 or not 0 <= value[1] < 10**6:
        raise Malformed("names no round")
    return Version(*value)


@dataclass
class NodeClients:
    """The clients of a run that work in this process: usually one, several in Flower's simulation.

    Args:
        base: folder of the clients' states of all runs on this node.
        own_data: whether this node's folder holds only its client's data.
        half: whether replies travel as bf16.
    """

    config: RunConfig
    base: Path
    notice: Callable[[str], None]
    own_data: bool = False
    half: bool = False
    _stack: ExitStack = field(default_factory=ExitStack)
    _serial: Serial | None = None
    _places: dict[int, tuple[str, Version]] = field(default_factory=dict)  # attempt and version of the last message
    _known: set[int] = field(default_factory=set)  # clients whose data fit the method

    def answer(self, request: ClientRequest, packed: bytes) -> bytes:
        message = _unpack_message(packed)
        if self._serial is None:
            try:
                self._serial = self._prepare_clients(request)
            except BaseException:
                self._stack.close()
                raise
        self._admit(request.client)
        folder = NodeFolder(self.base, request.run, request.client)
        # No other process may work for this client meanwhile.
        with hold_lock(folder.path / "lock"), cpu_threads(request.client_threads):
            self._restore_client(request, folder)
            if not request.last:
                folder.keep_message(request.version, request.to_dict(), packed)
            reply = self._ask(request, message, folder)
            if request.last:
                folder.drop_messages(request.version.plan + 1)
        return reply

    def close(self) -> None:
        self._stack.close()

    # -- once in a process -----------------------------------------------------------------------------------------

    def _prepare_clients(self, request: ClientRequest) -> Serial:
        keep_freed_memory()
        config = self.config.replace(
            threads=request.threads, client_threads=request.client_threads, plan=request.plan or None
        )
        enter = self._stack.enter_context
        enter(cpu_threads(config.threads))
        enter(reproducible())
        enter(compute_in(config.precision))
        enter(available(config.model, None))
        owner = request.client if self.own_data else None
        context = self._context = on_node(config, lambda text: self.notice(text), owner)
        if request.data is not None and data_fingerprint(context.data) != request.data:
            raise UserError(
                "The data on this node are other than the server's: give all machines the same files or, where the "
                "folder of a node holds the data of its client alone, set flower.own-data=true."
            )
        self._method = method = config.new_method()
        server = Server(context)
        with context.drawing(server, BEFORE):
            method.start(server)  # a method may note in itself what its clients need
        self._guarantee = guarantee(method, server, config.records)
        context.notices.disclosure = Disclosure.of(context.config.records, self._guarantee)
        pooling = Pooling(method, on=config.buffers == "pool")
        handlers: dict[str, Handler] = {"method": method, "pooling": pooling}
        return Serial(context, handlers, lambda _: dict, context.config.client_threads)

    def _admit(self, k: int) -> None:
        if k in self._known:
            return
        clients = self._context.federation.clients
        if k >= clients:
            raise UserError(
                f"This node is client {k}, and the run has {clients} clients, numbered from 0: start it with another "
                "partition-id."
            )
        check_client(self._method, Client(self._context, k, {}))
        self._known.add(k)

    # -- one message -----------------------------------------------------------------------------------------------

    def _restore_client(self, request: ClientRequest, folder: NodeFolder) -> None:
        """Bring the client to its state before this message of the round."""
        assert self._serial is not None  # answer
        plan, number = request.version
        before = request.attempt, Version(plan, number - 1)
        if number and request.client in self._serial.working() and self._places.get(request.client) == before:
            return
        for k in [request.client, *(k for k, (_, version) in self._places.items() if version.plan < plan)]:
            self._places.pop(k, None)
            self._serial.forget(k)  # its round is over, or begins again
        folder.drop_messages(plan)
        earlier = [folder.message(Version(plan, earlier_number)) for earlier_number in range(number)]
        if any(header.get("attempt") != request.attempt for header, _ in earlier):
            raise UserError("The earlier messages of this round are those of another process of the server.")
        self._serial.take(request.client, folder.read_state(request.begin))
        for header, packed in earlier:
            played = ClientRequest.read(header)
            self._serial.ask(played.client, played.callee, played.phase, _unpack_message(packed))

    def _ask(self, request: ClientRequest, message: Message, folder: NodeFolder) -> bytes:
        assert self._serial is not None  # answer
        context, k = self._context, request.client
        context.notices.warnings.clear()
        answer = self._serial.ask(k, request.callee, request.phase, message)
        self._places[k] = request.attempt, request.version
        if (state := self._serial.changed_state(k)) is not None:
            folder.write_state(request.version, state, request.oldest)
        ledger = None if state is None or self._guarantee is None else state.get(LEDGER)
        answer.warnings = dict(context.notices.warnings)
        public, changed = context.notices.disclosure.clients, state is not None
        settings: dict[str, Any] = {"public": public, "changed": changed, "ledger": ledger, "half": self.half}
        try:
            reply = pack_reply(request, answer, **settings)
        except TypeError as error:
            answer = Answer(k, problem=ClientFailed(k, f"its upload cannot travel: {error}"))
            reply = pack_reply(request, answer, **settings)
        if self._guarantee is not None:
            self._keep_digest(request, answer, folder)
        return reply

    def _keep_digest(self, request: ClientRequest, answer: Answer, folder: NodeFolder) -> None:
        """Store the digest of a private run's message before the message leaves its client."""
        releases = Releases(folder.path)
        releases.open(request.oldest)
        message = answer.message if answer.problem is None else DIVERGED
        releases.add(request.version.plan, f"{request.phase.exchange} {request.callee}", request.client, message)
        releases.forget(request.oldest)


def _unpack_message(packed: bytes) -> Message:
    if not isinstance(message := unpack_value(packed), dict):
        raise Malformed("holds no message")
    return message


def pack_reply(
    request: ClientRequest,
    answer: Answer,
    *,
    public: bool = True,
    changed: bool = False,
    ledger: object = None,
    half: bool = False,
) -> bytes:
    """Return the reply of a client. ``public`` is whether it may disclose more than the upload."""
    problem: dict[str, Any] | None = None
    if isinstance(failure := answer.problem, Diverged):
        batch, cause = (failure.batch, failure.what) if public else (0, "")
        problem = {"kind": "diverged", "round": failure.round, "batch": batch, "what": cause}
    elif failure is not None:
        cause, traceback = (failure.what, failure.traceback) if public else ("", "")
        problem = {"kind": "failed", "what": cause, "traceback": traceback}
    reply = {
        "client": request.client,
        "version": list(request.version),
        "message": answer.message,
        "problem": problem,
        "report": answer.report if public else {},
        "warnings": answer.warnings if public else {},
        "marks": sorted(answer.marks),  # marks depend on the method's code, not on the data
        "seconds": answer.seconds if public else 0.0,
        "changed": changed,
        "ledger": ledger,
    }
    return pack_value(reply, half=half)


# -- the server's end of a reply -------------------------------------------------------------------------------------

_REPLY: dict[str, tuple[type, ...]] = {
    "client": (int,), "version": (list,), "report": (dict,), "warnings": (dict,), "marks": (list,),
    "seconds": (float,), "changed": (bool,), "message": (), "problem": (), "ledger": (),
}  # fmt: skip
_PROBLEMS: dict[str, dict[str, tuple[type, ...]]] = {
    "diverged": {"kind": (str,), "round": (int,), "batch": (int,), "what": (str,)},
    "failed": {"kind": (str,), "what": (str,), "traceback": (str,)},
}


def on_node(config: RunConfig, notice: Callable[[str], None] | None = None, owner: int | None = None) -> RunContext:
    """Return the context of a run for a client on its own node.

    ``owner`` is the client whose data alone this machine has (None: this machine has all data).
    """
    if owner is None:
        data = inspect_items(config, load_data(config, notice=notice))
        config = complete_settings(config, data, are_loaded=True)
        data = kept_data(config, data)
    else:
        data = data_of_one(config, notice=notice, node=True)
        (split,) = data.clients
        no_samples = split.subset(torch.zeros(0, dtype=torch.int64))
        data = replace(data, clients=tuple(split if k == owner else no_samples for k in range(config.clients)))
        config = complete_settings(config, data, are_loaded=False)
    if notice is not None and data.form.seen:
        notice(data.form.seen[0])
    check_data(config, data, owner)
    found, _, _ = own_model.find_facts(config, data, None, Path(), known=False)
    return RunContext(config.replace(**found), data, notice)


def read_reply(packed: bytes, client: int, version: Version) -> tuple[Answer, bool, object]:
    """Unpack a reply and check everything but the upload, which the engine checks. Raises Malformed.

    Returns:
        The answer, whether the client's state has changed, and the client's privacy ledger.
    """
    values = _check_form(unpack_value(packed), _REPLY, "is no answer of a fedkern client")
    if values["client"] != client or values["version"] != list(version):
        raise Malformed("answers another message")
    report, warnings = values["report"], values["warnings"]
    if not _has_valid_names(report, TAKEN) or not all(isinstance(value, (int, float)) for value in report.values()):
        raise Malformed("has an invalid report")
    if not all(abs(value) <= LARGEST_FIGURE or not math.isfinite(value) for value in report.values()):
        raise Malformed(f"reports a figure above {LARGEST_FIGURE:g}")
    if not _has_valid_names(warnings) or not all(isinstance(text, str) for text in warnings.values()):
        raise Malformed("has invalid warnings")
    if not all(mark in [*PLACES] for mark in values["marks"]):
        raise Malformed("has invalid marks")
    if not 0 <= values["seconds"] <= LARGEST_FIGURE:
        raise Malformed("has an invalid report")
    answer = Answer(
        client, values["message"], problem=_read_problem(values["problem"], client), report=report,
        warnings={name: make_printable(text) for name, text in warnings.items()}, seconds=values["seconds"],
        marks=frozenset(values["marks"]),
    )  # fmt: skip
    return answer, values["changed"], values["ledger"]


def _has_valid_names(table: dict[object, object], taken: tuple[str, ...] = ()) -> bool:
    names = all(isinstance(name, str) and len(name) <= LONGEST_NAME and name.isprintable() for name in table)
    return len(table) <= MOST_NAMES and names and table.keys().isdisjoint(taken)


def _read_problem(value: object, client: int) -> Diverged | ClientFailed | None:
    if value is None:
        return None
    kind = value.get("kind") if isinstance(value, dict) else None
    problem = _check_form(value, _PROBLEMS.get(str(kind), _PROBLEMS["failed"]), "has an invalid problem")
    if kind == "diverged":
        return Diverged(client, problem["round"], problem["batch"], make_printable(problem["what"]))
    return ClientFailed(client, problem["what"] or "its part of the method raised an exception", problem["traceback"])
