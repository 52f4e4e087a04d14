"""Tests of fedkern.compare with classes of methods and objects of them."""

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedkern
from fedkern.errors import UserError
from fedkern.methods import FedAvg, FedProx
from fedkern.settings.config import load_settings
from python_tests import own_data
from python_tests.methods.test_script_methods import Slow, elsewhere  # noqa: F401

TINY = {"data": "digits", "train_samples": 120, "clients": 3, "model": "mlp", "threads": 1, "grad_cam": 0,
        "local_steps": 2, "workers": 1, "rounds": 1, "progress": False}  # fmt: skip


def test_objects_are_compared_with_names():
    found = fedkern.compare([Slow(share=0.5), "fedavg", FedProx(mu=0.25)], seeds=[1], out="x", **TINY)
    assert [row["group"] for row in found.table] == ["Slow share=0.5", "fedavg", "fedprox mu=0.25"]
    assert [row["method"] for row in found.table] == ["Slow", "fedavg", "fedprox"]
    assert found.result.title().startswith("Slow, fedavg, fedprox on digits")
    assert sorted(path.name for path in Path("x").glob("*_seed=1")) == [
        "Slow_share=0.5_seed=1", "fedavg_seed=1", "fedprox_mu=0.25_seed=1"
    ]  # fmt: skip
    single = {name: value for name, value in TINY.items() if name != "progress"}
    simulated = fedkern.simulate(Slow(share=0.5), seed=1, out="alone", progress=False, pictures=False, **single)
    config = load_settings("x/Slow_share=0.5_seed=1")
    assert config.to_dict() == simulated.config.to_dict()
    assert json.loads(Path("x/Slow_share=0.5_seed=1/summary.json").read_text())["metrics"] == simulated.metrics
    # The same call goes on: nothing is run twice, and another setting has folders of its own.
    before = Path("x/Slow_share=0.5_seed=1/summary.json").stat().st_mtime_ns
    again = fedkern.compare([Slow(share=0.5), Slow(share=0.25)], seeds=[1], out="x", **TINY)
    assert [row["group"] for row in again.table] == ["Slow share=0.5", "Slow share=0.25"]
    assert Path("x/Slow_share=0.5_seed=1/summary.json").stat().st_mtime_ns == before
    assert load_settings("x/Slow_share=0.25_seed=1").options["share"] == 0.25


def test_a_target_takes_the_direction_of_the_metric():
    def mistakes(outputs, targets):
        return (outputs.argmax(1) != targets).float().mean()

    mistakes.higher_is_better = False
    sites, test = own_data.table()
    odd = lambda outputs, targets: 1.0  # noqa: E731
    settings = {"data": sites, "test": test, "model": own_data.Rows(), "main": "mine", "better": "max", "rounds": 1,
                "metrics": {"mine": odd, "mistakes": mistakes, "odd": odd}, "progress": False}  # fmt: skip
    found = fedkern.compare(["fedavg"], seeds=1, target="mistakes=0", out="x", **settings)
    assert (str(found.result.target), found.table[0]["reached"]) == ("mistakes <= 0", 0)
    with pytest.raises(UserError, match='whether a low "odd" is a good one: give the metric an attribute'):
        fedkern.compare(["fedavg"], seeds=1, target="odd=1", out="y", **settings)
    assert not Path("y").exists()


@pytest.mark.parametrize("model", [own_data.Rows, partial(own_data.Rows), own_data.Rows()])
def test_every_seed_builds_a_class_anew_and_copies_a_module(model):
    sites, test = own_data.table()
    settings = {"data": sites, "test": test, "rounds": 1, "local_epochs": 1, "batch_size": 100, "progress": False}
    found = fedkern.compare(["fedavg"], seeds=2, model=model, out="x", **settings)
    is_module = isinstance(model, nn.Module)
    assert len({round(run.metrics["loss"], 6) for run in found.result.runs}) == (1 if is_module else 2)
    texts = [found.result.title(), *(Path("x", name).read_text() for name in ("comparison.md", "comparison.tex"))]
    assert ["all seeds start from the same weights" in text for text in texts] == [is_module] * 3
    loaded = fedkern.load("x/fedavg_seed=1", data=sites, test=test, model=model)
    assert loaded.evaluate()["loss"] == loaded.metrics["loss"]


