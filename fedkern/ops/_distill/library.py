"""torch.library entries of losses on rows of logits: one scheme for all of them.

Each loss becomes two operators, the loss and its gradients: one graph node each under torch.compile. Second derivatives
go through the reference. Batching rules fold the mapped axis into the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core import library
from fedkern.ops._distill.rows import NONE, REDUCTIONS, reduce_mapped, spread_mapped

Optionals = tuple[Any, ...]  # tensors, and None where an optional one was not given


@dataclass(frozen=True)
class Loss:
    """Description of one loss, from which :func:`define` makes its operators.

    Attributes:
        name: name of the operator; the operator of its gradients is ``<name>_backward``.
        tensors: names of the tensor arguments; a question mark after an optional one.
        differentiable: number of tensor arguments, from the first on, that have gradients.
        settings: the other arguments with their types; the last one is the reduction.
        results: number of results.
        stacked: for each tensor that folds, whether its batch is axis 1, as of ``[K, B, C, *positions]``, and not 0.
        call: tensors and settings to the call that kernels take.
        kernel: (call) to the kernel that serves, or None: the reference does.
        method: the kernel's methods are ``<method>_forward`` and ``<method>_backward``.
        skips: tensors at the beginning of the call that the operator has not.
        reference: the loss in plain PyTorch, with tensors and settings as separate arguments.
        dtype: (tensors) to the dtype of the results.
        fold: as :func:`fold_tensors`, for tensors that do not all fold alike.
    """

    name: str
    tensors: tuple[str, ...]
    differentiable: int
    settings: tuple[str, ...]
    results: int
    stacked: tuple[bool, ...]
    call: Callable[..., Any]
    kernel: Callable[[Any], Any]
    method: str
    reference: Callable[..., Any]
    dtype: Callable[[Optionals], torch.dtype]
    fold: Callable[[Loss, Optionals, Sequence[int | None], int], Optionals] | None = None
    skips: int = 0

    def rows(self, tensors: Optionals) -> tuple[int, ...]:
        """``[B, *positions]``."""
        shape = tensors[0].shape[1:] if self.stacked[0] else tensors[0].shape
        return (shape[0], *shape[2:])


def define(loss: Loss) -> Callable[..., Any]:
    """Registers the operators of ``loss``; returns the function that calls the loss."""
    count, differentiable = len(loss.tensors), loss.differentiable
    named = [f"Tensor{'?' if name.endswith('?') else ''} {name.rstrip('?')}" for name in loss.tensors]
    # A temperature travels as a tensor under a compiler, which would compile every number anew.
    heated = loss.settings[0] == "float temperature"
    arguments = ", ".join([*named, *(["Tensor? heat"] if heated else []), *loss.settings])
    # One gradient alone is always wanted.
    flags = [f"bool need_{name.rstrip('?')}" for name in loss.tensors[:differentiable]] if differentiable > 1 else []
    grads_arguments = ", ".join(f"Tensor grad{i}" for i in range(loss.results))
    result = "Tensor" if loss.results == 1 else f"({', '.join(['Tensor'] * loss.results)})"
    results, fold = loss.results, loss.fold or fold_tensors

    def many(value: Any) -> tuple[Tensor, ...]:
        return (value,) if results == 1 else tuple(value)

    def one(values: Sequence[Any]) -> Any:
        return values[0] if results == 1 else tuple(values)

    def check(tensors: Optionals, reduction: int, grads: Sequence[Tensor] = ()) -> None:
        """Of what programs that call the operators themselves may get wrong, what no kernel sees."""
        if reduction not in REDUCTIONS.values():
            raise ValueError(f"reduction must be one of {REDUCTIONS}, but is {reduction}")
        for name, tensor in zip(loss.tensors, tensors, strict=True):
            if tensor is None and not name.endswith("?"):
                raise TypeError(f"{name} must be a tensor, but is None")
        expected = tuple(loss.rows(tensors)) if reduction == NONE else ()
        for grad in grads:
            if tuple(grad.shape) != expected:
                raise ValueError(f"a result's gradient must have shape {list(expected)}, but has {list(grad.shape)}")

    def plain(settings: Sequence[Any]) -> tuple[Any, ...]:
        """The settings as the loss takes them."""
        if not heated:
            return tuple(settings)
        heat, temperature, *rest = settings
        return (temperature if heat is None else heat.item(), *rest)

    def reference(*inputs: Any) -> Any:
        return loss.reference(*inputs[:count], *plain(inputs[count:]))

    def run(*inputs: Any) -> Any:
        tensors, settings = inputs[:count], plain(inputs[count:])
        check(tensors, settings[-1])
        call = loss.call(*tensors, *settings)
        kernel = loss.kernel(call)
        if kernel is None:
            return loss.reference(*tensors, *settings)
        return getattr(kernel, f"{loss.method}_forward")(call)

    def fake(*inputs: Any) -> Any:
        tensors = inputs[:count]
        shape = loss.rows(tensors) if inputs[-1] == NONE else ()
        return one([torch.empty(shape, dtype=loss.dtype(tensors), device=tensors[0].device) for _ in range(results)])

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.settings = inputs[count:]

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = [bool(need) for need in ctx.needs_input_grad[:differentiable]]
        gradients = gradients_of(*grads, *ctx.saved_tensors, *ctx.settings, *needs[: len(flags)])
        gradients = (gradients,) if differentiable == 1 else gradients
        outputs = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        return (*outputs, *[None] * (count - differentiable + len(ctx.settings)))

    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        size, *settings, reduction = (info.batch_size, *inputs[count:])
        folded = fold(loss, inputs[:count], in_dims[:count], size)
        rows = many(value_of(*folded, *settings, NONE))
        reduced = [reduce_mapped(x.unflatten(0, (size, x.shape[0] // size)), reduction) for x in rows]
        return one(reduced), one([0] * results)

    def split(inputs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any], Sequence[Any]]:
        """(grads, tensors, settings, needs)"""
        rest = inputs[results + count :]
        settings, needs = (rest[:-differentiable], rest[-differentiable:]) if flags else (rest, (True,))
        return inputs[:results], inputs[results : results + count], settings, needs

    def run_backward(*inputs: Any) -> Any:
        grads, tensors, settings, needs = split(inputs)
        check(tuple(tensors), settings[-1], grads)
        settings = plain(settings)
        call = loss.call(*tensors, *settings)
        kernel = loss.kernel(call)
        if kernel is None:
            gradients = reference_gradients(loss.reference, grads, tensors, settings, needs)
        else:
            padded = (*[False] * loss.skips, *needs, False)
            gradients = getattr(kernel, f"{loss.method}_backward")(grads, call, padded)[loss.skips :][:differentiable]
        outputs = place(gradients, tensors[:differentiable], needs)
        return outputs[0] if differentiable == 1 else outputs

    def fake_backward(*inputs: Any) -> Any:
        _, tensors, _, needs = split(inputs)
        outputs = place([None] * differentiable, tensors[:differentiable], needs)
        return outputs[0] if differentiable == 1 else outputs

    def setup_second(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[: results + count])
        _, _, ctx.settings, ctx.needs = split(inputs)

    def second(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        def value(*tensors: Any) -> Any:
            return reference(*tensors, *ctx.settings)

        back = library.second_derivative(value, results, ctx.saved_tensors, ctx.needs, cotangents)
        return (*back, *[None] * (len(ctx.settings) + len(flags)))

    def vmap_backward(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        size = info.batch_size
        grads, tensors, settings, needs = split(inputs)
        folded = fold(loss, tuple(tensors), in_dims[results : results + count], size)
        rows = loss.rows(folded)
        rows = (rows[0] // size, *rows[1:])
        spread = [spread_mapped(g, d, size, rows, settings[-1]) for g, d in zip(grads, in_dims, strict=False)]
        gradients = gradients_of(*spread, *folded, *settings[:-1], NONE, *needs[: len(flags)])
        gradients = (gradients,) if differentiable == 1 else gradients
        back = tuple(
            g if not need else unfold_stack(g, size) if stacked else g.unflatten(0, (size, len(g) // size))
            for g, need, stacked in zip(gradients, needs, loss.stacked, strict=True)
        )
        dims = tuple(0 if need else None for need in needs)
        return (back[0], dims[0]) if differentiable == 1 else (back, dims)

    value_of = library.register(
        loss.name, f"({arguments}) -> {result}", run, fake=fake, setup_context=setup, backward=backward, vmap=vmap,
        reference=reference,
    )  # fmt: skip
    gradients_of = library.register(
        f"{loss.name}_backward",
        f"({', '.join([grads_arguments, arguments, *flags])}) -> "
        + ("Tensor" if differentiable == 1 else f"({', '.join(['Tensor'] * differentiable)})"),
        run_backward,
        fake=fake_backward,
        setup_context=setup_second,
        backward=second,
        vmap=vmap_backward,
    )
    if not heated:
        return value_of

    def call(*inputs: Any) -> Any:
        tensors, temperature, rest = inputs[:count], inputs[count], inputs[count + 1 :]
        if torch.compiler.is_compiling():
            return value_of(*tensors, library.number_tensor(temperature), 1.0, *rest)
        return value_of(*tensors, None, temperature, *rest)

    return call


def place(gradients: Sequence[Tensor | None], inputs: Sequence[Any], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Results of a gradient operator, in the inputs' layout.

    An empty tensor where no gradient is wanted.
    """
    device = next(t.device for t in inputs if t is not None)
    return tuple(
        torch.empty(0, device=device)
        if x is None or not need
        else library.laid_out(None if gradient is None else gradient.detach(), torch.empty_like(x))
        for gradient, x, need in zip(gradients, inputs, needs, strict=True)
    )


