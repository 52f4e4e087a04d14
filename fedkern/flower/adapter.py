"""The only module that imports flwr: Flower's classes, grid and arrays.

Written for flwr's message API: strategies for 1.26 and later, whole runs for :data:`TESTED`.
"""

from __future__ import annotations

import importlib.metadata
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import ERROR, INFO, WARNING
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fedkern.errors import Malformed, UserError
from fedkern.process.extras import install

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fedkern.flower.model_layout import Layout

TESTED = ("1.41", "1.42")
"""Versions of flwr on which whole runs are tested."""

_OLDEST = (1, 26)
_HOW = install("flower")


def _check_version() -> None:
    try:
        version = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"fedkern.flower needs Flower, which is not installed: {_HOW}.") from None
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise UserError(f"fedkern.flower works with flwr {oldest} and later, but flwr {version} is installed: {_HOW}.")


def warn_of_version() -> None:
    version = importlib.metadata.version("flwr")
    if ".".join(version.split(".")[:2]) not in TESTED:
        tested = " and ".join(TESTED)
        log(WARNING, "whole runs are tested on flwr %s, not on flwr %s, which is installed", tested, version)


_check_version()

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.common.constant import ErrorCode  # noqa: E402
from flwr.common.logger import log  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp import strategy as flower  # noqa: E402
from flwr.serverapp.strategy import Result  # noqa: E402
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords  # noqa: E402

__all__ = [
    "ERROR", "INFO", "WARNING", "Array", "ArrayRecord", "ClientApp", "ConfigRecord", "Context", "Grid", "Message",
    "MessageType", "MetricRecord", "RecordDict", "Result", "ServerApp", "aggregate_metricrecords", "flower", "log",
]  # fmt: skip

_GROUP_BYTES = 4 << 20
"""Most bytes of expected replies to ask for at once. Larger models come one at a time."""
_FIRST_PAUSE, _LAST_PAUSE = 0.01, 3.0
"""Seconds between two looks for replies. The pause grows, up to Flower's own, while no reply comes."""

F = TypeVar("F", bound=Callable[..., object])
R = TypeVar("R")


def streaming(method: F) -> F:
    """Decorate an ``aggregate_train`` that reads its replies once, in any order.

    The method gets replies as they arrive, instead of a list after the last reply.
    """
    method.streams = True  # type: ignore[attr-defined]
    return method


class InformedStrategy(Protocol):
    arrayrecord_key: str
    aggregate_train: Callable[..., object]
    begin: Callable[[ArrayRecord | None, Sequence[int]], None]
    begin_evaluation: Callable[[Sequence[int]], None]


