"""Choices of a round's clients: what they draw, their code, and the same bits after an interruption."""

import numpy as np
import pytest
import torch

import fedkern
from fedkern.engine.client_choice import ClientChoice, by_loss, by_size, power_of_choice
from fedkern.engine.participation import Participation
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods import METHODS, FedAvg, Round
from fedkern.methods.base import Federation
from fedkern.run import main
from fedkern.settings.config import RunConfig, load_settings
from python_tests.interrupted import KillAt, check_interruption, forge_state, outcome, play_killed

pytestmark = pytest.mark.usefixtures("forked_workers")

SIZES, HALF = (20, 13, 9, 15), {"clients": 4, "sample_fraction": 0.5}
OWN = """
import numpy as np
def lowest(round, sizes, losses, count, rng):
    return np.argsort(np.where(np.isnan(losses), -1, losses))[:count]
def wrong(round, sizes, losses, count, rng):
    return [0, round, 0]
def failing(round, sizes, losses, count, rng):
    return round / 0
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path / 'own.py'}:"


def draw_often(choice, sizes, losses, count, draws=4000):
    """Return the share of the draws that have each of the candidates."""
    rng = np.random.default_rng(0)
    found = [choice(np.array(sizes), np.array(losses), count, rng) for _ in range(draws)]
    assert all(len({*chosen.tolist()}) == count for chosen in found)
    return np.bincount(np.concatenate(found), minlength=len(sizes)) / draws


def test_a_draw_by_size_is_in_proportion():
    assert draw_often(by_size, [1, 2, 5], [np.nan] * 3, 1) == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.03)
    assert draw_often(by_size, [1, 1, 998], [np.nan] * 3, 2)[2] == pytest.approx(1, abs=0.01)


def test_the_highest_losses_are_taken_after_clients_without_one():
    losses = [0.5, np.nan, 2.0, 1.0, np.nan]
    assert draw_often(by_loss, [1] * 5, losses, 3).tolist() == [0, 1, 1, 0, 1]
    assert draw_often(by_loss, [1] * 5, losses, 1) == pytest.approx([0, 0.5, 0, 0, 0.5], abs=0.03)


def test_power_of_choice_is_between_size_and_loss():
    sizes, losses = [1, 2, 5, 2], [3.0, 2.0, 1.0, 2.0]

    def of(candidates):
        return draw_often(lambda *given: power_of_choice(candidates, *given), sizes, losses, 1)

    assert of(1) == pytest.approx([0.1, 0.2, 0.5, 0.2], abs=0.03)
    assert of(4).tolist() == [1, 0, 0, 0]
    assert 0.1 < of(2)[0] < 1


def test_losses_are_those_reported_last():
    choice = ClientChoice(RunConfig.make("fedavg", choose="loss", **HALF), SIZES)
    assert choice.draw(3) == choice.draw(3)
    choice.note_losses({"1": {"loss": 2.0}, "3": {"loss": 1.0, "work_done": 0.5}})
    choice.note_losses({"3": {"loss": 3.0}, "2": {"loss": float("nan")}, "0": {}})
    assert str(choice.losses.tolist()) == "[nan, 2.0, nan, 3.0]"
    assert choice.draw(0) == [0, 2]
    choice.note_losses({"0": {"loss": 2.5}, "2": {"loss": 0.1}})
    assert choice.draw(0) == [0, 3]
    everyone = RunConfig.make("fedavg", choose="size", clients=4, sample_fraction=0.9)
    assert Participation(everyone, Federation(5, SIZES, 3)).clients(Round(), 0) == [0, 1, 2, 3]


@pytest.mark.parametrize("choose", ["size", "loss", "power-of-choice:3", "own"])
def test_an_interruption_and_workers_change_no_bit(choose, own, make_data, make_config, tmp_path):
    choose = f"{own}lowest" if choose == "own" else choose
    config, data = make_config("scaffold", rounds=6, choose=choose, **HALF), make_data(SIZES)
    run(config, out=tmp_path / "whole", data=data)
    play_killed(config.replace(workers="2"), out=tmp_path / "cut", data=data, at=KillAt("client", 7))
    resumed = load_settings(tmp_path / "cut")
    run(resumed, out=tmp_path / "cut", resume=True, data=data, trusted=[choose])
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    rounds = [
        {int(k): info["loss"] for k, info in record["clients"].items()} for record in read_metrics(tmp_path / "cut")
    ]
    losses: dict[int, float] = {}
    for clients in rounds:
        if choose == "loss":
            lowest = min(losses.get(k, 99.0) for k in clients)
            assert all(losses.get(k, 99.0) <= lowest for k in range(4) if k not in clients)
        losses |= clients


def test_stragglers_and_dropouts_beside_a_choice(make_data, make_config, tmp_path):
    config = make_config("fedavg", rounds=5, choose="loss", straggler_rate=0.5, dropout_rate=0.4, **HALF)
    check_interruption(config, tmp_path, data=make_data(SIZES), at=KillAt("round", 3))
    plan = [Round()] * 5
    assert Participation(config, Federation(5, SIZES, 3)).fewest_uploads(plan) == 1
    assert Participation(config.replace(dropout_rate=0.0), Federation(5, SIZES, 3)).fewest_uploads(plan) == 2


def test_a_run_that_names_a_function_asks_for_it_again(own, tmp_path, capsys):
    words = ["fedavg", "--data", "digits", "--train-samples", "60", "--clients", "4", "--sample-fraction", "0.5",
             "--width", "2", "--threads", "1", "--grad-cam", "0", "--rounds", "2"]  # fmt: skip
    folder = str(tmp_path / "run")
    assert main([*words, "--choose", f"{own}lowest", "--out", folder, "--quiet"]) == 0
    assert main(["export", folder, "--out", str(tmp_path / "net.pt")]) == 0  # an export draws no clients
    longer = ["extend", folder, "--rounds", "3", "--quiet"]
    assert main(longer) == 2
    assert f"give the option again, --choose {own}lowest" in capsys.readouterr().err
    (tmp_path / "own.py").write_text(OWN.replace("[:count]", "[-count:]"))
    assert main([*longer, "--choose", f"{own}lowest"]) == 0
    assert "goes on with" in fedkern.load(folder).summary["diagnostics"]["other-code"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"choose": "random"},
            '--choose must be uniform, size, loss, power-of-choice:D with a number D, .*, not "random"',
        ),
        ({"choose": "power-of-choice:0"}, "--choose power-of-choice:0 must draw at least the 2 clients"),
        ({"choose": "power-of-choice:5"}, "must draw .* at most all 4: take another number of candidates"),
        (
            {"choose": "loss", "asynchronous": "fedasync"},
            "--choose is about rounds that all their clients begin and end",
        ),
        ({"choose": "loss", "dp_clip": 1, "dp_noise": 1}, "--choose loss lets the clients' data decide who takes part"),
        ({"choose": "own.py:absent"}, "the choice of clients .*own.py:absent cannot be imported: .*has no"),
        ({"choose": "own.py:wrong"}, r"own.py:wrong must return 2 different clients from 0 to 3, not \[0, 0, 0\]"),
        ({"choose": "own.py:failing"}, "own.py:failing fails .*own.py, line 8"),
    ],
)
def test_choices_that_do_not_fit_are_refused(
    settings, message, own, make_data, make_config, refuses, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with refuses(message):
        run(make_config("fedavg", **HALF, **settings), out=tmp_path / "run", data=make_data(SIZES))


def test_other_methods_that_no_choice_fits(make_data, make_config, refuses, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--choose is not for oneshot-fedavg, a one-shot method"):
        RunConfig.make("oneshot-fedavg", choose="size")
    with pytest.raises(UserError, match=r"--choose loss lets .* leave it out of runs with differential privacy"):
        RunConfig.make("fediod", choose="loss", options=["epsilon=8"])
    with pytest.raises(UserError, match="--choose has no effect where all clients take part in every round"):
        RunConfig.make("fedavg", choose="size").for_user({"choose"})

    class Silent(FedAvg):
        """FedAvg whose clients report nothing."""

        def client_update(self, client, phase, message):
            upload = super().client_update(client, phase, message)
            client.report.clear()
            return upload

    monkeypatch.setitem(METHODS, "fedavg", Silent)
    with refuses("--choose loss needs training losses, and fedavg's clients report none"):
        run(make_config("fedavg", choose="loss", **HALF), out=tmp_path / "run", data=make_data(SIZES))


@pytest.mark.parametrize("losses", [torch.zeros(3, dtype=torch.float64), torch.zeros(4), 1.0])
def test_a_forged_checkpoint_is_refused(losses, make_data, make_config, tmp_path):
    config, data = make_config("fedavg", choose="loss", **HALF), make_data(SIZES)
    play_killed(config, out=tmp_path, data=data, at=KillAt("round", 1))
    forge_state(tmp_path, "participation-000001.safetensors", lambda state: state.update(losses=losses))
    with pytest.raises(UserError, match="The checkpoint is damaged: what it says of the clients"):
        run(config, out=tmp_path, data=data, resume=True)
