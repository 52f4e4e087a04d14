"""Results and figures of the pages come from benchmarks/results, whose files name their commits."""

import json
import re
import shlex
from pathlib import Path
from statistics import mean, stdev

import pytest
from matplotlib.image import imread

from benchmarks import artefact, comparisons, page_figures, pages, recorded
from benchmarks.gpu import stages
from benchmarks.page import RESULTS, load
from benchmarks.pages import Page
from benchmarks.studies import fusefl_figure, privacy_audit
from benchmarks.studies.page_commands import COMMANDS
from fedkern.cli.flags import parse_run
from fedkern.cli.request import effective_config
from fedkern.comparison import published

BY_PATH = {page.path: page for page in page_figures.PAGES}
PAGE = Page("docs/some.md", {"rates": lambda: ["Of 3 runs.", "", "| a | rate |", "|---|---:|", "| b | 1.5 % |"]})
TEXT = """Of 10 clients.

<!-- figures: rates -->

Of 3 runs.

[Table: rates](tables/some-rates.csv)

<!-- end -->

The published gain is 3 points.

It wins.
"""


@pytest.mark.parametrize("path", BY_PATH)
def test_a_page_says_what_the_results_say(path):
    assert pages.faults((pages.ROOT / path).read_text(), BY_PATH[path]) == []


def test_every_method_with_a_page_is_looked_at():
    excluded = {"docs/ops.md"}  # its tables are those of benchmarks.report
    found = {f"docs/{path.name}" for path in (pages.ROOT / "docs").glob("*.md")}
    methods = (found - excluded) & {f"docs/{name}.md" for name in COMMANDS}
    runs = {"docs/flower-reference.md", "docs/uploads.md", "docs/reproducing.md", "docs/privacy.md"}
    shared = {"README.md", "docs/artefact.md", "docs/results.md", "docs/speed.md", "docs/methods/README.md"} | runs
    shared |= {"docs/methods/baselines.md"}
    specified = {f"docs/methods/{name}.md" for name in page_figures.SPECIFIED}
    assert set(BY_PATH) == methods | shared | specified


def test_a_chart_that_no_command_makes_is_found():
    with pytest.raises(AssertionError, match=r"nothing in benchmarks/artefact\.toml makes \['new\.svg'\]"):
        artefact.list_artefacts((), ["new.svg"])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder that has the table of `TEXT`."""
    (tmp_path / "docs/tables").mkdir(parents=True)
    (tmp_path / "docs/tables/some-rates.csv").write_text("a,rate\nb,1.5 %\n")
    return tmp_path


@pytest.mark.parametrize("path", BY_PATH)
def test_a_changed_figure_is_found_wherever_it_stands(path, tmp_path):
    """The first digit of each caption or table is changed, one at a time."""
    page, text = BY_PATH[path], (pages.ROOT / path).read_text()
    for section in pages.SECTION.finditer(text):
        place = re.search(r"\d", section[0].partition("-->")[2].partition("[Table")[0])
        if place:
            at = section.start() + section[0].index("-->") + 3 + place.start()
            assert pages.faults(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :], page), section[0]
    stored = pages.tables(page)
    for changed in stored:
        for name, content in stored.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            at = re.search(r"\d", content).start()
            changed_content = content[:at] + str((int(content[at]) + 1) % 10) + content[at + 1 :]
            (tmp_path / name).write_text(changed_content if name == changed else content)
        assert len(pages.faults(text, page, tmp_path)) == 1, changed
    heading = f"## {page.part}\n" if page.part else "\n"
    for claim in ("It has 99.9 % there.", "It is 3 times as fast.", "It gains half a point.", "It wins by two points."):
        assert any(
            "result outside" in fault for fault in pages.faults(text.replace(heading, heading + claim, 1), page)
        ), claim


@pytest.mark.parametrize(("before", "after", "words"), [
    ("", "", None),
    ("Of 3 runs", "Of 4 runs", "should be"),
    ("It wins.", "It wins by 41 %.", "result outside"),
    ("It wins.", "It has 41 ± 2.", "result outside"),
    ("It wins.", "It is three times as fast.", "result outside"),
    ("The published gain", "The gain", "result outside"),
    ("figures: rates", "figures: dates", "nothing makes the section"),
    ("<!-- figures: rates -->", "", "is not on it"),
    ("It wins.", "With 50 clients, at a rate of 0.1 (`--share 41 %`, [one](http://a/2%)).", None),
])  # fmt: skip
def test_what_is_wrong_with_a_page(before, after, words, root):
    found = pages.faults(TEXT.replace(before, after, 1) if before else TEXT, PAGE, root)
    assert (not found) if words is None else any(words in fault for fault in found), found


@pytest.mark.parametrize(("path", "name"), [
    ("docs/speed.md", "whole runs beside plain PyTorch"),
    ("docs/speed.md", "rounds of FedAvg beside other frameworks"),
    ("docs/flower-reference.md", "aggregation beside Flower"),
])  # fmt: skip
def test_tables_of_whole_runs_have_a_caption_and_short_cells(path, name):
    lines = BY_PATH[path].tables[name]()
    assert re.fullmatch(r"(Intel Xeon|AMD EPYC), 2 cores, \d{4}-\d\d-\d\d at commit `[0-9a-f]{7,12}`\.", lines[0])
    assert max(len(cell.split()) for line in lines if line.startswith("|") for cell in line.split("|")) <= 15


def test_a_round_on_one_core_stands_beside_others_on_one_core():
    *_, header, _, line = page_figures.rounds_of_fedavg(page_figures.MACHINE)[:5]
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (header, line)), strict=True))
    assert cells["cores"] == "1"
    assert cells["fedkern, two workers"] == "–"
    assert all(cells[name] != "–" for name in ("fedkern, one process", "lean loop", "fluke", "pfl", "FedLab"))


def test_figures_are_written_where_they_stand(root):
    assert pages.fill(TEXT.replace("Of 3 runs.", "Of 9"), PAGE) == TEXT
    (root / "docs/tables/some-rates.csv").write_text("a,rate\nb,1.6 %\n")
    assert pages.faults(TEXT, PAGE, root) == ['docs/some.md: "b,1.6 %" should be "b,1.5 %"']


TABLES = {"fusefl": ("fusefl_calibration", "Dirichlet 0.1: FuseFL"), "fediod": ("fediod_rivals", "MNIST 0.1: FedIOD")}
"""Cells of tables where they are not the command's own."""


