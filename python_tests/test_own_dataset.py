"""Tests of the Dataset of examples/own_dataset.py: every method for CIFAR-10 learns, with the bits of equal arrays."""

import dataclasses
import math
import random
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

import fedkern
from fedkern.data import FederatedData, Split, lookup
from fedkern.errors import UserError
from fedkern.methods import METHODS
from python_tests.saved_network import same_network
from python_tests.smallest import SETTINGS

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "own_dataset.py"
SERVING = sorted(name for name, kind in METHODS.items() if kind.serves(lookup("cifar10").task))
OPTIONS: dict[str, dict[str, Any]] = {"fedgid": {"intervention": "off"}, "fedlpfm": {"pretrain_epochs": 1}}
NEED_PUBLIC = ("feddf", "fedlpfm")
SMALL = {"model": "cnn", "width": 4, "augment": "crop-flip", "batch_size": 16, "progress": False, "pictures": False}


def write_images(file: Path) -> Path:
    draw = np.random.default_rng(0)
    y = draw.integers(0, 10, 130)
    x = (draw.integers(0, 100, (130, 32, 32, 3)) + 15 * y[:, None, None, None]).astype(np.uint8)
    np.savez(file, x_train=x[:90], y_train=y[:90], x_test=x[90:], y_test=y[90:])
    return file


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Any, Any]:
    made: tuple[Any, Any] = runpy.run_path(str(EXAMPLE))["cifar10"](str(write_images(tmp_path / "x.npz")))
    return made


