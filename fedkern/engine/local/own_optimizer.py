"""Steps of a user-defined optimiser."""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedkern import ops
from fedkern.engine.local.network import Trained
from fedkern.errors import UserError, format_value
from fedkern.messages.states import State
from fedkern.methods.terms import Terms
from fedkern.usercode.named_code import explain_errors

Factory = Callable[[list[nn.Parameter]], object]
"""User's factory, which should return an optimiser of the parameters."""


def make_optimizer(make: Factory, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser that a user's factory makes."""
    with explain_errors("optimizer", make):
        optimizer = make(parameters)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optimizer must return a torch.optim.Optimizer, not {format_value(optimizer)}.")
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise UserError(
            f"optimizer makes {type(optimizer).__name__} with a learning rate of None, which the run's factors cannot "
            "multiply: give it a number."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(
            f"optimizer makes {type(optimizer).__name__}, which evaluates a batch several times: take another."
        )
    given, stepped = {id(tensor) for tensor in parameters}, stepped_by(optimizer)
    if not stepped or any(id(tensor) not in given for tensor in stepped):
        mistake = "parameters that it was not given" if stepped else "no parameters"
        raise UserError(
            f"optimizer makes {type(optimizer).__name__} of {mistake}: make it of the argument, as in lambda "
            "parameters: torch.optim.SGD(parameters, lr=0.1), because a run trains a copy of the network."
        )
    return optimizer


def stepped_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def clip(vectors: Sequence[Tensor], largest: float) -> Tensor:
    """Scale gradient vectors to a joint norm of at most ``largest`` (0: any), and return the norm, fp64 0-d."""
    norms = [torch.linalg.vector_norm(vector, dtype=torch.float64) for vector in vectors]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    if largest:
        for vector in vectors:
            vector.mul_((largest / norm).clamp(max=1))
    return norm


def _of_groups(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    names = dict.fromkeys(name for group in optimizer.param_groups for name in group if name != "params")
    return {name: repr([group.get(name) for group in optimizer.param_groups]) for name in names}


class _Rates:
    """Learning rates of an optimiser's groups, multiplied while the optimiser steps.

    Hooks of the factory see and change the rates without the factor. A rate that ``step`` changes keeps the change.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._factor = optimizer, 1.0
        self._own: list[tuple[Any, float]] = []  # each group's own rate and the multiplied one; empty between steps
        self._hooked = getattr(type(optimizer).step, "hooked", False)  # missing if a class skips torch's __init__
        if self._hooked:
            optimizer.register_step_pre_hook(self._multiply)
            hook = optimizer.register_step_post_hook(self._restore)
            hooks: Any = hook.hooks_dict_ref()
            hooks.move_to_end(hook.id, last=False)  # before those of the factory

    def step(self, factor: float) -> None:
        self._factor = factor
        if not self._hooked:
            self._multiply()
        self._optimizer.step()
        self._restore()

    def _multiply(self, *_: object) -> None:
        if self._factor == 1 or self._own:  # a class and its base may both call hooks
            return
        for group in self._optimizer.param_groups:
            own = group["lr"]
            group["lr"] = own * self._factor
            self._own.append((own, float(group["lr"])))

    def _restore(self, *_: object) -> None:
        for group, (own, multiplied) in zip(self._optimizer.param_groups, self._own, strict=False):
            changed = float(group["lr"]) != multiplied
            group["lr"] = group["lr"] / self._factor if changed else own
        self._own.clear()


class OwnStepper:
    """Steps of the optimiser of ``schedule.make`` (arguments of `fedkern.engine.local.training.stepper`).

    The method's terms are added to the gradients, which are then clipped, as in `fedkern.ops.sgd_step`. The learning
    rates are the optimiser's, times the schedule's.
    """

    def __init__(self, network: Trained, schedule: Any, terms: Terms | None, previous: State) -> None:
        self._theta, self._gradients = network.parameters.detach(), network.gradients
        self._vectors, self._schedule, self._terms = network.gradient_vectors, schedule, terms
        self._optimizer = optimizer = make_optimizer(schedule.make, network.trained_parameters)
        self._rates = _Rates(optimizer)
        if previous:
            self.switch(False)  # the state was kept in this mode
            state = {int(k): copy.deepcopy(values) for k, values in previous.items()}  # steps change loaded tensors
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self._begun = _of_groups(optimizer)  # after loading, which copies
        self.switch(True)

    @torch.no_grad()
    def step(self, factor: float | Tensor) -> ops.StepResult:
        if self._terms is not None:
            self._terms.add_to(self._gradients, self._theta)
        norm = clip(self._vectors, self._schedule.clip_norm)
        self._rates.step(float(factor))
        for vector in self._vectors:
            vector.zero_()
        return ops.StepResult(torch.isfinite(norm), norm.square())

    def read_state(self) -> State:
        states = {
            str(index): {name: value for name, value in values.items() if value is not None}
            for index, values in self._optimizer.state_dict()["state"].items()
        }
        values = {name: value for values in states.values() for name, value in values.items()}
        unkept = [name for name, value in values.items() if not isinstance(value, (Tensor, int, float, str))]
        groups = _of_groups(self._optimizer)
        if unkept := unkept + [name for name, text in groups.items() if text != self._begun.get(name)]:
            raise UserError(
                f"optimizer_state keep: {type(self._optimizer).__name__} has {unkept[0]}, which cannot be kept: "
                "tensors, numbers and texts of single parameters can. Leave optimizer_state out."
            )
        return states

    def switch(self, training: bool) -> None:
        """Call ``train()`` or ``eval()`` of a schedule-free optimiser."""
        method = getattr(self._optimizer, "train" if training else "eval", None)
        if callable(method):
            with explain_errors("optimizer", self._schedule.make):
                method()
