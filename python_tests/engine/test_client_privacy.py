"""``--dp-clip`` and ``--dp-noise``: clipping, noise, epsilon and secret sampling of runs, and refused combinations."""

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.studies.audit import audit
from fedkern.engine.local.training import Diverged
from fedkern.engine.participation import absent_clients, sample_clients
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics, read_summary
from fedkern.engine.uploads.private_mean import ClippedSum, variances
from fedkern.errors import UserError
from fedkern.methods import METHODS, FedAvg, Federation
from fedkern.models import build
from fedkern.privacy import ClientLevel, accounting, server_secret
from fedkern.privacy.keys import noise_key
from fedkern.report.live.progress_bar import run_headline
from fedkern.settings.config import RunConfig
from python_tests.engine.test_resume import WithSetUp
from python_tests.hearing import Hearing
from python_tests.interrupted import KillAt, kill_and_resume, outcome, play_killed

SIZES = (20, 13, 9, 15)
SECRET = bytes(range(16))
ONLY_CLIP = {"dp_clip": 0.05, "dp_noise": 0.0}
NOISED = {"dp_clip": 0.5, "dp_noise": 2.0, "dp_draws": "seed"}


def is_built_in(name):
    return METHODS[name].__module__.startswith("fedkern.")


# -- the sum -----------------------------------------------------------------------------------------------------------


def test_changes_are_clipped_as_one_vector_and_added():
    rng = np.random.default_rng(0)
    start = {"parameters": rng.standard_normal(40), "buffers": rng.standard_normal(3)}
    start = {name: value.astype(np.float32) for name, value in start.items()}
    total = ClippedSum(ClientLevel(2.0, 0.0, 1e-5), {k: torch.from_numpy(v) for k, v in start.items()})
    wanted = np.zeros(43)
    for scale in (0.01, 0.3, 5.0, 1e4):
        own = {name: (v + scale * rng.standard_normal(v.shape)).astype(np.float32) for name, v in start.items()}
        change = np.concatenate([own[name].astype(np.float64) - start[name] for name in start])
        length = np.sqrt((change**2).sum())
        norm, factor = total.add({name: torch.from_numpy(value) for name, value in own.items()})
        assert norm == pytest.approx(length, rel=1e-12)
        assert factor == pytest.approx(min(1.0, 2.0 / length), rel=1e-12)
        wanted += change * min(1.0, 2.0 / length)
    made = total.release(8, noise_key(SECRET, -1, "updates", 0))
    found = np.concatenate([made[name].numpy() for name in start])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.concatenate([*start.values()]) + wanted / 8, rtol=2e-7, atol=1e-7)


def test_the_noise_has_the_promised_deviation_and_comes_from_its_key():
    level, size = ClientLevel(0.5, 3.0, 1e-5), 200_000
    drawn = []
    for number in (0, 0, 1):
        total = ClippedSum(level, {"parameters": torch.zeros(size)})
        for _ in range(3):
            total.add({"parameters": torch.zeros(size)})
        drawn.append(total.release(4, noise_key(SECRET, -1, "updates", number))["parameters"].double())
    original, again, different = drawn
    assert torch.equal(original, again)
    wanted = 3.0 * 0.5 / 4
    assert wanted == level.deviation(4)
    for noise in (original, different):  # the numbers are fixed by the key; five standard errors of each estimate
        assert float(noise.std()) == pytest.approx(wanted, rel=5 / (2 * size) ** 0.5)
        assert abs(float(noise.mean())) < 5 * wanted / size**0.5
    assert abs(float((original * different).mean())) < 5 * wanted**2 / size**0.5


