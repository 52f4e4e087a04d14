"""FedIOD end to end: the plan of messages, updates, traffic, absent clients, and teachers."""

import dataclasses
import gc
import json
import shutil

import pytest
import torch

from fedkern.data import IGNORE, Split
from fedkern.downstream.saved_network import read_model
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.local.training import Diverged
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods import FedIOD
from fedkern.methods.common.oneshot import copy_vectors, flatten, load
from fedkern.methods.fediod import losses
from fedkern.methods.fediod.method import load_teacher, split_holdout
from fedkern.methods.fediod.server import ALIKE, make_generator, stack_class_counts
from fedkern.models.teachers.teacher_stack import TeacherStack
from fedkern.settings.config import load_settings
from python_tests.interrupted import KillAt, outcome, play_killed
from python_tests.methods.fediod_play import EVERY_TERM, TINY, World, cleared_and_live, frozen, same
from python_tests.tasks import test_segmentation as segmented

MIXED = "cnn:2,mlp:4,resnet8:2"


@pytest.fixture
def world(make_config, make_data):
    return lambda data=None, **options: World(make_config, make_data() if data is None else data, **options)


# -- one message after another, all clients at once, one graph ---------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize("models", ["cnn:2", MIXED], ids=["alike", "three architectures"])
def test_a_cohort_gives_the_numbers_of_messages(world, models):
    worlds = [world(models=models, batched=batched, **EVERY_TERM) for batched in (True, False)]
    for w in worlds:
        w.play(w.round(), 0)
    a, b = (w.server.state for w in worlds)
    for part in ("student", "generator", "adam"):
        for name in a[part]:
            torch.testing.assert_close(a[part][name], b[part][name], rtol=1e-3, atol=2e-5)
    for k in range(3):
        ours, theirs = (w.clients[k].state["critics"][0] for w in worlds)
        assert ours["steps"] == theirs["steps"]
        for name in ours["weights"]:
            torch.testing.assert_close(ours["weights"][name], theirs["weights"][name], rtol=1e-3, atol=2e-5)


def test_reports_are_means_over_what_a_client_took_part_in(world):
    worlds = [world(batched=batched, iterations=6) for batched in (True, False)]
    for w in worlds:
        w.play(w.round(), 0)
    for name in ("critic_loss", "realism"):
        ours, theirs = ([w.clients[k].report[name] for k in range(3)] for w in worlds)
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_messages_give_the_gradient_of_a_single_graph(world):
    """L_G is one autograd graph from the noise through every discriminator and teacher."""
    w = world(models=MIXED, batched=False, **EVERY_TERM)
    images, gradients = w.phases(w.round(), 0)[:2]
    w.exchange(images)
    shop, options = w.server.round_cache["workshop"], w.method.options
    x, ensemble = shop.x, shop.server.round_cache["criticism"]
    assert set(ensemble) == {0, 1, 2}
    discriminators = [w.clients[k].round_cache["answers"].discriminators.module for k in range(3)]
    seen = x.contiguous(memory_format=torch.channels_last)
    logits = torch.stack([load_teacher(w.method, w.clients[k])(seen) for k in range(3)]).log_softmax(2)
    patches = torch.cat([critic(seen) for critic in discriminators])
    samples = torch.tensor([float(c.samples) for c in w.clients.values()])
    pi = samples / samples.sum()
    total = losses.teacher_terms(logits, pi, options.w_balance)[0]
    total = total + options.w_real * (pi * losses.patch_entropy(patches, True).mean(1)).sum()
    expected = torch.autograd.grad(total, list(shop.generator.network.parameters()), retain_graph=True)
    w.exchange(gradients)
    got = [p.grad for p in shop.generator.network.parameters()]
    scale = max(float(g.abs().max()) for g in expected)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * scale)


# -- who changes what --------------------------------------------------------------------------------------------------


