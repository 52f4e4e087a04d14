"""FusedBlocks against M separate modules: outputs, gradients, running statistics, the way back."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedkern.models import resnet
from fedkern.ops import FusedBlocks
from fedkern.ops._fuse.blocks.choice import LOWERINGS


def vgg(channels: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (channels, width):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.MaxPool2d(2))


class PreActivation(nn.Module):
    """A user's own block: other order, other operators, a strided grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 6)
        self.depthwise = nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=6)
        self.act = nn.SiLU()
        self.pointwise = nn.Conv2d(12, 5, 1, bias=False)
        self.skip = nn.Conv2d(6, 5, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.depthwise(torch.relu(self.norm(x))))
        return torch.add(self.pointwise(y), self.skip(x)).relu()


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(6 * 64, 7), nn.BatchNorm1d(7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.norm(self.one(torch.flatten(x, 1)))))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: resnet.BasicBlock(6, 6),
    "residual, stride 2": lambda: resnet.BasicBlock(6, 8, 2),
    "stem": lambda: resnet.ResNet((1,), classes=2, channels=6, width=4).layer1,
    "imagenet stem": lambda: resnet.ResNet((1,), classes=2, channels=6, width=4, stem="imagenet").layer1,
    "ResNet-8 without its head": lambda: nn.Sequential(
        *list(resnet.ResNet((1, 1, 1), classes=2, channels=6, width=3).children())[:3]
    ),
    "ResNet-18 stage": lambda: resnet.ResNet((2, 2, 2, 2), classes=2, channels=6, width=3).layer2[:1],
    "VGG": lambda: vgg(6, 5),
    "adaptor": lambda: nn.Conv2d(6, 4, 1),
    "adaptor and block": lambda: nn.Sequential(nn.Conv2d(6, 4, 1), resnet.BasicBlock(4, 4)),
    "own block": PreActivation,
    "perceptron": Perceptron,
    "pool alone": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "identity": nn.Identity,
}


def make(name: str, count: int = 3) -> list[nn.Module]:
    """Blocks as after some training: no statistics or parameters at their defaults."""
    blocks = [BLOCKS[name]() for _ in range(count)]
    for block in blocks:
        for layer in block.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
                layer.num_batches_tracked.random_(0, 9)
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias)
    return blocks


def channels(name: str) -> int:
    return 3 if name == "ResNet-18 stage" else 6


def inputs(name: str, count: int, shared: bool) -> tuple[Tensor, list[Tensor]]:
    x = torch.randn(4, channels(name) * (1 if shared else count), 8, 8)
    return x, [x] * count if shared else list(x.tensor_split(count, 1))


@pytest.mark.sampled
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("shared", [True, False])
def test_training_step(name: str, lowering: str, shared: bool) -> None:
    blocks = make(name)
    fused = FusedBlocks(blocks, shared=shared, lowering=lowering).double()
    blocks = [block.double() for block in blocks]
    x, each = inputs(name, 3, shared)
    whole = x.double().requires_grad_()
    parts = [part.double().requires_grad_() for part in each]
    out, wanted = fused(whole), torch.cat([block(part) for block, part in zip(blocks, parts, strict=True)], 1)
    torch.testing.assert_close(out, wanted)
    assert all(torch.equal(a, b) for a, b in zip(fused.maps(out), out.chunk(3, 1), strict=True))
    grad = torch.randn_like(wanted)
    out.backward(grad)
    wanted.backward(grad)
    expected = [part.grad for part in parts]
    torch.testing.assert_close(whole.grad, sum(expected) if shared else torch.cat(expected, 1))
    given = [dict(block.named_parameters()) for block in blocks]
    for key, parameter in fused.branches.named_parameters():
        key = key.removeprefix("layer.") if name == "adaptor" else key
        torch.testing.assert_close(parameter.grad, torch.cat([own[key].grad for own in given]))
    # Running statistics, and how many batches they have seen.
    for state, block in zip(fused.state_dicts(), blocks, strict=True):
        torch.testing.assert_close(dict(state), dict(block.state_dict()))


@pytest.mark.sampled
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("fold", [True, False])
def test_evaluation(name: str, lowering: str, shared: bool, fold: bool) -> None:
    blocks = [block.eval() for block in make(name)]
    fused = FusedBlocks(blocks, shared=shared, fold=fold, lowering=lowering)
    assert not fused.training
    x, each = inputs(name, 3, shared)
    for layout in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad():
            wanted = torch.cat([block(part) for block, part in zip(blocks, each, strict=True)], 1)
            torch.testing.assert_close(fused(x.contiguous(memory_format=layout)), wanted, rtol=1e-4, atol=1e-5)
    before = [buffer.clone() for buffer in fused.buffers()]
    torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-5)  # recorded: nothing is folded
    assert all(torch.equal(a, b) for a, b in zip(before, fused.buffers(), strict=True))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("count", [1, 4])
