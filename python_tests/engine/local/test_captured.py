"""Recorded passes of local training: tapes stand for CUDA graphs on the CPU.

On a GPU, runs with graphs are compared with runs without.
"""

import contextlib
import gc
import itertools
import math
import random
from collections import defaultdict
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

from fedkern import models
from fedkern.data import FederatedData
from fedkern.engine import client as client_module
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.executors.serial import Serial
from fedkern.engine.local import captured, lanes, training
from fedkern.engine.local.captured import Graphs, is_replayable
from fedkern.engine.local.networks import Networks
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods import METHODS, FedAvg, Phase
from fedkern.models.precision import compute_in
from fedkern.ops import use_backend
from fedkern.process.torch_modes import reproducible
from python_tests.saved_network import same_network
from python_tests.smallest import SETTINGS

SMALL = {"width": 2, "rounds": 2, "local_epochs": 2, "batch_size": 2, "clients": 3, "workers": "1", "grad_cam": 0}
ALIKE = {"ccvr", "dense", "fedcgs", "feddf"}
"""Methods whose clients train as those of oneshot-fedavg do, or not at all."""
OWN = {
    "fedproto": {"options": {"networks": "averaged"}, "rounds": 3},
    "fedlpfm": {"data": "digits", "train_samples": 60, "public_samples": 20, "partition": "iid"},
}
CLAIMED = sorted(name for name, kind in METHODS.items() if is_replayable(kind) and name not in ALIKE)
SIDE_BY_SIDE = {"fedavg", "fedprox"}
QUICK = ("fedavg", "scaffold")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
VOLATILE = ("seconds", "phases", "time", "device")


class Tape(TorchDispatchMode):
    """A record of operators that runs them again on the same memory, as a CUDA graph does with kernels."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self._before = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was read")
        named = {arg.name: value for arg, value in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
        for arg in func._schema.arguments:
            if arg.alias_info is not None and arg.alias_info.is_write:
                for tensor in tree_leaves(named.get(arg.name)):
                    self.keep(tensor)
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def keep(self, tensor):
        """Note the values of a tensor that is written to."""
        if isinstance(tensor, Tensor):
            storage = torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())
            self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def undo(self):
        """Restore the values that were written: recording a CUDA graph runs nothing."""
        for storage, value in self._before.values():
            storage.copy_(value)

    playing = False

    @torch.no_grad()
    def replay(self):
        Tape.playing = True
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            if all(value.alias_info is None for value in func._schema.returns):
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)
        Tape.playing = False


class Tapes(Graphs):
    """Tapes instead of CUDA graphs."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.recorded = self.replayed = 0

    @contextlib.contextmanager
    def stream(self):
        yield

    def replaying(self, network, *arguments, **settings):
        self._network = network
        return super().replaying(network, *arguments, **settings)

    def record(self, work):
        tape = Tape()
        for buffer in self._network.module.buffers():  # batch norm's schema does not say that it writes to them
            tape.keep(buffer)
        try:
            with tape:
                result = work()
        finally:
            tape.undo()
        self.recorded += 1

        def replay():
            self.replayed += 1
            tape.replay()

        return replay, result


def rounds(folder):
    """Return the records of a run without times."""
    return [{k: v for k, v in row.items() if not any(word in k for word in VOLATILE)} for row in read_metrics(folder)]


def same_bits(left, right):
    return same_network(left, right) and rounds(left) == rounds(right)


