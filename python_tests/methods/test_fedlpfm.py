"""Fed-LPFM's and FML's losses against their equations, and the invariants of docs/methods/fedlpfm.md."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, kl_div, log_softmax, one_hot, softmax

from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.rounds.ledger import message_bytes
from fedkern.engine.run import run
from fedkern.engine.server import Server
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods import Batch, FedLPFM, Phase
from fedkern.methods.fedlpfm import teacher_mflops
from fedkern.methods.protocol import BEFORE
from fedkern.models.precision import compute_in
from fedkern.models.teachers.teacher import teacher_of
from fedkern.models.teachers.teacher_cache import unpack_top
from fedkern.models.teachers.teacher_training import tune_copy
from fedkern.settings.config import load_settings
from python_tests.hearing import Hearing
from python_tests.interrupted import KillAt, outcome, play_killed
from python_tests.methods.proxies import PHASE, Fixed, scene
from python_tests.saved_network import same_network

EQUAL = {"lr": 0.05, "momentum": 0.9}  # the methods' own defaults differ
SMALL = {"teacher": "pretrained:cnn/3", "pretrain_epochs": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def data(make_data, make_public):
    return make_public(make_data(), samples=12)


def make(lam=0.5, **options):
    return FedLPFM(FedLPFM.Options.parse({"lambda": lam, **options}))


def loss_of(method, proxy, teacher, batch):
    batch.drawn = {"teacher": teacher}
    return method.loss(proxy, batch, None)


@pytest.mark.parametrize("teachers", [1, 3])
@pytest.mark.parametrize("mixing", ["convex", "additive"])
@pytest.mark.parametrize(("lam", "temperature"), [(0.5, 1.0), (0.3, 4.0), (1.0, 2.0)])
def test_loss_and_gradient_are_the_equations(teachers, mixing, lam, temperature):
    proxy, teacher, batch = scene(teachers)
    method = make(lam, temperature=temperature, mixing=mixing, teachers=teachers)
    total, seen = loss_of(method, proxy, teacher, batch)
    total.backward()
    z, own = proxy.logits.detach(), (1 - lam if mixing == "convex" else 1.0)
    p = softmax(teacher / temperature, 2).mean(0)
    divergence = kl_div(log_softmax(z / temperature, 1), p, reduction="batchmean")
    expected = own * cross_entropy(z, batch.targets) + lam * temperature**2 * divergence
    torch.testing.assert_close(total.detach(), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(seen["loss_kd"], temperature**2 * divergence, rtol=1e-6, atol=1e-9)
    # (1 - lambda)(softmax z - onehot) + lambda T (softmax(z / T) - p_T), all over B
    target = one_hot(batch.targets, 5).double()
    gradient = own * (softmax(z, 1) - target) + lam * temperature * (softmax(z / temperature, 1) - p)
    torch.testing.assert_close(proxy.logits.grad, gradient / 7, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("teachers", [1, 2])
def test_nothing_is_left_to_learn_from_equal_logits(teachers):
    proxy, _, batch = scene()
    method = make(1.0, temperature=2.0, teachers=teachers)
    value, _ = loss_of(method, proxy, proxy.logits.detach().expand(teachers, -1, -1), batch)
    value.backward()
    assert 0 <= value.item() < 1e-12
    assert proxy.logits.grad.abs().max() < 1e-9


@pytest.mark.sampled(1)
@pytest.mark.parametrize("mixing", ["convex", "additive"])
def test_lambda_0_is_fedavg_bit_for_bit(mixing, make_data, make_config, tmp_path):
    data = make_data()  # no public images: no teacher is asked for
    run(make_config("fedavg", **EQUAL), out=tmp_path / "a", data=data)
    run(make_config("fedlpfm", options={"lambda": 0, "mixing": mixing}, **EQUAL), out=tmp_path / "b", data=data)
    assert same_network(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "cache").exists()


def small(make_config, **settings):
    options = {**SMALL, **settings.pop("options", {})}
    return make_config("fedlpfm", options=options, **settings)


def test_a_run_costs_the_bytes_of_fedavg_and_names_its_teacher(data, make_config, tmp_path):
    plain = run(make_config("fedavg"), out=tmp_path / "a", data=data)
    listener = Hearing()
    summary = run(small(make_config), out=tmp_path / "b", data=data, listener=listener)
    assert "training cnn of width 3 on 12 public images: epoch 1 of 2" in listener.notices
    assert summary["bytes"] == plain["bytes"]
    told = summary["diagnostics"]["teacher"]
    assert "cnn of width 3, pre-trained by fedkern on 12 public images (zero-shot)" in told
    assert "not in the byte ledger" in told
    metrics = summary["metrics"]
    for name in ("id_teacher_accuracy", "ood_public_proxy_accuracy", "teacher_inference_mflops"):
        assert name in metrics
    assert metrics["proxy_training_mflops"] > 2 * metrics["proxy_inference_mflops"] > 0
    for record in read_metrics(tmp_path / "b"):
        assert all(0 <= entry["teacher_right"] <= 1 and entry["loss_kd"] > 0 for entry in record["clients"].values())
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["metrics"] == metrics


def test_operations_of_a_teacher_are_the_same_in_either_precision(data, make_config):
    teacher = start(data, small(make_config))[0]._teachers[0]
    images = torch.zeros(2, *data.clients[0].images.shape[1:])
    expected = teacher_mflops(teacher, images)
    with compute_in("bf16"):
        teacher.logits(images)
        assert teacher_mflops(teacher, images) == expected > 0


def test_teachers_own_accuracy_is_reported(data, make_config, tmp_path):
    """The figure equals that of the cached teacher, computed by hand, without and with a correction by counts."""
    plain = run(small(make_config), out=tmp_path / "run", data=data)
    counted = run(small(make_config, options={"prior": "counts"}), out=tmp_path / "counted", data=data)
    teacher = start(data, small(make_config))[0]._teachers[0]
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (data.form.mean, data.form.std))
    logits = [teacher.logits((split.images / 255 - mean) / std) for split in (*data.clients, data.tests["ood"])]
    shares = torch.bincount(torch.cat([split.labels for split in data.clients]), minlength=3)
    predicted = torch.cat(logits[:-1]).exp()
    predicted = (predicted / predicted.sum(1, keepdim=True)).sum(0)
    for summary, shift in ((plain, 0), (counted, (shares / predicted).log())):
        right = ((logits[-1] + shift).argmax(1) == data.tests["ood"].labels).double().mean()
        assert summary["metrics"]["ood_teacher_accuracy"] == pytest.approx(float(right))
    stored = Checkpoints(tmp_path / "counted").last_server_state()["shift"]
    torch.testing.assert_close(stored, (shares / predicted).log()[None], rtol=1e-4, atol=1e-4)
    assert counted["bytes"]["one_off_up"] == 3 * 2 * 3 * 4  # counts of labels and of probabilities, three clients
    assert counted["bytes"]["down"] - plain["bytes"]["down"] == 2 * 3 * 3 * 4


@pytest.mark.sampled(1)
@pytest.mark.parametrize("tuning", ["probe", "finetune"])
def test_tuned_teachers_are_measured_on_the_validation_split(tuning, data, make_config, tmp_path):
    """The mean over clients, each tuned by hand here, stands beside the figure of the untuned teacher."""
    options = {"teacher_tuning": tuning, "tuning_lr": 0.05, "tuning_epochs": 5}
    config = small(make_config, options=options)
    summary = run(config, out=tmp_path / "run", data=data)
    method, context, _ = start(data, config)
    split, right = data.validation, []
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (data.form.mean, data.form.std))
    images = (split.images / 255 - mean) / std
    for k in range(3):
        client, teacher = Client(context, k, {}), method._teachers[0]
        rng, own = client.rng(f"teacher-{tuning}/0", BEFORE), [batch.inputs for batch in client.in_order()]
        tuned, _ = tune_copy(teacher, own, client.labels, rng, head_only=tuning == "probe", epochs=5, lr=0.05)
        logits = tuned(teacher.features(images)) if tuning == "probe" else tuned(images)
        right.append(float((logits.argmax(1) == split.labels).double().mean()))
    metrics = summary["metrics"]
    assert metrics["validation_tuned_teacher_accuracy"] == pytest.approx(sum(right) / 3)
    assert metrics["validation_tuned_teacher_accuracy"] != metrics["validation_teacher_accuracy"]
    assert summary["bytes"]["one_off_up"] == 0  # a figure, which nobody sends


def start(data, config):
    method, context = FedLPFM(FedLPFM.Options.parse(config.options)), RunContext(config, data)
    server = Server(context)
    method.start(server)
    return method, context, server


def test_stored_classes_teach_as_far_as_they_are_stored(data, make_config):
    """With all classes stored, only rounding to bfloat16 is lost."""
    rows, losses, states = np.array([5, 0, 12, 7]), {}, {}
    for kept in (0, 3, 1):
        method, context, server = start(data, small(make_config, options={"teacher_top_k": kept, "temperature": 2.0}))
        client, batch = Client(context, 1, {}), batch_of(context, 1, rows)
        method.client_update(client, PHASE, method.send(server, PHASE))
        batch.drawn = method.draw(client, batch, np.random.default_rng(0))
        proxy = Fixed(torch.linspace(-1, 1, 12).view(4, 3))
        losses[kept] = float(method.loss(proxy, batch, None)[1]["loss_kd"])
        states[kept] = client.state["teacher_logits"][0]
    assert losses[3] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != pytest.approx(losses[0], rel=0.02)
    assert (states[3].dtype, states[3].shape[1], states[1].shape[1]) == (torch.int16, 6, 2)
    values, classes = unpack_top(states[1])
    torch.testing.assert_close(values, (states[0] / 2).log_softmax(1).amax(1, keepdim=True).bfloat16(), rtol=0, atol=0)
    assert torch.equal(classes[:, 0].long(), states[0].argmax(1))


def batch_of(context, client, rows):
    data = context.samples.of_client(client)
    return Batch(data.pixels.take(rows), data.labels[rows], rows, PHASE)


@pytest.mark.parametrize("options", [{}, {"teacher_tuning": "probe", "tuning_lr": 0.05}, {"prior": "counts"}])
def test_cached_and_live_teachers_agree_without_augmentation(options, data, make_config):
    rows, drawn = np.array([5, 0, 12, 7]), {}
    for view in ("cached", "same"):
        method, context, server = start(data, small(make_config, options={"teacher_view": view, **options}))
        client = Client(context, 1, {})
        if "prior" in options:
            server.state["shift"] = torch.tensor([[3.0, -2.0, 0.5]])
        method.client_update(client, PHASE, method.send(server, PHASE))
        drawn[view] = method.draw(client, batch_of(context, 1, rows), np.random.default_rng(0))["teacher"]
    torch.testing.assert_close(drawn["cached"], drawn["same"], rtol=1e-4, atol=1e-4)
    assert drawn["same"].shape == (1, 4, 3)


def test_the_cached_view_is_the_image_before_augmentation(data, make_config):
    method, context, server = start(data, small(make_config, augment="crop"))
    client = Client(context, 0, {})
    method.client_update(client, PHASE, method.send(server, PHASE))
    plain = torch.cat([batch.inputs for batch in client.in_order()])
    torch.testing.assert_close(
        client.state["teacher_logits"][0], method._teachers[0].logits(plain), rtol=1e-5, atol=1e-5
    )


def test_the_teacher_neither_changes_nor_travels(data, make_config):
    method, context, server = start(data, small(make_config))
    before = {name: value.clone() for name, value in method._teachers[0].network.state_dict().items()}
    client, message = Client(context, 0, {}), method.send(server, PHASE)
    upload = method.client_update(client, PHASE, message)
    assert set(upload) == set(message)
    proxy = context.networks.get("server")
    assert message_bytes(upload) == 4 * (proxy.parameters.numel() + proxy.buffers.numel()) + 8 * 3
    for name, value in method._teachers[0].network.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in method._teachers[0].network.parameters())


def test_backbones(data, make_config):
    specs = {"teacher": "pretrained:cnn/3,pretrained:cnn/2,pretrained:cnn/4", "teachers": 2}
    drawn = {}
    for backbone in ("consistent", "random", "random-each-round"):
        method, context, _ = start(data, small(make_config, options={**specs, "backbone": backbone}))
        drawn[backbone] = [
            [tuple(method.backbones(Client(context, k % 3, {}), Phase(r, "train", "update"))) for r in range(8)]
            for k in range(3)
        ]
    assert {pair for rounds in drawn["consistent"] for pair in rounds} == {(0, 1)}
    assert all(len(set(rounds)) == 1 for rounds in drawn["random"])
    assert all(len(set(rounds)) > 1 for rounds in drawn["random-each-round"])
    assert {pair for rounds in drawn["random-each-round"] for pair in rounds} == {(0, 1), (0, 2), (1, 2)}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "how",
    [
        {"prior": "counts"},
        {"teacher_tuning": "probe"},
        {"teacher_tuning": "finetune"},
        {"backbone": "consistent", "teacher_top_k": 2},
    ],
)
def test_resumed_it_ends_alike_even_when_the_cache_is_gone(how, data, make_config, tmp_path):
    options = {
        "teacher": "pretrained:cnn/3,pretrained:cnn/2", "backbone": "random-each-round", "tuning_epochs": 2, **how,
    }  # fmt: skip
    config = small(make_config, options=options, rounds=3)
    run(config, out=tmp_path / "whole", data=data)
    shutil.rmtree(tmp_path / "cache")
    play_killed(config, out=tmp_path / "cut", data=data, at=KillAt("client", 4))
    shutil.rmtree(tmp_path / "cache")
    run(load_settings(tmp_path / "cut"), out=tmp_path / "cut", data=data, resume=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.exhaustive
def test_what_the_teacher_knows_reaches_classes_that_a_client_lacks(make_data, make_public, make_config, tmp_path):
    """Each client has one class, and only the teacher's probabilities teach it the others."""
    data = make_public(make_data((30, 30, 30)), samples=60)
    splits = []
    for k, split in enumerate(make_data((90, 90, 90)).clients):
        splits.append(split.subset(torch.nonzero(split.labels == k)[:, 0][:20]))
    data = dataclasses.replace(data, clients=tuple(splits))
    settings = {**EQUAL, "rounds": 6, "lr": 0.02, "width": 4, "local_epochs": 2, "batch_size": 4}
    accuracy = {}
    for lam in (0, 0.9):
        options = {"lambda": lam, "temperature": 4.0, "teacher": "pretrained:cnn/8", "pretrain_epochs": 20}
        summary = run(make_config("fedlpfm", options=options, **settings), out=tmp_path / str(lam), data=data)
        accuracy[lam] = summary["metrics"]["id_accuracy"]
    assert summary["metrics"]["id_teacher_accuracy"] == 1
    assert accuracy[0.9] > accuracy[0] + 0.15