def test_an_exchange_changes_what_it_may(world):
    """Images change only D, gradients only G, distillation only S.

    Nothing changes a teacher.
    """
    w = world(**EVERY_TERM)
    probe = torch.randn(3, *w.context.data.form.shape)
    said = TeacherStack([load_teacher(w.method, client) for client in w.clients.values()]).logits(probe)
    live = None
    for phase in w.phases(w.round(), 0)[:3]:
        before = {k: frozen(c.state.get("critics", {})) for k, c in w.clients.items()}
        teachers = {k: frozen(c.state["teacher"]) for k, c in w.clients.items()}
        if live is not None:
            g, s = live.generator.network, live.student.network
            weights = [[p.detach().clone() for p in m.parameters()] for m in (g, s)]
        w.exchange(phase)
        kind = phase.exchange.split()[0]
        for k, client in w.clients.items():
            assert same(client.state["teacher"], teachers[k])
            if kind != "images":
                assert same(client.state["critics"], before[k])
        assert torch.equal(w.method.bank(w.clients).logits(probe), said)  # the copies that run
        if live is not None:
            moved = [any(not torch.equal(p, q) for p, q in zip(m.parameters(), old, strict=True))
                     for m, old in zip((g, s), weights, strict=True)]  # fmt: skip
            assert moved == [kind == "gradients", kind == "distil"]
        live = w.server.round_cache["workshop"]
    critic = w.clients[0].state["critics"][0]
    assert critic["steps"] == 1
    assert not same(critic["mean"]["conv2"], torch.zeros_like(critic["mean"]["conv2"]))


def test_a_client_trains_its_discriminator_as_long_as_its_samples_last(world):
    """Clients of 20, 13 and 9 samples have 5, 4 and 3 batches of four in a round.

    After that they only answer.
    """
    w = world(iterations=6)
    w.play(w.round(), 0)
    assert [client.state["critics"][0]["steps"] for client in w.clients.values()] == [5, 4, 3]
    assert w.method.options.count_iterations(w.context.federation) == 6
    assert FedIOD.Options(batch=4, iterations=0).count_iterations(w.context.federation) == 5


def test_nobody_but_the_client_sees_its_networks(world):
    w = world()
    for phase in w.phases(w.round(), 0)[:3]:
        messages, answers = w.exchange(phase)
        down = {name for message in messages.values() for name in message}
        up = {name for answer in answers.values() for name in answer}
        assert (down, up) == {
            "images": ({"images", "critic_lr"}, {"logits", "scores"}),
            "gradients": ({"logits", "share"}, {"gradients"}),
            "distil": ({"images"}, {"logits", "scores"}),
        }[phase.exchange.split()[0]]
    keys = set(w.server.state)
    assert keys == {"student", "generator", "iteration", "classes"}


# -- clients that are absent, know other classes or differ ------------------------------------------------------------


def test_absent_clients_are_skipped_and_the_rest_reweighted(world):
    w = world()
    images, gradients, distil = w.phases(w.round(), 0)[:3]
    w.exchange(images, lost=(1,))
    messages = w.server.round_cache["criticism"]
    assert set(messages) == {0, 2}
    assert messages[0]["share"] == pytest.approx(20 / 29)
    assert messages[2]["share"] == pytest.approx(9 / 29)
    w.exchange(gradients, lost=(2,))
    w.exchange(distil, lost=(0, 1, 2))  # nobody is left: nothing is learnt, nothing fails
    assert w.server.round_cache["workshop"].iteration == 1


