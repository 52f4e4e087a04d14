"""report DIR... and --report."""

import dataclasses
import json
import shlex

import pytest

from fedkern.cli import flags, repeat
from fedkern.cli.request import effective_config
from fedkern.run import main
from fedkern.settings.config import load_settings
from python_tests.html_reader import Reader

TINY = ["--data", "digits", "--train-samples", "120", "--clients", "3", "--model", "mlp", "--threads", "1",
        "--grad-cam", "0", "--local-steps", "2", "--workers", "1", "--rounds", "1"]  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_a_report_at_the_end_of_a_run_and_later(result, tmp_path):
    out, _ = result("fedprox", *TINY, "--seed", "3", "--method-option", "mu=0.5", "--out", "run", "--report")
    assert "report:     run/report.html" in out
    text = (tmp_path / "run/report.html").read_text()
    (command,) = Reader(text).text("code")
    again = dataclasses.replace(flags.parse_run(shlex.split(command)[3:]), out=None)
    assert (
        effective_config(again)
        .with_client_threads()
        .differences(load_settings("run", device="cpu").with_client_threads())
        == []
    )
    (tmp_path / "run/report.html").unlink()
    out, _ = result("report", "run")
    assert out == "run/report.html\n"
    assert (tmp_path / "run/report.html").read_text() == text
    out, _ = result("report", "run", "./run", "--json")
    assert json.loads(out) == {"files": ["run/report.html"]}


@pytest.mark.exhaustive
def test_a_report_of_a_comparison(result, tmp_path):
    out, _ = result("compare", "fedavg", *TINY, "--seeds", "1", "--out", "x", "--report")
    assert "report: x/report.html" in out
    text = (tmp_path / "x/report.html").read_text()
    out, _ = result("report", "x", "x/fedavg_seed=0")
    assert out.splitlines() == ["x/report.html", "x/fedavg_seed=0/report.html"]
    assert (tmp_path / "x/report.html").read_text() == text
    assert "Final figures of every run" in Reader(text).text("h2")
    (tmp_path / "x/comparison.csv").unlink()
    (tmp_path / "x/comparison.md").unlink()
    assert main(["report", "x"]) == 0


def test_mistakes(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "report needs the folder of a run or of a comparison." in fails("report")
    assert "The run folder nowhere does not exist" in fails("report", "nowhere")
    assert "empty holds neither a run nor a comparison" in fails("report", "empty")
    assert 'does not take "--outt".' in fails("report", "empty", "--outt", "x")
    assert 'report does not take "--data-root".' in fails("report", "empty", "--data-root", "x")
    assert "Name report first, then its flags" in fails("--quiet", "report", "x")
    assert 'list does not take "--report"' in fails("list", "--report")
    assert list((tmp_path / "empty").iterdir()) == []


def test_help(result):
    out, _ = result("report", "--help")
    assert out.startswith("usage: python -m fedkern.run report DIR [DIR ...] [flags]")
    out, _ = result("--help")
    assert "python -m fedkern.run report DIR..." in out


def test_a_new_run_does_not_write_over_a_report(fails, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/report.html").write_text("mine")
    assert "already holds report.html" in fails("fedavg", *TINY, "--out", "run", "--report")
    assert (tmp_path / "run/report.html").read_text() == "mine"


@pytest.mark.usefixtures("undrawn")
def test_a_report_that_cannot_be_written_does_not_lose_the_run(capsys, monkeypatch, tmp_path):
    from fedkern.errors import UserError
    from fedkern.report.pages import run_page

    def full(*_, **__):
        raise UserError("run/report.html cannot be written, the disk is full.")

    monkeypatch.setattr(run_page, "write_report", full)
    assert main(["fedavg", *TINY, "--out", "run", "--report", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "run\n"
    assert err.splitlines()[-1] == (
        "error: The run is complete, but not its report (run/report.html cannot be written, the disk is full): write "
        "it with python -m fedkern.run report run."
    )
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.exhaustive
def test_a_picture_that_fails_ends_no_run_nor_its_report(capsys, monkeypatch, tmp_path):
    from fedkern.report.figures import plots

    monkeypatch.setattr(plots, "partition_picture", lambda *_, **__: {}["site"])
    assert main(["fedavg", *TINY, "--out", "run", "--report", "--quiet"]) == 0
    out, err = capsys.readouterr()
    said = "partition.png is missing, as it cannot be drawn: KeyError: 'site'."
    assert out == "run\n"
    assert f"warning (no-picture): {said}" in err
    assert said in Reader((tmp_path / "run/report.html").read_text()).text("p")
    assert (tmp_path / "run/accuracy.png").exists()
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--grad-cam", "4"), ("--grad-cam", "0")])
def test_a_run_of_a_vision_transformer_ends_with_its_pictures(words, result, tmp_path):
    small = "--clients 2 --train-samples 40 --rounds 1 --local-steps 1 --threads 1 --workers 1"
    out, err = result("fedavg", "--data", "colordigits", "--model", "vit-tiny", *small.split(), "--out", "run", *words)
    assert "missing" not in err
    assert ("gradcam.png" in out) is ("4" in words)
    assert (tmp_path / "run/gradcam.png").exists() is ("4" in words)
    figures = json.loads((tmp_path / "run/summary.json").read_text())["metrics"]
    assert ("id_gradcam_in_object" in figures) is ("4" in words)
    result("--resume", "run")


@pytest.mark.usefixtures("undrawn")
def test_a_run_with_data_in_memory_has_no_command(tmp_path):
    import numpy as np

    import fedkern

    site = (np.arange(512).astype(np.uint8).reshape(8, 8, 8), np.arange(8) % 2)
    data = fedkern.FederatedData.from_arrays([site, site], site)
    run = fedkern.simulate("fedavg", data=data, model="mlp", rounds=1, out="run", progress=False, pictures=False)
    assert repeat.repeat_command(run.out) == ""
    assert main(["report", "run"]) == 0
    assert "memory of a Python program" in Reader((tmp_path / "run/report.html").read_text()).words
