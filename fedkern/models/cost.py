"""Cost of a network: parameters, and floating-point operations in inference and in training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_PLAIN = {f"fedkern.models.networks.{name}" for name in ("cnn", "mlp", "resnet", "resnet8t")}
"""Modules of networks with linear layers and ungrouped convolutions as the only products."""


@dataclass
class Counted:
    """Operations of matrix products and convolutions (a multiplication and an addition are two), backward included."""

    flops: int = 0

    def add(self, layer: nn.Linear | nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        """Count a call of a linear layer or an ungrouped convolution, as a forward hook, and its backward pass."""
        # Every weight is used once per position of the output, which has as many channels as the weight has rows.
        operations = 2 * output.numel() * layer.weight.numel() // layer.weight.shape[0]
        if output.requires_grad:
            operations *= 1 + layer.weight.requires_grad + inputs[0].requires_grad
        self.flops += operations


@contextmanager
def count_flops(module: nn.Module | None) -> Iterator[Counted]:
    """Count the operations of ``module`` (None if unknown) inside the block, with a result at its end."""
    counted = Counted()
    if module is None or type(module).__module__ not in _PLAIN:
        from torch.utils.flop_counter import FlopCounterMode  # imports Triton and torch's compiler, which takes seconds

        with FlopCounterMode(display=False) as counter:
            yield counted
        counted.flops = int(counter.get_total_flops())
        return
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(counted.add) for layer in layers]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Cost:
    """Parameters of a network, and its operations per image."""

    parameters: int
    inference_flops: int
    training_flops: int


def stored_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def memory_ratio(evaluated: nn.Module, ordinary: nn.Module) -> float:
    """Return the bytes of a method's evaluated model over those of one ordinary network.

    Measure before calibration, which replaces the classifier by another of about the same size.
    """
    return stored_bytes(evaluated) / stored_bytes(ordinary)


def measure_cost(module: nn.Module, images: Tensor) -> Cost:
    """Measure the cost of ``module`` per image of ``images`` ``[B, C, H, W]`` (B >= 2 for batch norm).

    Give a copy: running statistics change, and all gradients are required.
    """
    module.eval()
    with torch.no_grad(), count_flops(module) as forward:
        module(images)
    module.train().requires_grad_(True)
    with count_flops(module) as step:
        module(images).sum().backward()
    for parameter in module.parameters():
        parameter.grad = None
    return Cost(
        parameters=sum(p.numel() for p in module.parameters()),
        inference_flops=forward.flops // len(images),
        training_flops=step.flops // len(images),
    )
