"""Bytes in records, summary and checkpoints."""

from fedkern.engine.parts.part import Record, RunPart, Summary, register_part
from fedkern.messages.states import State


@register_part("traffic")
class Traffic(RunPart):
    """Part that reports bytes of rounds and run, and books messages before any round."""

    def begin(self, resumed: bool) -> None:
        ledger, context = self._run.ledger, self._run.context
        if not resumed:
            for k, raw in enumerate(context.uploaded):
                ledger.book(k, "up", raw)
            shares_words = any(entry.counted for entry in self._run.plan if not entry.one_off)
            if shares_words and (words := context.words()) is not None:
                for k, client_words in enumerate(words[0]):
                    ledger.book(k, "up", client_words)
                    ledger.book(k, "down", words[1])
        context.uploaded.clear()
        self._run.server.traffic = ledger.rounds

    def before_round(self, record: Record) -> None:
        self._run.ledger.begin_round()

    def round_end(self, record: Record) -> None:
        if record.entry.one_off:
            return
        ledger, sums = self._run.ledger, self._run.ledger.round_sums
        record.put({"bytes_up": ledger.total_up, "bytes_down": ledger.total_down})
        record.put({f"round_bytes_{way}": sum(row[way] for row in sums.values()) for way in ("up", "down")})
        if len(record.exchanges) > 1:
            nothing = {"up": 0, "down": 0}
            record.put({"bytes": {f"train/{name}": sums.get(name, nothing) for name in record.exchanges}})

    def finish(self, summary: Summary) -> None:
        ledger = self._run.ledger
        entry = ledger.summary()
        if self._run.samples_in_secret:  # nobody may know who took part in which round
            del entry["clients"]
        summary.entries["bytes"] = entry
        if ledger.wire:
            summary.entries["wire"] = ledger.wire

    def state(self) -> State:
        ledger = self._run.ledger
        return {"ledger": ledger.sums(), **({"wire": ledger.wire} if ledger.wire else {})}

    def restore(self, state: State) -> None:
        ledger = self._run.ledger
        ledger.restore(state["ledger"], self._run.store.checkpoints.ledger_rows())
        ledger.wire.update(state.get("wire", {}))
