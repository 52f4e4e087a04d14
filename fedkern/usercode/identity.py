"""Identity of what a user gives: the content of a file, a module, a class, a function, an object with its values.

A resumed run is told from another one by it.  PyTorch is imported where values are hashed, since the front page of the
command line is printed without it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

from fedkern.files.inputs import open_regular, reading

PLAIN = (bool, int, float, str)
DEEP = 5
"""Levels of attributes of objects that are looked at."""
_FOREIGN = {"fedkern", *sys.stdlib_module_names} - {"__main__", "builtins"}
"""Packages whose classes say nothing of a class derived from them; code run by exec has "builtins"."""


def identity_of(thing: Any) -> str:
    """What a thing is told from its later self by, the same in every process.

    Args:
        thing: the content of a file, as bytes; the name of a module, as a text, which is found without importing it or
            its packages; a class, which counts with its bases outside fedkern; or a function, an object, tensors and
            values, nested by name, of which code, state and attributes count.

    Returns:
        Of bytes ``sha256:HEX``; of a module its version, that of its file, and the file; of everything else the SHA-256
        in hexadecimal.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    if isinstance(thing, bytes):
        return f"sha256:{hashlib.sha256(thing).hexdigest()}"
    if isinstance(thing, str):
        return _of_module(thing)
    if isinstance(thing, type):
        return _of_class(thing, source)
    state = hashlib.sha256()
    hashed(thing, state.update)
    return state.hexdigest()


def content(path: str | Path, what: str = "") -> bytes:
    """The content of a file of code; ``what`` names it in the error, by default as one that a plugin imports.

    Raises:
        UserError: the file cannot be read.
    """
    with reading(what or f"{path}, which a plugin imports,"), open_regular(path) as file:
        return file.read()


def _of_module(name: str) -> str:
    spec = _spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}")
    package = name.partition(".")[0]
    versions = {metadata.version(each) for each in metadata.packages_distributions().get(package, ())}
    parts = [" ".join(sorted(versions)) or "no version"]
    if spec.origin is not None and Path(spec.origin).is_file():
        parts += [identity_of(Path(spec.origin).read_bytes()), spec.origin]
    return ", ".join(parts)


def _spec(name: str) -> ModuleSpec | None:
    # importlib.util.find_spec would import, and so execute, the packages above the module.
    importlib.invalidate_caches()
    spec: ModuleSpec | None = None
    within = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        if depth > 1 and within is None:
            return None
        finders = [finder.find_spec for finder in sys.meta_path if hasattr(finder, "find_spec")]
        specs = (find(".".join(parts[:depth]), within) for find in finders)
        spec = next((each for each in specs if each is not None), None)
        if spec is None:
            return None
        within = spec.submodule_search_locations
    return spec


def by_bytecode(kind: type) -> str:
    """The identity of a class from which Python has no source, as in a notebook; other versions of Python differ."""
    return _of_class(kind, _bytecode)


def _of_class(kind: type, of: Callable[[type], str]) -> str:
    state = hashlib.sha256()
    for each in kind.__mro__:
        if each is not object and each.__module__.partition(".")[0] not in _FOREIGN:
            state.update(of(each).encode())
    return state.hexdigest()


def source(code: Any) -> str:
    """The source of a function or class, or that of an object's class; bytecode where Python has no source.

    Of a lambda it is the bytecode, since its lines hold more than the lambda.
    """
    if not (isinstance(code, type) or inspect.isroutine(code)):
        code = type(code)
    if isinstance(code, FunctionType) and code.__name__ == "<lambda>":
        return "\n".join(_instructions(code.__code__))
    try:
        return textwrap.dedent(inspect.getsource(code))
    except (OSError, TypeError, SyntaxError, IndexError):
        if isinstance(code, type):
            return _bytecode(code)
    name = f"{getattr(code, '__module__', '')}.{getattr(code, '__qualname__', '')}"
    return "\n".join([name, *_instructions(code.__code__)]) if isinstance(code, FunctionType) else name


def _bytecode(kind: type) -> str:
    """What the functions and plain attributes of a class do, without line numbers and docstrings of the class."""
    return "\n".join([kind.__name__, *_members(kind)])


def _members(kind: type) -> Iterator[str]:
    if hasattr(kind, "declared"):  # options of a method: what a dataclass makes of them says less
        yield from (f"{each.name} {each.type.__name__} {each.default!r} {each.range}" for each in kind.declared())
        return
    for name, value in vars(kind).items():
        function = inspect.unwrap(getattr(value, "__func__", None) or getattr(value, "fget", None) or value)
        if isinstance(function, FunctionType):
            yield name
            yield repr(function.__defaults__)
            yield from _instructions(function.__code__)
        elif isinstance(value, type) and value.__qualname__ == f"{kind.__qualname__}.{name}":
            yield from (name, *_members(value))
        elif not name.startswith("__") and isinstance(value, (*PLAIN, tuple)):
            yield f"{name}={value!r}"


def _instructions(code: CodeType) -> Iterator[str]:
    """What a piece of code does, without line numbers."""
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)
        else:  # the order of a set depends on the process
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)


def layout(tensors: Mapping[str, Any]) -> str:
    """SHA-256 of names, dtypes and shapes of tensors."""
    lines = (f"{name} {tensor.dtype} {list(tensor.shape)};" for name, tensor in tensors.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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
    elif isinstance(value, _arrays()):
        _values(value, update)
    elif deep:
        _object(value, update, deep - 1)


@functools.cache
def _arrays() -> tuple[type, ...]:
    import numpy as np
    import torch

    return torch.Tensor, np.ndarray, np.generic


def _values(value: Any, update: Callable[[bytes], object]) -> None:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        update(f"{tensor.dtype} {list(tensor.shape)};".encode())
        update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    else:
        array = np.ascontiguousarray(value)
        update(f"{array.dtype} {array.shape};".encode())
        update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())


def _object(value: Any, update: Callable[[bytes], object], deep: int) -> None:
    from numpy import asarray
    from torch.nn import Module

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
        if isinstance(value, Module):
            hashed(value.state_dict(), update, deep)
        if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
            _values(asarray(value), update)
        else:
            attributes = getattr(value, "__dict__", {}).items()
            hashed({name: each for name, each in attributes if not name.startswith("_")}, update, deep)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
