"""FedDRA (arXiv 2404.03854) in plain PyTorch: image and text encoders, anchors, robust client weights.

    L_k = CE(S, diag) + CE(S^T, diag) + mu (MSE(z*_x, z_x) + MSE(z*_y, z_y)),    S = z_x z_y^T / 0.07

A quarter of the rounds trains alignment layers and heads on frozen encoders, the others everything.  After each the
heads' batch norms get the statistics of the new network over all clients' samples, and the clients' weights follow
their losses on samples that they never train on.
"""

import argparse
import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.plain import common
from fedkern import models
from fedkern.models.pretrained.vocabulary import Tokens

FLAGS: dict[str, Any] = {
    "mu": 1.0, "lambda1": 1.0, "rho": 1.0, "eta": 0.5, "alignment_steps": 20,
    "loss_share": 0.1, "loss_batch": 32,
}  # fmt: skip
ASSUMES = {
    "weighting": "uniform", "dro_apply": "aggregate", "loss_split": "holdout", "loss_samples": 0, "dro": True,
    "anchors": True, "stages": "two", "stage_schedule": "sequential", "joint_start": "own",
}  # fmt: skip
TEMPERATURE = 0.07
FROZEN_FIRST = ("image_encoder", "text_encoder")
STATISTICS_SAMPLES = 256
LEAST_WEIGHT = 1e-3
TEST_LOSS_BATCH = 32


def contrastive(x: Tensor, y: Tensor) -> Tensor:
    similarities = x @ y.T / TEMPERATURE
    target = torch.arange(len(x), device=x.device)
    return F.cross_entropy(similarities, target) + F.cross_entropy(similarities.T, target)


def loss_of(model: Any, images: Tensor, tokens: Tokens, *, globally: Any, args: argparse.Namespace) -> Tensor:
    x, y = model(images, tokens)
    with torch.no_grad():
        anchor_x, anchor_y = globally(images, tokens)
    return args.lambda1 * contrastive(x, y) + args.mu * (F.mse_loss(x, anchor_x) + F.mse_loss(y, anchor_y))


def pairs(split: Any, source: Any, model: Any, augment: str = "none") -> common.Images:
    """Return images with the token numbers and masks of their texts."""
    tokens = model.tokenize(split.texts)
    return common.Images(common.normalise(split.images, source), tokens.ids, tokens.mask, augment=augment)


def subset(dataset: common.Images, rows: Tensor) -> common.Images:
    return common.Images(dataset.images[rows], *(column[rows] for column in dataset.columns), augment=dataset.augment)


def trim(ids: Tensor, mask: Tensor) -> Tokens:
    """Return a batch of texts, padded no further than its longest one needs."""
    length = int(mask.sum(1).max())
    return Tokens(ids[:, :length], mask[:, :length])


def on(batches: Iterable[Sequence[Tensor]], device: torch.device) -> Iterator[tuple[Tensor, Tokens]]:
    """Yield the batches of a loader, on the device, after reading the lengths of the texts."""
    for images, ids, mask in batches:
        yield images.to(device, non_blocking=True), trim(ids, mask).to(device)


def steps(dataset: common.Images, batch_size: int, count: int, device: torch.device) -> Iterator[tuple[Tensor, Tokens]]:
    """Yield so many batches, epoch after epoch."""
    batches = common.loader(dataset, batch_size, device)
    while count > 0:
        for images, tokens in on(batches, device):
            yield images, tokens
            count -= 1
            if count == 0:
                return


def train_client(
    model: Any, dataset: common.Images, args: argparse.Namespace, globally: Any, *, align_only: bool
) -> None:
    model.train()
    if align_only:
        for name in FROZEN_FIRST:
            model.get_submodule(name).requires_grad_(False).eval()
    optimizer = common.optimizer([parameter for parameter in model.parameters() if parameter.requires_grad], args)
    count = args.alignment_steps if align_only else args.local_steps
    for images, tokens in steps(dataset, args.batch_size, count, args.device):
        optimizer.zero_grad()
        loss_of(model, images, tokens, globally=globally, args=args).backward()
        optimizer.step()
    model.requires_grad_(True)


@torch.no_grad()
def pool_statistics(model: Any, datasets: Sequence[common.Images], weights: Sequence[float]) -> None:
    """Give the heads' batch norms mean and variance of their inputs over all clients' samples, client by weight."""
    model.eval()
    samples = [subset(data, torch.randperm(len(data))[:STATISTICS_SAMPLES]) for data in datasets]
    for head, inputs in (("image_head", image_inputs), ("text_head", text_inputs)):
        layers = model.get_submodule(head)
        reached = [inputs(model, data) for data in samples]
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.BatchNorm1d):
                total = sum(weights)
                mean = sum(w / total * x.mean(0) for w, x in zip(weights, reached, strict=True))
                square = sum(w / total * x.square().mean(0) for w, x in zip(weights, reached, strict=True))
                layer.running_mean.copy_(mean)
                layer.running_var.copy_((square - mean.square()).clamp_min(0))
            reached = [layers[i](x) for x in reached]


def image_inputs(model: Any, data: common.Images) -> Tensor:
    batches = DataLoader(data, batch_size=128)
    return torch.cat([model.image_token(images) for images, _ in on(batches, common.device_of(model))])


