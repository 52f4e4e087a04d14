"""FuseFL (arXiv 2410.20380) in plain PyTorch: networks trained and fused block by block.

At level l client m trains: fused levels 1 ... l-1 (frozen) -> 1x1 convolution -> its own blocks l ... K -> classifier.
In the end the last blocks' features are averaged and the averaged classifier is calibrated on features drawn from the
pooled class statistics.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain import common
from fedkern.models.blocks import cut_network

FLAGS: dict[str, Any] = {
    "blocks": 2, "calibration_epochs": 5, "calibration_lr": 0.01, "virtual_features": 5000,
}  # fmt: skip
ASSUMES = {
    "calibrate": True, "covariance": "full", "ccvr_compat": False, "adaptor": "cnn1x1",
    "adaptor_init": "average", "final_fuse": "mean", "frozen_bn": "owner", "width": "auto", "models": "",
}  # fmt: skip
CALIBRATION_BATCH = 128
JITTER = 1e-4


class Branch(nn.Module):
    """A client's adaptor and block."""

    def __init__(self, adaptor: nn.Module | None, block: nn.Module) -> None:
        super().__init__()
        self.adaptor, self.block = adaptor or nn.Identity(), block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.adaptor(x))


class Fused(nn.Module):
    """Levels of frozen branches, each level's results side by side, then their mean and a classifier."""

    def __init__(self, levels: Sequence[Sequence[Branch]], head: nn.Linear | None = None) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.ModuleList(level) for level in levels)
        self.head = head

    def join(self, x: Tensor) -> Tensor:
        for level in self.levels:
            x = torch.cat([branch(x) for branch in level], dim=1)
        return x

    def features(self, x: Tensor) -> Tensor:
        return self.join(x).unflatten(1, (len(self.levels[-1]), -1)).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Local(nn.Module):
    """Modules that a client trains at a level."""

    def __init__(self, adaptor: nn.Module | None, blocks: Sequence[nn.Module], head: nn.Linear) -> None:
        super().__init__()
        self.adaptor, self.blocks, self.head = adaptor or nn.Identity(), nn.ModuleList(blocks), head

    def forward(self, x: Tensor) -> Tensor:
        x = self.adaptor(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def averaging_adaptor(branches: int, channels: int) -> nn.Conv2d:
    """Return a 1 × 1 convolution that begins as the mean over the branches."""
    adaptor = nn.Conv2d(branches * channels, channels, 1)
    with torch.no_grad():
        adaptor.weight.copy_(torch.eye(channels).repeat(1, branches).view_as(adaptor.weight) / branches)
        adaptor.bias.zero_()
    return adaptor


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, *, fused: Fused | None) -> Tensor:
    if fused is None:
        return F.cross_entropy(model(images), labels)
    with torch.no_grad():
        inputs = fused.join(images)
    return F.cross_entropy(model(inputs), labels)


@torch.no_grad()
def class_statistics(
    fused: Fused, dataset: common.Images, classes: int, device: torch.device
) -> list[tuple[int, Tensor, Tensor]]:
    """Return count, mean [d] and scatter [d, d] of the features of every class, fp64."""
    labels = dataset.columns[0].to(device)
    features = torch.cat([fused.features(images.to(device)) for images in dataset.images.split(500)]).double()
    result = []
    for c in range(classes):
        of_class = features[labels == c]
        mean = of_class.mean(0) if len(of_class) else features.new_zeros(features.shape[1])
        result.append((len(of_class), mean, (of_class - mean).T @ (of_class - mean)))
    return result


def pool(clients: Sequence[Sequence[tuple[int, Tensor, Tensor]]]) -> list[tuple[int, Tensor, Tensor]]:
    """Return the same over all clients together: count, mean and covariance."""
    result = []
    for parts in zip(*clients, strict=True):
        n = sum(count for count, _, _ in parts)
        mean = sum(count * m for count, m, _ in parts) / max(n, 1)
        scatter = sum(s + count * torch.outer(m - mean, m - mean) for count, m, s in parts)
        result.append((n, mean, scatter / max(n - 1, 1)))
    return result


