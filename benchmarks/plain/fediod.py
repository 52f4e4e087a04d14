"""FedIOD (arXiv 2312.14478) in plain PyTorch: one generator against many private discriminators.

Every client trains a teacher.  Then a generator learns images that look real to the clients' discriminators, that the
teachers are sure of and that they tell apart, and a student learns from the weighted ensemble of the teachers.
"""

import argparse
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.plain import common
from benchmarks.plain.fedavg import loss_of as teacher_loss
from fedkern.models.networks.discriminator import PatchDiscriminators, whole_image
from fedkern.models.networks.generator import Generator

FLAGS: dict[str, Any] = {
    "holdout": 0.0, "iterations": 30, "batch": 32, "warmup": 0.5, "student_steps": 3, "ngf": 16, "ndf": 16,
    "critic_layers": 0, "generator_lr": 1e-3, "critic_lr": 2e-4, "student_lr": 0.05, "w_real": 8.0, "w_balance": 2.0,
}  # fmt: skip
ASSUMES = {
    "mode": "generator", "models": "", "student_optimizer": "sgd", "class_weights": "counts", "disc_weight": False,
    "pixels": "float32", "shards": 1, "histogram_noise": 0.0, "teacher_dp": False,
    "teacher_temperature": 1.0, "weight_floor": 0.0,
}  # fmt: skip
IGNORES = ("batched", "delta", "epsilon", "clip_d", "noise", "teacher_share", "fresh_statistics")
NOISE, STUDENT_DECAY = 100, 3e-5
BETAS = (0.5, 0.999)


def cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy over the last axis, in nats."""
    return torch.special.entr(probabilities).sum(-1)


def generator_loss(
    logits: Sequence[Tensor], patches: Sequence[Tensor], shares: Sequence[float], args: argparse.Namespace
) -> Tensor:
    """Return realism, clarity, diversity and balance of images from the answers of teachers and discriminators."""
    probabilities = [x.softmax(1) for x in logits]
    mixture = sum(share * p for share, p in zip(shares, probabilities, strict=True))
    clarity = sum(share * entropy(p).mean() for share, p in zip(shares, probabilities, strict=True))
    diversity = entropy(mixture).mean() - clarity
    balance = -sum(share * entropy(p.mean(0)) for share, p in zip(shares, probabilities, strict=True)) / math.log(2)
    realism = sum(share * F.softplus(-x).mean() for share, x in zip(shares, patches, strict=True))
    return args.w_real * realism + clarity - diversity + args.w_balance * balance


def ensemble(logits: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return the mean of the teachers' log-probabilities [B, C] with weights [K, C] of their classes."""
    return sum(w * x.log_softmax(1) for w, x in zip(weights, logits, strict=True))


def student_loss(student: Tensor, target: Tensor) -> Tensor:
    """Return half the variance over the classes of the logits' difference: the divergence at infinite temperature."""
    return 0.5 * (student - target).var(1, unbiased=False).mean()


def class_weights(labels: Sequence[Tensor], classes: int) -> Tensor:
    """Return every client's share [K, C] of a class's samples, equal shares where no client has one."""
    counts = torch.stack([torch.bincount(targets, minlength=classes) for targets in labels]).float()
    total = counts.sum(0)
    return torch.where(total > 0, counts / total.clamp_min(1), 1 / len(counts))


def real_batches(dataset: common.Images, size: int, device: torch.device) -> Iterator[Tensor]:
    """Yield a round's real images: once through the client's samples, the last batch filled up."""
    for images, *_ in common.on(DataLoader(dataset, batch_size=size, shuffle=True), device):
        yield images if len(images) == size else images[torch.arange(size) % len(images)]


def train_teachers(federation: common.Federation, args: argparse.Namespace) -> list[nn.Module]:
    teachers = []
    for dataset in federation.clients:
        teacher = common.build_model(args, federation.source)
        held = min(round(args.holdout * len(dataset)), len(dataset) - 1)
        rows = torch.randperm(len(dataset))[held:]
        data = common.Images(dataset.images[rows], dataset.columns[0][rows], augment=dataset.augment)
        common.train(teacher, data, args, teacher_loss)
        teachers.append(teacher.requires_grad_(False).eval())
    return teachers


def main() -> None:
    args, federation = common.start(__doc__, FLAGS)
    source, clients = federation.source, federation.clients
    channels, height, width = source.form.shape
    student = common.build_model(args, source)
    teachers = train_teachers(federation, args)
    generator = Generator(
        nz=NOISE, ngf=args.ngf, channels=channels, image_size=(height, width), widths=(4, 2, 1),
        mean=source.form.mean, std=source.form.std, pixel_mean=source.form.mean,
        generator=torch.Generator().manual_seed(args.seed),
    ).to(args.device)  # fmt: skip
    critics = [
        PatchDiscriminators(
            [torch.Generator().manual_seed(args.seed * len(clients) + k)], channels=channels, ndf=args.ndf,
            layers=args.critic_layers or whole_image(height, width),
        ).to(args.device)
        for k in range(len(clients))
    ]  # fmt: skip
    of_generator = torch.optim.Adam(generator.parameters(), lr=args.generator_lr, betas=BETAS)
    of_critics = [torch.optim.Adam(critic.parameters(), lr=args.critic_lr, betas=BETAS) for critic in critics]
    of_student = torch.optim.SGD(student.parameters(), lr=args.student_lr, momentum=0.9, weight_decay=STUDENT_DECAY)
    shares = [size / sum(federation.sizes) for size in federation.sizes]
    weights = class_weights([dataset.columns[0] for dataset in clients], len(source.classes)).to(args.device)
    iterations = args.iterations or math.ceil(max(federation.sizes) / args.batch)
    total = args.rounds * iterations
    warm = int(args.warmup * total)
    iteration = 0

    def update(round: int) -> None:
        nonlocal iteration
        real = [real_batches(dataset, args.batch, args.device) for dataset in clients]
        generator.train()
        student.train()
        for _ in range(iterations):
            progress = iteration / total
            images = generator(torch.randn(args.batch, NOISE, device=args.device))
            for critic, optimizer, batches in zip(critics, of_critics, real, strict=True):
                batch = next(batches, None)
                if batch is None:
                    continue
                optimizer.param_groups[0]["lr"] = cosine(args.critic_lr, 0.0, progress)
                optimizer.zero_grad()
                loss = F.softplus(critic(images.detach())).mean() + F.softplus(-critic(batch)).mean()
                (loss / 2).backward()
                optimizer.step()
            loss = generator_loss(
                [teacher(images) for teacher in teachers], [critic(images) for critic in critics], shares, args
            )
            of_generator.param_groups[0]["lr"] = cosine(args.generator_lr, 0.0, progress)
            of_generator.zero_grad()
            loss.backward()
            of_generator.step()
            if iteration >= warm:
                lr = cosine(args.student_lr, 1e-5, (iteration - warm) / (total - warm))
                of_student.param_groups[0]["lr"] = lr
                for _ in range(args.student_steps):
                    with torch.no_grad():
                        images = generator(torch.randn(args.batch, NOISE, device=args.device))
                        target = ensemble([teacher(images) for teacher in teachers], weights)
                    of_student.zero_grad()
                    student_loss(student(images), target).backward()
                    of_student.step()
            iteration += 1

    common.run_rounds(args, student, federation, update)
    for teacher in teachers:
        common.evaluate(copy.deepcopy(teacher), federation.tests)


if __name__ == "__main__":
    main()
