"""Downstream tasks of a finished run.

Each returns rows of figures by test set, averaged over the run's networks.

Features are frozen, with a linear classifier or a light decoder on them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedkern.data import IGNORE, Split, lookup
from fedkern.downstream.run_evaluation import Finished
from fedkern.engine.batches.images import Images
from fedkern.errors import UserError
from fedkern.models import PairNetwork, initialise
from fedkern.models.teachers.clip import read_prompts
from fedkern.process.torch_modes import reproducible
from fedkern.streams import stream
from fedkern.tasks import SEGMENTATION
from fedkern.tasks.classification import macro_auc
from fedkern.tasks.cross_entropy import cross_entropy
from fedkern.tasks.retrieval import TEMPERATURE, Gallery, recalls
from fedkern.tasks.segmentation import segmentation

WIDTH = 48
BATCH, LR = 32, 3e-3


class TokenDecoder(nn.Module):
    """Decoder from the frozen image encoder's patch tokens to logits of every pixel of images of ``image_size``.

    Two 3x3 convolutions, each with ReLU and bilinear upsampling, then a 1x1 convolution. The image encoder is never
    trained.
    """

    def __init__(self, network: PairNetwork, classes: int, image_size: Sequence[int]) -> None:
        super().__init__()
        self._encoder = [network]  # in a list: no submodule to train, move or save
        self.size = tuple(image_size)
        channels = network.image_align.norm1.weight.numel()
        self.first = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.second = nn.Conv2d(WIDTH, WIDTH // 2, 3, padding=1)
        self.last = nn.Conv2d(WIDTH // 2, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images ``[B, C, H, W]`` to logits ``[B, classes, H, W]``."""
        network = self._encoder[0]
        with torch.no_grad():
            tokens = network.encode_image(images)[:, 1:]
            tokens = F.layer_norm(tokens, tokens.shape[-1:])  # encoders differ in the scale of their tokens
        x = tokens.transpose(1, 2).unflatten(2, network.grid)
        half = [max(-(-side // 2), cells) for side, cells in zip(self.size, network.grid, strict=True)]
        x = F.interpolate(F.relu(self.first(x)), half, mode="bilinear", align_corners=False)
        x = F.interpolate(F.relu(self.second(x)), self.size, mode="bilinear", align_corners=False)
        logits: Tensor = self.last(x)
        return logits


def train_decoder(
    network: PairNetwork, images: Sequence[Tensor], labels: Tensor, classes: int, *, epochs: int, seed: int
) -> TokenDecoder:
    """Train a decoder with AdamW on the cross-entropy of pixels, and return it in eval mode.

    Args:
        network: a pair in eval mode.
        images: normalised images in consecutive parts.
        labels: int64 ``[n, H, W]`` of all images, negative for unknown pixels.
        seed: draws the initial weights and the order.
    """
    decoder = TokenDecoder(network, classes, labels.shape[1:])
    initialise(decoder, torch.Generator().manual_seed(int(stream(seed, "decoder").integers(2**63))))
    pixels = torch.cat(list(images))
    decoder.to(pixels.device)
    labels = labels.to(pixels.device).clamp_min(IGNORE)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=LR, weight_decay=1e-4)
    for epoch in range(epochs):
        order = torch.from_numpy(stream(seed, "decoder/order", round=epoch).permutation(len(pixels)))
        for rows in order.split(BATCH):
            rows = rows.to(pixels.device)
            loss = cross_entropy(decoder(pixels[rows]), labels[rows], ignore_index=IGNORE)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return decoder.eval()


PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Penalties for the validation set to choose from. Few-shot probes have no validation set and take `FEW_SHOT`."""
FEW_SHOT = 1e-2


class LinearProbe:
    """Multinomial logistic regression on standardised features, fitted to the optimum by L-BFGS in float64.

    Minimises the mean cross-entropy plus ``penalty / 2`` times the squared norm of the weights (not of the bias).

    Args:
        features: ``[n, d]``.
        labels: int64 ``[n]`` in ``[0, classes)``. A class without samples gets a weight like any other.
        penalty: above 0.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, penalty: float) -> None:
        x = features.double()
        self._mean = x.mean(0)
        deviation = x.std(0, correction=0)
        self._scale = torch.where(deviation > 1e-12, deviation, 1.0)
        x = (x - self._mean) / self._scale
        weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, device=x.device, requires_grad=True)
        bias = torch.zeros(classes, dtype=torch.float64, device=x.device, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [weight, bias], max_iter=200, tolerance_grad=1e-6, tolerance_change=1e-11, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = F.cross_entropy(x @ weight + bias, labels) + 0.5 * penalty * weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimiser.step(closure)
        self.weight, self.bias = weight.detach(), bias.detach()

    def logits(self, features: Tensor) -> Tensor:
        """Return fp64 ``[n, C]`` for features ``[n, d]``."""
        return ((features.double() - self._mean) / self._scale) @ self.weight + self.bias


def few_shot_rows(labels: Tensor, shots: int, seed: int, draw: int) -> Tensor:
    """Return ``shots`` random rows of every class (all rows of a smaller class), sorted, int64."""
    rng = stream(seed, f"few-shot/{shots}", round=draw)
    values = labels.cpu().numpy()
    rows = [rng.permutation(np.flatnonzero(values == label))[:shots] for label in np.unique(values)]
    return torch.from_numpy(np.sort(np.concatenate(rows)))


def figures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return ``accuracy`` and, unless all labels are equal, ``auc`` of logits ``[n, C]``."""
    result = {"accuracy": float((logits.argmax(1) == labels).double().mean())}
    area = macro_auc(F.softmax(logits.double(), 1), labels)
    return result if math.isnan(area) else {**result, "auc": area}


def average_figures(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in shared}


FEATURES = ("token", "mean", "embedding")
Row = dict[str, Any]


@reproducible()
def retrieve(run: Finished, ks: Sequence[int] = (1, 5, 10)) -> list[Row]:
    """Measure image-to-text and text-to-image recall at k on every test set, and on the clients' own.

    Rows have ``set``, ``i2t_r1``, ..., ``t2i_r1``, ..., ``gallery``. The clients' own sets give one row with the mean
    and one with the worst.
    """
    if "pairs" not in run.data.task.offers:
        raise UserError(f'data set "{run.data.name}" has no texts to retrieve.')

    def of(split: Split, networks: Sequence[PairNetwork]) -> Row:
        texts = split.texts or ()
        gallery = Gallery.of(split.ids, texts)
        figures = []
        for network in networks:
            images = run.image_embeddings(network, split)[gallery.images.to(run.device)]
            figures.append(recalls(images, run.text_embeddings(network, texts), ks, pairs=gallery.pairs))
        return {**average_figures(figures), "gallery": len(texts)}

    rows = [{"set": name, **of(split, run.networks)} for name, split in run.sets.items()]
    client_sets = run.data.client_tests
    if client_sets:
        single = len(run.networks) == 1
        scores = [of(split, run.networks if single else run.networks[k : k + 1]) for k, split in enumerate(client_sets)]
        rows.append({"set": "clients, mean", **average_figures(scores)})
        rows.append({"set": "clients, worst", **{name: min(row[name] for row in scores) for name in scores[0]}})
    return rows


@reproducible()
def zero_shot(run: Finished, prompts: str = "") -> list[Row]:
    """Classify by the nearest prompt. Rows have ``set``, ``accuracy``, ``auc``.

    ``prompts``: see :func:`fedkern.models.teachers.clip.read_prompts` (empty: the data set's own).
    """
    classes = _classes(run)
    default_prompts = lookup(run.data.name).prompts
    if prompts or isinstance(default_prompts, str):
        texts = read_prompts(prompts or str(default_prompts), classes)
    else:
        texts = [list(default_prompts[name]) for name in classes]

    def fit_prompts(network: PairNetwork) -> Callable[[Split], Tensor]:
        weight = torch.stack([normalize(run.text_embeddings(network, words).mean(0), dim=0) for words in texts])
        return lambda split: run.image_embeddings(network, split) @ weight.T / TEMPERATURE

    return _judge_classifiers(run, [fit_prompts(network) for network in run.networks])


@reproducible()
def probe(
    run: Finished, shots: Sequence[int] = (1, 5, 10, 0), *, features: str = "token", draws: int = 3, seed: int = 0
) -> list[Row]:
    """Fit logistic regression on frozen features of the clients' training images. Rows have ``set``, ``shots``, ...

    Args:
        shots: images of every class, 0 for all (a linear probe, whose penalty the validation set chooses).
        features: the probe's input, one of `FEATURES` (see :meth:`Finished.features`).
        draws: random choices of the shots to average.
        seed: draws these choices.
    """
    classes = _classes(run)
    train, validation = run.train(), run.data.validation
    if 0 in shots and not len(validation):
        raise UserError("A probe on all images chooses its penalty on the validation set, and this run has none.")
    rows: list[Row] = []
    pairs = [(run.features(network, train, features), network) for network in run.networks]
    labels = train.labels.to(run.device)
    for count in shots:
        fitted: list[Callable[[Split], Tensor]] = []
        for seen, network in pairs:
            if count:
                chosen = [few_shot_rows(train.labels, count, seed, draw).to(run.device) for draw in range(draws)]
                fits = [LinearProbe(seen[pick], labels[pick], len(classes), FEW_SHOT) for pick in chosen]
            else:
                fits = [_choose_probe(run, network, seen, labels, validation, len(classes), features)]
            fitted += [_apply_probe(run, network, fit, features) for fit in fits]
        rows += [{"set": row.pop("set"), "shots": count or "all", **row} for row in _judge_classifiers(run, fitted)]
    return rows


@reproducible()
def decode(run: Finished, *, epochs: int = 10, samples: int = 0, seed: int = 0) -> list[Row]:
    """Train a light decoder on frozen image tokens with the clients' masks. Rows have ``set``, ``dice``, ``iou``, ...

    Args:
        epochs: passes over the training images.
        samples: randomly chosen training images, 0 for all.
        seed: draws the training images, the initial weights and the order.
    """
    train = run.train()
    _pixels(run, train)
    if samples and samples < len(train):
        order = stream(seed, "decoder/samples").permutation(len(train))[:samples]
        train = train.subset(torch.from_numpy(order).sort().values)
    classes = len(run.data.classes) if train.masks is None else 2
    tests = {name: split for name, split in run.sets.items() if (split.masks is None) == (train.masks is None)}
    pixelwise = {
        name: replace(split, labels=_pixels(run, split), masks=None, task=SEGMENTATION) for name, split in tests.items()
    }
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in tests}
    images = list(run.images(train))
    for network in run.networks:
        decoder = train_decoder(network, images, _pixels(run, train), classes, epochs=epochs, seed=seed)
        for name in tests:
            figures[name].append(segmentation(decoder, Images(pixelwise[name], run.form, run.device)))
    return [{"set": name, **average_figures(network_figures)} for name, network_figures in figures.items()]


def _classes(run: Finished) -> tuple[str, ...]:
    if len(run.data.classes) < 2:
        raise UserError(f'data set "{run.data.name}" has a single label, and classification needs two or more.')
    if "pixels" in run.data.task.offers or not run.data.task.offers & {"classes", "pairs"}:
        raise UserError(
            f'data set "{run.data.name}" is for {run.data.task.name}: these tasks tell the single class of an image.'
        )
    return tuple(run.data.classes)


def _judge_classifiers(run: Finished, classifiers: Sequence[Callable[[Split], Tensor]]) -> list[Row]:
    """Average the figures of classifiers (functions from a split to logits) on every test set."""
    return [
        {"set": name, **average_figures([figures(logits(split).cpu(), split.labels) for logits in classifiers])}
        for name, split in run.sets.items()
    ]


def _apply_probe(run: Finished, network: PairNetwork, fitted: LinearProbe, features: str) -> Callable[[Split], Tensor]:
    return lambda split: fitted.logits(run.features(network, split, features))


def _choose_probe(
    run: Finished, network: PairNetwork, seen: Tensor, labels: Tensor, validation: Split, classes: int, features: str
) -> LinearProbe:
    """Return the probe on all training images, with the penalty of the lowest validation cross-entropy."""
    embeddings = run.features(network, validation, features)
    truth = validation.labels.to(run.device)
    fitted = [LinearProbe(seen, labels, classes, penalty) for penalty in PENALTIES]
    losses = [float(torch.nn.functional.cross_entropy(probe.logits(embeddings), truth)) for probe in fitted]
    return fitted[min(range(len(fitted)), key=losses.__getitem__)]


def _pixels(run: Finished, split: Split) -> Tensor:
    if split.masks is None and "pixels" not in run.data.task.offers:
        raise UserError(f'data set "{run.data.name}" has no masks to learn a segmentation from.')
    return split.labels if split.masks is None else split.masks.long()


TASKS: Mapping[str, Callable[..., list[Row]]] = {
    "retrieval": retrieve, "zero-shot": zero_shot, "probe": probe, "decode": decode,
}  # fmt: skip
"""Tasks by the name that ``evaluate DIR --task`` takes."""
