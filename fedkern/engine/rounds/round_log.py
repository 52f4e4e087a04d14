"""Log of a round's clients: figures of finished clients, and reasons of dropped ones."""

from __future__ import annotations

from collections.abc import Mapping

from fedkern.engine.context import RunContext
from fedkern.engine.executors.executor import Answer
from fedkern.engine.local.training import Diverged
from fedkern.engine.rounds.client_states import ClientStates
from fedkern.engine.rounds.progress import Progress
from fedkern.errors import ClientFailed, UserError
from fedkern.listeners.events import Listener
from fedkern.messages.states import State
from fedkern.methods.base import ClientId


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
        for name, text in answer.warnings.items():
            self._context.notices.warn(name, text)

    def note_done(self, k: ClientId, info: State, seconds: float) -> None:
        self._states.finish_exchange(k)
        self.reports.append(info)
        self.clients.setdefault(str(k), {}).update(info)
        entry = self._context.notices.disclosure.client({**info, "seconds": seconds})
        self._listener.on_client(self._progress.shown_number, k, entry)

    def note(self, k: ClientId, figures: Mapping[str, float]) -> None:
        self.clients[str(k)].update(figures)

    # -- who is left out -------------------------------------------------------------------------------------------

    def note_lost(self, k: ClientId, exchange: str, why: str) -> None:
        self._note_dropped(k, {"exchange": exchange, "reason": why})

    def note_missing(self, answer: Answer) -> None:
        if answer.absent:
            self._note_loss(answer.client, answer.absent)
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
        if self._hides_dropouts:
            self.excluded.add(k)
        else:
            self._note_dropped(k, why)

    def none_left(self) -> None:
        """Raise UserError because the round has no client left.

        A set-up round of named clients may lose all of them, as the run has others.
        """
        entry = self._progress.entry
        if entry is None or not (entry.one_off and isinstance(entry.participants, tuple)):
            last: State = self.dropped[-1] if self.dropped else {}
            label = self._context.data.client_label(last["client"]) if "reason" in last else ""
            why = f" (client {label}: {last['reason']})" if label else ""
            raise UserError(
                f"No client is left {self._progress.when()}, as all diverged, were refused or dropped out{why}: "
                "lower --lr, set --clip-norm, or lower --dropout-rate where it is given."
            )

    def _note_loss(self, k: ClientId, why: str) -> None:
        exchange = self._progress.exchange
        self.exclude(k, {"exchange": exchange, "reason": why})
        label, when = self._context.data.client_label(k), self._progress.when(exchange)
        self._warn(f"missing-client-{k}", f"Client {label} was left out {when}, as {why}.")

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
                raise UserError(f"{where}; lower --lr, set --clip-norm, or leave such clients out with --on-nan skip.")
        self.exclude(k, why)
        one_off = self._progress.entry is not None and self._progress.entry.one_off
        consequence = "what it would have made is missing from the run" if one_off else "it was left out of that round"
        self._warn(name, f"{where}; {consequence}.")

    def _warn(self, name: str, text: str) -> None:
        if not self._hides_dropouts:
            self._context.notices.warn(name, text)

    def _note_dropped(self, k: ClientId, why: State) -> None:
        self.excluded.add(k)
        at = max(self._progress.shown_number, 0)
        self.dropped = [*self.dropped, {"round": at, "client": k, **self._context.name_entry(k), **why}]
