"""The vision transformer: its layers against PyTorch's, images of other shapes, heads."""

import pytest
import torch
from torch import nn

from fedkern import models
from fedkern.models.networks.vit import Encoder, PatchEmbedding, patch_size


def test_a_layer_is_pytorchs():
    torch.manual_seed(0)
    ours = Encoder(192).double().eval()
    theirs = nn.TransformerEncoderLayer(192, 3, 768, 0.0, "gelu", batch_first=True, norm_first=True).double().eval()
    pairs = {
        "self_attn.in_proj_": ours.qkv, "self_attn.out_proj.": ours.project, "linear1.": ours.widen,
        "linear2.": ours.narrow, "norm1.": ours.norm1, "norm2.": ours.norm2,
    }  # fmt: skip
    with torch.no_grad():
        for name, layer in pairs.items():
            for kind in ("weight", "bias"):
                theirs.get_parameter(name + kind).copy_(getattr(layer, kind).normal_())
    x = torch.randn(2, 192, 3, 5, dtype=torch.float64)
    expected = theirs(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (3, 5))
    torch.testing.assert_close(ours(x), expected, rtol=1e-9, atol=1e-9)


def test_positions_are_interpolated_for_another_shape():
    embed = PatchEmbedding(1, 4, 2, 4)
    embed.initialise(torch.Generator().manual_seed(0))
    nn.init.zeros_(embed.project.weight)
    nn.init.zeros_(embed.project.bias)
    assert torch.equal(embed(torch.zeros(1, 1, 8, 8)), embed.position)
    assert embed(torch.zeros(2, 1, 8, 12)).shape == (2, 4, 4, 6)


@pytest.mark.parametrize(("size", "tokens"), [(8, 4), (28, 7), (32, 8), (64, 16), (224, 14)])
def test_tokens_per_side(size, tokens):
    assert size // patch_size(size) == tokens


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (136, 2), (135, 1), (86, 1), (13, 1)])
def test_heads_divide_the_width(width, heads):
    model = models.build("vit-tiny", classes=2, channels=3, image_size=8, seed=0, width=width)
    assert model.layer1[1].heads == heads
