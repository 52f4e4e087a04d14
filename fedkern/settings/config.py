"""All effective settings of a run, composed of sections, in ``config.toml``, and the format of a run folder."""

from __future__ import annotations

import dataclasses
import os
import shlex
import tomllib
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fedkern.data.dataset_registry import given_options
from fedkern.errors import UserError, require_format, suggest_name
from fedkern.files import toml
from fedkern.files.filesystem import check_text, describe_special_file, read_json, read_text
from fedkern.foreign_runs.recorded_run import RECORD
from fedkern.messages.states import State
from fedkern.methods import method_registry, script_methods
from fedkern.methods.aggregators import MEAN
from fedkern.methods.base import Method
from fedkern.methods.options import Options
from fedkern.models import MODELS
from fedkern.settings.data import DATA_DEPENDENT
from fedkern.settings.defaults import default_data, defaults
from fedkern.settings.execution import ExecutionSettings
from fedkern.settings.model import check_networks
from fedkern.settings.privacy import PrivacySettings
from fedkern.settings.section import FINGERPRINTS, Fingerprints, Values
from fedkern.settings.training import TrainingSettings
from fedkern.typed_option import Option
from fedkern.usercode import named_code, plugins
from fedkern.usercode import plugins as plugin_scope

NAME = "config.toml"
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
INIT = "init.safetensors"
"""File with the weights of a module that a script gave as ``init``."""
FORMAT = 15


def read_manifest(path: Path) -> State:
    """Return a manifest of this format, with unchecked entries.

    Raises:
        OtherFormat: the manifest has another format.
        OSError, ValueError, KeyError, TypeError: the file is missing or damaged.
    """
    manifest: State = read_json(path)
    require_format(path, manifest["format"], FORMAT)
    return manifest


def check_format(out: Path) -> None:
    """Raise OtherFormat if a run folder has another format, and ignore a missing or damaged manifest."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        read_manifest(out / FOLDER / MANIFEST)


def stored_code(out: Path) -> dict[str, dict[str, str]]:
    """Return the identities, by group, of the code that a script gave a run."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return read_code(read_manifest(out / FOLDER / MANIFEST)["entries"][-1]["info"])
    return {}


def read_code(info: Any) -> dict[str, dict[str, str]]:
    with suppress(LookupError, TypeError, AttributeError):
        return {group: {path: str(text) for path, text in table.items()} for group, table in info["code"].items()}
    return {}


RESUMABLE = ("data_root", "workers", "cache", "keep_items")
"""Settings that change no bit of a run, so that a resumed run may have others."""
UNSTORED = ("cache",)
"""Settings not stored in a run folder, which may come from anyone and must not decide where files are written."""


