"""Bytes in records, summary and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedkern.engine.context import RunContext
from fedkern.engine.ledger import Ledger
from fedkern.engine.parts.base import Part, Record, Summary
from fedkern.engine.registry import register_part
from fedkern.engine.run_objects import RunObjects
from fedkern.engine.server import Server
from fedkern.engine.store.checkpoints import Checkpoints


@register_part("traffic")
class Traffic(Part):
    """Tells the bytes of rounds and run, and books what travels before any round.

    Args:
        ledger: of the run.
        context: of the run.
        server: gets the bytes by name of the round.
        checkpoints: which has clients' rows of the ledger where there are many clients.
        wire: bytes that left and reached this machine; empty where nothing travels.
        shared_words: whether the clients' words make a vocabulary, which travels.
        secret: whether nobody may know who took part in which round.
    """

    def __init__(
        self,
        ledger: Ledger,
        context: RunContext,
        server: Server,
        checkpoints: Checkpoints,
        wire: dict[str, int],
        *,
        shared_words: bool,
        secret: bool,
    ) -> None:
        self._ledger, self._context, self._server, self._checkpoints = ledger, context, server, checkpoints
        self._wire, self._shared_words, self._secret = wire, shared_words, secret

    @classmethod
    def build(cls, run: RunObjects) -> Traffic:
        words = any(entry.booked for entry in run.plan if not entry.one_off)
        return cls(
            run.ledger, run.context, run.server, run.checkpoints, run.wire, shared_words=words, secret=run.amplified
        )

    def begin(self, resumed: bool) -> None:
        if not resumed:
            self._book_beforehand()
        self._context.uploaded.clear()
        self._server.traffic = self._ledger.rounds

    def _book_beforehand(self) -> None:
        """Books raw data for a pooled method, and the words of a shared vocabulary."""
        for k, raw in enumerate(self._context.uploaded):
            self._ledger.book(k, "up", raw)
        words = self._context.words() if self._shared_words else None
        if words is not None:
            for k, client_words in enumerate(words[0]):
                self._ledger.book(k, "up", client_words)
                self._ledger.book(k, "down", words[1])

    def before_round(self, record: Record) -> None:
        self._ledger.begin_round()

    def round_end(self, record: Record) -> None:
        if record.entry.one_off:
            return
        ledger, sums = self._ledger, self._ledger.round_sums
        record.put(
            {
                "bytes_up": ledger.total_up,
                "bytes_down": ledger.total_down,
                "round_bytes_up": sum(each["up"] for each in sums.values()),
                "round_bytes_down": sum(each["down"] for each in sums.values()),
            }
        )
        if len(record.exchanges) > 1:
            nothing = {"up": 0, "down": 0}
            record.put({"bytes": {f"train/{name}": sums.get(name, nothing) for name in record.exchanges}})

    def finish(self, summary: Summary) -> None:
        entry = self._ledger.summary()
        if self._secret:
            del entry["clients"]
        summary.entries["bytes"] = entry
        if self._wire:
            summary.entries["wire"] = self._wire

    def state(self) -> dict[str, Any]:
        ledger = self._ledger.sums() if self._checkpoints.tabled else self._ledger.to_dict()
        return {"ledger": ledger, **({"wire": self._wire} if self._wire else {})}

    def restore(self, state: Mapping[str, Any]) -> None:
        complete = "up" in state["ledger"]  # written where the clients were fewer than a table is for
        self._ledger.restore(state["ledger"], None if complete else self._checkpoints.booked())
        self._wire.update(state.get("wire", {}))
