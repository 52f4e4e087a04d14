"""Checks before a run is resumed from its last checkpoint, and warnings about what has changed since."""

import json
import shlex
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedkern.engine.context import RunContext
from fedkern.engine.store import predictions, record_files
from fedkern.engine.store.checkpoints import Checkpoints, Entry, read_newest
from fedkern.engine.store.run_folder import NODES, find_damaged
from fedkern.engine.transport import torchrun_group
from fedkern.errors import UserError
from fedkern.messages.states import State
from fedkern.methods.base import Round
from fedkern.ops._core import backend
from fedkern.ops._core.loading import Unavailable
from fedkern.process import versions
from fedkern.settings.config import NAME as SETTINGS
from fedkern.settings.config import RunConfig, load_settings, make_portable, read_code
from fedkern.settings.provenance import hash_code
from fedkern.usercode import named_code, plugins
from fedkern.usercode.code_identity import digest, find_changes, fold_table, is_unchanged

MOVABLE = ("data_options.boxes", "data_options.detector_cache")
"""Paths that may be changed by hand in config.toml: the data are compared instead."""


def resumed_settings(
    config: RunConfig, out: Path, trusted: Collection[str], rounds: int | None = None
) -> tuple[RunConfig, RunConfig, Entry | None]:
    """Return a resumed run's future settings, its stored settings, and its newest checkpoint or None."""
    stored = load_settings(out, trusted=trusted, device=config.device)  # the stored device may not exist here
    if rounds is not None:
        config, stored = config.replace(rounds=rounds), stored.replace(rounds=rounds)
    config = config.replace(
        client_threads=config.client_threads or stored.client_threads, plugins=plugins.identify_loaded(stored.plugins)
    )
    config = config.replace(**{name: getattr(stored, name) for name in config.unset})
    check_settings(config if config.augment else config.replace(augment=stored.augment), stored, out)
    if (entry := Checkpoints(out).peek()) is not None:
        entry = change_rounds(entry, rounds)
        check_unedited(stored, entry, out)
    elif not (config.asked or config.common):  # a run folder does not keep which settings were given
        config = config.replace(asked=config.not_default())
    return config, stored, entry


def change_rounds(entry: Entry, rounds: int | None) -> Entry:
    if rounds is None:
        return entry
    info = {**entry["info"], "config": {**entry["info"]["config"], "rounds": rounds}, "finished": False}
    info.pop("results", None)
    parts = dict(info["parts"])
    ended = parts["diagnoses"]["final"]  # about a network that is no longer the final one
    parts["diagnoses"] = {**parts["diagnoses"], "final": []}
    warned = parts.get("warnings", {})
    info["parts"] = {**parts, "warnings": {name: text for name, text in warned.items() if name not in ended}}
    return {**entry, "info": info}


def check_settings(config: RunConfig, stored: RunConfig, out: Path) -> None:
    if changed := config.differences(stored):
        raise UserError(f"{out} was made with other settings ({'; '.join(changed)}): resume it with its own.")


def finished_summary(entry: Entry | None, out: Path, predicted: bool) -> State | None:
    """Return the summary of a finished, undamaged run, or None if the run has to continue."""
    if entry is None or not entry["info"]["finished"]:
        return None
    record_files.Metrics(out).check_entry(entry)
    if find_damaged(out, entry) or (predicted and not (out / predictions.FILE).exists()):
        return None
    return record_files.read_summary(out)


def check_place(
    stored: RunConfig, entry: Entry | None, device: str, out: Path, trusted: Collection[str], *, remote: bool
) -> None:
    """Raise UserError if client states are in another place, kernels differ, or the folder names untrusted code."""
    is_remote = (out / NODES).exists()
    if entry is not None and is_remote and not remote:
        raise UserError(
            f"The states of the clients of {out} are on nodes of Flower: go on with flwr run and the run-config "
            f"'out=\"{out}\" resume=true'."
        )
    if entry is not None and remote and not is_remote:
        raise UserError(f"The run in {out} was not begun over Flower: go on with --resume {shlex.quote(str(out))}.")
    if entry is not None:
        check_kernels(entry["info"], device, out)
    stored.refuse_untrusted_code(out, trusted)


