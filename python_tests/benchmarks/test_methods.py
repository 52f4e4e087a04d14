"""Tests of the plain methods, which compute what fedkern's compute, and of whole runs as their page judges them."""

import argparse
import importlib
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_methods, processes
from benchmarks.bench_methods import CASES, Case, Row
from benchmarks.gpu_use import Use
from benchmarks.plain import common, feddra, fedgid, fediod, fedlpfm, fedprox
from fedkern import models
from fedkern.cli import flags, request
from fedkern.data import load
from fedkern.engine.run import run
from fedkern.methods import FedGID, FedLPFM, Phase, method_registry
from fedkern.methods.common.robust_weights import exponentiated_step, project
from fedkern.methods.fediod.losses import distillation, importance, teacher_terms
from fedkern.methods.protocol import Batch
from fedkern.models.pretrained.vocabulary import Tokens
from fedkern.settings.config import RunConfig
from fedkern.tasks import RETRIEVAL

PHASE = Phase(0, "train", "update")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def network(seed=0):
    return models.build("cnn", classes=10, channels=3, image_size=32, seed=seed, width=4)


def batch(**drawn):
    torch.manual_seed(1)
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    return Batch(inputs=images, targets=labels, indices=labels.numpy(), phase=PHASE, drawn=drawn)


def make_received(model):
    return SimpleNamespace(model=model, phase=PHASE, round_cache={}, samples=6, epochs=1, message={}, extras={})


def same_loss_and_gradients(theirs, ours, model):
    """Check that two losses of ``model`` have the same gradients.

    The tolerance is 1e-4 of the largest entry, because terms of a loss may cancel.
    """
    torch.testing.assert_close(theirs, ours, **CLOSE)
    gradients = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in (theirs, ours)]
    a, b = (torch.cat([g.flatten() for g in loss_gradients if g is not None]) for loss_gradients in gradients)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * float(b.abs().max()))


# -- the same mathematics ----------------------------------------------------------------------------------------------


def test_fedgid_has_the_loss_of_fedkern():
    model, globally = network().train(), common.frozen(network(1))
    options = {"alpha": 0.7, "lambda": 0.5, "temperature": 2.0}
    method = FedGID(FedGID.Options.parse(options, method="fedgid"))
    backgrounds = torch.randn(6, 3, 32, 32)
    data = batch(images=backgrounds, index=torch.arange(6).numpy(), alpha=0.7)
    data.drawn |= method.prepare(model, data, make_received(globally))
    ours, _ = method.loss(model, data, make_received(globally))
    args = argparse.Namespace(**options)
    theirs = fedgid.loss_of(model, data.inputs, data.targets, globally=globally, backgrounds=backgrounds, args=args)
    same_loss_and_gradients(theirs, ours, model)


def test_fedlpfm_has_the_loss_of_fedkern():
    model, teacher = network().train(), 3 * torch.randn(6, 10)
    options = {"lambda": 0.9, "temperature": 4.0}
    method, data = FedLPFM(FedLPFM.Options.parse(options, method="fedlpfm")), batch(teacher=teacher[None])
    ours, _ = method.loss(model, data, make_received(None))
    theirs = fedlpfm.loss_of(model, data.inputs, data.targets, teacher, argparse.Namespace(**options))
    same_loss_and_gradients(theirs, ours, model)


def test_fedprox_has_the_gradient_of_fedkern():
    model, globally, data = network().train(), network(1), batch()
    method = method_registry.get("fedprox")(method_registry.get("fedprox").Options.parse({"mu": 0.3}, method="fedprox"))
    theirs = fedprox.loss_of(model, data.inputs, data.targets, globally=globally, mu=0.3)
    parameters = list(model.parameters())
    own = torch.cat([g.flatten() for g in torch.autograd.grad(theirs, parameters)])
    gradients = torch.autograd.grad(method.loss(model, data, make_received(globally)), parameters)
    ours = torch.cat([g.flatten() for g in gradients])
    flat, sent = (torch.cat([p.detach().flatten() for p in net.parameters()]) for net in (model, globally))
    method.adjust_gradient(flat, ours, SimpleNamespace(parameters=sent))
    torch.testing.assert_close(own, ours, rtol=1e-4, atol=1e-6)


