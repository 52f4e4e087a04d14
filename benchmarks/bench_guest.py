"""Benchmark of training steps under fedkern.accelerate, beside the plain network, channels-last and torch.compile.

The networks are those of guests.py, as people write them.  A step is forward, cross-entropy, backward and torch's SGD.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fedkern
from benchmarks.baselines import Absent
from benchmarks.guests import GUESTS
from benchmarks.harness import compare

STEPS = 5  # at a time: a loop trains one network, whose code stays in the caches


def train_steps(network: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001)

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(call(x), y).backward()
            optimizer.step()

    return steps


def train_channels_last(network: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None] | Absent:
    """Return the steps in channels-last, which `view` in a network's forward refuses."""
    network, x = network.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    try:
        network(x)
    except RuntimeError as error:
        return Absent(str(error))
    return train_steps(network, network, x, y)


@pytest.mark.parametrize("batch", [8, 32])
@pytest.mark.parametrize("name", GUESTS)
def test_guest(node: str, name: str, batch: int, threads: int) -> None:
    make, shape = GUESTS[name]
    network = make()
    x, y = torch.randn(batch, *shape), torch.randint(10, (batch,))
    served, compiled = fedkern.accelerate(copy.deepcopy(network)), copy.deepcopy(network)
    compare(
        node,
        "guest",
        f"{name}, B={batch}",
        {
            "fedkern": train_steps(served, served, x, y),
            "eager": train_steps(network, network, x, y),
            "channels_last": train_channels_last(copy.deepcopy(network), x, y),
            "compile": train_steps(compiled, torch.compile(compiled, dynamic=False), x, y),
        },
        threads=threads,
    )
