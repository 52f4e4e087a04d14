"""Checks of a user's network against data, method and the run's start, and its acceleration, decided once."""

from __future__ import annotations

import copy
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.acceleration import accelerate, calls
from fedkern.acceleration.comparison import Found, find_difference, find_far_result
from fedkern.data import FederatedData
from fedkern.data.sources.items import name_cause
from fedkern.engine.batches.reader import trial_batch
from fedkern.engine.context import RunContext
from fedkern.engine.local.linear_pass import LINEAR, has_default_loss, make_pass, play_step
from fedkern.engine.store import initial_weights
from fedkern.errors import RAISED, UserError, describe_error, error_origin
from fedkern.messages.leaves import leaves
from fedkern.messages.states import State
from fedkern.methods import method_registry
from fedkern.methods.protocol import Batch
from fedkern.models import MODELS, Own
from fedkern.models.network_registry import explain_unknown
from fedkern.models.state.freezing import train_mode
from fedkern.models.users.cutting import find_head, find_logits
from fedkern.models.users.linear_chain import linear_chain
from fedkern.models.users.user_models import OwnNetwork, check_output
from fedkern.ops._core import backend
from fedkern.settings.config import RunConfig
from fedkern.streams import seeded_generators
from fedkern.tasks.cross_entropy import too_few
from fedkern.tasks.user_tasks import user_module
from fedkern.usercode.code_identity import digest, hash_layout, identity_table


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
    chain = linear_chain(user_module(network))
    if not chain and not any(isinstance(layer, nn.Conv2d) for layer in user_module(network).modules()):
        raise _AsWritten("it has no convolutions, and is more than linear layers with ReLU between them")
    if not backend.active_isa().startswith("avx"):
        raise _AsWritten("the compiled core serves AVX2 and AVX-512")
    largest = max(range(len(context.data.clients)), key=lambda k: len(context.data.clients[k]))
    rows = np.arange(min(context.config.batch_size, len(context.data.clients[largest])))
    batch = context.samples.of_client(largest).batch(rows)
    batch = replace(batch, task=batch.task.with_loss_copied())  # a loss may count its calls
    plain = _play_batch(network, batch)
    if find_difference(_play_batch(network, batch), plain, 0.0):
        raise _AsWritten("it draws from generators of its own, or changes as it runs")
    if chain:
        return _check_linear(context, network, batch, plain, len(chain))
    plan = _rehearse(network, batch)
    calls.apply_plan(user_module(network), plan.partition(" ")[0])  # nothing waits
    immediate = _play_batch(network, batch)
    calls.apply_plan(user_module(network), plan)
    with calls.override_calls(serve=lambda chain, dense: None):
        waiting = _play_batch(network, batch)
    if name := find_difference(waiting, immediate, 1e-5):
        raise _AsWritten(f"{name} differs when convolutions are deferred")
    record: calls.Record = ([], [])
    with calls.override_calls(record=record):
        results = _play_batch(network, batch)
    if (share := calls.worth(record)) < calls.LEAST:
        raise _AsWritten(f"operators would save work in {share:.0%} of its convolutions")
    if name := find_far_result(results, plain):
        raise _AsWritten(f"{name} differs when operators compute it")
    return f"served {len(dict(record[0])) // 2} of {len(record[1]) // 2} convolutions", plan


