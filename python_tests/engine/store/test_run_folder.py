"""Run folders: used, refused, and cleaned up, and foreign ones, whose names and links reach nothing outside."""

import errno
import json
import os
import zlib
from pathlib import Path

import pytest

from fedkern.engine.run import run
from fedkern.engine.store.run_folder import NAMES
from fedkern.errors import UserError
from fedkern.methods import METHODS, FedAvg
from fedkern.settings.config import load_settings
from python_tests.interrupted import KillAt, forge, outcome, play_killed

FOREIGN = ("README.md", "notes.part", "data.safetensors")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_a_new_run_writes_over_nothing(name, make_data, make_config, tmp_path):
    path = tmp_path / name
    if name == "checkpoints":
        path.mkdir()
        (path / "weights.safetensors").write_bytes(b"years of work")
    else:
        path.write_bytes(b"years of work")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"already holds (a run|{name}).*choose another --out"):
        run(make_config(), out=tmp_path, data=make_data())
    assert contents(tmp_path) == before


def test_a_new_run_leaves_the_files_of_others_alone(make_data, make_config, tmp_path):
    for name in FOREIGN:
        (tmp_path / name).write_text("mine")
    play_killed(make_config(), out=tmp_path, data=make_data(), at=KillAt("round", 0))
    (tmp_path / "checkpoints" / "mine.safetensors").write_text("mine")
    for name in ("checkpoints/{}server-000009.safetensors{}", "checkpoints/{}releases.jsonl{}", "{}summary.json{}"):
        (tmp_path / name.format(".", ".01234567.part")).write_text("a file that was not finished")
    run(load_settings(tmp_path), out=tmp_path, resume=True, data=make_data())
    for name in (*FOREIGN, "checkpoints/mine.safetensors"):
        assert (tmp_path / name).read_text() == "mine"
    assert sorted(path.name for path in tmp_path.rglob("*.part")) == ["notes.part"]


def test_a_new_run_never_goes_on_from_the_checkpoint_of_another(make_data, make_config, tmp_path):
    play_killed(make_config(rounds=3), out=tmp_path, data=make_data(), at=KillAt("round", 1))
    (tmp_path / "config.toml").unlink()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"already holds checkpoints, metrics\.jsonl"):
        run(make_config(lr=0.5), out=tmp_path, data=make_data())
    assert contents(tmp_path) == before


class Unstorable(FedAvg):
    """A method that puts values into the server's state that no file can hold."""

    requires = FedAvg.requires

    def server_update(self, server, phase, uploads):
        super().server_update(server, phase, uploads)
        server.state["function"] = print


@pytest.mark.parametrize("method", [FedAvg, Unstorable])
@pytest.mark.parametrize("exists", [False, True], ids=["new", "there before"])
def test_a_run_that_comes_to_nothing_leaves_nothing(exists, method, make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "fedavg", method)
    sizes, said = (8, 8, 8), r"state\['function'\] is of type builtin_function_or_method"
    if method is FedAvg:
        sizes, said = (8, 1, 8), "Client 1 has a single training sample"
    out = tmp_path / "above" / "run"
    if exists:
        out.mkdir(parents=True)
        (out / "README.md").write_text("mine")
    for _ in range(2):  # also the second time
        with pytest.raises(UserError, match=said):
            run(make_config(model="mlp"), out=out, data=make_data(sizes=sizes))
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == (["above", "above/run", "above/run/README.md"] if exists else [])


def test_a_run_that_came_to_something_stays(make_data, make_config, tmp_path):
    """Recorded rounds are worth keeping, even if no checkpoint has them."""
    data, out = make_data(), tmp_path / "run"
    run(make_config(rounds=3), out=tmp_path / "whole", data=data)

    class Stop(KillAt):
        essential = True

        def on_round(self, record):
            raise UserError("The third party has left.")

    with pytest.raises(UserError, match="third party"):
        run(make_config(rounds=3, checkpoint_every=3), out=out, data=data, listener=Stop("never"))
    assert (out / "metrics.jsonl").read_text()
    run(load_settings(out), out=out, resume=True, data=data)
    assert outcome(out)[1] == outcome(tmp_path / "whole")[1]


def test_a_link_that_leads_nowhere_is_named(make_data, make_config, tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="link is a link to a folder that does not exist: make that folder"):
        run(make_config(), out=tmp_path / "link", data=make_data())


