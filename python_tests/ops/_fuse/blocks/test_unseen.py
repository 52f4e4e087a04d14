"""FusedBlocks of blocks that do what a trace cannot see: refused by name, or exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.flop_counter import FlopCounterMode

from fedkern.ops import FlatParameters, FusedBlocks
from fedkern.ops._fuse.blocks.choice import LOWERINGS


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 1)))


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Frozen(nn.Sequential):
    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


def tie(block: Any) -> None:
    block[3][0] = nn.Conv2d(4, 4, 3, padding=1)
    block[3][0].weight = block[0].weight


def narrow(block: Any) -> None:
    block[0].weight = nn.Parameter(block[0].weight[:2].detach())


def replace(block: Any) -> None:
    weight = block[0].weight.detach()
    del block[0].weight
    block[0].weight = weight


def statistics_outside(block: Any) -> None:
    block[1].register_buffer("running_var", torch.ones(4), persistent=False)


UNSEEN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "hook": (".0, a Conv2d with forward hooks", lambda b: b[0].register_forward_hook(lambda m, i, o: o * 2)),
    "pre-hook": (".1, a BatchNorm2d with forward", lambda b: b[1].register_forward_pre_hook(lambda m, i: None)),
    "hook of an activation": (".2, a ReLU with", lambda b: b[2].register_forward_hook(lambda m, i, o: -o)),
    "hook of a container": (".3, a Sequential with", lambda b: b[3].register_forward_hook(lambda m, i, o: o + 1)),
    "hook of a block": (", a Sequential with", lambda b: b.register_forward_hook(lambda m, i, o: o + 1)),
    "backward hook": (".3.0, a Conv2d with", lambda b: b[3][0].register_full_backward_hook(lambda m, i, o: None)),
    "backward pre-hook": (".0, a", lambda b: b[0].register_full_backward_pre_hook(lambda m, o: None)),
    "state dict hook": (".0, a", lambda b: b[0].register_state_dict_post_hook(lambda *_: None)),
    "hook of a tensor": (".0, a Conv2d with hooks of bias", lambda b: b[0].bias.register_hook(lambda g: g * 0)),
    "hook of a sum": (
        ".1, a BatchNorm2d with hooks of weight",
        lambda b: b[1].weight.register_post_accumulate_grad_hook(lambda p: None),
    ),
    "weight norm": (".0, a Conv2d with", lambda b: weight_norm(b[0])),
    "spectral norm": (".3.0, a Conv2d with", lambda b: spectral_norm(b[3][0])),
    "parametrized": (".0, a ParametrizedConv2d", lambda b: parametrizations.weight_norm(b[0])),
    "orthogonal": (".3.0, a ParametrizedConv2d", lambda b: parametrizations.orthogonal(b[3][0])),
    "pruned": (".0, a Conv2d with", lambda b: prune.l1_unstructured(b[0], "weight", 0.5)),
    "method": (".0, a Conv2d with forward()", lambda b: setattr(b[0], "forward", lambda x: x * 0)),
    "inner method": (
        ".0, a Conv2d with _conv_forward()", lambda b: setattr(b[0], "_conv_forward", lambda *a: a[0]),
    ),
    "method of a block": (", a Sequential with forward()", lambda b: setattr(b, "forward", lambda x: x)),
    "train of a class": (".3, a Frozen with train()", lambda b: b.__setitem__(3, Frozen(*b[3]))),
    "subclass": (".0.weight outside of a layer", lambda b: b.__setitem__(0, Twice(4, 4, 3))),
    "buffer of a layer": (".0, a Conv2d with a tensor 'mask'", lambda b: b[0].register_buffer("mask", torch.ones(4))),
    "buffer of an activation": (".2, a ReLU with a tensor 'n'", lambda b: b[2].register_buffer("n", torch.ones(()))),
    "parameter of a layer": (".1, a BatchNorm2d with a", lambda b: setattr(b[1], "extra", nn.Parameter(torch.ones(4)))),
    "buffer of a block": ("[1].mean: no", lambda b: b.register_buffer("mean", torch.ones(4))),
    "no parameter": (".0, a Conv2d without a parameter or buffer 'weight'", replace),
    "statistics outside": (".1, a BatchNorm2d with a tensor 'running_var' outside", statistics_outside),
    "statistics switched off": (".1, a BatchNorm2d with", lambda b: setattr(b[1], "track_running_stats", False)),
    "statistics removed": (".1, a BatchNorm2d without", lambda b: setattr(b[1], "running_var", None)),
    "fewer rows": (".0, a Conv2d whose 'weight' has shape [2, 4, 3, 3], not [4, 4, 3, 3]", narrow),
    "tied": (".3.0.weight, which is blocks[1].0.weight as well", tie),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSEEN)
def test_refused_by_name(name: str) -> None:
    message, change = UNSEEN[name]
    blocks = [plain() for _ in range(3)]
    FusedBlocks(blocks)
    change(blocks[1])
    with pytest.raises(TypeError) as error:
        FusedBlocks(blocks)
    assert "blocks[1]" in str(error.value)
    assert message in str(error.value)


def test_flat_blocks_are_fused() -> None:
    """Their state dicts are those of ordinary modules, though by a hook."""
    blocks, x = [plain().eval() for _ in range(3)], torch.randn(2, 4, 6, 6)
    for block in blocks:
        FlatParameters(block)
    fused = FusedBlocks(blocks)
    torch.testing.assert_close(fused(x), torch.cat([block(x) for block in blocks], 1), rtol=1e-4, atol=1e-4)
    blocks[1][0].register_state_dict_post_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"blocks\[1\]\.0, a Conv2d with state dict hooks"):
        FusedBlocks(blocks)


def double(*_: Any) -> None:
    raise AssertionError("called")


@pytest.mark.parametrize(
    "register",
    [
        "register_module_forward_pre_hook",
        "register_module_forward_hook",
        "register_module_full_backward_pre_hook",
        "register_module_full_backward_hook",
    ],
)
def test_hooks_of_all_modules_are_refused(register: str) -> None:
    fused = FusedBlocks([nn.Conv2d(4, 4, 1) for _ in range(3)])
    handle = getattr(torch.nn.modules.module, register)(double)
    try:
        for call in (fused.forward, lambda x: FusedBlocks([nn.Identity(), nn.Identity()])):
            with pytest.raises(TypeError, match=rf"the hook double of torch\.nn\.modules\.module\.{register}, which"):
                call(torch.ones(2, 4, 3, 3))
    finally:
        handle.remove()
    fused(torch.ones(2, 4, 3, 3))


def test_the_hooks_of_torchs_counter_are_no_hindrance() -> None:
    fused = FusedBlocks([nn.Conv2d(4, 4, 1) for _ in range(3)])
    with FlopCounterMode(display=False) as counter:
        fused(torch.ones(2, 4, 3, 3))
    assert counter.get_total_flops() == 2 * 3 * 2 * 4 * 4 * 9


def test_single_layers_are_refused_too() -> None:
    layers = [nn.Linear(3, 2) for _ in range(2)]
    prune.random_unstructured(layers[0], "weight", 0.5)
    with pytest.raises(TypeError, match=r"does not support blocks\[0\], a Linear with forward pre hooks"):
        FusedBlocks(layers)


class Block(nn.Module):
    """Layers for the functions below, each of which is the ``forward`` of a class of its own."""

    forward: Any

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.n, self.m = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.r, self.q, self.i = nn.ReLU(inplace=True), nn.LeakyReLU(0.1, inplace=True), nn.Identity()


def blocks_of(forward: Callable[..., Any]) -> list[nn.Module]:
    kind = type(forward.__name__, (Block,), {"forward": forward})
    blocks = [kind() for _ in range(3)]
    for block in blocks:
        for name in set("cdnmrqi") - set(forward.__code__.co_names):
            delattr(block, name)  # a layer that nothing uses would be refused
        if not hasattr(block, "n"):
            continue
        block.n.running_mean.normal_()
        block.n.running_var.uniform_(0.5, 2)
    return blocks


def module(s: Any, x: Tensor) -> Tensor:
    y = s.r(x)
    return s.n(s.c(y)) + s.m(s.d(x))


def activation(s: Any, x: Tensor) -> Tensor:
    y = s.n(s.c(x))
    return s.m(s.d(s.q(y))) + y


def function(s: Any, x: Tensor) -> Tensor:
    y = s.n(s.c(x))
    return s.m(s.d(F.relu(y, inplace=True))) + y


def position(s: Any, x: Tensor) -> Tensor:
    y = s.n(s.c(x))
    return s.m(s.d(F.relu(y, True))) + y


def method(s: Any, x: Tensor) -> Tensor:
    y = s.c(x).relu_()
    z = s.n(y).relu_()
    return s.m(s.d(z)) + x.relu_() + x


def behind_identity(s: Any, x: Tensor) -> Tensor:
    y = s.n(s.c(x))
    z = s.r(s.i(y))
    return s.m(s.d(z)) + y


def flat(s: Any, x: Tensor) -> Tensor:
    y = s.n(s.m(s.d(s.c(x))))
    z = s.r(y.flatten(1))
    return z + y.flatten(1)


def sum_in_place(s: Any, x: Tensor) -> Tensor:
    y = s.m(s.c(x))
    z = y.add_(s.n(x))
    return s.d(z) + y


def augmented(s: Any, x: Tensor) -> Tensor:
    y = same = s.m(s.c(x))
    y += s.n(x)
    return s.d(y) + same


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (module, "blocks[0].r"), (activation, "blocks[0].q"), (function, "relu()"), (position, "relu()"),
        (method, "relu_()"), (behind_identity, "blocks[0].r"), (flat, "blocks[0].r"), (sum_in_place, "add_()"),
        (augmented, "iadd()"),
    ],
)  # fmt: skip
def test_values_read_again_after_an_operation_in_place(forward: Callable[..., Any], name: str) -> None:
    with pytest.raises(TypeError, match=r"works in place on a value that blocks\[0\] reads again") as error:
        FusedBlocks(blocks_of(forward))
    assert name in str(error.value)


def chain(s: Any, x: Tensor) -> Tensor:
    return s.m(s.d(s.q(s.r(s.n(s.c(x))))))


def shortcut(s: Any, x: Tensor) -> Tensor:
    y = s.m(s.d(s.r(s.n(s.c(x)))))
    y += x
    return F.relu(y, inplace=True)


def later_value(s: Any, x: Tensor) -> Tensor:
    y = s.r(s.i(s.n(s.c(x))))
    return s.m(s.d(y)) + y


def first(s: Any, x: Tensor) -> Tensor:
    y = s.q(x)
    return s.m(s.d(s.n(s.c(y)))).add_(y)


@pytest.mark.sampled
@pytest.mark.parametrize("lowering", [None, *LOWERINGS])
@pytest.mark.parametrize("forward", [chain, shortcut, later_value, first])
def test_operations_in_place_whose_old_value_nobody_reads(lowering: Any, forward: Callable[..., Any]) -> None:
    blocks, x = blocks_of(forward), torch.randn(2, 4, 6, 6)
    fused = FusedBlocks(blocks, lowering=lowering)
    for training in (True, False):
        expected = torch.cat([block.train(training)(x.clone()) for block in blocks], 1)
        before = x.clone()
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(fused.train(training)(x), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(x, before)


def by_mode(s: Any, x: Tensor) -> Tensor:
    return s.n(s.c(x)) + x if s.training else s.n(s.c(x))


def by_inner_mode(s: Any, x: Tensor) -> Tensor:
    return s.r(s.n(x)) if s.n.training else s.n(x)


def by_recording(s: Any, x: Tensor) -> Tensor:
    return s.d(s.c(x)) if torch.is_grad_enabled() else s.c(x)


def frozen_part(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = s.c(x)
    return s.d(y)


def recorded_part(s: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return s.c(x)


def precise_part(s: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = s.c(x)
    return s.d(y)


def half_part(s: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return s.c(x)


def scaled_sum(s: Any, x: Tensor) -> Tensor:
    return torch.add(s.c(x), x, alpha=2)


def sum_into(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    return torch.add(y, s.n(x), out=y)


@pytest.mark.parametrize(
    "forward",
    [by_mode, by_inner_mode, by_recording, frozen_part, recorded_part, precise_part, half_part, scaled_sum, sum_into],
)
@pytest.mark.parametrize("training", [True, False])
def test_code_that_depends_on_modes_and_contexts(forward: Callable[..., Any], training: bool) -> None:
    blocks = [block.train(training) for block in blocks_of(forward)]
    with torch.set_grad_enabled(training), pytest.raises(TypeError, match=r"blocks\[0\]"):
        FusedBlocks(blocks)
    assert all(layer.training is training for block in blocks for layer in block.modules())
    assert not torch.is_autocast_enabled("cpu")


def half_shortcut(s: Any, x: Tensor) -> Tensor:
    y = s.n(s.c(x))
    y += x  # keeps the 16 bits of y, where y + x has 32
    return s.r(y)


def full_shortcut(s: Any, x: Tensor) -> Tensor:
    return s.r(s.n(s.c(x)) + x)


AUTOCAST: dict[str, Callable[[], list[nn.Module]]] = {
    "convolution": lambda: [nn.Conv2d(4, 4, 3) for _ in range(3)],
    "stage": lambda: [plain() for _ in range(3)],
    "norm": lambda: [nn.BatchNorm2d(4) for _ in range(3)],
    "group norm": lambda: [nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)) for _ in range(3)],
    "linear": lambda: [nn.Linear(6, 5) for _ in range(3)],
    "sum in place": lambda: blocks_of(half_shortcut),
    "sum": lambda: blocks_of(full_shortcut),
}


@pytest.mark.sampled
@pytest.mark.parametrize("lowering", [None, *LOWERINGS])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_gives_the_dtype_of_the_blocks(name: str, shared: bool, lowering: Any) -> None:
    blocks = AUTOCAST[name]()
    x = torch.randn(2, 4 if shared else 12, 6, 6)
    each = [x] * 3 if shared else list(x.chunk(3, 1))
    fused = FusedBlocks(blocks, shared=shared, lowering=lowering)
    for training, recorded in ((True, True), (False, True), (False, False)):
        fused.train(training)
        with torch.set_grad_enabled(recorded), torch.autocast("cpu", torch.bfloat16):
            expected = torch.cat([b.train(training)(part) for b, part in zip(blocks, each, strict=True)], 1)
            result = fused(x)
        torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)  # with the dtype
