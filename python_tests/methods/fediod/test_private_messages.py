"""FedIOD's private messages and steps in a federation, and its teachers."""

import copy
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedkern.data import IGNORE
from fedkern.downstream.saved_network import read_model
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods.base import Federation, Phase
from fedkern.methods.fediod import private_messages as privacy
from fedkern.methods.fediod.discriminators import Discriminators
from fedkern.methods.fediod.iod_options import IODOptions
from fedkern.methods.fediod.losses import patch_entropy
from fedkern.privacy import IMAGE, LEDGER, Accountant
from fedkern.privacy.keys import noise_key
from fedkern.settings.config import load_settings
from fedkern.streams import stream
from python_tests.methods.fediod_play import TINY, World, cleared_and_live, frozen, same

PHASE = Phase(0, "round", "gradients")


def options_of(**settings):
    """Return FedIOD's options with small steps and repeatable noise."""
    return IODOptions(**{"disc_weight": True, "batch": 8, "iterations": 5, "noise": "seed", **settings})


NOISED = {"epsilon": 5.0}


def method(options):
    return SimpleNamespace(options=options)


class Client:
    """A client with a stream and a state, like the engine's."""

    def __init__(self, id=0, samples=50, state=None, seed=0, sides=()):
        self.id, self.label, self.samples, self.state, self._seed = id, str(id), samples, state or {}, seed
        self.labels = torch.zeros(1, dtype=torch.int64).expand(samples, *sides)
        self.declared, self.patients, self.unit = samples, None, IMAGE

    def rng(self, purpose, phase):
        return stream(self._seed, f"{purpose}/{phase.exchange}", round=phase.round, client=self.id)


class Training(Client):
    """A client that keeps how it is to train privately."""

    def fit_privately(self, method, phase, module, spending, *, rows):
        self.spending = spending


def place(rounds):
    """Return a server of two clients."""
    said = {}
    federation = Federation(rounds, (50, 50), 10)
    return SimpleNamespace(state={}, federation=federation, warn=said.__setitem__, said=said)


def make_client(sigma=1.0, **settings):
    """Return a client that knows its noise, in multiples of the clipping norm."""
    client = Client(**settings)
    privacy.keep_terms(client, {"privacy": {"sigma_d": sigma}})
    return client


def gradients(rows=8, seed=0, scale=1.0):
    return scale * torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_off_is_the_identity():
    options, client = options_of(), Client()
    u_d, histogram = gradients(), torch.tensor([3.0, 4.0])
    assert privacy.sanitise(client, u_d, options) is u_d
    assert privacy.release_histogram(client, histogram, options) is histogram
    assert [part.tolist() for part in privacy.shards(client, options)] == [list(range(50))]
    assert privacy.serving_shard(client, PHASE, options) == 0
    assert options.tells_scores
    assert not options.noises_gradients
    assert options.guarantee() is None
    server = place(3)
    privacy.prepare(server, options)
    privacy.keep_terms(client, {"privacy": server.state.get("privacy", {})})
    assert server.state == client.state == {}


def test_rows_are_clipped_before_the_noise():
    """Two data sets with the same noise differ by at most twice the clipping norm in every row."""
    options, bound = options_of(**NOISED, clip_d=2.0), 2.0
    noise = privacy.sanitise(make_client(1.5), torch.zeros_like(gradients()), options)
    for rows, is_clipped in ((gradients(scale=10.0), True), (gradients(scale=1e-3, seed=1), False)):
        signal = (privacy.sanitise(make_client(1.5), rows, options) - noise).flatten(1)
        norms = signal.norm(dim=1)
        assert (norms <= bound * (1 + 1e-4)).all()
        if is_clipped:
            assert torch.allclose(norms, torch.full_like(norms, bound), rtol=1e-4)
            expected = rows.flatten(1) / rows.flatten(1).norm(dim=1, keepdim=True)
            assert torch.allclose(signal / bound, expected, atol=1e-5)
        else:
            assert torch.allclose(signal, rows.flatten(1), atol=1e-5)


