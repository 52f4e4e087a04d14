"""Personal parts of a network: parameters and buffers that stay at every client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedkern.errors import UserError
from fedkern.models.state.freezing import constant_buffers, match_names
from fedkern.ops import FlatParameters

_MARK = "_fedkern_personal"
"""Attribute of a layer: the keys of its personal tensors."""


def keep(module: nn.Module, patterns: Sequence[str], text: str) -> None:
    """Mark trained parameters and buffers with names that match a pattern (``head.*``) as personal.

    The marks belong to the layers, also in deep copies and in other modules.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    constants = constant_buffers(module)
    keys = [*trained, *(name for name, _ in module.named_buffers() if name not in constants)]
    matches = match_names(module, patterns, keys, "--personal", f"trained parameter and no travelling buffer of {text}")
    if matches >= set(trained):
        raise UserError(
            f"--personal {','.join(patterns)} leaves nothing of {text} to be shared: name fewer of its parts, or take "
            "the method local."
        )
    for name in matches:
        path, _, key = name.rpartition(".")
        owner = vars(module.get_submodule(path))
        owner[_MARK] = tuple(sorted({*owner.get(_MARK, ()), key}))


def names(module: nn.Module) -> list[str]:
    return [
        f"{path}.{key}" if path else key for path, layer in module.named_modules() for key in vars(layer).get(_MARK, ())
    ]


def flatten(module: nn.Module) -> FlatParameters:
    """Return the module as flat vectors without its personal tensors and constant buffers."""
    return FlatParameters(module, {*names(module), *constant_buffers(module)})


def tensors(module: nn.Module) -> dict[str, Tensor]:
    personal = names(module)
    entries: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())} if personal else {}
    return {name: entries[name] for name in personal}


def copies(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named.items()}


@torch.no_grad()
def write(named: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        named[name].copy_(value)
