"""contrastive: the symmetric in-batch contrastive loss of image-text training, also in ``torch.library``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._contrast.kernels import CpuContrast
from fedkern.ops._contrast.reference import ContrastCall, contrastive_reference
from fedkern.ops._contrast.tiled import CudaContrast
from fedkern.ops._core import library
from fedkern.ops._core.backend import add_kernels, compute_dtype, eager, is_readable, select, select_ordinary
from fedkern.ops._core.checks import autocast, check_device, check_floating, check_number
from fedkern.ops._core.library import Context, EagerFunction, handed_out, saved_tensors


def check_pair(x: Tensor, y: Tensor) -> None:
    for name, tensor in (("x", x), ("y", y)):
        check_floating(tensor, name)
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have shape [B, D], one embedding per row, but has {list(tensor.shape)}")
    if x.shape != y.shape:
        raise ValueError(f"y must have shape {list(x.shape)} like x, row for row, but has {list(y.shape)}")
    check_device(y, "y", x, "x")


def check_temperature(temperature: float | Tensor, x: Tensor) -> float | Tensor:
    """Return ``temperature`` as a float above 0, or unchanged if it is a tensor."""
    if isinstance(temperature, Tensor):
        check_floating(temperature, "temperature")
        if temperature.dim() != 0:
            raise ValueError(
                f"temperature must be a number or a tensor without dimensions, but has shape {list(temperature.shape)}"
            )
        check_device(temperature, "temperature", x, "x")
        # Reading a GPU tensor would synchronise: there a value that is not above 0 gives what the formula says.
        if temperature.is_cpu and eager(temperature):
            check_number(temperature.item(), "temperature", above=True)
        return temperature
    return check_number(temperature, "temperature", above=True)


Results = tuple[Tensor, Tensor, Tensor, Tensor]


def reference_at(temperature: Any) -> Any:
    def loss(x: Tensor, y: Tensor, learnt: Tensor | None = None) -> Tensor:
        return contrastive_reference(x, y, temperature if learnt is None else learnt)

    return loss


def _loss_alone(x: Tensor, y: Tensor, learnt: Tensor | None, temperature: float, *needs: bool) -> tuple[Tensor]:
    return (reference_at(temperature)(x, y, learnt),)


def _run(x: Tensor, y: Tensor, learnt: Tensor | None, temperature: float, *needs: bool) -> Results:
    """Return the loss and, already in the forward pass, the gradients that ``needs`` asks for."""
    if x.dim() != 2 or x.shape != y.shape:
        raise ValueError(f"x and y must have one shape [B, D], but have {list(x.shape)} and {list(y.shape)}")
    if learnt is not None and learnt.dim():
        raise ValueError(f"a learnt temperature must be a 0-d tensor, but has shape {list(learnt.shape)}")
    kernel, call = select("contrastive", x, y), ContrastCall(x, y, temperature if learnt is None else learnt)
    compute = compute_dtype(torch.promote_types(x.dtype, y.dtype))
    gradients: Sequence[Tensor | None] = (None, None, None)
    if kernel is None:
        loss = contrastive_reference(*call)
        wide = [t if t is None else t.to(compute) for t in (x, y, learnt)]
        unit = loss.new_ones((), dtype=compute)
        gradients = library.differentiate_reference(reference_at(temperature), wide, needs, unit, twice=False)
    elif any(needs):
        loss, gradients = kernel.loss_and_gradients(call, needs)
    else:
        loss = kernel.loss(call)
    a, b, c = (
        _nothing(x) if g is None or not need else g.to(compute).contiguous()
        for g, need in zip(gradients, needs, strict=True)
    )
    return loss, a, b, c


def _fake(x: Tensor, y: Tensor, learnt: Tensor | None, temperature: float, *needs: bool) -> Results:
    dtype = torch.promote_types(x.dtype, y.dtype)
    a, b, c = (
        x.new_empty(shape, dtype=compute_dtype(dtype)) if need else _nothing(x)
        for shape, need in zip((x.shape, x.shape, ()), needs, strict=True)
    )
    return x.new_empty((), dtype=dtype), a, b, c


def _nothing(x: Tensor) -> Tensor:
    return torch.empty(0, device=x.device)


def _setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.settings = inputs[3:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _backward(ctx: Context, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    temperature, *needs = ctx.settings
    inputs, gradients = saved[:3], saved[3:]
    results: Sequence[Tensor | None]
    if torch.is_grad_enabled():  # create_graph=True
        results = library.differentiate_reference(reference_at(temperature), inputs, needs, grad)
    else:
        results = [
            (g * grad).to(t.dtype) if need and t is not None else None
            for g, t, need in zip(gradients, inputs, needs, strict=True)
        ]
    return (*results, *[None] * 4)


CONTRASTIVE = library.register(
    "contrastive",
    "(Tensor x, Tensor y, Tensor? learnt, float temperature, bool need_x, bool need_y, bool need_temperature) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    reference=_loss_alone,
)


def contrastive(x: Tensor, y: Tensor, temperature: float | Tensor = 0.07) -> Tensor:
    """Compute the symmetric in-batch contrastive loss of pairs (InfoNCE, CLIP, arXiv 2103.00020, FedDRA's L_NCE).

    ``CE(S, diagonal) + CE(Sᵀ, diagonal)`` with ``S = x yᵀ / temperature``: each row of x must find its partner among
    the rows of y, and each row of y its partner among the rows of x. Each direction is averaged over the batch; CLIP's
    loss is half of this sum.

    Args:
        x, y: embeddings ``[B, D]``, partners in the same row; float32, float64, bfloat16 or float16, any strides.
            Nothing is normalised here: apply ``F.normalize`` first for cosine similarities.
        temperature: a number above 0, or a 0-d tensor, which gets a gradient too. For a learnt logit scale pass its
            inverse: ``temperature=(-log_scale).exp()``.

    Returns:
        A scalar in the promoted dtype of x and y; 0 for an empty batch and for a single pair. Everything is computed in
        float32 (float64 where x or y is float64) and rounded once. Under autocast 16-bit embeddings count
        as float32.

    The B×B similarities exist only within a call, in tiles where the batch is large. Gradients are computed in the
    forward pass, so that nothing of that size is kept for the backward pass. Retained graphs and second derivatives
    work as usual. On a GPU torch computes the matrix products, in TF32 where ``torch.set_float32_matmul_precision``
    allows it.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match, or the temperature is not finite and above 0 (the value of a tensor
            on a GPU is not checked).
        RuntimeError: a forced backend does not support the call.
    """
    x, y = autocast(x, y)
    learnt = temperature if isinstance(temperature, Tensor) else None
    tensors = (x, y) if learnt is None else (x, y, learnt)
    kernel: CpuContrast | CudaContrast | None = select_ordinary("contrastive", *tensors)
    if kernel is None or x.dim() != 2 or x.shape != y.shape:
        check_pair(x, y)
    if type(temperature) is not float or not 0 < temperature < 1e30:
        temperature = check_temperature(temperature, x)
    if kernel is None:
        if not eager(*tensors):
            return _call_operator(x, y, learnt, temperature)
        kernel = select("contrastive", *tensors)
    if kernel is None:
        return contrastive_reference(x, y, temperature)
    call = ContrastCall(x, y, temperature)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Contrastive.call(kernel, call, *tensors)
    return kernel.loss(call)


def _call_operator(x: Tensor, y: Tensor, learnt: Tensor | None, temperature: float | Tensor) -> Tensor:
    if not isinstance(temperature, Tensor) and torch.compiler.is_compiling():
        learnt = library.number_tensor(temperature).to(x.device)
    needs = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (x, y, learnt)]
    return CONTRASTIVE(x, y, learnt, temperature if learnt is None else 0.0, *needs)[0]


class _Contrastive(EagerFunction):
    """Autograd function of eager calls.

    The loss is a scalar, so the forward pass computes gradients for a grad_output of 1, and the backward pass scales
    them.
    """

    @staticmethod
    def forward(ctx: Context, kernel: CpuContrast | CudaContrast, call: ContrastCall, *tensors: Tensor) -> Tensor:
        loss, gradients = kernel.loss_and_gradients(call, (*ctx.needs_input_grad[2:], False)[:3])
        ctx.settings = kernel, None if len(tensors) > 2 else call.temperature
        ctx.save_for_backward(*tensors, *gradients)
        return loss

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = saved_tensors(ctx)
        tensors, gradients = saved[:-3], saved[-3:]
        kernel, temperature = ctx.settings
        if not is_readable(grad):
            reference, needs = reference_at(temperature), ctx.needs_input_grad[2:]
            return (None, None, *library.differentiate_reference(reference, tensors, needs, grad))
        return None, None, *handed_out(kernel.scale_gradients(gradients[: len(tensors)], grad, tensors), gradients)


add_kernels("contrastive", cpu=CpuContrast, cuda=CudaContrast, fits="tensors_fit")
