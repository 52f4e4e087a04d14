"""Transformer layers over token sequences, as alignment layers and as the small encoders' own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 64


def head_count(width: int, head_width: int = HEAD_WIDTH) -> int:
    """The most heads of at least ``head_width`` channels that divide ``width`` (12 for 768), at least one."""
    return max(heads for heads in range(1, max(1, width // head_width) + 1) if width % heads == 0)


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward network with residual connections (arXiv 1706.03762), without dropout.

    With ``width`` 768 and the default ``feedforward`` it has 7,087,872 parameters.

    Args:
        width: d, channels of a token.
        heads: attention heads; default one for every 64 channels.
        feedforward: hidden units, default ``4 width``.
        norm_first: layer norms before the two parts (vision transformers) or after them (BERT).
    """

    def __init__(
        self, width: int, *, heads: int | None = None, feedforward: int | None = None, norm_first: bool = True
    ) -> None:
        super().__init__()
        self.heads = head_count(width) if heads is None else heads
        hidden = 4 * width if feedforward is None else feedforward
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.widen = nn.Linear(width, hidden)
        self.narrow = nn.Linear(hidden, width)

    def _attended(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = None if mask is None else mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.project(attended.transpose(1, 2).flatten(2))

    def _fed(self, tokens: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.widen(tokens)))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens fp32 ``[B, N, d]``, of which only those where ``mask`` (bool ``[B, N]``) is True are attended to."""
        if self.norm_first:
            tokens = tokens + self._attended(self.norm1(tokens), mask)
            return tokens + self._fed(self.norm2(tokens))
        tokens = self.norm1(tokens + self._attended(tokens, mask))
        return self.norm2(tokens + self._fed(tokens))
