"""Byte ledger: bytes sent up and down, per client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedkern.methods.base import Step
from fedkern.methods.uploads import Kept

NUMBER_BYTES = 8


def message_bytes(message: Any) -> int:
    """Bytes of a message's contents: its tensors' elements, 8 for a number, the UTF-8 length of a text."""
    if isinstance(message, (Tensor, Kept)):
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

    ``exchanges`` holds the bytes of the rounds by name of the exchange, ``rounds`` those by name of the round, both
    summed over clients.
    """

    clients: int
    up: list[int] = field(default_factory=list)
    down: list[int] = field(default_factory=list)
    one_off_up: list[int] = field(default_factory=list)
    one_off_down: list[int] = field(default_factory=list)
    exchanges: dict[str, dict[str, int]] = field(default_factory=dict)
    rounds: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("up", "down", "one_off_up", "one_off_down"):
            if not getattr(self, name):
                setattr(self, name, [0] * self.clients)

    def book(self, client: int, direction: str, message: Any, *, step: Step | None = None) -> int:
        """Books a message from (``"up"``) or to (``"down"``) a client and returns its bytes.

        Args:
            step: the communication round and the exchange; None for a one-off exchange.
        """
        size = message_bytes(message)
        getattr(self, direction if step is not None else f"one_off_{direction}")[client] += size
        if step is not None:
            self.exchanges.setdefault(step.exchange, {"up": 0, "down": 0})[direction] += size
            self.rounds.setdefault(step.name, {"up": 0, "down": 0})[direction] += size
        return size

    @property
    def total_up(self) -> int:
        return sum(self.up)

    @property
    def total_down(self) -> int:
        return sum(self.down)

    def summary(self) -> dict[str, Any]:
        """Totals: ``up`` and ``down`` of the rounds, ``one_off_up``, ``one_off_down``, and the ``total`` of these four.

        ``clients`` holds the same four per client.  ``exchanges``, where there are several names of exchanges, holds
        ``up`` and ``down`` of each.
        """
        one_off_up, one_off_down = sum(self.one_off_up), sum(self.one_off_down)
        return {
            "up": self.total_up,
            "down": self.total_down,
            "one_off_up": one_off_up,
            "one_off_down": one_off_down,
            "total": self.total_up + self.total_down + one_off_up + one_off_down,
            **({"exchanges": self.exchanges} if len(self.exchanges) > 1 else {}),
            "clients": {
                str(k): {
                    "up": self.up[k],
                    "down": self.down[k],
                    "one_off_up": self.one_off_up[k],
                    "one_off_down": self.one_off_down[k],
                }
                for k in range(self.clients)
            },
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "up": self.up,
            "down": self.down,
            "one_off_up": self.one_off_up,
            "one_off_down": self.one_off_down,
            "exchanges": self.exchanges,
            "rounds": self.rounds,
        }