def same_runs(config, data, tmp_path, monkeypatch):
    """Return whether a run with tapes has the bits of one without, the tapes, and the run's diagnostics."""
    tapes = Tapes()
    with use_backend("reference"):  # operators are dispatched, so that the tape sees what is in them
        run(config, data=data, out=tmp_path / "eager")
        with monkeypatch.context() as patch:
            patch.setattr(lanes, "MOST", 1)
            patch.setattr(Networks, "graphs", property(lambda self: tapes))
            summary = run(config, data=data, out=tmp_path / "taped")
    return same_bits(tmp_path / "eager", tmp_path / "taped"), tapes, summary["diagnostics"]


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in CLAIMED if name not in QUICK)]
)
def test_methods_that_say_so_are_replayable(name, make_data, make_config, tmp_path, monkeypatch):
    given = {**SMALL, **SETTINGS.get(name, {}), **OWN.get(name, {})}
    if METHODS[name].one_shot:
        given.update(rounds=None, local_epochs=4)
    data = None if name in OWN else make_data()
    equal, tapes, diagnostics = same_runs(make_config(name, **given), data, tmp_path, monkeypatch)
    assert equal
    assert tapes.replayed > 3 * tapes.recorded > 0
    assert "no-cuda-graph" not in diagnostics


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_a_pass_is_recorded_where_clients_keep_a_part(name, make_data, make_config, tmp_path, monkeypatch):
    given = {**SMALL, **SETTINGS.get(name, {}), "personal": "head.*", "clip_norm": 0.5}
    equal, tapes, _ = same_runs(make_config(name, **given), make_data(), tmp_path, monkeypatch)
    assert equal
    assert tapes.replayed > 3 * tapes.recorded > 0


def test_what_is_replayable():
    class Derived(FedAvg):
        pass

    class Other(FedAvg):
        def loss(self, model, batch, received):
            return super().loss(model, batch, received)

    class Claims(Other):
        replayable = True

    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * len(x)

    assert {"fedavg", "fedprox", "scaffold", "local", "fediod", "fedproto"} <= {*CLAIMED}

    class Declines(Claims):
        replayable = False

    class Helper(METHODS["afl"]):
        def scaled(self, loss, received):
            return super().scaled(loss, received)

    # What a class of somebody's own overrides of the loss, or a module does, may be no work for the device alone.
    assert [is_replayable(kind) for kind in (FedAvg, Derived, Other, Helper, Claims)] == [True, True, None, None, True]
    known = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert is_replayable(FedAvg, known)
    assert is_replayable(FedAvg, nn.Sequential(known, Own(2, 2))) is None
    # Who says so is not tried.
    assert [is_replayable(kind, Own(2, 2)) for kind in (Declines, METHODS["feddra"])] == [False, False]


CALLS, TURN = itertools.count(), {"round": 0}


class Stranger(FedAvg):
    calls = 0

    def factor(self, batch, loss):
        return 1.0

    def loss(self, model, batch, received):
        loss = super().loss(model, batch, received)
        return loss * self.factor(batch, loss)


def derive(factor, replayable=None):
    """Return a method whose loss has this factor."""
    return type("Derived", (Stranger,), {"factor": factor, "replayable": replayable})


def count_calls(self, batch, loss):
    self.calls += 1
    return float(self.calls)


def mean_index(self, batch, loss):
    return 1 + float(np.mean(batch.indices))


READING = derive(lambda self, batch, loss: 1 if loss > 0 else 2, replayable=True)
INDEXING = derive(mean_index, replayable=True)
EPOCHS = derive(lambda self, batch, loss: 2 if batch.epoch == 0 else 1, replayable=True)


def test_a_wrong_claim_is_noticed(make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "fedavg", derive(count_calls, replayable=True))
    equal, tapes, _ = same_runs(make_config(**SMALL), make_data(), tmp_path, monkeypatch)
    assert not equal
    assert tapes.recorded


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", [READING, INDEXING, EPOCHS], ids=["reading", "indexing", "epochs"])
def test_what_cannot_be_recorded_runs_eagerly(kind, make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "fedavg", kind)
    equal, tapes, diagnostics = same_runs(make_config(**SMALL), make_data(), tmp_path, monkeypatch)
    assert equal
    assert not tapes.recorded
    assert tapes.off
    assert "one by one" in diagnostics["no-cuda-graph"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("factor", "why"),
    [
        (lambda *_: 1.0 if random.random() < 2 else 2.0, "draws from the generator of random"),
        (lambda *_: 1.0 + 0 * np.random.normal(), "draws from the generator of NumPy"),  # noqa: NPY002
        (lambda *_: 1.0 + 0 * torch.rand(()), "draws from the generator of torch"),
        (count_calls, "it changes calls"),
        (lambda *_: 1.0 + next(CALLS), "does not repeat its own bits"),
        (mean_index, "cannot read batch.indices"),
    ],
)
def test_a_stranger_that_recording_would_freeze_runs_eagerly(
    factor, why, make_data, make_config, tmp_path, monkeypatch
):
    monkeypatch.setitem(METHODS, "fedavg", derive(factor))
    equal, tapes, diagnostics = same_runs(make_config(**SMALL), make_data(), tmp_path, monkeypatch)
    assert equal or "repeat" in why
    assert not tapes.recorded
    assert not tapes.off  # for others
    assert why in diagnostics["no-cuda-graph"]


