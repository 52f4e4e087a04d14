"""Embedded image-text data set: canvases of one to three real digits with compositional captions.

Clients differ in background, vocabulary (synonyms and word order) and mixture of digits and colours.  One is a small
minority with rare concepts in its own words, or with noisy images.

A canvas has real digits in colour on a textured background.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from fedkern.data.forms import ImageForm
from fedkern.data.sharing.partition import PartitionSpec, parse_partition
from fedkern.data.sharing.partition import partition as share_out
from fedkern.data.sources.digits import Bytes, enlarge_digits, fixed_split, resize_glyph
from fedkern.data.split import Split
from fedkern.data.types import DataRequest, FederatedData
from fedkern.errors import UserError
from fedkern.streams import stream
from fedkern.tasks.partition_statistics import PartitionStatistics

SIDE, CELL = 32, 16  # a canvas has two by two cells
SUBJECT, OTHER = 14, 11  # side in pixels of the digit that the caption begins with, and of the other digits
INK = {
    "red": (255, 70, 60), "green": (60, 220, 80), "blue": (90, 140, 255), "yellow": (250, 220, 60),
    "purple": (215, 90, 235), "white": (245, 245, 245),
}  # fmt: skip
TEXTURES = ("plain", "gradient", "rows", "columns", "diagonal", "checks", "speckles")
BRIGHTEST = 95  # largest value of a background's channel, of 255, so that every ink stands out
INK_THRESHOLD = 96  # opacity above which a pixel belongs to the digit
_GRID = np.mgrid[0:SIDE, 0:SIDE]


@dataclass(frozen=True)
class Ground:
    """Client's background: a texture and its two colours, uint8 ``[2, 3]``."""

    texture: str
    colours: Bytes


@dataclass(frozen=True)
class Glyph:
    """Digit on a canvas: row in the digits data set, ink, cell (0 to 3, row by row) and side in pixels."""

    row: int
    ink: str
    cell: int
    side: int


@functools.cache
def _glyphs(side: int) -> Bytes:
    return np.stack([resize_glyph(image, side) for image in enlarge_digits()[0]])


