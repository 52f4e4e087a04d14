"""Runs on PyTorch data sets: the rounds of plain PyTorch, for all workers, interruptions and kinds of samples."""

import copy
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import threading
import tracemalloc
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

import fedkern
from fedkern.data import DATASETS
from fedkern.data.identity import identify_memory, inspect_items
from fedkern.data.sharing.holdout import hold_out
from fedkern.data.sources.items import Items
from fedkern.errors import UserError
from fedkern.messages.leaves import Keywords, Positional, split_targets
from fedkern.methods import METHODS
from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.models.users.user_models import ItemNetwork
from fedkern.run import main
from fedkern.tasks import CLASSIFICATION, Task
from fedkern.usercode.code_identity import identity_table
from python_tests import opened_at_import, worker_methods
from python_tests.hearing import Hearing
from python_tests.interrupted import Kill, KillAt

EXAMPLES = Path(__file__).parents[2] / "examples"
QUIET = {"progress": False, "pictures": False, "workers": 1}
HERE = {**QUIET, "threads": 1, "client_threads": 1}
TWO = {**HERE, "workers": 2}


class Recorded(FedAvg):
    """FedAvg that notes the samples of every client."""

    requires = frozenset({"loss"})
    seen: ClassVar[list] = []

    def loss(self, model, batch, received):
        Recorded.seen.append((batch.phase.round, received.samples, batch.indices.copy(), batch.data))
        return super().loss(model, batch, received)


def call(network, inputs):
    if isinstance(inputs, Positional):
        return network(*inputs)
    return network(**inputs) if isinstance(inputs, Keywords) else network(inputs)


def plainly(network, sizes, loss_fn, lr, momentum):
    """Return the rounds of `Recorded` in plain PyTorch."""
    rounds = 1 + max(turn for turn, *_ in Recorded.seen)
    for turn in range(rounds):
        uploads = []
        for size in sizes:
            local = copy.deepcopy(network).train()
            trained = [parameter for parameter in local.parameters() if parameter.requires_grad]
            optimiser = torch.optim.SGD(trained, lr, momentum)
            for *_, batch in [entry for entry in Recorded.seen if entry[:2] == (turn, size)]:
                inputs, targets = split_targets(batch)
                optimiser.zero_grad()
                loss_fn(call(local, inputs), targets).backward()
                optimiser.step()
            uploads.append(local.state_dict())
        mean = dict.fromkeys(uploads[0], 0.0)
        for size, upload in zip(sizes, uploads, strict=True):
            for name, value in upload.items():
                mean[name] = mean[name] + size / sum(sizes) * value.double()
        network.load_state_dict({name: value.to(uploads[0][name].dtype) for name, value in mean.items()})
    return network


@pytest.mark.sampled(3)
@pytest.mark.parametrize("example", ["table", "text", "volumes", "regression", "frozen"])
def test_it_is_the_run_of_plain_pytorch(example, tmp_path):
    Recorded.seen = []
    given = runpy.run_path(str(EXAMPLES / f"{example}.py"))["given"]
    found = fedkern.simulate(Recorded, **given, rounds=2, lr=0.05, out=tmp_path / "run", **HERE)
    sites = given["data"].values() if isinstance(given["data"], dict) else given["data"]
    sizes, config = [len(site) for site in sites], found.config
    assert (config.clip_norm, config.weight_decay, config.lr_decay, config.augment) == (0, 0, 1, "none")
    loss_fn = given.get("loss_fn", nn.functional.cross_entropy)
    plain = plainly(copy.deepcopy(given["model"]), sizes, loss_fn, config.lr, config.momentum).state_dict()
    for name, value in found.model().state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-5)
    rows = sorted(int(row) for turn, size, rows, _ in Recorded.seen if (turn, size) == (0, sizes[0]) for row in rows)
    assert rows == sorted(list(range(sizes[0])) * config.local_epochs)  # every sample, once an epoch
    for site in sites if example != "volumes" else ():  # whose items are other ones in every epoch
        _, _, rows, batch = next(entry for entry in Recorded.seen if entry[1] == len(site))
        expected = default_collate([site[int(row)] for row in rows])
        assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))


class Drawing(Dataset):
    """Samples that draw from all three global generators."""

    def __init__(self, count, offset):
        self.count, self.offset = count, offset

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        target = (self.offset + index) % 3
        noise = 0.1 * (torch.randn(4) + float(np.random.randn()) + random.random())  # noqa: NPY002
        return torch.full((4,), float(target)) + noise, target


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def drawing(**changed):
    given = {
        "data": [Drawing(20, 0), Drawing(17, 20), Drawing(9, 37)], "validation": Drawing(8, 70), "model": network(),
        "test": {"one": Drawing(10, 50), "two": Drawing(12, 60)},
    }  # fmt: skip
    return given | changed


def state(run):
    return [value.clone() for value in run.model().state_dict().values()], run.metrics


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left[0], right[0], strict=True)) and left[1] == right[1]


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_bits_do_not_depend_on_workers_threads_and_interruptions(method, tmp_path):
    def play(name, **how):
        return fedkern.simulate(method, **drawing(), rounds=3, out=tmp_path / name, **{**HERE, **how})

    single = play("one")
    outside = torch.rand(2), np.random.rand(), random.random()  # noqa: NPY002
    assert outside
    assert same(state(single), state(play("two", workers=2)))
    assert same(state(single), state(play("threads", threads=2)))

    with pytest.raises(Kill):
        play("cut", listener=KillAt("round-start", round=2))
    again = fedkern.load(tmp_path / "cut", **drawing()).resume(progress=False, pictures=False, workers=2)
    assert same(state(single), state(again))


DRAWN = []


def hiding(items):
    """Hide values of a batch, and note the draws."""
    inputs, targets = default_collate(items)
    hidden = torch.rand(inputs.shape) < 0.3
    DRAWN.append((len(items), bytes(hidden.numpy()), float(np.random.rand()), random.random()))  # noqa: NPY002
    return torch.where(hidden, 0.0, inputs), targets


def in_a_loop(model, client):
    for _ in range(client.epochs):
        for batch in client.batches():
            nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("kind", ["items", "tensors", "loop"])
def test_every_batch_of_a_collation_has_draws_of_its_own(kind, tmp_path):
    wrap = (lambda rows: TensorDataset(*default_collate(list(rows)))) if kind == "tensors" else (lambda rows: rows)
    given = {"data": [wrap(table(20, 1)), wrap(table(20, 2))], "test": wrap(table(300, 3)), "model": nn.Linear(4, 4)}
    given |= {"collate_fn": hiding, "rounds": 2, "local_epochs": 2, "batch_size": 5}
    given |= {"train": in_a_loop} if kind == "loop" else {"lr": 0.1}
    DRAWN.clear()
    single = fedkern.simulate("fedavg", **given, out=tmp_path / "one", **HERE)
    drawn = [draws for size, *draws in DRAWN if size == 5]
    assert len(drawn) >= 32  # four batches, two epochs, rounds and clients
    of_tests = [draws for size, *draws in DRAWN if size == 64]
    for generator in range(3):
        assert len({draws[generator] for draws in drawn}) >= 32
        assert len({draws[generator] for draws in of_tests}) == 4  # the same ones in every round
    assert single.evaluate()["loss"] == single.metrics["loss"]
    assert same(state(single), state(fedkern.simulate("fedavg", **given, out=tmp_path / "two", **TWO)))


class Sampled(nn.Linear):
    """An encoder that samples as a VAE's does, in every mode."""

    def forward(self, x):
        mean = super().forward(x)
        return mean + torch.randn_like(mean)


def denoising(model, batch):
    level = torch.rand(len(batch[0]), 1)
    return nn.functional.mse_loss(model((1 - level) * batch[0] + level * torch.randn_like(batch[0])), batch[1])


def jitter_loss(outputs, targets):
    return ((outputs + random.gauss(0, 1) + np.random.randn() - targets) ** 2).mean()  # noqa: NPY002