def test_round_trip_is_exact(name: str, count: int) -> None:
    blocks = make(name, count)
    if name == "VGG":
        blocks = [block.to(memory_format=torch.channels_last) for block in blocks]
        blocks[0][0].requires_grad_(False), [block[0].requires_grad_(False) for block in blocks]
    fused = FusedBlocks(blocks)
    states = fused.state_dicts()
    modules = fused.split()
    for block, state, module in zip(blocks, states, modules, strict=True):
        assert type(module) is type(block)
        for other in (state, module.state_dict()):
            own = block.state_dict()
            assert list(other) == list(own)
            for key, tensor in own.items():
                assert other[key].dtype == tensor.dtype
                assert torch.equal(other[key], tensor)
        assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in block.parameters()]
        assert module.training == block.training
    other = FusedBlocks(make(name, count))
    other.load_state_dicts(states)
    for a, b in zip(other.state_dict().items(), fused.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])
    other = copy.deepcopy(fused).eval()
    fused.eval()
    x = torch.randn(2, channels(name), 8, 8)
    with torch.no_grad():
        assert torch.equal(other(x), fused(x))


def test_folded_weights_follow_the_parameters() -> None:
    blocks = [block.eval() for block in make("residual")]
    x = torch.randn(2, 6, 8, 8)
    for lowering, change in itertools.product(
        LOWERINGS,
        (
            lambda f: f.branches.conv1.weight.mul_(2),
            lambda f: f.branches.bn2.running_var.mul_(3),
            lambda f: f.load_state_dicts([b.state_dict() for b in make("residual")]),
            lambda f: setattr(f.branches.bn1.bias, "data", torch.randn(18)),
        ),
    ):
        fused = FusedBlocks(blocks, lowering=lowering).eval()
        with torch.no_grad():
            before = fused(x)
            change(fused)
            wanted = torch.cat([block(x) for block in fused.split()], 1)
            assert not torch.allclose(before, wanted, atol=1e-3)
            torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-5)


def test_frozen_blocks_pass_gradients_to_their_input() -> None:
    blocks = [block.eval().requires_grad_(False) for block in make("residual")]
    fused = FusedBlocks(blocks)
    x, y = (torch.ones(2, 6, 8, 8).requires_grad_() for _ in range(2))
    fused(x).square().sum().backward()
    torch.cat([block(y) for block in blocks], 1).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in fused.parameters())


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_layers_keep_their_own_mode(lowering: str) -> None:
    x = torch.randn(4, 6, 8, 8)
    for change in (lambda block: block[1:], lambda block: (block[1].train(), block[1].bn1.eval(), block)[2]):
        blocks = [change(nn.Sequential(nn.Identity(), block).eval()) for block in make("residual")]
        fused = FusedBlocks(blocks, lowering=lowering)  # type: ignore[arg-type]
        with torch.no_grad():
            wanted = torch.cat([block(x) for block in blocks], 1)
            torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-5)
        for state, block, again in zip(fused.state_dicts(), blocks, fused.split(), strict=True):
            torch.testing.assert_close(dict(state), dict(block.state_dict()))
            layers = zip(again.modules(), block.modules(), strict=True)
            assert all(a.training == b.training for a, b in layers if not list(a.children()))


def test_training_continues_as_the_blocks_would() -> None:
    blocks = [block.double() for block in make("residual, stride 2")]
    fused = FusedBlocks(blocks)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (fused, *blocks)]
    for _ in range(3):
        x = torch.randn(4, 6, 8, 8, dtype=torch.float64)
        losses = [fused(x).square().mean() * 3, *(block(x).square().mean() for block in blocks)]
        for optimiser, loss in zip(optimisers, losses, strict=True):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    for state, block in zip(fused.state_dicts(), blocks, strict=True):
        torch.testing.assert_close(dict(state), dict(block.state_dict()))