@pytest.mark.sampled(1)
@pytest.mark.parametrize("mode", ["generator", "public"])
def test_a_teacher_that_diverges_is_left_out(mode, make_data, make_public, make_config, monkeypatch, tmp_path):
    fit = Client.fit

    def diverging(self, method, phase, *arguments, **named):
        if self.id in lost:
            raise Diverged(self.id, phase.round, 1, "the loss is nan")
        return fit(self, method, phase, *arguments, **named)

    monkeypatch.setattr(Client, "fit", diverging)
    data = make_public(make_data())
    config = make_config("fediod", model="cnn", rounds=2, on_nan="skip", options={**TINY, "mode": mode})
    lost = (1,)
    summary = run(config, out=tmp_path / "run", data=data)
    said = summary["diagnostics"]["diverging-client"]
    assert said.startswith('Client 1 diverged before the first round ("teachers"), batch 1: the loss is nan; what it')
    assert summary["metrics"]["id_mean_teacher"] > 0
    lost = (0, 1, 2)
    with pytest.raises(UserError, match=r"No client is left before the first round \(.teachers.\), as all diverged"):
        run(config, out=tmp_path / "none", data=data)


def test_a_client_without_a_class_has_no_say_in_it(world, make_data):
    data = make_data()
    split = data.clients[0]
    data = dataclasses.replace(data, clients=(Split(split.images, torch.zeros_like(split.labels)), *data.clients[1:]))
    w = world(data, class_weights="counts")
    disclosed = stack_class_counts(w.server, [0, 1, 2], 0.0)
    assert disclosed.shape == (3, 3)
    assert disclosed[0, 1:].tolist() == [0, 0]
    w.exchange(w.phases(w.round(), 0)[0])
    logits = torch.randn(3, 4, 3)
    answers = {k: {"logits": logits[k], "scores": torch.ones(4)} for k in range(3)}
    known = w.server.round_cache["workshop"].gather(answers)
    assert known.mask.tolist()[0] == [True, False, False]
    floored = world(data, class_weights="counts", weight_floor=0.1, teacher_temperature=2.0, student_lr=1e-9)
    floored.exchange(floored.phases(floored.round(), 0)[0])
    shop = floored.server.round_cache["workshop"]
    ensemble = shop.gather(answers)
    assert ensemble.mask.all()
    images = torch.randn(4, 3, 8, 8)
    shop.teach(images, ensemble, 4)
    weights = torch.maximum(disclosed, 0.1 * disclosed.sum(0))
    mixed = ((weights / weights.sum(0))[:, None] * (logits / 2).log_softmax(2)).sum(0)
    expected = (mixed - shop.student.network(images).detach()).var(1, correction=0).mean() / 2
    assert shop.running.read()["student_loss"] == pytest.approx(float(expected), rel=1e-4)
    uniform = world(data, class_weights="uniform")
    assert stack_class_counts(uniform.server, [0, 1], 0.0).tolist() == [[1.0], [1.0]]


def test_bytes_are_those_of_the_specification(make_data, make_config, tmp_path):
    """Section 2.8: six batches of images down, six of logits and confidences and one of gradients up, in two steps."""
    run(make_config("fediod", model="cnn", grad_cam=0, options=TINY), out=tmp_path, data=make_data())
    booked = json.loads((tmp_path / "summary.json").read_text())["bytes"]
    batch, classes, pixels, iterations = 4, 3, 3 * 8 * 8, 2 * 3
    image, row = 4 * batch * pixels, 4 * batch * classes
    for entry in booked["clients"].values():
        assert entry["down"] == iterations * (3 * image + row + 8 + 8)  # gradients of the logits; two numbers
        assert entry["up"] == iterations * (3 * (row + 4 * batch) + image)
        assert entry["one_off_up"] == 4 * classes


def test_images_of_a_byte_per_channel(make_data, make_config, tmp_path):
    for pixels in ("float32", "uint8"):
        run(make_config("fediod", model="cnn", grad_cam=0, rounds=1, options={**TINY, "pixels": pixels, **EVERY_TERM}),
            out=tmp_path / pixels, data=make_data())  # fmt: skip
    fine, coarse = (json.loads((tmp_path / p / "summary.json").read_text()) for p in ("float32", "uint8"))
    saved = fine["bytes"]["down"] - coarse["bytes"]["down"]
    assert saved == 3 * 3 * 3 * 3 * 4 * 3 * 8 * 8  # clients, iterations, batches, bytes, images
    assert abs(fine["metrics"]["clarity"] - coarse["metrics"]["clarity"]) < 0.05


