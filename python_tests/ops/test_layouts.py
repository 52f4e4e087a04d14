"""Tests of maps of every order and spacing: no operator may assume that one stride leads through the positions."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedkern import ops
from python_tests.ops.operator_cases import assert_close, using

MAP, STACK = (2, 4, 3, 5), (3, 2, 4, 3, 5)


def _apart(x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    wide = x.new_full((*x.shape[:-2], 2 * height + 1, width + 3), 7.0)
    return wide[..., 1::2, 1 : 1 + width].copy_(x)


# Of maps [..., channels, height, width].
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "channels_between": lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2),
    "channels_last": lambda x: x.movedim(-3, -1).contiguous().movedim(-1, -3),
    "batch_inside": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "reversed": lambda x: x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1]),
    "sliced": _apart,
    "sliced_transposed": lambda x: _apart(x.mT).mT,
    "expanded": lambda x: x[..., :1, :].expand(x.shape),
    "per_channel": lambda x: x[..., :1, :1].expand(x.shape),
}

BOXES = torch.tensor([[[1.0, 0.0, 3.0, 2.0]], [[0.0, 1.0, 2.0, 3.0]]])

OPERATORS: dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], tuple[tuple[int, ...], ...]]] = {
    "kl_div": (lambda s, t: ops.kl_div(s, t, 2.0), (MAP, MAP)),
    "kl_div limit": (lambda s, t: ops.kl_div(s, t, float("inf"), reduction="none"), (MAP, MAP)),
    "kl_div weight": (lambda s, t, w: ops.kl_div(s, t, weight=w.abs(), reduction="none"), (MAP, MAP, (2, 3, 5))),
    "dual_kl": (lambda a, b, t: ops.dual_kl(a, b, t), (MAP, MAP, MAP)),
    "dual_kl student": (lambda a, b, t: ops.dual_kl(a, b, t, direction="student", reduction="sum"), (MAP, MAP, MAP)),
    "entropy": (lambda x: ops.entropy(x, reduction="none"), (MAP,)),
    "ensemble_kl": (lambda s, t, w: ops.ensemble_kl(s, t, w.abs()), (MAP, STACK, STACK)),
    "ensemble_kl logits": (lambda s, t: ops.ensemble_kl(s, t, mix="logits", reduction="none"), (MAP, STACK)),
    "ensemble_kl mean_of_kl": (lambda s, t: ops.ensemble_kl(s, t, mode="mean_of_kl"), (MAP, STACK)),
    "js_div": (lambda t, w: ops.js_div(t, w.abs(), reduction="none"), (STACK, (3, 2, 3, 5))),
    "consensus": (lambda t, w: ops.consensus(t, w.abs()), (STACK, (3, 2, 3, 5))),
    "blend": (lambda x, y: ops.blend(x, y, 0.3, index=torch.tensor([1, 1])), (MAP, MAP)),
    "erase_boxes": (lambda x: ops.erase_boxes(x, BOXES.to(x.dtype), 0.5), (MAP,)),
    "keep_boxes": (lambda x: ops.keep_boxes(x, BOXES.to(x.dtype), 0.5), (MAP,)),
    "fuse_concat": (lambda x, y, a, b: ops.fuse_concat([x, y], a, b, "relu"), (MAP, MAP, (8,), (8,))),
    "fuse_mean": (lambda x, y, a, b: ops.fuse_mean([x, y], a, b, "relu"), (MAP, MAP, (8,), (8,))),
}


def _differentiate(operator: str, tensors: list[Tensor]) -> list[Tensor]:
    """Return results and gradients of a loss that weighs every element differently."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    given = OPERATORS[operator][0](*leaves)
    results = given if isinstance(given, tuple) else (given,)
    steps = [torch.empty_like(x).copy_((torch.arange(x.numel()) % 7 + 1).view_as(x)) for x in results]
    loss = torch.stack([(x * step).sum() for x, step in zip(results, steps, strict=True)]).sum()
    return [*results, *torch.autograd.grad(loss, leaves)]


def test_maps_of_any_strides(backend: str) -> None:
    """The test loops over its cases, because Triton's interpreter would take only a few parametrised ones."""
    draw = torch.Generator().manual_seed(0)
    for operator, (_, shapes) in OPERATORS.items():
        for number, (name, lay_out) in enumerate(LAYOUTS.items()):
            tensors = [torch.randn(shape, generator=draw) for shape in shapes]
            maps = [i for i, x in enumerate(tensors) if x.dim() > 1]
            # All of them or, in turn, one beside others that are contiguous.
            chosen = maps if number % 2 == 0 else maps[number // 2 % len(maps) :][:1]
            laid = [lay_out(x) if i in chosen else x for i, x in enumerate(tensors)]
            with using("reference"):
                expected = _differentiate(operator, [x.double() for x in laid])
            with using(backend):
                got = _differentiate(operator, laid)
            if name == "channels_last" and backend != "reference":  # whose torch.cat hands slices back
                of_maps = [x for x in got if x.dim() == 4 and len(x) == MAP[0]]
                assert all(x.is_contiguous(memory_format=torch.channels_last) for x in of_maps), operator
            for place, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
                assert_close(f"{operator} {name} {place}", ours, theirs, absolute=2e-5)
