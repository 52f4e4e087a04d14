"""Client states of a round: when they are written, and which are dropped."""

from __future__ import annotations

from collections.abc import Callable

from fedkern.engine.context import RunContext
from fedkern.engine.executors.executor import Executor
from fedkern.engine.rounds.progress import Progress
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.uploads.encoders import STATES
from fedkern.errors import UserError
from fedkern.messages.states import State
from fedkern.methods.base import ClientId
from fedkern.privacy import LEDGER


class ClientStates:
    """Writer of changed states, as soon as their client is done, or at the end of rounds that ask for it.

    Args:
        stateless: whether epsilon relies on clients without state.
    """

    def __init__(
        self, executor: Executor, checkpoints: Checkpoints, context: RunContext, progress: Progress, stateless: bool
    ) -> None:
        self.executor, self._checkpoints, self._context = executor, checkpoints, context
        self._progress, self._stateless = progress, stateless
        # File and reader of the state before the round, of clients written in this round.
        self._begun: dict[ClientId, tuple[str | None, Callable[[], State]]] = {}

    @property
    def _late(self) -> bool:
        return self._progress.entry is not None and self._progress.entry.states == "round"

    def finish_exchange(self, k: ClientId) -> None:
        if self._late:
            return
        self._write(k)
        if self._progress.last_exchange:
            self.executor.forget(k)  # its state is on disk; its round_cache is needed no more

    def exclude(self, k: ClientId) -> None:
        """Leave a client out of the rest of the round, with its state from before the round.

        Exceptions are a privacy ledger, as releases count in any case, and a round whose earlier exchanges are not
        written yet. The state is then the present one, except for encoders, which count uploads that have arrived.
        """
        state, written = self.executor.changed_state(k), k in self._begun
        self.executor.forget(k)
        if state is None and written:
            state = self._checkpoints.client_state(k)
        if state is None:
            return
        file, begun = self._begun.get(k) or self._now(k)
        if self._late or LEDGER in state:
            if STATES in state:
                before = begun().get(STATES)
                state = {name: value for name, value in state.items() if name != STATES}
                state |= {} if before is None else {STATES: before}
            self._checkpoints.write_client(k, self._progress.planned + 1, state)
        elif written:
            self._checkpoints.name_client(k, file)

    def end_round(self) -> None:
        if self._late:
            for k in self.executor.working():
                self._write(k)
        self.executor.end_round()
        self._begun.clear()

    def _write(self, k: ClientId) -> None:
        state = self.executor.changed_state(k)
        if state and self._stateless:
            raise UserError(
                "Epsilon assumes that the clients of a round are drawn in secret, as "
                f"{self._context.config.method} is declared stateless, but client "
                f"{self._context.data.client_label(k)} keeps state: declare stateless = False."
            )
        if state is not None:
            self._begun.setdefault(k, self._now(k))
            self._checkpoints.write_client(k, self._progress.planned + 1, state)

    def _now(self, k: ClientId) -> tuple[str | None, Callable[[], State]]:
        return self._checkpoints.clients.get(k), self._checkpoints.reader(k)