def test_the_student_begins_after_the_warm_up(world):
    """Before that nobody is asked for the student, and its learning rate falls over its own iterations."""
    w = world(warmup=0.5, iterations=4)  # two rounds: eight iterations
    plan = [entry for entry in w.method.rounds(w.context.federation) if not entry.one_off]
    assert [entry.trains for entry in plan] == ["generator", "generator and student"]
    w.server.showing, rates = True, []
    for number in range(2):
        for phase in w.phases(w.round(), number):
            before = frozen(w.server.state["student"])
            messages, _ = w.exchange(phase)
            kind, i = phase.exchange.split()
            assert bool(messages) == (kind != "distil" or number == 1)
            if kind == "distil":
                shop = w.server.round_cache["workshop"]
                rates.append(shop.student._optimiser.lr)
                assert shop.iteration == 4 * number + int(i) + 1
        assert same(before, w.server.state["student"]) == (number == 0)
        assert set(w.server.artifacts) == {"generated"} | ({"teacher_weights"} if number else set())
        assert {"critic_loss", "realism"} <= set(w.clients[0].report)
        for side in (w.server, *w.clients.values()):
            side.round_cache.clear()
        w.server.artifacts.clear()
    start, end = w.method.options.student_lr, 1e-5
    assert rates[4:] == pytest.approx([end + (start - end) * c for c in (1, 0.853553, 0.5, 0.146447)], rel=1e-4)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("optimizer", "kept"), [("sgd", {"momentum_buffer"}), ("adamw", {"step", "exp_avg", "exp_avg_sq"})]
)
def test_a_round_goes_on_where_the_one_before_ended(world, optimizer, kept):
    """The state holds all that the next round needs, bit for bit."""
    worlds = cleared_and_live(world, 2, student_optimizer=optimizer, **EVERY_TERM)
    states = [w.server.state for w in worlds]
    assert set(states[0]["student_moments"]) == kept
    assert same(states[0], states[1])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("bias", [0.0, 50.0, -50.0])
def test_a_saturated_generator_is_told_of(world, bias):
    """With all-white or all-black images the sigmoid has no gradient, and the run would end at chance in silence."""
    w = world()
    flat = flatten(make_generator(w.server, w.method.options, torch.Generator()))
    module = load(flat, w.server.state["generator"])
    module.body[-1].bias.data.fill_(bias)
    w.server.state["generator"] = copy_vectors(flat)
    rounds = w.context.federation.rounds
    for number in range(rounds):
        assert "generator-collapsed" not in w.context.notices.warnings or number >= rounds / 2
        w.play(w.round(), number)
    assert ("generator-collapsed" in w.context.notices.warnings) == (bias != 0)
    assert (w.server.report["image_spread"] < ALIKE) == (bias != 0)


@pytest.mark.exhaustive
def test_memory_does_not_grow_with_the_iterations(world):
    w = world(iterations=8, **EVERY_TERM)
    counts = []
    for i, phase in enumerate(w.phases(w.round(), 0)):
        w.exchange(phase)
        if i in (8, 20):  # the end of an iteration
            gc.collect()
            counts.append(sum(1 for thing in gc.get_objects() if torch.Tensor in type(thing).__mro__))
    assert counts[0] == counts[1]


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_three_architectures_in_one_federation(make_data, make_config, tmp_path):
    config = make_config("fediod", model="cnn", grad_cam=0, options={**TINY, "models": MIXED})
    metrics = run(config, out=tmp_path, data=make_data())["metrics"]
    for name in ("best_teacher", "mean_teacher", "ensemble_uniform", "ensemble_weighted", "accuracy"):
        assert 0 <= metrics[f"id_{name}"] <= 1
    assert metrics["id_mean_teacher"] <= metrics["id_best_teacher"]
    assert 0 <= metrics["holdout"] <= 1
    last = read_metrics(tmp_path)[-1]
    assert set(last["clients"]["0"]) >= {"critic_loss", "realism", "holdout"}
    network, about = read_model(tmp_path)
    assert (about["model"], type(network).__name__) == ("cnn", "CNN")


