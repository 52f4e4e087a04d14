"""Noise keys: every release has its own key, made from a client's secret.

BLAKE2b (RFC 7693), keyed with the secret, gives a key that reveals neither the secret nor another release's key. An
attacker who finds a key of Philox (:func:`fedkern.ops.clip_and_noise`), in up to 2^64 trials, has the noise of one
release only.

    Random numbers                                   Generator         Bits of key
    noise on gradients, class counts, client means   Philox4x32-10     64 a release, and 57 of place in the stream
    noise of DP-SGD on a CPU                         Mersenne twister  128 a training, spread over the whole state
    noise of DP-SGD on a GPU                         Philox4x32-10     64 a training
    samples of a batch, and the shard in use         Philox4x64-10     128 a training and a step

No generator is cryptographic: the guarantee assumes random numbers. FedIOD's noise follows the normal law to 9.5
standard deviations and DP-SGD's to 8.5, with probability 2^-68 and 2^-55 beyond.
"""

import hashlib
from typing import NamedTuple

SECRET_BYTES = 16


class NoiseKey(NamedTuple):
    """Key of a release's noise for :func:`fedkern.ops.clip_and_noise`.

    Attributes:
        seed: the 64 bits of Philox's key.
        offset: start in the stream, one of 2^57 multiples of 64 below 2^63. Without an offset a table of all keys'
            first numbers would reveal a key.
    """

    seed: int
    offset: int


def noise_key(secret: bytes, client: int, channel: str, release: int) -> NoiseKey:
    """Return the key of a client's release, from a secret of 16 bytes.

    ``release`` counts earlier releases in the channel; no number may be used twice.
    """
    if len(secret) != SECRET_BYTES or release < 0:
        text = f"{len(secret)} bytes and release {release}"
        raise ValueError(f"noise_key: expected {SECRET_BYTES} bytes and a release of at least 0, given {text}")
    words = f"{client}/{release}/{channel}".encode()
    digest = hashlib.blake2b(words, key=secret, digest_size=16, person=b"fedkern noise").digest()
    seed, place = (int.from_bytes(half, "little") for half in (digest[:8], digest[8:]))
    return NoiseKey(seed, (place >> 7) << 6)
