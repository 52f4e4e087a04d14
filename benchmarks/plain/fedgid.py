"""FedGID (arXiv 2504.00850) in plain PyTorch: background intervention and distillation on feature maps.

L = CE(z_I, y) + CE(z_INV, y) + lambda T^2 [KL(f_I || f_G) + KL(f_INV || f_G)]
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain import common

FLAGS: dict[str, Any] = {"alpha": 0.6, "lambda": 1.0, "temperature": 1.0}
ASSUMES = {
    "weighting": "samples", "intervention": True, "distillation": True, "mix_stage": "map",
    "kl_direction": "local_global", "distill_on": "features",
    "intervene": "map",
}  # fmt: skip


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Normalise by the batch in batch norms without changing their running statistics."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(softmax(student / T) || softmax(teacher / T)): the local features against the global ones."""
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_teacher, log_student, reduction="batchmean", log_target=True)


def loss_of(
    model: Any, images: Tensor, labels: Tensor, *, globally: Any, backgrounds: Tensor, args: argparse.Namespace
) -> Tensor:
    """Return the loss of a batch whose samples are mixed with these backgrounds, row by row."""
    stage = model.stage_names[-3]
    maps = model.stages(images, upto=stage)
    features = model.tail(maps, after=stage)
    loss = F.cross_entropy(model.head(features), labels)
    with torch.no_grad():
        anchor = globally.features(images)
        background = globally.stages(backgrounds, upto=stage)
    mixed = args.alpha * maps + (1 - args.alpha) * background
    with running_statistics_kept(model):
        intervened = model.tail(mixed, after=stage)
    loss = loss + F.cross_entropy(model.head(intervened), labels)
    distilled = kl(features, anchor, args.temperature) + kl(intervened, anchor, args.temperature)
    return loss + getattr(args, "lambda") * distilled


def background_bank(split: Any, source: Any) -> Tensor:
    """Return a client's images with a known object, normalised, the object erased to the mean colour."""
    detected = split.masks.flatten(1).any(1)
    return common.normalise(split.images[detected], source).masked_fill(split.masks[detected][:, None], 0)


def main() -> None:
    args, federation = common.start(__doc__, FLAGS)
    model = common.build_model(args, federation.source)
    banks = [background_bank(split, federation.source) for split in federation.source.clients]
    augment = federation.clients[0].augment

    def update(round: int) -> None:
        globally = common.frozen(model)

        def train_client(local: nn.Module, k: int) -> None:
            def loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
                backgrounds = banks[k][torch.randint(len(banks[k]), (len(images),))]
                if augment == "crop-flip":
                    backgrounds = torch.stack([common.crop_and_flip(image) for image in backgrounds])
                backgrounds = backgrounds.to(args.device, non_blocking=True)
                return loss_of(net, images, labels, globally=globally, backgrounds=backgrounds, args=args)

            common.train(local, federation.clients[k], args, loss)

        common.average_clients(model, federation, train_client)

    common.run_rounds(args, model, federation, update)


if __name__ == "__main__":
    main()
