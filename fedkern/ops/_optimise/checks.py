"""optimise: the checks of vectors, settings and memory."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedkern.ops._core.checks import check_dense, check_device, check_floating, check_number, check_tensor, share_memory


def check_parameters(parameters: Tensor) -> None:
    check_floating(parameters, "parameters")
    if parameters.dim() not in (1, 2):
        raise ValueError(f"parameters must have shape [P] or [M, P], but has {list(parameters.shape)}")


def check_like(tensor: Tensor, name: str, parameters: Tensor, *, shared: bool = False) -> None:
    """Check dtype, shape and device against the parameters, with ``shared`` also one ``[P]`` for all rows."""
    check_tensor(tensor, name)
    if tensor.dtype != parameters.dtype:
        raise TypeError(f"{name} must have dtype {parameters.dtype} like parameters, but has {tensor.dtype}")
    if tensor.shape != parameters.shape and not (shared and tensor.shape == parameters.shape[-1:]):
        either = f" or {list(parameters.shape[-1:])}" if shared and parameters.dim() == 2 else ""
        raise ValueError(
            f"{name} must have shape {list(parameters.shape)}{either} like parameters, but has {list(tensor.shape)}"
        )
    check_device(tensor, name, parameters, "parameters")


def check_lr(
    lr: float | Sequence[float] | Tensor, parameters: Tensor, *, known: bool = True
) -> float | list[float] | Tensor:
    """Return one learning rate for all rows, or one per row: a list, or an unchecked fp64 tensor.

    A tensor comes back as ``[M]`` from a GPU, and with any shape if its values are not ``known``, as under
    torch.compile.
    """
    if isinstance(lr, Tensor):
        check_dense(lr, "lr")
        if not lr.is_floating_point():
            raise TypeError(f"lr must have a floating dtype, but has {lr.dtype}")
        known = known and not torch.compiler.is_compiling()
        if lr.dim() == 0 and lr.device.type == "cpu" and known:
            return check_number(lr.item(), "lr")
        if lr.dim() != 0 and (parameters.dim() == 1 or lr.shape != parameters.shape[:1]):
            raise ValueError(f"lr must be a number{_each(parameters)}, not a tensor {list(lr.shape)}")
        if lr.device.type != "cpu" and lr.device != parameters.device:
            raise ValueError(f"lr must be on the CPU, or on {parameters.device} like parameters, but is on {lr.device}")
        if not known:
            return lr.detach().to(torch.float64)
        if lr.device.type == "cpu" and not parameters.is_cuda:
            return [check_number(value, f"lr[{m}]") for m, value in enumerate(lr.tolist())]
        rows = parameters.shape[0] if parameters.dim() == 2 else 1
        return lr.detach().to(parameters.device, torch.float64).expand(rows)
    if isinstance(lr, Sequence) and not isinstance(lr, (str, bytes, bytearray)):
        if parameters.dim() != 2 or len(lr) != parameters.shape[0]:
            raise ValueError(f"lr must be a number{_each(parameters)}, not {len(lr)} numbers")
        return [check_number(value, f"lr[{m}]") for m, value in enumerate(lr)]
    return check_number(lr, "lr")


def _each(parameters: Tensor) -> str:
    return f", or one for each of the {parameters.shape[0]} rows" if parameters.dim() == 2 else ""


def check_betas(betas: Sequence[float]) -> tuple[float, float]:
    if isinstance(betas, (str, bytes, bytearray)) or not isinstance(betas, Sequence) or len(betas) != 2:
        kind = f"{len(betas)} values" if isinstance(betas, (list, tuple)) else type(betas).__name__
        raise (ValueError if isinstance(betas, (list, tuple)) else TypeError)(
            f"betas must be two numbers of [0, 1), not {kind}"
        )
    values = [check_number(value, f"betas[{i}]", 1.0) for i, value in enumerate(betas)]
    for i, value in enumerate(values):
        if value == 1:
            raise ValueError(f"betas[{i}] must be less than 1, not {value:g}")
    return values[0], values[1]


def check_memory(written: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, hidden: bool) -> None:
    """Raise ValueError if a written tensor shares memory with another tensor, or if its own elements overlap.

    If addresses are ``hidden`` (a compiler, a mode, the meta device), only a tensor given twice is found.
    """
    for name, tensor in written.items():
        if not hidden and is_folded(tensor):
            raise ValueError(f"{name} must not be expanded: several of its elements share one place in memory")
        for other_name, candidate in tensors.items():
            if other_name != name and (tensor is candidate if hidden else share_memory(tensor, candidate)):
                raise ValueError(f"{name} must not share memory with {other_name}: it is written to while that is used")


def is_folded(tensor: Tensor) -> bool:
    """Return whether two elements of a tensor of at most two axes lie at the same address."""
    axes = [(size, step) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    if not tensor.numel() or not axes:
        return False
    if len(axes) == 1 or not all(step for _, step in axes):
        return not all(step for _, step in axes)
    (rows, down), (columns, right) = axes
    # Row i, column 0 is row 0, column j first where i * down = j * right.
    common = math.gcd(down, right)
    return right // common < rows and down // common < columns
