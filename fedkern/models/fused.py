"""Fused levels: the blocks of all clients side by side behind adaptors (FuseFL, arXiv 2410.20380, section 4.3).

Level l maps the M results X of level l - 1 to ``{b_j(a_j(X)) for every client j}``, with adaptors a_j (none at level 1)
and blocks b_j.  Results are *joined*, concatenated on the channels: maps ``[B, M * C, H, W]``, tokens ``[B, N, M *
C]``, features ``[B, M * d]``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from fedkern.models.blocks import count_channels
from fedkern.models.precision import autocasts, to_fp32
from fedkern.models.state.allocate import make_empty
from fedkern.ops import fuse_concat, fuse_mean

AdaptorKind = Literal["cnn1x1", "avg", "sum"]
FinalFuse = Literal["mean", "sum", "concat"]
State = Mapping[str, Tensor]


class Pool(nn.Module):
    """Adaptor without parameters: the mean (or the sum) of the joined results of ``branches`` blocks."""

    def __init__(self, branches: int, *, total: bool = False) -> None:
        super().__init__()
        self.branches, self.total = branches, total

    def forward(self, x: Tensor) -> Tensor:
        channels = 2 if x.dim() == 3 else 1
        if channels == 2 or torch.compiler.is_exporting():  # exported programs have PyTorch's operators alone
            mean: Tensor = x.unflatten(channels, (self.branches, -1)).mean(channels)
        else:
            mean = fuse_mean(x.tensor_split(self.branches, dim=1))
        return mean * self.branches if self.total else mean

    def extra_repr(self) -> str:
        return f"{self.branches}, total={self.total}"


def make_adaptor(
    kind: AdaptorKind, shape: Sequence[int], branches: int, *, generator: torch.Generator | None = None
) -> nn.Module:
    """Return the adaptor between a level of M = ``branches`` blocks and the next block.

    ``"cnn1x1"`` is a 1x1 convolution with bias (for tokens and features a linear layer) of M c^2 + c parameters,
    ``"avg"`` and ``"sum"`` have none.

    Args:
        shape: of one block's result and of the adaptor's: (C, H, W), (N, C) or (d,).
        generator: draws initial values, uniform in ±1 / sqrt(M c); None makes the exact mean, ``[I ... I] / M``.
    """
    if kind != "cnn1x1":
        return Pool(branches, total=kind == "sum")
    width, joined = count_channels(shape), branches * count_channels(shape)
    adaptor = make_empty(nn.Conv2d, joined, width, 1) if len(shape) == 3 else make_empty(nn.Linear, joined, width)
    weight, bias = adaptor.weight, cast(Tensor, adaptor.bias)
    with torch.no_grad():
        if generator is None:
            weight.copy_(torch.eye(width).repeat(1, branches).div_(branches).reshape(weight.shape))
            bias.zero_()
        else:
            bound = joined**-0.5
            weight.uniform_(-bound, bound, generator=generator)
            bias.uniform_(-bound, bound, generator=generator)
    return adaptor


class Branch(NamedTuple):
    """One client's part of a level: modules (no adaptor at level 1) and the state dicts of their uploaded values."""

    block: nn.Module
    adaptor: nn.Module | None
    states: Mapping[str, State]


class FusedLevel(nn.Module):
    """Frozen (adaptor, block) pairs of all clients at one level, as one module on joined results."""

    def __init__(self, branches: Sequence[Branch]) -> None:
        super().__init__()
        self.count = len(branches)
        self._buffer_names = [
            [name for name, _ in branch.block.named_buffers() if name in branch.states["block"]] for branch in branches
        ]
        adaptor = branches[0].adaptor
        # A pooling adaptor is the same for every block, so it runs once, before all blocks.
        self.shared: nn.Module = adaptor if isinstance(adaptor, Pool) else nn.Identity()
        self.branches = nn.ModuleList(_load_branch(branch) for branch in branches)
        self.requires_grad_(False)
        self.eval()

    @autocasts
    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(x)
        results = [branch(x) for branch in self.branches]
        channels = 2 if results[0].dim() == 3 else 1
        joined = channels == 2 or torch.compiler.is_exporting()
        return torch.cat(results, dim=channels) if joined else fuse_concat(results)

    def statistics(self) -> list[dict[str, Tensor]]:
        states = [branch.state_dict() for branch in self.branches]
        return [
            {name: state[f"block.{name}"].detach().cpu().clone() for name in names}
            for state, names in zip(states, self._buffer_names, strict=True)
        ]


def _load_branch(branch: Branch) -> nn.Module:
    sequence = nn.Sequential()
    if branch.adaptor is not None and not isinstance(branch.adaptor, Pool):
        sequence.add_module("adaptor", branch.adaptor)
    sequence.add_module("block", branch.block)
    sequence = copy.deepcopy(sequence)
    tensors = {f"{part}.{key}": value for part, state in branch.states.items() for key, value in state.items()}
    sequence.load_state_dict({key: tensors.get(key, value) for key, value in sequence.state_dict().items()})
    return sequence


class FusedNetwork(nn.Module):
    """Fused levels one after another, the fusion of the last level's features, and a classifier, in eval mode.

    Args:
        head: None while later levels are still to be trained.
        final: ``"sum"`` is the released code's fusion.
        plain_head: the classifier before calibration, for comparison.
    """

    def __init__(
        self,
        levels: Sequence[FusedLevel],
        head: nn.Linear | None = None,
        *,
        final: FinalFuse = "mean",
        plain_head: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.final = final
        self.head, self.plain_head = head, plain_head
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> FusedNetwork:
        return self

    def normalise_by_batch(self) -> None:
        """Let batch norms use and update statistics from now on, as FuseFL's released code does."""
        super().train(True)

    def run_levels(self, x: Tensor) -> Tensor:
        for level in self.levels:
            x = level(x)
        return x

    def fuse(self, joined: Tensor) -> Tensor:
        if self.final == "concat":
            return joined
        parts: Tensor = joined.unflatten(1, (cast(FusedLevel, self.levels[-1]).count, -1))
        return parts.mean(1) if self.final == "mean" else parts.sum(1)

    def features(self, x: Tensor) -> Tensor:
        return self.fuse(to_fp32(self.run_levels(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.head is None:
            raise ValueError("this network has levels to come and no classifier yet")
        logits: Tensor = self.head(self.features(x))
        return logits
