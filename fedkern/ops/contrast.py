"""contrastive: the symmetric in-batch contrastive loss of image-text training.

The reference is in contrast_reference.py, the torch.library entry in contrast_library.py, the way through the tiles of
similarities in contrast_tiles.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkern.ops import _library
from fedkern.ops import contrast_launch as _cpu  # noqa: F401  registers the CPU kernels
from fedkern.ops._function import EagerFunction, handed_out
from fedkern.ops.backend import eager, intercepted, readable, select
from fedkern.ops.contrast_checks import check_pair, check_temperature
from fedkern.ops.contrast_kernels import ContrastKernel
from fedkern.ops.contrast_library import CONTRASTIVE, CONTRASTIVE_TRAINING
from fedkern.ops.contrast_reference import contrastive_reference

# the public function: checks and choice of path


def contrastive(x: Tensor, y: Tensor, temperature: float | Tensor = 0.07) -> Tensor:
    """Contrastive loss of pairs against their batch, both ways (InfoNCE; CLIP, arXiv 2103.00020; FedDRA's L_NCE).

    ``CE(S, diagonal) + CE(Sᵀ, diagonal)`` with ``S = x yᵀ / temperature``: each row of x has to find its partner among
    the rows of y, and each of y among those of x.  Each direction is the mean over the batch; CLIP's loss is half of
    their sum.

    Args:
        x, y: embeddings ``[B, D]``, partners in the same row; float32, float64, bfloat16 or float16, any strides. They
            are used as they are: normalise them first (``F.normalize``) for cosine similarities.
        temperature: a number above 0, or a tensor without dimensions, which gets a gradient too. For a learnt scale of
            the logits give its inverse: ``temperature=(-log_scale).exp()``.

    Returns:
        A scalar in the promoted dtype of x and y; 0 for an empty batch and for a single pair. Everything is computed in
        float32 (float64 where x or y is float64) and rounded once; autocast changes nothing here.

    The B×B similarities are held only within a call, in tiles where the batch is large: nothing of their size waits for
    the backward pass, whose gradients are taken on the way forward. Graphs that are retained or differentiated again
    work as usual. On a GPU torch multiplies, in TF32 where ``torch.set_float32_matmul_precision`` allows it.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or a temperature that do not fit.
    """
    check_pair(x, y)
    if type(temperature) is not float or not 0 < temperature < 1e30:
        temperature = check_temperature(temperature, x)
    learnt = temperature if isinstance(temperature, Tensor) else None
    tensors = (x, y) if learnt is None else (x, y, learnt)
    if intercepted() or not eager(*tensors):
        return _watched(x, y, learnt, temperature)
    kernel = select("contrastive", *tensors)
    if kernel is None:
        return contrastive_reference(x, y, temperature)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Contrastive.call(kernel, None if learnt is not None else temperature, *tensors)
    return kernel.loss(x, y, temperature)


def _watched(x: Tensor, y: Tensor, learnt: Tensor | None, temperature: float | Tensor) -> Tensor:
    """Through torch.library; by the operator that takes gradients at once, but under torch.func."""
    value = temperature if learnt is None else 0.0
    needs = [tensor is not None and tensor.requires_grad for tensor in (x, y, learnt)]
    if torch._C._are_functorch_transforms_active() or not (torch.is_grad_enabled() and any(needs)):
        return CONTRASTIVE(x, y, learnt, value)[0]
    return CONTRASTIVE_TRAINING(x, y, learnt, value, *needs)[0]


# forward and backward


class _Contrastive(EagerFunction):
    """The eager path: the loss is a scalar, so its gradients for a grad_output of 1 are taken on the way forward.

    Tensors arrive and leave as (x, y, [temperature]).
    """

    @staticmethod
    def forward(ctx: Any, kernel: ContrastKernel, temperature: float | None, *tensors: Tensor) -> Tensor:
        needs = ctx.needs_input_grad[2:]
        given = tensors[2] if temperature is None else temperature
        loss, gradients = kernel.loss_and_gradients(tensors[0], tensors[1], given, (*needs, False)[:3])
        ctx.kernel, ctx.temperature = kernel, temperature
        ctx.save_for_backward(*tensors, *gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        tensors, gradients = saved[:-3], saved[-3:]
        if not readable(grad):

            def reference(x: Tensor, y: Tensor, learnt: Tensor | None = None) -> Tensor:
                return contrastive_reference(x, y, ctx.temperature if learnt is None else learnt)

            needs = ctx.needs_input_grad[2:]
            return (None, None, *_library.differentiate_reference(reference, tensors, needs, grad))
        scaled = ctx.kernel.scaled(gradients[: len(tensors)], grad, tensors)
        return (None, None, *handed_out(scaled, gradients))
