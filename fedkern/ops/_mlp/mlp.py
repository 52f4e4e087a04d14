"""mlp_pass: loss and gradients of linear layers with ReLU between them, an operator for fedkern's training loop."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkern.ops._core import backend
from fedkern.ops._core.checks import mark_written
from fedkern.ops._optimise.kernels import Call


class Layer(NamedTuple):
    """A linear layer: ``weight`` ``[out, in]``, ``bias`` ``[out]`` or None, and memory for their gradients."""

    weight: Tensor
    bias: Tensor | None
    weight_gradient: Tensor
    bias_gradient: Tensor | None


class MlpPass:
    """Forward and backward pass of linear layers with ReLU between them and the mean cross-entropy behind them.

    Args:
        layers: in order, each with as many inputs as the one before has outputs; all fp32, contiguous and on the CPU.

    Attributes:
        inputs: numbers of a sample.

    Raises:
        ValueError: a call's tensors do not fit the layers.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._tensors = tuple(tensor for layer in layers for tensor in layer)
        self.inputs = layers[0].weight.shape[1]
        self._core = backend.cpu_core()

    def __call__(self, x: Tensor, targets: Tensor) -> Tensor | None:
        """Return the loss of a batch in nats, fp32 0-d, and write the gradients of all parameters.

        Args:
            x: fp32 ``[B, ...]`` of as many numbers a sample as the first layer has inputs.
            targets: int64 ``[B]``, of which -100 does not count.

        Returns:
            None, with nothing written, if no target counts, one is no class, or ``x`` or ``targets`` have another form.
            Else the loss and gradients have the same bits for any number of threads and at the levels AVX2 and AVX-512.
        """
        if x.dtype != torch.float32 or targets.dtype != torch.int64:
            return None
        loss = self._core.mlp_pass(self._tensors, x.contiguous(), targets.contiguous(), torch.get_num_threads())
        return None if loss is None else torch.scalar_tensor(loss, dtype=torch.float32)  # faster than torch.tensor

    def train(self, x: Tensor, targets: Tensor, sizes: Tensor, call: Call) -> tuple[Tensor, Tensor] | None:
        """Train on batches that follow each other in ``x`` and ``targets``, with a step of SGD after every pass.

        Args:
            sizes: number of samples of each batch, int64 ``[N]``.
            call: the step, whose vectors of parameters and gradients hold those of the layers.

        Returns:
            Losses and squared norms of the gradients, fp64 ``[N]``, of the same bits as those of single calls.  None,
            with nothing written, if one of the batches is not taken.
        """
        losses, squares = torch.empty(2, len(sizes), dtype=torch.float64)
        given = x.contiguous(), targets.contiguous(), sizes, call, losses, squares
        if not self._core.mlp_train(self._tensors, *given, torch.get_num_threads()):
            return None
        mark_written(call.parameters, call.gradients, call.first, call.gradient_sum)
        return losses, squares


def mlp_reference(layers: Sequence[Layer], x: Tensor, targets: Tensor) -> Tensor:
    """Specify :class:`MlpPass`."""
    parameters: list[Tensor] = []
    with torch.enable_grad():
        y = x.flatten(1)
        for layer in layers:
            weight, bias = (None if p is None else p.detach().requires_grad_() for p in layer[:2])
            assert weight is not None
            y = F.linear(y.relu() if parameters else y, weight, bias)
            parameters += [weight] if bias is None else [weight, bias]
        loss = F.cross_entropy(y, targets)
    memory = [tensor for layer in layers for tensor in layer[2:] if tensor is not None]
    for tensor, gradient in zip(memory, torch.autograd.grad(loss, parameters), strict=True):
        tensor.copy_(gradient)
    return loss.detach()
