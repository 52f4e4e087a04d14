"""The report of a run: headline, charts and pictures are those of the run folder."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import fedkern
from fedkern.engine.store import confusions
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.listeners import Listener
from fedkern.report import run_contents
from fedkern.report.figures import pictures
from fedkern.report.pages import run_page
from fedkern.report.pages.html_page import Chart
from fedkern.run import main
from python_tests.html_reader import Reader
from python_tests.image_files import two_brightnesses
from python_tests.interrupted import Kill, KillAt

TINY = ["--data", "digits", "--train-samples", "200", "--clients", "3", "--rounds", "2", "--model", "mlp",
        "--threads", "1", "--workers", "1", "--grad-cam", "0", "--quiet"]  # fmt: skip


def read(folder, **options):
    path = run_page.write_report(folder, **options)
    assert path == folder / "report.html"
    return Reader(path.read_text())


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["fedavg", *TINY, "--client-test", "0.2", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def finished_page(finished_run):
    return read(finished_run)


@pytest.fixture
def empty_charts(monkeypatch):
    """Leave charts empty.

    The run's own pictures are drawn, unlike with ``undrawn``.
    """
    monkeypatch.setattr("fedkern.report.figures.plots.to_svg", lambda figure, name: "<svg></svg>")


@pytest.fixture
def folder(finished_run, tmp_path):
    """Return a copy of the finished run, for changes."""
    return shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("report.html"))


def test_the_headline_is_what_a_sceptic_concludes(finished_run, finished_page):
    page, summary = finished_page, json.loads((finished_run / "summary.json").read_text())
    headline, *sentences = page.text("p")[1:8]
    accuracy = summary["metrics"]["accuracy"]
    assert headline == f"fedavg reaches an accuracy of {100 * accuracy:.1f} % on the test set after 2 rounds."
    matrix = confusions.read(finished_run).matrices["test"]
    baseline = f"Predicting the commonest class everywhere gives {100 * matrix.sum(1).max() / matrix.sum():.1f} %"
    assert any(text.startswith(baseline) for text in sentences)
    worst = summary["worst_client"]
    said = f"The worst of 3 clients is client {worst['client']}, with accuracy {100 * worst['value']:.1f} %."
    assert said in sentences
    assert any("95 % intervals" in text for text in sentences)
    assert any("This is one run" in text for text in sentences)
    assert "finished" in page.text("p")[0]


@pytest.mark.usefixtures("undrawn")
def test_the_headline_tells_of_poor_figures_and_warnings(finished_run):
    run = run_contents.read_run_folder(finished_run)
    for area, verdict in ((0.85, "AUROC is 85.0 % on the test set: the network tells classes apart."),
                          (0.5, "The network is hardly better.")):  # fmt: skip
        poor = {**run.summary, "metrics": {**run.summary["metrics"], "accuracy": 0.1, "auroc": area}}
        page = run_page.page(dataclasses.replace(run, summary=poor, warnings={"chance-level": "accuracy is 0.100"}))
        assert any(text.endswith(f"set. {verdict}") for text in page.headline)
    assert page.warnings == [("chance-level", "accuracy is 0.100")]
    assert run.warnings == run.summary["diagnostics"]


def charts(page):
    """Return the charts of a page by name."""
    blocks = [block for section in page.sections for block in section.blocks]
    return {block.name: block for block in blocks if isinstance(block, Chart)}


def columns(chart):
    """Return the columns of a chart's first table, by title."""
    table = chart.tables[0]
    return dict(zip(table.header, zip(*table.rows, strict=True), strict=True))