class Shaken:
    """A metric of all outputs that draws."""

    def __call__(self, outputs, targets):
        return float((outputs[torch.randperm(len(outputs))] - targets).abs().mean())


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize(
    ("model", "given"),
    [
        (Sampled(4, 4), {"loss_fn": nn.MSELoss()}),
        (nn.Linear(4, 4), {"batch_loss": denoising}),
        (nn.Linear(4, 4), {"loss_fn": jitter_loss}),
        (nn.Linear(4, 4), {"loss_fn": nn.MSELoss(), "metrics": {"shaken": Shaken()}}),
    ],
    ids=["network", "loss of torch", "loss of Python", "metric"],
)
def test_an_evaluation_that_draws_repeats(model, given, tmp_path):
    def site(count, seed):
        inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(inputs, inputs.flip(1))

    given |= {"data": {"a": site(20, 1), "b": site(15, 2)}, "test": {"a": site(70, 3), "b": site(80, 4)}}
    given |= {"validation": site(200, 5), "model": model, "lr": 0.05}

    def play(name, rounds=3, **how):
        return fedkern.simulate("fedavg", **given, rounds=rounds, out=tmp_path / name, **{**HERE, "threads": 2, **how})

    def figures(run):
        names = ("loss", "client_metrics", "validation_loss")
        return [{name: record.get(name) for name in names} for record in run.history.records], run.metrics

    single = play("one")
    torch.rand(5), random.random()
    assert figures(play("again")) == figures(single)
    assert figures(play("two", workers=2)) == figures(single)
    assert figures(play("cut", rounds=2).extend(3, progress=False, pictures=False)) == figures(single)
    assert {name: single.evaluate()[name] for name in ("loss", "validation_loss")} == {
        name: single.metrics[name] for name in ("loss", "validation_loss")
    }


def test_evaluations_of_batches_draw_different_numbers(tmp_path):
    seen = []

    class Noted(nn.Linear):
        def forward(self, x):
            if not self.training:
                seen.append(float(torch.rand(())))
            return super().forward(x)

    run = fedkern.simulate(
        "fedavg", data=[table(20)], test={"one": table(200, 1), "two": table(200, 1)}, model=Noted(4, 4), rounds=1,
        lr=0.1, out=tmp_path / "run", **HERE,
    )  # fmt: skip
    drawn, before = seen[-8:], torch.get_rng_state()
    run.evaluate()
    assert len({*drawn}) == 8
    assert seen[-8:] == drawn
    assert torch.equal(torch.get_rng_state(), before)


SCRIPT = '''
import torch, fedkern.methods
from torch import nn
from torch.utils.data import Dataset
from python_tests.workers_first import waiting_for_workers
waiting_for_workers().__enter__()
torch.set_num_threads(2)
(torch.rand(500, 500) @ torch.rand(500, 500)).sum()  # the process's OpenMP threads are there now

class Rows(Dataset):
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.randn(3) + i % 2, torch.tensor([float(i % 2)])

class Mine(fedkern.methods.FedAvg):
    """FedAvg of this script."""
    requires = frozenset({"loss"})

net = nn.Linear(3, 1)
for count, threads in ((1, 1), (2, 1), (2, 2)):
    torch.manual_seed(0)
    run = fedkern.simulate(Mine, data=[Rows(30), Rows(20)], test=Rows(10), model=net,
        loss_fn=lambda o, t: (o - t).abs().mean(), rounds=2, out=f"run-{count}-{threads}", workers=count, threads=2,
        client_threads=threads, progress=False, pictures=False)
    print(run.metrics["loss"], run.summary["diagnostics"])
'''


@pytest.mark.exhaustive
def test_what_cannot_be_sent_is_forked(tmp_path):
    # Classes and lambdas of a script that has computed on two threads.
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    lines = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, timeout=120, capture_output=True, text=True,
        check=True,
    ).stdout.splitlines()  # fmt: skip
    assert len(lines) == 3
    assert lines[0] == lines[1]
    assert lines[0].endswith("{}")
    assert "which is defined in __main__, cannot be sent to worker processes: define it in a module" in lines[2]


# -- kinds of samples --------------------------------------------------------------------------------------------------


class Listed(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def pad_rows(items):
    """Pad ragged rows, which torch's own collation refuses."""
    rows = nn.utils.rnn.pad_sequence([item["row"] for item in items], batch_first=True)
    return {"row": rows, "labels": torch.stack([item["labels"] for item in items])}


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 2)

    def forward(self, row):
        return {"logits": self.head(row.mean(1, keepdim=True))}