@pytest.mark.exhaustive
@pytest.mark.parametrize(("noise", "low", "high"), [(2.0, 0.85, 1.0), (1.0, 1.7, 2.0)])
def test_an_audit_finds_what_is_claimed(noise, low, high):
    """One client's long update points in opposite directions in two neighbouring runs: a release is 2 / noise-GDP."""
    level, start = ClientLevel(0.5, noise, 1e-5), {"parameters": torch.zeros(2)}
    settled = [{"parameters": torch.tensor([0.1, 3.0])}, {"parameters": torch.tensor([-9.0, 0.0])}]
    scores = []
    for turn, canary in enumerate((-7.0, 7.0)):
        own = []
        for number in range(6000):
            total = ClippedSum(level, start)
            for message in (*settled, {"parameters": torch.tensor([canary, 0.0])}):
                total.add(message)
            made = total.release(3, noise_key(SECRET, -1, "updates", 6000 * turn + number))
            own.append(float(made["parameters"][0]))
        scores.append(torch.tensor(own))
    assert low < audit(*scores).lower <= high == 2 / noise


def test_norm_and_number_share_the_noise():
    for clients, noise in ((4, 2.0), (1000, 2.0), (1000, 0.01)):
        update_noise, number_noise = ClientLevel(0.5, noise, 1e-5, 0.5).split_noise(clients)
        # A replaced client changes the sum by 2 C and the number by 1: squared ratios to the noise add up.
        assert (2 / update_noise) ** 2 + (1 / number_noise) ** 2 == pytest.approx((2 / noise) ** 2)
        assert number_noise == max(clients / 20, noise)


@pytest.mark.exhaustive
def test_an_audit_of_an_adaptive_norm_finds_what_is_claimed():
    """One client's update is within the norm in one run, and longer and opposite in the other one."""
    level, noise = ClientLevel(0.5, 2.0, 1e-5, 0.5), 2.0
    update_noise, number_noise = level.split_noise(40)
    scores = []
    for turn, canary in enumerate((0.4999, -7.0)):
        own = []
        for number in range(6000):
            total = ClippedSum(level, {"parameters": torch.zeros(1)})
            for value in (3.0, -9.0, canary):
                total.add({"parameters": torch.tensor([value])})
            key, share_key = (noise_key(SECRET, -1, name, 6000 * turn + number) for name in ("updates", "dp_clip"))
            change = float(total.release(40, key)["parameters"][0]) * 40 / 0.5
            own.append(-change * 2 / update_noise**2 - total.noisy_share(40, share_key) * 40 / number_noise**2)
        scores.append(torch.tensor(own))
    assert 0.85 < audit(*scores).lower <= 2 / noise


def test_variances_are_found_where_the_flat_vector_has_them():
    from fedkern import ops

    network = build("cnn", classes=3, channels=3, image_size=8, seed=0, width=2)
    found = variances(network)
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if buffer.is_floating_point():
                buffer.fill_(float(name.endswith("running_var")))
    assert 0 < int(found.sum()) < len(found)
    assert torch.equal(ops.FlatParameters(network).buffers, found.float())


# -- runs --------------------------------------------------------------------------------------------------------------


def watch_rounds(monkeypatch, name):
    """Register a method that notes every round's start, its uploads and the server's result, and return the notes."""
    kind, seen = METHODS[name], []

    class Seeing(kind):
        stateless = kind.stateless

        def send(self, server, phase):
            kept = {key: value.clone() for key, value in server.state.items() if isinstance(value, torch.Tensor)}
            seen.append({"start": kept, "uploads": {}})
            return super().send(server, phase)

        def client_update(self, client, phase, message):
            made = super().client_update(client, phase, message)
            seen[-1]["uploads"][client.id] = {key: value.clone() for key, value in made.items()}
            return made

        def server_update(self, server, phase, uploads):
            got = list(uploads)
            seen[-1]["got"] = got
            super().server_update(server, phase, iter(got))
            seen[-1]["end"] = dict(server.state)

        reduce = kind.reduce

    Seeing.__doc__ = kind.__doc__
    Seeing.name = kind.name
    monkeypatch.setitem(METHODS, name, Seeing)
    return seen