@pytest.mark.parametrize(("options", "sentence"), [
    ({"lambda": 1.5}, r'"lambda" must be at most 1 with mixing=convex, not 1\.5'),
    ({"teacher_view": "same", "teacher_tuning": "finetune"}, "kept as its logits alone: take teacher_view=cached"),
    ({"teacher_top_k": 4}, "teacher_top_k=4 is for 4 to 32768 classes, and the data have 3: take fewer, or 0"),
    ({"teacher_top_k": 2, "temperature": "inf"}, "softened answers: take a finite temperature, or teacher_top_k=0"),
    ({"teacher_top_k": 2, "teachers": 2}, "of one teacher, as they are: take teachers=1, or teacher_top_k=0"),
    ({"teacher_top_k": 2, "prior": "counts"}, "of one teacher, as they are: take prior=none, or teacher_top_k=0"),
    ({"teacher_top_k": 2, "teacher_view": "same"}, "as they are: take teacher_view=cached, or teacher_top_k=0"),
    ({"prior": "counts", "teacher_tuning": "probe"}, "A tuned teacher has its client's class shares: take prior=none"),
    ({"mapping": "mean"}, '"mapping" is for clip and efficientnet-lite0, and the teacher is pretrained:cnn/3: leave '),
    ({"teachers": 2}, "2 teachers per client need as many backbones, but teacher=pretrained:cnn/3 names 1"),
    ({"teacher": "klip:x"}, 'unknown teacher "klip:x"'),
    ({"prompts": "a {class}"}, '"prompts" is for clip, and the teacher is pretrained:cnn/3: leave it out, or take'),
    ({"teacher": "clip:/nowhere/at/all"}, "the CLIP folder /nowhere/at/all does not exist"),
    ({"teacher": "logits:/nowhere"}, "the file of teacher logits /nowhere does not exist"),
])  # fmt: skip
def test_mistakes_end_before_anything_is_written(options, sentence, data, make_config, refuses, tmp_path):
    with refuses(sentence):
        run(small(make_config, options=options), out=tmp_path / "run", data=data)


