"""FusedBlocks: M clients' blocks of one structure as one module."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence, Set
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fedkern.ops._core import backend
from fedkern.ops._core.checks import check_dense
from fedkern.ops._fuse.blocks.choice import LOWERINGS, Work, choose
from fedkern.ops._fuse.blocks.conv import core_for
from fedkern.ops._fuse.blocks.layers import FusedConv, FusedLayer, FusedLinear, fuse_layers
from fedkern.ops._fuse.blocks.lowering import FoldedBlocks, channels_last, concatenate, repeated, run_step, run_step_of
from fedkern.ops._fuse.blocks.shapes import Survey, axes_named, axes_of, survey
from fedkern.ops._fuse.blocks.trace import check_alike
from fedkern.ops._fuse.blocks.unseen import check_process

Lowering = Literal["grouped", "separate", "direct"]


class FusedBlocks(nn.Module):
    """Fuses M blocks of one structure into one module with the same outputs (FuseFL, arXiv 2410.20380).

    The first convolutions, which read the same input, are concatenated into one; later convolutions become grouped
    ones; batch norms are concatenated.  M 1x1 convolutions (FuseFL's adaptors) become one 1x1 convolution.  Blocks may
    be anything that torch.fx can trace into Conv2d, Linear (over the last axis), BatchNorm, GroupNorm, activations,
    pooling, Flatten, Identity and sums: residual blocks, VGG stages, stems, sequences of these.

    What a trace cannot see is refused: hooks (those of all modules of the process also in ``forward``), pruning, weight
    norms, replaced methods (``train()`` too), tensors that no layer reads, tied parameters, values read again after an
    operation in place, code that depends on the training mode.  A fused module never writes to its input, and gives the
    blocks' dtypes under autocast, where nothing is folded.

    Args:
        blocks: M >= 1 modules of the same structure, shapes, dtypes, devices, training modes (per layer) and
            ``requires_grad`` (per parameter), which the fused module takes over.  Their parameters and buffers are
            copied: one client's after the other's along axis 0, under their names in a block with the prefix
            ``"branches."``.
        shared: whether all blocks read the same input ``[B, C, ...]``.  If not, block m reads channels ``m * C`` to
            ``(m + 1) * C`` of ``[B, M * C, ...]``, such as the output of another FusedBlocks.
        fold: in evaluation mode and without autograd, fold batch norms into the convolutions before them (frozen
            levels).  Folded weights are computed again after every change of a parameter or buffer that torch counts:
            in-place operations, optimizers, loaded state dicts, a replaced tensor.  Torch does not count writes through
            ``p.data``, NumPy or an address: call :meth:`refold` after them.  The step of a ``fused=True`` optimizer
            needs :meth:`refold` only if a folded call ran between the step and the recorded call before it.
        lowering: how the result is computed: ``"grouped"`` (one convolution for all branches), ``"separate"`` (branch
            after branch) or ``"direct"`` (folded fp32 on the CPU: all branches by the core's own convolution, which
            wastes no SIMD lanes on few channels).  None picks by the width, kernel and map size of the blocks'
            convolutions and the CPU core's instruction set.  Where ``"direct"`` cannot serve, another lowering does.

    ``forward`` maps the input to ``[B, M * C', ...]``, client 0's channels first.  4-D results are channels-last, from
    ``"direct"`` contiguous.  Under torch.compile and torch.func transforms the forward pass is plain grouped (or
    separate) operations, and nothing is folded; torch.func refuses to update running statistics that it does not map
    over.

    When folded, the module holds its parameters, their folded copies, and these copies again in the layouts that
    convolutions read (for four shapes of the maps at most).  For maps of one shape this is about three times the
    parameters' bytes.

    FuseFL's level l >= 2, ``X -> {b_j(a_j(X))}``, is one ``FusedBlocks([nn.Sequential(a, b) for a, b in pairs])`` on
    ``X [B, M * c, H, W]``: its adaptors become one 1x1 convolution, its blocks run on their own channels of the result.

    The parameters can be trained later even if the module was built under ``torch.inference_mode()``.

    Raises:
        TypeError: a block holds what FusedBlocks does not support, or the process has hooks for all modules; the
            message names it.  (forward) ``x`` is no tensor.
        ValueError: no blocks, or blocks of different structure, shapes, training modes or ``requires_grad``.
        ValueError: (forward) ``x`` has another number of axes or channels than the blocks read, or is too small.
        RuntimeError: (forward) ``x`` has another dtype or device than the weights (the blocks' own error), or batch
            norms have ``momentum=None`` under torch.compile in training mode.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], *, shared: bool = True, fold: bool = True, lowering: Lowering | None = None
    ) -> None:
        super().__init__()
        if isinstance(blocks, (Set, str)) or not isinstance(blocks, Iterable):  # a set has no order
            raise TypeError(f"blocks must be a list of modules, not {type(blocks).__name__}")
        members = list(blocks)
        if not members:
            raise ValueError("blocks must hold at least one module, not none")
        if lowering is not None and lowering not in LOWERINGS:
            raise ValueError(f"lowering must be None or one of {', '.join(LOWERINGS)}, not {lowering!r}")
        self._steps = check_alike(members)
        self.count, self.shared, self.fold, self.lowering = len(members), shared, fold, lowering
        self._keys = list(members[0].state_dict())
        self._layers: dict[str, nn.Module] = {}
        # Tensors made in inference mode would not count their changes, which folding depends on.
        with torch.inference_mode(False):
            # In a list, so that it is not registered: its parameters are not this module's.
            self._template = [copy.deepcopy(members[0]).to("meta")]
            self.branches = self._joined(members)
        # From the layers, which keep the modes they have in the blocks: a slice of a frozen Sequential says "training".
        self.training = any(layer.training for layer in self._layers.values()) or (
            not self._layers and members[0].training
        )
        # Convolutions and linear layers compute the same in either mode: blocks of only these fold in training too.
        self._modeless = all(isinstance(layer, (FusedConv, FusedLinear)) for layer in self._layers.values())
        self._folded = FoldedBlocks(self._steps, self._layers, self.count)
        self._axes = axes_of(self._steps, self._layers)
        self._surveyed: dict[torch.Size, Survey] = {}

    def _joined(self, members: Sequence[nn.Module]) -> nn.Module:
        """The fused layers, under the names that they have in a block; fills ``_layers``."""
        root = nn.Module()
        named = [dict(block.named_modules()) for block in members]
        for step in self._steps:
            name = step.module
            if step.kind in ("add", "flatten") or name in self._layers or (not name and len(self._steps) > 1):
                continue
            layer = fuse_layers([modules[name] for modules in named])
            if not isinstance(layer, FusedLayer):
                layer = copy.deepcopy(layer)
                if hasattr(layer, "inplace"):
                    cast(Any, layer).inplace = False  # other layers may still read the value
            self._layers[name] = layer
            _place(root, name, layer)
        return root

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[B, M * C', ...]``; ``x`` is ``[B, C, ...]`` (``[B, M * C, ...]`` with ``shared=False``)."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, not {type(x).__name__}")
        check_dense(x, "x")
        if not torch.compiler.is_compiling():
            check_process()
        if x.dim() < 2 or (not self.shared and x.shape[1] % self.count):
            raise ValueError(f"x must have shape {axes_named(None, self.count, self.shared)}, not {list(x.shape)}")
        if self._axes is not None and x.dim() not in self._axes:
            axes = axes_named(self._axes, self.count, self.shared)
            raise ValueError(f"x must have shape {axes}, not {list(x.shape)}")
        if not backend.eager(x):
            # Under a compiler or a transform: plain operations, which it fuses or maps itself.
            return self._separate(x) if self.lowering == "separate" else self._grouped(x)
        sizes = x.shape[1:]
        surveyed = self._surveyed.get(sizes)
        if surveyed is None:
            surveyed = self._surveyed[sizes] = survey(self._steps, self._layers, self.count, x.shape, self.shared)
        training = self.training and not self._modeless
        # Autocast decides on every layer's dtype by itself, so that layers stay apart.
        folded = self.fold and not training and not torch.is_autocast_enabled(x.device.type)
        folded = folded and not (torch.is_grad_enabled() and (x.requires_grad or self._trained()))
        direct = surveyed.direct and folded and self.lowering in (None, "direct") and self._folded.by_sample
        core = core_for(x) if direct else None
        way: str = self.lowering or self._choose(x, surveyed.works, folded, core)
        if not folded:
            if self.fold and torch.is_grad_enabled() and (training or self._trained()):
                # A step of a fused optimizer may follow, which torch does not count as a change.
                self._folded.forget()
            return self._separate(x) if way == "separate" else self._grouped(x)
        with torch.no_grad():
            if way == "direct":
                if core is not None and self._folded.plain():
                    return self._folded.direct(core, x, self.shared)
                way = self._choose(x, surveyed.works, folded, None)
            if way == "grouped":
                return self._folded.grouped(x, self.shared)
            return concatenate(self._folded.separate(x, self.shared))

    def _choose(self, x: Tensor, works: Sequence[Work], folded: bool, core: Any | None) -> str:
        # Other devices' libraries do grouped convolutions in one launch.
        if not folded or x.dim() != 4 or x.device.type != "cpu":
            return "grouped"
        last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        direct = core is not None and core.isa() != "portable" and not self._folded.slow_pools
        return choose(works, last, direct)

    def refold(self) -> None:
        """Makes the next folded call fold the weights again, after a change that torch did not count (see ``fold``)."""
        self._folded.forget()

    def maps(self, fused: Tensor) -> list[Tensor]:
        """The M blocks' parts of a result of :meth:`forward`, as views."""
        return list(fused.tensor_split(self.count, dim=1))

    def _trained(self) -> bool:
        return any(p.requires_grad for p in self.parameters())

    def _grouped(self, x: Tensor) -> Tensor:
        values = [(channels_last(x), self.shared)]
        for step in self._steps:
            operands = [values[value] for value in step.inputs]
            values.append(run_step(step, self._layers.get(step.module), operands, self.count))
        y, shared = values[-1]
        return repeated(y, self.count) if shared else y

    def _separate(self, x: Tensor) -> Tensor:
        inputs = [x] * self.count if self.shared else list(x.tensor_split(self.count, dim=1))
        results = []
        for m in range(self.count):
            values = [channels_last(inputs[m])]
            for step in self._steps:
                operands = [values[value] for value in step.inputs]
                values.append(run_step_of(step, self._layers.get(step.module), operands, m))
            results.append(values[-1])
        return concatenate(results)

    def state_dicts(self) -> list[OrderedDict[str, Tensor]]:
        """Copies of the M blocks' state dicts, bit for bit the original ones if nothing was trained since."""
        return [
            OrderedDict((key, self._part(key, m).detach().clone()) for key in self._keys) for m in range(self.count)
        ]

    def load_state_dicts(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Loads the state dicts of M blocks.

        Raises:
            ValueError: ``states`` are not M state dicts, or a state dict has other keys or shapes.
        """
        if len(states) != self.count:
            raise ValueError(f"states must hold {self.count} state dicts, not {len(states)}")
        for m, state in enumerate(states):
            if list(state) != self._keys:
                odd = sorted(set(state) ^ set(self._keys)) or list(state)
                raise ValueError(f"states[{m}] must have the keys of a block's state dict; it differs in {odd}")
            for key, tensor in state.items():
                if tensor.shape != self._part(key, m).shape:
                    expected = list(self._part(key, m).shape)
                    raise ValueError(f"states[{m}][{key!r}] must have shape {expected}, not {list(tensor.shape)}")
        with torch.no_grad():
            for m, state in enumerate(states):
                for key, tensor in state.items():
                    self._part(key, m).copy_(tensor)

    def split(self) -> list[nn.Module]:
        """M modules of the blocks' own class with this module's parameters, training modes and ``requires_grad``."""
        blocks = []
        for state in self.state_dicts():
            block = copy.deepcopy(self._template[0])
            block.load_state_dict(state, assign=True)
            for key, parameter in block.named_parameters():
                name, _, attribute = key.rpartition(".")
                parameter.requires_grad_(cast(Tensor, getattr(self._layers[name], attribute)).requires_grad)
            block.train(self.training)
            for name, module in block.named_modules():
                if name in self._layers:
                    module.training = self._layers[name].training
            blocks.append(block)
        return blocks

    def _part(self, key: str, m: int) -> Tensor:
        name, _, attribute = key.rpartition(".")
        return cast(FusedLayer, self._layers[name]).part(attribute, m)

    def extra_repr(self) -> str:
        return f"{self.count} blocks, shared={self.shared}, fold={self.fold}, lowering={self.lowering!r}"


def _place(root: nn.Module, name: str, layer: nn.Module) -> None:
    """Registers ``layer`` under the dotted ``name``, with plain modules in between."""
    *path, last = (name or "layer").split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = cast(nn.Module, getattr(root, part))
    root.add_module(last, layer)
