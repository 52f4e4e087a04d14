"""Vocabularies of words: learning them from training texts, and tokenizing texts with them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedkern.process.device_copies import send

PAD, UNKNOWN, CLS = 0, 1, 2
SPECIAL = ("[PAD]", "[UNK]", "[CLS]")


class Tokens(NamedTuple):
    """Tokenized texts, the input of a text encoder.

    Attributes:
        ids: int64 ``[B, L]``; the first token stands for the whole text.
        mask: bool ``[B, L]``, True on tokens and False on the padding behind them.
    """

    ids: Tensor
    mask: Tensor

    @property
    def device(self) -> torch.device:
        """Device of the tokens."""
        return self.ids.device

    def take(self, rows: Tensor) -> Tokens:
        """Return the texts at ``rows`` (int64 ``[m]``), padded to the longest of these texts."""
        mask = self.mask[rows]
        length = max(1, int(mask.sum(1).max())) if len(mask) else 1
        return Tokens(self.ids[rows, :length], mask[:, :length])

    def to(self, device: torch.device | str) -> Tokens:
        """Return the same tokens on ``device``, without waiting for the copy.

        See :func:`fedkern.process.device_copies.send`.
        """
        device = torch.device(device)
        return Tokens(send(self.ids, device), send(self.mask, device))


def split_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class Vocabulary:
    """Token numbers of words.

    Args:
        tokens: words without the special tokens; word i has the number ``len(SPECIAL) + i``, others are ``[UNK]``.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tuple(tokens)
        self._numbers = {token: len(SPECIAL) + i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(SPECIAL) + len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Return the token numbers of a text, without ``[CLS]``."""
        return [self._numbers.get(word, UNKNOWN) for word in split_words(text)]

    def tokenize(self, texts: Sequence[str], longest: int) -> Tokens:
        """Return ``[CLS]`` and each text's tokens, together at most ``longest``, padded to the longest text."""
        rows = [[CLS, *self.encode(text)[: longest - 1]] for text in texts]
        length = max((len(row) for row in rows), default=1)
        ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows], dtype=torch.int64).view(-1, length)
        return Tokens(ids, ids != PAD)


def learn_vocabulary(texts: Iterable[str], size: int = 8_000) -> Vocabulary:
    """Build a vocabulary of at most ``size`` most frequent words, ties in alphabetical order.

    The order of ``texts`` does not matter.  A shared vocabulary discloses, once, which words occur in the clients'
    texts.
    """
    counts = Counter(word for text in texts for word in split_words(text))
    return Vocabulary(sorted(counts, key=lambda word: (-counts[word], word))[:size])
