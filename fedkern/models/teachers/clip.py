"""CLIP as a zero-shot teacher through transformers (Radford et al., arXiv 2103.00020), and its text prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedkern.errors import UserError, suggest_name
from fedkern.files import filesystem
from fedkern.files.filesystem import parse_json, read_text
from fedkern.models.networks.staged import Classifier
from fedkern.models.precision import autocasts, to_fp32
from fedkern.models.pretrained.preprocessing import BICUBIC, Preprocessing
from fedkern.models.pretrained.safe_loading import Pretrained, check_complete
from fedkern.models.teachers.teacher import GroupedHead, Teacher

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
    if not all(any(place in template for place in PLACES) for template in templates or [""]):
        raise UserError(f'the prompts file {path} must have a template like "{DEFAULT}" on every line.')
    return _fill(templates, classes)


def absolute(prompts: str) -> str:
    return prompts if any(place in prompts for place in PLACES) else filesystem.absolute(prompts)


def _fill(templates: Sequence[str], classes: Sequence[str]) -> list[list[str]]:
    names = [name.replace("_", " ").strip() for name in classes]
    return [[template.replace("{class}", name).replace("{}", name) for template in templates] for name in names]


def _by_class(path: Path, text: str, classes: Sequence[str]) -> list[list[str]]:
    try:
        table = dict(parse_json(text))
    except (TypeError, ValueError) as error:
        raise UserError(f"the prompts file {path} must map every class to its prompts, in JSON ({error}).") from None
    extra = [name for name in table if name not in classes]
    result = []
    for name in classes:
        value = table.get(name)
        prompts = [value] if isinstance(value, str) else value
        if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) and text for text in prompts):
            raise UserError(
                f'the class "{name}" needs a text or a list of texts in the prompts file {path}.'
                f"{suggest_name(name, extra)}"
            )
        result.append(list(prompts))
    if extra:
        raise UserError(f'the prompts file {path} has the class "{extra[0]}", which the data lack: take it out.')
    return result


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
    mapping: str = "mean",
    device: torch.device | str = "cpu",
) -> Teacher:
    """Return a frozen CLIP that classifies by prompts: logits ``s cos(v, u_c)``.

    ``v`` is the image feature, ``u_c`` the normalised mean of the normalised text features of the class's prompts
    (prompt ensembling), ``s`` CLIP's own logit scale.  With ``mapping`` "log-mean-exp" every prompt has a logit, and
    the class the log of the mean of their exponentials.  The input images are normalised by ``mean`` and ``std``.
    """
    name, source = f"clip:{model}", Pretrained(model, "CLIP")
    texts = read_prompts(prompts or DEFAULT, classes)

    def load() -> Classifier:
        hint = " (not a folder here; one that was downloaded before is given as clip:FOLDER)"
        loaded = source.load("CLIPModel", f"teacher {name}", "a CLIP", hint)
        if source.folder.is_dir():
            check_complete(f"CLIP {source.folder}", loaded.network, loaded.network, loaded.missing)
        network = loaded.network.float().eval().to(device)
        rows = texts if mapping == "mean" else [[text] for group in texts for text in group]
        weight = text_features(network, loaded.tokenizer, rows, network.device) * network.logit_scale.detach().exp()
        sizes = [1 if mapping == "mean" else len(group) for group in texts]
        head = GroupedHead(weight, weight.new_zeros(len(weight)), sizes)
        return ClipClassifier(network, head, Preprocessing({**PIXELS, **(loaded.settings or {})}, mean, std, SIDE))

    identity = {**source.identity, "prompts": json.dumps(texts), "mapping": mapping, "resize": "bytes"}
    return Teacher(name, len(classes), load, device=device, identity=identity, batch=64)


class ClipClassifier(Classifier):
    """CLIP's image encoder with its preprocessing, and a head on its unit features."""

    def __init__(self, network: Any, head: GroupedHead, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.head = head
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
