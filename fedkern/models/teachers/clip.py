"""CLIP as a zero-shot teacher through transformers (Radford et al., arXiv 2103.00020)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedkern.models.networks.staged import Classifier
from fedkern.models.precision import autocasts, to_fp32
from fedkern.models.pretrained.preprocessing import BICUBIC, Preprocessing
from fedkern.models.pretrained.safe_loading import Pretrained, check_complete
from fedkern.models.state.allocate import linear_of
from fedkern.models.teachers.prompts import DEFAULT, read_prompts
from fedkern.models.teachers.teacher import Teacher

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
