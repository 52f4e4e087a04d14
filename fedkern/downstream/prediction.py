"""The network of a finished run, applied to the user's images or samples of another kind."""

import csv
import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fedkern.data import FederatedData
from fedkern.data.forms import form_of
from fedkern.data.images.greys import inspect_files, pixels_outside
from fedkern.data.images.image_files import MAX_PIXELS, ImageFiles, list_images
from fedkern.data.sources.datasets import is_dataset, items_like
from fedkern.data.sources.items import name_cause
from fedkern.downstream.saved_network import read_model
from fedkern.engine.batches.reader import ItemReader
from fedkern.engine.setup.own_model import as_in_the_run
from fedkern.engine.store.resuming import load_unedited
from fedkern.errors import RAISED, UserError
from fedkern.files import atomic, filesystem
from fedkern.files.filesystem import check_text, describe_file_kind
from fedkern.messages.leaves import Keywords, Positional, join_batches, map_leaves, move_to_device
from fedkern.methods.protocol import batch_slices
from fedkern.process.torch_modes import reproducible
from fedkern.tasks import TASKS, Task
from fedkern.tasks.protocols import Description


@reproducible()
@torch.no_grad()
def outputs(module: nn.Module, data: FederatedData, samples: object, size: int) -> object:
    """Return the network's outputs on the CPU: class probabilities, or all outputs of a user-defined task.

    Args:
        samples: a map-style data set, or a network's inputs: a tensor or array, a tuple of them, or a dict by argument.
        size: batch size of a data set.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = module.to(device).eval()

    def answer(inputs: object) -> Any:
        try:
            return map_leaves(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, module(inputs))
        except RAISED as error:  # the user's own network may raise anything
            raise UserError(f"the network fails on the samples ({name_cause(error)}).") from error

    if is_dataset(samples):
        reader = ItemReader(items_like(data.clients[0], samples, "the samples"), device, seed=0, size=size)
        pairs = [(answer(inputs), count) for inputs, count in _inputs(reader, data)]
        results = join_batches([answer_part for answer_part, _ in pairs], [count for _, count in pairs])
    else:
        samples = map_leaves(lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, samples)
        inputs = Positional(samples) if isinstance(samples, tuple) else samples
        results = answer(move_to_device(Keywords(inputs) if isinstance(inputs, Mapping) else inputs, device))
    if "classes" in data.offers and results.dim() < 2:
        raise UserError(f"the network returns {list(results.shape)}: give samples one axis more, of their number.")
    return data.task.probabilities(results) if "classes" in data.offers else results


def _inputs(reader: ItemReader, data: FederatedData) -> Iterator[tuple[object, int]]:
    takes = 0 if data.form.inputs is None else len(data.form.inputs["args"])
    for batch in reader.batches():
        inputs_only = isinstance(batch.data, (tuple, list)) and len(batch.data) == takes > 1
        yield Positional(batch.data) if inputs_only else batch.inputs, len(batch.indices)


Value = TypeVar("Value")
Row = tuple[Path, Tensor, Tensor]
"""A file, its probabilities, and its size (width, height) before resizing."""

BATCH = 250
"""Largest batch, plus one image (see ``batch_slices``)."""
PIXELS = 1 << 20
"""Pixels per batch of larger images, so that memory does not depend on the images' size."""
PREDICTED = "predicted"
"""Column of the predicted class, before the columns of the probabilities."""


