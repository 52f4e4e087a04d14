"""aggregate: one low-rank adapter (LoRA) for the weighted mean of several."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedkern.ops._aggregate.checks import check_weights
from fedkern.ops._core.checks import check_count, check_device, check_floating, check_number, refuse_gradient

Pair = tuple[Tensor, Tensor]


def lora_merge(
    pairs: Sequence[Pair], weights: Tensor | Sequence[float], scales: Sequence[float], rank: int | None = None
) -> tuple[Tensor, Tensor, float]:
    """Merge low-rank adapters of one linear layer: ``B @ A`` is the weighted mean of ``scale * B_k @ A_k``.

    Client k adds ``scale_k * B_k @ A_k`` to the layer's weight (LoRA, arXiv 2106.09685). Means of A and of B have
    another product than the mean of these products, M, which this function represents:

    - Without a rank exactly, by concatenation (FLoRA, arXiv 2409.05976): A holds all rows of the A_k, and B all columns
      of the B_k, times weight and scale. The rank is the sum of the ranks.
    - With a rank by the nearest matrix of that rank in the Frobenius norm (Eckart and Young, 1936; in federated rounds
      FlexLoRA, arXiv 2402.11505). Both sides take the root of a singular value, and the largest entry of a column of B
      is positive. M is never stored: the SVD is of the product of two triangular factors, in fp64. Rows of A and
      columns of B beyond the rank of M are 0.

    The scales are part of the result, so `peft` loads it with ``lora_alpha`` equal to ``r``.

    Args:
        pairs: (A ``[r_k, in]``, B ``[out, r_k]``) of M clients; fp32, bf16, fp16 or fp64, of one dtype and device, any
            strides. Ranks may differ.
        weights: M finite numbers, at least 0 and not all 0. They need not sum to one. A client of weight zero is left
            out.
        scales: M numbers of at least 0: ``alpha / r_k``, or ``alpha / sqrt(r_k)`` (arXiv 2312.03732).
        rank: rank of the result; None: exact.

    Returns:
        A ``[rank, in]``, B ``[out, rank]`` in the pairs' dtype, and the error ``|B @ A - M| / |M|`` in the Frobenius
        norm, rounding included, 0 if M is 0. There is no gradient.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value is wrong, or a gradient was asked for.
    """
    _check_pairs(pairs)
    refuse_gradient("lora_merge", weights, *(side for pair in pairs for side in pair))
    shares, total = check_weights(weights, len(pairs))
    if not isinstance(scales, (list, tuple)) or len(scales) != len(pairs):
        raise ValueError(f"scales must be a list of {len(pairs)} numbers, one for each pair, not {scales!r}")
    factors = [
        share / total * check_number(scale, f"scales[{position}]")
        for position, (share, scale) in enumerate(zip(shares, scales, strict=True))
    ]
    if rank is not None:
        check_count(rank, "rank", 1)
    clients = [position for position, share in enumerate(shares) if share]
    rows = torch.cat([pairs[position][0].double() for position in clients])
    columns = torch.cat([factors[position] * pairs[position][1].double() for position in clients], 1)
    a, b = (rows, columns) if rank is None else _nearest(rows, columns, rank)
    a, b = a.to(pairs[0][0].dtype), b.to(pairs[0][0].dtype)
    size = _product_norm(rows, columns)
    return a, b, _product_norm(torch.cat([rows, a]), torch.cat([columns, -b], 1)) / size if size else 0.0


def _check_pairs(pairs: Sequence[Pair]) -> None:
    """Refuse pairs that are no matrices of one dtype and fitting shapes, or that hold NaN or infinite values."""
    if not isinstance(pairs, (list, tuple)) or not pairs:
        raise TypeError("pairs must be a list of at least one pair of tensors (A [r, in], B [out, r])")
    for position, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise TypeError(f"pairs[{position}] must be a pair of tensors (A [r, in], B [out, r])")
        for side, tensor in enumerate(pair):
            name, template = f"pairs[{position}][{side}]", pairs[0][0]
            check_floating(tensor, name)
            check_device(tensor, name, template, "pairs[0][0]")
            if tensor.dtype != template.dtype:
                raise TypeError(f"{name} must have dtype {template.dtype} like pairs[0][0], but has {tensor.dtype}")
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} must be finite, but holds NaN or infinite values")
        a, b = pair
        is_pair = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] and a.numel() and b.numel()
        if not is_pair or (b.shape[0], a.shape[1]) != (pairs[0][1].shape[0], pairs[0][0].shape[1]):
            raise ValueError(
                f"pairs[{position}] must have shapes [r, in] and [out, r], with the in and out of pairs[0], but has "
                f"{list(a.shape)} and {list(b.shape)}"
            )


def _nearest(rows: Tensor, columns: Tensor, rank: int) -> Pair:
    """Return A ``[rank, in]`` and B ``[out, rank]`` nearest to ``columns @ rows``."""
    left, left_factor = torch.linalg.qr(columns)
    right, right_factor = torch.linalg.qr(rows.T)
    u, values, v = torch.linalg.svd(left_factor @ right_factor.T, full_matrices=False)
    roots = values[:rank].sqrt()
    b, a = left @ u[:, :rank] * roots, v[:rank] @ right.T * roots[:, None]
    signs = b.gather(0, b.abs().argmax(0, keepdim=True)).sign()
    missing = rank - len(roots)
    return pad(a * signs.T, (0, 0, 0, missing)), pad(b * signs, (0, missing))


def _product_norm(rows: Tensor, columns: Tensor) -> float:
    """Return the Frobenius norm of ``columns @ rows``, without that product."""
    factors = [torch.linalg.qr(side.double(), mode="r").R for side in (columns, rows.T)]
    return float(torch.linalg.matrix_norm(factors[0] @ factors[1].T))
