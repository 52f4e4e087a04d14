"""entropy: Shannon entropy of the softmax of logits."""

import torch
from torch import Tensor

from fedkern.ops._core.backend import eager, select, select_ordinary
from fedkern.ops._core.checks import autocast
from fedkern.ops._distill.checks import check_logits, check_reduction, move_classes
from fedkern.ops._distill.entries import ENTROPY
from fedkern.ops._distill.gradients import DivergenceFunction
from fedkern.ops._distill.kernels import DistillKernels, entropy_call
from fedkern.ops._distill.reference import entropy_rows_reference


def entropy(logits: Tensor, *, reduction: str = "batchmean", dim: int = 1) -> Tensor:
    """Return the entropy ``H(softmax(logits)) = −Σ p log p`` over the classes, which lie on axis ``dim``, in nats.

    Args:
        logits: ``[B, C]`` or ``[B, C, *positions]``; float32, float64, bfloat16 or float16, any strides. A class of
            logit ``-inf`` has probability 0 and contributes nothing.
        reduction: ``"none"`` (one value per row), ``"sum"``, or ``"batchmean"`` (the sum divided by the number of rows,
            B × positions; 0 for an empty batch).
        dim: axis of the classes, as in :func:`fedkern.ops.kl_div`: -1 for ``[B, T, V]``.

    Returns:
        ``[B, *positions]`` for ``"none"``, else a scalar; the logits' dtype, computed in float32 (float64 for float64).
        Under autocast 16-bit logits count as float32.

    Raises:
        TypeError: ``logits`` is not a tensor or has another dtype.
        ValueError: the shape of ``logits`` or the reduction is wrong.
    """
    (logits,) = autocast(logits)
    if type(dim) is not int or dim != 1:
        (logits,) = move_classes(("logits",), (logits,), dim, (0,))
    kernel: DistillKernels | None = select_ordinary("entropy", logits)
    if kernel is None:
        check_logits(("logits",), (logits,))
    code = check_reduction(reduction)
    if kernel is None:
        if not eager(logits):
            return ENTROPY(logits, code)
        kernel = select("entropy", logits)
    if kernel is None:
        return entropy_rows_reference(logits, code)
    call = entropy_call(logits, code)
    if logits.requires_grad and torch.is_grad_enabled():
        return DivergenceFunction.call((kernel, call), None, None, logits, None)
    return kernel.divergence_forward(call)
