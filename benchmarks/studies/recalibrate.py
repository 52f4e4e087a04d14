"""Calibrate a finished run again, so that networks are compared under one classifier.

    python -m benchmarks.studies.recalibrate RUN [--covariance diagonal]

FuseFL's classifier reads the mean of its branches' features, an ensemble's all members' features side by side, M times
as many.  The effect of calibration depends on that, and on how far its few steps come: features of a mean are
smaller.  Here every network gets both kinds of classifier at several learning rates; an ordinary one has one branch,
whose features are the same in both.  The command prints the accuracies as JSON.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fedkern.data import normalise
from fedkern.downstream.saved_network import read_model
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.methods.common.calibration import CalibrationOptions, ClassStatistics, calibrate
from fedkern.methods.fusefl.method import plain_head
from fedkern.models import Ensemble
from fedkern.models.fused import FusedLevel, FusedNetwork
from fedkern.models.state.allocate import linear_of
from fedkern.settings.config import load_settings
from fedkern.settings.run_data import kept_data, load_data
from fedkern.streams import stream

Pool = Literal["mean", "concat"]
POOLS: tuple[Pool, ...] = ("mean", "concat")
RATES = (0.01, 0.1)
"""The last rate is one that the calibration's few passes get further with than with FuseFL's own, the first."""


@dataclass(frozen=True)
class Classifier:
    """A kind of calibration.

    Attributes:
        pool: whether the classifier reads the mean of the branches' features or all of them side by side.
        lr: its learning rate.
        covariance: class covariances ``"full"`` or ``"diagonal"``.
    """

    pool: Pool
    lr: float
    covariance: str = "full"

    @property
    def name(self) -> str:
        return f"{self.pool}, lr {self.lr:g}, {self.covariance}"


def recalibrate(folder: Path, wanted: Sequence[Classifier], *, batch: int = 500) -> dict[str, dict[str, float]]:
    """Return accuracies on the test and the validation set by the name of the classifier.

    Every classifier starts from the one before calibration: of features side by side the mean of the clients' logits,
    of their mean the mean of the clients' classifiers.  Features of the clients' training images are not augmented.

    Args:
        folder: a finished run on images: of ``fusefl`` or ``ensemble``, calibrated or not, or of a method whose model
            is an ordinary network, not calibrated (calibration starts from its classifier).
        wanted: the kinds of calibration.
        batch: images at a time.

    Returns:
        ``{"accuracy": ..., "validation_accuracy": ...}`` by :attr:`Classifier.name`.

    Raises:
        TypeError: a network without ``features`` and ``head``.
        ValueError: an ordinary network that is calibrated already, or a run of ``fusefl`` without its checkpoint.
    """
    config = load_settings(folder)
    network, about = read_model(folder)
    data = kept_data(config, load_data(config))
    branches = _branches(network)
    _refuse_calibrated(network, config.options, folder)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:  # [B, M, d]
        parts = (normalise(p, about["mean"], about["std"], channels_last=True) for p in images.split(batch))
        return torch.cat([branches(part) for part in parts])

    clients = [(features(split.images), split.labels) for split in data.clients]
    sets = {"accuracy": data.tests[""], "validation_accuracy": data.validation}
    tests = {name: (features(split.images), split.labels) for name, split in sets.items()}
    # Learning rates share what they start from and what they see.
    heads = {pool: _plain_head(network, folder, pool) for pool in {classifier.pool for classifier in wanted}}
    kinds = {(classifier.pool, classifier.covariance): classifier for classifier in wanted}
    seen = {kind: _statistics(classifier, heads[classifier.pool], clients) for kind, classifier in kinds.items()}
    accuracies = {}
    for classifier in wanted:
        options = CalibrationOptions(calibration_lr=classifier.lr, covariance=classifier.covariance)
        draw = stream(config.seed, "recalibration")
        head = calibrate(heads[classifier.pool], seen[classifier.pool, classifier.covariance], draw, options)
        with torch.no_grad():
            accuracies[classifier.name] = {
                name: float((head(_pool(x, classifier.pool)).argmax(1) == y).double().mean())
                for name, (x, y) in tests.items()
            }
    return accuracies


def _statistics(classifier: Classifier, head: nn.Linear, clients: list[tuple[Tensor, Tensor]]) -> ClassStatistics:
    statistics = ClassStatistics(head.out_features, head.in_features, diagonal=classifier.covariance == "diagonal")
    for x, labels in clients:
        statistics.add(_pool(x, classifier.pool), labels)
    return statistics


def _pool(features: Tensor, pool: Pool) -> Tensor:
    return features.mean(1) if pool == "mean" else features.flatten(1)


def _branches(network: Any) -> Callable[[Tensor], Tensor]:
    """Return a function from images to the branches' last features ``[B, M, d]``."""
    if isinstance(network, FusedNetwork):
        return lambda x: network.run_levels(x).unflatten(1, (_count(network), -1))
    if isinstance(network, Ensemble):
        return lambda x: torch.stack(network.parts(x)[0], 1)
    if hasattr(network, "features") and isinstance(getattr(network, "head", None), nn.Linear):
        return lambda x: network.features(x).unsqueeze(1)
    raise TypeError(f"recalibrate serves networks with features and a linear head, not {type(network).__name__}")


def _refuse_calibrated(network: Any, options: Mapping[str, Any], folder: Path) -> None:
    if not isinstance(network, FusedNetwork | Ensemble) and options.get("calibrate"):
        raise ValueError(f"{folder} has only its calibrated classifier left: run it with calibrate=false")


def _plain_head(network: Any, folder: Path, pool: Pool) -> nn.Linear:
    """Return the classifier before calibration for features pooled in this way."""
    if isinstance(network, Ensemble):
        network.pool = pool
        return network.joint_head()
    if not isinstance(network, FusedNetwork):
        return cast(nn.Linear, network.head)
    state = Checkpoints(folder).last_server_state()
    if state is None:
        raise ValueError(f"{folder} has no checkpoint left, which the clients' classifiers are in")
    return linear_of(plain_head(list(state["heads"].values()), pool))


def _count(network: FusedNetwork) -> int:
    return cast(FusedLevel, network.levels[-1]).count


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--covariance", choices=("full", "diagonal"), default="full", help="of a class's features")
    args = parser.parse_args()
    print(json.dumps(recalibrate(args.run, [Classifier(pool, lr, args.covariance) for pool in POOLS for lr in RATES])))


if __name__ == "__main__":
    main()
