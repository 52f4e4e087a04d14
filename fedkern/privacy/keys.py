"""Noise keys: every release has its own key, made from a client's secret.

BLAKE2b (RFC 7693), keyed with the secret, gives a key that reveals neither the secret nor another release's key.  The
noise itself comes from Philox (:func:`fedkern.ops.clip_and_noise`), which is not a cryptographic generator and has a
key of 64 bits.  Whoever finds one key, by trying up to 2^64 of them, has the noise of one release and of no other.

Generators and keys:

- Noise on gradients, class counts and means of clients: Philox4x32-10.  A release has 64 bits of key, and 57 bits of
  place in the stream.
- Noise of DP-SGD on a CPU: torch's Mersenne twister, with 128 bits for a training, spread over its whole state.
- Noise of DP-SGD on a GPU: torch's Philox4x32-10, with 64 bits for a training.
- Samples of a batch, and the shard that serves: numpy's Philox4x64-10, with 128 bits for a training and a step.

No generator is cryptographic: the guarantee takes their numbers for random.  FedIOD's noise follows the normal law to
9.5 standard deviations and DP-SGD's to 8.5.  A normal number lies beyond with probability 2^-68 and 2^-55.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

SECRET_BYTES = 16


class NoiseKey(NamedTuple):
    """The key from which :func:`fedkern.ops.clip_and_noise` draws one release's noise.

    Attributes:
        seed: the 64 bits of Philox's key.
        offset: place in Philox's stream where the release begins: one of 2^57 multiples of 64 below 2^63.  Without an
            offset a key could be looked up in a table of all keys' first numbers.
    """

    seed: int
    offset: int


def noise_key(secret: bytes, client: int, channel: str, release: int) -> NoiseKey:
    """Return the key of a client's release.

    Args:
        secret: 16 bytes that nobody else knows.
        channel: the channel of the release.
        release: number of earlier releases in the channel; no number may be used twice.

    Raises:
        ValueError: ``secret`` has another length, or ``release`` is negative.
    """
    if len(secret) != SECRET_BYTES or release < 0:
        text = f"{len(secret)} bytes and release {release}"
        raise ValueError(f"noise_key: expected {SECRET_BYTES} bytes and a release of at least 0, given {text}")
    words = f"{client}/{release}/{channel}".encode()
    digest = hashlib.blake2b(words, key=secret, digest_size=16, person=b"fedkern noise").digest()
    seed, place = (int.from_bytes(half, "little") for half in (digest[:8], digest[8:]))
    return NoiseKey(seed, (place >> 7) << 6)
