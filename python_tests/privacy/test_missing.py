"""Missing packages end in one sentence that names the extra."""

import sys

import pytest

from fedkern.errors import UserError
from fedkern.privacy import need_accounting
from fedkern.privacy.dpsgd import need_opacus


@pytest.mark.parametrize(("package", "need"), [("dp_accounting", need_accounting), ("opacus", need_opacus)])
def test_a_missing_package(monkeypatch, package, need):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs {package.replace('_', '-')}: pip install "):
        need()
