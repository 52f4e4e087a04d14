"""FuseFL by hand: its settings on a tiny federation, and a run whose messages can be inspected."""

import copy

import torch

from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.server import Server
from fedkern.methods import FuseFL, Phase, Upload

PLAIN = {"model": "cnn", "local_epochs": 3, "grad_cam": 0, "rounds": None}


def config_of(make_config, options=None, **settings):
    return make_config("fusefl", **{**PLAIN, **settings, "options": {"virtual_features": 20, **(options or {})}})


class Play:
    """A run by hand: the method, its server and clients, and the messages."""

    def __init__(self, config, data, order=None, backwards=False):
        self.context = RunContext(config, data)
        self.method = FuseFL(FuseFL.Options.parse(config.options))
        self.server = Server(self.context)
        self.clients = {k: Client(self.context, k, {}) for k in range(config.clients)}
        self.order = list(order or self.clients)
        self.backwards = backwards
        self.down, self.up = [], []
        self.method.start(self.server)

    def round(self, number, name):
        phase = Phase(number, name, "update")
        sent = self.method.send(self.server, phase)
        answers = {k: self.method.client_update(self.clients[k], phase, sent[k]) for k in self.order}
        self.down.append(sent)
        self.up.append({k: copy.deepcopy(answers[k]) for k in sorted(answers)})
        order = sorted(answers, reverse=self.backwards)
        uploads = (Upload(k, self.context.federation.samples[k], answers[k]) for k in order)
        self.method.server_update(self.server, phase, uploads)

    def go(self):
        for number, entry in enumerate(self.method.rounds(self.context.federation)):
            self.round(number, entry.name)
        return self


def flat(message, prefix=""):
    """Return the tensors of nested dicts under dotted names."""
    if isinstance(message, torch.Tensor):
        return {prefix: message}
    found = {}
    for name, value in message.items() if isinstance(message, dict) else ():
        found.update(flat(value, f"{prefix}.{name}" if prefix else str(name)))
    return found


def equal(a, b) -> bool:
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
