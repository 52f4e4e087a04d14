"""A user's network in a run: whether it fits data and method, and whether it is the one that the run began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkern.engine import initial_weights
from fedkern.engine.context import RunContext
from fedkern.errors import UserError
from fedkern.methods import registry
from fedkern.models import MODELS, Own
from fedkern.models.own import LEVELS, check_module, digest, level
from fedkern.models.registry import unknown
from fedkern.settings.config import RunConfig

INSTANCE = "module:"
"""Beginning of the name of a network that is given as a module."""


def of_module(config: RunConfig, module: nn.Module) -> RunConfig:
    """The settings of a run whose network is a module that a script made.

    Raises:
        UserError: the module cannot be trained, or cannot be copied.
    """
    name = f"{INSTANCE}{type(module).__name__}"
    if not isinstance(module, nn.Module):
        raise UserError(f"model must be an nn.Module, not {type(module).__name__}.")
    check_module(module, name)
    return config.replace(model=name, width=None)


def check_given(stored: RunConfig, module: nn.Module | None, out: Path) -> None:
    """Raises UserError where a stored run needs a module that only a script can make."""
    if stored.model.startswith(INSTANCE) and module is None:
        raise UserError(
            f"The run in {out} trains a module that a script made ({stored.model.removeprefix(INSTANCE)}): go on with "
            "it in Python, fedkern.load(DIR, model=MODULE).resume()."
        )


def settled(config: RunConfig, data: Any, stored: RunConfig | None, out: Path) -> tuple[RunConfig, list[str]]:
    """Tries the network of a run and describes it in the settings.

    A user's network gets two images, and its output is looked at.  Its source and its tensors are described by
    ``model_sha256`` and ``model_layout``.  A file of initial weights is described by ``init_sha256``.

    Args:
        config: the settings; ``MODELS`` has the network.
        data: the federated data.
        stored: the settings of the run that is resumed, or None.
        out: the run folder.

    Returns:
        The settings, and sentences on what has changed since the run began.

    Raises:
        UserError: the network does not fit, or another one was meant when the run began.
    """
    if config.init is not None:
        sha = initial_weights.sha256(config.init) if stored is None else stored.init_sha256
        config = config.replace(init_sha256=sha)
    entry = MODELS.get(config.model)
    if entry is None and data.task != "retrieval":
        raise UserError(unknown(config.model))
    own = data.task != "retrieval" and entry is not None and isinstance(entry.make, Own)
    if not own and config.init is None:
        return config, []
    context = RunContext(config, data)
    network = context.build()
    if entry is None or not own:
        return config, []
    make: Any = entry.make
    _check_output(network, context, make.text)
    _check_method(network, config, data.task, make.text)
    state = network.state_dict()
    layout = digest(state, values=False)
    sha = digest(make.what.state_dict(), values=True) if isinstance(make.what, nn.Module) else make.sha256
    said: list[str] = []
    if stored is not None:
        if stored.model_layout not in (None, layout):
            raise UserError(
                f"The network {make.text} has other parameters than when the run in {out} began: put its code back, or "
                "start a new run."
            )
        if stored.model_sha256 not in (None, sha):
            what = "has other initial weights" if isinstance(make.what, nn.Module) else "has changed"
            said.append(
                f"The network {make.text} {what} since the run in {out} began: the run may give other bits than an "
                "uninterrupted one."
            )
        layout, sha = stored.model_layout or layout, stored.model_sha256
    return config.replace(model_layout=layout, model_sha256=sha), said


@torch.no_grad()
def _check_output(network: nn.Module, context: RunContext, text: str) -> None:
    """Raises UserError where a network has no logits for the classes of the data."""
    shape = context.data.image_shape
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((2, *shape), generator=generator)
    size = "x".join(map(str, shape))
    network.eval()
    try:
        logits: Any = network(images)
    except Exception as error:  # a network's code may raise anything
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(
            f"the network {text} cannot take the images of {context.config.data}, {size} (channels, height, width): "
            f"{type(error).__name__}: {reason}."
        ) from None
    network.train()
    classes = context.federation.classes
    expected = [2, classes, *(shape[1:] if context.data.task == "segmentation" else ())]
    if not isinstance(logits, Tensor):
        raise UserError(
            f"the network {text} must give a tensor of logits, or an object with the attribute logits, and gives "
            "neither."
        )
    if list(logits.shape) != expected:
        way = "let it take the argument classes" if logits.shape[1:2] != (classes,) else (
            "let it give logits of every pixel" if len(expected) == 4 else "let it give one row of logits an image"
        )  # fmt: skip
        raise UserError(
            f"the network {text} gives {list(logits.shape)} for 2 images, where the {classes} classes of "
            f"{context.config.data} need {expected}: {way}."
        )
    if not bool(torch.isfinite(logits).all()):
        raise UserError(f"the network {text} gives values that are not finite for random images.")


def _check_method(network: nn.Module, config: RunConfig, task: str, text: str) -> None:
    """Raises UserError where the method needs more of a network than this one has."""
    kind = registry.get(config.method)
    needs = kind(kind.Options.parse(config.options, method=config.method)).needs
    has = level(network)
    if LEVELS.index(needs) <= LEVELS.index(has):
        return
    fitting = sorted(
        name
        for name, other in registry.METHODS.items()
        if other.learns(task) and LEVELS.index(other().needs) <= LEVELS.index(has)
    )
    lacks = {
        "features": "a linear layer with a bias as its last step",
        "stages": "modules that run one after another and end in a linear layer (its attribute stages names them)",
    }
    raise UserError(
        f"{config.method} needs {lacks[needs]}, which the network {text} has not: methods that can use it are "
        f"{', '.join(fitting)}."
    )