def test_feddra_has_the_loss_of_fedkern():
    about = {"channels": 3, "image_size": (32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "width": 16}
    words = ("red", "green", "two", "three")
    model, globally = (models.build_pair(**about, vocabulary=words, seed=seed) for seed in (0, 1))
    texts = ["red two", "green two", "red three", "green three red", "two", "three"]
    data = replace(batch(), targets=model.tokenize(texts), task=RETRIEVAL)
    globally, kind = common.frozen(globally), method_registry.get("feddra")
    method = kind(kind.Options.parse({"mu": 3.0}, method="feddra"))
    ours, _ = method.loss(model.train(), data, make_received(globally))
    args = argparse.Namespace(mu=3.0, lambda1=1.0)
    padded = Tokens(*(torch.nn.functional.pad(part, (0, 2)) for part in data.targets))
    theirs = feddra.loss_of(model, data.inputs, feddra.trim(*padded), globally=globally, args=args)
    same_loss_and_gradients(theirs, ours, model)


@pytest.mark.parametrize("losses", [[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 9.0], [5.0, 5.0, 1.0, 1.0], [2.0] * 4])
@pytest.mark.parametrize("rho", [0.1, 1.0, 2.0])
def test_feddra_weighs_clients_as_fedkern_does(losses, rho):
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).numpy()
    ours = project(exponentiated_step(weights, torch.tensor(losses).double().numpy(), 0.5), rho)
    assert feddra.new_weights(weights.tolist(), losses, 0.5, rho) == pytest.approx(ours.tolist(), abs=1e-9)


def test_fediod_has_the_losses_of_fedkern():
    torch.manual_seed(2)
    shares = torch.tensor([0.5, 0.3, 0.2])
    logits, patches = 2 * torch.randn(3, 5, 4), torch.randn(3, 5, 2, 2)
    weights = {"w_real": 8.0, "w_balance": 2.0}
    spoken = logits.log_softmax(2)
    labels = [torch.tensor([0, 0, 1]), torch.tensor([1]), torch.tensor([0, 1, 1])]
    counts = torch.stack([torch.bincount(own, minlength=4) for own in labels]).float()
    total, _ = teacher_terms(spoken, shares, 2.0)
    realism = (shares * torch.nn.functional.softplus(-patches).mean((1, 2, 3))).sum()
    theirs = fediod.generator_loss(list(logits), list(patches), shares.tolist(), argparse.Namespace(**weights))
    torch.testing.assert_close(theirs, total + 8.0 * realism, **CLOSE)

    student = torch.randn(5, 4)
    ours = distillation(student, spoken, importance(counts, None), counts > 0)
    own = fediod.student_loss(student, fediod.ensemble(list(logits), fediod.class_weights(labels, 4)))
    torch.testing.assert_close(own, ours, **CLOSE)


