"""Classifier calibration from class statistics (CCVR, arXiv 2106.05001, and FuseFL, arXiv 2410.20380, section 4.5).

The server pools the clients' statistics of features, draws virtual features from one Gaussian per class and trains only
the classifier.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedkern.errors import UserError
from fedkern.methods.options import Options
from fedkern.methods.protocol import Batch, Message, Phase, Upload
from fedkern.methods.roles import Server
from fedkern.methods.uploads import Declaration, Values
from fedkern.models.optimisers import SGD
from fedkern.typed_option import option

JITTER = 1e-4  # added to every variance, so that no direction has zero variance
BATCH = 128  # virtual features per step of the calibration
PORTION_BYTES = 64 << 20  # virtual features in memory at a time


@dataclass(frozen=True)
class CalibrationOptions(Options):
    """Options of calibrating methods."""

    calibrate: bool = option(True, "train the classifier anew on features drawn from pooled class statistics (CCVR)")
    calibration_epochs: int = option(5, "passes over the virtual features", low=1)
    calibration_lr: float = option(0.01, "learning rate of the calibration", above=0)
    virtual_features: int = option(5000, "virtual features per class and pass", low=1)
    covariance: str = option("full", "class covariances as sent: full or diagonal", choices=("full", "diagonal"))
    ccvr_compat: bool = option(
        False, "calibrate as the released code does: uncentred second moment, one pass, no shrinkage"
    )


class ClassStatistics:
    """Counts, means and scatters of features per class, exact for any partition of the samples.

    Parts are merged by the update of Chan et al. (1979), which never subtracts large moments; with ``compat`` as in
    FuseFL's released code: ``sum (n_k - 1) S_k / n_k + sum n_k mu_k mu_k^T`` over ``n - 1``, an uncentred second moment
    (its factor is written ``n / n - 1``).

    Attributes:
        counts: int64 [C].
        means: fp64 [C, d].
        scatters: fp64 [C, d, d], or [C, d] with ``diagonal``: sums of squared deviations from the class mean.
    """

    def __init__(self, classes: int, width: int, *, diagonal: bool = False, compat: bool = False) -> None:
        self.classes, self.width, self.diagonal, self.compat = classes, width, diagonal, compat
        self.counts = torch.zeros(classes, dtype=torch.int64)
        self.means = torch.zeros(classes, width, dtype=torch.float64)
        self.scatters = torch.zeros((classes, width) if diagonal else (classes, width, width), dtype=torch.float64)

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add ``features`` [B, d] with ``labels`` int64 [B]."""
        wide, labels = features.detach().double(), labels.to(features.device)
        for c in labels.unique().tolist():
            if not 0 <= c < self.classes:
                raise ValueError(f"labels must lie in [0, {self.classes}), not {c}")
            rows = wide[labels == c]
            mean = rows.mean(0)
            centred = rows - mean
            scatter = centred.square().sum(0) if self.diagonal else centred.T @ centred
            self._chan(c, len(rows), mean.cpu(), scatter.cpu())

    def message(self) -> Message:
        """Return a client's upload, with means and scatters of its C' classes.

        ``counts`` int32 [C], ``means`` fp32 [C', d], ``scatters`` fp32 [C', d (d + 1) / 2] (upper triangles by rows) or
        [C', d].
        """
        present = self.counts > 0
        scatters = self.scatters[present]
        if not self.diagonal:
            scatters = scatters[:, *torch.triu_indices(self.width, self.width)]
        return {"counts": self.counts.int(), "means": self.means[present].float(), "scatters": scatters.float()}

    def merge(self, message: Mapping[str, Tensor]) -> None:
        """Add a declared :meth:`message`, or change nothing and raise ValueError."""
        counts, means, scatters = (message[name].cpu() for name in ("counts", "means", "scatters"))
        present = int((counts > 0).sum())
        if len(scatters) != present:
            raise ValueError(f"{len(scatters)} means and scatters came for {present} classes")
        variances = scatters if self.diagonal else scatters[:, torch.eq(*torch.triu_indices(self.width, self.width))]
        if bool((variances < 0).any()):
            raise ValueError("scatters of the class statistics must not be negative on the diagonal")
        for row, c in enumerate(torch.nonzero(counts).flatten().tolist()):
            n, mean, packed = int(counts[c]), means[row].double(), scatters[row].double()
            scatter = packed if self.diagonal else self._unpack(packed)
            if self.compat:
                total = int(self.counts[c]) + n
                outer = mean.square() if self.diagonal else torch.outer(mean, mean)
                self.scatters[c] += (n - 1) / n * scatter + n * outer
                self.means[c] += (mean - self.means[c]) * (n / total)
                self.counts[c] = total
            else:
                self._chan(c, n, mean, scatter)

    def covariances(self) -> Tensor:
        """Return scatter / (n - 1), zero if n is 1 or 0."""
        degrees = (self.counts - 1).clamp_min(1).double()
        return self.scatters / degrees.reshape(-1, *[1] * (self.scatters.dim() - 1))

    def _chan(self, c: int, n: int, mean: Tensor, scatter: Tensor) -> None:
        before = int(self.counts[c])
        total = before + n
        shift = mean - self.means[c]
        between = shift.square() if self.diagonal else torch.outer(shift, shift)
        self.scatters[c] += scatter + between * (before * n / total)
        self.means[c] += shift * (n / total)
        self.counts[c] = total

    def _unpack(self, packed: Tensor) -> Tensor:
        full = packed.new_zeros(self.width, self.width)
        full[*torch.triu_indices(self.width, self.width)] = packed
        return full + full.triu(1).T


