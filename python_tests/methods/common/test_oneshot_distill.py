"""FedDF and DENSE: one network that follows the clients' ensemble, and images from an ensemble."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fedkern import models
from fedkern.downstream.saved_network import read_model
from fedkern.engine.run import run
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.messages.leaves import Keywords
from fedkern.methods.baselines import feddf
from fedkern.methods.common import oneshot_distill
from python_tests.saved_network import same_network

SMALL = {"nz": 4, "ngf": 2, "generator_steps": 2, "synthesis_batch": 8, "distill_batch": 4, "distill_epochs": 2}
OPTIONS = {"feddf": {"distill_batch": 4, "distill_epochs": 2}, "dense": SMALL}
RUNNING = {"fresh_statistics": False}
CALIBRATED = {"calibrate": True, "virtual_features": 20, "calibration_epochs": 1}


@pytest.fixture
def data(make_data, make_public):
    return make_public(make_data(), samples=10)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", OPTIONS)
def test_average_then_distilled_then_calibrated(method, data, make_config, tmp_path):
    run(make_config("oneshot-fedavg", model="cnn", rounds=None), out=tmp_path / "average", data=data)
    config = make_config(method, model="cnn", rounds=None, options={**OPTIONS[method], **CALIBRATED, **RUNNING})
    summary = run(config, out=tmp_path / "run", data=data)
    train, distil, calibrate = read_metrics(tmp_path / "run")
    average = read_metrics(tmp_path / "average")[0]
    for name in ("id_accuracy", "id_loss", "bytes_up", "bytes_down"):
        assert train[name] == average[name]
    assert distil["bytes_up"] == train["bytes_up"]  # nothing travels while the server distils
    assert distil["bytes_down"] == train["bytes_down"]
    assert distil["id_loss"] != train["id_loss"]
    assert calibrate["id_loss"] != distil["id_loss"]
    assert 0 <= summary["metrics"]["teacher_agreement"] <= 1
    assert summary["metrics"]["distil_images"] == (10 if method == "feddf" else 16)
    assert "members" not in Checkpoints(tmp_path / "run").last_server_state()
    assert isinstance(read_model(tmp_path / "run")[0], models.CNN)


def test_labels_of_public_images_are_not_looked_at(data, make_config, tmp_path):
    shifted = dataclasses.replace(data.public, labels=(data.public.labels + 1) % 3)
    config = make_config("feddf", model="cnn", rounds=None, options=OPTIONS["feddf"])
    run(config, out=tmp_path / "a", data=data)
    run(config, out=tmp_path / "b", data=dataclasses.replace(data, public=shifted))
    assert same_network(tmp_path / "a", tmp_path / "b")


def test_feddf_follows_the_ensemble(data, make_config, tmp_path):
    """With enough distillation the student's answers on public images are the ensemble's."""
    settings = {"model": "cnn", "rounds": None, "local_epochs": 4, "lr_end": 1.0}
    run(make_config("ensemble", **settings), out=tmp_path / "ensemble", data=data)
    images = data.public.images
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (data.form.mean, data.form.std))
    x = (images / 255 - mean) / std
    target = read_model(tmp_path / "ensemble")[0](x).log_softmax(1)
    losses = []
    for epochs in (1, 60):
        options = {"distill_batch": 10, "distill_epochs": epochs, "distill_lr": 0.01}
        out = tmp_path / str(epochs)
        run(make_config("feddf", **settings, options=options), out=out, data=data)
        with torch.no_grad():
            own = read_model(out)[0](x).log_softmax(1)
            losses.append(float((target.exp() * (target - own)).sum(1).mean()))
    assert losses[1] < 0.3 * losses[0]


def test_a_student_that_diverges_ends_the_run(data, make_config, tmp_path):
    options = {**OPTIONS["feddf"], "distill_lr": 1e30, "distill_epochs": 3}
    with pytest.raises(UserError, match="The student diverged: lower the method option distill_lr"):
        run(make_config("feddf", model="cnn", rounds=None, options=options), out=tmp_path, data=data)
    assert not (tmp_path / "model.safetensors").exists()


def test_feddf_needs_public_images_or_a_generator(make_data, make_config, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"give --public-samples N, or .* source=generator"):
        run(make_config("feddf", model="cnn", rounds=None, options=OPTIONS["feddf"]), out=tmp_path, data=make_data())
    assert not (tmp_path / "config.toml").exists()
    monkeypatch.setattr(feddf, "IMAGES", 20)
    options = {**SMALL, "source": "generator"}
    summary = run(make_config("feddf", model="cnn", rounds=None, options=options), out=tmp_path, data=make_data())
    assert summary["metrics"]["distil_images"] == 20


def test_networks_may_differ(make_data, make_config, tmp_path):
    """The student has the run's own network.

    The average is over the members with the same architecture.
    """
    data = make_data()
    options = {**SMALL, "models": "cnn:2,resnet8:2"}
    run(make_config("dense", model="cnn", rounds=None, options=options), out=tmp_path, data=data)
    network, _ = read_model(tmp_path)
    assert isinstance(network, models.CNN)
    record, second = read_metrics(tmp_path)
    assert record["bytes_down"] == 0
    assert record["id_loss"] != second["id_loss"]


def student_starts(config, data, out):
    """Play the run, and return the student's weights at the beginning of each epoch of distillation."""
    starts = []
    real = oneshot_distill.Distilled.follow

    def follow(self, student, *given):
        starts.append([p.detach().clone() for p in student.parameters()])
        return real(self, student, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oneshot_distill.Distilled, "follow", follow)
        run(config, out=out, data=data)
    return starts


