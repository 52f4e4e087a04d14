"""Display names of figures and test sets, and user-defined metrics (``@register_metric("name")``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fedkern.errors import RAISED, UserError, describe_error, error_origin
from fedkern.privacy.guarantee import PART
from fedkern.usercode import plugins
from fedkern.usercode.registry import Registry

_TEST_SETS = {
    "id": "in distribution", "ood": "out of distribution", "validation": "validation", "minority": "minority",
    "unseen": "unseen client", "held_out": "held-out client",
}  # fmt: skip
TEST_SETS = ("", *_TEST_SETS)
"""Test sets of built-in data, in the order of tables; a single test set is ``""``."""
OVER_CLIENTS = ("mean_client_", "worst_client_", "worst_tenth_client_", "best_tenth_client_")
"""Prefixes of figures over the clients' own test sets."""
_OVER_CLIENTS = re.compile(f"^({'|'.join(OVER_CLIENTS)})")
RECALLS = {
    f"{way}_r{k}": f"{text}, recall at {k}"
    for way, text in (("i2t", "image to text"), ("t2i", "text to image"))
    for k in (1, 2, 3, 5, 10, 20, 50, 100)
}
FRACTIONS = {
    "accuracy", "balanced_accuracy", "macro_f1", "auroc", "macro_auroc", "mean_average_precision", "exact_match",
    "dice", "iou", "confidence", "ece", *RECALLS,
}  # fmt: skip
"""Built-in figures between 0 and 1, names that no user-defined metric may have."""
FIGURE_NAMES = frozenset({"loss", "gallery", "hd95", "object_area", "gradcam_in_object", *FRACTIONS})
"""Built-in figures, names that no metric, part or method may use."""
RECORD_NAMES = frozenset({
    "round", "rounds", "name", "evaluated", "seconds", "round_seconds", "clients", "client_metrics", "phases", "device",
    "dropped", "clock", "simulated_seconds", "staleness", "bytes", "bytes_up", "bytes_down", "round_bytes_up",
    "round_bytes_down", "epsilon", "delta", "dp_clip", PART,
})  # fmt: skip
"""Entries of records and summaries beside figures."""
PREFIXES = (*(f"{name}_" for name in TEST_SETS if name), *OVER_CLIENTS)
"""Prefixes of figures' names for the test set or the clients."""
_FALLING = frozenset({"loss", "ece", "hd95", "mae"})
_RISING = frozenset({
    *(FRACTIONS - _FALLING), "kappa", "best_teacher", "mean_teacher", "ensemble_uniform", "ensemble_weighted",
    "holdout", "vote_accuracy", "probability_accuracy", "teacher_accuracy", "tuned_teacher_accuracy",
    "uncalibrated_accuracy", "public_proxy_accuracy",
})  # fmt: skip
"""Built-in figures for which larger is better."""
_FIGURES = {
    "macro_auroc": "AUROC, mean of the labels",
    "mean_average_precision": "average precision, mean of the labels",
    "macro_f1": "F1, mean of the classes",
    "exact_match": "images with all labels right",
    "auroc": "AUROC, one class against the rest, mean",
    "ece": "expected calibration error",
    "dice": "Dice, mean of the classes",
    "iou": "intersection over union",
    "hd95": "Hausdorff distance (95 %) in pixels",
    "confidence": "confidence in the true class",
    "gradcam_in_object": "Grad-CAM mass inside the object",
    "object_area": "area of the object",
    "gallery": "candidates in retrieval",
    PART: "epsilon of the covered part alone",
    **RECALLS,
    "ensemble_uniform": "teachers' ensemble with equal weights",
    "ensemble_weighted": "teachers' ensemble with the student's weights",
    "holdout": "teachers on their clients' hold-outs",
}
_SHORT = {
    "dice": "Dice", "i2t_r1": "recall at 1, image to text", "auroc": "AUROC", "macro_auroc": "macro AUROC",
}  # fmt: skip
# Suffixes of the names of shares, which are shown in per cent.
_SHARES = (
    "accuracy", "auroc", "auc", "mean_average_precision", "macro_f1", "exact_match", "recall", "ece", "confidence",
    "gradcam_in_object", "object_area", "dice", "iou", "best_teacher", "mean_teacher", "ensemble_uniform",
    "ensemble_weighted", "holdout", "_agreement", *RECALLS,
)  # fmt: skip
_ENDINGS = {
    "_up_bytes": " (sent by a client)", "_down_bytes": " (sent to a client)", "_bytes": " (size)",
    "_mflops": " (operations)",
}  # fmt: skip


