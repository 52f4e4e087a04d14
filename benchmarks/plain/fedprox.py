"""FedProx (Li et al., 2020, arXiv 1812.06127) in plain PyTorch."""

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
    args, federation = common.start(__doc__, FLAGS)
    model = common.build_model(args, federation.source)

    def loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return loss_of(net, images, labels, globally=model, mu=args.mu)

    def train_client(local: nn.Module, k: int) -> None:
        common.train(local, federation.clients[k], args, loss)

    common.run_rounds(args, model, federation, lambda _: common.average_clients(model, federation, train_client))


if __name__ == "__main__":
    main()
