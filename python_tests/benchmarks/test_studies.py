"""Every run that a study asks for is a command line that the program takes, and every table can be written."""

import json
from collections import defaultdict

import pytest

from benchmarks.studies import (
    fusefl_alike,
    study,
    study_compress,
    study_feddra,
    study_fedgid,
    study_fusefl,
)
from fedkern.cli import command_parser, flags, request
from fedkern.cli.commands import reproduce
from fedkern.comparison import published
from fedkern.comparison.cells import read_sweep, variants
from fedkern.settings import config

FIGURES = (
    "accuracy", "validation_accuracy", "vote_accuracy", "cue_tied_accuracy", "cue_random_accuracy", "backdoor_accuracy",
    "probability_accuracy", "bytes_up", "bytes_down", "levels_up_bytes", "levels_down_bytes", "round",
)  # fmt: skip


class Metrics(defaultdict):
    """Any figure there may be."""

    def get(self, name, default=None):
        return self[name]


def dry(kind, asked):
    class Dry(kind):
        def run(self, cases):
            for case in cases:
                assert asked.setdefault(case.name, case) == case
                ledger = {"up": 8, "down": 8, "clients": {"0": {"up": 8, "down": 8}}}
                said = {"refused-upload-0": "It was left out."}
                self.summaries[case.name] = {"clients": 5, "seconds": 1.0, "bytes": ledger, "diagnostics": said}

        def metrics(self, case):
            assert case.name in self.summaries
            return Metrics(lambda: 0.5)

        def rounds(self, case):
            assert case.name in self.summaries
            clients = {"clients": {"0": dict.fromkeys(study_feddra.LATE.values(), 0.5)}}
            figures = {**dict.fromkeys(FIGURES, 0.5), "bytes_up": 8}
            return [{"name": name, **clients, **figures} for name in ("train", "calibrate")]

    return Dry


def write_sections(module, runs):
    """Check that all tables of a study can be written."""
    for section in module.SECTIONS.values():
        page, numbers = section(runs)
        assert page.startswith("## ")
        assert numbers


def parse_cases(cases, tmp_path):
    """Check that every case is a command line that the program takes."""
    for case in cases:
        request.effective(flags.parse([*case.arguments, "--out", str(tmp_path / "run")]))


def one_per_shape(cases):
    """Return one case of every method, set of flags and values of options."""
    shapes = {}
    for case in cases:
        words = tuple(word for word in case.arguments if word.startswith("--") or "=" in word)
        shapes.setdefault((case.arguments[0], words), case)
    return shapes.values()


@pytest.mark.parametrize(("module", "kind"), [
    (study_fusefl, study_fusefl.FuseFLRuns), (study_compress, study_compress.CompressRuns),
])  # fmt: skip
@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_every_case_is_a_command_line(module, kind, name, monkeypatch, tmp_path):
    monkeypatch.setattr(study_fusefl, "probe", lambda folder, blocks: [0.1, 0.2])
    found = {"accuracy": 0.5}
    monkeypatch.setattr(fusefl_alike, "recalibrate", lambda folder, wanted: {one.name: found for one in wanted})
    asked = {}
    settings = {"data_root": str(tmp_path)} if name == "cifar10" else {}
    runs = dry(kind, asked)(module.STUDIES[name], tmp_path, 2, settings)
    write_sections(module, runs)
    parse_cases(one_per_shape(asked.values()), tmp_path)


@pytest.mark.parametrize("path", sorted(study.RESULTS.parent.glob("*.toml")), ids=lambda path: path.stem)
def test_cells_of_a_file_are_command_lines_of_different_runs(path, tmp_path):
    paper = published.read(str(path))
    assert paper.name not in published.names()  # whose default folder has another table
    asked = command_parser.parse(["reproduce", str(path), "--data-root", str(tmp_path)])
    runs = []
    for cell in paper.cells:
        command = reproduce.command_of(asked, paper.words(cell.command, tmp_path))
        for point in variants([command.method], read_sweep(cell.sweep), command.names)[command.method]:
            runs.append((cell.table, cell.figure, command.make(point, cell.seeds[0]).to_toml()))
    assert len(set(runs)) == len(runs)


@pytest.mark.parametrize("name", study_fedgid.STUDIES)
def test_every_case_of_fedgid_is_a_command_line(name, tmp_path):
    asked = {}
    settings = {"data_root": str(tmp_path)} if name == "colormnist" else {}
    runs = dry(study_fedgid.FedGIDRuns, asked)(study_fedgid.STUDIES[name], tmp_path, 2, settings)
    rows = {section: make(runs)[0] for section, make in study_fedgid.SECTIONS.items()}
    assert all(f"| {name} |" in rows["baselines"] for name in study_fedgid.BASELINES)
    assert all(f"| {name} |" in rows["parts"] for name in study_fedgid.PARTS)
    parse_cases(asked.values(), tmp_path)


@pytest.mark.parametrize("name", study_feddra.STUDIES)
def test_every_case_of_feddra_is_a_command_line(name, tmp_path):
    asked = {}
    runs = dry(study_feddra.DRARuns, asked)(study_feddra.STUDIES[name], tmp_path, 2, {})
    write_sections(study_feddra, runs)
    parse_cases(asked.values(), tmp_path)


def test_late_figures_are_of_the_last_third_of_the_rounds(tmp_path):
    class Recorded(study_feddra.DRARuns):
        def rounds(self, case):
            return [
                {"clients": {"0": {"drift": one}, "1": {"drift": 2.0 * one}}} for one in (9.0, 9.0, 9.0, 9.0, 2.0, 4.0)
            ]

    runs = Recorded(study_feddra.STUDIES["tiny"], tmp_path, 1, {})
    assert runs.late(runs.of(study_feddra.FULL, 0.1, 0), "drift") == pytest.approx(4.5)


