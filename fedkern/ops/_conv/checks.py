"""Argument checks of conv_norm and conv_pool, and the choice of their kernel."""

from typing import Any

import torch
from torch import Tensor

from fedkern.ops._conv.kernels import Inputs, Settings
from fedkern.ops._core import backend
from fedkern.ops._core.backend import eager, is_intercepted, select, select_ordinary, settle_choice
from fedkern.ops._core.checks import check_count, check_device, check_flag, check_floating, check_number, show_value

_autocast = torch.is_autocast_enabled


def choose_kernels(operator: str, *arguments: object) -> Any | None:
    """Return the kernel for an ordinary call, or None, and never raise."""
    try:
        kernel = select_ordinary(operator, *arguments)
        if kernel is None and not is_intercepted() and settle_choice(operator, "cpu"):
            kernel = select_ordinary(operator, *arguments)
    except (RuntimeError, ValueError):  # another backend is forced; torch.jit.trace is recording
        return None
    return None if kernel is None or _autocast("cpu") else kernel


def check_forced(operator: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if a backend was forced whose kernels cannot take these tensors."""
    operands = [tensor for tensor in tensors if tensor is not None]
    if not eager(*operands):
        if not backend.needs_reference(operator):
            backend.only_reference(operator, "torch.compile, modes and tensor subclasses")
    elif select(operator, *operands) is not None:
        where = "under autocast" if _autocast("cpu") else "of these sizes and strides, or at this ISA level"
        backend.not_forced(operator, "cpu", where)


HALVES = (torch.bfloat16, torch.float16)


def check_settings(settings: Settings) -> Settings:
    """Return the settings as plain numbers, or raise TypeError or ValueError."""
    mean, variance, momentum, eps, stride, relu, pool, update, training, groups = settings
    for name, flag in (("relu", relu), ("update", update), ("training", training)):
        check_flag(flag, name)
    momentum, eps = check_number(momentum, "momentum", 1), check_number(eps, "eps", above=True)
    stride, pool = check_count(stride, "stride", 1, 2), check_count(pool, "pool", 1, 2)
    groups = check_count(groups, "groups", 0)
    return Settings(mean, variance, momentum, eps, stride, relu, pool, update, training, groups)


def check_tensors(inputs: Inputs, settings: Settings) -> None:
    x, weight, scale, shift, bias, residual = inputs
    mean, variance, _, _, stride, _, pool, _, training, groups = settings
    _check_maps(x, weight)
    taps = tuple(weight.shape[2:])
    if weight.dim() != 4 or weight.shape[1] != x.shape[1] or taps not in ((3, 3), (1, 1)) or weight.shape[0] < 1:
        raise ValueError(
            f"weight must have shape [out, {x.shape[1]}, 3, 3] or [out, {x.shape[1]}, 1, 1], nine taps or one for each "
            f"channel of x, but has {list(weight.shape)}"
        )
    # Rows and columns of the convolution's result, before pooling.
    height, width = (-(-size // stride) for size in x.shape[2:])
    if pool > min(height, width):
        raise ValueError(f"x must have at least {stride + 1} rows and columns with pool=2, but has {list(x.shape)}")
    values = x.shape[0] * height * width
    if groups:
        if weight.shape[0] % groups:
            raise ValueError(
                f"groups must divide the {weight.shape[0]} channels of the result, but is {show_value(groups)}"
            )
        if mean is not None or variance is not None:
            raise ValueError("mean and variance must be None with groups, which have no running statistics")
        if values * weight.shape[0] == groups:
            raise ValueError(f"x must have more than 1 value per group, but has shape {list(x.shape)}")
    else:
        if bias is not None:
            raise ValueError("bias must be None without groups: batch norm takes it out again")
        if training and values == 1:
            raise ValueError(f"x must have more than 1 value per channel in training, but has shape {list(x.shape)}")
        if (mean is None) != (variance is None):
            raise ValueError("mean and variance must both be given, or both be None")
        if mean is None and not training:
            raise ValueError("mean and variance must be given with training=False")
    # Vectors may be fp32 beside 16-bit maps, except for the convolution's bias.
    free = _converts(x)
    _check_like(weight, "weight", x, free)
    vectors: dict[str, Any] = {"scale": scale, "shift": shift, "mean": mean, "variance": variance, "bias": bias}
    for name, vector in vectors.items():
        if vector is None and name not in ("scale", "shift"):
            continue
        check_floating(vector, name)
        if vector.shape != weight.shape[:1]:
            raise ValueError(
                f"{name} must have shape [{weight.shape[0]}], a value per channel of the result, "
                f"but has {list(vector.shape)}"
            )
        wide = x.dtype in HALVES and scale.dtype is torch.float32 and name != "bias"
        _check_like(vector, name, scale if wide else x, free, "scale" if wide else "x")
    for name, vector in (("mean", mean), ("variance", variance)):
        if vector is not None and vector.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, which conv_norm does not have; detach it")
    if residual is not None:
        check_floating(residual, "residual")
        shape = (x.shape[0], weight.shape[0], height, width)
        if residual.shape != shape:
            raise ValueError(f"residual must have shape {list(shape)}, but has {list(residual.shape)}")
        _check_like(residual, "residual", x, free)


def check_pooled(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, relu: bool) -> None:
    check_flag(relu, "relu")
    _check_maps(x, weight)
    taps = tuple(weight.shape[2:])
    if weight.dim() != 4 or weight.shape[1] != x.shape[1] or taps not in ((3, 3), (5, 5)) or weight.shape[0] < 1:
        raise ValueError(
            f"weight must have shape [out, {x.shape[1]}, 3, 3] or [out, {x.shape[1]}, 5, 5], but has "
            f"{list(weight.shape)}"
        )
    padding = check_count(padding, "padding", 0, taps[0] // 2)
    if 0 < padding < taps[0] // 2:
        raise ValueError(f"padding must be 0 or {taps[0] // 2}, half of the kernel's side, but is {padding}")
    if min(x.shape[2:]) < (smallest := taps[0] + 1 - 2 * padding):
        raise ValueError(f"x must have at least {smallest} rows and columns to be pooled, but has {list(x.shape)}")
    free = _converts(x)
    _check_like(weight, "weight", x, free)
    if bias is not None:
        check_floating(bias, "bias")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape [{weight.shape[0]}], but has {list(bias.shape)}")
        _check_like(bias, "bias", x, free)


def _check_maps(x: Tensor, weight: Tensor) -> None:
    check_floating(x, "x")
    check_floating(weight, "weight")
    if x.dim() != 4 or min(x.shape[1:]) < 1:
        raise ValueError(f"x must have shape [B, in, H, W], where only B may be 0, but has {list(x.shape)}")


def _converts(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _check_like(tensor: Tensor, name: str, like: Tensor, any_dtype: bool, like_name: str = "x") -> None:
    check_device(tensor, name, like, like_name)
    if tensor.dtype != like.dtype and not any_dtype:
        raise TypeError(f"{name} must have dtype {like.dtype} like {like_name}, but has {tensor.dtype}")