@dataclass(frozen=True)
class RunConfig(Fingerprints, ExecutionSettings, TrainingSettings, PrivacySettings):
    """Settings of one run, made by :meth:`make`, :meth:`of` or :func:`~fedkern.settings.config.load_settings`."""

    plugins: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, values: Mapping[str, object], *, stored: bool = False) -> Values:
        """Convert values to the types of their settings, with absolute paths unless ``stored``."""
        options = {entry.field: entry for entry in cls.list_options()}
        take = Option.convert if stored else Option.read
        result = {name: take(options[name], value) if name in options else value for name, value in values.items()}
        for name, value in result.items():
            if name in options and value == "":
                raise UserError(f"{options[name].label} is given without a value: give it one, or leave it out.")
        return result

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Self:
        """Return settings with these values, and derive all that depend on others."""
        values = cls.read(values, stored=True)
        kind = method_registry.get(method := values.get("method", cls.method))
        return cls._make(values, kind.Options.parse(values.get("options", {}), method=method))

    @classmethod
    def _make(cls, values: Values, options: Options) -> Self:
        tables = {name: dict(values.get(name, {})) for name in ("data_options", "plugins")}
        config = cls(**{**values, **tables, "options": options.to_dict()})
        vars(config)["method_options"] = options
        config = config.replace(**config.resolve())
        config.check()
        return config

    @classmethod
    def make(
        cls,
        method: str,
        *,
        options: Mapping[str, object] | Iterable[str] = (),
        data_options: Mapping[str, object] | None = None,
        plugins: Iterable[str] | Mapping[str, str] = (),
        **settings: Any,
    ) -> Self:
        """Make the settings of a run: the given ones, and for the rest the method's defaults on the data set.

        Args:
            options: method options, a mapping or ``key=value`` words.
            data_options: options of the data set (for example ``protocol``, ``boxes``, ``detector``).
            plugins: files and modules to load first.  The run stores them, and loaded plugins that it uses.
            **settings: any other field; ``None`` means not given.
        """
        plugin_scope.load_installed()
        loaded = plugin_scope.load_given(plugins)
        method_registry.get(method)
        names = cls.names()
        for name in settings:
            if name not in names:
                raise UserError(f'Unknown setting "{name}".{suggest_name(name, names)}')
        values = cls.read({name: value for name, value in settings.items() if value is not None})
        return cls.complete(method, values, method_registry.given_options(method, options), data_options or {}, loaded)

    @classmethod
    def complete(
        cls,
        method: str,
        values: Mapping[str, object],
        options: Mapping[str, object],
        data_options: Mapping[str, object],
        plugins: Mapping[str, str],
    ) -> Self:
        """Add the method's defaults on the data set to converted settings."""
        kind = method_registry.get(method)
        if kind.one_shot and "rounds" in values:
            raise UserError(
                f"--rounds is not for {method}, a one-shot method whose plan has the rounds it needs: give a client's "
                "whole budget with --local-epochs."
            )
        if kind.one_shot and "local_steps" in values:
            raise UserError(
                f"--local-steps is not for {method}, a one-shot method: give its budget with --local-epochs."
            )
        presets = defaults(method, str(values.get("data", default_data(method))))
        base: Values = {**presets, **values}
        check_networks({name: value for name, value in base.items() if value != presets.get(name)}, str(base["data"]))
        if "width" not in values and base["model"] != presets["model"]:
            base.pop("width", None)  # the default width belongs to the default network
        if "local_epochs" in values and "local_steps" not in values:
            base.pop("local_steps", None)  # the default steps give way to the user's epochs
        if kind.one_shot:
            base["rounds"] = 1
        all_options = {**kind.Options.parse(base.pop("options", {}), method=method).to_dict(), **options}
        all_data_options = given_options(str(base["data"]), data_options)
        rule = str(base.get("aggregator", MEAN)).partition(":")[0].strip()
        used_plugins = plugin_scope.find_used(
            {"method": method, "data set": str(base["data"]), "model": str(base["model"]), "aggregator": rule}
        )
        config = {**base, "method": method, "data_options": all_data_options, "plugins": {**plugins, **used_plugins}}
        if method in method_registry.GIVEN:
            config["method_sha256"] = script_methods.fingerprint(kind)
        if config.get("width") is None and config["model"] in MODELS:
            config["width"] = MODELS[config["model"]].width
        return cls._make({**config, "unset": frozenset(DATA_DEPENDENT) - values.keys()}, kind.Options.of(all_options))

    @classmethod
    def names(cls) -> set[str]:
        """Return the names of the settings in a config file, `UNSTORED` ones included."""
        return {f.name for f in dataclasses.fields(cls)} - {"unset", "asked", "common"}

    def to_dict(self) -> Values:
        """Return plain values, without settings that are ``None`` or in `UNSTORED`."""
        names = self.names() - set(UNSTORED)
        table = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in names}
        tables = {name: table.pop(name) for name in ("options", "data_options", "plugins", "identity")}
        options = {name: value for name, value in tables["options"].items() if value is not None}
        table |= {"options": options, "data_options": dict(self.data_options)}
        table |= {name: dict(tables[name]) or None for name in ("plugins", "identity")}
        return {name: value for name, value in table.items() if value is not None}

    def to_publish(self) -> Values:
        """Return :meth:`to_dict`, without hashes and sizes of data if records are private.

        A hash would confirm a guess of the last unknown label.
        """
        table = self.to_dict()
        if self.records == "private":
            table["identity"] = {name: text for name, text in self.identity.items() if name == "version"}
        return {name: value for name, value in table.items() if name != "identity" or value}

    def to_toml(self) -> str:
        return toml.dumps(self.to_publish())

    def check(self) -> None:
        super().check()
        texts = (*self.to_dict().items(), *self.options.items(), *self.data_options.items(), *self.plugins.items())
        for name, value in texts:
            if isinstance(value, str):
                check_text(value, f"the setting {name}")

    def for_user(self, names: Collection[str]) -> Self:
        """Mark the settings with ``names`` as the user's own, and refuse one without effect.

        A stored run or a config file names all settings, and must not count.
        """
        for name, way in self.find_unused().items():
            for label in self.given_flags(name) if name in names else ():
                raise UserError(f"{label} has no effect {way}.")
        return self.replace(asked=frozenset(names))

    def not_default(self) -> frozenset[str]:
        """Return the names of the settings not at their defaults, none for data that only a script has."""
        with suppress(UserError):
            table = {field.name: field.default for field in dataclasses.fields(self)} | defaults(self.method, self.data)
            return frozenset(name for name in self.names() if getattr(self, name) != table[name])
        return frozenset()

    def refuse_untrusted_code(self, folder: str | os.PathLike[str], trusted: Collection[str]) -> None:
        """Raise UserError if a run folder, which may come from anyone, names code that is not ``trusted``."""
        for option, code in self.code():
            if not named_code.trusts(trusted, code):
                raise named_code.refuse_untrusted(Path(folder) / NAME, code, "the option again", option)

    def code(self) -> list[tuple[str, str]]:
        """Return the code that the settings name, as pairs of flag and code."""
        options = [(shlex.quote(f"{name}={self.options[name]}"), part) for name, part in self.method_options.code()]
        pairs = [(f"--method-option {text}", part) for text, part in options]
        texts = {"model": self.model, "choose": self.choose}
        named = {name: text for name, text in texts.items() if named_code.parse(text) is not None}
        return [*pairs, *((f"--{name} {shlex.quote(text)}", text) for name, text in named.items())]

    def differences(self, stored: RunConfig) -> list[str]:
        """Return the differences from a stored run, as ``name: stored -> now``.

        Not compared are:

        * the method options of two different methods;
        * the data folder, which may have moved: a resumed run compares the data themselves;
        * the plugins, which :func:`fedkern.usercode.plugins.restore` checks;
        * settings that change no bit, and fingerprints.
        """
        mine, theirs = (flatten_table({**config.to_dict(), "plugins": {}, "identity": {}}) for config in (self, stored))
        names = [name for name in dict.fromkeys([*theirs, *mine]) if name not in (*RESUMABLE, *FINGERPRINTS)]
        if self.method != stored.method:
            names = [name for name in names if not name.startswith("options.")]
        return [
            f"{name}: {theirs.get(name, 'unset')} -> {mine.get(name, 'unset')}"
            for name in names
            if mine.get(name) != theirs.get(name)
        ]


def flatten_table(table: Mapping[str, object]) -> Values:
    """Return the settings by name, those of a table such as ``options`` as ``options.NAME``."""
    result: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            result.update({f"{name}.{key}": entry for key, entry in value.items()})
        else:
            result[name] = value
    return result


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
        named = plain["plugins"]
        if isinstance(named, list) and all(isinstance(name, str) for name in named):
            named = dict.fromkeys(named, "")
        if not isinstance(named, Mapping) or not all(isinstance(identity, str) for identity in named.values()):
            raise UserError(f'{source}: plugins must be a list of names, or a table of lines "NAME" = "IDENTITY".')
        plain["plugins"] = dict(named)
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
