"""FuseFL's parts that do not depend on rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedkern.errors import UserError
from fedkern.models.fused import FusedNetwork
from fedkern.models.precision import autocasts, to_fp32
from fedkern.models.state.freezing import constant_buffers


class LocalPart(nn.Module):
    """Module that a client trains at a level: adaptor, blocks from this level on and classifier.

    The fused levels before (``frozen``) are not in the module, so nothing trains them or puts them in train mode.
    """

    def __init__(
        self, frozen: FusedNetwork | None, adaptor: nn.Module | None, blocks: Sequence[nn.Module], head: nn.Linear
    ) -> None:
        super().__init__()
        self.adaptor = adaptor if adaptor is not None else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self._frozen = (frozen,)  # a tuple hides it from nn.Module

    @property
    def frozen(self) -> FusedNetwork | None:
        return self._frozen[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, classes]`` of the frozen levels' results (level 1: of images)."""
        logits: Tensor = self.head(self.features(x))
        return logits

    @autocasts
    def features(self, x: Tensor) -> Tensor:
        x = self.adaptor(x)
        for block in self.blocks:
            x = block(x)
        return to_fp32(x)


def base_width(network: nn.Module) -> int:
    return next(layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d))


def scaled_width(option: str, network: nn.Module, clients: int) -> int:
    """Return the clients' width: a given number, or for ``"auto"`` round(w / sqrt(M)) of a network of width w.

    M branches of width w' have about M (w' / w)^2 times its parameters, so the fused model is about as large as one
    ordinary model (docs/methods/fusefl.md, section 4).
    """
    if option == "auto":
        return max(1, round(base_width(network) / math.sqrt(clients)))
    if not option.isdecimal() or int(option) < 1:
        raise UserError(f'Method option "width" must be auto or a number from 1, not "{option}".')
    return int(option)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict for a message: contiguous CPU copies."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in module.state_dict().items()
    }


def sent_state(network: nn.Module, level: int) -> dict[str, Tensor]:
    """Return the state dict of a level's block without frozen tensors."""
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    unsent, path = {*constant_buffers(network), *frozen}, f"blocks.{level - 1}"
    block = network.get_submodule(path).state_dict()
    return {name: value for name, value in block.items() if f"{path}.{name}" not in unsent}


def plain_head(states: Sequence[Mapping[str, Tensor]], final: str) -> dict[str, Tensor]:
    """Return the clients' classifiers merged into one, before calibration, for features fused by ``final``.

    The uniform average; with ``concat`` the logits on all branches' features are the mean of the clients'.
    """
    names = ("weight", "bias")
    head = {name: torch.stack([state[name].double() for state in states]).mean(0).float() for name in names}
    if final == "concat":
        head["weight"] = torch.cat([state["weight"] for state in states], 1) / len(states)
    return head
