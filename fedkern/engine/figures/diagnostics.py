"""Warnings, by name, about typical signs of failed training."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import nn

from fedkern.files.image_rows import in_parts
from fedkern.methods.protocol import Observed
from fedkern.methods.roles import EvaluatedSet
from fedkern.models.networks.vit import PatchEmbedding
from fedkern.settings.config import RunConfig
from fedkern.tasks import Constant
from fedkern.tasks.figure_names import OVER_CLIENTS, direction, number_text, scale, set_noun, short_title, split_metric
from fedkern.tasks.multilabel import MAIN as AREA

DRIFT_FACTOR = 5.0
FALL = 0.1
NOTHING = 0.05
SMOOTH = {"linear", "bilinear", "bicubic", "trilinear"}
CHANCE_FACTOR, CHANCE_MARGIN, CHANCE_REST = 1.5, 0.05, 0.1
"""A figure is near that of a constant prediction if it is below CHANCE_FACTOR times that figure, below that figure +
CHANCE_MARGIN, and below that figure + CHANCE_REST of what is missing to 1. The factor alone fails with two classes,
where 1.5 times the figure may be good. The margin alone fails with 90 % of the images in one class, where an accuracy
of 95 % means half the errors."""

RARE = "train longer, weight rare classes in the loss, or predict them from a lower probability on."
"""Advice for a network that tells classes apart but predicts only the common ones."""


class Observations:
    """Count, mean and range of every scalar that clients report, over the whole run."""

    def __init__(self, stored: Mapping[str, Sequence[float]] | None = None) -> None:
        self._values: dict[str, list[float]] = {name: list(value) for name, value in (stored or {}).items()}

    def add(self, report: Mapping[str, object]) -> None:
        for name, value in report.items():
            if isinstance(value, float) and math.isfinite(value):
                count, total, low, high = self._values.get(name, (0, 0.0, math.inf, -math.inf))
                self._values[name] = [count + 1, total + value, min(low, value), max(high, value)]

    def summary(self) -> dict[str, Observed]:
        return {
            name: Observed(count=int(count), mean=total / count, low=low, high=high)
            for name, (count, total, low, high) in self._values.items()
        }

    def to_dict(self) -> dict[str, list[float]]:
        return self._values


def warn_emulated(precision: str, device: str) -> dict[str, str]:
    if precision != "bf16":
        return {}
    if device != "cpu":
        slow, lacks = not torch.cuda.is_bf16_supported(including_emulation=False), "GPU has no bf16 arithmetic"
    else:
        cpu = torch.cpu.get_capabilities()
        slow = cpu.get("architecture") == "x86_64" and not (cpu["avx512_bf16"] or cpu["amx_bf16"])
        lacks = "processor has neither AVX512-BF16 nor AMX-BF16"
    if not slow:
        return {}
    return {"emulated-bf16": f"This {lacks}, so that --precision bf16 is emulated and slower than fp32: leave it out."}


def warn_unrepeatable(
    find_network: Callable[[], nn.Module], shape: Sequence[int], device: torch.device
) -> dict[str, str]:
    """Return a warning about layers that upsample, whose gradient PyTorch sums in random order on a GPU."""
    if device.type == "cpu":
        return {}
    layers = list(find_network().modules())
    modes = {layer.mode for layer in layers if isinstance(layer, nn.Upsample)} & SMOOTH
    if shape and any(layer.interpolates(*shape[1:]) for layer in layers if isinstance(layer, PatchEmbedding)):
        modes.add("bicubic")
    if not modes:
        return {}
    return {
        "unrepeatable-gradient": f"The network enlarges maps by {' and '.join(sorted(modes))} interpolation, whose "
        "gradient does not repeat bit for bit on a GPU: for equal bits give a vision transformer square images, let "
        'other networks enlarge by "nearest" or a transposed convolution, or train with --device cpu.'
    }


def telling_area(metrics: Mapping[str, float], test_set: str, config: RunConfig) -> str:
    value = metrics.get(f"{test_set}_auroc" if test_set else "auroc", math.nan)
    near = math.isnan(value) or hardly_better("auroc", value, 0.5, config)
    return "" if near else f"AUROC is {_format_figure('auroc', value)}"


def collapsed_classes(
    sets: Mapping[str, EvaluatedSet], classes: Sequence[str], metrics: Mapping[str, float], config: RunConfig
) -> dict[str, str]:
    for prefix, data in sets.items():
        if data.predictions is None or prefix == "validation_":
            continue
        present = {k for part in in_parts(data.labels) for k in part.unique().tolist() if 0 <= k < len(classes)}
        if missing := sorted(present - set(torch.unique(data.predictions).tolist())):
            area = telling_area(metrics, prefix[:-1], config)
            names = ", ".join(f'"{classes[c]}"' for c in missing[:5]) + (" ..." if len(missing) > 5 else "")
            return {
                "collapsed-class": f"Never predicted on the {set_noun(prefix[:-1])}: {len(missing)} of {len(present)} "
                f"classes ({names})"
                + (f", though {area}: {RARE}" if area else ": train longer, or lower the learning rate.")
            }
    return {}


def unvaried_labels(sets: Mapping[str, EvaluatedSet]) -> dict[str, str]:
    """Return a warning about a multi-label test set on which every label is predicted alike everywhere."""
    alike = [prefix for prefix, data in sets.items() if prefix != "validation_" and data.task.is_constant(data)]
    text = f"Every label is predicted for all images of the {set_noun(alike[0][:-1])} or for none: " if alike else ""
    return {"unvaried-labels": f"{text}train longer, or change the learning rate."} if alike else {}


def outlying_drift(clients: Mapping[str, Mapping[str, float]], label: Callable[[int], str] = str) -> dict[str, str]:
    """Return a warning about a client whose update is many times longer than the others'."""
    drifts = {name: entry["drift"] for name, entry in clients.items() if "drift" in entry}
    if len(drifts) < 3:
        return {}
    worst = max(drifts, key=lambda name: drifts[name])
    usual = sorted(value for name, value in drifts.items() if name != worst)
    if (median := usual[len(usual) // 2]) > 0 and drifts[worst] > DRIFT_FACTOR * median:
        return {
            "outlying-client": f"The update of client {label(int(worst))} is {drifts[worst] / median:.0f} times as "
            "long as the others': look at its data, or clip with --clip-norm."
        }
    return {}


def constants(sets: Mapping[str, EvaluatedSet], classes: Sequence[str]) -> dict[str, Constant]:
    by_set = {prefix: data.task.constant(data, classes) for prefix, data in sets.items()}
    return {prefix: constant for prefix, constant in by_set.items() if constant is not None}


def hardly_better(figure: str, value: float, constant: float, config: RunConfig) -> bool:
    if direction(figure, {config.main: config.better}) == "min":
        return value > (1 - CHANCE_REST) * constant
    low = min(CHANCE_FACTOR * constant, constant + CHANCE_MARGIN, constant + CHANCE_REST * (1 - constant))
    return value < round(low, 12)  # 1.5 x 0.1 is 0.15


def poor_metrics(
    metrics: Mapping[str, float],
    best: Mapping[str, float],
    classes: int,
    constant: Mapping[str, Constant],
    config: RunConfig,
    tests: Collection[str] = (),
    added: Collection[str] = (),
) -> dict[str, str]:
    """Return warnings about figures near those of a constant prediction, or far below their best in validation.

    Accuracies of single clients, and on sets missing in ``constant``, are compared with 1 / classes. An AUROC above
    chance shows that the classes are told apart after all.

    Args:
        metrics, best: figures of the final network, and the best validation figures, by prefixed name.
        tests: names of the test sets.
        added: names of the user's metrics, whose chance level is unknown.
    """
    texts: dict[str, str] = {}
    retry = "train longer, or change the learning rate."
    for name, value in metrics.items():
        test_set, base = split_metric(name, tests)
        where = f" on the {set_noun(test_set)}" if test_set else ""
        if base == config.main and not math.isfinite(value) and name not in best:
            no_number = "NaN" if math.isnan(value) else "infinite"
            text = f"{short_title(base)}{where} is {no_number} in every evaluated round and ranks no rounds"
            texts.setdefault(f"undefined-{base}", f"{text}: look at the metric, or name another main figure.")
        if base == "loss" != config.main and math.isnan(value):
            text = f"The loss{where} is NaN: the network's outputs, or the samples, hold values that are not finite"
            texts.setdefault("undefined-loss", f"{text}, or no target counts.")
        if test_set == "validation" or base in added:
            continue
        is_low = f"{short_title(base)}{where} is {_format_figure(base, value)}"
        if name.endswith("dice") and value < NOTHING:
            texts.setdefault("chance-level", f"{is_low}, so hardly anything but background is found: {retry}")
        if name.endswith(AREA) and hardly_better(base, value, 0.5, config):
            texts.setdefault("chance-level", f"{is_low}, and scoring all images alike gives 50.0 %: {retry}")
        always = None if base.startswith(OVER_CLIENTS) else constant.get(f"{test_set}_" if test_set else "")
        if always is not None:
            figure = max((known for known in always.figures if name.endswith(known)), key=len, default="")
            level = always.figures.get(figure)
            guess = f'"{always.name}"' if always.name and figure != "balanced_accuracy" else "one class"
            text = f"and predicting {guess} everywhere gives {_format_figure(base, level or 0.0)}"
        else:
            level = 1 / classes if classes > 1 and name.endswith("accuracy") else None  # one class is always right
            text = f"near chance ({_format_figure(base, level or 0.0)})"
        if level is not None and hardly_better(base, value, level, config):
            if area := "" if base.startswith(OVER_CLIENTS) else telling_area(metrics, test_set, config):
                texts.setdefault("majority-level", f"{is_low}, {text}, but {area}: {RARE}")
            else:
                texts.setdefault("chance-level", f"{is_low}, {text}: {retry}")
    name, falls = config.main, config.better == "min"
    final, top = metrics.get(f"validation_{name}"), best.get(f"validation_{name}")
    levels = [always.figures[name] for always in constant.values() if name in always.figures]
    tolerance = FALL * (1.0 if scale(name)[1] else max(levels, default=abs(top or 0.0)))
    if final is not None and top is not None and (final - top if falls else top - final) > tolerance:
        texts[f"{'rising' if falls else 'falling'}-{name}"] = (
            f"Validation {short_title(name)} {'rose' if falls else 'fell'} from {_format_figure(name, top)} to "
            f"{_format_figure(name, final)}: lower the learning rate or stop earlier."
        )
    return texts


def _format_figure(figure: str, value: float) -> str:
    return f"{number_text(figure, value)} {scale(figure)[1]}".rstrip()


def missing_metrics(
    method: str, source: str, sets: Mapping[str, EvaluatedSet], figures: Mapping[str, float]
) -> dict[str, str]:
    expected = {metric.name: f"{prefix}{metric.name}" for prefix, data in sets.items() for metric in data.metrics}
    if not (missing := sorted(name for name, figure in expected.items() if figure not in figures)):
        return {}
    named = f"The metric {missing[0]} is" if len(missing) == 1 else f"The metrics {', '.join(missing)} are"
    return {
        "missing-metric": f"{named} not computed: metrics of plugins are for classification by one network, and "
        f"{method} on {source} has other figures."
    }


def undefined_figures(
    sets: Mapping[str, EvaluatedSet], of_clients: Mapping[int, Mapping[str, float | None]], label: Callable[[int], str]
) -> dict[str, str]:
    """Return warnings about main figures that are undefined on a test set or for clients."""
    texts: dict[str, str] = {}
    for prefix, task in [(prefix, data.task) for prefix, data in sets.items() if not data.task.has_main_figure(data)]:
        lacks = f"The {set_noun(prefix[:-1])} has {task.lacks}, and so no {short_title(task.main)}."
        texts[f"no-{prefix}{task.main}"] = lacks
    for name in dict.fromkeys(name for figures in of_clients.values() for name in figures):
        lacking = [k for k, figures in of_clients.items() if name in figures and figures[name] is None]
        task = next(iter(sets.values())).task
        why = f"have {task.lacks} in their test sets, and so no" if task.lacks and name == task.main else "have NaN as"
        named = ", ".join(label(k) for k in lacking[:5]) + (" ..." if len(lacking) > 5 else "")
        if lacking:
            texts[f"no-client-{name}"] = (
                f"{len(lacking)} of {len(of_clients)} clients ({named}) {why} {short_title(name)}"
                + ("; mean and worst client leave them out." if len(lacking) < len(of_clients) else ".")
            )
    return texts
