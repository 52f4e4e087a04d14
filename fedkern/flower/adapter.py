"""All that depends on Flower: its classes, its grid, its arrays.  Nothing else in fedkern imports flwr.

Written for flwr 1.41 and its message API.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from logging import INFO, WARNING
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedkern.errors import UserError
from fedkern.flower import array_bytes
from fedkern.flower.array_bytes import FLAT, FLOATS, LISTING
from fedkern.flower.model_layout import Layout

VERSIONS = ("1.41",)
"""Versions of flwr that this file is written for."""

_HOW = "pip install 'fedkern[flower]'"


def _check_version() -> None:
    try:
        found = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"fedkern.flower needs Flower, which is not installed: {_HOW}.") from None
    if ".".join(found.split(".")[:2]) not in VERSIONS:
        raise UserError(f"fedkern.flower works with flwr {VERSIONS[-1]}, but flwr {found} is installed: {_HOW}.")


_check_version()

from flwr.app import (  # noqa: E402
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common.logger import log  # noqa: E402
from flwr.serverapp import Grid  # noqa: E402
from flwr.serverapp import strategy as flower  # noqa: E402
from flwr.serverapp.strategy import Result  # noqa: E402
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords  # noqa: E402

__all__ = [
    "INFO",
    "WARNING",
    "Array",
    "ArrayRecord",
    "ConfigRecord",
    "Grid",
    "Message",
    "MessageType",
    "MetricRecord",
    "RecordDict",
    "Result",
    "aggregate_metricrecords",
    "flower",
    "log",
]

_GROUP_BYTES = 4 << 20
"""Most bytes of expected replies that are asked for at once: models larger than this come one at a time."""
_FIRST_PAUSE, _LAST_PAUSE = 0.01, 3.0
"""Seconds between two looks for replies: the pause grows while none comes, up to Flower's own."""

F = TypeVar("F", bound=Callable[..., Any])


def streaming(method: F) -> F:
    """Decorates an ``aggregate_train`` that goes through its replies once, in any order.

    Such a method gets the replies as they arrive, from an iterable that can be read once.  Another one gets a list
    after the last reply has come, as from Flower.
    """
    method.streams = True  # type: ignore[attr-defined]
    return method


