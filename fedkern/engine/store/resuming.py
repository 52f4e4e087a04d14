"""Whether a run may go on from its last checkpoint, and what is no longer as it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedkern.engine import config as settings
from fedkern.engine.config import RunConfig
from fedkern.engine.store import records
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.saved_model import damaged
from fedkern.errors import UserError
from fedkern.ops import backend, fuse_choice
from fedkern.ops.loading import Unavailable

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
        before = RunConfig(**settings.with_threads({**begun, "device": stored.device}))
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


FORCED = {"backend": "FEDKERN_BACKEND", "isa": "FEDKERN_CPU_ISA", "lowerings": fuse_choice.VARIABLE}
"""What of the kernels can be chosen, and by which environment variable."""


def check_kernels(info: Mapping[str, Any], device: str, out: Path) -> None:
    """Compares the kernels with those that the run was made with, which its bits depend on.

    Args:
        info: of the newest checkpoint; the first versions did not store the kernels.
        device: where the run would go on; on another device its bits differ anyway.
        out: the run folder.

    Raises:
        UserError: they differ, and can be the same on this machine; the sentence says how.
    """
    now = records.kernels()
    stored = info.get("kernels", now)
    if device != info["config"]["device"]:
        return
    changed, ways = [], []
    for name, variable in FORCED.items():
        before = stored.get(name, now[name])  # the first versions had one table of lowerings, and did not store it
        choosable = _choosable(name) if before != now[name] else {}
        if before in choosable:
            value = choosable[before]
            changed.append(f"{name}: {before} -> {now[name]}")
            ways.append(f"set {variable}={value}" if value else f"unset {variable}")
    if changed:
        raise UserError(
            f"{out} was made with other kernels ({'; '.join(changed)}): {' and '.join(ways)}, then resume it."
        )


def _choosable(name: str) -> dict[str, str]:
    """What this machine could have of `FORCED`, and the variable's value for that; "" where it must be unset."""
    if name == "lowerings":
        return {fuse_choice.serving(value).digest: value for value in ("shipped", "")}
    if name == "backend":
        return {"auto": "", **{row.backend: row.backend for row in backend.status() if row.serves}}
    try:
        return {level: level for level in backend.cpu_core().available_isas()}
    except Unavailable:
        return {}


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
    now = records.kernels()
    stored = info.get("kernels", now)
    differ = [f"{name} {value} and now {now[name]}" for name, value in stored.items() if now.get(name, value) != value]
    if differ:
        found["other-kernels"] = (
            f"The run was started with other kernels ({'; '.join(differ)}), which this machine does not have: its bits "
            "differ from an uninterrupted one."
        )
    return found


def repairs(checkpoints: Checkpoints, entry: Mapping[str, Any], out: Path) -> dict[str, str]:
    """Warnings, by name, of damage in a run folder that the run goes on in spite of.

    Args:
        checkpoints: opened.
        entry: the checkpoint that the run goes on from.
        out: the run folder.
    """
    found = {}
    if checkpoints.skipped:
        found["damaged-checkpoint"] = (
            f"The newest checkpoint in {checkpoints.folder} is missing or damaged ({'; '.join(checkpoints.skipped)}): "
            f"the run goes on from the one of round {entry['round']}."
        )
    if entry["info"]["finished"]:
        other = [name for name in damaged(out, entry) if (out / name).exists()]
        if other:
            found["damaged-results"] = f"{', '.join(other)} in {out} was not what the run wrote, and was made again."
    return found