def split_metric(name: str, own: Collection[str] = ()) -> tuple[str, str]:
    """Split ``"ood_accuracy"`` into test set ``"ood"`` (a run's only one is ``""``) and figure ``"accuracy"``.

    ``own`` holds the names of user-defined test sets.
    """
    for test_set in () if name.startswith(OVER_CLIENTS) else (*sorted(own, key=len, reverse=True), *TEST_SETS):
        if test_set and name.startswith(f"{test_set}_"):
            return test_set, name[len(test_set) + 1 :]
    return "", name


def direction(name: str, directions: Mapping[str, str | None], own: Collection[str] = ()) -> str | None:
    """Return whether larger (``"max"``) or smaller (``"min"``) values of a figure are better, or None.

    ``directions`` are the task's, ``own`` names of user-defined test sets.
    """
    figure = _OVER_CLIENTS.sub("", split_metric(name, own)[1])
    for stem in (figure, re.sub("^(lowest|highest|best)_", "", figure)):
        if stem in directions or stem in _FALLING or stem in _RISING:
            return directions.get(stem, "min" if stem in _FALLING else "max")
    return "max" if re.fullmatch(r"dice_\d+", figure) else None


def check_metric_names(metrics: Collection[str]) -> None:
    for name in metrics:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        stem = re.sub("^(lowest|highest)_", "", name)
        if name in RECORD_NAMES or (stem != name and stem in {*metrics, *FIGURE_NAMES}):
            raise UserError(f'The metric "{name}" has the name of an entry of the records: give it another name.')
        if prefix:
            raise UserError(
                f'The metric "{name}" begins with "{prefix}", as the figures of a test set or of clients do: give it '
                "another name."
            )


def check_set_names(names: Collection[str], metrics: Collection[str] = ()) -> None:
    """Raise UserError if figures of a test set, with user-defined ``metrics``, would collide with others."""
    figures = ("dice_1", *FIGURE_NAMES, *metrics)
    other_sets = {"validation_": "the validation set", **dict.fromkeys(OVER_CLIENTS, "the clients")}
    sets = {f"{name}_" if name else "": f"the {set_noun(name)}{'' if name else ' without a name'}" for name in names}
    for prefix in sets:
        if entry := next((prefix + figure for figure in figures if prefix + figure in RECORD_NAMES), ""):
            raise UserError(f'The test set "{prefix[:-1]}" would have a figure {entry}, which records have: rename it.')
        for other_prefix, called in (sets | other_sets).items():
            remainder = prefix[len(other_prefix) :] if prefix.startswith(other_prefix) else ""
            alike = prefix == "test_" or any(figure.startswith(remainder) for figure in figures)
            if prefix == other_prefix in other_sets or (remainder and alike):
                raise UserError(
                    f'The test set "{prefix[:-1]}" cannot have this name, as its figures would have the names of those '
                    f"of {called}: give it another name."
                )


def check_reachable(flag: str, name: str, value: float, *, falls: bool, own: Collection[str] = ()) -> None:
    """Raise UserError if a built-in fraction never reaches the value of ``flag``."""
    figure = _OVER_CLIENTS.sub("", split_metric(name, own)[1])
    if (figure in FRACTIONS or re.fullmatch(r"dice_\d+", figure)) and (value < 0 if falls else value > 1):
        raise UserError(
            f"{flag}: {name} is a fraction from 0 to 1, which never reaches {value:g}: give a fraction, such as "
            f"{value / 100 if 1 < value <= 100 else 0.9:g}."
        )


def scale(name: str) -> tuple[int, str]:
    """Return the factor and the unit for display, per cent for shares."""
    figure = split_metric(name)[1]
    return (100, "%") if figure.endswith(_SHARES) or figure.startswith("dice_") else (1, "")


def number_text(name: str, value: float, sign: str = "") -> str:
    """Return a value, or with ``sign`` "+" a difference, as text in its unit.

    A share has one decimal, other values have three digits.
    """
    factor, unit = scale(name)
    return f"{factor * value:{sign}{'.1f' if unit else '.3g'}}"


