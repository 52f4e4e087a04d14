"""A user's network in a run: whether it fits data and method, and whether it is the one that the run began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fedkern.engine import initial_weights
from fedkern.engine.context import RunContext
from fedkern.errors import UserError
from fedkern.methods import registry
from fedkern.models import MODELS, Own
from fedkern.models.own import check_module, check_output, digest
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
    if isinstance(module, type):
        raise UserError(
            f"model must be an object, not the class {module.__name__}: make one, or name the code as a text, "
            f'"FILE.py:{module.__name__}".'
        )
    if not isinstance(module, nn.Module):
        raise UserError(f"model must be an nn.Module or the name of a network, not {module!r}.")
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
        stored: the settings of the run that is resumed, or None.

    Returns:
        The settings, and sentences on what has changed since the run began.

    Raises:
        UserError: the network does not fit, or another one was meant when the run began.
    """
    if config.init is not None:
        sha = initial_weights.sha256(config.init) if stored is None else stored.init_sha256
        config = config.replace(init_sha256=sha)
    entry = MODELS.get(config.model)
    if entry is None:
        raise UserError(unknown(config.model))
    own = isinstance(entry.make, Own)
    if not own and config.init is None:
        return config, []
    context = RunContext(config, data)
    network = context.build()
    if not own:
        return config, []
    make: Any = entry.make
    classes, shape = context.federation.classes, data.form.shape
    check_output(network, make.text, shape, data.task.output(classes, shape[1:]), classes, config.data)
    registry.check_network(config.method, config.options, network, data.task, make.text)
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
