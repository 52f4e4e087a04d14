"""Fed-LPFM (arXiv 2311.08479) in plain PyTorch: a frozen teacher at every client, a small network that is shared.

    L = (1 - lambda) CE(z, y) + lambda T^2 KL(softmax(t / T) || softmax(z / T))

The teacher is a larger network trained on the public images, as fedkern's embedded one is; its logits of a client's
images are computed once.
"""

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.plain import common

FLAGS: dict[str, Any] = {"lambda": 0.5, "temperature": 1.0, "pretrain_epochs": 20}
ASSUMES = {
    "weighting": "samples", "teacher": "pretrained", "mixing": "convex", "teachers": 1, "prior": "none",
    "mapping": "auto", "backbone": "consistent", "teacher_view": "cached", "teacher_tuning": "zero-shot",
    "teacher_top_k": 0,
}  # fmt: skip
IGNORES = ("prompts", "tuning_epochs", "tuning_lr", "teacher_cache")
"""Method options that say nothing where the others are as :data:`ASSUMES` has them."""
LARGER = (("resnet8", 32), ("cnn", 64), ("resnet8", 64), ("resnet18", 32))
PRETRAINING = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
PRETRAINING_BATCH = 32


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, teacher: Tensor, args: argparse.Namespace) -> Tensor:
    logits = model(images)
    weight, temperature = getattr(args, "lambda"), args.temperature
    distilled = F.kl_div(
        F.log_softmax(logits / temperature, dim=1), F.softmax(teacher / temperature, dim=1), reduction="batchmean"
    )
    return (1 - weight) * F.cross_entropy(logits, labels) + weight * temperature**2 * distilled


def larger_model(args: argparse.Namespace, source: Any, client_model: nn.Module) -> Any:
    """Return the first network of the list that has more parameters than the shared one."""
    made = (common.build_model(args, source, name, width) for name, width in LARGER)
    size = sum(parameter.numel() for parameter in client_model.parameters())
    return next(model for model in made if sum(parameter.numel() for parameter in model.parameters()) > size)


def pretrain(model: nn.Module, public: common.Images, epochs: int) -> None:
    """Train by SGD on the public images, the learning rate falling to 0 along half a cosine."""
    batches = DataLoader(public, batch_size=PRETRAINING_BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), **PRETRAINING)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * len(batches))
    model.train()
    for _ in range(epochs):
        for images, labels in common.on(batches, common.device_of(model)):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.requires_grad_(False).eval()


@torch.no_grad()
def with_logits(dataset: common.Images, teacher: nn.Module) -> common.Images:
    """Return the same samples, each with the teacher's logits of its unaugmented image."""
    device = common.device_of(teacher)
    logits = torch.cat([teacher(images.to(device)).cpu() for images in dataset.images.split(256)])
    return common.Images(dataset.images, *dataset.columns, logits, augment=dataset.augment)


def main() -> None:
    args, federation = common.start(__doc__, FLAGS)
    model = common.build_model(args, federation.source)
    if federation.public is None:
        raise SystemExit("the teacher is trained on public images: give --public-samples")
    teacher = larger_model(args, federation.source, model)
    public_proxy = copy.deepcopy(model)
    for network in (teacher, public_proxy):
        pretrain(network, federation.public, args.pretrain_epochs)
    common.evaluate(teacher, federation.tests)
    common.evaluate(public_proxy, federation.tests)
    clients = [with_logits(dataset, teacher) for dataset in federation.clients]

    def train_client(local: nn.Module, k: int) -> None:
        common.train(local, clients[k], args, lambda net, *batch: loss_of(net, *batch, args))

    common.run_rounds(args, model, federation, lambda _: common.average_clients(model, federation, train_client))


if __name__ == "__main__":
    main()