def test_an_unverified_loss_is_recorded_and_compared(make_data, make_config, tmp_path, monkeypatch):
    compared, compare = [], Graphs._compare_step
    monkeypatch.setattr(Graphs, "_compare_step", lambda self, *a: compared.append(compare(self, *a)) or compared[-1])
    monkeypatch.setitem(METHODS, "fedavg", Stranger)
    equal, tapes, diagnostics = same_runs(make_config(**SMALL), make_data((20, 20, 20)), tmp_path, monkeypatch)
    assert equal
    assert tapes.recorded == 1
    assert tapes.replayed == 6 * 20 - 2
    # Three batches when it is recorded, and the first of each of the five exchanges that follow.
    assert [alike for _, alike in compared] == 8 * [True]
    assert "no-cuda-graph" not in diagnostics


class Turning(Stranger):
    """A loss that changes in the second round, which nothing reveals that a recording looks at."""

    def client_update(self, client, phase, message):
        TURN["round"] = phase.round
        return super().client_update(client, phase, message)

    def factor(self, batch, loss):
        return 1.0 + TURN["round"]


def test_a_stranger_that_turns_is_found_out_in_the_next_round(make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "fedavg", Turning)
    equal, tapes, diagnostics = same_runs(make_config(**SMALL), make_data(), tmp_path, monkeypatch)
    assert equal
    assert tapes.recorded == 1
    assert "gives other numbers" in diagnostics["no-cuda-graph"]


class OwnNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
        self.layers(torch.zeros(2, 3, 8, 8))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("accelerate", ["auto", "off"])
def test_a_network_of_somebodys_own_is_recorded(accelerate, make_data, make_config, tmp_path, monkeypatch, registries):
    models.register_model("own")(OwnNet)
    config = make_config(**{**SMALL, "model": "own", "accelerate": accelerate})
    equal, tapes, diagnostics = same_runs(config, make_data((20, 20, 20)), tmp_path, monkeypatch)
    assert equal
    assert tapes.recorded == 1
    assert tapes.replayed == 6 * 20 - 2
    assert "no-cuda-graph" not in diagnostics


@pytest.mark.parametrize(
    "loss", [None, nn.CrossEntropyLoss(label_smoothing=0.1), lambda x, y: cross_entropy(x, y) ** 2]
)
def test_steps_of_items_are_recorded(loss, make_config, tmp_path, monkeypatch, registries):
    models.register_model("own")(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.LogSoftmax(1)))
    sets = [TensorDataset(torch.randn(20, 6), torch.arange(20) % 3) for _ in range(3)]
    data = FederatedData.from_datasets(sets, sets[0], loss_fn=loss, classes=3)
    equal, tapes, diagnostics = same_runs(
        make_config(**{**SMALL, "model": "own", "width": None, "lr": 0.01}), data, tmp_path, monkeypatch
    )
    assert equal
    assert tapes.replayed > 3 * tapes.recorded > 0
    assert "no-cuda-graph" not in diagnostics


def test_a_whole_step_is_recorded_and_a_client_is_waited_for_once(make_data, make_config, monkeypatch):
    steps, reads = [], []
    monkeypatch.setattr(
        training.ops, "sgd_step", lambda *all, step=training.ops.sgd_step, **of: steps.append(1) or step(*all, **of)
    )
    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        read = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda self, *all, name=name, read=read: reads.append(Tape.playing) or read(self, *all)
        )
    counts, start = [], training.train_async

    def count_reads(*all, **of):
        reads.clear()
        told = start(*all, **of)
        counts.append(reads.count(False))

        def count_reads_of_figures():
            reads.clear()
            figures = told()
            counts.append(reads.count(False))
            return figures

        return count_reads_of_figures

    monkeypatch.setattr("fedkern.engine.client.train_async", count_reads)
    monkeypatch.setattr(training, "to_host_async", lambda tensor: tensor)  # on a GPU it waits for nothing
    _, line = passes((28, 28), make_data, make_config, exchanges=4, batch_size=4, local_epochs=1, momentum=0.9)
    assert line == ["eerppppp", "p" * 7, "p" * 7, "p" * 7]
    assert len(steps) == 3  # of two eager batches and of the recording
    assert counts[2:] == 3 * [0, 1]  # nothing before the figures are asked for


