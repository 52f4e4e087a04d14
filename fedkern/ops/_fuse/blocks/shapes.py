"""FusedBlocks: the input shapes that its layers accept, and those that the direct convolution covers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fedkern.ops._fuse.blocks import conv
from fedkern.ops._fuse.blocks.choice import Work
from fedkern.ops._fuse.blocks.layers import FusedLayer
from fedkern.ops._fuse.blocks.trace import Step

# Pools would read three axes as one image without a batch: the batch as its channels, the branches as its rows.
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)

NAMES = {2: "", 3: ", L", 4: ", H, W"}


def axes_of(steps: Sequence[Step], layers: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Numbers of axes that an input of these steps may have; None: any number from 2 on.

    Raises:
        TypeError: no number fits all layers.
    """
    most = max(NAMES) + 1  # layers treat all larger numbers alike
    counts = tuple(axes for axes in range(2, most + 1) if _runs_on(axes, steps, layers))
    if not counts:
        raise TypeError("FusedBlocks does not support blocks whose layers want maps of different numbers of axes")
    return None if most in counts else counts


def _runs_on(axes: int, steps: Sequence[Step], layers: Mapping[str, Any]) -> bool:
    values = [axes]
    for step in steps:
        counts = {values[value] for value in step.inputs}
        layer = layers.get(step.module)
        taken = (4,) if isinstance(layer, POOLS) else layer.axes if isinstance(layer, FusedLayer) else None
        if len(counts) > 1 or (taken is not None and not counts <= set(taken)):
            return False
        values.append(2 if step.kind == "flatten" else counts.pop())
    return True


def axes_named(axes: tuple[int, ...] | None, count: int, shared: bool) -> str:
    """The shapes with these numbers of axes, for error messages."""
    channels = "C" if shared else f"{count} * C"
    if axes is None:
        return f"[B, {channels}, ...]"
    return " or ".join(f"[B, {channels}{NAMES[n]}]" for n in axes)


class Survey(NamedTuple):
    """An input's way through the layers.

    Attributes:
        direct: whether "direct" covers all convolutions.
        works: the convolutions.
    """

    direct: bool
    works: list[Work]


def survey(steps: Sequence[Step], layers: Mapping[str, Any], count: int, shape: Sequence[int], shared: bool) -> Survey:
    """Follows an input of this shape, whose number of axes :func:`axes_of` allows, through the layers.

    Raises:
        ValueError: a layer does not accept the shape that reaches it.
    """
    direct, works = len(shape) == 4, []
    # A branch's shapes, and whether their channels are still the input's.
    values = [((shape[0], shape[1] if shared else shape[1] // count, *shape[2:]), True)]
    for step in steps:
        x, from_input = values[step.inputs[0]]
        layer: Any = layers.get(step.module)
        where = f'layer "{step.module}" of each block' if step.module else "each block"
        features = len(x) - 1 if step.kind == "linear" else 1
        width = layer.reads if isinstance(layer, FusedLayer) else None
        if width is not None and x[features] != width:
            if from_input and features == 1:
                channels = f"{width}" if shared else f"{count} * {width}"
                raise ValueError(
                    f"x must have {channels} channels, which {where} reads, not {shape[1]}: its shape is {list(shape)}"
                )
            kind = "features" if step.kind == "linear" else "channels"
            raise ValueError(
                f"x of shape {list(shape)} does not fit: {where} reads {width} {kind} and is given {x[features]}"
            )
        y: tuple[int, ...] = x
        if step.kind == "conv":
            y = layer.shape_after(x)
            if min(y[2:]) < 1:
                size, kernel = " x ".join(map(str, x[2:])), " x ".join(map(str, layer.kernel))
                raise ValueError(
                    f"x of shape {list(shape)} is too small: {where} convolves with {kernel} and gets maps of {size}"
                )
            direct = direct and conv.fits(layer, y[3])
            works.append(layer.work(y))
        elif step.kind == "linear":
            y = (*x[:-1], layer.writes)
        elif step.kind == "flatten":
            y = (x[0], math.prod(x[1:]))
        elif step.kind == "add":
            other, _ = values[step.inputs[1]]  # with as many axes, see axes_of
            if any(a != b and 1 not in (a, b) for a, b in zip(x, other, strict=True)):
                raise ValueError(
                    f"x of shape {list(shape)} does not fit: the blocks add maps of {list(x[1:])} and {list(other[1:])}"
                )
            y = tuple(b if a == 1 else a for a, b in zip(x, other, strict=True))
        elif isinstance(layer, POOLS):
            try:
                # On a real tensor: pooling a meta tensor imports torch's compiler or sympy, which takes up to a second.
                y = (x[0], *layer(torch.empty((1, *x[1:]))).shape[1:])
            except RuntimeError as error:
                raise ValueError(f"x of shape {list(shape)} does not fit {where}: {error}") from error
        values.append((y, from_input and step.kind in ("norm", "relu", "channelwise", "same")))
    return Survey(direct, works)
