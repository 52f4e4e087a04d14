"""Means of the figures of all clients' own networks."""

from typing import Any

from torch import Tensor

from fedkern.engine.batches.reader import Reader
from fedkern.engine.figures.own_figures import NAME
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.errors import ClientFailed, RunFailed, UserError
from fedkern.methods.base import ClientId, Phase
from fedkern.methods.common.personal import average_figures


class ClientsFigures:
    """Exchange that asks all clients for their networks' figures, even those that a round left out.

    State that a client's code changes meanwhile is dropped.
    """

    def __init__(self, run: RunObjects) -> None:
        self._run = run

    def __call__(
        self, own: str, *, tests: bool, keep: bool, locally: bool
    ) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
        """Return the means over all clients' networks, and every client's figures on its own test set.

        Args:
            own: attribute of the context that has the own test sets, or "".
            tests: whether to evaluate on the run's test sets.
            keep: whether these keep the networks' answers (``Reader.kept``).
            locally: whether all clients work in this process.
        """
        run, context, progress = self._run, self._run.context, self._run.progress
        executor = run.here if locally else run.executor
        with run.code("vectors"):
            vectors = run.method.vectors(run.server)
        message = {"vectors": vectors, "tests": tests, "keep": keep, "own": own}
        figures: list[dict[str, float]] = []
        of_clients: dict[int, dict[str, float]] = {}
        sets: dict[Any, Reader] = dict(context.samples.test_sets) | (getattr(context.samples, own) if own else {})
        kept: dict[Any, list[tuple[ClientId | None, Tensor]]] = {place: [] for place in sets}
        # As many states in memory at once as in a round.
        clients, at_once = range(context.federation.clients), context.config.clients_of_a_round
        for start in clients[::at_once]:
            asked = dict.fromkeys(clients[start : start + at_once], message)
            for answer in executor.answers(NAME, Phase(progress.index, NAME, NAME), asked):
                executor.forget(answer.client)
                run.notices.warn_all(answer.warnings)
                if (problem := answer.problem) is not None:
                    label = context.data.client_label(answer.client)
                    given = isinstance(problem, ClientFailed) and problem.exit_code == UserError.exit_code
                    where = f"The evaluation of client {label}'s network failed {progress.when()}"
                    error = (UserError if given else RunFailed)(f"{where}: {problem.what}.")
                    error.traceback = getattr(problem, "traceback", "")  # type: ignore[attr-defined]
                    raise error from problem.__cause__
                evaluated = answer.message
                figures.append(evaluated["figures"])
                of_clients.update(evaluated["own"])
                for place, answers in evaluated["kept"].items():
                    kept[place] += answers
            executor.end_round()
        for place, data in sets.items() if keep else ():
            data.kept = kept[place]
        return average_figures(figures), of_clients