@contextlib.contextmanager
def unread(may=lambda tensor: False):
    """Refuse to read the values of tensors, except those that ``may`` be read."""

    def refusing(read):
        def refuse(tensor, *all):
            if may(tensor):
                return read(tensor, *all)
            raise RuntimeError("a value is read before the work is waited for")

        return refuse

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "item", "__float__", "cpu"):
            patch.setattr(Tensor, name, refusing(getattr(Tensor, name)))
        yield patch


class Lane(Tapes):
    """Tapes of a lane whose copies arrive in the host's memory only when the host waits for them."""

    open = 0

    def __init__(self):
        super().__init__()
        self.coming = []

    @contextlib.contextmanager
    def ahead(self):
        Lane.open, Lane.most = Lane.open + 1, max(Lane.most, Lane.open + 1)

        def wait():
            Lane.open -= 1
            for copied, value in self.coming:
                copied.copy_(value)

        # On a GPU the step reads the rate where it is.
        with unread(lambda tensor: Tape.playing or tensor is self.held.get("rate")) as patch:
            for user in (training, client_module):
                patch.setattr(user, "to_host_async", self.to_host_async)
            self.coming = []
            yield wait

    def to_host_async(self, tensor):
        copied = torch.full_like(tensor, 77)
        self.coming.append((copied, tensor.clone()))
        return copied


@contextlib.contextmanager
def late():
    """Let lanes work as late as they can, the last lane first, and read only what has arrived by then.

    The host continues meanwhile, so late work sees whatever the host has changed.
    """
    begin, waiting = Serial._begin, []

    def begin_later(self, k, callee, phase, message, encoder, lane=None):
        if lane is None:
            return begin(self, k, callee, phase, message, encoder)
        done = {}
        waiting.append(lambda: done.update(finish=begin(self, k, callee, phase, message, encoder, lane)))

        def finish():
            while waiting:
                waiting.pop()()
            with self._context.networks.on_lane(lane):
                coming = [copied for copied, _ in self._context.networks.graphs.coming]
            with unread(lambda tensor: any(tensor is copied for copied in coming)):
                return done["finish"]()

        return finish

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Serial, "_begin", begin_later)
        yield


@pytest.mark.parametrize(
    "name", ["fedavg", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in CLAIMED if name != "fedavg")]
)
def test_clients_in_lanes_give_the_bits_of_clients_one_by_one(name, make_data, make_config, tmp_path, monkeypatch):
    given = {**SMALL, **SETTINGS.get(name, {}), **OWN.get(name, {})}
    if METHODS[name].one_shot:
        given.update(rounds=None, local_epochs=4)
    config, data = make_config(name, **given), None if name in OWN else make_data()
    tapes, Lane.most = defaultdict(Lane), 0
    monkeypatch.setattr(lanes, "MOST", 3)
    with use_backend("reference"):
        run(config, data=data, out=tmp_path / "eager")
        with monkeypatch.context() as patch, late():
            patch.setattr(Networks, "graphs", property(lambda self: tapes[self.lane]))
            run(config, data=data, out=tmp_path / "lanes")
    assert same_bits(tmp_path / "eager", tmp_path / "lanes")
    assert (Lane.open, Lane.most) == (0, 3 if name in SIDE_BY_SIDE else 0)


