"""Server of FedIOD: generator and student during a round (docs/methods/fediod.md, section 4)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fedkern.data.images.transforms import normalise
from fedkern.errors import UserError
from fedkern.methods.common.oneshot import copy_vectors, flatten, floor_counts, load
from fedkern.methods.common.oneshot_distill import Means, build_generator
from fedkern.methods.fediod.iod_options import IODOptions
from fedkern.methods.fediod.losses import distillation, importance, mixture, scalar_of, teacher_log_probs, teacher_terms
from fedkern.methods.protocol import ClientId, Message, batch_slices
from fedkern.methods.roles import Node, Server
from fedkern.models.networks.generator import Generator
from fedkern.models.optimisers import SGD, Adam, cosine
from fedkern.models.state.freezing import train_mode
from fedkern.process.device_copies import send

ALIKE = 0.01
"""Least mean standard deviation of a pixel over a batch of generated images, normalised; real images have about 1.

Below this value the generator has collapsed to one image, and its saturated sigmoid passes no gradient that would
change that.
"""

N = TypeVar("N", bound=nn.Module)
NOISE = 100
"""Dimensions of the generator's noise, as in the released CIFAR-10 script."""
STUDENT_MOMENTUM, STUDENT_DECAY, STUDENT_LR_END = 0.9, 3e-5, 1e-5
"""Settings of the student's optimiser and of its cosine schedule, as in the released CIFAR-10 script."""


def stack_class_counts(server: Server, ids: Sequence[ClientId], floor: float) -> Tensor:
    """Return the disclosed class counts, fp32 ``[K, C]``, with their floor, or ones ``[K, 1]``."""
    return floor_counts(torch.stack([server.state["classes"][k].float() for k in ids]), floor)


def prepare_images(images: Tensor, node: Node) -> Tensor:
    """Normalise sent images for the networks: fp32, channels-last, on the node's device."""
    if images.dtype == torch.uint8:
        images = normalise(images, node.mean, node.std)
    return images.detach().to(node.device, memory_format=torch.channels_last)


def make_generator(server: Server, options: IODOptions, draw: torch.Generator) -> Generator:
    """Return a fresh generator for the images of the run.

    The first images have the data's mean colour. Teachers may be sure of grey images, and leaving these can take half
    of a short training: on MNIST (Dirichlet 0.1, seed 2) the student reached 38 % from grey images, 73 % from the mean.
    """
    return build_generator(server, draw, nz=NOISE, ngf=options.ngf, widths=(4, 2, 1), pixel_mean=server.mean)


class Learner(Generic[N]):
    """Network of the server with an optimiser over all its parameters as one tensor: one kernel a step."""

    def __init__(
        self, module: N, optimise: Callable[[list[Tensor]], SGD | Adam], state: dict[str, Any], key: str, moments: str
    ) -> None:
        self._state, self._key, self._moments = state, key, moments
        self._flat = flatten(module)
        load(self._flat, state[key])
        self.network = train_mode(module)
        self._vector = self._flat.parameters.detach()
        self._vector.grad = self._flat.gradients()
        self._optimiser = optimise([self._vector])
        device = self._vector.device
        for name, value in state.get(moments, {}).items():  # on CUDA a fused Adam needs its step count there too
            place = torch.device("cpu") if name == "step" and device.type != "cuda" else device
            self._optimiser.state.setdefault(self._vector, {})[name] = value.to(place, copy=True)

    def step(self, loss: Tensor, lr: float) -> None:
        assert self._vector.grad is not None
        self._vector.grad.zero_()
        loss.backward()
        self._optimiser.lr = lr
        self._optimiser.step()
        self._flat.mark_changed()

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self._flat.parameters).all())

    def store(self) -> None:
        self._state[self._key] = copy_vectors(self._flat)
        if learnt := self._optimiser.state.get(self._vector):
            self._state[self._moments] = {name: value.detach().cpu().clone() for name, value in learnt.items()}


@dataclass
class Ensemble:
    """Answers of the K clients of an exchange, in the order of their ids.

    Attributes:
        logits: ``[K, B, C, *positions]``.
        pi: client weights ``[K]``, which sum to 1.
        shares: the same numbers on the host, readable without waiting for the device.
        weights: the teachers' weights in the mixture, ``[K, 1 or B, C]``.
        mask: classes that each client knows ``[K, C]``, or None.
    """

    ids: list[int]
    logits: Tensor
    pi: Tensor
    shares: list[float]
    weights: Tensor
    mask: Tensor | None


