"""Grounding DINO through transformers: boxes of named objects (FedGID's decoupler)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedkern.models.pretrained.safe_loading import Pretrained


class GroundingDino:
    """Frozen Grounding DINO, prompted with ``"<class>."`` and loaded on the first call of :meth:`detect`.

    Args:
        model: see :class:`fedkern.models.pretrained.safe_loading.Pretrained`.
        box_threshold: the best token of a box must score more than this.
        text_threshold: a token of the class name must score more than this.
    """

    def __init__(
        self,
        model: str | Path,
        box_threshold: float = 0.35,
        text_threshold: float = 0.25,
        device: torch.device | str = "cpu",
    ) -> None:
        self._source = Pretrained(model, "detector")
        self.box_threshold, self.text_threshold = float(box_threshold), float(text_threshold)
        self.device = torch.device(device)
        self._network: Any = None
        self._tokenizer: Any = None
        self._settings: dict[str, Any] = {}

    @property
    def identity(self) -> Mapping[str, str | float]:
        return {**self._source.identity, "box_threshold": self.box_threshold, "text_threshold": self.text_threshold}

    @torch.no_grad()
    def detect(self, images: Tensor, name: str) -> list[Tensor]:
        """Find the objects called ``name``, with underscores as spaces, in images uint8 ``[B, 3, H, W]``.

        Returns:
            Boxes float32 ``[n_i, 4]`` per image, xyxy in pixels, clipped to the image.
        """
        self._load()
        prompt = f"{name.replace('_', ' ').strip().lower()}."
        encoded = self._tokenizer([prompt] * len(images), return_tensors="pt").to(self.device)
        pixels = self._prepare(images)
        output = self._network(
            pixel_values=pixels,
            pixel_mask=torch.ones(len(images), *pixels.shape[-2:], dtype=torch.int64, device=self.device),
            **encoded,
        )
        scores = output.logits.sigmoid()
        tokens = self._name_tokens(encoded["input_ids"][0])
        selected = (scores.amax(dim=-1) > self.box_threshold) & (
            scores[..., : len(tokens)][..., tokens].amax(dim=-1) > self.text_threshold
        )
        height, width = images.shape[-2:]
        limits = torch.tensor([width, height, width, height], dtype=torch.float32)
        centre, size = output.pred_boxes.float().cpu().split(2, dim=-1)
        boxes = torch.cat([centre - size / 2, centre + size / 2], dim=-1).clamp(0, 1) * limits
        return [found[keep] for found, keep in zip(boxes, selected.cpu(), strict=True)]

    def _prepare(self, images: Tensor) -> Tensor:
        size = self._settings.get("size", {})
        shortest, longest = int(size.get("shortest_edge", 800)), int(size.get("longest_edge", 1333))
        height, width = images.shape[-2:]
        scale = min(shortest / min(height, width), longest / max(height, width))
        target = [max(1, round(height * scale)), max(1, round(width * scale))]
        values = images.to(self.device, torch.float32).div_(255)
        values = functional.interpolate(values, target, mode="bilinear", antialias=True, align_corners=False)
        mean = torch.tensor(self._settings.get("image_mean", [0.485, 0.456, 0.406]), device=self.device)
        std = torch.tensor(self._settings.get("image_std", [0.229, 0.224, 0.225]), device=self.device)
        return (values - mean.view(3, 1, 1)) / std.view(3, 1, 1)

    def _name_tokens(self, input_ids: Tensor) -> Tensor:
        """Return bool ``[L]``: True at the tokens of the class name."""
        stop = self._tokenizer.convert_tokens_to_ids(".")
        special = {*self._tokenizer.all_special_ids, stop} - {self._tokenizer.unk_token_id}
        return torch.tensor([token not in special for token in input_ids.tolist()], device=self.device)

    def _load(self) -> None:
        if self._network is not None:
            return
        user = f"detector {self._source.name}"
        source = self._source.load("GroundingDinoForObjectDetection", user, "a Grounding DINO")
        self._tokenizer, self._settings = source.tokenizer, source.settings
        self._network = source.network.eval().requires_grad_(False).to(self.device)
