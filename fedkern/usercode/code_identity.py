"""Identity of user-defined objects: a table of texts by path, which differs for changed objects.

:func:`identity_table` writes a row for every value below an object, such as ``loss_fn.weight``: a plain value of up to
`READABLE` characters as text, any other as SHA-256.  Equal objects have equal tables in every process, without
addresses, ``hash()`` and orders of sets.

* **Plain values** count by value: numbers, texts, bytes, ranges, dates, paths, UUIDs, patterns, dtypes, devices ...
* **Containers**: lists, tuples, deques and dicts in their order, sets sorted; of subclasses also class and attributes.
* **Tensors and arrays**: dtype, shape and values, whatever the strides.  Sparse and quantised tensors, masked arrays
  and arrays of objects count by their parts, tensors on ``meta`` without values.
* **Objects**: class and attributes, private ones and ``__slots__`` too, without cached properties.  An enum counts by
  name and value.  An object of C, or of a package that defines its pickling, counts by its pickled state.
* **nn.Module**: parameters, buffers (persistent or not), submodules, attributes and hooks, without the training mode.
* **Classes**: bases and members of a class and of its bases, outside of Python, torch, fedkern and installed packages.
* **Functions**: bytecode without line numbers; defaults, closures, attributes and wrapped functions; values of the
  module that the code names; names ``MODULE.X`` of the user's other modules; files of modules that the code imports by
  itself.
* **Partials, bound methods, callable objects**: function, arguments and object.
* **Modules and code of packages** count by name and version, Python, torch and fedkern by name: a run compares those
  versions by itself.

A value counts up to `LIMIT` bytes, nested objects up to `DEEP` levels, a table up to `NODES` values.  Anything beyond,
and unreadable values (locks, open files), have rows that begin with `NOT_COMPARED`.  A repeated object has a row with
its first path.

PyTorch is imported where values are walked: the command line's front page does without it.
"""

import dis
import enum
import functools
import hashlib
import importlib
import inspect
import os
import random
import re
import sys
import types
import weakref
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from uuid import UUID

from fedkern.files.filesystem import open_regular, report_unreadable

PLAIN = (bool, int, float, str)
LIMIT, DEEP, NODES, READABLE, ROWS = 1 << 20, 40, 1 << 14, 60, 200
"""Most bytes of a value, levels, values of a table, characters of a readable text, and rows that are stored."""
NOT_COMPARED = "not compared: "
"""Beginning of the text of a path that is not compared, before the reason."""
INSTALLED = ("site-packages", "dist-packages")
"""Folders of installed packages."""
Table = dict[str, str]
_PYTHON = "Python"
_CHANGED: dict[str, set[str]] = {}  # digests of objects before runs of this process, by the digest afterwards
_TEXTS = {
    bool, int, float, complex, str, bytes, bytearray, range, date, datetime, time, timedelta, timezone, Decimal,
    Fraction, UUID, PurePosixPath, PureWindowsPath, type(Path()), type(None), type(...), type(NotImplemented),
}  # fmt: skip
_FEW = 4  # most elements of a readable tensor
_HEAP = 1 << 9  # flag of classes made by Python code
_UNTOLD = {"__annotate__", "__classcell__", "__doc__", "__module__", "__name__", "__qualname__", "_abc_impl"}
_CACHES = {"dispatch_cache", "cache_token"}  # of functools.singledispatch
_PICKLING = ("__reduce_ex__", "__reduce__", "__getstate__")


# -- tables ------------------------------------------------------------------------------------------------------------


def identity_table(
    things: Mapping[str, object], *, weights: bool = True, limit: int = LIMIT, code: bool = True, local: bool = False
) -> dict[str, str]:
    """Return texts by path that differ for changed objects.

    Args:
        things: objects by the first part of their paths.
        weights: whether parameters and persistent buffers of modules count.
        limit: largest number of bytes of a value that count.
        code: whether the code of functions and classes counts, or their name alone.
        local: whether only this process compares the table, before and after a use of the objects.  Tensors of a graph,
            which a use leaves behind, do not count then, and the version of a tensor over ``limit`` does.
    """
    walk = _Walk(weights, limit, code, local)
    for name, thing in things.items():
        walk.visit(thing, name, DEEP)
    if any(text.startswith("code ") for text in walk.table.values()):
        walk.write(_PYTHON, f"{sys.version_info.major}.{sys.version_info.minor}")  # bytecode depends on the version
    return walk.table


