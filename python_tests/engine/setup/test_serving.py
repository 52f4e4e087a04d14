"""Runs that accelerate a user's network: the decision, its record, and bits that depend on nothing else."""

import dataclasses
import json
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import fedkern
from fedkern.acceleration import calls
from fedkern.engine.local import training
from fedkern.engine.local.linear_pass import has_default_loss, play_steps
from fedkern.engine.local.script_objects import ScriptObjects
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.methods import FedAvg
from fedkern.ops._core import backend
from fedkern.report.live.progress_bar import run_headline
from fedkern.settings.config import load_settings
from fedkern.tasks.classification import CLASSIFICATION
from python_tests.guest_networks import Doubling, Head, block
from python_tests.hearing import Hearing
from python_tests.interrupted import KillAt, kill_and_resume, outcome
from python_tests.saved_network import same_network, tensors

pytestmark = pytest.mark.skipif(not backend.active_isa().startswith("avx"), reason="the kernel serves AVX2 and AVX-512")


class Guest(Head):
    """A network whose forward is a function."""

    def __init__(self, classes=3):
        super().__init__(16, classes)
        (self.c1, self.b1), (self.c2, self.b2) = block(3, 16), block(16, 16)

    def maps(self, x):
        return F.relu(self.b2(self.c2(F.max_pool2d(F.relu(self.b1(self.c1(x))), 2))))


class Rows(nn.Sequential):
    """A network of modules one after another."""

    def __init__(self, classes=3):
        super().__init__(
            *block(3, 16), nn.ReLU(), nn.MaxPool2d(2), *block(16, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, classes),
        )  # fmt: skip


class Rectified(nn.Sequential):
    """A network of linear layers."""

    def __init__(self, classes=3):
        super().__init__(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), nn.Linear(9, classes))


class Drawing(Guest):
    """A network that draws from its own generator."""

    generator = torch.Generator().manual_seed(0)

    def maps(self, x):
        return super().maps(x + 0.1 * torch.randn(x.shape, generator=self.generator))


class Custom(Guest):
    def maps(self, x):
        return F.relu(Doubling.apply(self.b1(self.c1(x))))


class Wide(Guest):
    """A network whose products are mostly of a layer that nothing accelerates."""

    def __init__(self, classes=3):
        super().__init__(classes)
        self.first = nn.Conv2d(3, 64, 7, padding=3)
        self.second = nn.Conv2d(64, 3, 7, padding=3)

    def maps(self, x):
        return super().maps(self.second(F.relu(self.first(x))))


def guest(kind, seed=0):
    torch.manual_seed(seed)
    return kind()


@pytest.fixture
def play(make_config, make_data, tmp_path):
    def play(name, kind=Guest, method="fedavg", **settings):
        config = make_config(method, width=None, lr=0.05, **settings)
        run(config, out=tmp_path / name, data=make_data(), script=ScriptObjects(guest(kind)))
        return tmp_path / name

    return play


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Guest, "served 2 of 2 convolutions"),
        (Rows, "served 2 of 2 convolutions"),
        (Drawing, "as written: it draws from generators of its own, or changes as it runs"),
        (Custom, "served 1 of 1 convolutions"),
        (Wide, "as written: operators would save work in"),
        (Rectified, "served 2 of 2 linear layers"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Tanh()), "as written: it has no convolutions, and"),
    ],
)
def test_the_record_says_what_is_served_or_why_not(kind, said, play):
    assert load_settings(play("run", kind)).served.startswith(said)
    assert load_settings(play("off", kind, accelerate="off")).served is None


def test_the_header_says_it(make_config, make_data, tmp_path):
    heard, script = Hearing(), ScriptObjects(guest(Guest))
    run(make_config(width=None), out=tmp_path / "run", data=make_data(), script=script, listener=heard)
    assert "module:Guest: served 2 of 2 convolutions" in run_headline(heard.info)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("kind", "method"),
    [*product((Guest, Rows), ("fedavg", "moon", "scaffold", "fedproto")),
     *product((Rectified,), ("fedavg", "scaffold", "fedprox", "ditto", "fedper"))],
)  # fmt: skip
def test_a_run_that_is_served_is_near_the_one_as_written(kind, method, play):
    served, written = tensors(play("auto", kind, method)), tensors(play("off", kind, method, accelerate="off"))
    assert any(not torch.equal(served[name], written[name]) for name in served)
    for name, value in served.items():
        torch.testing.assert_close(value, written[name], rtol=1e-2, atol=1e-2 * float(written[name].abs().max()) + 1e-4)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", [Guest, Rows])
def test_stages_are_served(kind, play, monkeypatch):
    chains = []

    def serve(chain, dense):
        chains.append(chain)
        return served(chain, dense)

    served = calls._serve
    monkeypatch.setattr(calls, "_serve", serve)
    given = {"stages": "b1,b2"} if kind is Guest else {}
    staged = tensors(play("auto", kind, "fedgid", **given))
    assert len(chains) > 20
    written = tensors(play("off", kind, "fedgid", accelerate="off", **given))
    for name, value in staged.items():
        torch.testing.assert_close(value, written[name], rtol=1e-2, atol=1e-2 * float(written[name].abs().max()) + 1e-4)


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize(("kind", "way"), [(Guest, "+"), (Custom, "="), (Rectified, "l")])
def test_the_same_bits_in_workers_and_after_a_kill(kind, way, play, make_config, make_data, tmp_path):
    expected = play("one", kind, workers="1", rounds=3)
    assert load_settings(expected).plan[0] == way
    assert same_network(expected, play("two", kind, workers="2", rounds=3))
    config, how = make_config(width=None, lr=0.05, rounds=3), {"data": make_data(), "at": KillAt("round", 1)}
    again = kill_and_resume(config, out=tmp_path / "cut", script=ScriptObjects(guest(kind)), **how)
    assert again == outcome(expected)