def check_unedited(stored: RunConfig, entry: Entry, out: Path) -> None:
    """Compare the settings in config.toml with those at the run's start.

    Raises:
        UserError: settings differ, other than paths of data, the device and the number of workers.
    """
    begun = {name: value for name, value in entry["info"]["config"].items() if value is not None}
    try:
        before = RunConfig.of({**begun, "device": stored.device})
    except (UserError, TypeError) as error:
        raise UserError(
            f"The run in {out} was made with settings that this version of fedkern does not have ({error}): go on with "
            "the version that it was made with."
        ) from None
    changed = [text for text in make_portable(stored, out).differences(before) if text.partition(":")[0] not in MOVABLE]
    if changed:
        raise UserError(
            f"{out / SETTINGS} was changed after the run began ({'; '.join(changed)}): put back what stood there, "
            "or start a new run with the other settings."
        )


def with_identity(config: RunConfig, entry: Entry | None) -> RunConfig:
    """Return config.toml's settings with the checkpoint's identities of data and files, which private records hide."""
    return config if entry is None else config.replace(identity=entry["info"]["config"].get("identity", {}))


def load_unedited(out: Path | str, *, trusted: Collection[str] = (), **replaced: Any) -> RunConfig:
    config = load_settings(out, trusted=trusted, **replaced)
    if (entry := read_newest(Path(out))) is not None:
        check_unedited(config, entry, Path(out))
    return config


def facts_of(context: RunContext, fingerprint: int, out: Path) -> State:
    """Return the run's fingerprints for checkpoints: settings, data, code, names, versions and kernels."""
    config, data = context.config, context.data
    names = {"clients": data.client_names or (), "classes": data.classes}
    launched = torchrun_group.find_rank()
    return {
        "config": make_portable(config, out).to_dict(),
        "data": fingerprint,
        "code": {group: fold_table(table) for group, table in context.code.items()},
        "names": {kind: zlib.crc32(json.dumps(list(words)).encode()) for kind, words in names.items()},
        "versions": versions.versions(),
        "kernels": versions.kernels(),
        **({} if launched is None else {"torchrun": launched.job}),  # so that a restart recognises the run
    }


def check_user_code(
    config: RunConfig,
    stored: RunConfig,
    entry: Entry | None,
    code: Mapping[str, Mapping[str, str]],
    out: Path,
    trusted: Collection[str],
) -> tuple[RunConfig, list[str]]:
    """Compare the user's method, network, training, loss and metrics with those at the run's start.

    Returns the settings with the stored identities, and a warning for each changed object that is trusted. Raises
    UserError for other changes, because the run could not have the bits of an uninterrupted one.

    Args:
        code: identities of a script's code at its first use in this process, by group.
        trusted: code that may have changed: the name of a network, or of a script's argument.
    """
    began, current = stored.training or "none", config.training or "none"
    loss = "batch_loss" if "batch_loss" in code.get("loss_fn", {}) else "loss_fn"
    functions = "train" if "train function" in began + current else "optimizer"
    stored_code = {} if entry is None else read_code(entry["info"])
    identity = with_identity(stored, entry).identity
    groups = {
        "method": (stored.method_sha256, f"the class {config.kind.__name__}", "method"),
        "network": (identity.get("network"), f"the network {config.model.removeprefix(named_code.INSTANCE)}", "model"),
        "training": (stored.training_sha256, "the training of clients", functions),
        "loss_fn": (identity.get("loss_fn"), "the loss, a metric or the collation", loss),
    }
    changed = []
    for group, (sha256, subject, name) in groups.items():
        table = code.get(group, {})
        if (sha256 or group in stored_code or entry is not None) and not is_unchanged(sha256 or "", digest(table)):
            words = find_changes(stored_code[group], fold_table(table)) if group in stored_code else []
            words = ([f"{began} then, {current} now"] if group == "training" and began != current else []) + words
            changed.append((subject, name, words))
    if named_code.parse(config.model) is not None and stored.model_sha256 not in (None, config.model_sha256):
        files = (named_code.parse_identity(str(sha256)) for sha256 in (stored.model_sha256, config.model_sha256))
        changed.append((f"the network {config.model}", config.model, find_changes(*files)))
    current_choice = hash_code({"choose": config.choose}).get("choose", "")
    if (before := identity.get("choose", current_choice)) != current_choice:
        words = find_changes(named_code.parse_identity(before), named_code.parse_identity(current_choice))
        changed.append((f"the choice of clients {config.choose}", config.choose, words))
    warnings = []
    for subject, name, words in changed:
        if not named_code.trusts(trusted, name):
            raise named_code.refuse_changed(subject, out, words, f'trusted=["{name}"] to fedkern.load')
        warnings.append(named_code.warn_of_change(subject))
    kept = {name: getattr(stored, name) for name in ("model_sha256", "training", "training_sha256")}
    return config.replace(**kept), warnings


