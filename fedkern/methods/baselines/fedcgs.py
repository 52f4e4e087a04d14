"""FedCGS: a classifier from statistics of frozen features, in one round."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedkern.errors import UserError
from fedkern.methods.common.calibration import ClassStatistics, merge_uploads, shrink_covariances
from fedkern.methods.common.oneshot import OneShot
from fedkern.methods.method_registry import register
from fedkern.methods.options import Options as BaseOptions
from fedkern.methods.protocol import ClientId, Federation, Message, Phase, Round, Upload
from fedkern.methods.roles import Client, Server
from fedkern.methods.uploads import Declaration, Values
from fedkern.typed_option import option

STATISTICS = "statistics"


@register("fedcgs")
class FedCGS(OneShot):
    """A classifier from class means and one covariance of a frozen network's features (FedCGS, arXiv 2503.06962).

    Clients train nothing.  Of the features f of the network that a client receives it sends, per class, the count n_c
    and the mean mu_c, and the mean and the scatter of all its features.  The server pools these exactly.  With Sigma
    the covariance of all features of all clients, and n their number:

        w_c = Sigma^-1 mu_c        b_c = log(n_c / n) - mu_c^T Sigma^-1 mu_c / 2

    Start from a pretrained network: ``--init WEIGHTS``, or ``--model FILE.py:NAME`` whose class loads its weights.  A
    client sends C + C' d + d + d (d + 1) / 2 numbers of 4 bytes, where C' of the C classes are present.

    Sigma is the covariance about the mean of all features, as in the paper and the released code, not about class
    means.

    Differences from the paper:

    - ``shrinkage``, on by default, shrinks Sigma to its mean variance (`shrink_covariances`).
      Without shrinkage Sigma has no inverse if samples are fewer than features.
    - A class without samples has the mean of all features and the prior of half a sample.
    - The paper's second step, personalisation, is not built.

    Source: Guan et al., AAAI 2025.
    """

    requires = frozenset({"classes", "features"})
    takes_teachers = False
    averages = False

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """Options of FedCGS."""

        shrinkage: bool = option(True, "shrink the covariance to its mean variance; off: as published")

    calibrates = True

    def rounds(self, federation: Federation) -> Iterator[Round]:
        yield Round(STATISTICS, exchanges=(STATISTICS,), participants="all", trains="classifier")

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        network = self.statistics_network(client, message)
        statistics = FeatureStatistics(len(client.classes), network.head.in_features)
        with torch.no_grad():
            for batch in client.in_order():
                statistics.add(network.features(batch.inputs), batch.targets)
        return statistics.message()

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        head = self.head(server)
        width = head.in_features
        return {
            "means": Values(("classes present", width)),
            "counts": Values((head.out_features,), torch.int32, low=0),
            "mean": Values((width,)),
            "scatter": Values((width * (width + 1) // 2,)),
        }

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        head = self.head(server)
        pooled = FeatureStatistics(head.out_features, head.in_features)
        merge_uploads(server, uploads, pooled.merge)
        if not pooled.samples:
            raise UserError("The statistics of every client were refused, so that there is no classifier to set.")
        self.replace_head(server, pooled.classifier(shrinkage=self.options.shrinkage))


class FeatureStatistics:
    """Feature counts and sums per class, and the scatter of all features, exact for any partition."""

    def __init__(self, classes: int, width: int) -> None:
        self.counts = torch.zeros(classes, dtype=torch.int64)
        self.sums = torch.zeros(classes, width, dtype=torch.float64)
        self.total = ClassStatistics(1, width)

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add ``features`` [B, d] with ``labels`` int64 [B]."""
        self.total.add(features, torch.zeros_like(labels))
        self.counts += torch.bincount(labels.cpu(), minlength=len(self.counts))
        self.sums.index_add_(0, labels.cpu(), features.double().cpu())

    def message(self) -> Message:
        """Return a client's upload.

        ``counts`` int32 [C], ``means`` fp32 [C', d] of the client's C' classes, ``mean`` fp32 [d] and ``scatter`` fp32
        [d (d + 1) / 2] (upper triangle by rows) of all features.
        """
        present = self.counts > 0
        total = self.total.message()
        return {
            "means": (self.sums[present] / self.counts[present, None]).float(),
            "counts": self.counts.int(),
            "mean": total["means"][0],
            "scatter": total["scatters"][0],
        }

    def merge(self, message: Mapping[str, Tensor]) -> None:
        """Add a client's :meth:`message`, or raise ValueError."""
        counts, means = message["counts"].long(), message["means"].double()
        present = counts > 0
        if len(means) != int(present.sum()):
            raise ValueError(f"{len(means)} means came for {int(present.sum())} classes")
        total = {"counts": counts.sum()[None], "means": message["mean"][None], "scatters": message["scatter"][None]}
        self.total.merge(total)
        self.counts += counts
        self.sums[present] += means * counts[present, None]

    def classifier(self, *, shrinkage: bool) -> nn.Linear:
        """Return the linear classifier of these statistics, or raise UserError if the covariance is singular.

        A class without samples has the mean of all features and the prior of half a sample.
        """
        covariance = (shrink_covariances(self.total) if shrinkage else self.total.covariances())[0]
        present = (self.counts > 0)[:, None]
        means = torch.where(present, self.sums / self.counts.clamp_min(1)[:, None], self.total.means)
        root, failed = torch.linalg.cholesky_ex(covariance)
        if int(failed):
            raise UserError(
                f"The covariance of the {self.total.width} features of {self.samples} samples has no inverse: take "
                "shrinkage=true, or a network whose features are not all equal."
            )
        weight = torch.cholesky_solve(means.T, root).T
        prior = (self.counts.clamp_min(0.5) / self.samples).log()
        head = nn.Linear(self.total.width, len(self.counts))
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(prior - (weight * means).sum(1) / 2)
        return head.requires_grad_(False)
