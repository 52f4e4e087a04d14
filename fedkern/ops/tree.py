"""aggregate for whole models: lists of state dicts, of lists of NumPy arrays, or of ``{name: array}``.

A model is a mapping from names to tensors or arrays, or a sequence of them: what ``module.state_dict()`` returns, what
Flower's clients send.  Every function takes M models of one form and returns a model of that form: the same names or
positions, shapes, dtypes and kinds of array.  Floating entries are averaged by the operator of the same name in
:mod:`fedkern.ops`.  Integer and boolean entries (``num_batches_tracked``) become the largest value of the M models.
There is no gradient.

A large entry is read where it lies; small ones are gathered into one flat buffer.  Every entry of the result has memory
of its own, so that a model takes its own size when it is pickled.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.ops._aggregate import distances, mean, robust
from fedkern.ops._core.checks import check_dense
from fedkern.ops._core.layout import dense_stride
from fedkern.ops._core.private_torch import flatten_dense

__all__ = ["krum", "median", "trimmed_mean", "weighted_mean"]

Tree = TypeVar("Tree", bound=Mapping[Any, Any] | Sequence[Any])

# Elements from which an entry is worth a call of its own: below, the call costs more than copying M such entries.
_LARGE = 8192
_FLOATS = frozenset(
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, *map(np.dtype, ("float16", "float32", "float64"))]
)


@torch.no_grad()
def weighted_mean(models: Sequence[Tree], weights: Tensor | Sequence[float]) -> Tree:
    """Averages models entry by entry (:func:`fedkern.ops.weighted_mean`; FedAvg, arXiv 1602.05629).

    Args:
        models: M models of one form.
        weights: M finite numbers, at least 0 and not all 0; they need not sum to one.

    Returns:
        The average, in the form of the models.

    Raises:
        TypeError, ValueError: models differ in names, shapes, dtypes or devices, or an argument is wrong.
    """
    return _by_coordinate(models, lambda vectors: mean.weighted_mean(vectors, weights))


@torch.no_grad()
def median(models: Sequence[Tree], weights: Tensor | Sequence[float] | None = None) -> Tree:
    """Takes the median of every coordinate (:func:`fedkern.ops.median`; arXiv 1803.01498).

    Args:
        models: M models of one form.
        weights: M finite numbers, at least 0 and not all 0; default: equal.

    Returns:
        The median, in the form of the models.

    Raises:
        TypeError, ValueError: models differ in names, shapes, dtypes or devices, or an argument is wrong.
    """
    return _by_coordinate(models, lambda vectors: robust.median(vectors, weights))


@torch.no_grad()
def trimmed_mean(models: Sequence[Tree], trim: int, weights: Tensor | Sequence[float] | None = None) -> Tree:
    """Averages every coordinate without its ``trim`` largest and smallest values (:func:`fedkern.ops.trimmed_mean`).

    Args:
        models: M models of one form.
        trim: number of values dropped at each end of every coordinate, ``0 <= 2 * trim < M``.
        weights: M finite numbers, at least 0 and not all 0; default: equal.

    Returns:
        The trimmed mean, in the form of the models.

    Raises:
        TypeError, ValueError: models differ in names, shapes, dtypes or devices, or an argument is wrong.
    """
    return _by_coordinate(models, lambda vectors: robust.trimmed_mean(vectors, trim, weights))


@torch.no_grad()
def krum(models: Sequence[Tree], byzantine: int, keep: int = 1) -> Tree:
    """Selects the ``keep`` models that lie closest to others, and averages them (:func:`fedkern.ops.krum`).

    Distances are taken over all floating entries.  Entries of several dtypes are compared in the widest of them.

    Args:
        models: M models of one form.
        byzantine: number f of models that may be arbitrary, with ``2 f + 2 < M``.
        keep: number of models that are averaged, from 1 to ``M - f``.

    Returns:
        The average of the kept models, in the form of the models.

    Raises:
        TypeError, ValueError: models differ in names, shapes, dtypes or devices, or an argument is wrong.
    """
    forest = _Forest(models)
    return forest.model(forest.cut(distances.krum(forest.stacked(), byzantine, keep)))


class _Forest:
    """M models of one form as rows: ``rows[i][m]`` is entry i of model m, a tensor or a NumPy array.

    Attributes:
        first: a model of the form.
        keys: names or positions of the entries.
        floating: positions of the floating entries in ``rows``.
    """

    def __init__(self, models: Sequence[Any]) -> None:
        if isinstance(models, (Mapping, Tensor, np.ndarray, str)) or not isinstance(models, Sequence):
            raise TypeError(f"models must be a list of models, not {type(models).__name__}")
        if not models:
            raise ValueError("models must hold at least one model, but is empty")
        self.first: Any = models[0]
        self.keys = _keys(self.first)
        for m, model in enumerate(models):
            self._check_form(model, f"models[{m}]")
        self.rows = [self._row(key, [model[key] for model in models]) for key in self.keys]
        for key, row in zip(self.keys, self.rows, strict=True):
            if isinstance(row[0], Tensor) and row[0].is_floating_point() and row[0].dtype not in _FLOATS:
                raise TypeError(
                    f"models[0][{key!r}] must be float32, float64, bfloat16, float16 or whole numbers, but has dtype "
                    f"{row[0].dtype}: convert it, or leave it out"
                )
        self.floating = [i for i, row in enumerate(self.rows) if row[0].dtype in _FLOATS]

    def _check_form(self, model: Any, name: str) -> None:
        if isinstance(model, Mapping) != isinstance(self.first, Mapping):
            raise TypeError(f"{name} must be a {_form(self.first)} as models[0] is, not a {_form(model)}")
        if isinstance(model, Mapping):
            if model.keys() == self.first.keys():
                return
            for key in self.keys:
                if key not in model:
                    raise ValueError(f"{name} must have the entries of models[0], but lacks {key!r}")
            more = next(key for key in model if key not in self.first)
            raise ValueError(f"{name} must have the entries of models[0], but has {more!r} too")
        if len(_keys(model)) != len(self.keys):
            raise ValueError(f"{name} must have {len(self.keys)} entries as models[0], but has {len(model)}")

    def _row(self, key: Any, row: list[Any]) -> list[Any]:
        """The entries of one name, checked: all tensors, or all arrays that torch can read."""
        one = row[0]
        arrays = type(one) is np.ndarray and _is_plain(one)
        if arrays or type(one) in (Tensor, nn.Parameter):
            kind, shape, dtype = type(one), one.shape, one.dtype
            same = all(type(x) is kind and x.shape == shape for x in row)
            if arrays and same and all(x.dtype == dtype and x.flags.c_contiguous for x in row):
                return row
            alike = not arrays and same and all(x.dtype == dtype and x.device == one.device for x in row)
            if alike and one.layout is torch.strided and not (one.is_complex() or one.is_nested or one.is_quantized):
                return row
        tensors = [_tensor(x, f"models[{m}][{key!r}]") for m, x in enumerate(row)]
        one = tensors[0]
        for m, tensor in enumerate(tensors):
            where = f"models[{m}][{key!r}]"
            if tensor.shape != one.shape:
                raise ValueError(f"{where} must have shape {list(one.shape)}, but has {list(tensor.shape)}")
            if tensor.dtype != one.dtype:
                raise TypeError(f"{where} must have dtype {one.dtype}, but has {tensor.dtype}")
            if tensor.device != one.device:
                raise ValueError(f"{where} must be on {one.device}, but is on {tensor.device}")
        return tensors

    def stacked(self) -> Tensor:
        """``[M, P]``: all floating entries of every model, in the widest of their dtypes."""
        rows = [[_flat(x) for x in self.rows[i]] for i in self.floating]
        if not rows:
            raise ValueError("models must have a floating entry, but have none")
        device, dtype = rows[0][0].device, rows[0][0].dtype
        for i, row in zip(self.floating, rows, strict=True):
            if row[0].device != device:
                raise ValueError(
                    f"all floating entries must be on one device: {self.keys[i]!r} is on {row[0].device}, "
                    f"{self.keys[self.floating[0]]!r} on {device}"
                )
            dtype = torch.promote_types(dtype, row[0].dtype)
        return _gathered(rows, dtype)

    def cut(self, vector: Tensor) -> dict[int, Any]:
        """The floating entries in a vector ``[P]`` of :meth:`stacked`, in their shapes and dtypes."""
        entries: dict[int, Any] = {}
        ones = [self.rows[i][0] for i in self.floating]
        sizes = [int(np.prod(one.shape)) for one in ones]
        for i, one, piece in zip(self.floating, ones, _pieces(vector, sizes), strict=True):
            entries[i] = piece.view(one.shape).to(_flat(one).dtype)
        return entries

    def model(self, floating: Mapping[int, Any]) -> Any:
        """A model of this form: the given floating entries, and the maximum of the others."""
        entries = []
        for i, (key, row) in enumerate(zip(self.keys, self.rows, strict=True)):
            entry = floating[i] if i in floating else _largest(row)
            if isinstance(entry, Tensor) and not isinstance(self.first[key], Tensor):
                entry = entry.numpy()
            entries.append(entry)
        if not isinstance(self.first, Mapping):
            return tuple(entries) if isinstance(self.first, tuple) else entries
        if not isinstance(self.first, OrderedDict):
            return dict(zip(self.keys, entries, strict=True))
        ordered = OrderedDict(zip(self.keys, entries, strict=True))
        if hasattr(self.first, "_metadata"):  # of a state dict: the versions of its modules
            cast(Any, ordered)._metadata = self.first._metadata
        return ordered


def _by_coordinate(models: Sequence[Tree], operator: Callable[[Sequence[Tensor] | Tensor], Tensor]) -> Tree:
    """Applies an operator that treats coordinates apart to every entry of the models."""
    forest = _Forest(models)
    results: dict[int, Any] = {}
    small: dict[Any, list[int]] = {}
    for i in forest.floating:
        row = forest.rows[i]
        one = row[0]
        if type(one) is np.ndarray:
            if one.size < _LARGE:
                small.setdefault(one.dtype, []).append(i)
            else:
                results[i] = operator([_flat(x) for x in row]).numpy().reshape(one.shape)
        elif one.numel() < _LARGE:
            small.setdefault((one.dtype, one.device), []).append(i)
        else:
            vectors, stride = _vectors(row)
            results[i] = operator(vectors).as_strided(one.shape, stride)
    for kind, group in small.items():
        rows = [forest.rows[i] for i in group]
        pieces = _small_arrays(rows, operator) if isinstance(kind, np.dtype) else _small_tensors(rows, operator)
        results.update(zip(group, pieces, strict=True))
    if not results:
        operator([torch.zeros(0)] * len(models))  # the arguments are checked even where nothing is averaged
    return cast(Tree, forest.model(results))


def _small_arrays(rows: Sequence[Sequence[Any]], operator: Callable[[Tensor], Tensor]) -> list[Any]:
    count, sizes = len(rows[0]), [row[0].size for row in rows]
    stack = np.empty((count, sum(sizes)), rows[0][0].dtype)
    for m in range(count):
        np.concatenate([row[m].ravel() for row in rows], out=stack[m])
    result, pieces, begin = operator(torch.from_numpy(stack)).numpy(), [], 0
    for row, size in zip(rows, sizes, strict=True):
        pieces.append(result[begin : begin + size].reshape(row[0].shape).copy())
        begin += size
    return pieces


def _small_tensors(
    rows: Sequence[Sequence[Tensor]], operator: Callable[[Sequence[Tensor] | Tensor], Tensor]
) -> list[Tensor]:
    if all(tensor.is_contiguous() for row in rows for tensor in row):
        shapes = [row[0].shape for row in rows]
        result = operator([flatten_dense(model) for model in zip(*rows, strict=True)])
        pieces = _pieces(result, [shape.numel() for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    vectors, strides = zip(*map(_vectors, rows), strict=True)
    result = operator(_gathered(vectors, rows[0][0].dtype))
    pieces = _pieces(result, [row[0].numel() for row in vectors])
    return [piece.as_strided(row[0].shape, stride) for piece, row, stride in zip(pieces, rows, strides, strict=True)]


def _pieces(vector: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """A vector's pieces, each in memory of its own."""
    return [piece.clone() for piece in vector.split(list(sizes))]


