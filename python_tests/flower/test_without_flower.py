"""Imports without Flower, which end in one sentence."""

import importlib.util

import pytest

from fedkern.errors import UserError


@pytest.mark.skipif(importlib.util.find_spec("flwr") is not None, reason="flwr is installed")
def test_the_import_says_what_to_install():
    with pytest.raises(UserError, match="needs Flower, which is not installed: pip install "):
        import fedkern.flower.strategies  # noqa: F401
