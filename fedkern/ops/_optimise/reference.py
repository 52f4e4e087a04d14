"""optimise: reference of a step in plain PyTorch, on any device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core.memory import PIECE
from fedkern.ops._optimise.kernels import Call


def optimise_reference(call: Call) -> tuple[Tensor, Tensor]:
    """Specify a step as ``torch.optim`` writes it, with 16-bit types computed in fp32 and rounded once."""
    if call.parameters.dtype.itemsize > 2:
        return _step(call)
    tensors: dict[str, Any] = {name: tensor.float() for name, tensor in call.tensors().items()}
    wide = call._replace(**tensors)
    _, squared = _step(wide)
    for name, tensor in call.outputs().items():
        tensor.copy_(getattr(wide, name))
    return _finite(call, squared), squared


def _step(call: Call) -> tuple[Tensor, Tensor]:
    theta, gradient = call.parameters, call.gradients
    if call.gradient_sum is not None:
        call.gradient_sum.add_(gradient)
    if call.correction is not None:
        gradient = gradient + call.correction
    if call.proximal and call.anchor is not None:
        gradient = gradient.add(theta - call.anchor, alpha=call.proximal)
    squared = torch.stack([part.double().square().sum(1) for part in gradient.split(PIECE, 1)]).sum(0)
    if call.max_norm is not None:
        norm = squared.sqrt()
        scale = torch.where(norm <= call.max_norm, 1.0, call.max_norm / norm)  # NaN where the norm is
        gradient = gradient * scale.to(gradient.dtype)[:, None]
    if call.adamw is None:
        _sgd(call, theta, gradient)
    else:
        _adamw(call, theta, gradient)
    if call.zero:
        call.gradients.zero_()
    return _finite(call, squared), squared


def _sgd(call: Call, theta: Tensor, gradient: Tensor) -> None:
    if call.weight_decay:
        gradient = gradient.add(theta, alpha=call.weight_decay)
    if call.first is not None:
        gradient = call.first.mul_(call.momentum).add_(gradient)
    lr = call.lr
    if isinstance(lr, Tensor):
        theta.addcmul_(gradient, lr.to(theta.dtype)[:, None], value=-1)
    elif isinstance(lr, Sequence):
        for row, direction, rate in zip(theta, gradient, lr, strict=True):
            row.add_(direction, alpha=-rate)
    else:
        theta.add_(gradient, alpha=-lr)


def _adamw(call: Call, theta: Tensor, gradient: Tensor) -> None:
    numbers, lr = call.adamw, call.lr
    moment1, moment2 = call.first, call.second
    assert numbers is not None
    assert moment1 is not None
    assert moment2 is not None
    moment1.lerp_(gradient, 1 - numbers.beta1)
    moment2.mul_(numbers.beta2).addcmul_(gradient, gradient, value=1 - numbers.beta2)
    scale = moment2.sqrt().div_(numbers.root).add_(numbers.eps)
    if isinstance(lr, Tensor):
        decay, rate = ((x.to(theta.dtype))[:, None] for x in (1 - lr * call.weight_decay, -lr / numbers.bias))
        theta.mul_(decay).add_(rate * moment1 / scale)
    elif isinstance(lr, Sequence):
        for row, moment, scales, row_rate in zip(theta, moment1, scale, lr, strict=True):
            row.mul_(1 - row_rate * call.weight_decay).addcdiv_(moment, scales, value=-row_rate / numbers.bias)
    else:
        theta.mul_(1 - lr * call.weight_decay).addcdiv_(moment1, scale, value=-lr / numbers.bias)


def _finite(call: Call, squared: Tensor) -> Tensor:
    finite = squared.isfinite()
    for name, tensor in call.outputs().items():
        if name != "gradients":
            finite = finite & (tensor.amin(1).isfinite() & tensor.amax(1).isfinite() if tensor.shape[1] else True)
    return finite
