"""What a call costs beside its kernel: 64 rows of 10, where the kernel takes a microsecond or two.

Without gradient the whole call counts; with gradient, what it takes more than an empty ``torch.autograd.Function`` with
the same inputs and results.  Stacks of five teachers, whose kernels take several microseconds, are measured with one
row too, where hardly anything but the call is left.  On a GPU, where a call is over when it is enqueued, wall time
counts, and the first is taken over one eager elementwise operator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import compare
from torch import Tensor

from fedkern import ops

ROWS, CLASSES = 64, 10


@dataclass(frozen=True)
class Call:
    """One operator on small inputs.

    Attributes:
        run: from tensors to the result.
        shapes: of the tensors.
        leaves: how many of them, from the first, require a gradient in the rows with gradient; 0 for no such rows.
        results: how many tensors the operator makes, of which ``run`` returns the first.
    """

    run: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    leaves: int = 1
    results: int = 1


@functools.cache
def accumulator(on: torch.device) -> ops.Accumulator:
    return ops.Accumulator(640, device=on)


_LOGITS = (ROWS, CLASSES)
_TEACHERS, _ONE_ROW = (5, ROWS, CLASSES), (5, 1, CLASSES)
_VECTORS = (5, 640)
CALLS = {
    "kl_div": Call(lambda s, t: ops.kl_div(s, t, 2.0), (_LOGITS,) * 2),
    "dual_kl": Call(lambda a, b, t: ops.dual_kl(a, b, t, 2.0), (_LOGITS,) * 3, 2),
    "entropy": Call(lambda x: ops.entropy(x), (_LOGITS,)),
    "ensemble_kl": Call(lambda s, t, w: ops.ensemble_kl(s, t, w, 2.0), (_LOGITS, _TEACHERS, (5,))),
    "ensemble_kl, one row": Call(lambda s, t, w: ops.ensemble_kl(s, t, w, 2.0), ((1, CLASSES), _ONE_ROW, (5,))),
    "js_div": Call(lambda x: ops.js_div(x), (_TEACHERS,)),
    "js_div, one row": Call(lambda x: ops.js_div(x), (_ONE_ROW,)),
    "consensus": Call(lambda x: ops.consensus(x)[0], (_TEACHERS,), results=2),
    "consensus, one row": Call(lambda x: ops.consensus(x)[0], (_ONE_ROW,), results=2),
    "blend": Call(lambda x, y: ops.blend(x, y, 0.6), (_LOGITS,) * 2, 2),
    "contrastive": Call(lambda x, y: ops.contrastive(x, y), (_LOGITS,) * 2, 2),
    "contrastive, two rows": Call(lambda x, y: ops.contrastive(x, y), ((2, CLASSES),) * 2, 2),
    "erase_boxes": Call(lambda x, b: ops.erase_boxes(x, b), ((4, 1, 4, 40), (4, 1, 4))),
    "keep_boxes": Call(lambda x, b: ops.keep_boxes(x, b), ((4, 1, 4, 40), (4, 1, 4))),
    "weighted_mean": Call(lambda v: ops.weighted_mean(v, WEIGHTS), (_VECTORS,)),
    "Accumulator.add": Call(lambda v: accumulator(v.device).add(v, 1.0), ((640,),), 0),
    "median": Call(lambda v: ops.median(v), (_VECTORS,), 0),
    "trimmed_mean": Call(lambda v: ops.trimmed_mean(v, 1), (_VECTORS,), 0),
    "pairwise_distances": Call(lambda v: ops.pairwise_distances(v), (_VECTORS,), 0),
    "krum": Call(lambda v: ops.krum(v, 1), (_VECTORS,), 0),
    "geometric_median, one iteration": Call(lambda v: ops.geometric_median(v, iterations=1), (_VECTORS,), 0),
    "clip_by_norm": Call(lambda v: ops.clip_by_norm(v, 1.0), (_VECTORS,), 0),
    "clip_and_noise": Call(lambda v: ops.clip_and_noise(v, 1.0, 0.1, seed=1), (_VECTORS,), 0),
    "server_step": Call(lambda g, v: ops.server_step(g, v, WEIGHTS), ((640,), _VECTORS), 0),
    "fuse_concat": Call(lambda x, y: ops.fuse_concat([x, y]), ((4, 4, 4, 10),) * 2, 2),
    "fuse_mean": Call(lambda x, y: ops.fuse_mean([x, y]), ((4, 4, 4, 10),) * 2, 2),
}
WEIGHTS = [1.0, 2.0, 3.0, 4.0, 5.0]
WITH_GRADIENT = [name for name, call in CALLS.items() if call.leaves]


class Empty(torch.autograd.Function):
    """As many inputs and results as the operator, of the same shapes like the gradients, and nothing computed."""

    @staticmethod
    def forward(
        ctx: Any, shape: torch.Size, leaves: int, results: int, *tensors: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.leaves = leaves
        if results == 1:
            return tensors[0].new_empty(shape)
        return tuple([tensors[0].new_empty(shape) for _ in range(results)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return (None, None, None, *(torch.empty_like(x) if i < ctx.leaves else None for i, x in enumerate(saved)))


def inputs(call: Call) -> list[Tensor]:
    # Vectors may be weights, which are not negative.
    return [torch.rand(shape) if len(shape) == 1 else torch.randn(shape) for shape in call.shapes]


@pytest.mark.parametrize("name", CALLS)
def test_call(node: str, name: str, threads: int) -> None:
    call = CALLS[name]
    tensors = inputs(call)
    runs = {"fedkern": lambda: call.run(*tensors), "one eager operator": lambda: tensors[0] + 1}
    compare(
        node,
        "overhead",
        f"{name} {list(call.shapes[0])} without gradient",
        runs,
        threads=threads,
    )


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_call_with_gradient(node: str, name: str, threads: int) -> None:
    call = CALLS[name]
    tensors = inputs(call)
    for x in tensors[: call.leaves]:
        x.requires_grad_()
    shape = call.run(*tensors).shape
    grad = torch.ones(shape)

    def step(run: Callable[..., Any], *first: Any) -> Callable[[], None]:
        def both() -> None:
            for x in tensors[: call.leaves]:
                x.grad = None
            result = run(*first, *tensors)
            result = result if isinstance(result, Tensor) else result[0]
            result.backward(grad) if shape else result.backward()

        return both

    runs = {"fedkern": step(call.run), "empty Function": step(Empty.apply, shape, call.leaves, call.results)}
    case = f"{name} {list(call.shapes[0])} with gradient"
    compare(node, "overhead", case, runs, threads=threads)
