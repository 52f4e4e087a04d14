"""FusedBlocks: M clients' blocks of equal structure as one module."""

import copy
import operator
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedkern.ops._core import backend
from fedkern.ops._core.checks import check_dense
from fedkern.ops._core.layout import SafeConv2d

_CONV = ("in_channels", "out_channels", "groups")
WIDENED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv1d: _CONV, nn.Conv2d: _CONV, nn.Conv3d: _CONV,
    nn.BatchNorm1d: ("num_features",), nn.BatchNorm2d: ("num_features",), nn.BatchNorm3d: ("num_features",),
    nn.GroupNorm: ("num_groups", "num_channels"), nn.Linear: (),
}  # fmt: skip
"""Layers with parameters that have a grouped twin, and their sizes that grow with the number of blocks."""
CHANNELWISE = {
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Softplus, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Identity, nn.Flatten, nn.Dropout,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d,
}  # fmt: skip
"""Layers without parameters that never mix channels."""
FUNCTIONS = {
    operator.add, operator.iadd, torch.add, torch.relu, F.relu, F.gelu, F.silu, F.leaky_relu, F.max_pool2d,
    F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout, torch.flatten, "add", "add_", "relu", "relu_", "flatten",
    "contiguous",
}  # fmt: skip
"""Calls and methods between layers that never mix channels; ``flatten`` from axis 1 on."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FusedBlocks(nn.Module):
    """Fuse M blocks of equal structure into one module with the same outputs (FuseFL, arXiv 2410.20380).

    The module is a copy of the first block whose layers are replaced by grouped twins: one convolution with M groups
    for M convolutions, one batch norm over all channels for M batch norms. The copy runs the block's own ``forward``.
    The parameters can be trained. On the CPU, where grouped convolutions are slow, the blocks run one after another on
    views of the joined parameters.

    Args:
        blocks: M >= 1 modules of the same classes, shapes, dtypes, devices, modes and ``requires_grad``. Their
            parameters and buffers are copied. Layers with parameters are Conv1d to Conv3d, Linear on ``[B, d]``,
            BatchNorm and GroupNorm. Other layers and calls treat each channel alone (activations, pooling, sums).
        shared: whether all blocks read the same input ``[B, C, ...]``. Otherwise block m reads channels ``m * C`` to
            ``(m + 1) * C`` of ``[B, M * C, ...]``, such as the output of another FusedBlocks.

    Raises:
        TypeError: a block holds a layer, call or hook that is not supported; the message names it.
        ValueError: no blocks, or blocks that differ in structure, shapes, modes or attributes.

    Example:
        >>> blocks = [nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(5)]
        >>> FusedBlocks(blocks)(torch.randn(8, 3, 9, 9)).shape
        torch.Size([8, 80, 7, 7])
    """

    def __init__(self, blocks: Sequence[nn.Module], *, shared: bool = True) -> None:
        super().__init__()
        if isinstance(blocks, (Set, str)) or not isinstance(blocks, Iterable):  # a set has no order
            raise TypeError(f"blocks must be a list of modules, not {type(blocks).__name__}")
        members = list(blocks)
        if not members:
            raise ValueError("blocks must hold at least one module, not none")
        expected = _describe(members[0])
        for m, block in enumerate(members[1:], 1):
            actual = _describe(block)
            if actual != expected:
                names = [name for name in {**expected, **actual} if expected.get(name) != actual.get(name)]
                raise ValueError(f"blocks[{m}] must equal blocks[0] but for its values; it differs in {names[0]!r}")
        _check_forward(members[0])
        self.count, self.shared = len(members), shared
        self.training = members[0].training
        self._shapes = {key: value.shape for key, value in members[0].state_dict().items()}
        with torch.inference_mode(False):  # tensors of inference mode could not be trained later
            block = copy.deepcopy(members[0])
            for layer in block.modules():
                if hasattr(layer, "inplace"):  # it would write to the input
                    layer.inplace = False  # type: ignore[assignment]
            # In a list, so that the template's parameters are not this module's.
            self._template = [copy.deepcopy(block).to("meta")]
            for layer in self._template[0].modules():
                if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
                    layer.__class__ = SafeConv2d
            self.block = _widen(block, members)

    def forward(self, x: Tensor) -> Tensor:
        """Return the M outputs side by side, ``[B, M * C', ...]``, client 0's channels first.

        Args:
            x: ``[B, C, ...]``, or ``[B, M * C, ...]`` with ``shared=False``.

        Raises:
            TypeError: ``x`` is no dense tensor.
            ValueError: the channels of ``x`` cannot be divided among the blocks.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, not {type(x).__name__}")
        check_dense(x, "x")
        if x.dim() < 2 or (not self.shared and x.shape[1] % self.count):
            channels = "C" if self.shared else f"{self.count} * C"
            raise ValueError(f"x must have shape [B, {channels}, ...], not {list(x.shape)}")
        if x.is_cpu and backend.eager(x):
            return self._run_separately(x)
        if self.shared and self.count > 1:
            x = x.repeat(1, self.count, *[1] * (x.dim() - 2))
        result: Tensor = self.block(x)
        return result

    def _run_separately(self, x: Tensor) -> Tensor:
        template = self._template[0]
        for module, fused in zip(template.modules(), self.block.modules(), strict=True):
            module.training = fused.training
        state = {**dict(self.block.named_parameters()), **dict(self.block.named_buffers())}
        parts = {key: _split(state[key], self.count, shape) for key, shape in self._shapes.items()}
        inputs = [x] * self.count if self.shared else x.tensor_split(self.count, dim=1)
        views = [{key: tensors[m] for key, tensors in parts.items()} for m in range(self.count)]
        return torch.cat([functional_call(template, view, part) for view, part in zip(views, inputs, strict=True)], 1)

    def state_dicts(self) -> list[OrderedDict[str, Tensor]]:
        """Return copies of the M blocks' state dicts, bit for bit the original ones if nothing was trained since."""
        state = self.block.state_dict()
        parts = {key: _split(state[key], self.count, shape) for key, shape in self._shapes.items()}
        return [OrderedDict((key, tensors[m].clone()) for key, tensors in parts.items()) for m in range(self.count)]

    @torch.no_grad()
    def load_state_dicts(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Load the state dicts of M blocks.

        Raises:
            ValueError: ``states`` are not M state dicts, or a state dict has other keys or shapes.
        """
        if len(states) != self.count:
            raise ValueError(f"states must hold {self.count} state dicts, not {len(states)}")
        for m, state in enumerate(states):
            shapes = {key: value.shape for key, value in state.items()}
            if shapes != self._shapes:
                odd = sorted(key for key in {**shapes, **self._shapes} if shapes.get(key) != self._shapes.get(key))
                raise ValueError(f"states[{m}] must have the keys and shapes of a block's state dict; odd: {odd}")
        self.block.load_state_dict({key: _join([state[key] for state in states]) for key in self._shapes})

    def extra_repr(self) -> str:
        return f"{self.count} blocks, shared={self.shared}"


class GroupedLinear(nn.Module):
    """M linear layers on the parts of ``[B, M * in]``, weight ``[M * out, in]``."""

    def __init__(self, count: int, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.count, self.weight, self.bias = count, weight, bias

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError(f"a linear layer of FusedBlocks takes [B, d], not {list(x.shape)}: flatten the maps first")
        parts = x.unflatten(1, (self.count, -1)).transpose(0, 1)
        y = torch.bmm(parts, self.weight.unflatten(0, (self.count, -1)).transpose(1, 2)).transpose(0, 1).flatten(1)
        return y if self.bias is None else y + self.bias


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(tensor.shape or (1,)) for tensor in tensors])


def _split(joined: Tensor, count: int, shape: torch.Size) -> list[Tensor]:
    return [part.view(shape) for part in joined.tensor_split(count)]


def _describe(block: nn.Module) -> dict[str, Any]:
    if not isinstance(block, nn.Module):
        raise TypeError(f"blocks must hold modules, not {type(block).__name__}")
    described: dict[str, Any] = {}
    for name, module in block.named_modules():
        described[name] = type(module)
        for key, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, tuple, type(None))):
                described[f"{name}.{key}".lstrip(".")] = value
    tensors = [*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False)]
    forms = {key: (value.shape, value.dtype, value.device, value.requires_grad) for key, value in tensors}
    return described | forms


def _check_forward(block: nn.Module) -> None:
    """Raise TypeError for an unknown layer or call, a hook, a replaced ``forward``, or tied parameters."""
    from torch import fx  # takes a tenth of a second

    tensors = [parameter for _, parameter in block.named_parameters(remove_duplicate=False)]
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        raise TypeError("FusedBlocks cannot fuse tied parameters")
    for name, module in block.named_modules():
        kind = type(module)
        where = f"{name or 'a block'} ({kind.__name__})"
        if any(getattr(module, hooks) for hooks in _HOOKS) or "forward" in vars(module):
            raise TypeError(
                f"FusedBlocks cannot fuse {where}, which has hooks or a replaced forward: take them off first"
            )
        known = kind in WIDENED or kind in CHANNELWISE
        if not known and (module._parameters or module._buffers or not module._modules):
            raise TypeError(f"FusedBlocks does not know the layer {where}")
        cumulative = isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None
        if cumulative or (isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1)):
            raise TypeError(f"FusedBlocks does not know the layer {where} with these settings")
    if not block._modules:  # a layer alone
        return
    try:
        nodes = fx.symbolic_trace(block).graph.nodes
    except Exception as error:  # the block's code may raise anything on a proxy
        raise TypeError(f"FusedBlocks cannot trace the forward of {type(block).__name__}: {error}") from error
    for node in nodes:
        if node.op not in ("call_function", "call_method", "get_attr"):
            continue
        arguments = (*node.args[1:], *node.kwargs.values())
        mixes = node.target in (torch.flatten, "flatten") and arguments not in [(1,), (1, -1)]
        if node.target not in FUNCTIONS or mixes:
            call = getattr(node.target, "__name__", node.target)
            raise TypeError(f"FusedBlocks does not know the call {call} in forward")


def _widen(fused: nn.Module, members: Sequence[nn.Module]) -> nn.Module:
    """Replace the layers of ``fused``, a copy of the first block, by grouped twins."""
    count = len(members)
    layers = [dict(block.named_modules()) for block in members]
    for name, layer in [*fused.named_modules()]:
        if type(layer) not in WIDENED:
            continue
        for table in (layer._parameters, layer._buffers):
            for key, value in table.items():
                if value is not None:
                    joined = _join([getattr(blocks[name], key) for blocks in layers])
                    parameter = isinstance(value, nn.Parameter)
                    table[key] = nn.Parameter(joined, value.requires_grad) if parameter else joined
        for size in WIDENED[type(layer)]:
            setattr(layer, size, getattr(layer, size) * count)
        if isinstance(layer, nn.Linear):
            twin: Any = GroupedLinear(count, layer.weight, layer.bias).train(layer.training)
            fused = twin if not name else fused
            if name:
                fused.set_submodule(name, twin)
    return fused
