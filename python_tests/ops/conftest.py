"""What every operator test shares: which backends and ISA levels there are here."""

from __future__ import annotations

import operator_cases
import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", operator_cases.BACKENDS, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest):
    """Each available backend and ISA level in turn; active during the test."""
    with operator_cases.using(request.param):
        yield request.param
