"""Fed-LPFM (arXiv 2311.08479): private foundation models teach the lightweight network that the clients share.

Every client has a frozen teacher. Only the proxy z is trained and communicated (docs/methods/fedlpfm.md):

    L = (1 - lambda) CE(z, y) + lambda T^2 KL(softmax(t / T) || softmax(z / T))        ("convex"; batch mean)
    L = CE(z, y) + lambda T^2 KL(...)                                                  ("additive")

The KL is over all classes: the gain under class splits comes from classes that a client never sees. The teacher's
logits t are of the images before augmentation, computed once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax

from fedkern import ops
from fedkern.errors import UserError
from fedkern.files import filesystem
from fedkern.methods.base import LocalTraining
from fedkern.methods.method_registry import register
from fedkern.methods.options import Options as BaseOptions
from fedkern.methods.protocol import (
    BEFORE,
    Batch,
    ClientId,
    Federation,
    Message,
    Observed,
    Phase,
    Received,
    Round,
    Upload,
)
from fedkern.methods.roles import Client, Drawn, Server, TestSet
from fedkern.methods.uploads import Declaration, Maybe, Number
from fedkern.models.cost import count_flops, measure_cost
from fedkern.models.precision import compute_in
from fedkern.models.teachers import clip as templates
from fedkern.models.teachers import named_teachers
from fedkern.models.teachers.clip import DEFAULT
from fedkern.models.teachers.teacher import Teacher, trained_teacher
from fedkern.models.teachers.teacher_cache import LogitsCache
from fedkern.models.teachers.teacher_training import FINETUNE_LR, PROBE_LR, Recipe, load_or_pretrain, tune_copy
from fedkern.process.device_copies import send
from fedkern.typed_option import option

_ASKING = threading.Lock()  # test sets are evaluated in threads: a teacher is built once and runs once on each set
TUNE = "tune"


@register("fedlpfm")
class FedLPFM(LocalTraining):
    """Frozen foundation models teach the lightweight network that clients train and share (arXiv 2311.08479)."""

    requires = frozenset({"criterion", "classes", "images"})
    replayable = True
    asynchronous = True
    averages = True
    reduce = LocalTraining.reduce

    @dataclass(frozen=True)
    class Options(LocalTraining.Options):
        teacher: str = option(
            "pretrained",
            "frozen teachers, separated by commas: pretrained[:MODEL/WIDTH], clip:PATH_OR_NAME, efficientnet-lite0, "
            "logits:FILE, FILE.py:NAME, MODULE:NAME",
            path=named_teachers.absolute,
            code=named_teachers.list_code,
        )
        lam: float = option(0.5, "weight of the distillation loss; 0 is FedAvg", low=0, name="lambda")
        temperature: float = option(1.0, "temperature of the distillation loss", above=0, infinite=True)
        mixing: str = option(
            "convex",
            "loss: (1 - lambda) CE + lambda KL (convex), or CE + lambda KL (additive)",
            choices=("convex", "additive"),
        )
        divergence: str = option(
            "kl",
            "distillation loss: kl (KL(teacher || proxy)), mse (half the variance of the logit difference, its "
            "limit at high temperature), js (Jensen-Shannon)",
            choices=("kl", "mse", "js"),
        )
        prompts: str = option(
            DEFAULT, "CLIP's prompts: a template, a file of templates, or JSON by class", path=templates.absolute
        )
        teachers: int = option(1, "teachers per client; the mean of their probabilities is the target", low=1)
        backbone: str = option(
            "consistent",
            "teachers of a client: the first ones, drawn once, or drawn in every round",
            choices=("consistent", "random", "random-each-round"),
        )
        teacher_view: str = option(
            "cached",
            "images that the teacher sees: cached (not augmented; answered once), or same (as the proxy, in "
            "every step)",
            choices=("cached", "same"),
        )
        teacher_tuning: str = option(
            "zero-shot",
            "training of the teacher on the client's own samples: none (zero-shot), its head (probe), or all of "
            "it (finetune)",
            choices=("zero-shot", "probe", "finetune"),
        )
        tuning_epochs: int = option(10, "epochs of teacher_tuning", low=1)
        tuning_lr: float = option(
            0.0, "learning rate of teacher_tuning (AdamW); 0: 1e-3 for probe, 1e-5 for finetune", low=0
        )
        pretrain_epochs: int = option(20, "epochs of the embedded teacher on the public images", low=1)
        teacher_cache: str = option(
            "", "folder for teachers' weights and logits; empty: the user's cache folder", path=filesystem.absolute
        )

    def __init__(self, options: BaseOptions | None = None, **values: object) -> None:
        super().__init__(options, **values)
        o = self.options
        if o.mixing == "convex" and o.lam > 1:
            raise UserError(
                f'Method option "lambda" must be at most 1 with mixing=convex, not {o.lam:g}: take mixing=additive.'
            )
        if o.teacher_view == "same" and o.teacher_tuning == "finetune":
            raise UserError("A fine-tuned teacher is kept as its logits alone: take teacher_view=cached.")
        if math.isinf(o.temperature) and o.divergence != "kl":
            raise UserError('Method option "temperature" may be inf with divergence=kl alone.')
        if o.prompts != DEFAULT and all(spec.kind != "clip" for spec in named_teachers.parse_teachers(o.teacher)):
            raise UserError(
                f'Method option "prompts" is for CLIP, and the teacher is {o.teacher}: leave it out, or take '
                "teacher=clip:FOLDER."
            )
        self._teachers: named_teachers.Teachers  # from _install on
        self._proxy: Teacher | None = None
        self._known: dict[int, tuple[Any, dict[str, float]]] = {}

    # -- the loss --------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Batch, received: Received) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        o = self.options
        logits = model(batch.inputs)
        em = batch.task.criterion(logits, batch)
        if not o.lam:
            return em
        kd = self.divergence(logits, batch.drawn["teacher"])
        share = 1 - o.lam if o.mixing == "convex" else 1.0
        total = share * em + o.lam * kd if share else o.lam * kd
        return total, {"loss_em": em.detach(), "loss_kd": kd.detach()}

    def divergence(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """Return the distillation loss of proxy logits [B, C] against teachers' logits.

        ``teacher`` is [B, C] for one teacher, [K, B, C] for several.
        """
        o = self.options
        temperature = float(o.temperature)
        if o.divergence == "kl":
            if teacher.dim() == 3:
                return ops.ensemble_kl(logits, teacher, None, temperature)
            return ops.kl_div(logits, teacher, temperature)
        if o.divergence == "mse":
            return ops.kl_div(logits, teacher, math.inf)
        return temperature**2 * ops.js_div(torch.stack([logits, teacher]) / temperature)

    # -- the client ------------------------------------------------------------------------------------------------

    def check(self, client: Client) -> None:
        """Raise UserError if a file of teacher logits lacks images that the client would train on."""
        if not self.options.lam:
            return
        self._install(client, client.network)
        for index in self._used():
            spec = self._teachers.specs[index]
            if spec.kind == "logits" and self.options.teacher_tuning == "zero-shot":
                if self.options.teacher_view == "same" and self._has_augmented(client):
                    raise UserError(
                        f"The teacher {spec} knows images as they are stored and these are augmented: "
                        "take teacher_view=cached, or --augment none."
                    )
                for batch in client.in_order():
                    self._teachers[index].logits(batch.inputs)

    def _has_augmented(self, client: Client) -> bool:
        return next(client.in_order(1, augment=True, rng=client.rng("look", BEFORE))).fresh

    def rounds(self, federation: Federation) -> Iterator[Round]:
        """Yield FedAvg's plan, with a set-up round for tuned teachers.

        That round uploads only a figure for the experimenter.
        """
        if self.options.lam and self.options.teacher_tuning != "zero-shot":
            yield Round(TUNE, exchanges=(TUNE,), participants="all", one_off=True, counted=False, trains="teachers")
        yield from super().rounds(federation)

    def send(self, server: Server, phase: Phase) -> Message | dict[ClientId, Message]:
        return {} if phase.exchange == TUNE else super().send(server, phase)

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        if phase.exchange == TUNE:
            return {"right": Maybe(Number(0, 1))}
        return super().expects(server, phase, client, message)

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        if phase.exchange != TUNE:
            super().server_update(server, phase, uploads)
        elif right := [upload.message["right"] for upload in uploads]:
            server.report["validation_tuned_teacher_accuracy"] = sum(right) / len(right)

    def _tune(self, client: Client) -> Message:
        """Tune the client's teachers, and return their mean validation accuracy as ``right``."""
        each_round = self.options.backbone == "random-each-round"
        for index in self._used() if each_round else self.backbones(client, BEFORE):
            self._own_logits(client, index)
        right = client.state.get("tuned_right", {}).values()
        return {"right": sum(right) / len(right)} if right else {}

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        if self.options.lam:
            self._install(client, client.network)
            if phase.exchange == TUNE:
                return self._tune(client)
            chosen = self.backbones(client, phase)
            client.round_cache["chosen"] = chosen
            if self.options.teacher_view == "cached":
                stacked = torch.stack([self._own_logits(client, index) for index in chosen])
                client.round_cache["teacher"] = self._mixture(stacked).to(client.device)
                guesses = stacked.softmax(2).mean(0).argmax(1)
                client.report["teacher_right"] = float((guesses == client.labels).float().mean())
        return super().client_update(client, phase, message)

    def draw(self, client: Client, batch: Batch, rng: np.random.Generator) -> Drawn:
        """Return the teacher's logits of the batch's samples."""
        if not self.options.lam:
            return {}
        if self.options.teacher_view == "same":
            live = [self._live(client, index, batch) for index in client.round_cache["chosen"]]
            return {"teacher": self._mixture(torch.stack(live))}
        logits: Tensor = client.round_cache["teacher"]
        return {"teacher": logits.index_select(logits.dim() - 2, send(torch.from_numpy(batch.indices), logits.device))}

    def backbones(self, client: Client, phase: Phase) -> list[int]:
        """Return the positions of a client's teachers in this round."""
        o = self.options
        if o.backbone == "consistent":
            return list(range(o.teachers))
        when = BEFORE if o.backbone == "random" else Phase(phase.round, "", "update")
        drawn = client.rng("backbone", when).choice(len(self._teachers.specs), size=o.teachers, replace=False)
        return sorted(int(index) for index in drawn)

    def _mixture(self, logits: Tensor) -> Tensor:
        """Return teacher logits [K, B, C] for the divergence.

        Several teachers with another divergence than KL become the logits [B, C] of their mean probabilities.
        """
        if len(logits) == 1:
            return logits[0]
        if self.options.divergence == "kl":
            return logits
        temperature: float = self.options.temperature
        return temperature * (torch.logsumexp(log_softmax(logits / temperature, 2), 0) - math.log(len(logits)))

    def _own_logits(self, client: Client, index: int) -> Tensor:
        """Return a teacher's logits [n, C] of the client's samples, computed once in a run."""
        answers: dict[int, Tensor] = client.state.setdefault("teacher_logits", {})
        if index not in answers:
            answers[index] = self._compute(client, index)
        return answers[index]

    def _compute(self, client: Client, index: int) -> Tensor:
        o, teacher = self.options, self._teachers[index]
        images = (batch.inputs for batch in client.in_order())
        if o.teacher_tuning == "zero-shot":
            return self._teachers.cache.logits(teacher, images, client.samples)
        rng = client.rng(f"teacher-{o.teacher_tuning}/{index}", BEFORE)
        probes = o.teacher_tuning == "probe"
        lr = o.tuning_lr or (PROBE_LR if probes else FINETUNE_LR)
        tuned, logits = tune_copy(teacher, images, client.labels, rng, head_only=probes, epochs=o.tuning_epochs, lr=lr)
        if probes:
            heads = client.state.setdefault("teacher_heads", {})
            heads[index] = {name: value.cpu() for name, value in tuned.state_dict().items()}

        def answer(images: Tensor) -> Tensor:
            images = images.to(teacher.device)
            answers: Tensor = tuned(teacher.features(images) if probes else images)
            return answers

        right = client.validate(answer)
        if right is not None:
            client.state.setdefault("tuned_right", {})[index] = right
        return logits

    def _live(self, client: Client, index: int, batch: Batch) -> Tensor:
        teacher = self._teachers[index]
        if self.options.teacher_tuning == "zero-shot":
            return teacher.logits(batch.inputs).to(batch.inputs.device)
        if index not in client.state.get("teacher_heads", {}):
            self._own_logits(client, index)
        head = {name: value.to(teacher.device) for name, value in client.state["teacher_heads"][index].items()}
        return linear(teacher.features(batch.inputs), head["weight"], head["bias"]).to(batch.inputs.device)

    # -- teachers --------------------------------------------------------------------------------------------------

    def _install(self, place: Client | Server, build: Callable[..., nn.Module]) -> None:
        """Set the teachers' settings once. Teachers are built on first use."""
        if hasattr(self, "_teachers"):
            return
        o = self.options
        specs = named_teachers.expand_pretrained(named_teachers.parse_teachers(o.teacher), build)
        if o.teachers > len(specs):
            raise UserError(
                f"{o.teachers} teachers per client need as many backbones, but teacher={o.teacher} names "
                f"{len(specs)}: name them all, separated by commas."
            )
        self._teachers = named_teachers.Teachers(
            specs, LogitsCache(o.teacher_cache or None, place.mean, place.std, place.notice), classes=place.classes,
            device=place.device, build=build, public=place.public, prompts=o.prompts,
            recipe=Recipe(epochs=o.pretrain_epochs),
        )  # fmt: skip

    def _used(self) -> range:
        return range(self.options.teachers if self.options.backbone == "consistent" else len(self._teachers.specs))

    # -- the server ------------------------------------------------------------------------------------------------

    def start(self, server: Server) -> None:
        super().start(server)
        if not self.options.lam:
            return
        self._install(server, server.build)
        images = torch.zeros(2, *server.image_shape, device=server.device)
        costs = measure_cost(server.build(), images)
        server.report["proxy_parameters"] = costs.parameters
        server.report["proxy_inference_mflops"] = costs.inference_flops / 1e6
        server.report["proxy_training_mflops"] = costs.training_flops / 1e6
        server.report["proxy_inference_mbytes"] = costs.inference_bytes / 1e6
        server.report["proxy_training_mbytes"] = costs.training_bytes / 1e6
        for index in self._used():
            teacher = self._teachers[index]
            if self.options.teacher_tuning != "zero-shot":
                _ = teacher.classifier  # raises if the teacher cannot be tuned
            if self._teachers.specs[index].kind == "logits":
                continue
            teacher.logits(images)  # reports wrong classes, a missing package or NaN before anything is written
            mflops, parameters = teacher_mflops(teacher, images), float(teacher.parameters)
            if index == 0 or mflops > server.report["teacher_inference_mflops"]:
                server.report["teacher_inference_mflops"], server.report["teacher_parameters"] = mflops, parameters
        if server.public is not None and int(server.public.labels.min()) >= 0:
            network = server.build()
            load_or_pretrain(network, server.public, self._teachers.cache, name="proxy", recipe=self._teachers.recipe)
            self._proxy = trained_teacher(network, "proxy", len(server.classes), server.device)

    def evaluate(self, model: nn.Module, data: TestSet) -> dict[str, float]:
        """Return the proxy's figures, and if possible ``teacher_accuracy`` and ``public_proxy_accuracy``.

        - ``teacher_accuracy``: accuracy of the ensemble of the teachers that every client has; if clients draw their
          teachers, the mean of the teachers' accuracies. Missing with stored logits. Tuned teachers count as they were
          before tuning; ``validation_tuned_teacher_accuracy`` has the clients' mean accuracy of tuned teachers on the
          validation split.
        - ``public_proxy_accuracy``: accuracy of the proxy trained on the public images alone, like the embedded
          teacher.
        """
        figures = super().evaluate(model, data)
        if hasattr(self, "_teachers"):
            with _ASKING:
                if id(data) not in self._known:
                    self._known[id(data)] = (data, self._teacher_figures(data))  # holds data, so its id stays unique
            figures.update(self._known[id(data)][1])
        return figures

    def _teacher_figures(self, data: TestSet) -> dict[str, float]:
        labels = torch.cat([batch.targets.cpu() for batch in data.batches()])

        def answers(teacher: Teacher) -> Tensor:
            return self._teachers.cache.logits(teacher, (batch.inputs for batch in data.batches()), len(labels))

        def accuracy(probabilities: Tensor) -> float:
            return float((probabilities.argmax(1) == labels).double().mean())

        used = [self._teachers[index] for index in self._used()]
        figures: dict[str, float] = {}
        kinds = {self._teachers.specs[index].kind for index in self._used()}
        if "logits" not in kinds:  # stored logits may lack the test images
            probabilities = [answers(teacher).double().softmax(1) for teacher in used]
            if self.options.backbone == "consistent":
                figures["teacher_accuracy"] = accuracy(torch.stack(probabilities).mean(0))
            else:
                figures["teacher_accuracy"] = sum(map(accuracy, probabilities)) / len(used)
        if self._proxy is not None:
            figures["public_proxy_accuracy"] = accuracy(answers(self._proxy))
        return figures

    def diagnose(self, observed: Mapping[str, Observed]) -> dict[str, str]:
        """Add a note that names the teachers and their size, and a warning if they are at chance."""
        notes = dict(super().diagnose(observed))
        if not hasattr(self, "_teachers") or not self._teachers.made:
            return notes
        used = [teacher for _, teacher in sorted(self._teachers.made.items())]
        size = sum(teacher.parameters for teacher in used) * 4 / 1e6
        names = "; ".join(teacher.name for teacher in used)
        notes["teacher"] = (
            f"Taught by {names} ({self.options.teacher_tuning}), installed once at the clients ({size:.1f} MB) and not "
            "in the byte ledger."
        )
        right = observed.get("teacher_right")
        if right is not None and right.mean < 1.5 / len(self._teachers.classes):
            notes["teacher-at-chance"] = (
                f"The teacher is right about {right.mean:.2f} of the clients' own samples, near chance: look at the "
                "prompts and the class names, or lower lambda."
            )
        return notes


@compute_in("fp32")  # in bf16 a teacher computes with a copy of its layers, whose calls are not counted
def teacher_mflops(teacher: Teacher, images: Tensor) -> float:
    with count_flops(teacher.network) as counter:
        teacher.logits(images)
    return counter.flops / len(images) / 1e6
