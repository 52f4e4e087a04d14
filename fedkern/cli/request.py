"""A parsed command line, and the settings of the run that it asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedkern.data import COMMON_OPTIONS
from fedkern.engine import RunConfig
from fedkern.engine.config import FOUND, check_networks
from fedkern.errors import UserError, nearest
from fedkern.files import expand
from fedkern.inputs import read_text
from fedkern.methods import METHODS

PATHS = {
    **{knob.field: knob.path for knob in RunConfig.knobs() if knob.path is not None},
    **{name: option.path for name, option in COMMON_OPTIONS.items() if option.path is not None},
}
"""Functions that make a path absolute, by the name of the setting or data option that holds the path."""


@dataclass(frozen=True)
class Request:
    """A parsed command line.

    Attributes:
        command: ``"run"``, ``"resume"``, ``"attack"``, ``"list"``, ``"tune"``, ``"doctor"``, ``"help"`` or the name of
            a downstream task.
        method: the method, if given.
        settings: ``RunConfig`` fields that were given as flags, converted.
        options: ``key=value`` method options.
        data_options: options of the data set.
        config: the ``--config`` file.
        out: the run folder, if given; for ``tune``, the file to write.
        resume: the run folder to continue.
        folder: the run folder of a command about a finished run.
        tensorboard: whether event files are written beside metrics.jsonl.
        profile: whether a trace of one round is written.
        predictions: whether the final network's answers to the test images are written.
        measure: whether ``doctor`` measures the processor's peak.
        arguments: arguments of a downstream task or of ``tune``.
        plugins: names of plugins, which are loaded already.
    """

    command: str
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    data_options: Mapping[str, Any] = field(default_factory=dict)
    config: Path | None = None
    out: Path | None = None
    resume: Path | None = None
    folder: Path | None = None
    tensorboard: bool = False
    profile: bool = False
    predictions: bool = False
    measure: bool = False
    quiet: bool = False
    json: bool = False
    help: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("config", "out", "resume", "folder"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, expand(path))


def one_shot(method: str | None) -> bool:
    """Whether a method plans its own rounds and takes no ``--rounds``."""
    return method in METHODS and METHODS[method].one_shot


def effective(request: Request) -> RunConfig:
    """Makes the settings of a new run: defaults, then the ``--config`` file, then the flags.

    Raises:
        UserError: the file is missing or not TOML, or a setting is unknown or out of range.
    """
    table: dict[str, Any] = {}
    if request.config is not None:
        try:
            text = read_text(request.config, "utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UserError(f"The config file {request.config} cannot be read: {reason}.") from None
        table = RunConfig.table(text, source=str(request.config))
        table = {name: value for name, value in table.items() if name not in FOUND}
    method = request.method or table.get("method")
    if method is None:
        raise UserError(f"Which method? Name it as METHOD or as method in {request.config}.")
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(f'Unknown method "{method}" in {request.config}.{nearest(str(method), METHODS)}')
    from_file = dict(table.pop("options", {}))
    if one_shot(method):
        table.pop("rounds", None)  # the file may come from any run
    if table.pop("method", method) != method:
        from_file = {}  # the file is of another method: its settings apply, its method options do not
    options = {**named_options(method, from_file), **named_options(method, request.options)}
    data_options = {**table.pop("data_options", {}), **request.data_options}
    plugins = {**table.pop("plugins", {}), **dict.fromkeys(request.plugins, "")}
    settings = {**table, **request.settings}
    config = RunConfig.make(
        method, options=options, data_options=absolute(data_options), plugins=plugins, **absolute(settings)
    )
    check_networks(request.settings, config.data)  # flags alone: a file lists unused settings too
    return config


def absolute(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with absolute paths, so that a run can be resumed and compared from any folder.

    Raises:
        UserError: a path begins with the home folder of an unknown user.
    """
    return {
        name: PATHS[name](value) if name in PATHS and isinstance(value, str) and value else value
        for name, value in settings.items()
    }


def named_options(method: str, given: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The given method options (without defaults) by published name, checked and with absolute paths.

    Raises:
        UserError: an unknown option, a value out of range, or a path in the home folder of an unknown user.
    """
    kind = METHODS[method].Options
    parsed = kind.parse(given, method=method)
    words = given if isinstance(given, Mapping) else [word.partition("=")[0] for word in given]
    plain = {str(word).strip().replace("-", "_") for word in words}
    named = [knob for knob in kind.knobs() if {knob.name, knob.field} & plain]
    values = {knob.name: getattr(parsed, knob.field) for knob in named}
    paths = {knob.name: knob.path for knob in named if knob.path is not None and values[knob.name]}
    return {**values, **{name: make(str(values[name])) for name, make in paths.items()}}


def trusted(folder: Path, options: Sequence[str], settings: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The code that a stored run may import: the code named by options and by --model that the command line repeats.

    Raises:
        UserError: the folder holds no run, or a run with other values of these options.
    """
    model = (settings or {}).get("model")
    if not options and model is None:
        return ()
    stored = RunConfig.load(folder, device="cpu")
    given = named_options(stored.method, options)
    named = stored.replace(options={**stored.options, **given}, model=stored.model if model is None else model)
    if changed := named.differences(stored):
        raise UserError(f"The run in {folder} has other settings ({'; '.join(changed)}): leave these flags out.")
    own = () if model is None else (named.model,)
    return (*own, *(part for _, part in METHODS[stored.method].Options.code(given)))
