"""Saved states: nested dicts of tensors, numbers and texts, as one safetensors file with a JSON tree.

Two states with the same digest are equal, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedkern.errors import Malformed, require_format
from fedkern.files import atomic
from fedkern.files.filesystem import describe_special_file, parse_json
from fedkern.messages.leaves import leaves
from fedkern.ops._core.checks import python_number


def digest(message: object) -> str:
    """Return the BLAKE2b of a message: names, dtypes, shapes and bits of all its contents."""
    total = hashlib.blake2b(digest_size=16)

    def put(value: object) -> None:
        if isinstance(value, Mapping):
            total.update(f"{{{len(value)}".encode())
            for name in sorted(value, key=repr):
                total.update(repr(name).encode())
                put(value[name])
        elif isinstance(value, (list, tuple)):
            total.update(f"[{len(value)}".encode())
            for item in value:
                put(item)
        elif isinstance(value, Tensor):
            total.update(f"{value.dtype}{list(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            total.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        elif isinstance(value, np.ndarray):
            total.update(f"{value.dtype}{list(value.shape)}".encode())
            total.update(value.tobytes())
        else:
            total.update(repr(value).encode())

    put(message)
    return total.hexdigest()


class Fingerprint:
    """Record of a state, by which a change is noticed.

    Another tensor, or another version of one, is a change without reading. Writes through ``.data``, NumPy's view or a
    fused optimiser change neither, so otherwise digests are compared.
    """

    def __init__(self, state: object) -> None:
        self._tensors, self._digest = _tensors_in(state), digest(state)

    def matches(self, state: object) -> bool:
        # Both hold their tensors, so that no new tensor gets the identity of an old one.
        pairs = zip_longest(_tensors_in(state), self._tensors, fillvalue=(None, 0))
        are_same = all(new is old and version == old_version for (new, version), (old, old_version) in pairs)
        return are_same and digest(state) == self._digest


def _tensors_in(state: object) -> list[tuple[Tensor, int]]:
    return [(leaf, leaf._version) for leaf in leaves(state) if isinstance(leaf, Tensor)]


ABOUT = "fedkern"  # the file's only metadata key: the order of several keys in the file would be random
FORMAT = 1
DEEPEST = 64
"""Most nested dicts and lists."""
State = dict[str, Any]
"""Contents of a file by name: tensors, numbers, texts, None, and lists and dicts of these."""


def save(path: Path, state: object) -> None:
    """Write ``state`` to ``path`` atomically.

    ``state`` may hold tensors (any dtype of safetensors; saved contiguous, on the CPU), NumPy arrays, ``bool``,
    ``int``, ``float`` (NaN and infinities included), ``str``, ``None``, lists, tuples, and dicts with text or integer
    keys.

    Raises:
        TypeError: ``state`` holds something else; the message says where.
        UserError: the file cannot be written.
    """
    Packed(state).save(path)


class Packed:
    """A copy of a state (see :func:`save`), which can be written while the state itself changes.

    Args:
        durable: whether a written file is on the disk; else the caller flushes file and folder.

    Attributes:
        size: bytes of its tensors.
    """

    def __init__(self, state: object, *, durable: bool = True) -> None:
        self._durable = durable
        self._tensors: dict[str, Tensor] = {}
        tree = tree_of(state, "state", self._keep)
        self._about = json.dumps({"format": FORMAT, "tree": tree}, allow_nan=False)
        self.size = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())

    def _keep(self, value: Tensor | np.ndarray, where: str) -> str:
        check_tensor(value, where)
        name = f"t{len(self._tensors)}"
        # An array may be a view with negative strides.
        tensor = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value.detach()
        # Copied, because safetensors refuses shared storage, and a view would be saved with its whole buffer.
        self._tensors[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
        return name

    def state(self) -> State:
        copy: State = value_of(json.loads(self._about)["tree"], lambda name: self._tensors[name].clone())
        return copy

    def save(self, path: Path) -> None:
        def fill(temporary: Path) -> None:
            save_file(self._tensors, temporary, metadata={ABOUT: self._about})

        atomic.write(path, fill, durable=self._durable)


def load(path: Path) -> State:
    """Read what :func:`save` wrote, tensors on the CPU.

    Raises:
        OtherFormat: the file has another format.
        ValueError: the file is missing, damaged or foreign.
    """
    result = part(path)
    if not isinstance(result, dict):
        raise ValueError(f"{path} does not hold a dict")
    return result


def part(path: Path, *keys: str | int) -> Any:
    """Return the value under nested ``keys`` of a saved dict, or None, reading nothing else."""
    try:
        if kind := describe_special_file(path):
            raise ValueError(f"it is {kind}, not a regular file")
        with safe_open(path, framework="pt") as file:
            about = parse_json((file.metadata() or {})[ABOUT])
            require_format(path, about["format"], FORMAT)
            tree = about["tree"]
            for key in keys:
                entries = tree.get("dict", []) if isinstance(tree, dict) else []
                tree = next((entry for name, entry in entries if name == key), None)
            return value_of(tree, file.get_tensor)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from None


class TooDeep(TypeError):
    """Error: a value is nested too deeply, or in itself."""


def tree_of(
    value: object, where: str, tensor: Callable[[Any, str], object], bound: float = math.inf, depth: int = 0
) -> object:
    """Return a state or message as a tree for JSON.

    Args:
        where: name of the value in error messages.
        tensor: returns the entry of a tensor or an array, from it and its place.
        bound: limit of absolute whole numbers.
        depth: number of dicts and lists around the value.
    """
    if isinstance(value, (Tensor, np.ndarray)):
        return {"array" if isinstance(value, np.ndarray) else "tensor": tensor(value, where)}
    if depth > DEEPEST:
        raise TooDeep(f"{where[:80]} stands too deep in dicts and lists")
    value = python_number(value)
    if isinstance(value, int) and abs(value) >= bound:
        raise TypeError(f"{where} is a whole number of more than {int(bound).bit_length() - 1} bits")
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [tree_of(entry, f"{where}[{i}]", tensor, bound, depth + 1) for i, entry in enumerate(value)]}
    if isinstance(value, Mapping):
        for key in value:
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise TypeError(f"{where} has a key of type {type(key).__name__}, which must be a text or an integer")
        items = value.items()
        return {"dict": [[key, tree_of(item, f"{where}[{key!r}]", tensor, bound, depth + 1)] for key, item in items]}
    raise TypeError(f"{where} is of type {type(value).__name__}: take tensors, numbers, texts, lists and dicts")


def check_tensor(value: Tensor | np.ndarray, where: str) -> None:
    """Raise TypeError if a file cannot hold a tensor or an array, named ``where`` in messages."""
    if isinstance(value, Tensor) and value.is_inference():
        raise TypeError(f"{where} is an inference-mode tensor: clone it outside of torch.inference_mode()")
    try:
        tensor = torch.from_numpy(np.empty(0, value.dtype)) if isinstance(value, np.ndarray) else value
    except (TypeError, ValueError):  # of objects, of texts, of another byte order
        raise TypeError(f"{where} is an array of {value.dtype}: take numbers of this machine's kind") from None
    odd = tensor.is_complex() or tensor.is_quantized or tensor.is_nested or tensor.is_meta
    if odd or tensor.layout is not torch.strided:
        kind = f"{tensor.layout} and {tensor.dtype} on {tensor.device}"
        raise TypeError(f"{where} is a tensor of {kind}: take a strided one of real numbers")


def value_of(tree: object, tensor: Callable[[Any], Tensor], bound: float = math.inf, depth: int = 0) -> Any:
    if isinstance(tree, int) and abs(tree) >= bound:
        raise Malformed(f"has a whole number of more than {int(bound).bit_length() - 1} bits")
    if tree is None or isinstance(tree, (str, int)) or (isinstance(tree, float) and math.isfinite(tree)):
        return tree
    if depth > DEEPEST:
        raise Malformed("has dicts and lists that stand too deep in one another")
    kind, value = next(iter(tree.items())) if isinstance(tree, dict) and len(tree) == 1 else ("", None)
    if kind in ("tensor", "array"):
        return tensor(value).numpy() if kind == "array" else tensor(value)
    if kind == "float" and value in ("nan", "inf", "-inf"):
        return float(value)
    if kind in ("list", "tuple") and isinstance(value, list):
        entries = [value_of(entry, tensor, bound, depth + 1) for entry in value]
        return entries if kind == "list" else tuple(entries)
    if kind == "dict" and isinstance(value, list):
        if not all(isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int) for pair in value):
            raise Malformed("has an invalid dict")
        return {key: value_of(entry, tensor, bound, depth + 1) for key, entry in value}
    raise Malformed("has a text that describes no value")
