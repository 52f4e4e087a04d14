"""FusedBlocks under torch.compile and torch.func, and as FuseFL chains it: levels that read the level before."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fedkern.models import resnet
from fedkern.ops import FusedBlocks, use_isa
from fedkern.ops._fuse.blocks.choice import LOWERINGS
from python_tests.ops._fuse.blocks.test_fused_blocks import channels, make, vgg
from python_tests.ops.operator_cases import KERNELS

NAMES = ("residual, stride 2", "stem", "VGG", "adaptor and block", "own block", "perceptron")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "shared"), [*((name, True) for name in NAMES), ("residual, stride 2", False), ("perceptron", False)]
)
def test_compile_is_one_graph(name: str, shared: bool) -> None:
    fused = FusedBlocks(make(name), shared=shared)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, channels(name) * (1 if shared else 3), 8, 8)
    # The compiled one shares parameters and running statistics with the other: in evaluation mode none change.
    fused.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), fused(x), rtol=1e-4, atol=1e-5)
    state = {key: tensor.clone() for key, tensor in fused.state_dict().items()}
    fused.train()
    results = []
    for module in (compiled, fused):
        fused.load_state_dict(state)
        fused.zero_grad()
        out = module(x)
        out.square().mean().backward()
        after = {key: tensor.clone() for key, tensor in fused.state_dict().items()}
        results.append((out.detach(), [p.grad for p in fused.parameters()], after))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
def test_compile_with_inductor() -> None:
    fused = FusedBlocks([block.eval() for block in make("residual", 2)])
    x = torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        out = torch.compile(fused, fullgraph=True)(x)
        torch.testing.assert_close(out, fused(x), rtol=1e-4, atol=1e-5)


def test_compile_names_what_it_cannot_do() -> None:
    blocks = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=None)) for _ in range(2)]
    compiled = torch.compile(FusedBlocks(blocks), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"momentum=None under torch\.compile"):
        compiled(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shared", [True, False])
def test_transforms(name: str, shared: bool) -> None:
    fused = FusedBlocks([block.eval() for block in make(name)], shared=shared)
    x = torch.randn(3, 2, channels(name) * (1 if shared else 3), 8, 8)
    wanted = torch.stack([fused(part) for part in x])
    torch.testing.assert_close(torch.func.vmap(fused)(x), wanted, rtol=1e-4, atol=1e-5)
    by_x = torch.func.grad(lambda x: fused(x).square().sum())(x[0])
    leaf = x[0].clone().requires_grad_()
    fused(leaf).square().sum().backward()
    torch.testing.assert_close(by_x, leaf.grad, rtol=1e-3, atol=1e-3)


def test_many_sets_of_parameters_at_once() -> None:
    """torch.func.functional_call under vmap, training several fused levels side by side."""
    members = [FusedBlocks(make("residual", 2)) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(members)  # type: ignore[arg-type]
    x = torch.randn(3, 4, 6, 8, 8)
    wanted = torch.stack([member(part) for member, part in zip(members, x, strict=True)])
    base = FusedBlocks(make("residual", 2))

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    torch.testing.assert_close(torch.func.vmap(call)(parameters, buffers, x), wanted, rtol=1e-4, atol=1e-4)
    for key, buffer in buffers.items():
        torch.testing.assert_close(buffer, torch.stack([member.state_dict()[key] for member in members]))


def test_shared_running_statistics_are_not_mapped_over() -> None:
    with pytest.raises(RuntimeError, match=r"running_mean or running_var.* were not batched"):
        torch.func.vmap(FusedBlocks(make("residual")))(torch.randn(2, 2, 6, 8, 8))


def levels(kind: str, clients: int) -> list[list[nn.Module]]:
    """Per level the M clients' frozen blocks, from level 2 on behind their adaptors."""
    if kind == "ResNet":
        stem = [resnet.ResNet((1,), classes=2, width=4).layer1[:3] for _ in range(clients)]
        chains = [[resnet.BasicBlock(4, 8, 2)], [resnet.BasicBlock(8, 8), resnet.BasicBlock(8, 16, 2)]]
        widths = (4, 8)
        later = [
            [
                nn.Sequential(nn.Conv2d(clients * width, width, 1), *(make_like(block) for block in chain))
                for _ in range(clients)
            ]
            for width, chain in zip(widths, chains, strict=True)
        ]
        found = [stem, *later]
    else:
        found = [
            [vgg(3, 5) for _ in range(clients)],
            [nn.Sequential(nn.Conv2d(5 * clients, 5, 1), vgg(5, 7)) for _ in range(clients)],
        ]
    # The level that only pools, behind its adaptor.
    last = 16 if kind == "ResNet" else 7
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found.append([nn.Sequential(nn.Conv2d(last * clients, last, 1), *pool) for _ in range(clients)])
    for block in itertools.chain.from_iterable(found):
        block.eval().requires_grad_(False)
        for layer in block.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
    return found


def make_like(block: resnet.BasicBlock) -> resnet.BasicBlock:
    return resnet.BasicBlock(block.conv1.in_channels, block.conv1.out_channels, block.conv1.stride[0])


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["ResNet", "VGG"])
@pytest.mark.parametrize("lowering", [None, *LOWERINGS])
def test_chain_of_fused_levels(kind: str, lowering: str | None) -> None:
    """Level l maps X to b_j(a_j(X)) of every client j: in one module, or adaptors and blocks in one each."""
    chain = levels(kind, 3)
    image = torch.randn(4, 3, 8, 8)
    x = together = apart = image
    with torch.no_grad():
        for level, blocks in enumerate(chain):
            x = torch.cat([block(x) for block in blocks], 1)
            together = FusedBlocks(blocks, lowering=lowering)(together)  # type: ignore[arg-type]
            if level:
                apart = FusedBlocks([block[0] for block in blocks], lowering=lowering)(apart)  # type: ignore[index]
                blocks = [block[1:] for block in blocks]  # type: ignore[index]
            apart = FusedBlocks(blocks, shared=not level, lowering=lowering)(apart)  # type: ignore[arg-type]
            torch.testing.assert_close(together, x, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(apart, x, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")
@pytest.mark.parametrize("isa", [kernel.removeprefix("cpu-") for kernel in KERNELS if kernel.startswith("cpu-")])
def test_threads_change_no_bit(isa: str) -> None:
    fused = [FusedBlocks(blocks, lowering="direct") for blocks in levels("ResNet", 3)[:-1]]
    image = torch.randn(33, 3, 32, 32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x = image
            with torch.no_grad(), use_isa(isa):
                for one in fused:
                    x = one(x)
            results.append(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
