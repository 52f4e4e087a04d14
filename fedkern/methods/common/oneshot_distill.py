"""Base of one-shot methods that distil the clients' ensemble on the server."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedkern import ops
from fedkern.messages.leaves import leaves, map_leaves
from fedkern.methods.base import VECTORS
from fedkern.methods.common.oneshot import MemberNetworks, OneShot, exhaust
from fedkern.methods.common.oneshot_members import copy_vectors, flatten, load
from fedkern.methods.common.oneshot_synthesis import Synthesis, refuse_diverged
from fedkern.methods.protocol import ClientId, Federation, Message, Phase, Round, Upload
from fedkern.methods.roles import Client, Node, Server
from fedkern.methods.uploads import Declaration
from fedkern.models.networks.generator import Generator
from fedkern.models.networks.network_ensemble import Ensemble
from fedkern.models.state.freezing import train_mode
from fedkern.process.device_copies import send
from fedkern.typed_option import option


class Distilled(MemberNetworks):
    """Base of methods that average the clients' networks and distil their ensemble into the average.

    A round of its own for the distillation keeps the clients' training if it is interrupted. Members are in eval mode,
    the student in train mode. The student starts from the average of the members with its architecture, if any.
    """

    @dataclass(frozen=True)
    class Options(MemberNetworks.Options):
        """Options of methods that distil an ensemble on the server.

        Options from ``nz`` on are the generator's; the first five default to DENSE's published settings.
        """

        student_init: str = option(
            "average",
            "initial weights of the student: the average of the clients with its network, or fresh ones",
            choices=("average", "fresh"),
        )
        temperature: float = option(1.0, "temperature of the distillation", above=0, infinite=True)
        distill_batch: int = option(128, "images per step of the distillation", low=2)
        nz: int = option(256, "dimensions of the generator's noise", low=1)
        ngf: int = option(64, "unit of the generator's channels", low=1)
        generator_steps: int = option(30, "steps of the generator for each batch of images", low=1)
        generator_lr: float = option(1e-3, "learning rate of the generator and of its noise (Adam)", above=0)
        synthesis_batch: int = option(256, "images made at a time", low=2)
        bn_weight: float = option(1.0, "weight of the distance to the members' batch norm statistics", low=0)

    @abstractmethod
    def distil(self, server: Server, phase: Phase, teachers: Ensemble, student: nn.Module) -> None:
        """Train ``student`` in place on the logits of ``teachers``."""

    def follow(
        self,
        student: nn.Module,
        teachers: Ensemble,
        batches: Iterable[tuple[object, Tensor]],
        optimiser: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> dict[str, float]:
        """Train the student for an epoch on batches of images [B, C, H, W] and the members' logits [K, B, C].

        The loss is ``T^2 KL(softmax(mean_k t_k / T) || softmax(s / T))``. ``teacher_agreement`` is the share of images
        with equal predictions of student and ensemble.
        """
        running = Means()
        for images, answers in batches:
            logits = student(images)
            loss = ops.ensemble_kl(logits, answers, teachers.weights, self.options.temperature, mix="logits")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            if schedule is not None:
                schedule.step()
            agrees = logits.detach().argmax(1) == teachers.mix(answers).argmax(1)
            running.add(distil_loss=loss, teacher_agreement=agrees.float().mean())
        return running.read()

    def generator(self, server: Server, draw: torch.Generator) -> Generator:
        o = self.options
        channels, height, width = server.image_shape
        network = Generator(
            nz=o.nz, ngf=o.ngf, channels=channels, image_size=(height, width), mean=server.mean, std=server.std,
            generator=draw,
        )  # fmt: skip
        network.to(server.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network

    def synthesis(self, **settings: Any) -> Synthesis:
        o = self.options
        return Synthesis(
            steps=o.generator_steps, size=o.synthesis_batch, lr=o.generator_lr, batch_norm=o.bn_weight, **settings
        )

    # -- the plan --------------------------------------------------------------------------------------------------

    def rounds(self, federation: Federation) -> Iterator[Round]:
        train, *calibration = super().rounds(federation)
        yield train
        yield Round("distil", exchanges=("distil",), participants="all", trains="student")
        yield from calibration

    def send(self, server: Server, phase: Phase) -> Message | dict[int, Message]:
        return {} if phase.exchange == "distil" else super().send(server, phase)

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        return {} if phase.exchange == "distil" else super().client_update(client, phase, message)

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        return {} if phase.exchange == "distil" else super().expects(server, phase, client, message)

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        if phase.exchange == "update":
            sizes = {name: server.state[name].shape for name in VECTORS if name in server.state}
            sound = self.collect_members(server, phase, uploads)
            alike = (u for u in sound if {n: u.message[n].shape for n in VECTORS if n in u.message} == sizes)
            # Averages the accepted networks of the student's architecture; without any, the state stays fresh.
            super(OneShot, self).server_update(server, phase, alike)
        elif phase.exchange == "distil":
            exhaust(uploads)
            flat = flatten(server.build())
            student = flat.module
            if self.options.student_init == "average":
                load(flat, server.state)
            train_mode(student)
            members = self.build_members(server.build, server.state["members"])
            teachers = Ensemble(members, self.member_weights(server))
            self.distil(server, phase, teachers, student)
            refuse_diverged(student)
            server.state.update(copy_vectors(flat))
            del server.state["members"]  # later rounds do not need the members
        else:
            super().server_update(server, phase, uploads)


def torch_stream(node: Node, purpose: str, phase: Phase) -> torch.Generator:
    """Return a CPU generator, seeded by a node's stream."""
    return torch.Generator().manual_seed(int(node.rng(purpose, phase).integers(2**63)))


