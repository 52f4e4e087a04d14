"""The Dataset of examples/own_dataset.py: every method for CIFAR-10 learns of it, with the bits of equal arrays."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

import fedkern
from fedkern.data import FederatedData, Split, lookup
from fedkern.methods import METHODS
from python_tests.saved_network import same_network
from python_tests.smallest import SETTINGS

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "own_dataset.py"
SERVING = sorted(name for name, kind in METHODS.items() if kind.serves(lookup("cifar10").task))
OPTIONS: dict[str, dict[str, Any]] = {"fedgid": {"intervention": "off"}, "fedlpfm": {"pretrain_epochs": 1}}
NEED_PUBLIC = ("feddf", "fedlpfm")
SMALL = {"model": "cnn", "width": 4, "augment": "crop-flip", "batch_size": 16, "progress": False, "pictures": False}


def example() -> Any:
    spec = importlib.util.spec_from_file_location("own_dataset", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_images(file: Path) -> Path:
    draw = np.random.default_rng(0)
    y = draw.integers(0, 10, 130)
    x = (draw.integers(0, 100, (130, 32, 32, 3)) + 15 * y[:, None, None, None]).astype(np.uint8)
    np.savez(file, x_train=x[:90], y_train=y[:90], x_test=x[90:], y_test=y[90:])
    return file


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Any, Any]:
    train, test = example().cifar10(str(write_images(tmp_path / "x.npz")))
    return train, test


def settings_of(method: str) -> dict[str, Any]:
    how = {**SMALL, **({} if METHODS[method].one_shot else {"rounds": 2}), **SETTINGS.get(method, {})}
    how["options"] = {**how.get("options", {}), **OPTIONS.get(method, {})}
    how |= {"augment": None} if method == "fedcgs" else {}  # its clients take no augmented images
    return {name: value for name, value in how.items() if value not in (None, {})}


def words_of(method: str, file: Path) -> dict[str, object]:
    """Return flags of a command, without dashes, for the example with the images of a file."""
    settings = settings_of(method) | {"data": f"{EXAMPLE}:cifar10", "data_root": str(file), "clients": 3, "grad_cam": 0}
    settings |= {"threads": 1, "client_threads": 1, "device": "cpu"}
    names = [name for name in settings if name not in ("options", "progress", "pictures")]
    options = {f"method-option.{name}": value for name, value in settings.get("options", {}).items()}
    return {name.replace("_", "-"): settings[name] for name in names} | options


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", SERVING)
def test_every_method_gives_the_bits_of_arrays(method: str, sets: tuple[Any, Any], tmp_path: Path) -> None:
    train, test = sets
    parts = [Subset(train, range(0, 40)), Subset(train, range(40, 70))]
    arrays = FederatedData.from_arrays(
        [(train.data[:40], train.targets[:40]), (train.data[40:70], train.targets[40:70])], (test.data, test.targets)
    )
    public: dict[str, Any] = {}
    if method in NEED_PUBLIC:
        public = {"public": Subset(train, range(70, 90))}
        rest = torch.from_numpy(train.data[70:]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(train.targets[70:])
        arrays = dataclasses.replace(arrays, public=Split(*rest))
    how = settings_of(method)
    one = fedkern.simulate(method, data=parts, test=test, **public, out=tmp_path / "one", workers=1, **how)
    two = fedkern.simulate(method, data=parts, test=test, **public, out=tmp_path / "two", workers=2, **how)
    expected = fedkern.simulate(method, data=arrays, out=tmp_path / "arrays", workers=1, **how)
    assert one.metrics == two.metrics == expected.metrics
    assert same_network(one.out, expected.out)
    assert same_network(one.out, two.out)
