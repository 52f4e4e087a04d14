"""FedIOD's server: the generator and the student during a round (docs/methods/fediod.md, section 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedkern.data.images.transforms import normalise
from fedkern.errors import UserError
from fedkern.methods.common.oneshot_distill import Means
from fedkern.methods.common.oneshot_members import flatten, load, vectors
from fedkern.methods.fediod.losses import distillation, importance, mixture, reached, teacher_terms
from fedkern.methods.fediod.privacy_options import tells_scores
from fedkern.methods.protocol import Message, batch_slices
from fedkern.methods.roles import Server
from fedkern.models.freezing import train_mode
from fedkern.models.generator import Generator
from fedkern.models.optimisers import SGD, Adam
from fedkern.models.transfer import send

ALIKE = 0.01
"""Least mean standard deviation of a pixel over a batch of generated images, normalised; real images have about 1.

Below this value the generator has collapsed to one image, and its saturated sigmoid passes no gradient that would
change that.
"""

NOISE = 100
"""Dimensions of the generator's noise, as in the released CIFAR-10 script."""
STUDENT_MOMENTUM, STUDENT_DECAY, STUDENT_LR_END = 0.9, 3e-5, 1e-5
"""Of the student's optimiser and of its cosine schedule, as in the released CIFAR-10 script."""


def cosine(start: float, end: float, progress: float) -> float:
    """A learning rate that falls from ``start`` to ``end`` along half a cosine while ``progress`` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def make_generator(server: Server, options: Any, draw: torch.Generator) -> Generator:
    """A fresh generator for the images of the run, on the server's device.

    The first images have the data's mean colour.  Teachers may be sure of grey images, and leaving these can take half
    of a short training: on MNIST (Dirichlet 0.1, seed 2) the student reached 38 % from grey images, 73 % from the mean.
    """
    channels, height, width = server.image_shape
    generator = Generator(
        nz=NOISE, ngf=options.ngf, channels=channels, image_size=(height, width), widths=(4, 2, 1),
        mean=server.mean, std=server.std, pixel_mean=server.mean, generator=draw,
    )  # fmt: skip
    return generator.to(server.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def moments(optimiser: SGD | Adam, vector: Tensor) -> dict[str, Tensor]:
    """The optimiser's state of its one tensor, copied to the CPU."""
    state = optimiser.state.get(vector, {})
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def restore(optimiser: SGD | Adam, vector: Tensor, state: Mapping[str, Tensor] | None) -> None:
    """Gives an optimiser the state that :func:`moments` returned.

    None changes nothing.
    """
    device = vector.device
    for name, value in (state or {}).items():  # on CUDA a fused Adam needs its step count there too
        place = torch.device("cpu") if name == "step" and device.type != "cuda" else device
        optimiser.state.setdefault(vector, {})[name] = value.to(place, copy=True)


@dataclass
class Ensemble:
    """The answers of the K clients of an exchange, in the order of their ids.

    Attributes:
        logits: ``[K, B, C, *positions]``.
        pi: client weights ``[K]``, which sum to 1.
        shares: the same numbers, which nobody has to wait for.
        weights: the teachers' weights in the mixture, ``[K, 1 or B, C]``.
        mask: classes that each client knows ``[K, C]``, or None.
    """

    ids: list[int]
    logits: Tensor
    pi: Tensor
    shares: list[float]
    weights: Tensor
    mask: Tensor | None


def first_taught(options: Any, total: int) -> int:
    """The student's first iteration among ``total`` of a run."""
    return int(options.warmup * total) if options.mode == "generator" else 0


