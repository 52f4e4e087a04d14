"""Comparison of an accelerated network's results with those of the network as written."""

import torch
from torch import Tensor

Found = dict[str, Tensor | None]
"""Outputs, buffers and gradients (``the gradient of ...``) by name."""


def find_difference(results: Found, plain: Found, tolerance: float) -> str:
    """Return the first name whose results differ by more than a share of the largest of its kind."""
    sizes = {name: _size(tensor) for name, tensor in plain.items()}
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
    return 0.0 if tensor is None or not tensor.numel() else float(tensor.double().nan_to_num(0, 0, 0).abs().max())


def find_far_result(results: Found, plain: Found) -> str:
    """Return the first name for which operators and torch differ too much."""
    gradients = {name: grad for name, grad in plain.items() if name.startswith("the gradient") and grad is not None}
    outputs = {name: tensor for name, tensor in plain.items() if name not in gradients}
    if name := find_difference(results, outputs, 1e-3):
        return name
    if missing := [name for name in gradients if results[name] is None]:
        return missing[0]
    distances = {name: float((results[name] - grad).norm()) for name, grad in gradients.items()}  # type: ignore[operator]
    norm = sum(float(tensor.norm()) ** 2 for tensor in gradients.values()) ** 0.5
    if sum(distance**2 for distance in distances.values()) ** 0.5 > 5e-2 * norm:
        return max(distances, key=lambda name: distances[name])
    norms = {name: float(tensor.norm()) for name, tensor in gradients.items()}
    return next((name for name in norms if norms[name] > 1e-2 * norm and distances[name] > 0.2 * norms[name]), "")
