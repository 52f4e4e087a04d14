"""DP-SGD (Abadi et al., arXiv 1607.00133) on opacus: what it asks of a network, and its steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkern.errors import UserError

WAY_OUT = "such as cnn-gn, resnet8-gn or resnet18-gn (unet-small-gn for segmentation)"


@dataclass(frozen=True)
class DPSGD:
    """How a network is trained with differential privacy.

    Attributes:
        max_norm: largest Euclidean norm of the gradient of a sample, or of the sum of a patient's.
        noise: standard deviation of the noise on their sum over ``max_norm``, from the probability of a sample, or
            patient, to be in a batch and the number of steps.
        channel: what the client's ledger calls it.
        secret: mixed into the streams of sampling and noise; empty: they follow from the run's seed.
        patients: int64 [n], the patient of every sample, where a patient is what is drawn and clipped; None: a sample.
        images: the largest number of samples of a patient.
    """

    max_norm: float
    noise: Callable[[float, int], float]
    channel: str
    secret: str = field(default="", repr=False)
    patients: np.ndarray | None = None
    images: int = 1


def need_opacus() -> Any:
    """The package ``opacus``.

    Raises:
        UserError: it is not installed.
    """
    try:
        import opacus
        import opacus.optimizers
    except ImportError:
        raise UserError("Training with DP-SGD needs opacus: pip install 'fedkern[privacy]'.") from None
    return opacus


def check_network(module: nn.Module, name: str) -> None:
    """Raises UserError where a network has no per-sample gradients: ``name`` is what the user calls it."""
    opacus = need_opacus()
    if any(isinstance(layer, _BatchNorm) for layer in module.modules()):
        raise UserError(
            f"DP-SGD needs samples that do not look at each other, but {name} has batch norm: choose one with group "
            f"norm, {WAY_OUT}."
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
    """opacus's optimiser around ``optimizer``: after a backward pass of a batch's mean loss, ``step()`` is private.

    Args:
        module: trained through its hooks, which are taken off at the end.
        max_norm: largest norm of a sample's gradient.
        noise: standard deviation of the noise on the sum over ``max_norm``.
        batch: expected number of samples in a Poisson-sampled batch, by which the sum is divided.
        generator: of the noise, on the module's device.
    """
    opacus = need_opacus()
    # opacus unfolds a convolution's input by strides that it takes for contiguous ones: in channels-last the gradients
    # would silently be wrong.
    layers = [layer for layer in module.modules() if isinstance(layer, nn.modules.conv._ConvNd)]
    handles = [layer.register_forward_pre_hook(_contiguous) for layer in layers]
    hooked = opacus.GradSampleModule(module, loss_reduction="mean")
    try:
        with warnings.catch_warnings():
            # Of a first layer: images need no gradient.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            # Of channels-last weights, whose gradients are contiguous here.
            warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout")
            yield _optimizer(
                optimizer,
                noise * max_norm,
                max_grad_norm=max_norm,
                expected_batch_size=batch,
                generator=generator,
            )
    finally:
        hooked.to_standard_module()
        for handle in handles:
            handle.remove()


def _optimizer(optimizer: torch.optim.Optimizer, deviation: float, **settings: Any) -> Any:
    """opacus's optimiser with noise drawn in fp64.

    opacus draws in the gradients' fp32, where torch's Box-Muller transform has 24 bits for the radius on the CPU and
    ends at 5.77 standard deviations, which a normal number exceeds once in 1.2e8.  The 53 bits of fp64 reach 8.57
    (1e-17).
    """
    opacus = need_opacus()

    class Optimizer(opacus.optimizers.DPOptimizer):  # type: ignore[name-defined]
        def add_noise(self) -> None:
            super().add_noise()  # none: it makes the clipped sum the gradient
            for parameter in self.params if deviation else ():
                sum_ = parameter.grad
                size, place = sum_.shape, sum_.device
                noise = torch.normal(0.0, deviation, size, generator=self.generator, dtype=torch.float64, device=place)
                sum_.copy_(sum_ + noise)

    return Optimizer(optimizer, noise_multiplier=0.0, **settings)


def stream_name(purpose: str, secret: str) -> str:
    """The name of a random stream that nobody foresees without the secret; an empty one leaves it at ``purpose``."""
    return f"{purpose}/{secret}" if secret else purpose


def generator_of(stream: np.random.Generator, device: torch.device, *, whole: bool) -> torch.Generator:
    """A generator of torch's on ``device`` that follows from a stream, whose key has 128 bits.

    Neither torch's Mersenne twister nor its Philox is a cryptographic generator.

    Args:
        whole: of as many bits as the device's generator can take.  On the CPU all of its 624 words are the stream's, so
            that the 128 bits of the stream's key are what is to be guessed: of a seed torch takes 32 bits there, which
            can be tried out one by one.  On a GPU the key has 64 bits, and the stream gives all of them.
    """
    if whole and device.type != "cpu":
        return torch.Generator(device).manual_seed(int(stream.integers(1 << 64, dtype=np.uint64)))
    generator = torch.Generator(device).manual_seed(int(stream.integers(1 << 63)))
    if whole:
        state = generator.get_state()
        # Seed (8 bytes), counters (16), then the words of the Mersenne twister, each in 8 bytes.
        state.numpy()[24 : 24 + 8 * 624].view(np.uint64)[:] = stream.integers(1 << 32, size=624, dtype=np.uint64)
        generator.set_state(state)
    return generator


def _contiguous(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x.contiguous() for x in inputs)


def keep_finite(module: nn.Module) -> None:
    """Takes samples whose gradients are not all finite out of a batch, after its backward pass.

    Clipping bounds no NaN: one such sample would make the parameters NaN, which tells that it is there.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    finite = torch.stack([torch.isfinite(p.grad_sample.flatten(1)).all(1) for p in trained]).all(0)  # type: ignore[attr-defined]
    if not bool(finite.all()):
        for parameter in trained:
            parameter.grad_sample[~finite] = 0  # type: ignore[attr-defined]


def sum_patients(module: nn.Module, patients: np.ndarray) -> None:
    """Adds up the gradients of each patient's samples, after a backward pass: a row of ``grad_sample`` is a patient's.

    Args:
        patients: int64 [B], whose sample each of the batch is.
    """
    position = torch.from_numpy(np.unique(patients, return_inverse=True)[1])
    for parameter in module.parameters():
        if parameter.requires_grad:
            each: torch.Tensor = parameter.grad_sample  # type: ignore[attr-defined]
            member = torch.nn.functional.one_hot(position).T.to(each)  # a product adds in one order, on a GPU too
            parameter.grad_sample = (member @ each.flatten(1)).view(-1, *parameter.shape)  # type: ignore[attr-defined]
    keep_finite(module)  # a sum of finite values may be none


def empty_batch(module: nn.Module) -> None:
    """Stands for the backward pass of a batch into which no sample was drawn: its step is noise alone."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
