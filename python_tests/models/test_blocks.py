"""Cutting networks into blocks: the published cuts, their results, user-defined lists, mistakes."""

import pytest
import torch
from torch import nn

from fedkern import models
from fedkern.errors import UserError
from fedkern.models.blocks import BlockNetwork, check_alike, cut_network, cut_points, list_layers


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
