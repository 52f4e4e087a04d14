"""optimise: one step of an optimiser on flat vectors, in one pass over parameters, gradients and state."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedkern.ops._core import backend, library
from fedkern.ops._core.backend import select_ordinary
from fedkern.ops._core.checks import check_count, check_flag, check_number, mark_written, refuse_gradient
from fedkern.ops._optimise.checks import check_betas, check_like, check_lr, check_memory, check_parameters
from fedkern.ops._optimise.kernels import AdamW, Call, OptimiseKernels
from fedkern.ops._optimise.reference import optimise_reference

_grad_enabled, _is_compiling = torch.is_grad_enabled, torch.compiler.is_compiling
# Makes a named tuple in half the time that its own constructor takes.
_new = tuple.__new__

# Whole numbers up to here are exact in a float.
MAX_STEPS = 2**53


# ``max_norm`` in a tensor, where there is no None.
NO_CLIPPING = 0.0


class StepResult(NamedTuple):
    """Result of :func:`sgd_step` and :func:`adamw_step`.

    On a GPU, only reading its values waits for the step.

    Attributes:
        finite: bool, 0-d (``[M]`` for ``[M, P]``): whether the gradient and all written values are finite.
        squared_norm: fp64, 0-d or ``[M]``: the squared Euclidean norm of the gradient with ``correction`` and the
            proximal term, before clipping and weight decay.
    """

    finite: Tensor
    squared_norm: Tensor


def sgd_step(
    parameters: Tensor,
    gradients: Tensor,
    velocity: Tensor | None = None,
    *,
    lr: float | Sequence[float] | Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    anchor: Tensor | None = None,
    proximal: float = 0.0,
    correction: Tensor | None = None,
    gradient_sum: Tensor | None = None,
    max_norm: float | None = None,
    zero: bool = False,
) -> StepResult:
    """Take a step of SGD in place, as ``torch.optim.SGD`` does, with the terms that federated methods add.

    With parameters θ, gradient g and velocity v, in this order:

    1. ``gradient_sum += g`` (SCAFFOLD's option II, arXiv 1910.06378, sums the raw gradients of a round).
    2. ``g += correction`` (SCAFFOLD's ``c - c_i``; FedDyn's ``-g_k``, arXiv 2111.04263).
    3. ``g += proximal (θ - anchor)`` (FedProx, arXiv 1812.06127).
    4. ``g *= min(1, max_norm / |g|)``.
    5. ``g += weight_decay θ``.
    6. ``v = momentum v + g``; without momentum ``v = g``.
    7. ``θ -= lr v``.

    The step takes one pass over memory, or two with ``max_norm``, which needs the norm first. ``gradients`` are not
    changed unless ``zero`` is set. In fp32 and fp64 on the CPU, a step without clipping has the same bits as torch's
    own operations at the same ISA level. The bits do not depend on the number of threads.

    Args:
        parameters: θ ``[P]``, or ``[M, P]`` for M models side by side; fp32, fp64, bf16 or fp16, any strides. bf16 and
            fp16 are computed in fp32 and rounded once.
        gradients: g, of the same shape, dtype and device, as all tensors here.
        velocity: v, updated in place; zeros at the start. Required with ``momentum``, None without.
        lr: the learning rate, not negative; for ``[M, P]`` also one for each row, as a list or a floating tensor.
            The values of a tensor on a GPU are not checked.
        momentum, weight_decay, proximal: not negative.
        anchor: the parameters that ``proximal`` pulls towards; required with ``proximal``. For ``[M, P]`` also one
            ``[P]`` for all rows.
        correction: added to the gradient. For ``[M, P]`` also one ``[P]`` for all rows.
        gradient_sum: the raw gradients are added to this tensor.
        max_norm: largest norm of the gradient (of each row), above 0; None: no clipping.
        zero: set ``gradients`` to zero afterwards, which saves the training loop a pass.

    Returns:
        :class:`StepResult`. NaN and infinities spread as in torch; ``finite`` reports them. The step has no gradient.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value is wrong, a written tensor shares
            memory with another tensor, or a tensor requires a gradient outside of ``torch.no_grad()``.
        RuntimeError: a forced backend does not support the call.
    """
    call = _new(Call, (
        parameters, gradients, velocity, None, anchor, correction, gradient_sum, lr, momentum, weight_decay, proximal,
        max_norm, zero, None,
    ))  # fmt: skip
    kernel = select_ordinary("optimise", call, _grad_enabled())
    if kernel is not None:
        result = kernel.step(call)
        mark_written(parameters, velocity, gradient_sum, gradients if zero else None)
        return _new(StepResult, result)
    check_parameters(parameters)
    momentum = check_number(momentum, "momentum")
    if momentum and velocity is None:
        raise ValueError(f"velocity must be given with momentum {momentum:g}: zeros of parameters' shape at the start")
    if velocity is not None:
        if not momentum:
            raise ValueError("velocity must be None without momentum")
        check_like(velocity, "velocity", parameters)
    return _take("sgd_step", call, momentum, {"first": "velocity"}, None)


def adamw_step(
    parameters: Tensor,
    gradients: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    *,
    lr: float | Sequence[float] | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    anchor: Tensor | None = None,
    proximal: float = 0.0,
    correction: Tensor | None = None,
    gradient_sum: Tensor | None = None,
    max_norm: float | None = None,
    zero: bool = False,
) -> StepResult:
    """Take a step of AdamW (arXiv 1711.05101) in place, as ``torch.optim.AdamW`` does.

    The gradient g is prepared by steps 1 to 4 of :func:`sgd_step`. Then, with moments m and v and step number t:

    - ``θ *= 1 - lr weight_decay``
    - ``m += (1 - beta1) (g - m)`` and ``v = beta2 v + (1 - beta2) g^2``
    - ``θ -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)``

    Args:
        parameters, gradients, lr, anchor, proximal, correction, gradient_sum, max_norm, zero: as in :func:`sgd_step`.
        first: m, of parameters' shape, dtype and device; zeros at the start, updated in place.
        second: v, likewise.
        step: t, the number of this step, starting at 1; the same for all rows.
        betas: beta1 and beta2, each in [0, 1).
        eps: not negative.
        weight_decay: not negative.

    On the CPU the moments have the bits of torch's own. Torch's square root, which comes from MKL and is not correctly
    rounded, leaves one in some hundred parameters an ulp away.

    Returns:
        :class:`StepResult`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`sgd_step`.
    """
    numbers = None
    if type(step) is int and 0 < step <= MAX_STEPS and not _is_compiling():
        numbers = _numbers(betas, step, eps)
    call = _new(Call, (
        parameters, gradients, first, second, anchor, correction, gradient_sum, lr, 0.0, weight_decay, proximal,
        max_norm, zero, numbers,
    ))  # fmt: skip
    if numbers is not None:
        kernel = select_ordinary("optimise", call, _grad_enabled())
        if kernel is not None:
            result = kernel.step(call)
            mark_written(parameters, first, second, gradient_sum, gradients if zero else None)
            return _new(StepResult, result)
    check_parameters(parameters)
    check_like(first, "first", parameters)
    check_like(second, "second", parameters)
    step = check_count(step, "step", 1, MAX_STEPS)
    return _take("adamw_step", call, 0.0, {}, (check_betas(betas), step, check_number(eps, "eps")))


def _numbers(betas: Sequence[float], step: int, eps: float) -> AdamW | None:
    """Return AdamW's numbers for a step, or None if ``betas`` must be checked first."""
    if type(betas) is not tuple or len(betas) != 2:
        return None
    beta1, beta2 = betas
    if type(beta1) is not float or type(beta2) is not float or not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        return None
    return AdamW(beta1, beta2, 1 - beta1**step, (1 - beta2**step) ** 0.5, eps)


