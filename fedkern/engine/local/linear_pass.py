"""Training steps of networks of linear layers, whose forward and backward pass is one call of the compiled core."""

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.engine.batches.reader import Reader
from fedkern.engine.local.captured import Outcome
from fedkern.methods.protocol import Batch, Received
from fedkern.methods.roles import Objective
from fedkern.models.users.linear_chain import linear_chain
from fedkern.ops._mlp.mlp import Layer, MlpPass
from fedkern.ops._optimise.kernels import Call
from fedkern.tasks.task import Task
from fedkern.tasks.user_tasks import INTEGERS, user_module

LINEAR = "linear"
"""The plan (``RunConfig.plan``) of a network whose steps are such calls."""
GROUP, GROUP_NUMBERS = 128, 1 << 18
"""Largest number of batches of one call, between which Ctrl-C waits, and of numbers in their inputs."""
_chains: WeakKeyDictionary[nn.Module, list[nn.Linear] | None] = WeakKeyDictionary()


def has_default_loss(method: object, task: Task) -> bool:
    """Return whether a step's loss is the mean cross-entropy of the network's outputs alone."""
    own = [getattr(getattr(method, name, None), "__func__", None) for name in ("loss", "prepare")]
    return task.plain_loss and own == [Objective.loss, Objective.prepare]


def make_pass(network: nn.Module) -> MlpPass | None:
    """Return the pass of such a network, if all its layers are trained and have memory for their gradients."""
    module = user_module(network)
    if module not in _chains:
        _chains[module] = linear_chain(module)
    layers = []
    for layer in _chains[module] or ():
        weight_gradient, bias_gradient = layer.weight.grad, None if layer.bias is None else layer.bias.grad
        if weight_gradient is None or (layer.bias is None) != (bias_gradient is None):
            return None
        layers.append(Layer(layer.weight, layer.bias, weight_gradient, bias_gradient))
    return MlpPass(layers) if layers else None


def play_step(
    passing: MlpPass, otherwise: Callable[..., Outcome], batch: Batch, *, received: Received | None = None
) -> Outcome:
    """Run the pass of a batch, or ``otherwise`` where it does not take the batch."""
    tensors = _tensors(batch)
    loss = None if tensors is None else passing(*tensors)
    return otherwise(batch, received=received) if loss is None else Outcome(loss, None, (), ())


def play_steps(
    passing: MlpPass, call: Call, lr: float, plan: Sequence[np.ndarray], batch: Batch, data: Reader
) -> Outcome | None:
    """Train in one call on the batches of ``plan``, joined in ``batch``, or return None if it is not possible."""
    tensors = _tensors(batch)
    if tensors is None or not data.joins:  # items have changed
        return None
    results = passing.train(*tensors, torch.tensor([len(rows) for rows in plan]), call._replace(lr=lr))
    return None if results is None else Outcome(*results, (), ())


def group_batches(passing: MlpPass, plan: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Cut a plan into groups of batches that a cache holds."""
    count = max(1, min(GROUP, GROUP_NUMBERS // (passing.inputs * max(map(len, plan), default=1))))
    return [plan[start : start + count] for start in range(0, len(plan), count)]


def _tensors(batch: Batch) -> tuple[Tensor, Tensor] | None:
    x, targets = batch.inputs, batch.targets
    if not (isinstance(x, Tensor) and isinstance(targets, Tensor)):
        return None
    return x, targets.long() if targets.dtype in INTEGERS else targets
