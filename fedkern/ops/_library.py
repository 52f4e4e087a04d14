"""The operators in ``torch.library``: one graph node each for torch.compile, vmap, torch.func and opcheck.

Eager calls never pass through here (a dispatcher round trip in Python costs several times a small kernel); the public
functions come here under ``torch.compile``, functorch transforms, dispatch modes and for tensor subclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fedkern.ops import backend

LIBRARY = torch.library.Library("fedkern", "DEF")


def register(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
    reference: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines ``torch.ops.fedkern.<name>`` and returns the function to call it with.

    Args:
        name: operator name.
        schema: its arguments and results, for example ``"(Tensor a, float t) -> Tensor"``.
        implementation: runs on real tensors of any device.
        fake: gives the results' shapes, dtypes and strides on fake tensors.
        setup_context, backward: the gradient, as ``torch.library.register_autograd`` takes it.
        vmap: the batching rule, as ``torch.library.register_vmap`` takes it.  It and ``backward`` call operators
            through what this function returned for them, since further transforms may be active around them.
        reference: the same in torch's own operations, which forward-mode AD follows: an operator would drop its
            tangents without a word.

    Returns:
        The operator; under torch.func transforms an ``autograd.Function`` around it, because torch.library's own
        gradients refuse those (torch 2.11 to 2.13).
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CPU")
    LIBRARY.impl(name, implementation, "CUDA")
    qualified = f"fedkern::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    if vmap is not None:
        torch.library.register_vmap(qualified, vmap, lib=LIBRARY)
    operator = getattr(torch.ops.fedkern, name)
    if backward is None or setup_context is None:
        return operator
    members: dict[str, Any] = {
        "forward": staticmethod(lambda *arguments: operator(*arguments)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
    }
    if vmap is not None:
        members["vmap"] = staticmethod(vmap)
    function: Any = type(name, (torch.autograd.Function,), members)

    def call(*arguments: Any) -> Any:
        if reference is not None and backend.forward_mode(name):
            return reference(*arguments)
        transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        return function.apply(*arguments) if transformed else operator(*arguments)

    return call


@contextmanager
def recording() -> Iterator[None]:
    """Records a graph even within an operator's implementation.

    The dispatcher has left autograd behind when it calls one, and ``torch.enable_grad`` alone does not bring it back:
    a backward operator that differentiates the reference would find no graph under ``torch.compile``.
    """
    keys = torch._C.DispatchKey
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradCPU, keys.AutogradCUDA, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def differentiate_reference(
    reference: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad: Tensor | Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Returns the reference's gradients with a graph of their own: the way a second derivative is taken.

    Kernels write first derivatives only; when a backward pass is itself recorded (``create_graph=True``) the gradient
    is taken through the plain PyTorch reference instead.

    Args:
        reference: function of ``inputs``, a tensor or several.
        inputs: the saved inputs, with the graph they came with; None where an argument was not given.
        needs: which of them want a gradient.
        grad: gradient of the result, or of each.
    """
    with recording():
        result = reference(*inputs)
        wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need and tensor is not None]
        gradients = iter(torch.autograd.grad(result, wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(gradients) if need and t is not None else None for t, need in zip(inputs, needs, strict=True))
