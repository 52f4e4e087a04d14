"""Refusals, warnings and repairs of --resume, and metadata of model.safetensors."""

import hashlib
import json
import re
import shutil
import subprocess

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedkern import models
from fedkern.comparison.found_runs import read_run
from fedkern.downstream.membership_attack import attack
from fedkern.downstream.saved_network import read_model
from fedkern.downstream.tasks import TASKS
from fedkern.engine.run import run
from fedkern.engine.store import confusions, run_folder
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.extending import check_extension
from fedkern.engine.store.record_files import read_metrics, read_summary
from fedkern.errors import UserError
from fedkern.ops import use_backend, use_isa
from fedkern.ops._core import backend
from fedkern.run import main
from fedkern.settings.config import RunConfig, load_settings
from python_tests.interrupted import KillAt, forge, forget_results, outcome, play_killed, without


@pytest.fixture
def cut(played_once, make_data, make_config, tmp_path):
    """Return a run of three rounds that was killed after two checkpoints."""

    def play(out):
        play_killed(make_config(rounds=3), out=out, data=make_data(), at=KillAt("round", 2))

    return shutil.copytree(played_once("cut", play), tmp_path / "cut")


def go_on(out, data, **replaced):
    return run(load_settings(out, **replaced), out=out, resume=True, data=data)


def edit(out, old, new):
    path = out / "config.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_settings_that_were_edited_are_named(cut, make_data):
    for old, new, told in (
        ("lr = 0.05", "lr = 0.5", r"lr: 0\.05 -> 0\.5"),
        ('method = "fedavg"', 'method = "fedprox"', "method: fedavg -> fedprox"),
        ("rounds = 3", "rounds = 2", "rounds: 3 -> 2"),
        ("width = 2", "width = 4", "width: 2 -> 4"),
        ("\nthreads = 1", "\nthreads = 2", "threads: 1 -> 2"),
    ):
        edit(cut, old, new)
        with pytest.raises(UserError, match=rf"config\.toml was changed after the run began \({told}\): put back"):
            go_on(cut, make_data(seed=1))  # before the data are looked at
        edit(cut, new, old)


def test_the_data_may_have_moved(cut, make_data):
    edit(cut, 'method = "fedavg"', 'method = "fedavg"\ndata_root = "/elsewhere"')
    assert go_on(cut, make_data())["rounds"] == 3


def moved_to_a_gpu(out):
    """Edit the folder as if its run had been made on a GPU."""
    edit(out, 'device = "cpu"', 'device = "cuda"')
    forge(out, lambda entry: entry["info"]["config"].update(device="cuda"))


def test_a_run_goes_on_on_another_device_with_a_warning(cut, make_data, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    moved_to_a_gpu(cut)
    with pytest.raises(UserError, match="use --device cpu"):
        load_settings(cut)
    summary = go_on(cut, make_data(), device="cpu")
    assert "started on cuda and continued on cpu" in summary["diagnostics"]["other-device"]


def test_a_run_of_a_gpu_is_attacked_without_one(make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run(make_config(rounds=1), out=tmp_path, data=make_data())
    moved_to_a_gpu(tmp_path)
    assert 0 <= attack(tmp_path, data=make_data())["auc"] <= 1


@pytest.mark.sampled(1)
@pytest.mark.parametrize("left", [0, 30, None])
def test_rounds_that_metrics_have_lost_are_not_made_up(left, cut, make_data):
    path = cut / "metrics.jsonl"
    content = path.read_bytes()
    if left is None:
        path.unlink()
    else:
        path.write_bytes(content[:left])
    size = Checkpoints(cut).peek()["info"]["parts"]["records"]["bytes"]
    with pytest.raises(UserError, match=rf"metrics\.jsonl has lost rounds .*\({left or 0} of {size:,} bytes"):
        go_on(cut, make_data())
    assert (path.read_bytes() if path.exists() else b"") == content[: left or 0]
    path.write_bytes(content)
    assert go_on(cut, make_data())["rounds"] == 3


@pytest.mark.sampled(1)
@pytest.mark.parametrize("key", ["info", "finished", "parts", "entry", "round", "files", "table"])
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
    found = outcome(cut)
    assert "the last entry of manifest.json" in found[2]["diagnostics"]["damaged-checkpoint"]
    assert without(found, "damaged-checkpoint") == outcome(tmp_path / "whole")
    content = json.loads(manifest.read_text())
    damage(0)
    damage(1)
    with pytest.raises(UserError, match=r"All entries of .*manifest\.json are damaged: .* start it again"):
        go_on(cut, make_data())


# -- what is on the disk is what the run wrote ---------------------------------------------------------------------


def swap(path, old, new):
    """Replace bytes by as many others."""
    content = path.read_bytes()
    assert old in content
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))