def test_the_noise_has_the_scale_of_sigma_times_the_norm():
    zero = torch.zeros(32, 3, 16, 16)
    u_d = privacy.sanitise(make_client(1.5), zero, options_of(**NOISED, clip_d=2.0))
    assert float(u_d.std()) == pytest.approx(3.0, rel=5 / math.sqrt(2 * zero.numel()))
    assert abs(float(u_d.mean())) < 5 * 3.0 / math.sqrt(zero.numel())


def test_a_row_that_is_not_finite_is_released_as_noise():
    """NaN would reveal that a network, and so its data, produced the row.

    The other rows stay the same.
    """
    options, broken, zeroed = options_of(**NOISED, clip_d=2.0), gradients(), gradients()
    broken[1, 0, 3, 4], broken[4, 2] = float("nan"), float("inf")
    broken[6] *= 1e30  # finite, while its square is not
    zeroed[[1, 4]] = 0
    released = privacy.sanitise(make_client(1.5), broken, options)
    assert bool(released.isfinite().all())
    torch.testing.assert_close(released, privacy.sanitise(make_client(1.5), zeroed, options))


def test_no_noise_is_used_twice_and_a_resumed_client_goes_on_with_the_same():
    options, zero, uncut = options_of(**NOISED), torch.zeros(2, 1, 4, 4), make_client()
    outs = torch.stack([privacy.sanitise(uncut, zero, options) for _ in range(4)])  # the very same step
    assert torch.unique(outs.flatten()).numel() == outs.numel()
    cut = make_client()
    for _ in range(2):
        privacy.sanitise(cut, zero, options)
    resumed = Client(state=json.loads(json.dumps(cut.state)))
    again = torch.stack([privacy.sanitise(resumed, zero, options) for _ in range(2)])
    assert torch.equal(again, outs[2:])
    assert resumed.state == uncut.state
    assert not torch.equal(privacy.sanitise(make_client(id=1), zero, options), outs[0])


def test_every_release_has_a_key_of_its_own(monkeypatch):
    """Keys differ between clients, channels and releases, before and after a resume.

    A single key would be found in 2^64 trials.
    """
    options, keys = options_of(**NOISED, histogram_noise=2.0, noise="secret"), []
    draw = privacy.clip_and_noise
    monkeypatch.setattr(
        privacy, "clip_and_noise", lambda rows, bound, noise, *key: keys.append(key) or draw(rows, bound, noise, *key)
    )
    secret = "00" * 15 + "07"
    for number in range(2):
        client = make_client(id=number, state={privacy.SECRET: secret})
        privacy.release_histogram(client, torch.ones(3), options)
        for _ in range(3):
            privacy.sanitise(client, gradients(rows=2), options)
            client = Client(id=number, state=json.loads(json.dumps(client.state)))
        assert client.state[privacy.RELEASES] == {"histogram": 1, "discriminator": 3}
    seeds, offsets = zip(*keys, strict=True)
    assert len(set(seeds)) == len(set(offsets)) == 2 * 4
    assert keys[1] == noise_key(bytes.fromhex(secret), 0, "discriminator", 0)
    assert all(offset % 64 == 0 and 0 <= offset < 1 << 63 for offset in offsets)


def test_with_the_seed_the_keys_are_the_runs():
    options = options_of(**NOISED)
    keys = [privacy.next_key(Client(seed=seed, id=k), "discriminator", options) for seed in (0, 1) for k in (0, 1)]
    assert len(set(keys)) == 4
    assert privacy.next_key(Client(seed=0, id=0), "discriminator", options) == keys[0]


