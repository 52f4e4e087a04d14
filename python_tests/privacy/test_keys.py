"""Keys of noise: their parts, and that every part counts."""

import hashlib

import pytest
import torch

from fedkern import ops
from fedkern.privacy.keys import noise_key

SECRET = bytes(range(16))


def test_a_key_is_a_hash_of_all_that_it_belongs_to():
    seed, offset = noise_key(SECRET, 3, "teacher", 12)
    digest = hashlib.blake2b(b"3/12/teacher", key=SECRET, digest_size=16, person=b"fedkern noise").digest()
    assert seed == int.from_bytes(digest[:8], "little")
    assert offset == int.from_bytes(digest[8:], "little") >> 7 << 6


def test_every_bit_of_the_secret_and_every_part_of_the_name_counts():
    """If the noise followed from a seed alone, an attacker who finds the seed would have all of it."""
    keys = {noise_key(SECRET, 0, "a", 0)}
    number = int.from_bytes(SECRET, "big")
    keys |= {noise_key((number ^ 1 << bit).to_bytes(16, "big"), 0, "a", 0) for bit in range(128)}
    names = ((1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "1/a", 0), (11, "a", 0), (1, "a", 1), (0, "a", 11))
    keys |= {noise_key(SECRET, *name) for name in names}
    assert len({seed for seed, _ in keys}) == len({offset for _, offset in keys}) == 1 + 128 + len(names)


def test_the_operator_takes_every_key():
    zero = torch.zeros(2, 100)
    keys = [noise_key(SECRET, 0, "a", release) for release in range(64)]
    drawn = torch.stack([ops.clip_and_noise(zero, 1.0, 1.0, *key) for key in keys])
    assert torch.unique(drawn).numel() > 0.99 * drawn.numel()
    assert abs(float(drawn.std()) - 1) < 0.03
    assert any(seed >= 1 << 63 for seed, _ in keys)
    assert any(offset >= 1 << 62 for _, offset in keys)


def test_what_is_refused():
    for secret, release in ((b"short", 0), (SECRET * 2, 0), (SECRET, -1)):
        with pytest.raises(ValueError, match="noise_key"):
            noise_key(secret, 0, "a", release)
