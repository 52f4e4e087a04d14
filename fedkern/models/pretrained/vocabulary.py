"""Vocabularies of words or word pieces: learning them from training texts, and tokenizing texts with them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedkern.process.device_copies import send

PAD, UNKNOWN, CLS = 0, 1, 2
SPECIAL = ("[PAD]", "[UNK]", "[CLS]")
INSIDE = "##"  # prefix of a piece that continues a word (Devlin et al., arXiv 1810.04805)
Kind = Literal["words", "wordpieces"]


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
    """Token numbers of words, or of word pieces by greedy longest match from the left.

    Args:
        tokens: tokens without the special ones; token i has the number ``len(SPECIAL) + i``.
        kind: treatment of a word that is not among the tokens.  ``"words"``: ``[UNK]``.  ``"wordpieces"``: pieces, all
            but the first with the prefix ``##``; ``[UNK]`` if no pieces match.
    """

    def __init__(self, tokens: Sequence[str], kind: Kind = "words") -> None:
        self.tokens, self.kind = tuple(tokens), kind
        self._numbers = {token: len(SPECIAL) + i for i, token in enumerate(self.tokens)}
        self._cut: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(SPECIAL) + len(self.tokens)

    def _word(self, word: str) -> list[int]:
        if word in self._numbers:
            return [self._numbers[word]]
        if self.kind == "words":
            return [UNKNOWN]
        if word not in self._cut:
            self._cut[word] = self._pieces(word)
        return self._cut[word]

    def _pieces(self, word: str) -> list[int]:
        pieces, start = [], 0
        while start < len(word):
            prefix = INSIDE if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self._numbers), None)
            if end is None:
                return [UNKNOWN]
            pieces.append(self._numbers[prefix + word[start:end]])
            start = end
        return pieces

    def encode(self, text: str) -> list[int]:
        """Return the token numbers of a text, without ``[CLS]``."""
        return [number for word in split_words(text) for number in self._word(word)]

    def tokenize(self, texts: Sequence[str], longest: int) -> Tokens:
        """Return ``[CLS]`` and each text's tokens, together at most ``longest``, padded to the longest text."""
        rows = [[CLS, *self.encode(text)[: longest - 1]] for text in texts]
        length = max((len(row) for row in rows), default=1)
        ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows], dtype=torch.int64).view(-1, length)
        return Tokens(ids, ids != PAD)


def learn_vocabulary(texts: Iterable[str], kind: Kind = "words", size: int = 8_000) -> Vocabulary:
    """Build a vocabulary of at most ``size`` tokens beside the special ones.

    The order of ``texts`` does not matter.

    Words: the most frequent words, ties in alphabetical order.  Word pieces: all characters, as the beginning and as
    the continuation of a word, then pairs of neighbouring pieces merged by frequency (byte-pair encoding, arXiv
    1508.07909) until the vocabulary is full or no pair occurs twice.

    A shared vocabulary discloses, once, which words occur in the clients' texts.
    """
    counts = Counter(word for text in texts for word in split_words(text))
    if kind == "words":
        return Vocabulary(sorted(counts, key=lambda word: (-counts[word], word))[:size], kind)
    return Vocabulary(_merge_pieces(counts, size), kind)


def _merge_pieces(counts: Counter[str], size: int) -> list[str]:
    """Return the word pieces: characters first, then merged pieces in the order of the merges."""
    words = {word: [word[0], *(INSIDE + letter for letter in word[1:])] for word in sorted(counts)}
    letters = Counter[str]()
    for word, pieces in words.items():
        for piece in pieces:
            letters[piece] += counts[word]
    alphabet = sorted(letters, key=lambda piece: (-letters[piece], piece))[:size]
    pairs: Counter[tuple[str, str]] = Counter()
    words_with: defaultdict[tuple[str, str], set[str]] = defaultdict(set)

    def book(word: str, sign: int) -> None:
        pieces = words[word]
        for pair in pairwise(pieces):
            pairs[pair] += sign * counts[word]
            if sign > 0:
                words_with[pair].add(word)

    for word in words:
        book(word, 1)
    seen = set(alphabet)
    while len(alphabet) < size and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        piece_of_pair = best[0] + best[1].removeprefix(INSIDE)
        for word in words_with.pop(best):
            book(word, -1)
            words[word] = _merge(words[word], best, piece_of_pair)
            book(word, 1)
        del pairs[best]
        if piece_of_pair not in seen:  # different merges can give the same piece
            seen.add(piece_of_pair)
            alphabet.append(piece_of_pair)
    return alphabet


def _merge(pieces: list[str], pair: tuple[str, str], merged: str) -> list[str]:
    out: list[str] = []
    i = 0
    while i < len(pieces):
        if tuple(pieces[i : i + 2]) == pair:
            out.append(merged)
            i += 2
        else:
            out.append(pieces[i])
            i += 1
    return out