@pytest.mark.parametrize("method", [method for method in COMMANDS if method in load("page_commands")])
def test_a_pages_command_gave_its_tables_figure(method):
    """The figure is within two standard deviations of the table's three seeds, or the page says otherwise.

    The page uses the words that the command prints.
    """
    row, command = load("page_commands")[method], COMMANDS[method]
    assert row["command"] == command.text()
    values = page_figures.figures(*TABLES.get(method, (command.study, command.cell)), command.figure)
    page = (pages.ROOT / f"docs/{method}.md").read_text()
    if abs(row["figure"] - mean(values)) > 2 * stdev(values):
        assert "expect other numbers from the command below" in " ".join(page.split())
    assert row["command"] in " ".join(page.replace("\\\n", " ").split())


def test_the_published_commands_are_the_published_settings():
    text = (pages.ROOT / "docs/methods/README.md").read_text().replace("\\\n", " ")
    found = {}
    commands_of = r"^python -m fedkern\.run (.*(?:--lr-steps|critic_layers=2|ccvr_compat).*)$"
    for line in re.findall(commands_of, text, re.MULTILINE):
        config = effective_config(parse_run(shlex.split(line)))
        found[config.method] = config
    assert set(found) == {"fusefl", "fedlpfm", "fediod"}
    fuse = found["fusefl"].options
    cells = published.read_paper(str(pages.ROOT / "benchmarks/studies/fusefl_parts.toml"))
    released = effective_config(
        parse_run(cells.words(cells.find("Dirichlet 0.5: as in the released code").command))
    ).options
    changed = ("final_fuse", "adaptor_init", "frozen_bn", "ccvr_compat")
    assert [fuse[name] for name in changed] == [released[name] for name in changed] == ["sum", "random", "code", True]
    assert found["fusefl"].model == "resnet18"
    assert fuse["width"] == "20"
    paper = found["fediod"]
    assert paper.partition == "dirichlet:1.0:plain"  # neither balanced nor shuffled within a class
    assert paper.options == effective_config(parse_run(["fediod", *stages.FEDIOD.split()])).options
    assert (paper.options["w_real"], paper.options["ndf"], paper.options["holdout"]) == (1, 128, 0)
    assert (found["fedlpfm"].rounds, found["fedlpfm"].lr, found["fedlpfm"].weight_decay) == (600, 0.01, 5e-4)


