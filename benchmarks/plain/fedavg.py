"""FedAvg (McMahan et al., 2017, arXiv 1602.05629) in plain PyTorch."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain import common

FLAGS: dict[str, Any] = {}
ASSUMES = {"weighting": "samples"}
"""Method options that this file has no flag for, and the value that it computes."""


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def main() -> None:
    args, federation = common.start(__doc__, FLAGS)
    model = common.build_model(args, federation.source)

    def train_client(local: nn.Module, k: int) -> None:
        common.train(local, federation.clients[k], args, loss_of)

    common.run_rounds(args, model, federation, lambda _: common.average_clients(model, federation, train_client))


if __name__ == "__main__":
    main()