def test_noise_and_draws_follow_from_bits_that_a_client_draws_once(monkeypatch):
    """Two clients of one seed and id share no secret, and equal bits repeat everything."""
    options = options_of(**NOISED, shards=5, histogram_noise=2.0, noise="secret")

    def release_all(client):
        drawn = [privacy.serving_shard(client, Phase(r, "round", "images 0"), options) for r in range(40)]
        counts = privacy.release_histogram(client, torch.full((50,), 100.0), options)
        return [privacy.sanitise(client, gradients(), options), counts, torch.tensor(drawn)]

    left, right = make_client(), make_client()
    release, second = release_all(left), release_all(right)
    assert len(left.state[privacy.SECRET]) == 32
    assert left.state[privacy.SECRET] != right.state[privacy.SECRET]
    assert not any(torch.equal(a, b) for a, b in zip(release, second, strict=True))
    again = make_client(state={privacy.SECRET: left.state[privacy.SECRET]})
    monkeypatch.setattr(privacy.secrets, "token_hex", None)  # nothing is drawn a second time
    assert all(torch.equal(a, b) for a, b in zip(release, release_all(again), strict=True))


def test_the_bits_reach_private_training_and_stay_out_of_what_is_printed():
    seen = []
    for noise in ("secret", "seed"):
        client = Training()
        privacy.train_teacher(
            method(options_of(**NOISED, teacher_dp=True, noise=noise)), client, PHASE, None, np.arange(3)
        )
        seen.append(client.spending)
        assert client.spending.secret == client.state.get(privacy.SECRET, "")
    assert seen[0].secret
    assert seen[0].secret not in repr(seen[0])


def test_nobody_draws_bits_where_nothing_is_private():
    options, client = options_of(noise="secret"), Client()
    privacy.sanitise(client, gradients(), options)
    privacy.release_histogram(client, torch.ones(2), options)
    privacy.serving_shard(client, PHASE, options)
    assert privacy.secret(client, options) == ""
    assert client.state == {}


def test_every_release_is_booked():
    options, client = options_of(**NOISED, shards=10, histogram_noise=5.0), make_client(40.0)
    for _ in range(3):
        privacy.sanitise(client, gradients(rows=4), options)
    privacy.release_histogram(client, torch.tensor([20.0, 30.0]), options)
    expected = Accountant()
    expected.gaussian("discriminator", 40 / (2 * math.sqrt(4)), shards=10, steps=3)
    expected.gaussian("histogram", 5 / math.sqrt(2))
    assert client.state[LEDGER] == expected.state


def test_shards_are_disjoint_and_whole_and_fixed():
    options = options_of(**NOISED, shards=7)
    client = Client(samples=50)
    parts = privacy.shards(client, options)
    assert len(parts) == 7
    assert {len(part) for part in parts} == {7, 8}
    assert sorted(np.concatenate(parts).tolist()) == list(range(50))
    again = privacy.shards(Client(samples=50), options)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not np.array_equal(parts[0], privacy.shards(Client(id=1, samples=50), options)[0])
    with pytest.raises(UserError, match="client 3 has 6 samples"):
        privacy.shards(Client(id=3, samples=6), options)


def test_who_serves_is_drawn_evenly_and_independently_of_who_trains():
    """Each of seven shards serves a seventh of the steps, whichever shard trains."""
    options, client = options_of(**NOISED, shards=7, iterations=0), Client(samples=50)
    assert privacy.count_trainings(client, options) == 7  # batches of eight
    table = np.zeros((7, 7))
    for r in range(1000):
        for i in range(7):
            phase = Phase(r, "round", f"images {i}")
            table[privacy.training_shard(client, r, i, options), privacy.serving_shard(client, phase, options)] += 1
    assert (table.sum(1) == 1000).all()
    assert (abs(table - 1000 / 7) < 5 * math.sqrt(1000 / 7)).all()


@pytest.mark.parametrize(("samples", "iterations", "trainings"), [(50, 0, 7), (50, 3, 3), (9, 5, 2)])
def test_shards_take_turns_in_training_whatever_the_seed(samples, iterations, trainings):
    """A client trains while its samples last.

    The turns continue over the rounds.
    """
    options = options_of(**NOISED, shards=5, iterations=iterations)
    turns = []
    for seed in (0, 1):
        client = Client(samples=samples, seed=seed)
        assert privacy.count_trainings(client, options) == trainings
        turns.append([privacy.training_shard(client, r, i, options) for r in range(10) for i in range(trainings)])
    assert turns[0] == turns[1] == [n % 5 for n in range(10 * trainings)]


