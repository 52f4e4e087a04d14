"""Settings that the user gave: a run refuses unused settings, and keeps nothing."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

import fedkern
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.methods import METHODS, FedAvg, Round
from python_tests.interrupted import KillAt, play_killed

TINY = {"model": "cnn", "width": 2, "progress": False, "pictures": False, "grad_cam": 0, "rounds": 2}


class Loop(FedAvg):
    """A loop of one epoch at its own rate."""

    rate = 0.05

    def passes(self, client):
        return 1

    def client_update(self, client, phase, message):
        model = client.model(message)
        optimizer = torch.optim.SGD(model.parameters(), self.rate or client.lr)
        for _ in range(self.passes(client)):
            for batch in client.batches():
                optimizer.zero_grad()
                cross_entropy(model(batch.inputs), batch.targets).backward()
                optimizer.step()
        return client.upload(model)


class Reading(Loop):
    """The loop at the run's rate, for the run's epochs."""

    rate = 0.0

    def passes(self, client):
        return client.epochs


class Rows(FedAvg):
    """A loop over all samples at once."""

    def client_update(self, client, phase, message):
        model = client.model(message)
        for batch in client.in_order():
            cross_entropy(model(batch.inputs), batch.targets).backward()
        return client.upload(model)


class Summing(FedAvg):
    """A method whose server averages uploads by itself."""

    def server_update(self, server, phase, uploads):
        server.state["parameters"] = torch.stack([upload.message["parameters"] for upload in uploads]).mean(0)


class Stepping(Summing):
    """A method whose server averages uploads by itself, and steps by the server's rule."""

    def server_update(self, server, phase, uploads):
        before = server.state["parameters"]
        super().server_update(server, phase, uploads)
        state = {**server.state, "parameters": before}
        server.state["parameters"] = server.optimiser.step(state, server.state["parameters"])


class Watching(FedAvg):
    """A method whose server looks at uploads and averages as FedAvg does."""

    def server_update(self, server, phase, uploads):
        super().server_update(server, phase, uploads)
        server.report["seen"] = 1.0


class Everybody(FedAvg):
    """FedAvg with all clients."""

    def rounds(self, federation):
        for _ in range(federation.rounds):
            yield Round(participants="all")


class Prepared(Loop):
    """The loop after a set-up round that stores something."""

    def rounds(self, federation):
        yield Round("set-up", participants="all", one_off=True)
        yield from super().rounds(federation)


def loop(model, client):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for batch in client.batches():
        optimizer.zero_grad()
        cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()


@pytest.fixture
def data(make_data):
    return replace(make_data((9, 9, 9, 9)), name="arrays")