def check_data_and_plan(entry: Entry, facts: State, plan: Sequence[Round], out: Path) -> None:
    info = entry["info"]
    if info["data"] != facts["data"] or any(info["config"][key] != facts["config"][key] for key in ("main", "better")):
        raise UserError(f"The data are not those that {out} was started with: restore them, or start anew.")
    for kind, total in facts["names"].items():
        if info["names"][kind] != total:
            raise UserError(
                f"The {kind} of the data have other names than when the run in {out} began: put the names back, or "
                "start a new run with another --out."
            )
    if sum(not planned.one_off for planned in plan[: entry["plan"]]) != entry["round"]:
        raise UserError(
            f"The run in {out} was begun by a version of fedkern in which {facts['config']['method']} had other "
            "rounds: go on with that version, or start the run again."
        )


FORCED = {"backend": "FEDKERN_BACKEND", "isa": "FEDKERN_CPU_ISA"}
"""Selectable properties of the kernels, with the environment variable of each."""


def check_kernels(info: State, device: str, out: Path) -> None:
    """Compare the kernels with those of the run, on which its bits depend.

    On another device than before nothing is compared, as the bits differ anyway.

    Raises:
        UserError: the kernels differ, and this machine could have the same. The message says how.
    """
    current = versions.kernels()
    if device != info["config"]["device"]:
        return
    changed, ways = [], []
    for name, variable in FORCED.items():
        before = info["kernels"][name]
        choosable = _choosable(name) if before != current[name] else {}
        if (value := choosable.get(before)) is not None:
            changed.append(f"{name}: {before} -> {current[name]}")
            ways.append(f"set {variable}={value}" if value else f"unset {variable}")
    if changed:
        raise UserError(
            f"{out} was made with other kernels ({'; '.join(changed)}): {' and '.join(ways)}, then resume it."
        )


def _choosable(name: str) -> dict[str, str]:
    """Return possible values of a name in `FORCED`, each with its variable's value ("" to unset)."""
    if name == "backend":
        return {"auto": "", **{row.backend: row.backend for row in backend.status() if row.serves}}
    try:
        return {level: level for level in backend.cpu_core().available_isas()}
    except Unavailable:
        return {}


def warn_changes(info: State, config: RunConfig) -> dict[str, str]:
    """Return warnings, by name, about changes that make the bits of a resumed run differ."""
    warnings = {}
    theirs, device = info["versions"]["torch"], info["config"]["device"]
    if theirs != torch.__version__:
        warnings["other-versions"] = (
            f"The run was started with PyTorch {theirs} and continued with {torch.__version__}: its bits differ from "
            "an uninterrupted one."
        )
    if device != config.device:
        warnings["other-device"] = (
            f"The run was started on {device} and continued on {config.device}: its bits differ from an uninterrupted "
            "one."
        )
    before = info["config"].get("plugins") or {}
    # A file may move.
    if replaced := [name for name, identity in config.plugins.items() if identity not in before.values()]:
        warnings["other-plugin"] = named_code.warn_of_change(", ".join(replaced))
    current = versions.kernels()
    stored = info["kernels"]
    if differ := [
        f"{name} {value} and now {current[name]}" for name, value in stored.items() if current.get(name, value) != value
    ]:
        warnings["other-kernels"] = (
            f"The run was started with other kernels ({'; '.join(differ)}), which this machine does not have: its bits "
            "differ from an uninterrupted one."
        )
    return warnings


def warn_damage(checkpoints: Checkpoints, entry: Entry, out: Path) -> dict[str, str]:
    warnings = {}
    if checkpoints.skipped:
        warnings["damaged-checkpoint"] = (
            f"The newest checkpoint in {checkpoints.folder} is missing or damaged ({'; '.join(checkpoints.skipped)}): "
            f"the run goes on from the one of round {entry['round']}."
        )
    damaged = find_damaged(out, entry) if entry["info"]["finished"] else []
    if names := [name for name in damaged if (out / name).exists()]:
        warnings["damaged-results"] = f"{', '.join(names)} in {out} was not what the run wrote, and was made again."
    return warnings
