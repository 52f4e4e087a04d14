"""Progress of a run: its round and its exchange."""

from dataclasses import dataclass

from fedkern.methods.base import Round


@dataclass
class Progress:
    """Progress of a run, which only the loop changes.

    Attributes:
        done: communication rounds done.
        planned: rounds of the method's plan done, one-off rounds included.
        entry: the present or last round; None before this process plays its first.
        index: number of that round as in `Phase`: from 0, negative for one-off rounds.
        last_exchange: whether the exchange is the last of its round.
    """

    done: int = 0
    planned: int = 0
    entry: Round | None = None
    index: int = 0
    exchange: str = ""
    last_exchange: bool = True

    def begin(self, entry: Round) -> None:
        self.entry, self.index = entry, -1 - self.planned if entry.one_off else self.done

    @property
    def shown_number(self) -> int:
        """Number of the round in events and records: from 1, negative for one-off rounds."""
        return self.index + 1 if self.index >= 0 else self.index

    def when(self, exchange: str | None = None) -> str:
        """Return the round as a phrase, such as "in round 3".

        Args:
            exchange: an exchange to name. Default names (``"train"``, ``"update"``) are left out, and the round is
                named instead.
        """
        if (entry := self.entry) is None or entry.one_off:
            name = "" if entry is None else _in_brackets(entry, exchange)
            return (f"after round {self.done}" if self.done else "before the first round") + name
        return f"in round {self.index + 1}" + (_in_brackets(entry, exchange) if exchange is not None else "")


def _in_brackets(entry: Round, exchange: str | None) -> str:
    names = [name for name in (entry.name, exchange) if name not in ("train", "update", None)]
    return f' ("{names[-1]}")' if names else ""
