"""Transformer layer over token sequences."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.models.precision import Layer, autocasts, to_fp32
from fedkern.ops._core.backend import forced_backend, is_intercepted

HEAD_WIDTH = 64


def head_count(width: int) -> int:
    """Return the largest number of heads of at least 64 channels that divides ``width``, or 1."""
    return max(heads for heads in range(1, max(1, width // HEAD_WIDTH) + 1) if width % heads == 0)


def token_rows(mask: Tensor) -> Tensor | None:
    """Return the positions int64 ``[n]`` of tokens in a flattened mask bool ``[B, N]``, or None to compute padding too.

    Their number is unknown to compilers and transforms, and a GPU would be waited for.
    """
    if mask.device.type != "cpu" or torch.jit.is_tracing() or is_intercepted() or forced_backend() == "reference":
        return None
    rows = mask.flatten().nonzero().flatten()
    return rows if len(rows) < mask.numel() else None


def unpack(tokens: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    """Return packed tokens ``[n, d]`` in their places of ``[B, N, d]``, with zeros as padding."""
    return tokens.new_zeros(mask.numel(), tokens.shape[1]).index_copy(0, rows, tokens).view(*mask.shape, -1)


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward network with residual connections (arXiv 1706.03762), without dropout.

    There are ``4 width`` hidden units.  ``norm_first`` puts layer norms before attention and feed-forward (vision
    transformers), else after both (BERT).
    """

    def __init__(self, width: int, *, norm_first: bool = True) -> None:
        super().__init__()
        self.heads = head_count(width)
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project: Layer = nn.Linear(width, width)
        self.norm2: Layer = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow: Layer = nn.Linear(4 * width, width)

    def _attend(self, tokens: Tensor, mask: Tensor | None, rows: Tensor | None) -> Tensor:
        mixed = self.qkv(tokens)
        if mask is not None and rows is not None:
            mixed = unpack(mixed, mask, rows)
        query, key, value = mixed.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        visible = None if mask is None else mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible).transpose(1, 2).flatten(2)
        return self.project(attended if rows is None else attended.flatten(0, 1).index_select(0, rows))

    @autocasts
    def first_token(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the first token ``[B, d]`` of :meth:`forward`'s result without computing the other tokens.

        A single query needs neither keys nor values of the other tokens.  With ``k = W x + b`` its scores are ``(q W)
        x`` plus a constant that softmax ignores, and the mean of the values is the value matrix times the mean of the
        tokens.
        """
        x = self.norm1(tokens) if self.norm_first else tokens
        query_weight, key_weight, value_weight = self.qkv.weight.unflatten(0, (3, self.heads, -1))
        query_bias, _, value_bias = self.qkv.bias.unflatten(0, (3, self.heads, -1))
        query = torch.einsum("bd,hed->bhe", x[:, 0], query_weight) + query_bias
        scores = torch.einsum("bhe,hed->bhd", query, key_weight) @ x.transpose(1, 2) / query.shape[2] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        mixed = scores.softmax(2) @ x
        attended = torch.einsum("bhd,hed->bhe", mixed, value_weight) + value_bias
        token = tokens[:, 0] + self.project(attended.flatten(1))
        if self.norm_first:
            return to_fp32(token + self._fed(self.norm2(token)))
        token = self.norm1(token)
        return to_fp32(self.norm2(token + self._fed(token)))

    def _fed(self, tokens: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.widen(tokens)))

    def forward(self, tokens: Tensor, mask: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Map tokens fp32 ``[B, N, d]``, with attention to the tokens where ``mask`` (bool ``[B, N]``) is True.

        With ``rows`` (:func:`token_rows` of the mask) tokens are packed, fp32 ``[n, d]``, and only attention pads them.
        """
        if self.norm_first:
            tokens = tokens + self._attend(self.norm1(tokens), mask, rows)
            return tokens + self._fed(self.norm2(tokens))
        tokens = self.norm1(tokens + self._attend(tokens, mask, rows))
        return self.norm2(tokens + self._fed(tokens))
