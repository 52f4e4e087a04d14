"""Figures of the final network, and image-text pairs through the engine and the methods that only need a loss."""

import csv
import dataclasses
import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from fedkern.data import FederatedData, PartitionStatistics, Split
from fedkern.data.forms import ImageForm
from fedkern.data.images.transforms import normalise
from fedkern.data.sharing.holdout import hold_out
from fedkern.downstream.run_evaluation import evaluate_run
from fedkern.downstream.saved_network import read_model
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.figures import final_figures
from fedkern.engine.local.network import Network, NetworkPart
from fedkern.engine.run import run
from fedkern.engine.store import confusions
from fedkern.engine.store.record_files import read_metrics, read_summary
from fedkern.errors import UserError
from fedkern.methods import METHODS, FedAvg, Phase, register
from fedkern.models.towers import PARTS
from fedkern.settings.config import RunConfig, load_settings
from fedkern.tasks import CLASSIFICATION
from fedkern.tasks.retrieval import RETRIEVAL, contrastive_among

FIGURES = ("balanced_accuracy", "macro_f1", "auroc", "ece")
FILES = ("summary.json", "confusion.json", "predictions.csv")


def rows(folder):
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_figures(folder):
    """Return all figures and files of a folder's final network."""
    summary = read_summary(folder)
    files = [(folder / name).read_bytes() for name in FILES[1:] if (folder / name).exists()]
    return summary["metrics"], summary["per_class"], files


