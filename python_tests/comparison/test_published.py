"""Tests of papers as files: the format, its refusals, the flags of commands, and the papers that fedkern ships."""

import re
from pathlib import Path

import pytest

from fedkern.cli import flags
from fedkern.comparison import published
from fedkern.comparison.published import PAPERS, NotHere
from fedkern.errors import UserError

CELL = """
[[cells]]
table = 1
name = "a"
command = "fedavg --lr 0.1"
figure = "accuracy"
published = 0.9
tolerance = 0.01
"""


@pytest.fixture
def write(tmp_path):
    def write_text(text: str) -> str:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return str(path)

    return write_text


def test_defaults_hold_where_a_cell_says_nothing_else(write):
    paper = published.read_paper(write("[defaults]\nseeds = [1, 4]\nminutes = 2\n" + CELL + "minutes = 3\n"))
    (cell,) = paper.cells
    assert (cell.seeds, cell.minutes, cell.table, cell.published) == ((1, 4), 3.0, "1", 0.9)
    assert paper.name == "mine"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there is no cell"),
        ("cells = 1", "cells must be a list of tables"),
        ("cells = [1]", "cell 1 must be a table"),
        ("[[cells]", "it is no TOML"),
        (CELL + "publshed = 1", 'cell "a": there is no key "publshed". Did you mean "published"?'),
        (CELL + "xyzq = 1", 'cell "a": there is no key "xyzq". The keys are name, command, runs'),
        (CELL.replace('name = "a"\n', ""), "cell 1: name is missing"),
        (CELL.replace("0.9", '"0.9"'), "published must be a number, or a percentage such as \"41.5 %\", not '0.9'"),
        (CELL + 'minutes = "3 %"', "minutes must be a number, not '3 %'"),
        (CELL.replace("0.9", "900"), "published must be a fraction from 0 to 1, or a percentage up to 100"),
        (CELL + 'runs = "runs/*"', "recorded runs have no command: leave it out"),
        (CELL.replace("command", "source"), 'command is missing, or runs = "FOLDER"'),
        (CELL.replace('command = "fedavg --lr 0.1"', 'runs = "r"\nseeds = 3'), "recorded runs have no seeds"),
        (CELL + "runs = []", "runs must be a list of texts, not []"),
        (CELL + "runs = [1]", "runs must be a list of texts, not [1]"),
        (CELL + "seeds = 0", "--seeds must be"),
        (CELL + 'sweep = "lr=1"', "sweep must be a list of texts"),
        (CELL + 'sweep = ["lr"]', "--sweep needs the form"),
        (CELL + 'select = "figur"', 'select must be figure or validation, not "figur". Did you mean "figure"?'),
        (CELL + 'smaller = "3 rounds"', "it needs a baseline"),
        (CELL + 'baseline = "b"', 'there is no cell "b" for its baseline'),
        (
            CELL + CELL.replace('"a"', '"b"\nbaseline = "a"').replace('"accuracy"', '"loss"'),
            'cell "b": its figure is loss, but that of its baseline is accuracy: give both the same figure',
        ),
        (CELL + 'before = "b"', 'there is no entry "b" of before'),
        (CELL + 'target = "accuracy=0.9"', 'the figure "rounds" and a target go together'),
        (CELL.replace('"accuracy"', '"rounds"'), 'the figure "rounds" and a target go together'),
        (CELL.replace('figure = "accuracy"', 'target = "high"'), "--target needs the form"),
        (
            CELL.replace('figure = "accuracy"', 'target = "loss=1"').replace("0.9", '"9 %"'),
            "must be a number of rounds",
        ),
        (CELL + CELL, 'cell "a": this name is there twice'),
        (CELL.replace('"a"', '"a,b"'), "no comma"),
        ("words = 1\n" + CELL, "words must be"),
        ("[words]\nx = 1\n" + CELL, "x in words must be a text"),
        ("[defaults]\nunknown = 1\n" + CELL, 'there is no key "unknown"'),
    ],
)
def test_a_file_that_is_not_in_the_format_is_refused(write, text, said):
    path = write(text)
    with pytest.raises(UserError, match=r"mine\.toml") as error:
        published.read_paper(path)
    assert said in str(error.value)


def test_all_mistakes_are_told_at_once(write):
    text = """
        colour = 1
        [defaults]
        table = 1.5
        [[before]]
        minutes = 1
        [[cells]]
        name = "a"
        published = "high"
        baseline = "c"
        [[cells]]
        name = "b"
        command = "fedavg"
        lr = 0.1
        select = "best"
        published = "41.5 %"
        tolerance = 0.005
        baseline = "a"
        [[cells]]
        runs = "mine*"
        sweep = ["lr=1,2"]
        published = 1000
    """
    with pytest.raises(UserError) as error:
        published.read_paper(write(text))
    said, *mistakes = re.split(r" ?\(\d+\) ", str(error.value))
    assert said.endswith(f"mine.toml has {len(mistakes)} mistakes:")
    assert sorted(mistake.partition(".")[0] for mistake in mistakes) == [
        'cell "a": command is missing, or runs = "FOLDER"',
        'cell "a": published must be a number, or a percentage such as "41',
        'cell "a": there is no cell "c" for its baseline',
        'cell "b": select must be figure or validation, not "best"',
        'cell "b": there is no key "lr"',
        'cell "b": tolerance = 0',
        "cell 3: name is missing",
        "cell 3: published must be a fraction from 0 to 1, or a percentage up to 100",
        "cell 3: recorded runs have no sweep: leave it out",
        "defaults: table must be a text, not 1",
        "entry of before 1: command is missing",
        "entry of before 1: name is missing",
        'there is no key "colour"',
    ]