def settings_of(method: str) -> dict[str, Any]:
    plan = {"local_epochs": 1, **({} if METHODS[method].one_shot else {"rounds": 2})}
    how = {**SMALL, **({} if method == "fediod" else plan), **SETTINGS.get(method, {})}
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
        extra = torch.from_numpy(train.data[70:]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(train.targets[70:])
        arrays = dataclasses.replace(arrays, public=Split(*extra))
    how = settings_of(method)
    serial = fedkern.simulate(method, data=parts, test=test, **public, out=tmp_path / "one", workers=1, **how)
    two = fedkern.simulate(method, data=parts, test=test, **public, out=tmp_path / "two", workers=2, **how)
    expected = fedkern.simulate(method, data=arrays, out=tmp_path / "arrays", workers=1, **how)
    assert serial.metrics == two.metrics == expected.metrics
    assert same_network(serial.out, expected.out)
    assert same_network(serial.out, two.out)


class Scaled(Dataset[Any]):
    """Float images of another data set, some of them flipped by a generator that no seed reaches."""

    def __init__(self, images: Any, flips: float = 0.0) -> None:
        self.images, self.flips, self.draw = images, flips, random.Random(0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.images[index]
        return (image.flip(-1) if self.draw.random() < self.flips else image) / 255 * 4 - 2, label


def convolve() -> nn.Sequential:
    """Return a network of 12 outputs that takes floats alone."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 12))


def test_a_module_of_ones_own_gets_the_floats_of_the_data_set(sets: tuple[Any, Any], tmp_path: Path) -> None:
    train, test = map(Scaled, sets)
    how = {**SMALL, "width": None, "model": convolve(), "rounds": 1, "normalize": (0.5, 0.25), **SETTINGS["fediod"]}
    run = fedkern.simulate("fediod", data=[train, train], test=test, out=tmp_path / "run", **how)
    stacked = torch.stack([image for image, _ in test])
    with torch.no_grad():
        expected = run.model()(stacked).softmax(1)
    assert torch.allclose(run.predict(test), expected, atol=1e-6)
    assert torch.allclose(run.predict(stacked), expected, atol=1e-6)
    labels = torch.tensor([label for _, label in test])
    assert run.evaluate()["accuracy"] == pytest.approx(float((expected.argmax(1) == labels).double().mean()))
    assert run.evaluate(test) == run.evaluate()
    assert run.report().exists()
    again = {"data": [train, train], "test": test, "model": convolve(), "normalize": (0.4, 0.25)}
    with pytest.raises(UserError, match="The data are not those"):
        fedkern.load(run.out, **again, trusted=["model"])


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "flips": ("fedavg", {"flips": 0.1, "model": "cnn"}, "the same whenever they are read, .* was another one"),
    "pixels": ("fediod", {"model": "cnn"}, r"needs pixels, .*add normalize=\(mean, std\)"),
    "channels": ("fedavg", {"model": "cnn", "normalize": ([0.1, 0.2], [1, 1])}, "2 means .* for 3 channels"),
    "scale": ("fedavg", {"model": "cnn", "normalize": (0.5, 0)}, "normalize must be .*std above 0"),
    "off": ("fedavg", {"model": "cnn", "keep_items": "off"}, "needs images in memory"),
}


@pytest.mark.parametrize(("method", "given", "message"), WRONG.values(), ids=WRONG)
def test_images_that_cannot_be_taken_are_one_sentence(
    method: str, given: dict[str, Any], message: str, sets: tuple[Any, Any], tmp_path: Path
) -> None:
    train, test = Scaled(sets[0], given.pop("flips", 0.0)), Scaled(sets[1])
    with pytest.raises(UserError, match=message) as refused:
        fedkern.simulate(method, data=[train], test=test, out=tmp_path / "run", **{**SMALL, "rounds": 1, **given})
    assert "\n" not in str(refused.value)
    assert not [*(tmp_path / "run").glob("*")]


def test_only_items_in_use_are_read(sets: tuple[Any, Any], tmp_path: Path) -> None:
    train, test = sets
    reads: list[int] = []
    read = type(train).__getitem__

    class Counting(type(train)):  # type: ignore[misc]
        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, index: int) -> Any:
            reads.append(index)
            return read(self, index % len(self.targets))

    train.__class__ = Counting
    how = {**SMALL, "rounds": 1, "train_samples": 60, "clients": 2}
    fedkern.simulate("fedavg", data=train, test=test, out=tmp_path / "run", **how)
    assert len(reads) < 400


def pairs(change: Callable[[torch.Tensor, int], Any]) -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=draw)
    return [change(image, row % 4) for row, image in enumerate(images)]


class Listed(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


ODD: dict[str, tuple[Callable[[torch.Tensor, int], Any], str]] = {
    "not finite": (lambda x, y: (x / 255 + math.nan, y), "values that are not finite"),
    "channels last": (lambda x, y: (x.permute(1, 2, 0), y), r"channels last: give image.permute\(2, 0, 1\)"),
    "large class": (lambda x, y: (x, 2**40), "needs classes from 0, below"),
    "soft mask": (lambda x, y: {"image": x, "label": y, "mask": x[0] / 255}, "more than two values: give 0 and 1"),
    "scale": (lambda x, y: (x.float(), y), "have pixels from .* by normalize"),
}


@pytest.mark.parametrize(("change", "message"), ODD.values(), ids=ODD)
def test_images_of_another_form_are_one_sentence(change: Any, message: str, tmp_path: Path) -> None:
    data = Listed(pairs(change))
    how = {**SMALL, "rounds": 1, "normalize": (0.5, 0.25), "width": None, "model": "mlp"}
    with pytest.raises(UserError, match=message):
        fedkern.simulate("fedavg", data=[data], test=data, out=tmp_path / "run", **how)


class Bytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.uint8
        return self.layer(x.flatten(1) / 255)


def test_a_network_of_bytes_is_exported_and_judged_on_bytes(tmp_path: Path) -> None:
    data = Listed(pairs(lambda x, y: (x, y)))
    how = {**SMALL, "rounds": 1, "width": None, "model": Bytes()}
    run = fedkern.simulate("fedavg", data=[data], test=data, out=tmp_path / "run", **how)
    program = torch.export.load(run.export(tmp_path / "n.pt2")[0]).module()
    stacked = torch.stack([image for image, _ in data])
    assert torch.allclose(program(stacked).softmax(1), run.predict(data), atol=1e-6)
    floats = Listed(pairs(lambda x, y: (x / 255, y)))
    with pytest.raises(UserError, match=r"are float32, and the run in .* saw uint8"):
        run.evaluate(FederatedData.from_datasets([floats], floats))