def text_inputs(model: Any, data: common.Images) -> Tensor:
    batches = on(DataLoader(data, batch_size=128), common.device_of(model))
    return torch.cat([model.text_token(tokens) for _, tokens in batches])


@torch.no_grad()
def held_out_loss(model: Any, data: common.Images, batch_size: int) -> float:
    """Return the mean contrastive loss over whole batches."""
    model.eval()
    batches = DataLoader(data, batch_size=batch_size, drop_last=True)
    losses = [float(contrastive(*model(images, tokens))) for images, tokens in on(batches, common.device_of(model))]
    return sum(losses) / len(losses)


def new_weights(weights: list[float], losses: list[float], eta: float, rho: float) -> list[float]:
    """Return a step up the losses, then the nearest point of {p on the simplex: N sum p^2 <= 2 rho + 1}."""
    n, highest = len(weights), max(losses)
    if max(losses) == min(losses):
        return weights
    v = [max(w, LEAST_WEIGHT / n) * math.exp(eta * (loss - highest)) for w, loss in zip(weights, losses, strict=True)]
    v = [value / sum(v) for value in v]
    if n * sum(value**2 for value in v) <= 2 * rho + 1:
        return v
    for m in range(n, 0, -1):
        chosen = sorted(range(n), key=lambda k: -v[k])[:m]
        mean = sum(v[k] for k in chosen) / m
        scatter = sum((v[k] - mean) ** 2 for k in chosen)
        room = (2 * rho + 1) / n - 1 / m
        if room < 0 or scatter <= 0:
            continue
        p = {k: 1 / m + math.sqrt(room / scatter) * (v[k] - mean) for k in chosen}
        if min(p.values()) >= 0:
            return [p.get(k, 0.0) for k in range(n)]
    return v


@torch.no_grad()
def evaluate(model: Any, data: common.Images, texts: Sequence[str]) -> dict[str, float]:
    """Return recall in both directions, where equal texts count as one, and the contrastive loss."""
    model.eval()
    batches = DataLoader(data, batch_size=common.EVALUATION_BATCH)
    made = [model(images, tokens) for images, tokens in on(batches, common.device_of(model))]
    x, y = torch.cat([pair[0] for pair in made]), torch.cat([pair[1] for pair in made])
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    texts_of = torch.tensor([number[text] for text in texts], device=x.device)
    belongs = texts_of[:, None] == texts_of
    figures: dict[str, float] = {}
    for name, scores in (("i2t", x @ y.T), ("t2i", y @ x.T)):
        best = scores.masked_fill(~belongs, -torch.inf).amax(1, keepdim=True)
        ahead = (scores > best).sum(1)
        figures.update({f"{name}_r{k}": float((ahead < k).float().mean()) for k in (1, 5, 10)})
    size = min(TEST_LOSS_BATCH, len(x))
    rows = torch.arange(len(x) // size * size, device=x.device).view(size, -1).T
    figures["loss"] = float(torch.stack([contrastive(x[row], y[row]) for row in rows]).mean())
    return figures


def main() -> None:
    args = common.prepare(__doc__, FLAGS)
    source = common.load_source(args)
    channels, *sides = source.form.shape
    vocabulary = models.learn_vocabulary((text for split in source.clients for text in split.texts), "words")
    model = models.build_pair(
        channels=channels, image_size=sides, mean=source.form.mean, std=source.form.std, vocabulary=vocabulary.tokens,
        width=args.width, seed=args.seed,
    ).to(args.device)  # fmt: skip
    augment = args.augment or source.form.augment
    training, held = [], []
    for split in source.clients:
        dataset, order = pairs(split, source, model, augment), torch.randperm(len(split))
        count = max(2, round(args.loss_share * len(split)))
        training.append(subset(dataset, order[count:]))
        judged = subset(dataset, order[:count])
        judged.augment = "none"
        held.append(judged)
    tests = {f"{name}_" if name else "": split for name, split in source.tests.items()}
    if len(source.validation):
        tests["validation_"] = source.validation
    sets = {name: (pairs(split, source, model), split.texts) for name, split in tests.items()}
    test_sets = [(pairs(split, source, model), split.texts) for split in source.client_tests]
    loss_batch = min(args.loss_batch, *(len(data) for data in held))
    weights = [1 / len(training)] * len(training)
    aligned = min(max(1, args.rounds // 4), args.rounds - 1)

    records = common.Records(args)
    for number in range(1, args.rounds + 1):
        records.start()
        globally, states = common.frozen(model), []
        for data in training:
            local = copy.deepcopy(model)
            train_client(local, data, args, globally, align_only=number <= aligned)
            states.append(local.state_dict())
        model.load_state_dict(common.average(states, weights))
        pool_statistics(model, training, weights)
        losses = [args.lambda1 * held_out_loss(model, data, loss_batch) for data in held]
        weights = new_weights(weights, losses, args.eta, args.rho)
        figures: dict[str, float] = {}
        if records.due(number, args.rounds):
            for name, (data, texts) in sets.items():
                figures.update({name + key: value for key, value in evaluate(model, data, texts).items()})
            of_clients = [evaluate(model, data, texts) for data, texts in test_sets]
            for key in of_clients[0] if of_clients else ():
                figures[f"mean_client_{key}"] = sum(entry[key] for entry in of_clients) / len(of_clients)
        records.add(figures)
    records.write()


if __name__ == "__main__":
    main()