def collect_statistics(
    features: Callable[[Tensor], Tensor], batches: Iterable[Batch], classes: int, options: CalibrationOptions
) -> Message:
    """Return a client's upload: statistics of ``features(images)`` ``[B, d]``."""
    statistics: ClassStatistics | None = None
    with torch.no_grad():
        for batch in batches:
            rows = features(batch.inputs)
            if statistics is None:
                statistics = ClassStatistics(classes, rows.shape[1], diagonal=options.covariance == "diagonal")
            statistics.add(rows, batch.targets)
    if statistics is None:
        raise ValueError("batches must hold at least one batch, not none")
    return statistics.message()


def statistics_of(head: nn.Linear, options: CalibrationOptions) -> Declaration:
    """Declare a client's statistics of the inputs of ``head``."""
    width = head.in_features
    size = width if options.covariance == "diagonal" else width * (width + 1) // 2
    return {
        "counts": Values((head.out_features,), torch.int32, low=0),
        "means": Values(("classes present", width)),
        "scatters": Values(("classes present", size)),
    }


def merge_uploads(server: Server, uploads: Iterable[Upload], merge: Callable[[Message], None]) -> None:
    """Pass the clients' statistics to ``merge``, and refuse uploads that raise ValueError."""
    for upload in uploads:
        try:
            merge(upload.message)
        except ValueError as error:
            k = upload.client_id
            server.refuse(k, f"The class statistics of client {k} cannot be used: {error}")


def calibrate_head(
    server: Server, phase: Phase, uploads: Iterable[Upload], head: nn.Linear, options: CalibrationOptions
) -> nn.Linear:
    """Return ``head`` trained on the clients' statistics, or UserError if all were refused."""
    diagonal = options.covariance == "diagonal"
    pooled = ClassStatistics(head.out_features, head.in_features, diagonal=diagonal, compat=options.ccvr_compat)
    merge_uploads(server, uploads, pooled.merge)
    if not int(pooled.counts.sum()):
        raise UserError("The class statistics of every client were refused: run without calibrate.")
    return calibrate(head, pooled, server.rng("calibration", phase), options)