def test_records_of_the_same_length_are_told(cut, make_data):
    swap(cut / "metrics.jsonl", b'"round": 1', b'"round": 7')
    with pytest.raises(UserError, match=r"metrics\.jsonl is not what the run wrote: put"):
        go_on(cut, make_data())
    swap(cut / "metrics.jsonl", b'"round": 7', b'"round": 1')
    assert go_on(cut, make_data())["rounds"] == 3


def windows(path):
    """Convert line ends as git does with core.autocrlf."""
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


WAY_BACK = (
    r"is not what the run wrote, as its line ends became CRLF: mend the file by (sed -i 's/\\r\$//' \S+), and git"
)


def mend(told):
    """Follow the sentence's advice."""
    command = re.search(WAY_BACK, str(told.value))
    assert command, told.value
    subprocess.run(command[1], shell=True, check=True)


def test_line_ends_of_windows_are_named_with_the_way_back(cut, make_data):
    # An interrupted run has lines beyond its last checkpoint.
    path = cut / "metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + b'{"round": 2, "cut off')
    windows(path)
    for read in (lambda: go_on(cut, make_data()), lambda: read_metrics(cut)):
        with pytest.raises(UserError) as told:
            read()
        assert re.search(WAY_BACK, str(told.value))
    mend(told)
    assert path.read_bytes().startswith(before)
    assert go_on(cut, make_data())["rounds"] == 3


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("change", ["line ends", "a record"])
def test_a_run_of_other_records_is_not_extended(make_data, make_config, tmp_path, change):
    run(make_config(), out=tmp_path, data=make_data())
    if change == "line ends":
        windows(tmp_path / "metrics.jsonl")
    else:
        swap(tmp_path / "metrics.jsonl", b'"round": 1', b'"round": 7')
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=WAY_BACK if change == "line ends" else "put the file back") as told:
        check_extension(tmp_path, 3)
    assert before == files_of(tmp_path)
    if change == "line ends":
        mend(told)
        check_extension(tmp_path, 3)


READERS = {"metrics.jsonl": read_metrics, "summary.json": read_summary, "confusion.json": confusions.read}


def test_line_ends_of_every_file_that_a_finished_run_reads(make_data, make_config, tmp_path):
    run(make_config(), out=tmp_path, data=make_data())
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for name in ("config.toml", "checkpoints/manifest.json"):  # compared by what they say
        windows(tmp_path / name)
    assert read_run(tmp_path).summary["rounds"] == 2
    for name, read in READERS.items():
        windows(tmp_path / name)
        assert (tmp_path / name).read_bytes() != content[name]
        with pytest.raises(UserError) as told:
            read(tmp_path)
        mend(told)
        assert (tmp_path / name).read_bytes() == content[name]
        read(tmp_path)
    windows(tmp_path / "metrics.jsonl")
    swap(tmp_path / "metrics.jsonl", b'"round": 1', b'"round": 7')
    with pytest.raises(UserError, match="is not what the run wrote: put the file back"):
        read_metrics(tmp_path)


def test_the_manifest_has_the_sum_of_the_records(cut):
    entry = Checkpoints(cut).peek()
    lines = (cut / "metrics.jsonl").read_bytes()[: entry["info"]["parts"]["records"]["bytes"]]
    assert entry["info"]["parts"]["records"]["sha256"] == hashlib.sha256(lines).hexdigest()


@pytest.mark.parametrize("name", ["model.safetensors", "summary.json"])
def test_a_finished_run_is_looked_at_before_it_is_called_so(name, make_data, make_config, tmp_path):
    run(make_config(), out=tmp_path, data=make_data())
    before = outcome(tmp_path)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    if name == "model.safetensors":
        with pytest.raises(UserError, match=r"model\.safetensors is not what the run wrote: delete it, and --resume"):
            read_model(tmp_path)
    summary = go_on(tmp_path, make_data())
    assert f"{name} in {tmp_path} was not what the run wrote" in summary["diagnostics"]["damaged-results"]
    assert without(outcome(tmp_path), "damaged-results") == before
    read_model(tmp_path)
    assert go_on(tmp_path, None)["rounds"] == 2  # finished again, and without data


