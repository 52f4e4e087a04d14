"""A client on its own node: answers the server's messages from its own data, with its state on its own disk.

A node makes settings, data and method by itself, as the process of a run does; only messages of the method travel.
Each message names the state that the client's round begins with.  Where this process has not seen the round's earlier
messages (`client_daemon` says when it has), the client begins with that state and answers them once more,
from its disk.  The bits are those of a client that stays in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedkern.data.identity import data_fingerprint
from fedkern.engine import own_model
from fedkern.engine.client import Client, check_client
from fedkern.engine.context import RunContext
from fedkern.engine.executors.base import Answer
from fedkern.engine.executors.serial import Serial
from fedkern.engine.marks import PLACES
from fedkern.engine.node import TAKEN
from fedkern.engine.server import Server
from fedkern.engine.store.releases import DIVERGED, Releases
from fedkern.engine.training import Diverged
from fedkern.errors import ClientFailed, UserError, printable
from fedkern.flower.runs.node_folder import NodeFolder, Version
from fedkern.flower.runs.packed_message import Malformed, PackedMessage
from fedkern.flower.runs.portable import pack, unpack
from fedkern.methods.base import Phase
from fedkern.methods.common.pooling import Pooling
from fedkern.methods.common.privacy_report import guarantee
from fedkern.methods.protocol import BEFORE
from fedkern.models import available
from fedkern.models.precision import computing
from fedkern.privacy import LEDGER
from fedkern.privacy.disclosure import Disclosure
from fedkern.process.allocator import keep_freed_memory
from fedkern.process.torch_modes import cpu_threads, reproducible
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import check_data, data_of_one, effective, inspect_items, kept_data, load_data

PROTOCOL = 8
"""Version of the messages; both ends must have the same."""
ASKERS = ("method", "pooling")
MOST_NAMES, LONGEST_NAME = 256, 200
"""Most figures of a report and warnings of a reply, and most characters of the name of one."""
LARGEST_FIGURE = 1e100
"""Largest finite figure of a report: the server adds figures up."""
_NAME = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class ClientRequest:
    """What a server's message says beside the message of the method.

    Attributes:
        run: name of the run, 32 hexadecimal digits.
        attempt: name of the server's process; a resumed run has another one.
        asker: name of the object whose ``client_update`` is called.
        phase: the exchange.
        version: round of the plan, from 1, and number of the client's message in the round, from 0.
        begin: name of the state that the round begins with; None: the client has none yet.
        oldest: oldest round of the plan whose states the server's checkpoints name.
        last: whether no other message of the round will come.
        threads, client_threads: CPU threads of the run, on which bits depend.
        plan: how far convolutions of a user's network wait (`fedkern.deferred`); "": it runs as written.
        data: fingerprint of the server's data, which the node's must have too; None: the node has data of its own.
    """

    run: str
    attempt: str
    client: int
    asker: str
    phase: Phase
    version: Version
    begin: Version | None
    oldest: int
    last: bool
    threads: int
    client_threads: int
    plan: str
    data: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which :meth:`read` reads."""
        return {
            "protocol": PROTOCOL,
            **{name: value for name, value in vars(self).items() if name not in ("phase", "version", "begin")},
            "phase": [self.phase.round, self.phase.name, self.phase.exchange],
            "version": list(self.version),
            "begin": None if self.begin is None else list(self.begin),
        }

    @classmethod
    def read(cls, values: Any) -> ClientRequest:
        """Checks plain values and makes a request of them.

        Raises:
            Malformed: they are not what :meth:`to_dict` makes.
        """
        if not isinstance(values, dict) or values.get("protocol") != PROTOCOL:
            other = values.get("protocol") if isinstance(values, dict) else None
            raise Malformed(f"has the form {other!r} where this version of fedkern reads {PROTOCOL}")
        table = {name: value for name, value in values.items() if name != "protocol"}
        kinds = {name: str(kind) for name, kind in cls.__annotations__.items()}
        if table.keys() != kinds.keys():
            raise Malformed("lacks entries of its header, or has others")
        for name, kind in kinds.items():
            if kind in ("str", "int", "bool") and type(table[name]).__name__ != kind:
                raise Malformed(f"has {name} of the wrong type")
        threads = table["threads"], table["client_threads"]
        if table["client"] < 0 or table["oldest"] < 0 or not all(1 <= count <= 1024 for count in threads):
            raise Malformed("has a number out of range")
        if not all(_NAME.fullmatch(table[name]) for name in ("run", "attempt")):
            raise Malformed("names no run")
        if table["data"] is not None and (type(table["data"]) is not int or not 0 <= table["data"] < 1 << 32):
            raise Malformed("has no fingerprint of data")
        if table["asker"] not in ASKERS:
            raise Malformed("asks for nothing that a client does")
        phase = table["phase"]
        if not (isinstance(phase, list) and [type(part) for part in phase] == [int, str, str]):
            raise Malformed("names no exchange")
        begin = None if table["begin"] is None else _version(table["begin"])
        return cls(**{**table, "phase": Phase(*phase), "version": _version(table["version"]), "begin": begin})


