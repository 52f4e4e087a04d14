"""Training of teachers: on public images before a run, and on a client's own images (linear probe, fine-tuning)."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedkern import __version__
from fedkern.errors import UserError
from fedkern.models.optimisers import SGD
from fedkern.models.precision import computing
from fedkern.models.staged import StagedNetwork
from fedkern.models.teacher import Identity, Teacher, content
from fedkern.models.teacher_cache import TELL_EVERY, LogitsCache, file_name, image_keys, read_file, write_file

PROBE_LR, FINETUNE_LR = 1e-3, 1e-5


class Labelled(Protocol):
    """Labelled images: ``labels`` int64 [n] (CPU), and ``take``, which gives normalised images by index.

    The images are augmented if ``take`` gets an ``rng``.
    """

    labels: Tensor

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum and weight decay; the learning rate falls to 0 along half a cosine."""

    epochs: int = 20
    batch_size: int = 32
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4


def pretrain(
    network: nn.Module, data: Labelled, recipe: Recipe, seed: int, progress: Callable[[int], None] | None = None
) -> None:
    """Trains ``network`` in place on all of ``data``, with the data set's augmentation, and leaves it in eval mode.

    ``progress`` is called at the start of every epoch with the epoch's number, from 0.

    Raises:
        UserError: fewer than two images, or the weights became NaN or infinite.
    """
    if len(data) < 2:
        raise UserError(f"a teacher cannot be trained on {len(data)} public images: raise --public-samples.")
    device = next(network.parameters()).device
    labels = data.labels.to(device)
    rng = np.random.default_rng(seed)
    optimiser = SGD(network.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True)
    batches = max(1, len(data) // recipe.batch_size)  # leftover images join these: batch norm fails on a batch of one
    network.train()
    for number in range(recipe.epochs * batches):
        if number % batches == 0:
            parts = np.array_split(rng.permutation(len(data)), batches)
            if progress is not None:
                progress(number // batches)
        optimiser.lr = recipe.lr * (1 + math.cos(math.pi * number / (recipe.epochs * batches))) / 2
        index = parts[number % batches]
        loss = cross_entropy(network(data.take(index, rng)), labels[torch.from_numpy(index).to(device)])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    optimiser.zero_grad()
    network.eval()
    if not all(bool(torch.isfinite(p).all()) for p in network.parameters()):
        raise UserError("the teacher's training on the public images diverged: take another teacher, or more images.")


@computing("fp32")  # runs of either precision read the cached weights
def pretrained(
    network: StagedNetwork, data: Labelled, cache: LogitsCache, *, name: str, recipe: Recipe, seed: int
) -> None:
    """Gives ``network`` the weights that :func:`pretrain` makes, from the cache if they are there.

    The cache key holds everything that decides the bits of the weights: network, images, labels, augmentation, recipe,
    seed, device type, CPU threads, and the versions of torch and fedkern.
    """
    device = next(network.parameters()).device
    identity: Identity = {
        "model": name,
        "data": _digest(data, cache.mean, cache.std, seed),
        "seed": seed,
        **asdict(recipe),
        "initial": content(network),
        "fedkern": __version__,
        "torch": str(torch.__version__),
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
    }
    path = cache.folder / file_name("weights", identity)
    stored = read_file(path, identity)
    if stored is not None and _fits(network, stored):
        network.load_state_dict(stored)
        network.eval()
        return
    if path.exists() and cache.notice is not None:
        cache.notice(f"the cached teacher {path} is damaged and trained anew")
    told = -math.inf

    def progress(epoch: int) -> None:
        nonlocal told
        if cache.notice is not None and time.monotonic() - told >= TELL_EVERY:
            told = time.monotonic()
            cache.notice(f"training {name} on {len(data):,} public images: epoch {epoch + 1} of {recipe.epochs}")

    pretrain(network, data, recipe, seed, progress)
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in network.state_dict().items()}
    write_file(path, lambda: tensors, identity, required=cache.named)


def probe(
    teacher: Teacher, batches: Iterable[Tensor], labels: Tensor, rng: np.random.Generator, *, epochs: int, lr: float
) -> tuple[nn.Linear, Tensor]:
    """Linear probe: trains a copy of the teacher's head on the teacher's features of a client's images.

    Args:
        batches: normalised images ``[B, C, H, W]``, together as many as ``labels``.
        labels: int64 [n] (CPU).
        rng: draws the order of the samples.
        epochs: passes of AdamW with learning rate ``lr`` and batches of at most 128.

    Returns:
        The head, and its logits fp32 ``[n, classes]`` (CPU).
    """
    features = torch.cat([teacher.features(part) for images in batches for part in images.split(teacher.batch)])
    _, head = teacher.copy()
    targets = labels.to(features.device)
    with torch.enable_grad():
        _fit(head, lambda index: (head(features[index]), targets[index]), len(labels), rng, epochs, lr)
    with torch.no_grad():
        return head.requires_grad_(False), teacher.checked(head(features), len(labels)).cpu()


def finetune(
    teacher: Teacher, batches: Sequence[Tensor], labels: Tensor, rng: np.random.Generator, *, epochs: int, lr: float
) -> tuple[nn.Module, Tensor]:
    """Trains a copy of the whole teacher on a client's images.

    The copy stays in eval mode: batch norm keeps the teacher's running statistics, and dropout is off.
    Arguments as for :func:`probe`.

    Returns:
        The trained copy (images to logits), and the copy's logits fp32 ``[n, classes]`` (CPU) of the client's images.
    """
    trunk, head = teacher.copy()
    images = torch.cat(list(batches)).to(teacher.device)
    targets = labels.to(teacher.device)
    both = nn.ModuleList([trunk, head])
    with torch.enable_grad():
        _fit(both, lambda index: (head(trunk(images[index])), targets[index]), len(labels), rng, epochs, lr)
    with torch.no_grad():
        logits = torch.cat([head(trunk(part)) for part in images.split(teacher.batch)])
    return nn.Sequential(trunk, head), teacher.checked(logits, len(labels)).cpu()


def _fit(
    module: nn.Module,
    step: Callable[[Tensor], tuple[Tensor, Tensor]],
    samples: int,
    rng: np.random.Generator,
    epochs: int,
    lr: float,
) -> None:
    """AdamW over random batches of at most 128; ``step(index)`` gives logits and labels."""
    optimiser = torch.optim.AdamW(module.parameters(), lr=lr)
    for _ in range(epochs):
        order = rng.permutation(samples)
        for start in range(0, samples, 128):
            logits, labels = step(torch.from_numpy(order[start : start + 128]))
            optimiser.zero_grad()
            cross_entropy(logits, labels).backward()
            optimiser.step()


def _digest(data: Labelled, mean: Sequence[float], std: Sequence[float], seed: int) -> str:
    """Hash of the labels, of all images without augmentation, and of the first eight images with augmentation."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(data.labels.numpy().tobytes())
    for start in range(0, len(data), 500):
        for key in image_keys(data.take(np.arange(start, min(start + 500, len(data)))), mean, std):
            digest.update(key)
    if len(data):
        for key in image_keys(data.take(np.arange(min(8, len(data))), np.random.default_rng(seed)), mean, std):
            digest.update(key)
    return digest.hexdigest()


def _fits(network: nn.Module, stored: Mapping[str, Tensor]) -> bool:
    own = network.state_dict()
    return own.keys() == stored.keys() and all(
        own[key].shape == stored[key].shape and bool(torch.isfinite(stored[key]).all()) for key in own
    )
