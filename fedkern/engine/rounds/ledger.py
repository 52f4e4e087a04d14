"""Bytes sent up and down, per client, exchange and round."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedkern.messages.states import State
from fedkern.methods.base import Phase
from fedkern.methods.uploads import Maybe, Values

NUMBER_BYTES = 8
_COLUMNS = ("up", "down", "one_off_up", "one_off_down")


def message_bytes(message: object) -> int:
    """Return the bytes of a message or its declaration.

    These are its tensors' elements, 8 for a number, the UTF-8 length of a text. A declared size that is open counts 1.
    """
    if isinstance(message, Values):
        return math.prod(size for size in message.shape if isinstance(size, int)) * message.dtype.itemsize
    if isinstance(message, Maybe):
        return message_bytes(message.of)
    if isinstance(message, Tensor):
        return message.numel() * message.element_size()
    if isinstance(message, Mapping):
        return sum(message_bytes(value) for value in message.values())
    if isinstance(message, (list, tuple)):
        return sum(message_bytes(value) for value in message)
    if isinstance(message, str):
        return len(message.encode())
    return 0 if message is None else NUMBER_BYTES


@dataclass
class Ledger:
    """Bytes per client: ``up`` (client to server) and ``down`` in rounds, and both in one-off exchanges.

    ``exchanges`` and ``rounds`` hold bytes of the rounds by name, summed over clients; ``round_sums`` holds the present
    round's by exchange. ``wire`` holds the bytes that left and reached this machine, added by an executor of remote
    clients.
    """

    clients: int
    up: list[int] = field(init=False)
    down: list[int] = field(init=False)
    one_off_up: list[int] = field(init=False)
    one_off_down: list[int] = field(init=False)
    exchanges: dict[str, dict[str, int]] = field(default_factory=dict, init=False)
    rounds: dict[str, dict[str, int]] = field(default_factory=dict, init=False)
    round_sums: dict[str, dict[str, int]] = field(default_factory=dict, init=False, repr=False, compare=False)
    wire: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    # Kept beside the lists, so that a round's bookkeeping does not run over clients that are absent.
    _totals: dict[str, int] = field(init=False, repr=False, compare=False)
    _changed: set[int] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in _COLUMNS:
            setattr(self, name, [0] * self.clients)
        self._totals = dict.fromkeys(_COLUMNS, 0)

    def restore(self, sums: State, rows: Mapping[int, Sequence[int]]) -> None:
        for k, row in rows.items():
            for name, value in zip(_COLUMNS, row, strict=True) if k < self.clients else ():
                getattr(self, name)[k] = value
                self._totals[name] += value
        self.exchanges, self.rounds = sums["exchanges"], sums["rounds"]

    def _row(self, client: int) -> list[int]:
        return [getattr(self, name)[client] for name in _COLUMNS]

    def book(self, client: int, direction: str, message: object, *, phase: Phase | None = None) -> None:
        """Book the bytes of a message from (``"up"``) or to (``"down"``) a client."""
        size = message_bytes(message)
        column = direction if phase is not None else f"one_off_{direction}"
        getattr(self, column)[client] += size
        self._totals[column] += size
        self._changed.add(client)
        if phase is not None:
            self.exchanges.setdefault(phase.exchange, {"up": 0, "down": 0})[direction] += size
            self.round_sums.setdefault(phase.exchange, {"up": 0, "down": 0})[direction] += size
            self.rounds.setdefault(phase.name, {"up": 0, "down": 0})[direction] += size

    def begin_round(self) -> None:
        self.round_sums = {}

    @property
    def total_up(self) -> int:
        return self._totals["up"]

    @property
    def total_down(self) -> int:
        return self._totals["down"]

    @property
    def total(self) -> int:
        return sum(self._totals.values())

    def changed_rows(self) -> dict[int, list[int]]:
        """Return ``up``, ``down``, ``one_off_up``, ``one_off_down`` of every client booked since the last call."""
        rows = {k: self._row(k) for k in sorted(self._changed)}
        self._changed.clear()
        return rows

    def sums(self) -> State:
        return {"exchanges": self.exchanges, "rounds": self.rounds}

    def summary(self) -> State:
        """Return the totals of all clients and of each, and ``exchanges`` if there are several names."""
        return {
            **self._totals,
            "total": self.total,
            **({"exchanges": self.exchanges} if len(self.exchanges) > 1 else {}),
            "clients": {str(k): dict(zip(_COLUMNS, self._row(k), strict=True)) for k in range(self.clients)},
        }
