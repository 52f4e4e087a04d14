"""kl_div, dual_kl: Kullback-Leibler divergence between the softmaxes of one or two students and a teacher."""

from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core.backend import eager, select_ordinary
from fedkern.ops._core.checks import autocast
from fedkern.ops._distill.checks import check_logits, check_reduction, check_temperature, check_weight, move_classes
from fedkern.ops._distill.entries import DIVERGENCE, select_at
from fedkern.ops._distill.gradients import DivergenceFunction
from fedkern.ops._distill.kernels import DistillKernels, Divergence, new_call
from fedkern.ops._distill.reference import FLAT, divergence_reference, result_dtype
from fedkern.ops._distill.sparse import check_teacher, fill_classes, serve_sparse


def kl_div(
    student: Tensor,
    teacher: Tensor | tuple[Tensor, Tensor],
    temperature: float = 1.0,
    *,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    dim: int = 1,
    rest: str = "renormalise",
) -> Tensor:
    """Return ``T² · KL(softmax(teacher / T) ‖ softmax(student / T))`` over the classes, which lie on axis ``dim``.

    The distillation loss of Hinton et al. (arXiv 1503.02531). As in PyTorch's losses the classes lie on axis 1; give
    ``dim=-1`` for logits ``[B, T, V]`` of a language model. Exchange student and teacher for the other direction.

    Args:
        student: logits ``[B, C]`` or ``[B, C, *positions]``; float32, float64, bfloat16 or float16, any strides.
        teacher: logits of the same shape; its dtype may differ. Or ``(values, indices)``, as ``topk`` returns them, for
            a teacher that is stored at k of C classes: floating values ``[B, k, *positions]`` and the classes that they
            belong to, whole numbers of the same shape, different in every row.
        temperature: T > 0, in the units of the logits. ``math.inf`` is the exact limit: half the variance over classes
            of ``teacher - student``. Above 64 every backend takes the reference, in float64, which keeps all digits.
        weight: ``[B]`` or ``[B, *positions]``, floating or bool; multiplies each row's loss. A row of weight 0
            contributes exactly zero to the loss and to every gradient, whatever it holds.
        reduction: ``"none"`` (one value per row), ``"sum"``, or ``"batchmean"`` (the sum divided by the number of rows,
            B × positions; 0 for an empty batch).
        dim: axis of the classes, which may be negative. The other axes are B and the positions, in their order. No
            copy is made.
        rest: the C - k other classes of a stored teacher. ``"renormalise"``: values are logits, and the others have
            probability 0. ``"spread"``: values are log-probabilities at T = 1, and the others share what is left to 1
            equally (nothing where rounded values leave nothing), computed in float64.

    Returns:
        ``[B, *positions]`` for ``"none"``, else a scalar, in the promoted dtype of student and teacher. Everything is
        computed in float32 (float64 where an input is float64) and rounded once. Under autocast 16-bit
        logits count as float32.

    Gradients go to those of student, teacher and weight that require one, each in its own dtype. A class whose teacher
    probability is 0 (a logit of ``-inf``, or so low that the exponential underflows, as that of a class masked with a
    large finite number) contributes nothing to the teacher's side and gets no gradient there. A class that is ``-inf``
    in the student and has a teacher probability makes the loss ``+inf``. With ``temperature=math.inf`` classes
    that are ``-inf`` in either are left out. Values of a stored teacher get no gradient.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, a device, the temperature, the reduction or rest is wrong, values require a gradient, or
            (looked for on the CPU alone) indices are no different classes of a row.
    """
    names = ("student", "teacher")
    if not isinstance(teacher, tuple):
        if rest != "renormalise":
            raise ValueError(f"rest is for a teacher (values, indices), and this one has all logits; it is {rest!r}")
        return _dispatch(student, None, teacher, weight, temperature, False, reduction, dim, names)
    student, *stored = autocast(student, *teacher)
    if type(dim) is not int or dim != 1:
        (student,) = move_classes(("student",), (student,), dim, (0,))
        stored = [x.movedim(dim, 1) if isinstance(x, Tensor) and 1 < x.dim() == student.dim() else x for x in stored]
    check_logits(("student",), (student,))
    values, indices = check_teacher(student, stored, rest)
    temperature, code = check_temperature(temperature), check_reduction(reduction)
    if weight is not None:
        weight = check_weight(weight, student, torch.float32)
    loss = serve_sparse((student, values, indices, weight), temperature, code, rest)
    if loss is not None:
        return loss
    full = fill_classes(values, indices, student.shape[1], rest)
    loss = _dispatch(student, None, full, weight, temperature, False, reduction, 1, names)
    return loss.to(result_dtype(student, None, values))


def dual_kl(
    a: Tensor,
    b: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    direction: str = "teacher",
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    dim: int = 1,
) -> Tensor:
    """Return the sum of two divergences over the classes, which lie on axis ``dim``, from one reading of the teacher.

    The distillation loss of FedGID (arXiv 2504.00850).

    - ``direction="teacher"``: ``T² (KL(teacher ‖ a) + KL(teacher ‖ b))``
    - ``direction="student"``: ``T² (KL(a ‖ teacher) + KL(b ‖ teacher))``

    Each name stands for its softmax at temperature T. Temperature, reduction, dim, results, gradients and errors are
    those of :func:`kl_div`.

    Args:
        a, b, teacher: logits of one shape, as in :func:`kl_div`; a and b are two students.
        direction: whose probabilities weight the logarithms.
        weight: as in :func:`kl_div`; multiplies both divergences of a row.
    """
    if direction not in ("teacher", "student"):
        raise ValueError(f'direction must be "teacher" or "student", but is {direction!r}')
    return _dispatch(a, b, teacher, weight, temperature, direction == "student", reduction, dim, ("a", "b", "teacher"))


def _dispatch(
    student: Tensor,
    peer: Tensor | None,
    teacher: Tensor,
    weight: Tensor | None,
    temperature: float,
    reverse: bool,
    reduction: str,
    dim: int,
    names: tuple[str, ...],
) -> Tensor:
    student, peer, teacher = autocast(student, peer, teacher)
    # By the number of names: None as the second student of dual_kl is a mistake, which check_logits reports.
    tensors: tuple[Any, ...] = (student, teacher) if len(names) == 2 else (student, peer, teacher)
    if type(dim) is not int or dim != 1:
        tensors = move_classes(names, tensors, dim, (0,) * len(names))
        student, teacher = tensors[0], tensors[-1]
        peer = tensors[1] if len(names) == 3 else None
    operator = "kl_div" if len(names) == 2 else "dual_kl"
    kernel: DistillKernels | None = select_ordinary(operator, *tensors)
    if kernel is None:
        check_logits(names, tensors)
    if type(temperature) is not float or not temperature > 0:
        temperature = check_temperature(temperature)
    code = check_reduction(reduction)
    if weight is not None:
        weight = check_weight(weight, student, torch.float32)
        tensors = (*tensors, weight)
        if not eager(weight) or weight.is_neg():
            kernel = None
    if kernel is None or temperature > FLAT:
        if not eager(*tensors):
            return DIVERGENCE(student, peer, teacher, weight, temperature, reverse, code)
        kernel = select_at(temperature, operator, *tensors)
    if kernel is None:
        return divergence_reference(student, peer, teacher, weight, temperature, reverse, code)
    call = new_call(Divergence, (student, peer, teacher, weight, temperature, reverse, code))
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return DivergenceFunction.call((kernel, call), *call[:4])
    return kernel.divergence_forward(call)
