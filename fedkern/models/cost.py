"""Cost of a network: parameters, floating-point operations and memory, in inference and in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedkern.models.flops import Counting

_PLAIN = {f"fedkern.models.{name}" for name in ("cnn", "mlp", "resnet", "resnet8t", "vgg")}
"""Modules of the networks whose only products are linear layers and ungrouped convolutions."""


class _Torchs:
    """Torch's own counter, which counts all matrix products and convolutions."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode  # imports Triton and torch's compiler, which takes seconds

        self._mode = FlopCounterMode(display=False)

    def __enter__(self) -> _Torchs:
        self._mode.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._mode.__exit__(*raised)

    @property
    def flops(self) -> int:
        return int(self._mode.get_total_flops())


def count_flops(module: nn.Module | None) -> Any:
    """A context manager whose ``flops`` are the operations inside it, of matrix products and convolutions.

    Args:
        module: the network that runs inside; None if it is not known.
    """
    plain = module is not None and type(module).__module__ in _PLAIN
    return Counting() if plain else _Torchs()


@dataclass(frozen=True)
class Cost:
    """Cost of a network per image.

    A multiplication and an addition are two operations.  Only matrix products and convolutions are counted.

    Attributes:
        parameters: number of parameters.
        inference_flops: operations of a forward pass.
        training_flops: operations of a forward and a backward pass.
        inference_bytes: parameters, buffers, and the input and output of the layer where their sum is largest.
        training_bytes: parameters, buffers, gradients, momentum, and the tensors that the backward pass of one image
            needs.
    """

    parameters: int
    inference_flops: int
    training_flops: int
    inference_bytes: int
    training_bytes: int


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def memory_ratio(evaluated: nn.Module, ordinary: nn.Module) -> float:
    """Memory of a method's evaluated model over that of one ordinary network, in parameters and buffers.

    Copies that only make a model faster (the folded weights of :class:`fedkern.ops.FusedBlocks`) are not counted.
    The ratio is measured before calibration, which replaces the classifier by another of about the same size.
    """
    return stored_bytes(evaluated) / stored_bytes(ordinary)


def cost(module: nn.Module, images: Tensor) -> Cost:
    """Measures the cost of ``module`` per image of ``images`` ``[B, C, H, W]`` (B >= 2: batch norm trains on them).

    Give a copy: the module's running statistics change, and it is left in train mode with all gradients required.
    """
    count = len(images)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    buffers = stored_bytes(module) - weights
    with torch.no_grad(), _Layers(module.eval()) as layers, count_flops(module) as forward:
        module(images)
    saved: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    module.train().requires_grad_(True)
    with count_flops(module) as both, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(images).sum().backward()
    for parameter in module.parameters():
        parameter.grad = None
    return Cost(
        parameters=sum(p.numel() for p in module.parameters()),
        inference_flops=forward.flops // count,
        training_flops=both.flops // count,
        inference_bytes=weights + buffers + layers.largest // count,
        training_bytes=3 * weights + buffers + sum(saved.values()) // count,
    )


class _Layers:
    """Records the largest sum of a layer's input and output, in bytes, while a module runs."""

    def __init__(self, module: nn.Module) -> None:
        self.largest = 0
        self._leaves = [layer for layer in module.modules() if not any(True for _ in layer.children())]
        self._handles: list[Any] = []

    def __enter__(self) -> _Layers:
        self._handles = [layer.register_forward_hook(self._look) for layer in self._leaves]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _look(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [x for x in (*inputs, output) if isinstance(x, Tensor)]
        self.largest = max(self.largest, sum(x.numel() * x.element_size() for x in tensors))