def test_they_describe_the_network_that_was_saved(make_data, make_config, tmp_path):
    data = make_data()
    summary = run(make_config(), out=tmp_path, data=data, predictions=True)
    network, _ = read_model(tmp_path)
    read, found = confusions.read(tmp_path), rows(tmp_path)
    assert set(read.matrices) == {"id", "ood"}
    for prefix in ("id_", "ood_", "validation_"):
        name = prefix[:-1]
        split = data.validation if name == "validation" else data.tests[name]
        with torch.no_grad():
            p = network(normalise(split.images, data.form.mean, data.form.std)).double().softmax(1)
        guess, truth = p.argmax(1), split.labels
        known = {figure: summary["metrics"][prefix + figure] for figure in FIGURES}
        assert known["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(truth, guess))
        assert known["macro_f1"] == pytest.approx(metrics.f1_score(truth, guess, average="macro"))
        area = metrics.roc_auc_score(truth, p, multi_class="ovr")
        assert known["auroc"] == pytest.approx(area, abs=1e-6)
        assert 0 <= known["ece"] <= 1
        recalls = metrics.recall_score(truth, guess, average=None, labels=range(3))
        assert list(summary["per_class"][name]["recall"].values()) == pytest.approx(list(recalls))
        assert list(summary["per_class"][name]["recall"]) == ["a", "b", "c"]
        if name != "validation":
            assert read.matrices[name].tolist() == metrics.confusion_matrix(truth, guess, labels=range(3)).tolist()
        own = [row for row in found if row["test_set"] == name]
        assert [row["true_class"] for row in own] == ["abc"[c] for c in truth]
        assert [row["predicted_class"] for row in own] == ["abc"[c] for c in guess]
        said = np.array([[float(row[f"p_{c}"]) for c in "abc"] for row in own])
        np.testing.assert_allclose(said, p, atol=1e-5)
    assert list(found[0]) == ["test_set", "sample", "true_class", "predicted_class", "p_a", "p_b", "p_c"]


@pytest.mark.usefixtures("forked_workers")
def test_the_same_with_workers_and_after_a_resume_at_the_very_end(make_data, make_config, tmp_path, monkeypatch):
    data, config = make_data(), make_config(workers="1")
    run(config, out=tmp_path / "one", data=data, predictions=True)
    run(config.replace(workers="2"), out=tmp_path / "two", data=data, predictions=True)
    with monkeypatch.context() as patch:
        patch.setattr("fedkern.engine.parts.results.write_model", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(config, out=tmp_path / "cut", data=data)
    run(load_settings(tmp_path / "cut"), out=tmp_path / "cut", data=data, resume=True, predictions=True)
    assert read_figures(tmp_path / "one") == read_figures(tmp_path / "two") == read_figures(tmp_path / "cut")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("method", "settings"), [
    ("local", {}),
    ("fedproto", {"options": {"networks": "personal"}, "rounds": 1, "sample_fraction": 0.67}),
    ("ensemble", {"rounds": None}),
    ("fusefl", {"rounds": None, "local_epochs": 2, "options": {"calibrate": True}}),
])  # fmt: skip
def test_methods_that_evaluate_themselves(method, settings, make_data, make_config, tmp_path):
    config = make_config(method, **settings)
    summary = run(config, out=tmp_path, data=make_data(), predictions=True)
    found, figures = rows(tmp_path), summary["metrics"]
    assert all(0 <= figures[f"{prefix}_{name}"] <= 1 for prefix in ("id", "ood", "validation") for name in FIGURES)
    networks = {row.get("client") for row in found}
    assert len(networks) == {"local": 3, "fedproto": 2}.get(method, 1)
    assert networks <= ({"0", "1", "2"} if method in ("local", "fedproto") else {None})
    own = [row for row in found if row["test_set"] == "id"]
    assert len(own) == 16 * len(networks)
    right = sum(row["true_class"] == row["predicted_class"] for row in own)
    assert right / len(own) == pytest.approx(figures["id_accuracy"])
    matrix = confusions.read(tmp_path).matrices["id"]
    assert (matrix.trace(), matrix.sum()) == (right, len(own))


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", sorted(name for name, kind in METHODS.items() if kind.serves(CLASSIFICATION)))
def test_every_method_has_them(method, make_small, tmp_path):
    config, data = make_small(method)
    summary = run(config, out=tmp_path, data=data, predictions=True)
    assert {f"{prefix}_{name}" for prefix in ("id", "ood") for name in FIGURES} <= set(summary["metrics"])
    assert (tmp_path / "predictions.csv").exists()


def test_a_method_that_keeps_nothing_says_so(make_data, make_config, tmp_path):
    try:

        @register("mute")
        class Mute(FedAvg):
            """A method that evaluates without recording logits."""

            def evaluate(self, model, data):
                right = [(model(batch.inputs).argmax(1) == batch.targets).sum() for batch in data.batches()]
                return {"accuracy": float(sum(right)) / len(data)}

        summary = run(make_config("mute"), out=tmp_path, data=make_data(), predictions=True)
    finally:
        METHODS.pop("mute", None)
    assert "id_accuracy" in summary["metrics"]
    assert "id_auroc" not in summary["metrics"]
    assert "per_class" not in summary
    assert not (tmp_path / "predictions.csv").exists()
    assert "predictions.csv was not written: the figures of mute" in summary["diagnostics"]["no-predictions"]


def test_classes_without_samples_and_classes_of_one_name(make_data, make_config, tmp_path):
    data = make_data(two_tests=False)
    test = data.tests[""]
    data = dataclasses.replace(data, tests={"": test.subset(torch.nonzero(test.labels != 1)[:, 0])}, classes=("a",) * 3)
    summary = run(make_config(), out=tmp_path, data=data, predictions=True)
    table = summary["per_class"]["test"]
    assert list(table["recall"]) == ["0 a", "1 a", "2 a"]
    assert table["recall"]["1 a"] is None is table["auroc"]["1 a"]
    known = [value for value in table["auroc"].values() if value is not None]
    assert summary["metrics"]["auroc"] == pytest.approx(sum(known) / 2)
    assert summary["metrics"]["balanced_accuracy"] == pytest.approx(
        sum(value for value in table["recall"].values() if value is not None) / 2
    )
    assert {row["sample"] for row in rows(tmp_path) if row["test_set"] == "test"} == {
        str(i) for i in range(len(data.tests[""]))
    }


def test_logits_that_are_not_finite_have_no_areas():
    class Kept:
        task, labels, kept = CLASSIFICATION, torch.tensor([0, 1, 1]), [(None, torch.tensor([[1.0, 0]] * 3))]

        def __len__(self):
            return 3

    good, bad = Kept(), Kept()
    bad.kept = [(None, torch.tensor([[math.nan, 0.0], [0.0, 1.0], [0.0, 1.0]]))]
    short = Kept()
    short.kept = [(None, torch.zeros(3, 5))]  # not a logit for every class
    found = final_figures.final_figures({"id_": good, "ood_": bad, "": short}, ("x", "y"))
    assert {"id_auroc", "id_ece", "ood_macro_f1"} <= set(found.metrics)
    assert not {"ood_auroc", "ood_ece"} & set(found.metrics)
    assert set(found.per_class) == {"id", "ood"}


def test_private_records_have_no_counts(make_data, make_config, refuses, tmp_path):
    config = make_config(records="private")
    summary = run(config, out=tmp_path / "run", data=make_data())
    assert "id_auroc" in summary["metrics"]
    assert not (tmp_path / "run" / "confusion.json").exists()
    with refuses(r"--predictions writes the true class of every test image.* --records all", "other"):
        run(config, out=tmp_path / "other", data=make_data(), predictions=True)


def make_split(n, seed):
    images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, 16, 16)).astype(np.uint8))
    labels = (images.float().mean(1) > 110).long()
    return Split(images, labels)