def _take(
    name: str, call: Call, momentum: float, public: dict[str, str], adamw: tuple[tuple[float, float], int, float] | None
) -> StepResult:
    """Take the step after every check, in Python.

    The caller has checked parameters, states (``public``: their other names), momentum and ``adamw``.
    """
    parameters, gradients, _, _, anchor, correction, gradient_sum = vectors = call[:7]
    lr, max_norm, zero = call.lr, call.max_norm, call.zero
    check_like(gradients, "gradients", parameters)
    ordinary = backend.eager(*(tensor for tensor in vectors if tensor is not None))
    rate = check_lr(lr, parameters, known=ordinary)
    weight_decay, proximal = check_number(call.weight_decay, "weight_decay"), check_number(call.proximal, "proximal")
    if max_norm is not None:
        max_norm = check_number(max_norm, "max_norm", above=True)
    check_flag(zero, "zero")
    if proximal and anchor is None:
        raise ValueError(f"anchor must be given with proximal {proximal:g}")
    for key, vector in (("anchor", anchor), ("correction", correction)):
        if vector is not None:
            check_like(vector, key, parameters, shared=True)
    if gradient_sum is not None:
        check_like(gradient_sum, "gradient_sum", parameters)
    call = Call(*vectors, rate, momentum, weight_decay, proximal, max_norm, zero, None)
    tensors, changed = ({public.get(key, key): x for key, x in pick().items()} for pick in (call.tensors, call.outputs))
    check_memory(changed, tensors, hidden=not ordinary)
    refuse_gradient(name, *tensors.values(), lr)
    if ordinary:
        return StepResult(*_compute(call if adamw is None else call._replace(adamw=_numbers(*adamw))))
    betas, step, eps = adamw or ((0.0, 0.0), None, 0.0)
    settings = (momentum, weight_decay, proximal, NO_CLIPPING if max_norm is None else max_norm, *betas, eps)
    if isinstance(rate, list):
        rate = library.numbers_tensor(rate)
    elif not isinstance(rate, Tensor):
        rate = library.number_tensor(rate)
    return StepResult(*_operators[zero](*vectors, rate, library.numbers_tensor(settings), step))


