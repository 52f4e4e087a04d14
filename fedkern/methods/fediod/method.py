"""FedIOD: one generator against many private discriminators (arXiv 2312.14478, AAAI-24, docs/methods/fediod.md).

Every client trains its own teacher. Then a generator G on the server learns images that look real to every client's
discriminator (realism), that the teachers are sure of (clarity) and on which they differ (diversity), and a student
learns the ensemble's answers:

    images      down: x = G(z)              up: logits t_k(x), confidence r_k(x), after a step of D_k on x
    gradients   down: dL_G/dt_k             up: the gradient with respect to x, through D_k and T_k
    distil      down: the student's images  up: logits, confidences

Stage 1 is in section 4 of the page.  The student is compared with the teachers and their ensembles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.data.sharing.groups import drawn_rows
from fedkern.errors import UserError
from fedkern.methods.base import Messages
from fedkern.methods.common.figures import class_counts
from fedkern.methods.common.oneshot import OwnNetworks, copy_vectors, flatten, load, refresh_statistics
from fedkern.methods.common.oneshot_distill import torch_stream
from fedkern.methods.fediod import private_messages as private
from fedkern.methods.fediod.client import Answers
from fedkern.methods.fediod.discriminators import Discriminators
from fedkern.methods.fediod.iod_options import IODOptions
from fedkern.methods.fediod.losses import importance, mixture, normalise_weights, teacher_log_probs
from fedkern.methods.fediod.server import NOISE, Ensemble, Workshop, make_generator, stack_class_counts
from fedkern.methods.method_registry import register
from fedkern.methods.options import Options as BaseOptions
from fedkern.methods.protocol import BEFORE, Batch, ClientId, Federation, Message, Phase, Round, Upload, batch_slices
from fedkern.methods.roles import Client, Server, TestSet
from fedkern.methods.uploads import Declaration, Maybe, Values
from fedkern.models.networks.generator import Generator
from fedkern.models.optimisers import cosine
from fedkern.models.teachers.teacher_stack import TeacherStack
from fedkern.privacy import Guarantee

KEEP_BYTES = 1 << 30
"""Logits of a whole test set are kept up to this size; for a larger set the teachers run again for every figure."""


class Panel(nn.Module):
    """Teachers' logits on a test set, as both model and data of ``Method.evaluate``.

    A call returns ``answer`` of the current batch of :meth:`batches` and its teachers' logits.
    """

    def __init__(self, ask: Callable[[Tensor], Tensor], data: TestSet) -> None:
        super().__init__()
        self._ask, self._data = ask, data
        self.task = data.task
        self.cases = getattr(data, "cases", None)
        self._cache: list[Tensor] = []
        self._now: Tensor | None = None
        self.answer: Callable[[Tensor, Tensor], Tensor] = lambda images, logits: logits[0]

    def __len__(self) -> int:
        return len(self._data)

    def batches(self) -> Iterator[Batch]:
        """Yield the test set's batches, and keep the teachers' logits for the next pass."""
        kept: list[Tensor] = []
        size = 0
        for i, batch in enumerate(self._data.batches()):
            self._now = self._cache[i] if self._cache else self._ask(batch.inputs)
            size += self._now.numel() * self._now.element_size()
            if size <= KEEP_BYTES:
                kept.append(self._now)
            yield batch
        self._cache = kept if size <= KEEP_BYTES else []
        self._now = None

    def forward(self, images: Tensor) -> Tensor:
        assert self._now is not None
        return self.answer(images, self._now)


@torch.no_grad()
def compare_teachers(
    method: OwnNetworks, bank: TeacherStack, server: Server, members: Mapping[ClientId, Client], data: TestSet
) -> dict[str, float]:
    """Return ``best_teacher``, ``mean_teacher``, ``ensemble_uniform`` and ``ensemble_weighted`` on a test set.

    Nobody in the federation could choose ``best_teacher``. ``ensemble_weighted`` has the student's weights, without
    confidences if :meth:`Discriminators.judge` has none.
    """
    o, device, ids = method.options, server.device, list(members)
    panel = Panel(lambda images: teacher_log_probs(bank.logits(images)), data)

    def figure(answer: Callable[[Tensor, Tensor], Tensor]) -> float:
        panel.answer = answer
        return float(panel.task.score(method.evaluate(panel, panel)))

    figures = [figure(lambda images, logits, i=i: logits[i]) for i in range(len(ids))]  # type: ignore[misc]
    disclosed = stack_class_counts(server, ids, o.weight_floor).to(device)
    mask = None if o.class_weights == "uniform" else disclosed > 0
    uniform = torch.ones(len(ids), 1, 1, device=device)
    discriminators = Discriminators(list(members.values()), o) if o.tells_scores else None

    def mix_weighted(images: Tensor, logits: Tensor) -> Tensor:
        scores = None if discriminators is None else discriminators.judge(images)
        return mixture(teacher_log_probs(logits, o.teacher_temperature), importance(disclosed, scores), mask)

    return {
        "best_teacher": max(figures),
        "mean_teacher": sum(figures) / len(figures),
        "ensemble_uniform": figure(lambda images, logits: mixture(logits, uniform, None)),
        "ensemble_weighted": figure(mix_weighted),
    }


TRAIN = Phase(0, "train", "update")
"""Phase whose random streams a teacher trains with.  The one-shot methods train their members in the same phase, so
without a hold-out the teachers equal these members bit for bit."""


class Held:
    """Test set of some of a client's samples."""

    def __init__(self, client: Client, rows: np.ndarray) -> None:
        self._client, self._rows = client, rows
        self.task = client.task

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self) -> Iterator[Batch]:
        for part in batch_slices(len(self), min(self.task.outside, 500)):
            yield self._client.batch(self._rows[part])


