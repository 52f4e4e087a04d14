"""CLIP as a zero-shot teacher through transformers (Radford et al., arXiv 2103.00020), and its text prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedkern.errors import UserError, first_of, suggest_name
from fedkern.files import filesystem
from fedkern.files.filesystem import parse_json, read_text
from fedkern.models.networks.staged import Classifier
from fedkern.models.precision import autocasts, to_fp32
from fedkern.models.pretrained.preprocessing import BICUBIC, Preprocessing
from fedkern.models.pretrained.safe_loading import Pretrained, check_complete
from fedkern.models.state.allocate import linear_of
from fedkern.models.teachers.teacher import Teacher

DEFAULT = "a photo of a {class}."
PLACES = ("{class}", "{}")


def read_prompts(prompts: str, classes: Sequence[str]) -> list[list[str]]:
    """Return the prompts of every class, at least one each, for a mean of their features.

    Args:
        prompts: a template with ``{class}`` or ``{}`` in place of the class name (underscores become spaces); a text
            file with a template on every line (``#`` for comments); or a JSON file that maps every class to a prompt or
            a list of prompts.
    """
    if any(place in prompts for place in PLACES):
        return _fill([prompts], classes)
    path = filesystem.expand(prompts)
    try:
        text = read_text(path, "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f'the prompts file {path} cannot be read ({reason}): give a file, or a template like "{DEFAULT}".'
        ) from None
    if path.suffix == ".json":
        return _by_class(path, text, classes)
    templates = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not templates:
        raise UserError(f'the prompts file {path} is empty: write one template like "{DEFAULT}" on every line.')
    for template in templates:
        if not any(place in template for place in PLACES):
            raise UserError(f'the template "{template}" in {path} has no {{class}} where the class name goes.')
    return _fill(templates, classes)


def absolute(prompts: str) -> str:
    return prompts if any(place in prompts for place in PLACES) else filesystem.absolute(prompts)


def _fill(templates: Sequence[str], classes: Sequence[str]) -> list[list[str]]:
    names = [name.replace("_", " ").strip() for name in classes]
    return [[template.replace("{class}", name).replace("{}", name) for template in templates] for name in names]


def _by_class(path: Path, text: str, classes: Sequence[str]) -> list[list[str]]:
    try:
        table = parse_json(text)
    except ValueError as error:
        raise UserError(f"the prompts file {path} is not JSON: {error}.") from None
    if not isinstance(table, dict):
        raise UserError(f"the prompts file {path} must map every class to its prompts, but holds {_kind(table)}.")
    missing = [name for name in classes if name not in table]
    if missing:
        hint = suggest_name(missing[0], [name for name in table if name not in classes])
        raise UserError(f"the prompts file {path} has no prompts for the class{_names(missing)}: add them.{hint}")
    extra = [name for name in table if name not in classes]
    if extra:
        raise UserError(
            f"the prompts file {path} has prompts for the class{_names(extra)}, which the data do not have: take them "
            "out."
        )
    result = []
    for name in classes:
        value = table[name]
        prompts = [value] if isinstance(value, str) else value
        if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) and text for text in prompts):
            raise UserError(f'the prompts of "{name}" in {path} must be a text or a list of texts.')
        result.append(list(prompts))
    return result


def _names(names: Sequence[str]) -> str:
    listed = first_of([f'"{name}"' for name in names], 3)
    return f"{'es' if len(names) > 1 else ''} {listed}"


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"


SIDE = 224
PIXELS = {
    "do_center_crop": True, "resample": BICUBIC, "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}  # fmt: skip
"""Preprocessing of images unless preprocessor_config.json has other values, with the keys of that file."""


def clip_teacher(
    model: str | Path,
    classes: Sequence[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    prompts: str = DEFAULT,
    device: torch.device | str = "cpu",
) -> Teacher:
    """Return a frozen CLIP that classifies by prompts: logits ``s cos(v, u_c)``.

    ``v`` is the image feature, ``u_c`` the normalised mean of the normalised text features of the class's prompts
    (prompt ensembling), ``s`` CLIP's own logit scale.  The input images are normalised by ``mean`` and ``std``.
    """
    name, source = f"clip:{model}", Pretrained(model, "CLIP")
    texts = read_prompts(prompts or DEFAULT, classes)

    def load() -> Classifier:
        hint = " (not a folder here; one that was downloaded before is given as clip:FOLDER)"
        loaded = source.load("CLIPModel", f"teacher {name}", "a CLIP", hint)
        if source.folder.is_dir():
            check_complete(f"CLIP {source.folder}", loaded.network, loaded.network, loaded.missing)
        network = loaded.network.float().eval().to(device)
        weight = text_features(network, loaded.tokenizer, texts, network.device) * network.logit_scale.detach().exp()
        return ClipClassifier(network, weight, Preprocessing({**PIXELS, **(loaded.settings or {})}, mean, std, SIDE))

    identity = {**source.identity, "prompts": json.dumps(texts), "resize": "bytes"}
    return Teacher(name, len(classes), load, device=device, identity=identity, batch=64)


class ClipClassifier(Classifier):
    """CLIP's image encoder with its preprocessing, and class weights ``[C, d]`` on its unit features."""

    def __init__(self, network: Any, weight: Tensor, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.head = linear_of({"weight": weight, "bias": weight.new_zeros(len(weight))}, weight.device)
        self.vision, self.projection, self.prepare = network.vision_model, network.visual_projection, preprocessing

    def features(self, x: Tensor) -> Tensor:
        return functional.normalize(self._project(self.prepare(x)), dim=1)

    @autocasts
    def _project(self, pixels: Tensor) -> Tensor:
        return to_fp32(self.projection(self.vision(pixel_values=pixels).pooler_output))


@torch.no_grad()
def text_features(network: Any, tokenizer: Any, prompts: Sequence[Sequence[str]], device: torch.device) -> Tensor:
    """Return a unit vector per class, fp32 ``[classes, d]``: the normalised mean of the normalised features."""
    longest = int(network.config.text_config.max_position_embeddings)
    rows = []
    for texts in prompts:
        encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        output = network.text_model(
            input_ids=encoded["input_ids"].to(device), attention_mask=encoded["attention_mask"].to(device)
        )
        features = functional.normalize(network.text_projection(output.pooler_output), dim=1)
        rows.append(functional.normalize(features.mean(dim=0), dim=0))
    return torch.stack(rows)
