"""Base of one-shot methods that distil the clients' ensemble on the server, perhaps on synthetic images.

A generator makes them without data (DENSE, arXiv 2112.12371, section 3.1).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedkern import ops
from fedkern.errors import UserError
from fedkern.messages.leaves import leaves, map_leaves
from fedkern.methods.base import VECTORS
from fedkern.methods.common.oneshot import MemberNetworks, OneShot, copy_vectors, exhaust, flatten, load
from fedkern.methods.protocol import ClientId, Federation, Message, Phase, Round, Upload
from fedkern.methods.roles import Client, Node, Server
from fedkern.methods.uploads import Declaration
from fedkern.models.networks.generator import Generator
from fedkern.models.networks.network_ensemble import Ensemble, mean_logits
from fedkern.models.precision import to_fp32
from fedkern.models.state.freezing import train_mode
from fedkern.process.device_copies import send
from fedkern.typed_option import option


class _Moments(torch.autograd.Function):
    """Mean and variance of every channel, in channels-last 4 to 6 times as fast as ``torch.var_mean``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.movedim(1, -1).reshape(-1, x.shape[1])
        mean = rows.mean(0)
        ctx.save_for_backward(x, mean)
        return mean, (rows - mean).square_().mean(0)

    @staticmethod
    def backward(ctx: Any, to_mean: Tensor, to_variance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = to_variance * (2 / count)
        shift = to_mean / count - slope * mean
        return torch.addcmul(shift[:, None, None], x, slope[:, None, None])


class BatchNormStatistics:
    """Distance of a batch's statistics from the running statistics at every batch norm of frozen networks.

    ``sum over layers of ||mean(x) - running_mean||_2 + ||var(x) - running_var||_2``, averaged over the networks
    (DeepInversion, arXiv 1912.08795). Hooks read the layers' inputs inside the ``with`` block.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._networks = list(networks)
        self._terms: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for network in self._networks:
            for layer in network.modules():
                if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
                    self._handles.append(layer.register_forward_pre_hook(self._look))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._terms.clear()

    def _look(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        mean, var = _Moments.apply(to_fp32(inputs[0]))
        self._terms.append(torch.linalg.vector_norm(mean - layer.running_mean))
        self._terms.append(torch.linalg.vector_norm(var - layer.running_var))

    def take(self) -> Tensor | float:
        """Return the distance since the last call, 0 without batch norms."""
        terms, self._terms = self._terms, []
        return torch.stack(terms).sum() / len(self._networks) if terms else 0.0


def divergence(student: Tensor, teachers: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of ``KL(ensemble || student)`` over images with different predictions (DENSE, equation 5).

    Gradients reach both. ``student`` is [B, C], ``teachers`` [K, B, C], ``weights`` [K] or [K, 1, C].
    """
    rows = ops.ensemble_kl(student, teachers, weights, mix="logits", reduction="none")
    mixed = mean_logits(teachers.detach(), weights)
    return (rows * (mixed.argmax(1) != student.detach().argmax(1))).mean()


def synthesise(
    generator: Generator,
    teachers: Ensemble,
    student: nn.Module | None,
    options: Distilled.Options,
    draw: torch.Generator,
    classes: int,
    adversarial: float = 0.0,
    restart: bool = True,
) -> tuple[Tensor, Tensor]:
    """Train the generator and its noise, and return the images of the step with the lowest loss.

    With the teachers' mixed logits t, the student's logits s and random labels y:

        L = CE(t(x), y) + bn_weight L_BN(x) - adversarial D(t(x) || s(x))

    L_BN is :class:`BatchNormStatistics` and D :func:`divergence`. Teachers and student (None: no D) are in eval mode.
    ``restart`` draws new weights for the generator first.

    Returns:
        Normalised images fp32 [synthesis_batch, C, H, W] and their target labels int64 [synthesis_batch].
    """
    if student is not None:
        refuse_diverged(student)
    device = teachers.weights.device
    if restart:
        generator.reset(draw)
    generator.train()
    z = send(torch.randn(options.synthesis_batch, generator.nz, generator=draw), device).requires_grad_()
    labels = send(torch.randint(classes, (options.synthesis_batch,), generator=draw), device)
    optimiser = torch.optim.Adam([*generator.parameters(), z], options.generator_lr, betas=(0.5, 0.999))
    best: Tensor | None = None
    lowest = torch.full((), torch.inf, device=device)
    student_frozen = nullcontext() if student is None else frozen(student)
    with student_frozen, BatchNormStatistics(teachers.members if options.bn_weight else ()) as statistics:
        for _ in range(options.generator_steps):
            images = generator(z)
            logits = teachers.logits(images)
            loss = cross_entropy(teachers.mix(logits), labels) + options.bn_weight * statistics.take()
            if adversarial and student is not None:
                loss = loss - adversarial * divergence(student(images), logits, teachers.weights)
            better = (loss < lowest).detach()  # stays on the device, so no step waits for the loss
            lowest = torch.where(better, loss.detach(), lowest)
            best = images.detach() if best is None else torch.where(better, images.detach(), best)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
    if best is None or not bool(torch.isfinite(lowest)):
        raise UserError("The generator diverged: lower the method option generator_lr.")
    return best, labels


def refuse_diverged(student: nn.Module) -> None:
    if not all(bool(torch.isfinite(x).all()) for x in (*student.parameters(), *student.buffers())):
        raise UserError("The student diverged: lower the method option distill_lr.")


def build_generator(server: Server, draw: torch.Generator, **how: Any) -> Generator:
    """Return a fresh generator for the images of the run."""
    channels, height, width = server.image_shape
    network = Generator(
        channels=channels, image_size=(height, width), mean=server.mean, std=server.std, generator=draw, **how
    )
    network.to(server.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Freeze a network, in eval mode, inside the block."""
    training, needed = network.training, [p.requires_grad for p in network.parameters()]
    network.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter, need in zip(network.parameters(), needed, strict=True):
            parameter.requires_grad_(need)
        if training:
            train_mode(network)


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
            self.distil(server, phase, self.ensemble(server), student)
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
        chosen = map_leaves(lambda rows: _from_rows(rows.index_select(0, index)), self._rows)
        return chosen, self._logits.index_select(1, index)

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
            self._totals[name] = self._totals.get(name, 0) + value.detach()
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        return {name: float(total) / self._counts[name] for name, total in self._totals.items()}
