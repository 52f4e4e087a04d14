"""Prints the comparisons and, with ``--record``, writes them under benchmarks/results."""

from __future__ import annotations

import harness
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write benchmarks/results/<operator>.json")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not harness.COMPARISONS:
        return
    terminalreporter.section("speed-ups: median of per-pair ratios")
    terminalreporter.write_line(harness.table(harness.COMPARISONS))
    if config.getoption("--record"):
        for path in harness.write_results(harness.COMPARISONS):
            terminalreporter.write_line(f"wrote {path}")