class Two(nn.Module):
    """A network with two inputs."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(3, 2)

    def forward(self, left, right):
        return self.one(left) + self.two(right)


def rows_of(count, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
    return Listed([{"row": torch.rand(n, generator=generator), "labels": torch.tensor(n % 2)} for n in lengths])


def triples(count):
    return Listed([(torch.rand(2), torch.rand(3), index % 2) for index in range(count)])


def masked_loss(outputs, targets):
    """Return the loss of the known targets."""
    known = targets.isfinite()
    return ((outputs - targets.nan_to_num()) * known).square().sum() / known.sum().clamp_min(1)


def partly(count):
    targets = torch.rand(count, 2)
    targets[::3, 0] = float("nan")
    return TensorDataset(torch.rand(count, 3), targets)


class Attributes(nn.Linear):
    def forward(self, batch):
        logits = super().forward(batch.x)
        return SimpleNamespace(logits=logits, states=(logits.detach(),))


def attributes(items):
    x, labels = default_collate(items)
    return SimpleNamespace(x=x, labels=labels)


KINDS = {
    "ragged": {"data": [rows_of(12, 0), rows_of(9, 1)], "test": rows_of(8, 2), "model": Mean(), "collate_fn": pad_rows},
    "three parts": {"data": [triples(12), triples(9)], "test": triples(6), "model": Two()},
    "missing targets": {"data": [partly(12), partly(9)], "test": partly(6), "model": nn.Linear(3, 2),
                        "loss_fn": masked_loss},
    "numbers in steps": {
        "data": [TensorDataset(torch.rand(9, 5, 7), torch.randint(3, (9, 7)))], "model": nn.Conv1d(5, 3, 1),
        "test": TensorDataset(torch.rand(9, 5, 7), torch.randint(3, (9, 7))),
    },
    "whole loss": {
        "data": [rows_of(12, 0)], "test": rows_of(8, 2), "model": Mean(), "collate_fn": pad_rows,
        "batch_loss": lambda model, batch: nn.functional.cross_entropy(model(batch["row"])["logits"], batch["labels"]),
        "metrics": {"size": lambda model, batch: len(batch["labels"])},
    },
    "objects": {
        "data": [TensorDataset(torch.rand(12, 3), torch.arange(12) % 3)], "model": Attributes(3, 3),
        "test": TensorDataset(torch.rand(8, 3), torch.arange(8) % 3), "collate_fn": attributes,
        "loss_fn": lambda outputs, targets: nn.functional.cross_entropy(outputs.logits, targets),
        "metrics": {"rows": lambda outputs, targets: len(outputs.logits) == len(targets) == len(outputs.states[0])},
    },
}  # fmt: skip

KEPT = {"whole loss": dict, "objects": SimpleNamespace}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_sample(kind, tmp_path):
    found = fedkern.simulate("fedavg", **KINDS[kind], rounds=2, out=tmp_path / "run", **HERE)
    assert np.isfinite(found.metrics["loss"])
    main = "accuracy" if kind in ("ragged", "three parts") else "loss"
    assert (found.config.main, found.config.better) == (main, "min" if main == "loss" else "max")
    again = fedkern.load(tmp_path / "run", **KINDS[kind])
    assert again.evaluate() == pytest.approx(found.metrics)
    assert again.report().stat().st_size > 10_000
    assert isinstance(again.predict(KINDS[kind]["test"]), KEPT.get(kind, torch.Tensor))


def test_parts_of_a_batch():
    x, z, labels = torch.rand(2, 1), torch.rand(2, 1), torch.rand(2)
    assert split_targets([x, labels])[0] is x
    assert split_targets((x, z, labels)) == (Positional((x, z)), labels)
    assert split_targets({"x": x, "labels": labels}) == (Keywords({"x": x}), labels)
    assert split_targets({"x": x}) == ({"x": x}, None)
    pair = ItemNetwork(Two(), None, raw=False)
    inputs = torch.rand(2, 2), torch.rand(2, 3)
    assert torch.equal(pair(Positional(inputs)), pair(Keywords(left=inputs[0], right=inputs[1])))


def test_tensors_in_memory_are_indexed_as_they_are():
    """The batches are those of torch's collation, for torch's own sets only."""
    longer, shorter = (TensorDataset(torch.rand(n, 2), torch.arange(n)) for n in (7, 5))
    joined = ConcatDataset([Subset(longer, [6, 1, 2]), shorter])
    split = Items(joined, "data", CLASSIFICATION, default_collate)
    rows = [7, 0, 3, 2, 2]
    assert split.is_deterministic
    assert not Items(Listed([1, 2]), "data", CLASSIFICATION, default_collate).is_deterministic
    for found, expected in zip(split.batch(rows, 0), default_collate([joined[row] for row in rows]), strict=True):
        assert torch.equal(found, expected)


def table(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 4, generator=generator)
    return TensorDataset(rows, (rows @ torch.ones(4, 3).cumsum(1)).argmax(1) + rows[:, 0].gt(0).long())


def test_one_set_is_shared_out(tmp_path):
    pool = TensorDataset(torch.randn(60, 4), torch.arange(60) % 3)
    found = fedkern.simulate(
        "fedavg", data=pool, test=table(9), clients=3, partition="dirichlet:0.5", train_samples=50,
        model=nn.Linear(4, 4), rounds=1, out=tmp_path / "run", **HERE,
    )  # fmt: skip
    sizes = [entry["samples"] for entry in found.history.records[-1]["clients"].values()]
    assert (len(sizes), sum(sizes)) == (3, 50)
    again = fedkern.load(tmp_path / "run", data=pool, test=table(9), model=nn.Linear(4, 4))
    assert again.evaluate() == pytest.approx(found.metrics)


class Stated(Drawing):
    """Samples with an attribute that names classes."""

    def __init__(self, count, targets):
        super().__init__(count, 0)
        self.targets = targets


class Numbered(nn.Linear):
    def __init__(self, classes=4):
        super().__init__(4, classes)


def test_a_network_keeps_its_default_where_the_data_name_no_classes(tmp_path):
    data = {"data": [table(20, 1), table(20, 2)], "test": table(30, 3), "rounds": 1}
    assert fedkern.simulate("fedavg", **data, model=Numbered, out=tmp_path / "run", **HERE).model().out_features == 4


@pytest.mark.parametrize(
    ("dataset", "warned"),
    [
        (Stated(30, [0] * 30), "its attribute states the class 0 of item 1, whose target is 1"),
        (Stated(30, ["cat"] * 30), "give the data set an attribute targets of whole numbers"),
        (Drawing(30, 0), "give the data set an attribute targets of whole numbers"),
        (Stated(30, [row % 3 for row in range(30)]), None),
        (Subset(ConcatDataset([table(9), TensorDataset(torch.rand(30, 4), torch.arange(30) % 3)]), range(9, 39)), None),
    ],
    ids=range(5),
)
def test_stated_classes_are_compared_with_items(dataset, warned, recwarn):
    before = torch.get_rng_state()
    data = fedkern.FederatedData.from_datasets(dataset, table(6), partition="classes:1", count=3)
    assert sorted(data.statistics.counts.tolist()) == [[0, 0, 10], [0, 10, 0], [10, 0, 0]]
    assert torch.equal(torch.get_rng_state(), before)
    told = [str(warning.message).partition("read once for their classes: ")[2] for warning in recwarn]
    assert told == ([f"{warned}."] if warned else [])


@pytest.mark.parametrize(
    ("held", "sets"), [({"client_test": 0.3}, {""}), ({"held_out_client": "south"}, {"", "held_out"})]
)
def test_samples_are_held_out(held, sets, tmp_path):
    data = {"north": table(30), "south": table(20, 1), "east": table(20, 2)}
    found = fedkern.simulate(
        "fedavg", data=data, test=table(9, 3), model=nn.Linear(4, 4), rounds=1, out=tmp_path / "run", **held, **HERE
    )
    assert {f"{name}_accuracy".strip("_") for name in sets} <= {*found.metrics}
    clients = found.history.records[-1]["clients"].values()
    assert [entry["samples"] for entry in clients] == ([21, 14, 14] if "client_test" in held else [30, 20])
    assert bool(found.summary.get("client_metrics")) is ("client_test" in held)


def test_validation_sets_are_taken_together(tmp_path):
    given = {"data": {"a": table(30), "b": table(20, 1)}, "test": table(12, 2), "model": nn.Linear(4, 4), "rounds": 1}
    parts, joined = {"a": table(7, 3), "b": table(8, 4)}, ConcatDataset([table(7, 3), table(8, 4)])
    how = {**given, **HERE}
    several = fedkern.simulate("fedavg", **how, validation=parts, out=tmp_path / "several").metrics
    assert several == fedkern.simulate("fedavg", **how, validation=joined, out=tmp_path / "one").metrics
    assert "validation_accuracy" in several
    private = fedkern.simulate("fedavg", **how, validation=parts, records="private", out=tmp_path / "private").metrics
    assert "validation_accuracy" not in private


def test_every_client_has_its_own_test_set(tmp_path):
    data, test = {"a": table(20), "b": table(16, 1)}, {"a": table(8, 2), "b": table(6, 3)}
    found = fedkern.simulate(
        "fedavg", data=data, test=test, model=nn.Linear(4, 4), rounds=1, out=tmp_path / "run", **HERE
    )
    own = found.summary["client_metrics"]
    assert {*own} == {"0", "1"}
    mean = sum(len(test[name]) * own[str(k)]["accuracy"] for k, name in enumerate(test)) / 14
    assert found.metrics["accuracy"] == pytest.approx(mean)


# -- losses and figures ------------------------------------------------------------------------------------------------


def first_loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)


def second_loss(outputs, targets):
    return 2 * nn.functional.cross_entropy(outputs, targets)


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, outputs, targets):
        self.calls += 1
        return nn.functional.cross_entropy(outputs, targets)


class Averaging(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def forward(self, outputs, targets):
        loss = nn.functional.cross_entropy(outputs, targets)
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        return loss


def logging_loop():
    losses = []

    def train(model, client):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for batch in client.batches():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch.inputs), batch.targets)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))

    return train


@pytest.mark.parametrize(
    ("name", "make"), [("loss_fn", Counting), ("loss_fn", Averaging), ("train", logging_loop)], ids=range(3)
)
def test_objects_that_change_while_they_run_go_on(name, make, tmp_path):
    how, loss = {**GOOD, "data": [table(9), table(9, 1)]}, make()
    run = fedkern.simulate("fedavg", **how, **{name: loss}, rounds=1, out=tmp_path / "run", **HERE)
    before = identity_table({name: make()})
    assert identity_table({name: loss}) != before
    run.evaluate()
    run.extend(2, **QUIET)
    fedkern.load(tmp_path / "run", **how, **{name: loss}).extend(3, **QUIET)
    fedkern.load(tmp_path / "run", **how, **{name: make()}).extend(4, **QUIET)  # as in another process
    if make is Counting:
        loss.calls = -5
        with pytest.raises(UserError, match=r"\(`loss_fn.calls` changed from 0 to -5\): put back the former one"):
            fedkern.load(tmp_path / "run", **how, loss_fn=loss).extend(5, **QUIET)


class Scaled(nn.Linear):
    def __init__(self, scale):
        super().__init__(4, 4)
        self.scale = scale

    def forward(self, x):
        return self.scale * super().forward(x)


def test_a_network_of_other_code_is_refused(tmp_path, monkeypatch):
    how = {"data": [table(9)], "test": table(6)}
    fedkern.simulate("fedavg", **how, model=Scaled(1), rounds=1, out=tmp_path / "run", **HERE)
    with pytest.raises(UserError, match=r"the network Scaled has changed .* \(`model.scale` changed from 1 to 2\)"):
        fedkern.load(tmp_path / "run", **how, model=Scaled(2)).extend(2, **QUIET)
    fedkern.load(tmp_path / "run", **how, model=Scaled(1)).extend(2, **QUIET)  # of other weights
    extended = fedkern.load(tmp_path / "run", **how, model=Scaled(2), trusted=["model"]).extend(3, **QUIET)
    assert "goes on with the network Scaled as it is now" in extended.summary["diagnostics"]["other-code"]
    monkeypatch.setattr(Scaled, "forward", nn.Linear.forward)
    with pytest.raises(UserError, match=r"\(`Scaled.forward` changed"):
        fedkern.load(tmp_path / "run", **how, model=Scaled(1)).extend(4, **QUIET)


def without_things(items):
    return default_collate([item[:2] for item in items])


def test_items_count_with_their_objects_and_what_does_not_is_told(tmp_path):
    def how(thing):
        train, second = (Listed([(*item, thing) for item in rows]) for rows in (table(9), table(6, 1)))
        return {"data": [train], "test": second, "model": nn.Linear(4, 4), "collate_fn": without_things}

    fedkern.simulate("fedavg", **how(Counting()), rounds=1, out=tmp_path / "run", **HERE)
    counter = Counting()
    counter.calls = 1
    with pytest.raises(UserError, match="The data are not those"):
        fedkern.load(tmp_path / "run", **how(counter)).extend(2, **QUIET)
    fedkern.load(tmp_path / "run", **how(Counting())).extend(3, **QUIET)
    heard = Hearing()
    fedkern.simulate("fedavg", **how(threading.Lock()), rounds=1, out=tmp_path / "lock", **HERE, listener=heard)
    assert heard.notices == ["Resuming does not check `item[2]` (lock, TypeError) for changes."]


# -- what is not taken -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "changed"),
    [
        (np.array(["a", "b"])[0], np.array(["a", "b"])[1]), (np.array(["a"]), np.array(["b"])),
        (Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 9)), (torch.zeros(2), torch.ones(2)), (1.0, 2.0),
        (b"a", b"b"), ({"x": 1}, {"x": 2}),
        (np.datetime64("2026-01-01"), np.datetime64("2026-01-02")),
    ],
)  # fmt: skip
def test_items_of_any_kind_have_hashes(item, changed):
    def digest(value):
        return inspect_items(Items(Listed([value]), "x", CLASSIFICATION, default_collate)).digest

    assert digest(item) == digest(copy.deepcopy(item)) != digest(changed)


class Opened(Dataset):
    """Items of an open file, whose position forked processes would share."""

    def __init__(self, path, count):
        self.file, self.count = path.open("rb"), count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.file.seek(4 * index)
        return torch.frombuffer(bytearray(self.file.read(4)), dtype=torch.uint8).float(), index % 2


def test_open_files_are_not_shared_by_a_fork(tmp_path):
    (tmp_path / "values").write_bytes(bytes(range(200)))
    given = {"data": [Opened(tmp_path / "values", 20), Opened(tmp_path / "values", 30)], "model": nn.Linear(4, 2)}
    given |= {"test": Opened(tmp_path / "values", 9), "rounds": 2}
    told = fedkern.simulate("fedavg", **given, out=tmp_path / "run", **TWO)
    single = fedkern.simulate("fedavg", **given, out=tmp_path / "alone", **HERE)
    said = r"cannot be pickled .*: open files and connections where an item is read to have them side by side"
    assert re.search(said, told.summary["diagnostics"]["no-workers"])
    assert same(state(told), state(single))


@pytest.mark.parametrize("loss", ["of a module", "lambda"])
@pytest.mark.parametrize("kind", ["descriptor", "cached", "module"])
def test_workers_have_positions_of_their_own_in_open_files(kind, loss, tmp_path, processes):
    loss_fn = nn.CrossEntropyLoss() if loss == "of a module" else (lambda o, t: nn.functional.cross_entropy(o, t))
    data = opened_at_import.Bytes(kind, 0, 90)
    given = {"data": [Subset(data, range(45)), Subset(data, range(45, 90))], "model": nn.Linear(2, 3), "rounds": 2}
    given |= {"test": opened_at_import.Bytes(kind, 90, 40), "loss_fn": loss_fn, "lr": 0.1}
    two = fedkern.simulate("fedavg", **given, out=tmp_path / "two", **TWO)
    assert len(processes) == 2
    assert same(state(two), state(fedkern.simulate("fedavg", **given, out=tmp_path / "one", **HERE)))


@pytest.mark.parametrize("method", ["fedavg", worker_methods.Counting], ids=["lambda", "class of a module"])
def test_a_process_with_threads_is_not_forked(method, tmp_path, processes):
    given = {"data": [table(20, 1), table(20, 2)], "test": table(9), "model": nn.Linear(4, 4), "rounds": 1, "lr": 0.1}
    named = method != "fedavg"  # code that another process imports
    given |= {} if named else {"loss_fn": lambda o, t: nn.functional.cross_entropy(o, t)}
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        run = fedkern.simulate(method, **given, out=tmp_path / "run", **TWO)
    finally:
        end.set()
        thread.join()
    assert len(processes) == 2 * named
    assert named or (
        "cannot be sent to worker processes, and a process that has threads cannot be forked: define it in a module "
        in (run.summary["diagnostics"]["no-workers"])
    )


class Scheduled(nn.Module):
    """A loss that smooths more with every batch, counted in a buffer, an attribute or a generator."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.count, self.generator = kind, 0, np.random.default_rng(0)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, outputs, targets):
        loss = nn.functional.cross_entropy(outputs, targets)
        if outputs.requires_grad and self.kind == "mean":
            self.mean.mul_(0.9).add_(0.1 * loss.detach())
        self.count += outputs.requires_grad and self.kind == "count"
        noise = self.generator.random() if outputs.requires_grad and self.kind == "generator" else 0
        return loss * (1 + self.count + self.mean + noise)


