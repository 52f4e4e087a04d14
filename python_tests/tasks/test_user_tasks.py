"""Tests of user-defined losses and metrics, also registered ones: a run's figures, and their inputs."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, StackDataset, TensorDataset, default_collate

import fedkern
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics, read_summary
from fedkern.errors import UserError
from fedkern.methods import register_metric
from fedkern.report.live.progress_bar import run_headline
from fedkern.settings.config import load_settings
from fedkern.tasks import OwnTask, user_tasks
from python_tests.hearing import Hearing
from python_tests.interrupted import Kill, KillAt, outcome
from python_tests.smallest import SETTINGS

HERE = {"progress": False, "pictures": False, "workers": 1, "threads": 1}
AT_ONCE, APART = "loss of a set: of all its samples at once", "loss of a set: mean over batches, by their targets"
FIGURES = {"accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece", "confidence", "loss"}


def site(count, seed=0, ignored=None):
    rows = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    targets = rows[:, :3].argmax(1)
    targets[: count // 3] = targets[: count // 3] if ignored is None else ignored
    return TensorDataset(rows, targets)


def simulate(out, method="fedavg", **given):
    """Return a run of a round, the outputs of its network on the test set, and the lines of its header."""
    heard = Hearing()
    usual = {"data": [site(30), site(20, 1)], "test": site(150, 2), "model": nn.Linear(4, 3), "rounds": 1, "lr": 0.1}
    run = fedkern.simulate(method, **usual | given | HERE, out=out, listener=heard)
    with torch.no_grad():
        return run, run.model()((usual | given)["test"].tensors[0]), run_headline(heard.info)


def focal(outputs, targets):
    """Return a user-defined loss, in which correct samples count less."""
    return ((1 - outputs.softmax(1).gather(1, targets[:, None])) * F.cross_entropy(outputs, targets)).mean()


class Counted:
    """Figure in the form of torchmetrics, which writes into its inputs."""

    higher_is_better = True

    def reset(self):
        self.right = self.all = 0

    def update(self, outputs, targets):
        self.right += int((outputs.argmax(1) == targets).sum())
        self.all += len(targets.fill_(outputs.zero_().argmax()))

    def compute(self):
        return torch.tensor(self.right / self.all)


WEIGHT = torch.tensor([1.0, 2.0, 4.0])
LOGARITHMS = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1))
BYTES = [TensorDataset(x, y.byte()) for x, y in (site(n, seed).tensors for seed, n in enumerate((30, 20, 150)))]
LOSSES = {
    "bytes": ({"loss_fn": nn.CrossEntropyLoss(WEIGHT), "data": BYTES[:2], "test": BYTES[2]}, ["fedavg", "local"]),
    "metric": (
        {"metrics": {"zero": lambda x, y: x.zero_().sum(), "spread": lambda x, y: x.std(), "share": Counted()}},
        ["fedavg", "fedntd", "ensemble", "local"],
    ),
    "module": ({"loss_fn": nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2)}, ["fedavg", "local"]),
    "function": ({"loss_fn": partial(F.cross_entropy, weight=WEIGHT)}, ["ensemble"]),
    "likelihood": ({"loss_fn": nn.NLLLoss(), "model": LOGARITHMS}, ["fedavg", "fedntd"]),
    "classes": ({"loss_fn": focal, "classes": ["a", "b", "c"]}, ["fedavg", "fedntd"]),
}


@pytest.mark.parametrize(
    ("given", "method"), [(given, method) for given, methods in LOSSES.values() for method in methods]
)
def test_a_classification_keeps_its_figures(given, method, tmp_path):
    run, outputs, lines = simulate(tmp_path / "run", method, **given, rounds=None if method == "ensemble" else 1)
    rows, targets = site(150, 2).tensors
    assert {*run.metrics} >= FIGURES | {*given.get("metrics", ())}
    assert (run.config.main, run.predicts, AT_ONCE in lines) == ("accuracy", "probabilities", True)
    assert run.metrics.get("share", run.metrics["accuracy"]) == pytest.approx(run.metrics["accuracy"])
    if method != "local":  # whose figures are means
        assert run.metrics.get("spread", outputs.std()) == pytest.approx(float(outputs.std()), rel=1e-5)
        loss = given.get("loss_fn", F.cross_entropy)
        assert run.metrics["loss"] == pytest.approx(float(loss(outputs, targets)), rel=1e-6)
        assert run.metrics["accuracy"] == pytest.approx(float((outputs.argmax(1) == targets).double().mean()))
        chosen = outputs.softmax(1).gather(1, targets[:, None])
        assert run.metrics["confidence"] == pytest.approx(float(chosen.mean()), rel=1e-5)
        torch.testing.assert_close(run.predict(rows), outputs.softmax(1))
    assert run.evaluate() == pytest.approx({name: run.metrics[name] for name in run.evaluate()})


def test_outputs_without_a_name_are_missed_aloud(tmp_path):
    run, _, _ = simulate(tmp_path / "run", model=nn.Linear(4, 5), classes=3)
    assert "auroc" not in run.metrics
    assert "5 outputs for 3 named classes" in run.summary["diagnostics"]["unnamed-outputs"]


@pytest.mark.parametrize(("given", "main", "better"), [
    ({}, "loss", "min"),
    ({"metrics": {"a": max, "share": Counted()}}, "share", "max"),
    ({"metrics": {"a": max}, "main": "a", "better": "min"}, "a", "min"),
    ({"metrics": {"share": Counted()}, "main": "loss"}, "loss", "min"),
])  # fmt: skip
def test_the_main_figure_and_its_direction(given, main, better):
    task = OwnTask(**given)
    assert (task.main, task.better) == (main, better)


def test_another_loss_says_how_to_get_figures_of_classes(tmp_path):
    run, outputs, lines = simulate(tmp_path / "run", loss_fn=focal)
    assert "accuracy, AUROC and calibration: give classes=, where outputs are logits of classes" in lines
    assert (run.config.main, run.predicts) == ("loss", "outputs")
    assert torch.equal(run.predict(site(150, 2)), outputs)
    with pytest.raises(UserError, match=r"fedntd is for .* \(give classes= where outputs are their logits\)"):
        simulate(tmp_path / "other", "fedntd", loss_fn=focal)


@pytest.mark.parametrize(("given", "said"), [
    ({"metrics": {"auroc": max}}, "metrics has one called auroc, which every classification has"),
    ({"metrics": {"a": max}, "better": "min"}, "is of the main figure, the accuracy: name another"),
    ({"method": "moon", "loss_fn": nn.NLLLoss(), "model": LOGARITHMS}, "but the loss takes logarithms of prob"),
    ({"metrics": {"a": max}, "main": "a"}, 'better= is missing: say whether "min" or "max" is the better a'),
    ({"main": "f1"}, "main must be one of accuracy, loss, confidence, not 'f1'"),
    ({"test": StackDataset(torch.zeros(9, 4), torch.full((9,), -100))}, "The test set has no target that counts"),
])  # fmt: skip
def test_figures_that_a_classification_has(given, said, tmp_path):
    with pytest.raises(UserError, match=said):
        simulate(tmp_path / "run", **given)
    run, *_ = simulate(tmp_path / "other", metrics={"a": lambda outputs, targets: 0.5}, main="a", better="min")
    assert (run.config.main, run.config.better, {*run.metrics} >= FIGURES) == ("a", "min", True)


class Answering(nn.Linear):
    def forward(self, x):
        return SimpleNamespace(logits=super().forward(x), hidden=None)


def test_none_among_outputs(tmp_path):
    run, outputs, lines = simulate(
        tmp_path / "run", model=Answering(4, 3), loss_fn=lambda answer, y: F.cross_entropy(answer.logits, y).sqrt(),
        metrics={"bare": lambda answer, y: answer.hidden is None},
    )  # fmt: skip
    loss = F.cross_entropy(outputs.logits, site(150, 2).tensors[1]).sqrt()
    assert (AT_ONCE in lines, run.metrics["bare"]) == (True, 1)
    assert run.metrics["loss"] == pytest.approx(float(loss), rel=1e-6)


def dropping(items):
    return default_collate([(row, target) for row, target in items if row[3] < 0.5 or len(items) < 3])


@pytest.mark.parametrize("limit", [1 << 30, 20])
@pytest.mark.parametrize(
    ("kind", "ignored"), [("plain", -100), ("batch", -100), ("classes", -100), ("classes", 255), ("tokens", 255)]
)
def test_ignored_targets_and_dropped_items_count_nothing(kind, ignored, limit, monkeypatch, tmp_path):
    monkeypatch.setattr(user_tasks, "MOST", limit)
    own = kind in ("classes", "tokens")
    loss = nn.CrossEntropyLoss(WEIGHT, ignore_index=ignored) if own else nn.CrossEntropyLoss()
    sets, model = [site(30, 0, ignored), site(20, 1, ignored), site(200, 2, ignored)], nn.Linear(4, 3)
    if kind == "tokens":  # a row has one, and the network gives [n, 3, 1]
        sets = [TensorDataset(dataset.tensors[0], dataset.tensors[1][:, None]) for dataset in sets]
        model = nn.Sequential(model, nn.Unflatten(1, (3, 1)))
    given = {"data": sets[:2], "test": sets[2], "collate_fn": dropping, "model": model} | (
        {"loss_fn": loss} if own else {}
    )
    given |= {"batch_loss": lambda model, batch: loss(model(batch[0]), batch[1])} if kind == "batch" else {}
    run, _, lines = simulate(tmp_path / "run", **given)
    rows, targets = dropping([sets[2][row] for row in range(200)])
    with torch.no_grad():
        outputs = run.model()(rows)
    assert run.metrics["loss"] == pytest.approx(float(loss(outputs, targets)), rel=1e-5)
    assert (AT_ONCE in lines) == (limit > 20 and own)
    if kind in ("plain", "classes"):
        right = (outputs.argmax(1) == targets)[targets != ignored]
        assert run.metrics["accuracy"] == pytest.approx(float(right.double().mean()))
        assert {*run.metrics} >= FIGURES
    monkeypatch.setattr(OwnTask, "output_bytes", lambda *arguments: 1)
    again = fedkern.load(tmp_path / "run", **given).extend(2, progress=False)
    assert again.config.output_bytes == run.config.output_bytes


class Energy(nn.Linear):
    def forward(self, x):
        x = x.detach().requires_grad_()
        return super().forward(x), x


def slope(outputs, targets):
    return (torch.autograd.grad(outputs[0].sum(), outputs[1], create_graph=True)[0][:, 0] - targets).square().mean()


def pad(items):
    rows, targets = zip(*items, strict=True)
    return pad_sequence(rows, batch_first=True), pad_sequence(targets, batch_first=True, padding_value=-100)


def per_token(outputs, targets):
    return F.cross_entropy(outputs.mT, targets)


WORDS = [torch.arange(n)[None] for n in [*range(1, 6)] * 30]
TEXTS = ConcatDataset([TensorDataset(word % 5, word % 3) for word in WORDS])


@pytest.mark.parametrize(
    ("test", "given"),
    [
        (site(150, 2), {"loss_fn": slope, "model": Energy(4, 1)}),
        (TEXTS, {"loss_fn": per_token, "model": nn.Embedding(5, 3), "collate_fn": pad}),
    ],
    ids=["gradients", "lengths"],
)
def test_outputs_that_stay_apart(test, given, tmp_path):
    """The loss takes gradients of some outputs, and batches of other outputs have other lengths."""
    heard, given = Hearing(), {"data": [ConcatDataset([test])] * 2, "test": test, "rounds": 1, **given, **HERE}
    run = fedkern.simulate("fedavg", **given, out=tmp_path / "run", listener=heard)
    rows, targets = given.get("collate_fn", default_collate)([test[row] for row in range(150)])
    assert APART in run_headline(heard.info)
    assert run.metrics["loss"] == pytest.approx(given["loss_fn"](run.model()(rows), targets).item(), rel=1e-5)


class Rows:
    """Metric without reset: the number of samples, from a model and a batch."""

    count = 0

    def update(self, model, batch):
        assert model(batch[0]).shape == (len(batch[1]), 3)
        self.count += len(batch[1])

    def compute(self):
        return self.count


def test_metrics_beside_a_loss_of_the_batch(tmp_path):
    run, _, lines = simulate(
        tmp_path / "run", batch_loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        metrics={"mean": lambda model, batch: batch[0].mean(), "rows": Rows()},
    )  # fmt: skip
    assert (run.metrics["rows"], run.config.main, APART in lines) == (150, "loss", True)
    assert run.metrics["mean"] == pytest.approx(float(site(150, 2).tensors[0].mean()), abs=1e-6)
    assert "mean: mean over batches; use update and compute for a whole set" in lines


# -- registered metrics ------------------------------------------------------------------------------------------------


@pytest.fixture
def metrics(registries):
    return register_metric


def top2(logits, labels):
    """Return the share of samples whose class is among the two likeliest."""
    assert (logits.dtype, labels.dtype, logits.device.type) == (torch.float32, torch.int64, "cpu")
    return (logits.topk(2).indices == labels[:, None]).any(1).double().mean()


def test_a_metric_stands_beside_the_ordinary_figures(metrics, make_data, make_config, tmp_path):
    seen = []
    metrics("top2")(top2)

    @metrics("right")
    def right(logits, labels):
        """Return the accuracy, computed again."""
        seen.append(len(labels))
        return float((logits.argmax(1) == labels).sum()) / len(labels)

    run(make_config("fedavg", rounds=2), out=tmp_path / "run", data=make_data())
    records = read_metrics(tmp_path / "run")
    for found in (*records, read_summary(tmp_path / "run")["metrics"]):
        for prefix in ("id_", "ood_", "validation_"):
            assert found[f"{prefix}right"] == found[f"{prefix}accuracy"]
            assert found[f"{prefix}accuracy"] <= found[f"{prefix}top2"] <= 1
    assert seen == [16, 16, 8] * 2  # whole test sets, once a round


def test_side_by_side_evaluation_gives_the_same_value(metrics, make_data, make_config, tmp_path):
    metrics("top2")(top2)
    for threads in (1, 3):
        config = make_config("fedavg", rounds=1, threads=threads, client_threads=1)
        run(config, out=tmp_path / str(threads), data=make_data())
    single, three = (read_metrics(tmp_path / str(threads))[0] for threads in (1, 3))
    assert single["id_top2"] == three["id_top2"]


def test_a_resumed_run_has_the_same_metrics(metrics, make_data, make_config, tmp_path):
    metrics("top2")(top2)
    config = make_config("fedavg", rounds=2)
    run(config, out=tmp_path / "whole", data=make_data())
    with pytest.raises(Kill):
        run(config, out=tmp_path / "run", data=make_data(), listener=KillAt("round", 1))
    run(load_settings(tmp_path / "run"), out=tmp_path / "run", resume=True, data=make_data())
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_metric_that_fails_leaves_no_run(metrics, make_data, make_config, refuses, tmp_path):
    for wrong, message in ((lambda a, b: 1 / 0, "ZeroDivisionError"), (lambda a, b: "many", "ValueError: could not")):
        wrong.__doc__ = "Wrong."
        metrics("wrong")(wrong)
        with refuses(f'The metric "wrong" fails on .* of 3 classes .{message}'):
            run(make_config("fedavg"), out=tmp_path / "run", data=make_data())


def test_an_ensemble_has_the_metric_of_its_answer(metrics, make_data, make_config, tmp_path):
    @metrics("right")
    def right(logits, labels):
        """Return the accuracy, computed again."""
        return (logits.argmax(1) == labels).double().mean()

    run(make_config("ensemble", rounds=None), out=tmp_path / "run", data=make_data())
    found = read_summary(tmp_path / "run")["metrics"]
    assert found["id_right"] == pytest.approx(found["id_accuracy"])


def test_other_tasks_and_other_figures_say_that_it_is_missing(metrics, make_data, make_pairs, make_config, tmp_path):
    metrics("top2")(top2)
    pairs = {**SETTINGS["feddra"], "rounds": 1}
    run(make_config("feddra", **pairs), out=tmp_path / "pairs", data=make_pairs())
    run(make_config("local", **SETTINGS.get("local", {"rounds": 1})), out=tmp_path / "local", data=make_data())
    for name in ("pairs", "local"):
        summary = read_summary(tmp_path / name)
        assert "The metric top2 is not computed" in summary["diagnostics"]["missing-metric"]
        assert not any("top2" in figure for figure in summary["metrics"])


def test_registering_wrongly(metrics):
    for name in ("Top2", "top-2", "2top", ""):
        with pytest.raises(ValueError, match="expected lower-case letters"):
            metrics(name)
    for name in ("accuracy", "loss", "macro_f1", "dice", "i2t_r5", "name", "seconds", "id_top2", "validation_top2"):
        with pytest.raises(ValueError, match="expected another name"):
            metrics(name)
    metrics("top2")(top2)
    metrics("top2")(top2)  # a notebook's cell, run again
    with pytest.raises(ValueError, match='metric "top2" is already registered'):

        @metrics("top2")
        def other(logits, labels):
            """Return another metric."""
