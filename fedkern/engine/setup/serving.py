"""Acceleration of a user's network, decided once on copies and one batch, and stored with the run."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.acceleration import accelerate, calls
from fedkern.acceleration.comparison import Found, find_difference, find_far_result
from fedkern.engine.context import RunContext
from fedkern.errors import describe_error
from fedkern.messages.leaves import leaves
from fedkern.methods.protocol import Batch
from fedkern.models.state.freezing import train_mode
from fedkern.models.users.user_models import OwnNetwork
from fedkern.ops._core import backend
from fedkern.settings.config import RunConfig
from fedkern.streams import seeded_generators
from fedkern.tasks.user_tasks import user_module

LEAST = 0.5
"""Least share of the products of a network's convolutions from which operators pay (benchmarks/bench_guest.py)."""


def decide_acceleration(context: RunContext, network: nn.Module) -> tuple[str, str | None]:
    """Return a sentence for the run's record, and the plan if the network is accelerated.

    The sentence is ``"served 9 of 9 convolutions"``, or ``"as written: "`` and why.

    A copy runs a batch of the largest client, with the task's loss: plain twice; with every step deferred but computed
    by torch's layers, which checks the mechanism; and with operators, which may differ by roundings and a ReLU that one
    of them flips.
    """
    try:
        return _check_served(context, copy.deepcopy(network))
    except _AsWritten as reason:
        return f"as written: {reason}", None
    except Exception as error:  # a network's code may raise anything about a tensor that it does not know
        return f"as written: {describe_error(error)}", None


class _AsWritten(Exception):
    pass


def _check_served(context: RunContext, network: nn.Module) -> tuple[str, str]:
    if not any(isinstance(layer, nn.Conv2d) for layer in user_module(network).modules()):
        raise _AsWritten("it has no convolutions")
    if not backend.active_isa().startswith("avx"):
        raise _AsWritten("the compiled core serves AVX2 and AVX-512")
    largest = max(range(len(context.data.clients)), key=lambda k: len(context.data.clients[k]))
    rows = np.arange(min(context.config.batch_size, len(context.data.clients[largest])))
    batch = context.samples.of_client(largest).batch(rows)
    batch = replace(batch, task=batch.task.with_loss_copied())  # a loss may count its calls
    plain = _play_batch(network, batch)
    if find_difference(_play_batch(network, batch), plain, 0.0):
        raise _AsWritten("it draws from generators of its own, or changes as it runs")
    plan = _rehearse(network, batch)
    calls.apply_plan(user_module(network), plan)
    with calls.override_calls(serve=lambda chain, dense: None):
        waiting = _play_batch(network, batch)
    if name := find_difference(waiting, plain, 1e-5):
        raise _AsWritten(f"{name} differs when convolutions are deferred")
    record: calls.Record = ([], [])
    with calls.override_calls(record=record):
        results = _play_batch(network, batch)
    if (share := worth(record)) < LEAST:
        raise _AsWritten(f"operators would save work in {share:.0%} of its convolutions")
    if name := find_far_result(results, plain):
        raise _AsWritten(f"{name} differs when operators compute it")
    return f"served {len(dict(record[0])) // 2} of {len(record[1]) // 2} convolutions", plan


def _rehearse(network: nn.Module, batch: Batch) -> str:
    module = copy.deepcopy(network)
    accelerate(user_module(module), check=False)
    for training, gradients in calls.MODES:
        train_mode(module) if training else module.eval()
        with seeded_generators(0), torch.set_grad_enabled(gradients):
            module(batch.inputs)
    return calls.plan_of(user_module(module))


def worth(record: calls.Record) -> float:
    """Return the share of products that operators save, after recomputation and copies, at least 0."""
    served = dict(record[0])
    again = sum(products for _, products in record[0]) - sum(served.values())
    moved = calls.MOVE * sum(site.moved for site in served)
    return max(0.0, (sum(served.values()) - again - moved) / max(sum(record[1]), 1))


def as_in_the_run(module: nn.Module, config: RunConfig) -> nn.Module:
    for part in module.modules():
        if config.plan is not None and isinstance(part, OwnNetwork):
            calls.apply_plan(part.module, config.plan)
    return module


def _play_batch(network: nn.Module, batch: Batch) -> Found:
    module = copy.deepcopy(network)
    with seeded_generators(0):
        train_mode(module)
        loss = batch.task.loss(module, batch)
        loss.backward()
    results: Found = {"the loss": loss.detach()}
    results |= {f"the gradient of {name}": tensor.grad for name, tensor in user_module(module).named_parameters()}
    results |= {name: tensor.detach() for name, tensor in user_module(module).named_buffers()}
    module.eval()
    with seeded_generators(0), torch.no_grad():
        answer = [leaf for leaf in leaves(module(batch.inputs)) if isinstance(leaf, Tensor)]
    return results | {f"output {number}": leaf for number, leaf in enumerate(answer)}
