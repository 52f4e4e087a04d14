"""fuse: the feature maps of several clients' blocks concatenated, or averaged, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fedkern.ops._core import backend
from fedkern.ops._core.checks import check_dense
from fedkern.ops._core.function import EagerFunction
from fedkern.ops._fuse.cuda import CudaFuse
from fedkern.ops._fuse.kernels import FuseNeeds, order_of
from fedkern.ops._fuse.launch import CpuFuse
from fedkern.ops._fuse.library import FUSE
from fedkern.ops._fuse.reference import fuse_backward_reference, fuse_concat_reference, fuse_mean_reference

Activation = Literal["relu"] | None


# 1. What it computes: fuse_concat_reference, fuse_mean_reference.


# 2. The public functions.


def fuse_concat(
    features: Sequence[Tensor],
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: Activation = None,
) -> Tensor:
    """Concatenates M feature maps along the channels, with batch norm and ReLU in the same pass.

    ``out[:, o + c] = act(scale[o + c] * features[m][:, c] + shift[o + c])`` with ``o`` the channels of the maps before
    map m (FuseFL's fusion, arXiv 2410.20380).  The same takes three passes with ``torch.cat``, a batch norm in
    evaluation mode (``scale = gamma / sqrt(var + eps)``, ``shift = beta - scale * mean``) and a ReLU.

    Args:
        features: M >= 1 maps ``[B, C_m, *S]`` (feature vectors ``[B, C_m]`` too), fp32, bf16, fp16 or fp64, of one
            dtype, device, batch and position shape.  The result is channels-last if all maps are.
        scale, shift: ``[sum of C_m]``, of any of these dtypes; None for 1 and 0.
        activation: ``"relu"`` or None.

    Returns:
        ``[B, sum of C_m, *S]``.  fp32, bf16 and fp16 are computed in fp32 and rounded once.

    Differentiable in features, scale and shift; sums over batch and positions run in a fixed order, so that gradients
    have the same bits every time.  Works under torch.compile (one node) and for second derivatives; torch.func
    transforms use the reference.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device or shape is wrong.
        RuntimeError: a forced backend cannot serve the call.
    """
    found = _usual(features, scale, shift, activation, mean=False)
    if found is not None:
        return _fuse_alike(*found, features, scale, shift, activation is not None, mean=False)
    _check(features, scale, shift, activation, mean=False)
    return _fuse(features, scale, shift, activation is not None, mean=False)


def fuse_mean(
    features: Sequence[Tensor],
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: Activation = None,
) -> Tensor:
    """Averages M feature maps, each after its own batch norm and ReLU, in one pass (FuseFL's ``avg`` adaptor).

    ``out[:, c] = 1/M * sum over m of act(scale[m * C + c] * features[m][:, c] + shift[m * C + c])``.

    Args:
        features: M >= 1 maps of one shape ``[B, C, *S]``; otherwise as in :func:`fuse_concat`.
        scale, shift: ``[M * C]``, as in :func:`fuse_concat`.
        activation: ``"relu"`` or None.

    Returns:
        ``[B, C, *S]``.  fp32, bf16 and fp16 are computed in fp32 and rounded once.

    Gradients, transforms and errors are those of :func:`fuse_concat`.
    """
    found = _usual(features, scale, shift, activation, mean=True)
    if found is not None:
        return _fuse_alike(*found, features, scale, shift, activation is not None, mean=True)
    _check(features, scale, shift, activation, mean=True)
    return _fuse(features, scale, shift, activation is not None, mean=True)


def _fuse_alike(
    kernel: CpuFuse,
    last: bool,
    features: Sequence[Tensor],
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    mean: bool,
) -> Tensor:
    if torch.is_grad_enabled():
        summed = (scale is not None and scale.requires_grad) or (shift is not None and shift.requires_grad)
        if summed or (relu and mean):
            return _fuse(features, scale, shift, relu, mean)
        for x in features:
            if x.requires_grad:
                return _FuseAlike.call((kernel, scale, shift, relu, mean, last), *features)
    return kernel.forward_alike(features, scale, shift, relu, mean, last)


def _usual(
    features: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None, activation: Activation, mean: bool
) -> tuple[CpuFuse, bool] | None:
    """The CPU kernel and whether maps are channels-last, for common calls; None: the general path must decide."""
    if backend.intercepted():  # first: a compiler would guard on all that is looked up below
        return None
    found = backend._chosen.get(("fuse_mean" if mean else "fuse_concat", "cpu"))
    if found is None or type(found[0]) is not CpuFuse or activation not in (None, "relu"):
        return None
    layout = found[0].fits(features, scale, shift)
    return (found[0], layout == 2) if layout else None


_CHANNELS_LAST = torch.channels_last


def _fuse(features: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None, relu: bool, mean: bool) -> Tensor:
    operator = "fuse_mean" if mean else "fuse_concat"
    given = list(features)
    if scale is not None:
        given.append(scale)
    if shift is not None:
        given.append(shift)
    reference = fuse_mean_reference if mean else fuse_concat_reference
    if not backend.eager(*given):
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            # The operator has no batching rule for a list of mapped tensors; the reference's operations have theirs.
            backend.only_reference(operator, "torch.func transforms")
            return reference(features, scale, shift, relu)
        return FUSE(list(features), scale, shift, relu, mean)
    kernel = backend.select(operator, *features)
    if kernel is None:
        return reference(features, scale, shift, relu)
    if torch.is_grad_enabled() and True in [tensor.requires_grad for tensor in given]:
        return _Fuse.call(scale, shift, relu, mean, *features)
    return kernel.forward(features, scale, shift, relu, mean)


def _check(
    features: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None, activation: Activation, mean: bool
) -> None:
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise TypeError(f"features must be a list of tensors, not {type(features).__name__}")
    if not len(features):
        raise ValueError("features must hold at least one map, not none")
    first = features[0]
    channels = 0 if not _alike(features) else len(features) * first.shape[1]
    for m, x in enumerate(() if channels else features):
        if not isinstance(x, Tensor):
            raise TypeError(f"features[{m}] must be a tensor, not {type(x).__name__}")
        check_dense(x, f"features[{m}]")
        if x.dtype not in backend.FLOATS:
            raise TypeError(f"features[{m}] must be float32, float64, bfloat16 or float16, not {x.dtype}")
        if x.dim() < 2:
            raise ValueError(f"features[{m}] must have shape [B, C, *S], not {list(x.shape)}")
        if x.dtype != first.dtype:
            raise TypeError(f"features[{m}] must have features[0]'s dtype {first.dtype}, not {x.dtype}")
        if x.device != first.device:
            raise ValueError(f"features[{m}] must be on features[0]'s device {first.device}, not {x.device}")
        expected = (first.shape[0], first.shape[1] if mean else x.shape[1], *first.shape[2:])
        if x.shape != expected:
            shape: list[object] = list(expected)
            if not mean:
                shape[1] = "C"
            raise ValueError(f"features[{m}] must have shape {shape} as features[0] has, not {list(x.shape)}")
        channels += x.shape[1]
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is None:
            continue
        if not isinstance(vector, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(vector).__name__}")
        check_dense(vector, name)
        if vector.dtype not in backend.FLOATS:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, not {vector.dtype}")
        if vector.shape != (channels,):
            raise ValueError(
                f"{name} must have shape [{channels}], one value per channel of every map, not {list(vector.shape)}"
            )
        if vector.device != first.device:
            raise ValueError(f"{name} must be on the maps' device {first.device}, not {vector.device}")
    if activation is not None and activation != "relu":
        raise ValueError(f'activation must be None or "relu", not {activation!r}')


def _alike(features: Sequence[Tensor]) -> bool:
    """True for valid maps of one shape: the common case, checked in few steps."""
    first = features[0]
    if (
        not isinstance(first, Tensor)
        or first.layout is not torch.strided
        or first.is_nested
        or first.dtype not in backend.FLOATS
        or first.dim() < 2
    ):
        return False
    shape, dtype, device = first.shape, first.dtype, first.device
    for x in features:
        if (
            not isinstance(x, Tensor)
            or x.layout is not torch.strided
            or x.is_nested
            or x.dtype is not dtype
            or x.shape != shape
            or x.device != device
        ):
            return False
    return True


# 3. Eager autograd.


class _Fuse(EagerFunction):
    @staticmethod
    def forward(
        ctx: Any, scale: Tensor | None, shift: Tensor | None, relu: bool, mean: bool, *features: Tensor
    ) -> Tensor:
        kernel = backend.select("fuse_mean" if mean else "fuse_concat", *features)
        assert kernel is not None  # _fuse() has selected it before
        out = kernel.forward(features, scale, shift, relu, mean)
        # A concatenation's result shows where its ReLU is 0; scale's gradient and a mean of ReLUs need the maps.
        by_features = ctx.needs_input_grad[0] or (relu and mean)
        ctx.save_for_backward(
            scale, shift, out if relu and not by_features else None, *(features if by_features else ())
        )
        ctx.relu, ctx.mean, ctx.channels = relu, mean, [x.shape[1] for x in features]
        ctx.channels_last = order_of(out) == 1
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        scale, shift, out, *features = ctx.saved_tensors
        need_scale, need_shift, _, _, *need_features = ctx.needs_input_grad
        needs = FuseNeeds(tuple(need_features), need_scale, need_shift)
        arguments = (grad, features or None, out, scale, shift, ctx.relu, ctx.mean, ctx.channels, needs)
        kernel = None
        if not torch.is_grad_enabled() and backend.eager(grad):
            kernel = backend.select("fuse_mean" if ctx.mean else "fuse_concat", grad)
        if kernel is None:
            # Recorded (create_graph=True) or batched (is_grads_batched=True).
            maps, to_scale, to_shift = fuse_backward_reference(*arguments)
        else:
            maps, to_scale, to_shift = kernel.backward(*arguments, ctx.channels_last)
        return (to_scale, to_shift, None, None, *maps)


class _FuseAlike(EagerFunction):
    """:class:`_Fuse` for the calls that :func:`_usual` serves, with constant scale and shift."""

    # Every argument costs autograd as much time as a check: all arguments without a gradient come as one tuple.
    @staticmethod
    def forward(
        ctx: Any, how: tuple[CpuFuse, Tensor | None, Tensor | None, bool, bool, bool], *features: Tensor
    ) -> Tensor:
        kernel, scale, shift, relu, mean, last = how
        out = kernel.forward_alike(features, scale, shift, relu, mean, last)
        kept = relu or scale is not None
        if kept:
            ctx.save_for_backward(scale, out if relu else None)
        ctx.settings = (kernel, relu, mean, last, features[0].shape[1], kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        kernel, relu, mean, last, channels, kept = ctx.settings
        scale, out = ctx.saved_tensors if kept else (None, None)
        needs = ctx.needs_input_grad[1:]
        readable = backend.readable(grad) and not grad.is_neg()
        if last and readable and out is None and scale is None and not mean:
            # As torch.cat's gradient: nothing is computed, and the pieces of a channels-last row are too short to copy.
            parts = grad.split(channels, 1)
            return (None, *[part if need else None for part, need in zip(parts, needs, strict=True)])
        if readable and (grad.is_contiguous(memory_format=_CHANNELS_LAST) if last else grad.is_contiguous()):
            return (None, *kernel.backward_alike(grad, out, scale, mean, needs, last))
        rest = (relu, mean, [channels] * len(needs), FuseNeeds(needs, False, False))
        if not readable:
            maps, _, _ = fuse_backward_reference(grad, None, out, scale, None, *rest)
        else:
            maps, _, _ = kernel.backward(grad, None, out, scale, None, *rest, last)
        return (None, *maps)


# 4. The same operator for torch.compile and opcheck: library.py.


# 5. The backends that serve it.

for _name in ("fuse_concat", "fuse_mean"):
    backend.serve(_name, cpu=CpuFuse, cuda=CudaFuse, triton="_fuse.triton:TritonFuse")