@pytest.mark.usefixtures("undrawn")
def test_charts_hold_the_figures_of_the_run(finished_run):
    run, records = run_contents.read_run_folder(finished_run), read_metrics(finished_run)
    found = charts(run_page.page(run))
    assert {"main", "loss", "labels", "client-final", "client-loss", "client-drift", "bytes", "phases", "class-recall",
            "confusion-0"} <= found.keys()  # fmt: skip
    main_ = columns(found["main"])
    assert main_["test"] == tuple(f"{100 * record['accuracy']:.1f} %" for record in records)
    assert main_["validation"] == tuple(f"{100 * record['validation_accuracy']:.1f} %" for record in records)
    loss = columns(found["loss"])
    of_clients = [np.mean([info["loss"] for info in record["clients"].values()]) for record in records]
    assert loss["training"] == tuple(f"{loss:.3g}" for loss in of_clients)
    assert loss["test"] == tuple(f"{record['loss']:.3g}" for record in records)
    by_client = columns(found["client-loss"])
    assert by_client["client 2"] == tuple(f"{r['clients']['2']['loss']:.3g}" for r in records)
    matrix = [[int(count) for count in row[1:]] for row in found["confusion-0"].tables[0].rows]
    assert matrix == confusions.read(finished_run).matrices["test"].tolist()
    counts = [sum(map(int, row[1:])) for row in found["labels"].tables[0].rows]
    assert counts == [record["samples"] for record in records[0]["clients"].values()]


def test_curves_of_an_asynchronous_run_are_over_the_clock(finished_run, monkeypatch):
    run, drawn = run_contents.read_run_folder(finished_run), []
    monkeypatch.setattr(run_page.charts, "curves", lambda _, __, panels, **___: drawn.extend(panels))
    records = [{**record, "clock": 7.5 * record["round"], "staleness": 0.5} for record in run.records]
    run = dataclasses.replace(run, records=records)
    for part in (run_page._curves, run_page.clients):
        list(part(run))
    curves = [curve for panel in drawn for curve in panel.curves]
    assert len(curves) > 6
    assert all(list(curve.at) == [7.5 * number for number in curve.rounds] for curve in curves)


def test_the_file_has_every_chart_with_a_text_and_a_table(finished_run, finished_page):
    page = finished_page
    assert page.unclosed == []
    labels = [given for _, given, _ in page.elements if given.get("role") == "img"]
    assert {given["id"] for given in labels} == {f"chart-{name}" for name in page.charts}
    assert all(len(given["aria-label"]) > 30 for given in labels)
    assert len(page.text("summary")) == len(page.text("svg")) == len(labels) >= 10
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert (finished_run / "report.html").stat().st_size < 1_000_000


def test_the_same_folder_gives_the_same_file(finished_run, finished_page):
    report = (finished_run / "report.html").read_bytes()
    assert run_page.write_report(finished_run).read_bytes() == report


def test_numbered_parts_of_a_phase_are_one():
    found = run_contents.sum_phases({"train": 3.0, "train/images 0": 1.0, "train/images 11": 0.5, "evaluate": 1})
    assert found == {"train": 3.0, "train/images": 1.5, "evaluate": 1.0}


@pytest.mark.usefixtures("undrawn")
def test_settings_versions_and_command(folder):
    page = read(folder, command="python -m fedkern.run fedavg --rounds 2")
    assert page.text("code") == ["python -m fedkern.run fedavg --rounds 2"]
    assert {"client_test", "0.2"} <= {*page.text("th"), *page.text("td")}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["versions"]["torch"] in page.text("td")


@pytest.mark.usefixtures("undrawn")
def test_reports_without_the_data(tmp_path, capsys):
    """Only the registry of fedkern/data is called, as a command leaves out its defaults."""
    root, folders = two_brightnesses(tmp_path / "data", 64), [tmp_path / "x", tmp_path / "x" / "fedavg_seed=0"]
    rows = [f"{'ab'[i % 2]}/{i}.png,{'ab'[i % 2]},{'NS'[i // 32]},{i // 4}\n" for i in range(64)]
    (root / "list.csv").write_text(f"path,label,site,patient_id\n{''.join(rows)}")
    small = {"rounds": 1, "local_steps": 1, "model": "cnn", "width": 2, "grad_cam": 2, "threads": 1, "workers": 1}
    fedkern.compare(["fedavg", "fedprox"], seeds=1, data="csv", data_root=root, data_options={"size": 8},
                    out=folders[0], progress=False, **small)  # fmt: skip
    run, words = fedkern.load(folders[1]), ["report", *map(str, folders)]
    facts = (folders[1] / "facts.json").read_bytes()
    table = json.loads(facts)
    assert table["tests"] == {"": {"samples": 16, "groups": 4, "chance": 0.5}}
    assert table["statistics"]["names"] == ["N", "S"]
    assert sum(map(sum, table["statistics"]["counts"])) + table["validation"] == 48
    (folders[1] / "facts.json").unlink()
    assert main(words) == 2
    assert "facts.json is missing or damaged (No such file or directory): --resume " in capsys.readouterr().err
    run.resume(progress=False)
    assert (folders[1] / "facts.json").read_bytes() == facts

    called = set()
    shutil.rmtree(root)
    sys.setprofile(lambda frame, *_: called.add(frame.f_code.co_filename))
    try:
        assert main(words) == 0
    finally:
        sys.setprofile(None)
    assert {Path(name).name for name in called if "/fedkern/data/" in name} == {"dataset_registry.py"}
    without_data, page = [Reader((folder / "report.html").read_text()) for folder in folders]
    for reader in (without_data, page):
        assert "labels" in reader.charts
        assert "Predicting the commonest class everywhere gives 50.0 %" in reader.words
    assert "Pictures of test samples are left out, as a report reads no data: fedkern.load(" in page.words