def digest(table: Mapping[str, str]) -> str:
    """Return the SHA-256 of a table, or "" for an empty one."""
    text = "\n".join(f"{path}\0{table[path]}" for path in sorted(table))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest() if table else ""


def list_uncompared(table: Mapping[str, str]) -> list[str]:
    texts = {path: text.removeprefix(NOT_COMPARED) for path, text in table.items() if text.startswith(NOT_COMPARED)}
    return [f"`{path}` ({reason})" for path, reason in texts.items()]


def select_code(table: Mapping[str, str]) -> dict[str, str]:
    """Return the rows of functions and classes, which no training changes."""
    return {path: text for path, text in table.items() if text.startswith(("code ", "class "))}


def note_change(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Note that a run changed objects while it used them, so that they count as the former ones in this process."""
    if before != after:
        digests = {digest(before), *_CHANGED.get(digest(before), ())}
        _CHANGED.setdefault(digest(after), set()).update(digests)


def is_unchanged(stored: str | None, current: str) -> bool:
    """Return whether a stored digest is the current one, or that of the objects when a run began here."""
    return stored in (None, current) or stored in _CHANGED.get(current, ())


def find_changes(old_table: Mapping[str, str], new_table: Mapping[str, str]) -> list[str]:
    """Describe the differences of two tables, readable values first, without rows below a new or missing path."""
    paths = {path for path in {*old_table, *new_table} if old_table.get(path) != new_table.get(path)}
    changed_values, other_changes = [], []
    for path in sorted(paths):
        before, after = old_table.get(path), new_table.get(path)
        if before is None or after is None:
            if path != _PYTHON and not any(path.startswith((f"{above}.", f"{above}[")) for above in paths):
                other_changes.append(f"`{path}` is {'new' if before is None else 'gone'}")
        elif any(text.startswith(("code ", "sha256:")) for text in (before, after)):
            other_changes.append(f"`{path}` changed")
        else:
            changed_values.append(f"`{path}` changed from {before} to {after}")
    return [*changed_values, *other_changes]


def fold_table(table: Mapping[str, str], rows: int = ROWS) -> dict[str, str]:
    """Fold a table to at most ``rows`` rows, if possible, with hashes for all rows below a path."""
    parts = {path: re.split(r"(?=[.\[])", path) for path in table}
    groups: dict[str, Table] = {}
    for depth in range(max(map(len, parts.values()), default=0), 0, -1):
        groups = {}
        for path, text in table.items():
            groups.setdefault("".join(parts[path][:depth]), {})[path] = text
        if len(groups) <= rows:
            break
    return {path: group[path] if [*group] == [path] else f"sha256:{digest(group)}" for path, group in groups.items()}


# -- the walk ----------------------------------------------------------------------------------------------------------


class _Walk:
    def __init__(self, weights: bool, limit: int, code: bool, local: bool) -> None:
        self.table: Table = {}
        self._weights, self._limit, self._code, self._local, self._left = weights, limit, code, local, NODES
        self._paths: dict[int, tuple[str, Any]] = {}  # of objects by id, with the objects, so that no id is used again
        self._classes: dict[int, type] = {}

    def write(self, path: str, text: str) -> str:
        """Add a row, with a prime if the path is taken, and return its path."""
        while path in self.table:
            path += "'"
        self.table[path] = text
        return path

    def _hash(self, path: str, header: str, content: bytes, total: int) -> None:
        self.write(path, f"sha256:{hashlib.sha256(header.encode() + content).hexdigest()}")
        if total > len(content):
            self.write(f"{path}[...]", f"{NOT_COMPARED}all after its first {len(content):,} bytes")

    def visit(self, value: object, path: str, deep: int) -> None:
        try:
            text = _text(value, self._limit)
            if text is None or (self._local and text == "{}"):  # a dict that may get tensors of a graph
                self._visit(value, path, deep)
            elif len(text) <= READABLE:
                self.write(path, text)
            else:
                content = text.encode(errors="surrogatepass")
                self._hash(path, "", content[: self._limit], len(content))
        except Exception as error:  # an object may raise anything
            self.write(path, f"{NOT_COMPARED}{type(value).__name__}, {type(error).__name__}")

    def _visit(self, value: object, path: str, deep: int) -> None:
        self._left -= 1
        if deep < 0:
            self.write(path, f"{NOT_COMPARED}deeper than {DEEP} levels")
        elif self._left < 0:
            if self._left == -1:
                self.write(path, f"{NOT_COMPARED}this and all after {NODES:,} values")
        elif isinstance(value, _arrays()):
            self._array(value, path, deep)
        elif id(value) in self._paths:
            self.write(path, f"same as {self._paths[id(value)][0]}")
        else:
            self._paths[id(value)] = path, value
            self._thing(value, path, deep - 1)

    def _rows(self, values: Iterable[tuple[object, object]], path: str, deep: int, form: str = ".{}") -> None:
        for name, value in values:
            if not (self._local and getattr(value, "grad_fn", None) is not None):
                self.visit(value, path + form.format(name), deep)
            if self._left < 0:
                return

    def _thing(self, value: object, path: str, deep: int) -> None:
        if isinstance(value, types.ModuleType):
            if (package := _package(value.__name__)) is None:
                package = str(vars(value).get("__version__", ""))
            self.write(path, f"module {value.__name__}" + (f" ({package})" if package else ""))
        elif isinstance(value, types.GeneratorType):
            self.write(path, f"{NOT_COMPARED}the place in a generator")
            self._rows(inspect.getgeneratorlocals(value).items(), path, deep)
        elif (reason := _of_process(value)) is not None:
            self.write(path, f"{NOT_COMPARED}{reason}")
        elif isinstance(value, type):
            self.write(path, f"class {_class_text(value)}")
            self._class(value, deep)
        elif isinstance(value, types.FunctionType):
            self._function(value, path, deep)
        elif isinstance(value, (types.MethodType, staticmethod, classmethod)):
            self.visit(value.__func__, path, deep)
            if isinstance(value, types.MethodType):
                self.visit(value.__self__, f"{path}.__self__", deep)
        elif isinstance(value, property):
            for accessor in filter(None, (value.fget, value.fset, value.fdel)):
                self.visit(accessor, path, deep)
        elif isinstance(value, functools.partial):
            self.visit(value.func, path, deep)
            self._rows(enumerate(value.args), path, deep, "[{}]")
            self._rows([*value.keywords.items(), *_attributes(value)], path, deep)
        elif isinstance(value, weakref.ReferenceType):
            self.visit(value(), path, deep)
        elif inspect.isroutine(value) and hasattr(value, "__qualname__"):  # a function of C, no descriptor of a user
            module = getattr(value, "__module__", None) or ""
            self.write(path, f"function {'' if _package(module) is None else f'{module}.'}{value.__qualname__}")
            parts = [(name, getattr(value, name, None)) for name in ("__self__", "__wrapped__")]  # a method, lru_cache
            left_out = types.ModuleType, type, type(None)
            self._rows([pair for pair in parts if not isinstance(pair[1], left_out)], path, deep)
        else:
            self._object(value, path, deep)

    def _array(self, value: Any, path: str, deep: int) -> None:
        import numpy as np
        import torch

        if isinstance(value, torch.nn.Parameter) and not self._weights:
            self.write(path, "parameter")
            return
        if isinstance(value, torch.Tensor):
            tensor = value.detach()
            header = f"{tensor.dtype} {list(tensor.shape)}"
            if tensor.layout != torch.strided or tensor.is_nested:
                self.write(path, f"{tensor.layout} {header}")
                self._visit_pickled(tensor.__reduce_ex__(4), type(tensor), path, deep)
            elif tensor.is_quantized:
                self.visit([header, tensor.dequantize()], path, deep)
            elif tensor.is_meta:
                self.write(path, f"{header} without values")
            elif tensor.numel() <= _FEW:
                self.write(path, f"{header} {tensor.tolist()}")
            else:
                head = tensor.reshape(-1)[: max(1, self._limit // tensor.element_size())].resolve_conj().resolve_neg()
                header += f" {tensor._version}" if self._local and head.numel() < tensor.numel() else ""
                self._hash(path, header, head.cpu().contiguous().view(torch.uint8).numpy().tobytes(), tensor.nbytes)
            return
        header = f"{value.dtype} {list(value.shape)}"
        if isinstance(value, np.ma.MaskedArray):
            self.visit([np.asarray(value.data), np.ma.getmaskarray(value)], path, deep)
        elif value.dtype.hasobject:
            self.visit([header, value.tolist()], path, deep)
        elif value.size <= _FEW:
            self.write(path, f"{header} {value.tolist()}")
        else:
            part = np.asarray(value).reshape(-1)[: max(1, self._limit // value.itemsize)]
            self._hash(path, header, part.tobytes(), value.nbytes)

    def _object(self, value: object, path: str, deep: int) -> None:
        from torch import nn

        kind = type(value)
        is_user_class = _package(kind.__module__, kind) is None
        base: Any = None if kind in _TEXTS else next((base for base in kind.__mro__ if base in _TEXTS), None)
        size = f" of {len(value)}" if isinstance(value, (*_SEQUENCES, dict, set, frozenset)) else ""
        maker = next(part for part in kind.__mro__ if any(name in vars(part) for name in _PICKLING))
        has_own_rules = isinstance(value, (nn.Module, enum.Enum, types.MappingProxyType)) or bool(base or size)
        pickled = not has_own_rules and maker is not object and _package(maker.__module__, maker) is not None
        attributes = [] if pickled and not is_user_class else [*_attributes(value)]
        reduced: Any = ""
        if pickled or (not has_own_rules and maker is object and not (is_user_class and attributes)):
            try:
                reduced = value.__reduce_ex__(4)
            except TypeError:  # the object has fields of C
                if not attributes:
                    raise
                self.write(f"{path}[...]", f"{NOT_COMPARED}fields of C")
            reduced = "" if not pickled and (attributes or getattr(value, "__dict__", None)) else reduced
        self.write(path, _class_text(kind) + ("" if self._local else size))  # the rows show a changed size
        self._class(kind, deep)
        if isinstance(value, nn.Module):
            self._module(dict(attributes), path, deep)
            return
        if isinstance(value, enum.Enum):
            attributes = [("name", value.name), ("value", value.value)]
        elif base is not None:
            self.visit(base.__repr__(value), f"{path}.value", deep)
        elif isinstance(value, _SEQUENCES):
            basic: Any = next(part for part in _SEQUENCES if isinstance(value, part))
            self._rows(enumerate(basic.__iter__(value)), path, deep, "[{}]")
        elif isinstance(value, (dict, types.MappingProxyType)):
            items = dict.items(value) if isinstance(value, dict) else value.items()
            self._rows(((self._key(key, deep), item) for key, item in items), path, deep, "[{}]")
        elif isinstance(value, (set, frozenset)):
            members = {self._key(item, deep): item for item in value}
            self._rows(((key, members[key]) for key in sorted(members)), path, deep, "[{}]")
        self._rows(attributes, path, deep)
        self._visit_pickled(reduced, kind, path, deep)

    def _visit_pickled(self, reduced: Any, kind: type, path: str, deep: int) -> None:
        """Add the rows of the result of ``__reduce_ex__``."""
        if isinstance(reduced, str):
            self._rows([("name", reduced)] if reduced else [], path, deep)
            return
        arguments = [part for part in reduced[1] if part is not kind]
        content = [None if part is None else list(part) for part in reduced[3:5]]
        parts = [arguments or None, *reduced[2:3], *content]
        names = ("arguments", "state", "items", "pairs")
        self._rows([pair for pair in zip(names, parts, strict=False) if pair[1] is not None], path, deep)

    def _key(self, key: object, deep: int) -> str:
        """Return the text of a key or of a member of a set, independent of the others."""
        text = _text(key, self._limit)
        if text is None:
            walk = _Walk(self._weights, self._limit, code=False, local=self._local)
            walk._left, walk._paths = self._left, dict(self._paths)
            walk.visit(key, "", deep)
            self._left = walk._left
            text = f"{_class_text(type(key))} {digest(walk.table)[:12]}"
        return text if len(text) <= READABLE else hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]

    def _module(self, attributes: dict[str, Any], path: str, deep: int) -> None:
        from torch import nn

        passing = attributes.get("_non_persistent_buffers_set", ())
        for group in ("_parameters", "_buffers", "_modules"):
            parts = {name: part for name, part in attributes.pop(group, {}).items() if part is not None}
            if not self._weights and group != "_modules":
                parts = {name: part for name, part in parts.items() if group == "_buffers" and name in passing}
            self._rows(parts.items(), path, deep)
        for name in sorted(vars(nn.Module()).keys() & attributes.keys()):
            hooks = attributes.pop(name)  # by numbers of the process's counter, or modes
            if isinstance(hooks, dict):
                attributes |= {f"{name}[{place}]": hook for place, hook in enumerate(hooks.values())}
        self._rows(attributes.items(), path, deep)

    # -- code ----------------------------------------------------------------------------------------------------------

    def _class(self, kind: type, deep: int) -> None:
        bases: tuple[type, ...] = (*kind.__mro__, *inspect.getmro(type(kind))) if self._code else ()
        for base in bases:
            if id(base) in self._classes or _package(base.__module__, base) is not None:
                continue
            self._classes[id(base)] = base
            class_path = self.write(_short_name(base), f"class of {', '.join(map(_class_text, base.__bases__))}")
            members = [(name, member) for name, member in vars(base).items() if _counts(name, member)]
            if issubclass(base, enum.Enum):
                members = [pair for pair in members if pair[0] not in base.__members__ and not pair[0].startswith("_")]
                members += [(name, member._value_) for name, member in base.__members__.items()]
            self._rows(members, class_path, deep)

    def _function(self, function: types.FunctionType, path: str, deep: int) -> None:
        code, package = function.__code__, _package(function.__globals__.get("__name__", ""))
        cells = [
            (name, _cell_content(cell))
            for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)
            if package is None or name not in _CACHES
        ]
        attributes = {name: value for name, value in vars(function).items() if name not in _UNTOLD}
        if package is not None or not self._code:
            place = "" if package is None else f"{function.__globals__['__name__']}."
            self.write(path, f"function {place}{_short_name(code)}" + (f" ({package})" if package else ""))
            wrapped = {"__wrapped__": attributes["__wrapped__"]} if "__wrapped__" in attributes else {}
            self._rows([*cells, *wrapped.items()], path, deep)
            return
        self.write(path, f"code {_code_hash(code)}")
        names = code.co_varnames[: code.co_argcount]
        defaults = function.__defaults__ or ()
        self._rows(zip(names[len(names) - len(defaults) :], defaults, strict=True), path, deep)
        self._rows((function.__kwdefaults__ or {}).items(), path, deep)
        read, all_names, imports = _names(code)
        values = [(name, function.__globals__[name]) for name in read if name in function.__globals__]
        for name, value in [*cells, *values]:
            self._visit_named(value, f"{path}.{name}", all_names, deep)
        for name in imports:
            if _package(name) is None:
                file = Path(_origin(name))
                self.write(f"{path}.{name}", content_hash(file.read_bytes()) if file.is_file() else "no file")
        self._rows(attributes.items(), path, deep)

    def _visit_named(self, value: object, path: str, attributes: frozenset[str], deep: int) -> None:
        """Add the rows of a value that code names, and if it is a user's module, of the names in it."""
        self.visit(value, path, deep)
        if isinstance(value, types.ModuleType) and _package(value.__name__) is None and deep > 0:
            for name in sorted(attributes & vars(value).keys()):
                self._visit_named(vars(value)[name], f"{path}.{name}", attributes, deep - 1)


_SEQUENCES = (list, tuple, deque)
_FORMS: dict[type, str] = {list: "[{}]", tuple: "({})", dict: "{{{}}}", set: "set({})", frozenset: "frozenset({})"}


def _text(value: Any, limit: int, deep: int = _FEW) -> str | None:
    """Return the text of a plain value or of a container of them, a little over the limit at most, else None."""
    kind = type(value)
    if kind in _TEXTS:
        zone = getattr(value, "tzinfo", None)
        if kind is int and abs(value) > sys.maxsize:
            return hex(value)  # the decimal form has a limit
        return repr(value) if zone is None or type(zone) is timezone else None
    if kind in _FORMS:
        if not deep:
            return None
        texts: list[str] = []
        size = 0
        for item in value.items() if kind is dict else value:
            parts = [_text(part, limit, deep - 1) for part in (item if kind is dict else (item,))]
            if None in parts:
                return None
            texts.append(": ".join(filter(None, parts)))
            size += len(texts[-1])
            if size > limit and kind not in (set, frozenset):
                break
        return _FORMS[kind].format(", ".join(sorted(texts) if kind in (set, frozenset) else texts))
    if isinstance(value, re.Pattern):
        return f"re.compile({value.pattern!r}, {value.flags})"
    if isinstance(value, memoryview):
        return repr((value.format, value.shape, value.tobytes()))
    return repr(value) if isinstance(value, _described_types()) else None


@functools.cache
def _arrays() -> tuple[type, ...]:
    import numpy as np
    import torch

    return torch.Tensor, np.ndarray, np.generic


@functools.cache
def _described_types() -> tuple[type, ...]:
    import numpy as np
    import torch

    return torch.dtype, torch.device, torch.layout, torch.memory_format, np.dtype


def _attributes(value: object) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of an object by name: slots, those of C, and its dict, without cached properties."""
    for kind in type(value).__mro__:
        for name, member in vars(kind).items() if "__slots__" in vars(kind) else ():
            if isinstance(member, types.MemberDescriptorType):
                with suppress(AttributeError):  # unset
                    yield name, member.__get__(value)
    for name in ("maxlen", "default_factory"):
        if isinstance(value, (deque, defaultdict)) and hasattr(value, name):
            yield name, getattr(value, name)
    for name, attribute in list(getattr(value, "__dict__", {}).items()):
        is_cached = isinstance(inspect.getattr_static(type(value), name, None), functools.cached_property)
        is_saved_mode = name.startswith("prev") and type(value).__module__.startswith("torch.")  # in torch's modes
        if not is_cached and not is_saved_mode and name not in _UNTOLD and not name.startswith("_torchdynamo"):
            yield name, attribute


def _of_process(value: object) -> str | None:
    """Describe a value that belongs to the process, else return None."""
    import numpy as np
    import torch

    if any(value is generator for generator in (random._inst, np.random.mtrand._rand, torch.default_generator)):
        return "generator of the process, which a run seeds"
    if value is os.environ:
        return "environment of the process"
    return "progress bar" if type(value).__module__.startswith("tqdm.") else None


def _counts(name: str, member: object) -> bool:
    """Return whether a member of a class can affect its objects."""
    if isinstance(member, (types.MemberDescriptorType, types.GetSetDescriptorType)) or name in _UNTOLD:
        return False
    special = name.startswith("__") and name.endswith("__")
    return not special or callable(member) or isinstance(member, (classmethod, staticmethod, property))


def _cell_content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _short_name(thing: Any) -> str:
    name: str = thing.co_qualname if isinstance(thing, types.CodeType) else thing.__qualname__
    return name.rpartition("<locals>.")[2]


def _class_text(kind: type) -> str:
    package = _package(kind.__module__, kind)
    place = "" if package is None or kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{place}{_short_name(kind)}" + (f" ({package})" if package else "")


# -- code --------------------------------------------------------------------------------------------------------------


def _names(code: types.CodeType) -> tuple[list[str], frozenset[str], list[str]]:
    """Return the names that code reads, all names in code, and the modules that code imports."""
    steps = [step for part in _pieces(code) for step in dis.get_instructions(part)]
    read = {step.argval for step in steps if step.opname.startswith("LOAD_") and step.opname.endswith(_READS)}
    imports = {step.argval for step in steps if step.opname == "IMPORT_NAME" and step.argval}
    return sorted(read), frozenset(name for part in _pieces(code) for name in part.co_names), sorted(imports)


_READS = ("_GLOBAL", "_NAME", "_GLOBALS")  # LOAD_GLOBAL, LOAD_NAME, LOAD_FROM_DICT_OR_GLOBALS


def _pieces(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _pieces(constant)


def _code_hash(code: types.CodeType) -> str:
    """Return a hash of code without line numbers and names of files."""
    digest_state = hashlib.sha256()
    for part in _pieces(code):
        digest_state.update(part.co_code + part.co_exceptiontable)
        names = part.co_names, part.co_varnames, part.co_freevars, part.co_argcount, part.co_kwonlyargcount
        constants = [_text(constant, LIMIT, DEEP) for constant in part.co_consts]  # None: code
        digest_state.update(repr((names, constants, part.co_flags)).encode(errors="surrogatepass"))
    return digest_state.hexdigest()


def _package(module: str, kind: type | None = None) -> str | None:
    """Return name and version of a module's package, None for a user's, "" for Python's, torch's and fedkern's.

    ``kind`` is a class of the module: classes made by ``exec`` claim to be of ``builtins``.
    """
    top = module.partition(".")[0]
    if top == "builtins" and kind is not None:
        return None if kind.__flags__ & _HEAP else ""
    package = sys.modules.get(top)
    file = getattr(package, "__file__", None)
    if file is None:
        file = next(iter(getattr(package, "__path__", ())), "") or ("" if package else _origin(top))
    return _package_at(top, str(file))


@functools.cache
def _package_at(top: str, file: str) -> str | None:
    if top in ("torch", "fedkern"):
        return ""
    if set(INSTALLED) & set(Path(file).parts):
        return f"{top} {_version(top)}"
    standard = Path(file).is_relative_to(Path(os.__file__).parent) if file else top in sys.stdlib_module_names
    return "" if standard and top != "__main__" else None


def _version(package: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    if isinstance(version := getattr(sys.modules.get(package), "__version__", None), str):
        return version
    versions = {metadata.version(name) for name in metadata.packages_distributions().get(package, ())}  # slow
    return " ".join(sorted(versions)) or "no version"


def _origin(name: str) -> str:
    importlib.invalidate_caches()
    spec = _spec(name) if name else None
    return (spec.origin or "") if spec is not None and spec.has_location else ""


def module_identity(name: str) -> str:
    """Return version, hash and path of the file of a module, without importing it."""
    importlib.invalidate_caches()
    spec = _spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}")
    parts = [_version(name.partition(".")[0])]
    if spec.origin is not None and Path(spec.origin).is_file():
        parts += [content_hash(Path(spec.origin).read_bytes()), spec.origin]
    return ", ".join(parts)


def _spec(name: str) -> ModuleSpec | None:
    # importlib.util.find_spec would import, and so execute, the packages above the module.
    package = name.rpartition(".")[0]
    within = getattr(_spec(package), "submodule_search_locations", None) if package else None
    if package and within is None:
        return None
    finders = [finder.find_spec for finder in sys.meta_path if hasattr(finder, "find_spec")]
    specs = (find(name, within) for find in finders)
    return next((spec for spec in specs if spec is not None), None)


# -- files -------------------------------------------------------------------------------------------------------------


def content_hash(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def read_content(path: str | Path, subject: str = "") -> bytes:
    """Return the content of a file of code, called ``subject`` in the error."""
    with report_unreadable(subject or f"{path}, which a plugin imports,"), open_regular(path) as file:
        return file.read()


def hash_layout(tensors: Mapping[str, Any]) -> str:
    lines = (f"{name} {tensor.dtype} {list(tensor.shape)};" for name, tensor in tensors.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
