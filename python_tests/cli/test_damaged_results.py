"""Figures of a finished run are shown only if unchanged."""

import shutil

import pytest

from fedkern.engine.run import run
from fedkern.settings.stored import load_settings

TINY = ["--data", "digits", "--train-samples", "80", "--clients", "2", "--model", "mlp", "--threads", "1", "--grad-cam",
        "0", "--local-steps", "2", "--workers", "1", "--rounds", "2", "--predictions", "--quiet"]  # fmt: skip
FILES = ("summary.json", "model.safetensors", "evaluation.csv", "confusion.json", "predictions.csv", "metrics.jsonl")


def flip_bit(content, _):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def two_rows_swapped(content, _):
    lines = content.splitlines(keepends=True)
    return b"".join([*lines[:-2], lines[-1], lines[-2]]) if len(lines) > 2 else content[::-1]


DAMAGES = {
    "flipped": flip_bit,
    "cut": lambda content, _: content[:-20],
    "lengthened": lambda content, _: content + content.splitlines(keepends=True)[-1],
    "swapped": two_rows_swapped,
    "another run's": lambda _, stranger: stranger,
    "empty": lambda content, _: b"",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, undrawing):
    from fedkern.run import main

    base = tmp_path_factory.mktemp("runs")
    for seed in ("0", "1"):
        with undrawing():
            assert main(["fedavg", *TINY, "--seed", seed, "--out", str(base / seed)]) == 0
    return base / "0", base / "1"


@pytest.mark.sampled
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_changed_files_are_named(name, damage, runs, fails, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs[0], out)
    content = DAMAGES[damage]((out / name).read_bytes(), (runs[1] / name).read_bytes())
    assert content != (out / name).read_bytes()
    (out / name).write_bytes(content)
    commands = [["report", str(out)], ["compare", str(out), str(runs[1]), "--out", str(tmp_path / "c")]]
    commands += [["evaluate", str(out)]] if name not in ("metrics.jsonl",) else []
    for command in commands:
        assert name in fails(*command)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", FILES[1:5])
def test_what_was_damaged_or_deleted_is_made_again(name, runs, tmp_path):
    for damaged in (False, True):
        out = tmp_path / f"run{damaged}"
        shutil.copytree(runs[0], out)
        before = (out / name).read_bytes()
        (out / name).unlink()
        if damaged:
            (out / name).write_bytes(b"x")
        run(load_settings(out), out=out, resume=True, predictions=True)
        assert (out / name).read_bytes() == before


@pytest.mark.parametrize("name", ["summary.json", "confusion.json", "metrics.jsonl", "model.safetensors"])
def test_a_report_without_a_file_says_so(name, runs, fails, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs[0], out)
    (out / name).unlink()
    command = "evaluate" if name == "model.safetensors" else "report"
    assert name in fails(command, str(out))


@pytest.mark.parametrize("command", ["report", "compare", "attack", "evaluate", "predict", "export"])
def test_settings_of_another_run_are_named(command, runs, fails, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs[0], out)
    shutil.copy(runs[1] / "config.toml", out / "config.toml")
    arguments = {"compare": [str(runs[1]), "--out", str(tmp_path / "c")], "predict": ["image.png"]}.get(command, [])
    assert "config.toml was changed after the run began (seed" in fails(command, str(out), *arguments)