STEPS = []


def counted_in_a_global(outputs, targets):
    STEPS.append(0)
    return nn.functional.cross_entropy(outputs, targets, label_smoothing=1 / len(STEPS))


class Collation:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def join(self, items):
        inputs, targets = default_collate(items)
        return inputs + torch.randn(inputs.shape, generator=self.generator), targets


def make_counter(kind):
    calls = []

    def train(model, client):
        calls.append(0)
        in_a_loop(model, client)

    def factory(parameters):
        calls.append(0)
        return torch.optim.SGD(parameters, lr=0.1 / len(calls))

    return train if kind == "train" else factory


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"loss_fn": Scheduled("count"), "lr": 0.1}, r"Clients change loss_fn\.count as"),
        ({"loss_fn": Scheduled("mean"), "lr": 0.1}, r"Clients change loss_fn\.mean as"),
        ({"loss_fn": Scheduled("generator"), "lr": 0.1}, r"Clients change loss_fn\.generator\S* as"),
        ({"loss_fn": counted_in_a_global, "lr": 0.1}, r"Clients change loss_fn\.STEPS as"),
        ({"collate_fn": Collation().join, "lr": 0.1}, r"Clients change collate_fn\.__self__\.generator\S* as"),
        ({"train": make_counter("train")}, r"Clients change train\.calls as"),
        ({"optimizer": make_counter("optimizer")}, r"Clients change optimizer\.calls as"),
        ({"loss_fn": Scheduled("nothing"), "lr": 0.1, "collate_fn": partial(default_collate)}, None),
        ({"train": in_a_loop}, None),
        ({"optimizer": partial(torch.optim.SGD, lr=0.1)}, None),
    ],
)
def test_state_that_clients_leave_in_a_users_objects_is_told(given, told, tmp_path):
    given = {"data": [table(20, 1), table(20, 2)], "test": table(30, 3), "model": nn.Linear(4, 4), "rounds": 1, **given}
    found = fedkern.simulate("fedavg", **given, out=tmp_path / "run", **HERE).summary["diagnostics"].get("python-state")
    assert (found is None) == (told is None)
    assert told is None or re.match(told + r" they work, .* or in client\.state\.$", found)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x):
        return [self.left(x), self.right(x)]


def both(outputs, targets):
    return sum(nn.functional.mse_loss(*pair) for pair in zip(outputs, targets, strict=True))


@pytest.mark.parametrize("size", [4, 64])
def test_several_targets_and_outputs_are_put_together_by_place(size, tmp_path):
    def rows(count):
        return Listed([(torch.full((3,), float(i)), (torch.tensor([float(i)]), torch.zeros(1))) for i in range(count)])

    seen = {}

    def first(outputs, targets):
        seen["shapes"] = [len(outputs), len(targets), *targets[0].shape]
        return targets[0].mean()

    given = {"data": [rows(12)], "test": rows(11), "model": Heads(), "loss_fn": both, "metrics": {"first": first}}
    run = fedkern.simulate("fedavg", **given, rounds=1, batch_size=size, out=tmp_path / "run", **HERE)
    assert seen["shapes"] == [2, 2, 11, 1]
    assert run.metrics["first"] == 5.0
    assert [leaf.shape for leaf in run.predict(rows(7))] == [(7, 1), (7, 1)]


def test_prediction_needs_no_targets(tmp_path):
    given = {"data": [table(12)], "test": table(6), "model": nn.Linear(4, 4), "rounds": 1}
    run = fedkern.simulate("fedavg", **given, out=tmp_path / "run", **HERE)
    rows = table(5).tensors[0]
    assert torch.equal(run.predict(TensorDataset(rows)), run.predict(table(5)))
    assert torch.equal(run.predict(rows.numpy()), run.predict(rows))
    with pytest.raises(UserError, match=r"the network returns \[4\]: give samples one axis more"):
        run.predict(rows[0])
    with pytest.raises(UserError, match="the network fails on the samples"):
        run.predict(rows.double())
    two = fedkern.simulate(
        "fedavg", data=[triples(12)], test=triples(6), model=Two(), rounds=1, out=tmp_path / "two", **HERE
    )
    left, right = torch.rand(5, 2), torch.rand(5, 3)
    assert torch.equal(two.predict(TensorDataset(left, right)), two.predict((left, right)))


def test_an_unseen_client_leaves_pooled_sets(tmp_path):
    own = {name: table(count, seed) for seed, (name, count) in enumerate({"a": 5, "b": 6, "c": 7}.items(), 5)}
    data = fedkern.FederatedData.from_datasets({name: table(12, k) for k, name in enumerate("abc")}, own)
    kept = hold_out(data, held_out="a", share=0.0, seed=0)
    assert {name: len(split) for name, split in kept.tests.items()} == {"": 13, "held_out": 17}


def batch_loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Broken(Listed):
    def __getitem__(self, index):
        if index == 7:
            raise OSError("disk")
        return super().__getitem__(index)