def test_a_round_is_the_plain_formula_over_the_clients_asked(make_data, make_config, tmp_path, monkeypatch):
    seen = watch_rounds(monkeypatch, "fedavg")
    config = make_config("fedavg", clients=4, rounds=3, dropout_rate=0.3, workers="1", **ONLY_CLIP)
    run(config, out=tmp_path / "run", data=make_data(SIZES))
    rounds = seen[-3:]  # before the run the method is asked what it would send
    missing = [absent_clients(config, number, range(4)) for number in range(3)]
    assert any(missing)
    records = read_metrics(tmp_path / "run")
    for played, absent, record in zip(rounds, missing, records, strict=True):
        assert set(played["uploads"]) == set(range(4)) - set(absent)
        names = ("parameters", "buffers")
        start = torch.cat([played["start"][name] for name in names]).double()
        total = torch.zeros_like(start)
        for k, upload in played["uploads"].items():
            change = torch.cat([upload[name] for name in names]).double() - start
            norm = float(change.square().sum().sqrt())
            total += change * min(1.0, 0.05 / norm)
            assert record["clients"][str(k)]["update_norm"] == pytest.approx(norm, rel=1e-9)
            assert record["clients"][str(k)].get("clipped", 1.0) == pytest.approx(min(1.0, 0.05 / norm), rel=1e-9)
        end = torch.cat([played["end"][name] for name in names]).double()
        torch.testing.assert_close(end, start + total / 4, rtol=2e-7, atol=1e-8)
        assert torch.equal(played["end"]["integers"], played["start"]["integers"])
        (only,) = played["got"]
        assert (only.client_id, only.samples, only.share) == (-1, 1, 1.0)
    assert "privacy" not in read_summary(tmp_path / "run")  # without noise nothing is promised


