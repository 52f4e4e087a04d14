"""Training steps of networks of linear layers, whose forward and backward pass is one call of the compiled core."""

from collections.abc import Callable
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fedkern.engine.local.captured import Outcome
from fedkern.methods.protocol import Batch, Received
from fedkern.methods.roles import Objective
from fedkern.models.users.linear_chain import linear_chain
from fedkern.ops._mlp.mlp import Layer, MlpPass
from fedkern.tasks.task import Task
from fedkern.tasks.user_tasks import INTEGERS, user_module

LINEAR = "linear"
"""The plan (``RunConfig.plan``) of a network whose steps are such calls."""
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
    x, targets = batch.inputs, batch.targets
    if isinstance(x, Tensor) and isinstance(targets, Tensor):
        loss = passing(x, targets.long() if targets.dtype in INTEGERS else targets)
        if loss is not None:
            return Outcome(loss, None, (), ())
    return otherwise(batch, received=received)