def reference_gradients(
    loss_reference: Callable[..., Any],
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor | None],
    settings: Sequence[Any],
    needs: Sequence[bool],
    *,
    graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """The reference's gradients of the first ``len(needs)`` tensors.

    ``graph``: with a graph of their own.
    """
    inputs, others = list(tensors[: len(needs)]), tensors[len(needs) :]
    if not graph:
        inputs = [
            x if x is None else x.detach().requires_grad_(bool(need)) for x, need in zip(inputs, needs, strict=True)
        ]
    each = library.differentiate_reference(lambda *xs: loss_reference(*xs, *others, *settings), inputs, needs, grads)
    return tuple(x if x is None or graph else x.detach() for x in each)


def fold_rows(x: Tensor | None, axis: int | None, count: int) -> Tensor | None:
    """``[B, ...]`` of every call as ``[V * B, ...]``."""
    return None if x is None else library.fold_mapped(x, axis, count)


def fold_stack(x: Tensor | None, axis: int | None, count: int) -> Tensor | None:
    """``[K, B, ...]`` of every call as ``[K, V * B, ...]``."""
    return None if x is None else library.mapped_first(x, axis, count).transpose(0, 1).flatten(1, 2)


def fold_tensors(loss: Loss, tensors: Optionals, axes: Sequence[int | None], count: int) -> Optionals:
    """``tensors`` of ``count`` mapped calls as one call's, whose batch holds the batches of all."""
    folds = [fold_stack if stacked else fold_rows for stacked in loss.stacked]
    return tuple(fold(x, axis, count) for fold, x, axis in zip(folds, tensors, axes, strict=True))


def unfold_stack(x: Tensor, count: int) -> Tensor:
    return x.unflatten(1, (count, x.shape[1] // count)).transpose(0, 1)