def test_an_adaptive_norm_follows_the_quantile(make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(accounting, "FIRST_CLIP", 0.6)
    config = make_config("fedavg", clients=4, rounds=5, workers="1", dp_clip="adaptive:0.7", dp_noise=0.0)
    run(config, out=tmp_path / "run", data=make_data(SIZES))
    clip, shares = 0.6, []
    for record in read_metrics(tmp_path / "run"):
        assert record["dp_clip"] == pytest.approx(clip, rel=1e-12)
        shares.append(np.mean([client["update_norm"] <= clip for client in record["clients"].values()]))
        clip *= np.exp(0.2 * (0.7 - shares[-1]))
    assert len(set(shares)) > 1


def test_no_round_exceeds_the_largest_epsilon(make_data, make_config, tmp_path):
    level = ClientLevel(0.5, 2.0, 1e-5)
    limit = (level.epsilon(2) + level.epsilon(3)) / 2
    config = make_config("fedavg", rounds=5, max_epsilon=limit, **NOISED)
    heard = Hearing()
    summary = run(config, out=tmp_path / "run", data=make_data(), listener=heard)
    assert summary["stopped"]["by"] == "max-epsilon"
    assert (summary["rounds"], summary["metrics"]["epsilon"]) == (2, level.epsilon(2))
    assert f"epsilon {level.epsilon(2):.3g} at delta 1e-05 after 2 rounds" in "\n".join(run_headline(heard.info))
    with pytest.raises(UserError, match="--max-epsilon 1 is less than the epsilon of the first round"):
        run(config.replace(max_epsilon=1.0), out=tmp_path / "none", data=make_data())
    assert not (tmp_path / "none").exists()


def test_scaffold_clips_network_and_control_variate_together(make_data, make_config, tmp_path, monkeypatch):
    seen = watch_rounds(monkeypatch, "scaffold")
    config = make_config("scaffold", clients=4, rounds=2, sample_fraction=0.5, workers="1", **ONLY_CLIP)
    run(config, out=tmp_path / "run", data=make_data(SIZES))
    for played in seen[-2:]:
        begun = played["start"]
        start = {**{name: begun[name].double() for name in ("parameters", "buffers")}, "control": 0.0}
        total = {name: torch.zeros_like(begun[name]).double() for name in start}
        assert len(played["uploads"]) == 2
        for upload in played["uploads"].values():
            change = {name: upload[name].double() - start[name] for name in start}
            norm = float(sum(part.square().sum() for part in change.values()).sqrt())
            for name, part in change.items():
                total[name] += part * min(1.0, 0.05 / norm)
        for name in ("parameters", "buffers"):
            wanted = start[name] + total[name] / 2
            torch.testing.assert_close(played["end"][name].double(), wanted, rtol=2e-7, atol=1e-8)
        wanted = begun["control"].double() + total["control"] / 4  # two of four clients, so half of their mean
        torch.testing.assert_close(played["end"]["control"].double(), wanted, rtol=1e-5, atol=1e-9)


def test_a_larger_client_weighs_no_more(make_data, make_config, tmp_path, monkeypatch):
    seen = watch_rounds(monkeypatch, "fedavg")
    config = make_config("fedavg", rounds=1, workers="1", **{**NOISED, "dp_clip": 1e-3, "dp_noise": 1e-9})
    run(config, out=tmp_path / "run", data=make_data((60, 6, 6)))
    played = seen[-1]
    start = played["start"]["parameters"].double()
    got = played["got"][0].message["parameters"].double() - start
    vectors = [upload["parameters"].double() - start for upload in played["uploads"].values()]
    assert all(float(vector.norm()) > 1e-3 for vector in vectors)
    along = [float(got @ vector / vector.norm()) for vector in vectors]
    assert float(got.norm()) <= 1e-3
    assert min(along) > 0.15e-3  # a mean by samples would be nearly the large client's alone


def test_heavy_noise_leaves_variances_positive_and_counts_alone(make_data, make_config, tmp_path, monkeypatch):
    seen = watch_rounds(monkeypatch, "fedavg")
    config = make_config("fedavg", rounds=2, dp_clip=1.0, dp_noise=50.0, workers="1")
    run(config, out=tmp_path / "run", data=make_data())
    mask = variances(build("cnn", classes=3, channels=3, image_size=8, seed=0, width=2))
    for played in seen[-2:]:
        before, after = played["start"]["buffers"][mask], played["end"]["buffers"][mask]
        assert bool((after >= 0.0999 * before).all())
        assert bool((after < 0.1001 * before).any())
        assert torch.equal(played["end"]["integers"], played["start"]["integers"])


MORE = 'whose clients upload more \\("{}"\\) than a change'


def refusal(config):
    """Return why a method is refused, from its declarations.

    Empty if the method runs.
    """
    method = config.new_method()
    if not method.averages:
        return "--dp-clip is for methods that average the clients' parameters, which .* does not do: leave it out"
    if config.own_networks:
        return f"--dp-noise is not for {config.method}: it covers what clients upload, and not the figures of networks"
    if method.follows_own_update:
        return "whose clients keep a gradient of their whole update"
    for entry in method.rounds(Federation(config.rounds, (9, 9, 9), 3, config.local_epochs)):
        if later := entry.exchanges[0 if entry.one_off else 1 :]:
            return MORE.format(later[0])
        if entry.exchanges == ("statistics",):
            return 'whose clients upload "counts", which the server does not only add up'
        if "parameters" not in method.reduce:
            return "whose server does more with uploads than adding them up"
    return ""


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", sorted(filter(is_built_in, METHODS)))
def test_every_method_runs_or_is_refused(name, make_small, tmp_path):
    own = {"options": {}} if name == "fedgid" else {}  # they share images
    refused = refusal(make_small(name, **own)[0])
    assert not (refused and name in ("fedavg", "fedgid", "fml", "oneshot-fedavg", "scaffold"))

    def play():
        config, data = make_small(name, two_tests=False, **own, **NOISED)
        return run(config, out=tmp_path / "run", data=data)

    if not refused:
        private = play()["privacy"]
        assert private["unit"] == "client"
        assert private["rounds"] == 1
        assert 0 < private["epsilon"] < 20
        return
    with pytest.raises(UserError, match=refused):
        play()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("fedavg", {"dp_clip": 1.0}, "--dp-clip needs --dp-noise: give both"),
        ("fedavg", {"dp_noise": 1.0}, "--dp-noise needs --dp-clip: give both"),
        ("fedavg", {"dp_delta": 1e-6}, "--dp-delta is about the noise of --dp-noise"),
        ("fedavg", {"dp_draws": "seed"}, "--dp-draws is about the noise of --dp-noise"),
        ("fedavg", {**NOISED, "dp_clip": 0.0}, "--dp-clip must be a number above 0, or adaptive:Q .*, not 0.0"),
        ("fedavg", {**NOISED, "dp_clip": "adaptive:1"}, "a share Q between 0 and 1, not adaptive:1"),
        ("fedavg", {"max_epsilon": 8.0}, "--max-epsilon is about the noise of --dp-noise"),
        ("fedavg", {**ONLY_CLIP, "max_epsilon": 8.0}, "--dp-noise 0 has no epsilon"),
        ("fedavg", {**NOISED, "dp_noise": -1.0}, "--dp-noise must be at least 0"),
        ("fedavg", {**NOISED, "dp_noise": float("nan")}, "--dp-noise must be"),
        ("fedavg", {**NOISED, "dp_delta": 0.7}, "--dp-delta must be above 0 and at most 0.5"),
        ("fedavg", {**NOISED, "aggregator": "median"}, "--aggregator median is not for --dp-clip"),
        ("fedavg", {**NOISED, "aggregator": "krum"}, "--aggregator krum.* is not for --dp-clip"),
        ("fedavg", {**NOISED, "clip_update_norm": 1.0}, "--clip-update-norm clips what --dp-clip clips already"),
        ("feddyn", NOISED, "whose clients keep a gradient of their whole update"),
        ("fedavg", {**NOISED, "freeze_bn_after": 1}, "--freeze-bn-after keeps .* leave one of the two out"),
        ("fedavg", {**NOISED, "privacy_unit": "patient"}, "--privacy-unit patient is for methods that protect"),
        ("fedproto", {**NOISED, "options": {"networks": "personal"}}, "--dp-clip is for methods that average"),
    ],
)
def test_settings_that_do_not_fit_are_refused(method, settings, message):
    with pytest.raises(UserError, match=message):
        RunConfig.make(method, **settings)


