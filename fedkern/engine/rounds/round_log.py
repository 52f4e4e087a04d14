"""Log of a round's clients: figures of finished clients, reasons of dropped ones, and states to keep or drop."""

import time
from collections.abc import Callable, Mapping

from fedkern.data.sources.items import Items
from fedkern.engine.context import RunContext
from fedkern.engine.executors.executor import Answer, Executor
from fedkern.engine.local.training import Diverged
from fedkern.engine.rounds.progress import Progress
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.uploads.encoders import STATES
from fedkern.errors import ClientFailed, UserError
from fedkern.listeners.events import Listener
from fedkern.messages.states import State
from fedkern.methods.base import ClientId
from fedkern.privacy import LEDGER


class Timing:
    """Clock of a run, with ``phases`` in seconds over the whole run."""

    def __init__(self) -> None:
        self._before, self._started = 0.0, time.perf_counter()
        self.phases: dict[str, float] = {}

    def begin(self) -> None:
        self._started = time.perf_counter()

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    def add(self, phases: Mapping[str, float]) -> None:
        for name, value in phases.items():
            self.phases[name] = self.phases.get(name, 0.0) + value

    def restore(self, seconds: float, phases: Mapping[str, float]) -> None:
        self._before, self.phases = seconds, dict(phases)


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
        if (state := self.executor.changed_state(k)) and self._stateless:
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


class RoundLog:
    """The clients of a round.

    Args:
        hides_dropouts: whether to hide dropped clients, as no noise covers a drop.
        hint: end of the sentence about an undeclared upload, for the method's author.

    Attributes:
        clients: each client's report in this round, by its id as a text.
        reports: the reports, one exchange after another.
        left: clients that are left out of the rest of the round.
        dropped: an entry for every client left out since the last record.
    """

    def __init__(
        self,
        context: RunContext,
        progress: Progress,
        states: ClientStates,
        listener: Listener,
        *,
        hides_dropouts: bool = False,
        hint: str = "",
    ) -> None:
        self._context, self._progress, self._states, self._listener = context, progress, states, listener
        self._hides_dropouts, self._hint = hides_dropouts, hint
        self.clients: dict[str, State] = {}
        self.reports: list[State] = []
        self.excluded: set[ClientId] = set()
        self.dropped: list[State] = []
        self.marks: set[str] = set()

    def begin(self) -> None:
        self.clients, self.reports, self.excluded = {}, [], set()

    # -- who is done -----------------------------------------------------------------------------------------------

    def pass_warnings(self, answer: Answer) -> None:
        self._context.notices.warn_all(answer.warnings)

    def note_done(self, k: ClientId, info: State, seconds: float) -> None:
        self._states.finish_exchange(k)
        self.reports.append(info)
        self.clients.setdefault(str(k), {}).update(info)
        entry = self._context.notices.disclosure.client({**info, "seconds": seconds})
        self._listener.on_client(self._progress.shown_number, k, entry)

    def note(self, k: ClientId, figures: Mapping[str, float]) -> None:
        self.clients[str(k)].update(figures)

    # -- who is left out -------------------------------------------------------------------------------------------

    def note_missing(self, answer: Answer) -> None:
        if answer.absent:
            k, exchange = answer.client, self._progress.exchange
            self.exclude(k, {"exchange": exchange, "reason": answer.absent})
            label, when = self._context.data.client_label(k), self._progress.when(exchange)
            self._warn(f"missing-client-{k}", f"Client {label} was left out {when}, as {answer.absent}.")
        elif answer.problem is not None:
            self._broke(answer.client, answer.problem)
        else:
            self.note_refused(answer.client, answer.refused)

    def note_refused(self, k: ClientId, why: str) -> None:
        """Leave out a client whose upload is unfit, or raise UserError with ``--on-nan stop``."""
        if self._hides_dropouts or not self._context.notices.disclosure.server:
            why = "is not as declared"
        label, exchange = self._context.data.client_label(k), self._progress.exchange
        sentence = f"Client {label}'s upload {self._progress.when(exchange)} {why}"
        if self._context.config.on_nan == "stop":
            raise UserError(f"{sentence}; leave such uploads out with --on-nan skip.{self._hint}")
        self.exclude(k, {"exchange": exchange, "reason": why})
        self._warn(f"refused-upload-{k}", f"{sentence}; it was left out.")

    def exclude(self, k: ClientId, why: State) -> None:
        self._states.exclude(k)
        self.excluded.add(k)
        if not self._hides_dropouts:
            self.note_dropped(k, why)

    def none_left(self) -> None:
        """Raise UserError because the round has no client left.

        A set-up round of named clients may lose all of them, as the run has others.
        """
        if (entry := self._progress.entry) is None or not (entry.one_off and isinstance(entry.participants, tuple)):
            last: State = self.dropped[-1] if self.dropped else {}
            label = self._context.data.client_label(last["client"]) if "reason" in last else ""
            why = f" (client {label}: {last['reason']})" if label else ""
            raise UserError(
                f"No client is left {self._progress.when()}, as all diverged, were refused or dropped out{why}: "
                "lower --lr, set --clip-norm, or lower --dropout-rate where it is given."
            )

    def _broke(self, k: ClientId, problem: Diverged | ClientFailed) -> None:
        when, config = self._progress.when(), self._context.config
        label, public = self._context.data.client_label(k), self._context.notices.disclosure.clients
        why: State = {}
        if isinstance(problem, ClientFailed):
            if config.on_error == "stop":
                raise problem.at(when, label) from problem.__cause__
            where, name = f"Client {label} failed {when}", f"failing-client-{k}"
            if public:
                where, why = f"{where}: {problem.what}", {"reason": problem.what}
        else:
            where, name = f"Client {label} diverged {when}", "diverging-client"
            if public:  # that the upload is missing is visible anyway; the reason is private
                where += f", batch {problem.batch}: {problem.what}"
                why = {"batch": problem.batch, "reason": problem.what}
            if config.on_nan == "stop":
                way = "lower --lr, set --clip-norm, or leave such clients out with --on-nan skip"
                split = self._context.data.clients[k]
                if public and isinstance(split, Items) and (row := split.infinite_item()) is not None:
                    way = f"item {row} of {split.name} holds NaN or infinity: mend it, or leave it out"
                raise UserError(f"{where}; {way}.")
        self.exclude(k, why)
        one_off = self._progress.entry is not None and self._progress.entry.one_off
        consequence = "what it would have made is missing from the run" if one_off else "it was left out of that round"
        self._warn(name, f"{where}; {consequence}.")

    def _warn(self, name: str, text: str) -> None:
        if not self._hides_dropouts:
            self._context.notices.warn(name, text)

    def note_dropped(self, k: ClientId, why: State) -> None:
        self.excluded.add(k)
        at = max(self._progress.shown_number, 0)
        self.dropped = [*self.dropped, {"round": at, "client": k, **self._context.name_entry(k), **why}]
