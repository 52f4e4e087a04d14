"""Federated methods: one file each, written against the protocol of :mod:`fedkern.methods.base`."""

from fedkern.methods import fedavg, fedgid, fedprox
from fedkern.methods.base import (
    METHODS,
    Backgrounds,
    Batch,
    Client,
    Federation,
    LocalTraining,
    Message,
    Method,
    Received,
    Round,
    Server,
    Step,
    Upload,
    get,
    option,
    register,
)

__all__ = [
    "METHODS", "Backgrounds", "Batch", "Client", "Federation", "LocalTraining", "Message", "Method", "Received",
    "Round", "Server", "Step", "Upload", "fedavg", "fedgid", "fedprox", "get", "option", "register",
]  # fmt: skip
