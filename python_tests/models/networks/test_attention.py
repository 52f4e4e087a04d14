"""The transformer layer's shortcut for its first token."""

import pytest
import torch

from fedkern.models.networks.attention import TransformerLayer


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(("width", "heads"), [(16, 1), (256, 4)])
@pytest.mark.parametrize("masked", [True, False])
def test_the_first_token_is_that_of_the_whole_layer(norm_first, width, heads, masked):
    generator = torch.Generator().manual_seed(0)
    layer = TransformerLayer(width, norm_first=norm_first).double()
    assert layer.heads == heads
    for parameter in layer.parameters():  # biases that are not zero
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / width**0.5
    tokens = torch.randn(3, 7, width, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]]) if masked else None
    full, token = layer(tokens, mask)[:, 0], layer.first_token(tokens, mask)
    assert torch.allclose(token, full, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(full.shape, generator=generator, dtype=torch.float64)
    inputs = [tokens, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(x, inputs, upstream) for x in (full, token)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