@pytest.mark.usefixtures("undrawn")
def test_only_pictures_of_the_folder_are_embedded(folder, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"no picture")
    (folder / "gradcam.png").write_bytes(b"GIF89a")
    listed = json.loads((folder / "pictures.json").read_text())["pictures"]
    (folder / "pictures.json").write_text(json.dumps({"pictures": [*listed, "../secret.png"]}))
    assert read(folder).values("src") == []


@pytest.mark.exhaustive
@pytest.mark.usefixtures("empty_charts")
def test_missing_pictures_are_drawn(folder):
    for name in ("pictures.json", "accuracy.png"):
        (folder / name).unlink()
    read(folder)
    assert (folder / "accuracy.png").exists()
    assert {"accuracy.png", "confusion.png", "partition.png"} <= {path.name for path in pictures.find_pictures(folder)}


def test_changed_settings_and_folders_without_a_run(folder, tmp_path):
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("rounds = 2", "rounds = 3"))
    with pytest.raises(UserError, match="was changed after the run began"):
        run_page.write_report(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a run folder"):
        run_page.write_report(tmp_path / "empty")
    assert not (folder / "report.html").exists()
    assert not (tmp_path / "empty" / "report.html").exists()


class Stopped(Listener):
    essential = True

    def on_round(self, record):
        if record["round"] == 1:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_is_not_finished_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"data": "digits", "train_samples": 280, "clients": 14, "model": "mlp", "threads": 1, "grad_cam": 0,
                "local_steps": 1, "workers": 1}  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        fedkern.simulate("fedavg", rounds=3, out="run", progress=False, listener=Stopped(), **settings)
    run = fedkern.load("run")
    page = Reader(run.report().read_text())
    notice, second = page.text("p")[1:3]
    assert notice == "This run is not finished: 1 of 3 rounds are done, so no figure is its result."
    assert second.startswith("After round 1 it has an accuracy of ")
    assert "Go on with: python -m fedkern.run --resume run" in page.text("p")
    assert {"highest", "middle", "lowest"} <= {*page.text("th", scope="col")}
    assert "confusion-0" not in page.charts
    assert [path.name for path in run.out.glob("*.png")] == []


@pytest.mark.usefixtures("undrawn")
def test_of_many_clients_some_are_charted(finished_run):
    run = run_contents.read_run_folder(finished_run)
    counts = np.random.default_rng(0).integers(1, 9, size=(10_000, 10))
    sizes = tuple(counts.sum(1).tolist())
    statistics = dataclasses.replace(run.facts.statistics, counts=counts, own_tests=(), samples=sizes)
    facts = dataclasses.replace(run.facts, statistics=statistics)
    text, chart, *_ = run_page.clients(dataclasses.replace(run, facts=facts))
    assert chart.name == "labels"
    assert chart.title.startswith("Label distribution of 200 of 10,000 clients")
    assert chart.tables[0].rows[0][0] == f"client {int(np.argsort(-counts.sum(1), kind='stable')[0])}"
    assert chart.tables[0].title == "number of samples; 30 of 200 rows"
    assert text.startswith("10,000 clients with")


