"""Hashes of values and of code that a user gives, by which a resumed run is told from another one."""

from __future__ import annotations

import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DEEP = 5
"""Levels of attributes of objects that are looked at."""


def digest(**given: Any) -> str:
    """SHA-256 of functions, modules, objects and values by name: of their code, state and attributes."""
    found = hashlib.sha256()
    hashed(given, found.update)
    return found.hexdigest()


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
        update(_source(value).encode())
        hashed([value.__defaults__, value.__kwdefaults__], update, deep)
        for cell in value.__closure__ or ():
            hashed(_content(cell), update, deep)
    elif inspect.isroutine(value) or isinstance(value, type):
        update(_source(value).encode())
    else:
        update(_source(type(value)).encode())
        if isinstance(value, nn.Module):
            hashed(value.state_dict(), update, deep)
        if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
            _values(np.asarray(value), update)
        else:
            held = {name: each for name, each in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
            hashed(held, update, deep)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _source(code: Any) -> str:
    """The text of a function or class; of a lambda, whose lines hold more, its byte code; else the name."""
    name = f"{getattr(code, '__module__', '')}.{getattr(code, '__qualname__', '')}"
    if isinstance(code, FunctionType) and code.__name__ == "<lambda>":
        return "\n".join(instructions(code.__code__))
    try:
        return textwrap.dedent(inspect.getsource(code))
    except (OSError, TypeError):
        return "\n".join([name, *instructions(code.__code__)]) if isinstance(code, FunctionType) else name


def instructions(code: CodeType) -> Iterator[str]:
    """What a piece of code does, without line numbers."""
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from instructions(constant)
        else:  # the order of a set depends on the process
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)
