"""Tests of papers as files: the format, its refusals, the flags of commands, and the papers that fedkern ships."""

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
        ("[[cells]", "it is no TOML"),
        (CELL + "publshed = 1", 'cell "a": there is no key "publshed"'),
        (CELL.replace('figure = "accuracy"\n', ""), 'cell "a": figure is missing'),
        (CELL.replace("0.9", '"0.9"'), 'published must be a number, not "0.9"'),
        (CELL.replace("0.9", "90.0"), "accuracy is a fraction from 0 to 1"),
        (CELL.replace("tolerance = 0.01", ""), "needs a tolerance"),
        (CELL + "seeds = 0", "--seeds must be"),
        (CELL + 'sweep = "lr=1"', "sweep must be a list of texts"),
        (CELL + 'sweep = ["lr"]', "--sweep needs the form"),
        (CELL + 'scale = "small"', 'scale must be paper or smaller, not "small".'),
        (CELL + 'smaller = "3 rounds"', 'scale = "smaller" and smaller go together'),
        (CELL + 'scale = "smaller"\nsmaller = "3 rounds"', "it needs a baseline"),
        (CELL + 'baseline = "b"', 'mine has no cell "b"'),
        (CELL + 'before = "b"', 'there is no entry "b" of before'),
        (CELL + 'target = "accuracy=0.9"', 'the figure "rounds" and a target go together'),
        (CELL + CELL, 'the name "a" is there twice'),
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
    assert said.replace('not "0.9"', "not '0.9'") in str(error.value)


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


def test_the_pages_paper_is_in_the_format(write):
    page = (Path(__file__).parents[2] / "docs" / "reproducing.md").read_text()
    paper = published.read_paper(write(page.partition("```toml\n")[2].partition("```")[0]))
    assert [cell.baseline for cell in paper.cells] == ["", "FedAvg"]


def test_fedkern_ships_papers():
    assert "mcmahan2017" in published.list_papers()
