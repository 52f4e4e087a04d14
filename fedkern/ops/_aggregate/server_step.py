"""aggregate: one step of a server optimiser, with norms and cosines of the clients' deltas."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedkern.ops._aggregate import checks
from fedkern.ops._aggregate.checks import Vectors
from fedkern.ops._aggregate.kernels import AggregateKernels
from fedkern.ops._aggregate.mean import select
from fedkern.ops._aggregate.rules import DEFAULTS, RULES, ServerCall, ServerRule
from fedkern.ops._core import library
from fedkern.ops._core.backend import select_ordinary
from fedkern.ops._core.checks import check_device, check_flag, check_number, mark_written, refuse_gradient, share_memory


class ServerStep(NamedTuple):
    """Result of :func:`server_step`.

    Attributes:
        model: ``[P]``, the new global model.
        norms: fp64 ``[M]``, the Euclidean norm of every client's delta; ``[0]`` with ``similarities=False``.
        cosines: fp64 ``[M]``, the cosine of the angle between every client's delta and the mean delta; 0 where either
            of the two is zero. ``[0]`` with ``similarities=False``.
    """

    model: Tensor
    norms: Tensor
    cosines: Tensor


_STATES = (torch.float32, torch.float64)


def server_step(
    global_: Tensor,
    vectors: Vectors,
    weights: Tensor | Sequence[float],
    rule: str = "mean",
    *,
    first: Tensor | None = None,
    second: Tensor | None = None,
    learning_rate: float | None = None,
    beta1: float | None = None,
    beta2: float | None = None,
    tau: float | None = None,
    out: Tensor | None = None,
    similarities: bool = True,
) -> ServerStep:
    """Take one step of a server optimiser from the clients' models (FedOpt, arXiv 2003.00295, algorithm 2).

    g is the global model and ``d = sum_m w_m (x_m - g) / sum_m w_m`` the mean delta. The new model by rule:

    - "mean" (FedAvg): ``g + lr d``.
    - "momentum" (FedAvgM, arXiv 1909.06335): ``g + lr m`` after ``m <- beta1 m + d``.
    - "adam", "yogi", "adagrad": ``g + lr m / (sqrt(v) + tau)`` after ``m <- beta1 m + (1 - beta1) d`` and

      - "adam": ``v <- beta2 v + (1 - beta2) d^2``,
      - "yogi": ``v <- v - (1 - beta2) d^2 sign(v - d^2)``,
      - "adagrad": ``v <- v + d^2``.

    The defaults are Flower's:

    ==========  =============  =====  =====  ====
    rule        learning_rate  beta1  beta2  tau
    ==========  =============  =====  =====  ====
    "mean"      1
    "momentum"  1              0
    "adam"      0.1            0.9    0.99   1e-9
    "yogi"      0.01           0.9    0.99   1e-3
    "adagrad"   0.1            0             1e-9
    ==========  =============  =====  =====  ====

    There is no bias correction, as in the paper. The paper starts v at ``tau^2`` or more, Flower at 0. Everything is
    computed in fp64 and rounded once. The uploads are read once.

    Step parameters alone: a step of Adam makes a running variance negative. Of ``flat = FlatParameters(module)`` give
    ``flat.parameters`` here and ``flat.buffers`` to :func:`weighted_mean`.

    Args:
        global_: g ``[P]``, of the vectors' dtype and device, any stride.
        vectors: the clients' models: M tensors ``[P]``, or one ``[M, P]``; fp32, bf16, fp16 or fp64, any strides.
        weights: M finite numbers, at least 0 and not all 0; they need not sum to one. A vector of weight zero takes no
            part in the mean and may hold NaN; its norm and cosine are computed all the same.
        rule: "mean", "momentum", "adam", "yogi" or "adagrad".
        first: m ``[P]``, fp32 or fp64, contiguous; updated in place. All rules but "mean" need it; begin with zeros.
            Neither state may share memory with the other state or with another argument.
        second: v ``[P]``, contiguous, of the dtype of ``first``; updated in place. "adam", "yogi" and "adagrad" need
            it.
        learning_rate: lr, at least 0; None: the rule's default, as for the next three.
        beta1, beta2: decay rates of m and v, from 0 to 1.
        tau: added to ``sqrt(v)``, at least 0.
        out: tensor ``[P]`` that receives the new model, in any of the four dtypes and any stride; the model is rounded
            to its dtype. It may be ``global_`` or a vector.
        similarities: False leaves out norms and cosines, which then are empty. The model has the same bits.

    Returns:
        :class:`ServerStep`; its model is in the vectors' dtype, or ``out``. A NaN or infinity in a client's model
        reaches its coordinate of the new model, and that client's norm and cosine. A NaN or infinity in the mean delta
        reaches all cosines. There is no gradient.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value is wrong, or a gradient was asked for.
        RuntimeError: a forced backend does not support the call.
    """
    check_flag(similarities, "similarities")
    if not isinstance(weights, Tensor) and global_ is not None:
        kernel = select_ordinary("aggregate", vectors, torch.is_grad_enabled(), global_, first, second, out)
        if kernel is not None:
            settings = _settings(rule, learning_rate, beta1, beta2, tau)
            if _ordinary(kernel, global_, vectors, settings.rule, first, second, out):
                values = kernel.numbers(weights, checks.count_of(vectors))
                call = ServerCall(global_, vectors, values, settings, first, second, out, similarities)
                step = kernel.server_step(call)
                if first is not None or out is not None:
                    mark_written(first, second, out)
                return ServerStep(*step)
    template, count = checks.check_vectors(vectors)
    size = template.shape[-1]
    checks.check_vector(global_, "global_", size)
    if global_.dtype != template.dtype:
        raise ValueError(f"global_ must have the dtype {template.dtype} of the vectors, but has {global_.dtype}")
    check_device(global_, "global_", template, "the vectors")
    if isinstance(weights, Tensor):
        checks.check_weights_tensor(weights, count, template.device)
    settings = _settings(rule, learning_rate, beta1, beta2, tau)
    _check_states(rule, first, second, size, template.device)
    if out is not None:
        checks.check_out(out, size, template.device)
    ordinary = checks.eager(vectors, weights, global_, first, second, out)
    call = ServerCall(global_, vectors, weights, settings, first, second, out, similarities)
    if first is not None:
        _check_apart(call, share_memory if ordinary else operator.is_)
    refuse_gradient("server_step", global_, *checks.rows_or_stack(vectors), weights, first, second, out)
    if not ordinary:
        tensors = global_, checks.rows_of(vectors), checks.as_tensor(weights, template, count)
        dtype = None if out is None else out.dtype
        numbers = library.numbers_tensor(settings[1:])  # a schedule compiles nothing anew
        result = ServerStep(*_operator(*tensors, settings.rule, numbers, first, second, dtype, similarities))
        return result if out is None else result._replace(model=out.copy_(result.model))
    return _compute(call)


def _settings(
    rule: str, learning_rate: float | None, beta1: float | None, beta2: float | None, tau: float | None
) -> ServerRule:
    if not isinstance(rule, str) or rule not in DEFAULTS:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    default = DEFAULTS[rule]
    if learning_rate is beta1 is beta2 is tau is None:
        return default
    numbers = (learning_rate, beta1, beta2, tau)
    rates = [usual if number is None else number for number, usual in zip(numbers, default[1:], strict=True)]
    for number, name in zip(rates, ("learning_rate", "beta1", "beta2", "tau"), strict=True):
        check_number(number, name, 1.0 if name.startswith("beta") else float("inf"))
    return ServerRule(default.rule, *(float(number) for number in rates))


def _ordinary(
    kernel: AggregateKernels,
    global_: Tensor,
    vectors: Vectors,
    rule: int,
    moment1: Tensor | None,
    moment2: Tensor | None,
    out: Tensor | None,
) -> bool:
    """Return whether a kernel may take plain tensors ``[P]`` unchanged: dtypes, states, shared memory."""
    if global_.dtype is not checks.rows_or_stack(vectors)[0].dtype:
        return False
    # "mean" has no state, "momentum" has only the first.
    if (moment1 is None) is not (rule == 0) or (moment2 is None) is not (rule < 2):
        return False
    if moment1 is not None:
        if moment1.dtype not in _STATES or (moment2 is not None and moment2.dtype is not moment1.dtype):
            return False
    elif out is None:
        return True
    return bool(kernel.core.writable((moment1, moment2, out), vectors, (global_,)))


def _check_states(rule: str, moment1: Tensor | None, moment2: Tensor | None, size: int, device: torch.device) -> None:
    required = {"first": rule != "mean", "second": rule in ("adam", "yogi", "adagrad")}
    for (name, needed), state in zip(required.items(), (moment1, moment2), strict=True):
        if not needed:
            if state is not None:
                raise ValueError(f'{name} must be None for rule "{rule}", which keeps no such state')
            continue
        if state is None:
            raise ValueError(f'{name} must be given for rule "{rule}": a tensor [{size}], zeros at the start')
        checks.check_out(state, size, device, name)
        if state.dtype not in _STATES:
            raise TypeError(f"{name} must have dtype float32 or float64, but has {state.dtype}")
        if not state.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if moment1 is not None and moment2 is not None and moment1.dtype != moment2.dtype:
        raise TypeError(f"second must have the dtype {moment1.dtype} of first, but has {moment2.dtype}")


def _check_apart(call: ServerCall, shared: Callable[[Tensor, Tensor], bool]) -> None:
    """Raise ValueError if a state, which is written to, is ``shared`` with another argument."""
    arguments: dict[str, object] = {name: getattr(call, name) for name in ("second", "out", "global_", "weights")}
    arguments |= {f"vectors[{m}]": vector for m, vector in enumerate(checks.rows_of(call.vectors))}
    for name, state in (("first", call.first), ("second", call.second)):
        arguments.pop(name, None)
        for argument, tensor in arguments.items():
            if state is not None and isinstance(tensor, Tensor) and shared(state, tensor):
                raise ValueError(f"{name} must not share memory with {argument}: it is written to while that is used")


def _compute(call: ServerCall) -> ServerStep:
    global_, vectors, weights, _, moment1, moment2, out, _ = call
    kernel = select(vectors, global_, *(state for state in (moment1, moment2) if state is not None))
    values = checks.kernel_weights(weights, len(vectors))
    target = out
    if out is not None and not _direct(out, global_, vectors, moment1, moment2):
        target = torch.empty_like(out, memory_format=torch.contiguous_format)  # rounded once, to out's dtype
    model, norms, cosines = kernel.server_step(call._replace(weights=values, out=target))
    mark_written(moment1, moment2)
    return ServerStep(model if out is None else checks.copy_result(model, out), norms, cosines)


def _direct(out: Tensor, global_: Tensor, vectors: Vectors, *states: Tensor | None) -> bool:
    """Return whether a kernel may write to ``out`` while it reads: ``out`` is ``global_`` or overlaps nothing."""
    if not out.is_contiguous() or out.is_neg():
        return False
    storage = out.untyped_storage().data_ptr()
    in_place = out.data_ptr() == global_.data_ptr() and global_.is_contiguous() and out.dtype == global_.dtype
    tensors = [*checks.rows_or_stack(vectors), *(state for state in states if state is not None)]
    if not in_place:
        tensors.append(global_)
    return all(tensor.untyped_storage().data_ptr() != storage for tensor in tensors)


def _implementation(global_: Tensor, vectors: list[Tensor], weights: Tensor, *others: Any) -> tuple[Tensor, ...]:
    rule, numbers, moment1, moment2, dtype, similarities = others
    settings = ServerRule(rule, *numbers.tolist())
    out = None if dtype is None else global_.new_empty(global_.shape, dtype=dtype)
    return tuple(_compute(ServerCall(global_, vectors, weights, settings, moment1, moment2, out, similarities)))


def _fake(global_: Tensor, vectors: list[Tensor], *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, dtype, similarities = others
    count = len(vectors) if similarities else 0
    norms, cosines = (global_.new_empty(count, dtype=torch.float64) for _ in range(2))
    return global_.new_empty(global_.shape, dtype=dtype), norms, cosines


_operator = library.register(
    "server_step",
    "(Tensor global_, Tensor[] vectors, Tensor weights, int rule, Tensor numbers, "
    "Tensor(a!)? first, Tensor(b!)? second, ScalarType? dtype, bool similarities) -> (Tensor, Tensor, Tensor)",
    _implementation,
    fake=_fake,
)
