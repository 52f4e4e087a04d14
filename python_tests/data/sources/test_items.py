"""Tests of PyTorch data sets: how often items are read, draws that stay free, and their patients and sites."""

import copy
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, default_collate

import fedkern
from fedkern.data import FederatedData
from fedkern.data.sources.items import Items
from fedkern.errors import UserError
from fedkern.listeners import Listener
from fedkern.settings.run_data import kept_data
from fedkern.streams import GENERATORS, generator_states, mix_words, seed_generators, seeded_generators
from fedkern.tasks import CLASSIFICATION
from python_tests.engine.test_items import HERE
from python_tests.smallest import SETTINGS

OWN = np.random.default_rng(0)
DRAWS = {
    "nothing": lambda: 1.0,
    "torch": lambda: float(torch.rand(()) < 0.1),
    "NumPy": lambda: float(np.random.rand() < 0.1),  # noqa: NPY002
    "random": lambda: float(random.random() < 0.1),
    "spare number": lambda: np.random.randn(),  # noqa: NPY002
    "put back": lambda: drawn_and_put_back(),
    "own generator": lambda: float(OWN.random() < 0.1),
    "system": lambda: float(os.urandom(1)[0] < 26),
}
MOVING = [*DRAWS][:5]
"""Draws that the generators show; of the others those that are put back repeat."""


def drawn_and_put_back():
    with torch.random.fork_rng(devices=[]):
        return float(torch.rand(()))


class Flipped(Dataset):
    """Items that draw where ``often`` divides their row.

    ``reads`` counts the reads.
    """

    def __init__(self, count, kind="nothing", often=1):
        self.count, self.kind, self.often, self.reads = count, kind, often, 0

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        self.reads += 1
        drawn = DRAWS[self.kind]() if row % self.often == 0 else 0.0
        return {"x": torch.tensor([row % 3 == 0, row % 3 == 1, drawn]).float(), "labels": row % 3}


class Several(Flipped):
    """Data set that reads several items at once."""

    calls = 0

    def __getitems__(self, rows):
        Several.calls += 1
        return [self[row] for row in rows]


@pytest.mark.parametrize("often", [1, 7])
@pytest.mark.parametrize("kind", MOVING)
def test_items_read_at_once_are_those_of_seeds(kind, often):
    np.random.seed(3), np.random.randn(), random.gauss(0, 1), torch.randn(())  # noqa: NPY002 -- leave spare numbers
    before = generator_states()
    split = Items(Several(60, kind, often), "data", CLASSIFICATION, default_collate)
    for rows in ([1, 2, 3], [5, 4, 7], [14, 13], range(20, 50)):
        calls, expected = Several.calls, []
        for row in rows:
            seed_generators(mix_words(9, row))
            expected.append(split.dataset[row])
        for name, state in before.items():
            GENERATORS[name][1](state)
        batch = split.batch(rows, 9)
        assert all(torch.equal(value, default_collate(expected)[name]) for name, value in batch.items())
        assert generator_states() == before
        assert kind != "nothing" or Several.calls == calls + 1


class Named(nn.Linear):
    def forward(self, x):
        return super().forward(x)


class Reads(Listener):
    """Counter of reads before the first round, and in all rounds."""

    def __init__(self, *sets):
        self.sets, self.counts = sets, []

    def on_round_start(self, round, name, participants):
        self.counts.append(sum(part.reads for part in self.sets))

    def on_end(self, summary):
        self.on_round_start(0, "", [])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", DRAWS)
