"""Runs on images with several labels, as a user starts them, and refusals of settings for image-text data."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fedkern
from fedkern.data import load
from fedkern.downstream.saved_network import read_model
from fedkern.engine.figures import diagnostics
from fedkern.run import main
from fedkern.settings.config import RunConfig, load_settings
from fedkern.tasks import CLASSIFICATION, MULTILABEL

TINY = ("--data", "csv", "--data-root", "set", "--threads", "1", "--workers", "1", "--model", "mlp",
        "--data-option", "size=8", "--grad-cam", "0")  # fmt: skip
NAMES = ("left", "right", "top")


def write_list(folder, column, cells, separator=","):
    """Write black images and their table, whose ``column`` holds ``cells``."""
    folder.mkdir(exist_ok=True)
    for i, _ in enumerate(cells):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    lines = [f"path{separator}{column}", *(f"{i}.png{separator}{labels}" for i, labels in enumerate(cells))]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")


def cell(i):
    return "|".join(name for k, name in enumerate(NAMES) if i >> k & 1)


@pytest.fixture
def label_folder(tmp_path):
    """Write images of two sites whose bright halves are their labels.

    Every eighth image has no label.
    """
    folder = tmp_path / "set"
    folder.mkdir()
    lines = ["path,labels,site,label_of_another_kind"]
    rng = np.random.default_rng(0)
    for i in range(160):
        pixels = rng.integers(0, 60, (8, 8, 3))
        kind = i % 8
        pixels[:, :4] += 65 * (kind & 1)
        pixels[:, 4:] += 65 * (kind >> 1 & 1)
        pixels[:4] += 65 * (kind >> 2 & 1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{i}.png, {cell(kind)} ,{'AB'[i // 8 % 2]},{kind}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_the_column_becomes_zeros_and_ones(label_folder):
    data = load("csv", root=label_folder, options={"size": 8})
    assert (data.task.name, data.classes, data.client_names) == ("multilabel", NAMES, ("A", "B"))
    for split in (*data.clients, data.validation, *data.tests.values()):
        assert split.labels.dtype == torch.uint8
        for name, row in zip(split.ids, split.labels.tolist(), strict=True):
            kind = int(name.partition(".")[0]) % 8
            assert row == [kind & 1, kind >> 1 & 1, kind >> 2 & 1]
    statistics = data.statistics
    assert statistics.sizes.tolist() == [len(split) for split in data.clients]
    assert statistics.counts.tolist() == [split.labels.sum(0).tolist() for split in data.clients]
    assert statistics.rows()[-1][2] == str(sum(len(split) for split in data.clients))
    federation = load("csv", root=label_folder, options={"size": 8, "label": "label_of_another_kind"})
    assert (federation.task.name, len(federation.classes)) == ("classification", 8)


def test_a_held_out_client_and_own_tests(label_folder):
    from fedkern.data.sharing.holdout import hold_out

    data = load("csv", root=label_folder, options={"size": 8})
    kept = hold_out(data, held_out=0, share=0.25, seed=0)
    assert kept.statistics.sizes.tolist() == [len(kept.clients[0])]
    assert kept.statistics.counts.tolist() == [kept.clients[0].labels.sum(0).tolist()]
    assert kept.client_tests[0].labels.shape[1] == 3


def test_a_run_learns_and_tells_every_label(label_folder, result, tmp_path):
    words = ("--rounds", "6", "--local-epochs", "4", "--lr", "0.1", "--client-test", "0.2", "--out", "run")
    told, shown = result("fedprox", *TINY, *words)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    metrics = summary["metrics"]
    assert metrics["macro_auroc"] > 0.95
    assert metrics["exact_match"] > 0.5
    assert "accuracy" not in metrics
    assert "ece" not in metrics
    assert "macro AUROC" in shown
    flat = " ".join(told.split())
    assert "AUROC, mean of the labels" in flat
    assert "AUROC of every label" in flat
    areas = summary["per_class"]["test"]["auroc"]
    assert list(areas) == list(NAMES)
    assert sum(areas.values()) / 3 == pytest.approx(metrics["macro_auroc"])
    assert {"chance-level", "unvaried-labels"}.isdisjoint(summary["diagnostics"])
    assert not (tmp_path / "run/confusion.json").exists()
    assert not (tmp_path / "run/confusion.png").exists()
    assert (tmp_path / "run/accuracy.png").exists()
    assert (tmp_path / "run/partition.png").exists()
    with (tmp_path / "run/evaluation.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "macro_auroc"]
    assert [(row["client"], row["test_set"]) for row in rows] == [("", "test"), ("A", "own"), ("B", "own")]
    assert summary["worst_client"]["metric"] == "macro_auroc"
    assert load_settings("run").partition == "attribute"
    # What a finished run is good for.
    result("evaluate", "run")
    again = json.loads((tmp_path / "run/evaluate.json").read_text())["metrics"]
    assert {name: again[name] for name in ("macro_auroc", "loss")} == pytest.approx(
        {name: metrics[name] for name in ("macro_auroc", "loss")}
    )
    printed, _ = result("predict", "run", "set/7.png", "set/0.png")
    with (tmp_path / "predictions.csv").open(newline="") as file:
        left, right = csv.DictReader(file)
    assert left["predicted"] == "|".join(name for name in NAMES if float(left[name]) > 0.5)
    assert float(left["left"]) > float(right["left"])
    assert printed.splitlines()[1].endswith("  no label") == (right["predicted"] == "")
    # The run's labels are several, and so are those of a table with one in every row.
    lines = ["path,labels", *(f"set/{i}.png,{cell(i % 8)}" for i in range(160) if i % 8 in (1, 2, 4))]
    (tmp_path / "single.csv").write_text("\n".join(lines))
    result("evaluate", "run", "--data", "csv", "--data-root", "single.csv", "--data-option", "size=8")
    run = fedkern.load("run")
    found = run.predict("set/7.png")[0]
    assert found.tolist() == pytest.approx([float(left[name]) for name in NAMES], abs=1e-5)
    assert read_model("run")[1]["task"] == "multilabel"
    result("export", "run", "--format", "state-dict")
    assert json.loads((tmp_path / "run/model.pt.json").read_text())["task"] == "multilabel"
    assert main(["attack", "run"]) == 2
    run.extend(7, progress=False, pictures=False, workers=1)
    assert run.summary["rounds"] == 7


def test_warnings_about_a_network_that_tells_nothing():
    judged = SimpleNamespace(main="macro_auroc", better="max")

    def warn(area):
        return diagnostics.poor_metrics({"macro_auroc": area, "validation_macro_auroc": 0.4}, {}, 3, {}, judged)

    assert "macro AUROC is 50.0 %, and scoring all images alike gives 50.0 %" in warn(0.5)["chance-level"]
    assert warn(0.7) == {}
    falling = diagnostics.poor_metrics({"validation_macro_auroc": 0.6}, {"validation_macro_auroc": 0.9}, 3, {}, judged)
    assert "Validation macro AUROC fell from 90.0 % to 60.0 %" in falling["falling-macro_auroc"]
    labels = torch.zeros(2, 2, dtype=torch.uint8)
    alike, varied = torch.tensor([[1.0, -1.0], [2.0, -1.0]]), torch.tensor([[1.0, -1.0], [-2.0, -1.0]])

    class Kept(SimpleNamespace):
        def __len__(self):
            return 2

    def diagnose(*kept, task=MULTILABEL):
        found = Kept(task=task, labels=labels, kept=[(None, answers) for answers in kept])
        return diagnostics.unvaried_labels({"id_": found, "validation_": found})

    assert "for all images of the in-distribution test set or for none" in diagnose(alike)["unvaried-labels"]
    assert diagnose(alike, varied) == diagnose() == diagnose(alike, task=CLASSIFICATION) == {}


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["afl", "feddyn", "scaffold", "centralised"])
def test_other_methods_learn_it_too(label_folder, result, tmp_path, method):
    result(method, *TINY, "--rounds", "2", "--local-epochs", "2", "--lr", "0.1", "--out", "run", "--quiet")
    assert json.loads((tmp_path / "run/summary.json").read_text())["metrics"]["macro_auroc"] > 0.6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fedgid"], 'fedgid is for classification, but the data set "csv" is for multilabel: methods for that are '
         "afl, centralised, ditto, fedavg, feddyn, fedlora, fedper, fedprox, local, qffl, scaffold."),
        (["fedavg", "--partition", "dirichlet:0.5"], "take iid or quantity:ALPHA, or attribute with a column client"),
        (["fedavg", "--partition", "stratified"], '"stratified" cannot share it out'),
        (["fedavg", "--data-option", "labels=lables"], 'names the column "lables"'),
        (["fedavg", "--data-option", "labels=site", "--data-option", "label=site"], "leave out one of the options"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(label_folder, fails, tmp_path, words, said):
    assert said in fails(words[0], *TINY, *words[1:], "--out", "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (["a", "a|a", ""] * 20, 'has the single class "a", expected two or more'),
        (["", "|", " "], "names no label, expected two or more"),
    ],
)
def test_too_few_labels(tmp_path, fails, cells, said):
    write_list(tmp_path / "set", "labels", cells)
    assert said in fails("fedavg", *TINY, "--out", "run")


def test_labels_that_count_as_empty_are_told(tmp_path):
    write_list(tmp_path, "labels", ["a|NA" if i == 3 else "a|b" for i in range(20)])
    said = []
    data = load("csv", root=tmp_path, clients=2, options={"size": 8}, notice=said.append)
    assert data.classes == ("a", "b")
    assert said == [f"Labels of the column labels of {tmp_path / 'list.csv'} that count as empty: NA (1)."]


@pytest.mark.parametrize("column", ["labels", "findings"])
def test_a_label_in_every_row_is_a_class_or_one_of_several(tmp_path, column):
    write_list(tmp_path, column, ["abc"[i % 3] for i in range(20)])
    options = {"size": 8, **({} if column == "labels" else {"labels": column})}
    with pytest.raises(
        fedkern.UserError, match=f"exactly one label; .* label={column}; .* --data-option task=multilabel$"
    ):
        load("csv", root=tmp_path, options=options, partition="iid", clients=2)
    ways = {"classification": {"size": 8, "label": column}, "multilabel": {**options, "task": "multilabel"}}
    for task, chosen in ways.items():
        data = load("csv", root=tmp_path, options=chosen, partition="iid", clients=2)
        assert (data.task.name, data.classes) == (task, ("a", "b", "c"))


def test_labels_that_are_numbers_are_sorted_as_numbers(tmp_path):
    write_list(tmp_path / "set", "labels", ["10|9" if i % 2 else "9" for i in range(20)], separator=";")
    data = load("csv", root=tmp_path / "set", clients=2, options={"size": 8})
    assert data.classes == ("9", "10")
    assert data.statistics.partition == "iid"


# -- image text --------------------------------------------------------------------------------------------------------


PAIRS = ("--train-samples", "60", "--clients", "2", "--rounds", "1", "--width", "4", "--local-steps", "1",
        "--data-option", "test_samples=10", "--data-option", "validation_samples=10")  # fmt: skip


@pytest.mark.parametrize("method", ["feddra", "centralised"])
def test_a_batch_of_a_single_pair(method, fails):
    sentence = fails(method, "--data", "captions", *PAIRS, "--batch-size", "1", "--out", "run")
    assert "--batch-size 1 is too small for image-text data" in sentence
    assert "--model" not in sentence
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("words", "said", "offered"),
    [  # the second network is the default where there is a choice
        *(
            (
                ("feddra", *PAIRS, "--model", model),
                'no effect on the data set "captions"',
                "--image-encoder and --text-",
            )
            for model in ("resnet8", "cnn")
        ),
        *(
            (("fedavg", "--data", "digits", flag, value), "is for images with texts", "--model")
            for flag, value in (("--image-encoder", "vit"), ("--text-encoder", "words"))
        ),
    ],
)
def test_networks_that_the_data_do_not_have(words, said, offered, fails):
    sentence = fails(*words, "--out", "run")
    assert " ".join(words[-2:]) in sentence
    assert said in sentence
    assert offered in sentence
    assert not Path("run").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_file_of_all_settings_is_still_read(result, fails):
    """Like config.toml of every run, the file names a model too."""
    sizes = {"test_samples": 10, "validation_samples": 10}
    settings = {"train_samples": 60, "clients": 2, "rounds": 1, "width": 4, "local_steps": 1}
    text = RunConfig.make("fedavg", data="captions", **settings, data_options=sizes).to_toml()
    assert 'model = "cnn"' in text
    Path("all.toml").write_text(text)
    result("fedavg", "--config", "all.toml", "--out", "run", "--quiet")
    Path("other.toml").write_text(text.replace('model = "cnn"', 'model = "mlp"'))
    assert "--model mlp has no effect" in fails("fedavg", "--config", "other.toml", "--out", "again")


@pytest.mark.usefixtures("undrawn")
def test_the_first_lines_name_the_encoders(result):
    shown = "".join(result("fedavg", "--data", "captions", *PAIRS, "--image-encoder", "vit", "--out", "run"))
    assert "vit+words with" in shown
    assert "cnn with" not in shown
