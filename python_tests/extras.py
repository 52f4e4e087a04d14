"""Marks of tests that need an optional package."""

from importlib.util import find_spec

import pytest


def _needs(name):
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed (pip install '.[privacy]')")


needs_accounting = _needs("dp_accounting")
needs_opacus = _needs("opacus")