class StreamedGrid:
    """A grid that tells a strategy what it sends (``begin``), and hands on training replies as they arrive."""

    def __init__(self, grid: Grid, strategy: InformedStrategy) -> None:
        self._grid, self._strategy = grid, strategy
        self._send: Callable[..., Iterable[Message]] = grid.send_and_receive

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and return a list of replies, or for training an iterable that waits for each reply."""
        sent = list(messages)
        kind = sent[0].metadata.message_type.partition(".")[0] if sent else ""
        if kind == MessageType.EVALUATE:
            self._strategy.begin_evaluation([message.metadata.dst_node_id for message in sent])
            return list(Arrivals(self._grid, sent, timeout, len(sent)))
        if kind != MessageType.TRAIN:
            return self._send(sent, timeout=timeout)
        array_records = find_records(sent[0].content, ArrayRecord)
        named = sent[0].content.get(self._strategy.arrayrecord_key)
        arrays = named if isinstance(named, ArrayRecord) else next(iter(array_records), None)
        self._strategy.begin(arrays, [message.metadata.dst_node_id for message in sent])
        if not getattr(self._strategy.aggregate_train, "streams", False):
            return self._send(sent, timeout=timeout)
        size = 0 if arrays is None else sum(len(array.data) for array in arrays.values())
        return Arrivals(self._grid, sent, timeout, max(1, _GROUP_BYTES // max(size, 1)))


class Arrivals:
    """Replies to messages, which are sent on construction. Iteration waits for each reply and keeps none.

    At most ``group`` replies are asked for at once, for ``timeout`` seconds (None: no limit).
    """

    def __init__(self, grid: Grid, messages: Sequence[Message], timeout: float | None, group: int) -> None:
        self._grid, self._group = grid, group
        self._end = None if timeout is None else time.monotonic() + timeout
        ids = list(grid.push_messages(messages))
        self._pending = [name for name in ids if name]
        node_ids = [message.metadata.dst_node_id for message in messages]
        self._asked = dict(zip(ids, node_ids, strict=False))
        if len(self._pending) < len(messages):
            log(WARNING, "%s of %s messages could not be sent.", len(messages) - len(self._pending), len(messages))

    def __iter__(self) -> Iterator[Message]:
        longest = float(getattr(self._grid, "pull_interval", _LAST_PAUSE))
        pause = min(_FIRST_PAUSE, longest)
        while self._pending:
            late = self._end is not None and time.monotonic() >= self._end
            answered: set[str] = set()
            for begin in range(0, len(self._pending), self._group):
                replies = list(self._grid.pull_messages(self._pending[begin : begin + self._group]))
                answered.update(reply.metadata.reply_to_message_id for reply in replies)
                self._name_nodes(replies)
                while replies:
                    yield replies.pop(0)  # not kept in a name, which would outlive the caller's use of the reply
            self._pending = [name for name in self._pending if name not in answered]
            if late or not self._pending:
                return
            pause = min(_FIRST_PAUSE if answered else 1.5 * pause, longest)
            time.sleep(pause)

    def _name_nodes(self, replies: Sequence[Message]) -> None:
        """Put the node's number, not the SuperLink's, into errors about unreachable nodes."""
        for reply in replies:
            node = self._asked.get(reply.metadata.reply_to_message_id)
            if node is not None and reply.has_error():
                reply.metadata.__dict__["_src_node_id"] = node


def nodes(grid: Grid) -> list[int]:
    """Return the connected nodes by registration, then id, because the grid's order may change."""
    try:
        listed = list(grid.get_nodes())
    except AttributeError:  # flwr below 1.38 only lists ids
        return sorted(map(int, grid.get_node_ids()))
    pairs = [(str(getattr(node, "registered_at", "") or ""), int(node.node_id)) for node in listed]
    return [node for _, node in sorted(pairs)]


def make_record(
    layout: Layout, vector: Tensor | Mapping[str, bytes], integers: Mapping[str, np.ndarray]
) -> ArrayRecord:
    """Return a model as Flower's arrays: floating entries ``[P]`` or their bytes by key, and ``integers``."""
    import numpy as np  # not above, as with torch: a process that only hands messages on needs neither

    from fedkern.flower.array_bytes import FLAT, FLOATS, LISTING, NUMPY, npy_bytes, raw_bytes

    arrays = ArrayRecord()
    if layout.flat:
        data = vector[FLAT] if isinstance(vector, Mapping) else raw_bytes(vector.to(FLOATS[layout.flat]))
        arrays[FLAT] = Array(layout.flat, (layout.size,), FLAT, data)
        arrays[LISTING] = Array("uint8", (len(layout.listing),), LISTING, layout.listing)
    for entry in layout.entries:
        if not entry.floating:
            data = npy_bytes(np.ascontiguousarray(integers[entry.key]), entry.shape)
        elif layout.flat:
            continue
        elif isinstance(vector, Mapping):
            data = vector[entry.key]
        else:
            data = npy_bytes(vector[entry.begin : entry.end].to(FLOATS[entry.dtype]).numpy(), entry.shape)
        arrays[entry.key] = Array(entry.dtype, entry.shape, NUMPY, data)
    return arrays


def find_records(content: RecordDict, kind: type[R]) -> list[R]:
    """Return the records of a kind.

    Flower's ``array_records`` makes a reference cycle, which keeps arrays alive until the next garbage collection.
    """
    return [value for value in content.values() if isinstance(value, kind)]