def test_class_counts_are_noised_in_records_also_where_a_record_is_many_pixels():
    options = options_of(histogram_noise=2.0)
    counts = torch.full((5000,), 1000.0)
    noisy = privacy.release_histogram(Client(samples=5_000_000), counts, options)
    assert float((noisy - counts).std()) == pytest.approx(2.0, rel=0.05)
    told = privacy.release_histogram(Client(samples=50_000, sides=(5, 20)), counts, options)  # 100 pixels each
    assert float((told - counts).std()) == pytest.approx(200.0, rel=0.05)
    untold = Client()
    assert privacy.release_histogram(untold, counts, options_of(histogram_noise=2.0, class_weights="uniform")) is counts
    assert untold.state == {}
    assert float(privacy.release_histogram(Client(samples=1), torch.zeros(500) + 1e-9, options).min()) >= 0


def test_the_noise_on_the_counts_covers_a_record_of_which_everything_is_known():
    """Another image may replace an image of unknown pixels: sqrt(2) times all its pixels."""
    options, sides = options_of(histogram_noise=2.0), (4, 5)
    labels = torch.full((3, *sides), IGNORE)
    labels[0], labels[1, 0, 0] = 0, 1
    neighbour = labels.clone()
    neighbour[0] = 1
    before, after = (torch.bincount(known[known >= 0], minlength=2).float() for known in (labels, neighbour))
    assert float((after - before).norm()) == pytest.approx(math.sqrt(2) * 20)
    counts = torch.full((5000,), 1000.0)  # far away from 0; known is a tenth of all pixels
    client = Client(samples=2_500_000, sides=sides)
    noise = float((privacy.release_histogram(client, counts, options) - counts).std())
    booked = client.state[LEDGER]["histogram"][0][1]
    assert noise == pytest.approx(booked * math.sqrt(2) * 20, rel=0.05)


@pytest.mark.exhaustive
@pytest.mark.parametrize("teacher", [False, True])
def test_a_target_is_met_by_what_the_clients_then_release(teacher):
    shards = 1 if teacher else 20
    options = options_of(epsilon=4.0, shards=shards, batch=4, iterations=3, histogram_noise=20.0, teacher_dp=teacher)
    server = place(2)
    privacy.prepare(server, options)
    client = Client()
    privacy.keep_terms(client, {"privacy": server.state.get("privacy", {})})
    privacy.release_histogram(client, torch.tensor([20.0, 30.0]), options)
    for _ in range(6):
        privacy.sanitise(client, gradients(rows=4), options)
    assert options.guarantee().complete == teacher
    accountant = Accountant(client.state[LEDGER])
    part = (2.0, options.delta / 2) if teacher else (4.0, options.delta)
    assert 0.99 * part[0] < accountant.epsilon(part[1]) <= part[0]


def test_public_images_leave_the_teachers_alone_to_be_covered():
    options = options_of(epsilon=4.0, teacher_dp=True, mode="public", class_weights="uniform")
    assert not options.noises_gradients
    client = Training()
    assert privacy.train_teacher(method(options), client, PHASE, None, np.arange(3))
    accountant = Accountant()
    accountant.dp_sgd("teacher", client.spending.noise(0.1, 100), rate=0.1, steps=100)
    assert 0.99 * 4 < accountant.epsilon(options.delta) <= 4
    said = options.guarantee()
    assert said.to_dict() == {"covers": ["teacher_logits"], "leaves_uncovered": []}
    assert said.statement(4.0).endswith(
        "it covers the teachers' answers that the student learns from and so the released student."
    )


def test_steps_are_counted_from_the_largest_client_where_none_are_given():
    assert options_of(iterations=0).count_steps(Federation(7, (10, 33), 10)) == 7 * 5
    assert options_of().count_steps(Federation(7, (10, 33), 10)) == 7 * 5
    assert options_of(iterations=9).count_steps(Federation(2, (10, 33), 10)) == 18


