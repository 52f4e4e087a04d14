"""What FedIOD's clients do with images and gradients in stage 2, one alone or all of a process at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedkern.data.transforms import normalise
from fedkern.methods import fediod_private as private
from fedkern.methods.base import Client, ClientId, Message, Step
from fedkern.methods.fediod_critics import Critics
from fedkern.methods.fediod_losses import asks_teachers, spoken
from fedkern.models.bank import Bank


@dataclass
class Asked:
    """What stays of an exchange of images until the gradients of their logits come back."""

    images: Tensor  # a leaf
    logits: Tensor  # [K, B, C, *positions]
    realism: Tensor  # [K, B]


class Answers:
    """Teachers and discriminators of some clients, for one round.

    Args:
        clients: whose; their order is that of every [K, ...] below.
        bank: their teachers.
        options: the method's, settled.
    """

    def __init__(self, clients: Sequence[Client], bank: Bank, options: Any) -> None:
        self.clients, self.bank, self.options = list(clients), bank, options
        self.slots = {client.id: slot for slot, client in enumerate(clients)}
        self.critics = Critics(clients, options)
        self._asked: Asked | None = None
        self._seen = torch.zeros(2, len(self.clients), device=self.clients[0].device)  # critic losses, realism
        self._counts = [[0] * len(self.clients) for _ in range(2)]

    # -- the three exchanges ---------------------------------------------------------------------------------------

    def images(self, step: Step, iteration: int, messages: Mapping[ClientId, Message]) -> dict[ClientId, Message]:
        """Trains the discriminators on the images, then answers with logits and confidences (2.5 b, c)."""
        self._asked = None
        present = [self.slots[k] for k in messages]
        message = next(iter(messages.values()))
        images = self.normalised(message["images"])
        self.critics.serve(step)
        drawn = {slot: self.critics.real(slot, step, iteration) for slot in present}
        trained = {slot: real for slot, real in drawn.items() if real is not None}
        losses = self.critics.train(images, trained, message["critic_lr"])
        if losses is not None:
            self._count(0, losses, list(trained))
        with torch.enable_grad():
            images.requires_grad_(asks_teachers(self.options) or self.options.w_real > 0)
            logits = spoken(self.bank.logits(images), self.options.mix)
            realism, scores = self.critics.look(images)
        self._count(1, realism.detach().mean(1), present)
        self._asked = Asked(images, logits, realism)
        return self._answers(step, messages, logits.detach(), scores.detach())

    def gradients(self, step: Step, messages: Mapping[ClientId, Message]) -> dict[ClientId, Message]:
        """The gradients with respect to the images: through the discriminator, and of the logits through the teacher.

        Both are left as one image's own (times B), as :func:`fedkern.methods.fediod_private.sanitise` describes.  A
        cohort without privacy adds up its clients' gradients on the way: the first one's message holds the sum and the
        others' zeros, which the server's sum cannot tell from the rest.

        A client that has lost what it kept of the images answers with nothing, as if it were absent.
        """
        asked, self._asked = self._asked, None
        if asked is None:
            return {k: {} for k in messages}
        self._report()
        if private.private(self.options):
            return {k: self._own(step, asked, k, message) for k, message in messages.items()}
        outputs: list[Tensor] = []
        given: list[Tensor] = []
        for name, tensor in (("realism", asked.realism), ("logits", asked.logits)):
            if any(name in message for message in messages.values()):
                whole = torch.zeros_like(tensor)
                for k, message in messages.items():
                    whole[self.slots[k]] = message[name]
                outputs.append(tensor)
                given.append(whole)
        (total,) = torch.autograd.grad(outputs, asked.images, given)
        zero = total.new_zeros(()).expand(total.shape)
        return {k: {"gradients": zero if i else total} for i, k in enumerate(messages)}

    def _own(self, step: Step, asked: Asked, k: ClientId, message: Message) -> Message:
        slot = self.slots[k]
        images = asked.images
        u_d = u_t = torch.zeros_like(images)
        if "realism" in message:
            (u_d,) = torch.autograd.grad(asked.realism[slot].sum(), images, retain_graph=True)
        if "logits" in message:
            given = message["logits"].to(images.device)
            (u_t,) = torch.autograd.grad(asked.logits[slot], images, given, retain_graph=True)
        u_d, u_t = private.sanitise(self.clients[slot], step, u_d, u_t, self.options)
        return {"gradients": message.get("realism", 0.0) * u_d + u_t}

    @torch.no_grad()
    def distil(
        self, step: Step, messages: Mapping[ClientId, Message], logits: Tensor | None = None
    ) -> dict[ClientId, Message]:
        """What teachers and discriminators say of the images that the student learns from.

        Args:
            logits: what the teachers say ``[K, B, C, *positions]``, where it is known already.
        """
        images = self.normalised(next(iter(messages.values()))["images"])
        scores: Tensor | None = None
        if self.options.disc_weight:
            self.critics.serve(step)
            scores = self.critics.judge(images)
        logits = self.bank.logits(images) if logits is None else logits
        return self._answers(step, messages, spoken(logits, self.options.mix), scores)

    # -- the rest --------------------------------------------------------------------------------------------------

    def _answers(
        self, step: Step, messages: Mapping[ClientId, Message], logits: Tensor, scores: Tensor | None
    ) -> dict[ClientId, Message]:
        answers: dict[ClientId, Message] = {}
        for k in messages:
            slot = self.slots[k]
            answers[k] = {"logits": logits[slot]}
            if scores is not None and self.options.disc_weight:
                client = self.clients[slot]
                answers[k]["scores"] = private.release_scores(client, step, scores[slot], self.options)
        return answers

    def normalised(self, images: Tensor) -> Tensor:
        """A copy of what travelled, as networks see it: fp32, channels-last, on the clients' device."""
        client = self.clients[0]
        if images.dtype == torch.uint8:
            images = normalise(images, client.mean, client.std)
        return images.detach().to(client.device, memory_format=torch.channels_last, copy=True)

    def _count(self, row: int, values: Tensor, slots: Sequence[int]) -> None:
        """Adds a figure ``[K]`` of the clients in ``slots``; what it says of the others means nothing."""
        if len(slots) == len(self.clients):
            self._seen[row] += values
        else:
            self._seen[row, slots] += values[slots]
        for slot in slots:
            self._counts[row][slot] += 1

    def _report(self) -> None:
        """The round's means so far in the clients' reports."""
        rows = self._seen.tolist()
        for slot, client in enumerate(self.clients):
            for name, row, counts in zip(("critic_loss", "realism"), rows, self._counts, strict=True):
                if counts[slot]:
                    client.report[name] = row[slot] / counts[slot]
