"""Client side of FedIOD's stage 2, for one client or all clients of a process."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkern.methods.fediod import private_messages as private
from fedkern.methods.fediod.discriminators import Discriminators
from fedkern.methods.fediod.iod_options import IODOptions
from fedkern.methods.fediod.losses import scalar_of, teacher_log_probs
from fedkern.methods.fediod.server import prepare_images
from fedkern.methods.protocol import ClientId, Message, Messages, Phase
from fedkern.methods.roles import Client
from fedkern.models.teachers.teacher_stack import TeacherStack


@dataclass
class Pending:
    """State between the exchange of images and the gradients of the logits."""

    iteration: int  # within the round
    images: Tensor  # an autograd leaf
    logits: Tensor  # [K, B, C, *positions]
    realism: Tensor  # [K, B]


class Answers:
    """Teachers (``bank``) and discriminators of some clients, for one round."""

    def __init__(self, clients: Sequence[Client], bank: TeacherStack, options: IODOptions) -> None:
        self.clients, self.bank, self.options = list(clients), bank, options
        self.slots = {client.id: slot for slot, client in enumerate(clients)}
        self.discriminators = Discriminators(clients, options)
        self._pending: Pending | None = None
        self._seen = torch.zeros(2, len(self.clients), device=self.clients[0].device)  # discriminator losses, realism
        self._counts = [[0] * len(self.clients) for _ in range(2)]

    # -- the three exchanges ---------------------------------------------------------------------------------------

    def images(self, phase: Phase, iteration: int, messages: Messages) -> dict[ClientId, Message]:
        """Train the discriminators on the images, then answer with logits and confidences.

        With shards, one public discriminator trains and another, secret one may serve the gradients
        (`private_messages`).
        """
        self._pending = None
        present = [self.slots[k] for k in messages]
        message = next(iter(messages.values()))
        images = prepare_images(message["images"], self.clients[0]).clone()  # a leaf of the graph below
        self._bring_training(phase, iteration)
        drawn = {slot: self.discriminators.real(slot, phase, iteration) for slot in present}
        trained = {slot: real for slot, real in drawn.items() if real is not None}
        losses = self.discriminators.train(images, trained, message["critic_lr"])
        if losses is not None:
            self._count(0, losses, list(trained))
        seen: tuple[Tensor, Tensor] | None = None
        if self.options.shards > 1:
            with torch.no_grad():  # before the serving discriminator is loaded: its figures would reveal it
                seen = self.discriminators.look(images)
        self.discriminators.bring(lambda client: private.serving_shard(client, phase, self.options))
        with torch.enable_grad():
            images.requires_grad_()
            logits = teacher_log_probs(self.bank.logits(images))
            realism, scores = self.discriminators.look(images)
        figures = (realism, scores) if seen is None else seen
        self._count(1, figures[0].detach().mean(1), present)
        self._pending = Pending(iteration, images, logits, realism)
        return self._answers(messages, logits.detach(), figures[1].detach())

    def gradients(self, phase: Phase, messages: Messages) -> dict[ClientId, Message]:
        """Return the images' gradients, through the discriminator and through the teacher, times B.

        In a cohort without privacy the first message holds the sum over clients, all that the server uses. A client
        that has lost its state of the images answers with an empty message.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return {k: {} for k in messages}
        self._report()
        if self.options.noises_gradients:
            return {k: self._own(pending, k, message) for k, message in messages.items()}
        self._measure(phase, pending, messages)
        outputs, gradients = [pending.realism, pending.logits], [torch.zeros_like(pending.realism)]
        gradients.append(torch.zeros_like(pending.logits))
        for k, message in messages.items():
            gradients[0][self.slots[k]] = self.options.w_real * message["share"]
            gradients[1][self.slots[k]] = message["logits"]
        used = slice(None) if self.options.w_real else slice(1, None)
        (total,) = torch.autograd.grad(scalar_of(outputs[used], gradients[used]), pending.images)
        zero = total.new_zeros(()).expand(total.shape)
        return {k: {"gradients": zero if i else total} for i, k in enumerate(messages)}

    def _realism_rows(self, pending: Pending, k: ClientId) -> Tensor | None:
        """Return a client's gradient ``[B, C, H, W]`` through its discriminator, or None without a realism loss.

        Without the 1 / B of a mean over images and the client's weight.
        """
        if not self.options.w_real:
            return None
        return torch.autograd.grad(pending.realism[self.slots[k]].sum(), pending.images, retain_graph=True)[0]

    def _own(self, pending: Pending, k: ClientId, message: Message) -> Message:
        slot, images = self.slots[k], pending.images
        rows = private.sanitise(self.clients[slot], self._realism_rows(pending, k), self.options)
        grad = message["logits"].to(images.device) / message["share"]
        (total,) = torch.autograd.grad(scalar_of([pending.logits[slot]], [grad]), images, retain_graph=True)
        if rows is not None:
            total = self.options.w_real * rows + total
        return {"gradients": message["share"] * total}

    def _measure(self, phase: Phase, pending: Pending, messages: Messages) -> None:
        """Report a client's median row norm, from which to choose the clipping norm of a private run.

        Clients take turns, one a round, since a client's own gradients cost as much as the sum over all clients.
        """
        client = self.clients[phase.round % len(self.clients)]
        last = private.count_trainings(client, self.options) - 1
        if self.options.claims_privacy or client.id not in messages or pending.iteration != last:
            return  # in a private run this figure would be a release
        if (rows := self._realism_rows(pending, client.id)) is not None:
            client.report["norm_d"] = float(rows.flatten(1).norm(dim=1).median())

    @torch.no_grad()
    def distil(self, phase: Phase, iteration: int, messages: Messages) -> dict[ClientId, Message]:
        images = prepare_images(next(iter(messages.values()))["images"], self.clients[0])
        scores: Tensor | None = None
        if self.options.tells_scores:
            self._bring_training(phase, iteration)
            scores = self.discriminators.judge(images)
        return self._answers(messages, teacher_log_probs(self.bank.logits(images)), scores)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _bring_training(self, phase: Phase, iteration: int) -> None:
        self.discriminators.bring(lambda client: private.training_shard(client, phase.round, iteration, self.options))

    def _answers(self, messages: Messages, logits: Tensor, scores: Tensor | None) -> dict[ClientId, Message]:
        answers: dict[ClientId, Message] = {}
        for k in messages:
            slot = self.slots[k]
            answers[k] = {"logits": logits[slot]}
            if scores is not None and self.options.tells_scores:
                answers[k]["scores"] = scores[slot]
        return answers

    def _count(self, row: int, values: Tensor, slots: Sequence[int]) -> None:
        if len(slots) == len(self.clients):
            self._seen[row] += values
        else:
            self._seen[row, slots] += values[slots]
        for slot in slots:
            self._counts[row][slot] += 1

    def _report(self) -> None:
        rows = self._seen.tolist()
        for slot, client in enumerate(self.clients):
            for name, row, counts in zip(("critic_loss", "realism"), rows, self._counts, strict=True):
                if counts[slot]:
                    client.report[name] = row[slot] / counts[slot]
