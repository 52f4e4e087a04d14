"""Forms: how samples of a federation enter a network, and which can be shown as pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fedkern import models
from fedkern.data.images.transforms import cut_central_windows, normalise
from fedkern.data.split import Split
from fedkern.errors import UserError
from fedkern.messages.leaves import Keywords, Positional, leaves, map_leaves, split_targets
from fedkern.tasks import Task
from fedkern.tasks.protocols import Description

Scale = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation per channel, of images in [0, 1]."""
T = TypeVar("T")
OF_DATASETS = ("dtype", "is_raw", "is_scaled")
"""Attributes of images that user data sets give and networks get unchanged."""
MASK = "mask"
"""Key of an item that holds the object mask."""


@dataclass(frozen=True)
class ImageForm:
    """Form of images.

    Attributes:
        shape: channels, height and width that a network sees.
        augment: key of `fedkern.data.images.transforms.AUGMENTATIONS`.
        grey_bits: bits of a grey value in files with more than eight; 0 without such files.
        window: their values that become black and white, or None.
        seen: lines on files and on what networks see: one for all, then one per differing set.
        outside: warning where most pixels of such files lie outside the window.
        sites: of image files; those of `Split.homes` where one client holds all images.
        is_raw: whether networks get images neither scaled nor normalised.
        is_scaled: whether known ``mean`` and ``std`` can convert images back to pixels.
    """

    noun: ClassVar[str] = "images"
    offers: ClassVar[frozenset[str]] = frozenset({"images", "pixels"})

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str = "none"
    grey_bits: int = 16
    window: tuple[float, float] | None = None
    seen: tuple[str, ...] = field(default=(), compare=False)
    outside: str = field(default="", compare=False)
    sites: tuple[str, ...] = field(default=(), compare=False)
    dtype: str = "uint8"
    is_raw: bool = False
    is_scaled: bool = True

    @property
    def feeds_bytes(self) -> bool:
        return self.is_raw and self.dtype == "uint8"

    def size_text(self) -> str:
        return f" of {'×'.join(map(str, self.shape))}"

    def normalise_images(self, images: Tensor) -> Tensor:
        """Return a network's input for images ``[B, C, H, W]``, channels-last."""
        if images.dtype != torch.uint8 or self.feeds_bytes:
            return images.contiguous(memory_format=torch.channels_last)
        return normalise(images, self.mean, self.std, channels_last=True)

    def scale(self, purpose: str) -> Scale:
        """Return mean and standard deviation per channel.

        UserError if they are unknown or networks get bytes; ``purpose`` names what needs them.
        """
        if not self.is_scaled:
            raise UserError(
                f"{purpose} needs pixels, and the data set gives float images: add normalize=(mean, std), the numbers "
                "of the transform Normalize of the data set (0 and 1 without one)."
            )
        if self.feeds_bytes:
            raise UserError(
                f"{purpose} computes with images, and a network of your own gets uint8 images as they are: let the "
                "data set give floats, (image / 255 - mean) / std, and add normalize=(mean, std)."
            )
        return self.mean, self.std

    def to_bytes(self, images: Tensor) -> Tensor:
        """Return images of a split as uint8, or raise UserError as :meth:`scale` does."""
        if images.dtype == torch.uint8:
            return images
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in self.scale("A picture"))
        return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def describe_stored(self) -> tuple[str, ...]:
        """Return a line on images that come from no files."""
        colour = {1: "grey", 3: "RGB"}.get(self.shape[0], f"{self.shape[0]} channels")
        return (f"images: 8-bit {colour}, {self.shape[2]} x {self.shape[1]}",)

    def central(self, split: Split) -> Split:
        """Return a split that is not augmented: central windows of the network's input size."""
        return cut_central_windows(split, self.shape[1:])

    def about(self) -> dict[str, object]:
        """Return the form's entries in model.safetensors."""
        return {
            "channels": self.shape[0], "image_size": list(self.shape[1:]), "mean": list(self.mean),
            "std": list(self.std), "grey_bits": self.grey_bits, "window": self.window and list(self.window),
            **({name: getattr(self, name) for name in OF_DATASETS} if self.is_raw or not self.is_scaled else {}),
        }  # fmt: skip

    def noise(self, samples: int, rng: np.random.Generator) -> Tensor:
        """Return random inputs: standard normal fp32, or uniform uint8 where networks get bytes."""
        if self.feeds_bytes:
            return torch.from_numpy(rng.integers(0, 256, (samples, *self.shape), dtype="uint8"))
        return torch.from_numpy(rng.standard_normal((samples, *self.shape), dtype="float32"))

    def build(self, task: Task, about: Description, seed: int) -> nn.Module:
        """Return a freshly initialised network, see `fedkern.tasks.Task.build`."""
        return task.build({**about, "channels": self.shape[0], "image_size": self.shape[1:]}, seed)


