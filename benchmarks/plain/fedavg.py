"""FedAvg (McMahan et al., 2017, arXiv 1602.05629) in plain PyTorch."""

import copy
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
    args = common.arguments(__doc__, **FLAGS).parse_args()
    common.prepare(args)
    federation = common.load_data(args)
    model = common.build_model(args, federation.source)

    def update(round: int) -> None:
        states = []
        for dataset in federation.clients:
            local = copy.deepcopy(model)
            common.train(local, dataset, args, loss_of)
            states.append(local.state_dict())
        model.load_state_dict(common.average(states, federation.sizes))

    common.run_rounds(args, model, federation, update)


if __name__ == "__main__":
    main()
