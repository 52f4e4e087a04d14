"""Tests of commands that install missing extras: pip accepts them in this form."""

import re
import tomllib
from pathlib import Path

import pytest

from fedkern import UserError
from fedkern.process import extras

ROOT = Path(__file__).resolve().parents[2]
OFFERED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
BARE = re.compile(r"[\w-]+")


@pytest.mark.parametrize("extra", extras.PACKAGES)
def test_an_extra_is_installed_from_the_checkout_or_by_its_packages(extra, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert extras.install(extra) == f"pip install '.[{extra}]'"
    (tmp_path / "pyproject.toml").touch()  # of a project of the user's
    for folder in (ROOT / "docs", tmp_path):
        monkeypatch.chdir(folder)
        words = extras.install(extra).removeprefix("pip install ").replace("'", "").split()
        assert [BARE.match(word)[0] for word in words] == [BARE.match(entry)[0] for entry in OFFERED[extra]]


def test_a_package_of_no_extra_is_installed_by_its_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"^to_pandas needs it: pip install pandas\.$"):
        extras.import_extra("to_pandas needs it", "pandas", "fedkern.nothing")


def test_no_sentence_installs_fedkern_from_an_index():
    """No index has fedkern: whoever registers the name would control what such a command installs."""
    folders = ("fedkern", "python_tests", "examples", "docs", "benchmarks")
    places = [path for name in folders for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".md", ".toml")]
    for path in [*places, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        if path.name != Path(__file__).name:
            assert not re.search(r"pip install \S*fedkern\[", path.read_text("utf-8")), path
