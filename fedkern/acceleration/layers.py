"""Convolutions of torch that an operator may replace: one inspection for networks of any origin."""

from functools import lru_cache
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

SETTINGS = attrgetter("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
"""Of a convolution, as :func:`square_windows` takes them."""
PARAMETERS = itemgetter("weight", "bias")
"""Of a layer's dictionary: a module's attribute that is a tensor takes half a microsecond."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The dictionaries in which a module holds its hooks."""
GLOBAL_HOOKS = [getattr(torch_module, f"_global{name}", {}) for name in HOOKS]
"""Hooks of all modules of the process, by the dictionaries in which torch keeps them."""
_METHODS = [nn.Conv2d.forward, nn.Conv2d._conv_forward, nn.Conv2d.__call__]
Windows = tuple[int, int, int]
"""Side of the windows, stride and padding."""
Convolution = tuple[Tensor, Tensor | None, int, int, int]
"""Weight, bias, side of the windows, stride and padding."""


def convolution(layer: object) -> Convolution | None:
    """Return a convolution with square windows that are neither dilated nor grouped, or None.

    Also None if another object replaces a parameter, as after ``weight_norm``, pruning or parametrisations.
    """
    if type(layer) is not nn.Conv2d:
        return None
    try:
        weight, bias = PARAMETERS(layer._parameters)
        square = square_windows(*SETTINGS(layer))
    except KeyError:
        return None
    return None if weight is None or square is None else (weight, bias, *square)


def is_untouched(layer: nn.Module) -> bool:
    if type(layer) is not nn.Conv2d or [nn.Conv2d.forward, nn.Conv2d._conv_forward, nn.Conv2d.__call__] != _METHODS:
        return False
    return vars(layer).keys().isdisjoint(("forward", "_conv_forward", "__call__"))


def square_windows(
    size: object, stride: object, padding: object, dilation: object, groups: object, padding_mode: object
) -> Windows | None:
    """Return the windows of a convolution that is neither dilated nor grouped, or None."""
    try:
        return _square(size, stride, padding, dilation, groups, padding_mode)
    except TypeError:  # lists where torch writes tuples
        return None


@lru_cache(maxsize=1024)
def _square(size: Any, stride: Any, padding: Any, dilation: Any, groups: int, mode: str) -> Windows | None:
    if groups != 1 or dilation != (1, 1) or mode != "zeros" or isinstance(padding, str):
        return None
    is_square = all(height == width for height, width in (size, stride, padding))
    return (size[0], stride[0], padding[0]) if is_square else None


def has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
