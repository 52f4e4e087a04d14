"""fuse: the feature maps of several clients' blocks concatenated or averaged in one pass, also in ``torch.library``."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fedkern.ops._core import backend, library
from fedkern.ops._core.backend import eager, is_readable, select, select_ordinary
from fedkern.ops._core.checks import check_device, check_floating
from fedkern.ops._core.library import Context, EagerFunction, saved_tensors
from fedkern.ops._fuse.kernels import FuseKernels
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
    grad: Tensor, features: list[Tensor], out: Tensor | None, *arguments: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    scale, shift, relu, mean, channels, *needs = arguments
    if (needs[1] and scale is None) or (needs[2] and shift is None):
        raise ValueError("a scale or shift that is not given has no gradient")
    kernel = backend.select("fuse_mean" if mean else "fuse_concat", grad)
    run = fuse_backward_reference if kernel is None else kernel.backward
    call = FuseCall(scale, shift, relu, mean, channels, order_of(grad) == 1)
    result = run(grad, features or None, out, call, tuple(needs))
    maps, to_scale, to_shift = _backward_fake(grad, features, out, *arguments)
    filled = [library.laid_out(x, empty) for x, empty in zip(result[0], maps, strict=True)]
    return filled, library.laid_out(result[1], to_scale), library.laid_out(result[2], to_shift)


def _backward_fake(
    grad: Tensor, features: list[Tensor], out: Tensor | None, *arguments: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    scale, shift, _, _, channels, need_features, need_scale, need_shift = arguments
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


Activation = Literal["relu"] | None

# Looked up once: on small maps the code around a kernel takes longer than the kernel.
_grad_enabled = torch.is_grad_enabled
# Makes a named tuple in half the time that its own constructor takes.
_new = tuple.__new__


def fuse_concat(
    features: Sequence[Tensor], scale: Tensor | None = None, shift: Tensor | None = None, activation: Activation = None
) -> Tensor:
    """Concatenate M feature maps along the channels, with batch norm and ReLU in the same pass.

    ``out[:, o + c] = act(scale[o + c] * features[m][:, c] + shift[o + c])`` with ``o`` the channels of the maps before
    map m (FuseFL's fusion, arXiv 2410.20380). The same takes three passes with ``torch.cat``, a batch norm in
    evaluation mode (``scale = gamma / sqrt(var + eps)``, ``shift = beta - scale * mean``) and a ReLU.

    Args:
        features: M >= 1 maps ``[B, C_m, *S]`` (feature vectors ``[B, C_m]`` too), fp32, bf16, fp16 or fp64, of one
            dtype, device, batch and position shape. The result is channels-last if all maps are.
        scale, shift: ``[sum of C_m]``, of any of these dtypes; None for 1 and 0.
        activation: ``"relu"`` or None.

    Returns:
        ``[B, sum of C_m, *S]``. fp32, bf16 and fp16 are computed in fp32 and rounded once.

    Differentiable in features, scale and shift; sums over batch and positions run in a fixed order, so that gradients
    have the same bits every time. Works under torch.compile (one node) and for second derivatives; torch.func
    transforms use the reference.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device or shape is wrong.
        RuntimeError: a forced backend does not support the call.
    """
    return _dispatch("fuse_concat", features, scale, shift, activation, False)


def fuse_mean(
    features: Sequence[Tensor], scale: Tensor | None = None, shift: Tensor | None = None, activation: Activation = None
) -> Tensor:
    """Average M feature maps, each after its own batch norm and ReLU, in one pass (FuseFL's ``avg`` adaptor).

    ``out[:, c] = 1/M * sum over m of act(scale[m * C + c] * features[m][:, c] + shift[m * C + c])``.

    Args:
        features: M >= 1 maps of one shape ``[B, C, *S]``; otherwise as in :func:`fuse_concat`.
        scale, shift: ``[M * C]``, as in :func:`fuse_concat`.
        activation: ``"relu"`` or None.

    Returns:
        ``[B, C, *S]``. fp32, bf16 and fp16 are computed in fp32 and rounded once.

    Gradients, transforms and errors are those of :func:`fuse_concat`.
    """
    return _dispatch("fuse_mean", features, scale, shift, activation, True)


def _dispatch(
    operator: str,
    features: Sequence[Tensor],
    scale: Tensor | None,
    shift: Tensor | None,
    activation: Activation,
    mean: bool,
) -> Tensor:
    kernel: FuseKernels | None = select_ordinary(operator, features, scale, shift)
    if kernel is None or (activation is not None and activation != "relu"):
        _check(features, scale, shift, activation, mean)
    relu = activation is not None
    if kernel is not None:
        # Ordinary maps have one shape, and all are contiguous or all channels-last.
        template = features[0]
        channels, channels_last = [template.shape[1]] * len(features), not template.is_contiguous()
    else:
        if not eager(*features, *[vector for vector in (scale, shift) if vector is not None]):
            return FUSE(list(features), scale, shift, relu, mean)
        kernel = select(operator, *features)
        if kernel is None:
            return (fuse_mean_reference if mean else fuse_concat_reference)(features, scale, shift, relu)
        scale, shift = (None if vector is None else vector.resolve_neg() for vector in (scale, shift))
        channels, channels_last = [x.shape[1] for x in features], wants_channels_last(features)
    call = _new(FuseCall, (scale, shift, relu, mean, channels, channels_last))
    if _grad_enabled():
        tensors = features
        if scale is not None and scale.requires_grad:
            tensors = (*tensors, scale)
        if shift is not None and shift.requires_grad:
            tensors = (*tensors, shift)
        for x in tensors:
            if x.requires_grad:
                return _Fuse.call((kernel, call), *tensors)
    return kernel.forward(features, call)


def _check(
    features: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None, activation: Activation, mean: bool
) -> None:
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise TypeError(f"features must be a list of tensors, but got {type(features).__name__}")
    if not len(features):
        raise ValueError("features must hold at least one map, but hold none")
    template = features[0]
    channels = 0
    for m, x in enumerate(features):
        name = f"features[{m}]"
        check_floating(x, name)
        if x.dim() < 2:
            raise ValueError(f"{name} must have shape [B, C, *S], but has {list(x.shape)}")
        if x.dtype != template.dtype:
            raise TypeError(f"{name} must have dtype {template.dtype} like features[0], but has {x.dtype}")
        check_device(x, name, template, "features[0]")
        expected = (template.shape[0], template.shape[1] if mean else x.shape[1], *template.shape[2:])
        if x.shape != expected:
            shape: list[object] = list(expected)
            if not mean:
                shape[1] = "C"
            raise ValueError(f"{name} must have shape {shape} like features[0], but has {list(x.shape)}")
        channels += x.shape[1]
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is None:
            continue
        check_floating(vector, name)
        if vector.shape != (channels,):
            raise ValueError(
                f"{name} must have shape [{channels}], one value per channel of every map, but has {list(vector.shape)}"
            )
        check_device(vector, name, template, "the maps")
    if activation is not None and activation != "relu":
        raise ValueError(f'activation must be None or "relu", but is {activation!r}')


class _Fuse(EagerFunction):
    """Differentiable fuse_concat and fuse_mean.

    Scale and shift are passed only if they require a gradient: every tensor costs autograd as much time as a check.
    """

    @staticmethod
    def forward(ctx: Context, kernel_and_call: tuple[FuseKernels, FuseCall], *tensors: Tensor) -> Tensor:
        kernel, call = kernel_and_call
        scale, shift, relu, mean, channels, _ = call
        features = tensors[: len(channels)]
        out = kernel.forward(features, call)
        to_scale = scale is not None and scale.requires_grad
        to_shift = shift is not None and shift.requires_grad
        # A concatenation's result shows where its ReLU is 0; scale's gradient and a mean of ReLUs need the maps.
        by_features = to_scale or (relu and mean)
        saves = relu or scale is not None or to_shift
        if saves:
            ctx.save_for_backward(
                scale,
                shift if to_shift or by_features else None,
                out if relu and not by_features else None,
                *(features if by_features else ()),
            )
        ctx.settings = (kernel, call[2:], saves, to_scale, to_shift)
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel, settings, saves, learned_scale, learned_shift = ctx.settings
        _, mean, channels, last = settings
        scale, shift, out, *features = saved_tensors(ctx) if saves else (None, None, None)
        needs = ctx.needs_input_grad[1:]
        direct = is_readable(grad)
        if direct and last and not saves and not mean and kernel.views:
            # As torch.cat's gradient: nothing is computed, and the pieces of a channels-last row are too short to copy.
            return (None, *[part if need else None for part, need in zip(grad.split(channels, 1), needs, strict=True)])
        count = len(channels)
        fuse_needs = (needs[:count], learned_scale and needs[count], learned_shift and needs[-1])
        if direct and grad.is_neg():
            grad = grad.resolve_neg()
        # The reference where the pass is recorded (create_graph=True) or batched (is_grads_batched=True).
        run = kernel.backward if direct else fuse_backward_reference
        call = _new(FuseCall, (scale, shift, *settings))
        to_maps, to_scale, to_shift = run(grad, features or None, out, call, fuse_needs)
        if len(needs) == count:
            return (None, *to_maps)
        return (None, *to_maps, *([to_scale] if learned_scale else []), *([to_shift] if learned_shift else []))


for _name in ("fuse_concat", "fuse_mean"):
    backend.add_kernels(_name, cpu=FuseKernels, cuda=FuseKernels, triton="_fuse.triton:TritonFuse", fits="fuse_fits")