def draw_ground(texture: str, rng: np.random.Generator) -> Ground:
    """Return a background of two dark colours that differ visibly."""
    dark = rng.integers(0, BRIGHTEST // 2, size=3)
    second = dark + rng.integers(BRIGHTEST // 4, BRIGHTEST // 2, size=3)
    return Ground(texture, np.stack([dark, second]).astype(np.uint8))


def _texture(kind: str, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return the second colour's share per pixel, ``[SIDE, SIDE]``, at a random phase and scale."""
    y, x = _GRID + rng.uniform(0, SIDE, size=(2, 1, 1))
    period = rng.uniform(5, 9)
    if kind == "plain":
        return np.full((SIDE, SIDE), rng.random())
    if kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        along = np.cos(angle) * x + np.sin(angle) * y
        share: npt.NDArray[np.float64] = (along - along.min()) / (along.max() - along.min())
        return share
    if kind == "speckles":
        return (rng.random((SIDE, SIDE)) < 0.35).astype(np.float64)
    waves = {"rows": (y,), "columns": (x,), "diagonal": ((x + y) / np.sqrt(2),), "checks": (x, y)}[kind]
    pattern: npt.NDArray[np.bool_] = np.logical_xor.reduce([along % period < period / 2 for along in waves])
    return pattern.astype(np.float64)


def draw(ground: Ground, digits: Sequence[Glyph], rng: np.random.Generator) -> tuple[Bytes, npt.NDArray[np.bool_]]:
    """Draw a canvas, and return the image uint8 ``[3, SIDE, SIDE]`` and the digits' mask bool ``[SIDE, SIDE]``."""
    share = _texture(ground.texture, rng)
    dark, light = ground.colours.astype(np.float64)[..., None, None]
    image = (share * light + (1 - share) * dark) * rng.uniform(0.8, 1.2)
    mask = np.zeros((SIDE, SIDE), dtype=np.bool_)
    for placed in digits:
        top, left = (CELL * place + rng.integers(0, CELL - placed.side + 1) for place in divmod(placed.cell, 2))
        where = ..., slice(top, top + placed.side), slice(left, left + placed.side)
        opacity = _glyphs(placed.side)[placed.row]
        alpha = opacity / 255
        image[where] = (1 - alpha) * image[where] + alpha * np.array(INK[placed.ink])[:, None, None]
        mask[where] = opacity > INK_THRESHOLD
    return np.rint(image).clip(0, 255).astype(np.uint8), mask


def add_noise(image: Bytes, limit: int, rng: np.random.Generator) -> Bytes:
    """Change every value uniformly by up to ``limit``, in integers so that all machines agree."""
    change = rng.integers(-limit, limit, size=image.shape, endpoint=True)
    return (image + change).clip(0, 255).astype(np.uint8)


CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The majority clients use the first two words of every concept, the minority client the third.
WORDS: dict[str, tuple[str, str, str]] = {
    "zero": ("zero", "0", "null"), "one": ("one", "1", "single"), "two": ("two", "2", "pair"),
    "three": ("three", "3", "trio"), "four": ("four", "4", "quartet"), "five": ("five", "5", "quintet"),
    "six": ("six", "6", "sextet"), "seven": ("seven", "7", "septet"), "eight": ("eight", "8", "octet"),
    "nine": ("nine", "9", "nonet"),
    "red": ("red", "scarlet", "crimson"), "green": ("green", "emerald", "lime"), "blue": ("blue", "azure", "cobalt"),
    "yellow": ("yellow", "golden", "amber"), "purple": ("purple", "violet", "magenta"),
    "white": ("white", "pale", "ivory"),
    "above": ("above", "over", "atop"), "below": ("below", "under", "beneath"),
    "left": ("left of", "to the left of", "westward of"), "right": ("right of", "to the right of", "eastward of"),
    "place 0": ("in the top left", "at the upper left", "in the north west"),
    "place 1": ("in the top right", "at the upper right", "in the north east"),
    "place 2": ("in the bottom left", "at the lower left", "in the south west"),
    "place 3": ("in the bottom right", "at the lower right", "in the south east"),
    "thing": ("a {colour} {digit}", "some {colour} {digit}", "the {digit} in {colour}"),
    "opening": ("", "a picture of", "this shows"),
}  # fmt: skip
PROMPTS = {
    name: tuple(f"a {ink} {word}" for ink in INK for word, place in zip(WORDS[name], WORDS["place 0"], strict=True))
    for name in CLASSES
} | {
    ink: tuple(f"a {word} {WORDS[name][synonym]}" for name in CLASSES for synonym, word in enumerate(WORDS[ink]))
    for ink in INK
}
"""Zero-shot prompts with all synonyms: a digit in every colour, a colour on every digit."""
KINDS = {"digit": CLASSES, "colour": tuple(INK)}  # kind of label: its classes
CLIENTS = 5
SAMPLES, TEST, VALIDATE = 3_000, 500, 300
CLIENT_TEST = 96  # canvases of every client's own test set: three batches of 32
# Normalisation of the channels.  The images have means of about (0.23, 0.21, 0.19) and standard deviations of about
# (0.18, 0.16, 0.17); recorded runs have these values.
SCALE = (0.24, 0.22, 0.24), (0.25, 0.24, 0.25)
NOISE = 80  # largest change of a pixel's channel, of 255, in the images of a minority with the trait ``noise``
RARE = 0.15  # how often majority clients show a concept of the minority, relative to other concepts

Digits = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Style:
    """Client's style of canvases and captions.

    ``words`` has a synonym for every concept of `WORDS`.  Probabilities: ``digits`` and ``inks``, and ``counts`` of one
    to three digits on a canvas.  ``noise`` is the largest change of a pixel's channel, of 255.
    """

    ground: Ground
    words: dict[str, str]
    digits: npt.NDArray[np.float64]
    inks: npt.NDArray[np.float64]
    counts: npt.NDArray[np.float64]
    noise: int = 0

    def shows(self, concept: str) -> bool:
        kinds = (CLASSES, self.digits), (tuple(INK), self.inks)
        chance = next((shares[names.index(concept)] for names, shares in kinds if concept in names), 1.0)
        return bool(chance > 0.5 / len(CLASSES))


def make_captions(
    request: DataRequest, minority: float, minority_trait: str, held_out: int, labels: str
) -> FederatedData:
    """Draw the canvases of all clients, the validation set and the tests.

    The label is the class of the subject: the digit named first in the caption and drawn largest.  Training, validation
    and test canvases show different handwritten digits.

    With the partition ``attribute`` clients differ in everything, and the last is the minority, with words and concepts
    of its own or ``noise``.  The number of clients changes nothing else about a client.  ``iid``: every client shows
    all styles equally.  Other partitions decide the subjects, in every client's style.

    The test ``""`` has equally many canvases per training client.  ``minority`` needs ``attribute``, and ``unseen``
    shows held-out clients in training clients' words.
    """
    if request.public_samples:
        raise UserError('data set "captions" is made for its clients and has no public samples to give')
    spec, seed = parse_partition(request.partition or "attribute"), request.seed
    clients = CLIENTS if request.clients is None else request.clients
    samples = SAMPLES if request.train_samples is None else request.train_samples
    test_samples = request.test_samples or TEST
    # Other partitions decide the clients' sizes themselves, and so have no minority.
    small = spec.name == "attribute" and clients > 1 and minority > 0
    if minority_trait != "concepts" and not small:
        raise UserError(
            f"Data option minority_trait = {minority_trait} has no effect without a minority: give --partition "
            "attribute, two clients or more and a minority above 0, or leave it out."
        )
    is_rare = small and minority_trait == "concepts"
    styles = [_style(seed, k, rare=is_rare and k == clients - 1, avoid=is_rare) for k in range(clients)]
    if small and not is_rare:
        styles[-1] = replace(styles[-1], noise=NOISE)
    sizes, subjects = _subjects(spec, clients, samples, seed, minority if small else 0.0)
    drawn = enlarge_digits()[1]
    pools = [rows.numpy() for rows in fixed_split(drawn)]

    def canvases(purpose: str, k: int, chosen: list[Style], count: int, subjects: Digits | None = None) -> Split:
        # Each split draws its digits from the same split of the digits data set.
        pool = pools[{"train": 0, "validation": 1}.get(purpose, 2)]
        split = _canvases(chosen, count, subjects, pool, drawn, stream(seed, f"captions/{purpose}", client=k),
                          f"{purpose}/{k}", labels)  # fmt: skip
        if spec.name == "iid" or purpose not in ("test", "validation", "minority"):
            return split
        return replace(split, homes=torch.arange(len(styles))[-len(chosen) :][torch.arange(count) % len(chosen)])

    # Under iid all clients share all styles.
    common = styles if spec.name == "iid" else None
    splits = tuple(canvases("train", k, common or [styles[k]], sizes[k], subjects[k]) for k in range(clients))
    tests = {"": canvases("test", -1, styles, test_samples)}
    if small:
        tests["minority"] = canvases("minority", -1, styles[-1:], test_samples)
    if held_out:
        unseen = [_unseen(seed, k, styles) for k in range(held_out)]
        tests["unseen"] = canvases("unseen", -1, unseen, test_samples)
    validation = canvases("validation", -1, styles, request.validation_samples or VALIDATE)
    test_size = min(CLIENT_TEST, test_samples)
    client_tests = tuple(
        canvases("client-test", k, common or [styles[k]], test_size, _draw_subjects(subjects[k], test_size, seed, k))
        for k in range(clients)
    )
    names = [name for split in (*splits, validation, *tests.values(), *client_tests) for name in split.ids or ()]
    return FederatedData(
        name="captions", classes=KINDS[labels], clients=splits, validation=validation, tests=tests,
        form=ImageForm((3, *validation.images.shape[2:]), *SCALE),
        statistics=PartitionStatistics.of([split.labels.numpy() for split in splits], KINDS[labels], spec.text),
        image_ids=frozenset(names), client_tests=client_tests,
    )  # fmt: skip


def _mixture(size: int, rng: np.random.Generator, liked: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shares: npt.NDArray[np.float64] = rng.dirichlet(np.full(size, 2.0)) * liked
    shares /= shares.sum()
    return shares


def _style(seed: int, client: int, *, rare: bool, avoid: bool) -> Style:
    """Return a client's style: of the minority if ``rare``, avoiding its concepts if ``avoid``."""
    rng = stream(seed, "captions/style", client=client)
    first_texture = int(stream(seed, "captions/texture").integers(len(TEXTURES)))
    ground = draw_ground(TEXTURES[(first_texture + client) % len(TEXTURES)], rng)
    liked = np.ones(len(CLASSES)), np.ones(len(INK))
    concept_rng = stream(seed, "captions/minority")
    for weights, count in zip(liked, (3, 2), strict=True):
        concepts = concept_rng.permutation(len(weights))[:count]
        if avoid:
            weights[concepts] = RARE
        if rare:
            weights[:] = 0.02
            weights[concepts] = 1.0
    digits, inks = (_mixture(len(weights), rng, weights) for weights in liked)
    counts = _mixture(3, rng, np.ones(3))
    words = {concept: choices[2 if rare else int(rng.integers(2))] for concept, choices in WORDS.items()}
    return Style(ground, words, digits, inks, counts)


def _unseen(seed: int, number: int, styles: list[Style]) -> Style:
    """Return a held-out client's style, with words that some training client uses."""
    rng = stream(seed, "captions/unseen", client=number)
    ground = draw_ground(TEXTURES[int(rng.integers(len(TEXTURES)))], rng)
    words = {}
    for concept in WORDS:
        users = [style for style in styles if style.shows(concept)] or styles
        words[concept] = users[int(rng.integers(len(users)))].words[concept]
    sizes = len(CLASSES), len(INK), 3
    digits, inks, counts = (_mixture(size, rng, np.ones(size)) for size in sizes)
    return Style(ground, words, digits, inks, counts)


def _subjects(
    spec: PartitionSpec, clients: int, samples: int, seed: int, minority: float
) -> tuple[list[int], list[Digits | None]]:
    """Return every client's number of canvases and subjects (None: drawn by its style)."""
    if spec.name not in ("iid", "attribute"):
        labels = np.arange(samples) % len(CLASSES)
        parts = share_out(spec, labels, clients, seed, class_count=len(CLASSES))
        return [len(part) for part in parts], [labels[part] for part in parts]
    small = max(1, round(minority * samples)) if minority else 0
    larger = clients - bool(small)
    sizes = [len(part) for part in np.array_split(np.arange(samples - small), larger)] + [small] * bool(small)
    if min(sizes) < 1:
        raise UserError(
            f'data set "captions": {clients} clients are more than {samples} canvases can serve; take fewer clients or '
            "more --train-samples"
        )
    return sizes, [None] * clients


def _draw_subjects(subjects: Digits | None, count: int, seed: int, client: int) -> Digits | None:
    """Draw ``count`` subjects with the frequencies of ``subjects``, or return None."""
    if subjects is None:
        return None
    return stream(seed, "captions/client-test/subjects", client=client).choice(subjects, size=count)


def _choose(shares: npt.NDArray[np.float64], count: int, rng: np.random.Generator) -> Digits:
    """Draw ``count`` positions as ``rng.choice(len(shares), count, p=shares)`` does, in a fifth of its time."""
    ends = shares.cumsum()
    positions: Digits = (ends / ends[-1]).searchsorted(rng.random(count), side="right")
    return positions


def _canvases(
    styles: list[Style],
    count: int,
    subjects: Digits | None,
    pool: Digits,
    labels: Digits,
    rng: np.random.Generator,
    prefix: str,
    kind: str,
) -> Split:
    """Draw ``count`` canvases, with the styles in turn and digits from the rows ``pool``.

    ``labels``: classes of all digits.  ``kind``: a key of `KINDS`.
    """
    by_class = [pool[labels[pool] == label] for label in range(len(CLASSES))]
    images = np.empty((count, 3, SIDE, SIDE), dtype=np.uint8)
    masks = np.empty((count, SIDE, SIDE), dtype=np.bool_)
    targets = np.empty(count, dtype=np.int64)
    texts = []
    for i in range(count):
        style = styles[i % len(styles)]
        number = 1 + int(_choose(style.counts, 1, rng)[0])
        classes = _choose(style.digits, number, rng)
        if subjects is not None:
            classes[0] = subjects[i]
        inks = [tuple(INK)[ink] for ink in _choose(style.inks, number, rng)]
        cells = rng.permutation(4)[:number]
        placed = [
            Glyph(int(by_class[label][rng.integers(len(by_class[label]))]), ink, int(cell), OTHER if j else SUBJECT)
            for j, (label, ink, cell) in enumerate(zip(classes, inks, cells, strict=True))
        ]
        images[i], masks[i] = draw(style.ground, placed, rng)
        if style.noise:
            images[i] = add_noise(images[i], style.noise, rng)
        targets[i] = classes[0] if kind == "digit" else tuple(INK).index(inks[0])
        texts.append(_caption(style.words, classes, inks, cells))
    return Split(
        torch.from_numpy(images),
        torch.from_numpy(targets),
        torch.from_numpy(masks),
        tuple(f"{prefix}/{i}".replace("/-1/", "/") for i in range(count)),
        texts=tuple(texts),
    )


def _caption(words: dict[str, str], classes: Digits, inks: list[str], cells: Digits) -> str:
    """Return a caption such as ``a red three above a blue seven and left of a green one``."""
    things = [
        words["thing"].format(colour=words[ink], digit=words[CLASSES[label]])
        for label, ink in zip(classes, inks, strict=True)
    ]
    (row, column), subject = divmod(int(cells[0]), 2), things[0]
    place = words[f"place {int(cells[0])}"]
    if len(things) == 1:
        return f"{words['opening']} {subject} {place}".strip()
    phrases = []
    diagonal = False
    for thing, cell in zip(things[1:], cells[1:], strict=True):
        down, right = divmod(int(cell), 2)
        if column == right:
            phrases.append(f"{words['above' if row < down else 'below']} {thing}")
        elif row == down:
            phrases.append(f"{words['left' if column < right else 'right']} {thing}")
        else:  # neither above nor beside: the caption names the corners of both
            diagonal = True
            phrases.append(f"with {thing} {words[f'place {int(cell)}']}")
    return f"{words['opening']} {subject} {place + ' ' if diagonal else ''}{' and '.join(phrases)}".strip()