@pytest.mark.sampled
@pytest.mark.parametrize("name", [".lock", "config.toml", "server-000001.safetensors", "manifest.json", "summary.json"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES], ids=["full", "forbidden"])
def test_the_way_out_of_a_folder_that_cannot_be_written(name, number, make_data, make_config, tmp_path, monkeypatch):
    """A run with recorded rounds goes on with --resume.

    A run without starts again, and has left nothing behind.
    """
    out = tmp_path / "run"
    data, config = make_data(), make_config(rounds=1)
    real = os.open, Path.replace

    def refuse(path):
        if path.name == name:
            raise OSError(number, "no")

    def replace(self, target):
        refuse(target)
        return real[1](self, target)

    def open_(path, *words, **more):
        if str(path).endswith(".lock"):
            refuse(Path(path))
        return real[0](path, *words, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        patch.setattr(os, "open", open_)
        with pytest.raises(UserError) as caught:
            run(config, out=out, data=data)
    sentence = str(caught.value)
    full = number == errno.ENOSPC
    assert f"{name} cannot be written" in sentence
    if name in (".lock", "config.toml", "manifest.json"):
        assert sentence.endswith("free some space, then start again." if full else "choose another folder with --out.")
        assert not out.exists()
        run(config, out=out, data=data)
    else:
        assert sentence.endswith(f"then go on with --resume {out}.")
        assert ("free some space" in sentence) == full
        run(load_settings(out), out=out, resume=True, data=data)


# -- foreign folders ---------------------------------------------------------------------------------------------------


HOSTILE_NAMES = (
    "../../victim",
    "../metrics.jsonl",
    "ABSOLUTE",
    "",
    ".",
    "..",
    "manifest.json",
    "client-00001-000001/../../x",
)


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text("years of work")
    return path


@pytest.fixture
def folder(make_data, make_config, tmp_path):
    """Return the folder of a run that was killed in its third round."""
    play_killed(make_config("scaffold", rounds=4), out=tmp_path / "run", data=make_data(), at=KillAt("round", 2))
    return tmp_path / "run"


def go_on(folder, way, data):
    try:
        run(load_settings(folder), out=folder, resume=True, data=data, rounds=6 if way == "extend" else None)
    except UserError:
        return False
    return True


def in_files(entry, name):
    entry["files"][name] = 1


def as_server(entry, name):
    entry["files"][name] = entry["files"].pop(entry["server"])
    entry["server"] = name


def as_participation(entry, name):
    entry["files"][name] = 1
    entry["participation"] = name


def as_table(entry, name):
    entry["table"]["file"] = name


@pytest.mark.sampled(1)
@pytest.mark.parametrize("way", ["resume", "extend"])
@pytest.mark.parametrize("put", [in_files, as_server, as_participation, as_table])
@pytest.mark.parametrize("forged", ["older", "every"])
def test_names_in_a_manifest(forged, put, way, folder, victim, make_data):
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    manifest = folder / "checkpoints" / "manifest.json"
    text = manifest.read_text()
    for name in HOSTILE_NAMES:
        name = name.replace("ABSOLUTE", str(victim))
        manifest.write_text(text)
        forge(folder, lambda entry, name=name: put(entry, name) if forged == "every" or entry["round"] == 1 else None)
        went_on = go_on(folder, way, make_data())
        assert victim.read_text() == "years of work"
        assert not went_on or forged == "older"
        assert (folder / "config.toml").exists()
        if went_on:
            break  # the entry with the name has gone
        assert {path: path.read_bytes() for path in before if path.name != ".lock"} == {
            path: content for path, content in before.items() if path.name != ".lock"
        }


def test_names_in_the_table_of_clients(folder, make_data, victim):
    def change(entry):
        path = folder / "checkpoints" / entry["table"]["file"]
        line = (json.dumps({"0": ["../../victim", 3, []]}) + "\n").encode()
        path.write_bytes(line)
        entry["table"].update(bytes=len(line), sum=zlib.crc32(line))

    forge(folder, change)

    assert not go_on(folder, "resume", make_data())
    assert victim.read_text() == "years of work"


CHANGED = (".lock", "metrics.jsonl", "checkpoints/releases.jsonl")
REPLACED = ("summary.json", "model.safetensors", "evaluation.csv", "confusion.json", "shown.safetensors", "config.toml")


def lead(path, victim, kind):
    """Replace a file by a link to the victim, which gets the file's content if the run reads the file."""
    if path.exists():
        victim.write_bytes(path.read_bytes())
        path.unlink()
    if kind == "dangling link":
        victim.unlink()
        path.symlink_to(victim)
    elif kind == "link":
        path.symlink_to(victim)
    else:
        os.link(victim, path)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["link", "hard link", "dangling link"])
@pytest.mark.parametrize("name", [*CHANGED, *REPLACED])
@pytest.mark.parametrize("way", ["resume", "extend"])
def test_links_are_not_written_through(way, name, kind, make_data, make_config, tmp_path, victim):
    folder = tmp_path / "run"
    private = {"dp_clip": 1.0, "dp_noise": 1.0} if "releases" in name else {}
    config = make_config(rounds=4, **private)
    play_killed(config, out=folder, data=make_data(), at=KillAt("round", 2))
    lead(folder / name, victim, kind)
    content = victim.read_bytes() if victim.exists() else None
    listing = sorted(path.name for path in tmp_path.iterdir())
    went_on = go_on(folder, way, make_data())
    assert (victim.read_bytes() if victim.exists() else None) == content
    assert sorted(path.name for path in tmp_path.iterdir()) == listing
    if name in (".lock", "metrics.jsonl"):
        assert not went_on


@pytest.mark.sampled
@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("way", ["resume", "extend"])
def test_a_folder_that_is_a_link(way, dangling, make_data, make_config, tmp_path):
    folder, target = tmp_path / "run", tmp_path / "elsewhere"
    play_killed(make_config(rounds=4), out=folder, data=make_data(), at=KillAt("round", 2))
    (folder / "checkpoints").rename(target)
    (folder / "checkpoints").symlink_to(tmp_path / "nowhere" if dangling else target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert not go_on(folder, way, make_data())
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.sampled
@pytest.mark.parametrize("method", ["fedavg", "scaffold", "dp"])
@pytest.mark.parametrize("lost", ["manifest", "checkpoints"])
def test_a_run_whose_manifest_is_gone_does_not_begin_anew(lost, method, make_data, make_config, tmp_path):
    config = make_config(rounds=4, dp_clip=1.0, dp_noise=1.0) if method == "dp" else make_config(method, rounds=4)
    play_killed(config, out=tmp_path, data=make_data(), at=KillAt("round", 2))
    for path in (tmp_path / "checkpoints").iterdir():
        if lost == "checkpoints" or path.name == "manifest.json":
            path.unlink()
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"manifest\.json is missing, though the run has begun: put the file back"):
        run(load_settings(tmp_path), out=tmp_path, data=make_data(), resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