class Long(Listed):
    def __len__(self):
        return self.items

    def __getitem__(self, index):
        return torch.full((4,), index % 3 - 1.0), index % 3


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.rand(4), 0


GOOD = {"data": [table(9)], "test": table(6), "model": nn.Linear(4, 4)}
NINE = Listed([(torch.rand(4), number // 8) for number in range(9)])
SENTENCES = {
    "alike": ({"data": {1: table(4), "1": table(5)}}, 'Two of the clients are called "1", as their keys are the same'),
    "alike tests": ({"test": {None: table(4), "None": table(5)}}, 'Two of the test sets are called "None"'),
    "alike validation": ({"validation": {b"a": table(4), "b'a'": table(5)}}, "Two of the validation sets are called"),
    "splits": ({"data": {name: table(4) for name in ("train", "validation", "test")}, "test": None},
               r'as the splits of one data set d, .*: give data=d\["train"\], validation=d\["validation"\] and test=d'),
    "splits and more": ({"data": {name: table(4) for name in ("Train", "test_matched", "unsupervised")}},
                        "clients are called Train, test_matched, unsupervised, as the splits of one data set"),
    "test set": ({"data": {"a": GOOD["test"]}}, "The test set is the data set that client a trains on: give test="),
    "half": ({"data": [Long(2.5)]}, r"client 0 has no length that is a whole number from 0 \(TypeError: 'float'"),
    "below": ({"test": {"a": Long(-1)}}, r"test a has no length that is a whole number from 0 \(ValueError"),
    "long": ({"data": [Long(10**9)]}, "client 0 has 1,000,000,000 samples, .*train_samples=N"),
    "long test": ({"test": Long(10**9), "train_samples": 4}, "test has 1,000,000,000 samples, .*Subset"),
    "broadcast": ({"data": [TensorDataset(torch.rand(9, 4), torch.rand(9, 4))], "loss_fn": nn.MSELoss(),
                   "test": TensorDataset(torch.rand(6, 4), torch.rand(6))}, "A batch of the test set is .*target size"),
    "class of a loss": ({"test": {"far": TensorDataset(torch.rand(6, 4), torch.arange(6))},
                         "loss_fn": nn.CrossEntropyLoss()}, "The classes of the test set far are 0 to 5, not 0 to"),
    "many classes": ({"data": Long(10**9), "train_samples": 4, "partition": "stratified"}, "too many to read"),
    "loader": ({"data": [DataLoader(table(9), 4)]}, r"client 0 is a DataLoader: give its dataset and collate_fn; its "
               r"batch size \(4\) and sampler \(SequentialSampler\) are the run's own"),
    "stream": ({"data": [Endless()]}, r"client 0 has no length and no order \(Endless\): give a map-style data set"),
    "pair": ({"data": [(np.zeros((9, 4)), np.zeros(9, np.int32))]}, r"client 0 is a pair of arrays: give .*Dataset"
             r"\(torch.from_numpy\(X\).float\(\), torch.from_numpy\(y\).long\(\)\)"),
    "whole pair": ({"data": (torch.rand(9, 4), torch.zeros(9).long())}, r"data is a pair of arrays: .*et\(X, y\)\."),
    "array": ({"test": np.zeros((9, 4), np.float32)}, r"^test is an array: .*Dataset\(torch.from_numpy\(X\), y\)\."),
    "samples": ({"data": [[(torch.rand(4), 0)]]}, "client 0 is a list of samples: give a data set"),
    "splits of a": ({"data": {"a": {"train": table(4), "test": table(4)}}}, "client a is a dict, of train, test: give"),
    "late class": ({"test": Listed([(torch.rand(4), row) for row in (0, 1, 2, 9)])}, "4 outputs for 10 classes, as"),
    "late -1": ({"test": Listed([(torch.rand(4), row) for row in (0, 1, -1)])}, "a target is -1, and classes are num"),
    "texts": ({"data": [Listed([(torch.rand(4), "cat")] * 3)]}, "a loss is needed, as the targets, .*, are texts"),
    "labels as texts": ({"data": [Listed([(torch.rand(3, 8, 8), "cat")] * 9)],
                         "test": Listed([(torch.rand(3, 8, 8), "cat")] * 4)},
                        "model has no effect on images with texts: leave it out, or give classes as whole numbers"),
    "nothing": ({"data": [object()]}, "client 0 must be a map-style data set, with len and .index., not an object of"),
    "no client": ({"data": {}}, "data must hold at least one client's data set"),
    "empty client": ({"data": {"a": table(4), "b": Listed([])}}, "client b has no samples: leave it out"),
    "no test": ({"test": None}, "There is no test set: give test=DATASET"),
    "one own test": ({"data": {"a": table(4), "b": table(4)}, "test": {"a": table(4)}}, "client b has no test set"),
    "doubles": ({"data": [TensorDataset(torch.rand(9, 4).double(), torch.zeros(9).long())]},
                r"return float32, as x\.float\(\) does"),
    "numbers": ({"data": [TensorDataset(torch.rand(9, 4), torch.rand(9))]},
                "a loss is needed, as the targets, .*, are float32 numbers: give classes as whole numbers"),
    "unnamed": ({"data": [Listed([{"x": torch.rand(4), "answer": 1}] * 3)]},
                "nothing of a sample is its target, only x, answer: give samples"),
    "no pair": ({"data": [Listed([torch.rand(4)] * 3)], "loss_fn": nn.MSELoss()},
                "nothing of a sample is its target, as a batch is no tuple"),
    "no tests": ({"test": {}}, "There is no test set: give test=DATASET"),
    "vector": ({"loss_fn": nn.CrossEntropyLoss(reduction="none")},
               r"loss_fn must return one number, .* returns a tensor \[9\]: take the mean"),
    "metric": ({"metrics": {"hits": lambda _, b: b}}, r"hits must return one number, .* a tensor \[6\]: take the mean"),
    "axis": ({"data": [TensorDataset(torch.rand(9, 4), torch.zeros(9, 1).long())]}, "float32 .9, 4. and int64 .9, 1. "),
    "unnamed classes": ({"model": lambda classes: nn.Linear(4, classes)}, "needs the argument classes: the data name"),
    "no function": ({"loss_fn": 3}, "loss_fn must be a function or a module"),
    "model first": ({"loss_fn": batch_loss}, "first parameter of this one is called model: give it as batch_loss=, or"),
    "outputs first": ({"batch_loss": first_loss}, r"batch_loss takes \(model, batch\), .*: give it as loss_fn="),
    "two losses": ({"loss_fn": nn.MSELoss(), "batch_loss": max}, "loss_fn and batch_loss are both given: leave one"),
    "classes": ({"model": nn.Linear(4, 2), "data": [TensorDataset(torch.rand(9, 4), torch.full((9,), 5))]},
                "has 2 outputs for 6 classes, as a target is 5: give it as many outputs"),
    "network": ({"model": nn.Linear(3, 2)}, r"fails on two samples of client 0, .*mat1 and mat2.* a dict's"),
    "of fedkern": ({"model": "cnn"}, "the network cnn is for images .C, H, W. .*samples have one input of"),
    "ragged": ({"data": [rows_of(9, 2)], "model": Mean()}, "Items 0, 1 of client 0 make no batch .*or collate_fn"),
    "ragged pool": ({"data": rows_of(9, 2), "model": Mean(), "clients": 2}, "Items 0, 1 of data make no batch"),
    "augment": ({"augment": "crop"}, 'augment="crop" is for images .C, H, W.; samples'),
    "scale": ({"normalize": (0.0, 1.0)}, "^normalize is for images .C, H, W.; samples have one input of shape"),
    "processes": ({"num_workers": 2}, "num_workers is a DataLoader's: workers are the clients' processes"),
    "shuffling": ({"shuffle": True}, "shuffle is a DataLoader's: every epoch takes all samples of a client in random"),
    "partition": ({"partition": "iid"}, "partition has no effect on data in memory"),
    "clients": ({"clients": 4}, 'clients is "4", and the data have 1'),
    "option": ({"data_options": {"cue_clients": 1}}, "cue_clients has no effect on data in memory"),
    "width": ({"width": 3}, "width has no effect on a module"),
    "metric's class": ({"metrics": {"mae": nn.L1Loss}}, r"the metric mae is the class L1Loss: make .*, L1Loss\(\)"),
    "loss's class": ({"loss_fn": nn.CrossEntropyLoss}, "loss_fn is the class CrossEntropyLoss: make an object of it"),
    "list of metrics": ({"metrics": [first_loss]}, 'metrics must be a dict by name, such as {"mae": FUNCTION}, not'),
    "metric's bytes": ({"metrics": {"\udcff": first_loss}}, r'the metric "\\xff" has bytes that are not UTF-8'),
    "client's bytes": ({"data": {"\udcff": table(9)}}, r'the client "\\xff" has bytes .*: give it another name\.'),
    "class's bytes": ({"classes": ["a", "b", "c", "\ud800"]}, r'the class "\\ud800" has bytes that are not UTF-8'),
    "test's bytes": ({"test": {"\udcff": table(6)}}, r'the test set "\\xff" has bytes that are not UTF-8'),
    "folder's bytes": ({"out": "\udcff"}, r'the folder "\\xff" has bytes that are not UTF-8: rename'),
    "few outputs": ({"data": [NINE], "test": NINE, "model": nn.Linear(4, 1), "classes": None},
                    "has 1 outputs for 2 classes, as a target is 1: give it as many"),
    "stages": ({"stages": ["0"]}, "stages is for images, and the samples of these data are none: leave it out"),
    "features": ({"features": "0", "batch_loss": lambda network, batch: network(batch[0]).sum()},
                 "are for a network of your own that gives logits, not module:Linear"),
    "broken item": ({"data": [table(9), Broken([(torch.rand(4), 0)] * 9)]},
                    r"Item 7 of client 1 cannot be read \(OSError: disk\)"),
    "two forms": ({"validation": {"a": table(4), "b": Listed([(torch.rand(4), 2)] * 4)}},
                  "Items 3, 4 of the validation set make no batch"),
    "named loss": ({"metrics": {"loss": first_loss}}, "metrics has one called loss"),
    "ten classes": ({"classes": 10}, "has 4 outputs, but the data have 10 classes"),
    "class": ({"classes": ["a"]}, "classes must name at least 2"),
    "number": ({"data": table(9), "clients": "two"}, 'clients must be an integer, not "two"'),
    "patients": ({"dp_clip": 1.0, "dp_noise": 1.0, "privacy_unit": "patient"}, "patient"),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "said"), SENTENCES.values(), ids=SENTENCES)
def test_what_is_not_taken_is_one_sentence(changed, said, tmp_path):
    with pytest.raises(UserError, match=said) as told:
        fedkern.simulate("fedavg", **{**GOOD, "rounds": 1, "out": tmp_path / "run", **HERE, **changed})
    assert "\n" not in str(told.value)
    assert told.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def odd(inputs=4, targets=None, *, kind=torch.float32, parts=1, label=torch.int64):
    targets = torch.arange(6) % 3 if targets is None else targets
    return TensorDataset(*[torch.rand(6, inputs, dtype=torch.float64).to(kind)] * parts, targets.to(label))


ODD = {
    "doubles": (odd(kind=torch.float64), r"\[float64 \[2, 4\], int64 \[2\]\], not \[float32 \[2, 4\], int64 \[2\]\]"),
    "width": (odd(5), r"float32 \[2, 5\]"), "floats": (odd(label=torch.float32), r", float32 \[2\]\], not"),
    "column": (odd(targets=torch.zeros(6, 1)), r"int64 \[2, 1\]"), "three parts": (odd(parts=2), "TypeError"),
    "truths": (odd(label=torch.bool), r"bool \[2\]"),
    "one part": (TensorDataset(torch.rand(6, 4)), r"is \[float32 \[2, 4\]\], not"),
    "keys": (Listed([{"x": torch.rand(4), "labels": 0}] * 6), r"is \{x: float32 \[2, 4\], labels: int64"),
    "a class": (odd(targets=torch.arange(6)), "The classes of .* are 0 to 5, not 0 to 3"),
    "unstated": (Listed([(torch.rand(4), 7)] * 6), "The classes of .* are 7 to 7, not 0 to 3"),
    "below 0": (Subset(odd(targets=torch.arange(6) - 1), [1, 2, 0]), "are -1 to [13], not"),
}  # fmt: skip
PLACES = {
    "client b": ("data", "b"), "test set farther": ("test", "farther"), "test set of b": ("test", "b"),
    "the validation set": ("validation", "b"),
}  # fmt: skip


@pytest.mark.sampled(4)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("odd_set", "said"), ODD.values(), ids=ODD)
def test_sets_of_another_form_are_named_before_the_run(odd_set, said, place, tmp_path):
    sets = {"data": {"a": table(9), "b": table(8)}, "validation": {"a": table(7)}}
    sets["test"] = {"a" if place == "test set of b" else "far": table(6)}
    sets[PLACES[place][0]][PLACES[place][1]] = odd_set
    with pytest.raises(UserError, match=said) as told:
        fedkern.simulate("fedavg", **sets, model=nn.Linear(4, 4), rounds=1, out=tmp_path / "run", **HERE)
    assert place in str(told.value)
    assert "round" not in str(told.value)
    assert not (tmp_path / "run").exists()


class Unloaded(Drawing):
    """Samples whose classes are unknown until all are read."""

    @property
    def targets(self):
        raise OSError("no index")


class Lenient(nn.Linear):
    """A network that takes several dtypes, and optional inputs."""

    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x, mask=None):
        return super().forward(x.float())


