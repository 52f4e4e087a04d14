"""Watch over the first training steps of a process: mistakes in a user's code that raise nothing by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from fedkern.engine.network import Network, Part, Trainable
from fedkern.errors import UserError, first_of, shown
from fedkern.messages.leaves import leaves
from fedkern.methods.protocol import Batch, Received
from fedkern.methods.roles import Client, Objective
from fedkern.tasks.user_tasks import inner

STEPS = 2
"""Steps that are watched: what a loss does once, such as adding a hook, is told by the second from what piles up."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Parameters = dict[str, tuple[tuple[int, int], bool, torch.dtype, torch.device]]


class UnfitStep(UserError):
    """A training step that cannot train the network as it should; it ends the run, whichever client took it."""


class FirstSteps(Objective):
    """A method's ``loss`` whose first calls in this process are checked: the steps of a run, not steps beside it.

    Args:
        keep_going: whether a loss that is not finite only leaves its client out (``--on-nan skip``).
    """

    def __init__(self, *, keep_going: bool = False) -> None:
        self._left, self._keep_going = STEPS, keep_going
        self._outside: list[Tensor] = []  # leaves of the last loss that are no parameters of the network
        self._hooked: set[str] = set()

    def watch(self, client: Client, method: Objective, network: Network | Part | Trainable) -> Objective:
        """Return an object with the method's ``loss``, for a client that trains ``network``."""
        if not self._left:
            return method
        self._client, self._method, self._network = client, method, network
        return self

    def loss(self, model: nn.Module, batch: Batch, received: Received) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the method's loss of a batch.

        Raises:
            UnfitStep: nothing of the network would be trained, or other parameters than the run's.
        """
        recorded = self._client.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not self._left or recorded:
            return self._method.loss(model, batch, received)
        module = inner(self._network.module)
        parameters, hooks = _parameters(module), _hooks(module)
        result = self._method.loss(model, batch, received)
        self._check_value(result[0] if isinstance(result, tuple) else result, batch)
        self._check_parameters(parameters, _parameters(module))
        self._check_graph(result[0] if isinstance(result, tuple) else result, batch)
        grown = {name for name, count in _hooks(module).items() if count > hooks.get(name, 0)}
        if piling := sorted(grown & self._hooked):
            self._client.warn(
                "piling-hooks",
                f"Every training step adds a hook to {piling[0] or 'the network'}, and none is removed: each step "
                "takes longer than the one before. Register the hook once, or call remove() on its handle.",
            )
        self._hooked, self._left = grown, self._left - 1
        if not self._left:
            self._outside = []
        return result

    def take(self, client: Client, network: Network, model: nn.Module) -> None:
        """Copy what a user's loop has left in ``model`` into the client's network, and warn of the first ones."""
        if not self._left:
            network.take(model)
            return
        self._left -= 1
        received = [vector.clone() for vector in (network.parameters, network.personal)]
        network.take(model)
        kinds = {_kind(each) for each in inner(model).parameters() if each.is_floating_point()} - {"float32"}
        if kinds:
            client.warn(
                "converted-parameters",
                f"The training loop leaves parameters in {', '.join(sorted(kinds))}, and the upload is their rounded "
                "values in float32: keep the model in float32, and use autocast inside the loop.",
            )
        if all(map(torch.equal, received, (network.parameters, network.personal))):
            client.warn(
                "untrained-upload",
                f"The training loop of client {client.label} leaves all parameters bit for bit as it received them: "
                "train the model that it is given, in place.",
            )

    def _name(self, batch: Batch) -> str:
        """Return the name of the loss in a message."""
        if not _is_shipped(kind := _owner(type(self._method))):
            return f"{kind.__name__}.loss"
        return "The loss of the network's outputs" if _is_shipped(batch.task.loss_code) else "loss_fn"

    def _check_value(self, loss: object, batch: Batch) -> None:
        """Check that a loss is a finite number that a gradient can be taken of."""
        name = self._name(batch)
        if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
            what = f"a tensor {list(loss.shape)} of {_kind(loss)}" if isinstance(loss, Tensor) else shown(loss)
            raise UnfitStep(f"{name} must return one floating number, a tensor of no axes, and returns {what}.")
        if not loss.requires_grad:
            raise UnfitStep(
                f"{name} returns a {_kind(loss)} without a graph, so that no gradient reaches the network: leave out "
                "what cuts the graph off (detach, no_grad, item, argmax, NumPy)."
            )
        first = self._left == STEPS and batch.phase.round <= 0  # later ones may diverge, and a GPU would have to wait
        if first and not self._keep_going and not bool(torch.isfinite(loss)):
            raise UnfitStep(
                f"{name} returns {loss.item()} for the first batch of client {self._client.label}: mend the network, "
                "the loss or the samples."
            )

    def _check_parameters(self, before: Parameters, after: Parameters) -> None:
        """Check that a step has left the network's parameters the tensors that they were."""
        for name in {**before, **after}:
            if before.get(name) == after.get(name):
                continue
            old, new = before.get(name), after.get(name)
            if old is None or new is None:
                does = "adds" if old is None else "removes"
            elif old[2:] != new[2:]:
                does = "converts"
            else:
                does = "replaces" if old[1] == new[1] else "freezes" if old[1] else "unfreezes"
            raise UnfitStep(
                f"A training step {does} the network's parameter {name}, and a run trains and sends the parameters "
                "that the network has before its first step: do that where the network is made, not in its forward "
                "pass or the loss."
            )

    def _check_graph(self, loss: Tensor, batch: Batch) -> None:
        """Check that a loss is one of the trained parameters, and of no other trainable tensors."""
        found, opaque = _leaves_of(loss)
        module = {id(parameter) for parameter in self._network.module.parameters()}
        given = {id(leaf) for leaf in leaves([batch.inputs, batch.targets, batch.data])}
        outside = [leaf for leaf in found if id(leaf) not in module | given]
        # A tensor that a loss makes for itself, to take its gradient, is another one in the next step.
        own = [leaf for leaf in outside if isinstance(leaf, nn.Parameter) or any(leaf is old for old in self._outside)]
        self._outside = outside
        name, shapes = self._name(batch), first_of([str(list(leaf.shape)) for leaf in own], 3)
        if not opaque and not {id(parameter) for parameter in self._network.trained} & {id(leaf) for leaf in found}:
            of = f", only of other ones, {shapes}" if own else ""
            raise UnfitStep(
                f"{name} returns a loss of none of the network's trained parameters{of}: compute it with the model "
                "and the outputs that it is given, as every client trains a copy of the network."
            )
        if not own:
            return
        text = (
            f"{name} depends on trainable parameters that are not the network's ({shapes}), which no optimiser steps "
            "and no message holds: make them layers of the network (those of a list by nn.ModuleList), or freeze them "
            "with requires_grad_(False)"
        )
        if _is_shipped(_owner(type(self._method))):
            raise UnfitStep(f"{text}.")
        self._client.warn("untrained-parameters", f"{text}; a method may also step them itself.")