def test_only_items_that_are_always_the_same_become_rows(kind, tmp_path):
    def play(name, **how):
        torch.manual_seed(0)
        sets = Flipped(90, kind, 2), Flipped(30)
        reads = Reads(*sets)
        run = fedkern.simulate(
            "fedavg", data=sets[0], test=sets[1], clients=3, model=Named(3, 3), rounds=4, local_epochs=2, lr=0.1,
            out=tmp_path / name, listener=reads, **how, **HERE,
        )  # fmt: skip
        return [value.tolist() for value in run.model().state_dict().values()], reads.counts

    (weights, counts), (all_weights, all_counts) = play("auto"), play("off", keep_items="off")
    is_kept = kind == "nothing"
    assert max(counts[0], all_counts[0]) <= 130 or kind not in MOVING
    assert (counts[-1] - counts[-2] < 50) is is_kept  # six items of the clients, and the test set
    assert all_counts[-1] - all_counts[-2] >= 210
    assert (weights == all_weights) >= (kind in (*MOVING, "put back"))
    if is_kept:
        assert play("memory", keep_items="memory")[0] == weights
    else:
        with pytest.raises(UserError, match=r'keep_items="memory": client . cannot be kept, as (its|an) item'):
            play("memory", keep_items="memory")


class Refilled(Flipped):
    """Data set that gives one tensor, filled anew for every item."""

    place = torch.zeros(3)

    def __getitem__(self, row):
        return self.place.copy_(super().__getitem__(row)["x"]), row % 3


def test_a_batch_of_one_item_has_its_values():
    split = Items(Refilled(60), "data", CLASSIFICATION, default_collate, item_bytes=12)
    for row, (inputs, _) in enumerate(split.batches([np.array([row]) for row in range(60)], 9)):
        assert torch.equal(inputs[0], Flipped(60)[row]["x"])


class Augmented(Several):
    """Data set that changes the items of the class below."""

    def __getitem__(self, row):
        return {**super().__getitem__(row), "labels": 7}


@pytest.mark.parametrize("around", [lambda data: data, lambda data: Subset(data, range(9))])
def test_getitems_of_a_class_below_are_not_read(around):
    split = Items(around(Augmented(60)), "data", CLASSIFICATION, default_collate)
    assert split.batch([1, 2], 9)["labels"].tolist() == [7, 7]


def test_a_spare_number_of_numpy_stays():
    for draws in (2, 1):
        np.random.seed(5), np.random.randn(draws)  # noqa: NPY002
        before = np.random.get_state()[3:]  # noqa: NPY002
        with seeded_generators(1):
            np.random.randn(3)  # noqa: NPY002
        assert np.random.get_state()[3:] == before  # noqa: NPY002


# -- item groups -------------------------------------------------------------------------------------------------------


Capture = pytest.CaptureFixture


class Scans(Dataset):
    """Images or rows of patients with names and five samples each."""

    def __init__(self, count: int, begin: int = 0, shape: tuple[int, ...] = (1, 8, 8), form: str = "") -> None:
        draw = np.random.default_rng(begin)
        self.x = torch.from_numpy(draw.integers(0, 255, (count, *shape)).astype(np.uint8))
        self.targets, self.form, self.reads = [row % 3 for row in range(count)], form, 0
        names = [f"p{(begin + row) // 5}" for row in range(count)]
        if form == "keys":
            self._names = names
        else:
            self.patient = names

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> object:
        self.reads += 1
        x = self.x[row] if self.x.dim() == 4 else self.x[row].float()
        if self.form == "keys":
            return {"x": x, "patient": self._names[row], "labels": self.targets[row]}
        return x, self.targets[row]


class Column(Scans):
    """Samples in a table with columns, like Hugging Face's."""

    column_names = ("x", "who")

    def __getitem__(self, row: object) -> object:
        return self.patient if row == "who" else super().__getitem__(row)


def in_parts(data: Scans) -> Dataset:
    return Subset(ConcatDataset([Subset(data, range(20, 60)), Subset(data, range(20))]), [*range(40, 60), *range(40)])


