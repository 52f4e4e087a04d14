"""FusedBlocks: the steps of a block, traced by torch.fx, and the check that M blocks have the same steps."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fedkern.ops._fuse.blocks.unseen import check_plain, check_process, check_tensors, check_tied


class Step(NamedTuple):
    """One operation.  Values are numbered: the block's input is value 0, and step i computes value i + 1.

    Attributes:
        kind: ``"conv"``, ``"linear"``, ``"norm"``, ``"relu"``, ``"channelwise"``, ``"flatten"``, ``"same"``, ``"add"``.
        module: the submodule's name within the block; "" for a function, or for a block that is a single layer.
        inputs: numbers of the values that it reads.
        in_place: whether a sum is written to its first value, whose dtype it then has.
    """

    kind: str
    module: str
    inputs: tuple[int, ...]
    in_place: bool = False


# Modules that treat every channel by itself and have no parameters: they work as they are on M blocks' channels.
CHANNELWISE = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Tanh,
    nn.Sigmoid,
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)

_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    torch.flatten: "flatten",
}
_METHODS = {"relu": "relu", "relu_": "relu", "add": "add", "add_": "add", "flatten": "flatten"}
SUPPORTED = (
    "Conv2d, Linear, BatchNorm, GroupNorm, ReLU and other activations, pooling, Flatten, Identity, Sequential, "
    "sums and ReLUs of values"
)


def trace(block: nn.Module, what: str) -> tuple[Step, ...]:
    """Returns the steps of ``block``, which error messages call ``what``.

    Raises:
        TypeError: FusedBlocks does not support a submodule or function, ``forward`` depends on its input's values, on
            the training mode or on a context, or ``block`` has what a trace cannot see: hooks, replaced methods,
            tensors that no layer uses, values that are read after an operation in place has changed them.
    """
    if not isinstance(block, nn.Module):
        raise TypeError(f"{what} must be a module, not {type(block).__name__}")
    check_process()
    modules = dict(block.named_modules())
    for name, module in modules.items():
        check_plain(module, f"{what}.{name}" if name else what, layer=_kind(module) is not None)
    if _kind(block) is not None:
        # fx would trace into the root even if it is a single layer.
        return (Step(_checked(block, what), "", (0,)),)
    check_tied(block, what)
    modes = {module: module.training for module in modules.values()}
    both = []
    try:
        for training in (True, False):
            for module in modes:
                module.training = training
            both.append(_steps(_graph(block, what, training), modules, what))
    finally:
        for module, training in modes.items():
            module.training = training
    if both[0] != both[1]:
        raise TypeError(
            f"FusedBlocks does not support {what} ({type(block).__name__}), which does something else in training than "
            "in evaluation, under torch.no_grad() or under autocast"
        )
    names = {step.module for step in both[0]}
    for key, _ in (*block.named_parameters(), *block.named_buffers()):
        if key.rpartition(".")[0] not in names:
            raise TypeError(f"FusedBlocks does not support {what}.{key}: no supported layer uses it")
    return both[0]


def _graph(block: nn.Module, what: str, recorded: bool) -> fx.Graph:
    """The operations with autograd and without autocast, or (``recorded=False``) with autocast and without autograd.

    ``forward`` sees both, so that a context of its own is another state in one of the two.
    """
    device = next((p.device.type for p in block.parameters() if not p.is_meta), "cpu")
    casts = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, not recorded)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(recorded):
            return _Tracer(what, device).trace(block)
    except (fx.proxy.TraceError, TypeError, AttributeError, RuntimeError) as error:
        raise TypeError(f"{what} ({type(block).__name__}) cannot be taken apart into layers: {error}") from error
    finally:
        torch.set_autocast_enabled(device, casts)


def _steps(graph: fx.Graph, modules: dict[str, nn.Module], what: str) -> tuple[Step, ...]:
    numbers: dict[fx.Node, int] = {}
    memory: dict[fx.Node, fx.Node] = {}  # for every value, the value whose memory it may share
    changed: dict[fx.Node, str] = {}  # values that an operation in place has changed since, and the operation
    steps: list[Step] = []
    result = 0
    for node in graph.nodes:
        for value in node.all_input_nodes:
            if value in changed:
                raise TypeError(
                    f"FusedBlocks does not support {changed[value]}, which works in place on a value that {what} reads "
                    "again"
                )
        memory[node] = node
        if node.op == "placeholder":
            if numbers:
                raise TypeError(f"{what} must take one input, but it also takes {node.target}")
            numbers[node] = 0
        elif node.op == "output":
            (output,) = node.args
            if not isinstance(output, fx.Node):
                raise TypeError(f"{what} must return one tensor, not {type(output).__name__}")
            result = numbers[output]
        else:
            kind, name = _describe(node, modules, what)
            inputs = tuple(numbers[x] for x in node.args if isinstance(x, fx.Node))
            if len(inputs) != (2 if kind == "add" else 1):
                raise TypeError(f"{what} calls {node.target} with something else than feature maps")
            in_place, first = _in_place(node, modules), memory[node.all_input_nodes[0]]
            if in_place:
                where = f"{what}.{name}" if name else f"{getattr(node.target, '__name__', node.target)}() in {what}"
                changed.update((value, where) for value in numbers if memory[value] is first)
            if in_place or kind in ("same", "flatten"):
                memory[node] = first
            steps.append(Step(kind, name, inputs, in_place and kind == "add"))
            numbers[node] = len(steps)
    if result != len(steps):
        raise TypeError(f"{what} must return what it computes last")
    return tuple(steps)


class _Proxy(fx.Proxy):
    def __iadd__(self, other: Any) -> fx.Proxy:
        # Without this method "y += z" would be traced as "y = y + z".
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    def __init__(self, what: str, device: str) -> None:
        super().__init__()
        self._what, self._device = what, device
        self._contexts = self._active()

    def _active(self) -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_autocast_enabled(self._device)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _kind(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, kind: str, target: Any, *arguments: Any, **settings: Any) -> fx.Node:
        if self._active() != self._contexts:
            name = getattr(target, "__name__", target)
            raise TypeError(f"{self._what} calls {name} in a context of its own, such as torch.no_grad() or autocast")
        return super().create_node(kind, target, *arguments, **settings)


def _in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    return node.target in (operator.iadd, "add_", "relu_") or bool(_inplace_argument(node))


def _inplace_argument(node: fx.Node) -> Any:
    """``inplace`` of a call of F.relu, False for other calls."""
    if node.target is not F.relu:
        return False
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("inplace", False)


def _kind(module: nn.Module) -> str | None:
    kinds: tuple[tuple[Any, str], ...] = (
        (nn.Conv2d, "conv"),
        (nn.Linear, "linear"),
        (NORMS, "norm"),
        (nn.ReLU, "relu"),
        (CHANNELWISE, "channelwise"),
        (nn.Flatten, "flatten"),
        (nn.Identity, "same"),
    )
    for types, kind in kinds:
        if type(module) in (types if isinstance(types, tuple) else (types,)):
            return kind
    return None


def _checked(module: nn.Module, where: str) -> str:
    kind = _kind(module)
    if kind is None:
        raise TypeError(f"FusedBlocks does not support {where}, a {type(module).__name__}; it supports {SUPPORTED}")
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        raise TypeError(f"FusedBlocks does not support {where} with padding_mode={module.padding_mode!r}, only zeros")
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
        raise TypeError(f"FusedBlocks does not support {where}, a Flatten of other than all axes behind the batch")
    if getattr(module, "return_indices", False):
        raise TypeError(f"FusedBlocks does not support {where} with return_indices=True")
    check_tensors(module, where)
    return kind


def _describe(node: fx.Node, modules: dict[str, nn.Module], what: str) -> tuple[str, str]:
    if node.op == "call_module":
        name = str(node.target)
        return _checked(modules[name], f"{what}.{name}"), name
    kind: str | None = None
    if node.op == "call_function":
        kind = _FUNCTIONS.get(node.target)
    elif node.op == "call_method":
        kind = _METHODS.get(str(node.target))
    if kind == "flatten" and (tuple(node.args[1:]), node.kwargs) not in (((1,), {}), ((), {"start_dim": 1})):
        kind = None
    takes = {"add": {"alpha"}, "flatten": {"start_dim"}, "relu": {"inplace"}}.get(kind or "", set())
    if not node.kwargs.keys() <= takes or node.kwargs.get("alpha", 1) != 1 or (kind == "add" and len(node.args) > 2):
        kind = None
    if node.op == "get_attr":
        raise TypeError(f"FusedBlocks does not support the use of {what}.{node.target} outside of a layer")
    if kind is None:
        name = str(getattr(node.target, "__name__", node.target))
        raise TypeError(f"FusedBlocks does not support {name}() in {what}; it supports {SUPPORTED}")
    return kind, ""


_SETTINGS = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    *("in_features", "out_features", "num_features", "num_groups", "num_channels"),
    *("eps", "momentum", "affine", "track_running_stats"),
    *("output_size", "ceil_mode", "count_include_pad", "divisor_override"),
    *("negative_slope", "alpha", "approximate", "min_val", "max_val"),
)


def signature(module: nn.Module) -> tuple[Any, ...]:
    """The settings and tensors that must be the same in M layers to fuse them."""
    values = [(name, getattr(module, name)) for name in _SETTINGS if hasattr(module, name)]
    tensors = [
        (name, tuple(t.shape), t.dtype, t.device)
        for name, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]
    return (type(module).__name__, *values, *tensors)


def _check_state(layer: nn.Module, first: nn.Module, name: str, m: int) -> None:
    """Raises ValueError if two layers differ in training mode or ``requires_grad``: a fused layer has only one."""
    mine, other = (f"blocks[{i}].{name}" if name else f"blocks[{i}]" for i in (m, 0))
    if layer.training != first.training:
        modes = ("evaluation", "training")
        raise ValueError(
            f"{mine} must be in {modes[first.training]} mode, as {other} is, not in {modes[layer.training]} mode: "
            "call train() or eval() on all blocks"
        )
    for key, parameter in first.named_parameters(recurse=False):
        if layer.get_parameter(key).requires_grad != parameter.requires_grad:
            raise ValueError(
                f"{mine}.{key} must have requires_grad={parameter.requires_grad}, as {other}.{key} has: one tensor "
                "holds them all, freeze it in all blocks or in none"
            )


def check_alike(blocks: list[nn.Module]) -> tuple[Step, ...]:
    """Returns the steps that all blocks share.

    Raises:
        TypeError: a block cannot be traced into supported layers.
        ValueError: a block differs from the first in its steps, a layer, a training mode or a ``requires_grad``.
    """
    steps = trace(blocks[0], "blocks[0]")
    names = list(dict.fromkeys(step.module for step in steps))
    modules = dict(blocks[0].named_modules())
    for m, block in enumerate(blocks[1:], start=1):
        if block is blocks[0]:
            continue
        if trace(block, f"blocks[{m}]") != steps:
            raise ValueError(f"blocks[{m}] must have the steps of blocks[0], but {block} has others")
        theirs = dict(block.named_modules())
        for name in names:
            if name and signature(theirs[name]) != signature(modules[name]):
                raise ValueError(
                    f"blocks[{m}].{name} must be like blocks[0].{name}, {modules[name]}, not {theirs[name]}, "
                    "in all settings, shapes, dtypes and devices"
                )
        if not names[0] and signature(block) != signature(blocks[0]):
            raise ValueError(f"blocks[{m}] must be like blocks[0], {blocks[0]}, not {block}")
        for name in names:
            # A function's step has no module; its name is "", as that of a block that is a single layer.
            if name or len(steps) == 1:
                _check_state(theirs[name], modules[name], name, m)
    return steps