def test_a_finished_run_with_other_records_is_not_finished(make_data, make_config, tmp_path):
    run(make_config(), out=tmp_path, data=make_data())
    swap(tmp_path / "metrics.jsonl", b'"round": 2', b'"round": 9')
    with pytest.raises(UserError, match=r"metrics\.jsonl is not what the run wrote"):
        go_on(tmp_path, make_data())


# -- the kernels ---------------------------------------------------------------------------------------------------


def test_another_backend_is_told_like_another_setting(make_data, make_config, tmp_path):
    out = tmp_path / "cut"
    with use_backend("reference"):
        play_killed(make_config(rounds=3), out=out, data=make_data(), at=KillAt("round", 2))
    assert Checkpoints(out).peek()["info"]["kernels"]["backend"] == "reference"
    with pytest.raises(UserError, match=r"\(backend: reference -> auto\): set FEDKERN_BACKEND=reference, then resume"):
        go_on(out, make_data())
    with use_backend("reference"):
        assert go_on(out, make_data())["rounds"] == 3


def test_another_backend_than_the_free_choice(cut, make_data):
    with use_backend("reference"), pytest.raises(UserError, match=r"auto -> reference.*: unset FEDKERN_BACKEND, then"):
        go_on(cut, make_data())


@pytest.mark.skipif(not {"avx2", "portable"} <= {*backend.cpu_core().available_isas()}, reason="one ISA alone")
def test_another_isa_is_told_where_it_can_be_had(make_data, make_config, tmp_path):
    out = tmp_path / "cut"
    with use_isa("portable"):
        play_killed(make_config(rounds=3), out=out, data=make_data(), at=KillAt("round", 2))
    with use_isa("avx2"), pytest.raises(UserError, match=r"isa: portable -> avx2\): set FEDKERN_CPU_ISA=portable"):
        go_on(out, make_data())
    with use_isa("portable"):
        assert "other-kernels" not in go_on(out, make_data())["diagnostics"]


def test_an_isa_that_this_machine_lacks_is_a_warning(cut, make_data):
    forge(cut, lambda entry: entry["info"]["kernels"].update(isa="avx1024"))
    told = go_on(cut, make_data())["diagnostics"]["other-kernels"]
    assert "isa avx1024 and now " in told


# -- saved model -------------------------------------------------------------------------------------------------------


PLAIN = {
    "model": "cnn", "width": 4, "task": "classification", "classes": ["a", "b"], "channels": 3, "image_size": [16, 16],
    "mean": [0.5] * 3, "std": [0.2] * 3, "grey_bits": 8, "window": None, "method": "fedavg",
    "rounds": 1,
}  # fmt: skip
PAIR = {
    "image_encoder": "conv", "text_encoder": "words", "channels": 3, "image_size": [16, 16], "mean": [0.5] * 3,
    "std": [0.2] * 3, "vocabulary": ["a", "b"], "width": 8,
}  # fmt: skip
PAIRED = {**PLAIN, "task": "retrieval", "model": "conv+words", "pair": PAIR}
ANYTHING = [None, True, -1, 0.5, "x", [], [None], {}, 10**400, [[1]], [10**400] * 3]
"""Of every kind that JSON has, none of which fits everywhere."""


def write(folder, about, text=None):
    network = models.build_pair(**PAIR) if "model" in about and "pair" in about else models.build(
        "cnn", classes=2, channels=3, image_size=16, seed=0, width=4
    )  # fmt: skip
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    text = json.dumps({"format": run_folder.FORMAT, **about}) if text is None else text
    save_file(tensors, folder / run_folder.MODEL, metadata={"fedkern": text})


@pytest.fixture
def folder(tmp_path):
    config = RunConfig.make("fedavg", data="digits", model="cnn", width=4, clients=2)
    (tmp_path / "config.toml").write_text(config.to_toml())
    return tmp_path