def test_a_client_that_diverges_in_a_lane_is_told_and_the_others_go_on(make_data, make_config, tmp_path, monkeypatch):
    class Exploding(FedAvg):
        replayable = True

        def draw(self, client, batch, rng):
            last = client.id == 1 and batch.phase.round == 1 and batch.epoch == 1
            return {"times": torch.full((), math.inf if last else 1.0)}

        def loss(self, model, batch, received):
            return super().loss(model, batch, received) * batch.drawn["times"]

    monkeypatch.setitem(METHODS, "fedavg", Exploding)
    monkeypatch.setattr(lanes, "MOST", 3)
    tapes, Lane.most = defaultdict(Lane), 0
    with use_backend("reference"), monkeypatch.context() as patch:
        patch.setattr(Networks, "graphs", property(lambda self: tapes[self.lane]))
        with pytest.raises(UserError, match="Client 1 diverged in round 2, batch 11: the loss is inf"):
            run(make_config(**SMALL), data=make_data((20, 20, 20)), out=tmp_path)
    assert Lane.most == 3
    Lane.open = 0


class Drawing(FedAvg):
    """A method that draws for every batch, in ways that a recording can read and cannot.

    Its loss looks at the received message.
    """

    replayable = True

    def draw(self, client, batch, rng):
        return {
            "weight": torch.from_numpy(rng.random(len(batch.indices)).astype(np.float32)),
            "times": 1.0 + batch.epoch,
            "by": rng,
        }

    def loss(self, model, batch, received):
        losses = cross_entropy(model(batch.inputs), batch.targets, reduction="none")
        loss = (losses * batch.drawn["weight"]).mean() * batch.drawn["times"]
        if received.phase.round == 0:
            loss = loss * len(received.message["parameters"])
        return loss, {"weight": batch.drawn["weight"].mean(), "loss_twice": 2 * loss.detach()}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("model", ["cnn", "mlp"])
def test_drawn_tensors_rates_and_figures(model, make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "fedavg", Drawing)
    settings = {"model": model, "lr": 0.001, "lr_steps": "1,2", "momentum": 0.5, "clip_norm": 1.0, "width": None}
    config = make_config(**{**SMALL, **settings})
    equal, tapes, diagnostics = same_runs(config, make_data((20, 13)), tmp_path, monkeypatch)
    assert equal
    # The loss looks at what was received, and the number is another in the second epoch: two passes a client and round,
    # but for the second client, whose five batches of two are too few.
    assert tapes.recorded == 6
    assert "no-cuda-graph" not in diagnostics


class Looking(FedAvg):
    """A method whose loss looks at the received message."""

    def loss(self, model, batch, received):
        return super().loss(model, batch, received) * len(received.message)


