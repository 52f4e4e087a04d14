"""Budgets ``--max-seconds``, ``--max-bytes`` and ``--max-epsilon``: a round that would exceed one is not begun."""

import time

from fedkern.engine.parts.part import Record, SettingPart, Stop, register_part
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.messages.states import State


class _Budget(SettingPart):
    """Ends the run before a communication round if less is left than the most expensive one so far took.

    The first round begins while anything is left. The budget is a setting under the part's name.
    """

    unit = ""

    def __init__(self, run: RunObjects) -> None:
        super().__init__(run)
        self._most: float = getattr(run.config, self.name)
        self._dearest = 0.0

    def amount_spent(self) -> float:
        raise NotImplementedError

    def of_round(self, record: Record) -> float:
        raise NotImplementedError

    def before_round(self, record: Record) -> Stop | None:
        spent = self.amount_spent()
        if record.entry.one_off or (spent < self._most and spent + self._dearest <= self._most):
            return None
        name = self.name.replace("_", "-")
        reason = f"{spent:,.0f} {self.unit} are spent, and a round takes up to {self._dearest:,.0f}"
        return Stop(name, f"{reason} (--{name} {self._most:g})")

    def round_end(self, record: Record) -> None:
        if not record.entry.one_off:
            self._dearest = max(self._dearest, self.of_round(record))

    def state(self) -> State:
        return {"dearest": self._dearest}

    def restore(self, state: State) -> None:
        self._dearest = state["dearest"]


@register_part("max_seconds")
class MaxSeconds(_Budget):
    """Budget of seconds of work, over all resumptions."""

    unit = "seconds"

    def amount_spent(self) -> float:
        return self._run.timing.seconds()

    def of_round(self, record: Record) -> float:
        return time.perf_counter() - record.started


@register_part("max_bytes")
class MaxBytes(_Budget):
    """Budget of bytes that clients send and receive, set-up rounds included."""

    unit = "bytes"

    def amount_spent(self) -> float:
        return self._run.ledger.total

    def of_round(self, record: Record) -> float:
        return sum(row["up"] + row["down"] for row in self._run.ledger.round_sums.values())


@register_part("max_epsilon")
class MaxEpsilon(SettingPart):
    """Budget of the epsilon of ``--dp-noise``, which is known before a round."""

    def before_round(self, record: Record) -> Stop | None:
        private, done = self._run.private, self._run.progress.done
        assert private is not None
        if done < private.allowed_rounds:
            return None
        reason = f"epsilon is {private.epsilon(done):.3g}, and of one more round {private.epsilon(done + 1):.3g}"
        return Stop("max-epsilon", f"{reason} (--max-epsilon {self._run.config.max_epsilon:g})")
