"""FusedBlocks where something does not fit: errors that say so, and never a read beyond what the core was given."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedkern.ops import FusedBlocks
from fedkern.ops._fuse.blocks import folded as folding
from fedkern.ops._fuse.blocks.choice import LOWERINGS
from fedkern.ops._fuse.blocks.conv import MAX_COLUMNS
from python_tests.ops._fuse.blocks.test_fused_blocks import make

WAYS = [None, *LOWERINGS]


def joined(blocks: list[nn.Module], x: Tensor) -> Tensor:
    return torch.cat([block(x) for block in blocks], 1)


@pytest.mark.sampled
@pytest.mark.parametrize("lowering", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["residual", "adaptor", "perceptron"])
@torch.no_grad()
def test_weights_of_another_dtype(lowering: str | None, dtype: torch.dtype, name: str) -> None:
    """The core reads fp32: weights of another dtype, from the start or later, are torch's to compute or refuse."""
    blocks = [block.eval() for block in make(name)]
    x = torch.randn(2, 6, 8, 8)
    later = FusedBlocks(blocks, lowering=lowering)  # type: ignore[arg-type]
    wanted = later(x)
    blocks = [copy.deepcopy(block).to(dtype) for block in blocks]
    for fused in (FusedBlocks(blocks, lowering=lowering), later.to(dtype)):  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="same"):
            fused(x)
        with pytest.raises(RuntimeError, match="same"):
            blocks[0](x)
        loose = 0.1 if dtype is torch.bfloat16 else 1e-4
        torch.testing.assert_close(fused(x.to(dtype)).float(), wanted, rtol=loose, atol=loose)
    torch.testing.assert_close(later.float()(x), wanted, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("lowering", WAYS)
@torch.no_grad()
def test_one_tensor_of_another_dtype(lowering: str | None) -> None:
    """Each tensor that is folded counts, not the first: a bias alone, and a batch norm's, which folding casts."""
    blocks = [nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval() for _ in range(3)]
    x = torch.randn(2, 6, 8, 8)
    fused = FusedBlocks(blocks, lowering=lowering)  # type: ignore[arg-type]
    wanted = fused(x)
    fused.get_submodule("branches.1").double()
    torch.testing.assert_close(fused(x), wanted)
    fused.get_submodule("branches.2").double()
    with pytest.raises(RuntimeError, match="same"):
        fused(x)


@pytest.mark.parametrize("lowering", WAYS)
@torch.no_grad()
def test_autocast_casts_weights(lowering: str | None) -> None:
    blocks = [block.eval() for block in make("residual")]
    x = torch.randn(2, 6, 8, 8)
    wanted = joined(blocks, x)
    for weights in (torch.float32, torch.bfloat16):
        fused = FusedBlocks([block.to(weights) for block in blocks], lowering=lowering)  # type: ignore[arg-type]
        for given in (x, x.bfloat16()):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                torch.testing.assert_close(fused(given).float(), wanted, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("lowering", WAYS)
@torch.no_grad()
def test_parameters_of_another_shape(lowering: str | None) -> None:
    fused = FusedBlocks([nn.Conv2d(3, 4, 3).eval() for _ in range(2)], lowering=lowering)  # type: ignore[arg-type]
    weight, bias = fused.branches.layer.weight, fused.branches.layer.bias
    x = torch.randn(2, 3, 8, 8)
    for tensor, changed in ((bias, bias[:1].clone()), (weight, weight[:, :, :2].clone())):
        before, tensor.data = tensor.data, changed
        with pytest.raises(ValueError, match=r"must have weights \[8, 3, 3, 3\] and a bias each, not \["):
            fused(x)
        tensor.data = before
        fused(x)


class Joined(nn.Module):
    """A sum of two maps of which one is pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 3, 1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.pool(x)


def late(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *layers)


SHAPES = [
    (nn.Conv2d(3, 8, 3), (2, 5, 8, 8), r"x must have 3 channels, which each block reads, not 5: its shape is \[2, 5,"),
    (nn.Conv2d(3, 8, 3), (2, 2, 8, 8), r"x must have 3 channels, which each block reads, not 2"),
    (nn.Conv2d(4, 8, 3, groups=2), (2, 40000, 8, 8), r"x must have 4 channels, which each block reads, not 40000"),
    (late(), (2, 40000, 8, 8), r'x must have 3 channels, which layer "0" of each block reads, not 40000'),
    (nn.Conv2d(3, 8, 3), (3, 8, 8), r"x must have shape \[B, C, H, W\], not \[3, 8, 8\]"),
    (nn.MaxPool2d(2), (3, 8, 8), r"x must have shape \[B, C, H, W\], not \[3, 8, 8\]"),
    (nn.BatchNorm1d(3), (2, 3, 8, 8), r"x must have shape \[B, C\] or \[B, C, L\], not \[2, 3, 8, 8\]"),
    (nn.BatchNorm2d(3), (2, 4, 8, 8), r"x must have 3 channels, which each block reads, not 4"),
    (nn.GroupNorm(1, 3, affine=False), (2, 4, 8), r"x must have 3 channels, which each block reads, not 4"),
    (nn.Linear(3, 4), (2, 4), r"x must have 3 channels, which each block reads, not 4"),
    (
        nn.Conv2d(3, 8, 5),
        (2, 3, 4, 9),
        r"\[2, 3, 4, 9\] is too small: each block convolves with 5 x 5 .* maps of 4 x 9",
    ),
    (late(nn.Conv2d(8, 4, 3, 2, dilation=2, padding=1)), (1, 3, 9, 2), r'\[1, 3, 9, 2\] is too small: layer "2" of'),
    (late(nn.MaxPool2d(4)), (2, 3, 2, 2), r'x of shape \[2, 3, 2, 2\] does not fit layer "2" of each block: '),
    (Joined(), (2, 3, 8, 8), r"\[2, 3, 8, 8\] does not fit: the blocks add maps of \[3, 8, 8\] and \[3, 4, 4\]"),
    (
        late(nn.Flatten(), nn.Linear(8 * 16, 2)),
        (2, 3, 5, 4),
        r'x of shape \[2, 3, 5, 4\] does not fit: layer "3" of each block reads 128 features and is given 160',
    ),
]


@pytest.mark.sampled
@pytest.mark.parametrize("lowering", WAYS)
@pytest.mark.parametrize(("block", "shape", "message"), SHAPES)
def test_wrong_shapes(lowering: str | None, block: nn.Module, shape: tuple[int, ...], message: str) -> None:
    fused = FusedBlocks([block] * 3, lowering=lowering)  # type: ignore[arg-type]
    for module in (fused, fused.eval()):
        with torch.no_grad():
            for _ in range(2):
                with pytest.raises(ValueError, match=message):
                    module(torch.randn(shape))
        with pytest.raises(ValueError, match=message):
            module(torch.randn(shape))


def test_wrong_shapes_where_each_branch_has_an_input() -> None:
    fused = FusedBlocks([nn.Conv2d(3, 8, 3)] * 4, shared=False)
    with pytest.raises(ValueError, match=r"x must have 4 \* 3 channels, which each block reads, not 20: its"):
        fused(torch.randn(2, 20, 8, 8))
    with pytest.raises(ValueError, match=r"x must have shape \[B, 4 \* C, H, W\], not \[12, 8, 8\]"):
        fused(torch.randn(12, 8, 8))


def test_wrong_number_of_axes_under_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(FusedBlocks([nn.Conv2d(3, 8, 3)] * 2), backend="eager")
    with pytest.raises(Exception, match=r"x must have shape \[B, C, H, W\], not \[3, 8, 8\]"):
        compiled(torch.randn(3, 8, 8))
    torch._dynamo.reset()


def test_layers_that_want_other_axes_than_they_get() -> None:
    with pytest.raises(TypeError, match="does not support blocks whose layers want maps of different numbers of axes"):
        FusedBlocks([nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4))])


@pytest.mark.sampled
@pytest.mark.parametrize(
    "make_block",
    [
        lambda: nn.Conv2d(2, 2, 3, padding=1),
        lambda: nn.Conv2d(2, 3, 5, 2, 3),
        lambda: nn.Conv2d(2, 3, (1, 3), padding="same"),
        lambda: nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=9) for _ in range(3))),
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1, padding=9), nn.MaxPool2d(2), nn.Conv2d(2, 2, 1)),
    ],
)
@pytest.mark.parametrize("lowering", [None, "direct"])
@torch.no_grad()
def test_maps_as_wide_as_the_core_takes_and_wider(make_block: object, lowering: str | None) -> None:
    """Maps that grow on the way, or are too wide from the start, take another way."""
    blocks = [make_block().eval() for _ in range(5)]  # type: ignore[operator]
    fused = FusedBlocks(blocks, lowering=lowering)  # type: ignore[arg-type]
    for width in (MAX_COLUMNS // 2, *range(MAX_COLUMNS - 20, MAX_COLUMNS + 3), 2 * MAX_COLUMNS + 1):
        x = torch.randn(1, 2, 4, width)
        torch.testing.assert_close(fused(x), joined(blocks, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lowering", WAYS)
@torch.no_grad()
def test_changes_that_torch_does_not_count(lowering: str | None) -> None:
    fused = FusedBlocks([block.eval() for block in make("residual")], lowering=lowering)  # type: ignore[arg-type]
    x = torch.randn(2, 6, 8, 8)
    for change in (
        lambda: fused.branches.conv1.weight.data.mul_(2),
        lambda: fused.branches.bn2.weight.data.neg_(),
        lambda: fused.branches.bn1.running_mean.numpy().__iadd__(1),
    ):
        before = fused(x)
        change()
        fused.refold()
        wanted = joined(fused.split(), x)
        assert not torch.allclose(before, wanted, atol=1e-3)
        torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_that_change_while_another_thread_packs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made of the old weights is not kept for the new ones."""
    fused = FusedBlocks([nn.Sequential(nn.Conv2d(3, 4, 3)).eval() for _ in range(2)], lowering="direct")
    x, original, changed = torch.randn(2, 3, 8, 8), folding.pack, []

    def pack(*arguments: Any) -> Tensor:
        if not changed:
            changed.append(True)
            for parameter in fused.parameters():
                parameter.add_(1)
            fused(x)  # as another thread would
        return original(*arguments)

    monkeypatch.setattr(folding, "pack", pack)
    fused(x)
    assert changed
    torch.testing.assert_close(fused(x), joined(fused.split(), x))


@pytest.mark.sampled
@pytest.mark.parametrize("lowering", WAYS)
@pytest.mark.parametrize("name", ["residual", "adaptor", "perceptron", "identity"])
def test_built_in_inference_mode(lowering: str | None, name: str) -> None:
    x = torch.randn(2, 6, 8, 8)
    with torch.inference_mode():
        blocks = [block.eval() for block in make(name)]
        fused = FusedBlocks(blocks, lowering=lowering)  # type: ignore[arg-type]
        wanted = joined(blocks, x)
        torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-5)
        for parameter in fused.parameters():
            parameter.mul_(1.5)
        wanted = joined(fused.split(), x)
        torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-5)
        wanted = wanted.clone()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(fused)(x), wanted, rtol=1e-4, atol=1e-5)
    if list(fused.parameters()):
        out = fused.train()(x)
        out.square().mean().backward()
        assert all(p.grad is not None for p in fused.parameters())


