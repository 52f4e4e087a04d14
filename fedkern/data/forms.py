"""Forms: how the samples of a federation reach a network, and what of them can be shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedkern import models
from fedkern.data.images.transforms import central
from fedkern.errors import UserError
from fedkern.messages.leaves import Keywords, Positional, leaves, mapped, parted


@dataclass(frozen=True)
class ImageForm:
    """Images.

    Attributes:
        shape: channels, height and width of the images that a network sees.
        mean, std: per channel, of images in [0, 1].
        augment: augmentation of training batches: a name in `fedkern.data.images.transforms.AUGMENTATIONS`.
        grey_bits: bits of a grey value in image files with more than eight, in all images alike; 0 where no file has.
        window: the values of such files that become black and white, or None.
        seen: lines on image files and what a network sees of them: one on all, and those on sets that differ.
        outside: a sentence where most pixels of such files lie outside of the window, else empty.
        sites: names of the sites that image files have; those of `Split.homes` where one client holds them all.
    """

    noun: ClassVar[str] = "images"
    lacks: ClassVar[frozenset[str]] = frozenset()

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str = "none"
    grey_bits: int = 16
    window: tuple[float, float] | None = None
    seen: tuple[str, ...] = field(default=(), compare=False)
    outside: str = field(default="", compare=False)
    sites: tuple[str, ...] = field(default=(), compare=False)

    def said(self) -> str:
        """The size of a sample in words."""
        return f" of {'×'.join(map(str, self.shape))}"

    def stored(self) -> tuple[str, ...]:
        """A line on images that are no files: depth, colour and size."""
        colour = {1: "grey", 3: "RGB"}.get(self.shape[0], f"{self.shape[0]} channels")
        return (f"images: 8-bit {colour}, {self.shape[2]} x {self.shape[1]}",)

    def central(self, split: Any) -> Any:
        """A split that is not augmented: the window that a network sees."""
        return central(split, self.shape[1:])

    def about(self) -> dict[str, Any]:
        """Entries of model.safetensors."""
        return {
            "channels": self.shape[0], "image_size": list(self.shape[1:]), "mean": list(self.mean),
            "std": list(self.std), "grey_bits": self.grey_bits, "window": self.window and list(self.window),
        }  # fmt: skip

    def noise(self, samples: int, rng: np.random.Generator) -> Tensor:
        """Normally distributed inputs of a network, fp32."""
        return torch.from_numpy(rng.standard_normal((samples, *self.shape), dtype="float32"))

    def build(self, task: Any, about: Mapping[str, Any], seed: Any) -> nn.Module:
        """A freshly initialised network; ``about`` is as in `fedkern.tasks.Task.build`."""
        network: nn.Module = task.build({**about, "channels": self.shape[0], "image_size": self.shape[1:]}, seed)
        return network


def form_of(about: Mapping[str, Any]) -> ImageForm | ItemForm:
    """The form that ``about()`` of it has described."""
    if "items" in about:
        return ItemForm(tuple(about["items"]), about["inputs"], about["head"])
    shape = about["channels"], *about["image_size"]
    window = about["window"] and tuple(about["window"])
    return ImageForm(shape, tuple(about["mean"]), tuple(about["std"]), grey_bits=about["grey_bits"], window=window)


@dataclass(frozen=True)
class ItemForm:
    """Samples of map-style data sets.

    Attributes:
        shapes: dtype and shape of every tensor of a batch of two samples, in words.
        inputs: those of a network's arguments, nested as they are: ``{"args": [...], "kwargs": {...}}``; None where the
            user's own loss calls the network.
        head: name of the linear layer that gives the network's logits, or None.
    """

    noun: ClassVar[str] = "samples"
    lacks: ClassVar[frozenset[str]] = frozenset({"images", "pixels"})
    augment: ClassVar[str] = "none"
    seen: ClassVar[tuple[str, ...]] = ()
    outside: ClassVar[str] = ""
    sites: ClassVar[tuple[str, ...]] = ()

    shapes: tuple[str, ...]
    inputs: Any = None
    head: str | None = None

    @staticmethod
    def of(batch: Any, called: bool = True) -> ItemForm:
        """The form of samples of which ``batch`` has two; ``called``: fedkern calls the network on a batch's inputs."""
        x = parted(batch)[0]
        by_name = isinstance(x, Keywords)
        args = () if by_name else x if isinstance(x, Positional) else (x,)
        inputs = {"args": _outlined(args), "kwargs": _outlined(x) if by_name else {}}
        return ItemForm(tuple(map(in_words, leaves(batch))), inputs if called else None)

    def said(self) -> str:
        """The tensors of a batch in words."""
        return f", two of which are {', '.join(self.shapes)}"

    def stored(self) -> tuple[str, ...]:
        """Nothing: samples are what a user's data set gives."""
        return ()

    def central(self, split: Any) -> Any:
        """The split itself."""
        return split

    def about(self) -> dict[str, Any]:
        """Entries of model.safetensors."""
        return {"items": list(self.shapes), "inputs": self.inputs, "head": self.head}

    def noise(self, samples: int, rng: np.random.Generator) -> Any:
        """Normally distributed inputs of a network; zeros, of which any is an index, where they are no floats."""

        def draw(words: str) -> Tensor:
            dtype, _, shape = words.partition(" ")
            kind = getattr(torch, dtype, None)
            if not isinstance(kind, torch.dtype):
                raise UserError(
                    f"The method needs examples of the network's inputs, which cannot be made of {words}: let the data "
                    "give tensors, alone or in tuples and dicts, or take another method."
                )
            sizes = samples, *json.loads(shape)[1:]
            if not kind.is_floating_point:
                return torch.zeros(sizes, dtype=kind)
            return torch.from_numpy(rng.standard_normal(sizes, dtype="float32")).to(kind)

        x = mapped(draw, self.inputs)
        if x["kwargs"]:
            return Keywords(x["kwargs"])
        return x["args"][0] if len(x["args"]) == 1 else Positional(x["args"])

    def build(self, task: Any, about: Mapping[str, Any], seed: Any) -> nn.Module:
        """A freshly initialised network."""
        return models.build_any(
            about["model"], classes=about["classes"], width=about["width"], seed=seed, head=self.head,
            raw=task.network == "any",
        )  # fmt: skip


def _outlined(value: object) -> object:
    """Return nested inputs in words, as JSON holds them; a container of another type than JSON's is named."""
    if isinstance(value, Mapping):
        return {key: _outlined(part) for key, part in value.items()}
    return [*map(_outlined, value)] if isinstance(value, (tuple, list)) else in_words(value)


def in_words(leaf: Any) -> str:
    """Return dtype and shape of a tensor, or the type of another leaf, in words."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {[*leaf.shape]}"
    return type(leaf).__name__
