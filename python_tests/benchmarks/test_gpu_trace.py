"""Tests of the reader of profiler traces: made-up traces, and one of a run on the CPU."""

import json

import pytest

from benchmarks.gpu import trace


def event(category, name, begin, length, **fields):
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": length, "tid": 1, **fields}


EVENTS = [
    event("cpu_op", "aten::conv2d", 0, 100),
    event("cpu_op", "aten::convolution", 10, 80),
    event("cuda_runtime", "cudaLaunchKernel", 20, 10),
    event("kernel", "conv", 50, 300, tid=7, args={"stream": 7}),
    event("cpu_op", "aten::item", 120, 400),
    event("cpu_op", "aten::_local_scalar_dense", 130, 380),
    event("cuda_runtime", "cudaMemcpyAsync", 140, 10),
    event("cuda_runtime", "cudaStreamSynchronize", 160, 340),
    event("gpu_memcpy", "Memcpy DtoH", 300, 100, tid=7, args={"stream": 7}),
    event("cuda_runtime", "cudaDeviceSynchronize", 900, 100),
]


def test_waits_and_idle_time_are_counted(tmp_path):
    found = trace.figures(EVENTS)
    assert found["seconds"] == pytest.approx(1e-3)
    assert found["busy"] == pytest.approx(0.35)  # 50 to 400: what overlaps counts once
    assert found["kernels"] == 1
    assert found["waits"] == {
        "aten::_local_scalar_dense": [1, pytest.approx(340e-6)],
        "no operator": [1, pytest.approx(100e-6)],
    }
    trace.draw(EVENTS, tmp_path / "trace.png", "made up")
    assert (tmp_path / "trace.png").stat().st_size > 5000


def test_a_run_on_the_cpu_waits_for_no_gpu(tmp_path, capsys):
    words = [
        "fedavg", "--data", "digits", "--train-samples", "60", "--clients", "2", "--width", "2", "--rounds", "2",
        "--local-steps", "1", "--grad-cam", "0", "--device", "cpu", "--workers", "1", "--quiet",
    ]  # fmt: skip
    for _ in range(2):  # a second time over what the first has left
        assert trace.main([*words, "--out", str(tmp_path)]) == 0
    assert "no GPU, 0 waits" in capsys.readouterr().out
    found = json.loads((tmp_path / "trace.json").read_text())
    assert found["waits"] == {}
    assert found["busy"] is None
    assert found["flags"] == words[1:]
    assert (tmp_path / "trace.png").exists()
    assert trace.main(["fedavg", "--data", "nothing", "--out", str(tmp_path)]) == 2
