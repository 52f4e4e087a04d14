"""The network of a finished run as a file for other programs."""

import inspect
import json
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fedkern.data.forms import form_of
from fedkern.downstream.prediction import Predictor
from fedkern.downstream.saved_network import read_model
from fedkern.errors import UserError, suggest_name
from fedkern.files import atomic
from fedkern.messages.leaves import Keywords, Positional, leaves, map_leaves
from fedkern.ops._core.private_torch import ONNX_LOG
from fedkern.process.extras import import_extra
from fedkern.process.torch_modes import reproducible
from fedkern.tasks.protocols import Description
from fedkern.tasks.user_tasks import user_module

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2", "state-dict": ".pt"}
"""Formats, with their file suffixes."""
SUFFIXES = {**{suffix: kind for kind, suffix in FORMATS.items()}, ".pth": "state-dict"}
ABOUT = ".json"
TOLERANCE = 1e-4
"""Largest allowed difference of the exported network's outputs, relative to their largest value or 1."""


def find_format(kind: str | None, out: Path | str | None) -> str:
    if kind is not None and kind not in FORMATS:
        hint = suggest_name(str(kind), FORMATS)
        raise UserError(f'--format must be one of {", ".join(FORMATS)}, not "{kind}".{hint}')
    if out is None:
        return kind or "torch-export"
    named = SUFFIXES.get(Path(out).suffix.lower())
    if kind is None and named is None:
        endings = ", ".join(f"{suffix} ({kind})" for suffix, kind in SUFFIXES.items())
        raise UserError(f"{out} has no suffix of a format: let its name end in {endings}, or give --format.")
    if None not in (kind, named) and kind != named:
        raise UserError(
            f"{out} is a name of --format {named}, not of --format {kind}: leave --format out, or rename it."
        )
    return kind or str(named)


class Deployed(nn.Module):
    """The network with the normalisation of its images, per channel: from images in [0, 1] to logits."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.module, mean, std = predictor.module, predictor.mean, predictor.std
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map fp32 ``[B, C, H, W]`` in [0, 1] to logits ``[B, classes]``, for segmentation ``[B, classes, H, W]``."""
        is_user_network = images.dtype == torch.uint8
        logits: Tensor = self.module(images if is_user_network else (images - self.mean) / self.std)
        return logits


@dataclass(frozen=True)
class Exportable:
    """A network ready for export.

    Attributes:
        network: the module whose tensors a state dict holds.
        program: the module in other files.
        args, kwargs: inputs for two samples, as a batch of one would be taken for a constant.
        judged: part of an output to compare: for images the class probabilities.
        about: entries of the JSON file.
        raw: entry ``input`` of a state dict, whose network does not normalise.
        names: input names in an ``onnx`` file (empty: the exporter's).
        unfit: why only a state dict can be written.
        lengths: whether other axes than the first may have any length that the network takes.
    """

    network: nn.Module
    program: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    judged: Callable[[Tensor], Tensor]
    about: dict[str, Any]
    raw: Any
    names: tuple[str, ...] = ()
    unfit: str = ""
    lengths: bool = False

    def __call__(self) -> object:
        return self.program(*self.args, **self.kwargs)


@reproducible()
def exportable(
    out: Path | str, trusted: Collection[str] = (), model: nn.Module | None = None, *, best: bool = False
) -> Exportable:
    module, about = read_model(out, trusted, model, best=best)
    return of_items(module, about) if "items" in about else of_images(Predictor.of(out, module, about, trusted))


def of_images(predictor: Predictor) -> Exportable:
    channels, height, width = predictor.image_shape
    form = predictor.form
    about = {
        "task": predictor.task.name, "classes": list(predictor.classes), "channels": channels,
        "image_size": [height, width], "mean": list(predictor.mean), "std": list(predictor.std),
        "grey_bits": predictor.grey_bits, "window": predictor.window,
        "input": f"fp32 [B, C, H, W] {'in [0, 1]' if form.is_scaled else 'as the data set gives them'}",
        "output": "logits",
    }  # fmt: skip
    raw = "fp32 [B, C, H, W], normalised by mean and std"
    example = torch.rand(2, *predictor.image_shape, generator=torch.Generator().manual_seed(0))
    if form.feeds_bytes:
        raw = about["input"] = "uint8 [B, C, H, W]"
        example = (255 * example).to(torch.uint8)
    network = predictor.module.cpu()
    program = Deployed(predictor).eval()
    return Exportable(network, program, (example,), {}, predictor.task.probabilities, about, raw, ("images",))


