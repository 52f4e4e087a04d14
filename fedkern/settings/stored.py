"""Settings from TOML text and from run folders."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedkern.errors import UserError, suggest_name
from fedkern.files.filesystem import describe_special_file, read_text
from fedkern.foreign_runs.recorded_run import RECORD
from fedkern.methods import script_methods
from fedkern.methods.base import Method
from fedkern.settings.config import UNSTORED, RunConfig
from fedkern.settings.run_format import INIT, NAME, check_format, stored_code
from fedkern.settings.section import Values
from fedkern.usercode import plugins


def read_settings(text: str, *, source: str = NAME) -> Values:
    """Return the settings in TOML text, for ``make(**table)`` of a partial config file."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for an integer of thousands of digits
        raise UserError(f"{source} is not a valid TOML file: {error}.") from None
    names = RunConfig.names()
    plain: Values = {}
    for written, value in table.items():
        name = written.replace("-", "_")
        if name not in names:
            raise UserError(f'{source} has an unknown setting "{name}".{suggest_name(name, names)}')
        if name in plain:
            raise UserError(f'{source} has {name} twice, with "_" and with "-": leave one out.')
        plain[name] = value
    for name in ("options", "data_options", "identity"):
        if not isinstance(plain.get(name, {}), Mapping):
            raise UserError(f"{source}: [{name}] must be a table of key = value lines.")
    if "plugins" in plain:
        plain["plugins"] = _plugin_table(plain["plugins"], source)
    return plain


def stored_settings(folder: str | os.PathLike[str]) -> Values:
    path = Path(folder) / NAME
    try:
        text = read_text(path, "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    return read_settings(text, source=str(path))


def load_settings(
    folder: str | os.PathLike[str], *, trusted: Collection[str] = (), given: type[Method] | None = None, **replaced: Any
) -> RunConfig:
    """Load a run's plugins, and return the settings of its folder, some of them ``replaced``.

    ``trusted`` plugins may be executed in any case, and ``"method"`` there trusts a changed class.  ``given`` is the
    class of the run's method if a script gave it.
    """
    check_run_folder(folder)
    check_format(Path(folder))
    table = stored_settings(folder)
    plugins.load_installed()
    plugins.restore(table.get("plugins", {}), folder, trusted)
    table = {name: value for name, value in table.items() if name not in UNSTORED}
    if table.get("init") == INIT:
        table["init"] = str(Path(folder).absolute() / INIT)
    method, sha256 = str(table.get("method", RunConfig.method)), table.get("method_sha256")
    if given is not None:
        script_methods.give_class_again(given, method, folder)
    script_methods.check_class(method, sha256, stored_code(Path(folder)).get("method", {}), folder, trusted)
    return RunConfig.of({**table, **replaced})


def make_portable(config: RunConfig, folder: str | os.PathLike[str]) -> RunConfig:
    """Replace the path of a run folder's own file of weights by its name, for storage."""
    return config.replace(init=INIT) if config.init == str(Path(folder).absolute() / INIT) else config


def load_plugins(folder: str | os.PathLike[str], trusted: Collection[str] = ()) -> None:
    """Load the plugins of a run folder, none if its ``config.toml`` is missing or damaged."""
    try:
        table = stored_settings(folder)
    except UserError:
        return
    plugins.load_installed()
    plugins.restore(table.get("plugins", {}), folder, trusted)


def _plugin_table(value: object, source: str) -> dict[str, str]:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return dict.fromkeys(value, "")
    if not isinstance(value, Mapping) or not all(isinstance(identity, str) for identity in value.values()):
        raise UserError(f'{source}: plugins must be a list of names, or a table of lines "NAME" = "IDENTITY".')
    return dict(value)


def check_regular(folder: str | os.PathLike[str]) -> None:
    """Raise UserError for a run folder with a named pipe, a socket or a device, which might block for ever."""
    for path in (*Path(folder).glob("*"), *Path(folder).glob("checkpoints/*")):
        if kind := describe_special_file(path):
            raise UserError(f"{path} is {kind}, not a regular file: remove it, or put back the run's own file.")


def check_run_folder(folder: str | os.PathLike[str]) -> None:
    check_regular(folder)
    if not Path(folder).exists():
        raise UserError(f"The run folder {folder} does not exist: name one that a run was written to with --out.")
    if (Path(folder) / RECORD).exists():
        raise UserError(f"{folder} has a run that fedkern.record wrote, which only compare and reproduce read.")
    if not (Path(folder) / NAME).exists():
        raise UserError(f"{folder} is not a run folder: it has no {NAME}.")
