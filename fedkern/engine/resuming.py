"""Whether a run may go on from its last checkpoint, and what is no longer as it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedkern.engine import config as settings
from fedkern.engine.config import RunConfig
from fedkern.errors import UserError

MOVABLE = ("data_options.boxes", "data_options.detector_cache")
"""Places of files that may be changed by hand: the data that they make are compared themselves."""


def check_unedited(stored: RunConfig, entry: Mapping[str, Any], out: Path) -> None:
    """Compares the settings in config.toml with those that the run was started with.

    Args:
        stored: the settings in config.toml.
        entry: the newest checkpoint.
        out: the run folder.

    Raises:
        UserError: they differ in more than places of data and the device; the sentence names what.
    """
    begun = {name: value for name, value in entry["info"]["config"].items() if value is not None}
    try:
        before = RunConfig(**{**begun, "device": stored.device})
    except (UserError, TypeError) as error:
        raise UserError(
            f"The run in {out} was made with settings that this version of fedkern does not have ({error}): go on with "
            "the version that it was made with."
        ) from None
    changed = [text for text in stored.differences(before) if text.partition(":")[0] not in MOVABLE]
    if changed:
        raise UserError(
            f"{out / settings.NAME} was changed after the run began ({'; '.join(changed)}): put back what stood there, "
            "or start a new run with the other settings."
        )


def changes(info: Mapping[str, Any], config: RunConfig) -> dict[str, str]:
    """Warnings, by name, of what makes the bits of a run that goes on differ from those of an uninterrupted one.

    Args:
        info: of the checkpoint that it goes on from.
        config: the settings it goes on with.
    """
    found = {}
    theirs, device = info["versions"]["torch"], info["config"]["device"]
    if theirs != torch.__version__:
        found["other-versions"] = (
            f"The run was started with PyTorch {theirs} and continued with {torch.__version__}: its bits differ from "
            "an uninterrupted one."
        )
    if device != config.device:
        found["other-device"] = (
            f"The run was started on {device} and continued on {config.device}: its bits differ from an uninterrupted "
            "one."
        )
    return found
