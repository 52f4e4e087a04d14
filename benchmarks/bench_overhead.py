"""Benchmark of small calls without gradients: 64 rows of 10, where the kernel takes a microsecond or two.

Stacks of five teachers, whose kernels take several microseconds, are measured with one row too, where hardly anything
but the call is left.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import compare
from fedkern import ops

ROWS, CLASSES = 64, 10


@dataclass(frozen=True)
class Call:
    """Operator on small inputs.

    Attributes:
        run: the call.
        shapes: of the tensors.
    """

    run: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]


@functools.cache
def accumulator(on: torch.device) -> ops.Accumulator:
    return ops.Accumulator(640, device=on)


_LOGITS = (ROWS, CLASSES)
_TEACHERS, _ONE_ROW = (5, ROWS, CLASSES), (5, 1, CLASSES)
_VECTORS = (5, 640)
CALLS = {
    "kl_div": Call(lambda s, t: ops.kl_div(s, t, 2.0), (_LOGITS,) * 2),
    "dual_kl": Call(lambda a, b, t: ops.dual_kl(a, b, t, 2.0), (_LOGITS,) * 3),
    "entropy": Call(lambda x: ops.entropy(x), (_LOGITS,)),
    "ensemble_kl": Call(lambda s, t, w: ops.ensemble_kl(s, t, w, 2.0), (_LOGITS, _TEACHERS, (5,))),
    "ensemble_kl, one row": Call(lambda s, t, w: ops.ensemble_kl(s, t, w, 2.0), ((1, CLASSES), _ONE_ROW, (5,))),
    "js_div": Call(lambda x: ops.js_div(x), (_TEACHERS,)),
    "js_div, one row": Call(lambda x: ops.js_div(x), (_ONE_ROW,)),
    "consensus": Call(lambda x: ops.consensus(x)[0], (_TEACHERS,)),
    "consensus, one row": Call(lambda x: ops.consensus(x)[0], (_ONE_ROW,)),
    "blend": Call(lambda x, y: ops.blend(x, y, 0.6), (_LOGITS,) * 2),
    "contrastive": Call(lambda x, y: ops.contrastive(x, y), (_LOGITS,) * 2),
    "contrastive, two rows": Call(lambda x, y: ops.contrastive(x, y), ((2, CLASSES),) * 2),
    "erase_boxes": Call(lambda x, b: ops.erase_boxes(x, b), ((4, 1, 4, 40), (4, 1, 4))),
    "keep_boxes": Call(lambda x, b: ops.keep_boxes(x, b), ((4, 1, 4, 40), (4, 1, 4))),
    "weighted_mean": Call(lambda v: ops.weighted_mean(v, WEIGHTS), (_VECTORS,)),
    "Accumulator.add": Call(lambda v: accumulator(v.device).add(v, 1.0), ((640,),)),
    "median": Call(lambda v: ops.median(v), (_VECTORS,)),
    "trimmed_mean": Call(lambda v: ops.trimmed_mean(v, 1), (_VECTORS,)),
    "pairwise_distances": Call(lambda v: ops.pairwise_distances(v), (_VECTORS,)),
    "krum": Call(lambda v: ops.krum(v, 1), (_VECTORS,)),
    "geometric_median, one iteration": Call(lambda v: ops.geometric_median(v, iterations=1), (_VECTORS,)),
    "clip_by_norm": Call(lambda v: ops.clip_by_norm(v, 1.0), (_VECTORS,)),
    "clip_and_noise": Call(lambda v: ops.clip_and_noise(v, 1.0, 0.1, seed=1), (_VECTORS,)),
    "server_step": Call(lambda g, v: ops.server_step(g, v, WEIGHTS), ((640,), _VECTORS)),
    "fuse_concat": Call(lambda x, y: ops.fuse_concat([x, y]), ((4, 4, 4, 10),) * 2),
    "fuse_mean": Call(lambda x, y: ops.fuse_mean([x, y]), ((4, 4, 4, 10),) * 2),
}
WEIGHTS = [1.0, 2.0, 3.0, 4.0, 5.0]


def inputs(call: Call) -> list[Tensor]:
    # Vectors may be weights, which are not negative.
    return [torch.rand(shape) if len(shape) == 1 else torch.randn(shape) for shape in call.shapes]


@pytest.mark.parametrize("name", CALLS)
def test_call(node: str, name: str, threads: int) -> None:
    call = CALLS[name]
    tensors = inputs(call)
    runs = {"fedkern": lambda: call.run(*tensors), "one eager operator": lambda: tensors[0] + 1}
    compare(node, "overhead", f"{name} {list(call.shapes[0])} without gradient", runs, threads=threads)