@pytest.mark.parametrize("lowering", WAYS)
@torch.inference_mode()
def test_parameters_that_count_no_changes(lowering: str | None) -> None:
    """Inference tensors put in place of the parameters are folded in every call."""
    fused = FusedBlocks([block.eval() for block in make("residual")], lowering=lowering)  # type: ignore[arg-type]
    x = torch.randn(2, 6, 8, 8)
    fused.load_state_dict({key: value.clone() for key, value in fused.state_dict().items()}, assign=True)
    assert fused.branches.conv1.weight.is_inference()
    before = fused(x)
    fused.branches.conv1.weight.mul_(2)
    wanted = joined(fused.split(), x)
    assert not torch.allclose(before, wanted, atol=1e-3)
    torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-5)


def perceptrons(kind: str) -> list[nn.Module]:
    def one() -> nn.Module:
        hidden = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5, bias=False))
        if kind == "flat":
            return nn.Sequential(hidden, nn.Flatten(), nn.LazyLinear(2))
        return nn.Linear(4, 5) if kind == "linear" else hidden

    return [one() for _ in range(3)]


@pytest.mark.sampled
@pytest.mark.parametrize("lowering", WAYS)
@pytest.mark.parametrize("kind", ["linear", "hidden", "flat"])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 6, 7, 4), (0, 3, 4), (5, 1, 4)])
@pytest.mark.parametrize("shared", [True, False])
def test_linear_layers_over_the_last_axis(
    lowering: str | None, kind: str, shape: tuple[int, ...], shared: bool
) -> None:
    blocks = perceptrons(kind)
    for block in blocks:
        block(torch.randn(1, *shape[1:]))  # gives lazy layers their shape
    fused = FusedBlocks(blocks, lowering=lowering, shared=shared)  # type: ignore[arg-type]
    each = [torch.randn(shape)] * 3 if shared else [torch.randn(shape) for _ in range(3)]
    x = each[0] if shared else torch.cat(each, 1)
    wanted = torch.cat([block(part) for block, part in zip(blocks, each, strict=True)], 1)
    for folded in (False, True):
        with torch.set_grad_enabled(not folded):
            torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.func.vmap(fused)(x[None])[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lowering", WAYS)
@torch.no_grad()
def test_linear_layers_between_convolutions(lowering: str | None) -> None:
    blocks = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(8, 6), nn.Conv2d(4, 2, 3)) for _ in range(3)]
    fused = FusedBlocks(blocks, lowering=lowering)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 5, 8)
    torch.testing.assert_close(fused(x), joined(blocks, x), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fused(x).float(), joined(blocks, x).float(), rtol=0.1, atol=0.1)