def test_a_teacher_that_cannot_be_private_is_told_before_anything_is_written():
    options = options_of(**NOISED, teacher_dp=True)
    bringing, fresh = Client(), Client(id=2)
    bringing.load_pretrained, fresh.load_pretrained = lambda module: True, lambda module: False
    with pytest.raises(UserError, match="cannot vouch for those of --teachers"):
        privacy.check(bringing, lambda: torch.nn.Linear(1, 1), options)
    with pytest.raises(UserError, match="the network of client 2 has batch norm: choose one with group norm"):
        privacy.check(fresh, lambda: torch.nn.BatchNorm2d(3), options)
    privacy.check(fresh, lambda: torch.nn.GroupNorm(1, 3), options)
    privacy.check(bringing, lambda: torch.nn.BatchNorm2d(3), options_of())


def test_no_gradient_leaves_before_the_noise_is_known():
    with pytest.raises(ValueError, match="client 0 to have been told the noise"):
        privacy.sanitise(Client(), gradients(), options_of(**NOISED))


def test_noise_for_gradients_that_the_loss_does_not_have_is_refused():
    with pytest.raises(UserError, match='"epsilon" is for the gradients through the discriminators'):
        privacy.prepare(place(2), options_of(**NOISED, w_real=0.0))
    client = make_client()
    assert privacy.sanitise(client, None, options_of(**NOISED)) is None
    assert LEDGER not in client.state


# -- private steps -----------------------------------------------------------------------------------------------------


SHARDED = {"epsilon": 50.0, "shards": 3, "noise": "seed"}


@pytest.fixture
def world(make_config, make_data):
    return lambda **options: World(make_config, make_data(), **options)


def norms(rows):
    return rows.flatten(1).norm(dim=1)


def test_a_row_is_the_gradient_of_an_images_own_loss(world):
    """Neither the batch nor the number of clients affects a row.

    The report has the median norm of the rows before clipping.
    """
    w = world(w_real=8.0, iterations=3)
    for phase in w.phases(w.round(), 0):
        messages, _ = w.exchange(phase)
        if phase.exchange == "images 2":  # client 0, whose turn it is, trains for the last time
            images = messages[0]["images"].clone().requires_grad_()
            discriminators = w.clients[0].round_cache["answers"].discriminators
            realism = patch_entropy(discriminators.module(images), True)[0]
            (rows,) = torch.autograd.grad(realism.sum(), images)
        if phase.exchange == "gradients 2":
            assert w.clients[0].report["norm_d"] == pytest.approx(float(norms(rows).median()), rel=1e-3)
            assert "norm_d" not in w.clients[1].report
        elif phase.exchange != "distil 2":
            assert "norm_d" not in w.clients[0].report


def test_the_rows_that_are_clipped_are_those_whose_norms_are_told(world, monkeypatch):
    """The same step with and without privacy reports the median of the rows before the noise."""
    given = []
    monkeypatch.setattr(privacy, "sanitise", lambda client, rows, options: given.append(rows) or rows)
    open_, private = world(iterations=1, disc_weight=False), world(iterations=1, disc_weight=False, epsilon=50.0)
    for w in (open_, private):
        w.play(w.round(), 0)
    assert len(given) == 3
    assert open_.clients[0].report["norm_d"] == pytest.approx(float(norms(given[0]).median()), rel=1e-3)
    assert "norm_d" not in private.clients[0].report
    a, b = (w.server.state["generator"]["parameters"] for w in (open_, private))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # the weights taken out of the rows are back in the sum


def test_the_records_tell_the_norms_of_runs_without_privacy_alone(make_config, make_data, tmp_path):
    options = {**TINY, "batched": True}
    for name, extra in (("open", {}), ("private", SHARDED)):
        config = make_config("fediod", model="cnn", rounds=2, grad_cam=0, options={**options, **extra})
        run(config, out=tmp_path / name, data=make_data())
    told = [[k for k, c in r["clients"].items() if c.get("norm_d", 0) > 0]
            for r in read_metrics(tmp_path / "open") if "critic_loss" in r["clients"].get("0", {})]  # fmt: skip
    assert told == [["0"], ["1"]]
    assert not any("norm_" in name for r in read_metrics(tmp_path / "private")
                   for c in r.get("clients", {}).values() for name in c)  # fmt: skip