@pytest.mark.parametrize(
    ("method", "settings", "options"),
    [
        ("fedavg", {"rounds": 2, "optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}, {}),
        ("fedprox", {"rounds": 2, "weight_decay": 1e-3}, {"mu": 0.5}),
        ("scaffold", {"rounds": 3}, {}),
        ("fusefl", {"local_epochs": 5}, {"virtual_features": 16}),
    ],
)
def test_a_run_of_whole_batches_ends_where_fedkern_ends(method, settings, options, tmp_path, monkeypatch):
    """Only the data and the first weights are drawn with one batch per client, and these are the same."""
    model = "resnet8" if method == "fusefl" else "cnn"
    config = RunConfig.make(
        method, data="digits", train_samples=60, clients=3, partition="iid", batch_size=64, model=model, width=4,
        threads=1, grad_cam=0, seed=3, options=options, **settings,
    )  # fmt: skip
    run(config, out=tmp_path / "run")
    words = bench_methods.plain_words(config, tmp_path, seed=3, threads=1)
    monkeypatch.setattr(sys, "argv", [method, *words])
    importlib.import_module(f"benchmarks.plain.{method}").main()
    ours = bench_methods.read_rounds("fedkern", tmp_path)
    theirs = bench_methods.read_rounds("plain", tmp_path)
    assert len(ours) == len(theirs)
    if method == "fusefl":  # features for the calibration are drawn
        ours, theirs = ours[:-1], theirs[:-1]
    for name in ("loss", "confidence", "validation_loss"):
        assert theirs[-1][name] == pytest.approx(ours[-1][name], rel=1e-3), name
    assert theirs[-1]["accuracy"] == pytest.approx(ours[-1]["accuracy"], abs=0.01)


def test_the_data_are_those_of_fedkern():
    args = common.arguments("").parse_args(["--data", "digits", "--train-samples", "100", "--partition", "iid"])
    found, source = common.load_data(args), load("digits", clients=5, partition="iid", train_samples=100)
    assert found.sizes == [len(split) for split in source.clients]
    assert [torch.equal(a.columns[0], b.labels) for a, b in zip(found.clients, source.clients, strict=True)] == [
        True
    ] * 5


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_a_command_of_all_variants(case, tmp_path):
    words = bench_methods.run_words(case, tmp_path, "/data", seed=1, threads=2)
    effective = request.effective_config(flags.parse_run(words))
    wanted = bench_methods.config(case, tmp_path, "/data").replace(seed=1, threads=2)
    assert effective.differences(wanted) == []
    plain = bench_methods.plain_words(wanted, tmp_path, seed=1, threads=2)
    module = importlib.import_module(f"benchmarks.plain.{case.method}")
    args = common.arguments("", **module.FLAGS).parse_args(plain)
    assert (args.lr, args.seed, args.batch_size) == (effective.lr, 1, effective.batch_size)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"options": {"distill_on": "logits"}}, "distill_on"),
        ({"clip_norm": 1.0}, "clip_norm"),
        ({"buffers": "local"}, "buffers"),
        ({"lr_steps": "3"}, "lr_steps"),
    ],
)
def test_what_the_plain_method_does_not_compute_is_refused(given, word, tmp_path):
    with pytest.raises(ValueError, match=word):
        bench_methods.plain_words(RunConfig.make("fedgid", **given), tmp_path, seed=0, threads=0)


# -- costs -------------------------------------------------------------------------------------------------------------


def test_plain_variants_compute_without_the_kernels(monkeypatch):
    """The plain variants use fedkern's networks, which would call operators."""
    monkeypatch.setattr("os.environ", {"FEDKERN_BACKEND": "cpu", "PYTHONDONTWRITEBYTECODE": "1"})
    for name in ("plain", "plain one core"):
        assert bench_methods.environment(name, None)["FEDKERN_BACKEND"] == "reference"
    assert bench_methods.environment("fedkern", None).keys() == {"PYTHONPATH"}


def test_the_cost_of_a_command_has_its_children(tmp_path):
    child = "x = bytearray(60 << 20); x[::4096] = b'1' * len(x[::4096]); import time; time.sleep(0.6)"
    spin = "import time\nwhile time.process_time() < 0.3: pass\n"
    script = f"import subprocess, sys\np = [subprocess.Popen([sys.executable, '-c', s]) for s in ({child!r}, {spin!r})]"
    script += "\nfor one in p: one.wait()"
    cost = processes.run([sys.executable, "-c", script], {}, tmp_path)
    assert cost.cpu_seconds > 0.3
    assert cost.seconds >= 0.6
    assert cost.peak_bytes > 60 << 20
    assert cost.processes == 3


# -- rows, pages -------------------------------------------------------------------------------------------------------


def row(method="fedavg", setting="default", **seconds):
    return Row(
        method, setting, main="accuracy", seconds={name: list(values) for name, values in seconds.items()},
        cpu_seconds={name: list(values) for name, values in seconds.items()},
        peak_bytes={name: [10**6] * len(values) for name, values in seconds.items()},
        round_seconds={name: [value / 2 for value in values] for name, values in seconds.items()},
        figure={name: [0.5, 0.6, 0.7][: len(values)] for name, values in seconds.items()},
    )  # fmt: skip


def test_a_speed_up_is_the_median_of_the_ratios_of_one_seed():
    assert row(plain=[10.0, 20.0, 30.0], fedkern=[5.0, 5.0, 30.0]).speedup("plain") == 2.0
    assert row(fedkern=[1.0]).speedup("plain") is None


def test_a_run_with_other_settings_before_counts_in_no_mean():
    rows = [row("fedavg", before=[4.0], fedkern=[2.0]), row("fediod", before=[90.0], fedkern=[1.0], plain=[3.0])]
    rows[1].differs = ["preset: paper, study"]
    assert bench_methods.speedups(rows, "before", "fedkern") == [2.0]
    assert bench_methods.speedups(rows, "plain", "fedkern") == [3.0]


