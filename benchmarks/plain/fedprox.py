"""FedProx (Li et al., 2020, arXiv 1812.06127) in plain PyTorch."""

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain import common

FLAGS: dict[str, Any] = {"mu": 0.01}
ASSUMES = {"weighting": "samples"}


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, *, globally: nn.Module, mu: float) -> Tensor:
    """Return the cross-entropy and mu/2 ||theta - theta_global||^2."""
    loss = F.cross_entropy(model(images), labels)
    pairs = zip(model.parameters(), globally.parameters(), strict=True)
    return loss + mu / 2 * sum((parameter - received.detach()).pow(2).sum() for parameter, received in pairs)


def main() -> None:
    args = common.arguments(__doc__, **FLAGS).parse_args()
    common.prepare(args)
    federation = common.load_data(args)
    model = common.build_model(args, federation.source)

    def update(round: int) -> None:
        states = []
        for dataset in federation.clients:
            local = copy.deepcopy(model)
            common.train(local, dataset, args, lambda net, *batch: loss_of(net, *batch, globally=model, mu=args.mu))
            states.append(local.state_dict())
        model.load_state_dict(common.average(states, federation.sizes))

    common.run_rounds(args, model, federation, update)


if __name__ == "__main__":
    main()
