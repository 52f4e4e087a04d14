"""Flower in tests: nothing leaves the machine, and all its files are in the tests' folder."""

import logging
import os
import tempfile

import pytest

_HOME = tempfile.TemporaryDirectory(prefix="fedkern-tests-flower-", ignore_cleanup_errors=True)
os.environ["FLWR_HOME"] = _HOME.name
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


@pytest.fixture
def audible():
    """Let Flower's logger propagate, so that caplog hears it."""
    logger = logging.getLogger("flwr")
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before


@pytest.fixture
def alone(tmp_path, monkeypatch, audible):
    """Put states into the test's folder, and leave nothing of a node behind.

    No picture is drawn, as drawing takes long.
    """
    from fedkern.flower.runs import node_process, server_app

    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(server_app, "draw", lambda *_: None)
    yield
    node_process.drop_clients()