def test_batch_norms_that_average_over_all_batches() -> None:
    """With momentum=None a branch's statistics weigh a batch by how many it has seen."""
    blocks = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=None)) for _ in range(3)]
    for count, block in enumerate(blocks):
        block[1].num_batches_tracked.fill_(count)
    fused = [FusedBlocks(blocks, lowering=lowering) for lowering in LOWERINGS]
    x = torch.randn(4, 3, 5, 5)
    for module in (*fused, *blocks):
        module(x)
    for one in fused:
        for state, block in zip(one.state_dicts(), blocks, strict=True):
            torch.testing.assert_close(dict(state), dict(block.state_dict()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lowering", ["grouped", "separate"])
def test_the_gradient_of_a_batch_of_one_has_the_maps_layout(training: bool, lowering: str) -> None:
    """torch's own batch norm reads the gradient of channels behind as one of rows of pixels (2.13)."""
    for first, shape in itertools.product((nn.Conv2d(6, 6, 1), nn.Identity()), ((1, 6, 4, 5), (3, 6, 1, 5))):
        blocks = [nn.Sequential(copy.deepcopy(first), nn.BatchNorm2d(6)).train(training) for _ in range(2)]
        fused = FusedBlocks(blocks, lowering=lowering)
        x = torch.randn(shape).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        leaves = [x, *fused.parameters()]
        y = fused(x)
        grad = torch.randn_like(y)
        usual = torch.empty_like(y).copy_(grad)
        expected = torch.autograd.grad(y, leaves, usual, retain_graph=True)
        for read in (lambda y: y.squeeze(0).movedim(-3, -1), lambda y: y.flatten(2).mT):
            got = torch.autograd.grad(read(y), leaves, read(grad).contiguous(), retain_graph=True)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_empty_batch_and_other_dtypes() -> None:
    blocks = [block.eval() for block in make("residual")]
    with torch.no_grad():
        assert FusedBlocks(blocks)(torch.randn(0, 6, 8, 8)).shape == (0, 18, 8, 8)
        for dtype in (torch.float64, torch.bfloat16):
            fused = FusedBlocks([copy.deepcopy(block).to(dtype) for block in blocks])
            x = torch.randn(2, 6, 8, 8).to(dtype)
            wanted = torch.cat([block(x.float()) for block in blocks], 1)
            loose = 0.1 if dtype is torch.bfloat16 else 1e-4
            torch.testing.assert_close(fused(x).float(), wanted, rtol=loose, atol=loose)


@pytest.mark.sampled(14)
@pytest.mark.parametrize(
    ("width", "kernel", "stride", "padding", "dilation", "size"),
    [
        (1, 1, 1, 0, 1, (1, 1)),
        (14, 3, 1, 1, 1, (16, 16)),
        (29, 3, 2, 1, 1, (17, 32)),
        (20, 3, 1, 2, 2, (9, 7)),
        (15, (5, 2), 1, (2, 0), 1, (6, 33)),
        (64, 7, 3, 3, 1, (20, 40)),
        (7, 1, 2, 0, 1, (8, 8)),
        (3, 3, 1, 1, 1, (3, 251)),
        (3, 3, 1, 1, 1, (2, 300)),  # too wide: another way
        (6, 4, 5, 0, 1, (19, 24)),
        (5, 3, 2, 0, 3, (30, 31)),
    ],
)
@pytest.mark.parametrize("shared", [True, False])
def test_direct_convolution(
    backend: str, width: int, kernel: object, stride: int, padding: object, dilation: int, size: tuple, shared: bool
) -> None:
    blocks = [nn.Conv2d(5, width, kernel, stride, padding, dilation).eval() for _ in range(3)]  # type: ignore[arg-type]
    fused = FusedBlocks(blocks, shared=shared, lowering="direct")
    whole = torch.randn(3, 5 if shared else 15, *size)
    each = [whole] * 3 if shared else whole.chunk(3, 1)
    with torch.no_grad():
        out = fused(whole)
        wanted = torch.cat([block.double()(part.double()) for block, part in zip(blocks, each, strict=True)], 1)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    if backend.startswith("cpu") and max(size) <= 251:
        assert out.is_contiguous()


def test_direct_way_in_chunks_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedkern.ops._fuse.blocks import lowering as fuse_lowering

    blocks = [nn.Sequential(block, nn.MaxPool2d(2), nn.Conv2d(6, 2, 1)).eval() for block in make("residual")]
    fused = FusedBlocks(blocks, lowering="direct")
    x = torch.randn(7, 6, 16, 16)
    with torch.no_grad():
        whole = fused(x)
        monkeypatch.setattr(fuse_lowering, "CHUNK_BYTES", 2 * 18 * 256 * 4)
        assert torch.equal(fused(x), whole)
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            assert torch.equal(fused(x), whole)
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(whole, torch.cat([block(x) for block in blocks], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_large_results_in_pieces(monkeypatch: pytest.MonkeyPatch, lowering: str) -> None:
    """What looks at one sample at a time may be computed so; batch norms without running statistics may not."""
    from fedkern.ops._fuse.blocks import lowering as fuse_lowering

    for layers in (
        [nn.Conv2d(6, 5, 1), nn.ReLU()],
        [nn.Conv2d(6, 5, 3, 2), nn.BatchNorm2d(5, track_running_stats=False)],
        [nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    ):
        blocks = [nn.Sequential(*copy.deepcopy(layers)).eval() for _ in range(3)]
        for block in blocks:
            nn.init.normal_(block[0].weight)
        fused = FusedBlocks(blocks, lowering=lowering)
        x = torch.randn(7, 6, 8, 8)
        with torch.no_grad(), monkeypatch.context() as patch:
            wanted = torch.cat([block(x) for block in blocks], 1)
            whole = fused(x)
            patch.setattr(fuse_lowering, "FRESH_BYTES", 1000)
            patch.setattr(fuse_lowering, "PIECE_BYTES", 2 * 15 * 64 * 4)
            patch.setattr(fuse_lowering, "CHUNK_BYTES", 2 * 15 * 64 * 4)
            pieces = fused(x)
            assert pieces.stride() == whole.stride()
            torch.testing.assert_close(pieces, wanted, rtol=1e-4, atol=1e-5)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.scale


def conv(width: int = 4, **options: object) -> nn.Conv2d:
    return nn.Conv2d(3, width, 1, **options)  # type: ignore[arg-type]


WRONG = [
    ([], ValueError, "blocks must hold at least one module"),
    ([conv(), 3], TypeError, r"blocks\[1\] must be a module, not int"),
    ([nn.Sequential(conv(), nn.Dropout())], TypeError, r"does not support blocks\[0\]\.1, a Dropout"),
    ([nn.Sequential(conv(), nn.Sequential(nn.Softmax()))], TypeError, r"does not support blocks\[0\]\.1\.0, a Softmax"),
    ([conv(padding_mode="circular")], TypeError, r"blocks\[0\] with padding_mode='circular'"),
    ([nn.MaxPool2d(2, return_indices=True)], TypeError, r"blocks\[0\] with return_indices=True"),
    ([Scaled()], TypeError, r"does not support the use of blocks\[0\]\.scale outside"),
    ([Branching()], TypeError, r"blocks\[0\] \(Branching\) cannot be taken apart"),
    ([TwoInputs()], TypeError, r"blocks\[0\] must take one input, but it also takes y"),
    ([conv(), conv(5)], ValueError, r"blocks\[1\] must be like blocks\[0\]"),
    ([nn.Sequential(conv()), nn.Sequential(conv(stride=2))], ValueError, r"blocks\[1\]\.0 must be like blocks\[0\]\.0"),
    ([nn.Sequential(conv()), nn.Sequential(conv(), nn.ReLU())], ValueError, r"blocks\[1\] must have the steps of"),
    ([conv(), conv().double()], ValueError, r"blocks\[1\] must be like blocks\[0\]"),
]


@pytest.mark.parametrize(("blocks", "error", "message"), WRONG)
def test_what_is_not_supported_is_named(blocks: list, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        FusedBlocks(blocks)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="lowering must be None or one of grouped, separate, direct"):
        FusedBlocks([conv()], lowering="fast")
    fused = FusedBlocks([conv(), conv()], shared=False)
    with pytest.raises(TypeError, match="x must be a tensor, not list"):
        fused([1])
    with pytest.raises(ValueError, match=r"x must have shape \[B, 2 \* C, ...\], not \[1, 3, 4, 4\]"):
        fused(torch.zeros(1, 3, 4, 4))
    states = fused.state_dicts()
    with pytest.raises(ValueError, match="states must hold 2 state dicts, not 1"):
        fused.load_state_dicts(states[:1])
    with pytest.raises(ValueError, match=r"states\[1\] must have the keys.*differs in \['bias'\]"):
        fused.load_state_dicts([states[0], {"weight": states[1]["weight"]}])
    with pytest.raises(ValueError, match=r"states\[0\]\['bias'\] must have shape \[4\], not \[1\]"):
        fused.load_state_dicts([{**states[0], "bias": torch.zeros(1)}, states[1]])
