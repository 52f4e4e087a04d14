"""The one place where default settings live: common ones, per data set, and per data set and method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COMMON: Mapping[str, Any] = {
    "data": "colordigits",
    "model": "cnn",
    "clients": 5,
    "rounds": 20,
    "local_epochs": 2,
    "batch_size": 32,
    "lr": 0.05,
    "momentum": 0.9,
    "weight_decay": 0.0,
}

DATA: Mapping[str, Mapping[str, Any]] = {
    "digits": {"clients": 5, "rounds": 20, "partition": "dirichlet:0.5"},
    "colordigits": {"clients": 5, "rounds": 40, "correlation": 0.7},
    "mnist": {"clients": 10, "rounds": 20, "batch_size": 64},
    "fashionmnist": {"clients": 10, "rounds": 20, "batch_size": 64},
    "colormnist": {"clients": 5, "rounds": 12, "batch_size": 64, "correlation": 0.5},
    "colorfashion": {"clients": 5, "rounds": 12, "batch_size": 64, "correlation": 0.5},
    "cifar10": {"clients": 10, "rounds": 100, "batch_size": 64, "model": "resnet8", "weight_decay": 5e-4},
    "cifar100": {"clients": 10, "rounds": 100, "batch_size": 64, "model": "resnet18", "weight_decay": 5e-4},
    "nico": {
        "clients": 7, "rounds": 50, "local_epochs": 10, "batch_size": 64, "lr": 0.01, "weight_decay": 1e-5,
        "model": "resnet18", "grad_cam": 100,
    },
}  # fmt: skip

METHOD: Mapping[tuple[str, str], Mapping[str, Any]] = {
    # (method, data set): settings; "options" holds method options by published name.
    ("fedgid", "colordigits"): {"options": {"lambda": 0.3}},
}
"""Settings that differ from the data set's; FedAvg and FedProx use the data set's own, so comparisons are fair."""


def defaults(method: str, data: str) -> dict[str, Any]:
    """The default settings of a run of ``method`` on ``data``; ``options`` are the method options that differ."""
    return {**COMMON, **DATA.get(data, {}), **METHOD.get((method, data), {})}