def split_holdout(client: Client, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the samples that train the teacher, at least one, and of the held-out samples.

    Groups (patient, case or image) stay on one side. With patients as the unit of privacy, ``share`` is of patients: a
    patient's number of images must not influence who else is held out.
    """
    if client.patients is not None:  # a share of the patients, however many images each has
        parts = drawn_rows(client.rng("holdout", TRAIN), client.samples, client.patients)
        groups = min(round(share * len(parts)), len(parts) - 1)
        out, train = (np.concatenate([np.zeros(0, np.int64), *rows]) for rows in (parts[:groups], parts[groups:]))
        return np.sort(train), np.sort(out)
    count = min(round(share * client.samples), client.samples - 1)
    parts = drawn_rows(client.rng("holdout", TRAIN), client.samples, client.groups)
    groups = int(np.searchsorted(np.cumsum([len(part) for part in parts]), count, side="right"))
    groups = min(max(groups, int(count > 0)), len(parts) - 1)
    order, count = np.concatenate(parts), sum(len(part) for part in parts[:groups])
    return np.sort(order[count:]), np.sort(order[:count])


def make_teacher(method: OwnNetworks, client: Client) -> None:
    """Train the client's teacher, or load a pretrained one, into ``client.state["teacher"]``.

    A pretrained teacher has no ``holdout`` figure, since it may have trained on these samples.
    """
    module = build_network(method, client)
    rows, out = split_holdout(client, method.options.holdout)
    load_pretrained = client.load_pretrained(module)
    if not load_pretrained and not private.train_teacher(method, client, TRAIN, module, rows):
        client.fit(method, TRAIN, module, rows=None if len(rows) == client.samples else rows)
        if method.options.fresh_statistics:
            refresh_statistics(client, module, rows)
    module.eval()
    state = client.state["teacher"] = copy_vectors(flatten(module))
    if not load_pretrained and bool((client.labels[torch.from_numpy(out)] >= 0).any()):
        with torch.no_grad():
            state["holdout"] = client.task.score(method.evaluate(module, Held(client, out)))


def build_network(method: OwnNetworks, client: Client) -> nn.Module:
    network: nn.Module = client.network(**method.architecture(client.id))
    return network


def load_teacher(method: OwnNetworks, client: Client) -> nn.Module:
    return load(flatten(build_network(method, client)), client.state["teacher"]).eval().requires_grad_(False)


SHOWN = 8
"""Number of generated images in the picture."""


def log_pictures(server: Server, generator: Generator | None, options: IODOptions, ensemble: Ensemble | None) -> None:
    """Log the pictures of a round's last iteration, from what there is of generator and ensemble."""
    if generator is not None:
        server.log_image("generated", lambda: _images(server, generator, options))
    if ensemble is None:
        return
    weights = normalise_weights(ensemble.weights, ensemble.mask).mean(1)
    rows = weights.new_full((server.federation.clients, weights.shape[1]), float("nan"))
    rows[ensemble.ids] = weights
    server.log_image("teacher_weights", lambda: rows, axes=("client", "class", "weight of the client's teacher"))


@torch.no_grad()
def _images(server: Server, generator: Generator, options: IODOptions) -> Tensor:
    """Return generated images in [0, 1], from the same noise in every round."""
    draw = torch_stream(server, "shown", BEFORE)
    z = torch.randn(options.batch, NOISE, generator=draw).to(server.device)
    # A copy: a forward pass in train mode would change the running statistics of batch norm.
    x: Tensor = copy.deepcopy(generator).train()(z)[:SHOWN]
    mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (server.mean, server.std))
    return x * std + mean


