"""conv_norm and conv_pool: a convolution and what follows, up to norm, residual, ReLU and max pooling, in one call."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fedkern.ops._conv.checks import check_forced, check_pooled, check_settings, check_tensors, choose_kernels
from fedkern.ops._conv.kernels import ConvKernels, Inputs, NotFinite, Pooling, PoolKernels, Settings
from fedkern.ops._conv.reference import conv_norm_reference, conv_pool_reference, norm_reference
from fedkern.ops._core import backend, library
from fedkern.ops._core.backend import is_readable
from fedkern.ops._core.checks import python_number
from fedkern.ops._core.library import Context, EagerFunction, saved_tensors


def conv_pool(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: int = 0, relu: bool = True) -> Tensor:
    """Compute convolution, bias, ReLU and max pooling: a stage of a convolutional network without norm in one call.

    The same in PyTorch::

        y = F.conv2d(x, weight, bias, padding=padding)
        y = y.relu() if relu else y
        y = F.max_pool2d(y, 2)

    The CPU kernel computes fp32 maps, contiguous or channels-last, of sizes at which it is faster than PyTorch. Its
    backward pass leaves out the products that pooling and ReLU make zero: three quarters and more. PyTorch's
    operators compute all other calls, such as under autocast, ``torch.compile`` and torch.func transforms, on GPUs,
    and at the portable ISA level.

    Args:
        x: maps ``[B, in, H, W]``; fp32, fp64, bf16 or fp16, any strides.
        weight: ``[out, in, 3, 3]`` or ``[out, in, 5, 5]``, of x's dtype.
        bias: ``[out]``, of x's dtype; None: no bias.
        padding: zeros around the maps: 0, or half of the kernel's side, rounded down.
        relu: whether a ReLU follows.

    Returns:
        ``[B, out, h // 2, w // 2]``, where the convolution gives ``[B, out, h, w]``: an odd last row and column are
        left out. Channels-last where x or weight is, as in PyTorch.

    Differentiable in x, weight and bias; retained graphs and second derivatives work as usual. What the kernel
    computes has the same bits every time, for any number of threads. Where two values of a window differ by rounding
    alone, another of them may be the maximum than in PyTorch.

    Where x, the weight or the gradient holds an infinity or NaN, or a product of Winograd's overflows, PyTorch's
    operators compute the call again, since 0 times an infinity is NaN.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value is wrong.
        RuntimeError: a forced backend does not support the call.
    """
    padding = python_number(padding)
    kernel = choose_pool_kernels(x, weight, bias, padding)
    if kernel is None or not isinstance(relu, bool):
        check_pooled(x, weight, bias, padding, relu)
        check_forced("conv_pool", x, weight, bias)
        return conv_pool_reference(x, weight, bias, padding=padding, relu=relu)
    last = any(tensor.stride(1) == 1 and tensor.is_contiguous(memory_format=_CHANNELS_LAST) for tensor in (x, weight))
    return run_pooling(kernel, x, weight, bias, Pooling(padding, relu, not last or len(weight) == 1))


def choose_pool_kernels(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> PoolKernels | None:
    """Return the kernel of a call for :func:`run_pooling`, or None, and never raise."""
    return choose_kernels("conv_pool", x, weight, bias, padding)


def run_pooling(kernel: PoolKernels, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Pooling) -> Tensor:
    try:
        if _grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
            return _ConvPool.call(kernel, settings, x, weight, bias)
        return kernel.forward(x, weight, bias, settings)[0]
    except NotFinite:
        return conv_pool_reference(x, weight, bias, padding=settings.padding, relu=settings.relu)


class _ConvPool(EagerFunction):
    @staticmethod
    def forward(
        ctx: Context, kernel: PoolKernels, settings: Pooling, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        out, places = kernel.forward(x, weight, bias, settings)
        ctx.save_for_backward(x, weight, bias, places)
        ctx.settings = kernel, settings
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel, settings = ctx.settings
        x, weight, bias, places = saved_tensors(ctx)
        needs = ctx.needs_input_grad[2:]
        if is_readable(grad):
            try:
                return (None, None, *kernel.backward(grad, x, weight, places, settings, needs))
            except NotFinite:
                pass
        # Recorded (create_graph=True), batched (is_grads_batched=True) or not finite.
        reference = functools.partial(conv_pool_reference, padding=settings.padding, relu=settings.relu)
        with torch.autocast("cpu", enabled=False):
            gradients = library.differentiate_reference(reference, (x, weight, bias), needs, grad, _grad_enabled())
        return (None, None, *gradients)


backend.add_kernels("conv_pool", cpu=PoolKernels, dtypes=frozenset({torch.float32}), fits="pool_fits")


_grad_enabled = torch.is_grad_enabled
_CHANNELS_LAST = torch.channels_last


def conv_norm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int = 1,
    relu: bool = True,
    pool: int = 1,
    residual: Tensor | None = None,
    update: bool = True,
    training: bool = True,
    groups: int = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute convolution, batch or group norm, residual, ReLU and max pooling: a stage of a network in one call.

    The same in PyTorch::

        y = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
        y = F.batch_norm(y, mean, variance, scale, shift, training, momentum, eps)
        y = y if residual is None else y + residual
        y = y.relu() if relu else y
        y = F.max_pool2d(y, 2) if pool == 2 else y

    With ``groups``::

        y = F.conv2d(x, weight, bias, stride=stride, padding=weight.shape[2] // 2)
        y = F.group_norm(y, groups, scale, shift, eps)

    The CPU kernel computes channels-last fp32 maps of sizes at which it is faster than PyTorch. PyTorch's operators
    compute all other calls, such as under autocast, ``torch.compile`` and torch.func transforms, on GPUs, and at the
    portable ISA level.

    Args:
        x: maps ``[B, in, H, W]``; fp32, fp64, bf16 or fp16, any strides.
        weight: ``[out, in, 3, 3]`` or ``[out, in, 1, 1]``, of x's dtype; the convolution has padding 1 with nine taps,
            0 with one.
        scale, shift: the norm's weight and bias ``[out]``; of x's dtype, or fp32 beside 16-bit maps.
        mean, variance: running statistics ``[out]``, of scale's dtype, without gradient; read with ``training=False``
            and updated in place in training. None: no running statistics, as with groups.
        momentum: weight of the batch's statistics in the update, in [0, 1]. The variance is updated with the unbiased
            one of the batch.
        eps: added to the variance, above 0.
        stride: of the convolution, 1 or 2.
        relu: whether a ReLU follows.
        pool: 2 for max pooling of windows of 2 x 2, which leaves out an odd last row and column; 1 for none.
        residual: of the norm's shape and x's dtype, added before the ReLU.
        update: whether training updates the running statistics.
        training: whether to normalise by the batch's statistics; else by the running ones.
        groups: of a group norm, which no statistics of the batch enter; they divide the channels. 0 for batch norm.
        bias: the convolution's ``[out]``, of x's dtype, with groups alone: batch norm takes it out again.

    Returns:
        ``[B, out, H, W]``, with ``stride=2`` ``[B, out, ⌈H / 2⌉, ⌈W / 2⌉]``; with ``pool=2`` half of that, rounded
        down. Channels-last where x or weight is, as in PyTorch.

    Where both numbers of channels are multiples of 16, 3x3 convolutions of stride 1 take Winograd's products
    (F(2x2, 3x3), arXiv 1509.09308), with rounding errors of a few 1e-6 of the largest value. Where the kernel meets an
    infinity or NaN, PyTorch's operators compute the call again, since Winograd's products would spread it. Other
    numbers of channels are filled up with zeros where that costs at most half as many products again, with groups
    only those of x. The gradient of wide weights takes memory for every thread: with 1,024 channels and a batch of 256
    a pass has 1.45 times PyTorch's peak on one thread, and 1.7 times on two.

    PyTorch's own batch norm (2.13) reads the gradient of a batch of one, or of maps of one row or column, in the wrong
    order where that gradient is contiguous with the channels behind, as after ``y.squeeze(0).permute(1, 2, 0)``. Its
    group norm (2.13) ends the process where its map is channels-last and only its weight and bias want a gradient.
    conv_norm lays both out first. Plain layers of your network keep the faults: ``y = y.flatten().view(y.shape)``
    behind a batch norm mends the first one for contiguous maps.

    Differentiable in x, weight, scale, shift, bias and residual; retained graphs and second derivatives work as usual.
    What the kernel computes has the same bits every time, for any number of threads. Under autocast dtypes may differ,
    as PyTorch converts them.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value is wrong.
        RuntimeError: a forced backend does not support the call.
    """
    settings = check_settings(Settings(mean, variance, momentum, eps, stride, relu, pool, update, training, groups))
    inputs = Inputs(x, weight, scale, shift, bias, residual)
    kernel = choose_norm_kernels(inputs, settings)
    if kernel is None or (mean is None and not training and not groups):
        check_tensors(inputs, settings)
        check_forced("conv_norm", *inputs, mean, variance)
        return conv_norm_reference(inputs, settings)
    return compute_conv_norm(kernel, inputs, settings)


def choose_norm_kernels(inputs: Inputs, settings: Settings) -> ConvKernels | None:
    """Return the kernel of a call for :func:`compute_conv_norm`, or None, and never raise."""
    x, weight, scale, shift, bias, residual = inputs
    mean, variance, _, _, stride, _, pool, _, _, groups = settings
    arguments = x, weight, scale, shift, mean, variance, residual, pool, stride, groups, bias
    kernel: ConvKernels | None = choose_kernels("conv_norm", *arguments)
    if kernel is None:  # also for objects that raise where requires_grad is read
        return None
    if mean is not None and variance is not None and (mean.requires_grad or variance.requires_grad):
        return None
    return kernel


def compute_conv_norm(kernel: ConvKernels, inputs: Inputs, settings: Settings) -> Tensor:
    """Compute :func:`conv_norm` with the kernel of :func:`choose_norm_kernels`, without checks of the settings.

    Batch statistics subtract a bias again: it only changes the running mean, and has a gradient of zeros.
    """
    x, weight, scale, shift, bias, residual = inputs
    if not x.is_contiguous(memory_format=_CHANNELS_LAST):  # the weight is channels-last
        inputs = inputs._replace(x=x.contiguous(memory_format=_CHANNELS_LAST))
    if residual is not None and not residual.is_contiguous(memory_format=_CHANNELS_LAST):
        inputs = inputs._replace(residual=residual.contiguous(memory_format=_CHANNELS_LAST))
    try:
        if _grad_enabled() and (
            x.requires_grad
            or weight.requires_grad
            or scale.requires_grad
            or shift.requires_grad
            or (residual is not None and residual.requires_grad)
            or (bias is not None and bias.requires_grad)
        ):
            result: Tensor = _ConvNorm.call(kernel, settings, *inputs)
        else:
            result = kernel.forward(inputs, settings, False)[0]
    except NotFinite:
        return conv_norm_reference(inputs, settings)
    if bias is not None and settings.training and settings.update and settings.mean is not None:
        settings.mean.data.add_(bias.detach(), alpha=settings.momentum)
    return result


class _ConvNorm(EagerFunction):
    @staticmethod
    def forward(ctx: Context, kernel: ConvKernels, settings: Settings, *tensors: Tensor) -> Tensor:
        inputs = Inputs(*tensors)
        x, weight, scale, shift, bias, residual = inputs
        out, intermediates = kernel.forward(inputs, settings, True)
        masked = residual is not None and settings.relu
        frozen = not any(ctx.needs_input_grad[2:4])  # the map and the weight may then change before the backward pass
        after = out if masked else None
        ctx.save_for_backward(*(None, None) if frozen else (x, weight), scale, shift, bias, *intermediates, after)
        ctx.settings = (kernel, settings, residual is not None, (x.shape, weight.shape))
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel, settings, added, shapes = ctx.settings
        x, weight, scale, shift, bias, y, raw, saved, out = saved_tensors(ctx)
        needs = ctx.needs_input_grad[2:]
        frozen = x is None
        if frozen:  # the kernel takes nothing but their shapes from them
            x, weight = (torch.empty(n, dtype=y.dtype, device="cpu", memory_format=_CHANNELS_LAST) for n in shapes)
        if is_readable(grad):
            # Hooks on saved tensors may have changed strides.
            last = x.contiguous(memory_format=_CHANNELS_LAST)
            after = None if out is None else out.contiguous(memory_format=_CHANNELS_LAST)
            taps = weight if weight.is_contiguous() else weight.contiguous(memory_format=_CHANNELS_LAST)
            intermediates = (y.contiguous(), None if raw is None else raw.contiguous(), saved.contiguous())
            try:
                return (None, None, *kernel.backward(settings, grad, last, taps, scale, intermediates, after, needs))
            except NotFinite:
                pass
        # Recorded (create_graph=True), batched (is_grads_batched=True) or not finite. The residual counts by its ReLU
        # alone.
        if out is not None:
            grad = grad.masked_fill(out <= 0, 0)
        mean = variance = None
        if not settings.training and not settings.groups:  # the running statistics may have changed since
            mean, variance = saved[0, : len(scale)], saved[1, : len(scale)].pow(-2) - settings.eps
        plain = settings._replace(mean=mean, variance=variance, relu=settings.relu and not added)
        if frozen:
            height, width = (-(-size // settings.stride) for size in x.shape[2:])
            x, weight = y.view(len(x), height, width, -1).movedim(-1, 1)[:, : len(scale)], None

        def reference(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None) -> Tensor:
            bias = bias if settings.groups else None
            inputs = Inputs(x, weight, scale, shift, bias)
            if frozen:
                return norm_reference(x if bias is None else x + bias[:, None, None], inputs, plain)
            return conv_norm_reference(inputs, plain)

        felt = needs[4] and settings.groups > 0
        with torch.autocast("cpu", enabled=False):
            gradients = library.differentiate_reference(
                reference, (x, weight, scale, shift, bias), (*needs[:4], felt), grad, _grad_enabled()
            )
        if needs[4] and not felt:
            gradients = (*gradients[:4], torch.zeros_like(bias))
        return (None, None, *gradients, grad if needs[5] else None)


backend.add_kernels("conv_norm", cpu=ConvKernels, dtypes=frozenset({torch.float32}), fits="conv_fits")