def test_a_segmentation_has_the_dice_of_every_class(make_config, refuses, tmp_path):
    clients = tuple(make_split(6, k) for k in range(2))
    data = FederatedData(
        name="tiny", classes=("ground", "cell"), clients=clients, validation=make_split(4, 8),
        tests={"": make_split(5, 9)},
        form=ImageForm(tuple(clients[0].images.shape[1:]), (0.5,) * 3, (0.3,) * 3),
        statistics=PartitionStatistics.of([np.zeros(6, int)] * 2, ("ground", "cell"), "iid"),
    )  # fmt: skip
    config = make_config(model="unet-small", clients=2, rounds=1, grad_cam=0)
    summary = run(config, out=tmp_path / "run", data=data)
    network, _ = read_model(tmp_path / "run")
    split = data.tests[""]
    with torch.no_grad():
        guess = network(normalise(split.images, data.form.mean, data.form.std)).argmax(1)
    found = summary["per_class"]["test"]["dice"]
    for c, name in enumerate(data.classes):
        overlap, either = ((guess == c) & (split.labels == c)).sum((1, 2)), (guess == c).sum((1, 2))
        expected = (2 * overlap / (either + (split.labels == c).sum((1, 2)))).double().mean()
        assert found[name] == pytest.approx(float(expected), abs=1e-6)
    assert found["cell"] == pytest.approx(summary["metrics"]["dice"])
    assert not (tmp_path / "run" / "confusion.json").exists()
    with refuses("--predictions writes a class for every image, and these data are for segm", "other"):
        run(config, out=tmp_path / "other", data=data, predictions=True)


@pytest.mark.parametrize(("content", "why"), [
    ("{", "damaged"),
    ("[]", "damaged"),
    ('{"classes": ["a"]}', "it has no 'test_sets'"),
    ('{"classes": ["a", 2], "test_sets": {}}', "no list of names"),
    ('{"classes": ["a", "b"], "test_sets": {"id": [[1, 2], [3]]}}', "every two classes"),
    ('{"classes": ["a"], "test_sets": {"id": [[-1]]}}', "every two classes"),
    ('{"classes": ["a"], "test_sets": {"id": [[true]]}}', "every two classes"),
    ('{"classes": ["a"], "test_sets": {"id": [[1e3]]}}', "every two classes"),
    ('{"classes": ["a"], "test_sets": [[1]]}', "every two classes"),
])  # fmt: skip
def test_damaged_counts_are_named(content, why, tmp_path):
    assert confusions.read(tmp_path) is None
    (tmp_path / "confusion.json").write_text(content)
    with pytest.raises(UserError, match=r"confusion\.json is damaged .*: delete it, only a picture is lost") as error:
        confusions.read(tmp_path)
    assert why in str(error.value)


# -- pairs -------------------------------------------------------------------------------------------------------------


PHASE = Phase(0, "train", "update")
TINY = {"width": 8, "batch_size": 6, "lr": 0.01}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["fedavg", "fedprox", "feddyn", "scaffold", "local", "centralised"])
def test_a_baseline_trains_on_pairs(method, make_pairs, make_config, tmp_path):
    config = make_config(method, **TINY, client_test=0.3)
    data = make_pairs()
    metrics = run(config, out=tmp_path, data=data)["metrics"]
    again = evaluate_run(tmp_path, data=data)[0]
    assert again == {name: metrics[name] for name in again}
    for name in ("i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5", "validation_i2t_r1"):
        assert 0 <= metrics[name] <= 1
    assert metrics["gallery"] == 16
    assert metrics["worst_client_loss"] >= metrics["mean_client_loss"] > 0
    network, about = read_model(tmp_path)
    assert about["pair"]["vocabulary"]
    members = network.members if method == "local" else [network]
    assert len(members) == (3 if method == "local" else 1)
    tokens = members[0].tokenize(["a red square"])
    assert members[0].text_embedding(tokens).shape == (1, 128)