def of_items(module: nn.Module, about: Description) -> Exportable:
    """Return a user-defined network of samples that are no images: the user's own module."""
    form: Any = form_of(about)
    network, unfit = user_module(module), ""
    description = {"task": about["task"], "classes": about["classes"], "input": about["inputs"]}
    description["output"] = "what the network gives"
    inputs: Any = Positional()
    if form.inputs is None:
        unfit = "the run's loss calls the network itself, so that its inputs are not known"
    elif untraceable := [words for words in leaves(form.inputs) if not words.endswith(" [2]") and " [2, " not in words]:
        unfit = f"an input of two samples is {untraceable[0]}, and only tensors [B, ...] can be exported"
    else:
        inputs = form.noise(2, np.random.default_rng(0))
    by_name = isinstance(inputs, Keywords)
    args = () if by_name else tuple(inputs) if isinstance(inputs, Positional) else (inputs,)
    kwargs, raw = dict(inputs) if by_name else {}, about["inputs"]
    return Exportable(network, network, args, kwargs, Tensor.float, description, raw, unfit=unfit, lengths=True)


@reproducible()
def export(bundle: Exportable, out: Path, kind: str) -> list[Path]:
    """Write the network in one of the `FORMATS` and its description as JSON, and return both paths.

    ``onnx`` and ``torch-export`` files take any number of samples. A ``state-dict`` file holds only the tensors, and
    its images are normalised by ``mean`` and ``std`` of the JSON file. The file is read again before it takes its name,
    an ``onnx`` file with onnxruntime if installed. UserError leaves no file.
    """
    writers: dict[str, Callable[..., None]] = {"onnx": _onnx, "torch-export": _program}
    about = bundle.about | {"format": kind} | ({"input": bundle.raw} if kind == "state-dict" else {})
    if kind == "state-dict":
        state = {name: tensor.clone() for name, tensor in bundle.network.state_dict().items()}
        atomic.write(out, lambda temporary: torch.save(state, temporary))
    elif bundle.unfit:
        raise UserError(f"No file of --format {kind} can be written ({bundle.unfit}): take --format state-dict.")
    else:
        try:
            outputs = [leaf for leaf in leaves(bundle()) if isinstance(leaf, Tensor)]
            if bundle.lengths and not all(bool(leaf.isfinite().all()) for leaf in outputs):  # as masks of zeros give
                bundle = replace(bundle, args=map_leaves(_ones, bundle.args), kwargs=map_leaves(_ones, bundle.kwargs))
            program, axes = _trace_network(bundle)
            atomic.write(out, lambda temporary: writers[kind](bundle, program, axes, temporary))
            about |= {"input": _inputs_in_words(bundle, program)} if bundle.lengths else {}
        except UserError:
            raise
        except Exception as error:  # exporters raise many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"No file of --format {kind} can be written of this network and read again ({reason}): take --format "
                "state-dict, and build the network again from the run folder."
            ) from error
    path = out.with_name(out.name + ABOUT)
    try:
        atomic.write_bytes(path, (json.dumps(about, indent=2) + "\n").encode())
    except BaseException:
        out.unlink()
        raise
    return [out, path]


def _ones(leaf: Tensor) -> Tensor:
    return leaf if leaf.is_floating_point() else torch.ones_like(leaf)


Shapes = dict[str, Any] | tuple[Any, ...]
"""Free axes for torch.export."""


def _trace_network(bundle: Exportable) -> tuple[ExportedProgram, Shapes]:
    """Return the exported program, with free lengths if the network takes several, and its dynamic shapes."""
    if bundle.lengths:
        with suppress(Exception):  # exporters raise many kinds where a length cannot be free
            program, shapes = _export(bundle, torch.export.Dim.AUTO)
            if _takes_other_lengths(bundle, program):
                return program, shapes
    return _export(bundle, torch.export.Dim.STATIC)


def _export(bundle: Exportable, length: object) -> tuple[ExportedProgram, Shapes]:
    """Export with a free number of samples, and ``length`` for all other axes."""
    batch = torch.export.Dim("batch", min=1)

    def axes_of(leaf: Tensor) -> dict[int, object]:
        return {0: batch, **dict.fromkeys(range(1, leaf.dim()), length)}

    shapes = map_leaves(axes_of, bundle.args)
    if bundle.kwargs:
        names = list(inspect.signature(bundle.program.forward).parameters)
        shapes = {**dict(zip(names, shapes, strict=False)), **map_leaves(axes_of, bundle.kwargs)}
    return torch.export.export(bundle.program, bundle.args, bundle.kwargs, dynamic_shapes=shapes), shapes