def test_no_client_may_have_the_students_architecture(data, make_config, tmp_path):
    """Without a network to average, the student starts from the run's fresh network."""
    options = {**OPTIONS["feddf"], "models": "resnet8:2"}
    starts = student_starts(make_config("feddf", model="cnn", rounds=None, options=options), data, tmp_path)
    initial = models.build("cnn", classes=3, channels=3, image_size=8, seed=0, width=2).parameters()
    assert all(torch.equal(a, b) for a, b in zip(starts[0], initial, strict=True))
    record, second = read_metrics(tmp_path)
    assert record["id_loss"] != second["id_loss"]


def test_the_student_starts_from_the_average_or_fresh(data, make_config, tmp_path):
    average_start, fresh_start = (
        student_starts(
            make_config("feddf", model="cnn", rounds=None, options={**OPTIONS["feddf"], "student_init": start}), data,
            tmp_path / start,
        )[0]
        for start in ("average", "fresh")
    )  # fmt: skip
    initial = models.build("cnn", classes=3, channels=3, image_size=8, seed=0, width=2).parameters()
    assert all(torch.equal(a, b) for a, b in zip(fresh_start, initial, strict=True))
    run(make_config("oneshot-fedavg", model="cnn", rounds=None), out=tmp_path / "plain", data=data)
    average = list(read_model(tmp_path / "plain")[0].parameters())
    assert all(torch.equal(a, b) for a, b in zip(average_start, average, strict=True))


def test_pool_asks_every_image_once():
    members = [models.build("cnn", classes=4, channels=3, image_size=8, seed=k, width=2) for k in range(2)]
    teachers = models.Ensemble(members)
    pool = oneshot_distill.Pool(teachers, 7)
    images = torch.randn(7, 3, 8, 8)
    pool.add(images[:3])
    pool.add(images[3:])
    index = torch.tensor([6, 0, 4])
    own, said = pool.take(index)
    assert torch.equal(own, images[index])
    assert own.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(said, teachers.logits(images)[:, index])
    epoch = list(pool.batches(3, torch.Generator()))
    assert [len(batch) for batch in epoch] == [3, 3]  # the seventh image alone cannot be normalised
    assert len(set(torch.cat(epoch).tolist())) == 6


def test_a_pool_keeps_the_nesting_of_inputs():
    def teachers(inputs):
        return torch.stack([inputs["row"].sum(1, keepdim=True), inputs["turn"][:, None].float()])

    pool = oneshot_distill.Pool(SimpleNamespace(logits=teachers), 5)
    inputs = Keywords({"row": torch.rand(5, 3), "turn": torch.arange(5)})
    pool.add(inputs)
    own, said = pool.take(torch.tensor([4, 1]))
    assert isinstance(own, Keywords)
    assert torch.equal(own["row"], inputs["row"][[4, 1]])
    assert own["turn"].tolist() == [4, 1]
    assert torch.equal(said, teachers(inputs)[:, [4, 1]])


# -- oneshot synthesis -------------------------------------------------------------------------------------------------


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def networks(count=2):
    made = [models.build("cnn", classes=3, channels=1, image_size=8, seed=k, width=2) for k in range(count)]
    for k, network in enumerate(made):
        network.train()
        with torch.no_grad():
            network(3 * torch.randn(32, 1, 8, 8, generator=draw(k)))  # running statistics other than the initial ones
    return made


@pytest.fixture
def teachers():
    return models.Ensemble(networks())


def generator(seed=0):
    return models.Generator(nz=6, ngf=2, channels=1, image_size=8, generator=draw(seed))


def how(**settings):
    return oneshot_distill.Distilled.Options(
        **{"generator_steps": 4, "synthesis_batch": 12, "generator_lr": 1e-2, **settings}
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_are_torchs_in_both_passes(layout):
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=draw()).to(memory_format=layout)
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(oneshot_distill._Moments.apply(x), (mean, variance))
    assert torch.autograd.gradcheck(oneshot_distill._Moments.apply, x.requires_grad_())


def test_distance_to_running_statistics(teachers):
    x = torch.randn(5, 1, 8, 8, generator=draw())
    expected = torch.zeros(())
    for member in teachers.members:
        h = x
        for stage in (member.layer1, member.layer2, member.layer3):
            h = stage[0](h)
            mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)
            expected = expected + (mean - stage[1].running_mean).norm() + (var - stage[1].running_var).norm()
            h = stage[3](stage[2](stage[1](h)))
    with oneshot_distill.BatchNormStatistics(teachers.members) as statistics:
        teachers.logits(x.clone().requires_grad_())
        torch.testing.assert_close(statistics.take(), expected / 2)
        assert statistics.take() == 0.0
    teachers.logits(x.clone().requires_grad_())
    assert statistics.take() == 0.0  # the hooks are gone


