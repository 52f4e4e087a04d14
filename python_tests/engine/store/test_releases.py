"""Releases of a resumed private run, logged artifacts, and statements about privacy."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from fedkern.downstream.saved_network import read_model
from fedkern.engine import client as engine_client
from fedkern.engine.local.training import Diverged
from fedkern.engine.run import run
from fedkern.engine.server import Server
from fedkern.engine.store import artifacts
from fedkern.engine.store.artifacts import Artifact, ArtifactLog, prepare_artifact
from fedkern.engine.store.artifacts import read as read_shown
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.record_files import read_metrics, read_summary
from fedkern.engine.store.releases import NAME, Releases
from fedkern.errors import UserError
from fedkern.messages import states
from fedkern.messages.states import digest
from fedkern.methods import register
from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.methods.fediod import client as fediod_client
from fedkern.methods.fediod import private_messages
from fedkern.privacy import LEDGER, Accountant, Guarantee
from fedkern.report.figures.pictures import write_pictures
from fedkern.settings.config import load_settings
from python_tests.interrupted import KillAt, forget_results, play_killed

OPTIONS = {
    "iterations": 2, "batch": 4, "ngf": 2, "ndf": 2, "student_steps": 1, "epsilon": 5.0,
    "class_weights": "uniform",
}  # fmt: skip


@pytest.fixture(params=[2])
def cut(request, played_once, make_data, make_config, tmp_path):
    """Return a run killed after client 0 of a round has sent its first gradients, and before client 1 has."""
    data = make_data(two_tests=False)
    config = make_config("fediod", rounds=2, options=OPTIONS, grad_cam=0)

    def play(out):
        play_killed(config, out=out, data=data, at=KillAt("client", 4, round=request.param))

    shutil.copytree(played_once(f"cut{request.param}", play), tmp_path / "cut")

    def go_on():
        return run(load_settings(tmp_path / "cut"), out=tmp_path / "cut", resume=True, data=data)

    return tmp_path / "cut", go_on


def read_releases(out):
    return [json.loads(line) for line in (out / "checkpoints" / NAME).read_text().splitlines()]


def test_what_is_released_again_counts_once(cut):
    out, go_on = cut
    plan = Checkpoints(out).peek()["plan"]
    before = read_releases(out)
    assert [row[1:3] for row in before if row[0] == plan] == [["images 0", 0], ["images 0", 1], ["images 0", 2],
                                                              ["gradients 0", 0], ["gradients 0", 1]]  # fmt: skip
    assert 0.99 * 5 < go_on()["privacy"]["epsilon_covered"] <= 5  # what all releases of the plan cost once
    # What a kept checkpoint would replay is there, nothing older.
    entries = Checkpoints(out)._read_manifest()
    rows = read_releases(out)
    assert {row[0] for row in rows} == {entries[0]["plan"]}
    assert [row for row in rows if row[0] == plan][:5] == [row for row in before if row[0] == plan]


@pytest.mark.parametrize("cut", [1], indirect=True)
def test_secrets_are_kept_before_the_first_round_that_may_be_cut(cut):
    assert cut[1]()["rounds"] == 2


def test_another_processor_device_or_version_is_refused_before_anything_leaves(cut, monkeypatch):
    """The last bits would differ, and the same noise on both values would reveal the difference."""
    out, go_on = cut
    handed, rows, before = [], fediod_client.Answers._realism_rows, read_releases(out)

    def others(self, pending, k):
        return rows(self, pending, k) * (1 + 2**-12)

    update = private_messages.sanitise
    monkeypatch.setattr(fediod_client.Answers, "_realism_rows", others)
    monkeypatch.setattr(private_messages, "sanitise", lambda *a: handed.append(a) or update(*a))
    with pytest.raises(UserError, match=r"after client 0 had released its answer, and what would be released in its"):
        go_on()
    assert len(handed) == 1
    assert read_releases(out) == before
    monkeypatch.undo()
    with monkeypatch.context() as patch:  # other noise on the same answer, as of another stream or a lost secret
        patch.setattr(private_messages, "secret", lambda client, options: "0" * 32)
        with pytest.raises(UserError, match="differs: both together would tell more than epsilon says"):
            go_on()
    assert go_on()["rounds"] == 2  # where it was interrupted it still can


def test_a_run_without_an_epsilon_keeps_no_releases(make_data, make_config, tmp_path):
    run(make_config("fedavg", rounds=1, grad_cam=0), out=tmp_path / "run", data=make_data())
    assert not (tmp_path / "run" / "checkpoints" / NAME).exists()


def test_the_file_of_releases(tmp_path):
    releases = Releases(tmp_path)
    releases.open(0)
    for plan in (0, 1, 2):
        releases.add(plan, "update", 3, {"x": torch.ones(2)})
    releases.forget(1)
    with (tmp_path / NAME).open("a") as file:
        file.write('[2, "update", 4, "0123')  # the process died while it wrote: that message never left
    again = Releases(tmp_path)
    again.open(2)
    again.add(2, "update", 4, {"x": torch.zeros(2)})
    again.add(2, "update", 3, {"x": torch.ones(2)})
    assert [row[:3] for row in map(json.loads, (tmp_path / NAME).read_text().splitlines())] == [
        [1, "update", 3], [2, "update", 3], [2, "update", 4],
    ]  # fmt: skip
    last = Releases(tmp_path)
    last.open(1)
    with pytest.raises(UserError, match="client 3 had released"):
        last.add(1, "update", 3, {"x": torch.ones(2, dtype=torch.float64)})
    (tmp_path / NAME).write_text("[1\n")
    with pytest.raises(UserError, match=r"releases.jsonl is damaged .*start it again in a new folder"):
        Releases(tmp_path).open(0)


def test_a_digest_tells_names_kinds_shapes_and_bits_apart():
    x = torch.arange(6.0)
    different = [
        {"x": x}, {"y": x}, {"x": x.view(2, 3)}, {"x": x.double()}, {"x": x.int()}, {"x": x.bfloat16()}, {"x": x[:0]},
        {"x": x, "y": 1}, {"x": x, "y": 1.0}, {"x": {"x": x}}, {"x": [x]}, {"x": torch.nextafter(x, x + 1)}, {},
        "diverged",
    ]  # fmt: skip
    assert len({digest(message) for message in different}) == len(different)
    assert digest({"a": 1, "b": x[::2]}) == digest({"b": x[::2].clone(), "a": 1})


def test_what_a_client_spent_before_it_diverged_stays_booked(make_data, make_config, tmp_path, monkeypatch):
    """With --on-nan skip the client is left out, but its noise counts in the run's figure."""
    train = engine_client.train_privately

    def diverging(client, method, phase, *arguments):
        train(client, method, phase, *arguments)
        if client.id == 1:
            raise Diverged(1, phase.round, 1, "the parameters are not finite")

    monkeypatch.setattr(engine_client, "train_privately", lambda *a: diverging(*a) or {})
    options = {**OPTIONS, "teacher_dp": True}
    config = make_config("fediod", model="cnn-gn", width=4, rounds=1, options=options, grad_cam=0, on_nan="skip")
    summary = run(config, out=tmp_path / "run", data=make_data(two_tests=False))
    assert "diverging-client" in summary["diagnostics"]
    assert all(summary["privacy"]["clients"][str(k)]["channels"]["teacher"] > 0 for k in range(3))


