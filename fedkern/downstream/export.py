"""The network of a finished run as a file for other programs."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkern import atomic
from fedkern.downstream.prediction import Predictor
from fedkern.errors import UserError
from fedkern.extras import needed
from fedkern.ops._core.private_torch import ONNX_LOG
from fedkern.torch_modes import reproducible

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2", "state-dict": ".pt"}
"""Formats, and how the names of their files end."""
ABOUT = ".json"
TOLERANCE = 1e-4
"""By how much the exported network's probabilities may differ from the run's."""


class Deployed(nn.Module):
    """The network with the normalisation of its images, per channel: from images in [0, 1] to logits."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.module, self.task, mean, std = predictor.module, predictor.task, predictor.mean, predictor.std
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` (``[B, classes, H, W]`` for segmentation) of fp32 ``[B, C, H, W]`` in [0, 1]."""
        return self.module((images - self.mean) / self.std)


@reproducible()
def export(predictor: Predictor, out: Path, kind: str) -> list[Path]:
    """Writes the network to a file in one of the `FORMATS`, and what it is to a JSON file beside it; returns both.

    ``onnx`` and ``torch-export`` files take fp32 images ``[B, C, H, W]`` in [0, 1], of any number B, and return logits.
    A ``state-dict`` file holds the tensors of the network alone, for ``torch.load``; its images are normalised by the
    ``mean`` and ``std`` that the JSON file has.

    What is written is read again before it takes its name, an ``onnx`` file by onnxruntime where that is installed.

    Raises:
        UserError: a package for the format is missing, the network cannot be written in it or read again, or a file
            cannot be written; nothing is then left.
    """
    module = predictor.module.cpu()
    writers: dict[str, Callable[[Deployed, Tensor, Path], None]] = {"onnx": _onnx, "torch-export": _program}
    if kind == "state-dict":
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        atomic.write(out, lambda temporary: torch.save(state, temporary))
    else:
        # Two images: a batch of one would be taken for a constant.
        example = torch.rand(2, *predictor.image_shape, generator=torch.Generator().manual_seed(0))
        deployed = Deployed(predictor).eval()
        try:
            atomic.write(out, lambda temporary: writers[kind](deployed, example, temporary))
        except UserError:
            raise
        except Exception as error:  # exporters raise many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"No file of --format {kind} can be written of this network and read again ({reason}): take --format "
                "state-dict, and build the network again from the run folder."
            ) from error
    channels, height, width = predictor.image_shape
    about: dict[str, Any] = {
        "task": predictor.task.name,
        "classes": list(predictor.classes),
        "channels": channels,
        "image_size": [height, width],
        "mean": list(predictor.mean),
        "std": list(predictor.std),
        "grey_bits": predictor.grey_bits,
        "format": kind,
        "input": "fp32 [B, C, H, W]" + (", normalised by mean and std" if kind == "state-dict" else " in [0, 1]"),
        "output": "logits",
    }
    path = out.with_name(out.name + ABOUT)
    try:
        atomic.write_bytes(path, (json.dumps(about, indent=2) + "\n").encode())
    except BaseException:
        out.unlink()
        raise
    return [out, path]


def _traced(deployed: nn.Module, example: Tensor) -> Any:
    return torch.export.export(deployed, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def _program(deployed: Deployed, example: Tensor, path: Path) -> None:
    with path.open("w+b") as file:
        torch.export.save(_traced(deployed, example), file)
        file.seek(0)
        program = torch.export.load(file)
    if any(str(node.target).startswith("fedkern.") for node in program.graph.nodes):
        raise UserError("This network has operators of fedkern, which nothing else reads: take --format state-dict.")
    _check(program.module()(example), deployed, example)


def _onnx(deployed: Deployed, example: Tensor, path: Path) -> None:
    onnx = needed("--format onnx needs the packages onnx and onnxscript", "export", "onnx", "onnxscript")
    _traced(deployed, example)  # its error is clearer than that of the exporter
    logging.getLogger(ONNX_LOG).addFilter(_of_the_network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own parts
        program = torch.onnx.export(
            deployed, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=["images"], output_names=["logits"], verbose=False,
        )  # fmt: skip
    assert program is not None
    program.save(str(path), include_initializers=True, keep_initializers_as_inputs=False, external_data=False)
    onnx.checker.check_model(str(path))
    if find_spec("onnxruntime") is not None:
        session = import_module("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
        _check(torch.from_numpy(session.run(None, {"images": example.numpy()})[0]), deployed, example)


def _of_the_network(record: logging.LogRecord) -> bool:
    """Whether a line of the exporter's log is not about torchvision, which a network that needs it has imported."""
    return not str(record.msg).startswith("torchvision is not installed")


@torch.no_grad()
def _check(found: Tensor, deployed: Deployed, example: Tensor) -> None:
    there, here = map(deployed.task.probabilities, (found.float(), deployed(example).float()))
    difference = float((there - here).abs().max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"The exported network's probabilities differ from the run's by {difference:.2g}: take --format state-dict."
        )