KINDS = {
    "attribute": (lambda count, start: Scans(count, start), "patient"),
    "key": (lambda count, start: Scans(count, start, form="keys"), "patient"),
    "column": (lambda count, start: Column(count, start), "who"),
    "function": (lambda count, start: Scans(count, start), lambda row: row // 5),
    "parts": (lambda count, start: in_parts(Scans(count, start)) if count == 60 else Scans(count, start), "patient"),
}


@pytest.mark.filterwarnings("ignore:All .* items .* are read once for their groups")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("partition", ["iid", "dirichlet:1:min=1", "attribute"])
def test_groups_stay_together_or_are_clients(kind: str, partition: str) -> None:
    make, groups = KINDS[kind]
    how = {} if partition == "attribute" else {"count": 4}
    data = FederatedData.from_datasets(make(60, 0), make(20, 50), groups=groups, partition=partition, **how)
    rows = [split.rows.tolist() for split in data.clients]
    assert sorted(row for part in rows for row in part) == [*range(60)]
    owners = [{row // 5 for row in part} for part in rows]
    assert sum(map(len, owners)) == 12
    if partition != "attribute":
        assert [len(split.units()) for split in data.clients] == [*map(len, rows)]
        assert data.tests[""].patients.unique().numel() == 4
        fewer = FederatedData.from_datasets(make(60, 0), make(20, 50), groups=groups, partition="iid", samples=30)
        assert sum(len({row // 5 for row in split.rows.tolist()}) for split in fewer.clients) == 6
        return
    names = [str(k) if kind == "function" else f"p{k}" for k in range(12)]
    assert sorted(data.client_names) == sorted(names)
    assert [owner.pop() for owner in owners] == [names.index(name) for name in data.client_names]
    homes = [data.client_names[k] if k >= 0 else "" for k in data.tests[""].homes.tolist()]
    assert homes == ([""] * 20 if kind == "function" else ["p10"] * 5 + ["p11"] * 5 + [""] * 10)


@pytest.mark.parametrize("shape", [(1, 8, 8), (6,)], ids=["images", "items"])
def test_runs_use_patients_as_those_of_files(shape: tuple[int, ...], tmp_path: Path, capsys: Capture) -> None:
    sets = {"data": Scans(60, 0, shape), "test": Scans(30, 50, shape)}
    model = "cnn" if len(shape) == 3 else nn.Linear(6, 3)
    how = {**HERE, **sets, "groups": "patient", "model": model, "rounds": 1, "clients": 2, "progress": True}
    reads = Reads(*sets.values())
    run = fedkern.simulate("fedavg", **how, accelerate="off", client_test=0.4, listener=reads, out=tmp_path / "run")
    assert len(shape) == 3 or reads.counts[0] <= 100  # no item is read twice for its group
    noun = "images" if len(shape) == 3 else "samples"
    text = capsys.readouterr().err
    assert f"Patients whose {noun} are trained on are also in the test set (1 of 6)" in " ".join(text.split())
    units = {(row["set"], row["unit"], row["units"]) for row in run.summary["intervals"]}
    assert units == {("test", "patients", 6), ("own", "patients", 2)}
    kept = kept_data(run.config, FederatedData.from_datasets(*sets.values(), groups="patient", count=2))
    for split, own in zip(kept.clients, kept.client_tests, strict=True):
        assert (len(split), len(own)) == (20, 10)
        assert not {*split.patients.tolist()} & {*own.patients.tolist()}
    again = fedkern.load(run.out, **sets, groups="patient", **({} if len(shape) == 3 else {"model": model}))
    assert again.resume(progress=False, pictures=False).metrics == run.metrics
    with pytest.raises(UserError, match="data"):
        fedkern.load(run.out, **sets, **({} if len(shape) == 3 else {"model": model})).extend(2, progress=False)


def test_a_site_is_held_out_and_a_patient_is_a_unit_of_privacy(tmp_path: Path) -> None:
    how = {**HERE, "data": Scans(30, 0, (1, 16, 16)), "test": Scans(10, 25, (1, 16, 16)), "groups": "patient"}
    how |= {"model": "cnn", "rounds": 1}
    run = fedkern.simulate("fedavg", **how, partition="attribute", held_out_client="p5", out=tmp_path / "run")
    assert run.summary["client_names"] == [f"p{k}" for k in range(5)]
    sizes = {row["set"]: row["samples"] for row in run.summary["intervals"]}
    assert sizes == {"test": 5, "held_out": 10}
    unit = {"privacy_unit": "patient", "patient_images": 2, "clients": 2}
    options = {**SETTINGS["fediod"]["options"], "epsilon": 50.0}
    private = fedkern.simulate("fediod", **how, **unit, options=options, out=tmp_path / "private")
    assert (private.summary["privacy"]["unit"], private.summary["privacy"]["patient_images"]) == ("patient", 2)


NUMBERS = torch.arange(60.0).reshape(20, 3)
TABLE = TensorDataset(NUMBERS, torch.arange(20) % 3)
OTHERS = TensorDataset(torch.cat([NUMBERS[15:], -NUMBERS[1:]]), torch.cat([torch.arange(15, 20) % 3, torch.arange(19)]))


@pytest.mark.parametrize(
    ("train", "test", "count"),
    [
        (Scans(30, 1), copy.deepcopy(Scans(30, 1)), "30 of 30"),
        (Scans(30, 1), Scans(20, 2), ""),
        (Scans(30, 1, (6,)), copy.deepcopy(Scans(30, 1, (6,))), "30 of 30"),
        (TABLE, OTHERS, "5 of 24"),
        (Subset(Scans(60, 3, (6,)), range(40)), Subset(Scans(60, 3, (6,)), range(39, 60)), "1 of 21"),
    ],
    ids=["images", "other images", "items", "tensors", "subsets"],
)
def test_equal_samples_are_found(train: Dataset, test: Dataset, count: str, tmp_path: Path, capsys: Capture) -> None:
    is_image = train[0][0].dim() == 3
    model = "cnn" if is_image else nn.Linear(len(train[0][0]), 24)
    how = {**HERE, "progress": True, "model": model, "clients": 2, "rounds": 1}
    fedkern.simulate("fedavg", data=train, test=test, classes=24, out=tmp_path / "run", **how)
    text = " ".join(capsys.readouterr().err.split())
    noun = "images" if is_image else "samples"
    assert text.count(f"Some {noun} are in both training and the test set ({count}), so") == bool(count)
    assert text.count("are in both training and") == bool(count)


def with_patients(values: object) -> Scans:
    data = Scans(20)
    data.patient = values
    return data


@pytest.mark.parametrize(
    ("data", "groups", "said"),
    [
        (Scans(20), 3, "groups is 3: give the name of an attribute"),
        (Scans(20), "doctor", "of data cannot be read .it has no attribute or column of this name, and an item no"),
        (with_patients(["a"] * 7), "patient", "'patient' of data cannot be read .there are 7 for 20 items"),
        (with_patients(5), "patient", "'patient' of data cannot be read .TypeError: .*iterable"),
        (with_patients([["a"]] * 20), "patient", "one is ..a.., neither a text nor a number nor None"),
        (Scans(20), lambda row: {}[row], "groups=.* of data cannot be read .KeyError: 0.: give"),
    ],
)
def test_wrong_groups_are_one_sentence(data: Scans, groups: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        FederatedData.from_datasets(data, Scans(9), groups=groups)


def test_groups_of_one_name_are_one_however_written() -> None:
    values = ["01", 1, 1.0, "1", np.int64(1), torch.tensor(1), "Caf\u00e9", "Cafe\u0301", None, float("nan"), "", 2**60]
    sets = with_patients(values + [7] * 8), with_patients(range(20))
    data = FederatedData.from_datasets(*sets, groups="patient", count=1)
    patients = data.clients[0].patients.tolist()
    assert len({*patients[:6]}) == 1 == len({*patients[6:8]})
    assert len({*patients}) == 7
    assert patients[0] == data.tests[""].patients[1]
    clients = {"groups": "patient", "partition": "attribute"}
    with pytest.raises(UserError, match="has 3 sites, not 2: leave clients out"):
        FederatedData.from_datasets(with_patients([1, 2, 3, 3] * 5), Scans(9), count=2, **clients)
    with pytest.raises(UserError, match="needs the site of every item"):
        FederatedData.from_datasets(with_patients([None, 2] * 10), Scans(9), **clients)