class Converting(FedAvg):
    requires = frozenset({"loss"})

    def loss(self, model, batch, received):
        batch.inputs = batch.inputs.float()
        return super().loss(model, batch, received)


def converting_loop(model, client):
    for batch in client.batches():
        nn.functional.cross_entropy(model(batch.inputs.float()), batch.targets).backward()


@pytest.mark.parametrize(
    "given",
    [
        {"model": Lenient(), "test": odd(kind=torch.float64, parts=2)},
        {"data": [table(9), odd(kind=torch.float64)], "method": Converting},
        {"data": [table(9), odd(kind=torch.float64)], "train": converting_loop},
        {"data": [table(9), odd(5)], "on_error": "skip"},
        {"data": [odd(label=torch.int32)], "test": odd(label=torch.uint8), "method": "fedproto", "model": network()},
        {"data": [table(9), Unloaded(6, 0)]},
        {"test": Stated(6, [70] * 6)},
        {"data": [table(9), odd(targets=torch.tensor([0, 1, 2, 3, 3, -100]))], "loss_fn": nn.CrossEntropyLoss()},
    ],
    ids=range(8),
)
def test_sets_of_another_form_are_taken_where_they_can_be(given, tmp_path):
    given = {"method": "fedavg", **GOOD, **given}
    assert np.isfinite(fedkern.simulate(**given, rounds=1, out=tmp_path / "run", **HERE).metrics["loss"])


def test_some_of_very_many_samples_are_drawn_without_an_order_of_all():
    tracemalloc.start()
    data = fedkern.FederatedData.from_datasets([Long(10**9), Long(10**9)], table(6), samples=20)
    assert sum(data.client_sizes) == 20
    assert identify_memory(data)["samples"]
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_other_machines_have_no_such_data(monkeypatch, tmp_path):
    words = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    launched = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0}
    for name, value in {**words, **launched}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=r"other ranks have none: .*, with workers=N, or .* load FILE"):
        fedkern.simulate("fedavg", **GOOD, rounds=1, out=tmp_path / "run", **HERE)


SERVES = {
    "afl", "ccvr", "centralised", "ditto", "ensemble", "fedavg", "fedcgs", "feddf", "feddyn", "fedlora", "fedntd",
    "fedper", "fedproto", "fedprox", "fml", "local", "moon", "oneshot-fedavg", "qffl", "scaffold",
}  # fmt: skip


@pytest.mark.sampled(5)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_learns_it_or_says_what_it_misses(method, tmp_path):
    given = {"data": {"a": table(30), "b": table(20, 1)}, "test": table(12, 2)}
    given["model"] = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    settings = {} if METHODS[method].one_shot else {"rounds": 2}
    settings |= {"public": table(16, 3), "distill_epochs": 2} if method == "feddf" else {}

    def play():
        return fedkern.simulate(method, **given, **settings, out=tmp_path / "run", **HERE)

    if method in SERVES:
        found = play().metrics
        assert np.isfinite(found["loss"])
        assert found.get("distil_images") == (16 if method == "feddf" else None)
    else:
        said = r"needs images .*; samples have one input of shape .4.|is for retrieval, but"
        with pytest.raises(UserError, match=said):
            play()


class Hidden(nn.Module):
    """A network whose activation is a function, not a module."""

    def __init__(self, parts):
        super().__init__()
        self.first, self.last = copy.deepcopy(parts[0]), copy.deepcopy(parts[2])

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


@pytest.mark.parametrize("method", ["moon", "fedproto"])
def test_features_of_a_functional_network_are_those_of_the_sequence(method, tmp_path):
    torch.manual_seed(0)
    parts = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    given = {"data": {"a": table(30), "b": table(20, 1)}, "test": table(12, 2), "rounds": 2}
    vectors = []
    for name, model, features in (("hooks", Hidden(parts), "first"), ("parts", parts, "0"), ("usual", parts, None)):
        found = fedkern.simulate(method, **given, model=model, features=features, out=tmp_path / name, **HERE)
        vectors.append(torch.nn.utils.parameters_to_vector(found.model().parameters()))
    torch.testing.assert_close(vectors[0], vectors[1])
    assert not torch.allclose(vectors[0], vectors[2])