@pytest.mark.parametrize(
    ("method", "settings", "refused"),
    [
        (Loop, {}, ""),
        (Loop, {"batch_size": 4, "local_epochs": 1, "momentum": 0.0, "clip_norm": 0.0}, ""),
        (Loop, {"local_epochs": 3}, "local_epochs has no effect on Loop"),
        (Loop, {"lr": 0.05}, "lr has no effect on Loop, whose clients never read client.lr: give your optimiser lr"),
        (Loop, {"lr_decay": 0.5}, "lr_decay has no effect on Loop"),
        (Loop, {"momentum": 0.9}, "momentum has no effect on Loop, .* train with client.train"),  # the default
        (Loop, {"weight_decay": 0.1}, "weight_decay has no effect on Loop"),
        (Loop, {"clip_norm": 1.0}, "clip_norm has no effect on Loop"),
        (Loop, {"optimizer": "adamw"}, "optimizer has no effect on Loop"),
        (Loop, {"optimizer": torch.optim.Adam}, "optimizer has no effect on Loop"),
        (Loop, {"freeze_bn_after": 1}, "freeze_bn_after has no effect on Loop"),
        (Reading, {"lr": 0.1, "lr_decay": 0.5, "batch_size": 4, "local_epochs": 2}, ""),
        (Reading, {"local_steps": 2}, ""),
        (Rows, {"batch_size": 4}, "batch_size has no effect on Rows"),
        (Summing, {"lr": 0.1, "momentum": 0.5, "batch_size": 4, "sample_fraction": 0.5}, ""),
        (Summing, {"server_rule": "adam"}, r"server_rule has no effect on Summing, .* call self.average\(server, uplo"),
        (Summing, {"server_lr": 0.5}, "server_lr has no effect on Summing"),
        (Summing, {"aggregator": "median"}, "aggregator has no effect on Summing"),
        (Stepping, {"server_rule": "adam", "server_lr": 0.5}, ""),
        (Stepping, {"server_rule": "adam", "aggregator": "median"}, "aggregator has no effect on Stepping"),
        (Watching, {"server_rule": "adam", "server_lr": 0.5, "aggregator": "median"}, ""),
        (Everybody, {"sample_fraction": 0.5}, "sample_fraction has no effect on Everybody"),
        (Prepared, {"momentum": 0.5}, "momentum has no effect on Prepared"),
        ("fedcgs", {"lr": 0.1, "rounds": None}, "lr has no effect on FedCGS, whose clients never read .* leave lr out"),
        ("oneshot-fedavg", {"lr_decay": 0.5, "rounds": None}, "lr_decay has no effect on oneshot-fedavg, whose client"),
    ],
)
def test_settings_that_nothing_uses_are_refused(method, settings, refused, data, tmp_path):
    out = tmp_path / "run"

    def play():
        fedkern.simulate(method, data=data, out=out, workers=1, **{**TINY, **settings})

    if not refused:
        play()
        return
    with pytest.raises(UserError, match=f"^{refused}"):
        play()
    assert not out.exists()


@pytest.mark.usefixtures("forked_workers")
def test_marks_travel_from_workers(data, refuses, tmp_path, processes):
    how = {"data": data, "workers": 2, **TINY}
    fedkern.simulate(Reading, lr=0.1, batch_size=4, local_epochs=2, out=tmp_path / "reads", **how)
    with refuses(r"^lr has no effect on Loop"):
        fedkern.simulate(Loop, lr=0.1, batch_size=4, out=tmp_path / "run", **how)
    assert len(processes) == 4


def test_a_train_function_is_named_and_its_way_out(data, tmp_path):
    how = {"data": data, "train": loop, "out": tmp_path / "run", **TINY}
    with pytest.raises(UserError, match="lr has no effect on FedAvg with the train function loop, whose clients never"):
        fedkern.simulate("fedavg", lr=0.1, **how)
    fedkern.simulate("fedavg", batch_size=4, **how)


def test_a_run_killed_in_its_first_round_still_refuses(make_data, make_config, monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "fedavg", Prepared)
    for number, at in enumerate((KillAt("client", 1), KillAt("client", 4))):  # in the set-up round, and after it
        config = make_config("fedavg", data="digits", clients=3, width=2, momentum=0.5)
        config = config.replace(asked=frozenset({"momentum"}))
        out = tmp_path / str(number)
        play_killed(config, out=out, data=make_data(), at=at)
        with pytest.raises(UserError, match=r"^--momentum has no effect on Prepared"):
            run(config.replace(asked=frozenset()), out=out, data=make_data(), resume=True)
    config = make_config("fedavg", momentum=0.5)  # nobody gave it
    run(config, out=tmp_path / "plain", data=make_data())


def test_a_comparison_notes_what_its_methods_do_not_use(data, tmp_path):
    settings = {name: value for name, value in TINY.items() if name != "pictures"}
    found = fedkern.compare([Loop, "fedavg"], data=data, seeds=1, out=tmp_path, momentum=0.5, batch_size=4, **settings)
    (note,) = [note for note in found.notes if "effect" in note]
    assert note.startswith("--momentum has no effect on Loop, ")
    assert note.endswith(" The defaults of --local-epochs, --lr, --optimizer have no effect on Loop.")
    assert not any(note.startswith("Warnings: no-effect") for note in found.notes)
