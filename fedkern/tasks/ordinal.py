"""Ordinal classification: ordered classes, such as grades or ages."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.errors import UserError
from fedkern.tasks import classification as of_classes
from fedkern.tasks.protocols import Description, JudgedSet, SampleSet, TaskBatch
from fedkern.tasks.task import Constant, Figures, Rows, Task, iterate_outputs, mean, to_dict

UNIT = 0.5413248546129181
"""softplus(UNIT) is 1: thresholds begin one apart."""


class CumulativeLink(nn.Module):
    """Network with one output between K - 1 learnt thresholds: the proportional odds model (McCullagh, 1980).

    P(y <= k) = sigmoid(threshold_k - score). The output is the logarithm of every class's probability, fp32 ``[n, K]``,
    of ``network``'s score ``[n, 1]``.
    """

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network = network
        # The first threshold, then distances before softplus, so that thresholds averaged over clients stay in order.
        self.steps = nn.Parameter(torch.tensor([1 - classes / 2, *[UNIT] * (classes - 2)]))

    @property
    def thresholds(self) -> Tensor:
        """The thresholds, fp32 ``[K - 1]``, increasing."""
        return torch.cat([self.steps[:1], F.softplus(self.steps[1:])]).cumsum(0)

    def forward(self, images: Tensor) -> Tensor:
        score = self.network(images).float()
        if score.shape[1:] != (1,):
            raise ValueError(f"an ordinal network gives one number an image, [n, 1], and not {list(score.shape)}")
        margins = self.thresholds - score
        gaps = F.softplus(self.steps[1:])
        # log(sigmoid(a) - sigmoid(b)) is log sigmoid(a) + log sigmoid(-b) + log(1 - exp(b - a)), without cancellation.
        below, above = F.logsigmoid(margins), F.logsigmoid(-margins)
        between = below[:, 1:] + above[:, :-1] + torch.log(-torch.expm1(-gaps))
        return torch.cat([below[:, :1], between, above[:, -1:]], 1)


class Ordinal(Task):
    """Ordinal classification, int64 ``[n]``, by the distance of predictions in classes."""

    name, main, better, sampled = "ordinal", "mae", "min", "mae"
    offers = frozenset({"loss", "criterion", "images"})

    def criterion(self, outputs: Tensor, batch: TaskBatch) -> Tensor:
        return F.nll_loss(outputs, batch.targets)

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.nll_loss(outputs, targets, reduction="none")

    @torch.no_grad()
    def figures(self, model: nn.Module, data: JudgedSet) -> dict[str, float]:
        """Return ``mae`` (mean absolute error in classes), ``kappa``, ``accuracy`` and ``loss`` (nats).

        Predictions are the likeliest classes; kept answers are log-probabilities, [n, K].
        """
        parts = [(outputs.double(), labels) for outputs, labels in iterate_outputs(model, data)]
        if not parts:
            raise ValueError("data: expected at least one sample, given none")
        logits, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        predicted = logits.argmax(1)
        if record := getattr(data, "record", None):
            record(predicted)
        if keep := getattr(data, "keep", None):
            keep(logits.float().cpu())
        off = (predicted - labels).double()
        kappa = quadratic_kappa(of_classes.confusion(labels, predicted, logits.shape[1]))
        return {
            "mae": float(off.abs().mean()),
            **({} if kappa is None else {"kappa": kappa}),
            "accuracy": float((off == 0).double().mean()),
            "loss": float(F.nll_loss(logits, labels)),
        }

    def final(self, data: SampleSet, outputs: Sequence[Tensor], names: Sequence[str]) -> Figures:
        labels, predictions = data.labels.cpu(), [logits.argmax(1) for logits in outputs]
        recalls = mean([of_classes.recalls(labels, predicted, len(names)) for predicted in predictions])
        matrices = [of_classes.confusion(labels, predicted, len(names)) for predicted in predictions]
        return Figures(per_class={"recall": to_dict(recalls, names)}, confusion=torch.stack(matrices).sum(0))

    def parts(self, output: Tensor, labels: Tensor, cases: Tensor | None) -> Tensor:
        return (output.argmax(1) - labels).abs().double()[:, None]

    def constant(self, data: SampleSet, classes: Sequence[str]) -> Constant | None:
        counts = torch.bincount(data.labels.cpu(), minlength=len(classes))
        if int((counts > 0).sum()) < 2:
            return None
        figures = {"mae": float(_errors(counts.numpy()).min()), "accuracy": float(counts.max() / counts.sum())}
        return Constant(figures, "")

    def chance(
        self, data: SampleSet | None, classes: int, *, counts: Rows | None = None, candidates: float = 0.0
    ) -> float | None:
        if counts is None and data is not None:
            counts = np.bincount(data.labels.numpy())
        return float(_errors(counts).min()) if counts is not None and counts.sum() else None

    def check_classes(self, names: Sequence[str], ordered: bool) -> None:
        if not ordered:
            raise UserError(
                f"ordinal classes need an order, and {', '.join(names[:4])} are no numbers: give it with --data-option "
                f"order={'|'.join(names[:4])}."
            )

    def build(self, about: Description, seed: int) -> nn.Module:
        return CumulativeLink(super().build({**about, "classes": 1}, seed), about["classes"])


def quadratic_kappa(confusion: Tensor) -> float | None:
    """Return Cohen's kappa with quadratic weights, as in scikit-learn, or None if 0 / 0."""
    counts = confusion.double()
    numbers = torch.arange(len(counts), device=counts.device, dtype=torch.float64)
    weights = (numbers[:, None] - numbers).square()
    expected = (weights * counts.sum(1, keepdim=True) * counts.sum(0)).sum() / counts.sum()
    return float(1 - (weights * counts).sum() / expected) if expected else None


def _errors(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the mean absolute error of always predicting a class, for each class."""
    numbers = np.arange(len(counts))
    errors: npt.NDArray[np.float64] = np.abs(numbers[:, None] - numbers) @ counts / counts.sum()
    return errors


ORDINAL = Ordinal()
