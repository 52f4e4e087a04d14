"""Table of Flower's nodes by client. Nodes are asked for their client when they connect."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from fedkern.errors import Malformed, UserError, printable_name
from fedkern.flower.adapter import QUERY, NodeChannel, NodeReply
from fedkern.flower.runs.node_client import PROTOCOL
from fedkern.flower.runs.portable import pack_value, unpack_value
from fedkern.methods.base import ClientId
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
                client = self._read_introduction(node, arrived)
                if client is not None:
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