def _vectors(row: Sequence[Tensor]) -> tuple[list[Tensor], tuple[int, ...]]:
    """The M tensors of an entry as ``[n]``, in memory order where all have one, and the strides of the result."""
    stride = row[0].stride()
    if all(tensor.is_contiguous() for tensor in row):
        return [tensor.view(-1) for tensor in row], stride
    if all(tensor.stride() == stride and _dense(tensor) for tensor in row):
        return [tensor.as_strided((tensor.numel(),), (1,)) for tensor in row], stride
    return [tensor.reshape(-1) for tensor in row], torch.empty(row[0].shape, device="meta").stride()


def _gathered(rows: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> Tensor:
    """``[M, P]``: entries ``rows[i][m]``, each ``[n_i]``, one after another."""
    count, size = len(rows[0]), sum(row[0].numel() for row in rows)
    stack = torch.empty(count, size, dtype=dtype, device=rows[0][0].device)
    for vector, m in zip(stack.unbind(), range(count), strict=True):
        torch.cat([row[m] for row in rows], out=vector)
    return stack


def _largest(row: Sequence[Any]) -> Any:
    if type(row[0]) is np.ndarray:
        return np.maximum.reduce(row, keepdims=False, out=np.empty(row[0].shape, row[0].dtype))
    if row[0].dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch has no maximum of these
        return torch.from_numpy(np.maximum.reduce([tensor.cpu().numpy() for tensor in row])).to(row[0].device)
    if row[0].is_cpu and row[0].numel() == 1:  # a counter: three operators take longer than the rest of a small layer
        return torch.full_like(row[0], max(tensor.item() for tensor in row))
    return torch.stack(list(row)).amax(0)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps, in any order of the axes."""
    return tensor.is_contiguous() or dense_stride(tensor) == tensor.stride()


def _keys(model: Any) -> list[Any]:
    if isinstance(model, Mapping):
        return list(model)
    if isinstance(model, Sequence) and not isinstance(model, (str, bytes)):
        return list(range(len(model)))
    raise TypeError(f"a model must be a state dict, a dict of arrays or a list of arrays, not a {type(model).__name__}")


def _form(model: Any) -> str:
    return "dict" if isinstance(model, Mapping) else type(model).__name__


def _is_plain(array: Any) -> bool:
    """Whether torch reads the array's numbers as they are: a real kind in this machine's byte order."""
    return array.dtype.kind in "fiub" and array.dtype.isnative and array.dtype.itemsize <= 8


def _flat(entry: Any) -> Tensor:
    """``[n]``: a tensor's or an array's numbers, without a copy where that is possible."""
    if type(entry) is not np.ndarray:
        return cast(Tensor, entry.reshape(-1))
    # torch warns of arrays that nobody may write to; these are only read.
    return torch.from_numpy((entry if entry.flags.writeable else _readable(entry)).ravel())


def _tensor(value: Any, name: str) -> Tensor:
    """An entry as a tensor that shares its memory where that is possible."""
    if isinstance(value, Tensor):
        check_dense(value, name)
        if value.is_complex():
            raise TypeError(f"{name} must be real, but has dtype {value.dtype}")
        return value.detach()
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(f"{name} must be a tensor or a NumPy array, not {type(value).__name__}")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be an array without a mask, not a masked one; .filled(value) makes one")
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold numbers, but has dtype {array.dtype}")
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).reshape(array.shape)
    try:
        return torch.from_numpy(array if array.flags.writeable else _readable(array))
    except TypeError as error:
        raise TypeError(f"{name} has dtype {array.dtype}, which torch does not know: {error}") from None


def _readable(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same memory as an array that claims to be writable; it keeps ``array`` alive."""
    if not array.size:
        return array.copy()
    memory = (ctypes.c_char * array.nbytes).from_address(array.ctypes.data)
    memory.owner = array  # type: ignore[attr-defined]
    return np.frombuffer(cast(Any, memory), dtype=array.dtype).reshape(array.shape)
