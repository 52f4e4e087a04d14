"""A Flower grid without a network: nodes are functions, and their replies arrive in a given order."""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.app.error import Error
from flwr.serverapp import Grid

Client = Callable[[Message], RecordDict | Error | None]

with contextlib.suppress(ImportError):  # flwr below 1.38 writes no task into messages
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


class FakeGrid(Grid):
    """An implementation of Flower's Grid.

    Args:
        clients: functions from a message to a reply's content, an error, or None for no reply, by node.
        order: positions of the sent messages in the order in which their replies arrive; None: as sent.

    Attributes:
        most_alive: the most replies that existed at once.
        sent: nodes of the messages, by type.
    """

    pull_interval = 0.001

    def __init__(self, clients: dict[int, Client], order: Sequence[int] | None = None) -> None:
        self.clients, self.order = clients, order
        self.most_alive = self.alive = self._count = 0
        self.sent: list[tuple[str, list[int]]] = []
        self._waiting: list[tuple[str, Message]] = []

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        return "the run"

    def create_message(self, *args, **named):
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        messages = list(messages)
        for message in messages:
            self._count += 1
            message.metadata.__dict__["_message_id"] = str(self._count)
            ids.append(str(self._count))
        pairs = list(zip(ids, messages, strict=True))
        if self.order is not None and len(pairs) == len(self.order):
            pairs = [pairs[i] for i in self.order]
        self._waiting += pairs
        if messages:
            kinds = messages[0].metadata.message_type
            self.sent.append((kinds, [message.metadata.dst_node_id for message in messages]))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the next replies in the order of arrival, as long as they are asked for."""
        found, asked = [], set(message_ids)
        while self._waiting and self._waiting[0][0] in asked:
            _, message = self._waiting.pop(0)
            made = self.clients[message.metadata.dst_node_id](message)
            if made is None:
                continue
            reply = Message(made, reply_to=message)
            self.alive += 1
            self.most_alive = max(self.most_alive, self.alive)
            weakref.finalize(reply, self._note_gone)
            found.append(reply)
        return found

    def _note_gone(self) -> None:
        self.alive -= 1

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        ids = self.push_messages(messages)
        return list(self.pull_messages(ids))


def arrays_of(model: dict[str, np.ndarray]) -> ArrayRecord:
    """Return a model as Flower's own arrays."""
    return ArrayRecord({key: Array(np.asarray(value)) for key, value in model.items()})


def content(model, weight=1, **metrics) -> RecordDict:
    """Return a reply: arrays (or a dict of NumPy arrays) and metrics."""
    arrays = model if isinstance(model, ArrayRecord) else arrays_of(model)
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": weight, **metrics})})


def client(model, weight=1, **metrics) -> Client:
    """Return a node that answers every message with these arrays.

    Their bytes are new in every reply.
    """
    return lambda message: content(model, weight, **metrics)


def numbers(arrays: ArrayRecord) -> dict[str, np.ndarray]:
    """Return the arrays as NumPy's."""
    return {key: array.numpy() for key, array in arrays.items()}
