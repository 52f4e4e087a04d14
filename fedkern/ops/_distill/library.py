"""torch.library entries of losses on rows of logits: the loss and its gradients, one graph node each.

Recorded backward passes go through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core import library
from fedkern.ops._core.library import Context
from fedkern.ops._core.private_torch import functorch_active
from fedkern.ops._distill.reference import reduce_rows
from fedkern.ops._distill.rows import NONE, REDUCTIONS

Optionals = Sequence[Any]  # tensors, and None where an optional one was not given
Arguments = Sequence[Any]  # some of an operator's, as torch hands them over
Operation = Callable[..., Any]


Reference = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Loss:
    """Description of one loss, from which :func:`define_loss` makes its operators.

    Attributes:
        name: name of the operator; the operator of its gradients is ``<name>_backward``.
        tensors: names of the tensor arguments; a question mark after an optional one.
        differentiable: number of tensor arguments, from the first on, that have gradients.
        settings: the other arguments with their types; the last one is the reduction.
        axes: each tensor's axis of the batch, or None.
        call: function from tensors and settings to the call that kernels take.
        kernel: function from the call to its kernel, or None for the reference.
        method: the kernel's methods are ``<method>_forward`` and ``<method>_backward``.
        skips: tensors at the beginning of the call that the operator does not have.
        dtype: function from the tensors to the results' dtype.
    """

    name: str
    tensors: tuple[str, ...]
    differentiable: int
    settings: tuple[str, ...]
    results: int
    axes: tuple[int | None, ...]
    call: Callable[..., Any]
    kernel: Callable[[Any], Any]
    method: str
    reference: Reference
    dtype: Callable[[Optionals], torch.dtype]
    skips: int = 0

    def rows(self, tensors: Optionals) -> tuple[int, ...]:
        shape = tensors[0].shape[1:] if self.axes[0] else tensors[0].shape
        return (shape[0], *shape[2:])


def define_loss(loss: Loss) -> Operation:
    """Register the operators of ``loss``, and return the function that calls it."""
    count, differentiable, results = len(loss.tensors), loss.differentiable, loss.results
    named = [f"Tensor{'?' if name.endswith('?') else ''} {name.rstrip('?')}" for name in loss.tensors]
    # A temperature travels as a tensor under a compiler, which would compile every number anew.
    heated = loss.settings[0] == "float temperature"
    arguments = [*named, *(["Tensor? heat"] if heated else []), *loss.settings]
    flags = [f"bool need_{name.rstrip('?')}" for name in loss.tensors[:differentiable]]

    def schema(parameters: Sequence[str], returns: int) -> str:
        return f"({', '.join(parameters)}) -> ({', '.join(['Tensor'] * returns)})"

    def pack_results(values: Arguments) -> Tensor | tuple[Tensor, ...]:
        return values[0] if len(values) == 1 else tuple(values)

    def check(tensors: Optionals, reduction: int, grads: Sequence[Tensor] = ()) -> None:
        """Check what no kernel sees, for programs that call the operators themselves."""
        if reduction not in REDUCTIONS.values():
            raise ValueError(f"reduction must be one of {REDUCTIONS}, but is {reduction}")
        for name, tensor in zip(loss.tensors, tensors, strict=True):
            if tensor is None and not name.endswith("?"):
                raise TypeError(f"{name} must be a tensor, but is None")
        expected = tuple(loss.rows(tensors)) if reduction == NONE else ()
        for grad in grads:
            if tuple(grad.shape) != expected:
                raise ValueError(f"a result's gradient must have shape {list(expected)}, but has {list(grad.shape)}")

    def plain(settings: Arguments) -> Arguments:
        if not heated:
            return tuple(settings)
        heat, temperature, *tail = settings
        return (temperature if heat is None else heat.item(), *tail)

    def reference(*inputs: Any) -> Tensor | tuple[Tensor, ...]:
        return loss.reference(*inputs[:count], *plain(inputs[count:]))

    def run(*inputs: Any) -> Tensor | tuple[Tensor, ...]:
        tensors, settings = inputs[:count], plain(inputs[count:])
        check(tensors, settings[-1])
        call = loss.call(*tensors, *settings)
        kernel = loss.kernel(call)
        if kernel is None:
            return loss.reference(*tensors, *settings)
        forward: Reference = getattr(kernel, f"{loss.method}_forward")
        return forward(call)

    def fake(*inputs: Any) -> Tensor | tuple[Tensor, ...]:
        tensors = inputs[:count]
        shape = loss.rows(tensors) if inputs[-1] == NONE else ()
        return pack_results(
            [torch.empty(shape, dtype=loss.dtype(tensors), device=tensors[0].device) for _ in range(results)]
        )

    def setup(ctx: Context, inputs: Arguments, output: object) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.settings = inputs[count:]

    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = [bool(need) for need in ctx.needs_input_grad[:differentiable]]
        gradients = gradients_of(*grads, *ctx.saved_tensors, *ctx.settings, *needs)
        gradients = (gradients,) if differentiable == 1 else gradients
        outputs = (g if need else None for g, need in zip(gradients, needs, strict=True))
        return (*outputs, *[None] * (count - differentiable + len(ctx.settings)))

    def vmap(info: library.Mapped, in_dims: tuple[int | None, ...], *inputs: Any) -> Arguments:
        *settings, reduction = inputs[count:]
        folded = fold_tensors(inputs, in_dims, loss.axes, info.batch_size)
        rows = value_of(*folded, *settings, NONE)
        rows = [unfold_batch(x, 0, info.batch_size) for x in ((rows,) if results == 1 else rows)]
        return pack_results([torch.vmap(lambda x: reduce_rows(x, None, reduction))(x) for x in rows]), pack_results(
            [0] * results
        )

    def split(inputs: Arguments) -> tuple[Sequence[Tensor], Optionals, Arguments, Sequence[bool]]:
        """Return ``(grads, tensors, settings, needs)``."""
        grads, tensors = inputs[:results], tuple(inputs[results : results + count])
        return grads, tensors, inputs[results + count : -differentiable], inputs[-differentiable:]

    def run_backward(*inputs: Any) -> Tensor | tuple[Tensor, ...]:
        grads, tensors, settings, needs = split(inputs)
        check(tensors, settings[-1], grads)
        settings, inner = plain(settings), tensors[:differentiable]
        call = loss.call(*tensors, *settings)
        kernel = loss.kernel(call)
        if kernel is None:
            constants = (*tensors[differentiable:], *settings)
            gradients = library.differentiate_reference(
                lambda *tensors: loss.reference(*tensors, *constants), inner, needs, grads, twice=False
            )
        else:
            padded = (*[False] * loss.skips, *needs, False)
            gradients = getattr(kernel, f"{loss.method}_backward")(grads, call, padded)[loss.skips :][:differentiable]
        return pack_results(place_gradients(gradients, inner, needs))

    def fake_backward(*inputs: Any) -> Tensor | tuple[Tensor, ...]:
        _, tensors, _, needs = split(inputs)
        return pack_results(place_gradients([None] * differentiable, tensors[:differentiable], needs))

    def setup_second(ctx: Context, inputs: Arguments, output: object) -> None:
        ctx.save_for_backward(*inputs[: results + count])
        ctx.settings = split(inputs)[2:]

    def second(ctx: Context, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        settings, needs = ctx.settings
        back = library.second_derivative(
            lambda *tensors: reference(*tensors, *settings), results, ctx.saved_tensors, needs, cotangents
        )
        return (*back, *[None] * (len(settings) + differentiable))

    def vmap_backward(info: library.Mapped, in_dims: tuple[int | None, ...], *inputs: Any) -> Arguments:
        _, _, settings, needs = split(inputs)
        folded = fold_tensors(inputs, in_dims, (*[0] * results, *loss.axes), info.batch_size)
        gradients = gradients_of(*folded, *settings, *needs)
        gradients = (gradients,) if differentiable == 1 else gradients
        back = [
            unfold_batch(gradient, axis, info.batch_size) if need and axis is not None else gradient
            for gradient, axis, need in zip(gradients, loss.axes, needs, strict=False)
        ]
        return pack_results(back), pack_results([0 if need else None for need in needs])

    value_of: Operation = library.register(
        loss.name, schema(arguments, results), run, fake=fake, setup_context=setup, backward=backward,
        vmap=vmap, reference=reference,
    )  # fmt: skip
    parameters = [*(f"Tensor grad{i}" for i in range(results)), *arguments, *flags]
    gradients_of: Operation = library.register(
        f"{loss.name}_backward", schema(parameters, differentiable), run_backward, fake=fake_backward,
        setup_context=setup_second, backward=second, vmap=vmap_backward,
    )  # fmt: skip

    def call(*inputs: Any) -> object:
        tensors, settings, reduction = inputs[:count], inputs[count:-1], inputs[-1]
        if torch.compiler.is_compiling():
            if heated:
                settings = (library.number_tensor(settings[0]), 1.0, *settings[1:])
            return value_of(*tensors, *settings, reduction)
        if heated:
            settings = (None, *settings)
        if not functorch_active():
            return value_of(*tensors, *settings, reduction)
        rows = value_of(*tensors, *settings, NONE)
        return pack_results([reduce_rows(x, None, reduction) for x in ((rows,) if results == 1 else rows)])

    return call


def fold_tensors(
    tensors: Optionals, dims: Sequence[int | None], axes: Sequence[int | None], count: int
) -> list[Tensor | None]:
    """Merge the tensors of ``count`` mapped calls into those of one call."""
    return [
        x if x is None or axis is None else library.mapped_first(x, dim, count).movedim(0, axis).flatten(axis, axis + 1)
        for x, dim, axis in zip(tensors, dims, axes, strict=False)
    ]


def unfold_batch(x: Tensor, axis: int, count: int) -> Tensor:
    parts: Tensor = x.unflatten(axis, (count, x.shape[axis] // count))
    return parts.movedim(axis, 0)


def place_gradients(gradients: Sequence[Tensor | None], inputs: Optionals, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Return gradients in the inputs' layout, empty where not wanted."""
    device = next(t.device for t in inputs if t is not None)
    return tuple(
        torch.empty(0, device=device) if x is None or not need else library.laid_out(gradient, torch.empty_like(x))
        for gradient, x, need in zip(gradients, inputs, needs, strict=True)
    )