def test_class_counts_are_refused_beside_differential_privacy(data, make_config, refuses, tmp_path):
    config = small(make_config, options={"prior": "counts"}, dp_clip=1.0, dp_noise=1.0)
    with refuses(r'--dp-clip is not for fedlpfm with these options, whose clients upload more \("count"\) than a'):
        run(config, out=tmp_path / "run", data=data)


@pytest.mark.parametrize(("options", "settings", "sentence"), [
    ({}, {}, "lacks the logits of"),
    ({"teacher_view": "same"}, {}, "lacks the logits of"),
    ({"teacher_tuning": "probe"}, {}, "gives logits alone, and tuning needs features"),
    ({"teacher_view": "same"}, {"augment": "crop"}, "these are augmented: take teacher_view=cached, or --augment "),
])  # fmt: skip
def test_a_file_of_other_images_is_refused(options, settings, sentence, data, make_config, refuses, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"keys": torch.zeros(1, 16, dtype=torch.uint8), "logits": torch.zeros(1, 3)}, path)
    with refuses(sentence):
        config = small(make_config, options={"teacher": f"logits:{path}", **options}, **settings)
        run(config, out=tmp_path / "run", data=data)


def test_an_embedded_teacher_needs_public_images(make_data, make_config, tmp_path):
    with pytest.raises(UserError, match="give --public-samples N"):
        run(small(make_config), out=tmp_path / "run", data=make_data())


def test_a_teacher_of_other_classes(data, make_config, monkeypatch):
    config = small(make_config)
    monkeypatch.setattr(
        "fedkern.models.teachers.named_teachers.Teachers.make",
        lambda *_: teacher_of(lambda x: torch.zeros(len(x), 7), "imagenet", 3),
    )
    with pytest.raises(UserError, match="the teacher imagenet knows 7 classes and the data have 3"):
        start(data, config)
