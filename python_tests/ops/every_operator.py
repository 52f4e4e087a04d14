"""Every public operator under one signature: a line here adds a new one to the tests of all operators."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern import ops

# What ops exports beside operators: classes with tests of their own, and switches.
NO_OPERATORS = {
    "Accumulator", "FlatParameters", "FusedBlocks", "ServerStep", "StepResult", "empty_cache", "lora_merge",
    "use_backend", "use_isa",
}  # fmt: skip


# Operators of torch.library that no public function calls with ordinary arguments.
INDIRECT: set[str] = {
    "fedkern::optimiser_step_and_zero"  # under torch.compile
}


@dataclass(frozen=True)
class Operator:
    """A way to call a public operator.

    Attributes:
        name: as in ``fedkern.ops``; a second entry of one operator adds its settings after a space.
        call: from floating tensors to a tensor or a tuple of them.
        shapes: of those tensors.
        large: the same, large enough for several threads.
        gradient: whether it has one.
        vmap: whether it has a batching rule; the others raise.
        positive: which tensors must not be negative (weights).
        changed: which tensors it writes to.
        alike: whether its changed tensors have the dtype of the others, and any strides.
        compiled: whether one core computes all of it.  Parts that torch's own operators compute have bits that depend
            on the number of threads.
        only_cpu: whether there are kernels for fp32 on a CPU with AVX2 alone, and no operator of torch.library: GPUs,
            other ISA levels and compilers meet the reference.
    """

    name: str
    call: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    large: tuple[tuple[int, ...], ...]
    gradient: bool = True
    vmap: bool = True
    positive: tuple[int, ...] = ()
    changed: tuple[int, ...] = ()
    alike: bool = False
    compiled: bool = True
    only_cpu: bool = False

    def inputs(self, dtype: torch.dtype = torch.float32, *, large: bool = False, seed: int = 0) -> list[Tensor]:
        """Return seeded inputs."""
        draw = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(shape, generator=draw) for shape in (self.large if large else self.shapes)]
        return [(x.abs() + 0.1 if i in self.positive else x).to(dtype) for i, x in enumerate(tensors)]

    def two_sizes(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the inputs of two sizes that have the same numbers of axes."""
        small, large = self.inputs(), self.inputs(large=True, seed=1)
        if [x.dim() for x in small] != [x.dim() for x in large]:
            # The index is of a batch of its own.
            large = [torch.cat([x, x], -1 if self.name == "blend index" else 0) for x in small]
        return small, large

    def fresh(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return ``tensors``, copied where the operator writes to them."""
        return [x.clone() if i in self.changed else x for i, x in enumerate(tensors)]

    def results(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the results of :attr:`call`, always as a tuple.

        Tensors that it changes are copied first.
        """
        given = self.call(*self.fresh(tensors))
        return tuple(given) if isinstance(given, (tuple, list)) else (given,)


UPLOAD_WEIGHTS = [1.0, 2.0, 3.0, 4.0, 5.0]
INDEX = torch.tensor([2, 0, 0, 3])
LARGE_INDEX = torch.arange(64).flip(0) // 2
BOXES = torch.tensor([[[1.0, 1.0, 4.0, 3.0]], [[0.0, 2.0, 2.0, 5.0]], [[0.0, 0.0, 0.0, 0.0]]])


# Made once per device: copying to a GPU in the middle of a call would wait for it.
@functools.cache
def _boxes_on(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return BOXES[torch.arange(count) % 3].to(device, dtype)


@functools.cache
def _index_on(count: int, device: torch.device) -> Tensor:
    return (INDEX if count == 4 else LARGE_INDEX).to(device)


# Before any test: made while torch.export traces, they would be fake tensors for ever.
_boxes_on(3, torch.float32, torch.device("cpu"))
_index_on(4, torch.device("cpu"))


def _boxes(images: Tensor) -> Tensor:
    return _boxes_on(images.shape[0], images.dtype, images.device)


def _index(x: Tensor) -> Tensor:
    return _index_on(x.shape[0], x.device)


def _store_two(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a teacher that is stored at two classes."""
    values = torch.full((x.shape[0], 2), -1.5, dtype=x.dtype, device=x.device)
    return values, torch.arange(2, device=x.device).expand(x.shape[0], 2)


def _sgd_step(p: Tensor, g: Tensor, v: Tensor, a: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    step = ops.sgd_step(
        p, g, v, lr=0.1, momentum=0.9, weight_decay=0.01, anchor=a, proximal=0.3, correction=c, gradient_sum=s,
        max_norm=2.0,
    )  # fmt: skip
    return step.squared_norm, p, v, s


def _adamw_step(p: Tensor, g: Tensor, moment: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    return ops.adamw_step(p, g, moment, second, 3, lr=0.1).squared_norm, p, moment, second


_LOGITS, _MANY = (4, 7), (2048, 300)
_VECTORS, _UPLOADS = (5, 33), (5, 400_000)
_MAP, _MAPS = (2, 3, 4, 5), (16, 8, 64, 64)
# Channels last: x and weight of a convolution to 8 channels.
_CONV, _CONVS = ((2, 6, 5, 3), (8, 3, 3, 3)), ((32, 32, 32, 8), (16, 8, 3, 3))

Untracked = functools.partial(Operator, gradient=False, vmap=False)
of_uploads = functools.partial(Untracked, shapes=(_VECTORS,), large=(_UPLOADS,))
of_maps = functools.partial(Operator, shapes=(_MAP, _MAP, (6,), (6,)), large=(_MAPS, _MAPS, (16,), (16,)))
Optimiser = functools.partial(Untracked, alike=True)
Convolution = functools.partial(Operator, only_cpu=True)

OPERATORS = [
    Operator("blend", lambda x, y: ops.blend(x, y, 0.3), ((4, 3, 2),) * 2, ((64, 20_000),) * 2),
    Operator("blend index", lambda x, y: ops.blend(x, y, 0.3, index=_index(x)), ((4, 3, 2),) * 2, ((64, 20_000),) * 2),
    Operator(
        "blend alpha",
        lambda x, y, a: ops.blend(x, y, a.sigmoid()),
        ((4, 3), (4, 3), (4,)),
        ((64, 20_000),) * 2 + ((64,),),
    ),
    Operator("erase_boxes", lambda x: ops.erase_boxes(x, _boxes(x), 0.5), ((3, 2, 5, 6),), ((48, 3, 128, 128),)),
    Operator("keep_boxes", lambda x: ops.keep_boxes(x, _boxes(x), 0.5), ((3, 2, 5, 6),), ((48, 3, 128, 128),)),
    Operator("kl_div", lambda s, t: ops.kl_div(s, t, 2.0), (_LOGITS,) * 2, (_MANY,) * 2),
    Operator(
        "kl_div weight",
        lambda s, t, w: ops.kl_div(s, t, 2.0, weight=w, reduction="none"),
        ((4, 7, 3), (4, 7, 3), (4,)),
        ((64, 21, 400), (64, 21, 400), (64,)),
        positive=(2,),
    ),
    Operator("kl_div dim", lambda s, t: ops.kl_div(s, t, 2.0, dim=-1), ((4, 3, 7),) * 2, ((64, 400, 21),) * 2),
    Operator("kl_div stored", lambda s: ops.kl_div(s, _store_two(s), 2.0, rest="spread"), (_LOGITS,), (_MANY,)),
    Operator("dual_kl", lambda a, b, t: ops.dual_kl(a, b, t, 2.0), (_LOGITS,) * 3, (_MANY,) * 3),
    Operator(
        "dual_kl limit",
        lambda a, b, t: ops.dual_kl(a, b, t, math.inf, direction="student", reduction="none"),
        (_LOGITS,) * 3,
        (_MANY,) * 3,
    ),
    Operator("entropy", lambda x: ops.entropy(x), (_LOGITS,), (_MANY,)),
    Operator(
        "ensemble_kl",
        lambda s, t, w: ops.ensemble_kl(s, t, w, 2.0),
        (_LOGITS, (3, *_LOGITS), (3, *_LOGITS)),
        (_MANY, (3, *_MANY), (3, *_MANY)),
        positive=(2,),
    ),
    Operator(
        "ensemble_kl logits",
        lambda s, t: ops.ensemble_kl(s, t, mix="logits", reduction="none"),
        (_LOGITS, (3, *_LOGITS)),
        (_MANY, (3, *_MANY)),
    ),
    Operator(
        "ensemble_kl mean_of_kl",
        lambda s, t, w: ops.ensemble_kl(s, t, w, mode="mean_of_kl"),
        ((4, 7, 3), (3, 4, 7, 3), (3,)),
        ((64, 21, 400), (3, 64, 21, 400), (3,)),
        positive=(2,),
    ),
    Operator(
        "ensemble_kl limit",
        lambda s, t, w: ops.ensemble_kl(s, t, w, math.inf, reduction="sum"),
        (_LOGITS, (3, *_LOGITS), (3,)),
        (_MANY, (3, *_MANY), (3,)),
        positive=(2,),
    ),
    Operator("js_div", ops.js_div, ((3, *_LOGITS), (3,)), ((3, *_MANY), (3,)), positive=(1,)),
    Operator("consensus", ops.consensus, ((3, 4, 7, 3), (3, 4)), ((3, 64, 21, 400), (3, 64)), positive=(1,)),
    Operator("contrastive", ops.contrastive, ((6, 5),) * 2, ((700, 64),) * 2, compiled=False),
    Operator(
        "contrastive temperature",
        lambda x, y, t: ops.contrastive(x, y, t[0]),
        ((6, 5), (6, 5), (1,)),
        ((700, 64), (700, 64), (1,)),
        positive=(2,),
        compiled=False,
    ),
    Operator("weighted_mean", ops.weighted_mean, (_VECTORS, (5,)), (_UPLOADS, (5,)), positive=(1,)),
    Operator(
        "weighted_mean list",
        lambda a, b, w: ops.weighted_mean([a, b], w),
        ((33,), (33,), (2,)),
        ((400_000,), (400_000,), (2,)),
        positive=(2,),
    ),
    of_uploads("trimmed_mean", lambda v: ops.trimmed_mean(v, 1)),
    of_uploads("median", lambda v: ops.median(v)),
    Untracked("median weights", ops.median, (_VECTORS, (5,)), (_UPLOADS, (5,)), positive=(1,)),
    of_uploads("geometric_median", ops.geometric_median),
    of_uploads("krum", lambda v: ops.krum(v, 1, 2)),
    of_uploads("pairwise_distances", ops.pairwise_distances),
    of_uploads("clip_by_norm", lambda v: ops.clip_by_norm(v, 0.7)),
    of_uploads("clip_and_noise", lambda v: ops.clip_and_noise(v, 0.7, 0.1, seed=3, offset=5)),
    Untracked(
        "server_step", lambda g, v: ops.server_step(g, v, UPLOAD_WEIGHTS), ((33,), _VECTORS), ((400_000,), _UPLOADS)
    ),
    Untracked(
        "server_step adam",
        lambda g, v, m, s: ops.server_step(g, v, UPLOAD_WEIGHTS, "adam", first=m, second=s),
        ((33,), _VECTORS, (33,), (33,)),
        ((400_000,), _UPLOADS, (400_000,), (400_000,)),
        positive=(3,),
        changed=(2, 3),
    ),
    Optimiser(
        "sgd_step",
        lambda p, g: (ops.sgd_step(p, g, lr=0.1).squared_norm, p),
        ((33,),) * 2,
        ((400_000,),) * 2,
        changed=(0,),
    ),
    Optimiser("sgd_step terms", _sgd_step, ((5, 33),) * 6, ((3, 100_000),) * 6, changed=(0, 2, 5)),
    Optimiser("adamw_step", _adamw_step, ((33,),) * 4, ((400_000,),) * 4, positive=(3,), changed=(0, 2, 3)),
    of_maps("fuse_concat", lambda x, y, a, b: ops.fuse_concat([x, y], a, b, "relu")),
    of_maps("fuse_mean", lambda x, y, a, b: ops.fuse_mean([x, y], a, b, "relu")),
    Convolution(
        "conv_norm",
        lambda x, w, a, b: ops.conv_norm(x.movedim(-1, 1), w, a / 8, b / 8, None, None, pool=2),
        (*_CONV, (8,), (8,)),
        (*_CONVS, (16,), (16,)),
    ),
    Convolution(
        "conv_norm residual",
        lambda x, w, a, b, r: ops.conv_norm(
            x.movedim(-1, 1),
            w,
            a,
            b,
            torch.zeros_like(a),
            torch.full_like(b, 30.0),
            residual=r.movedim(-1, 1),
            training=False,
        ),
        (*_CONV, (8,), (8,), (2, 6, 5, 8)),
        (*_CONVS, (16,), (16,), (32, 32, 32, 16)),
    ),
    Convolution(
        "conv_norm groups",
        lambda x, w, a, b, c: ops.conv_norm(x.movedim(-1, 1), w, a / 8, b / 8, None, None, groups=4, bias=c),
        (*_CONV, (8,), (8,), (8,)),
        (*_CONVS, (16,), (16,), (16,)),
    ),
    Convolution(
        "conv_pool",
        lambda x, w, b: ops.conv_pool(x.movedim(-1, 1), w, b / 8, padding=1),
        (*_CONV, (8,)),
        (*_CONVS, (16,)),
    ),
    Convolution("conv_pool relu", lambda x, w: ops.conv_pool(x.movedim(-1, 1), w, relu=False), _CONV, _CONVS),
]


def _each(operators: Sequence[Operator]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("operator", operators, ids=[o.name.replace(" ", "-") for o in operators])


each_operator = _each(OPERATORS)
each_differentiable = _each([o for o in OPERATORS if o.gradient])
each_gpu_operator = _each([o for o in OPERATORS if not o.only_cpu])
