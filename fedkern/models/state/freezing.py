"""Frozen parts of a network: parameters and buffers that no message holds."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkern.errors import UserError, suggest_name

N = TypeVar("N", bound=nn.Module)


def freeze_parameters(module: nn.Module, patterns: Sequence[str], text: str) -> None:
    parameters = dict(module.named_parameters())
    for name in match_names(module, patterns, [*parameters], "--freeze", f"parameter of {text}"):
        parameters[name].requires_grad_(False)
    if parameters and not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"every parameter of {text} is frozen, so there is nothing to train: leave some out.")


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
