"""SCAFFOLD (Karimireddy et al., ICML 2020, arXiv 1910.06378) in plain PyTorch.

A client's new control variate is the mean of its gradients along the way, which under plain SGD is option II.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.plain import common
from benchmarks.plain.fedavg import loss_of

FLAGS: dict[str, Any] = {}
ASSUMES = {"weighting": "samples", "control": "II"}


def train_client(
    local: nn.Module, dataset: common.Images, args: Any, control: list[Tensor], own: list[Tensor]
) -> list[Tensor]:
    """Train with gradients g - c_i + c, and return the client's new control variate, the mean of the g."""
    parameters = list(local.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    steps = 0

    def correct() -> None:
        nonlocal steps
        steps += 1
        for parameter, sum_, c, c_i in zip(parameters, total, control, own, strict=True):
            sum_ += parameter.grad
            parameter.grad += c - c_i

    common.train(local, dataset, args, loss_of, correct)
    return [sum_ / steps for sum_ in total]


def main() -> None:
    args, federation = common.start(__doc__, FLAGS)
    model = common.build_model(args, federation.source)
    control = [torch.zeros_like(parameter) for parameter in model.parameters()]
    own = [[torch.zeros_like(c) for c in control] for _ in federation.clients]
    shares = [size / sum(federation.sizes) for size in federation.sizes]

    def update(round: int) -> None:
        states, changes = [], []
        for k, dataset in enumerate(federation.clients):
            local = copy.deepcopy(model)
            new = train_client(local, dataset, args, control, own[k])
            changes.append([after - before for after, before in zip(new, own[k], strict=True)])
            own[k] = new
            states.append(local.state_dict())
        model.load_state_dict(common.average(states, federation.sizes))
        for share, change in zip(shares, changes, strict=True):
            for c, delta in zip(control, change, strict=True):
                c += share * delta

    common.run_rounds(args, model, federation, update)


if __name__ == "__main__":
    main()
