"""An iteration of FedIOD's stage 2 with twenty teachers of one architecture, against the plain loop over them.

Ours is the method as the engine runs it in one process, message by message: discriminators side by side, teachers with
batch norm folded, the student's five batches answered at once, the losses by fedkern.ops.  The loop is what one writes
from the paper: every discriminator and every teacher in turn (in eval mode, without gradients of their own), eager
losses on one autograd graph, one Adam for all discriminators; in torch's default layout, and channels-last.

The losses alone are those of the generator (clarity, diversity) and of the student, forward and backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import compare, device
from torch import Tensor, nn

from fedkern import models
from fedkern.data import FederatedData, PartitionStatistics, Split
from fedkern.engine import RunConfig
from fedkern.engine.context import RunContext
from fedkern.engine.parties import Client, Server
from fedkern.methods import FedIOD, Step, Upload
from fedkern.methods.common.oneshot_members import flatten, vectors
from fedkern.methods.fediod.losses import distillation, importance, teacher_terms
from fedkern.methods.fediod.presets import settle
from fedkern.models.discriminator import PatchDiscriminators

CLIENTS, BATCH, CLASSES, SIDE, STEPS = 20, 64, 10, 32, 5
OPTIONS: dict[str, Any] = {
    "preset": "paper",
    "batch": BATCH,
    "student_steps": STEPS,
    "ngf": 16,
    "ndf": 16,
    "class_weights": "counts",
}
LAST = torch.channels_last


def federation() -> FederatedData:
    """Clients of one batch of random images; what they show does not change the time."""
    rng = np.random.default_rng(0)

    def split(count: int) -> Split:
        images = rng.integers(0, 256, (count, 3, SIDE, SIDE)).astype(np.uint8)
        return Split(torch.from_numpy(images), torch.from_numpy(rng.integers(0, CLASSES, count)))

    clients, classes = tuple(split(BATCH) for _ in range(CLIENTS)), tuple(str(c) for c in range(CLASSES))
    return FederatedData(
        name="random",
        classes=classes,
        clients=clients,
        validation=split(8),
        tests={"": split(8)},
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        augment="none",
        statistics=PartitionStatistics.of([client.labels.numpy() for client in clients], classes, "iid"),
    )


def teachers(model: str, width: int) -> list[Any]:
    made = []
    for k in range(CLIENTS):
        network = models.build(model, classes=CLASSES, channels=3, image_size=SIDE, seed=k, width=width)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                generator = torch.Generator(device="cpu").manual_seed(k)
                layer.running_mean.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr,operator]
                layer.running_var.uniform_(0.5, 2, generator=generator)  # type: ignore[union-attr,operator]
        made.append(network.eval().requires_grad_(False).to(device()))
    return made


def ours(networks: list[Any], data: FederatedData, model: str, width: int) -> Callable[[], Any]:
    """An iteration as the engine plays it."""
    config = RunConfig.make(
        "fediod", data="cifar10", clients=CLIENTS, model=model, width=width, augment="none", threads=1,
        device=device().type, options=OPTIONS,
    )  # fmt: skip
    bench = RunContext(config, data)
    method, server = FedIOD(FedIOD.Options.parse(config.options)), Server(bench)
    method.start(server)
    clients = {k: Client(bench, k, {"teacher": vectors(flatten(copy.deepcopy(n)))}) for k, n in enumerate(networks)}
    for k, client in clients.items():
        server.state["classes"][k] = torch.bincount(client.labels, minlength=CLASSES).float()

    def iteration() -> None:
        for kind in ("images", "gradients", "distil"):
            step = Step(0, "distil", f"{kind} 0")
            sent: Any = method.send(server, step)
            answers = method.cohort_update(clients, step, sent)
            assert answers is not None
            method.server_update(server, step, (Upload(k, BATCH, answer) for k, answer in answers.items()))

    return iteration


def plain(networks: list[Any], data: FederatedData, student: Any, layout: torch.memory_format) -> Callable[[], Any]:
    """The same as one writes it from the paper."""
    where, generator = device(), torch.Generator(device="cpu").manual_seed(0)
    place = {"device": where, "memory_format": layout}
    networks = [copy.deepcopy(network).to(**place) for network in networks]
    critics = nn.ModuleList(PatchDiscriminators([generator], ndf=OPTIONS["ndf"]) for _ in range(CLIENTS)).to(where)
    made = models.Generator(nz=100, ngf=OPTIONS["ngf"], widths=(4, 2, 1), image_size=SIDE, generator=generator)
    made.to(**place)
    student = copy.deepcopy(student).train().requires_grad_(True).to(**place)
    to_g, to_d = (torch.optim.Adam(m.parameters(), 1e-4, betas=(0.5, 0.999)) for m in (made, critics))
    to_s = torch.optim.SGD(student.parameters(), 5e-3, 0.9, weight_decay=3e-5)
    real = torch.stack([(c.images.float().to(where) / 255 - 0.5) / 0.25 for c in data.clients])
    real = torch.stack([images.contiguous(memory_format=layout) for images in real])
    counts = torch.stack([torch.bincount(c.labels, minlength=CLASSES).float() for c in data.clients]).to(where)
    by_class, pi = counts / counts.sum(0), torch.full((CLIENTS,), 1 / CLIENTS, device=where)

    def bce(patches: Tensor, label: float) -> Tensor:
        return F.binary_cross_entropy_with_logits(patches, torch.full_like(patches, label))

    def iteration() -> None:
        x = made(torch.randn(BATCH, 100, device=where))
        loss = torch.zeros((), device=where)
        for k, critic in enumerate(critics):
            loss = loss + (bce(critic(x.detach()), 0.0) + bce(critic(real[k]), 1.0)) / (2 * CLIENTS)
        to_d.zero_grad()
        loss.backward()
        to_d.step()
        logits = torch.stack([network(x) for network in networks]).log_softmax(2)
        loss = eager_generator(logits, pi)
        for k, critic in enumerate(critics):
            loss = loss + pi[k] * bce(critic(x), 1.0)
        to_g.zero_grad()
        loss.backward()
        to_g.step()
        for _ in range(STEPS):
            with torch.no_grad():
                x = made(torch.randn(BATCH, 100, device=where))
                logits = torch.stack([network(x) for network in networks]).log_softmax(2)
                scores = torch.stack([critic(x).sigmoid().mean((0, 2, 3)) for critic in critics])
            loss = eager_student(student(x), logits, by_class, scores)
            to_s.zero_grad()
            loss.backward()
            to_s.step()

    return iteration


def eager_generator(logits: Tensor, pi: Tensor) -> Tensor:
    """Clarity minus the Jensen-Shannon divergence, client by client."""
    clarity, mixed = logits.new_zeros(()), torch.zeros_like(logits[0])
    for weight, own in zip(pi, logits, strict=True):
        log_p = F.log_softmax(own, 1)
        clarity = clarity - weight * (log_p.exp() * log_p).sum(1).mean()
        mixed = mixed + weight * log_p.exp()
    jsd = -(mixed * mixed.clamp_min(1e-12).log()).sum(1).mean() - clarity
    return clarity - jsd


def eager_student(student: Tensor, logits: Tensor, by_class: Tensor, scores: Tensor) -> Tensor:
    """Half the variance of the difference to the ensemble, weighted class by class and image by image."""
    weights = [own[None] * r[:, None] for own, r in zip(by_class, scores, strict=True)]
    total = torch.stack(weights).sum(0)
    target = torch.zeros_like(student)
    for weight, own in zip(weights, logits, strict=True):
        target = target + weight / total * own
    return (target - student).var(1, correction=0).mean() / 2


@pytest.mark.parametrize(("model", "width"), [("resnet8", 16), ("cnn", 32)])
def test_step(benchmark: Any, model: str, width: int) -> None:
    networks, data = teachers(model, width), federation()
    compare(
        benchmark,
        "fediod_step",
        f"iteration, K={CLIENTS} {model} of width {width}, B={BATCH}, {SIDE} pixels, {STEPS} student steps",
        {
            "fedkern": ours(networks, data, model, width),
            "plain loop": plain(networks, data, networks[0], torch.contiguous_format),
            "channels-last loop": plain(networks, data, networks[0], LAST),
        },
        floors={"plain loop": 1.5},
        gpu_floors={"plain loop": 3.0},
        pairs=5,
        threads=1,
    )


@pytest.mark.parametrize(("batch", "classes"), [(64, 10), (64, 100)])
def test_losses(benchmark: Any, batch: int, classes: int) -> None:
    generator, where = torch.Generator(device="cpu").manual_seed(0), device()
    draw = lambda *shape: torch.randn(*shape, generator=generator, device="cpu").to(where)  # noqa: E731
    logits, student = draw(CLIENTS, batch, classes).log_softmax(2), draw(batch, classes)
    by_class, scores = draw(CLIENTS, classes).softmax(0), draw(CLIENTS, batch).sigmoid()
    pi = torch.full((CLIENTS,), 1 / CLIENTS, device=where)
    s: SimpleNamespace = settle(FedIOD.Options(**OPTIONS))

    def fast() -> tuple[Tensor, Tensor]:
        t, x = logits.detach().requires_grad_(), student.detach().requires_grad_()
        weights = importance(by_class, scores)
        total, _ = teacher_terms(t, pi, s, None, weights, None)
        (a,) = torch.autograd.grad(total, t)
        (b,) = torch.autograd.grad(distillation(x, logits, weights, None, s), x)
        return a, b

    def eager() -> tuple[Tensor, Tensor]:
        t, x = logits.detach().requires_grad_(), student.detach().requires_grad_()
        (a,) = torch.autograd.grad(eager_generator(t, pi), t)
        (b,) = torch.autograd.grad(eager_student(x, logits, by_class, scores), x)
        return a, b

    for got, expected in zip(fast(), eager(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    compare(
        benchmark,
        "fediod_step",
        f"losses of generator and student, K={CLIENTS}, B={batch}, C={classes}",
        {"fedkern": fast, "eager": eager},
        floors={"eager": 4.0},
        threads=1,
    )
