"""Small runs whose clients have networks of their own."""

from typing import Any

import torch

import fedkern

SETTINGS: dict[str, Any] = {
    "data": "digits", "train_samples": 60, "clients": 3, "model": "cnn", "width": 2, "rounds": 3, "local_epochs": 2,
    "batch_size": 4, "lr": 0.05, "momentum": 0.9, "threads": 1, "client_threads": 1, "workers": 1, "grad_cam": 0,
    "client_test": 0.2, "progress": False,
}  # fmt: skip


def play(out, method, **settings):
    return fedkern.simulate(method, out=out, pictures=False, **{**SETTINGS, **settings})


def same(got, second):
    return all(torch.equal(value, second[name]) for name, value in got.items())
