"""Networks cut into blocks, and fused levels: one pass against separate calls, adaptors, transformers, sizes."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import nn

from fedkern import models
from fedkern.errors import UserError
from fedkern.models.blocks import BlockNetwork, check_alike, count_channels, cut_network, cut_points, list_layers
from fedkern.models.fused import Branch, FusedLevel, FusedNetwork, Pool, make_adaptor


class Setup(NamedTuple):
    """M clients' networks, their adaptors (none at level 1), and the network fused from them."""

    networks: list[BlockNetwork]
    adaptors: list[list[nn.Module]]
    fused: FusedNetwork


def fuse(names, blocks, *, kind="cnn1x1", width=6, size=16, final="mean") -> Setup:
    networks = []
    for k, name in enumerate(names):
        built = models.build(name, classes=3, channels=3, image_size=size, seed=k, width=width)
        network = cut_network(built, blocks)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 2)
        networks.append(network.eval())
    shapes = networks[0].interfaces((3, size, size))
    levels, adaptors = [], []
    for i in range(len(shapes)):
        made, branches = [], []
        for k, network in enumerate(networks):
            adaptor = None
            if i:
                random = torch.Generator().manual_seed(k)
                adaptor = make_adaptor(kind, shapes[i - 1], len(names), generator=random)
                made.append(adaptor)
            states = {"block": network.blocks[i].state_dict()}
            if adaptor is not None and kind == "cnn1x1":
                states["adaptor"] = adaptor.state_dict()
            # Other values than the state dicts', as where the blocks of others arrive.
            template = copy.deepcopy(network.blocks[i])
            for p in template.parameters():
                p.data.fill_(7)
            branches.append(Branch(template, copy.deepcopy(adaptor), states))
        levels.append(FusedLevel(branches))
        adaptors.append(made)
    return Setup(networks, adaptors, FusedNetwork(levels, networks[0].head, final=final))


def by_hand(setup: Setup, x: torch.Tensor, kind: str) -> torch.Tensor:
    """Call every block by itself, and combine the results in plain PyTorch."""
    results = [x]
    for i in range(len(setup.networks[0].blocks)):
        after = []
        for k, network in enumerate(setup.networks):
            if not i:
                after.append(network.blocks[0](x))
            elif kind == "cnn1x1":
                axis = 2 if results[0].dim() == 3 else 1
                after.append(network.blocks[i](setup.adaptors[i][k](torch.cat(results, axis))))
            else:
                total = torch.stack(results).sum(0)
                after.append(network.blocks[i](total if kind == "sum" else total / len(results)))
        results = after
    if setup.fused.final == "concat":
        return torch.cat(results, 1)
    return torch.stack(results).mean(0) if setup.fused.final == "mean" else torch.stack(results).sum(0)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("names", "blocks", "kind"), [
    (["resnet8"] * 3, 2, "cnn1x1"),
    (["resnet8"] * 3, 5, "cnn1x1"),
    (["resnet8"] * 3, 3, "avg"),
    (["cnn"] * 2, 3, "sum"),
    (["mlp"] * 3, 3, "cnn1x1"),
    (["vit-tiny"] * 2, 4, "cnn1x1"),
    (["vit-tiny"] * 2, 2, "avg"),
    pytest.param(["resnet18", "resnet10", "resnet18"], 4, "cnn1x1", marks=pytest.mark.exhaustive),
    (["resnet10", "resnet18"], 2, "avg"),
])  # fmt: skip
@torch.no_grad()
def test_one_pass_is_separate_calls(names, blocks, kind):
    setup = fuse(names, blocks, kind=kind, final={2: "sum", 3: "mean"}[len(names)] if blocks < 5 else "concat")
    x = torch.randn(4, 3, 16, 16)
    expected = by_hand(setup, x, kind)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(setup.fused.features(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.exhaustive
@pytest.mark.parametrize("total", [False, True])
@torch.no_grad()
def test_an_exported_network_has_operators_of_pytorch_alone(total):
    convs = [nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh())]
    second = [nn.Flatten(), nn.Sequential(nn.Flatten(), nn.Tanh())]
    levels = [
        FusedLevel([Branch(b, adaptor, {"block": b.state_dict()}) for b in blocks])
        for blocks, adaptor in ((convs, None), (second, Pool(2, total=total)))
    ]
    network, x = nn.Sequential(*levels).eval(), torch.randn(3, 3, 2, 2)
    program = torch.export.export(network, (x,))
    assert not [node.target for node in program.graph.nodes if "fedkern" in str(node.target)]
    torch.testing.assert_close(program.module()(x), network(x))


@torch.no_grad()
def test_tokens_are_fused_over_their_channels():
    linears = [nn.Sequential(nn.Flatten(2), nn.Linear(16, 5)) for _ in range(2)]
    second = [nn.Sequential(nn.Linear(5, 5), nn.Flatten(1)) for _ in range(2)]
    for kind in ("cnn1x1", "avg"):
        random = torch.Generator().manual_seed(0)
        adaptor = make_adaptor(kind, (3, 5), 2, generator=random)
        states = {"adaptor": adaptor.state_dict()} if kind == "cnn1x1" else {}
        levels = [
            FusedLevel([Branch(b, None, {"block": b.state_dict()}) for b in linears]),
            FusedLevel([Branch(b, adaptor, {"block": b.state_dict(), **states}) for b in second]),
        ]
        x = torch.randn(4, 3, 4, 4)
        tokens = [b(x) for b in linears]
        joined = torch.cat(tokens, 2)
        torch.testing.assert_close(levels[0](x), joined)
        mixed = adaptor(joined) if kind == "cnn1x1" else (tokens[0] + tokens[1]) / 2
        assert mixed.shape == (4, 3, 5)
        torch.testing.assert_close(levels[1](joined), torch.cat([b(mixed) for b in second], 1))


@torch.no_grad()
def test_one_client_behind_identity_adaptors_is_its_own_network():
    network = cut_network(models.build("resnet18", classes=3, channels=3, image_size=16, seed=0, width=4), 8).eval()
    shapes = network.interfaces((3, 16, 16))
    levels = []
    for i, block in enumerate(network.blocks):
        adaptor = make_adaptor("cnn1x1", shapes[i - 1], 1) if i else None
        states = {"block": block.state_dict(), **({"adaptor": adaptor.state_dict()} if adaptor is not None else {})}
        levels.append(FusedLevel([Branch(block, adaptor, states)]))
    x = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(FusedNetwork(levels, network.head)(x), network(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 4, 4), (7, 6), (6,)])
