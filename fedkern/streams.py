"""Counter-based random streams, one per (seed, purpose, round, client), and words for the global generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def stream(seed: int, purpose: str, *, round: int = 0, client: int = -1) -> np.random.Generator:
    """Returns the generator that belongs to one purpose, round and client of a run.

    The stream is Philox keyed by a hash of seed, purpose, round and client, so it depends on nothing drawn before.  The
    order and number of workers, an interruption with resume, or an added client change no other stream.

    Args:
        seed: the run's root seed, any integer.
        purpose: what is drawn, for example ``"partition"``, ``"batches"`` or ``"augmentation"``.
        round: communication round, from 0; -1 before the first round.
        client: client id, from 0; -1 for the server.
    """
    words = f"{int(seed)}/{purpose}/{int(round)}/{int(client)}".encode()
    key = np.frombuffer(hashlib.blake2b(words, digest_size=16).digest(), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def mix_words(word: int, number: int) -> int:
    """Return a word of 63 bits that no other word and number (from -2) are likely to give (SplitMix64)."""
    z = (word + (number + 2) * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return (z ^ (z >> 31)) >> 1


def seed_generators(word: int, device: torch.device | None = None) -> None:
    """Seed the global generators of torch (also that of a CUDA ``device``), NumPy and ``random``."""
    torch.default_generator.manual_seed(word)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(word)
    random.seed(word)
    np.random.seed(word % 2**32)  # noqa: NPY002


@contextmanager
def preserve_generators(device: torch.device | None = None) -> Iterator[Callable[[], bool]]:
    """Put the global generators back at the end of the block; yield a function that tells whether they have moved."""
    cuda = device if device is not None and device.type == "cuda" else None

    def states() -> tuple[Any, ...]:
        of_cuda = None if cuda is None else torch.cuda.get_rng_state(cuda)
        return random.getstate(), np.random.get_state(), torch.default_generator.get_state(), of_cuda  # noqa: NPY002

    def flat(of_python: tuple[Any, ...], of_numpy: Any, *tensors: Any) -> tuple[Any, ...]:
        return (*of_python, *of_numpy, *tensors)

    before = states()
    try:
        yield lambda: not all(map(np.array_equal, flat(*before), flat(*states())))
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.default_generator.set_state(before[2])
        if cuda is not None:
            torch.cuda.set_rng_state(before[3], cuda)


@contextmanager
def seeded_generators(word: int, device: torch.device | None = None) -> Iterator[None]:
    """Have the global generators begin at ``word`` inside the block, and put them back afterwards.

    A user's code draws from them: initial weights, dropout, items.
    """
    with preserve_generators(device):
        seed_generators(word, device)
        yield