class Workshop:
    """Generator, student, optimisers and averages, read from ``server.state`` and written back by :meth:`keep`."""

    def __init__(self, server: Server, options: IODOptions) -> None:
        self.server, self.options, self.total = server, options, options.count_steps(server.federation)
        o, state = options, server.state
        self.iteration: int = state["iteration"]
        sgd = partial(SGD, lr=o.student_lr, momentum=STUDENT_MOMENTUM, weight_decay=STUDENT_DECAY)
        adamw = partial(Adam, lr=o.student_lr, weight_decay=STUDENT_DECAY, decoupled=True)
        optimise = sgd if o.student_optimizer == "sgd" else adamw
        self.student = Learner(server.build(), optimise, state, "student", "student_moments")
        self.generator: Learner[Generator] | None = None
        if o.makes_images:
            blank = torch.Generator().manual_seed(0)
            adam = partial(Adam, lr=o.generator_lr, betas=(0.5, 0.999))
            self.generator = Learner(make_generator(server, o, blank), adam, state, "generator", "adam")
        self._first_taught = o.find_first_taught(server.federation)
        self.running = Means()
        self.x: Tensor | None = None  # images with the generator's graph, until the gradients are back

    # -- images ----------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the run's finished iterations, in [0, 1)."""
        return self.iteration / self.total

    @property
    def teaches(self) -> bool:
        return self.iteration >= self._first_taught

    def generate(self, draw: torch.Generator) -> Tensor:
        """Return images for discriminators and generator, whose graph stays in ``x``."""
        z = send(torch.randn(self.options.batch, NOISE, generator=draw), self.server.device)
        assert self.generator is not None
        with torch.enable_grad():
            x = self.generator.network(z)
        self.running.add(image_spread=x.detach().std(0).mean())
        # The clients' gradients are at the images as sent (pixels=uint8: rounded) and go to the generator unchanged.
        self.x = x
        return self._encode(x.detach())

    @torch.no_grad()
    def examples(self, draw: torch.Generator) -> Tensor:
        o = self.options
        zs = [send(torch.randn(o.batch, NOISE, generator=draw), self.server.device) for _ in range(o.student_steps)]
        assert self.generator is not None
        return self._encode(torch.cat([self.generator.network(z) for z in zs]))

    def _encode(self, images: Tensor) -> Tensor:
        if self.options.pixels == "float32":
            return images
        mean, std = (
            send(torch.tensor(v), images.device).view(1, -1, 1, 1) for v in (self.server.mean, self.server.std)
        )
        return ((images * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8)

    # -- the generator's step --------------------------------------------------------------------------------------

    def gather(self, answers: Mapping[int, Message]) -> Ensemble:
        device, ids = self.server.device, sorted(answers)
        logits = torch.stack([answers[k]["logits"].to(device) for k in ids])
        samples = torch.tensor([float(self.server.federation.samples[k]) for k in ids])
        pi = samples / samples.sum()
        disclosed = send(stack_class_counts(self.server, ids, self.options.weight_floor), device)
        scores = torch.stack([answers[k]["scores"].to(device) for k in ids]) if self.options.tells_scores else None
        mask = None if self.options.class_weights == "uniform" else disclosed > 0
        return Ensemble(ids, logits, send(pi, device), pi.tolist(), importance(disclosed, scores), mask)

    def criticise(self, answers: Mapping[int, Message]) -> dict[int, Message]:
        """Compute the generator's losses on the clients' answers, and the messages that ask for gradients.

        These have a client's weight ``share`` (pi_k) and B times the gradient with respect to its logits.
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
        x, self.x = self.x, None
        if x is None or self.generator is None or not gradients:
            return
        total = gradients[0].to(x.device, copy=True)
        for gradient in gradients[1:]:
            total += gradient.to(x.device)
        total /= len(x)
        self.generator.step(scalar_of([x], [total]), cosine(self.options.generator_lr, 0.0, self.progress))

    # -- the student's steps ---------------------------------------------------------------------------------------

    def teach(self, images: Tensor, ensemble: Ensemble, size: int) -> None:
        """Train the student towards the ensemble on sent images, ``size`` images a step."""
        progress = (self.iteration - self._first_taught) / (self.total - self._first_taught)
        lr = cosine(self.options.student_lr, STUDENT_LR_END, progress)
        per_image = ensemble.weights.shape[1] > 1
        answers = teacher_log_probs(ensemble.logits, self.options.teacher_temperature)
        target = mixture(answers, ensemble.weights, ensemble.mask).argmax(1)
        guesses: list[Tensor] = []
        for rows in batch_slices(len(images), size):
            x = prepare_images(images[rows], self.server)
            weights = ensemble.weights[:, rows] if per_image else ensemble.weights
            with torch.enable_grad():
                student_logits: Tensor = self.student.network(x)
                loss = distillation(student_logits, answers[:, rows], weights, ensemble.mask)
            self.student.step(loss, lr)
            self.running.add(student_loss=loss)
            guesses.append(student_logits.detach().argmax(1))
        self.running.add(
            student_agreement=(torch.cat(guesses) == target).float().mean(),
            teacher_agreement=(ensemble.logits.argmax(2) == target).float().mean(),
        )

    # -- the end of a round ----------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Write the server's state and the round's means.

        Images that hardly differ are a warning only in the second half of the run, since new weights give such images
        too.
        """
        self.server.state["iteration"] = self.iteration
        for name, learner in (("student", self.student), ("generator", self.generator)):
            if learner is None:
                continue
            learner.store()
            if not learner.is_finite():
                option = f"{name}_lr"
                raise UserError(f"The {name} diverged in iteration {self.iteration}: lower the method option {option}.")
        figures = self.running.read()
        self.server.report.update(figures)
        if self.progress >= 0.5 and (spread := figures.get("image_spread", 1.0)) < ALIKE:
            self.server.warn(
                "generator-collapsed",
                f"The generator's images hardly differ from one another (deviation {spread:.2g} of a pixel, of real "
                f"images about 1, after {self.iteration} iterations), and the student learns nothing from them: lower "
                "the method options generator_lr or critic_lr, or raise w_balance.",
            )
