"""Training of teachers on public images before a run, and on a client's own images (linear probe, fine-tuning)."""

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedkern import __version__
from fedkern.errors import UserError
from fedkern.models.networks.staged import StagedNetwork
from fedkern.models.optimisers import SGD
from fedkern.models.precision import compute_in
from fedkern.models.teachers.teacher import Identity, Teacher, hash_state
from fedkern.models.teachers.teacher_cache import LogitsCache, image_keys, limit_notices

PROBE_LR, FINETUNE_LR = 1e-3, 1e-5


class Labelled(Protocol):
    labels: Tensor

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum, weight decay, and a learning rate that falls to 0 along half a cosine."""

    epochs: int = 20
    batch_size: int = 32
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4


def pretrain(
    network: nn.Module, data: Labelled, recipe: Recipe, seed: int, progress: Callable[[int], None] | None = None
) -> None:
    """Train ``network`` in place on augmented ``data``, and leave it in eval mode.

    ``progress`` gets the number of every epoch, from 0, at its start.
    """
    if len(data) < 2:
        raise UserError(
            f"a teacher cannot be trained on {len(data)} public images: raise --public-samples, or give more items in "
            "public=DATASET."
        )
    if int(data.labels.min()) < 0:
        raise UserError(
            "a teacher learns from public images with classes of the run, and these have none: give items (image, "
            "class) in public=DATASET, or another teacher."
        )
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


@compute_in("fp32")  # runs of either precision read the cached weights
def load_or_pretrain(
    network: StagedNetwork, data: Labelled, cache: LogitsCache, *, name: str, recipe: Recipe, seed: int = 0
) -> None:
    """Give ``network`` the weights of :func:`pretrain`, from the cache if possible.

    The cache key holds everything that decides the bits of the weights.
    """
    device = next(network.parameters()).device
    identity: Identity = {
        "model": name,
        "data": _digest(data, cache.mean, cache.std, seed),
        "seed": seed,
        **asdict(recipe),
        "initial": hash_state(network),
        "fedkern": __version__,
        "torch": str(torch.__version__),
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
    }
    if (stored := cache.read("weights", identity)) is not None:
        network.load_state_dict(stored)
        network.eval()
        return
    tell, total = limit_notices(cache.notice), f"of {recipe.epochs}"
    images = f"{len(data):,} public images"
    pretrain(network, data, recipe, seed, lambda epoch: tell(f"training {name} on {images}: epoch {epoch + 1} {total}"))
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in network.state_dict().items()}
    cache.write("weights", identity, lambda: tensors)


def tune_copy(
    teacher: Teacher,
    batches: Iterable[Tensor],
    labels: Tensor,
    rng: np.random.Generator,
    *,
    head_only: bool,
    epochs: int,
    lr: float,
) -> tuple[nn.Module, Tensor]:
    """Train a copy of the teacher on a client's images with AdamW and batches of at most 128.

    The copy stays in eval mode: batch norm keeps the teacher's running statistics, and dropout is off.  ``head_only``
    trains the head alone, on the teacher's features (linear probe).

    Returns:
        The trained copy (images to logits; of a probe: features to logits), and its logits fp32 ``[n, classes]`` (CPU).
    """
    network = teacher.classifier
    module = copy.deepcopy(network.head if head_only else network).requires_grad_(True)
    if head_only:
        inputs = torch.cat([teacher.features(part) for images in batches for part in images.split(teacher.batch)])
    else:
        inputs = torch.cat(list(batches)).to(teacher.device)
    targets = labels.to(inputs.device)
    optimiser = torch.optim.AdamW(module.parameters(), lr=lr)
    for _ in range(epochs):
        for index in torch.from_numpy(rng.permutation(len(labels))).split(128):
            with torch.enable_grad():
                loss = cross_entropy(module(inputs[index]), targets[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    module.requires_grad_(False)
    with torch.no_grad():
        logits = torch.cat([module(part) for part in inputs.split(len(inputs) if head_only else teacher.batch)])
    return module, teacher.check_logits(logits, len(labels)).cpu()


def _digest(data: Labelled, mean: Sequence[float], std: Sequence[float], seed: int) -> str:
    """Hash the labels, all images without augmentation, and the first eight with augmentation."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(data.labels.numpy().tobytes())
    for start in range(0, len(data), 500):
        digest.update(b"".join(image_keys(data.take(np.arange(start, min(start + 500, len(data)))), mean, std)))
    if len(data):
        augmented = data.take(np.arange(min(8, len(data))), np.random.default_rng(seed))
        digest.update(b"".join(image_keys(augmented, mean, std)))
    return digest.hexdigest()
