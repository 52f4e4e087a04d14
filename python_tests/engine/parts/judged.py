"""A network, a method and sets of images of two classes, for parts that report figures."""

import torch
from torch import nn

from fedkern.data import Split
from fedkern.data.forms import ImageForm
from fedkern.engine.batches.images import Images
from fedkern.engine.hooks import MethodCode
from fedkern.engine.rounds.progress import Progress
from fedkern.methods.base import Method

FORM = ImageForm((1, 2, 2), (0.0,), (1.0,))
CPU = torch.device("cpu")
SETTINGS = {
    "method": "judged", "data": "tiny", "seed": 5, "clients": 2, "records": "all", "width": 2, "buffers": "average",
    "threads": 1, "client_threads": 1, "grad_cam": 0, "statistics": True, "main": "accuracy",
    "better": "max",
}  # fmt: skip


class Says(nn.Module):
    """A network that takes an image for a dog where its pixels are brighter than ``level``."""

    def __init__(self, level):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(level))

    def forward(self, images):
        dog = images.mean((1, 2, 3)) - self.level
        return torch.stack([-dog, dog], 1)


class Judged(Method):
    """A method that counts its evaluations."""

    def __init__(self):
        super().__init__()
        self.evaluated, self.observed = 0, None

    def evaluate(self, model, data):
        self.evaluated += 1
        return super().evaluate(model, data)

    def oracle_metrics(self, server, clients, sets):
        return {"paid": server + 1.0, "id_paid": 2.0, "unpaid": float(len(clients) + len(sets))}

    def diagnose(self, observed):
        self.observed = observed
        return {"odd": "It is odd.", "known": "It is known."}


def brightness_set(levels, labels, **more):
    """Return a set of images of four equal pixels, one for each brightness from 0 to 1."""
    images = (torch.tensor(levels) * 255).to(torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2).clone()
    return Images(Split(images, torch.tensor(labels), **more), FORM, CPU, cache=True)


def code(method):
    return MethodCode(type(method), "judged", Progress())
