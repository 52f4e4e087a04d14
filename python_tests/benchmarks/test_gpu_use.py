"""The watch over a GPU, with NVML's functions replaced."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest

from benchmarks import gpu_use


@pytest.fixture
def nvml(monkeypatch):
    told = SimpleNamespace(used=100, busy=40, open=0, asked=0)

    def memory(handle):
        assert handle == "GPU 1"
        return SimpleNamespace(used=told.used)

    def rates(handle):
        told.asked += 1
        return SimpleNamespace(gpu=told.busy)

    def opened(step):
        told.open += step

    module = SimpleNamespace(
        nvmlInit=lambda: opened(1), nvmlShutdown=lambda: opened(-1), nvmlDeviceGetHandleByIndex="GPU {}".format,
        nvmlDeviceGetMemoryInfo=memory, nvmlDeviceGetUtilizationRates=rates,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return told


def test_the_mean_and_the_most_are_told(nvml):
    with gpu_use.watched(1, every=0.005) as use:
        nvml.used = 900
        limit = time.monotonic() + 10
        while use.taken < 800:
            assert time.monotonic() < limit
            time.sleep(0.001)
        nvml.used, nvml.busy = 300, 80
    assert use.taken == 800
    assert use.utilisation[0] == 40
    assert use.utilisation[-1] == 80
    assert 40 < use.mean < 80
    assert nvml.asked == len(use.utilisation)
    assert nvml.open == 0


def test_a_run_that_fails_ends_the_watch(nvml):
    with pytest.raises(ZeroDivisionError), gpu_use.watched(1):
        raise ZeroDivisionError
    assert nvml.open == 0
