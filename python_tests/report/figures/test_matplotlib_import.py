"""Import of matplotlib at the end of a command, and in a process that continues."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys
{before}
from fedkern.process.interrupts import in_order
from fedkern.report.figures.matplotlib_import import without_docstrings
with in_order(to_the_end={last}):
    try:
        with without_docstrings():
            import matplotlib.lines
            {inside}
    except KeyError:
        pass
from matplotlib.artist import kwdoc
from matplotlib.lines import Line2D
print("solid_capstyle" in Line2D.set.__doc__, "solid_capstyle" in kwdoc(Line2D))
"""


def find_docs(last: bool, before: str = "", inside: str = "pass", **environment: str) -> str:
    """Return whether a line's properties are in its docstring, and whether matplotlib can list them."""
    code = CODE.format(last=last, before=before, inside=inside)
    words, variables = [sys.executable, "-c", code], {**os.environ, **environment}
    return subprocess.run(words, env=variables, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("inside", ["import os; assert os.environ['MPLBACKEND'] == 'nonsense'", "raise KeyError"])
def test_a_command_imports_it_without_tables_of_properties_and_needs_no_backend_of_the_user(inside):
    assert find_docs(True, inside=inside, MPLBACKEND="nonsense") == "False True"


def test_a_script_has_them():
    assert find_docs(False) == "True True"


def test_who_has_imported_it_keeps_them():
    assert find_docs(True, before="import matplotlib.artist") == "True True"
