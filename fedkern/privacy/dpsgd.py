"""DP-SGD (Abadi et al., arXiv 1607.00133) on opacus."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkern.errors import UserError
from fedkern.ops._core.layout import plain_strides
from fedkern.process.extras import import_extra

WAY_OUT = "such as cnn-gn, resnet8-gn or resnet18-gn (unet-small-gn for segmentation)"
OF_OPACUS = (nn.MultiheadAttention, nn.RNN, nn.LSTM, nn.GRU)
"""Layers without per-sample gradients in opacus, which has its own: opacus.layers.DPLSTM and so on."""


@dataclass(frozen=True)
class DPSGD:
    """Settings of a network's training with differential privacy.

    Attributes:
        max_norm: clipping norm, the largest Euclidean norm of a sample's gradient, or of the sum over a patient's
            samples.
        noise: function ``noise(rate, steps)`` of the probability that a sample (or patient) is in a batch and of the
            number of steps. Returns the standard deviation of the noise on the sum of gradients, over ``max_norm``.
        channel: the channel of the training in the client's ledger.
        secret: mixed into the streams of sampling and noise. Empty: the streams follow from the run's seed.
        patients: int64 [n], the patient of every sample; patients are drawn and clipped. None: samples are.
        images: the largest number of samples of a patient.
    """

    max_norm: float
    noise: Callable[[float, int], float]
    channel: str
    secret: str = field(default="", repr=False)
    patients: np.ndarray | None = None
    images: int = 1


def need_opacus() -> ModuleType:
    return import_extra("Training with DP-SGD needs opacus", "privacy", "opacus", "opacus.optimizers")


def check_network(module: nn.Module, name: str) -> None:
    """Raise UserError if a network, called ``name``, has no per-sample gradients.

    Causes are layers that keep statistics, such as batch norm, and layers that opacus replaces by its own.
    """
    opacus = need_opacus()
    if any(isinstance(layer, _BatchNorm) for layer in module.modules()):
        raise UserError(
            f"DP-SGD needs samples that do not look at each other, but {name} has batch norm: choose one with group "
            f"norm, {WAY_OUT}."
        )
    for layer in module.modules():
        if type(layer) in OF_OPACUS:
            kind = type(layer).__name__
            raise UserError(
                f"DP-SGD cannot take the gradient of each sample in {name}, which has nn.{kind}: use "
                f"opacus.layers.DP{kind} in its place, or choose a network {WAY_OUT}."
            )
    try:
        opacus.GradSampleModule.validate(module, strict=True)
    except NotImplementedError:
        raise UserError(
            f"DP-SGD cannot take the gradient of each sample in {name}, whose layers keep statistics: choose one with "
            f"group norm, {WAY_OUT}."
        ) from None


@contextmanager
def private_steps(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    max_norm: float,
    noise: float,
    batch: float,
    generator: torch.Generator,
) -> Iterator[Any]:
    """Wrap ``optimizer`` in opacus's: after a backward pass of a mean loss, ``step()`` is private.

    ``noise`` is the standard deviation on the sum over ``max_norm``. ``batch`` is the expected number of samples in a
    Poisson-sampled batch, by which the sum is divided. ``generator`` draws the noise, on the module's device.
    """
    opacus = need_opacus()
    # opacus unfolds a convolution's input as if its strides were contiguous: with channels-last inputs, also of one
    # pixel, the gradients would silently be wrong.
    layers = [layer for layer in module.modules() if isinstance(layer, nn.modules.conv._ConvNd)]
    handles = [layer.register_forward_pre_hook(lambda _, inputs: tuple(map(plain_strides, inputs))) for layer in layers]
    hooked = opacus.GradSampleModule(module, loss_reduction="mean")
    try:
        with warnings.catch_warnings():
            # From the first layer: images need no gradient.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            # From channels-last weights, whose gradients are contiguous here.
            warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout")
            yield _optimizer(
                optimizer, noise * max_norm, max_grad_norm=max_norm, expected_batch_size=batch, generator=generator
            )
    finally:
        hooked.to_standard_module()
        for handle in handles:
            handle.remove()


def _optimizer(optimizer: torch.optim.Optimizer, deviation: float, **settings: object) -> Any:
    """Return opacus's optimiser with noise drawn in fp64.

    opacus draws in the gradients' fp32. There torch's Box-Muller transform on the CPU has too few bits for the radius,
    so that the noise has no tail beyond a limit:

    dtype   bits   limit, standard deviations   a normal number is beyond it with probability
    fp32    24     5.77                         1 / 1.2e8
    fp64    53     8.57                         1e-17
    """
    opacus = need_opacus()

    class Optimizer(opacus.optimizers.DPOptimizer):  # type: ignore[name-defined]
        def add_noise(self) -> None:
            super().add_noise()  # adds none (multiplier 0), but makes the clipped sum the gradient
            for parameter in self.params if deviation else ():
                sum_ = parameter.grad
                size, place = sum_.shape, sum_.device
                noise = torch.normal(0.0, deviation, size, generator=self.generator, dtype=torch.float64, device=place)
                sum_.copy_(sum_ + noise)

    return Optimizer(optimizer, noise_multiplier=0.0, **settings)


def stream_name(purpose: str, secret: str) -> str:
    """Return the name of a random stream, unpredictable without the ``secret`` unless that is empty."""
    return f"{purpose}/{secret}" if secret else purpose


def generator_of(stream: np.random.Generator, device: torch.device, *, full_state: bool) -> torch.Generator:
    """Return a torch generator on ``device`` seeded from a stream with a key of 128 bits.

    ``full_state``: take as many bits as the device's generator can hold, on the CPU all its 624 words, so that an
    attacker must guess the 128 bits of the key. Of a seed torch only takes 32 bits there, few enough to try all. On a
    GPU the generator's key has 64 bits.
    """
    if full_state and device.type != "cpu":
        return torch.Generator(device).manual_seed(int(stream.integers(1 << 64, dtype=np.uint64)))
    generator = torch.Generator(device).manual_seed(int(stream.integers(1 << 63)))
    if full_state:
        state = generator.get_state()
        # Seed (8 bytes), counters (16), then the words of the Mersenne twister, each in 8 bytes.
        state.numpy()[24 : 24 + 8 * 624].view(np.uint64)[:] = stream.integers(1 << 32, size=624, dtype=np.uint64)
        generator.set_state(state)
    return generator


def check_rows(module: nn.Module, samples: int) -> None:
    """Raise UserError unless a backward pass gave every parameter one gradient per sample.

    A network that folds patches into the batch axis gives one per patch. Clipping these does not bound the norm of the
    sample's gradient.
    """
    for name, parameter in module.named_parameters():
        rows = getattr(parameter, "grad_sample", None)
        if parameter.requires_grad and not (isinstance(rows, torch.Tensor) and len(rows) == samples):
            raise UserError(
                f"DP-SGD clips the gradient of each sample, but the parameter {name} of the network does not have one "
                "per sample: keep one row per sample on the first axis of what every layer takes, and use every layer, "
                "or train without teacher_dp."
            )


def keep_finite(module: nn.Module) -> None:
    """Zero the gradients of samples with a non-finite one, after the backward pass.

    Clipping does not bound NaN: one such sample would make the parameters NaN, which reveals its presence.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    finite = torch.stack([torch.isfinite(p.grad_sample.flatten(1)).all(1) for p in trained]).all(0)  # type: ignore[attr-defined]
    if not bool(finite.all()):
        for parameter in trained:
            parameter.grad_sample[~finite] = 0  # type: ignore[attr-defined]


def sum_patients(module: nn.Module, patients: np.ndarray) -> None:
    """Sum per-sample gradients over each patient's samples, after a backward pass."""
    position = torch.from_numpy(np.unique(patients, return_inverse=True)[1])
    for parameter in module.parameters():
        if parameter.requires_grad:
            gradients: torch.Tensor = parameter.grad_sample  # type: ignore[attr-defined]
            member = torch.nn.functional.one_hot(position).T.to(gradients)  # a matmul sums in one order, on a GPU too
            parameter.grad_sample = (member @ gradients.flatten(1)).view(-1, *parameter.shape)  # type: ignore[attr-defined]
    keep_finite(module)  # a sum of finite values may overflow


def empty_batch(module: nn.Module) -> None:
    """Stand in for the backward pass of an empty batch, whose step is pure noise."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