class Clock(Drawing):
    generator = torch.Generator()

    def __getitem__(self, index):
        rows, target = super().__getitem__(index)
        return rows + torch.rand(4, generator=self.generator), target


@pytest.mark.parametrize("loss_fn", [None, nn.CrossEntropyLoss()])
@pytest.mark.parametrize("last", [nn.Softmax(1), nn.LogSoftmax(1), nn.Identity()])
def test_a_softmax_before_a_cross_entropy_is_told(last, loss_fn, tmp_path):
    given = {"data": [table(9)], "test": table(6), "model": nn.Sequential(nn.Linear(4, 4), last), "loss_fn": loss_fn}
    found = fedkern.simulate("fedavg", **given, rounds=1, out=tmp_path / "run", **HERE)
    assert ("probabilities" in found.summary["diagnostics"]) is isinstance(last, nn.Softmax)


class Leaving(Listed):
    """Items that change modes and the working folder, and leave a thread running."""

    end = threading.Event()

    def __getitem__(self, index):
        rows, target = super().__getitem__(index)
        item = torch.tensor(rows.tolist()), target
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(3)
        os.chdir("/")
        threading.Thread(target=self.end.wait, name="fedkern-test", daemon=True).start()
        return item


def test_items_leave_no_modes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, network = [*zip(torch.rand(9, 4), range(9), strict=True)], nn.Linear(4, 9)
    given = {"model": network, "rounds": 1, **HERE}
    runs = [
        fedkern.simulate("fedavg", data=[kind(rows[:5]), kind(rows[5:])], test=kind(rows), out=kind.__name__, **given)
        for kind in (Listed, Leaving)
    ]
    Leaving.end.set()
    assert same(*map(state, runs))
    assert runs[1].summary["diagnostics"].keys() - runs[0].summary["diagnostics"].keys() == {"piling-threads"}
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("kind", [Drawing, Clock])
def test_items_with_a_generator_of_their_own_are_told(kind, tmp_path):
    given = {"data": [Drawing(20, 0), kind(17, 20)], "test": Drawing(9, 90), "model": network()}
    found = fedkern.simulate("fedavg", **given, rounds=1, out=tmp_path / "run", **HERE)
    told = found.summary["diagnostics"].get("unsteady-items", "")
    assert told.startswith("An item of client 1 changes between reads") is (kind is Clock)


def test_methods_are_compared_on_it(tmp_path):
    given = {"data": {"a": table(30), "b": table(20, 1)}, "test": table(12, 2), "model": nn.Linear(4, 4)}
    how = {"rounds": 1, "progress": False, "workers": 1}
    found = fedkern.compare(["fedavg", "fedprox"], seeds=2, **given, **how, out=tmp_path / "all")
    assert [row["method"] for row in found.table] == ["fedavg", "fedprox"]
    assert all(row["seeds"] == 2 and 0 <= row["accuracy"] <= 1 for row in found.table)


class Named(nn.Linear):
    """A network with several named inputs and several outputs."""

    def forward(self, x, scale):
        return {"logits": super().forward(x) * scale[:, None], "scale": scale}


def make_named(count, seed=0):
    rows = [{"x": x, "scale": x.sum(), "labels": int(y)} for x, y in table(count, seed)]
    return Listed(rows)


class Stacked(nn.Linear):
    def forward(self, rows):
        return super().forward(torch.stack(rows))


def keep_list(items):
    return [row for row, _ in items], torch.stack([target for _, target in items])


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("make", "network", "given"),
    [
        (table, nn.Linear(4, 4), {}),
        (make_named, Named(4, 4), {}),
        (triples, Two(), {}),
        (partly, nn.Linear(3, 2), {"loss_fn": masked_loss}),
    ],
)  # fmt: skip
def test_its_network_is_exported(make, network, given, tmp_path):
    run = fedkern.simulate(
        "fedavg", data=[make(12), make(8)], test=make(6), model=network, **given, rounds=1, out=tmp_path / "run", **HERE
    )
    file, about = run.export(tmp_path / "network.pt2")
    program = torch.export.load(file).module()
    inputs, _ = split_targets(default_collate([make(6)[row] for row in range(5)]))
    torch.testing.assert_close(call(program, inputs), call(run.model(), inputs))
    assert json.loads(about.read_text())["format"] == "torch-export"
    state, _ = run.export(tmp_path / "state.pt", "state-dict")
    copy.deepcopy(network).load_state_dict(torch.load(state))
    with pytest.raises(UserError, match=r"network\.pt2 is there already: name another one with out="):
        run.export(tmp_path / "network.pt2")
    for name, kind, said in (
        ("other", "onx", 'format must be one of onnx, torch-export, state-dict, not "onx"'),
        ("other.bin", None, r"has no suffix of a format: let its name end in \.onnx \(onnx\), \.pt2 \(torch-export\)"),
        ("other.PT2", "onnx", r"is a name of format torch-export, not of format onnx: leave format out, or rename it"),
        *([("other.onnx", None, "format onnx needs")] if find_spec("onnxscript") is None else []),
    ):
        with pytest.raises(UserError, match=said):
            run.export(tmp_path / name, kind)
    assert torch.load(run.export(tmp_path / "again.pth")[0]).keys() == torch.load(state).keys()


class Words(nn.Module):
    """A network on words or, without an embedding table, on waves."""

    def __init__(self, table, fixed=0):
        super().__init__()
        self.table = nn.Embedding(9, 6) if table else nn.Conv1d(1, 6, 5, stride=2)
        self.head, self.fixed, self.waves = nn.Linear(6 * (fixed or 1), 3), fixed, not table

    def forward(self, x):
        x = self.table(x[:, None]).transpose(1, 2) if self.waves else self.table(x)
        return self.head(x.flatten(1) if self.fixed else x.mean(1))


class Padded(Words):
    def forward(self, x):
        return self.head(self.table(x).mul((x > 0)[..., None]).sum(1) / (x > 0).sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("rows", "network", "told"),
    [
        (torch.randint(9, (8, 12)), Words(table=True), "int64 [B, L]"),
        (torch.randn(8, 40), Words(table=False), "float32 [B, L]"),
        (torch.randint(9, (8, 12)), Words(table=True, fixed=12), "int64 [B, 12]"),
        (torch.randint(1, 9, (8, 12)), Padded(table=True), "int64 [B, L]"),
    ],
)  # fmt: skip
def test_texts_and_waves_are_exported_with_a_free_length(rows, network, told, tmp_path):
    data = TensorDataset(rows, torch.arange(8) % 3)
    run = fedkern.simulate("fedavg", data=[data], test=data, model=network, rounds=1, out=tmp_path / "run", **HERE)
    file, about = run.export(tmp_path / "network.pt2")
    assert json.loads(about.read_text())["input"] == {"args": [told], "kwargs": {}}
    program, longer = torch.export.load(file).module(), torch.cat([rows, rows, rows], 1)[:3]
    taken = longer if "L" in told else rows[:3]
    torch.testing.assert_close(program(taken), run.model()(taken))