def _version(value: Any) -> Version:
    is_pair = isinstance(value, list) and [type(part) for part in value] == [int, int]
    if not is_pair or not 0 < value[0] < 10**6 or not 0 <= value[1] < 10**6:
        raise Malformed("names no round")
    return Version(*value)


@dataclass
class _Place:
    """How far a client has come in this process."""

    attempt: str
    version: Version  # of the last message


@dataclass
class NodeClients:
    """The clients of a run that work in this process: usually one, several in Flower's simulation.

    Args:
        base: folder of the clients' states of all runs on this node.
        notice: called with the progress of something long; may be set anew between messages.
        own_data: whether this node's folder holds the data of its client alone.
        half: whether replies travel as bf16 (:func:`~fedkern.flower.runs.portable.pack`).
    """

    config: RunConfig
    base: Path
    notice: Callable[[str], None] | None = None
    own_data: bool = False
    half: bool = False
    _stack: ExitStack = field(default_factory=ExitStack)
    _serial: Serial | None = None
    _places: dict[int, _Place] = field(default_factory=dict)
    _known: set[int] = field(default_factory=set)  # clients whose data fit the method

    def answer(self, request: ClientRequest, packed: PackedMessage) -> PackedMessage:
        """A client's answer to a message of the server, packed for :func:`read_reply`.

        Raises:
            UserError: data, settings or an earlier state are not as they must be on this node.
            Malformed: the message is none of fedkern's.
        """
        message = unpack(packed)
        if not isinstance(message, dict):
            raise Malformed("holds no message")
        if self._serial is None:
            try:
                self._serial = self._prepared(request)
            except BaseException:
                self._stack.close()
                raise
        self._admit(request.client)
        folder = NodeFolder(self.base, request.run, request.client)
        with folder.alone(), cpu_threads(request.client_threads):
            self._go_to(request, folder)
            if not request.last:
                folder.keep_message(request.version, request.to_dict(), packed)
            reply = self._ask(request, message, folder)
            if request.last:
                folder.drop_messages(request.version.plan + 1)
        return reply

    def close(self) -> None:
        """Leaves the precision and the networks that the settings name."""
        self._stack.close()

    # -- once in a process -----------------------------------------------------------------------------------------

    def _prepared(self, request: ClientRequest) -> Serial:
        """Makes data and method, as `fedkern.engine.run.run` does before its first round."""
        keep_freed_memory()
        config = self.config.replace(
            threads=request.threads, client_threads=request.client_threads, plan=request.plan or None
        )
        enter = self._stack.enter_context
        enter(cpu_threads(config.threads))
        enter(reproducible())
        enter(computing(config.precision))
        enter(available(config.model, None))
        context = self._context = on_node(config, self._tell, request.client if self.own_data else None)
        if request.data is not None and data_fingerprint(context.data) != request.data:
            raise UserError(
                "The data on this node are other than the server's: give all machines the same files or, where the "
                "folder of a node holds the data of its client alone, set flower.own-data=true."
            )
        self._method = method = config.new_method()
        server = Server(context)
        with context.drawing(server, BEFORE):
            method.start(server)  # a method may note in itself what its clients need
        self._said = guarantee(method, server, config.records)
        context.notices.disclosure = Disclosure.of(context.config.records, self._said)
        pooling = Pooling(method, on=config.buffers == "pool")
        handlers = {"method": method, "pooling": pooling}
        return Serial(context, handlers, lambda _: dict, context.config.client_threads)

    def _admit(self, k: int) -> None:
        """Checks a client that has not worked in this process yet."""
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

    def _tell(self, text: str) -> None:
        if self.notice is not None:
            self.notice(text)

    # -- one message -----------------------------------------------------------------------------------------------

    def _go_to(self, request: ClientRequest, folder: NodeFolder) -> None:
        """Brings the client to where it was before this message of the round."""
        assert self._serial is not None  # answer
        at = self._places.get(request.client)
        plan, number = request.version
        before = Version(plan, number - 1)
        here = request.client in self._serial.working()
        if number and here and at is not None and at.attempt == request.attempt and at.version == before:
            return
        for k in [request.client, *(k for k, place in self._places.items() if place.version.plan < plan)]:
            self._places.pop(k, None)
            self._serial.forget(k)  # its round is over, or begins again
        folder.drop_messages(plan)
        earlier = [folder.message(Version(plan, each)) for each in range(number)]
        if any(header.get("attempt") != request.attempt for header, _ in earlier):
            raise UserError("The earlier messages of this round are those of another process of the server.")
        self._serial.take(request.client, folder.read_state(request.begin))
        for header, packed in earlier:
            played = ClientRequest.read(header)
            self._serial.ask(played.client, played.asker, played.phase, unpack(packed))

    def _ask(self, request: ClientRequest, message: dict[str, Any], folder: NodeFolder) -> PackedMessage:
        assert self._serial is not None  # answer
        context, k = self._context, request.client
        context.notices.warnings.clear()
        answer = self._serial.ask(k, request.asker, request.phase, message)
        self._places[k] = _Place(request.attempt, request.version)
        state = self._serial.changed(k)
        if state is not None:
            folder.write_state(request.version, state, request.oldest)
        ledger = None if state is None or self._said is None else state.get(LEDGER)
        try:
            reply = self._reply(request, answer, state is not None, ledger)
        except TypeError as error:
            answer = Answer(k, problem=ClientFailed(k, f"its upload cannot travel: {error}"))
            reply = self._reply(request, answer, state is not None, ledger)
        if self._said is not None:
            self._keep_digest(request, answer, folder)
        return reply

    def _reply(self, request: ClientRequest, answer: Answer, changed: bool, ledger: Any) -> PackedMessage:
        public = self._context.notices.disclosure.clients
        return pack(
            {
                "client": request.client,
                "version": list(request.version),
                "message": answer.message,
                "problem": _problem(answer, public),
                "report": answer.report if public else {},
                "warnings": dict(self._context.notices.warnings) if public else {},
                "marks": sorted(answer.marks),  # they tell of the method's code, not of the data
                "seconds": answer.seconds if public else 0.0,
                "changed": changed,
                "ledger": ledger,
            },
            half=self.half,
        )

    def _keep_digest(self, request: ClientRequest, answer: Answer, folder: NodeFolder) -> None:
        """Keeps the digest of a private run's message before the message leaves its client."""
        releases = Releases(folder.path)
        releases.open(request.oldest)
        releases.add(
            request.version.plan,
            f"{request.phase.exchange} {request.asker}",
            request.client,
            answer.message if answer.problem is None else DIVERGED,
        )
        releases.forget(request.oldest)


