"""Tests of items of PyTorch data sets: how often they are read, and that no random draw is frozen or changed."""

import os
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, default_collate

import fedkern
from fedkern.data.sources.items import Items
from fedkern.errors import UserError
from fedkern.listeners import Listener
from fedkern.streams import GENERATORS, generator_states, mix_words, seed_generators, seeded_generators
from fedkern.tasks import CLASSIFICATION
from python_tests.engine.test_items import HERE

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