class StreamedGrid(Grid):
    """A grid that gives a strategy the replies to training messages one by one, as they arrive.

    Everything else is the grid's own.

    Args:
        grid: the grid of the ServerApp.
        strategy: a `fedkern.flower.averaging.FedAvg`, whose ``begin`` is told what is sent.
    """

    def __init__(self, grid: Grid, strategy: Any) -> None:
        self._grid, self._strategy = grid, strategy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def set_run(self, run: Any) -> None:
        """See Flower's ``Grid``; so for the next methods."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(self, *args: Any, **named: Any) -> Message:
        return self._grid.create_message(*args, **named)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Sends messages and gives their replies: a list, or for training an iterable that waits for each reply."""
        sent = list(messages)
        if not sent or sent[0].metadata.message_type.partition(".")[0] != MessageType.TRAIN:
            return self._grid.send_and_receive(sent, timeout=timeout)
        held = records(sent[0].content, ArrayRecord)
        named = sent[0].content.get(self._strategy.arrayrecord_key)
        arrays = named if isinstance(named, ArrayRecord) else next(iter(held), None)
        self._strategy.begin(arrays, [message.metadata.dst_node_id for message in sent])
        if not getattr(self._strategy.aggregate_train, "streams", False):
            return self._grid.send_and_receive(sent, timeout=timeout)
        size = 0 if arrays is None else sum(len(array.data) for array in arrays.values())
        return Arrivals(self._grid, sent, timeout, max(1, _GROUP_BYTES // max(size, 1)))


class Arrivals:
    """Replies to messages, which are sent at once; iteration waits for each, and keeps none.

    Args:
        grid: where the messages go.
        messages: the messages.
        timeout: seconds from now after which no more is waited for; None: no limit.
        group: most replies that are asked for at once.
    """

    def __init__(self, grid: Grid, messages: Sequence[Message], timeout: float | None, group: int) -> None:
        self._grid, self._group = grid, group
        self._end = None if timeout is None else time.monotonic() + timeout
        ids = list(grid.push_messages(messages))
        self._pending = [name for name in ids if name]
        if len(self._pending) < len(messages):
            log(WARNING, "%s of %s messages could not be sent.", len(messages) - len(self._pending), len(messages))

    def __iter__(self) -> Iterator[Message]:
        longest = float(getattr(self._grid, "pull_interval", _LAST_PAUSE))
        pause = min(_FIRST_PAUSE, longest)
        while self._pending:
            late = self._end is not None and time.monotonic() >= self._end
            answered: set[str] = set()
            for begin in range(0, len(self._pending), self._group):
                found = list(self._grid.pull_messages(self._pending[begin : begin + self._group]))
                answered.update(reply.metadata.reply_to_message_id for reply in found)
                while found:
                    yield found.pop(0)  # not kept in a name, which would outlive the caller's use of the reply
            self._pending = [name for name in self._pending if name not in answered]
            if late or not self._pending:
                return
            pause = min(_FIRST_PAUSE if answered else 1.5 * pause, longest)
            time.sleep(pause)


def nodes(grid: Grid) -> list[int]:
    """The connected nodes, in the order in which they registered, then by id: not as the grid happens to list them."""
    found = [(str(getattr(node, "registered_at", "") or ""), int(node.node_id)) for node in grid.get_nodes()]
    return [node for _, node in sorted(found)]


def record(
    layout: Layout, vector: Tensor | Mapping[str, bytes], whole: Mapping[str, np.ndarray[Any, Any]]
) -> ArrayRecord:
    """A model as Flower's arrays.

    Args:
        layout: the model's layout, plain or flat.
        vector: ``[P]``, the floating entries; or the bytes of their arrays, by key.
        whole: the other entries by key.
    """
    floats = _bytes_of(layout, vector) if isinstance(vector, Tensor) else vector
    made = ArrayRecord()
    if layout.flat:
        made[FLAT] = Array(layout.flat, (layout.size,), FLAT, floats[FLAT])
        listing = layout.listing
        made[LISTING] = Array("uint8", (len(listing),), LISTING, listing)
    for entry in layout.entries:
        if entry.floating and layout.flat:
            continue
        if entry.floating:
            data = floats[entry.key]
        else:
            data = array_bytes.npy_bytes(np.ascontiguousarray(whole[entry.key]), entry.shape)
        made[entry.key] = Array(entry.dtype, entry.shape, array_bytes.NUMPY, data)
    return made


def _bytes_of(layout: Layout, vector: Tensor) -> dict[str, bytes]:
    """The bytes of the arrays of all floating entries, by key."""
    if layout.flat:
        return {FLAT: array_bytes.raw_bytes(vector.to(FLOATS[layout.flat]))}
    made = {}
    for entry in layout.floating:
        numbers = vector[entry.begin : entry.end].to(FLOATS[entry.dtype]).numpy()
        made[entry.key] = array_bytes.npy_bytes(numbers, entry.shape)
    return made


def records(content: RecordDict, kind: type[Any]) -> list[Any]:
    """The records of a kind.

    Flower's own properties for this (``array_records``) make a reference cycle that keeps the arrays alive until the
    garbage collector comes by.
    """
    return [value for value in content.values() if isinstance(value, kind)]


def without_arrays(content: RecordDict) -> RecordDict:
    """The metrics and settings of a reply, without its arrays."""
    return RecordDict({name: value for name, value in content.items() if not isinstance(value, ArrayRecord)})


def to_flat(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> ArrayRecord:
    """See :func:`fedkern.flower.flat_arrays.pack`."""
    forms = []
    for key, value in state.items():
        name = array_bytes.dtype_name(value.dtype) if value.is_floating_point() else value.cpu().numpy().dtype.name
        forms.append((key, tuple(value.shape), name))
    layout = Layout(forms)
    layout.flat = array_bytes.dtype_name(dtype or layout.dtype)
    parts = [state[entry.key].detach().cpu().reshape(-1).to(FLOATS[layout.flat]) for entry in layout.floating]
    vector = torch.cat(parts) if parts else torch.empty(0, dtype=FLOATS[layout.flat])
    return record(layout, vector, {entry.key: state[entry.key].detach().cpu().numpy() for entry in layout.whole})