def failed(request: ClientRequest, what: str, traceback: str) -> PackedMessage:
    """The reply of a client that could not begin to answer."""
    problem = {"kind": "failed", "what": what, "traceback": traceback}
    empty: dict[str, Any] = {"message": None, "report": {}, "warnings": {}, "marks": [], "seconds": 0.0, "ledger": None}
    head = {"client": request.client, "version": list(request.version), "changed": False}
    return pack({**head, **empty, "problem": problem})


def _problem(answer: Answer, public: bool) -> dict[str, Any] | None:
    problem = answer.problem
    if problem is None:
        return None
    if isinstance(problem, Diverged):
        batch, what = (problem.batch, problem.what) if public else (0, "")
        return {"kind": "diverged", "round": problem.round, "batch": batch, "what": what}
    return {"kind": "failed", "what": problem.what if public else "", "traceback": problem.traceback if public else ""}


# -- the server's end of a reply -------------------------------------------------------------------------------------

_REPLY = {
    "client": int, "version": list, "report": dict, "warnings": dict, "marks": list, "seconds": float, "changed": bool,
}  # fmt: skip


@dataclass
class Reply:
    """A client's reply as the server has read it: the answer, whether the client's state changed, and its ledger."""

    answer: Answer
    changed: bool
    ledger: Any