@pytest.mark.parametrize(
    ("make", "network", "given", "said"),
    [
        (table, nn.Linear(4, 4), {"batch_loss": batch_loss}, "the run's loss calls the"),
        (table, Stacked(4, 4), {"collate_fn": keep_list}, "input of two samples is float32 .4., and only"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_said(make, network, given, said, tmp_path):
    settings = {"data": [make(12)], "test": make(6), "model": network, "rounds": 1, "out": tmp_path / "run"}
    run = fedkern.simulate("fedavg", **settings, **given, **HERE)
    with pytest.raises(UserError, match=said):
        run.export(tmp_path / "network.pt2")
    assert not (tmp_path / "network.pt2").exists()
    run.export(tmp_path / "state.pt", "state-dict")


@pytest.mark.exhaustive
def test_every_seed_of_a_comparison_shares_a_set_out_anew(tmp_path):
    given = {"data": table(40), "test": table(12, 2), "model": nn.Linear(4, 4), "rounds": 1, "workers": 1}
    shared = {"clients": 2, "partition": "dirichlet:0.4:min=1"}
    again = {**given, **shared, "progress": False, "out": tmp_path / "all"}
    found = fedkern.compare(["fedavg"], seeds=2, sweep={"train_samples": [30, 40]}, **again)
    assert fedkern.compare(["fedavg"], seeds=2, sweep={"train_samples": [30, 40]}, **again).table == found.table
    lists = {**given, "data": [table(30), table(30, 3)], "progress": False}
    fedkern.compare(["fedavg"], seeds=1, sweep={"train_samples": [10, 60]}, **lists, out=tmp_path / "lists")
    folders = [folder for folder in (tmp_path / "lists").iterdir() if folder.is_dir()]
    assert len({fedkern.load(folder).metrics["loss"] for folder in folders}) == 2
    with pytest.raises(UserError, match="partition has no effect on data in memory"):
        fedkern.compare(["fedavg"], seeds=1, sweep={"partition": ["iid"]}, **lists, out=tmp_path / "no")
    weights = [
        [update["samples"] for update in fedkern.load(folder).history.records[0]["clients"].values()]
        for folder in sorted((tmp_path / "all").iterdir()) if folder.is_dir()
    ]  # fmt: skip
    assert sorted(map(sum, weights)) == [30, 30, 40, 40]
    assert len(set(map(tuple, weights))) > 2


def test_a_registered_function_may_return_it(registries, tmp_path):
    @fedkern.register_data("clinics", clients=2)
    def clinics(seed=0):
        """Return two tables."""
        return fedkern.FederatedData.from_datasets({"a": table(30, seed), "b": table(20, 1)}, table(12, 2))

    @fedkern.register_data("both", clients=2)
    def both():
        """Return a table to share out, and a test set."""
        return table(30), table(12, 2)

    how = {"model": nn.Linear(4, 4), "rounds": 1, **HERE}
    shared = fedkern.simulate("fedavg", data="both", partition="dirichlet:1:min=2", out=tmp_path / "both", **how)
    again = {"data": table(30), "test": table(12, 2), "clients": 2, "partition": "dirichlet:1:min=2"}
    assert fedkern.simulate("fedavg", **again, out=tmp_path / "again", **how).metrics == shared.metrics
    found = fedkern.simulate("fedavg", data="clinics", model=nn.Linear(4, 4), rounds=1, out=tmp_path / "run", **HERE)
    assert found.metrics["accuracy"] > 0
    assert fedkern.load(tmp_path / "run", model=nn.Linear(4, 4)).evaluate() == pytest.approx(found.metrics)


def test_values_that_are_not_finite_are_named(tmp_path, capsys):
    bad = table(20)
    bad.tensors[0][11, 2] = torch.nan
    with pytest.raises(UserError, match="item 11 of client 1 holds NaN or infinity: mend it, or leave it out"):
        fedkern.simulate(
            "fedavg", data=[table(20), bad], test=table(6), model=nn.Linear(4, 4), out=tmp_path / "client", **HERE
        )
    fedkern.simulate(
        "fedavg", data=[table(20)], test=bad, model=nn.Linear(4, 4), rounds=1, out=tmp_path / "test", **HERE
    )
    assert "The loss is NaN: the network's outputs, or the samples" in capsys.readouterr().err


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.functional.l1_loss])
def test_outputs_are_not_broadcast_against_targets(loss, tmp_path):
    rows = torch.randn(20, 4)
    pairs = TensorDataset(rows, rows.sum(1))
    data = {"data": [pairs], "test": pairs, "model": nn.Linear(4, 1), "loss_fn": loss}
    with pytest.raises(UserError, match=r"same shape, not \[N, 1\] and \[N\]"):
        fedkern.simulate("fedavg", **data, out=tmp_path / "run", **HERE)


@pytest.mark.parametrize("is_cut", [False, True], ids=["extend", "resume"])
def test_what_cannot_go_on_moves_nothing(is_cut, tmp_path):
    given = {"data": [table(20), table(9)], "test": table(6, 2), "model": nn.Linear(4, 4), "loss_fn": first_loss}
    listeners = {"listener": KillAt("round-start", round=2)} if is_cut else {}
    with pytest.raises(Kill) if is_cut else nullcontext():
        fedkern.simulate("fedavg", **given, rounds=1 + is_cut, out=tmp_path / "run", **listeners, **HERE)
    shutil.copytree(tmp_path / "run", tmp_path / "other")

    def go_on(name, **known):
        run, shown = fedkern.load(tmp_path / name, **known), {"progress": False, "pictures": False}
        return run.resume(**shown) if is_cut else run.extend(2, **shown)

    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for known, said in (
        ({"model": given["model"]}, "is given through Python"),
        ({}, "trains a module that a script made"),
        ({**given, "data": [table(20), table(10)]}, "The data are not those"),
        ({**given, "data": [table(20, 1), table(9)]}, "The data are not those"),
        ({**given, "data": {"a": table(20), "b": table(9)}}, "clients of the data have other names"),
        ({**given, "data": [table(20)]}, "The data are not those"),
        ({**given, "model": nn.Sequential(nn.Linear(4, 4))}, "was made with other settings"),
        ({**given, "loss_fn": second_loss}, "the loss, a metric or the collation has changed since the run in"),
        ({**given, "train": lambda model, client: None}, "the training of clients has changed"),
    ):
        with pytest.raises(UserError, match=said):
            go_on("run", **known)
        assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    uncut = fedkern.simulate("fedavg", **given, rounds=2, out=tmp_path / "whole", **HERE)
    assert same(state(go_on("run", **given)), state(uncut))
    reset = go_on("other", **{**given, "loss_fn": second_loss}, trusted=["loss_fn"])
    assert "goes on with the loss, a metric or the collation as it is now" in reset.summary["diagnostics"]["other-code"]


class Counts(Task):
    """Counts of events.

    The network's output is the logarithm of their expectation.
    """

    name, main, better, network = "counts", "deviance", "min", "any"

    def criterion(self, outputs, batch):
        return nn.functional.poisson_nll_loss(outputs, batch.targets)

    @torch.no_grad()
    def figures(self, model, data):
        pairs = [(model(batch.inputs), batch.targets) for batch in data.batches()]
        outputs, targets = (torch.cat(part) for part in zip(*pairs, strict=True))
        loss = float(nn.functional.poisson_nll_loss(outputs, targets))
        return {"deviance": 2 * loss, "loss": loss}


def test_a_task_of_ones_own(tmp_path):
    sets = [TensorDataset(torch.rand(n, 3), torch.randint(4, (n, 1)).float()) for n in (20, 15, 10)]
    given = {"data": sets[:2], "test": sets[2], "model": nn.Linear(3, 1), "task": Counts()}
    found = fedkern.simulate("fedavg", **given, rounds=2, out=tmp_path / "run", **TWO)
    assert (found.config.main, found.config.better) == ("deviance", "min")
    assert fedkern.load(tmp_path / "run", **given).evaluate() == pytest.approx(found.metrics)
    with pytest.raises(UserError, match=r"task must be an object of fedkern\.tasks\.Task, without a loss"):
        fedkern.simulate("fedavg", **given, loss_fn=first_loss, out=tmp_path / "other", **HERE)


CODE = '''
import torch
from torch.utils.data import TensorDataset

import fedkern


def clinics(seed=0):
    """Two tables."""
    rows = torch.linspace(-1, 1, 60).reshape(20, 3)
    own = TensorDataset(rows, rows[:, 0].gt(0).long())
    return fedkern.FederatedData.from_datasets({"a": own, "b": own}, TensorDataset(*own.tensors))


class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
'''


@pytest.mark.usefixtures("undrawn")
def test_code_is_named_on_the_command_line(tmp_path, monkeypatch, registries, capsys):
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    data, code = ("--data", "mine.py:clinics"), ("--model", "mine.py:Net")
    assert main(["fedavg", *data, *code, "--rounds", "1", "--out", "run", "--workers", "1", "--quiet"]) == 0
    assert main(["evaluate", "run", *data, *code]) == 0
    figures, told = (
        json.loads((tmp_path / "run" / name).read_text()) for name in ("evaluate-clinics.json", "summary.json")
    )
    assert all(told["metrics"][name] == value for name, value in figures["metrics"].items())
    del DATASETS[f"{tmp_path / 'mine.py'}:clinics"]  # as in another process; this one has loaded it
    assert main(["evaluate", "run", *code]) == 2
    assert "mine.py:clinics is code, which a run folder may not name alone: give --data" in capsys.readouterr().err
    for given, said in (
        ({}, r'where you trust that code, give it again, trusted=\["/.*/mine\.py:Net"\] to fedkern\.load\.$'),
        ({"model": "mine.py:Net"}, r'give trusted=\["/.*/mine\.py:Net"\] to fedkern\.load for code'),
        ({"trusted": "mine.py:Net"}, r'give data="/.*/mine\.py:clinics"\.$'),
        ({"data": "digits"}, 'learns from .*:clinics, not from "digits"'),
    ):
        with pytest.raises(UserError, match=said):
            fedkern.load("run", **given).evaluate()
    assert fedkern.load("run", data="mine.py:clinics", trusted="mine.py:Net").evaluate() == figures["metrics"]