class Weighing(FedAvg):
    """FedAvg that weighs clients by their number."""

    def weight(self, server, upload):
        return 1.0 + upload.client_id


class Remembering(FedAvg):
    """FedAvg whose clients count their rounds."""

    def client_update(self, client, phase, message):
        client.state["rounds"] = client.state.get("rounds", 0) + 1
        return super().client_update(client, phase, message)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("fedgid", {}, MORE.format("collect")),
        ("fedproto", {"options": {"networks": "averaged"}}, "whose server does more with uploads than adding them up"),
        ("oneshot-fedavg", {"rounds": None, "options": {"calibrate": True}}, 'whose clients upload "counts", which'),
        ("fedavg", {"buffers": "pool"}, "--buffers pool"),
        ("moon", {}, "whose server does more with uploads than adding them up"),
        ("local", {"sample_fraction": 0.5}, r"declared stateless, but client \d keeps state: declare stateless ="),
    ],
)
def test_methods_and_options_that_do_not_fit_are_refused(
    method, settings, message, make_data, make_config, refuses, tmp_path, monkeypatch
):
    for name, kind in (("fedgid", WithSetUp), ("moon", Weighing), ("local", Remembering)):
        monkeypatch.setitem(METHODS, name, kind)
    with refuses(message):
        run(make_config(method, **{**settings, **NOISED}), out=tmp_path / "run", data=make_data())


def test_what_image_text_data_cannot_keep_private_is_refused(make_pairs, make_config, tmp_path):
    config = make_config("fedavg", **{**NOISED, "buffers": "average", "width": 4})
    with pytest.raises(UserError, match="does not cover the vocabulary that --text-encoder"):
        run(config, out=tmp_path / "run", data=make_pairs())
    config = make_config("fedavg", **{**NOISED, "buffers": "pool", "width": 4})
    with pytest.raises(UserError, match="--buffers pool has clients upload sums over their samples"):
        run(config, out=tmp_path / "run", data=make_pairs())


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.fixture
def constant(monkeypatch):
    """Fix the secret that a run draws."""
    monkeypatch.setattr(server_secret.secrets, "token_hex", lambda count: "5a" * count)


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("fedavg", {"sample_fraction": 0.5, "dp_draws": "secret", "server_rule": "momentum"}),
        ("scaffold", {"dropout_rate": 0.3, "checkpoint_every": 2}),
        ("fedavg", {"dp_clip": "adaptive:0.3"}),
    ],
)
def test_workers_and_an_interruption_change_no_bit(method, settings, constant, make_data, make_config, tmp_path):
    given, data = {"rounds": 4, "clients": 4, **NOISED, **settings}, make_data(SIZES)
    run(make_config(method, **given), out=tmp_path / "whole", data=data)
    config = make_config(method, workers="2", **given)
    again = kill_and_resume(config, out=tmp_path / "parts", data=data, at=KillAt("round", 2))
    assert again == outcome(tmp_path / "whole")


