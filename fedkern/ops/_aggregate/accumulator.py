"""aggregate: the weighted mean of vectors that arrive one after another."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._aggregate.checks import check_out, check_vector, check_weight, copy_result, direct_target
from fedkern.ops._aggregate.mean import select
from fedkern.ops._aggregate.plain import PLAIN
from fedkern.ops._aggregate.reference import INFINITE, LOWEST, NOT_A_NUMBER, exact_merge_reference
from fedkern.ops._core import backend
from fedkern.ops._core.checks import check_count, check_tensor, show_value
from fedkern.ops._core.private_torch import functorch_active

# Exact weights are integers in units of the smallest positive double.
_UNIT = 1 << 1074
_WEIGHT_BYTES = 280
# Products of larger weights and finite fp32 numbers may overflow.
_LARGE_WEIGHT = 2.0**895
_MAX_EXACT = 2**31 - 1
_MAX_ELEMENTS = 2**48


class Accumulator:
    """Running weighted mean of vectors ``[P]`` that arrive one after another: memory O(P), not O(M * P).

    The sum is kept in fp64. So the mean of equal fp32, bf16 or fp16 vectors is that vector exactly, and the bits do
    not depend on the number of threads. They are the bits of :func:`weighted_mean` on the same vectors in the same
    order.

    With ``exact=True`` the bits do not depend on the order of arrival either. Each product is rounded to fp64 and its
    digits in base 2^32 are added as integers: three digits per element, on a fixed grid (compare Demmel and Nguyen,
    "Parallel reproducible summation", IEEE Trans. Comput. 64(7), 2015). The weights are added as integers too. Exact
    sums take three times the memory and, since they are memory-bound, about three times as long.

    An accumulator holds state. It is not differentiable, and :meth:`add` raises under torch.compile or a torch.func
    transform. Calls from several threads take turns.

    Args:
        size: P, the length of the vectors.
        exact: whether the bits are independent of the order of arrival; see above.
        device: device of the sum and of all vectors; default: torch's default device (the CPU).

    Raises:
        TypeError, ValueError: size is not a whole number from 0 to 2^48, or torch cannot use the device.
    """

    def __init__(self, size: int, exact: bool = False, *, device: torch.device | str | None = None) -> None:
        self.size = size = check_count(size, "size", 0, _MAX_ELEMENTS)
        self.exact = exact
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, TypeError, AssertionError) as error:  # each from another part of torch
            raise ValueError(f"device must be one that torch can use here, not {show_value(device)}") from error
        self._count = 0
        self._dtype: torch.dtype | None = None
        self._weight = 0.0
        self._units = 0
        # Kernels and torch's operators change the sums without the interpreter's lock.
        self._lock = threading.RLock()
        # Ordinary tensors also under inference_mode, where they could not be written to afterwards.
        with torch.inference_mode(False):
            self._sum = self._digits = self._top = torch.empty(0)
            if exact:
                self._digits = torch.zeros(3, size, dtype=torch.int64, device=device)
                self._top = torch.full((size,), LOWEST, dtype=torch.int8, device=device)
            else:
                self._sum = torch.zeros(size, dtype=torch.float64, device=device)

    @property
    def weight(self) -> float:
        """Sum of the weights added."""
        return self._units / _UNIT if self.exact else self._weight

    @property
    def count(self) -> int:
        """Number of vectors added."""
        return self._count

    def add(self, vector: Tensor, weight: float | Tensor = 1.0) -> None:
        """Add ``weight * vector``. A vector of weight zero is counted but not read.

        Args:
            vector: ``[P]``, fp32, bf16, fp16 or fp64, of any stride.
            weight: finite and not negative; 0, or at least 2.3e-308.

        Raises:
            TypeError, ValueError: an argument has the wrong type, shape, device or value.
            OverflowError: an exact accumulator is full (2^31 - 1 vectors).
            RuntimeError: called under torch.compile or a torch.func transform, or a forced backend does not
                support the call.
        """
        if torch.compiler.is_compiling() or functorch_active():
            raise RuntimeError(
                "Accumulator keeps state and cannot be used under torch.compile or a torch.func transform"
            )
        check_vector(vector, "vector", self.size)
        if vector.device != self.device:
            raise ValueError(f"vector must be on {self.device} like the accumulator, but is on {vector.device}")
        value = check_weight(weight, "weight")
        if 0 < value < sys.float_info.min:
            raise ValueError(f"weight must not be subnormal, as {value} is: its products lose digits, scale weights up")
        with self._lock:
            total = self.weight + value
            if total == float("inf"):
                raise ValueError("weight makes the sum of the weights overflow; scale the weights down")
            if self.exact and self._count == _MAX_EXACT:
                raise OverflowError(f"an exact accumulator takes at most {_MAX_EXACT} vectors")
            is_large = self.exact and value > _LARGE_WEIGHT and self.size > 0
            if is_large and (largest := float(vector.detach().abs().max())) < math.inf <= largest * value:
                raise ValueError(f"weight {value:g} makes products with the vector overflow; scale the weights down")
            if value:
                self._add(vector.detach(), value)
            self._count += 1
            self._weight = total
            if self.exact:
                numerator, denominator = value.as_integer_ratio()
                self._units += numerator * (_UNIT // denominator)
            self._dtype = vector.dtype if self._dtype is None else torch.promote_types(self._dtype, vector.dtype)

    def _add(self, vector: Tensor, weight: float) -> None:
        kernel = select([vector])
        if not backend.eager(vector):
            kernel = PLAIN
        if self.exact:
            kernel.exact_accumulate(self._digits, self._top, vector, weight)
        else:
            kernel.accumulate(self._sum, vector, weight)

    def merge(self, other: Accumulator) -> None:
        """Add all that another exact accumulator was given, as if its vectors had been added here: the same bits.

        So parts of a sum can be made in several places, in whatever order. Only integers are added.

        Args:
            other: of the same size, on the same device, exact too; it stays as it is.

        Raises:
            TypeError, ValueError: other is no such accumulator, this one is not exact, or the sum of the weights
                overflows.
            OverflowError: both together have more vectors than an exact accumulator takes (2^31 - 1).
        """
        if not isinstance(other, Accumulator):
            raise TypeError(f"other must be an Accumulator, not {type(other).__name__}")
        if not (self.exact and other.exact):
            raise ValueError("merge needs two exact accumulators: other sums depend on the order of their vectors")
        if (self.size, self.device) != (other.size, other.device):
            raise ValueError(
                f"other must have size {self.size} on {self.device} like the accumulator, but has size {other.size} on "
                f"{other.device}"
            )
        lower, higher = sorted((self, other), key=id)  # a fixed order: two merges cannot deadlock
        with lower._lock, higher._lock:
            if self._count + other._count > _MAX_EXACT:
                raise OverflowError(f"an exact accumulator takes at most {_MAX_EXACT} vectors")
            try:
                total = (self._units + other._units) / _UNIT
            except OverflowError:
                raise ValueError("the sum of the weights overflows; scale the weights down") from None
            exact_merge_reference(self._digits, self._top, other._digits, other._top)
            self._count += other._count
            self._units += other._units
            self._weight = total
            if other._dtype is not None:
                self._dtype = other._dtype if self._dtype is None else torch.promote_types(self._dtype, other._dtype)

    def mean(self, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weighted mean so far, ``[P]``.

        More vectors may be added afterwards.

        Args:
            out: tensor ``[P]`` that receives the mean, in any of the four dtypes.
            dtype: dtype of a new result; default: that of the vectors, promoted where they differ.

        Raises:
            TypeError, ValueError: out or dtype is wrong, or no vector of positive weight was added yet.
        """
        with self._lock:
            if not self.weight > 0:
                raise ValueError("nothing to average yet: add a vector of positive weight before asking for the mean")
            if out is not None:
                check_out(out, self.size, self.device)
                if dtype not in (None, out.dtype):
                    raise TypeError(f"dtype must be out's {out.dtype} where out is given, not {dtype}")
                if torch.is_grad_enabled() and out.requires_grad:
                    raise ValueError("out takes no part in differentiation; call mean under torch.no_grad()")
            dtype = dtype or self._dtype or torch.float32
            if not isinstance(dtype, torch.dtype) or dtype not in backend.FLOATS:
                raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, not {dtype}")
            kernel = select([torch.empty(0, dtype=dtype, device=self.device)])
            target: Tensor | None = None
            if backend.eager(self._sum, *(() if out is None else (out,))):
                target = direct_target(out, ())
            else:  # a fake result, or a new one on another default device, has no memory that a kernel can write to
                kernel = PLAIN
            into = target if target is not None else dtype if out is None else out.dtype
            if self.exact:
                result = kernel.exact_mean(self._digits, self._top, self.weight, into)
            else:
                result = kernel.accumulated_mean(self._sum, self.weight, into)
            return result if out is None else copy_result(result, out)

    def reset(self) -> None:
        """Forget all vectors and weights."""
        with self._lock:
            self._count, self._dtype, self._weight, self._units = 0, None, 0.0, 0
            self._sum.zero_()
            self._digits.zero_()
            self._top.fill_(LOWEST)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state (tensors, numbers), from which :meth:`load_state_dict` continues bit for bit."""
        with self._lock:
            state: dict[str, Any] = {
                "size": self.size,
                "exact": int(self.exact),
                "count": self._count,
                "weight": self._weight,
                "dtype": -1 if self._dtype is None else backend.DTYPES[self._dtype],
            }
            if self.exact:
                units = self._units.to_bytes(_WEIGHT_BYTES, "little")
                state["units"] = torch.tensor(list(units), dtype=torch.uint8, device="cpu")
                state["digits"], state["top"] = self._digits.clone(), self._top.clone()
            else:
                state["sum"] = self._sum.clone()
            return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state from :meth:`state_dict` of an accumulator with the same ``size`` and ``exact``.

        A state that is refused changes nothing.

        Raises:
            TypeError, ValueError: the state has wrong entries, types or shapes, another ``size`` or ``exact``, or
                values that no sum of vectors can have.
        """
        with self._lock:
            count, weight, dtype = self._check_state(state)
            if self.exact:
                self._units = _units(state["units"])
                self._digits.copy_(state["digits"])
                self._top.copy_(state["top"])
            else:
                self._sum.copy_(state["sum"])
            self._count, self._weight, self._dtype = count, weight, dtype

    def _check_state(self, state: Mapping[str, Any]) -> tuple[int, float, torch.dtype | None]:
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a dict made by state_dict(), not {type(state).__name__}")
        # A state of another kind is refused for its entries, before values are read.
        numbers = ("size", "exact", "count", "weight", "dtype")
        for name in numbers:
            if name not in state:
                raise ValueError(f"the state must have the entry {name!r}")
        size, exact = _whole(state, "size"), bool(_whole(state, "exact"))
        if size != self.size or exact != self.exact:
            raise ValueError(
                f"the state must be of size {self.size} and exact={self.exact}, "
                f"not of size {show_value(size)} and exact={exact}"
            )
        forms: dict[str, tuple[torch.dtype, list[int]]] = {"sum": (torch.float64, [size])}
        if exact:
            forms = {
                "units": (torch.uint8, [_WEIGHT_BYTES]),
                "digits": (torch.int64, [3, size]),
                "top": (torch.int8, [size]),
            }
        for name in sorted({*state} ^ {*numbers, *forms}, key=str):
            raise ValueError(f"the state must {'not ' if name in state else ''}have the entry {show_value(name)!r}")
        for entry, (form, shape) in forms.items():
            name, value = f"the state's {entry}", state[entry]
            check_tensor(value, name)
            if value.dtype is not form:
                raise TypeError(f"{name} must have dtype {form}, but has {value.dtype}")
            if list(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, but has {list(value.shape)}")
        # Numbers that no sum of vectors has would give wrong means.
        count, weight = _whole(state, "count"), check_weight(state["weight"], "the state's weight")
        if exact:
            # The units are the exact sum. "weight" is a rounded copy on which no result depends.
            try:
                total = _units(state["units"]) / _UNIT
            except OverflowError:
                raise ValueError("the state's units must be a sum of weights that a float can hold") from None
            if not math.isclose(total, weight, rel_tol=1e-6):
                raise ValueError(f"the state's weight must be that of its units, {total:g}, not {weight:g}")
        if count < 0 or (exact and count > _MAX_EXACT) or (not count and weight):
            raise ValueError(f"the state's count must be that of vectors of weight {weight:g}, not {show_value(count)}")
        codes = {number: dtype for dtype, number in backend.DTYPES.items()}
        code = _whole(state, "dtype")
        if code not in (codes if count else {-1}):
            allowed = f"one of {', '.join(map(str, codes))}" if count else "-1 before the first vector"
            raise ValueError(f"the state's dtype must be {allowed}, not {show_value(code)}")
        if exact:
            _check_digits(state["digits"], state["top"], count)
        return count, weight, codes.get(code)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def __repr__(self) -> str:
        kind = ", exact" if self.exact else ""
        return f"Accumulator({self.size}{kind}: {self._count} vectors, weight {self.weight:g})"


def _whole(state: Mapping[str, Any], name: str) -> int:
    value = state[name]
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point() and not value.is_complex():
        value = value.item()
    return int(value) if isinstance(value, bool) else check_count(value, f"the state's {name}", -1)


def _units(stored: Tensor) -> int:
    return int.from_bytes(bytes(stored.tolist()), "little")


def _check_digits(digits: Tensor, top: Tensor, count: int) -> None:
    """Raise ValueError for digits that no sum of ``count`` vectors has: a vector adds less than 2^32 to a digit."""
    if top.numel() and not LOWEST <= int(top.min()) <= int(top.max()) <= NOT_A_NUMBER:
        raise ValueError(f"the state's top must be between {LOWEST} and {NOT_A_NUMBER}")
    limit = count << 32
    if digits.numel() and not -limit <= int(digits.min()) <= int(digits.max()) <= limit:
        raise ValueError(f"the state's digits must be within 2^32 for each of its {count} vectors")
    if bool(((top >= INFINITE) & (digits != 0).any(0)).any()):
        raise ValueError("the state's digits must be 0 where its top says that the sum is not finite")