def shrink_covariances(statistics: ClassStatistics) -> Tensor:
    """Return covariances shrunk towards their mean variance, zero for absent classes.

    ``(1 - rho_c) Sigma_c + rho_c (tr Sigma_c / d) I`` with rho_c of the oracle approximating shrinkage (Chen et al.,
    arXiv 0907.4698, eq. 23), for diagonal statistics ``2 / (n + 1) sum v^2 / sum (v - mean v)^2``. A class with one
    sample takes the other classes' mean variance.
    """
    covariances, d = statistics.covariances(), statistics.width
    variances = covariances if statistics.diagonal else covariances.diagonal(dim1=1, dim2=2)
    mean = variances.mean(1)
    several = statistics.counts > 1
    common = mean[several].mean() if bool(several.any()) else mean.new_zeros(())
    result = torch.zeros_like(covariances)
    for c in torch.nonzero(statistics.counts).flatten().tolist():
        n = int(statistics.counts[c])
        target = (mean[c] if n > 1 else common).expand(d)
        if statistics.diagonal:
            spread = (variances[c] - mean[c]).square().sum()
            numerator = 2 / (n + 1) * variances[c].square().sum()
        else:
            squared, trace = covariances[c].square().sum(), mean[c] * d
            spread = (n + 1 - 2 / d) * (squared - trace.square() / d)
            numerator = (1 - 2 / d) * squared + trace.square()
        rho = 1.0 if n == 1 or numerator >= spread else float(numerator / spread)
        result[c] = (1 - rho) * covariances[c] + rho * (target if statistics.diagonal else target.diag())
    return result


def virtual_features(
    statistics: ClassStatistics, rng: np.random.Generator, per_class: int, *, compat: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled portions of ``per_class`` drawn features of every class, fp32 [n, d], and labels int64 [n].

    ``compat`` leaves the covariances unchanged, neither shrunk nor raised by ``JITTER``.
    """
    present = torch.nonzero(statistics.counts).flatten().tolist()
    covariances = statistics.covariances() if compat else shrink_covariances(statistics)
    roots = [_root(covariances[c], 0.0 if compat else JITTER).float() for c in present]
    means = statistics.means.float()
    at_once = max(1, PORTION_BYTES // max(1, 4 * statistics.width * len(present)))
    for begin in range(0, per_class, at_once):
        count = min(at_once, per_class - begin)
        parts = []
        for c, root in zip(present, roots, strict=True):
            noise = torch.from_numpy(rng.standard_normal((count, statistics.width), dtype=np.float32))
            parts.append(means[c] + (noise * root if statistics.diagonal else noise @ root.T))
        order = torch.from_numpy(rng.permutation(count * len(present)))
        yield torch.cat(parts)[order], torch.tensor(present).repeat_interleave(count)[order]


def _root(covariance: Tensor, jitter: float) -> Tensor:
    """Return R with R R^T = covariance + jitter I."""
    if covariance.dim() == 1:
        return (covariance + jitter).clamp_min(0).sqrt()
    raised = covariance + jitter * torch.eye(len(covariance), dtype=covariance.dtype)
    root, failed = torch.linalg.cholesky_ex(raised)
    if int(failed):  # the matrix is singular up to the rounding of fp32 uploads
        values, vectors = torch.linalg.eigh(raised)
        root = vectors * values.clamp_min(0).sqrt()
    result: Tensor = root
    return result


def calibrate(
    head: nn.Linear, statistics: ClassStatistics, rng: np.random.Generator, options: CalibrationOptions
) -> nn.Linear:
    """Return a copy of ``head`` trained on virtual features by SGD without momentum.

    ``options.ccvr_compat`` makes one pass at learning rate 0.01.
    """
    compat = options.ccvr_compat
    trained = copy.deepcopy(head).requires_grad_(True)
    device = trained.weight.device
    optimiser = SGD(trained.parameters(), 0.01 if compat else options.calibration_lr)
    with torch.enable_grad():
        for _ in range(1 if compat else options.calibration_epochs):
            for features, labels in virtual_features(statistics, rng, options.virtual_features, compat=compat):
                x, y = features.to(device), labels.to(device)
                for rows, targets in zip(x.split(BATCH), y.split(BATCH), strict=True):
                    optimiser.zero_grad()
                    cross_entropy(trained(rows), targets).backward()
                    optimiser.step()
    return trained.requires_grad_(False)
