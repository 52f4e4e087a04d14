"""Where a run stands: its round and its exchange."""

from __future__ import annotations

from dataclasses import dataclass

from fedkern.methods.base import Round


@dataclass
class Progress:
    """Where a run stands.

    The loop alone changes it.

    Attributes:
        done: communication rounds done.
        planned: rounds of the method's plan done, one-off ones included.
        entry: the round being played, or the last one; None before this process plays its first.
        index: number of that round as `Phase` has it: from 0, negative for one-off rounds.
        exchange: name of the exchange.
        last_exchange: whether it is the last one of its round.
    """

    done: int = 0
    planned: int = 0
    entry: Round | None = None
    index: int = 0
    exchange: str = ""
    last_exchange: bool = True

    def begin(self, entry: Round) -> None:
        """Begins a round."""
        self.entry, self.index = entry, -1 - self.planned if entry.one_off else self.done

    @property
    def shown_number(self) -> int:
        """Number of the round in events and records: from 1, negative for one-off rounds."""
        return self.index + 1 if self.index >= 0 else self.index

    def when(self, exchange: str | None = None) -> str:
        """Return when something happens, as a part of a sentence.

        Args:
            exchange: the exchange, to be named in the text; None names only set-up rounds.  Default names
                (``"train"``, ``"update"``) are left out: where the exchange has one, the round is named instead.
        """
        entry = self.entry
        if entry is None or entry.one_off:
            name = "" if entry is None else _in_brackets(entry, exchange)
            return (f"after round {self.done}" if self.done else "before the first round") + name
        return f"in round {self.index + 1}" + (_in_brackets(entry, exchange) if exchange is not None else "")


def _in_brackets(entry: Round, exchange: str | None) -> str:
    """Return the exchange or the round by a name of its own, in brackets.

    Empty where neither has one.
    """
    names = [name for name in (entry.name, exchange) if name not in ("train", "update", None)]
    return f' ("{names[-1]}")' if names else ""