def shrunk(covariance: Tensor, count: int) -> Tensor:
    """Apply oracle approximating shrinkage towards the mean variance (Chen et al., arXiv 0907.4698)."""
    d = len(covariance)
    squared, trace = covariance.square().sum(), covariance.trace()
    spread = (count + 1 - 2 / d) * (squared - trace.square() / d)
    wanted = (1 - 2 / d) * squared + trace.square()
    rho = 1.0 if count == 1 or wanted >= spread else float(wanted / spread)
    return (1 - rho) * covariance + rho * trace / d * torch.eye(d, dtype=covariance.dtype, device=covariance.device)


def calibrate(head: nn.Linear, statistics: Sequence[tuple[int, Tensor, Tensor]], args: Any) -> nn.Linear:
    """Train a copy of the classifier on features drawn from one Gaussian per class."""
    head = copy.deepcopy(head)
    optimizer = torch.optim.SGD(head.parameters(), lr=args.calibration_lr)
    roots = {}
    for c, (count, _, covariance) in enumerate(statistics):
        if count:
            raised = shrunk(covariance, count) + JITTER * torch.eye(
                len(covariance), dtype=torch.float64, device=args.device
            )
            roots[c] = torch.linalg.cholesky(raised).float()
    for _ in range(args.calibration_epochs):
        drawn = [
            statistics[c][1].float() + torch.randn(args.virtual_features, len(root), device=args.device) @ root.T
            for c, root in roots.items()
        ]
        labels = torch.tensor(list(roots), device=args.device).repeat_interleave(args.virtual_features)
        order = torch.randperm(len(labels), device=args.device)
        features = torch.cat(drawn)[order]
        for x, y in zip(features.split(CALIBRATION_BATCH), labels[order].split(CALIBRATION_BATCH), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(head(x), y).backward()
            optimizer.step()
    return head


def main() -> None:
    args, federation = common.start(__doc__, FLAGS)
    source, count = federation.source, len(federation.clients)
    full = common.build_model(args, source)
    width = round(next(m for m in full.modules() if isinstance(m, nn.Conv2d)).out_channels / math.sqrt(count))
    networks = [cut_network(common.build_model(args, source, args.model, width), args.blocks) for _ in range(count)]
    interfaces = networks[0].interfaces(source.form.shape)

    records = common.Records(args)
    levels: list[list[Branch]] = []
    for level in range(1, args.blocks + 1):
        records.start()
        share, left = divmod(args.local_epochs, args.blocks)
        level_args = copy.copy(args)
        level_args.local_epochs = share + (level <= left)
        fused = common.frozen(Fused(levels)) if levels else None
        branches = []
        for network, dataset in zip(networks, federation.clients, strict=True):
            adaptor = averaging_adaptor(count, interfaces[level - 2][0]).to(args.device) if levels else None
            local = Local(adaptor, list(network.blocks)[level - 1 :], network.head)
            common.train(local, dataset, level_args, lambda net, *batch, f=fused: loss_of(net, *batch, fused=f))
            branches.append(Branch(copy.deepcopy(adaptor), copy.deepcopy(network.blocks[level - 1])))
        levels.append(branches)
        if level < args.blocks:
            records.add({})
            continue
        head = copy.deepcopy(networks[0].head)
        head.load_state_dict(common.average([network.head.state_dict() for network in networks], [1.0] * count))
        model = common.frozen(Fused(levels, head))
        records.add(common.evaluate(model, federation.tests))

    records.start()
    classes = len(source.classes)
    plain = [common.Images(data.images, *data.columns) for data in federation.clients]
    uncalibrated = model
    model = copy.deepcopy(model)
    statistics = pool([class_statistics(model, data, classes, args.device) for data in plain])
    model.head = calibrate(head, statistics, args)
    figures = common.evaluate(model, federation.tests)
    before = common.evaluate(uncalibrated, federation.tests)
    figures.update(
        {name.replace("accuracy", "uncalibrated_accuracy"): v for name, v in before.items() if "accuracy" in name}
    )
    records.add(figures)
    records.write()


if __name__ == "__main__":
    main()
