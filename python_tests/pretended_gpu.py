"""Pretended GPU: clients train on the meta device, which computes nothing, and waits are noted.

Meta tensors have shapes but no values, and a device of their own, so operations that would stop the host on a GPU stand
out: reading a value, asking for a number of elements that depends on values, a copy from one device to the other that
is not queued, and tensors of different devices in one operator.  The first three would only cost time, the last would
fail.
"""

import itertools
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fedkern.engine import client
from fedkern.engine.context import RunContext
from fedkern.engine.local import network, training
from fedkern.engine.parts import evaluation
from fedkern.ops import flat

META = torch.device("meta")
COUNTED = {"nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal"}
"""Operators whose result's shape or value the host has to know."""


class Waits(TorchDispatchMode):
    """Record of operations that would stop the host, in all training steps but the first one of every exchange.

    The first step prepares what the others share: caches, frozen copies, banks.

    Attributes:
        found: occurrences by operation and place.
        steps: number of recorded steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.steps = 0
        self.inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__
        if name == "_to_copy" and kwargs.get("device") is not None:
            target = torch.device(kwargs["device"]).type
            if target != given[0].device.type and not kwargs.get("non_blocking"):
                self._note(f"a copy of {list(given[0].shape)} to {target}")
            if given[0].is_meta and target == "cpu":
                return torch.zeros_like(given[0], device="cpu", dtype=kwargs.get("dtype") or given[0].dtype)
        elif name == "copy_" and given[0].is_meta != given[1].is_meta:
            if not (len(args) > 2 and args[2]):
                self._note(f"a copy of {list(given[0].shape)} from {given[1].device}")
            if given[1].is_meta:
                return given[0].zero_()
        elif any(x.is_meta for x in given):
            if name == "_local_scalar_dense":
                self._note("a value that is read")
                return 1.0 if given[0].is_floating_point() else True if given[0].dtype == torch.bool else 1
            masks = name.startswith("index") and any(x.dtype in (torch.bool, torch.uint8) for x in given[1:])
            if name in COUNTED or masks:
                self._note(f"{name}, whose result depends on values")
            ours = func.namespace == "fedkern"  # the host reads the numbers of a call, which lie on the CPU
            if not ours and any(not x.is_meta and (x.dim() or name.startswith("index")) for x in given):
                self._note(f"{name} of tensors on both devices")
        return func(*args, **kwargs)

    def _note(self, action: str) -> None:
        if self.inside:
            frames = [f for f in traceback.extract_stack() if "/fedkern/" in f.filename or "worker" in f.filename]
            where = frames[-1] if frames else traceback.extract_stack()[0]
            self.found[f"{action} ({Path(where.filename).name}: {where.name})"] += 1


def pretend(monkeypatch) -> Waits:
    """Put all clients on the meta device.

    The server and its inputs (zeros) stay on the CPU.
    """
    waits = Waits()
    made: dict[int, tuple[RunContext, RunContext]] = {}
    numbers = itertools.count(1)
    own_init, own_train, own_check = client.Client.__init__, training.train_async, training.check
    own_pointer = Tensor.data_ptr
    step = 0

    def init(self, context, *arguments):
        if id(context) not in made:
            twin = RunContext(context.config, context.data)
            twin.device = twin.networks.device = twin.samples.device = META
            twin.teachers = context.teachers
            made[id(context)] = twin, context
        own_init(self, made[id(context)][0], *arguments)

    def train(*given, **settings):
        nonlocal step
        step = 0
        try:
            return own_train(*given, **settings)
        finally:
            waits.inside = False

    def check():  # called at the beginning of every step
        nonlocal step
        step += 1
        waits.inside = step > 1
        waits.steps += waits.inside
        own_check()

    def gather(records, finite=None):
        waits.inside = False
        return [(outcome.names, 1) for outcome in records], torch.empty(0)

    def add_to_totals(number, phase, groups, values, done, totals, seen):
        for name in {"loss", *(name for names, _ in groups for name in names)}:
            totals[name], seen[name] = 1.0, 1
        return done + len(groups)

    monkeypatch.setattr(client.Client, "__init__", init)
    monkeypatch.setattr(client, "train_async", train)
    monkeypatch.setattr(evaluation, "ClientsFigures", lambda *_: None)  # a network that has values is judged
    monkeypatch.setattr(training, "check", check)
    monkeypatch.setattr(training, "_gather_records", gather)
    monkeypatch.setattr(training, "_add_to_totals", add_to_totals)
    for kind in (network.Network, network.NetworkPart, network.Trainable):
        monkeypatch.setattr(kind, "finite", lambda self: True)
    # FlatParameters takes no tensors without values, and tells tensors apart by their addresses, of which these have
    # none.
    monkeypatch.setattr(flat, "_check_tensors", lambda found: None)
    monkeypatch.setattr(flat, "_check_values", lambda vector, name: None)
    monkeypatch.setattr(flat.FlatParameters, "_stray", lambda self: None)
    monkeypatch.setattr(Tensor, "data_ptr", lambda self: next(numbers) << 40 if self.is_meta else own_pointer(self))
    return waits
