"""A missing package ends in one sentence that names the extra."""

from __future__ import annotations

import sys

import pytest

from fedkern.errors import UserError
from fedkern.privacy import need_accounting
from fedkern.privacy.dpsgd import need_opacus


def test_dp_accounting(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match="needs dp-accounting: pip install "):
        need_accounting()


def test_opacus(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(UserError, match="needs opacus: pip install "):
        need_opacus()