def test_statistics_are_matched_by_the_data_themselves():
    network = networks(1)[0]
    bn = network.layer1[1]
    x = torch.randn(64, 1, 8, 8, generator=draw(7))
    h = network.layer1[0](x).detach()
    bn.running_mean.copy_(h.mean((0, 2, 3)))
    bn.running_var.copy_(h.var((0, 2, 3), unbiased=False))
    with torch.no_grad(), oneshot_distill.BatchNormStatistics([network.layer1]) as statistics:
        network.eval().layer1(x)
        assert float(statistics.take()) < 1e-5


def test_divergence_counts_the_boundary_alone():
    t = torch.tensor([[[3.0, 0, 0], [0, 2.0, 0]], [[1.0, 0, 0], [0, 4.0, 0]]])
    s = torch.tensor([[2.0, 0, 0], [1.0, 0, 0]])
    weights = torch.tensor([0.5, 0.5])
    p, q = t.mean(0).softmax(1), s.softmax(1)
    rows = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(oneshot_distill.divergence(s, t, weights), rows[1] / 2)  # they agree on the first image
    assert oneshot_distill.divergence(t.mean(0), t, weights) == 0
    by_class = torch.tensor([[[0.25, 0.5, 1.0]], [[0.75, 0.5, 0.0]]])
    p = torch.tensor([[1.5, 0, 0], [0, 3.0, 0]]).softmax(1)
    rows = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(oneshot_distill.divergence(s, t, by_class), rows[1] / 2)


def test_teachers_and_student_stay_as_they_are(teachers):
    student = networks(3)[2].train()
    student.head.weight.requires_grad_(False)
    before = copy.deepcopy([teachers.state_dict(), student.state_dict()])
    oneshot_distill.synthesise(generator(), teachers, student, how(), draw(), 3, adversarial=1.0)
    for module, state in zip((teachers, student), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert student.training
    assert all(p.grad is None for p in (*student.parameters(), *teachers.parameters()))
    assert [n for n, p in student.named_parameters() if not p.requires_grad] == ["head.weight"]


def test_images_come_to_look_like_their_labels(teachers):
    for member in teachers.members:
        member.head.weight.mul_(5)  # opinions, as after training
    settings = how(generator_steps=40, bn_weight=0.0, synthesis_batch=30)
    made, labels = oneshot_distill.synthesise(generator(), teachers, None, settings, draw(1), 3)
    settings = how(generator_steps=1, synthesis_batch=30)
    raw, _ = oneshot_distill.synthesise(generator(), teachers, None, settings, draw(1), 3)
    assert made.shape == (30, 1, 8, 8)
    with torch.no_grad():
        assert F.cross_entropy(teachers(made), labels) < 0.8 * F.cross_entropy(teachers(raw), labels)


def test_statistics_and_divergence_pull_where_they_should(teachers):
    student = networks(3)[2].eval()
    with torch.no_grad():
        student.head.weight.neg_()  # it disagrees with the teachers

    def figures(bn_weight, adversarial):
        settings = how(generator_steps=30, bn_weight=bn_weight)
        made, _ = oneshot_distill.synthesise(
            generator(), teachers, student, settings, draw(2), 3, adversarial=adversarial
        )
        with oneshot_distill.BatchNormStatistics(teachers.members) as statistics, torch.no_grad():
            t = torch.stack([m(made) for m in teachers.members])
            return float(statistics.take()), float(oneshot_distill.divergence(student(made), t, teachers.weights))

    near, _ = figures(bn_weight=1.0, adversarial=0.0)
    far, adversarial = figures(bn_weight=0.0, adversarial=10.0)
    _, plain = figures(bn_weight=0.0, adversarial=0.0)
    assert near < far
    assert adversarial > plain > 0


def test_same_stream_same_images(teachers):
    before = torch.random.get_rng_state()
    a = oneshot_distill.synthesise(generator(), teachers, None, how(), draw(3), 3)
    b = oneshot_distill.synthesise(
        generator(1), teachers, None, how(), draw(3), 3
    )  # restarted, so its first weights do not matter
    c = oneshot_distill.synthesise(generator(1), teachers, None, how(), draw(3), 3, restart=False)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], c[0])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_student_and_a_generator_that_diverge_are_named(teachers):
    student = networks(1)[0]
    torch.nn.init.constant_(student.head.bias, float("inf"))
    with pytest.raises(UserError, match="The student diverged: lower the method option distill_lr"):
        oneshot_distill.synthesise(generator(), teachers, student, how(), draw(), 3)
    torch.nn.init.constant_(teachers.members[0].head.bias, float("nan"))
    with pytest.raises(UserError, match="lower the method option generator_lr"):
        oneshot_distill.synthesise(generator(), teachers, None, how(), draw(), 3)
