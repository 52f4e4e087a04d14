"""The operators in ``torch.library``: one graph node each for torch.compile, vmap, torch.func and opcheck.

Eager calls do not use them: a dispatcher round trip in Python costs several times a small kernel. They use
:class:`EagerFunction`, an ``autograd.Function`` with less overhead, as a whole call takes a few dozen microseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from fedkern.ops._core import backend
from fedkern.ops._core.private_torch import apply_of, functorch_active, graph_is_retained, recording


class Context(Protocol):
    """First argument of both passes of an operator's autograd function.

    Attributes:
        settings: all that the forward pass leaves to the backward pass besides tensors.
    """

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Any, ...]
    settings: Any

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


def handed_out(gradients: Sequence[Tensor | None], saved: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return ``gradients``, cloning those among ``saved`` if the graph is retained.

    Their receiver may change them in place, and another pass reads saved tensors again. Only for backward passes.
    """
    if not graph_is_retained():
        return gradients
    return [x.clone() if x is not None and any(x is original for original in saved) else x for x in gradients]


def saved_tensors(ctx: Context) -> tuple[Any, ...]:
    """Return the saved tensors for kernels.

    Hooks on saved tensors may return negative views, whose memory has the opposite sign.
    """
    saved = ctx.saved_tensors
    for x in saved:
        if x is not None and x.is_neg():
            return tuple(x if x is None else x.resolve_neg() for x in saved)
    return saved


class EagerFunction(torch.autograd.Function):
    """``autograd.Function`` whose ``call`` skips the Python code of ``apply``.

    ``apply`` looks for torch.func transforms as long as a small kernel takes. The caller must know that there are none.
    """

    call: ClassVar[Callable[..., Tensor]]

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        cls.call = apply_of(cls)


LIBRARY = torch.library.Library("fedkern", "DEF")
Result = TypeVar("Result")


def number_tensor(value: float) -> Tensor:
    """Convert ``value`` to a 0-d fp64 tensor on the CPU, by multiplication.

    torch.compile turns this into a computation of tensors; a float argument would compile anew for every value.
    """
    return torch.ones((), dtype=torch.float64, device="cpu") * value


def numbers_tensor(values: Sequence[float], device: torch.device | str = "cpu") -> Tensor:
    return torch.stack([number_tensor(value) for value in values]).to(device)


class Mapped(Protocol):
    @property
    def batch_size(self) -> int: ...


