"""A parsed command line, and the settings of the run that it asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedkern.errors import UserError, suggest_name
from fedkern.files.filesystem import expand, read_text
from fedkern.methods import METHODS
from fedkern.methods.method_registry import given_options
from fedkern.settings.config import RunConfig, load_settings, read_settings
from fedkern.settings.model import check_networks
from fedkern.settings.section import FINGERPRINTS
from fedkern.usercode import plugins as plugin_scope


@dataclass(frozen=True)
class Request:
    """A parsed command line, with the flags of a run in `fedkern.cli.parser.RUN_FLAGS`.

    Attributes:
        command: ``"run"``, ``"resume"``, ``"help"`` or a name in `fedkern.cli.front_page.COMMANDS`.
        settings: ``RunConfig`` fields from flags, converted.
        options: ``key=value`` method options.
        folder: the run folder of a command about a finished run.
        arguments: values of a command's own flags.
        plugins: names of plugins, already loaded.
    """

    command: str
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    data_options: Mapping[str, Any] = field(default_factory=dict)
    config: Path | None = None
    out: Path | None = None
    resume: Path | None = None
    flower: Path | None = None
    own_data: bool = False
    folder: Path | None = None
    tensorboard: bool = False
    wandb: str | None = None
    mlflow: str | None = None
    profile: bool = False
    predictions: bool = False
    report: bool = False
    quiet: bool = False
    json: bool = False
    help: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("config", "out", "resume", "flower", "folder"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, expand(path))


def one_shot(method: str | None) -> bool:
    """Return whether a method plans its own rounds and takes no ``--rounds``."""
    return method is not None and method in METHODS and METHODS[method].one_shot


@dataclass(frozen=True)
class Given:
    """Choices for a new run from the ``--config`` file and the flags, without defaults.

    ``plugins`` have their identities. ``names`` are the settings that the user chose, as a file that a run wrote has
    all settings.
    """

    method: str
    settings: Mapping[str, Any]
    options: Mapping[str, Any]
    data_options: Mapping[str, Any]
    plugins: Mapping[str, str]
    names: frozenset[str]

    def config(self) -> RunConfig:
        plugin_scope.load_installed()
        loaded = plugin_scope.load_given(self.plugins)
        return RunConfig.complete(self.method, self.settings, self.options, self.data_options, loaded)


def effective_config(request: Request) -> RunConfig:
    choices = read_given(request)
    config = choices.config()
    check_networks(request.settings, config.data)  # flags alone: a file lists unused settings too
    if request.command == "run":  # the runs of a comparison differ in which settings they use
        config = config.for_user(request.settings).replace(asked=choices.names)
    return config


def read_given(request: Request) -> Given:
    """Read the choices for a new run: the ``--config`` file, then the flags."""
    table: dict[str, Any] = {}
    names: set[str] = set()
    if request.config is not None:
        try:
            text = read_text(request.config, "utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UserError(f"The config file {request.config} cannot be read: {reason}.") from None
        table = read_settings(text, source=str(request.config))
        names = set() if table.keys() & set(FINGERPRINTS) else {*table}
        table = {name: value for name, value in table.items() if name not in FINGERPRINTS}
    method = request.method or table.get("method")
    if method is None:
        raise UserError(f"Which method? Name it as METHOD or as method in {request.config}.")
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(f'Unknown method "{method}" in {request.config}.{suggest_name(str(method), METHODS)}')
    from_file = dict(table.pop("options", {}))
    if one_shot(method):
        table.pop("rounds", None)  # the file may come from any run
    if table.pop("method", method) != method:
        from_file = {}  # the file is of another method: its settings apply, its method options do not
    options = {**given_options(method, from_file), **given_options(method, request.options)}
    data_options = {**table.pop("data_options", {}), **request.data_options}
    plugins = {**table.pop("plugins", {}), **dict.fromkeys(request.plugins, "")}
    settings = {**RunConfig.read(table), **request.settings}
    return Given(method, settings, options, data_options, plugins, frozenset(names | request.settings.keys()))


def find_trusted_code(folder: Path, options: Sequence[str], settings: Mapping[str, object]) -> tuple[str, ...]:
    """Return the code that a stored run may import: of options, --model and --choose that the command line repeats."""
    repeated = {name: str(settings[name]) for name in ("model", "choose") if name in settings}
    if not options and not repeated:
        return ()
    stored = load_settings(folder, device="cpu")
    values = given_options(stored.method, options)
    named = stored.replace(options={**stored.options, **values}, **repeated)
    if changed := named.differences(stored):
        raise UserError(f"The run in {folder} has other settings ({'; '.join(changed)}): leave these flags out.")
    return (*repeated.values(), *(part for _, part in METHODS[stored.method].Options.of(values).code()))
