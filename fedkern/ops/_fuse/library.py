"""fuse in ``torch.library``: operators with shapes and gradients for torch.compile and opcheck."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core import backend, library
from fedkern.ops._core.function import Context
from fedkern.ops._fuse.maps import empty_map, order_of, wants_channels_last
from fedkern.ops._fuse.reference import FuseCall, fuse_backward_reference, fuse_concat_reference, fuse_mean_reference

Inputs = tuple[list[Tensor], Tensor | None, Tensor | None, bool, bool]


def _reference(features: list[Tensor], scale: Tensor | None, shift: Tensor | None, relu: bool, mean: bool) -> Tensor:
    return (fuse_mean_reference if mean else fuse_concat_reference)(features, scale, shift, relu)


def _implementation(
    features: list[Tensor], scale: Tensor | None, shift: Tensor | None, relu: bool, mean: bool
) -> Tensor:
    kernel = backend.select("fuse_mean" if mean else "fuse_concat", *features)
    if kernel is not None:
        channels = [x.shape[1] for x in features]
        out = kernel.forward(features, FuseCall(scale, shift, relu, mean, channels, wants_channels_last(features)))
        # A mean has the first map's strides, which may be any along axes of size 1 or without elements.
        odd = mean and (1 in out.shape or 0 in out.shape)
        return library.laid_out(out, _fake(features, scale, shift, relu, mean)) if odd else out
    return _fake(features, scale, shift, relu, mean).copy_(_reference(features, scale, shift, relu, mean))


def _fake(features: list[Tensor], scale: Tensor | None, shift: Tensor | None, relu: bool, mean: bool) -> Tensor:
    template = features[0]
    channels = template.shape[1] if mean else sum([x.shape[1] for x in features])
    return empty_map((template.shape[0], channels, *template.shape[2:]), wants_channels_last(features), template)


def _setup_context(ctx: Context, inputs: Inputs, output: Tensor) -> None:
    features, scale, shift, relu, mean = inputs
    needs = (
        [x.requires_grad for x in features],
        scale is not None and scale.requires_grad,
        shift is not None and shift.requires_grad,
    )
    by_features = needs[1] or (relu and mean)
    ctx.save_for_backward(scale, shift, None if by_features or not relu else output, *(features if by_features else ()))
    ctx.settings = (relu, mean, [x.shape[1] for x in features]), needs


def _backward(ctx: Context, grad: Tensor) -> tuple[list[Tensor | None] | Tensor | None, ...]:
    scale, shift, out, *features = ctx.saved_tensors
    (relu, mean, channels), needs = ctx.settings
    if torch.is_grad_enabled():  # create_graph=True
        call = FuseCall(scale, shift, relu, mean, channels, False)
        return (*fuse_backward_reference(grad, features or None, out, call, needs), None, None)
    maps, to_scale, to_shift = FUSE_BACKWARD(grad, features, out, scale, shift, relu, mean, channels, *needs)
    chosen = [x if need else None for x, need in zip(maps, needs[0], strict=True)]
    return chosen, to_scale if needs[1] else None, to_shift if needs[2] else None, None, None


def _backward_implementation(
    grad: Tensor, features: list[Tensor], out: Tensor | None, *others: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    scale, shift, relu, mean, channels, *needs = others
    if (needs[1] and scale is None) or (needs[2] and shift is None):
        raise ValueError("a scale or shift that is not given has no gradient")
    kernel = backend.select("fuse_mean" if mean else "fuse_concat", grad)
    run = fuse_backward_reference if kernel is None else kernel.backward
    call = FuseCall(scale, shift, relu, mean, channels, order_of(grad) == 1)
    result = run(grad, features or None, out, call, tuple(needs))
    maps, to_scale, to_shift = _backward_fake(grad, features, out, *others)
    filled = [library.laid_out(x, empty) for x, empty in zip(result[0], maps, strict=True)]
    return filled, library.laid_out(result[1], to_scale), library.laid_out(result[2], to_shift)


def _backward_fake(
    grad: Tensor, features: list[Tensor], out: Tensor | None, *others: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    scale, shift, _, _, channels, need_features, need_scale, need_shift = others
    channels_last = order_of(grad) == 1
    maps = [
        empty_map((grad.shape[0], count, *grad.shape[2:]), channels_last, grad) if need else grad.new_empty(0)
        for count, need in zip(channels, need_features, strict=True)
    ]
    to_scale = scale.new_empty(scale.shape) if need_scale and scale is not None else grad.new_empty(0)
    to_shift = shift.new_empty(shift.shape) if need_shift and shift is not None else grad.new_empty(0)
    return maps, to_scale, to_shift


FUSE = library.register(
    "fuse", "(Tensor[] features, Tensor? scale, Tensor? shift, bool relu, bool mean) -> Tensor", _implementation,
    fake=_fake, setup_context=_setup_context, backward=_backward, reference=_reference,
)  # fmt: skip
FUSE_BACKWARD = library.register(
    "fuse_backward",
    "(Tensor grad, Tensor[] features, Tensor? out, Tensor? scale, Tensor? shift, bool relu, bool mean, "
    "SymInt[] channels, bool[] need_features, bool need_scale, bool need_shift) -> (Tensor[], Tensor, Tensor)",
    _backward_implementation,
    fake=_backward_fake,
)
