"""Foreign run folders: nothing outside is deleted or written, whatever names and links they hold."""

import json
import os
import zlib

import pytest

from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.settings.stored import load_settings
from python_tests.interrupted import KillAt, forge, play_killed

NAMES = ("../../victim", "../metrics.jsonl", "ABSOLUTE", "", ".", "..", "manifest.json", "client-00001-000001/../../x")


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
    for name in NAMES:
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