def register(
    name: str,
    schema: str,
    implementation: Callable[..., Result],
    *,
    fake: Callable[..., object],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., object] | None = None,
    vmap: Callable[..., object] | None = None,
    reference: Callable[..., Result] | None = None,
    public: str = "",
) -> Callable[..., Result]:
    """Define ``torch.ops.fedkern.<name>`` and return the function to call it with.

    Args:
        schema: arguments and results of the operator, for example ``"(Tensor a, float t) -> Tensor"``.
        implementation: computes the results of real tensors on the CPU and on CUDA.
        fake: gives the results' shapes, dtypes and strides on fake tensors.
        setup_context, backward: the gradient, as ``torch.library.register_autograd`` takes it.
        vmap: the batching rule, as ``torch.library.register_vmap`` takes it. ``vmap`` and ``backward`` must call
            operators through the functions that :func:`register` returned for them, since further transforms may be
            active around them. None: all transforms of torch.func run through the reference.
        reference: the same computation in PyTorch's own operations. Forward-mode AD runs through it, since a custom
            operator would silently drop the tangents.
        public: names of the operators that call this one, for the error of vmap where there is neither a rule nor a
            reference; default: ``name``.

    Returns:
        A function that calls the operator. Under torch.func transforms it calls an ``autograd.Function`` around the
        operator, because torch.library's own gradients refuse transforms (torch 2.11 to 2.13).
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CPU")
    LIBRARY.impl(name, implementation, "CUDA")
    qualified = f"fedkern::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    operator: Callable[..., Result] = getattr(torch.ops.fedkern, name)
    if vmap is not None or reference is None:
        rule = vmap or functools.partial(_refuse_vmap, public or name)
        torch.library.register_vmap(qualified, rule, lib=LIBRARY)
    if backward is None:
        return operator
    members: dict[str, Any] = {
        "forward": lambda *arguments: operator(*arguments),
        "setup_context": setup_context,
        "backward": backward,
    }
    if vmap is not None:
        members["vmap"] = vmap
    function: Any = type(name, (torch.autograd.Function,), {key: staticmethod(rule) for key, rule in members.items()})

    def call(*arguments: object) -> Result:
        if reference is not None and backend.needs_reference(name, has_rules=vmap is not None):
            return reference(*arguments)
        transformed = not torch.compiler.is_compiling() and functorch_active()
        run: Callable[..., Result] = function.apply if transformed else operator
        return run(*arguments)

    return call


def _refuse_vmap(public: str, *arguments: object) -> NoReturn:
    raise NotImplementedError(f"torch.func.vmap over {public} is not supported: loop over the mapped axis")


def second_derivative(
    reference: Callable[..., Any], results: int, saved: Sequence[Any], needs: Sequence[bool], cotangents: Sequence[Any]
) -> list[Tensor | None]:
    """Differentiate the reference's gradients (by the inputs that ``needs`` names) by all of ``saved``.

    Args:
        reference: function of the inputs; numbers and None are bound.
        results: how many results the reference has: a tensor for 1, else a tuple.
        saved: the results' gradients, then the inputs; None where an argument was not given.
    """
    floating = [i for i, x in enumerate(saved) if x is not None and x.is_floating_point()]
    chosen = [results + i for i, need in enumerate(needs) if need and saved[results + i] is not None]

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        full = list(saved)
        for i, x in zip(floating, tensors, strict=True):
            full[i] = x

        def value(*selected: Tensor) -> Any:
            inputs = list(full)
            for i, x in zip(chosen, selected, strict=True):
                inputs[i] = x
            return reference(*inputs[results:])

        pull: Callable[..., tuple[Tensor, ...]] = torch.func.vjp(value, *(full[i] for i in chosen))[1]
        return pull(full[0] if results == 1 else tuple(full[:results]))

    pull = torch.func.vjp(gradients, *(saved[i] for i in floating))[1]
    back: list[Tensor | None] = [None] * len(saved)
    for i, x in zip(floating, pull(tuple(cotangents[i - results] for i in chosen)), strict=True):
        back[i] = x
    return back


def fold_mapped(x: Tensor, axis: int | None, count: int) -> Tensor:
    """Move the mapped axis, or V repetitions, into the batch: ``[V * B, ...]``."""
    return mapped_first(x, axis, count).flatten(0, 1)


def mapped_first(x: Tensor, axis: int | None, count: int) -> Tensor:
    """Move the mapped axis, or V repetitions, to the front: ``[V, ...]``."""
    return x.expand(count, *x.shape) if axis is None else x.movedim(axis, 0)


def laid_out(result: Tensor | None, like: Tensor) -> Tensor:
    """Return ``result`` in the form of the fake result ``like``, or ``like`` for None."""
    if result is None:
        return like
    return result if (result.dtype, result.stride()) == (like.dtype, like.stride()) else like.copy_(result)


def differentiate_reference(
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad: Tensor | Sequence[Tensor],
    twice: bool = True,
) -> tuple[Tensor | None, ...]:
    """Return the reference's gradients, for second derivatives (``twice``) with a graph of their own.

    Kernels compute first derivatives only. A recorded backward pass differentiates the reference instead, by views of
    the saved ``inputs``: an input that was made of another keeps its own graph.
    """
    with recording():
        views = [
            x if x is None else x.view_as(x) if twice else x.detach().requires_grad_(bool(need))
            for x, need in zip(inputs, needs, strict=True)
        ]
        operands = [view for view, need in zip(views, needs, strict=True) if need and view is not None]
        result = reference(*views)
        gradients = iter(
            torch.autograd.grad(result, operands, grad, create_graph=twice, allow_unused=True) if operands else ()
        )
    return tuple(next(gradients) if need and t is not None else None for t, need in zip(inputs, needs, strict=True))
