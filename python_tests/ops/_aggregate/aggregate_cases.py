"""Cases of the aggregate operators: vectors, weights and comparisons."""

import math
import random
from collections.abc import Iterable

import torch
from torch import Tensor

from fedkern.ops import Accumulator
from fedkern.ops._aggregate.reference import philox

CLIENTS = [1, 2, 3, 9, 10, 11, 20, 33]
SIZES = [0, 1, 2, 3, 7, 8, 10, 31, 100, 127, 128, 129, 200, 1000, 1271]
WEIGHTS = ["equal", "counts", "random", "zeros", "tiny", "subnormal", "huge"]

# Found by a search of this seed's stream: place, counter and radius word (0 or 2) that is below 2^12, in either half of
# the sixteen counters of a group; the last two are the lowest, 0.
REFINED_SEED = 5
REFINED = [
    (189771, 47451, 0), (1260580, 315140, 2), (2927392, 731840, 2), (4206848, 1051712, 0), (5516994, 1379250, 0),
    (7862959, 1965743, 2), (4805119844, 1201279956, 2), (19666415436, 4916603868, 0),
]  # fmt: skip


def refined_numbers(counter: int, k: int) -> tuple[float, float]:
    """Return the two numbers of a refined radius word, in Python's floats from the four words that make them."""
    word, turn = (int(w) for w in philox(torch.tensor([counter]), REFINED_SEED)[k : k + 2])
    low_word = int(philox(torch.tensor([counter]), REFINED_SEED, 1)[k])
    radius = math.sqrt(-2 * math.log((word * 2**32 + low_word + 0.5) / 2**64))
    angle = math.pi * (turn - (turn >> 31 << 32)) / 2**31
    return radius * math.cos(angle), radius * math.sin(angle)


def make_vectors(count: int, size: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for _ in range(count)]


def make_weights(kind: str, count: int, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    if kind == "equal":
        return [1.0] * count
    if kind == "counts":
        return [float(draw.randint(1, 5000)) for _ in range(count)]
    weights = [draw.random() + 0.01 for _ in range(count)]
    if kind == "zeros":
        weights[1:] = [value if draw.random() < 0.5 else 0.0 for value in weights[1:]]
    return [value * {"tiny": 1e-300, "subnormal": 1e-320, "huge": 1e150}.get(kind, 1.0) for value in weights]


def accumulate(vectors: Iterable[Tensor], weights: Iterable[float], exact: bool = True) -> Accumulator:
    """Return an accumulator with these vectors."""
    vectors = list(vectors)
    accumulator = Accumulator(len(vectors[0]), exact=exact)
    for vector, weight in zip(vectors, weights, strict=True):
        accumulator.add(vector, weight)
    return accumulator


def exact_mean(vectors: list[Tensor], weights: list[float]) -> Tensor:
    """Return the mean in fp64, with scaled weights so that nothing overflows."""
    top = max(weights)
    shares = [weight / top for weight in weights]
    total = torch.zeros(len(vectors[0]), dtype=torch.float64)
    for vector, share in zip(vectors, shares, strict=True):
        total += vector.double() * share if share else 0.0
    return total / math.fsum(shares)


def close(given: Tensor, exact: Tensor) -> None:
    """Compare results: fp32 within 1e-6, 16 bits within the rounded result plus one ulp.

    Terms that cancel to nothing may differ by fp64's rounding.
    """
    assert given.shape == exact.shape
    assert torch.equal(given.isnan(), exact.isnan())
    given, exact = given[~exact.isnan()], exact[~exact.isnan()]
    error = (given.double() - exact).abs().where(given.double() != exact, 0.0)
    if given.dtype in (torch.float32, torch.float64):
        small = 1e-6 if given.dtype == torch.float32 else 1e-14
        bound = small * exact.abs() + small / 10
    else:
        info = torch.finfo(given.dtype)
        bound = 1.5 * 2.0 ** exact.abs().clamp_min(info.tiny).log2().floor() * info.eps + 1e-15
    assert bool((error <= bound).all()), f"error {error.max():.3g}"


def odd_views(vectors: list[Tensor]) -> list[list[Tensor]]:
    """Return the same vectors behind odd offsets, strides other than one, and as columns of one tensor."""
    size = len(vectors[0])
    columns = torch.stack(vectors, 1)
    wide = [torch.stack([vector, torch.full_like(vector, 777.0)], 1).flatten()[::2] for vector in vectors]
    shifted = []
    for m, vector in enumerate(vectors):
        memory = torch.full((size + 41,), 777.0, dtype=vector.dtype)
        memory[m % 41 : m % 41 + size] = vector
        shifted.append(memory[m % 41 : m % 41 + size])
    return [list(columns.unbind(1)), wide, shifted]