class Predictor:
    """The network of a finished run, which reads images as its training did.

    Attributes:
        module: the network, in eval mode.
        classes: in the order of the logits.
        image_shape: channels, height and width.
        mean, std: per channel, of images in [0, 1].
        grey_bits, window: as in `fedkern.data.forms.ImageForm`.
    """

    def __init__(self, module: nn.Module, about: Description, where: Path | str = "The run") -> None:
        self.task: Task = TASKS[about["task"]]
        if "pairs" in self.task.offers:
            raise UserError(
                f"{where} holds a pair of encoders: predictions are for classification and segmentation. Use "
                "`evaluate DIR --task retrieval` or `--task zero-shot` for image-text data."
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module = module.to(self.device).eval()
        self.classes: tuple[str, ...] = tuple(about["classes"])
        form: Any = form_of(about)
        self.form: Any = form
        self.image_shape: tuple[int, int, int] = form.shape
        self.mean, self.std, self.grey_bits, self.window = form.mean, form.std, form.grey_bits, form.window
        self.batch = min(BATCH, max(1, PIXELS // (form.shape[1] * form.shape[2])))

    @classmethod
    @reproducible()
    def open(
        cls, out: Path | str, trusted: Collection[str] = (), model: nn.Module | None = None, *, best: bool = False
    ) -> Self:
        """Read the network of a run folder, as :meth:`fedkern.api.Run.model`."""
        return cls.of(out, *read_model(out, trusted, model, best=best), trusted)

    @classmethod
    def of(cls, out: Path | str, module: nn.Module, about: Description, trusted: Collection[str] = ()) -> Self:
        if "items" in about:
            raise UserError(
                f"The network in {out} is for samples that are no images: give them in Python, "
                "fedkern.load(DIR, ...).predict(DATASET)."
            )
        config = load_unedited(out, trusted=trusted, device="cpu")
        if crop := config.data_options.get("crop"):
            raise UserError(
                f"The network in {out} saw parts of images (data option crop={crop}): predictions are for networks "
                "that see whole images."
            )
        predictor = cls(as_in_the_run(module, config), about, where=out)
        if not config.statistics:  # batch norm then normalises by the batch, so that answers depend on its size
            predictor.batch = BATCH
        return predictor

    @reproducible()
    def read(self, paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
        """Decode image files as in training: whole, resized, in the network's colours.

        Returns:
            uint8 ``[n, C, H, W]``, and int64 ``[n, 2]``, width and height before resizing.
        """
        channels, height, width = self.image_shape
        if height != width:
            raise UserError(f"The network sees images of {height}x{width} pixels, and image files are read as squares.")
        grey, bits = channels == 1, self.grey_bits
        return ImageFiles(paths, height, "predict", grey=grey, bits=bits, window=self.window).read()

    @reproducible()
    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return probabilities of the classes, or of every label by itself for multi-label images.

        Args:
            images: uint8 ``[n, C, H, W]``, or float32 for a run on float images.

        Returns:
            fp32 ``[n, classes]``, for segmentation ``[n, classes, H, W]``, on the CPU.
        """
        kind, sides = str(images.dtype).removeprefix("torch."), ", ".join(map(str, self.image_shape))
        is_bytes = kind == "uint8" and self.form.is_scaled
        if not (is_bytes or kind == self.form.dtype) or tuple(images.shape[1:]) != self.image_shape:
            is_float = images.is_floating_point() and self.form.dtype == "uint8"
            way = "; give floats in [0, 1] as (255 * images).round().to(torch.uint8)" * is_float
            expected = f"{self.form.dtype} [n, {sides}]"
            raise UserError(f"images must be {expected}, but are {kind} {list(images.shape)}{way}.")
        if not len(images):
            return torch.empty(0, *self.task.output(len(self.classes), self.image_shape[1:]))
        parts = []
        for rows in batch_slices(len(images), self.batch):
            batch = self.form.normalise_images(images[rows].to(self.device))
            parts.append(self.task.probabilities(self.module(batch).float()).cpu())
        return torch.cat(parts)

    def check_window(self, paths: Sequence[Path]) -> None:
        """Warn if most pixels of the files lie outside the grey window of the training."""
        looks = inspect_files(paths, MAX_PIXELS, True) if self.window is not None else {}
        if text := pixels_outside(self.window, looks.values(), "store the greys of these files as in the training"):
            warnings.warn(text, stacklevel=2)

    @reproducible()
    def probabilities_of(self, paths: Sequence[Path]) -> Tensor:
        self.check_window(paths)
        slices = batch_slices(len(paths), self.batch) if paths else [slice(0, 0)]
        return torch.cat([self.probabilities(self.read(paths[rows])[0]) for rows in slices])

    def files(self, paths: Sequence[Path]) -> Iterator[Row]:
        self.check_window(paths)
        for rows in batch_slices(len(paths), self.batch):
            images, sizes = self.read(paths[rows])
            yield from zip(paths[rows], self.probabilities(images), sizes, strict=True)


def found_images(paths: Sequence[Path]) -> list[Path]:
    """Return the given image files, and those in the given folders and their subfolders. Repeats are errors."""
    images: list[Path] = []
    for path in paths:
        check_text(str(path), "the path")
        if not path.is_dir():
            if problem := describe_file_kind(path):
                raise UserError(f"{path} is {problem}: name image files, or folders of image files.")
            images.append(path)
            continue
        folders = [path, *sorted(folder for folder in path.rglob("*") if folder.is_dir())]
        inside = [image for folder in folders for image in list_images(folder)]
        if not inside:
            raise UserError(f"The folder {path} holds no image file.")
        images += inside
    if twice := find_repeat(images):
        raise UserError(f"The image {twice} is named twice.")
    return images


def find_repeat(values: Sequence[Value]) -> Value | None:
    return next((value for value, count in Counter(values).items() if count > 1), None)


def write_table(out: Path, predictor: Predictor, rows: Iterable[Row]) -> None:
    """Write a CSV file with the columns ``path``, ``predicted`` (several labels joined by ``|``) and probabilities.

    Classes get a prefix ``p_`` if one is called ``path`` or ``predicted``. Rows go into a file beside ``out`` that
    replaces it at the end. An error leaves nothing.
    """

    classes = predictor.classes

    def fill(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            before = "p_" if {"path", PREDICTED} & {*classes} else ""
            writer.writerow(["path", PREDICTED, *(f"{before}{name}" for name in classes)])
            for path, probabilities, _ in rows:
                prediction = predictor.task.prediction_text(probabilities, classes)
                writer.writerow([str(path), prediction, *(f"{value:.6g}" for value in probabilities.tolist())])

    try:
        filesystem.replace(out, fill)
    except BrokenPipeError:  # of a progress line
        raise
    except OSError as error:
        raise atomic.unwritable(out, error) from None


def write_masks(folder: Path, paths: Sequence[Path], rows: Iterable[Row]) -> None:
    """Write the predicted class of every pixel as a grey PNG of the image's own size and name.

    ``folder`` must not exist. An error leaves nothing.
    """
    names = [f"{path.stem}.png" for path in paths]
    if twice := find_repeat(names):
        raise UserError(f"Two images would give the mask {twice}: predict them one folder at a time.")
    with atomic.new_folder(folder, "prediction") as part:
        for name, (_, answer, size) in zip(names, rows, strict=True):
            mask = Image.fromarray(answer.argmax(0).to(torch.uint8).numpy())
            full_mask = mask.resize((int(size[0]), int(size[1])), Image.Resampling.NEAREST)
            with (part / name).open("wb") as file:
                full_mask.save(file, format="PNG")
                file.flush()
                os.fsync(file.fileno())


WRITERS: Mapping[str, tuple[str, int, Callable[[Path, Predictor, Sequence[Path], Iterable[Row]], None]]] = {
    "classes": ("predictions.csv", 5, lambda out, predictor, paths, rows: write_table(out, predictor, rows)),
    "pixels": ("masks", 0, lambda out, predictor, paths, rows: write_masks(out, paths, rows)),
}
"""Default name, printed rows and writer of the answers, by kind of network."""