def test_cases_measured_again_replace_their_own_alone(tmp_path):
    machine = {"cpu": "A chip", "cores": 2, "isa": "avx2", "torch": "2.13.0", "time": "2026-01-01"}
    rows = [row("fedavg", plain=[2.0], fedkern=[1.0]), row("fedgid", plain=[3.0], fedkern=[1.0])]
    path = bench_methods.write(rows, machine, before="abc", folder=tmp_path)
    assert path == tmp_path / "methods_a-chip.json"
    again = row("fedavg", plain=[4.0], fedkern=[1.0])
    again.missing = {"before": "no --before was given"}
    again.differs = ["lr: 0.1, 0.2"]
    bench_methods.write([again], machine, before="abc", folder=tmp_path)
    found = {case.name: case for case in bench_methods.read(path, machine)}
    assert [found[name].speedup("plain") for name in ("fedavg default", "fedgid default")] == [4.0, 3.0]
    assert bench_methods.read(path, {**machine, "cpu": "another"}) == []
    page = path.with_suffix(".md").read_text()
    assert "fedgid" in page
    assert "no --before was given" in page
    assert "lr: 0.1, 0.2" in page
    assert "| fedavg | 4.00 (2.00) | 1.00 (0.50) | 4.00× (4.00×) |" in page


def record_commands(monkeypatch):
    """Replace every command by one that writes the records of a round, and return the list of commands."""
    asked, record = [], {"round_seconds": 1.0, "accuracy": 0.5}

    def fake(command, environment, folder):
        asked.append(command)
        (folder.parent / "run").mkdir()
        (folder.parent / "run" / "metrics.jsonl").write_text(json.dumps(record))
        (folder.parent / "records.json").write_text(json.dumps({"rounds": [record]}))
        return processes.Cost(2.0, 1.0, 100, 1)

    monkeypatch.setattr(processes, "run", fake)
    return asked


def test_on_a_gpu_all_variants_are_sent_there_and_it_is_watched(tmp_path, monkeypatch):
    asked = record_commands(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_methods.gpu_use, "watch", lambda: nullcontext(Use([30.0, 50.0], 7_000_000)))
    case = Case("fedavg", "default", {"rounds": 1})
    found = bench_methods.measure(case, ("plain", "fedkern", "bf16"), 2, before=None, data_root=None, device="cuda")
    assert [command[command.index("--device") + 1] for command in asked] == ["cuda"] * 6
    assert found.later_seconds == {}  # there is one round
    assert found.gpu_utilisation == {key: [40.0, 40.0] for key in ("plain", "fedkern", "bf16")}
    machine = {"cpu": "A chip", "gpu": "A GPU", "cores": 2, "isa": "avx2", "torch": "2.13.0", "time": "2026-01-01"}
    path = bench_methods.write([found], machine, before="", folder=tmp_path)
    assert path.name == "methods_a-gpu.json"
    page = path.with_suffix(".md").read_text()
    assert "| fedavg | 40, 7 | 40, 7 | 40, 7 |" in page
    assert "Promised" not in page
    assert bench_methods.read(path, machine) == [found]


def test_variants_run_in_turn_with_the_seeds_of_the_repeats(tmp_path, monkeypatch):
    asked = record_commands(monkeypatch)
    case = Case("fedavg", "default", {"rounds": 1})
    found = bench_methods.measure(case, ("plain", "before", "fedkern"), 2, before=None, data_root=None)
    plain, ours = "benchmarks.plain.fedavg", "fedkern.run"
    turns = [(command[2], command[command.index("--seed") + 1]) for command in asked]
    assert turns == [(plain, "0"), (ours, "0"), (ours, "1"), (plain, "1")]
    assert found.missing == {"before": "no --before was given"}
    assert found.seconds == {"plain": [2.0, 2.0], "fedkern": [2.0, 2.0]}
    assert found.main == "accuracy"


def test_a_command_ends_with_whoever_measures_it(tmp_path, monkeypatch):
    started = []

    def interrupt(pid, options):
        started.append(pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes.os, "wait4", interrupt)
    with pytest.raises(KeyboardInterrupt):
        processes.run([sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path)
    assert processes.session(started[0]) == []