def figure_title(name: str) -> str:
    """Return a display name: ``"lowest_hd95"`` is ``"lowest: Hausdorff distance (95 %) in pixels"``."""
    return _title_of(name, _FIGURES)


def figure_and_set(name: str, own: Collection[str] = ()) -> str:
    """Return a display name with the test set: ``"accuracy, out of distribution"``."""
    test_set, figure = split_metric(name, own)
    return f"{figure_title(figure)}, {set_title(test_set)}" if test_set else figure_title(figure)


def short_title(name: str) -> str:
    """Return a display name for a line, an axis or a column."""
    return _title_of(name, {**_FIGURES, **_SHORT})


def _title_of(name: str, titles: Mapping[str, str]) -> str:
    figure = max((known_name for known_name in titles if f"_{name}".endswith(f"_{known_name}")), key=len, default="")
    ending = next((known_name for known_name in _ENDINGS if name.endswith(known_name)), "")
    if not figure:
        return name.removesuffix(ending).replace("_", " ") + _ENDINGS.get(ending, "")
    prefix = name.removesuffix(figure).replace("_", " ").strip()
    return f"{prefix}: {titles[figure]}" if prefix else titles[figure]


def set_title(name: str) -> str:
    """Return a test set's display name: ``"in distribution"`` for ``"id"``."""
    return _TEST_SETS.get(name, name)


def short_set_title(name: str) -> str:
    """Return a test set's short display name: ``"OOD"``, ``"held-out client"``."""
    return name.upper() if name in ("id", "ood") else set_title(name)


def set_noun(name: str) -> str:
    """Return a test set's name after an article: ``"in-distribution test set"``, ``'test set "north"'``."""
    title = set_title(name)
    if name not in TEST_SETS:
        return f'test set "{name}"'
    if title.endswith("client"):
        return title
    return f"{title.replace(' ', '-')} {'set' if name == 'validation' else 'test set'}".strip()


F = TypeVar("F", bound=Callable[..., float])


@dataclass(frozen=True)
class Metric:
    """Registered metric: its name, a line of description, and ``function(logits, labels)``."""

    name: str
    description: str
    function: Callable[[Tensor, Tensor], float]

    def __call__(self, logits: Tensor, labels: Tensor) -> float:
        try:
            return float(self.function(logits, labels))
        except MemoryError:
            raise
        except RAISED as error:  # the user's own code may raise anything
            raise UserError(
                f'The metric "{self.name}" fails on {len(labels)} samples of {logits.shape[1]} classes '
                f"({describe_error(error)}): mend {self.function.__qualname__}{error_origin(error, self.function)}."
            ) from error


METRICS: Registry[Metric] = Registry("metric", code=lambda metric: metric.function)
"""Metrics by name."""


def register_metric(name: str) -> Callable[[F], F]:
    """Register a metric, which every evaluation of a classifier then computes on every test set.

    The function is called as ``function(logits, labels)`` with all samples of a test set, fp32 ``[n, C]`` and int64
    ``[n]`` on the CPU, and returns a number.

    Args:
        name: the figure's name: lower-case letters, digits and "_". The docstring's first line describes the figure.

    Raises:
        ValueError: the name has other characters, is that of another figure, or begins like a test set's figures.
        TypeError: there is no docstring.

    Example::

        @register_metric("top3")
        def top3(logits, labels):
            "Share of samples whose class is among the three likeliest."
            return (logits.topk(3).indices == labels[:, None]).any(1).float().mean()
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f'metric "{name}": expected lower-case letters, digits and "_" in the name')
    if name in FIGURE_NAMES or name in RECORD_NAMES or name.startswith(PREFIXES):
        raise ValueError(f'metric "{name}": expected another name, as fedkern has such figures itself')

    def add(function: F) -> F:
        METRICS[name] = Metric(name, METRICS.describe(name, function), function)
        return function

    return add


def metrics_of(stored: Mapping[str, str]) -> tuple[Metric, ...]:
    return tuple(METRICS[name] for name in plugins.names_of_run(METRICS, stored))


class Answers:
    """Logits and labels of a test set, gathered if there are metrics."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        if self._metrics:
            self._logits.append(logits.float().cpu())
            self._labels.append(labels.cpu())

    def figures(self) -> dict[str, float]:
        if not self._metrics:
            return {}
        logits, labels = torch.cat(self._logits), torch.cat(self._labels)
        return {metric.name: metric(logits, labels) for metric in self._metrics}
