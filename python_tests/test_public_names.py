"""Tests of public names: changes are deliberate, and texts for users name none of fedkern's private packages."""

import importlib
import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedkern
from python_tests.public_names import MODULES
from python_tests.test_build import run_python

ROOT = Path(__file__).resolve().parent.parent
PRIVATE = re.compile(r"(?:fedkern\.|from fedkern import [^\n]*\b)(?:engine|settings|downstream|messages)\b")
DEVELOPERS = {"docs/architecture.md"}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".ipynb", ".md", ".toml"))


def for_users(path: Path) -> str:
    """Return the text of a file without its parts for developers."""
    text = path.read_text()
    return text[text.index("## Compatibility") :] if path.name == "CONTRIBUTING.md" else text


def docstrings(module: str) -> Iterator[tuple[str, str]]:
    """Yield the docstrings of a module, of its public names and of their public members, by name."""
    found = importlib.import_module(module)
    yield module, inspect.getdoc(found) or ""
    for name in found.__all__:
        value = getattr(found, name)
        yield f"{module}.{name}", inspect.getdoc(value) or ""
        for member, descriptor in vars(value).items() if isinstance(value, type) else ():
            if not member.startswith("_") and hasattr(descriptor, "__get__"):
                yield f"{module}.{name}.{member}", inspect.getdoc(getattr(value, member)) or ""


@pytest.mark.parametrize(
    "path", [path for path in (*PAGES, *EXAMPLES) if str(path.relative_to(ROOT)) not in DEVELOPERS],
    ids=lambda path: str(path.relative_to(ROOT)),
)  # fmt: skip
def test_a_page_names_no_private_package(path: Path) -> None:
    assert PRIVATE.findall(for_users(path)) == []


@pytest.mark.parametrize("module", MODULES)
def test_public_docstrings_name_no_private_package(module: str) -> None:
    texts = dict(docstrings(module))
    assert len(texts) > 5
    assert [name for name, text in texts.items() if not text or PRIVATE.search(text)] == []


def test_events_of_a_run_come_from_a_public_place() -> None:
    from fedkern import listeners

    assert {"Listener", "RunInfo"} <= set(listeners.__all__)
    assert inspect.signature(listeners.Listener.on_start).parameters["run"].annotation == "RunInfo"


def test_public_names_change_on_purpose() -> None:
    program = "runpy.run_module('python_tests.public_names', run_name='__main__')"
    done = run_python(f"import runpy, sys; sys.path.append({str(ROOT)!r}); {program}")
    assert done.returncode == 0, done.stderr
    listed = (ROOT / "python_tests" / "public_names.txt").read_text()
    assert done.stdout.splitlines() == listed.splitlines(), "a stored run, command or program of a user may break"


def test_no_public_name_is_a_module() -> None:
    assert [name for name in fedkern.__all__ if isinstance(getattr(fedkern, name), types.ModuleType)] == []
