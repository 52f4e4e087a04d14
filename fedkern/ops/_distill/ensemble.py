"""ensemble_kl: a student against K teachers."""

import torch
from torch import Tensor

from fedkern.ops._core.backend import eager, outlived, select_ordinary
from fedkern.ops._core.checks import autocast, check_tensor
from fedkern.ops._core.private_torch import is_wrapped
from fedkern.ops._distill import checks
from fedkern.ops._distill.ensemble_reference import ensemble_reference
from fedkern.ops._distill.entries import ENSEMBLE, select_at
from fedkern.ops._distill.gradients import EnsembleFunction
from fedkern.ops._distill.kernels import DistillKernels, Ensemble, new_call
from fedkern.ops._distill.reference import is_flat
from fedkern.ops._distill.rows import LOGITS, MAX_DIMS, MEAN, PROBS


def ensemble_kl(
    student: Tensor,
    teachers: Tensor,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    *,
    mix: str = "probs",
    mode: str = "kl_of_mean",
    class_mask: Tensor | None = None,
    log_probs: bool = False,
    reduction: str = "batchmean",
    dim: int = 1,
) -> Tensor:
    """Return ``T² · KL(P ‖ softmax(student / T))`` over the classes, axis ``dim``, P the mixture of K teachers.

    - ``mix="probs"``: ``P ∝ Σₖ Wₖ softmax(teacherₖ / T)``, renormalised over classes.
    - ``mix="logits"``: ``P = softmax(Σₖ Wₖ teacherₖ / T)``. With equal weights this is FedDF (arXiv 2006.07242).
    - ``mode="mean_of_kl"``: ``T² · Σₖ Wₖ KL(softmax(teacherₖ / T) ‖ softmax(student / T))``. The student's gradient is
      that of ``mix="probs"``; the gradients of teachers and weights are different.

    The mixture is never materialised.

    Args:
        student: logits ``[B, C]`` or ``[B, C, *positions]``; float32, float64, bfloat16 or float16, any strides.
        teachers: logits ``[K, B, C]`` or ``[K, B, C, *positions]``; the dtype may differ from the student's.
        weights: ``[K]``, ``[K, B]``, ``[K, C]``, ``[K, B, C]``, ``[K, B, 1]`` or ``[K, 1, C]`` (or with the teachers'
            positions), at least 0, floating or bool; default: equal. Where B = C, ``[K, B]`` is refused, since it could
            be ``[K, C]``. Normalised over the teachers for every sample and class to W; 1/K where weights and mask
            leave no teacher. The sum of float32 and 16-bit weights must be in float32's range; of float64 weights,
            against float32 logits, those 1e38 times below the largest count as 0. A teacher of weight 0 has no effect,
            whatever it holds, and its weight gets no gradient.
        temperature: T > 0. ``math.inf`` is the exact limit: half the variance of mixed − student logits, over the
            classes that are finite in the student and in every teacher of positive weight there. Above 64 every
            backend takes the reference, in float64.
        mix: ``"probs"`` or ``"logits"``.
        mode: ``"kl_of_mean"`` or ``"mean_of_kl"``. ``"mean_of_kl"`` requires ``mix="probs"``, weights per teacher
            (``[K]``, ``[K, B]``, ``[K, B, 1]``) and no ``class_mask``.
        class_mask: bool ``[K, C]``, the classes that each teacher knows; all others have weight 0. There, and where
            weights by class are 0, NaN, infinities and a dtype's largest numbers count as ``-inf``.
        log_probs: teachers hold log-probabilities. At T = 1 their exponentials are used as the probabilities, without
            another softmax.
        reduction: ``"none"`` (one value per row), ``"sum"``, or ``"batchmean"`` (the sum divided by the number of rows,
            B × positions).
        dim: axis of the classes in the student's logits, as in :func:`fedkern.ops.kl_div`: -1 for ``[B, T, V]``. That
            of the teachers, whose first axis does not count, and of weights that have as many axes as the teachers.

    Returns:
        ``[B, *positions]`` for ``"none"``, else a scalar, in the promoted dtype of student and teachers: a bfloat16
        student against float32 teachers gives a float32 loss and a bfloat16 gradient. Everything is computed in float32
        (float64 where one of the two is float64) and rounded once. Under autocast 16-bit logits
        count as float32.

    Gradients go to those of student, teachers and weights that require one, each in its own dtype. A class whose
    teacher probability is 0 (a logit of ``-inf``, or so low that the exponential underflows) contributes nothing and
    gets no gradient. A class that is ``-inf`` in the student and has a probability in the mixture makes the loss
    ``+inf``.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape, a device, the temperature, mix, mode or reduction is wrong, or a weight on the CPU is
            negative or not finite.
    """
    student, teachers = autocast(student, teachers)
    if type(dim) is not int or dim != 1:
        student, teachers = checks.move_classes(("student", "teachers"), (student, teachers), dim, (0, 1))
        if weights is not None:
            check_tensor(weights, "weights")
            if weights.dim() == student.dim() + 1:
                weights = weights.movedim(dim if dim < 0 else dim + 1, 2)
    # The core's check in one step; all other checks only if it fails.
    tensors = (student, teachers) if weights is None else (student, teachers, weights)
    kernel: DistillKernels | None = select_ordinary("ensemble_kl", *tensors)
    ordinary = kernel is not None and 3 <= teachers.dim() <= MAX_DIMS + 1
    if ordinary and isinstance(class_mask, Tensor) and outlived(class_mask):
        ordinary = False
    if not ordinary or teachers.shape[1:] != student.shape or 0 in (teachers.shape[0], teachers.shape[2]):
        checks.check_stack("teachers", teachers)
        checks.check_student(student, teachers)
    if type(temperature) is not float or not temperature > 0:
        temperature = checks.check_temperature(temperature)
    code = checks.check_reduction(reduction)
    mixture = _mixture(mix, mode)
    # Weights [K] stay short for kernels that read them with a stride of 0.
    short = False
    if weights is not None:
        checks.check_values(weights, ordinary)
        short = ordinary and weights.dim() == 1 and weights.shape[0] == teachers.shape[0] and not weights.requires_grad
        short = short and weights.dtype is not torch.float64
        if not short:
            weights = checks.spread_weights(weights, teachers)
            tensors = (student, teachers, weights)
    if class_mask is not None:
        checks.check_mask(class_mask, teachers)
    if mixture == MEAN and (class_mask is not None or (weights is not None and not short and weights.shape[2] != 1)):
        raise ValueError('mode="mean_of_kl" takes weights per teacher, [K] or [K, B], and no class_mask')
    teachers = checks.without_unknown(teachers, weights, class_mask)
    tensors = (student, teachers, *tensors[2:])
    log_probs = bool(log_probs)

    # Under compilers and transforms the operator of torch.library; class masks are not mapped.
    if not ordinary or is_flat(temperature):
        if not eager(*tensors, *(() if class_mask is None else (class_mask,))):
            if class_mask is not None and not torch.compiler.is_compiling() and is_wrapped(class_mask):
                weights, class_mask = checks.mask_weights(weights, class_mask, teachers), None
            return ENSEMBLE(student, teachers, weights, class_mask, temperature, mixture, log_probs, code)
        kernel = select_at(temperature, "ensemble_kl", *tensors)
    if short and weights is not None and (kernel is None or not kernel.short_weights):
        weights = checks.spread_weights(weights, teachers)
    if kernel is None:
        return ensemble_reference(student, teachers, weights, class_mask, temperature, mixture, log_probs, code)
    call = new_call(Ensemble, (student, teachers, weights, class_mask, temperature, mixture, log_probs, code))
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return EnsembleFunction.call((kernel, call), *call[:4])
    loss: Tensor = kernel.ensemble_forward(call)
    return loss


def _mixture(mix: str, mode: str) -> int:
    if mode == "kl_of_mean":
        if mix == "probs":
            return PROBS
        if mix == "logits":
            return LOGITS
    if mix not in ("probs", "logits"):
        raise ValueError(f'mix must be "probs" or "logits", but is {mix!r}')
    if mode != "mean_of_kl":
        raise ValueError(f'mode must be "kl_of_mean" or "mean_of_kl", but is {mode!r}')
    if mix != "probs":
        raise ValueError('mode="mean_of_kl" mixes no logits: mix must be "probs"')
    return MEAN
