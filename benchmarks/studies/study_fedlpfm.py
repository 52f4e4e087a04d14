"""The evidence for Fed-LPFM: does a frozen teacher help where clients see few classes, and what does it depend on.

    python -m benchmarks.studies.study_fedlpfm digits                      # embedded data
    python -m benchmarks.studies.study_fedlpfm cifar10 --data-root DIR     # the official binary files

``--only SECTION ...`` runs some of the sections: ``table`` (FedAvg, FedProx, FML, Fed-LPFM under class split and
Dirichlet 0.1, three seeds), ``partitions`` (IID to Dirichlet 0.01), ``loss`` (lambda, divergences), ``teachers``
(tuned, several, random ones), ``proxy`` (a larger one, class split) and ``edges`` (learning rates beyond the grid).
Each goes on where it was interrupted, takes at most about an hour on two cores, and writes
``benchmarks/studies/results/fedlpfm_<study>_<section>.md`` and ``.json``.

The proxy is a small CNN, as a client's device would hold, several times smaller than the teacher; with ResNet-8 in its
place every run takes several times as long (section ``proxy``).

Nothing is downloaded: the teacher is a larger network that fedkern itself trains on public images, which no client
holds.  Its accuracy stands beside every table, and so does that of the proxy trained on the public images alone: what
Fed-LPFM has above that comes from the clients.  The learning rate of a method under a partition comes from the same
grid, by the accuracy on the validation split (seed 0) alone; ``table`` runs it, the other sections take the rates from
its results where these are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.studies.study import (
    JPEG,
    RATES_HEADER,
    Case,
    Runs,
    best_rate,
    beyond,
    run_sections,
    spread,
    stored_rates,
    table,
    tried_rates,
)

SEEDS = (0, 1, 2)
METHODS = {"FedAvg": "fedavg", "FedProx": "fedprox", "FML": "fml", "Fed-LPFM": "fedlpfm"}
FULL = "Fed-LPFM"
BOUNDS = {"local training only": "local", "centralised": "centralised"}


@dataclass(frozen=True)
class Study:
    """What is held fixed.

    Attributes:
        settings: of every run.
        split: the class split.
        teachers: backbones of the teacher, the first one alone unless a section says otherwise.
        pretrain_epochs: epochs of their training on the public images.
        rates: learning rates to choose from.
        larger: model and width of the section ``proxy``.
    """

    settings: Mapping[str, Any]
    split: str
    teachers: tuple[str, ...]
    pretrain_epochs: int
    rates: tuple[float, ...]
    larger: tuple[str, int] = ("resnet8", 16)

    @property
    def partitions(self) -> dict[str, str]:
        """Those of the main table."""
        return {f"class split ({self.split.partition(':')[2]} a client)": self.split, "Dirichlet 0.1": "dirichlet:0.1"}

    def options(self, **changes: Any) -> dict[str, Any]:
        """Fed-LPFM's options."""
        own = {"teacher": f"pretrained:{self.teachers[0]}", "pretrain_epochs": self.pretrain_epochs}
        return {**own, **changes}


_COMMON = {
    "clients": 5, "model": "cnn", "batch_size": 32, "momentum": 0.9, "weight_decay": 5e-4, "local_epochs": 1,
    "eval_every": 1000, "checkpoint_every": 10, "grad_cam": 0,
}  # fmt: skip
STUDIES = {
    "digits": Study(
        {"data": "digits", **_COMMON, "width": 8, "rounds": 20, "public_samples": 300},
        "classes:2", ("resnet8/16", "cnn/32", "resnet8/24"), 20, (0.01, 0.03, 0.1),
    ),
    "cifar10": Study(
        {
            "data": "cifar10", **_COMMON, "width": 16, "rounds": 30, "train_samples": 5000, "public_samples": 5000,
            "test_samples": 2000, "validation_samples": 1000,
        },
        "classes:2", ("resnet8/32", "cnn/48", "resnet8/24"), 20, (0.01, 0.03, 0.1),
    ),
}  # fmt: skip


SAID = {"cifar10": f"  {JPEG}."}
"""What else a page should say, by data set."""