@pytest.mark.exhaustive
def test_a_class_and_a_sweep_with_a_choice():
    found = fedkern.compare(Slow, seeds=[3], sweep={"share": [0.5, 1.0]}, select="validation", out="x", **TINY)
    assert len(found.table) == 1
    assert found.table[0]["group"] in ("Slow share=0.5", "Slow share=1")
    assert any(note.startswith("Slow: share=") for note in found.notes)
    pair = fedkern.compare([Slow(share=0.5), "fedavg"], seeds=[3], sweep={"lr": [0.1]}, out="y", **TINY)
    assert [row["group"] for row in pair.table] == ["Slow lr=0.1 share=0.5", "fedavg lr=0.1"]
    runs = fedkern.compare(["y/Slow_lr=0.1_share=0.5_seed=3", "y/fedavg_lr=0.1_seed=3"], out="z", progress=False)
    assert [row["group"] for row in runs.table] == ["Slow", "fedavg"]


def test_finished_runs_of_other_code_or_data_are_refused(tmp_path):
    def sites(seed):
        rows = torch.randn(24, 4, generator=torch.Generator().manual_seed(seed))
        return [TensorDataset(rows[k : k + 8], rows[k : k + 8, 0].gt(0).long()) for k in (0, 8, 16)]

    def play(weight=1.0, seed=0):
        *data, test = sites(seed)
        loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, weight]))
        torch.manual_seed(0)
        return fedkern.compare(
            ["fedavg", "fedprox"], data=data, test=test, model=nn.Linear(4, 2), loss_fn=loss_fn, rounds=1, out="x",
            threads=1, workers=1, progress=False,
        )  # fmt: skip

    before = play().table
    assert play().table == before
    with pytest.raises(UserError, match=r"made with another loss, metric or collation \(`loss_fn.weight` changed from"):
        play(weight=2.0)
    with pytest.raises(UserError, match=r"was made with different data \(samples\): name another out"):
        play(seed=1)


def test_finished_runs_of_an_edited_network_are_refused(tmp_path):
    file = Path("net_of_a_test.py")
    net = "nn.Sequential(nn.Flatten(), nn.Linear(1024, WIDTH), nn.Linear(WIDTH, 10))"
    text = f"from torch import nn\ndef net(): return {net}"
    file.write_text(text.replace("WIDTH", "4"))
    how = {**TINY, "model": f"{file}:net"}
    before = fedkern.compare(["fedavg", "fedprox"], out="x", **how).table
    assert fedkern.compare(["fedavg", "fedprox"], out="x", **how).table == before
    file.write_text(text.replace("WIDTH", "8"))
    with pytest.raises(UserError, match=r"was made with another model .*net_of_a_test.py:net: name another out"):
        fedkern.compare(["fedavg", "fedprox"], out="x", **how)


class Blind(Slow):
    """Method with a NaN figure at share 0.5, as if logits had overflowed there."""

    def evaluate(self, model, data):
        return {**super().evaluate(model, data), **({"accuracy": math.nan} if self.options.share == 0.5 else {})}


def test_a_setting_whose_figure_is_nan_is_not_chosen():
    found = fedkern.compare(Blind, seeds=[3], sweep={"share": [0.5, 1.0]}, select="validation", out="x", **TINY)
    assert [row["group"] for row in found.table] == ["Blind share=1"]


class Other:
    class Slow(FedAvg):
        """Another class of the same name."""


@pytest.mark.parametrize(
    ("methods", "options", "said"),
    [
        ([Slow(share=0.5), "fedavg"], {"share": 0.25}, "share is given twice, in Slow(...) and beside it"),
        ([Slow(share=0.5)], {"sweep": {"share": [0.25]}}, "share is given twice, in Slow(...) and beside it"),
        ([Slow(share=0.5), Slow(share=0.5)], {}, "Slow is given twice with the same options"),
        ([Slow, Slow()], {}, "Slow is named twice"),
        (["fedprox", FedProx()], {}, "fedprox is named twice"),
        ([Slow, Other.Slow], {}, "Two methods are called Slow"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path, methods, options, said):
    with pytest.raises(fedkern.UserError, match=re.escape(said)):
        fedkern.compare(methods, seeds=1, out="x", **{**TINY, **options})
    assert list(tmp_path.iterdir()) == []