def test_a_secret_run_does_not_follow_from_its_seed(make_data, make_config, tmp_path):
    config = make_config("fedavg", rounds=2, **{**NOISED, "dp_draws": "secret"})
    models = []
    for name in ("one", "other"):
        run(config, out=tmp_path / name, data=make_data())
        models.append((tmp_path / name / "model.safetensors").read_bytes())
        secret = server_secret.read_secret(tmp_path / name / "checkpoints")
        for path in (path for path in (tmp_path / name).rglob("*") if path.is_file()):
            if path.name != server_secret.NAME:
                assert secret.encode() not in path.read_bytes(), path
                assert bytes.fromhex(secret) not in path.read_bytes(), path
    assert models[0] != models[1]


def test_another_release_in_the_place_of_the_first_ends_the_run(make_data, make_config, tmp_path):
    """Round 2 was released after the last checkpoint, and another secret would give other noise."""
    config = make_config("fedavg", rounds=4, checkpoint_every=3, **{**NOISED, "dp_draws": "secret"})
    out = tmp_path / "run"
    play_killed(config, out=out, data=make_data(), at=KillAt("round", 1))
    (out / "checkpoints" / server_secret.NAME).write_text("00" * 16 + "\n")
    with pytest.raises(UserError, match="interrupted after the server had released the mean of a round"):
        run(config, out=out, data=make_data(), resume=True)


# -- epsilon, and what is told -----------------------------------------------------------------------------------------


def test_epsilon_is_told_as_planned_so_far_and_spent(make_data, make_config, tmp_path):
    heard = Hearing()
    config = make_config("fedavg", rounds=3, **NOISED)
    summary = run(config, out=tmp_path / "run", data=make_data(), listener=heard)
    level = ClientLevel(0.5, 2.0, 1e-5)
    assert [record["epsilon"] for record in read_metrics(tmp_path / "run")] == [level.epsilon(r) for r in (1, 2, 3)]
    private = summary["privacy"]
    assert private["epsilon"] == summary["metrics"]["epsilon"] == level.epsilon(3)
    assert (private["delta"], private["clip"], private["noise"], private["unit"]) == (1e-5, 0.5, 2.0, "client")
    assert private["leaves_uncovered"] == []
    assert "when the whole data set of one client is replaced" in private["statement"]
    assert "the run's seed stays secret" in private["statement"]
    told = "\n".join(run_headline(heard.info))
    assert f"epsilon {level.epsilon(3):.3g} at delta 1e-05 after 3 rounds covers everything that the server" in told
    assert "differential privacy of every client: the whole data set of one is replaced" in told


@pytest.mark.parametrize(("clients", "given", "delta"), [(3, None, 1e-5), (3, 1e-3, 1e-3), (100_000, None, 10**-5.5)])
def test_delta(clients, given, delta):

    config = RunConfig.make("fedavg", clients=clients, **NOISED, **({} if given is None else {"dp_delta": given}))
    assert config.delta == pytest.approx(delta)


