"""What the process of a run and its workers tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fedkern.models import ModelEntry


@dataclass(frozen=True)
class Setup:
    """What the clients of a run need to know, once.

    Attributes:
        config: every setting.
        data: the federated data.
        askers: who may ask clients, by name.
        pair: what the networks of image-text data are made from, where the data are such.
        entry: the network, where it was put into ``fedkern.models.MODELS``.
        disclosure: what may be told.
        backend: the forced backend of the operators; None where none is.
        isa: the ISA level of the CPU core, "none" where there is no core.
        modes: process-wide settings of PyTorch that change bits.
    """

    config: Any
    data: Any
    askers: dict[str, Any]
    pair: dict[str, Any] | None
    entry: ModelEntry | None
    disclosure: Any
    backend: str | None
    isa: str
    modes: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What a worker is asked.

    Attributes:
        client: whom.
        asker: by whom, and ``step`` when.
        message: what the client is sent.
        state: the client's, where it begins its round in this worker.
        played: earlier questions of the round, which the client was asked in a worker that is lost.
        fresh: whether the client begins its round in this worker.
    """

    client: int
    asker: str
    step: Any
    message: Any
    fresh: bool
    state: dict[str, Any] | None = None
    played: tuple[tuple[str, Any, Any], ...] = ()


@dataclass
class Done:
    """What a worker says of a task: the answer, and the client's state where the task has changed it."""

    answer: Any
    state: dict[str, Any] | None = None
    failed: Exception | None = None


@dataclass(frozen=True)
class Notice:
    """How far something long has come, told at once."""

    text: str


@dataclass(frozen=True)
class Cleared:
    """Tells a worker that what it has mapped for earlier exchanges will not be named again."""


@dataclass(frozen=True)
class Forget:
    """Tells a worker that these clients work no more in this round; none: that the round is over."""

    clients: tuple[int, ...] = field(default=())


def modes() -> dict[str, Any]:
    """The process-wide settings of PyTorch that change bits."""
    return {
        "dtype": torch.get_default_dtype(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
    }


def set_modes(given: dict[str, Any]) -> None:
    """Makes them what :func:`modes` said elsewhere."""
    torch.set_default_dtype(given["dtype"])
    torch.set_float32_matmul_precision(given["matmul"])
    now = modes()
    if (now["deterministic"], now["warn_only"]) != (given["deterministic"], given["warn_only"]):
        # Even where it changes nothing it imports torch's compiler, which takes a second.
        torch.use_deterministic_algorithms(given["deterministic"], warn_only=given["warn_only"])
    torch.backends.mkldnn.enabled = given["mkldnn"]