class LPFMRuns(Runs):
    """Names the cases of the study."""

    def __init__(self, study: Study, folder: Path, workers: int, settings: Mapping[str, Any]) -> None:
        super().__init__(folder, workers, settings)
        self.study = study

    def of(self, method: str, partition: str, lr: float, seed: int, **options: Any) -> Case:
        """A run; ``options`` are the changes to Fed-LPFM's."""
        settings = {**self.study.settings, "partition": partition, "lr": lr, "seed": seed}
        own = self.study.options(**options) if method == "fedlpfm" else options
        words = [f"{key}={value}" for key, value in options.items()]
        return self.case(method, settings, own, *words, partition, f"lr{lr}", f"s{seed}")

    def larger(self, method: str, lr: float) -> Case:
        """A run with the larger proxy under the class split, seed 0."""
        model, width = self.study.larger
        settings = {**self.study.settings, "model": model, "width": width, "partition": self.study.split, "lr": lr}
        own = self.study.options() if method == "fedlpfm" else {}
        return self.case(method, {**settings, "seed": 0}, own, f"{model}-{width}", self.study.split, f"lr{lr}", "s0")

    def rates(self, partition: str, anew: bool = False) -> dict[str, float]:
        """Every method's learning rate under a partition: the main table's, or, for that, from a grid that is run."""
        study, rates = self.study, self.study.rates
        stored = {} if anew else stored_rates(f"fedlpfm_{study.settings['data']}_table", study.settings, rates)
        title = next(title for title, one in study.partitions.items() if one == partition)
        if stored:
            return {name: stored[f"{name}, {title}"] for name in METHODS}
        cases = {(name, lr): self.of(method, partition, lr, 0) for name, method in METHODS.items() for lr in rates}
        self.run([cases[FULL, rates[0]]])  # alone, because two at once would both train the teacher
        self.run(cases.values())
        return {
            name: best_rate({lr: [self.metrics(cases[name, lr])["validation_accuracy"]] for lr in rates})
            for name in METHODS
        }


Section = tuple[str, dict[str, Any]]


def main_table(runs: LPFMRuns) -> Section:
    """All methods under class split and Dirichlet 0.1, between local training and centralised training."""
    page, numbers = "", {}
    for title, partition in runs.study.partitions.items():
        rates = runs.rates(partition, anew=True)
        cases = {name: [runs.of(METHODS[name], partition, rates[name], seed) for seed in SEEDS] for name in METHODS}
        bounds = {name: runs.of(method, partition, rates["FedAvg"], 0) for name, method in BOUNDS.items()}
        runs.run([case for several in cases.values() for case in several] + list(bounds.values()))
        rows = []
        for name, several in cases.items():
            found = [runs.metrics(case) for case in several]
            numbers[f"{name}, {title}"] = {"lr": rates[name], "runs": found}
            sent = runs.summaries[several[0].name]["bytes"]["clients"]["0"]
            rows.append([name, str(rates[name]), spread([m["accuracy"] for m in found]), _megabytes(sent)])
        for name, case in bounds.items():
            m = numbers[f"{name}, {title}"] = runs.metrics(case)
            sent = runs.summaries[case.name]["bytes"]["clients"]["0"]
            rows.append([f"{name} (seed 0)", str(rates["FedAvg"]), f"{100 * m['accuracy']:.1f}", _megabytes(sent)])
        header = ["method", "lr", "accuracy", "MB up, down of a client"]
        page += f"## {title}: mean ± standard deviation over {len(SEEDS)} seeds, in %\n\n{table(header, rows)}\n\n"
        page += _teacher(runs.metrics(cases[FULL][0]))
    return page, numbers


def _megabytes(sent: Mapping[str, int]) -> str:
    return f"{sent['up'] / 1e6:.2f}, {sent['down'] / 1e6:.2f}"


def _teacher(m: Mapping[str, float]) -> str:
    alone = f"; the proxy trained on them alone {100 * m['public_proxy_accuracy']:.1f} %"
    return f"The teacher, trained on the public images: {100 * m['teacher_accuracy']:.1f} %{alone}.\n\n"


def edges(runs: LPFMRuns) -> Section:
    """One learning rate further where the main table's is the grid's edge, and the bounds at rates of their own."""
    page, numbers, grid = "", {}, runs.study.rates
    for title, partition in runs.study.partitions.items():
        tried = {name: [rate, *beyond(rate, grid)] for name, rate in runs.rates(partition).items()}
        tried = {name: rates for name, rates in tried.items() if len(rates) > 1}
        tried |= {name: list(grid) for name in BOUNDS}
        methods = METHODS | BOUNDS
        cases = {(n, lr): runs.of(methods[n], partition, lr, 0) for n, rates in tried.items() for lr in rates}
        runs.run([cases[name, lr] for name, lr in cases if name == FULL][:1])  # alone, or two would train the teacher
        runs.run(cases.values())
        rows = []
        for name, rates in tried.items():
            row, numbers[f"{name}, {title}"] = tried_rates(name, {lr: runs.metrics(cases[name, lr]) for lr in rates})
            rows.append(row)
        page += f"## {title}, seed 0\n\n{table(RATES_HEADER, rows)}\n\n"
    return page, numbers


def proxy(runs: LPFMRuns) -> Section:
    """All methods with a larger proxy under the class split, every learning rate of the grid."""
    study, numbers, rows = runs.study, {}, []
    cases = {(name, lr): runs.larger(method, lr) for name, method in METHODS.items() for lr in study.rates}
    runs.run([cases[FULL, study.rates[0]]])  # alone, because two at once would both train the teacher
    runs.run(cases.values())
    for name in METHODS:
        row, numbers[name] = tried_rates(name, {lr: runs.metrics(cases[name, lr]) for lr in study.rates})
        rows.append(row)
    model, width = study.larger
    page = f"## {model} of width {width} as the proxy, {study.split}, seed 0\n\n{table(RATES_HEADER, rows)}\n\n"
    return page + _teacher(runs.metrics(cases[FULL, study.rates[0]])), numbers