def test_one_mode_and_one_set_of_trained_parameters() -> None:
    """What is one tensor or one layer in the end must be in one state in all blocks."""
    for name in ("residual", "VGG"):
        for change, message in (
            (
                lambda b: b.eval(),
                r"blocks\[2\]\.\S+ must be in training mode, as blocks\[0\]\.\S+ is, not in evaluation",
            ),
            (
                lambda b: b.requires_grad_(False),
                r"blocks\[2\]\.\S+\.weight must have requires_grad=True, as blocks\[0\]",
            ),
            (
                lambda b: list(b.parameters())[-1].requires_grad_(False),
                r"blocks\[2\]\.\S+\.bias must have requires_grad",
            ),
        ):
            blocks = make(name)
            change(blocks[2])
            with pytest.raises(ValueError, match=message):
                FusedBlocks(blocks)
            for block in blocks[:2]:
                change(block)
            fused = FusedBlocks(blocks)
            for module, block in zip(fused.split(), blocks, strict=True):
                assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in block.parameters()]
                assert module.training == block.training
    norms: list[nn.Module] = [nn.BatchNorm2d(3).eval(), nn.BatchNorm2d(3)]
    with pytest.raises(
        ValueError, match=r"blocks\[1\] must be in evaluation mode, as blocks\[0\] is, not in training mode"
    ):
        FusedBlocks(norms)
    FusedBlocks([norm.eval() for norm in norms])


@pytest.mark.sampled
@pytest.mark.parametrize("lowering", WAYS)
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("name", ["residual", "adaptor"])
def test_optimizers_are_followed(lowering: str | None, options: dict[str, bool], kind: type, name: str) -> None:
    """A fused optimizer's steps count as no changes: what may be trained is folded anew after a recorded call."""
    fused = FusedBlocks([block.eval() for block in make(name)], lowering=lowering)  # type: ignore[arg-type]
    optimizer = kind(fused.parameters(), lr=0.1, **options)
    x = torch.randn(2, 6, 8, 8)
    for _ in range(2):
        with torch.no_grad():
            before = fused(x)
        optimizer.zero_grad()
        fused(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            wanted = joined(fused.split(), x)
            assert (before - wanted).abs().max() > 1e-2
            torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-4)
