"""FedIOD's server and clients, played step by step without a run."""

import torch

from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.server import Server
from fedkern.methods import FedIOD, Phase, Upload

TINY = {
    "ngf": 2, "ndf": 2, "batch": 4, "student_steps": 2, "iterations": 3, "w_real": 1.0, "w_balance": 0.0,
    "disc_weight": True, "warmup": 0.0,
}  # fmt: skip
EVERY_TERM = {"w_balance": 0.7, "generator_lr": 0.01, "student_lr": 0.05, "critic_layers": 3}


class World:
    """Server and clients of a federation, played step by step."""

    def __init__(self, make_config, data, **options):
        self.config = make_config("fediod", model="cnn", grad_cam=0, options={**TINY, **options})
        self.context = RunContext(self.config, data)
        self.method = FedIOD(FedIOD.Options.parse(self.config.options))
        self.server = Server(self.context)
        self.clients = {k: Client(self.context, k, {}) for k in range(len(data.clients))}
        self.method.start(self.server)
        for number, entry in enumerate(self.method.rounds(self.context.federation)):
            if entry.one_off:
                self.play(entry, -1 - number)

    def phases(self, entry, number):
        return [Phase(number, entry.name, exchange) for exchange in entry.exchanges]

    def play(self, entry, number, lost=lambda phase: ()):
        ids = entry.participants if isinstance(entry.participants, tuple) else tuple(self.clients)
        for phase in self.phases(entry, number):
            self.exchange(phase, ids, lost(phase))
        for client in self.clients.values():
            client.round_cache.clear()
        self.server.round_cache.clear()

    def exchange(self, phase, ids=None, lost=()):
        ids = tuple(self.clients) if ids is None else ids
        outgoing = self.method.send(self.server, phase)
        if outgoing and all(isinstance(key, int) for key in outgoing):
            messages = {k: outgoing[k] for k in ids if k in outgoing}
        else:
            messages = dict.fromkeys(ids, outgoing) if outgoing is not None else {}
        chosen = {k: self.clients[k] for k in ids}
        answers = self.method.cohort_update(chosen, phase, messages) if messages else {}
        if answers is None:
            answers = {k: self.method.client_update(chosen[k], phase, messages[k]) for k in messages}
        uploads = [Upload(k, chosen[k].samples, answers[k]) for k in answers if k not in lost]
        self.method.server_update(self.server, phase, iter(uploads))
        return messages, answers

    def round(self):
        return next(entry for entry in self.method.rounds(self.context.federation) if not entry.one_off)


def frozen(tree):
    return {
        name: frozen(v) if isinstance(v, dict) else v.clone() if torch.is_tensor(v) else v for name, v in tree.items()
    }


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def cleared_and_live(world, rounds, **options):
    """Return two worlds after some rounds: one restarts from states every round, in one the server keeps objects."""
    cleared, live = (world(**options) for _ in range(2))
    for number in range(rounds):
        cleared.play(cleared.round(), number)
        for client in cleared.clients.values():  # as read from the disk
            client.state["critics"] = frozen(client.state["critics"])
        for phase in live.phases(live.round(), number):
            live.exchange(phase)
        for client in live.clients.values():
            client.round_cache.clear()
    return cleared, live
