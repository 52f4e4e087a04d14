"""List of names that users type or that files hold, as lines.

A change of a line breaks a user's program, command or stored run.  Where that is meant::

    python -m python_tests.public_names > python_tests/public_names.txt
"""

import importlib
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

import fedkern
from fedkern.cli import command_parser
from fedkern.cli.front_page import COMMANDS
from fedkern.data.dataset_registry import DATASETS
from fedkern.methods import METHODS
from fedkern.settings.config import RunConfig

MODULES = ("fedkern", *map("fedkern.{}".format, ("data", "listeners", "methods", "models", "ops", "privacy")))


def members(kind: type) -> Iterable[str]:
    """Return the public members of a class that fedkern's classes define or declare."""
    ours = [base for base in kind.__mro__ if base.__module__.startswith("fedkern")]
    return {name for base in ours for name in (*vars(base), *inspect.get_annotations(base)) if name[0] != "_"}


def public_api() -> Iterator[str]:
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            yield f"name {module.__name__}.{name}"
            value = getattr(module, name)
            if isinstance(value, type):
                inherited = members(value.__base__ or object) if issubclass(value, METHODS["fedavg"]) else ()
                yield from (f"member {module.__name__}.{name}.{member}" for member in {*members(value)} - {*inherited})


def typed_words() -> Iterator[str]:
    """Yield commands with their flags, settings, and the options of methods and data sets."""
    for command in ("fedavg", *COMMANDS):
        help_page = command_parser.parse_words([command, "--help"]).help
        yield from (
            f"flag {command} {flag}" for flag in re.findall(r"^ +(?:-\w, )?(--[\w-]+)", help_page, re.MULTILINE)
        )
    yield from (f"setting {setting.field}" for setting in RunConfig.list_options())
    for name, method in METHODS.items():
        yield from (f"option {name} {option.name}" for option in method.Options.list_options())
    for name, source in DATASETS.items():
        yield from (f"data option {name} {option}" for option in source.options)


def stored_keys() -> Iterator[str]:
    """Yield the keys of the files of a run of one round."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        fedkern.simulate("fedavg", rounds=1, clients=2, train_samples=40, width=2, out=out, grad_cam=0)
        record = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        yield from (f"record {key}" for key in record)
        for file in ("summary.json", "facts.json"):
            yield from (f"{file} {key}" for key in json.loads((out / file).read_text()))


def public_names() -> list[str]:
    return sorted({*public_api(), *typed_words(), *stored_keys()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write("".join(f"{line}\n" for line in public_names()))
