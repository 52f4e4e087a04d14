"""Figures of the clients' own networks, computed where each client works."""

from contextlib import nullcontext

from fedkern.engine.client import Client
from fedkern.engine.evaluate import evaluate, evaluate_clients
from fedkern.methods.base import Message, Method, Phase
from fedkern.methods.common.personal import ClientsNetworks

NAME = "figures"
"""Name of the handler in the executors' tables, and of the exchange."""


class OwnFigures:
    """Handler with which a client evaluates its own network."""

    def __init__(self, method: Method) -> None:
        self._method = method

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        """Return the client's figures.

        Args:
            message: ``vectors`` of the global network; whether to evaluate on the ``tests`` and to ``keep`` the
                answers; ``own``, the attribute of the samples that has the client's own test set, or "".

        Returns:
            ``figures``, names prefixed; ``own``, figures on the client's own test set, by client; ``kept`` answers by
            the prefix of their test set (see :attr:`Reader.kept`), and by client those on the own test sets.
        """
        context, k = client.context, client.id
        seed = context.config.seed
        network = client.frozen(self._method.own_vectors(client, message["vectors"]))
        tests = context.samples.test_sets if message["tests"] else {}
        sets = getattr(context.samples, message["own"]) if message["own"] else {}
        own, names = {k: sets[k]} if k in sets else {}, context.data.client_names
        unnamed, itself = lambda _: nullcontext(), lambda _: client  # the receiver names a failure
        networks = ClientsNetworks(self._method, [k], lambda _: network)
        return {
            "figures": evaluate(networks, network, tests, nullcontext, seed=seed, keep=message["keep"]),
            "own": evaluate_clients(self._method, network, own, 1, names, unnamed, itself, seed, message["keep"]),
            "kept": {prefix: reader.kept for prefix, reader in (tests | own).items()} if message["keep"] else {},
        }
