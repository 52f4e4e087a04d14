"""Flower's executor: every client works on its own node, with the bits of the serial executor.

A client's state stays on its node, and the server's checkpoint holds only the state's name, with which a resumed server
tells every node where the round begins. A client whose node is not connected, or that misses the deadline, is left out
of the round. Everything from a node is checked, and malformed replies and undeclared uploads are refused.
"""

import json
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

from fedkern.engine.executors.executor import Answer, Done
from fedkern.engine.executors.ordered import Ordered
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.engine.store.run_folder import NODES
from fedkern.errors import ClientFailed, Malformed, UserError, printable_name
from fedkern.files import atomic
from fedkern.files.filesystem import read_json
from fedkern.flower.adapter import QUERY, TRAIN, NodeChannel, NodeReply
from fedkern.flower.array_bytes import pack_value, unpack_value
from fedkern.flower.runs.node_client import MOST_NAMES, PROTOCOL, ClientRequest, Version, read_reply
from fedkern.methods.base import ClientId, Message, Phase
from fedkern.privacy import LEDGER, Accountant
from fedkern.process.interrupts import check

INTRODUCTION_SECONDS = 60.0
"""Seconds that a new node has to say which client it is, during the rounds."""
MOST_FACTS = 32
_FIRST_PAUSE, _PAUSE, _LAST_PAUSE = 0.01, 0.1, 0.5

Warn = Callable[[str, str], None]


class NodeRegistry:
    """The nodes of a run's clients, for which :meth:`wait_for_nodes` waits ``wait`` seconds.

    Attributes:
        count: number of clients, set before :meth:`wait_for_nodes`.
        home: connected nodes by client, the latest one of several.
        facts: nodes' descriptions of their own data, by client.
    """

    def __init__(self, channel: NodeChannel, *, wait: float, own_data: bool = False) -> None:
        self._channel, self._wait, self._own_data = channel, wait, own_data
        self.count = 0
        self.home: dict[ClientId, int] = {}
        self.facts: dict[ClientId, dict[str, Any]] = {}
        self._warn: Warn = lambda name, text: None
        self._asked: dict[int, float] = {}  # when a node was asked which client it is
        self._waiting: dict[str, int] = {}  # nodes that have not said yet, by message
        self._client_of: dict[int, ClientId] = {}
        self._refused = ""  # why the latest foreign node takes no part

    def wait_for_nodes(self, warn: Warn) -> None:
        """Wait for the nodes of all clients, and go on without some of them after ``wait`` seconds.

        Raises UserError without any node. ``warn`` takes this and later warnings, a name and a sentence.
        """
        self._warn = warn
        end, pause = time.monotonic() + self._wait, _FIRST_PAUSE
        while True:
            check()
            self._get_acquainted()
            missing = [k for k in range(self.count) if k not in self.home]
            if not missing or time.monotonic() >= end:
                break
            pause = min(1.5 * pause, _LAST_PAUSE)
            time.sleep(pause)
        if not self.home:
            raise UserError(
                self._refused
                or f"No node of a client is connected after {self._wait:g} seconds: start a SuperNode for every "
                f"client, with --node-config 'partition-id=K num-partitions={self.count}' for client K."
            )
        if missing:
            names = ", ".join(map(str, missing))
            text = f"Clients without a node when the run began: {names}; rounds go on without them until they connect."
            warn("clients-without-node", text)

    def update(self) -> None:
        """Update the table of nodes, waiting a little for new nodes to say which client they are."""
        self._get_acquainted()
        while any(time.monotonic() - self._asked[node] <= INTRODUCTION_SECONDS for node in self._waiting.values()):
            check()
            time.sleep(_PAUSE)
            self._get_acquainted()

    def _get_acquainted(self) -> None:
        present = self._channel.nodes()
        for node in [node for node in self._asked if node not in present]:
            del self._asked[node]
            self._client_of.pop(node, None)
            self._waiting = {name: asked_node for name, asked_node in self._waiting.items() if asked_node != node}
        for node in present:
            if node not in self._asked:
                self._asked[node] = time.monotonic()
                header = json.dumps({"data": self._own_data})
                name = self._channel.send(node, QUERY, header, pack_value({}), INTRODUCTION_SECONDS * 10)
                if name is not None:
                    self._waiting[name] = node
        for arrived in self._channel.collect_replies(list(self._waiting)):
            if arrived.reply_to in self._waiting:
                node = self._waiting.pop(arrived.reply_to)
                if (client := self._read_introduction(node, arrived)) is not None:
                    self._client_of[node] = client
        self.home = {}
        for node in present:
            if node in self._client_of:
                k = self._client_of[node]
                if k in self.home:
                    # Of a SuperNode that was killed and has come back, the SuperLink lists the old one for a while.
                    text = f"Several nodes say that they are client {k}; the one that connected last works."
                    self._warn("nodes-of-one-client", text)
                self.home[k] = node

    def _read_introduction(self, node: int, arrived: NodeReply) -> ClientId | None:
        """Return the client that a node says it is, None for a foreign node."""
        try:
            if arrived.packed is None:
                raise Malformed(arrived.malformed or f"failed: {arrived.error}")
            if not isinstance(values := unpack_value(arrived.packed), dict):
                values = {}
            spoken, k = values.get("protocol"), values.get("client")
            if spoken != PROTOCOL:
                raise Malformed(
                    f"has form {spoken!r} of fedkern's messages, and the server has form {PROTOCOL}: install one "
                    "version of fedkern on all machines"
                )
            if type(k) is not int:
                raise Malformed("does not say which client it is")
            if not 0 <= k < self.count:
                raise Malformed(f"says that it is client {k}, and the run has {self.count} clients, numbered from 0")
            if self._own_data:
                self.facts[k] = _facts(values.get("data"))
            return k
        except Malformed as why:
            problem = str(why)
        except Exception as error:  # a node may answer anything, and ends no run
            problem = f"gives an answer that cannot be read ({type(error).__name__}: {error})"
        self._refused = f"Node {node} {printable_name(problem, 400)}; it takes no part."
        self._warn(f"foreign-node-{node}", self._refused)
        return None