def partitions(runs: LPFMRuns) -> Section:
    """From IID to Dirichlet 0.01, one seed, with the learning rates of Dirichlet 0.1."""
    rates, numbers = runs.rates("dirichlet:0.1"), {}
    kinds = {"IID": "iid", "1.0": "dirichlet:1.0", "0.1": "dirichlet:0.1", "0.01": "dirichlet:0.01"}
    cases = {(name, k): runs.of(METHODS[name], kinds[k], rates[name], 0) for name in METHODS for k in kinds}
    runs.run(cases.values())
    rows = []
    for name in METHODS:
        found = [runs.metrics(cases[name, k])["accuracy"] for k in kinds]
        numbers[name] = dict(zip(kinds, found, strict=True))
        rows.append([name, *(f"{100 * value:.1f}" for value in found)])
    header = ["method", *(k if k == "IID" else f"Dirichlet {k}" for k in kinds)]
    return f"## Other partitions, seed 0, accuracy in %\n\n{table(header, rows)}\n", numbers


def _changes(runs: LPFMRuns, title: str, changes: Mapping[str, Mapping[str, Any]], first: str) -> Section:
    """Fed-LPFM with changed options under both partitions of the main table, one seed; ``first`` needs all teachers."""
    found: dict[str, dict[str, Any]] = {name: {} for name in changes}
    for partition in runs.study.partitions.values():
        lr = runs.rates(partition)[FULL]
        cases = {name: runs.of("fedlpfm", partition, lr, 0, **options) for name, options in changes.items()}
        runs.run([cases[first]])  # alone, because two at once would both train its teachers
        runs.run(cases.values())
        for name, case in cases.items():
            found[name][partition] = runs.metrics(case)
    rows = []
    for name, by_partition in found.items():
        accuracies = [f"{100 * m['accuracy']:.1f}" for m in by_partition.values()]
        teacher = next(iter(by_partition.values())).get("validation_teacher_accuracy")
        tuned = [m.get("validation_tuned_teacher_accuracy") for m in by_partition.values()]
        shown = ["" if value is None else f"{100 * value:.1f}" for value in (teacher, *tuned)]
        rows.append([name, *accuracies, *shown])
    header = [FULL, *runs.study.partitions, "teacher", *(f"tuned, {name}" for name in runs.study.partitions)]
    teachers = "Teachers on the validation split: as they came, and tuned, on average over the clients' own ones.\n\n"
    return f"## {title}, seed 0, accuracy in %\n\n{teachers}{table(header, rows)}\n", found


def loss(runs: LPFMRuns) -> Section:
    """Lambda, the form of the loss, and the divergence."""
    changes: dict[str, dict[str, Any]] = {"lambda 0.5": {}}
    changes |= {f"lambda {value}": {"lambda": value} for value in (0.1, 0.3, 0.7, 0.9, 1.0)}
    changes |= {
        "additive": {"mixing": "additive"},
        "MSE": {"divergence": "mse"},
        "Jensen-Shannon": {"divergence": "js"},
        "temperature 4": {"temperature": 4.0},
        "teacher sees the augmented view": {"teacher_view": "same"},
    }
    return _changes(runs, "The loss", changes, "lambda 0.5")


def teachers(runs: LPFMRuns) -> Section:
    """Tuned teachers, several teachers, other teachers at other clients."""
    several = {"teacher": ",".join(f"pretrained:{name}" for name in runs.study.teachers)}
    changes: dict[str, dict[str, Any]] = {
        "as it is": {},
        "linear probe on the client's samples": {"teacher_tuning": "probe"},
        "fine-tuned on the client's samples": {"teacher_tuning": "finetune"},
        "two teachers": {**several, "teachers": 2},
        "three teachers": {**several, "teachers": 3},
        "one of three, drawn per client": {**several, "backbone": "random"},
        "one of three, drawn in every round": {**several, "backbone": "random-each-round"},
    }
    return _changes(runs, f"Teachers ({', '.join(runs.study.teachers)})", changes, "three teachers")


SECTIONS: Mapping[str, Callable[[LPFMRuns], Section]] = {
    "table": main_table,
    "partitions": partitions,
    "loss": loss,
    "teachers": teachers,
    "proxy": proxy,
    "edges": edges,
}


def about(study: Study) -> str:
    return f""".  Teacher:
{study.teachers[0]} (model/width), {study.pretrain_epochs} epochs on the public images.  Learning rates from
{study.rates}, chosen per partition by validation accuracy.{SAID.get(study.settings["data"], "")}"""


if __name__ == "__main__":
    run_sections("fedlpfm", "Fed-LPFM", __doc__ or "", STUDIES, SECTIONS, LPFMRuns, about)
