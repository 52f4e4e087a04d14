"""Counter-based random streams, one per (seed, purpose, round, client), and states of the global generators."""

from __future__ import annotations

import ctypes
import hashlib
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def stream(seed: int, purpose: str, *, round: int = 0, client: int = -1) -> np.random.Generator:
    """Return the generator of one purpose, round and client of a run.

    Philox is keyed by a hash of seed, purpose, round and client, so the stream does not depend on earlier draws. The
    order and number of workers, an interruption with resume, or an added client change no other stream.

    Args:
        seed: the run's root seed, any integer.
        purpose: for example ``"partition"``, ``"batches"`` or ``"augmentation"``.
        round: communication round, from 0; -1 before the first round.
        client: client id, from 0; -1 for the server.
    """
    words = f"{int(seed)}/{purpose}/{int(round)}/{int(client)}".encode()
    key = np.frombuffer(hashlib.blake2b(words, digest_size=16).digest(), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def mix_words(word: int, number: int) -> int:
    """Mix a word and a number (from -2) into a word of 63 bits (SplitMix64)."""
    z = (word + (number + 2) * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return (z ^ (z >> 31)) >> 1


def seed_generators(word: int, device: torch.device | None = None, names: Collection[str] | None = None) -> None:
    """Seed the global generators of torch (also that of a CUDA ``device``), NumPy and ``random``, or some by name."""
    for name in GENERATORS if names is None else names:
        GENERATORS[name][2](word)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(word)


def generator_states() -> dict[str, object]:
    return {name: get() for name, (get, _, _) in GENERATORS.items()}


def forget_spare_number() -> None:
    """Read NumPy's state in full next, as a spare number may have appeared without a move of key and position."""
    _spareless[0] = b""


def restore_generators(states: Mapping[str, Any]) -> set[str]:
    moved = {name for name, (get, _, _) in GENERATORS.items() if name != "NumPy" and get() != states[name]}
    # Key and position show almost every move; the spare number takes longer to read.
    if _numpy_words() != states["NumPy"][0] or _read_numpy() != states["NumPy"]:
        moved.add("NumPy")
    for name in moved:
        GENERATORS[name][1](states[name])
    return moved


def _read_numpy() -> tuple[bytes, tuple[int, float]]:
    """Return key and position of NumPy's generator, and the spare number of normal draws, which moves neither.

    A full read takes 50 microseconds, and a spare number appears only if the generator moves.
    """
    if (words := _numpy_words()) != _spareless[0]:
        state: Any = np.random.get_state()  # noqa: NPY002
        if state[3]:
            return words, state[3:]
        _spareless[0] = words
    return words, (0, 0.0)


def _numpy_words() -> bytes:
    source = np.random.mtrand._rand._bit_generator
    # No other kind can be seeded.
    return ctypes.string_at(source.ctypes.state_address, _NUMPY_BYTES) if type(source) is np.random.MT19937 else b""


def _restore_numpy(state: tuple[bytes, tuple[int, float]]) -> None:
    words = np.frombuffer(state[0], np.uint32)
    if state[1][0]:
        np.random.set_state(("MT19937", words[:-1], int(words[-1]), *state[1]))  # noqa: NPY002
        _spareless[0] = b""
    elif len(words):
        np.random.seed(0)  # noqa: NPY002  # drops a spare number, in a twentieth of the time of set_state
        ctypes.memmove(np.random.mtrand._rand._bit_generator.ctypes.state_address, state[0], _NUMPY_BYTES)
        _spareless[0] = state[0]


_NUMPY_BYTES, _spareless = 625 * 4, [b""]  # last key and position that were without a spare number
GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], object], Callable[[int], object]]] = {
    "random": (random.getstate, random.setstate, random.seed),
    "NumPy": (_read_numpy, _restore_numpy, lambda word: np.random.seed(word % 2**32)),  # noqa: NPY002
    "torch": (
        lambda: torch.default_generator.get_state().numpy().tobytes(),
        lambda state: torch.default_generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
        torch.default_generator.manual_seed,
    ),
}
"""Functions that read, restore and seed the CPU's global generators."""


@contextmanager
def preserve_generators(device: torch.device | None = None) -> Iterator[Callable[[], bool]]:
    """Restore the global generators at the end of the block. Yields a function that says whether they have moved."""
    cuda = [device] if device is not None and device.type == "cuda" else []
    forget_spare_number()
    before, on_gpu = generator_states(), [torch.cuda.get_rng_state(gpu) for gpu in cuda]

    def have_moved() -> bool:
        return generator_states() != before or not all(map(torch.equal, on_gpu, map(torch.cuda.get_rng_state, cuda)))

    try:
        yield have_moved
    finally:
        restore_generators(before)
        for gpu, state in zip(cuda, on_gpu, strict=True):
            torch.cuda.set_rng_state(state, gpu)


@contextmanager
def seeded_generators(word: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators inside the block, for user code (initial weights, dropout, items), then restore."""
    with preserve_generators(device):
        seed_generators(word, device)
        yield
