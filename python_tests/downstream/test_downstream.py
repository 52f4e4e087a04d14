"""Tests of downstream tasks on a finished run, linear probes, areas under the curve, and the light decoder."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from fedkern.data import IGNORE, Split, load
from fedkern.downstream import Finished, decode, probe, retrieve, tasks, zero_shot
from fedkern.downstream.run_evaluation import evaluate_run, list_sets
from fedkern.downstream.tasks import train_decoder
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.methods.common.personal import Personal
from fedkern.models import PairNetwork, Tokens, build_pair
from fedkern.run import main
from fedkern.settings.config import RunConfig
from fedkern.tasks import MULTILABEL, ORDINAL, SEGMENTATION
from fedkern.tasks.segmentation import segmentation

CLASSES = ("ant", "bee", "cow")
SMALL = {"test_samples": 12, "validation_samples": 6}


class Oracle(PairNetwork):
    """Network that knows the class of an image of one grey tone, and the class that a text names."""

    wrong = False  # takes every class for the next one

    def image_embedding(self, images: torch.Tensor) -> torch.Tensor:
        tones = (images.mean((1, 2, 3)) * 0.5 + 0.5) * 255 / 100
        return torch.eye(128)[(tones.round().long() + self.wrong) % 3]

    def text_embedding(self, tokens: Tokens) -> torch.Tensor:
        named = torch.stack([(tokens.ids == 3 + c).any(1) for c in range(3)], 1)
        return torch.eye(128)[named.float().argmax(1)]


def oracle(wrong: bool = False) -> Oracle:
    pair = build_pair(channels=3, image_size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, vocabulary=CLASSES, width=16)
    known = Oracle(pair.image_encoder, pair.text_encoder)
    known.wrong = wrong
    return known


def make_split(labels: list[int]) -> Split:
    images = torch.tensor(labels, dtype=torch.uint8)[:, None, None, None].mul(100).expand(-1, 3, 16, 16).contiguous()
    texts = tuple(f"this is {CLASSES[label]} {i}" for i, label in enumerate(labels))
    return Split(images, torch.tensor(labels), texts=texts, ids=tuple(f"{i}" for i in range(len(labels))))


def make_finished(module: torch.nn.Module, **changes: Any) -> Finished:
    about = {"model": "x", "channels": 3, "image_size": (16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    data = load("captions", train_samples=5, options=SMALL)
    train = make_split([0, 1, 2] * 6)
    data = dataclasses.replace(
        data, name="pairs", form=dataclasses.replace(data.form, shape=(3, 16, 16)), classes=CLASSES,
        clients=(train, train), validation=train,
        tests={"": make_split([0, 1, 2, 2]), "unseen": make_split([1, 0])}, **{"client_tests": (), **changes},
    )  # fmt: skip
    return Finished(Path("there"), RunConfig.make("fedavg", data="captions"), module, about, data)


def right_and_wrong() -> Personal:
    return Personal({0: oracle(), 1: oracle(wrong=True)})


def test_zero_shot_is_right_where_the_network_is() -> None:
    assert zero_shot(make_finished(oracle()), "a {class}") == [
        {"set": "seen", "accuracy": 1.0, "auc": 1.0},
        {"set": "unseen", "accuracy": 1.0, "auc": 1.0},
    ]
    assert [row["accuracy"] for row in zero_shot(make_finished(oracle(wrong=True)), "{class}")] == [0.0, 0.0]
    rows = zero_shot(make_finished(right_and_wrong()), "{class}")
    assert [row["accuracy"] for row in rows] == [0.5, 0.5]


def test_retrieval_finds_what_belongs_together() -> None:
    rows = retrieve(make_finished(oracle()), ks=(1, 2))
    assert [row["set"] for row in rows] == ["seen", "unseen"]
    # Two of the four images are cows, and their texts are level.
    assert rows[0]["i2t_r1"] == rows[0]["t2i_r1"] == pytest.approx(0.75)
    assert rows[0]["i2t_r2"] == rows[1]["i2t_r1"] == pytest.approx(1)
    assert rows[0]["gallery"] == 4


def test_retrieval_of_the_clients_own_sets() -> None:
    own = {"client_tests": (make_split([0, 1]), make_split([2, 2]))}
    rows = {row["set"]: row for row in retrieve(make_finished(oracle(), **own), ks=(1,))}
    assert rows["clients, mean"]["i2t_r1"] == pytest.approx(0.75)
    assert rows["clients, worst"]["i2t_r1"] == pytest.approx(0.5)
    # Where every client has a network of its own it is tried on that client's set.
    rows = {row["set"]: row for row in retrieve(make_finished(right_and_wrong(), **own), ks=(1,))}
    assert rows["clients, mean"]["i2t_r1"] == pytest.approx((1 + 0.5) / 2)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("features", ["token", "mean", "embedding"])
def test_probes_learn_what_features_tell(features: str) -> None:
    rows = probe(make_finished(build_small()), (2, 0), features=features, draws=2)
    assert [(row["set"], row["shots"]) for row in rows] == [
        ("seen", 2), ("unseen", 2), ("seen", "all"), ("unseen", "all"),
    ]  # fmt: skip
    assert all(row["accuracy"] == row["auc"] == 1 for row in rows)


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        (SEGMENTATION, torch.zeros(18, 16, 16).long()), (MULTILABEL, torch.zeros(18, 3, dtype=torch.uint8)),
        (ORDINAL, torch.zeros(18).long()),
    ],
)  # fmt: skip
def test_what_is_no_single_class_of_an_image_is_refused(task: Any, labels: torch.Tensor) -> None:
    split = dataclasses.replace(make_split([0, 1, 2] * 6), labels=labels, task=task, texts=None)
    made = make_finished(build_small())
    made.data = dataclasses.replace(made.data, clients=(split, split), validation=split, tests={"": split})
    for command in (zero_shot, probe):
        with pytest.raises(UserError, match=f"is for {task.name}: these tasks tell the single class"):
            command(made)
    with pytest.raises(UserError, match="has no texts"):
        retrieve(made)
    if task is SEGMENTATION:
        assert [row["set"] for row in decode(made, epochs=1)] == ["seen"]
        return
    with pytest.raises(UserError, match="has no masks to learn a segmentation from"):
        decode(made)


def build_small() -> PairNetwork:
    return build_pair(channels=3, image_size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, vocabulary=CLASSES, width=16)


# the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pairs"
    config = RunConfig.make(
        "fedavg", data="captions", train_samples=60, clients=2, rounds=1, local_epochs=1, width=16, client_test=0.2,
        data_options={**SMALL, "minority": 0},
    )  # fmt: skip
    run(config, out=out)
    return out


def evaluate(folder: Path, task: str, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["evaluate", str(folder), "--task", task, "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    data_name = [words[words.index("--data") + 1]] if "--data" in words else []
    labels = [word.partition("=")[2] for word in words if word.startswith("labels=")]
    assert found == json.loads((folder / ("-".join(["evaluate", task, *data_name, *labels]) + ".json")).read_text())
    return found


def test_retrieval_repeats_what_the_run_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["set"]: row for row in evaluate(folder, "retrieval", capsys)["rows"]}
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    for name in ("i2t_r1", "i2t_r10", "t2i_r5", "gallery"):
        assert rows["seen"][name] == pytest.approx(metrics[name])
        assert rows["unseen"][name] == pytest.approx(metrics[f"unseen_{name}"])
    assert rows["clients, worst"]["i2t_r5"] == pytest.approx(metrics["worst_client_i2t_r5"])


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["zero-shot"], {"accuracy", "auc"}),
        (["zero-shot", "--prompts", "one {class}"], {"accuracy", "auc"}),
        (["probe", "--shots", "1,all", "--features", "mean"], {"shots", "accuracy", "auc"}),
        (["decode", "--epochs", "1", "--samples", "20"], {"dice", "iou", "loss", "hd95"}),
    ],
)
def test_every_command(folder: Path, words: list[str], names: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(folder, words[0], capsys, *words[1:])
    assert (found["method"], found["data"], found["networks"]) == ("fedavg", "captions", 1)
    assert {row["set"] for row in found["rows"]} == {"seen", "unseen"}
    assert all(set(row) == {"set"} | names for row in found["rows"])


def test_a_table_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(folder), "--task", "zero-shot"]) == 0
    table = capsys.readouterr().out
    assert "unseen" in table
    assert "%" in table


def test_another_data_set(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("dark", 20), ("light", 230)):
        for i in range(12):
            path = tmp_path / "set" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (value, value, i)).save(path)
    words = ["--data", "folder", "--data-root", str(tmp_path / "set")]
    found = evaluate(folder, "probe", capsys, *words, "--shots", "3")  # in the size and colours of the training
    assert found["data"] == "folder"
    assert [row["accuracy"] for row in found["rows"]] == [1.0]
    grey = get_refusal(capsys, "probe", str(folder), *words, "--data-option", "colour=grey", "--data-option", "size=16")
    assert grey.endswith("match them with --data-option size=32 --data-option colour=rgb.\n")
    assert 'data set "folder" has no texts' in get_refusal(capsys, "retrieval", str(folder), *words)
    assert 'data set "folder" has no masks' in get_refusal(capsys, "decode", str(folder), *words)


def test_other_labels_of_the_same_canvases(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = evaluate(folder, "probe", capsys, "--shots", "all")
    colours = evaluate(folder, "probe", capsys, "--shots", "all", "--data-option", "labels=colour")
    assert colours["data_options"] == {"labels": "colour"}
    # Colours are easier to see than digits: networks that have hardly been trained show them.
    assert all(c["accuracy"] > d["accuracy"] for c, d in zip(colours["rows"], digits["rows"], strict=True))
    assert json.loads((folder / "evaluate-probe.json").read_text()) == digits


def get_refusal(capsys: pytest.CaptureFixture[str], task: str, *words: str) -> str:
    assert main(["evaluate", "--task", task, *words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["probe"], "evaluate needs the folder of a finished run"),
        (["probes", "RUN"], "Argument --task: invalid choice: 'probes'"),
        (["retrieval", "RUN", "--shots", "3"], "--shots is for --task probe: leave it out, or name such a task"),
        (
            ["zero-shot", "RUN", "--seed", "3"],
            "--seed is for --task probe or decode: leave it out, or name such a task",
        ),
        (["probe", "RUN", "--shots", "0"], "--shots takes whole numbers of at least 1, not '0'"),
        (["probe", "RUN", "--seed", "1" + "0" * 5000], "--seed takes whole numbers of at least 0"),
        (["probe", "RUN", "--features", "tokens"], "--features must be one of token, mean, embedding, not tokens"),
        (["retrieval", "RUN", "--k", "3"], 'does not take "--k". Did you mean "--ks"?'),
        (["decode", "RUN", "--epochs", "many"], "--epochs takes whole numbers of at least 1"),
        (["zero-shot", "RUN", "--prompts", "nowhere.txt"], "prompts file nowhere.txt cannot be read"),
        (["zero-shot", "RUN", "--data-option", "size=3"], "of the run's own data only labels may change"),
        (["zero-shot", "RUN", "--data-option", "labels=size"], "labels"),
        (["decode", "elsewhere"], "The run folder elsewhere does not exist"),
        (["probe", "."], ". is not a run folder: it has no config.toml"),
        (["decode", "RUN", "--data", "digits"], "(channels, height, width), but the run in"),
        (["decode", "RUN", "--data", "digits"], "it has no option for such images; name a data set that has with"),
        (["zero-shot", "UNFINISHED"], "has no model.safetensors: its run is not finished"),
        (["zero-shot", "PLAIN"], "downstream tasks are for pairs"),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, words: list[str], sentence: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    if "PLAIN" in words:
        small = {"train_samples": 40, "rounds": 1, "local_epochs": 1, "width": 4, "grad_cam": 0}
        run(RunConfig.make("fedavg", data="digits", clients=2, **small), out=tmp_path / "plain")
    if "UNFINISHED" in words:
        (tmp_path / "begun").mkdir()
        shutil.copy(folder / "config.toml", tmp_path / "begun")
    where = {"RUN": str(folder), "PLAIN": str(tmp_path / "plain"), "UNFINISHED": str(tmp_path / "begun")}
    assert sentence in get_refusal(capsys, *(where.get(word, word) for word in words))


def test_a_run_whose_network_is_damaged(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="is damaged"):
        Finished.open(tmp_path / "copy")


def test_a_run_of_clients_own_pairs_is_evaluated_again(tmp_path):
    settings = {"local_epochs": 1, "threads": 1, "client_threads": 1, "workers": "1", "grad_cam": 0}
    config = RunConfig.make("local", data="captions", train_samples=80, rounds=1, data_options=SMALL, **settings)
    metrics = run(config, out=tmp_path)["metrics"]
    found = evaluate_run(tmp_path)[0]
    assert {name: metrics[name] for name in found} == pytest.approx(found)
    assert {"i2t_r1", "highest_i2t_r1"} <= found.keys()


def test_images_and_patients_of_every_site_are_told() -> None:
    data = load("digits", clients=2, partition="iid", train_samples=40)
    test = data.tests[""].subset(torch.arange(6))
    test = dataclasses.replace(test, patients=torch.tensor([3, 3, 4, 5, 5, 5]), homes=torch.tensor([0, 0, 0, 1, 1, -1]))
    named = dataclasses.replace(data, client_names=("Bern", "Rome"), tests={"": test})
    assert list(list_sets(named)) == ["the test set: images 6 of 3 patients, Bern 3 of 2 patients, Rome 2 of 1 patient"]
    assert list(list_sets(data)) == [f"the test set: images {len(data.tests[''])}"]


# -- probes ------------------------------------------------------------------------------------------------------------


def blobs(n: int = 60, classes: int = 3, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(n) % classes
    return 3 * torch.eye(classes, width)[labels] + torch.randn(n, width) * torch.arange(1, width + 1), labels


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_the_probe_is_scikit_learns_logistic_regression(penalty: float) -> None:
    features, labels = blobs()
    features[:, 4] = 7.0  # a constant feature
    made = tasks.LinearProbe(features, labels, 3, penalty).logits(features).softmax(1)
    scaled = StandardScaler().fit_transform(features.double().numpy())
    theirs = LogisticRegression(C=1 / (penalty * len(features)), tol=1e-10, max_iter=5000).fit(scaled, labels.numpy())
    np.testing.assert_allclose(made.numpy(), theirs.predict_proba(scaled), atol=2e-5)


def test_a_class_that_does_not_occur_is_never_preferred() -> None:
    features, labels = blobs()
    made = tasks.LinearProbe(features, labels, 5, 1e-2).logits(features)
    assert made.shape == (60, 5)
    assert int(made.argmax(1).max()) < 3


def test_areas_are_scikit_learns() -> None:
    labels = torch.arange(90) % 4
    scores = (torch.rand(90, 4) + torch.eye(4)[labels] / 4).mul(8).round()  # many ties
    expected = np.mean([roc_auc_score(labels == c, scores[:, c]) for c in range(4)])
    assert tasks.macro_auc(scores, labels) == pytest.approx(expected)
    known = labels < 2  # only classes that occur count
    expected = np.mean([roc_auc_score(labels[known] == c, scores[known, c]) for c in range(2)])
    assert tasks.macro_auc(scores[known], labels[known]) == pytest.approx(expected)
    assert math.isnan(tasks.macro_auc(scores[:3], torch.zeros(3, dtype=torch.int64)))
    assert tasks.figures(scores, labels)["accuracy"] == float((scores.argmax(1) == labels).double().mean())
    assert "auc" not in tasks.figures(scores[:3], torch.zeros(3, dtype=torch.int64))


def test_shots_of_every_class() -> None:
    labels = torch.tensor([0] * 20 + [2] * 3 + [5] * 9)
    rows = tasks.few_shot_rows(labels, 4, seed=0, draw=0)
    assert torch.bincount(labels[rows]).tolist() == [4, 0, 3, 0, 0, 4]
    assert len(set(rows.tolist())) == len(rows)
    assert torch.equal(rows, tasks.few_shot_rows(labels, 4, seed=0, draw=0))
    assert not torch.equal(rows, tasks.few_shot_rows(labels, 4, seed=0, draw=1))


def test_the_decoder_learns_from_frozen_tokens() -> None:
    pair = build_pair(channels=1, image_size=(16, 16), mean=(0.5,), std=(0.5,), vocabulary=("a",), width=16).eval()
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    cells = torch.rand(40, 4, 4) < 0.3
    cells[:, 0, 0] = True
    masks = cells.repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = masks[:, None].float() + 0.1 * torch.randn(40, 1, 16, 16)
    labels = masks.long()
    labels[:, 15] = IGNORE

    def train_and_judge(epochs: int) -> dict[str, float]:
        decoder = train_decoder(pair, images[:32].split(10), labels[:32], 2, epochs=epochs, seed=0)
        batch = SimpleNamespace(inputs=images[32:], targets=labels[32:])
        return segmentation(decoder, SimpleNamespace(batches=lambda: [batch]))

    found = train_and_judge(25)
    assert found["dice"] > 0.7
    assert found["dice"] > train_and_judge(1)["dice"] + 0.1
    assert train_and_judge(1) == train_and_judge(1)
    assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())
    assert all(p.grad is None for p in pair.parameters())