def test_a_row_tells_the_share_of_the_gap_that_it_closes(monkeypatch):
    def row(table, name, baseline="", **values):
        played = {"values": " ".join(f"{seed[1:]}={value}" for seed, value in values.items())} if values else {}
        gap = dict.fromkeys(("gap", "gap_low", "gap_high"))
        return {"table": table, "name": name, "baseline": baseline, **gap, **played}

    rows = [
        row("free", "goal", s0=0.9, s1=0.94, s2=0.1),
        row("tied", "tied: FedAvg", s0=0.8, s1=0.84),
        row("tied", "tied: half", "tied: FedAvg", s0=0.85, s1=0.89),
        row("tied", "tied: once", "tied: FedAvg", s1=0.89),  # one seed: the gap has no interval
        row("tied", "tied: worse", "tied: FedAvg", s0=0.79, s1=0.83),
        row("tied", "tied: open", "tied: FedAvg"),
        row("noisy", "noisy: FedAvg", s0=0.7, s1=0.94),
        row("noisy", "noisy: half", "noisy: FedAvg", s0=0.8, s1=0.94),
    ]
    monkeypatch.setattr(page_figures, "read_rows", lambda name: {row["name"]: row for row in rows})
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page_figures.list_cells("x", "tied", goal="goal")
    ]
    assert [line[0] for line in cells[2:]] == ["goal", "FedAvg", "half", "once", "worse", "open"]
    assert [line[-1] for line in cells[2:]] == ["", "", "50 %", "", "−10 %", ""]
    assert len(page_figures.list_cells("x", "tied")) == 2 + 5
    assert "%" not in "".join(page_figures.list_cells("x", "noisy", goal="goal"))  # the gap's interval holds 0


# -- recorded ----------------------------------------------------------------------------------------------------------


COMMIT = re.compile(rf"{recorded.UNRECORDED}|[0-9a-f]{{7,12}}(-dirty)?")
FILES = [path for folder in (comparisons.RESULTS, RESULTS) for path in sorted(folder.glob("*.json"))]


def commits(content: dict) -> list[str]:
    """Return the commits that a file names.

    A study names one in every finished row.
    """
    if "rows" in content and "machine" not in content:
        builds = [row["fedkern"] for row in content["rows"] if row["ours"] is not None]
        return [build.partition(" ")[2] for commit in builds for build in commit.split(", ")]
    return [content.get("versions", content.get("machine", content)).get("commit", "")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_result_file_names_its_commit_or_says_unrecorded(path: Path) -> None:
    found = commits(json.loads(path.read_text()))
    assert [commit for commit in found if not COMMIT.fullmatch(commit)] == []


def test_the_commit_is_unrecorded_where_nobody_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "commit", lambda package: "")
    assert recorded.recorded_commit() == "unrecorded"
    monkeypatch.setattr(recorded, "commit", lambda package: f"of {package.name}")
    assert recorded.recorded_commit() == "of benchmarks"


# -- privacy audit -----------------------------------------------------------------------------------------------------


ROWS = json.loads(privacy_audit.RESULT.read_text())["mechanisms"]


def test_no_bound_is_above_its_claim_and_every_defect_is_caught():
    assert [row["mechanism"] for row in ROWS] == [mechanism.name for mechanism in privacy_audit.MECHANISMS]
    for row in ROWS:
        assert row["lower"] <= row["claimed"]
        assert row["caught"]["lower"] > row["caught"]["claimed"]
        assert row["repeats"] >= privacy_audit.REPEATS
        if row["caught"]["defect"] == "half the noise":
            assert row["lower"] > 0.9 * row["claimed"]
        else:
            # Renyi accounting of a shard claims more than half the noise shows; privacy loss distributions do not.
            shards = row["mechanism"].endswith("shards")
            assert row["lower"] < row["half"]["lower"]
            assert (row["half"]["lower"] < row["half"]["claimed"]) == shards


# -- fusefl figure -----------------------------------------------------------------------------------------------------


ROW = {"table": "upload and memory", "ours": 0.4, "values": "0=0.42 1=0.38", "bytes_up": 375_000.0}


def test_played_rows_stand_at_their_upload_and_memory(tmp_path):
    rows = [
        {**ROW, "name": "FuseFL of width 7"},
        {**ROW, "name": "ensemble of width 16", "ours": None},
        {**ROW, "name": "FuseFL as published", "table": "published"},
        {**ROW, "name": "one-shot FedAvg of width 16", "bytes_up": 1_800_000.0},
    ]
    found = fusefl_figure.points(rows)
    assert found["FuseFL of width 7"] == (75_000.0, 77_265, [42.0, 38.0])
    assert found["one-shot FedAvg of width 16"][:2] == (360_000.0, 78_042)
    assert len(found) == 2
    fusefl_figure.draw(rows, tmp_path / "figure.png")
    picture = imread(tmp_path / "figure.png")
    assert picture.shape[1] > 600
    assert picture.std() > 0.05
