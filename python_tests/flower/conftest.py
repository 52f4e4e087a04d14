"""Flower in tests: nothing leaves the machine, and its files lie in a folder of the tests' own."""

from __future__ import annotations

import os
import tempfile

_HOME = tempfile.TemporaryDirectory(prefix="fedkern-tests-flower-", ignore_cleanup_errors=True)
os.environ["FLWR_HOME"] = _HOME.name
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