class Workshop:
    """Generator, student, their optimisers and averages: read from ``server.state``, written back by :meth:`keep`.

    Args:
        server: its state has ``student``, ``generator`` and the optimiser states of the rounds before.
        options: the method's options.
        total: iterations of the whole run.
    """

    def __init__(self, server: Server, options: Any, total: int) -> None:
        self.server, self.options, self.total = server, options, total
        state = server.state
        self.iteration: int = state["iteration"]
        self._student = flatten(server.build())
        self.student = train_mode(load(self._student, state["student"]))
        vector = self._student.parameters.detach()  # all parameters as one tensor: one kernel a step
        vector.grad = self._to_student = self._student.gradients()
        lr, decay = options.student_lr, STUDENT_DECAY
        self._optimiser: SGD | Adam
        if options.student_optimizer == "sgd":
            self._optimiser = SGD([vector], lr, STUDENT_MOMENTUM, weight_decay=decay)
        else:
            self._optimiser = Adam([vector], lr, weight_decay=decay, decoupled=True)
        self._student_vector = vector
        restore(self._optimiser, vector, state.get("student_moments"))
        self.generates = options.mode == "generator"
        self.first = first_taught(options, total)
        self.running = Means()
        self.x: Tensor | None = None  # images with the generator's graph, until the gradients are back
        if self.generates:
            self._open_generator()

    def _open_generator(self) -> None:
        o, state = self.options, self.server.state
        blank = torch.Generator().manual_seed(0)
        self._flat = flatten(make_generator(self.server, o, blank))
        self.generator: Any = load(self._flat, state["generator"]).train()
        vector = self._flat.parameters.detach()
        vector.grad = self._to_generator = self._flat.gradients()
        self._adam = Adam([vector], o.generator_lr, (0.5, 0.999))
        restore(self._adam, vector, state.get("adam"))
        self._generator_vector = vector

    # -- images ----------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the run's iterations that are done, in [0, 1)."""
        return self.iteration / self.total

    @property
    def teaches(self) -> bool:
        """Whether the warm-up is over, so that the student learns in this iteration."""
        return self.iteration >= self.first

    def generate(self, draw: torch.Generator) -> Tensor:
        """Images for the discriminators and the generator, as they are sent.

        Their graph stays in ``x``.
        """
        z = send(torch.randn(self.options.batch, NOISE, generator=draw), self.server.device)
        with torch.enable_grad():
            x = self.generator(z)
        self.running.add(image_spread=x.detach().std(0).mean())
        sent = self._sent(x.detach())
        # The clients' gradients are at the images as sent (pixels=uint8: rounded) and go to the generator unchanged.
        self.x = x
        return sent

    @torch.no_grad()
    def examples(self, draw: torch.Generator) -> Tensor:
        """The student's images of an iteration, for all steps one after another, as they are sent."""
        o = self.options
        zs = [send(torch.randn(o.batch, NOISE, generator=draw), self.server.device) for _ in range(o.student_steps)]
        return self._sent(torch.cat([self.generator(z) for z in zs]))

    def _sent(self, images: Tensor) -> Tensor:
        if self.options.pixels == "float32":
            return images
        mean, std = (
            send(torch.tensor(v), images.device).view(1, -1, 1, 1) for v in (self.server.mean, self.server.std)
        )
        return ((images * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8)

    def seen(self, sent: Tensor) -> Tensor:
        """Sent images, normalised for the networks as the clients do it (:meth:`Answers.normalised`)."""
        if sent.dtype == torch.uint8:
            sent = normalise(sent, self.server.mean, self.server.std)
        return sent.contiguous(memory_format=torch.channels_last)

    # -- the generator's step --------------------------------------------------------------------------------------

    def gather(self, answers: Mapping[int, Message]) -> Ensemble:
        """Stacks the clients' answers of an exchange."""
        device, state, ids = self.server.device, self.server.state, sorted(answers)
        logits = torch.stack([answers[k]["logits"].to(device) for k in ids])
        samples = torch.tensor([float(self.server.federation.samples[k]) for k in ids])
        pi = samples / samples.sum()
        disclosed = send(torch.stack([state["classes"][k].float() for k in ids]), device)
        scores = None
        if tells_scores(self.options):
            scores = torch.stack([answers[k]["scores"].to(device) for k in ids])
        mask = None if self.options.class_weights == "uniform" else disclosed > 0
        return Ensemble(ids, logits, send(pi, device), pi.tolist(), importance(disclosed, scores), mask)

    def criticise(self, answers: Mapping[int, Message]) -> dict[int, Message]:
        """Computes the generator's losses on the clients' answers, and the messages that ask for gradients.

        Returns:
            For every client its weight ``share`` (pi_k, which is public) and B times the gradient of the losses with
            respect to its logits, ``[B, C, *positions]``.
        """
        ensemble = self.gather(answers)
        logits = ensemble.logits.detach().requires_grad_()
        with torch.enable_grad():
            total, terms = teacher_terms(logits, ensemble.pi, self.options.w_balance)
        (gradient,) = torch.autograd.grad(total, [logits])
        self.running.add(**terms)
        batch = logits.shape[1]
        return {k: {"share": ensemble.shares[i], "logits": gradient[i] * batch} for i, k in enumerate(ensemble.ids)}

    def improve(self, gradients: list[Tensor]) -> None:
        """One step of the generator with the sum of the clients' gradients with respect to the images."""
        x, self.x = self.x, None
        if x is None or not gradients:
            return
        total = gradients[0].to(x.device, copy=True)
        for one in gradients[1:]:
            total += one.to(x.device)
        total /= len(x)
        self._to_generator.zero_()
        reached([x], [total]).backward()
        self._adam.lr = cosine(self.options.generator_lr, 0.0, self.progress)
        self._adam.step()
        self._flat.mark_changed()

    # -- the student's steps ---------------------------------------------------------------------------------------

    def teach(self, images: Tensor, ensemble: Ensemble, size: int) -> None:
        """Steps of the student towards the ensemble on sent images, ``size`` images a step.

        With public images the last step may be smaller, but it has at least two images where ``images`` has two (see
        ``batch_slices``).
        """
        progress = (self.iteration - self.first) / (self.total - self.first)
        lr = cosine(self.options.student_lr, STUDENT_LR_END, progress)
        self._optimiser.lr = lr
        every = ensemble.weights.shape[1] > 1
        target = mixture(ensemble.logits, ensemble.weights, ensemble.mask).argmax(1)
        guesses: list[Tensor] = []
        for rows in batch_slices(len(images), size):
            x = self.seen(images[rows])
            weights = ensemble.weights[:, rows] if every else ensemble.weights
            logits = ensemble.logits[:, rows]
            with torch.enable_grad():
                student_logits = self.student(x)
                loss = distillation(student_logits, logits, weights, ensemble.mask)
            self._to_student.zero_()
            loss.backward()
            self._optimiser.step()
            self._student.mark_changed()
            self.running.add(student_loss=loss)
            guesses.append(student_logits.detach().argmax(1))
        self.running.add(
            student_agreement=(torch.cat(guesses) == target).float().mean(),
            teacher_agreement=(ensemble.logits.argmax(2) == target).float().mean(),
        )

    # -- the end of a round ----------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Writes everything back into the server's state, and the round's means into the server's report.

        Warns in the second half of the run of a generator whose images hardly differ.  In the first half new weights
        give such images too.

        Raises:
            UserError: a parameter of the student or the generator is not finite.
        """
        state = self.server.state
        state["iteration"] = self.iteration
        state["student"] = vectors(self._student)
        if learnt := moments(self._optimiser, self._student_vector):
            state["student_moments"] = learnt
        networks = [("student", "student_lr", self._student)]
        if self.generates:
            networks.append(("generator", "generator_lr", self._flat))
            state["generator"] = vectors(self._flat)
            if learnt := moments(self._adam, self._generator_vector):
                state["adam"] = learnt
        for name, rate, flat in networks:
            if not bool(torch.isfinite(flat.parameters).all()):
                raise UserError(f"The {name} diverged in iteration {self.iteration}: lower the method option {rate}.")
        figures = self.running.read()
        self.server.report.update(figures)
        if self.progress >= 0.5 and (spread := figures.get("image_spread", 1.0)) < ALIKE:
            self.server.warn(
                "generator-collapsed",
                f"The generator's images hardly differ from one another (deviation {spread:.2g} of a pixel, of real "
                f"images about 1, after {self.iteration} iterations), and the student learns nothing from them: lower "
                "the method options generator_lr or critic_lr, or raise w_balance.",
            )
