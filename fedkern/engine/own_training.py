"""A user's own local training: a function in place of the run's loop, or a factory of its optimiser."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkern import ops
from fedkern.errors import UserError, shown
from fedkern.methods import registry
from fedkern.methods.base import LocalTraining
from fedkern.methods.terms import Terms
from fedkern.settings.config import RunConfig
from fedkern.tasks.own import explained
from fedkern.usercode.code_digest import digest

_PARTS = ("client_update", "loss", "terms", "adjust_gradient", "draw", "prepare")
"""What makes up a method's local training: a function replaces that of FedAvg, whatever the method's server does."""
_UNREAD = {
    "train": ("momentum", "weight_decay", "clip_norm", "freeze_bn_after", "optimizer", "optimizer_state"),
    "optimizer": ("lr", "momentum", "weight_decay"),
}
"""Settings that a function takes the place of."""


@dataclass(frozen=True)
class OwnTraining:
    """Functions that a user trains with.

    Attributes:
        train: ``train(model, client)`` in place of a method's local training.
        optimizer: ``optimizer(parameters)``, a factory for the run's loop.
    """

    train: Callable[[Any, Any], None] | None = None
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None

    def run(self, model: nn.Module, client: Any) -> None:
        """Calls ``train``, which trains the model in place."""
        assert self.train is not None
        left: Any = self.train(model, client)
        if left is not None and left is not model:
            raise UserError(
                f"train must return nothing, not {shown(left)}: what it leaves in the model that it was given is the "
                'upload, and figures go into client.report["NAME"].'
            )


def taken(train: Any, settings: dict[str, Any]) -> OwnTraining | None:
    """A user's functions among the arguments of a run; takes a factory out of the ``settings``.

    Raises:
        UserError: a setting would be dropped, or ``train`` is no function.
    """
    optimizer = settings.pop("optimizer") if callable(settings.get("optimizer")) else None
    if train is None and optimizer is None:
        return None
    if train is not None and not callable(train):
        raise UserError(f"train must be a function of a model and a client, not {shown(train)}.")
    what = "optimizer" if train is None else "train"
    for name in _UNREAD[what]:
        if settings.get(name) is not None or (name == "optimizer" and optimizer is not None):
            raise UserError(f"{name} has no effect beside a function {what}, which decides it: set it there.")
    return OwnTraining(train, optimizer)


def check_method(config: RunConfig, own: OwnTraining | None) -> None:
    """Raises UserError where a user's functions would drop a part of the method."""
    kind: Any = config.kind
    usual: Any = registry.get("fedavg")
    if own is not None and kind.promises(config.chosen):
        raise UserError(f"{config.method} with differential privacy has an optimiser of its own: leave yours out.")
    plain = issubclass(kind, LocalTraining) and all(getattr(kind, part) is getattr(usual, part) for part in _PARTS)
    if own is not None and own.train is not None and not plain:
        raise UserError(
            f"A train function would drop what {registry.short(config.method)} adds to local training: write a class "
            "derived from it with a client_update (client.model, client.batches, client.upload), give an optimizer "
            "factory instead, or take fedavg."
        )


def settled(context: Any, own: OwnTraining | None, stored: RunConfig | None, out: Path) -> RunConfig:
    """The settings with what a user's functions are, in words and as a hash; an optimiser is made once to be tried.

    Raises:
        UserError: a factory makes no optimiser, or the run that is resumed began with other functions.
    """
    config: RunConfig = context.config
    if own is None:
        return config
    if own.optimizer is None:
        words = f"train function {getattr(own.train, '__qualname__', type(own.train).__name__)}"
    else:
        found = made(own.optimizer, [each for each in context.build().parameters() if each.requires_grad])
        given = {name: value for name, value in found.defaults.items() if value not in (None, False)}
        words = f"{type(found).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"
    sha = digest(train=own.train, optimizer=own.optimizer)
    if stored is not None and stored.training_sha256 != sha:
        raise UserError(
            f"The run in {out} began with {stored.training or 'no functions'}, and the code given now ({words}) is "
            "another: give the same train or optimizer, or start a new run."
        )
    return config.replace(training=words, training_sha256=sha)


def made(make: Callable[[list[nn.Parameter]], Any], parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that a user's factory makes; raises UserError where it is none that a loop can step."""
    with explained("optimizer", make):
        found = make(parameters)
    if not isinstance(found, torch.optim.Optimizer):
        raise UserError(f"optimizer must return a torch.optim.Optimizer, not {shown(found)}.")
    closure = inspect.signature(type(found).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(f"optimizer makes {type(found).__name__}, which evaluates a batch several times: take another.")
    return found


def clip(vectors: Sequence[Tensor], largest: float) -> Tensor:
    """Scales vectors of gradients to a joint norm of at most ``largest`` (0: any); returns the norm, fp64 0-d."""
    norms = [torch.linalg.vector_norm(each, dtype=torch.float64) for each in vectors]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    if largest:
        for each in vectors:
            each.mul_((largest / norm).clamp(max=1))
    return norm


def own_stepper(
    network: Any, schedule: Any, terms: Terms | None, kept: Mapping[str, Any]
) -> tuple[Callable[[float], ops.StepResult], Callable[[], dict[str, Any]]]:
    """As `fedkern.engine.training.stepper`, with the optimiser of ``schedule.make``.

    The method's terms are added to the gradients, which are then clipped, as `fedkern.ops.sgd_step` does; the learning
    rates are the optimiser's, times the schedule's.
    """
    theta, gradients = network.parameters.detach(), network.gradients
    vectors = network.gradient_vectors
    optimizer = made(schedule.make, network.trained)
    rates = [group["lr"] for group in optimizer.param_groups]
    if kept:
        state = {int(index): copy.deepcopy(values) for index, values in kept.items()}  # steps change what is loaded
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    @torch.no_grad()
    def step(factor: float) -> ops.StepResult:
        if terms is not None:
            terms.add_to(gradients, theta)
        norm = clip(vectors, schedule.clip_norm)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.step()
        for each in vectors:
            each.zero_()
        return ops.StepResult(torch.isfinite(norm), norm.square())

    def held() -> dict[str, Any]:
        found = optimizer.state_dict()["state"]
        plain = (Tensor, int, float, str)
        return {
            str(index): {name: value for name, value in values.items() if isinstance(value, plain)}
            for index, values in found.items()
        }

    return step, held
