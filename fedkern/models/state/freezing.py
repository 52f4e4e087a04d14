"""Frozen and personal parts of a network: parameters and buffers that no message holds, or that stay at a client."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkern.errors import UserError, suggest_name
from fedkern.models.pretrained.row_memory import RememberingEncoder, RowMemory
from fedkern.ops import FlatParameters

N = TypeVar("N", bound=nn.Module)


def freeze_parameters(module: nn.Module, patterns: Sequence[str], text: str) -> None:
    parameters = dict(module.named_parameters())
    for name in match_names(module, patterns, [*parameters], "--freeze", f"parameter of {text}"):
        parameters[name].requires_grad_(False)
    if parameters and not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"every parameter of {text} is frozen, so there is nothing to train: leave some out.")
    for layer in module.modules():
        if isinstance(layer, RememberingEncoder) and not any(p.requires_grad for p in layer.parameters()):
            layer.memory = RowMemory.of(layer)


def match_names(module: nn.Module, patterns: Sequence[str], names: Sequence[str], flag: str, kind: str) -> set[str]:
    """Return the ``names`` that match a pattern of ``flag``, called ``kind`` in the error."""
    selection: set[str] = set()
    for pattern in patterns:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            children = [f"{name}.*" for name, child in module.named_children() if child.state_dict()]
            raise UserError(
                f"{flag} {pattern} matches no {kind}: its parts are {', '.join(children or names)}."
                f"{suggest_name(pattern, [*children, *names])}"
            )
        selection.update(matches)
    return selection


def frozen_norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms with frozen parameters only, whose running statistics must stay, too."""
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    parameters = {layer: [*layer.parameters(recurse=False)] for layer in norms}
    return [layer for layer in norms if parameters[layer] and not any(p.requires_grad for p in parameters[layer])]


def constant_buffers(module: nn.Module) -> list[str]:
    """Return the names of the buffers that no message holds: non-persistent ones, and those of :func:`frozen_norms`.

    The norms of an entirely frozen module count as trained.
    """
    is_partial = any(parameter.requires_grad for parameter in module.parameters())
    frozen = {id(norm) for norm in frozen_norms(module)} if is_partial else set()
    sent = {id(parameter) for parameter in module.parameters()}
    for layer in (layer for layer in module.modules() if id(layer) not in frozen):
        passing = layer._non_persistent_buffers_set
        sent |= {id(buffer) for name, buffer in layer._buffers.items() if name not in passing}
    return [name for name, buffer in module.named_buffers() if id(buffer) not in sent]


def train_mode(module: N) -> N:
    """Put a module in train mode, except for its :func:`frozen_norms`, and return the module."""
    module.train(True)
    for layer in frozen_norms(module):
        layer.eval()
    return module


def freeze_bn_after(module: nn.Module) -> None:
    """Put batch norms in eval mode, so that running statistics are used but not updated (FixBN).

    Scale and shift are still trained.  ``module.train()`` undoes this.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()


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
