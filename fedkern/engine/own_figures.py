"""Figures of the clients' own networks, each computed where its client works: an exchange of the engine's own."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor

from fedkern.engine.client import Client
from fedkern.engine.client_states import ClientStates
from fedkern.engine.context import RunContext
from fedkern.engine.evaluate import evaluate, evaluate_clients
from fedkern.engine.executors.base import Answer
from fedkern.engine.hooks import MethodCode
from fedkern.engine.reader import Reader
from fedkern.engine.server import Server
from fedkern.errors import ClientFailed, RunFailed, UserError
from fedkern.methods.base import ClientId, Message, Method, Phase
from fedkern.methods.common.personal import ClientsNetworks, means

NAME = "figures"
"""The handler's name in the executors' tables, and that of the exchange."""


class OwnFigures:
    """Has a client evaluate its own network.

    Args:
        method: gives the figures.
    """

    def __init__(self, method: Method) -> None:
        self._method = method

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        """The client's figures.

        Args:
            message: ``vectors`` of the global network; whether to evaluate on the ``tests`` and to ``keep`` the answers
                to them; ``own``, the attribute of the context that has the client's own test set, or "".

        Returns:
            ``figures``, names prefixed; ``own``, figures on the client's own test set, by client; ``kept`` answers by
            the prefix of their test set (see :attr:`Reader.kept`), and by client those on the own test sets.
        """
        context, k = client.context, client.id
        seed = context.config.seed
        network = client.frozen(self._method.own_vectors(client, message["vectors"]))
        tests = context.test_sets if message["tests"] else {}
        sets = getattr(context, message["own"]) if message["own"] else {}
        own, names = {k: sets[k]} if k in sets else {}, context.data.client_names
        unnamed, itself = lambda _: nullcontext(), lambda _: client  # a failure is named where it arrives
        one = ClientsNetworks(self._method, [k], lambda _: network)
        return {
            "figures": evaluate(one, network, tests, nullcontext, seed=seed, keep=message["keep"]),
            "own": evaluate_clients(self._method, network, own, 1, names, unnamed, itself, seed, message["keep"]),
            "kept": {prefix: each.kept for prefix, each in (tests | own).items()} if message["keep"] else {},
        }


class ClientsFigures:
    """Asks all clients for the figures of their networks; those that a round left out too.

    What a client's code changes in its state meanwhile is dropped.

    Args:
        method, server, context: of the run.
        states: has the run's executor.
        code: names the method in an exception.
    """

    def __init__(
        self, method: Method, server: Server, context: RunContext, states: ClientStates, code: MethodCode
    ) -> None:
        self._method, self._server, self._context = method, server, context
        self._states, self._code = states, code

    def __call__(
        self, own: str, *, tests: bool, keep: bool, here: bool
    ) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
        """The means over all clients' networks, and every client's figures on its own test set.

        Args:
            own: the attribute of the context that has these sets, or "".
            tests: whether to evaluate on the run's test sets.
            keep: whether these keep the networks' answers (``Reader.kept``).
            here: whether all clients work in this process.

        Raises:
            UserError, RunFailed: a client's evaluation failed.
        """
        executor, context, progress = self._states.executor, self._context, self._code.progress
        executor = executor.here if here else executor
        with self._code("vectors"):
            vectors = self._method.vectors(self._server)
        message = {"vectors": vectors, "tests": tests, "keep": keep, "own": own}
        figures: list[dict[str, float]] = []
        of_clients: dict[int, dict[str, float]] = {}
        sets: dict[Any, Reader] = dict(context.test_sets) | (getattr(context, own) if own else {})
        kept: dict[Any, list[tuple[ClientId | None, Tensor]]] = {place: [] for place in sets}
        # No more states are in memory at once than in a round.
        clients, most = range(context.federation.clients), context.config.clients_of_a_round
        for first in clients[::most]:
            asked = dict.fromkeys(clients[first : first + most], message)
            for answer in executor.answers(NAME, Phase(progress.index, NAME, NAME), asked):
                executor.forget(answer.client)
                evaluated = self._taken(answer)
                figures.append(evaluated["figures"])
                of_clients.update(evaluated["own"])
                for place, answers in evaluated["kept"].items():
                    kept[place] += answers
            executor.end_round()
        for place, data in sets.items() if keep else ():
            data.kept = kept[place]
        return means(figures), of_clients

    def _taken(self, answer: Answer) -> Any:
        for name, text in answer.warnings.items():
            self._context.warn(name, text)
        problem = answer.problem
        if problem is None:
            return answer.message
        label = self._context.data.client_label(answer.client)
        given = isinstance(problem, ClientFailed) and problem.exit_code == UserError.exit_code
        where = f"The evaluation of client {label}'s network {self._code.progress.when()}"
        error = (UserError if given else RunFailed)(f"{where} failed: {problem.what}.")
        error.traceback = getattr(problem, "traceback", "")  # type: ignore[attr-defined]
        raise error from problem.__cause__