def on_node(config: RunConfig, notice: Callable[[str], None] | None = None, alone: int | None = None) -> RunContext:
    """What all clients of a run share, as :func:`fedkern.engine.run.run` makes it, for a client that works elsewhere.

    ``alone`` is the client whose data alone this machine has; None: this machine has the data of all clients.

    Raises:
        UserError: the data, or the files that the settings name, are not on this machine.
    """
    if alone is None:
        data = inspect_items(config, load_data(config, notice=notice))
        config = effective(config, data, are_loaded=True)
        data = kept_data(config, data)
    else:
        data = data_of_one(config, notice=notice, node=True)
        (split,) = data.clients
        none = split.subset(torch.zeros(0, dtype=torch.int64))
        data = replace(data, clients=tuple(split if k == alone else none for k in range(config.clients)))
        config = effective(config, data, are_loaded=False)
    if notice is not None and data.form.seen:
        notice(data.form.seen[0])
    check_data(config, data, alone)
    found, _, _ = own_model.find_facts(config, data, None, Path(), known=False)
    return RunContext(config.replace(**found), data, notice)


def read_reply(packed: PackedMessage, client: int, version: Version) -> Reply:
    """Unpacks a reply and checks everything but the upload itself, which the engine checks.

    Raises:
        Malformed: the reply is none of fedkern's, or answers another message.
    """
    values = unpack(packed)
    if not isinstance(values, dict) or values.keys() != {*_REPLY, "message", "problem", "ledger"}:
        raise Malformed("is no answer of a fedkern client")
    if any(type(values[name]) is not kind for name, kind in _REPLY.items()):
        raise Malformed("is no answer of a fedkern client")
    if values["client"] != client or values["version"] != list(version):
        raise Malformed("answers another message")
    report, warnings = values["report"], values["warnings"]
    if not _named(report, TAKEN) or not all(isinstance(value, (int, float)) for value in report.values()):
        raise Malformed("has a report that is none")
    if not all(abs(value) <= LARGEST_FIGURE or not math.isfinite(value) for value in report.values()):
        raise Malformed(f"reports a figure above {LARGEST_FIGURE:g}")
    if not _named(warnings) or not all(isinstance(text, str) for text in warnings.values()):
        raise Malformed("has warnings that are none")
    if not all(mark in [*PLACES] for mark in values["marks"]):
        raise Malformed("has marks that are none")
    if not 0 <= values["seconds"] <= LARGEST_FIGURE:
        raise Malformed("has a report that is none")
    answer = Answer(
        client, values["message"], problem=_read_problem(values["problem"], client), report=report,
        warnings={name: printable(text) for name, text in warnings.items()}, seconds=values["seconds"],
        marks=frozenset(values["marks"]),
    )  # fmt: skip
    return Reply(answer, values["changed"], values["ledger"])


def _named(table: dict[Any, Any], taken: tuple[str, ...] = ()) -> bool:
    """Whether a reply's table has few entries, with names that a record may show and none that is ``taken``."""
    names = all(isinstance(name, str) and len(name) <= LONGEST_NAME and name.isprintable() for name in table)
    return len(table) <= MOST_NAMES and names and table.keys().isdisjoint(taken)


def _read_problem(value: Any, client: int) -> Diverged | ClientFailed | None:
    if value is None:
        return None
    forms: dict[str, dict[str, type]] = {
        "diverged": {"kind": str, "round": int, "batch": int, "what": str},
        "failed": {"kind": str, "what": str, "traceback": str},
    }
    form = forms.get(str(value.get("kind"))) if isinstance(value, dict) else None
    if form is None or value.keys() != form.keys() or any(type(value[name]) is not kind for name, kind in form.items()):
        raise Malformed("has a problem that is none")
    if value["kind"] == "diverged":
        return Diverged(client, value["round"], value["batch"], printable(value["what"]))
    return ClientFailed(client, value["what"] or "its part of the method raised an exception", value["traceback"])