def _sizes(program: ExportedProgram) -> list[list[str]]:
    """Return the sizes of every input of a program. Fixed sizes are numbers."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    return [[*map(str, values[name].shape)] for name in program.graph_signature.user_inputs]


def _takes_other_lengths(bundle: Exportable, program: ExportedProgram) -> bool:
    """Return whether the program gives the network's outputs for other lengths of its free axes."""
    for change in (lambda size: 2 * size, lambda size: size + 1, lambda size: size - 1):
        inputs = iter(_sizes(program))

        def resize(leaf: Tensor, change: Callable[[int], int] = change, inputs: Iterator[list[str]] = inputs) -> Tensor:
            for axis, size in enumerate(next(inputs)):
                if axis and not size.isdecimal():
                    leaf = torch.cat([leaf, leaf], axis).narrow(axis, 0, change(leaf.shape[axis]))
            return leaf

        resized_bundle = replace(bundle, args=map_leaves(resize, bundle.args), kwargs=map_leaves(resize, bundle.kwargs))
        with suppress(Exception), torch.no_grad():
            check(program.module()(*resized_bundle.args, **resized_bundle.kwargs), resized_bundle)
            return True
    return False


def _inputs_in_words(bundle: Exportable, program: ExportedProgram) -> object:
    """Return dtype and shape of the inputs: B samples, L and L2 for free lengths, numbers for fixed ones."""
    given, names = iter(_sizes(program)), dict[str, str]()

    def in_words(leaf: Tensor) -> str:
        letter = [*"BL", *(f"L{number}" for number in range(2, 99))]
        sizes = [size if size.isdecimal() else names.setdefault(size, letter[len(names)]) for size in next(given)]
        return f"{str(leaf.dtype).removeprefix('torch.')} [{', '.join(sizes)}]"

    return map_leaves(in_words, {"args": [*bundle.args], "kwargs": bundle.kwargs})


def _program(bundle: Exportable, exported: ExportedProgram, axes: Shapes, path: Path) -> None:
    with path.open("w+b") as file:
        torch.export.save(exported, file)
        file.seek(0)
        program = torch.export.load(file)
    if any(str(node.target).startswith("fedkern.") for node in program.graph.nodes):
        raise UserError("This network has operators of fedkern, which nothing else reads: take --format state-dict.")
    check(program.module()(*bundle.args, **bundle.kwargs), bundle)


def _onnx(bundle: Exportable, exported: ExportedProgram, axes: Shapes, path: Path) -> None:
    onnx = import_extra("--format onnx needs the packages onnx and onnxscript", "export", "onnx", "onnxscript")
    logging.getLogger(ONNX_LOG).addFilter(_of_the_network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own parts
        program = torch.onnx.export(
            bundle.program, bundle.args, kwargs=bundle.kwargs, dynamo=True, dynamic_shapes=axes,
            input_names=bundle.names or None, output_names=["logits"] if bundle.names else None, verbose=False,
        )  # fmt: skip
    assert program is not None
    program.save(str(path), include_initializers=True, keep_initializers_as_inputs=False, external_data=False)
    onnx.checker.check_model(str(path))
    if find_spec("onnxruntime") is not None:
        session = import_module("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
        inputs = [leaf.numpy() for leaf in leaves([*bundle.args, bundle.kwargs])]
        names = bundle.names or [entry.name for entry in session.get_inputs()]
        check([torch.from_numpy(array) for array in session.run(None, dict(zip(names, inputs, strict=True)))], bundle)


def _of_the_network(record: logging.LogRecord) -> bool:
    """Drop the exporter's line about torchvision, which a network that needs torchvision has imported."""
    return not str(record.msg).startswith("torchvision is not installed")


@torch.no_grad()
def check(outputs: object, bundle: Exportable) -> None:
    """Raise UserError if the file's outputs for the two samples differ from the network's."""
    for pair in zip(leaves(outputs), leaves(bundle()), strict=True):
        if not isinstance(pair[1], Tensor):
            continue
        exported, expected = (bundle.judged(leaf.float()) for leaf in pair)
        difference = float((exported - expected).abs().max() / expected.abs().max().clamp(min=1))
        if not difference <= TOLERANCE:
            raise UserError(
                f"The exported network's outputs differ from the run's by {difference:.2g}: take --format state-dict."
            )