def _compute(call: Call) -> tuple[Tensor, Tensor]:
    """Take the step on tensors of any strides, by the selected kernel or the reference."""
    with torch.no_grad():
        flat = call.parameters.dim() == 1
        copies: list[tuple[Tensor, Tensor]] = []
        changed = call.outputs()
        prepared: dict[str, Any] = {}
        for name, tensor in call.tensors().items():
            rows = tensor.unsqueeze(0) if flat else tensor.expand(call.parameters.shape)
            unit = rows.shape[1] <= 1 or rows.stride(1) == 1
            if rows.is_neg() or not unit or (name in changed and rows.stride(0) < rows.shape[1]):
                copy = rows.resolve_neg().clone(memory_format=torch.contiguous_format)
                if name in changed:
                    copies.append((rows, copy))
                rows = copy
            prepared[name] = rows
        call = call._replace(**prepared)
        kernel = backend.select("optimise", *prepared.values())
        finite, squared = optimise_reference(call) if kernel is None else kernel.step(call)
        for rows, copy in copies:
            rows.copy_(copy)
    if kernel is not None:
        mark_written(*changed.values())
    return (finite[0], squared[0]) if flat else (finite, squared)


# The same operator for torch.compile and opcheck. Numbers travel as tensors: a schedule compiles nothing anew.


def _implementation(zero: bool, parameters: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    gradients, moment1, moment2, anchor, correction, gradient_sum, lr, settings, step = others
    if step is not None and step < 1:
        raise ValueError(f"step must be at least 1, not {step}")
    momentum, weight_decay, proximal, max_norm, beta1, beta2, eps = settings.tolist()
    finite, squared = _compute(
        Call(
            parameters, gradients, moment1, moment2, anchor, correction, gradient_sum, check_lr(lr, parameters),
            momentum, weight_decay, proximal, None if max_norm == NO_CLIPPING else max_norm, zero,
            None if step is None else _numbers((beta1, beta2), step, eps),
        )
    )  # fmt: skip
    return (finite, squared) if parameters.dim() == 2 else (finite.clone(), squared.clone())


def _fake(parameters: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    rows = parameters.shape[:-1]
    return parameters.new_empty(rows, dtype=torch.bool), parameters.new_empty(rows, dtype=torch.float64)


# Two operators, since a schema says once and for all whether gradients are written to.
_operators = [
    library.register(
        name,
        f"(Tensor(a!) parameters, Tensor{alias} gradients, Tensor(b!)? first, Tensor(c!)? second, Tensor? anchor, "
        "Tensor? correction, Tensor(d!)? gradient_sum, Tensor lr, Tensor settings, SymInt? step) -> (Tensor, Tensor)",
        functools.partial(_implementation, bool(zero)),
        fake=_fake,
        public="sgd_step or adamw_step",
    )
    for zero, (name, alias) in enumerate((("optimiser_step", ""), ("optimiser_step_and_zero", "(e!)")))
]


backend.add_kernels("optimise", cpu=OptimiseKernels, cuda=OptimiseKernels, fits="optimise_fits")
