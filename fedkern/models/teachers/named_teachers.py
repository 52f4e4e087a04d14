"""Teachers by name: parsing ``teacher=...`` and making the teachers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fedkern.errors import UserError, suggest_name
from fedkern.files import filesystem
from fedkern.models.network_registry import MODELS
from fedkern.models.networks.staged import StagedNetwork
from fedkern.models.teachers.clip import clip_teacher
from fedkern.models.teachers.efficientnet_lite import NAME as LITE
from fedkern.models.teachers.efficientnet_lite import efficientnet_lite_teacher
from fedkern.models.teachers.teacher import Teacher, teacher_of, trained_teacher
from fedkern.models.teachers.teacher_cache import LogitsCache, stored_logits
from fedkern.models.teachers.teacher_training import Labelled, Recipe, load_or_pretrain
from fedkern.usercode import named_code
from fedkern.usercode.named_code import FORMS

KINDS = ("pretrained", "clip", LITE, "logits")
CODE = "code"
"""Kind of a teacher that is a user-defined function or module."""
ALONE = ("pretrained", LITE)
"""Kinds without a required source."""
# Candidates of plain ``pretrained``, in order of size with ten classes: the smallest that are larger than the run's
# network are taken.
LARGER = (("resnet8", 32), ("cnn", 64), ("resnet8", 64), ("resnet18", 32), ("resnet18", 64), ("resnet18", 96))
CHOICES = 3


@dataclass(frozen=True)
class Spec:
    """Name of a teacher: ``kind:source``, or the name of code alone."""

    kind: str
    source: str

    def __str__(self) -> str:
        return self.source if self.kind == CODE else f"{self.kind}:{self.source}" if self.source else self.kind


def parse_teachers(text: str) -> list[Spec]:
    specs = []
    for word in text.split(","):
        kind, _, source = word.strip().partition(":")
        if kind not in KINDS:
            misspelt = suggest_name(kind, KINDS) and kind.isidentifier() and find_spec(kind) is None
            if named_code.parse(word.strip()) is None or misspelt:
                raise UserError(
                    f'unknown teacher "{word.strip()}": expected pretrained, pretrained:MODEL/WIDTH, '
                    f"clip:PATH_OR_NAME, {LITE}, logits:FILE, {FORMS}.{suggest_name(kind, KINDS)}"
                )
            kind, source = CODE, word.strip()
        if kind not in ALONE and not source:
            raise UserError(f"the teacher {kind} needs a path after a colon: {kind}:PATH.")
        specs.append(Spec(kind, source))
    return specs


def absolute(text: str) -> str:
    """Return the list with absolute paths, except for names and paths with commas."""
    words = []
    for spec in parse_teachers(text):
        paths = {
            "clip": filesystem.absolute_folder, "logits": filesystem.absolute, LITE: filesystem.absolute,
            CODE: named_code.absolute,
        }  # fmt: skip
        path = paths.get(spec.kind, str)(spec.source) if spec.source else ""
        words.append(str(spec if "," in path else Spec(spec.kind, path)))
    return ",".join(words)


def list_code(text: str) -> list[str]:
    """Return the teachers in a list that are Python code, which is imported and so run."""
    return [str(spec) for spec in parse_teachers(text) if spec.kind == CODE]


def expand_pretrained(specs: Sequence[Spec], build: Callable[..., nn.Module]) -> list[Spec]:
    """Replace plain ``pretrained`` by up to three networks that are larger than the run's."""
    result: list[Spec] = []
    for spec in specs:
        if spec.kind != "pretrained" or spec.source:
            result.append(spec)
            continue
        smallest = count_parameters(build())
        larger: list[Spec] = []
        for model, width in LARGER:
            if len(larger) < CHOICES and count_parameters(build(model=model, width=width)) > smallest:
                larger.append(Spec("pretrained", f"{model}/{width}"))
        if not larger:
            model, width = LARGER[-1]
            raise UserError(
                f"no embedded teacher is larger than the run's own network ({smallest:,} parameters): name one, for "
                f"example teacher=pretrained:{model}/{2 * width}."
            )
        result += larger
    return result


@dataclass
class Teachers:
    """Teachers of a run, by position in a list, made on first use.

    Attributes:
        cache: of logits and the weights of embedded (``pretrained``) teachers, with the images' normalisation.
        build: makes a freshly initialised network: ``build(model=, width=)``.
        public: public images for the training of embedded teachers, or None.
        mapping: of logits of ImageNet classes or prompts to a class, or auto for each teacher's own.
        recipe: of this training.
    """

    specs: Sequence[Spec]
    cache: LogitsCache
    classes: Sequence[str]
    device: torch.device
    build: Callable[..., Any]
    public: Labelled | None
    prompts: str
    mapping: str
    recipe: Recipe
    made: dict[int, Teacher] = field(default_factory=dict)

    def __getitem__(self, index: int) -> Teacher:
        if index not in self.made:
            self.made[index] = self.make(self.specs[index])
        return self.made[index]

    def make(self, spec: Spec) -> Teacher:
        scale = {"mean": self.cache.mean, "std": self.cache.std}
        options: dict[str, Any] = {**scale, "device": self.device}
        if self.mapping != "auto":
            options["mapping"] = self.mapping
        if spec.kind == "clip":
            return clip_teacher(spec.source, self.classes, **options, prompts=self.prompts)
        if spec.kind == LITE:
            return efficientnet_lite_teacher(self.classes, **options, path=spec.source)
        if spec.kind == "logits":
            return stored_logits(spec.source, len(self.classes), **scale)
        if spec.kind == CODE:
            return self._import_teacher(spec)
        model, _, width = spec.source.partition("/")
        if model not in MODELS or (width and not (width.isdigit() and int(width) > 0)):
            raise UserError(
                f'the teacher "{spec}" must be pretrained:MODEL or pretrained:MODEL/WIDTH with one of '
                f"{', '.join(MODELS)}.{suggest_name(model, MODELS)}"
            )
        if self.public is None:
            raise UserError(
                "the embedded teacher learns from public images and there are none: give --public-samples N, in Python "
                "beside data sets public=DATASET, or another teacher such as --method-option teacher=clip:PATH_OR_NAME."
            )
        network: StagedNetwork = self.build(model=model, width=int(width) if width else None)
        name = f"{model} of width {int(width) if width else MODELS[model].width}"
        load_or_pretrain(network, self.public, self.cache, name=name, recipe=self.recipe)
        name += f", pre-trained by fedkern on {len(self.public):,} public images"
        return trained_teacher(network, name, len(self.classes), self.device)

    def _import_teacher(self, spec: Spec) -> Teacher:
        """Import a callable, with cached logits if it has an attribute ``identity``, or a :class:`Teacher`."""
        location = named_code.parse(spec.source)
        assert location is not None  # parse has checked this
        thing: Any = named_code.load(location, "the teacher")[0]
        if isinstance(thing, Teacher):
            return thing
        return teacher_of(thing, str(spec), len(self.classes), self.device, getattr(thing, "identity", None))


def count_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