def passes(sizes, make_data, make_config, kind=FedAvg, exchanges=1, **settings):
    """Return the tapes after exchanges of clients of these sizes, and which passes ran.

    The passes are letters: e(ager), r(ecording), p(layed again).
    """
    context, tapes, line = RunContext(make_config(**{**SMALL, **settings}), make_data(sizes)), Tapes(), []
    context.networks.lane_graphs[0] = tapes
    method = kind()
    with pytest.MonkeyPatch.context() as patch, use_backend("reference"):
        call, loss = captured.Recorded.__call__, kind.loss

        def note_pass(self, model, batch, received):
            line.append("e" if isinstance(batch.phase, Phase) else "r")
            return loss(self, model, batch, received)

        patch.setattr(
            captured.Recorded, "__call__", lambda self, batches: line.append("p" * len(batches)) or call(self, batches)
        )
        patch.setattr(kind, "loss", note_pass)
        patch.setattr(kind, "replayable", True)
        for i in range(exchanges):
            client = Client(context, i % len(sizes), {})
            method.client_update(client, Phase(i // len(sizes), "train", "update"), context.networks.initial())
            line.append(" ")
    return tapes, "".join(line).split()


def test_a_pass_is_recorded_after_two_batches_where_five_are_left(make_data, make_config):
    def line(count, **settings):
        return passes((count,), make_data, make_config, batch_size=4, **settings)[1]

    assert line(24, local_epochs=1) == ["eeeeee"]
    assert line(28, local_epochs=1) == ["eerppppp"]
    assert line(15, local_epochs=4) == ["eerpe" + 3 * "pppe"]  # the batches of 3 samples are too few
    assert line(15, local_epochs=8) == ["eerpe" + "pppe" + "ppprp" + 5 * "pppp"]
    assert line(28, local_epochs=3, local_steps=6) == ["eeeeee"]
    assert line(28, local_epochs=3, local_steps=7) == ["eerppppp"]


def test_what_was_received_is_not_replayed_for_another_client(make_data, make_config):
    tapes, line = passes((20, 20), make_data, make_config, exchanges=4, local_epochs=1)
    assert tapes.recorded == 1
    assert line[1:] == ["p" * 10] * 3
    tapes, _ = passes((20, 20), make_data, make_config, Looking, exchanges=4, local_epochs=1)
    assert tapes.recorded == 4


def test_clients_of_few_batches_share_a_pass_that_lasts(make_data, make_config):
    short = {"sizes": (12, 12, 12, 12), "batch_size": 4, "local_epochs": 1, "exchanges": 5}
    assert passes(make_data=make_data, make_config=make_config, **short)[1] == ["eee", "eee", "erpp", "ppp", "ppp"]
    # One pass shows that recordings of this loss serve a single exchange.
    _, line = passes(make_data=make_data, make_config=make_config, kind=Looking, **short)
    assert line == ["eee", "eee", "erpp", "eee", "eee"]


def test_a_vector_that_many_clients_get_is_sent_once():
    networks = Networks(None, None, torch.device("meta"), dict)
    vector = torch.ones(3)
    sent = networks.send(vector)
    assert sent.device.type == "meta"
    assert networks.send(vector) is sent
    assert networks.send(sent) is sent
    vector.add_(1)
    again = networks.send(vector)
    assert again is not sent
    assert networks.send(vector.clone()) is not again


@pytest.mark.sampled(1)
@pytest.mark.parametrize("change", ["precision", "statistics", "method"])
def test_a_recorded_pass_is_for_a_network_as_it_was(change, make_data, make_config):
    context, tapes = RunContext(make_config(**{**SMALL, "model": "resnet8"}), make_data()), Tapes()
    context.networks.lane_graphs[0] = tapes
    method = FedAvg()
    with use_backend("reference"):
        for i in range(2):
            precision = "bf16" if change == "precision" and i else "fp32"
            if change == "statistics":
                context.config = make_config(**{**SMALL, "model": "resnet8", "freeze_bn_after": 1})
            if change == "method":
                method = FedAvg()
            with compute_in(precision):
                method.client_update(Client(context, 0, {}), Phase(i, "train", "update"), context.networks.initial())
    assert tapes.recorded == 2


class Graph:
    """A stand-in for ``torch.cuda.CUDAGraph`` whose end fails after the driver has given the recording up."""

    made, broken = 0, False

    def capture_begin(self, pool, capture_error_mode):
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        Graph.made += 1
        if self.broken == "at once":
            raise RuntimeError("no recording")

    def capture_end(self):
        if self.broken:
            raise RuntimeError("invalidated")

    def replay(self):
        return "replayed"


def test_after_a_recording_the_process_is_as_before(monkeypatch):
    mode = 1
    graphs = Graphs(torch.device("cuda"))

    def set_mode(value):
        nonlocal mode
        mode = value

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    replay, found = graphs.record(lambda: (mode, gc.isenabled()))
    assert (replay(), found) == ("replayed", (2, False))
    assert (mode, gc.isenabled()) == (1, True)
    for broken, error in ((False, KeyboardInterrupt), (True, KeyboardInterrupt), (True, None), ("at once", None)):
        monkeypatch.setattr(Graph, "broken", broken)
        with pytest.raises(error or RuntimeError):
            graphs.record(Mock(side_effect=error))
        assert (mode, gc.isenabled()) == (1, True)
    assert Graph.made == 5


# -- on a GPU ------------------------------------------------------------------------------------------------------


class Randomly(FedAvg):
    """A method that trains a network with its own dropout."""

    replayable = True

    def client_update(self, client, phase, message):
        with torch.random.fork_rng(devices=[client.device]):
            torch.manual_seed(phase.round)
            torch.cuda.manual_seed(phase.round)
            layers = nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 3)
            module = nn.Sequential(*layers).to(client.device)
            client.fit(self, phase, module)
        return {"parameters": torch.cat([p.detach().flatten() for p in module.parameters()])}


def on_the_gpu(config, data, kind, exchanges, graphs):
    """Return answers and figures of clients' exchanges on a GPU, with graphs or without."""
    found = []
    with reproducible(), compute_in(config.precision):
        context = RunContext(config, data)
        if not graphs:
            context.networks.lane_graphs[0] = None
        message, method, states = context.networks.initial(), kind(**config.options), [{} for _ in data.clients]
        extra = {"control": torch.zeros_like(message["parameters"])} if kind is METHODS["scaffold"] else {}
        for i in range(exchanges):
            k = i % len(data.clients)
            client = Client(context, k, states[k])
            phase = Phase(i // len(data.clients), "train", "update")
            answer = method.client_update(client, phase, {**message, **extra})
            found.append(({name: value.cpu() for name, value in answer.items()}, dict(client.report)))
            if not extra:
                message = {name: answer.get(name, value) for name, value in message.items()}
        if graphs:
            assert context.networks.graphs._last is not None
            assert not context.networks.graphs.off, context.notices.warnings
        assert "no-cuda-graph" not in context.notices.warnings
    return found


def assert_same(left, right):
    assert len(left) == len(right)
    for (a, told), (b, said) in zip(left, right, strict=True):
        assert told == said
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


GPU = {"device": "cuda", "batch_size": 4, "local_epochs": 3}


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["cnn", "resnet8", "vit-tiny"])
@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fml"])
def test_graphs_have_the_bits_of_eager_passes(method, model, precision, make_data, make_config):
    width = None if model == "vit-tiny" else 8
    config = make_config(method, **{**SMALL, **GPU, "model": model, "width": width, "precision": precision})
    data = make_data((50, 47))
    # A client's state would come back on the CPU: two clients, and a second round only where there is none.
    exchanges = 4 if method == "fedavg" else 2
    graph, eager = (on_the_gpu(config, data, METHODS[method], exchanges, graphs) for graphs in (True, False))
    assert_same(graph, eager)
    assert all(math.isfinite(report["loss"]) for _, report in graph)


@pytest.mark.gpu
@NEEDS_CUDA
def test_graphs_draw_the_numbers_of_eager_passes(make_data, make_config):
    config, data = make_config(**{**SMALL, **GPU}), make_data((50, 47))
    assert_same(*(on_the_gpu(config, data, Randomly, 4, graphs) for graphs in (True, False)))


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize(
    ("name", "model", "precision"),
    [
        *itertools.product(["fusefl", "fedgid"], ["cnn", "resnet8"], ["fp32", "bf16"]),
        *((name, "resnet8", "fp32") for name in CLAIMED if name not in ("fusefl", "fedgid")),
    ],
)
def test_runs_with_graphs_are_runs_without(name, model, precision, make_data, make_config, tmp_path, monkeypatch):
    given = {**SMALL, **GPU, "model": model, "precision": precision, **SETTINGS.get(name, {}), **OWN.get(name, {})}
    if METHODS[name].one_shot:
        given.update(rounds=None, local_epochs=8)
    config, recorded, record = make_config(name, **given), [], Graphs.record
    monkeypatch.setattr(Graphs, "record", lambda self, work: recorded.append(self) or record(self, work))
    for folder in ("graphs", "eager"):
        data = None if name in OWN else make_data((50, 47, 20))
        summary = run(config, data=data, out=tmp_path / folder)
        assert "no-cuda-graph" not in summary["diagnostics"]
        monkeypatch.setattr(Networks, "graphs", None)
    assert recorded
    assert same_bits(tmp_path / "graphs", tmp_path / "eager")


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("kind", [READING, INDEXING], ids=["reading", "indexing"])
def test_after_a_failed_recording_a_gpu_goes_on(kind, make_data, make_config):
    config, data = make_config(**{**SMALL, **GPU}), make_data((50, 47))
    found = []
    for graphs in (True, False):
        with reproducible():
            context = RunContext(config, data)
            if not graphs:
                context.networks.lane_graphs[0] = None
            client = Client(context, 0, {})
            answer = kind().client_update(client, Phase(0, "train", "update"), context.networks.initial())
            found.append((answer, client.report))
            assert ("no-cuda-graph" in context.notices.warnings) == graphs
    assert_same(*([trained] for trained in found))
    for later in (FedAvg, Randomly):
        assert_same(*(on_the_gpu(config, data, later, 4, graphs) for graphs in (True, False)))