def without_arrays(content: RecordDict) -> RecordDict:
    return RecordDict({name: value for name, value in content.items() if not isinstance(value, ArrayRecord)})


# -- whole runs over Flower ------------------------------------------------------------------------------------------

TRAIN, QUERY = MessageType.TRAIN, MessageType.QUERY
_HEADER, _MESSAGE = "fedkern.header", "fedkern.message"
_BYTES = "fedkern.bytes"
"""Encoding of an array: the bytes of a packed message (`fedkern.flower.array_bytes`)."""
_LOST = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)


@dataclass
class NodeReply:
    """A node's reply to a message: ``packed``, unless there is an ``error`` or the content is ``malformed``.

    ``lost`` says that node or message are gone, rather than that the node's app has failed.
    """

    reply_to: str
    packed: bytes | None = None
    error: str = ""
    lost: bool = False
    malformed: str = ""


class NodeChannel:
    """Messages to nodes and their replies. ``sent`` and ``received`` count bytes without Flower's overhead."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.sent = self.received = 0
        self._last: tuple[bytes, ArrayRecord] | None = None  # of a packed message that several nodes get

    def nodes(self) -> list[int]:
        return nodes(self._grid)

    def send(self, node: int, kind: str, header: str, packed: bytes, ttl: float | None) -> str | None:
        """Send a message and return its name, None if Flower has not taken it.

        Message and reply expire after ``ttl`` seconds (None: Flower's 12 hours).
        """
        if self._last is None or self._last[0] is not packed:
            self._last = packed, _in_record(packed)
        content = RecordDict({_HEADER: ConfigRecord({"header": header}), _MESSAGE: self._last[1]})
        self.sent += len(packed) + len(header)
        named = list(self._grid.push_messages([Message(content, node, kind, ttl=ttl)]))
        return named[0] if named and named[0] else None

    def collect_replies(self, names: Sequence[str]) -> list[NodeReply]:
        if not names:
            return []
        arrivals: list[NodeReply] = []
        for reply in self._grid.pull_messages(list(names)):
            to = reply.metadata.reply_to_message_id
            if reply.has_error():
                error = reply.error
                text = str(error.reason or f"error {error.code}")
                arrivals.append(NodeReply(to, error=text, lost=error.code in _LOST))
                continue
            try:
                packed = unpack_message(reply)[1]
                self.received += len(packed)
                arrivals.append(NodeReply(to, packed))
            except Malformed as why:
                arrivals.append(NodeReply(to, malformed=str(why)))
            except Exception as error:  # a node's reply may hold anything, and ends no run
                arrivals.append(NodeReply(to, malformed=f"cannot be read ({type(error).__name__}: {error})"))
        return arrivals


def for_one_message() -> bool:
    """Return whether Flower started this process for one message, with packages that outlive the process.

    SuperNodes do, simulations do not. Flower deletes dependencies installed at run time when the process ends.
    """
    return Path(sys.argv[0]).stem == "flwr-clientapp" and "--allow-runtime-dependency-installation" not in sys.argv


def unpack_message(message: Message) -> tuple[str, bytes]:
    """Return header and packed message, or raise Malformed."""
    header, record = (message.content.get(name) for name in (_HEADER, _MESSAGE))
    text = header.get("header") if isinstance(header, ConfigRecord) else None
    array = record.get(_MESSAGE) if isinstance(record, ArrayRecord) else None
    if not isinstance(text, str) or array is None or array.stype != _BYTES or not isinstance(array.data, bytes):
        raise Malformed("has other records than a message of fedkern")
    return text, array.data


def make_reply(message: Message, packed: bytes) -> Message:
    return Message(RecordDict({_HEADER: ConfigRecord({"header": ""}), _MESSAGE: _in_record(packed)}), reply_to=message)


def _in_record(packed: bytes) -> ArrayRecord:
    return ArrayRecord({_MESSAGE: Array("uint8", (len(packed),), _BYTES, packed)})
