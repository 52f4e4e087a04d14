"""Folders of new runs: used, refused, and cleaned up when a run fails early."""

import errno
import os
from pathlib import Path

import pytest

from fedkern.engine.run import run
from fedkern.engine.store.run_folder import NAMES
from fedkern.errors import UserError
from fedkern.methods import METHODS, FedAvg
from fedkern.settings.stored import load_settings
from python_tests.interrupted import KillAt, outcome, play_killed

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