def test_outputs_alone(make_data, make_public, make_config, tmp_path):
    """With public images and no generator, teachers of any architecture answer once."""
    options = {"mode": "public", "models": MIXED, "batch": 4, "student_steps": 2, "iterations": 2}
    data = make_public(make_data(), samples=10)
    summary = run(
        make_config("fediod", model="cnn", grad_cam=0, public_samples=10, options=options), out=tmp_path, data=data
    )
    booked = summary["bytes"]
    assert (booked["up"], booked["down"]) == (0, 0)
    assert booked["one_off_up"] == 3 * (4 * 3 + 4 * 10 * 3)
    assert "id_ensemble_weighted" in summary["metrics"]
    own = read_metrics(tmp_path)[-1]["clients"]
    assert "critic_loss" not in own["0"]
    assert summary["metrics"]["holdout"] == pytest.approx(sum(c["holdout"] for c in own.values()) / len(own))
    with pytest.raises(UserError, match="--public-samples"):
        run(make_config("fediod", model="cnn", options=options), out=tmp_path / "none", data=make_data())


def test_what_cannot_be_is_said_before_anything_is_written(make_data, make_config, tmp_path):
    for settings, words in (
        ({"buffers": "drop"}, "running statistics"),
        ({"options": {"critic_layers": 4}}, "at least 16 x 16 pixels"),
    ):
        with pytest.raises(UserError, match=words):
            run(make_config("fediod", **settings), out=tmp_path / "run", data=make_data())
    assert not (tmp_path / "run").exists()


# -- segmentation ------------------------------------------------------------------------------------------------------


K, B, C, H, W = 3, 2, 4, 3, 5


