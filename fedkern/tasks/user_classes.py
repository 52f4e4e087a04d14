"""Classification with a user-defined loss or additional metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from fedkern.errors import UserError
from fedkern.tasks.classification import CLASSIFICATION, Classification
from fedkern.tasks.protocols import JudgedSet
from fedkern.tasks.task import Task
from fedkern.tasks.user_tasks import OwnTask, SetEvaluation, TorchLoss, torch_loss

TAKEN = ("accuracy", "loss", "confidence", "balanced_accuracy", "macro_f1", "auroc", "ece")
"""Names of the figures of every classification."""


class OwnClassification(OwnTask, Classification):
    """Classification with a user-defined loss of logits and classes, or with user-defined metrics.

    Args:
        loss_fn, metrics: as in `OwnTask`. Outputs are logits, for NLL logarithms of probabilities.
        main, better: the main figure (None: the accuracy) and its better values.
    """

    name, target, network, noun = "classification", "class", "classes", "samples"
    built_in = TAKEN[:3]
    concurrent = False
    member_figures = Task.member_figures

    def __init__(
        self,
        loss_fn: Callable[..., Tensor] | None = None,
        metrics: Mapping[str, object] | None = None,
        main: str | None = None,
        better: Literal["max", "min"] | None = None,
        batch_loss: None = None,
    ) -> None:
        super().__init__(loss_fn, metrics, main, better)
        if name := next((name for name in self.metrics if name in TAKEN), None):
            raise UserError(f"metrics has one called {name}, which every classification has: give it another name.")
        if main is None and self.better == "min":
            raise UserError('better="min" is of the main figure, the accuracy: name another one with main=.')
        options = torch_loss(self.loss_code) or TorchLoss()
        self.ignored, self._logarithms = options.ignored, options.logarithms  # type: ignore[misc]
        # Logarithms of probabilities are not linear in the features.
        self.offers = CLASSIFICATION.offers - ({"features"} if options.logarithms else set())  # type: ignore[misc]

    @torch.no_grad()
    def figures(self, model: nn.Module, data: JudgedSet) -> dict[str, float]:
        return self.figures_of_client(model, data, None)

    def figures_of_client(self, model: nn.Module, data: JudgedSet, client: int | None) -> dict[str, float]:
        evaluation = SetEvaluation(self, model, data)
        with evaluation.turn:
            pairs = cast("Iterator[tuple[Tensor, Tensor]]", evaluation.batches())
            figures = self.figures_of(pairs, data, client) | evaluation.figures()
        return {self.main: figures[self.main], **figures}

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.exp() if self._logarithms else super().probabilities(logits)
