"""A federation of quadratics, on which FedAvg with several local steps stops at a wrong place."""

import types

import torch

from fedkern import ops
from fedkern.methods import Federation, Phase, Upload

DIMENSION, RATE, STEPS = 6, 0.1, 10
SAMPLES = (10, 30, 20, 40)


class Client:
    """Minimises (theta - a)^T A (theta - a) / 2 by plain gradient descent, through the method's hook."""

    device = torch.device("cpu")

    def __init__(self, k):
        g = torch.Generator().manual_seed(k)
        root = torch.randn(DIMENSION, DIMENSION, generator=g)
        self.id, self.samples, self.state = k, SAMPLES[k], {}
        self.curvature = root @ root.T / DIMENSION + 0.2 * torch.eye(DIMENSION)
        self.optimum = 3 * torch.randn(DIMENSION, generator=g)

    def gradient(self, theta):
        return self.curvature @ (theta - self.optimum)

    def train(self, method, phase, message, extras=None):
        theta = message["parameters"].clone()
        received = types.SimpleNamespace(
            message=message, parameters=message["parameters"], phase=phase, extras=extras, round_cache={}
        )
        for _ in range(STEPS):
            gradient = self.gradient(theta)
            method.adjust_gradient(theta, gradient, received)
            theta = theta - RATE * gradient
        return {"parameters": theta}


class Server:
    def __init__(self, rounds):
        self.state, self.round_cache = {}, {}
        self.federation = Federation(rounds, SAMPLES, classes=2)

    def initial(self):
        return {"parameters": torch.zeros(DIMENSION)}

    def accumulator(self, size):
        return ops.Accumulator(size)


def distance(method, rounds, weights, partial=False):
    """How far the server's model is from the minimum of the weighted objective after some rounds."""
    server, clients = Server(rounds), [Client(k) for k in range(len(SAMPLES))]
    method.start(server)
    for r in range(rounds):
        phase = Phase(r, "train", "update")
        sent = method.send(server, phase)
        chosen = [c for c in clients if not partial or (c.id + r) % 2]
        uploads = [Upload(c.id, c.samples, method.client_update(c, phase, sent.get(c.id, sent))) for c in chosen]
        method.server_update(server, phase, iter(uploads))
    curvature = sum(w * c.curvature for w, c in zip(weights, clients, strict=True))
    pull = sum(w * c.curvature @ c.optimum for w, c in zip(weights, clients, strict=True))
    return float(torch.linalg.vector_norm(server.state["parameters"] - torch.linalg.solve(curvature, pull)))


WEIGHTS = {"samples": [n / sum(SAMPLES) for n in SAMPLES], "uniform": [1 / len(SAMPLES)] * len(SAMPLES)}