def form_of(about: Description) -> ImageForm | SampleForm:
    """Return the form whose ``about()`` is given."""
    if "items" in about:
        return SampleForm(tuple(about["items"]), about["inputs"], about["head"])
    shape = about["channels"], *about["image_size"]
    window = about["window"] and tuple(about["window"])
    switches = {name: about[name] for name in ("grey_bits", *OF_DATASETS) if name in about}
    return ImageForm(shape, tuple(about["mean"]), tuple(about["std"]), window=window, **switches)


@dataclass(frozen=True)
class SampleForm:
    """Form of samples of map-style data sets.

    Attributes:
        shapes: dtype and shape of every tensor of a batch of two samples.
        inputs: nested network arguments as text, ``{"args": [...], "kwargs": {...}}``; None if the user's loss calls
            the network.
        head: name of the linear layer that gives the logits.
        normalize: mean and standard deviation of the float images' transform.
    """

    noun: ClassVar[str] = "samples"
    offers: ClassVar[frozenset[str]] = frozenset()
    augment: ClassVar[str] = "none"
    seen: ClassVar[tuple[str, ...]] = ()
    outside: ClassVar[str] = ""
    sites: ClassVar[tuple[str, ...]] = ()

    shapes: tuple[str, ...]
    inputs: Any = None
    head: str | None = None
    normalize: Scale | None = field(default=None, compare=False)

    @staticmethod
    def of(batch: object, called: bool = True, normalize: Scale | None = None) -> SampleForm:
        """Return the form of a batch of two samples, where fedkern calls the network if ``called``."""
        x = split_targets(batch)[0]
        by_name = isinstance(x, Keywords)
        args = () if by_name else x if isinstance(x, Positional) else (x,)
        inputs = {"args": _outline_inputs(args), "kwargs": _outline_inputs(x) if by_name else {}}
        form = SampleForm(tuple(map(in_words, leaves(batch))), inputs if called else None, normalize=normalize)
        if normalize is not None and form.image_shape is None:
            raise UserError(f"normalize is for images [C, H, W]; samples have {form.input_words()}: leave it out.")
        return form

    @property
    def _single(self) -> tuple[str, list[int]] | None:
        """Dtype and shape of a sample's only input tensor besides a mask, else None."""
        if self.inputs is None:
            return None
        inputs = [*self.inputs["args"], *(value for key, value in self.inputs["kwargs"].items() if key != MASK)]
        if len(inputs) != 1 or not isinstance(inputs[0], str) or " [" not in inputs[0]:
            return None
        dtype, _, shape = inputs[0].partition(" ")
        return dtype, json.loads(shape)[1:]

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Channels, height and width if samples are images, uint8 or float32 ``[C, H, W]``, else None."""
        dtype, shape = self._single or ("", [])
        return (shape[0], shape[1], shape[2]) if dtype in ("uint8", "float32") and len(shape) == 3 else None

    @property
    def dtype(self) -> str:
        return self._single[0] if self._single else ""

    def input_words(self) -> str:
        if self._single:
            dtype, shape = self._single
            return f"one input of shape {shape}" + (f" and dtype {dtype}" if len(shape) == 3 else "")
        return f"the parts {', '.join(self.shapes)} (of two samples)"

    def size_text(self) -> str:
        return f", two of which are {', '.join(self.shapes)}"

    def describe_stored(self) -> tuple[str, ...]:
        return ()

    def central(self, split: T) -> T:
        return split

    def about(self) -> dict[str, object]:
        """Return the form's entries in model.safetensors."""
        return {"items": list(self.shapes), "inputs": self.inputs, "head": self.head}

    def noise(self, samples: int, rng: np.random.Generator) -> object:
        """Return random inputs: standard normal floats, or zeros for integers, since 0 is a valid index."""

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

        x = map_leaves(draw, self.inputs)
        if x["kwargs"]:
            return Keywords(x["kwargs"])
        return x["args"][0] if len(x["args"]) == 1 else Positional(x["args"])

    def build(self, task: Task, about: Description, seed: int) -> nn.Module:
        network: nn.Module = models.build_any(
            about["model"], classes=about["classes"], width=about["width"], seed=seed, head=self.head,
            raw=task.network == "any",
            inputs=self.input_words() + ", and targets are no classes" * (task.target != "class"),
        )  # fmt: skip
        return network


def _outline_inputs(value: object) -> object:
    """Return nested inputs as text for JSON, and other containers as their type's name."""
    if isinstance(value, Mapping):
        return {key: _outline_inputs(part) for key, part in value.items()}
    return [*map(_outline_inputs, value)] if isinstance(value, (tuple, list)) else in_words(value)


def in_words(leaf: object) -> str:
    """Return a tensor's dtype and shape, or another leaf's type, as text."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {[*leaf.shape]}"
    return type(leaf).__name__
