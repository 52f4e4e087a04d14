"""The audit: bounds on mechanisms with known mu, the methods' mechanisms, and what a run discloses.

The program of the page (benchmarks/studies/privacy_audit.py) runs them with fewer repeats and fixed seeds.
"""

import dataclasses
import io
import json
import math
import struct
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console
from scipy.optimize import brentq
from scipy.stats import binom

from benchmarks.studies import privacy_audit
from benchmarks.studies.audit import audit, claimed_mu
from fedkern.data.identity import identify_memory
from fedkern.downstream import membership_attack
from fedkern.engine.run import run
from fedkern.engine.store.checkpoints import read_newest
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.listeners import Listener
from fedkern.methods import register
from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.privacy import Accountant, Guarantee
from fedkern.privacy.guarantee import Disclosure
from fedkern.report.figures.pictures import write_pictures
from fedkern.report.live.progress_bar import Live
from fedkern.report.pages.run_page import write_report
from fedkern.report.tables import final_table
from fedkern.settings.config import RunConfig, load_settings, read_settings
from fedkern.settings.run_data import kept_data
from python_tests.interrupted import KillAt, play_killed

REPEATS = 10_000


def gaussian(mu, runs, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(runs, generator=generator), mu + torch.randn(runs, generator=generator)


# -- the bounds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
def test_the_bound_is_near_mu_of_a_gaussian_mechanism_and_below(mu):
    found = audit(*gaussian(mu, 40_000, 0))
    assert 0.9 * mu - 0.05 < found.lower < mu
    assert found.repeats == 40_000
    assert found.lower == pytest.approx(
        torch.special.ndtri(torch.tensor([1 - found.false_positives, 1 - found.false_negatives]).double()).sum().item()
    )


def test_the_bound_is_wrong_as_seldom_as_it_says():
    """Of 500 audits at 80 % at most a fifth is above mu, up to 5 deviations.

    Choosing the threshold costs nothing.
    """
    wrong = sum(audit(*gaussian(1.0, 200, seed), confidence=0.8).lower > 1.0 for seed in range(500))
    assert 0 < wrong < 100 + 5 * math.sqrt(500 * 0.2 * 0.8)


def test_nothing_told_apart_is_a_bound_of_zero():
    assert audit(*gaussian(0.0, 1000, 0)).lower == 0
    assert audit(torch.zeros(100), torch.zeros(100)).lower == 0
    assert audit(*reversed(gaussian(3.0, 1000, 0))).lower == 0  # scores that are larger on the wrong side


def test_the_error_rates_are_clopper_and_pearsons():
    """With scores that never overlap, the bound is all that the number of repeats can show.

    An error counts with its exact probability.
    """
    clear = audit(torch.zeros(2000), torch.ones(2000))
    assert clear.false_positives == clear.false_negatives == pytest.approx(1 - 0.005 ** (1 / 1000))
    assert clear.lower == pytest.approx(-2 * float(torch.special.ndtri(torch.tensor(clear.false_positives).double())))
    members, strangers = torch.zeros(2000), torch.ones(2000)
    members[1000:1007] = 2  # seven of the half that is counted
    assert binom.cdf(7, 1000, audit(members, strangers).false_positives) == pytest.approx(0.005)


def test_what_is_no_set_of_scores_is_refused():
    good = torch.zeros(10)
    for members, strangers, words in (
        (torch.zeros(3), torch.zeros(3), "one must be scores"),
        (good, torch.zeros(5, 2), "other must be scores"),
        (good, torch.zeros(8), "same number of runs, not 10 and 8"),
        (good, torch.full((10,), math.nan), "other must not hold NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            audit(members, strangers)
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="confidence must be in"):
            audit(good, good, confidence=confidence)


# -- claims ------------------------------------------------------------------------------------------------------------


def test_mu_of_a_ledger_without_sampling():
    accountant = Accountant()
    assert claimed_mu(accountant.state) == 0
    accountant.gaussian("discriminator", 2.0, steps=4)
    assert claimed_mu(accountant.state) == pytest.approx(1.0)
    accountant.gaussian("teacher", 0.5)
    assert claimed_mu(accountant.state) == pytest.approx(math.sqrt(1 + 4))
    accountant.dp_sgd("dp-sgd", 4.0, rate=1.0, steps=3)  # a replaced gradient may turn around
    assert claimed_mu(accountant.state) == pytest.approx(math.sqrt(1 + 4 + 3 / 4))
    accountant.gaussian("histogram", 0.0)
    assert claimed_mu(accountant.state) == math.inf
    with pytest.raises(ValueError, match="not laplace"):
        claimed_mu({"a": [["laplace", 1.0, 1.0, 1]]})
    with pytest.raises(ValueError, match="false_positives must be in"):
        claimed_mu({}, 0.0)


@pytest.mark.parametrize("false_positives", [0.01, 0.1, 0.3])
def test_mu_of_a_sampled_release_is_no_less_than_the_best_test_has(false_positives):
    """A fifth of the releases is N(1, 1 / 4), or N(-1, 1 / 4) with the record replaced, and the rest N(0, 1 / 4)."""
    ledger = {"discriminator": [["gaussian", 0.25, 0.2, 1]]}  # over the change, which is 2

    def above(threshold, mean):
        parts = torch.tensor([mean - threshold, -threshold]).double() / 0.5
        return float(torch.special.ndtr(parts) @ torch.tensor([0.2, 0.8]).double())

    threshold = brentq(lambda t: above(t, -1.0) - false_positives, -5, 5)
    best = float(torch.special.ndtri(torch.tensor([1 - false_positives, above(threshold, 1.0)]).double()).sum())
    claimed = claimed_mu(ledger, false_positives)
    assert best < claimed < claimed_mu({"discriminator": [["gaussian", 0.25, 0.5, 1]]}, false_positives) < math.inf


# -- the mechanisms ----------------------------------------------------------------------------------------------------

PLAIN = {
    "discriminators": (privacy_audit.channels(sigma=2.0), 2.0),
    "discriminators, four releases": (privacy_audit.channels(sigma=8.0, releases=4), 1.0),
    "class counts": (privacy_audit.histogram(histogram_noise=1.0), math.sqrt(2)),
}
TRAINED = {
    "DP-SGD": (privacy_audit.dp_sgd(noise=1.0), 2.0),
    "DP-SGD, two steps": (privacy_audit.dp_sgd(noise=math.sqrt(2), steps=2), 2.0),
}


@pytest.mark.parametrize("name", [*PLAIN, *TRAINED])
def test_a_mechanism_gives_away_what_it_books_and_half_its_noise_is_caught(name):
    """The audited bound is below the ledger's mu and near it."""
    runs, mu = (PLAIN | TRAINED)[name]
    repeats, share = (REPEATS, 0.8) if name in PLAIN else (4096, 0.85)
    mechanism = privacy_audit.Mechanism("it", runs)
    found = privacy_audit.run_audit(mechanism, repeats)
    assert found["claimed"] == pytest.approx(mu)
    assert share * mu < found["lower"] <= mu
    with privacy_audit.draws(privacy_audit.halve_noise):
        caught = privacy_audit.run_audit(mechanism, repeats)
    assert caught["claimed"] == found["claimed"]
    assert caught["lower"] > 1.5 * mu


def test_noise_that_is_used_twice_is_caught():
    """Noise cancels between four releases in opposite directions, which reveals everything."""
    runs, mu = PLAIN["discriminators, four releases"]

    def reuse_noise(max_norm, noise, seed, offset):
        return {"max_norm": max_norm, "noise": noise, "seed": 1, "offset": 0}

    with privacy_audit.draws(reuse_noise):
        found = privacy_audit.run_audit(privacy_audit.Mechanism("", runs), REPEATS)
    assert found["claimed"] == pytest.approx(mu)
    assert found["lower"] > 6


def test_clipping_to_twice_the_norm_is_caught():
    runs, mu = PLAIN["discriminators"]

    def loose(max_norm, noise, **settings):
        return {"max_norm": 2 * max_norm, "noise": noise / 2, **settings}

    with privacy_audit.draws(loose):
        assert privacy_audit.run_audit(privacy_audit.Mechanism("", runs), REPEATS)["lower"] > 1.5 * mu


@pytest.mark.parametrize(
    ("runs", "repeats"),
    [(privacy_audit.channels(sigma=2.0, shards=5), 6000), (privacy_audit.dp_sgd(noise=1.0, rate=0.25), 4096)],
    ids=["shards", "DP-SGD"],
)
def test_sampled_mechanisms_stay_within_their_ledgers_and_sampling_left_out_is_caught(runs, repeats):
    mechanism = privacy_audit.Mechanism("", runs)
    found = privacy_audit.run_audit(mechanism, repeats)
    assert 0 < found["lower"] < found["claimed"]
    with privacy_audit.stop_sampling():
        caught = privacy_audit.run_audit(mechanism, repeats)
    assert caught["ledger"] == found["ledger"]
    assert caught["lower"] > caught["claimed"]


# -- disclosure --------------------------------------------------------------------------------------------------------


SMALL = {"iterations": 2, "batch": 4, "ngf": 2, "ndf": 2, "student_steps": 1, "noise": "seed"}
PARTLY = {**SMALL, "epsilon": 8.0, "histogram_noise": 5.0}
WHOLE = {**SMALL, "epsilon": 8.0, "teacher_dp": True, "class_weights": "uniform"}
FIGURES = ("accuracy", "loss", "confidence", "balanced_accuracy", "macro_f1", "auroc", "ece")
OF_THE_MODEL = {f"{split}{name}" for split in ("", "validation_") for name in FIGURES}


class Everything(Listener):
    """A listener that gets every figure of every client, as in a run with all records."""

    def __init__(self):
        self.figures, self.warnings, self.infos = {}, {}, []

    def on_client(self, round, client, info):
        self.infos.append(info)
        own = {name: value for name, value in info.items() if name not in ("samples", "seconds")}
        self.figures.update({(round, client, name): value for name, value in own.items()})

    def on_warning(self, name, text):
        self.warnings[name] = text


class Both(Listener):
    def __init__(self, *listeners):
        self.listeners = listeners

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda *args: [getattr(listener, name)(*args) for listener in self.listeners]


def play(config, data, out):
    """Return a run with all outputs: pictures, event files, a display."""
    seen, console = Everything(), Console(file=io.StringIO(), force_terminal=True, width=200)
    boards = []
    if find_spec("tensorboard") is not None:
        from fedkern.listeners.tensorboard import TensorBoard

        boards.append(TensorBoard())
    summary = run(config, out=out, data=data, listener=Both(seen, Live(console), *boards))
    pictures = {path.name for path in write_pictures(out, data=data)}
    console.print(final_table(summary, "accuracy"))
    return summary, seen, pictures, console.file.getvalue()


def hits(out, said, values):
    """Return where any of the values stands, in whatever form, in ``said`` and the run's files.

    The folder checkpoints/ is left out.
    """
    values = [value for value in values if math.isfinite(value) and len(repr(value)) > 7]
    assert values
    found = {}
    for path in (path for path in out.rglob("*") if path.is_file() and "checkpoints" not in path.parts):
        content = path.read_bytes()
        for value in values:
            forms = [repr(value)[:9].encode(), f"{value:.5g}".encode(), struct.pack("<d", value)]
            if path.name.startswith("events."):
                forms = [struct.pack("<f", value)]
            elif path.suffix == ".png":
                forms = forms[:1]
            if any(form in content for form in forms):
                found.setdefault(path.relative_to(out).as_posix(), []).append(value)
    shown = [value for value in values if f"{value:.4g}" in said]
    return found | ({"display": shown} if shown else {})


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [PARTLY, WHOLE], ids=["a part is covered", "all is covered"])
def test_no_file_of_a_private_run_tells_a_clients_figure(options, make_data, make_config, tmp_path):
    """Values that only a run with all records shows appear nowhere in the same run with private records."""
    data = make_data(two_tests=False)
    config = make_config("fediod", model="cnn-gn", width=4, rounds=1, options=options, grad_cam=0, client_test=0.3)
    assert config.records == "private"
    data = kept_data(config, data)
    config = config.replace(client_test=0.0)
    told = play(config.replace(records="all"), data, tmp_path / "all")
    private = play(config, data, tmp_path / "private")
    assert (tmp_path / "all" / "model.safetensors").read_bytes() == (
        tmp_path / "private" / "model.safetensors"
    ).read_bytes()

    covered = "teacher_dp" in options
    names = OF_THE_MODEL | {"delta", "epsilon" if covered else "epsilon_covered"}
    own = {f"{split}{name}" for split in ("", "validation_")
           for name in ("best_teacher", "mean_teacher", "ensemble_uniform", "ensemble_weighted")}  # fmt: skip
    own |= {"image_spread", "clarity", "diversity", "balance", "student_loss", "student_agreement", "teacher_agreement"}
    assert set(private[0]["metrics"]) == (names | own if covered else names)
    hidden = {"holdout", "mean_client_accuracy", "worst_client_accuracy", "mean_client_loss", "worst_client_loss"}
    assert hidden | own <= set(told[0]["metrics"])
    client = list(told[1].figures.values()) + [told[0]["metrics"][name] for name in hidden]
    assert {"critic_loss", "realism", "loss"} <= {name for _, _, name in told[1].figures}
    secret = client if covered else client + [told[0]["metrics"][name] for name in own]
    places = hits(tmp_path / "all", told[3], secret)
    assert {"metrics.jsonl", "summary.json"} <= set(places)  # looked for in the right form
    assert find_spec("tensorboard") is None or any(path.startswith("tensorboard/") for path in places)
    # A fraction of few images may also be the model's own figure on a test set, which is told.
    secret = [value for value in secret if value not in private[0]["metrics"].values()]
    assert hits(tmp_path / "private", private[3], secret) == {}

    tags = [path.read_bytes() for path in (tmp_path / "private").rglob("events.*")]
    assert all(content.count(b"final/epsilon") == 1 for content in tags)
    assert all(content.count(b"final/epsilon_covered") == (not covered) for content in tags)
    assert private[1].infos
    assert not any(private[1].infos)
    (record,) = read_metrics(tmp_path / "private")
    assert "clients" not in record
    assert not hidden & set(record)
    pictures = {"generated.png", "teacher_weights.png"}
    assert pictures | {"partition.png"} <= told[2]
    assert private[2] & (pictures | {"partition.png"}) == (pictures if covered else set())
    assert "partition.png" not in {path.name for path in (tmp_path / "private").iterdir()}


@pytest.mark.exhaustive
def test_an_epsilon_of_the_whole_release_is_told_with_private_records_alone(make_data, make_config, tmp_path):
    found = {}
    for records in ("all", "private"):
        config = make_config("fediod", model="cnn-gn", width=4, rounds=1, options=WHOLE, grad_cam=0, records=records)
        found[records] = run(config, out=tmp_path / records, data=make_data(two_tests=False))
    told, private = (found[name]["privacy"] for name in ("all", "private"))
    assert (told["leaves_uncovered"], private["leaves_uncovered"]) == (["records"], [])
    assert told["epsilon_covered"] == private["epsilon"] <= 8.0
    for tables, missing in ((told, "epsilon"), (private, "epsilon_covered")):
        assert missing not in {*tables, *tables["clients"]["0"]}
    assert "epsilon" not in found["all"]["metrics"]
    assert "partly-covered" in found["all"]["diagnostics"]
    assert "partly-covered" not in found["private"]["diagnostics"]
    for name, words in (("all", "NO epsilon of the whole release"), ("private", "covers everything that clients")):
        assert words in str(final_table(found[name], "accuracy").title)


class Talking(FedAvg):
    """FedAvg that reports everything it should not."""

    def client_update(self, client, phase, message):
        client.warn("client-said", f"client {client.id} has {len(client.labels)} samples")
        client.report["secret"] = 0.123456789
        if client.id == 1:
            message = {**message, "parameters": message["parameters"] * math.nan}
        return super().client_update(client, phase, message)

    def server_update(self, server, phase, uploads):
        super().server_update(server, phase, uploads)
        server.report["made_of_uploads"] = 0.987654321
        server.warn("server-said", "an upload was 0.987654321")

    def oracle_metrics(self, server, clients, sets):
        return {"paid": 1.0, "id_paid": 2.0, "unpaid": 3.0}

    def diagnose(self, observed):
        return {"observed": f"{observed['secret'].mean}"}


@pytest.fixture
def talking(registries):
    return register("talking")(Talking)


def covering(leaves):
    return lambda self, server: Guarantee(1e-5, {"noise": "the noise"}, leaves, derived_figures=("paid",))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("covered", [None, False, True])
def test_warnings_and_figures_of_any_method(covered, talking, make_data, make_config, tmp_path, monkeypatch):
    # Without a guarantee, with a partial one, with a full one.  A client that diverges says no more.
    if covered is not None:
        monkeypatch.setattr(talking, "guarantee", covering({} if covered else {"parameters": "the parameters"}))
    settings = {"records": "private"} if covered is None else {}
    config = make_config("talking", on_nan="skip", **settings)
    assert config.records == "private"  # whoever overrides guarantee
    seen = Everything()
    summary = run(config, out=tmp_path / "run", data=make_data(), listener=seen)
    metrics = summary["metrics"]
    assert {name for name in metrics if name in ("paid", "id_paid", "unpaid")} == (
        {"paid", "id_paid"} if covered else set()
    )
    assert ("made_of_uploads" in metrics) == bool(covered)
    assert set(seen.warnings) == set(summary["diagnostics"])
    assert ("server-said" in seen.warnings) == bool(covered)
    assert not {"client-said", "observed"} & set(seen.warnings)
    assert seen.warnings["diverging-client"] == "Client 1 diverged in round 1; it was left out of that round."
    records = read_metrics(tmp_path / "run")
    assert [record["dropped"] for record in records] == [[{"round": r, "client": 1}] for r in (1, 2)]
    assert not any({"loss", "clients"} & set(record) or "secret" in json.dumps(record) for record in records)
    told = run(config.replace(records="all"), out=tmp_path / "all", data=make_data())
    assert {"client-said", "observed", "server-said", "diverging-client"} <= set(told["diagnostics"])
    assert {"made_of_uploads", "paid", "id_paid", "unpaid"} <= set(told["metrics"])
    assert {"loss", "clients"} <= set(read_metrics(tmp_path / "all")[0])
    assert "batch 1: the loss is nan" in told["diagnostics"]["diverging-client"]


def test_a_client_that_stops_a_private_run_tells_no_more(talking, make_data, make_config, tmp_path):
    with pytest.raises(UserError, match=r"^Client 1 diverged in round 1; lower --lr"):
        run(make_config("talking", records="private"), out=tmp_path / "run", data=make_data())


def test_records_are_a_setting_like_others(make_data, make_config, tmp_path):
    config = make_config("fedavg", rounds=1, records="private")
    summary = run(config, out=tmp_path / "run", data=make_data())
    stored = load_settings(tmp_path / "run")
    assert stored.records == summary["records"] == "private"
    with pytest.raises(UserError, match="records: private -> all"):
        run(config.replace(records="all"), out=tmp_path / "run", data=make_data(), resume=True)
    text = (tmp_path / "run" / "config.toml").read_text()
    assert 'records = "private"' in text
    for method, options, expected in (("fedavg", {}, "all"), ("fediod", {"epsilon": 1.0}, "private")):
        settings = make_config(method, options=options)
        open_ = "".join(line for line in settings.to_toml().splitlines(True) if not line.startswith("records"))
        assert RunConfig.of(read_settings(open_)).records == settings.records == expected
    with pytest.raises(UserError, match="--records"):
        make_config("fedavg", records="some")


def test_what_is_of_no_client_is_always_told():
    assert Disclosure.of("all", None) == Disclosure()
    assert Disclosure.of("private", None) == Disclosure(clients=False, server=False, derived_figures=())
    assert Disclosure.of("all", None).oracle_metrics({"unpaid": 1.0}, ("",)) == {"unpaid": 1.0}
    part = Guarantee(1e-5, {"a": "a"}, {"b": "b"}, derived_figures=("paid",))
    assert Disclosure.of("private", part) == Disclosure(clients=False, server=False, derived_figures=())
    covered = Disclosure.of("private", dataclasses.replace(part, leaves={}))
    assert covered == Disclosure(clients=False, server=True, derived_figures=("paid",))
    assert covered.oracle_metrics({"paid": 1.0, "id_paid": 2.0, "unpaid": 3.0}, ("", "id_")) == {
        "paid": 1.0,
        "id_paid": 2.0,
    }


def test_an_attack_on_a_private_run_is_the_experimenters(make_data, make_config, tmp_path):
    """The attack needs the clients' samples."""
    data = make_data(two_tests=False)
    for records in ("all", "private"):
        out = tmp_path / records
        run(make_config("fedavg", rounds=1, patience=1, records=records), out=out, data=data)
        for network, name in (("last", "attack.json"), ("best", "attack-best.json")):
            found = membership_attack.attack(out, data=data, best=network == "best")
            path = (out / "checkpoints" if records == "private" else out) / name
            assert membership_attack.result_path(out, network) == path
            assert json.loads(path.read_text())["auc"] == found["auc"]
    assert not [*(tmp_path / "private").glob("attack*")]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("cut", [1, 2])
def test_hashes_and_sizes_of_a_private_runs_data_stay_in_its_checkpoints(cut, make_data, make_config, tmp_path):
    # Also for a run interrupted in its first round, before there is a checkpoint, or in its second.
    data, out = make_data(two_tests=False), tmp_path / "run"
    found = identify_memory(data)
    run(make_config("fedavg", rounds=1, records="all"), out=tmp_path / "all", data=data)
    assert found["labels"] in (tmp_path / "all" / "config.toml").read_text()
    config = make_config("fedavg", rounds=2, records="private")
    play_killed(config, out=out, data=data, at=KillAt("round-start", round=cut))
    run(load_settings(out), out=out, data=data, resume=True)
    write_report(out, data=data)
    assert load_settings(out).identity.keys() == {"version"}
    for path in (path for path in out.rglob("*") if path.is_file() and "checkpoints" not in path.parts):
        content = path.read_bytes()
        assert not [name for name, text in found.items() if text.encode() in content], path
    assert read_newest(out)["info"]["config"]["identity"].items() >= found.items()


def test_a_private_run_that_goes_on_stays_private(make_data, make_config, tmp_path):
    data = make_data(two_tests=False)
    config = make_config("fediod", model="cnn-gn", width=4, rounds=3, options=PARTLY, grad_cam=0)
    uncut = run(config, out=tmp_path / "whole", data=data)
    play_killed(config, out=tmp_path / "cut", data=data, at=KillAt("round-start", round=3))
    again = run(load_settings(tmp_path / "cut"), out=tmp_path / "cut", data=data, resume=True)
    assert again["metrics"] == uncut["metrics"]
    assert again["diagnostics"] == uncut["diagnostics"]
    assert torch.equal(*(torch.tensor([r["accuracy"] for r in read_metrics(tmp_path / x)]) for x in ("cut", "whole")))