def _is_shipped(code: object) -> bool:
    return str(getattr(code, "__module__", "")).partition(".")[0] in ("fedkern", "torch")


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _owner(kind: type) -> type:
    """Return the class that has the ``loss`` of a method."""
    return next(each for each in kind.__mro__ if "loss" in vars(each))


def _parameters(module: nn.Module) -> Parameters:
    """Return identity, memory and kind of every parameter, by name."""
    return {
        name: ((id(each), 0 if each.is_meta else each.data_ptr()), each.requires_grad, each.dtype, each.device)
        for name, each in module.named_parameters()
    }


def _hooks(module: nn.Module) -> dict[str, int]:
    """Return the number of hooks of every module and parameter, by name."""
    modules = {name: sum(len(getattr(each, kind)) for kind in _HOOKS) for name, each in module.named_modules()}
    return modules | {name: len(each._backward_hooks or ()) for name, each in module.named_parameters()}


def _leaves_of(loss: Tensor) -> tuple[list[Tensor], bool]:
    """Return the leaves of a loss's graph, and whether a function may hide others (a reentrant checkpoint)."""
    if loss.grad_fn is None:
        return [loss], False
    found: list[Tensor] = []
    opaque, seen, waiting = False, {loss.grad_fn}, [loss.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if isinstance(node, BackwardCFunction):
            opaque |= not node._forward_cls.__module__.startswith("fedkern.")  # type: ignore[attr-defined]
        elif node.name() == "torch::autograd::AccumulateGrad":
            found.append(node.variable)
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        waiting += new
    return found, opaque
