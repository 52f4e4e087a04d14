"""Hashes of values and of code that a user gives, by which a resumed run is told from another one."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.usercode.identity import source

DEEP = 5
"""Levels of attributes of objects that are looked at."""


def digest(**values: Any) -> str:
    """SHA-256 of functions, modules, objects and values by name: of their code, state and attributes."""
    state = hashlib.sha256()
    hashed(values, state.update)
    return state.hexdigest()


def hashed(value: Any, update: Callable[[bytes], object], deep: int = DEEP) -> None:
    """Hashes nested tensors, arrays, texts and numbers, and functions; of other objects type and attributes."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            update(repr(key).encode())
            hashed(each, update, deep)
    elif isinstance(value, (tuple, list)):
        update(f"{len(value)};".encode())
        for each in value:
            hashed(each, update, deep)
    elif isinstance(value, (str, bytes, int, float, bool, type(None))):
        update(repr(value).encode())
    elif isinstance(value, (Tensor, np.ndarray, np.generic)):
        _values(value, update)
    elif deep:
        _object(value, update, deep - 1)


def _values(value: Any, update: Callable[[bytes], object]) -> None:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        update(f"{tensor.dtype} {list(tensor.shape)};".encode())
        update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    else:
        array = np.ascontiguousarray(value)
        update(f"{array.dtype} {array.shape};".encode())
        update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())


def _object(value: Any, update: Callable[[bytes], object], deep: int) -> None:
    if isinstance(value, functools.partial):
        hashed([value.func, value.args, value.keywords], update, deep)
    elif isinstance(value, MethodType):
        hashed([value.__func__, value.__self__], update, deep)
    elif isinstance(value, FunctionType):
        update(source(value).encode())
        hashed([value.__defaults__, value.__kwdefaults__], update, deep)
        for cell in value.__closure__ or ():
            hashed(_content(cell), update, deep)
    else:
        update(source(value).encode())
        if inspect.isroutine(value) or isinstance(value, type):
            return
        if isinstance(value, nn.Module):
            hashed(value.state_dict(), update, deep)
        if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
            _values(np.asarray(value), update)
        else:
            attributes = getattr(value, "__dict__", {}).items()
            hashed({name: each for name, each in attributes if not name.startswith("_")}, update, deep)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