def _facts(values: object) -> dict[str, Any]:
    if not isinstance(values, dict) or type(values.get("samples")) is not int or not 0 < values["samples"] < 1 << 40:
        raise Malformed("does not say how many samples it has")
    if not all(isinstance(value, (str, int, float, list)) for value in values.values()) or len(values) > MOST_FACTS:
        raise Malformed("does not say what form its data have")
    return dict(values)


STATE = "flower"
"""Entry of a checkpoint's client state with the name of the state on the node."""
MOST_ENTRIES = 1024
"""Most entries of a client's privacy ledger, as each costs accounting time. Equal releases share an entry."""
FAREWELL = 10.0
"""Seconds at the end of a run for the nodes to hear the end. A SuperNode looks for messages every 3 s."""
_AT_ONCE = 16  # replies asked for at once


class Nodes(Ordered):
    """The executor of a run's clients on Flower's nodes.

    Args:
        deadline: seconds within which a client must answer (0: only Flower's limit, 12 hours).
        half: whether messages travel as bf16.
        own_data: whether nodes have their own data, unknown to the server.
    """

    remote = True

    def __init__(
        self,
        run: RunObjects,
        channel: NodeChannel,
        registry: NodeRegistry,
        *,
        deadline: float,
        half: bool,
        own_data: bool,
    ) -> None:
        super().__init__(run.context, run.here, lambda k: cache(run.store.checkpoints.reader(k)))
        self._run, self._channel, self._registry, self._deadline = run, channel, registry, deadline
        self.count = registry.count = run.context.federation.clients
        self._attempt, self._half = uuid.uuid4().hex, half
        self._data = None if own_data else run.store.facts["data"]
        self._booked = {"up": 0, "down": 0}  # bytes of this process that the run has in its sums
        self._names: dict[ClientId, set[str]] = {}  # of figures and warnings in all replies of a client
        self._sent: dict[ClientId, int] = {}  # messages of the round
        # State of this exchange:
        self._end: float | None = None  # when the deadline is
        self._pause = _FIRST_PAUSE
        self._versions: dict[ClientId, Version] = {}
        self._waiting: dict[str, ClientId] = {}  # by the name of a message whose reply has not come
        registry.wait_for_nodes(run.notices.warn)
        self._name = self._load_run_name()

    def _load_run_name(self) -> str:
        """Return the run's name on the nodes, the same in every process of the server."""
        path = self._run.out / NODES
        if path.exists():
            try:
                name = read_json(path)["run"]
                if not re.fullmatch("[0-9a-f]{32}", name):
                    raise ValueError("it names no run")
                return str(name)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is damaged ({error}): put it back, or start the run again.") from None
        name = uuid.uuid4().hex
        atomic.write_bytes(path, (json.dumps({"run": name}) + "\n").encode())
        return name

    # -- the executor ----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._registry.update()
        self._end = time.monotonic() + self._deadline if self._deadline else None
        self._pause = _FIRST_PAUSE
        self._waiting.clear()
        packed: dict[int, bytes] = {}
        for k, (callee, phase, message, encoder) in self._requests.items():
            assert encoder is None  # no filter of a run over Flower has any: an encoder is code, which no node takes
            request = self._request(k, callee, phase)
            self._versions[k] = request.version
            if id(message) not in packed:
                packed[id(message)] = self._pack_message(message)
            if (node := self._registry.home.get(k)) is None:
                self._note_absence(k, "no node of it is connected")
                continue
            name = self._channel.send(
                node, TRAIN, json.dumps(request.to_dict()), packed[id(message)], self._deadline or None
            )
            if name is None:
                self._note_absence(k, "its message could not be sent")
            else:
                self._waiting[name] = k

    def _advance(self, k: ClientId) -> None:
        if k in self._replies:
            return
        late = self._end is not None and time.monotonic() >= self._end
        # Replies of this client, the next one in order, then of some others.
        names = sorted(self._waiting, key=lambda name: self._waiting[name] != k)
        heard = [reply for reply in self._channel.collect_replies(names[:_AT_ONCE]) if reply.reply_to in self._waiting]
        for arrived in heard:
            client = self._waiting.pop(arrived.reply_to)
            self._replies[client] = self._reply(client, arrived)
        if k in self._replies:
            return
        if late:
            self._note_absence(k, f"it had not answered after {self._deadline:g} seconds")
            return
        self._pause = _FIRST_PAUSE if heard else min(1.5 * self._pause, _LAST_PAUSE)
        time.sleep(self._pause if self._end is None else min(self._pause, max(0.0, self._end - time.monotonic())))

    def _note_absence(self, k: ClientId, why: str) -> None:
        self._replies[k] = Done(Answer(k, absent=why))

    def _pack_message(self, message: Message) -> bytes:
        try:
            return pack_value(message, half=self._half)
        except TypeError as error:
            method = self._run.context.config.method
            raise UserError(
                f"{method} cannot work over Flower, as what it sends to clients cannot travel: {error}."
            ) from None

    def _request(self, k: ClientId, callee: str, phase: Phase) -> ClientRequest:
        run = self._run
        name = self._readers[k]().get(STATE)
        version = Version(run.progress.planned + 1, self._sent.get(k, 0))
        self._sent[k] = version.number + 1
        oldest = run.store.checkpoints.oldest(k)
        return ClientRequest(
            run=self._name, attempt=self._attempt, client=k, callee=callee, phase=phase, version=version,
            begin=None if name is None else Version(*name), oldest=version.plan if oldest is None else oldest,
            last=run.progress.last_exchange, threads=run.context.config.threads,
            client_threads=run.context.config.client_threads, plan=run.context.config.plan or "", data=self._data,
        )  # fmt: skip

    def _reply(self, k: ClientId, arrived: NodeReply) -> Done:
        if arrived.lost:
            return Done(Answer(k, absent=f"its node was lost ({printable_name(arrived.error, 200)})"))
        if arrived.error:
            return Done(Answer(k, problem=ClientFailed(k, arrived.error)))
        try:
            if arrived.packed is None:
                raise Malformed(arrived.malformed)
            answer, is_changed, ledger = read_reply(arrived.packed, k, self._versions[k])
            ledger = self._check_ledger(ledger)
            names = self._names.setdefault(k, set())
            names.update(answer.report, answer.warnings)
            if len(names) > MOST_NAMES:  # records and checkpoints keep each
                raise Malformed(f"brings names of figures and warnings beyond the {MOST_NAMES} of a client")
        except Malformed as why:
            return Done(Answer(k, refused=printable_name(str(why), 400)))
        except Exception as error:  # a node's reply may hold anything, and ends no run
            return Done(Answer(k, refused=printable_name(f"cannot be read ({type(error).__name__}: {error})", 400)))
        state = {STATE: list(self._versions[k]), **({} if ledger is None else {LEDGER: ledger})}
        return Done(answer, state if is_changed else None)

    def _check_ledger(self, ledger: Any) -> dict[str, Any] | None:
        if ledger is None or self._run.guarantee is None:
            return None
        try:
            state = Accountant(ledger).state
        except (TypeError, ValueError, AttributeError, OverflowError):
            raise Malformed("has an invalid privacy ledger") from None
        if sum(len(entries) for entries in state.values()) > MOST_ENTRIES:
            raise Malformed(f"has a privacy ledger of more than {MOST_ENTRIES} entries")
        return state

    def forget(self, client: ClientId) -> None:
        super().forget(client)
        self._sent.pop(client, None)

    def end_round(self) -> None:
        super().end_round()
        self._sent.clear()
        if self._run.notices.disclosure.clients:  # lengths of texts depend on what a client does not disclose
            wire = self._run.ledger.wire
            for direction, total in (("up", self._channel.received), ("down", self._channel.sent)):
                wire[direction] = wire.get(direction, 0) + total - self._booked[direction]
                self._booked[direction] = total

    def close(self) -> None:
        """End the run's processes on the nodes, which would otherwise hold its data for a while."""
        with suppress(Exception):  # the run has ended, whatever becomes of them
            header = json.dumps({"end": self._name})
            sent = [self._channel.send(node, QUERY, header, b"", FAREWELL) for node in self._registry.home.values()]
            names = {name for name in sent if name is not None}
            end = time.monotonic() + FAREWELL
            while names and time.monotonic() < end:
                names.difference_update(reply.reply_to for reply in self._channel.collect_replies(list(names)))
                time.sleep(_FIRST_PAUSE if names else 0)
