"""Downstream tasks of a finished run.

Each returns rows of figures by test set, averaged over the run's networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedkern.data import Split, lookup
from fedkern.downstream import probes
from fedkern.downstream.decoder import train_decoder
from fedkern.downstream.finished import Finished
from fedkern.engine.batches.images import Images
from fedkern.errors import UserError
from fedkern.models import PairNetwork
from fedkern.models.teachers.prompts import read_prompts
from fedkern.process.torch_modes import reproducible
from fedkern.tasks import SEGMENTATION
from fedkern.tasks.retrieval import TEMPERATURE, Gallery, recalls
from fedkern.tasks.segmentation import segmentation

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
        return {**probes.average_figures(figures), "gallery": len(texts)}

    rows = [{"set": name, **of(split, run.networks)} for name, split in run.sets.items()]
    client_sets = run.data.client_tests
    if client_sets:
        single = len(run.networks) == 1
        scores = [of(split, run.networks if single else run.networks[k : k + 1]) for k, split in enumerate(client_sets)]
        rows.append({"set": "clients, mean", **probes.average_figures(scores)})
        rows.append({"set": "clients, worst", **{name: min(row[name] for row in scores) for name in scores[0]}})
    return rows


@reproducible()
def zero_shot(run: Finished, prompts: str = "") -> list[Row]:
    """Classify by the nearest prompt. Rows have ``set``, ``accuracy``, ``auc``.

    ``prompts``: see :func:`fedkern.models.teachers.prompts.read_prompts` (empty: the data set's own).
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
                chosen = [probes.few_shot_rows(train.labels, count, seed, draw).to(run.device) for draw in range(draws)]
                fits = [probes.LinearProbe(seen[pick], labels[pick], len(classes), probes.FEW_SHOT) for pick in chosen]
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
        order = probes.stream(seed, "decoder/samples").permutation(len(train))[:samples]
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
    return [{"set": name, **probes.average_figures(network_figures)} for name, network_figures in figures.items()]


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
    rows = []
    for name, split in run.sets.items():
        results = [probes.figures(logits(split).cpu(), split.labels) for logits in classifiers]
        rows.append({"set": name, **probes.average_figures(results)})
    return rows


def _apply_probe(
    run: Finished, network: PairNetwork, fitted: probes.LinearProbe, features: str
) -> Callable[[Split], Tensor]:
    return lambda split: fitted.logits(run.features(network, split, features))


def _choose_probe(
    run: Finished, network: PairNetwork, seen: Tensor, labels: Tensor, validation: Split, classes: int, features: str
) -> probes.LinearProbe:
    """Return the probe on all training images, with the penalty of the lowest validation cross-entropy."""
    embeddings = run.features(network, validation, features)
    truth = validation.labels.to(run.device)
    fitted = [probes.LinearProbe(seen, labels, classes, penalty) for penalty in probes.PENALTIES]
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
