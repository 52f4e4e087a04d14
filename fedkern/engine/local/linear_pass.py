"""Training steps of networks of linear layers, whose forward and backward pass is one call of the compiled core."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.engine.local.captured import Outcome
from fedkern.methods.protocol import Batch, Received
from fedkern.methods.roles import Objective
from fedkern.models.users.linear_chain import linear_chain
from fedkern.ops._mlp.mlp import Layer, MlpPass
from fedkern.tasks.classification import Classification
from fedkern.tasks.task import Task
from fedkern.tasks.user_tasks import INTEGERS, OwnTask, cross_entropy, user_module

LINEAR = "linear"
"""The plan (``RunConfig.plan``) of a network whose steps are such calls."""
_chains: WeakKeyDictionary[nn.Module, list[nn.Linear] | None] = WeakKeyDictionary()


def has_default_loss(method: object, task: Task) -> bool:
    """Return whether a step's loss is the mean cross-entropy of the network's outputs alone."""
    loss = task.loss_code if isinstance(task, OwnTask) else cross_entropy if type(task) is Classification else None
    if type(loss) is nn.CrossEntropyLoss and loss.weight is None and not loss._forward_hooks:
        is_mean = (loss.ignore_index, loss.reduction, loss.label_smoothing) == (-100, "mean", 0)
    else:
        is_mean = loss is cross_entropy or loss is F.cross_entropy
    return is_mean and getattr(type(method), "loss", None) is Objective.loss


def make_pass(network: nn.Module) -> MlpPass | None:
    """Return the pass of such a network, if all its layers are trained and have memory for their gradients."""
    module = user_module(network)
    if module not in _chains:
        _chains[module] = linear_chain(module)
    layers = [
        Layer(layer.weight, layer.bias, *map(_gradient, (layer.weight, layer.bias))) for layer in _chains[module] or ()
    ]
    lacking = [layer for layer in layers if layer[2] is None or (layer.bias is not None and layer[3] is None)]
    return MlpPass(layers) if layers and not lacking else None


def _gradient(parameter: Tensor | None) -> Any:
    return None if parameter is None else parameter.grad


def play_step(
    passing: MlpPass, otherwise: Callable[..., Outcome], batch: Batch, *, received: Received | None = None
) -> Outcome:
    """Run the pass of a batch, or ``otherwise`` where it does not take the batch."""
    x, targets = batch.inputs, batch.targets
    if isinstance(x, Tensor) and isinstance(targets, Tensor):
        loss = passing(x, targets.long() if targets.dtype in INTEGERS else targets)
        if loss is not None:
            return Outcome(loss, None, (), ())
    return otherwise(batch, received=received)
