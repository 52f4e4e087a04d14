"""A Flower project for a fedkern run: pyproject.toml, README and the run's code, written without importing flwr."""

import importlib.util
import re
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedkern.data import COMMON_OPTIONS, lookup
from fedkern.errors import UserError, printable_name
from fedkern.files import atomic, toml
from fedkern.flower.runs.run_settings import CODE, DATA_OPTION, FLOWER, LOCAL_ONLY, METHOD_OPTION, SWITCHES, setting_key
from fedkern.methods import method_registry
from fedkern.settings.config import RunConfig
from fedkern.settings.defaults import default_data, defaults
from fedkern.usercode import named_code

SERVER_APP = "fedkern.flower.runs.server_app:app"
GOES_ON = {"on_nan": "skip", "on_error": "skip"}
"""Default settings of a project, because one client's mistake should not end a run on nodes."""
_WIDE = 60


@dataclass(frozen=True)
class Project:
    """Contents of a project: what the user gave, without defaults (compare `fedkern.cli.request.Given`).

    ``out`` None means a new run folder for every run.
    """

    method: str
    settings: Mapping[str, object]
    options: Mapping[str, object]
    data_options: Mapping[str, object]
    plugins: Sequence[str]
    out: Path | None
    own_data: bool
    report: bool
    predictions: bool
    clients: Sequence[str]

    def write(self, folder: Path) -> list[Path]:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder: name a new one with --flower.")
        code = self._code()
        fresh = not folder.exists()
        with atomic.report_unwritable(folder):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            for path in code.values():
                shutil.copyfile(path, folder / path.name)
            atomic.write_bytes(folder / "pyproject.toml", self.pyproject(folder.absolute().name).encode())
            atomic.write_bytes(folder / "README.md", self.readme(folder).encode())
        except BaseException as error:
            for path in folder.iterdir():
                path.unlink()
            if fresh:
                folder.rmdir()
            if isinstance(error, OSError):
                raise atomic.unwritable(folder, error) from None
            raise
        return sorted(folder.iterdir())

    def _code(self) -> dict[str, Path]:
        """Return the code files to copy into the project, by their name in the settings."""
        files = {name: Path(name) for name in self.plugins if Path(name).is_absolute()}
        for named in (named_code.parse(str(self.settings.get(field) or "")) for field in CODE):
            if named is not None and named.file:
                files[named.file] = Path(named.file)
        by_name: dict[str, Path] = {}
        for path in files.values():
            if not path.is_file():
                raise UserError(f"{path} cannot be copied into the project, as it is no file.")
            if by_name.setdefault(path.name, path) != path:
                raise UserError(
                    f"{by_name[path.name]} and {path} have one name, and a project is one folder: rename one."
                )
        return files

    # -- pyproject.toml --------------------------------------------------------------------------------------------

    def pyproject(self, name: str) -> str:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "fedkern-run"
        return f"""\
# A run of fedkern over Flower; README.md has the commands.

[project]
name = {toml.quote_text(plain)}
version = "1.0.0"
description = {toml.quote_text(f"fedkern: {self.method}")}
license = "Apache-2.0"
# fedkern and flwr are installed on every machine: Flower 1.42 installs what is named here anew for every run.
dependencies = []

[tool.flwr.app]
publisher = "fedkern"

[tool.flwr.app.components]
serverapp = "{SERVER_APP}"
clientapp = "fedkern.flower.runs.client_app:app"

# The settings of the run: an empty text leaves one open.  One run's own: flwr run --run-config 'rounds=3 lr=0.05'
[tool.flwr.app.config]
{self._table(self._settings())}
[tool.flwr.app.config.{METHOD_OPTION.rstrip(".")}]
{self._table(self._options())}
[tool.flwr.app.config.{DATA_OPTION.rstrip(".")}]
{self._table(self._data_options())}
[tool.flwr.app.config.flower]
{self._table(self._flower())}"""

    def _settings(self) -> dict[str, tuple[object, str]]:
        usual = defaults(self.method, self._data)
        settings = {**GOES_ON, **self.settings}
        rows: dict[str, tuple[object, str]] = {"method": (self.method, "")}
        for setting in RunConfig.list_options():
            if setting.field == "method" or setting.field in LOCAL_ONLY:
                continue
            value = settings.get(setting.field)
            default = usual.get(setting.field, setting.default)
            comment = "" if value is not None or default is None else f"default {default}"
            rows[setting_key(setting.field)] = (self._portable(setting.field, value), comment)
        named = (Path(name).name if Path(name).is_absolute() else name for name in self.plugins)
        rows["plugins"] = (",".join(named), "")
        rows["out"] = ("" if self.out is None else str(self.out), "the run folder; resume = true goes on with it")
        for name, switch in SWITCHES.items():
            rows[name] = (bool(getattr(self, name, False)), switch.help)
        return rows

    def _portable(self, field: str, value: object) -> object:
        if value is None:
            return ""
        named = named_code.parse(str(value)) if field in CODE else None
        return f"{Path(named.file).name}:{named.name}" if named is not None and named.file else value

    def _options(self) -> dict[str, tuple[object, str]]:
        given = {name: value for name, value in self.options.items() if value is not None}
        declared = method_registry.get(self.method).Options.list_options()
        return {option.name: (given.get(option.name, ""), "") for option in declared}

    @property
    def _data(self) -> str:
        return str(self.settings.get("data") or default_data(self.method))

    def _data_options(self) -> dict[str, tuple[object, str]]:
        names = dict.fromkeys([*self.data_options, *COMMON_OPTIONS, *lookup(self._data).options])
        return {name: (self.data_options.get(name, ""), "") for name in names}

    def _flower(self) -> dict[str, tuple[object, str]]:
        rows = {key.partition(".")[2]: (option.default, option.help) for key, option in FLOWER.items()}
        return {**rows, "own-data": (self.own_data, rows["own-data"][1])}

    @staticmethod
    def _table(rows: Mapping[str, tuple[object, str]]) -> str:
        lines = []
        for key, (value, comment) in rows.items():
            line = toml.format_line(key, value)
            lines.append(f"{line}  # {' '.join(comment.split())}" if comment and len(line) < _WIDE else line)
        return "".join(f"{line}\n" for line in lines)

    # -- README.md ---------------------------------------------------------------------------------------------------

    def readme(self, folder: Path) -> str:
        count = len(self.clients)
        nodes = "\n".join(
            f"| {printable_name(str(name), 60).replace('|', '/')} | `--node-config 'partition-id={k} "
            f"num-partitions={count}'` |"
            for k, name in enumerate(self.clients)
        )
        data = "A folder holds the data of its client alone (`flower.own-data` in the settings)."
        if not self.own_data:
            data = "All folders hold the same data set, that of the server (`--own-data` writes a project for others)."
        return f"""\
# {self.method} over Flower

Written by `python -m fedkern.run {self.method} --flower {folder.name}`. All machines need fedkern and Flower: in
a checkout of fedkern `pip install '.[flower]'`, or where fedkern is installed `pip install 'flwr>=1.41,<1.43'`.

## On one machine

Flower's simulation needs `pip install 'flwr[simulation]>=1.41,<1.43'`. In this folder:

```
flwr run . local --stream --federation-config 'num-supernodes={count}'
```

## On machines of their own

The SuperLink, with certificates and SuperNode authentication as Flower's documentation has them:

```
flower-superlink --insecure --host 0.0.0.0
```

A SuperNode for every client, each on the machine that has its data:

```
flower-supernode --insecure --superlink HOST:8000 --node-config 'partition-id=0 num-partitions={count}'
```

| client | node |
|---|---|
{nodes}

`data-root="DIR"` in `--node-config` names the folder of the data on that machine, `state-dir="DIR"` the folder of the
client's state. {data} Then the run, from this folder, with the SuperLink's address in Flower's `config.toml`:

```
flwr run . NAME --stream
```

## Settings

The settings are the run-config in `pyproject.toml`: the flags of fedkern without dashes in front. A single run has its
own with `--run-config`, and a run whose server was stopped goes on with the same bits:

```
flwr run . local --stream --run-config 'rounds=3 lr=0.05'
flwr run . local --stream --run-config 'out="DIR" resume=true'
```

Files that settings name by a path (data, initial weights, teachers) must be on every machine under that path. Code of
`--model` and `--plugin` is in this folder, and Flower sends it to the nodes.
"""


def simulation_settings(folder: Path, options: Sequence[str]) -> list[str]:
    """Return Flower's settings to simulate a project on this machine: fedkern's, then the user's ``options``.

    The folder may hold any Flower project. In a :class:`Project`, each client needs a node.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            "Flower's simulation needs Ray, which is not installed: pip install 'flwr[simulation]>=1.41,<1.43', or "
            "name a SuperLink with --superlink."
        )
    nodes = []
    with suppress(OSError, ValueError, LookupError, TypeError):  # Flower says what is wrong with a project
        app = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
        if app["components"]["serverapp"] == SERVER_APP and not any("num-supernodes" in text for text in options):
            if not app["config"]["clients"]:
                raise UserError(
                    "The project leaves its number of clients to the data set: give that number with "
                    "--federation-config num-supernodes=N."
                )
            nodes = [f"num-supernodes={app['config']['clients']}"]
    return ["client-resources-num-cpus=1", *nodes, *options]
