"""Flower without a network for complete runs: every message passes Flower's serialisation to a fresh node.

A node keeps only what is on its disk, as when Flower starts a process for every message.
"""

import itertools
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedkern.flower.adapter import TRAIN
from fedkern.flower.runs import client_app, node_process
from python_tests.flower.fake_grid import FakeGrid

Fault = Callable[[Message, Context], Message | None]


def travel(message: Message) -> tuple[Message, int]:
    """Return the message as it arrives at the other side, and the bytes of all its parts."""
    contents = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    size = sum(map(len, contents.values()))
    name = message.object_id
    arrived = inflate_object_from_contents(name, contents)
    assert isinstance(arrived, Message)
    arrived.metadata.__dict__["_message_id"] = name
    return arrived, size


class NodeGrid(FakeGrid):
    """An implementation of Flower's Grid, where node ``100 + k`` is client k.

    Args:
        run_config: of the run.
        clients: ids of the clients whose nodes are connected.
        faults: functions instead of the app, by client and number of its message in the run, from 0.
        lives: whether nodes stay in memory between messages, as in Flower's simulation.
        nodes: further entries of the nodes' configurations, by client.

    Attributes:
        connected: clients whose nodes are connected now.
        asked: clients of the messages of training, in the order in which they were sent.
        size: bytes sent and received.
    """

    def __init__(self, run_config, clients, faults=None, *, lives=False, nodes=None):
        self.run_config, self.connected, self.faults, self.lives = run_config, list(clients), faults or {}, lives
        self.nodes = nodes or {}
        self.asked: list[int] = []
        self.size = 0
        self._count = len(self.connected)
        self._numbers = itertools.count()
        self._waiting: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return [100 + k for k in reversed(self.connected)]

    def get_nodes(self) -> Iterable[Any]:
        return [SimpleNamespace(node_id=node, registered_at="") for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            arrived, size = travel(message)
            self.size += size
            name = f"message-{next(self._numbers)}"
            arrived.metadata.__dict__["_message_id"] = name
            self._waiting[name] = arrived
            ids.append(name)
            if arrived.metadata.message_type == TRAIN:
                self.asked.append(arrived.metadata.dst_node_id - 100)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies, the last first: not in the order in which they are used."""
        found = []
        for name in sorted(message_ids, key=lambda name: -int(name.rpartition("-")[2])):
            if name not in self._waiting:
                continue
            reply = self._reply(self._waiting.pop(name))
            if reply is not None:
                arrived, size = travel(reply)
                self.size += size
                found.append(arrived)
        return found

    def _reply(self, message: Message) -> Message | None:
        k = message.metadata.dst_node_id - 100
        node_config = {"partition-id": k, "num-partitions": self._count, **self.nodes.get(k, {})}
        context = Context(1, 100 + k, node_config, RecordDict(), dict(self.run_config))
        fault = None
        if message.metadata.message_type == TRAIN:
            number = sum(client == k for client in self.asked) - 1
            fault = self.faults.get((k, number))
        if not self.lives:
            node_process.drop_clients()
        try:
            return (fault or client_app.app)(message, context)
        except Exception as error:  # as Flower does (supernode/runtime/run_clientapp.py)
            reason = str(type(error)) + ":<'" + str(error) + "'>"
            return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)
        finally:
            if not self.lives:
                node_process.drop_clients()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


def silent(message: Message, context: Context) -> None:
    """Never answer, as a node that hangs."""


def report_gone(message: Message, context: Context) -> Message:
    """Return Flower's error for a node that is gone."""
    return Message(Error(code=ErrorCode.NODE_UNAVAILABLE, reason="Error: Node Unavailable"), reply_to=message)
