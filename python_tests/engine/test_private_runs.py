"""Complete private runs of FedIOD: the target is met, and a killed run ends with the same bits and figures."""

import json
from types import SimpleNamespace

import pytest
import torch

from fedkern.engine.run import run
from fedkern.engine.store import artifacts
from fedkern.engine.store.artifacts import read as read_shown
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.methods.fediod import private_messages
from fedkern.settings.config import load_settings
from python_tests.interrupted import KillAt, play_killed

SMALL = {"iterations": 2, "batch": 4, "ngf": 2, "ndf": 2, "student_steps": 1, "histogram_noise": 5.0}
SEEDED = {"noise": "seed"}
NOISED = {**SMALL, "epsilon": 8.0, "shards": 3}
WHOLE = {**SMALL, "epsilon": 8.0, "teacher_dp": True}


@pytest.fixture
def bits(monkeypatch):
    """Make secret bytes predictable: 1, 2, 3 and so on since the last call of the returned function."""
    drawn = []

    def token_hex(count):
        drawn.append(count)
        return f"{len(drawn):0{2 * count}x}"

    monkeypatch.setattr(private_messages, "secrets", SimpleNamespace(token_hex=token_hex))  # of clients alone
    return drawn


@pytest.mark.exhaustive
def test_private_teachers_have_a_clipping_norm_of_their_own(make_data, make_config, tmp_path):
    data, options, found = make_data(two_tests=False), {**WHOLE, **SEEDED}, []
    for clip_norm in (0.0, 1e-6):
        config = make_config(
            "fediod", model="cnn-gn", width=4, rounds=1, local_epochs=2, clip_norm=clip_norm, options=options,
            grad_cam=0,
        )  # fmt: skip
        run(config, out=tmp_path / str(len(found)), data=data)
        found.append((tmp_path / str(len(found)) / "model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("noise", ["secret", "seed"])
@pytest.mark.parametrize("options", [NOISED, WHOLE], ids=["noised", "private teachers"])
@pytest.mark.parametrize("teachers", [False, True], ids=["between rounds", "while teachers train"])
def test_a_killed_run_releases_the_same(teachers, options, noise, bits, make_data, make_config, tmp_path):
    """Secrets are stored before a release, also if only some teachers have released their histograms."""
    options = {**options, "noise": noise}
    data = make_data(two_tests=False)
    config = make_config("fediod", model="cnn-gn", width=4, rounds=3, options=options, grad_cam=0)
    summary = run(config, out=tmp_path / "whole", data=data)
    assert bits == ([16] * 3 if noise == "secret" else [])  # once a client
    bits.clear()
    kills = KillAt("client", 3 + 1 if noise == "secret" else 1) if teachers else KillAt("round-start", round=3)
    play_killed(config, out=tmp_path / "cut", data=data, at=kills)
    bits[:] = [0] * 100  # drawn again, they would be others
    again = run(load_settings(tmp_path / "cut"), out=tmp_path / "cut", resume=True, data=data)
    covered = "teacher_dp" in options  # what is made of uncovered answers is not shown
    for name in ("model.safetensors", *((artifacts.FILE,) if covered else ())):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(bits) == 100
    assert again["privacy"] == summary["privacy"]
    assert again["metrics"] == summary["metrics"]

    private = json.loads((tmp_path / "whole" / "summary.json").read_text())["privacy"]
    if covered:
        assert 7.5 < private["epsilon"] <= 8.0
        assert summary["metrics"]["epsilon"] == private["epsilon"]
        assert "epsilon_covered" not in {*private, *summary["metrics"]}
    else:
        assert summary["metrics"]["epsilon_covered"] == private["epsilon_covered"]
        assert private["epsilon_covered"] > private["channels"]["discriminator"] > 0
        assert "epsilon" not in {*private, *summary["metrics"]}
    assert private["leaves_uncovered"] == ([] if covered else ["teacher_gradients", "teacher_logits"])
    assert {"discriminator_gradients", "class_counts"} <= set(private["covers"])
    assert set(private["channels"]) == {"histogram", "discriminator", *(["teacher"] if covered else [])}
    assert ("so the released generator and student" in private["statement"]) == covered
    assert ("partly-covered" in summary["diagnostics"]) != covered
    pictures = {"generated", "teacher_weights"} if covered else set()
    assert {entry.name for entry in read_shown(tmp_path / "whole")} == pictures


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [NOISED, WHOLE], ids=["noised", "private teachers"])
def test_the_seed_does_not_tell_the_noise(options, make_data, make_config, tmp_path):
    """Two runs of one seed have different noise, and only the clients' states hold the secrets behind it."""
    data = make_data(two_tests=False)
    config = make_config("fediod", model="cnn-gn", width=4, rounds=1, options=options, grad_cam=0)
    found = []
    for name in ("one", "other"):
        out = tmp_path / name
        run(config, out=out, data=data)
        checkpoints = Checkpoints(out)
        checkpoints.open()
        secret = [checkpoints.client_state(k)["privacy_secret"] for k in range(3)]
        found.append((secret, checkpoints.server_state(), [checkpoints.client_state(k) for k in range(3)]))
        files = [path for path in out.rglob("*") if path.is_file() and not path.name.startswith("client-")]
        assert {"config.toml", "metrics.jsonl", "summary.json", "manifest.json", "model.safetensors"} <= {
            path.name for path in files
        }
        for path in files:
            content = path.read_bytes()
            for bits in secret:
                assert bits.encode() not in content, path
                assert bytes.fromhex(bits) not in content, path
                assert str(int(bits, 16)).encode() not in content, path
    left, right = found
    assert len({*left[0], *right[0]}) == 6
    for k in range(3):
        assert not torch.equal(left[1]["classes"][k], right[1]["classes"][k])
        teachers = [outcome[2][k]["teacher"]["parameters"] for outcome in found]
        assert torch.equal(*teachers) == ("teacher_dp" not in options)
    assert not torch.equal(*(outcome[1]["generator"]["parameters"] for outcome in found))
    said = json.loads((tmp_path / "one" / "summary.json").read_text())["privacy"]["statement"]
    assert "and their secret bits) stays with the clients; it covers" in said
    assert "seed" not in said


def test_with_the_seed_a_run_can_be_repeated_and_says_what_that_costs(make_data, make_config, tmp_path):
    config = make_config("fediod", rounds=1, options={**NOISED, **SEEDED}, grad_cam=0)
    for name in ("one", "other"):
        summary = run(config, out=tmp_path / name, data=make_data(two_tests=False))
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")}) == 1
    assert " stays with the clients and the run's seed stays secret; it covers" in summary["privacy"]["statement"]


def test_the_pictures_are_what_they_say(make_data, make_config, tmp_path):
    options = {"iterations": 1, "batch": 4, "ngf": 2, "ndf": 2, "student_steps": 1, "disc_weight": False}
    data = make_data(two_tests=False)
    run(make_config("fediod", rounds=1, options=options, grad_cam=0), out=tmp_path / "run", data=data)
    entries = {entry.name: entry.value for entry in read_shown(tmp_path / "run")}
    assert entries["generated"].shape == (4, 3, 8, 8)
    counts = data.statistics.counts
    assert entries["teacher_weights"].numpy() == pytest.approx(counts / counts.sum(0), rel=1e-5)