@register("fediod")
class FedIOD(OwnNetworks):
    """A student distilled from private teachers on the images of one generator (FedIOD, arXiv 2312.14478)."""

    Options = IODOptions
    options: IODOptions
    requires = frozenset({"classes", "images"})
    may_skip_clients = True
    takes_teachers = True
    replayable = True
    schedule_note = "the cosine schedules and the warm-up span all rounds"

    def __init__(self, options: BaseOptions | None = None, **values: object) -> None:
        super().__init__(options, **values)
        self._teachers: dict[ClientId, nn.Module] = {}  # frozen: built once in a run
        self._banks: dict[tuple[ClientId, ...], TeacherStack] = {}

    # -- the plan --------------------------------------------------------------------------------------------------

    def rounds(self, federation: Federation) -> Iterator[Round]:
        if self.options.draws_secrets:
            # The secrets are stored before anything is released, so that an interrupted round releases the same again.
            yield Round("secrets", exchanges=("secret",), participants="all", one_off=True, counted=False)
        yield Round("teachers", exchanges=("teacher",), participants="all", one_off=True, trains="clients' teachers")
        if not self.options.makes_images:
            title = "teachers' answers to the public images"
            yield Round("answers", exchanges=("answers",), participants="all", one_off=True, trains=title)
        exchanges = ("images", "gradients", "distil") if self.options.makes_images else ("distil",)
        iterations, taught = self.options.count_iterations(federation), self.options.find_first_taught(federation)
        names = tuple(f"{name} {i}" for i in range(iterations) for name in exchanges)
        cohort = self.options.batched or not self.options.makes_images
        for number in range(1, federation.rounds + 1):
            trained = [*["generator"] * self.options.makes_images, *["student"] * (number * iterations > taught)]
            yield Round("distil", exchanges=names, states="round", cohort=cohort, trains=" and ".join(trained))

    def check(self, client: Client) -> None:
        private.check(client, lambda: build_network(self, client), self.options)

    def start(self, server: Server) -> None:
        o = self.options
        public = 0 if server.public is None else len(server.public)
        if not self.options.makes_images and public < 2:
            raise UserError(
                "fediod with mode=public learns on at least 2 public images and this run sets "
                f"{public or 'none'} aside: give --public-samples N, or in Python beside data sets public=DATASET."
            )
        smallest = 2**o.critic_layers
        if self.options.makes_images and min(server.image_shape[1:]) < smallest:
            raise UserError(
                f"The discriminators with critic_layers={o.critic_layers} need images of at least {smallest} x "
                f"{smallest} pixels: give fewer, or 0 for as many as fit."
            )
        flat = flatten(server.build())
        if flat.buffers.numel() and "buffers" not in server.initial():
            raise UserError("fediod needs the running statistics of its student: use --buffers average.")
        for entry in self.architectures:
            server.build(model=entry and entry[0], width=entry and entry[1])
        server.state.update(student=copy_vectors(flat), iteration=0, classes={})
        if self.options.makes_images:
            draw = torch_stream(server, "generator", BEFORE)
            server.state["generator"] = copy_vectors(flatten(make_generator(server, o, draw)))
        private.prepare(server, o)

    # -- the server ------------------------------------------------------------------------------------------------

    def _workshop(self, server: Server) -> Workshop:
        if "workshop" not in server.round_cache:
            server.round_cache["workshop"] = Workshop(server, self.options)
        shop: Workshop = server.round_cache["workshop"]
        return shop

    def send(self, server: Server, phase: Phase) -> Message | dict[ClientId, Message] | None:
        kind, _ = split_exchange(phase)
        if kind == "teacher":
            return {"privacy": dict(server.state["privacy"])} if "privacy" in server.state else {}
        if kind == "secret":
            return {}
        ids = sorted(server.state["classes"])
        if not self.options.makes_images:
            return {k: {} for k in ids}
        shop = self._workshop(server)
        if kind == "gradients":
            criticism: dict[ClientId, Message] | None = server.round_cache.pop("criticism", None)
            return criticism
        if kind == "distil" and not shop.teaches:
            return None
        draw = torch_stream(server, "noise", phase)
        images = shop.generate(draw) if kind == "images" else shop.examples(draw)
        message: Message = {"images": images}
        if kind == "images":
            message["critic_lr"] = cosine(self.options.critic_lr, 0.0, shop.progress)
        else:
            server.round_cache["images"] = images
        return dict.fromkeys(ids, message) or None

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        kind, _ = split_exchange(phase)
        classes, channels, (height, width) = server.federation.classes, server.image_shape[0], server.image_shape[1:]
        positions = server.task.output(classes, (height, width))[1:]
        if kind == "teacher":
            return {"classes": Values((classes,), low=0)} if self.options.tells_counts else {}
        if kind == "answers":
            assert server.public is not None  # checked in start
            return {"logits": Values((len(server.public), classes, *positions))}
        if kind == "secret" or not self.options.makes_images:
            return {}
        if kind == "gradients":  # a client that has lost its state of the images sends none
            return {"gradients": Maybe(Values((self.options.batch, channels, height, width)))}
        size = len(message["images"])
        scores = {"scores": Values((size,), low=0, high=1)} if self.options.tells_scores else {}
        return {"logits": Values((size, classes, *positions)), **scores}

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        kind, i = split_exchange(phase)
        if kind == "teacher":
            for upload in uploads:
                server.state["classes"][upload.client_id] = upload.message.get("classes", torch.ones(1))
        elif kind == "answers":
            server.state["answers"] = {upload.client_id: upload.message["logits"].cpu() for upload in uploads}
        if kind in ("teacher", "secret", "answers"):
            return
        # Uploads come first: the clients answer while these are read, and nobody answers where nothing was sent.
        answers = {upload.client_id: upload.message for upload in uploads}
        shop, round_cache = self._workshop(server), server.round_cache
        if kind == "images":
            if answers:
                round_cache["criticism"] = shop.criticise(answers)
        elif kind == "gradients":
            shop.improve([message["gradients"] for message in answers.values()])
        else:
            ensemble = self._teach(server, shop, phase, answers)
            shop.iteration += 1
            if i + 1 == self.options.count_iterations(server.federation):
                shop.keep()
                log_pictures(server, shop.generator.network if shop.generator else None, self.options, ensemble)

    def _teach(self, server: Server, shop: Workshop, phase: Phase, answers: Messages) -> Ensemble | None:
        size = self.options.batch
        images = server.round_cache.pop("images", None)  # none before the student's first iteration, nor public ones
        if not answers:
            return None
        if not self.options.makes_images:
            assert server.public is not None  # checked in start
            rows = server.rng("public", phase).permutation(len(server.public))[: size * self.options.student_steps]
            images, logits = server.public.take(rows), server.state["answers"]
            answers = {k: {"logits": logits[k][torch.from_numpy(rows)]} for k in answers if k in logits}
        ensemble = shop.gather(answers)
        shop.teach(images, ensemble, size)
        return ensemble

    # -- the clients -----------------------------------------------------------------------------------------------

    def untrained(self, client: Client) -> np.ndarray:
        """Return the hold-out of the client's teacher.

        The client's discriminators do train on these images.
        """
        return split_holdout(client, self.options.holdout)[1]

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        return self._update({client.id: client}, phase, {client.id: message})[client.id]

    def cohort_update(self, clients: Mapping[ClientId, Client], phase: Phase, messages: Messages) -> Messages | None:
        kind, _ = split_exchange(phase)
        together = self.options.batched and self.options.makes_images and not self.options.noises_gradients
        if not together or kind not in ("images", "gradients", "distil"):
            return None  # with noise each client's gradients are needed alone
        clients = {k: client for k, client in clients.items() if "teacher" in client.state}  # the others diverged
        return self._update(clients, phase, messages)

    def _update(self, clients: Mapping[ClientId, Client], phase: Phase, messages: Messages) -> Messages:
        kind, i = split_exchange(phase)
        if kind == "secret":
            for client in clients.values():
                private.secret(client, self.options)
            return {k: {} for k in clients}
        if kind == "teacher":
            return {k: self._train(client, messages[k]) for k, client in clients.items()}
        for k in messages:
            if "holdout" in clients[k].state["teacher"]:
                clients[k].report["holdout"] = clients[k].state["teacher"]["holdout"]
        if kind == "answers":
            return {k: self._answer(client) for k, client in clients.items()}
        if not self.options.makes_images:
            return {k: {} for k in messages}
        answers = self._answers(clients)
        if kind == "images":
            return answers.images(phase, i, messages)
        if kind == "gradients":
            return answers.gradients(phase, messages)
        return answers.distil(phase, i, messages)

    def _train(self, client: Client, message: Message) -> Message:
        private.keep_terms(client, message)
        make_teacher(self, client)
        counts = private.release_histogram(client, class_counts(client), self.options)
        return {"classes": counts} if self.options.tells_counts else {}

    @torch.no_grad()
    def _answer(self, client: Client) -> Message:
        assert client.public is not None  # checked in start
        bank = self.bank({client.id: client})
        logits = (teacher_log_probs(bank.logits(batch.inputs))[0] for batch in client.public.batches(64))
        return {"logits": torch.cat(list(logits))}

    def bank(self, clients: Mapping[ClientId, Client]) -> TeacherStack:
        """Return the teachers of these clients, in their order."""
        ids = tuple(clients)
        if ids not in self._banks:
            for k in ids:
                if k not in self._teachers:
                    self._teachers[k] = load_teacher(self, clients[k])
            for cohort in [cohort for cohort in self._banks if len(cohort) > 1 < len(ids)]:
                del self._banks[cohort]  # of another cohort: one cohort's stack is kept
            self._banks[ids] = TeacherStack([self._teachers[k] for k in ids])
        return self._banks[ids]

    def _answers(self, clients: Mapping[ClientId, Client]) -> Answers:
        """Return the clients' answers, the same object in every exchange of a round."""
        cache = next(iter(clients.values())).round_cache
        if "answers" not in cache:
            cache["answers"] = Answers(list(clients.values()), self.bank(clients), self.options)
            for client in clients.values():
                client.round_cache["answers"] = cache["answers"]
        answers: Answers = cache["answers"]
        return answers

    # -- results ---------------------------------------------------------------------------------------------------

    def model(self, server: Server) -> nn.Module:
        return server.network(server.state["student"])

    def guarantee(self, server: Server) -> Guarantee | None:
        return self.options.guarantee(server.federation.unit)

    @classmethod
    def is_private(cls, options: BaseOptions) -> bool:
        return isinstance(options, IODOptions) and options.claims_privacy

    def oracle_metrics(
        self, server: Server, clients: Mapping[ClientId, Client], sets: Mapping[str, TestSet]
    ) -> dict[str, float]:
        """Return the teachers' figures on every test set, and ``holdout``, their mean on the clients' own hold-outs."""
        members = {k: clients[k] for k in sorted(server.state["classes"]) if "teacher" in clients[k].state}
        figures: dict[str, float] = {}
        for prefix, data in sets.items() if members else ():
            compared = compare_teachers(self, self.bank(members), server, members, data)
            figures |= {prefix + name: value for name, value in compared.items()}
        teachers = [client.state["teacher"] for client in members.values()]
        if holdouts := [teacher["holdout"] for teacher in teachers if "holdout" in teacher]:
            figures["holdout"] = sum(holdouts) / len(holdouts)
        return figures


def split_exchange(phase: Phase) -> tuple[str, int]:
    """Return the kind and the iteration of an exchange."""
    kind, _, number = phase.exchange.partition(" ")
    return kind, int(number or 0)