# -- artifacts ---------------------------------------------------------------------------------------------------------


class Telling(FedAvg):
    """FedAvg that shows its round's number and releases something private."""

    made = 0

    def client_update(self, client, phase, message):
        accountant = Accountant(client.state.get(LEDGER))
        accountant.gaussian("noise", 10.0 + client.id)
        client.state[LEDGER] = accountant.state
        return super().client_update(client, phase, message)

    def server_update(self, server, phase, uploads):
        super().server_update(server, phase, uploads)

        def images():
            type(self).made += 1
            return torch.full((2, 3, 4, 4), (phase.round + 1) / 100)

        server.log_image("generated", images)
        server.log_image("weights", torch.arange(6.0).view(3, 2) + phase.round, axes=("client", "class"))

    def guarantee(self, server):
        return Guarantee(1e-5, {"noise": "the noise"}, {"parameters": "the parameters", "labels": "the labels"})


@pytest.fixture
def telling(registries):
    Telling.made = 0
    return register("telling")(Telling)


def test_a_few_rounds_are_kept_and_a_resumed_run_keeps_the_same(telling, make_data, make_config, tmp_path):
    data, config = make_data(), make_config("telling", rounds=12, checkpoint_every=3, eval_every=12, records="all")
    summary = run(config, out=tmp_path / "whole", data=data)
    entries = read_shown(tmp_path / "whole")
    images = [entry for entry in entries if entry.name == "generated"]
    rounds = [entry.round for entry in images]
    assert rounds[0] == 1
    assert rounds[-1] == 12
    assert 2 <= len(rounds) <= artifacts.ROUNDS + 1
    assert telling.made == len(rounds)  # nothing is made that nobody keeps
    for entry in images:
        assert entry.value.dtype == torch.uint8
        assert torch.equal(entry.value, torch.full((2, 3, 4, 4), round(255 * entry.round / 100), dtype=torch.uint8))
    tables = [entry for entry in entries if entry.name == "weights"]
    assert [entry.round for entry in tables] == rounds
    assert torch.equal(tables[-1].value, torch.arange(6.0).view(3, 2) + 11)
    assert tables[-1].axes == ("client", "class")

    out = tmp_path / "cut"
    play_killed(config, out=out, data=data, at=KillAt("round", 7))
    again = run(load_settings(out), out=out, resume=True, data=data)
    assert (out / artifacts.FILE).read_bytes() == (tmp_path / "whole" / artifacts.FILE).read_bytes()
    assert again["privacy"] == summary["privacy"]

    private = json.loads((tmp_path / "whole" / "summary.json").read_text())["privacy"]
    expected = Accountant()
    expected.gaussian("noise", 10.0, steps=12)
    epsilon = private["epsilon_covered"]
    assert epsilon == pytest.approx(expected.epsilon(1e-5), rel=1e-12)  # client 0 has the least noise
    assert summary["metrics"]["epsilon_covered"] == epsilon == private["channels"]["noise"]
    assert summary["metrics"]["delta"] == 1e-5
    epsilons = [private["clients"][k]["epsilon_covered"] for k in "210"]
    assert sorted(epsilons) == epsilons
    assert epsilons[-1] == epsilon
    assert (private["covers"], private["leaves_uncovered"]) == (["noise"], ["parameters", "labels", "records"])
    assert "epsilon" not in {*private, *summary["metrics"], *private["clients"]["0"]}
    assert private["statement"].endswith(
        "covers the noise, but not the parameters, the labels and what the records tell of single clients: the whole "
        "release has no epsilon."
    )