def logits(seed=0):
    return torch.randn(K, B, C, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_one_confidence_for_all_pixels_of_an_image():
    """r_k(x) is averaged over the image, so every pixel has the weights w_kc r_k(x), which sum to one."""
    counts = torch.tensor([[5.0, 2, 0, 1], [5, 0, 0, 1], [5, 1, 0, 2]], dtype=torch.float64)
    scores = torch.rand(K, B, dtype=torch.float64) + 0.1
    weights = losses.importance(counts, scores)  # normalised over the clients below, as the operator does
    assert weights.shape == (K, B, C)
    share = losses.normalise_weights(weights)
    torch.testing.assert_close(share.sum(0), torch.ones(B, C, dtype=torch.float64))
    assert torch.allclose(share[:, :, 2], torch.full((K, B), 1 / 3, dtype=torch.float64))  # nobody has class 2
    mixed = losses.mixture(logits(), weights, None)
    for b in range(B):
        for c in range(C):
            expected = (share[:, b, c, None, None] * logits()[:, b, c]).sum(0)
            torch.testing.assert_close(mixed[b, c], expected)


OPTIONS = {"ngf": 2, "ndf": 2, "batch": 4, "iterations": 2, "student_steps": 1}


def test_a_run_with_three_architectures(tmp_path):
    models = "unet-small:2,unet:2,unet-small:3"
    config = segmented.settings("fediod", options={**OPTIONS, "models": models}, rounds=1)
    data = segmented.federation()
    labels = data.clients[0].labels.clone()
    labels[:, :2] = IGNORE  # what a client has not labelled is no part of its weights
    data = dataclasses.replace(data, clients=(dataclasses.replace(data.clients[0], labels=labels), *data.clients[1:]))
    metrics = run(config, out=tmp_path, data=data)["metrics"]
    figures = ("dice", "best_teacher", "mean_teacher", "ensemble_uniform", "ensemble_weighted")
    assert all(0 <= metrics[name] <= 1 for name in figures)
    assert metrics["best_teacher"] >= metrics["mean_teacher"]
    assert "accuracy" not in metrics
    assert {"hd95", "iou"} & set(metrics)


def test_one_client_alone_is_its_own_ensemble(tmp_path):
    config = segmented.settings("fediod", options=OPTIONS, rounds=1, clients=1)
    metrics = run(config, out=tmp_path, data=segmented.federation((12,)))["metrics"]
    figures = {metrics[name] for name in ("best_teacher", "mean_teacher", "ensemble_uniform", "ensemble_weighted")}
    assert len(figures) == 1


def test_a_hold_out_of_which_nothing_is_known_has_no_figure(tmp_path):
    """A tenth of nine images is one image, which may have no known pixel."""
    config = segmented.settings("fediod", options={**OPTIONS, "holdout": 0.1}, rounds=1)
    data = segmented.federation((12, 9, 7))
    held = split_holdout(Client(RunContext(config, data), 1, {}), 0.1)[1]
    assert len(held) == 1
    data.clients[1].labels[held] = IGNORE
    metrics = run(config, out=tmp_path, data=data)["metrics"]
    assert 0 <= metrics["holdout"] <= 1  # the mean over those that have one
    told = [k for record in read_metrics(tmp_path) for k, c in record["clients"].items() if "holdout" in c]
    assert set(told) == {"0", "2"}


# -- resume ------------------------------------------------------------------------------------------------------------


PLAYED = {
    "ngf": 2, "ndf": 2, "batch": 4, "student_steps": 2, "iterations": 4, "w_real": 1.0, "w_balance": 0.5,
    "disc_weight": True, "models": "cnn:2,mlp:4,resnet8:2", "warmup": 0.5,
}  # fmt: skip
PRIVATE = {"epsilon": 50.0, "shards": 3, "histogram_noise": 2.0, "noise": "seed"}
ROUNDS = 3


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    known = {}

    def get(name, config, data):
        if name not in known:
            out = tmp_path_factory.mktemp("whole")
            run(config, out=out, data=data)
            known[name] = outcome(out)
        return known[name]

    return get


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["open", "private"])
@pytest.mark.parametrize(("round", "answers"), [(1, 4), (2, 0), (2, 9), (3, 13)])
def test_killed_in_the_second_stage(round, answers, name, make_data, make_config, tmp_path, reference):
    """The networks have three architectures.

    The warm-up ends within the second round.
    """
    options = PLAYED if name == "open" else {**PLAYED, **PRIVATE}
    data, config = make_data(), make_config("fediod", model="cnn", rounds=ROUNDS, grad_cam=0, options=options)
    expected = reference(name, config, data)
    play_killed(config, out=tmp_path, data=data, at=KillAt("client", answers, round))
    assert len(read_metrics(tmp_path)) == round - 1
    run(load_settings(tmp_path), out=tmp_path, resume=True, data=data)
    assert outcome(tmp_path) == expected
    assert read_metrics(tmp_path)[-1]["round"] == ROUNDS


def test_teachers_that_were_brought_are_not_asked_for_again(make_data, make_config, tmp_path):
    data, models = make_data(), {"models": PLAYED["models"]}
    run(make_config("ensemble", model="cnn", rounds=None, grad_cam=0, options=models), out=tmp_path / "own", data=data)
    config = make_config("fediod", model="cnn", rounds=2, grad_cam=0, options=PLAYED, teachers=str(tmp_path / "own"))
    run(config, out=tmp_path / "whole", data=data)
    play_killed(config, out=tmp_path / "run", data=data, at=KillAt("client", 5, round=2))
    shutil.rmtree(tmp_path / "own")
    run(config, out=tmp_path / "run", data=data, resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