def test_others_say_that_they_are_not_for_pairs(make_pairs, make_config, tmp_path):
    with pytest.raises(UserError, match=r"fedgid is for classification.*for retrieval"):
        run(make_config("fedgid"), out=tmp_path, data=make_pairs())
    with pytest.raises(UserError, match="control=I "):
        run(make_config("scaffold", options={"control": "I"}), out=tmp_path, data=make_pairs())


def test_the_loss_is_the_contrastive_one_of_the_batch(make_pairs, make_config):
    client = Client(RunContext(make_config(**TINY), make_pairs()), 0, {})
    batch = next(iter(client.in_order(6)))
    network = client.network()
    x, y = network(batch.inputs, batch.targets)
    truth = torch.arange(6)
    expected = sum(torch.nn.functional.cross_entropy(s, truth) for s in (x @ y.T / 0.07, y @ x.T / 0.07))
    assert torch.allclose(batch.task.loss(network, batch), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="losses are per sample"):
        RETRIEVAL.loss(network, dataclasses.replace(batch, per_sample=True))


def test_test_loss_is_of_batches_of_one_size():
    x = torch.nn.functional.normalize(torch.randn(70, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    near = contrastive_among(x, x, 32)
    assert contrastive_among(x[:64], x[:64], 32) == near  # what is left over stays out
    assert contrastive_among(x[:9], x[:9], 32) < near  # fewer alternatives


def test_words_of_the_vocabulary_are_booked(make_pairs, make_config, tmp_path):
    summary = run(make_config(**TINY, rounds=1), out=tmp_path, data=make_pairs())
    vocabulary = read_model(tmp_path)[1]["pair"]["vocabulary"]
    assert summary["bytes"]["one_off_down"] == 3 * sum(len(word) for word in vocabulary)
    assert summary["bytes"]["one_off_up"] > 0


# Clients' own test sets, and a client that never trains.


def test_set_aside_divides_every_client(make_pairs):
    data = make_pairs()
    divided = hold_out(data, held_out=1, share=0.25, seed=3)
    assert [len(c) for c in divided.clients] == [15, 7]
    assert [len(c) for c in divided.client_tests] == [5, 2]
    assert torch.equal(divided.tests["held_out"].images, data.clients[1].images)
    shared = hold_out(data, held_out=None, share=0.25, seed=3)
    assert torch.equal(shared.client_tests[2].images, divided.client_tests[1].images)  # whoever else is there
    together = torch.cat([shared.clients[0].images, shared.client_tests[0].images]).flatten(1).sum(1).sort().values
    assert torch.equal(together, data.clients[0].images.flatten(1).sum(1).sort().values)


def test_set_aside_says_what_is_wrong(make_pairs):
    with pytest.raises(UserError, match="0 to 2, not 3"):
        hold_out(make_pairs(), held_out=3, share=0, seed=0)
    with pytest.raises(UserError, match="Client 1 has 3 samples"):
        hold_out(make_pairs(sizes=(9, 3)), held_out=None, share=0.5, seed=0)


def test_a_held_out_client_is_reported_and_never_sent_anything(make_pairs, make_config, tmp_path):
    config = make_config(**TINY, held_out_client=2, client_test=0.2)
    summary = run(config, out=tmp_path, data=make_pairs())
    assert 0 <= summary["metrics"]["held_out_i2t_r1"] <= 1
    assert sorted(read_metrics(tmp_path)[0]["clients"]) == ["0", "1"]
    assert len(summary["bytes"]["clients"]) == 2
    assert run(load_settings(tmp_path), out=tmp_path, resume=True, data=make_pairs()) == summary


# What the training loop learnt for it.


def test_a_part_is_trained_alone(make_pairs, make_config):
    context = RunContext(make_config(**TINY, local_steps=2), make_pairs())
    network, client = context.networks.get("local"), Client(context, 0, {})
    message = context.networks.initial()

    class Heads(FedAvg):
        def loss(self, model, batch, received):
            with torch.no_grad():
                images, texts = model.encode_image(batch.inputs), model.encode_text(batch.targets)
            x, y = model.project_image(images), model.project_text(texts, batch.targets.mask)
            return (x - y).square().sum()

    result = client.train(Heads(), PHASE, message, parts=PARTS[2:])
    encoders = message["parameters"].numel() - result["parameters"].numel()
    places = network.places["parameters"]
    assert encoders == min(place.start for name, place in places.items() if name.startswith(PARTS[2:]))
    assert encoders >= max(place.stop for name, place in places.items() if name.startswith(PARTS[:2]))
    assert torch.equal(network.parameters[:encoders], message["parameters"][:encoders])
    assert torch.equal(network.parameters[encoders:], result["parameters"])
    assert not torch.equal(result["parameters"], message["parameters"][encoders:])


def test_parts_must_be_neighbours_and_exist(make_pairs, make_config):
    network = Network(RunContext(make_config(**TINY), make_pairs()).networks.build(), torch.device("cpu"))
    with pytest.raises(ValueError, match="neighbours"):
        NetworkPart(network, ("image_encoder", "text_align"))
    with pytest.raises(ValueError, match="given nose"):
        NetworkPart(network, ("nose",))


class Watching(FedAvg):
    """FedAvg that keeps its batches."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def loss(self, model, batch, received):
        self.batches.append(batch)
        return super().loss(model, batch, received)


@pytest.mark.parametrize(("steps", "batches"), [(2, 2), (3, 3), (9, 9)])
def test_a_limit_of_steps_replaces_epochs(steps, batches, make_data, make_config):
    method = Watching()
    client = Client(RunContext(make_config(local_steps=steps, batch_size=4), make_data()), 0, {})
    client.train(method, PHASE, client._context.networks.initial())
    seen = [batch.indices for batch in method.batches]
    assert len(seen) == batches
    assert len(set(map(int, torch.cat([torch.from_numpy(i) for i in seen[:5]])))) == sum(map(len, seen[:5]))


def test_adamw_is_torchs(make_data, make_config):
    config = make_config(optimizer="adamw", lr=0.01, weight_decay=0.05, local_steps=4)
    context = RunContext(config, make_data())
    method = Watching()
    result = Client(context, 0, {}).train(method, PHASE, context.networks.initial())
    network = context.networks.build().to(memory_format=torch.channels_last)
    adam = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.05)
    for batch in list(method.batches):
        adam.zero_grad()
        batch.task.loss(network, batch).backward()
        adam.step()
    expected = Network(network, torch.device("cpu")).read()
    assert torch.allclose(result["parameters"], expected["parameters"], rtol=1e-4, atol=1e-5)


def test_only_chosen_rows_are_trained_on(make_data, make_config):
    method = Watching()
    context = RunContext(make_config(), make_data())
    rows = torch.tensor([1, 4, 5, 8, 11]).numpy()
    Client(context, 0, {}).train(method, PHASE, context.networks.initial(), rows=rows)
    assert {row for batch in method.batches for row in batch.indices.tolist()} == set(rows.tolist())


def test_one_shot_methods_have_no_steps():
    with pytest.raises(UserError, match="--sample-fraction is not for dense"):
        RunConfig.make("dense", sample_fraction=0.5)
    with pytest.raises(UserError, match="--local-steps is not for dense"):
        RunConfig.make("dense", local_steps=3)


def test_data_without_texts_stay_as_they_were(make_data):
    data = make_data()
    assert dataclasses.replace(hold_out(data, held_out=None, share=0, seed=0), client_tests=()) == data


def test_fixed_statistics_are_trained_with_and_stay(make_pairs, make_config, tmp_path):
    results = {}
    for fixed in (None, 1):
        context = RunContext(make_config(**TINY, local_steps=2, freeze_bn_after=fixed), make_pairs())
        message = context.networks.initial()
        for r in range(2):
            result = Client(context, 0, {}).train(FedAvg(), Phase(r, "train", "update"), message)
            results[fixed, r] = result
            assert torch.equal(result["buffers"], message["buffers"]) == (fixed is not None and r >= fixed)
    assert torch.equal(results[None, 0]["parameters"], results[1, 0]["parameters"])
    assert not torch.equal(results[None, 1]["parameters"], results[1, 1]["parameters"])


def test_a_client_with_a_single_pair(make_pairs, make_config, refuses, tmp_path):
    config = make_config("fedavg", width=4, rounds=1)
    with refuses("Client 1 has a single image-text pair"):
        run(config, out=tmp_path / "run", data=make_pairs((6, 1)))
    run(make_config("centralised", width=4, rounds=1, local_steps=1), out=tmp_path / "all", data=make_pairs((6, 1)))