def test_who_shows_nothing_leaves_no_file(make_data, make_config, tmp_path):
    summary = run(make_config("fedavg", rounds=1), out=tmp_path / "run", data=make_data())
    assert not (tmp_path / "run" / artifacts.FILE).exists()
    assert read_shown(tmp_path / "run") == []
    assert "privacy" not in summary
    assert "epsilon" not in summary["metrics"]


def test_every_round_of_a_short_run_is_wanted(tmp_path):
    assert [r for r in range(1, 6) if ArtifactLog(tmp_path, 5).wants(r)] == [1, 2, 3, 4, 5]
    assert not ArtifactLog(tmp_path, 5).wants(-1)
    rounds = [r for r in range(1, 1001) if ArtifactLog(tmp_path, 1000).wants(r)]
    assert rounds == [1, 125, 250, 375, 500, 625, 750, 875, 1000]


def test_what_cannot_be_shown():
    for name, value in (("Bad name", torch.zeros(2, 2)), ("../up", torch.zeros(2, 2)), ("cube", torch.zeros(2, 2, 2))):
        with pytest.raises(ValueError, match="log_image: expected"):
            prepare_artifact(name, value)
    assert prepare_artifact("mri", torch.rand(2, 4, 3, 3)).shape == (2, 1, 3, 3)
    found = prepare_artifact("odd", torch.tensor([[-1.0, 2.0, math.nan, 0.5]]).view(1, 1, 2, 2))
    assert found.flatten().tolist() == [0, 255, 0, 128]


