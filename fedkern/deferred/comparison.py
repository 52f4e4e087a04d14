"""How far results of an accelerated network are from those of the network as written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Found = dict[str, Tensor | None]
"""Outputs, buffers and gradients (``the gradient of ...``) by name."""


def differs(results: Found, plain: Found, tolerance: float) -> str:
    """The first thing that differs by more than a share of the largest of its kind; empty where nothing does."""
    sizes = {name: _size(each) for name, each in plain.items()}
    largest = max((size for name, size in sizes.items() if name.startswith("the gradient")), default=0.0)
    for name, expected in plain.items():
        result, variance = results.get(name), name.replace("running_mean", "running_var")  # a mean may be 0
        if result is None or expected is None:
            if result is not expected:
                return name
            continue
        scale = largest if name.startswith("the gradient") else max(sizes[name], sizes.get(variance, 0.0))
        if not torch.allclose(result.double(), expected.double(), rtol=0, atol=tolerance * scale, equal_nan=True):
            return name
    return ""


def _size(tensor: Tensor | None) -> float:
    """The largest finite value."""
    return 0.0 if tensor is None or not tensor.numel() else float(tensor.double().nan_to_num(0, 0, 0).abs().max())


def far(results: Found, plain: Found) -> str:
    """What operators have computed too far from torch; empty where nothing is."""
    gradients = {name: each for name, each in plain.items() if name.startswith("the gradient") and each is not None}
    rest = {name: each for name, each in plain.items() if name not in gradients}
    if name := differs(results, rest, 1e-3):
        return name
    if missing := [name for name in gradients if results[name] is None]:
        return missing[0]
    apart: Mapping[str, float] = {name: float((results[name] - each).norm()) for name, each in gradients.items()}  # type: ignore[operator]
    norm = sum(float(each.norm()) ** 2 for each in gradients.values()) ** 0.5
    if sum(each**2 for each in apart.values()) ** 0.5 > 5e-2 * norm:
        return max(apart, key=lambda name: apart[name])
    norms = {name: float(each.norm()) for name, each in gradients.items()}
    return next((name for name in norms if norms[name] > 1e-2 * norm and apart[name] > 0.2 * norms[name]), "")