@pytest.mark.usefixtures("empty_charts")
def test_private_records_tell_nothing_of_clients(tmp_path):
    folder = tmp_path / "run"
    assert main(["fedavg", *TINY, "--records", "private", "--out", str(folder)]) == 0
    page = read(folder)
    assert page.charts <= {"main", "loss", "bytes", "phases", "phase-rounds", "class-recall"}
    assert "The records are private: nothing is told of single clients." in page.words
    assert "What predicting one class everywhere gives is not known: the records are private." in page.words
    assert "training samples" not in page.words
    facts = json.loads((folder / "facts.json").read_text())
    assert [facts[name] for name in ("tests", "validation", "statistics")] == [{"": {}}, None, None]
    assert page.values("src") == []


@pytest.mark.exhaustive
def test_data_and_names_of_a_python_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)

    def site(count):
        labels = np.arange(count) % 2
        bright = (100 * labels[:, None, None]).astype(np.uint8)
        return rng.integers(0, 100, (count, 12, 12), dtype=np.uint8) + bright, labels

    evil = "</script><script>alert(1)</script>"
    clients = {"<b>north</b>": site(30), evil: site(20)}
    data = fedkern.FederatedData.from_arrays(clients, {"": site(20), "far": site(10)}, classes=["<i>ill", "%{x}"])
    run = fedkern.simulate("fedavg", data=data, model="mlp", rounds=1, out="run", threads=1, progress=False)
    page = Reader(run.report().read_text())
    assert page.text("script") == []
    assert not page.text("b")
    assert not page.text("i")
    assert evil in page.text("th", scope="row")
    assert {"<i>ill", "%{x}", "<b>north</b>"} <= {*page.text("text")}
    assert "Data, network or method of this run were in the memory of a Python program." in page.words
    assert {"test", "far"} <= {*page.text("text")}
    assert 'the test set "far"' in page.words


SMALL = {"--clients": "3", "--train-samples": "120", "--threads": "1", "--workers": "1", "--grad-cam": "0"}
WHOLE = {
    "fedgid": ["--rounds", "1", "--grad-cam", "4"],
    "fedlpfm": ["--rounds", "1", "--clients", "5", "--partition", "iid"],
    "fusefl": ["--local-epochs", "2", "--method-option", "blocks=2"],
    "fediod": ["--rounds", "1", "--method-option", "student_steps=2", "--method-option", "batch=8"],
    "feddra": ["--rounds", "1", "--local-steps", "2", "--method-option", "alignment_steps=1", "--width", "4"],
    "fedavg": ["--rounds", "1", "--data", "segdigits"],
}  # fmt: skip


@pytest.mark.exhaustive
# Fed-LPFM trains its teacher first.
@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[pytest.mark.slow] if method == "fedlpfm" else []) for method in WHOLE]
)
def test_every_method_has_a_report(method, tmp_path):
    words = [word for pair in SMALL.items() for word in pair if pair[0] not in WHOLE[method]]
    assert main([method, *words, *WHOLE[method], "--quiet", "--report", "--out", str(tmp_path / "run")]) == 0
    page = Reader((tmp_path / "run" / "report.html").read_text())
    assert page.unclosed == []
    titles = page.text("h2")
    assert {"Final figures", "Curves", "Clients", "Bytes and time", "Configuration and versions"} <= {*titles}
    wanted = {"fedgid": "Pictures", "fediod": "Pictures", "fedavg": "Pictures", "feddra": "Pictures"}
    assert wanted.get(method, "Curves") in titles
    if method == "feddra":
        assert {"weight", "main"} <= page.charts
        assert "Retrieval examples" in page.text("figcaption")
        assert "Picking at random gives" in page.words


@pytest.mark.usefixtures("undrawn")
def test_an_extended_run_is_not_finished_until_its_last_round(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fedkern.simulate("fedavg", data="digits", model="mlp", train_samples=100, clients=2, rounds=1, out="run",
                           threads=1, workers=1, progress=False, pictures=False)  # fmt: skip
    with pytest.raises(Kill):
        run.extend(3, listener=KillAt("round-start"), progress=False)
    assert "This run is not finished: 1 of 3 rounds are done" in Reader(run.report().read_text()).words
