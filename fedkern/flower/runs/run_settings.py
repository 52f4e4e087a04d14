"""The settings of a run as the flat run-config of a Flower project, and back.

| key | holds |
|---|---|
| `rounds`, `local-epochs`, ... | a setting, named as its flag (an empty text leaves it open) |
| `method-option.NAME`, `data-option.NAME` | an option of the method or of the data set |
| `plugins` | files of the project, or modules, separated by commas |
| `out`, `resume`, `report`, `predictions` | as the flags of the command line |
| `flower.deadline`, `flower.wait`, ... | entries of `FLOWER` |
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkern.data import lookup
from fedkern.data.dataset_registry import open_code
from fedkern.engine.setup.order import FILTER_ORDER
from fedkern.engine.uploads.asynchronous import check_local
from fedkern.engine.uploads.filters import FILTERS, Filter
from fedkern.errors import UserError, suggest_name
from fedkern.flower.runs.node_config import STAYS, UserConfig
from fedkern.settings.config import RunConfig
from fedkern.typed_option import Option, as_typed
from fedkern.usercode import named_code, plugins

METHOD_OPTION, DATA_OPTION = "method-option.", "data-option."
SWITCHES = {
    "resume": Option(False, "whether the run in out goes on from its last checkpoint"),
    "report": Option(False, "whether report.html is written at the end"),
    "predictions": Option(False, "whether the answers to the test images are written to predictions.csv"),
}
_SECONDS: dict[str, Any] = {"low": 0, "high": 1e9}
FLOWER = {
    "flower.deadline": Option(
        3600.0, "seconds within which clients must answer a message; 0: no limit but Flower's own", **_SECONDS
    ),
    "flower.wait": Option(600.0, "seconds to wait for the nodes of all clients before the first round", **_SECONDS),
    "flower.own-data": Option(False, "whether data folder or function of a node give the data of its client alone"),
    "flower.transport": Option(
        "fp32", "how fp32 tensors travel: fp32, or bf16 for half the bytes, which rounds them", choices=("fp32", "bf16")
    ),
    "flower.resident": Option(
        STAYS, "seconds that a client's process stays on its SuperNode after a message; 0: it ends", **_SECONDS
    ),
    "flower.state": Option("", "folder of the clients' states on their nodes; empty: a folder in the user's cache"),
}
JUDGING = {"test_share": 0.5, "validation_share": 0.9}
"""Default shares of the server's images if nodes have their own data: the server's images only judge."""
LOCAL_ONLY = ("workers",)
CODE = ("model", "data", "choose")


@dataclass(frozen=True)
class RunSettings:
    """Values of a run-config. ``out`` None means a new folder in ``runs``."""

    config: RunConfig
    out: Path | None
    resume: bool
    report: bool
    predictions: bool
    deadline: float
    wait: float
    own_data: bool
    transport: str
    state: str


def setting_key(field: str) -> str:
    return field.replace("_", "-")


def read_run_config(run_config: UserConfig, data_root: str | None = None) -> RunSettings:
    """Read Flower's flat run-config, and load the plugins that it names.

    ``data_root`` is the folder of the data on this machine, instead of the run-config's.
    """
    values = {key: word for key, value in run_config.items() if (word := as_typed(value).strip())}
    fields = {setting_key(flag.field): flag.field for flag in RunConfig.list_options() if flag.field not in LOCAL_ONLY}
    keys = [*fields, *SWITCHES, *FLOWER, "out", "plugins"]
    for key in values:
        if key not in keys and not key.startswith((METHOD_OPTION, DATA_OPTION)):
            raise UserError(f'The run-config has an unknown key "{key}".{suggest_name(key, keys)}')
    named = [_locate_file(name.strip()) for name in values.get("plugins", "").split(",") if name.strip()]
    plugins.load_installed()
    loaded = plugins.load_given(named)
    settings: dict[str, Any] = {fields[key]: word for key, word in values.items() if key in fields}
    method = settings.pop("method", "fedavg")
    settings |= {field: _located_code(settings[field]) for field in CODE if field in settings}
    if "data" in settings:
        open_code(settings["data"])
    if data_root:
        settings["data_root"] = data_root
    words = [f"{key.removeprefix(METHOD_OPTION)}={word}" for key, word in _under(values, METHOD_OPTION)]
    data_options = {key.removeprefix(DATA_OPTION).replace("-", "_"): word for key, word in _under(values, DATA_OPTION)}
    config = RunConfig.make(method, options=words, data_options=data_options, plugins=loaded, **settings)
    config = config.replace(asked=frozenset(settings))
    switches: dict[str, Any] = {
        key.removeprefix("flower.").replace("-", "_"): (
            option.named(key, key).convert(values[key]) if key in values else option.default
        )
        for key, option in {**SWITCHES, **FLOWER}.items()
    }
    del switches["resident"]  # the ClientApp reads it itself, before it imports all this
    if switches["own_data"]:
        check_own_data(config)
        shares = {name: share for name, share in JUDGING.items() if name in lookup(config.data).options}
        config = config.replace(data_options={**shares, **config.data_options})
    return RunSettings(config, Path(values["out"]).expanduser() if "out" in values else None, **switches)


def check_portable(config: RunConfig) -> None:
    if config.kind.pooled:
        raise UserError(f"{config.method} needs the data of all clients in one place, which Flower keeps apart.")
    check_local(config)
    if config.devices is not None:
        raise UserError("--devices simulates time, and Flower's nodes take real time: leave it out.")
    if config.own_networks:
        raise UserError(
            f"{'--personal' if config.personal is not None else config.method} is not for Flower: a run is judged by "
            "the networks that its clients keep to themselves, and the server of a Flower run does not have these."
        )
    if config.records == "private" and config.choose not in ("uniform", "size"):
        raise UserError(
            f"--choose {config.choose} needs the losses that clients report, and with private records nodes of Flower "
            "send none: take --choose size, or --records all."
        )
    if config.compress is not None:
        raise UserError(
            f"--compress {config.compress} is not for runs over Flower, whose nodes send uploads whole: leave it out, "
            'or have them travel as bf16 with flower.transport="bf16".'
        )
    for name in plugins.names_of_run(FILTERS, config.plugins):
        if name not in FILTER_ORDER and FILTERS[name].encoders is not Filter.encoders:
            raise UserError(
                f"The filter {name} has encoders, and nodes of Flower send uploads as they are: leave its plugin out."
            )


def check_own_data(config: RunConfig) -> None:
    """Raise UserError for settings that need the data of several clients in one place."""
    if "clients" in config.unset:
        raise UserError("flower.own-data needs the number of clients, which no node reports: give clients=N.")
    if config.held_out_client is not None or config.client_test or config.privacy_unit != "image":
        raise UserError(
            "held-out-client, client-test and privacy-unit patient need the data of all clients in one place: leave "
            "them out with flower.own-data."
        )
    if config.data_options.get("cue_clients") or config.data_options.get("backdoor_clients"):
        raise UserError(
            "cue-clients and backdoor-clients change the data of some of all clients: leave them out with "
            "flower.own-data."
        )
    if config.public_samples or "pairs" in lookup(config.data).task.offers:
        raise UserError(
            "Public samples and image-text data are drawn from the data of all clients, which flower.own-data keeps "
            "apart: use a data folder with all data on every node."
        )


def _under(values: Mapping[str, str], prefix: str) -> Iterable[tuple[str, str]]:
    return ((key, word) for key, word in values.items() if key.startswith(prefix))


def _locate_file(name: str) -> str:
    """Find a project file, which Flower puts on ``sys.path``. Other names are returned unchanged."""
    path = Path(name)
    if path.is_absolute() or not name.endswith(".py"):
        return name
    file = next((candidate for folder in sys.path if (candidate := Path(folder) / name).is_file()), None)
    return name if file is None else str(file.absolute())


def _located_code(text: str) -> str:
    file, _, name = text.rpartition(":")
    return f"{_locate_file(file)}:{name}" if file.endswith(".py") and named_code.parse(text) is not None else text
