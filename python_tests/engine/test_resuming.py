"""What --resume refuses, what it lets pass with a warning, and what it repairs."""

import json

import pytest
from interrupted import Kill, KillAt, outcome

from fedkern.engine import RunConfig, attack, read_model, run
from fedkern.engine.checkpoint import Checkpoints
from fedkern.errors import UserError


@pytest.fixture
def cut(make_data, make_config, tmp_path):
    """A run of three rounds that was killed after two checkpoints."""
    out = tmp_path / "cut"
    with pytest.raises(Kill):
        run(make_config(rounds=3), out=out, data=make_data(), listener=KillAt("round", 2))
    return out


def go_on(out, data, **replaced):
    return run(RunConfig.load(out, **replaced), out=out, resume=True, data=data)


def edit(out, old, new):
    path = out / "config.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("lr = 0.05", "lr = 0.5", r"lr: 0\.05 -> 0\.5"),
        ('method = "fedavg"', 'method = "fedprox"', "method: fedavg -> fedprox"),
        ("rounds = 3", "rounds = 2", "rounds: 3 -> 2"),
        ("width = 2", "width = 4", "width: 2 -> 4"),
        ("threads = 1", "threads = 2", "threads: 1 -> 2"),
    ],
)
def test_settings_that_were_edited_are_named(old, new, told, cut, make_data):
    edit(cut, old, new)
    with pytest.raises(UserError, match=rf"config\.toml was changed after the run began \({told}\): put back"):
        go_on(cut, make_data(seed=1))  # before the data are looked at


def test_the_data_may_have_moved(cut, make_data):
    edit(cut, 'method = "fedavg"', 'method = "fedavg"\ndata_root = "/elsewhere"')
    assert go_on(cut, make_data())["rounds"] == 3


def moved_to_a_gpu(out):
    """The folder as if its run had been made on a GPU."""
    edit(out, 'device = "cpu"', 'device = "cuda"')
    manifest = out / "checkpoints" / "manifest.json"
    content = json.loads(manifest.read_text())
    for entry in content["entries"]:
        entry["info"]["config"]["device"] = "cuda"
        del entry["sum"]  # as the first versions wrote them
    manifest.write_text(json.dumps(content))


def test_a_run_goes_on_on_another_device_with_a_warning(cut, make_data, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    moved_to_a_gpu(cut)
    with pytest.raises(UserError, match="use --device cpu"):
        RunConfig.load(cut)
    summary = go_on(cut, make_data(), device="cpu")
    assert "started on cuda and continued on cpu" in summary["diagnostics"]["other-device"]


def test_a_run_of_a_gpu_is_attacked_without_one(make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run(make_config(rounds=1), out=tmp_path, data=make_data())
    moved_to_a_gpu(tmp_path)
    assert 0 <= attack(tmp_path, data=make_data())["auc"] <= 1


@pytest.mark.parametrize("left", [0, 30, None])
def test_rounds_that_metrics_have_lost_are_not_made_up(left, cut, make_data):
    path = cut / "metrics.jsonl"
    content = path.read_bytes()
    if left is None:
        path.unlink()
    else:
        path.write_bytes(content[:left])
    size = Checkpoints(cut).peek()["info"]["metrics_bytes"]
    with pytest.raises(UserError, match=rf"metrics\.jsonl has lost rounds .*\({left or 0} of {size:,} bytes"):
        go_on(cut, make_data())
    assert (path.read_bytes() if path.exists() else b"") == content[: left or 0]
    path.write_bytes(content)
    assert go_on(cut, make_data())["rounds"] == 3


@pytest.mark.parametrize("key", ["info", "finished", "ledger", "entry", "round", "files", "clients"])
def test_a_damaged_entry_falls_back_to_the_one_before(key, cut, make_data, make_config, tmp_path):
    run(make_config(rounds=3), out=tmp_path / "whole", data=make_data())
    manifest = cut / "checkpoints" / "manifest.json"
    content = json.loads(manifest.read_text())

    def damage(number):
        entry = content["entries"][number]
        if key == "entry":
            content["entries"][number] = None
        elif key in entry:
            entry[key] = None
        else:
            entry["info"][key] = None
        manifest.write_text(json.dumps(content))

    damage(-1)
    assert Checkpoints(cut).peek()["round"] == 1
    go_on(cut, make_data())
    assert outcome(cut) == outcome(tmp_path / "whole")
    content = json.loads(manifest.read_text())
    damage(0)
    damage(1)
    with pytest.raises(UserError, match=r"All entries of .*manifest\.json are damaged: .* start it again"):
        go_on(cut, make_data())


def test_a_damaged_model_is_made_again(make_data, make_config, tmp_path):
    run(make_config(), out=tmp_path, data=make_data())
    before = outcome(tmp_path)
    path = tmp_path / "model.safetensors"
    for content in (b"nothing", path.read_bytes()[:-1]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged \(.*\): delete it, and --resume .* makes it again"):
            read_model(tmp_path)
        go_on(tmp_path, make_data())
        assert outcome(tmp_path) == before