def test_a_secret_draw_counts_and_nothing_tells_of_it(make_data, make_config, tmp_path):
    config = make_config("fedavg", rounds=6, clients=4, sample_fraction=0.25, **{**NOISED, "dp_draws": "secret"})
    heard = Hearing()
    summary = run(config, out=tmp_path / "run", data=make_data(SIZES), listener=heard)
    level = ClientLevel(0.5, 2.0, 1e-5)
    assert summary["privacy"]["epsilon"] == level.epsilon(6, drawn=1, of=4)
    assert (summary["privacy"]["drawn"], summary["privacy"]["of"]) == (1, 4)
    assert "who takes part in a round stays secret" in summary["privacy"]["statement"]
    assert "clients" not in summary["bytes"]
    records = read_metrics(tmp_path / "run")
    assert not any("clients" in record or "dropped" in record or "loss" in record for record in records)
    assert len({record["round_bytes_up"] for record in records}) == 1
    by_seed = [sample_clients(config, number) for number in range(200)]
    own = [sample_clients(config, number, "5a" * 16) for number in range(200)]
    assert sum(left == right for left, right in zip(by_seed, own, strict=True)) < 100
    secret = server_secret.read_secret(tmp_path / "run" / "checkpoints")
    assert heard.drawn == [sample_clients(config, number, secret) for number in range(6)]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("moon", {}),
        pytest.param("fedavg", {"buffers": "local"}, marks=pytest.mark.exhaustive),
        pytest.param("fedavg", {"dropout_rate": 0.2}, marks=pytest.mark.exhaustive),
        pytest.param("fedavg", {"straggler_rate": 0.2, "stragglers": "drop"}, marks=pytest.mark.exhaustive),
        ("fedavg", {"records": "all"}),
    ],
)
def test_a_draw_that_is_told_or_remembered_does_not_count(method, settings, make_data, make_config, tmp_path):
    config = make_config(method, rounds=6, clients=4, sample_fraction=0.5, **{**NOISED, **settings})
    summary = run(config, out=tmp_path / "run", data=make_data(SIZES))
    asked = [k for number in range(6) for k in sample_clients(config, number)]
    taken = max(asked.count(k) for k in range(4))
    assert 3 <= taken < 6
    name = "epsilon_covered" if "records" in settings else "epsilon"
    assert summary["privacy"][name] == summary["metrics"][name] == ClientLevel(0.5, 2.0, 1e-5).epsilon(taken)
    assert "drawn" not in summary["privacy"]
    assert (summary["privacy"]["leaves_uncovered"] == ["records"]) == ("records" in settings)


def test_nothing_tells_of_a_client_that_is_left_out(make_data, make_config, tmp_path, monkeypatch):

    class Ailing(FedAvg):
        """FedAvg with one client that diverges, and one that sends nonsense."""

        def client_update(self, client, phase, message):
            made = super().client_update(client, phase, message)
            if client.id == 0:
                raise Diverged(0, phase.round, 3, "the loss is not finite")
            return {**made, "parameters": made["parameters"] * float("nan")} if client.id == 1 else made

    seen = {}
    for name, kind in (("well", FedAvg), ("ailing", Ailing)):
        monkeypatch.setitem(METHODS, "fedavg", kind)
        summary = run(make_config("fedavg", rounds=2, on_nan="skip", **NOISED), out=tmp_path / name, data=make_data())
        timeless = ("seconds", "round_seconds", "phases", "device")
        records = [{k: v for k, v in record.items() if k not in timeless} for record in read_metrics(tmp_path / name)]
        seen[name] = (
            [sorted(record) for record in records],
            [record["bytes_up"] for record in records],
            sorted(summary["diagnostics"]),
            summary["bytes"],
        )
        assert not any("client" in key for key in summary["diagnostics"])
    assert seen["ailing"] == seen["well"]


@pytest.mark.exhaustive
def test_modest_noise_still_learns(tmp_path):
    config = RunConfig.make(
        "fedavg", data="digits", model="mlp", width=16, clients=40, partition="iid", rounds=15, local_epochs=2,
        lr=0.1, dp_clip=1.0, dp_noise=0.3, dp_draws="seed", threads=1, workers="1", eval_every=15, grad_cam=0,
    )  # fmt: skip
    summary = run(config, out=tmp_path / "run")
    plain = run(dataclasses.replace(config, dp_clip=None, dp_noise=None, dp_draws="secret"), out=tmp_path / "plain")
    assert summary["metrics"]["accuracy"] > 0.5  # a constant answer is right about one image in ten
    assert summary["metrics"]["accuracy"] < plain["metrics"]["accuracy"]