@pytest.mark.parametrize(
    ("keys", "published_value", "tolerance"),
    [
        ("published = 0.415", 0.415, 0.02),
        ("published = 41.5", 0.415, 0.02),
        ('published = "41.5 %"', 0.415, 0.02),
        ('published = "0.5%"', 0.005, 0.02),
        ("published = 1", 1.0, 0.02),
        ("published = 41.5\ntolerance = 0.5", 0.415, 0.005),
        ('published = "0.5 %"\ntolerance = 0.1', 0.005, 0.001),
        ('published = 0.415\ntolerance = "1 %"', 0.415, 0.01),
        ("published = 0.415\ntolerance = 0.01", 0.415, 0.01),
        ('published = 41.5\nfigure = "ood_accuracy"', 0.415, 0.02),
        ('published = 41.5\nfigure = "loss"', 41.5, 2.075),
        ('published = "41.5 %"\nfigure = "hits"\ntolerance = 1', 0.415, 0.01),
        ('published = 87\ntarget = "accuracy=0.97"', 87, 4.35),
    ],
)
def test_a_value_is_a_fraction_or_a_percentage(write, keys, published_value, tolerance):
    (cell,) = published.read_paper(write(f'[[cells]]\nname = "a"\ncommand = "fedavg"\n{keys}\n')).cells
    assert (cell.published, cell.tolerance) == (pytest.approx(published_value), pytest.approx(tolerance))
    assert cell.figure == ("rounds" if "target" in keys else cell.figure)


def test_an_unknown_paper_is_refused():
    with pytest.raises(UserError, match=r'no paper "macmahan2017".*Did you mean "mcmahan2017"'):
        published.read_paper("macmahan2017")
    with pytest.raises(UserError, match=r"nothing\.toml cannot be read: No such file"):
        published.read_paper("nothing.toml")


def test_files_of_code_are_found_beside_the_paper_and_in_a_package(write, tmp_path, monkeypatch):
    paper = published.read_paper(write('[words]\nshared = "--rounds 2"\n' + CELL))
    (tmp_path / "mine.py").write_text("")
    words = paper.words(
        "fedavg {shared} --model mine.py:Net --teachers {before} --method-option a=mine.py:f", Path("/b c")
    )
    own = tmp_path / "mine.py"
    assert words == [
        "fedavg", "--rounds", "2", "--model", f"{own}:Net", "--teachers", "/b c", "--method-option", f"a={own}:f",
    ]  # fmt: skip
    (tmp_path / "phones.toml").write_text("")
    assert paper.words("--devices phones.toml") == ["--devices", str(tmp_path / "phones.toml")]
    (tmp_path / "code").mkdir()
    assert paper.words(f"code/../../{tmp_path.name}/mine.py:Net") == [f"{own}:Net"]
    with pytest.raises(NotHere, match=r"other.py is not beside mine\.toml"):
        paper.words("fedavg --data other.py:Net")
    (tmp_path / "own_tower" / "model").mkdir(parents=True)
    (tmp_path / "own_tower" / "__init__.py").write_text("raise SystemExit('its code is run')")
    with pytest.raises(NotHere, match="package own_tower is missing: pip install own-tower"):
        paper.words("fedavg --text-encoder package:own_tower/model")
    monkeypatch.syspath_prepend(tmp_path)
    own = str(tmp_path / "own_tower" / "model")
    assert paper.words("fedavg --text-encoder package:own_tower/model")[-1] == own
    assert paper.words("fedavg --text-encoder=package:own_tower/model")[-1] == f"--text-encoder={own}"
    with pytest.raises(NotHere, match="package own_tower has no folder other: pip install -U own-tower"):
        paper.words("fedavg --text-encoder package:own_tower/other")
    for malformed in ("own_tower", "own-tower/model", "own_tower/../own_tower", "own_tower//etc"):
        with pytest.raises(UserError, match=f'"package:{malformed}" must be package:NAME/FOLDER') as error:
            paper.words(f"fedavg --text-encoder package:{malformed}")
        assert not isinstance(error.value, NotHere)
    with pytest.raises(UserError, match='unknown}" stands for nothing'):
        paper.words("fedavg {unknown}")
    with pytest.raises(UserError, match="cannot be read: No closing quotation"):
        paper.words('fedavg "')


@pytest.mark.parametrize("name", published.list_papers())
def test_a_paper_that_fedkern_ships_is_in_the_format(name):
    paper = published.read_paper(name)
    assert paper.title
    assert paper.citation
    assert paper.folder == PAPERS
    for cell in paper.cells:
        request = flags.parse_run(paper.words(cell.command, Path("before") if cell.before else None))
        assert request.method
        assert "seed" not in request.settings
        assert cell.minutes > 0
        assert cell.source or cell.published is None


def test_the_page_shows_the_example():
    page = (Path(__file__).parents[2] / "docs" / "reproducing.md").read_text()
    assert page.partition("```toml\n")[2].partition("```")[0] == published.EXAMPLE.read_text()
