"""Commands that repeat a run, also with another method."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from fedkern.cli.flags import DATA_FLAGS
from fedkern.cli.front_page import PROGRAM
from fedkern.cli.parser import as_word
from fedkern.cli.request import one_shot
from fedkern.engine.marks import PLACES, TRAINED
from fedkern.settings.config import NAME as SETTINGS
from fedkern.settings.config import RunConfig, load_settings
from fedkern.settings.data import DataSettings
from fedkern.settings.federation import FederationSettings
from fedkern.settings.model import ModelSettings
from fedkern.settings.section import FINGERPRINTS
from fedkern.settings.training import TrainingSettings
from fedkern.typed_option import as_typed, flag

if TYPE_CHECKING:
    from fedkern.comparison.run_results import Result


def _section(field: dataclasses.Field[object]) -> int:
    order = (DataSettings, FederationSettings, TrainingSettings, ModelSettings)
    return next((i for i, section in enumerate(order) if field.name in section.__annotations__), len(order))


def command_line(method: str, config: RunConfig) -> str:
    """Return the shortest command that runs ``method`` with the settings of ``config``.

    The command repeats all plugins, and changed method options that ``method`` has too.
    """
    base = RunConfig.make(config.method, data=config.data)
    target = RunConfig.make(method, data=config.data)
    width = RunConfig.make(method, data=config.data, model=config.model).width  # default width of the model
    words = [PROGRAM, method]
    # Clients with --teachers do not train.
    idle = {name for mark in TRAINED for name in PLACES[mark].settings} if config.teachers else set()
    skipped = {"method", "options", "data_options", "plugins", *FINGERPRINTS, *idle}
    # Values that follow from the method's options, and from the threads and the clients.
    derived = {
        "records": config.replace(records=None).resolve()["records"],
        "client_threads": config.replace(client_threads=0).with_client_threads().client_threads,
    }
    for f in sorted(dataclasses.fields(RunConfig), key=_section):
        value = getattr(config, f.name)
        if f.name not in config.names() - skipped or value in (None, derived.get(f.name)):
            continue
        if f.name == "rounds" and (one_shot(method) or one_shot(config.method)):
            continue  # a one-shot method plans its own rounds
        if value != (width if f.name == "width" else getattr(target, f.name)):
            words += [flag(f.name), as_word(value)]
    if config.data != RunConfig.make(method).data:
        words[2:2] = ["--data", as_word(config.data)]
    for name, value in config.data_options.items():
        words += [flag(name), as_word(value)] if name in DATA_FLAGS else ["--data-option", as_word(f"{name}={value}")]
    for name, value in config.options.items():
        if value != base.options[name] and value != target.options.get(name, value):
            words += ["--method-option", as_word(f"{name}={as_typed(value)}")]
    for name in config.plugins:
        words += ["--plugin", as_word(name)]
    return " ".join(words)


def repeat_command(folder: Path) -> str:
    """Return the command that repeats a run, "" if data or network came from a Python program."""
    from fedkern.report.pages.run_page import in_memory, stored_device

    config = load_settings(folder, device="cpu")
    if in_memory(config):
        return ""
    device = stored_device(folder)
    return command_line(config.method, config) + ("" if device == "cpu" else f" --device {as_word(device)}")


def first_commands(result: Result) -> dict[str, str]:
    firsts = {group.label: next(iter(group.runs.values())).folder for group in result.groups}
    own_firsts = {label: run for label, run in firsts.items() if (run / SETTINGS).exists()}
    return {label: text for label, run in own_firsts.items() if (text := repeat_command(run))}
