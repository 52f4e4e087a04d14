"""Whether a run accelerates a user's network: decided once, on copies and one batch, and stored with the run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.deferred import accelerate, calls
from fedkern.engine.context import RunContext
from fedkern.errors import described
from fedkern.messages.leaves import leaves
from fedkern.models.freezing import train_mode
from fedkern.models.user_models import OwnNetwork
from fedkern.ops._core import backend
from fedkern.settings.config import RunConfig
from fedkern.streams import seeded_generators
from fedkern.tasks.user_tasks import inner

LEAST = 0.5
"""Share of the products of a network's convolutions that operators have to serve: below, nothing is gained
(benchmarks/bench_guest.py)."""

Found = dict[str, Tensor | None]


def decided(context: RunContext, network: nn.Module) -> str:
    """The record of a run: ``"served 9 of 9 convolutions"``, or ``"as written: "`` and why.

    A copy plays a batch of the largest client in both modes, with the task's loss: plain twice; with every step
    deferred but computed by torch's layers, which judges the mechanism; and with operators, which may differ by
    roundings and by a ReLU that one of them flips.
    """
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in inner(network).modules())
    if not convolutions:
        return "as written: it has no convolutions"
    if not backend.active_isa().startswith("avx"):
        return "as written: the compiled core serves AVX2 and AVX-512"
    largest = max(range(len(context.data.clients)), key=lambda k: len(context.data.clients[k]))
    rows = np.arange(min(context.config.batch_size, len(context.data.clients[largest])))
    batch = context.client_data(largest).batch(rows)
    try:
        batch = replace(batch, task=batch.task.with_loss_copied())  # a loss may count its calls
        plain = _played(network, batch)
        if _differs(_played(network, batch), plain, 0.0):
            return "as written: it draws from generators of its own, or changes as it runs"
        network = copy.deepcopy(network)
        accelerate(inner(network))
        with calls.serving_by(lambda chain, dense: None):
            waiting = _played(network, batch)
        if name := _differs(waiting, plain, 1e-5):
            return f"as written: {name} is another one where convolutions wait"
        with calls.recording() as record:
            results = _played(network, batch)
    except Exception as error:  # a network's code may raise anything about a tensor that it does not know
        return f"as written: {described(error)}"
    if (share := worth(record)) < LEAST:
        return f"as written: operators would save work in {share:.0%} of its convolutions"
    if name := _far(results, plain):
        return f"as written: {name} is another one where operators compute it"
    return f"served {len(dict(record[0])) // 2} of {len(record[1]) // 2} convolutions"


def worth(record: calls.Record) -> float:
    """The share of products that operators serve, without what is computed again and what copies cost; at least 0."""
    served = dict(record[0])
    again = sum(products for _, products in record[0]) - sum(served.values())
    moved = calls.MOVE * sum(site.moved for site in served)
    return max(0.0, (sum(served.values()) - again - moved) / max(sum(record[1]), 1))


def as_in_the_run(module: nn.Module, config: RunConfig) -> nn.Module:
    """A finished run's module, whose own networks compute as they did in the run; returns it."""
    for part in module.modules() if config.accelerated else ():
        if isinstance(part, OwnNetwork):
            accelerate(part.module)
    return module


def _played(network: nn.Module, batch: Any) -> Found:
    """Loss, gradients, buffers and evaluated outputs of a copy, by name."""
    module = copy.deepcopy(network)
    with seeded_generators(0):
        train_mode(module)
        loss = batch.task.loss(module, batch)
        loss.backward()
    results: Found = {"the loss": loss.detach()}
    results |= {f"the gradient of {name}": each.grad for name, each in inner(module).named_parameters()}
    results |= {name: each.detach() for name, each in inner(module).named_buffers()}
    module.eval()
    with seeded_generators(0), torch.no_grad():
        answer = [leaf for leaf in leaves(module(batch.inputs)) if isinstance(leaf, Tensor)]
    return results | {f"output {number}": leaf for number, leaf in enumerate(answer)}


def _differs(results: Found, plain: Found, tolerance: float) -> str:
    """The first thing that differs by more than a share of the largest of its kind; empty where nothing does."""
    gradients = [each for name, each in plain.items() if name.startswith("the gradient") and each is not None]
    largest = max((float(each.abs().max()) for each in gradients), default=0.0)
    for name, expected in plain.items():
        result = results.get(name)
        if result is None or expected is None:
            if result is not expected:
                return name
            continue
        scale = largest if name.startswith("the gradient") else float(expected.abs().max()) if expected.numel() else 0.0
        if not torch.allclose(result.double(), expected.double(), rtol=0, atol=tolerance * scale, equal_nan=True):
            return name
    return ""


def _far(results: Found, plain: Found) -> str:
    """What operators have computed too far from torch; empty where nothing is."""
    gradients = {name: each for name, each in plain.items() if name.startswith("the gradient") and each is not None}
    rest = {name: each for name, each in plain.items() if name not in gradients}
    if name := _differs(results, rest, 1e-3):
        return name
    if missing := [name for name in gradients if results[name] is None]:
        return missing[0]
    apart: Mapping[str, float] = {name: float((results[name] - each).norm()) for name, each in gradients.items()}  # type: ignore[operator]
    norm = float(torch.cat([each.flatten() for each in gradients.values()]).norm())
    if sum(each**2 for each in apart.values()) ** 0.5 > 5e-2 * norm:
        return max(apart, key=lambda name: apart[name])
    norms = {name: float(each.norm()) for name, each in gradients.items()}
    return next((name for name in norms if norms[name] > 1e-2 * norm and apart[name] > 0.2 * norms[name]), "")
