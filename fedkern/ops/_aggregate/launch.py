"""aggregate: launcher of the compiled CPU kernels, which take tensors as pointers, sizes and strides."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fedkern.ops._aggregate.checks import Vectors, check_weights, deliver, direct_target, written
from fedkern.ops._aggregate.kernels import ServerRule, Weights
from fedkern.ops._aggregate.plain import PlainAggregate
from fedkern.ops._aggregate.pointers import addresses, numbers, unit_addresses
from fedkern.ops._core import backend
from fedkern.ops._core.memory import fresh

# Templates for empty_like, by number of clients: it takes two thirds of the time of empty(count, dtype=...).
_NUMBERS: dict[int, Tensor] = {}
_empty_like = torch.empty_like

# Longest vector, in elements, that stays in a CPU core's caches between its norm and its scaling (csrc/bindings).
SHORT = 16384


class Rows(NamedTuple):
    """Vectors that kernels may read as they are: unit strides, no gradient, no transform or mode around the call.

    Attributes:
        kernel: the CPU kernels that serve the call.
        dtype: dtype of all vectors.
        size: P.
        pointers: address of each vector.
    """

    kernel: CpuAggregate
    dtype: torch.dtype
    size: int
    pointers: list[int]


def rows(vectors: Vectors, *, recorded: bool = False) -> Rows | None:
    """Returns the vectors for a direct call of the CPU kernels, or None where the general path must serve.

    The checks, ``backend.eager`` and ``backend.select`` ask questions about every vector, which are half of a call's
    time with ten vectors.  So one call into the core answers all of them.

    Args:
        vectors: as in :func:`fedkern.ops.weighted_mean`, not checked yet.
        recorded: also accept vectors that want a gradient; the caller then records it.
    """
    if backend.intercepted():
        return None
    kernel = backend._chosen.get(_KEY, _NONE)[0]
    if type(kernel) is not CpuAggregate:
        return None
    found = kernel.core.plain_vectors(vectors, _TENSORS, not recorded and torch.is_grad_enabled())
    if found is None or found[0] not in backend.DTYPES:
        return None
    return Rows(kernel, *found)


_KEY = ("aggregate", "cpu")
_NONE = (None, frozenset[torch.dtype]())
_TENSORS = (Tensor, torch.nn.Parameter)


class CpuAggregate(PlainAggregate):
    """:class:`~fedkern.ops._aggregate.kernels.AggregateKernel` on ``fedkern._cpu``."""

    def __init__(self, core: ModuleType) -> None:
        self.core = core

    def weighted_mean(self, vectors: Vectors, weights: Weights, out: Tensor | None) -> Tensor:
        values, total = numbers(weights)
        pointers, strides = addresses(vectors)
        if not all(values):
            kept = [m for m, value in enumerate(values) if value]
            pointers, strides = [pointers[m] for m in kept], [strides[m] for m in kept]
            values = [values[m] for m in kept]
        dtype, size = vectors[0].dtype, vectors[0].shape[0]
        target = direct_target(out, size, dtype, pointers, strides, dtype.itemsize)
        if target is None:
            target = fresh(self.core, torch.empty(size, dtype=dtype if out is None else out.dtype))
        self._weighted_mean(dtype, size, pointers, strides, values, total, target.dtype, target.data_ptr())
        return target if out is None else deliver(target, out)

    def mean_of_rows(self, given: Rows, weights: Sequence[float], out: Tensor | None) -> Tensor | None:
        """:meth:`weighted_mean` of checked vectors; None where the kernel cannot write to ``out`` directly."""
        _, dtype, size, pointers = given
        values, total = self.core.plain_weights(weights, len(pointers)) or check_weights(weights, len(pointers))
        if out is None:
            target = fresh(self.core, torch.empty(size, dtype=dtype))
            target_dtype, place = dtype, target.data_ptr()
        else:
            found = self.core.plain_vectors((out,), _TENSORS, torch.is_grad_enabled())
            if found is None or found[1] != size or found[0] not in backend.DTYPES:
                return None
            target, target_dtype, place = out, found[0], found[2][0]
            if not self.core.apart(
                place, size * target_dtype.itemsize, pointers, size * dtype.itemsize, target_dtype is dtype
            ):
                return None
        if 0.0 in values:
            pointers = [pointer for pointer, value in zip(pointers, values, strict=True) if value]
            values = [value for value in values if value]
        self._weighted_mean(dtype, size, pointers, [], values, total, target_dtype, place)
        if out is not None:
            written(out)
        return target

    def _weighted_mean(
        self,
        dtype: torch.dtype,
        size: int,
        pointers: list[int],
        strides: list[int],
        values: list[float],
        total: float,
        target_dtype: torch.dtype,
        target: int,
    ) -> None:
        """Calls the core; an empty ``strides`` means that all strides are one."""
        self.core.weighted_mean(
            backend.DTYPES[dtype],
            backend.DTYPES[target_dtype],
            size,
            pointers,
            strides,
            values,
            total,
            target,
            torch.get_num_threads(),
        )

    def accumulate(self, total: Tensor, vector: Tensor, weight: float) -> None:
        self.core.accumulator_add(
            backend.DTYPES[vector.dtype],
            len(total),
            vector.data_ptr(),
            vector.stride(0),
            weight,
            total.data_ptr(),
            torch.get_num_threads(),
        )

    def accumulated_mean(self, total: Tensor, weight: float, out: Tensor | torch.dtype) -> Tensor:
        target = self._target(out, len(total))
        self.core.accumulator_mean(
            backend.DTYPES[target.dtype],
            len(total),
            total.data_ptr(),
            weight,
            target.data_ptr(),
            torch.get_num_threads(),
        )
        return target

    def exact_accumulate(self, digits: Tensor, top: Tensor, vector: Tensor, weight: float) -> None:
        self.core.exact_add(
            backend.DTYPES[vector.dtype],
            len(top),
            vector.data_ptr(),
            vector.stride(0),
            weight,
            digits.data_ptr(),
            top.data_ptr(),
            torch.get_num_threads(),
        )

    def exact_mean(self, digits: Tensor, top: Tensor, weight: float, out: Tensor | torch.dtype) -> Tensor:
        target = self._target(out, len(top))
        self.core.exact_mean(
            backend.DTYPES[target.dtype],
            len(top),
            digits.data_ptr(),
            top.data_ptr(),
            weight,
            target.data_ptr(),
            torch.get_num_threads(),
        )
        return target

    def server_step(
        self,
        global_: Tensor,
        vectors: Vectors,
        weights: Weights,
        rule: ServerRule,
        first: Tensor | None,
        second: Tensor | None,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        pointers, kept = unit_addresses(vectors)
        old = global_.contiguous()
        target = self._target(old.dtype if out is None else out, len(old))
        given = Rows(self, old.dtype, len(old), pointers)
        states = [backend.address(state) for state in (first, second)]
        state_dtype = torch.float32 if first is None else first.dtype
        result = self._server_step(given, old.data_ptr(), *numbers(weights), rule, state_dtype, states, target)
        del kept
        return result

    def server_step_of_rows(
        self,
        given: Rows,
        global_: Tensor,
        weights: Sequence[float],
        rule: ServerRule,
        first: Tensor | None,
        second: Tensor | None,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """:meth:`server_step`; None where an argument is wrong or the kernel cannot take it directly."""
        grad, (_, dtype, size, pointers) = torch.is_grad_enabled(), given
        plain = self.core.plain_vectors
        old = plain((global_,), _TENSORS, grad)
        if old is None or old[0] is not dtype or old[1] != size:
            return None
        # "mean" has no state, "momentum" has only the first.
        if (first is None) is not (rule.rule == 0) or (second is None) is not (rule.rule < 2):
            return None
        state_dtype: torch.dtype = torch.float32
        places: list[int] = []
        if first is not None:
            found = plain((first,) if second is None else (first, second), _TENSORS, grad)
            if found is None or found[1] != size or found[0] not in (torch.float32, torch.float64):
                return None
            state_dtype, _, places = found
            bytes_ = size * state_dtype.itemsize
            widest, others = size * max(state_dtype.itemsize, dtype.itemsize), [*places[1:], *pointers, old[2][0]]
            for place in places:
                if not self.core.apart(place, bytes_, others, widest, False):
                    return None
                others = others[1:]
        values, total = self.core.plain_weights(weights, len(pointers)) or check_weights(weights, len(pointers))
        if out is None:
            target = fresh(self.core, _empty_like(global_))
        else:
            spot = plain((out,), _TENSORS, grad)
            if spot is None or spot[1] != size or spot[0] not in backend.DTYPES:
                return None
            bytes_, each = size * spot[0].itemsize, size * dtype.itemsize
            apart = self.core.apart
            if not (
                apart(spot[2][0], bytes_, old[2], each, spot[0] is dtype)
                and apart(spot[2][0], bytes_, pointers, each, False)
                and apart(spot[2][0], bytes_, places, size * state_dtype.itemsize, False)
            ):
                return None
            target = out
        result = self._server_step(
            given, old[2][0], values, total, rule, state_dtype, [*places, None, None][:2], target
        )
        if places or out is not None:
            written(first, second, out)
        return result

    def _server_step(
        self,
        given: Rows,
        old: int,
        values: list[float],
        total: float,
        rule: ServerRule,
        state_dtype: torch.dtype,
        states: Sequence[int | None],
        target: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = len(values)
        if count not in _NUMBERS:
            _NUMBERS[count] = torch.empty(count, dtype=torch.float64, device="cpu")
        norms, cosines = _empty_like(_NUMBERS[count]), _empty_like(_NUMBERS[count])
        self.core.server_step(
            backend.DTYPES[given.dtype],
            backend.DTYPES[state_dtype],
            backend.DTYPES[target.dtype],
            given.size,
            old,
            given.pointers,
            values,
            total,
            *rule,
            *states,
            target.data_ptr(),
            norms.data_ptr(),
            cosines.data_ptr(),
            torch.get_num_threads(),
        )
        return target, norms, cosines

    def sorted_mean(self, vectors: Vectors, low: int, high: int, weights: Weights | None) -> Tensor:
        return self._sorted_mean(vectors, low, high, [] if weights is None else numbers(weights)[0], 0.0)

    def weighted_median(self, vectors: Vectors, weights: Weights) -> Tensor:
        values, total = numbers(weights)
        return self._sorted_mean(vectors, 0, len(values), values, total / 2)

    def _sorted_mean(self, vectors: Vectors, low: int, high: int, weights: list[float], half: float) -> Tensor:
        pointers, kept = unit_addresses(vectors)
        found = Rows(self, vectors[0].dtype, vectors[0].shape[0], pointers)
        result = self.sorted_mean_of_rows(found, low, high, weights, half)
        del kept
        return result

    def sorted_mean_of_rows(
        self, given: Rows, low: int, high: int, weights: Sequence[float] = (), half: float = 0.0
    ) -> Tensor:
        """:meth:`sorted_mean`; :meth:`weighted_median` where ``half``, half of the weights' sum, is above 0."""
        _, dtype, size, pointers = given
        target = self._target(dtype, size)
        self.core.sorted_mean(
            backend.DTYPES[dtype], size, pointers, low, high, weights, half, target.data_ptr(), torch.get_num_threads()
        )
        return target

    def squared_distances(self, vectors: Vectors) -> Tensor:
        pointers, kept = unit_addresses(vectors)
        result = self.distances_of_rows(Rows(self, vectors[0].dtype, vectors[0].shape[0], pointers), root=False)
        del kept
        return result

    def distances(self, vectors: Vectors) -> Tensor:
        pointers, kept = unit_addresses(vectors)
        result = self.distances_of_rows(Rows(self, vectors[0].dtype, vectors[0].shape[0], pointers), root=True)
        del kept
        return result

    def distances_of_rows(self, given: Rows, *, root: bool) -> Tensor:
        """:meth:`squared_distances`, or with ``root`` :meth:`distances`."""
        _, dtype, size, pointers = given
        count = len(pointers)
        result = torch.empty(count, count, dtype=torch.float64)
        self.core.squared_distances(
            backend.DTYPES[dtype], size, pointers, root, result.data_ptr(), torch.get_num_threads()
        )
        return result

    def squared_distances_to(self, vectors: Vectors, point: Tensor) -> Tensor:
        return self._squared_distances_to(vectors, point.data_ptr())

    def squared_norms(self, vectors: Vectors) -> Tensor:
        return self._squared_distances_to(vectors, None)

    def _squared_distances_to(self, vectors: Vectors, point: int | None) -> Tensor:
        pointers, kept = unit_addresses(vectors)
        result = torch.zeros(len(pointers), dtype=torch.float64)
        self.core.squared_distances_to(
            backend.DTYPES[vectors[0].dtype],
            vectors[0].shape[0],
            pointers,
            point,
            result.data_ptr(),
            torch.get_num_threads(),
        )
        del kept
        return result

    def clip_and_noise(self, vectors: Vectors, max_norm: float, deviation: float, seed: int, offset: int) -> Tensor:
        dtype, size = vectors[0].dtype, vectors[0].shape[0]
        if size > SHORT:
            return super().clip_and_noise(vectors, max_norm, deviation, seed, offset)
        pointers, kept = unit_addresses(vectors)
        result = self.clip_of_rows(Rows(self, dtype, size, pointers), max_norm, deviation, seed, offset)
        del kept
        return result

    def clip_of_rows(self, given: Rows, max_norm: float, deviation: float, seed: int, offset: int) -> Tensor:
        """Clips vectors of at most :data:`SHORT` elements and adds noise, to each right after its norm is known."""
        _, dtype, size, pointers = given
        result = fresh(self.core, torch.empty(len(pointers), size, dtype=dtype))
        self.core.clip_short(
            backend.DTYPES[dtype],
            size,
            pointers,
            max_norm,
            deviation,
            seed,
            offset,
            result.data_ptr(),
            torch.get_num_threads(),
        )
        return result

    def scale_and_noise(self, vectors: Vectors, factors: Tensor, deviation: float, seed: int, offset: int) -> Tensor:
        pointers, kept = unit_addresses(vectors)
        dtype, size = vectors[0].dtype, vectors[0].shape[0]
        result = fresh(self.core, torch.empty(len(pointers), size, dtype=dtype))
        self.core.scale_and_noise(
            backend.DTYPES[dtype],
            size,
            pointers,
            factors.data_ptr(),
            deviation,
            seed,
            offset,
            result.data_ptr(),
            torch.get_num_threads(),
        )
        del kept
        return result

    def _target(self, out: Tensor | torch.dtype, size: int) -> Tensor:
        return out if isinstance(out, Tensor) else fresh(self.core, torch.empty(size, dtype=out))