def test_operators_that_compute_something_else_are_not_taken(play, monkeypatch):
    served = calls._serve

    def wrong(chain, dense):
        found = served(chain, dense)
        return None if found is None else found * 1.1

    monkeypatch.setattr(calls, "_serve", wrong)
    out = play("run")
    assert load_settings(out).served.startswith("as written: ")
    assert "differs when operators compute it" in load_settings(out).served
    monkeypatch.undo()
    assert same_network(out, play("off", accelerate="off"))


def test_what_a_run_hands_out_is_plain_and_its_figures_are_those_of_the_run(make_data, tmp_path):
    data = dataclasses.replace(make_data(), name="digits")
    how = {"model": guest(Guest), "rounds": 1, "progress": False, "pictures": False, "batch_size": 4}
    found = fedkern.simulate("fedavg", data=data, out=tmp_path / "run", **how)
    assert found.config.served == "served 2 of 2 convolutions"
    assert not any("_conv_forward" in vars(layer) for layer in found.model().modules())
    again = found.evaluate()
    assert again == {name: found.metrics[name] for name in again}
    assert found.predict(data.tests["id"].images[:3]).shape == (3, 3)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["method"] == "fedavg"


def test_a_loop_of_one_s_own_gets_the_accelerated_network(make_data, tmp_path):
    seen = []

    def train(model, client):
        seen.append(any("_conv_forward" in vars(layer) for layer in model.modules()))

    data = dataclasses.replace(make_data(), name="digits")
    how = {"model": guest(Guest), "rounds": 1, "progress": False, "pictures": False, "workers": 1}
    fedkern.simulate("fedavg", data=data, train=train, out=tmp_path / "run", **how)
    assert set(seen) == {True}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (None, "served 2 of 2 linear layers"),
        (F.cross_entropy, "served 2 of 2 linear layers"),
        (nn.CrossEntropyLoss(), "served 2 of 2 linear layers"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "as written: its loss is more than the cross-entropy of a batch"),
        (nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0])), "as written: its loss"),
        (lambda outputs, targets: F.cross_entropy(2 * outputs, targets.long()), "as written: its loss"),
    ],
)
def test_linear_layers_are_served_behind_the_plain_cross_entropy(loss, said, tmp_path):
    rows, targets = torch.randn(40, 192), torch.randint(0, 3, (40,), dtype=torch.int32)
    data = [TensorDataset(rows[:20], targets[:20]), TensorDataset(rows[20:], targets[20:])]
    how = {"test": data[0], "model": guest(Rectified), "progress": False, "pictures": False, "lr": 0.05}
    found = [
        fedkern.simulate("fedavg", data=data, loss_fn=loss, out=tmp_path / way, accelerate=way, rounds=2, **how)
        for way in ("auto", "off")
    ]
    assert found[0].config.served.startswith(said)
    served, written = (run.model().state_dict() for run in found)
    for name, value in served.items():
        torch.testing.assert_close(value, written[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedprox", "fedper"])
@pytest.mark.parametrize("kind", [TensorDataset, type("Items", (TensorDataset,), {})])
def test_batches_of_one_call_give_the_bits_of_single_ones(kind, method, tmp_path, monkeypatch):
    torch.manual_seed(0)
    rows, targets = torch.randn(200, 192), torch.randint(0, 3, (200,))
    targets[3] = -100
    found, joined = [], []

    def spy(*given):
        joined.append(play_steps(*given))
        return joined[-1]

    for name, play_many in (("joined", spy), ("single", lambda *_: None)):
        monkeypatch.setattr(training, "play_steps", play_many)
        data = [kind(rows[:90], targets[:90]), kind(rows[90:], targets[90:])]
        how = {"model": guest(Rectified), "lr": 0.05, "momentum": 0.5, "batch_size": 4, "pictures": False}
        found.append(fedkern.simulate(method, data=data, test=data[1], rounds=6, out=tmp_path / name, **how))
    assert any(outcome is not None for outcome in joined) == (method != "fedper")
    assert same_network(*(run.out for run in found))


def test_a_class_that_the_network_lacks_is_named_as_ever(tmp_path):
    rows = torch.randn(40, 192)
    data = [TensorDataset(rows[:20], torch.arange(20) % 3), TensorDataset(rows[20:], torch.arange(20) % 4)]
    with pytest.raises(UserError, match="3 outputs for 4 classes, as a target is 3"):
        fedkern.simulate("fedavg", data=data, test=data[0], model=guest(Rectified), rounds=1, out=tmp_path / "run")


@pytest.mark.parametrize(("changes", "plain"), [({}, True), ({"prepare": dict}, False), ({"loss": dict}, False)])
def test_a_method_with_a_step_of_its_own_is_as_written(changes, plain):
    assert has_default_loss(object.__new__(type("Other", (FedAvg,), changes)), CLASSIFICATION) == plain