class Pool:
    """Pool of samples with every member's logits, computed once per sample.

    Args:
        capacity: number of samples that the pool can hold.
    """

    def __init__(self, teachers: Ensemble, capacity: int) -> None:
        self._teachers, self._capacity = teachers, capacity
        self._rows: Any = None  # nested as a network's inputs
        self._logits = torch.empty(0)  # [K, capacity, C], or [K, capacity, C, H, W]
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @torch.no_grad()
    def add(self, inputs: Any) -> None:
        """Add normalised images fp32 [n, C, H, W], or nested tensors [n, ...]."""
        logits, begin = self._teachers.logits(inputs), self._count
        end = begin + logits.shape[1]
        if not begin:
            self._rows = map_leaves(lambda leaf: leaf.new_empty(self._capacity, *_to_rows(leaf).shape[1:]), inputs)
            self._logits = logits.new_empty(len(logits), self._capacity, *logits.shape[2:])
        for rows, leaf in zip(leaves(self._rows), leaves(inputs), strict=True):
            rows[begin:end] = _to_rows(leaf)
        self._logits[:, begin:end] = logits
        self._count = end

    def take(self, index: Tensor) -> tuple[object, Tensor]:
        """Return inputs of B samples and the members' logits.

        Logits are [K, B, C] or [K, B, C, H, W]; ``index`` is int64 [B] (CPU).
        """
        index = send(index, self._logits.device)
        return map_leaves(lambda rows: _from_rows(rows.index_select(0, index)), self._rows), self._logits.index_select(
            1, index
        )

    def batches(self, size: int, draw: torch.Generator) -> Iterator[Tensor]:
        """Yield an epoch's random positions in batches, without a last batch of one, for batch norm."""
        for batch in torch.randperm(len(self), generator=draw).split(size):
            if len(batch) > 1:
                yield batch


def _to_rows(leaf: Tensor) -> Tensor:
    """Return images in NHWC: selecting rows keeps channels-last and copies whole images."""
    return leaf.permute(0, 2, 3, 1) if leaf.dim() == 4 else leaf


def _from_rows(rows: Tensor) -> Tensor:
    return rows.permute(0, 3, 1, 2) if rows.dim() == 4 else rows


class Means:
    """Means of named figures, each over its own values, without waiting for the device."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, **figures: Tensor) -> None:
        for name, value in figures.items():
            total = self._totals.get(name)
            self._totals[name] = value.detach() if total is None else total + value.detach()
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        return {name: float(total) / self._counts[name] for name, total in self._totals.items()}
