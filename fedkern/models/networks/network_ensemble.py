"""Ensemble of frozen networks as one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedkern.models.state.allocate import linear_of


def mean_logits(logits: Tensor, weights: Tensor) -> Tensor:
    """Return the mean ``[B, C, *positions]`` of ``[M, B, C, *positions]`` by weights ``[M]`` or ``[M, 1, C]``."""
    if weights.dim() > 1:
        return torch.einsum("mc,mbc...->bc...", weights[:, 0], logits)
    return torch.einsum("m,mbc...->bc...", weights, logits)


class Ensemble(nn.Module):
    """Frozen networks with averaged logits, always in eval mode.

    With weights by class the members' logits are their log-probabilities.  A softmax ignores a constant that is added
    to all logits of a member, and a mean with other weights for every class does not (FedIOD, arXiv 2312.14478).

    Attributes:
        weights: the normalised weights, ``[M]``, or ``[M, 1, C]`` by class.
        head: a classifier on :meth:`features` that replaces the mean of the logits, or None (:meth:`replace_head`).

    Args:
        members: M >= 1 networks with ``features`` and a linear ``head``, of any architecture, with the same classes.
        weights: numbers of at least 0, the members' weights in the mean, M or ``[M, C]`` by class; normalised to sum 1
            over the members, by default equal.  A class in which no member has a weight weighs all alike.
        temperature: divides the logits before the log-probabilities, with weights by class.
        pool: :meth:`features` concatenates the members' features or takes their mean (members of one width).

    Raises:
        ValueError: ``pool`` is ``"mean"`` and members have different numbers of features.
    """

    weights: Tensor

    def __init__(
        self,
        members: Sequence[nn.Module],
        weights: Sequence[float] | Sequence[Sequence[float]] | Tensor | None = None,
        *,
        pool: Literal["concat", "mean"] = "concat",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        heads: list[Any] = [member.head for member in members]
        self.widths = [int(head.in_features) for head in heads]
        if pool == "mean" and len(set(self.widths)) > 1:
            raise ValueError(f'pool "mean" needs members with equally many features, not {self.widths}')
        self.members = nn.ModuleList(members)
        self.pool, self.temperature = pool, temperature
        w = torch.ones(len(members)) if weights is None else torch.as_tensor(weights, dtype=torch.float32)
        total = w.sum(0)
        w = w / total if w.dim() == 1 else torch.where(total > 0, w / total, 1 / len(members))[:, None]
        self.register_buffer("weights", w.to(next(self.parameters()).device))
        self.head: nn.Linear | None = None
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Ensemble:
        """Do nothing: the members are frozen and stay in eval mode."""
        return self

    # -- features and logits ---------------------------------------------------------------------------------------

    def parts(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the members' features, M times ``[B, d_m]``, and logits ``[M, B, C]``.

        The features and logits of U-Nets also have ``*positions``.
        """
        features = [member.features(x) for member in self.members]  # type: ignore[operator]
        logits = torch.stack([member.head(f) for member, f in zip(self.members, features, strict=True)])  # type: ignore[operator]
        return features, logits if self.weights.dim() == 1 else (logits / self.temperature).log_softmax(2)

    def logits(self, x: Tensor) -> Tensor:
        """Return every member's logits ``[M, B, C]``, with gradients to ``x``."""
        return self.parts(x)[1]

    def features(self, x: Tensor) -> Tensor:
        """Return the members' pooled features side by side ``[B, sum d_m]``, or their mean ``[B, d]``."""
        return self.gather(self.parts(x)[0])

    def gather(self, features: list[Tensor]) -> Tensor:
        """Concatenate or average the members' features, as :meth:`features` does."""
        return torch.cat(features, 1) if self.pool == "concat" else torch.stack(features).mean(0)

    def mix(self, logits: Tensor) -> Tensor:
        """Return the weighted mean ``[B, C, *positions]`` of the members' logits ``[M, B, C, *positions]``."""
        return mean_logits(logits, self.weights)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, C]``: the weighted mean of the members' logits, or those of :attr:`head`."""
        return self.answer(*self.parts(x))

    def answer(self, features: list[Tensor], logits: Tensor) -> Tensor:
        """Return the ensemble's logits, from the members' features and logits (:meth:`parts`)."""
        return self.mix(logits) if self.head is None else self.head(self.gather(features))

    def joint_head(self) -> nn.Linear:
        """Return the classifier on :meth:`features` that calibration starts from.

        On concatenated features it gives exactly the weighted mean of the members' logits.  On the mean of the
        features it is the weighted mean of the members' heads.

        Raises:
            ValueError: the weights are by class: no linear classifier gives the mean of log-probabilities.
        """
        if self.weights.dim() > 1:
            raise ValueError("weights must be a number for each member, not by class, for a classifier to start from")
        heads: list[Any] = [member.head for member in self.members]
        rows = [w * head.weight for w, head in zip(self.weights, heads, strict=True)]
        weight = torch.cat(rows, 1) if self.pool == "concat" else torch.stack(rows).sum(0)
        bias = torch.stack([w * head.bias for w, head in zip(self.weights, heads, strict=True)]).sum(0)
        return linear_of({"weight": weight, "bias": bias}, weight.device).requires_grad_(False)

    def replace_head(self, weight: Tensor, bias: Tensor) -> None:
        """Replace the mean of the logits by a classifier on :meth:`features`: ``weight`` [C, D], ``bias`` [C]."""
        self.head = linear_of({"weight": weight, "bias": bias}, self.weights.device).requires_grad_(False)
