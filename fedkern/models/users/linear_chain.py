"""Networks that are linear layers with ReLU between them, recognised by their code."""

import dis
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fedkern.acceleration.layers import GLOBAL_HOOKS, has_hooks

_NAMES = frozenset({"F", "functional", "nn", "torch", "relu", "flatten", "view", "reshape", "size", "shape"})
"""Names that the code of such a network may use beside those of its layers."""
_LAYERS = nn.Linear, nn.ReLU, nn.Flatten, nn.Identity
_PLAIN = *_LAYERS, nn.Sequential, nn.ModuleList, nn.ModuleDict
_CHANGES = "POP_JUMP", "STORE_ATTR", "MAKE_FUNCTION"
"""Begins of names of instructions that such code lacks."""
_KINDS: dict[Any, str] = {
    nn.Linear: "linear", nn.ReLU: "relu", nn.Flatten: "flat", nn.Identity: "same", F.relu: "relu", torch.relu: "relu",
    torch.flatten: "flat", "relu": "relu", "flatten": "flat", "view": "flat", "reshape": "flat",
}  # fmt: skip
_BESIDE = getattr, operator.getitem, "size"
"""What asks for a shape, on the way to a ``view``."""


def linear_chain(network: nn.Module) -> list[nn.Linear] | None:
    """Return the linear layers of a network that is nothing else, in order, or None.

    It flattens its input, if anything, and has ReLU between its layers. Its code has no branch, changes nothing and
    calls nothing else, so that what one call does, every call does. A ``view`` may still mix samples.
    """
    parts = [*network.modules()]
    of_parameters = [p._backward_hooks or p._post_accumulate_grad_hooks for p in network.parameters()]
    if any((*GLOBAL_HOOKS, *of_parameters, *map(has_hooks, parts))) or not all(map(_is_plain, parts)):
        return None
    if isinstance(network, nn.Linear):
        return [network]
    try:
        graph = _Tracer().trace(network)
    except Exception:  # code may do anything with what stands for a tensor
        return None
    layers: list[nn.Linear] = []
    value, last = None, "start"
    for node in graph.nodes:
        if node.op == "placeholder" and value is None:
            value = node
        elif node.op == "output":
            return layers if node.args[0] is value and last == "linear" else None
        elif node.target not in _BESIDE:
            layer = network.get_submodule(node.target) if node.op == "call_module" else None
            kind = _KINDS.get(node.target if layer is None else _kind(layer), "")
            if not node.args or node.args[0] is not value or (kind, last) not in _ORDER or layer in layers:
                return None
            if isinstance(layer, nn.Linear):
                layers.append(layer)
            value, last = node, last if kind in ("flat", "same") else kind
    return None


_ORDER = {("flat", "start"), ("same", "start"), ("same", "linear"), ("same", "relu"), ("linear", "start"),
          ("relu", "linear"), ("linear", "relu")}  # fmt: skip
"""Pairs of a step and what the last one but flattening was."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LAYERS)


def _kind(part: nn.Module) -> type[nn.Module] | None:
    """Return the class in `_PLAIN` that a part, perhaps of a subclass, is made of."""
    return next((kind for kind in _PLAIN if isinstance(part, kind)), None)


def _is_plain(part: nn.Module) -> bool:
    kind, base = type(part), _kind(part)
    if "forward" in vars(part) or kind.__call__ is not nn.Module.__call__:
        return False
    if base is not None:  # a parametrised layer has its weights elsewhere
        return kind.forward is base.forward and (base is not nn.Linear or {"weight", "bias"} <= part._parameters.keys())
    code = getattr(kind.forward, "__code__", None)
    if code is None or code.co_freevars or not _NAMES.union(part._modules).issuperset(code.co_names):
        return False
    return not any(step.opname.startswith(_CHANGES) for step in dis.get_instructions(code))
