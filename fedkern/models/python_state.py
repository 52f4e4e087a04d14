"""Python attributes of users' networks, which no vector holds: they go from client to client of a process."""

from __future__ import annotations

import functools
import io
import pickle
import sys
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

_SHIPPED = {"fedkern", "torch", *sys.stdlib_module_names} - {"__main__"}
_ENGINES = {*vars(nn.Module()), "track_running_stats"}
"""Attributes that PyTorch and the engine change."""
SMALL = 1 << 20
"""Most elements of a tensor whose values are compared; of a larger one it is the memory."""


class _Pickler(pickle.Pickler):
    """Writes values without modules and parameters, which are compared elsewhere."""

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            if value.numel() > SMALL:
                return value.data_ptr(), value._version
            return value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        return "" if isinstance(value, (Tensor, nn.Module)) else None


def attributes(network: nn.Module) -> dict[str, int]:
    """Hashes of what users' modules and their classes hold, by dotted name, beside what ``nn.Module`` itself keeps.

    Left out are attributes of PyTorch's and fedkern's own layers, cached properties and what cannot be pickled.
    """
    hashes: dict[str, int] = {}
    for path, module in network.named_modules():
        hashes |= {f"{path}.{name}".removeprefix("module.").removeprefix("."): x for name, x in fields(module).items()}
    return hashes


def fields(thing: Any) -> dict[str, int]:
    """Hashes of what an object of a user's class, and the class, hold, by name; see :func:`attributes`."""
    kinds = [kind for kind in type(thing).__mro__ if kind.__module__.partition(".")[0] not in _SHIPPED]
    of_classes = {name: value for kind in reversed(kinds) for name, value in vars(kind).items()}
    hashes: dict[str, int] = {}
    for name, value in {**of_classes, **vars(thing)}.items() if kinds else ():
        if name in _ENGINES or name.startswith("__") or isinstance(of_classes.get(name), functools.cached_property):
            continue
        with suppress(Exception), io.BytesIO() as file:  # a value may be anything
            _Pickler(file).dump(value)
            hashes[name] = hash(file.getvalue())
    return hashes