@pytest.mark.exhaustive
def test_a_key_that_is_missing_or_of_another_kind_is_a_sentence_or_changes_nothing(folder):
    pairs = [{**PAIRED, "pair": pair} for pair in spoilt(PAIR)]
    for about in (*spoilt({**PLAIN, "statistics": "batch", "samples": [1, 1]}), *spoilt(PAIRED), *pairs):
        write(folder, about)
        try:
            read_model(folder)
        except UserError:
            continue
        assert isinstance(about["model"], str)
        assert isinstance(about["method"], str)


def spoilt(about):
    """Yield the table without each key, and with each key's value of any kind."""
    for key in about:
        yield {name: value for name, value in about.items() if name != key}
        yield from ({**about, key: value} for value in ANYTHING)


def test_a_file_that_names_no_network_is_damaged(folder):
    for text in ("[]", "null", "1", '"x"', "{", "", '{"format": 1, "model": NaN}', "[" * 100_000):
        write(folder, PLAIN, text)
        with pytest.raises(UserError, match="is damaged"):
            read_model(folder)
    save_file({}, folder / run_folder.MODEL)
    with pytest.raises(UserError, match="does not say what network it holds"):
        read_model(folder)


def test_what_is_whole_is_read(folder):
    for about in (PLAIN, {**PLAIN, "statistics": "batch"}, PAIRED):
        if "statistics" in about:
            network = models.build("cnn", classes=2, channels=3, image_size=16, seed=0, width=4)
            run_folder.write_model(folder / run_folder.MODEL, network, about)
        else:
            write(folder, about)
        assert read_model(folder)[1] == about


def test_another_format_is_refused(folder):
    for number, told in ((0, "format 0"), (2, "format 2"), ("1", "format '1'"), (None, "no format number")):
        write(folder, {**PLAIN, "format": number})
        with pytest.raises(UserError, match=rf"model.safetensors has {told}, and this version of fedkern reads format"):
            read_model(folder)


@pytest.mark.parametrize("change", [
    {"model": "x"}, {"width": None}, {"width": 8}, {"classes": ["a"]}, {"channels": 1, "mean": [0.5], "std": [0.5]},
    {"image_size": [1, 1]}, {"width": 60_000, "channels": 60_000, "mean": [0.5] * 60_000, "std": [0.5] * 60_000},
])  # fmt: skip
def test_another_network_than_the_tensors_are_of_is_a_sentence(folder, change):
    write(folder, {**PLAIN, **change})
    with pytest.raises(UserError, match=r"model|images|parameters|damaged"):
        read_model(folder)


@pytest.mark.parametrize("change", [
    {"image_encoder": "x"}, {"text_encoder": "x"}, {"vocabulary": None}, {"vocabulary": ["a"]}, {"width": 7},
    {"image_size": [8, 8]}, {"longest": 1},
])  # fmt: skip
def test_another_pair_too(folder, change):
    write(folder, {**PAIRED, "pair": {**PAIR, **change}})
    with pytest.raises(UserError, match=r"encoder|pair|images|parameters|damaged"):
        read_model(folder)


def test_every_command_says_so(folder, capsys):
    for about in ({**PLAIN, "mean": None}, {**PAIRED, "pair": {}}, {"samples": 3}):
        write(folder, about)
        for words in (["attack"], *(["evaluate", "--task", task] for task in TASKS)):
            assert main([*words, str(folder)]) == 2
            said = capsys.readouterr().err
            assert "is damaged" in said
            assert "Traceback" not in said


def test_what_a_method_builds_again_is_looked_at_too(make_data, make_config, tmp_path):
    # The ensemble's tensors, and complete tables of other clients or images.
    data, out = make_data(), tmp_path / "run"
    run(make_config("ensemble", rounds=None), out=out, data=data)
    forget_results(out)
    path = out / run_folder.MODEL
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["fedkern"])
    tensors = load_file(path)
    assert {"format": run_folder.FORMAT, **read_model(out)[1]} == about
    for change in ({"samples": [1]}, {"samples": [0] * 40}, {"classes": ["a"]}, {"image_size": [1, 1]},
                   {"channels": 1, "mean": [0.5], "std": [0.5]}, {"task": "segmentation"}):  # fmt: skip
        save_file(tensors, path, metadata={"fedkern": json.dumps({**about, **change})})
        try:
            network, _ = read_model(out)
        except UserError:
            continue
        assert set(network.state_dict()) == set(tensors)  # what changes nothing of the module