# -- shards ------------------------------------------------------------------------------------------------------------


def steps_by_shard(w, client):
    return {shard: kept["steps"] for shard, kept in w.clients[client].state["critics"].items()}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("serves", [None, 0, 2], ids=["drawn", "the first", "the last"])
def test_shards_train_in_turn_whichever_serves(world, monkeypatch, serves):
    """Clients of 20, 13 and 9 samples train four, four and three times a round of four."""
    asked = Counter()
    drawn = privacy.serving_shard
    monkeypatch.setattr(
        privacy, "serving_shard", lambda *a: asked.update([shard := drawn(*a) if serves is None else serves]) or shard
    )
    w = world(iterations=4, **SHARDED)
    for number in range(3):
        w.play(w.round(), number)
    for k, trained in enumerate((12, 12, 9)):
        found = steps_by_shard(w, k)
        assert [found[shard] for shard in range(3)] == [trained // 3] * 3
    assert asked.total() == 36  # one draw for every gradient, none for the distillation
    assert set(asked) == ({0, 1, 2} if serves is None else {serves})


@pytest.mark.parametrize(("iterations", "steps"), [(4, [2, 1, 1]), (1, [1, 0, 0])])
def test_a_discriminator_does_not_remember_who_served(iterations, steps, world, monkeypatch):
    """With the same images the states after a round are equal bit for bit, for the first and the last serving shard."""
    states = []
    for serves in (0, 2):
        monkeypatch.setattr(privacy, "serving_shard", lambda *a, shard=serves: shard)
        w = world(iterations=iterations, batched=False, **SHARDED)
        for phase in w.phases(w.round(), 0):
            if phase.exchange.startswith("images"):  # without the others the generator stays as it is
                w.exchange(phase)
        states.append(frozen(w.clients[0].state["critics"]))
    assert [list(state) for state in states] == [[0, 1, 2]] * 2  # in this order, too
    assert [kept["steps"] for kept in states[0].values()] == steps
    assert same(*states)


def test_what_is_reported_does_not_tell_who_serves(world, monkeypatch):
    """The recorded realism is that of the shard whose turn it is to train."""
    told = []
    for serves in (0, 1, 2):
        monkeypatch.setattr(privacy, "serving_shard", lambda *a, shard=serves: shard)
        w = world(iterations=2, **SHARDED)
        for phase in w.phases(w.round(), 0)[:2]:  # the gradients' answers report
            w.exchange(phase)
        told.append([dict(w.clients[k].report) for k in range(3)])
    assert {"critic_loss", "realism"} <= set(told[0][0])
    assert told[0] == told[1] == told[2]


def test_the_gradient_comes_through_the_shard_that_serves(world, monkeypatch):
    given = []
    monkeypatch.setattr(privacy, "sanitise", lambda client, rows, options: given.append(rows) or rows)
    monkeypatch.setattr(privacy, "serving_shard", lambda *a: 2)
    w = world(iterations=1, **SHARDED)
    images, gradients = w.phases(w.round(), 0)[:2]
    sent = w.exchange(images)[0][0]["images"].clone().requires_grad_()
    module = copy.deepcopy(w.clients[0].round_cache["answers"].discriminators.module)
    for name, tensor in module.parts()[0].items():
        tensor.copy_(w.clients[0].state["critics"][2]["weights"][name])
    (expected,) = torch.autograd.grad(patch_entropy(module(sent), True).sum(), sent)
    w.exchange(gradients)
    torch.testing.assert_close(given[0], expected, rtol=1e-4, atol=1e-8)


def test_a_cohort_with_shards_gives_the_numbers_of_messages(world):
    worlds = [world(iterations=2, batched=batched, **SHARDED) for batched in (True, False)]
    for w in worlds:
        for number in range(2):
            w.play(w.round(), number)
    for name in ("student", "generator"):
        for part, value in worlds[0].server.state[name].items():
            torch.testing.assert_close(value, worlds[1].server.state[name][part], rtol=1e-3, atol=2e-5)
    for k in range(3):
        assert steps_by_shard(worlds[0], k) == steps_by_shard(worlds[1], k)


def test_a_round_with_shards_goes_on_where_the_one_before_ended(world):
    """With two iterations and three shards the turn follows from the iteration, not from cached state."""
    worlds = cleared_and_live(world, 3, iterations=2, **SHARDED)
    assert same(worlds[0].server.state, worlds[1].server.state)
    for k in range(3):
        assert same(worlds[0].clients[k].state, worlds[1].clients[k].state)


def test_withheld_confidence_is_neither_judged_nor_sent(world, monkeypatch):
    def judge(self, images):
        raise AssertionError("nobody is told")

    monkeypatch.setattr(Discriminators, "judge", judge)
    w = world(iterations=2, disc_weight=True, **SHARDED)
    w.play(w.round(), 0)
    for phase in w.phases(w.round(), 1)[:3]:
        _, answers = w.exchange(phase)
        assert {name for answer in answers.values() for name in answer} == (
            {"gradients"} if phase.exchange == "gradients 0" else {"logits"}
        )


# -- local teachers ----------------------------------------------------------------------------------------------------


def test_without_a_hold_out_the_teachers_are_those_of_the_ensemble(make_data, make_config, tmp_path):
    data = make_data()
    settings = {"grad_cam": 0, "model": "cnn", "local_epochs": 2}
    options = {**TINY, "holdout": 0.0, "iterations": 1}
    run(make_config("fediod", rounds=1, options=options, **settings), out=tmp_path / "own", data=data)
    run(make_config("ensemble", rounds=None, **settings), out=tmp_path / "members", data=data)
    members, _ = read_model(tmp_path / "members")
    run(make_config("ensemble", rounds=None, teachers=str(tmp_path / "own"), **settings), out=tmp_path / "x", data=data)
    brought, _ = read_model(tmp_path / "x")
    for name, value in members.state_dict().items():
        assert torch.equal(value, brought.state_dict()[name]), name


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["oneshot-fedavg", "dense", "fediod"])
def test_teachers_of_an_earlier_run_or_of_ones_own(method, make_data, make_config, tmp_path):
    """Teachers read from a run give the bits of the same networks read from files."""
    data, generated = make_data(), {"nz": 4, "ngf": 2}
    options = {
        "dense": {**generated, "generator_steps": 1, "synthesis_batch": 4, "distill_epochs": 1},
        "fediod": {**TINY, "iterations": 1},
    }
    run(make_config("ensemble", model="cnn", rounds=None), out=tmp_path / "run", data=data)
    (tmp_path / "own").mkdir()
    for k, member in enumerate(read_model(tmp_path / "run")[0].members):
        if k == 1:
            torch.save(member.state_dict(), tmp_path / "own" / "client-1.pt")
        else:
            save_file(
                {n: v.contiguous() for n, v in member.state_dict().items()},
                tmp_path / "own" / f"client-{k}.safetensors",
            )
    results = []

    # A teacher that is brought may have trained on what would be held out here.
    def unseen(folder):
        return [c for record in read_metrics(folder) for c in record.get("clients", {}).values() if "holdout" in c]

    for folder in ("run", "own"):
        config = make_config(method, model="cnn", rounds=1 if method == "fediod" else None, grad_cam=0,
                             teachers=str(tmp_path / folder), options=options.get(method, {}))  # fmt: skip
        run(config, out=tmp_path / f"with-{folder}", data=data)
        results.append(read_model(tmp_path / f"with-{folder}")[0].state_dict())
        assert method != "fediod" or not unseen(tmp_path / f"with-{folder}")
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert load_settings(tmp_path / "with-own").teachers == str(tmp_path / "own")


def test_a_method_that_trains_none_takes_no_teachers(make_config, tmp_path):
    with pytest.raises(UserError, match="--teachers is not for fedavg"):
        make_config("fedavg", teachers=str(tmp_path))
