"""Tests of a round's use of a GPU."""

import torch

from fedkern.process import device_use


def test_what_a_round_takes_of_a_gpu(monkeypatch):
    """A made-up GPU suffices for the engine's side."""
    assert device_use.figures(torch.device("cpu")) == {}
    gpu, reset = torch.device("cuda", 0), []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 45)
    device_use.begin(gpu)
    assert reset == [gpu]
    assert device_use.figures(gpu) == {"peak_bytes": 123, "utilisation": 45}

    def untold(device):
        raise RuntimeError("not supported")

    monkeypatch.setattr(torch.cuda, "utilization", untold)
    assert device_use.figures(gpu) == {"peak_bytes": 123, "utilisation": None}
