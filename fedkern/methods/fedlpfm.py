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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedkern import ops
from fedkern.errors import UserError
from fedkern.files import filesystem
from fedkern.methods.base import LocalTraining, vectors_of
from fedkern.methods.common.figures import class_counts
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
from fedkern.methods.uploads import Declaration, Maybe, Number, Values
from fedkern.models.cost import count_flops, measure_cost
from fedkern.models.precision import compute_in
from fedkern.models.teachers import clip as templates
from fedkern.models.teachers import named_teachers
from fedkern.models.teachers.clip import DEFAULT
from fedkern.models.teachers.teacher import Teacher, trained_teacher
from fedkern.models.teachers.teacher_cache import CLASSES, LogitsCache, pack_top, unpack_top
from fedkern.models.teachers.teacher_training import FINETUNE_LR, PROBE_LR, Recipe, load_or_pretrain, tune_copy
from fedkern.process.device_copies import send
from fedkern.typed_option import option

_ASKING = threading.Lock()  # test sets are evaluated in threads: a teacher is built once and runs once on each set
TUNE, COUNT = "tune", "count"


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
        prompts: str = option(
            DEFAULT, "CLIP's prompts: a template, a file of templates, or JSON by class", path=templates.absolute
        )
        mapping: str = option(
            "auto",
            "logit of a class with several ImageNet classes or prompts: their mean (of prompts: of their features), "
            "the log of the mean of their exponentials, or auto (log-mean-exp, and mean of prompts)",
            choices=("auto", "mean", "log-mean-exp"),
        )
        prior: str = option(
            "none",
            "correct the teacher for class shares: none, or counts (from one exchange of every client's class counts, "
            "which tell its labels)",
            choices=("none", "counts"),
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
        teacher_top_k: int = option(
            0, "most likely classes that are stored of a teacher's answer, in bfloat16; 0: all logits, in fp32", low=0
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
        if o.prior == "counts" and o.teacher_tuning != "zero-shot":
            raise UserError("A tuned teacher has its client's class shares: take prior=none.")
        if o.teacher_top_k and o.temperature == math.inf:
            raise UserError("teacher_top_k stores softened answers: take a finite temperature, or teacher_top_k=0.")
        for name, value in (("teachers", 1), ("prior", "none"), ("teacher_view", "cached")):
            if o.teacher_top_k and getattr(o, name) != value:
                raise UserError(
                    f"teacher_top_k stores the answers of one teacher, as they are: take {name}={value}, or "
                    "teacher_top_k=0."
                )
        specs = named_teachers.parse_teachers(o.teacher)
        for name, unset, kinds in (("prompts", DEFAULT, ("clip",)), ("mapping", "auto", ("clip", named_teachers.LITE))):
            if getattr(o, name) != unset and all(spec.kind not in kinds for spec in specs):
                raise UserError(
                    f'Method option "{name}" is for {" and ".join(kinds)}, and the teacher is {o.teacher}: leave it '
                    "out, or take teacher=clip:FOLDER."
                )
        self._teachers: named_teachers.Teachers  # from _install on
        self._proxy: Teacher | None = None
        self._shift = torch.zeros(1, 1)
        self._known: dict[int, tuple[Any, dict[str, float]]] = {}

    # -- the loss --------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Batch, received: Received) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        o = self.options
        logits = model(batch.inputs)
        em = batch.task.criterion(logits, batch)
        if not o.lam:
            return em
        teacher, t = batch.drawn["teacher"], float(o.temperature)  # [K, B, C], or [1, B, 2 teacher_top_k]
        if o.teacher_top_k:
            kd = t**2 * ops.kl_div(logits / t, unpack_top(teacher[0]), rest="spread")  # softened when stored
        else:
            kd = ops.kl_div(logits, teacher[0], t) if len(teacher) == 1 else ops.ensemble_kl(logits, teacher, None, t)
        share = 1 - o.lam if o.mixing == "convex" else 1.0
        total = share * em + o.lam * kd if share else o.lam * kd
        return total, {"loss_em": em.detach(), "loss_kd": kd.detach()}

    # -- the client ------------------------------------------------------------------------------------------------

    def check(self, client: Client) -> None:
        """Raise UserError if a file of teacher logits lacks images that the client would train on."""
        if not self.options.lam:
            return
        self._install(client, client.network)
        for index in self._used():
            spec = self._teachers.specs[index]
            if spec.kind == "logits" and self.options.teacher_tuning == "zero-shot":
                image = next(client.in_order(1, augment=True, rng=client.rng("look", BEFORE)))
                if self.options.teacher_view == "same" and image.fresh:
                    raise UserError(
                        f"The teacher {spec} knows images as they are stored and these are augmented: "
                        "take teacher_view=cached, or --augment none."
                    )
                for batch in client.in_order():
                    self._teachers[index].logits(batch.inputs)

    def rounds(self, federation: Federation) -> Iterator[Round]:
        """Yield FedAvg's plan, with set-up rounds for tuned teachers and for class counts.

        Tuning uploads only a figure for the experimenter.
        """
        if self.options.lam and self.options.teacher_tuning != "zero-shot":
            yield Round(TUNE, exchanges=(TUNE,), participants="all", one_off=True, counted=False, trains="teachers")
        if self.options.lam and self.options.prior == "counts":
            yield Round(COUNT, exchanges=(COUNT,), participants="all", one_off=True)
        yield from super().rounds(federation)

    def send(self, server: Server, phase: Phase) -> Message | dict[ClientId, Message]:
        if phase.exchange in (TUNE, COUNT):
            return {}
        message: Message = vectors_of(server.state)
        return {**message, "shift": server.state["shift"]} if "shift" in server.state else message

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        if phase.exchange == TUNE:
            return {"right": Maybe(Number(0, 1))}
        if phase.exchange == COUNT:
            return {"counts": Values((2, len(self._used()), len(server.classes)), low=0)}
        return super().expects(server, phase, client, message)

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        if phase.exchange == COUNT:
            server.state["shift"] = class_shift(upload.message["counts"] for upload in uploads)
        elif phase.exchange != TUNE:
            super().server_update(server, phase, uploads)
        elif right := [upload.message["right"] for upload in uploads]:
            server.report["validation_tuned_teacher_accuracy"] = sum(right) / len(right)

    def _tune(self, client: Client) -> Message:
        """Tune the client's teachers, and return their mean validation accuracy as ``right``."""
        for index in self._list_teachers(client):
            self._own_logits(client, index)
        right = client.state.get("tuned_right", {}).values()
        return {"right": sum(right) / len(right)} if right else {}

    def _list_teachers(self, client: Client) -> Sequence[int]:
        """Return the positions of all teachers that the client asks in the run."""
        return self._used() if self.options.backbone == "random-each-round" else self.backbones(client, BEFORE)

    def _count(self, client: Client) -> Message:
        """Return the sums over the client's samples of labels and of teachers' probabilities, ``counts`` [2, J, C]."""
        counts = torch.zeros(2, len(self._used()), len(client.classes))
        for index in self._list_teachers(client):
            counts[0, index] = class_counts(client)
            counts[1, index] = self._own_logits(client, index).softmax(1).sum(0)
        return {"counts": counts}

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        if self.options.lam:
            self._install(client, client.network)
            if phase.exchange == TUNE:
                return self._tune(client)
            if phase.exchange == COUNT:
                return self._count(client)
            chosen = self.backbones(client, phase)
            shift = message.get("shift", torch.zeros(len(self._used()), 1)).cpu()[chosen, None]
            client.round_cache.update(chosen=chosen, shift=shift)
            if self.options.teacher_view == "cached":
                stacked = torch.stack([self._own_logits(client, index) for index in chosen])
                if self.options.teacher_top_k:
                    guesses = unpack_top(stacked[0])[1][:, 0]
                else:
                    stacked = stacked + shift
                    guesses = stacked.softmax(2).mean(0).argmax(1)
                client.round_cache["teacher"] = stacked.to(client.device)
                client.report["teacher_right"] = float((guesses == client.labels).float().mean())
        return super().client_update(client, phase, message)

    def draw(self, client: Client, batch: Batch, rng: np.random.Generator) -> Drawn:
        """Return the logits of the batch's samples by the client's K teachers, as :meth:`_own_logits` has them."""
        if not self.options.lam:
            return {}
        if self.options.teacher_view == "same":
            live = torch.stack([self._live(client, index, batch) for index in client.round_cache["chosen"]])
            return {"teacher": live + client.round_cache["shift"].to(live.device)}
        logits: Tensor = client.round_cache["teacher"]
        return {"teacher": logits.index_select(1, send(torch.from_numpy(batch.indices), logits.device))}

    def backbones(self, client: Client, phase: Phase) -> list[int]:
        """Return the positions of a client's teachers in this round."""
        o = self.options
        if o.backbone == "consistent":
            return list(range(o.teachers))
        when = BEFORE if o.backbone == "random" else Phase(phase.round, "", "update")
        drawn = client.rng("backbone", when).choice(len(self._teachers.specs), size=o.teachers, replace=False)
        return sorted(int(index) for index in drawn)

    def _own_logits(self, client: Client, index: int) -> Tensor:
        """Return a teacher's logits [n, C] of the client's samples, or packed ones, computed once in a run."""
        answers: dict[int, Tensor] = client.state.setdefault("teacher_logits", {})
        if index not in answers:
            answers[index] = self._compute(client, index)
        return answers[index]

    def _compute(self, client: Client, index: int) -> Tensor:
        o, teacher = self.options, self._teachers[index]
        images = (batch.inputs for batch in client.in_order())
        if o.teacher_tuning == "zero-shot":
            return self._teachers.cache.logits(teacher, images, client.samples, o.teacher_top_k, o.temperature)
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
        return pack_top(logits, o.teacher_top_k, o.temperature) if o.teacher_top_k else logits

    def _live(self, client: Client, index: int, batch: Batch) -> Tensor:
        teacher = self._teachers[index]
        if self.options.teacher_tuning == "zero-shot":
            return teacher.logits(batch.inputs).to(batch.inputs.device)
        if index not in client.state.get("teacher_heads", {}):
            self._own_logits(client, index)
        head = {name: value.to(teacher.device) for name, value in client.state["teacher_heads"][index].items()}
        answers: Tensor = functional_call(teacher.classifier.head, head, teacher.features(batch.inputs))
        return answers.to(batch.inputs.device)

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
        if o.teacher_top_k and not o.teacher_top_k <= len(place.classes) <= CLASSES:
            raise UserError(
                f"teacher_top_k={o.teacher_top_k} is for {o.teacher_top_k} to {CLASSES} classes, and the data have "
                f"{len(place.classes)}: take fewer, or 0."
            )
        self._teachers = named_teachers.Teachers(
            specs, LogitsCache(o.teacher_cache or None, place.mean, place.std, place.notice), classes=place.classes,
            device=place.device, build=build, public=place.public, prompts=o.prompts, mapping=o.mapping,
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

    def model(self, server: Server) -> nn.Module:
        self._shift = server.state.get("shift", self._shift).cpu()
        return super().model(server)

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
            top, t = self.options.teacher_top_k, self.options.temperature
            images = (batch.inputs for batch in data.batches())
            found = self._teachers.cache.logits(teacher, images, len(labels), top, t)
            if not top:
                return found
            values, classes = unpack_top(found)
            return torch.full((len(found), teacher.classes), -torch.inf).scatter(1, classes.long(), values.float())

        def accuracy(probabilities: Tensor) -> float:
            return float((probabilities.argmax(1) == labels).double().mean())

        used = [self._teachers[index] for index in self._used()]
        figures: dict[str, float] = {}
        # Stored logits may lack the test images.
        if all(self._teachers.specs[index].kind != "logits" for index in self._used()):
            shifts = self._shift.expand(len(used), -1)
            guesses = [(answers(t) + shift).double().softmax(1) for t, shift in zip(used, shifts, strict=True)]
            if self.options.backbone == "consistent":
                guesses = [torch.stack(guesses).mean(0)]
            figures["teacher_accuracy"] = sum(map(accuracy, guesses)) / len(guesses)
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


def class_shift(counts: Iterable[Tensor]) -> Tensor:
    """Return what to add to teachers' logits, fp32 ``[J, C]``, for the class shares of the federation.

    ``log(n_c / m_c)`` with n_c samples of class c, and m_c the sum of the teacher's probabilities of c over all samples
    (the correction of Saerens et al., Neural Computation 2002, for known shares).  Both are at least half a sample.

    Args:
        counts: clients' n and m, ``[2, J, C]``.
    """
    total: Tensor = sum(counts, torch.zeros((), dtype=torch.float64)).clamp_min(0.5)
    return (total[0] / total[1]).log().float()


@compute_in("fp32")  # in bf16 a teacher computes with a copy of its layers, whose calls are not counted
def teacher_mflops(teacher: Teacher, images: Tensor) -> float:
    with count_flops(teacher.network) as counter:
        teacher.logits(images)
    return counter.flops / len(images) / 1e6
