"""Marks on some clients' images: spurious cues, and the patch of a backdoor.

Cues are coloured shapes that give the class away, as in the backdoor experiment of FuseFL (arXiv 2410.20380): a model
that reads the shape loses its accuracy where shapes are random.  Shapes cover equally much of the object in both tests,
``cue_tied`` and ``cue_random``, so the difference of their accuracies is due to the cue alone.

For backdoored clients, a corner patch means the attacker's class (BadNets, arXiv 1708.06733).  Half of such a client's
training images carry the patch and the target label.  The test ``backdoor`` holds the test images of all other classes,
patched and with the target label: its accuracy is the attack's success rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkern.data.data_option import CommonOptions, check_single
from fedkern.data.split import Split
from fedkern.data.types import FederatedData
from fedkern.errors import UserError
from fedkern.streams import stream

SHARE = 0.5
"""Share of a backdoored client's images that carry the patch."""


def draw_patch(images: Tensor, size: int) -> Tensor:
    """Copy images uint8 ``[n, C, H, W]`` with a white square, one pixel off the lower right corner."""
    out = images.clone(memory_format=torch.contiguous_format)
    out[..., -size - 1 : -1, -size - 1 : -1] = 255
    return out


def add_backdoor(data: FederatedData, clients: int, target: int, size: int, seed: int) -> FederatedData:
    """Backdoor the first ``clients`` clients and add a ``backdoor`` copy of every test set."""
    if not clients:
        return data
    check_single(data.name, data.task, CommonOptions(backdoor_clients=clients))
    side = min(data.form.shape[1:])
    if clients > len(data.clients):
        raise UserError(f"backdoor_clients is {clients}, but the data are shared out among {len(data.clients)} clients")
    if target >= len(data.classes):
        raise UserError(f'backdoor_target is {target}, but "{data.name}" has the classes 0 to {len(data.classes) - 1}')
    if size >= side:
        raise UserError(f'backdoor_size is {size}, but the images of "{data.name}" are only {side} pixels high or wide')

    def poison_split(split: Split, client: int) -> Split:
        rng = stream(seed, "backdoor/train", client=client)
        rows = torch.from_numpy(rng.permutation(len(split))[: round(SHARE * len(split))])
        images, labels = split.images.clone(), split.labels.clone()
        images[rows], labels[rows] = draw_patch(images[rows], size), target
        return dataclasses.replace(split, images=images, labels=labels)

    def attack_split(name: str, split: Split) -> Split:
        rows = torch.nonzero(split.labels != target)[:, 0]
        if not len(rows):
            raise UserError(f'the test set "{name or "test"}" has no image of a class other than {target} to attack')
        victims = split.subset(rows)
        labels = torch.full_like(victims.labels, target)
        return dataclasses.replace(victims, images=draw_patch(victims.images, size), labels=labels)

    splits = [poison_split(split, k) if k < clients else split for k, split in enumerate(data.clients)]
    statistics = data.statistics.recounted(splits)
    attacked = {f"{name}_backdoor" if name else "backdoor": attack_split(name, s) for name, s in data.tests.items()}
    return dataclasses.replace(data, clients=tuple(splits), tests=data.tests | attacked, statistics=statistics)


Grid = npt.NDArray[np.floating[Any]]

# Functions of x and y in [-1, 1], y downwards; the ten shapes are distinct on 10x10 pixels.
SHAPES: dict[str, Callable[[Grid, Grid], npt.NDArray[np.bool_]]] = {
    "disc": lambda x, y: x**2 + y**2 <= 1,
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.36),
    "square": lambda x, y: np.ones(np.broadcast(x, y).shape, dtype=np.bool_),
    "frame": lambda x, y: np.maximum(abs(x), abs(y)) >= 0.6,
    "triangle": lambda x, y: 2 * abs(x) <= y + 1,
    "inverted triangle": lambda x, y: 2 * abs(x) <= 1 - y,
    "plus": lambda x, y: np.minimum(abs(x), abs(y)) <= 0.25,
    "cross": lambda x, y: np.minimum(abs(x - y), abs(x + y)) <= 0.35,
    "horizontal bars": lambda x, y: abs(y) >= 0.4 + 0 * x,
    "vertical bars": lambda x, y: abs(x) >= 0.4 + 0 * y,
}


def shape_masks(size: int) -> Tensor:
    """Return all shapes, bool ``[10, size, size]``, True where a pixel's centre is inside."""
    line = (np.arange(size) + 0.5) * (2 / size) - 1
    x, y = line[None, :], line[:, None]
    return torch.from_numpy(np.stack([inside(x, y) for inside in SHAPES.values()]))


def draw_shapes(images: Tensor, shapes: npt.NDArray[np.int64], size: int, rng: np.random.Generator) -> Tensor:
    """Draw a shape on a copy of every image, uint8 ``[n, C, H, W]``, in a random colour and place.

    ``shapes``, int64 ``[n]``, are positions in `SHAPES`.
    """
    n, channels, height, width = images.shape
    if not 1 <= size <= min(height, width):
        raise ValueError(f"size: expected 1 to {min(height, width)} for images of {height}x{width} pixels, got {size}")
    top = torch.from_numpy(rng.integers(0, height - size + 1, size=n))
    left = torch.from_numpy(rng.integers(0, width - size + 1, size=n))
    colours = torch.from_numpy(rng.integers(0, 256, size=(n, channels), dtype=np.uint8))
    rows, columns = top[:, None] + torch.arange(size), left[:, None] + torch.arange(size)
    index = torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]
    out = images.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)  # a pixel's channels side by side
    inside = shape_masks(size)[torch.from_numpy(shapes)][..., None]
    out[index] = torch.where(inside, colours[:, None, None, :], out[index])
    return out.permute(0, 3, 1, 2).contiguous()


def add_cues(data: FederatedData, clients: int, size: int, seed: int) -> FederatedData:
    """Draw cues on the first ``clients`` clients' training images and add two copies of every test set.

    Cues show the image's class, but a random class in ``cue_random``.  Test set ``ood`` gives ``ood_cue_tied`` and
    ``ood_cue_random``.  Object masks stay unchanged: a cue belongs to no object.
    """
    if not clients:
        return data
    classes, side = len(data.classes), min(data.form.shape[1:])
    if clients > len(data.clients):
        raise UserError(f"cue_clients is {clients}, but the data are shared out among {len(data.clients)} clients")
    if classes > len(SHAPES):
        raise UserError(f'there are {len(SHAPES)} cue shapes, too few for the {classes} classes of "{data.name}"')
    if size > side:
        raise UserError(f'cue_size is {size}, but the images of "{data.name}" are only {side} pixels high or wide')

    def draw_cues(split: Split, purpose: str, client: int = -1, *, is_tied: bool = True) -> Split:
        rng = stream(seed, f"cue/{purpose}", client=client)
        shapes = split.labels.numpy() if is_tied else rng.integers(0, classes, size=len(split))
        return dataclasses.replace(split, images=draw_shapes(split.images, shapes, size, rng))

    splits = [draw_cues(split, "train", k) if k < clients else split for k, split in enumerate(data.clients)]
    tests = dict(data.tests)
    for name, split in data.tests.items():
        prefix = f"{name}_" if name else ""
        tests[f"{prefix}cue_tied"] = draw_cues(split, f"test/{name}/tied")
        tests[f"{prefix}cue_random"] = draw_cues(split, f"test/{name}/random", is_tied=False)
    return dataclasses.replace(data, clients=tuple(splits), tests=tests)
