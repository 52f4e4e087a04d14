"""The network of a finished run, applied to images of one's own."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from fedkern.data.images import MAX_PIXELS, list_images, read_images
from fedkern.data.transforms import normalise
from fedkern.engine.config import RunConfig
from fedkern.engine.store import atomic
from fedkern.engine.store.saved_model import read_model
from fedkern.errors import UserError
from fedkern.files import check_text
from fedkern.inputs import standing
from fedkern.methods.protocol import batch_slices

Value = TypeVar("Value")

BATCH = 250
TASKS = ("classification", "multilabel", "segmentation")
PARTS = ("tile", "crop")
"""Data options with which a network sees parts of images."""
PREDICTED = "predicted"
"""Column of the predicted class; the columns behind it are the classes' probabilities."""


class Predictor:
    """The network of a finished run, with the reading of images that its training had.

    Attributes:
        module: the network, in eval mode.
        classes: names of the classes, in the order of the logits.
        task: ``"classification"``, ``"multilabel"`` or ``"segmentation"``.
        image_shape: channels, height and width of the images that the network sees.
        mean, std: per channel, of images in [0, 1].
    """

    def __init__(self, module: nn.Module, about: Mapping[str, Any], where: Path | str = "The run") -> None:
        self.task: str = about.get("task", "classification")
        if self.task not in TASKS:
            raise UserError(
                f"{where} holds a pair of encoders: predictions are for classification and segmentation; the commands "
                "retrieval and zero-shot are for image-text data."
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module = module.to(self.device).eval()
        self.classes: tuple[str, ...] = tuple(about["classes"])
        height, width = about["image_size"]
        self.image_shape: tuple[int, int, int] = (about["channels"], height, width)
        self.mean, self.std = tuple(about["mean"]), tuple(about["std"])

    @classmethod
    def open(cls, out: Path | str, trusted: Collection[str] = (), model: nn.Module | None = None) -> Self:
        """Reads the network of a run folder.

        Args:
            out: the run folder.
            trusted: what may be imported, see :func:`fedkern.engine.run`.
            model: the run's network, where a script made it.

        Raises:
            UserError: the folder has no finished run, a run of image-text pairs, or one whose network saw parts of
                images.
        """
        module, about = read_model(out, trusted, model)
        options = RunConfig.load(out, trusted=trusted, device="cpu").data_options
        for name in PARTS:
            if options.get(name):
                raise UserError(
                    f"The network in {out} saw parts of images (data option {name}={options[name]}): predictions are "
                    "for networks that see whole images."
                )
        return cls(module, about, where=out)

    def read(self, paths: Sequence[Path], max_pixels: int = MAX_PIXELS) -> tuple[Tensor, Tensor]:
        """Decodes image files as the run's training did: whole, resized, in the network's colours.

        Returns:
            uint8 ``[n, C, H, W]``, and int64 ``[n, 2]``, width and height before resizing.

        Raises:
            UserError: an image that cannot be decoded or is too large.
        """
        channels, height, width = self.image_shape
        if height != width:
            raise UserError(f"The network sees images of {height}x{width} pixels, and image files are read as squares.")
        return read_images(paths, height, "predict", grey=channels == 1, max_pixels=max_pixels)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities of the classes; where an image may have several labels, of every label for itself.

        Args:
            images: uint8 ``[n, C, H, W]``.

        Returns:
            fp32 ``[n, classes]``, for segmentation ``[n, classes, H, W]``, on the CPU.

        Raises:
            ValueError: images of another shape or dtype.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.image_shape:
            sides = ", ".join(str(side) for side in self.image_shape)
            raise ValueError(f"images must be uint8 [n, {sides}], but are {images.dtype} {list(images.shape)}")
        parts = []
        for rows in batch_slices(len(images), BATCH):
            batch = normalise(images[rows].to(self.device), self.mean, self.std, channels_last=True)
            logits = self.module(batch).float()
            parts.append((logits.sigmoid() if self.task == "multilabel" else logits.softmax(1)).cpu())
        empty = (0, len(self.classes), *(self.image_shape[1:] if self.task == "segmentation" else ()))
        return torch.cat(parts) if parts else torch.empty(empty)

    def said(self, probabilities: Tensor) -> str:
        """The class of an image with its probability, or all labels above one half with theirs, in words."""
        if self.task == "multilabel":
            named = zip(self.classes, probabilities.tolist(), strict=True)
            return ", ".join(f"{name} {value:.3f}" for name, value in named if value > 0.5) or "no label"
        best = int(probabilities.argmax())
        return f"{self.classes[best]}  {float(probabilities[best]):.3f}"

    def files(self, paths: Sequence[Path], max_pixels: int = MAX_PIXELS) -> Iterator[tuple[Path, Tensor, Tensor]]:
        """Yields every file with its answer and its size (width, height) before resizing.

        The answer is fp32 ``[classes]``, probabilities; for segmentation uint8 ``[H, W]``, the class of every pixel.
        """
        for rows in batch_slices(len(paths), BATCH):
            images, sizes = self.read(paths[rows], max_pixels)
            answers = self.probabilities(images)
            if self.task == "segmentation":  # the probabilities of many images would fill the memory
                answers = answers.argmax(1).to(torch.uint8)
            yield from zip(paths[rows], answers, sizes, strict=True)


def found_images(given: Sequence[Path]) -> list[Path]:
    """The given image files, and all image files in the given folders and their subfolders.

    Raises:
        UserError: a path that does not exist, a folder without images, or two paths to one file.
    """
    found: list[Path] = []
    for path in given:
        check_text(str(path), "the path")
        if not path.is_dir():
            if what := standing(path):
                raise UserError(f"{path} is {what}: name image files, or folders of image files.")
            found.append(path)
            continue
        folders = [path, *sorted(one for one in path.rglob("*") if one.is_dir())]
        inside = [image for folder in folders for image in list_images(folder)]
        if not inside:
            raise UserError(f"The folder {path} holds no image file.")
        found += inside
    if twice := repeated(found):
        raise UserError(f"The image {twice} is named twice.")
    return found


def repeated(values: Sequence[Value]) -> Value | None:
    """The first value that comes more than once, or None."""
    return next((value for value, count in Counter(values).items() if count > 1), None)


def write_table(
    out: Path, classes: Sequence[str], rows: Sequence[tuple[Path, Tensor]], *, several: bool = False
) -> None:
    """Writes a CSV file with the columns ``path``, ``predicted`` and a probability for every class.

    Args:
        rows: every file with its probabilities, fp32 ``[classes]``.
        several: an image may have several labels: ``predicted`` has those above one half, joined by ``|``.

    Raises:
        UserError: the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", PREDICTED, *classes])
    for path, probabilities in rows:
        values = [f"{value:.6g}" for value in probabilities.tolist()]
        if several:
            found = "|".join(name for name, value in zip(classes, probabilities.tolist(), strict=True) if value > 0.5)
        else:
            found = classes[int(probabilities.argmax())]
        writer.writerow([str(path), found, *values])
    atomic.write_bytes(out, text.getvalue().encode())


def write_masks(folder: Path, rows: Sequence[tuple[Path, Tensor, Tensor]]) -> list[Path]:
    """Writes the predicted class of every pixel as a grey PNG of the image's own size, named as the image.

    Args:
        folder: is made; it must not exist.
        rows: every file with the class of every pixel, uint8 ``[H, W]``, and its size (width, height).

    Raises:
        UserError: two images have one name, or the folder cannot be written.
    """
    names = [f"{path.stem}.png" for path, _, _ in rows]
    if twice := repeated(names):
        raise UserError(f"Two images would give the mask {twice}: predict them one folder at a time.")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): name another folder with --out.") from None
    written = []
    for name, (_, answer, size) in zip(names, rows, strict=True):
        values = Image.fromarray(answer.numpy())
        whole = values.resize((int(size[0]), int(size[1])), Image.Resampling.NEAREST)
        buffer = io.BytesIO()
        whole.save(buffer, format="PNG")
        atomic.write_bytes(folder / name, buffer.getvalue())
        written.append(folder / name)
    return written