def test_an_image_that_fails_ends_no_run():
    """An artifact that fails is a warning, and only running out of memory or Ctrl-C end the run."""

    def log(name, value, axes=("", "")):
        warned = {}
        server = SimpleNamespace(
            showing=True, artifacts={}, _context=SimpleNamespace(notices=SimpleNamespace(warn=warned.__setitem__))
        )
        Server.log_image(server, name, value, axes)
        return server.artifacts, warned

    def failing(error):
        def images():
            raise error

        return images

    assert log("good", torch.zeros(2, 2))[1] == {}
    for name, value, why in (
        ("Bad name", torch.zeros(2, 2), "ValueError: log_image: expected a name"),
        ("cube", torch.zeros(2, 2, 2), "ValueError: log_image: expected cube to be images"),
        ("odd", [[1.0]], "TypeError: 'list' object is not callable"),
        ("made", failing(RuntimeError("no such map")), "RuntimeError: no such map"),
        ("counted", failing(ZeroDivisionError()), "ZeroDivisionError"),
    ):
        shown, warned = log(name, value)
        assert shown == {}
        assert warned["no-picture"].startswith(f"The picture {name} is missing: {why}")
        assert warned["no-picture"].endswith(".")
    for error in (KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError("CUDA"), UserError("The key is gone."),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9")):  # fmt: skip
        with pytest.raises(type(error)):
            log("made", failing(error))


def test_a_damaged_file_is_named(tmp_path):
    log = ArtifactLog(tmp_path, 1)
    log.add(Artifact("a", 1, torch.zeros(1, 1), ("", "")))
    log.write()
    assert len(read_shown(tmp_path)) == 1
    (tmp_path / artifacts.FILE).write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r"shown\.safetensors is damaged: delete it"):
        read_shown(tmp_path)


def test_no_noise_is_said_in_words():
    text = Guarantee(1e-5, covers={"one": "a", "two": "b", "three": "c"}).statement(math.inf)
    assert text.startswith("No finite epsilon at delta 1e-05")
    assert text.endswith("covers a, b and c.")


@pytest.mark.exhaustive
def test_no_reader_takes_what_the_run_did_not_write(telling, make_data, make_config, tmp_path):
    """Every reader refuses every file of a finished private run that is unreadable or replaced."""
    data, out = make_data(), tmp_path / "run"
    config = make_config("telling", rounds=2, records="all", grad_cam=0)
    run(config, out=out, data=data)
    assert read_summary(out)["records"] == "all"
    assert write_pictures(out, data=data)
    (out / "pictures.json").unlink()
    before = {path.name for path in out.iterdir()}

    def check_refused(name, content, *readers):
        content_before = (out / name).read_bytes()
        (out / name).write_bytes(content(content_before))
        for look in (*readers, lambda out: write_pictures(out, data=data)):
            with pytest.raises(UserError, match=rf"{name} (is|was|has)"):
                look(out)
        assert {path.name for path in out.iterdir()} == before  # nothing was drawn, the list least of all
        (out / name).write_bytes(content_before)

    check_refused("summary.json", lambda _: b"{", read_summary)
    check_refused("summary.json", lambda data: data.replace(b'"all"', b'"ALL"'), read_summary)
    check_refused("metrics.jsonl", lambda data: data.replace(b"accuracy", b"ACCURACY"), read_metrics)
    check_refused("metrics.jsonl", lambda data: data[: len(data) // 2], read_metrics)
    check_refused("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), read_model)
    check_refused("config.toml", lambda data: data.replace(b'records = "all"', b'records = "private"'))

    def other(data):
        entries = read_shown(out)
        rows = [[e.name, e.round, 255 - e.value, list(e.axes)] for e in entries]
        states.save(tmp_path / "other", {"shown": rows})
        return (tmp_path / "other").read_bytes()

    check_refused(artifacts.FILE, lambda _: b"{", read_shown)
    check_refused(artifacts.FILE, other, read_shown)
    assert write_pictures(out, data=data)
    forget_results(out)  # whoever sends the folder can forge what it says, but nothing that cannot be drawn
    image, table = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 2)
    for row in (["../outside", 1, table, ["a", "b"]], ["x", 1.5, table, ["a", "b"]], ["x", 1, 3, ["a", "b"]],
                ["x", 1, table.double(), ["a", "b"]], ["x", 1, image[:, :0], ["", ""]], ["x", 1, image[0], ["", ""]],
                ["x", 1, table, [1, "b"]], ["x", 1, table, []], ["x"]):  # fmt: skip
        states.save(out / artifacts.FILE, {"shown": [row]})
        with pytest.raises(UserError, match="is damaged: delete it, only pictures are lost"):
            read_shown(out)
    states.save(out / artifacts.FILE, {"shown": [["x", 1, table, ["a", "b"]], ["x", 2, image, ["", ""]]]})
    with pytest.raises(UserError, match="is damaged: delete it, only pictures are lost"):
        write_pictures(out, data=data)
    assert not (tmp_path / "outside.png").exists()
    for name in ("summary.json", artifacts.FILE):  # what is not there is not shown
        (out / name).unlink()
    assert (read_summary(out), read_shown(out)) == (None, [])
    assert write_pictures(out, data=data)