def test_a_fresh_adaptor_is_the_mean(shape):
    m, c = 3, count_channels(shape)
    adaptor, pool = make_adaptor("cnn1x1", shape, m), make_adaptor("avg", shape, m)
    assert sum(p.numel() for p in adaptor.parameters()) == m * c * c + c
    assert isinstance(pool, Pool)
    assert not list(pool.parameters())
    assert not list(pool.buffers())
    parts = [torch.randn(2, *shape) for _ in range(m)]
    joined = torch.cat(parts, 2 if len(shape) == 2 else 1)
    expected = sum(parts) / m
    torch.testing.assert_close(adaptor(joined), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pool(joined), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(make_adaptor("sum", shape, m)(joined), m * expected, rtol=1e-5, atol=1e-5)


def test_frozen_levels_stay_frozen_until_told_otherwise():
    fused = fuse(["resnet8"] * 2, 2).fused
    fused.train()
    assert not any(module.training for module in fused.modules())
    assert not any(p.requires_grad for p in fused.parameters())
    before = fused.levels[0].statistics()
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        own = fused.run_levels(x)
        fused.normalise_by_batch()
        assert (fused.run_levels(x) - own).abs().max() > 1e-2
    after = fused.levels[0].statistics()
    assert {"1.conv1.weight"}.isdisjoint(before[0])
    assert int(after[1]["1.bn1.num_batches_tracked"]) == int(before[1]["1.bn1.num_batches_tracked"]) + 1
    assert not torch.equal(after[0]["1.bn1.running_mean"], before[0]["1.bn1.running_mean"])


def parameters(blocks: int, clients: int, width: int) -> int:
    """Count M networks of this width in K blocks, with cnn1x1 adaptors and one classifier."""
    network = cut_network(models.build("resnet18", classes=10, channels=3, image_size=32, seed=0, width=width), blocks)
    c = [count_channels(shape) for shape in network.interfaces((3, 32, 32))]
    own = sum(p.numel() for block in network.blocks for p in block.parameters())
    adaptors = sum(clients * n * n + n for n in c[:-1])
    return clients * (own + adaptors) + sum(p.numel() for p in network.head.parameters())


@pytest.mark.parametrize(("clients", "width", "ratios"), [
    (5, 29, (1.04, 1.07, 1.31)), (5, 20, (0.49, 0.51, 0.62)), (10, 20, (0.99, 1.05, 1.52)),
    (20, 14, (0.99, 1.11, 2.02)), (50, 9, (1.07, 1.38, 3.73)),
])  # fmt: skip
def test_sizes_relative_to_one_resnet18(clients, width, ratios):
    found = tuple(round(parameters(k, clients, width) / 11_173_962, 2) for k in (2, 4, 8))
    assert found == pytest.approx(ratios, abs=0.011)


def test_the_fused_network_has_these_parameters():
    for blocks in (2, 4):
        setup = fuse(["resnet18"] * 3, blocks, width=3, size=8)
        network = setup.networks[0]
        c = [count_channels(shape) for shape in network.interfaces((3, 8, 8))]
        own = sum(p.numel() for block in network.blocks for p in block.parameters())
        expected = 3 * (own + sum(3 * n * n + n for n in c[:-1])) + sum(p.numel() for p in network.head.parameters())
        assert sum(p.numel() for p in setup.fused.parameters()) == expected


# -- blocks ------------------------------------------------------------------------------------------------------------


def make(name: str, *, image_size: int = 32, **options):
    return models.build(name, classes=10, channels=3, image_size=image_size, seed=0, **options)


def sizes(network: BlockNetwork) -> list[int]:
    return [sum(p.numel() for p in block.parameters()) for block in network.blocks]


def test_resnet18_is_cut_as_published():
    model = make("resnet18")
    assert len(list_layers(model)) == 9
    assert [cut_points(model, k) for k in (2, 3, 4, 8)] == [(4,), (0, 4), (0, 4, 6), (0, 1, 2, 3, 5, 7, 8)]
    assert sizes(cut_network(model, 2)) == [675_392, 10_493_440]
    assert sizes(cut_network(model, 4)) == [1_856, 673_536, 2_099_712, 8_393_728]
    assert sizes(cut_network(model, 8))[-1] == 0  # the pooling alone
    assert sum(sizes(cut_network(model, 8))) == 11_173_962 - 5_130


@pytest.mark.parametrize(("name", "cuts"), [
    ("resnet8", {2: (1,), 3: (1, 2), 4: (0, 1, 2), 5: (0, 1, 2, 3)}),
    ("mlp", {2: (1,), 3: (0, 1), 4: (0, 1, 2)}),
    ("cnn", {2: (1,), 3: (0, 1)}),
    ("vit-tiny", {2: (6,), 4: (3, 6, 9), 13: tuple(range(12))}),
])  # fmt: skip
def test_small_networks_and_transformers(name, cuts):
    model = make(name, width=8, image_size=8)
    assert {k: cut_points(model, k) for k in cuts} == cuts


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [n for n, entry in models.MODELS.items() if entry.gives == "classes"])
def test_every_network_cut_computes_what_it_computes(name):
    model = make(name, width=8).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.features(x)
        for k in (1, 2, 3, len(list_layers(model)) + 1):
            network = cut_network(model, k)
            assert len(network.blocks) == k
            torch.testing.assert_close(network.features(x), expected, rtol=1e-5, atol=1e-6)
            shapes = network.interfaces((3, 32, 32))
            y = x
            for block, shape in zip(network.blocks, shapes, strict=True):
                y = block(y)
                assert tuple(y.shape[1:]) == shape
    assert {id(p) for p in network.parameters()} == {id(p) for p in model.parameters()}


