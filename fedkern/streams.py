"""Counter-based random streams: one per (seed, purpose, round, client)."""

from __future__ import annotations

import hashlib

import numpy as np


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
