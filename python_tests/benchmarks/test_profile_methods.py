"""Tests of the profiler: every second belongs to one part, and all marked functions exist."""

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fedkern
from benchmarks import profile_methods
from benchmarks.profile_methods import (
    BACKWARD,
    BATCHES,
    EVALUATE,
    FORWARD,
    KEEP,
    LOAD,
    NORM,
    OPERATORS,
    OTHER,
    OURS,
    PARTS,
    PRODUCTS,
    PYTHON,
    REGIONS,
    STEP,
    WHOLE,
)  # fmt: skip
from fedkern import ops


@dataclass
class Event:
    name: str
    self_cpu_time_total: float
    cpu_parent: Any = None
    thread: int = 1


def test_every_event_counts_once_for_its_region_or_its_operator():
    run = Event(f"fedkern/{WHOLE}", 1e6)
    judged = Event(f"fedkern/{EVALUATE}", 2e6, run)
    taken = Event(f"fedkern/{BATCHES}", 3e6, run)
    backward = Event("autograd::engine::evaluate_function: ConvolutionBackward0", 4e6, run)
    events = [
        run, judged, taken, backward,
        Event("aten::conv2d", 10e6, judged),
        Event(f"fedkern/{BATCHES}", 20e6, judged),
        Event("aten::index_select", 30e6, taken),
        Event("aten::fill_", 40e6, backward),
        Event("aten::native_batch_norm", 50e6, run),
        Event("aten::relu", 60e6, run),
        Event("KLBackward", 70e6, run),
        Event("Optimizer.step#SGD.step", 80e6, run),
        Event("aten::addmm", 90e6, run),
        Event("aten::mkldnn_convolution", 100e6, Event("aten::convolution", 0, run)),
        Event("aten::relu", 1e9, None, thread=2),
    ]  # fmt: skip
    found = profile_methods.divide(events, {"KLBackward"})
    expected = {
        PYTHON: 1, EVALUATE: 32, BATCHES: 33, BACKWARD: 44, NORM: 50, OTHER: 60, OURS: 70, STEP: 80, PRODUCTS: 90,
        FORWARD: 100,
    }  # fmt: skip
    assert {name: value for name, value in found.items() if value} == pytest.approx(expected)
    assert set(found) == set(PARTS)


@pytest.mark.parametrize("path", [*REGIONS, *(f"fedkern.ops:{name}" for name in OPERATORS)])
def test_what_is_marked_is_there(path):
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)


def test_a_run_passes_what_is_marked(monkeypatch, tmp_path):
    simulate = profile_methods.mark_function(fedkern.simulate, WHOLE)  # everything is imported before it is marked
    for path in (*REGIONS, *(f"fedkern.ops:{name}" for name in OPERATORS)):
        module, _, name = path.partition(":")
        holder = importlib.import_module(module)
        *outer, last = name.split(".")
        for name_part in outer:
            holder = getattr(holder, name_part)
        monkeypatch.setattr(holder, last, getattr(holder, last))  # taken back after the test
    profile_methods.mark_all()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        simulate(
            "fedavg", data="digits", model="mlp", train_samples=60, clients=2, rounds=1, local_steps=1, workers=1,
            threads=1, grad_cam=0, out=tmp_path / "run", progress=False, pictures=False,
        )  # fmt: skip
    found = profile_methods.divide(profiler.events(), set())
    assert [part for part in (LOAD, BATCHES, STEP, EVALUATE, OURS, KEEP) if not found[part]] == []


def test_backward_passes_of_our_operators_are_known():
    x = torch.randn(4, 10, requires_grad=True)
    loss = ops.kl_div(x, torch.randn(4, 10))
    assert loss.grad_fn.name() in profile_methods.functions_of_ours()
