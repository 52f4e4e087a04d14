"""Reference of contrastive in plain PyTorch: specification, test oracle and fallback."""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from fedkern.ops._core.backend import compute_dtype


class ContrastCall(NamedTuple):
    """Checked arguments of contrastive: embeddings ``[B, D]`` and a number or a 0-d tensor."""

    x: Tensor
    y: Tensor
    temperature: float | Tensor


class Gradients(NamedTuple):
    """Gradients for a grad_output of 1, in the computing dtype, None where not needed."""

    x: Tensor | None
    y: Tensor | None
    temperature: Tensor | None


def contrastive_reference(x: Tensor, y: Tensor, temperature: float | Tensor = 0.07) -> Tensor:
    """Specify :func:`fedkern.ops.contrastive`."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    compute = compute_dtype(dtype)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(compute)
    with _full_precision(x):
        logits = x.to(compute) @ y.to(compute).T / temperature
    log_likelihoods = logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()
    return (-log_likelihoods.sum() / max(len(x), 1)).to(dtype)


def _full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast, which would round the products."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()