def test_depths_that_agree_can_be_fused():
    shapes = [
        [cut_network(make(name, width=4), k).interfaces((3, 32, 32)) for name in ("resnet18", "resnet10")]
        for k in (2, 4)
    ]
    for own in shapes:
        check_alike(own)
    with pytest.raises(UserError, match=r"Block 1 of client 1 gives \[4, 32, 32\] and that of client 0 \[8, 16, 16\]"):
        check_alike([shapes[0][0], shapes[1][1][::1][:1] + shapes[0][0][1:]])


def test_a_list_of_the_users_own():
    blocks = [nn.Conv2d(1, 4, 3), nn.Sequential(nn.Flatten(2), nn.Linear(36, 5)), nn.Flatten()]
    network = BlockNetwork(blocks, nn.Linear(20, 3))
    assert network.interfaces((1, 8, 8)) == [(4, 6, 6), (4, 5), (20,)]
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_mistakes_are_named():
    head = nn.Linear(4, 2)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UserError, match=r"Block 2 cannot take what .* \[4, 8, 8\], as .* 5 channels\."):
        BlockNetwork([nn.Conv2d(3, 4, 1), nn.Conv2d(5, 4, 1), pool], head).interfaces((3, 8, 8))
    with pytest.raises(UserError, match=r"Block 1 cannot take the images, of shape \[1, 8, 8\]"):
        BlockNetwork([nn.Conv2d(3, 4, 1), pool], head).interfaces((1, 8, 8))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(256, 4))  # what is wrong shows behind the first layer
    with pytest.raises(UserError, match=r"Block 1 cannot take the images, of shape \[3, 8, 8\]: .*192"):
        BlockNetwork([flat], head).interfaces((3, 8, 8))
    with pytest.raises(UserError, match=r"last block gives \[4, 8, 8\], but the classifier takes features \[4\]"):
        BlockNetwork([nn.Conv2d(3, 4, 1)], head).interfaces((3, 8, 8))
    with pytest.raises(UserError, match="has 4 layers and a pooling and can be cut into 1 to 5 blocks, not 6"):
        cut_network(make("resnet8", width=4), 6)