def test_a_compressed_run_stands_beside_as_many_bytes_of_whole_uploads(tmp_path):
    """The first round that reaches them; a difference is of one seed."""

    class Recorded(dry(study_compress.CompressRuns, {})):
        def rounds(self, case):
            return [{"round": one, "bytes_up": 4 * one, "accuracy": one / 10} for one in (1, 2, 3)]

    runs = Recorded(study_compress.STUDIES["digits"], tmp_path, 1, {})
    case = runs.of("int8", "drop", 0.1, 0)
    runs.run([case])
    stopped = {}
    for sent in (8, 9):
        runs.summaries[case.name]["bytes"]["up"] = sent
        figures = runs.figures(case, case)
        stopped[sent] = figures["stopped"]
    assert figures["late"] == pytest.approx(0.2)
    assert stopped == {8: {"round": 2, "accuracy": 0.2}, 9: {"round": 3, "accuracy": 0.3}}

    def row(*values):
        common = {"late": 0.35, "up": 1e6, "down": 2e6, "stopped": stopped[8]}
        return {"lr": 0.1, "runs": [{"accuracy": one, **common} for one in values]}

    rows = {"none": row(0.4, 0.6), "int8": row(0.3, 0.5), "none, 2 rounds of 10 epochs": row(0.2, 0.2)}
    numbers = {f"{name}, {buffers}": one for buffers in study_compress.BUFFERS for name, one in rows.items()}
    whole, int8, fewer, *_ = study_compress.cells({**numbers, "rates": [0.1], "settings": {}})
    assert whole[5:] == ["50.0 ± 14.1", "", "35.0 ± 0.0", ""]
    assert int8[:5] == ["int8", "average", "0.1", "1.00", "2.00"]
    assert int8[5:] == ["40.0 ± 14.1", "-10.0 ± 0.0", "35.0 ± 0.0", "20.0 ± 0.0, round 2"]
    assert fewer[5:] == ["20.0 ± 0.0", "-30.0 ± 14.1", "", ""]


def test_best_rate_is_the_lower_one_on_a_tie():
    assert study.best_rate({0.1: [0.5, 0.7], 0.01: [0.6, 0.6], 0.05: [0.1, 0.9]}) == 0.01
    assert study.best_rate({0.1: [0.5], 0.01: [0.4]}) == 0.1


def test_transfer_seconds():
    assert study.transfer_seconds(1.25e6, 10) == pytest.approx(1.0)


@pytest.mark.parametrize("found", ["abc1234", None])
def test_a_page_names_the_commit_of_its_runs(found, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    versions = {"fedkern": "1.0", "torch": "2.0", **({"commit": found} if found else {})}
    study.publish("some_table", "Title", "About.", "## Page\n", {"a": 1}, versions)
    page = (tmp_path / "results" / "some_table.md").read_text()
    assert page.startswith(f"# Title\n\nAbout.  fedkern 1.0 at commit {found or 'unrecorded'}, torch 2.0")
    assert page.endswith("## Page\n")
    assert '"versions"' in (tmp_path / "results" / "some_table.json").read_text()


def begun(folder, case):
    """A run folder as a case leaves it behind, finished."""
    run = folder / case.name
    run.mkdir(parents=True)
    (run / "config.toml").write_text(request.effective(flags.parse([*case.arguments, "--threads", "1"])).to_toml())
    (run / "summary.json").write_text('{"metrics": {}}')
    run.with_name(run.name + ".arguments.json").write_text(json.dumps(case.arguments))


def test_a_folder_made_with_other_settings_or_defaults_is_refused(monkeypatch, tmp_path):
    case = study.Case("one", study.arguments("fedprox", {"rounds": 2, "seed": 3}, {"mu": 0.1}))
    begun(tmp_path, case)
    assert study.run([case], tmp_path) == {"one": {"metrics": {}}}
    other = study.Case("one", study.arguments("fedprox", {"rounds": 2, "seed": 4}, {"mu": 0.1}))
    with pytest.raises(SystemExit, match="one was made with other settings"):
        study.run([other], tmp_path)
    usual = config.defaults
    monkeypatch.setattr(config, "defaults", lambda method, data: {**usual(method, data), "lr": 0.0123})
    with pytest.raises(SystemExit, match=r"one was made with other defaults \(lr: .* -> 0\.0123\)"):
        study.run([case], tmp_path)


def test_what_a_failing_run_says_last_is_repeated(tmp_path):
    case = study.Case("bad", ("fedavg", "--data", "mnist", "--data-root", str(tmp_path / "missing")))
    with pytest.raises(SystemExit, match=r"bad failed with exit code 2: error: .*missing"):
        study.run([case], tmp_path / "runs", workers=1)


def test_learning_rates_are_those_of_the_same_settings_and_grid(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    content = {"FedAvg": {"lr": 0.1}, "settings": {"rounds": 3}, "rates": [0.1, 0.3], "versions": {}}
    (tmp_path / "table.json").write_text(json.dumps(content))
    assert study.stored_rates("table", {"rounds": 3}, (0.1, 0.3)) == {"FedAvg": 0.1}
    assert study.stored_rates("table", {"rounds": 3}, (0.1, 0.3, 0.9)) == {}
    assert study.stored_rates("table", {"rounds": 4}, (0.1, 0.3)) == {}
    assert study.stored_rates("none", {"rounds": 3}, (0.1, 0.3)) == {}