def _check_linear(context: RunContext, network: nn.Module, batch: Batch, plain: Found, count: int) -> tuple[str, str]:
    if not has_default_loss(context.config.method_instance, batch.task):
        raise _AsWritten("its loss is more than the cross-entropy of a batch")
    parameters = dict(user_module(network).named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    passing = make_pass(network)
    if passing is None or backend.forced_backend() not in (None, "cpu"):
        raise _AsWritten("a layer is frozen" if passing is None else "another backend is forced")
    loss = play_step(passing, _refuse, batch).loss
    results = plain | {"the loss": loss} | {f"the gradient of {name}": p.grad for name, p in parameters.items()}
    if name := find_far_result(results, plain):
        raise _AsWritten(f"{name} differs when the compiled core computes it")
    return f"served {count} of {count} linear layers", LINEAR


def _refuse(batch: Batch, **_: object) -> NoReturn:
    raise _AsWritten("a sample is not as many fp32 numbers as the first layer takes, or the targets are no classes")


def _rehearse(network: nn.Module, batch: Batch) -> str:
    module = copy.deepcopy(network)
    accelerate(user_module(module), check=False)
    for training, gradients in calls.MODES:
        train_mode(module) if training else module.eval()
        with seeded_generators(0), torch.set_grad_enabled(gradients):
            module(batch.inputs)
    return calls.plan_of(user_module(module))


def as_in_the_run(module: nn.Module, config: RunConfig) -> nn.Module:
    for part in module.modules():
        if config.plan not in (None, LINEAR) and isinstance(part, OwnNetwork):
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


def find_facts(
    config: RunConfig, data: FederatedData, stored: RunConfig | None, out: Path, *, known: bool
) -> tuple[State, FederatedData, list[str]]:
    """Try the network of a run and describe it.

    ``model_sha256`` and ``model_layout`` describe a user's network, ``init_sha256`` a file of initial weights.

    Returns:
        Settings that describe the network, the data with the network's classes if nobody named them, and sentences for
        the user.
    """

    # The file of --init is fixed by its hash.
    facts: State = {}
    if config.init is not None:
        facts["init_sha256"] = initial_weights.sha256(config.init) if stored is None else stored.init_sha256
        config = config.replace(**facts)

    # Built-in networks of images fit by construction, unless a setting changes them.
    if (entry := MODELS.get(config.model)) is None:
        raise UserError(explain_unknown(config.model))
    from_user = isinstance(entry.make, Own)
    is_of_images = bool(data.form.offers)
    if not from_user and not (config.init or config.features or config.stages) and is_of_images:
        return facts, data, []
    context = RunContext(config, data)
    network = context.networks.build()
    notes = [context.networks.unfit] if context.networks.unfit and stored is None else []
    if not from_user:
        return facts, data, notes

    # A user's network is tried on samples, or its output shape is checked.
    make: Any = entry.make
    if not is_of_images:
        data, output_bytes = _try_network(network, make, data)
        facts["output_bytes"] = output_bytes if stored is None else stored.output_bytes
        network = RunContext(config, data).networks.build()
    else:
        data = _with_classes(network, data)
        classes, form = len(data.classes), data.form
        check_output(network, make.text, form, data.task.output(classes, form.shape[1:]), classes, config.data)

    # A resumed run keeps what was decided at its start.
    method_registry.check_network(config.method, config.method_instance.needs, network, data, make.text)
    facts["model_layout"], facts["model_sha256"] = hash_layout(network.state_dict()), network_hash(make)
    if stored is not None:
        if stored.model_layout not in (None, facts["model_layout"]):
            raise UserError(
                f"The network {make.text} has other parameters than when the run in {out} began: put its code back, or "
                "start a new run."
            )
        if isinstance(make.source, nn.Module) and stored.model_sha256 not in (None, facts["model_sha256"]):
            notes.append(
                f"The network {make.text} has other initial weights since the run in {out} began, and a client that "
                "has not trained yet may start from them: call torch.manual_seed before you make it, or give its class."
            )
        facts["model_layout"] = stored.model_layout or facts["model_layout"]
        facts["served"], facts["plan"] = stored.served, stored.plan
    elif config.accelerate == "auto" and config.device == "cpu" and config.precision == "fp32" and known:
        facts["served"], facts["plan"] = decide_acceleration(RunContext(config, data), network)
    return facts, data, notes


@torch.no_grad()
def gives_probabilities(context: RunContext) -> bool:
    """Return whether a user's network ends in a softmax, although its loss is a cross-entropy of logits."""
    entry, form, takes_logits = MODELS.get(context.config.model), context.data.form, context.data.task.takes_logits
    if not takes_logits or not isinstance(getattr(entry, "make", None), Own):
        return False
    network = context.networks.build().eval()
    with suppress(Exception), seeded_generators(0):  # a network's code may raise anything, which the run itself reports
        rows = find_logits(network(form.noise(2, np.random.default_rng(0))))
        certain = torch.allclose(rows.sum(1), torch.ones(())) and bool((rows >= 0).all())
        return certain and rows.dim() > 1 and rows.shape[1] > 1
    return False


def network_hash(make: Own) -> str | None:
    if isinstance(make.source, nn.Module):
        return digest(identity_table({"weights": dict(make.source.state_dict())}, limit=sys.maxsize))
    return make.sha256


def _try_network(network: nn.Module, make: Own, data: FederatedData) -> tuple[FederatedData, int]:
    """Return the data with the network's classes and head, and the bytes of a sample's outputs.

    Bytes count outputs and targets if a user's loss may take a whole set at once, else 0. The loss is not called here
    but checked in the first training steps (`fedkern.engine.local.first_steps`), as one more call would change a loss
    that counts. With a loss of a model and a batch, which may call the network in any way, nothing is tried.
    """
    offers = data.task.offers
    if not offers & {"criterion", "classes"}:
        return data, 0
    split = next(filter(len, data.clients))  # a node has samples of its client alone
    batch = trial_batch(split, range(min(2, len(split))))
    largest = max(map(len, (*data.tests.values(), data.validation)))

    def play_last() -> tuple[object, object]:
        last = trial_batch(split, range(max(0, len(split) - 3), len(split)))
        return network(last.inputs), last.targets

    network.eval()
    try:
        with seeded_generators(0):
            outputs = network(batch.inputs)
            output_bytes = data.task.output_bytes((outputs, batch.targets), play_last, largest)
    except UserError:
        raise
    except RAISED as error:  # a network's code may raise anything
        raise UserError(
            f"the network {make.text} fails on two samples of {split.name}, {', '.join(data.form.shapes)} "
            f"({name_cause(error)}){error_origin(error, type(user_module(network)))}: it gets an item's parts but the "
            "last, or a dict's keys but its label; a collate_fn picks others: (x, targets), or (x, y, targets) for two."
        ) from error
    network.train()
    if "classes" in offers:
        count = _classes(outputs, batch.targets, make.text, getattr(data.task, "ignored", -100))
        if len(data.classes) > count:
            raise UserError(
                f"the network {make.text} has {count} outputs, but the data have {len(data.classes)} classes: "
                "give the network as many outputs, or name other classes."
            )
        data = replace(data, classes=data.classes or tuple(map(str, range(count))))
    if isinstance(batch.inputs, Tensor):
        with suppress(Exception), seeded_generators(0):  # the network then has no head that a method could use
            data = replace(data, form=replace(data.form, head=find_head(user_module(network), batch.inputs)))
    return data, output_bytes


def _with_classes(network: nn.Module, data: FederatedData) -> FederatedData:
    """Return a user's data with as many numbered classes as the network has, if the data have fewer."""
    count = len(data.classes)
    if not data.sights or data.classes != tuple(map(str, range(count))):
        return data
    with suppress(Exception), torch.no_grad(), seeded_generators(0):  # `check_output` reports failures
        outputs = find_logits(network.eval()(data.form.noise(2, np.random.default_rng(0)))).shape[1]
        data = replace(data, classes=tuple(map(str, range(max(count, outputs)))))
    network.train()
    return data


def _classes(outputs: object, targets: Tensor, text: str, ignored: int) -> int:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != len(targets):
        shape = f", not {list(outputs.shape)}" if isinstance(outputs, Tensor) else " alone"
        raise UserError(f"the network {text} must return logits [samples, classes]{shape}: or give a loss_fn.")
    if (largest := int(targets.where(targets != ignored, 0).max())) >= outputs.shape[1]:
        raise UserError(too_few(outputs, largest, f"the network {text}"))
    return outputs.shape[1]
