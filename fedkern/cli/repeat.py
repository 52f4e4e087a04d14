"""The command that repeats a run with another method."""

from __future__ import annotations

import dataclasses

from fedkern.cli.flags import DATA_FLAGS, flag, quote
from fedkern.cli.front_page import PROGRAM
from fedkern.cli.request import one_shot
from fedkern.settings.config import RunConfig
from fedkern.settings.found import FOUND
from fedkern.typed_option import as_typed


def command_line(method: str, config: RunConfig) -> str:
    """The shortest command that runs ``method`` with the settings of ``config``: data, split, budget, optimiser, seed.

    Method options that the user changed are repeated if ``method`` has them too, and so are all plugins.
    """
    preset = {"preset": config.options["preset"]} if "preset" in config.options else {}  # sets other options too
    own = RunConfig.make(config.method, data=config.data, options=preset)
    target = RunConfig.make(method, data=config.data)
    width = RunConfig.make(method, data=config.data, model=config.model).width  # default width of the model
    words = [PROGRAM, method]
    for f in dataclasses.fields(RunConfig):
        value = getattr(config, f.name)
        if f.name in ("method", "options", "data_options", "plugins", "left_open", *FOUND) or value is None:
            continue
        if f.name == "records" and value == config.replace(records=None).resolved()["records"]:
            continue  # follows from the method's options
        if (
            f.name == "client_threads"
            and value == config.replace(client_threads=0).with_client_threads().client_threads
        ):
            continue  # follows from the threads and the clients
        if f.name == "rounds" and (one_shot(method) or one_shot(config.method)):
            continue  # a one-shot method plans its own rounds
        if value != (width if f.name == "width" else getattr(target, f.name)):
            words += [flag(f.name), quote(value)]
    if config.data != RunConfig.make(method).data:
        words[2:2] = ["--data", quote(config.data)]
    for name, value in config.data_options.items():
        words += [flag(name), quote(value)] if name in DATA_FLAGS else ["--data-option", quote(f"{name}={value}")]
    for name, value in config.options.items():
        if (name in preset or value != own.options[name]) and value != target.options.get(name, value):
            words += ["--method-option", quote(f"{name}={as_typed(value)}")]
    for name in config.plugins:
        words += ["--plugin", quote(name)]
    return " ".join(words)
