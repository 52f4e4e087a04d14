"""The evidence for FedIOD: does its student beat teachers and baselines, what does each part do, what is private.

    python -m benchmarks.study_fediod digits                      # embedded data
    python -m benchmarks.study_fediod mnist --data-root DIR       # the four IDX files
    python -m benchmarks.study_fediod cifar10 --data-root DIR     # the official binary files

``--only SECTION ...`` runs some of the sections: ``table`` (every baseline on the same teachers, two heterogeneities,
three seeds), ``terms`` (every loss term and importance weight taken away), ``clients`` (how many, and how fast the
student learns), ``privacy`` (accuracy and membership attack against epsilon) and ``bytes``.  Each goes on where it was
interrupted and writes ``benchmarks/results/fediod_<study>_<section>.md`` and ``.json``.  ``study_fediod_segment`` is
the same for segmentation.

The clients' networks are trained once for every split (``ensemble``) and brought to every other method
(``--teachers``), so that all distil or average the same ones.  Learning rates come from a grid for each method, by the
validation accuracy at seed 0 alone: those of the clients' training at every heterogeneity, those of the server's
students at the first one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.study import Case, Runs, best_rate, run_sections, spread, table
from fedkern import engine

SEEDS = (0, 1, 2)
IOD, REFERENCE, AVERAGE = "FedIOD", "FedAvg, many rounds", "one-shot FedAvg"
STUDENTS: Mapping[str, tuple[str, str, tuple[float, ...]]] = {
    # name: method, its option that is the student's learning rate, the grid
    IOD: ("fediod", "student_lr", (0.005, 0.02, 0.05)),
    "FedDF, public images": ("feddf", "distill_lr", (3e-4, 1e-3, 3e-3)),
    "DENSE": ("dense", "distill_lr", (0.005, 0.02, 0.05)),
    "Co-Boosting": ("coboosting", "distill_lr", (0.005, 0.02, 0.05)),
}


@dataclass(frozen=True)
class Study:
    """What is held fixed.

    Attributes:
        settings: of every run; ``local_epochs`` is the clients' whole training.
        rounds, iterations: FedIOD's plan.
        reference_rounds: those of multi-round FedAvg, over which the same epochs are spread.
        rates: learning rates of the clients to choose from.
        iod: FedIOD's other method options.
        free: those of the data-free baselines, which make as many images.
        many: numbers of clients of the section ``clients``.
        private: settings of the section ``privacy`` that differ.
        shards: of the section ``privacy``.
        students: which of the methods that distil are compared.
        figure: what is compared, ``accuracy`` or ``dice``.
        alphas: heterogeneities: Dirichlet parameters, or the names of partitions.
    """

    settings: Mapping[str, Any]
    rounds: int
    iterations: int
    reference_rounds: int
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    alphas: tuple[Any, ...] = (0.1, 1.0)
    iod: Mapping[str, Any] = field(default_factory=dict)
    free: Mapping[str, Any] = field(default_factory=dict)
    many: tuple[int, ...] = (2, 5, 10, 20)
    private: Mapping[str, Any] = field(default_factory=dict)
    shards: int = 20
    students: tuple[str, ...] = tuple(STUDENTS)
    figure: str = "accuracy"

    def partition(self, alpha: Any) -> str:
        """The ``--partition`` of a heterogeneity."""
        return alpha if isinstance(alpha, str) else f"dirichlet:{alpha}"


_COMMON = {"clients": 5, "batch_size": 32, "momentum": 0.9, "weight_decay": 3e-4, "grad_cam": 0}
_SMALL = {"ngf": 16, "ndf": 16, "student_steps": 3}
_FREE = {"ngf": 16, "generator_steps": 10, "synthesis_batch": 128, "distill_epochs": 30, "distill_batch": 64}
STUDIES = {
    "digits": Study(
        {"data": "digits", **_COMMON, "model": "resnet8", "width": 8, "public_samples": 200, "local_epochs": 20},
        10, 40, 10, iod=_SMALL, free=_FREE, many=(2, 5, 10), private={"model": "resnet8-gn"}, shards=5,
    ),
    "mnist": Study(
        {
            "data": "mnist", **_COMMON, "train_samples": 10000, "public_samples": 1000, "test_samples": 5000,
            "validation_samples": 1000, "model": "resnet8", "width": 8, "local_epochs": 10,
        },
        10, 60, 10, iod=_SMALL, free=_FREE, private={"model": "resnet8-gn"},
    ),
    "cifar10": Study(
        {
            "data": "cifar10", **_COMMON, "train_samples": 10000, "public_samples": 1000, "test_samples": 2000,
            "validation_samples": 1000, "model": "resnet8", "width": 16, "local_epochs": 20,
        },
        10, 40, 10, iod=_SMALL, free=_FREE, private={"model": "resnet8-gn"},
    ),
}  # fmt: skip

Section = tuple[str, dict[str, Any]]


class IODRuns(Runs):
    """Names the cases of the study and brings the same teachers to all of them."""

    def __init__(self, study: Study, folder: Path, workers: int, settings: Mapping[str, Any]) -> None:
        super().__init__(folder, workers, settings)
        self.study = study
        self._rates: dict[Any, float] = {}

    # -- cases -----------------------------------------------------------------------------------------------------

    def teachers(self, alpha: Any, lr: float, seed: int, **changes: Any) -> Case:
        """The clients' training: the members of the ensemble."""
        settings = {**self.study.settings, "partition": self.study.partition(alpha), "lr": lr, "seed": seed, **changes}
        return self.case("ensemble", settings, {}, *_said(changes), f"a{alpha}", f"lr{lr}", f"s{seed}")

    def reference(self, alpha: Any, lr: float, seed: int) -> Case:
        """Multi-round FedAvg with the same epochs."""
        rounds = self.study.reference_rounds
        settings = {
            **self.study.settings, "partition": self.study.partition(alpha), "lr": lr, "seed": seed, "rounds": rounds,
            "local_epochs": max(1, self.study.settings["local_epochs"] // rounds),
        }  # fmt: skip
        return self.case("fedavg", settings, {}, f"a{alpha}", f"lr{lr}", f"s{seed}")

    def brought(
        self, method: str, teachers: Case, alpha: Any, seed: int, options: Mapping[str, Any], *words: str,
        own: bool = False, **changes: Any,
    ) -> Case:  # fmt: skip
        """A run of ``method`` on finished teachers, or, with ``own``, on teachers that it trains as they were."""
        lr = float(teachers.arguments[teachers.arguments.index("--lr") + 1])
        settings = {**self.study.settings, "partition": self.study.partition(alpha), "lr": lr, "seed": seed, **changes}
        if not own:
            settings["teachers"] = str((self.folder / teachers.name).resolve())
        if method == "fediod":
            settings["rounds"] = self.study.rounds
        return self.case(method, settings, options, *words, *_said(changes), f"a{alpha}", f"lr{lr}", f"s{seed}")

    def iod(self, teachers: Case, alpha: Any, seed: int, *, own: bool = False, **changes: Any) -> Case:
        """FedIOD; ``changes`` are method options, or settings that the study fixes otherwise."""
        chosen = {key: value for key, value in changes.items() if key in SETTINGS}
        given = {key: value for key, value in changes.items() if key not in SETTINGS}
        options = {"iterations": self.study.iterations, "holdout": 0, **self.study.iod, **given}
        if "student_lr" not in options:
            options["student_lr"] = self.rate(IOD)
        return self.brought("fediod", teachers, alpha, seed, options, *_said(given), own=own, **chosen)

    def student(self, name: str, teachers: Case, alpha: Any, seed: int, rate: float) -> Case:
        """A method that distils the teachers into a student with this learning rate."""
        method, knob, _ = STUDENTS[name]
        if method == "fediod":
            return self.iod(teachers, alpha, seed, student_lr=rate)
        options = {} if method == "feddf" else dict(self.study.free)
        return self.brought(method, teachers, alpha, seed, {**options, knob: rate}, f"rate{rate}")

    # -- learning rates --------------------------------------------------------------------------------------------

    def choose(self) -> None:
        """Runs the grids and chooses every learning rate."""
        study = self.study
        grid = [(alpha, lr) for alpha in study.alphas for lr in study.rates]
        self.run([*(self.teachers(a, lr, 0) for a, lr in grid), *(self.reference(a, lr, 0) for a, lr in grid)])
        for alpha in study.alphas:
            for name, make in (("teachers", self.teachers), (REFERENCE, self.reference)):
                scores = {lr: [self.metrics(make(alpha, lr, 0))[self.validated]] for lr in study.rates}
                self._rates[name, alpha] = best_rate(scores)
        alpha = study.alphas[0]
        teachers = self.teachers(alpha, self._rates["teachers", alpha], 0)
        cases = {(n, r): self.student(n, teachers, alpha, 0, r) for n in study.students for r in STUDENTS[n][2]}
        self.run([teachers])
        self.run(cases.values())
        for name in study.students:
            found = {rate: [self.metrics(cases[name, rate])[self.validated]] for rate in STUDENTS[name][2]}
            self._rates[name] = best_rate(found)

    @property
    def validated(self) -> str:
        """The figure that chooses."""
        return f"validation_{self.study.figure}"

    def rate(self, name: str, alpha: Any | None = None) -> float:
        """The learning rate chosen for the clients (at ``alpha``) or for a student."""
        key = name if alpha is None else (name, alpha)
        if key not in self._rates:
            self.choose()
        return self._rates[key]

    def trained(self, alpha: Any, seed: int, **changes: Any) -> Case:
        """The teachers at the learning rate chosen, which the caller runs."""
        return self.teachers(alpha, self.rate("teachers", alpha), seed, **changes)

    def attack(self, case: Case) -> dict[str, Any]:
        """The membership attack on a finished run, made once."""
        path = self.folder / case.name / "attack.json"
        if not path.exists():
            engine.attack(self.folder / case.name)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def megabytes(self, case: Case) -> tuple[float, float]:
        """What a client sends and receives on average in the whole run."""
        sent, clients = self.summaries[case.name]["bytes"], self.summaries[case.name]["clients"]
        return sent["up"] / clients / 1e6, sent["down"] / clients / 1e6


SETTINGS = {"clients", "model", "width"}
"""What `changes` of FedIOD may name beside method options."""


def _said(changes: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in changes.items()]


# -- sections ------------------------------------------------------------------------------------------------------

FROM_IOD = {"best teacher": "best_teacher", "mean teacher": "mean_teacher", "uniform ensemble": "ensemble_uniform",
            "weighted ensemble": "ensemble_weighted"}  # fmt: skip


def main_table(runs: IODRuns) -> Section:
    """The student against every baseline at every heterogeneity."""
    study = runs.study
    runs.choose()
    teachers = {(alpha, seed): runs.trained(alpha, seed) for alpha in study.alphas for seed in SEEDS}
    runs.run(teachers.values())
    cases: dict[tuple[str, Any, int], Case] = {}
    for (alpha, seed), own in teachers.items():
        for name in study.students:
            cases[name, alpha, seed] = runs.student(name, own, alpha, seed, runs.rate(name))
        cases[AVERAGE, alpha, seed] = runs.brought("oneshot-fedavg", own, alpha, seed, {})
        cases[REFERENCE, alpha, seed] = runs.reference(alpha, runs.rate(REFERENCE, alpha), seed)
    runs.run(cases.values())
    page, numbers = "", {}
    for alpha in study.alphas:
        found = {name: [runs.metrics(cases[name, alpha, s])[study.figure] for s in SEEDS] for name in _names(cases)}
        for name, figure in FROM_IOD.items():
            found[name] = [runs.metrics(cases[IOD, alpha, s])[figure] for s in SEEDS]
        rates = {name: runs.rate(name) for name in study.students} | {REFERENCE: runs.rate(REFERENCE, alpha)}
        rows = [[name, str(rates.get(name, "")), spread(found[name])] for name in _order(found)]
        lr = runs.rate("teachers", alpha)
        title = f"## {study.partition(alpha)}: {study.figure} in %, mean ± standard deviation over {len(SEEDS)} seeds; "
        page += f"{title}teachers' learning rate {lr}\n\n{table(['', 'learning rate', study.figure], rows)}\n\n"
        numbers[study.partition(alpha)] = {study.figure: found, "rates": rates, "teachers": lr}
    page += "The best teacher is chosen by these very figures, which nobody in the federation could do.\n"
    return page, numbers


def _names(cases: Mapping[tuple[str, Any, int], Case]) -> list[str]:
    return list(dict.fromkeys(name for name, _, _ in cases))


def _order(found: Mapping[str, Any]) -> list[str]:
    first = [IOD, *FROM_IOD, AVERAGE]
    return [*first, *(name for name in found if name not in first)]


TERMS: Mapping[str, Mapping[str, Any]] = {
    "FedIOD": {},
    "without realism": {"w_real": 0.0},
    "without clarity": {"w_clear": 0.0},
    "without diversity": {"w_diverse": 0.0},
    "diversity minimised (the code's sign)": {"js_sign": 1},
    "diversity: mutual information": {"diversity": "mutual_information"},
    "with the adversarial term": {"w_adv": 0.2},
    "with the balance term": {"w_balance": 1.0},
    "uniform class weights": {"class_weights": "uniform"},
    "without discriminators' weights": {"disc_weight": False},
    "without importance weights": {"class_weights": "uniform", "disc_weight": False},
    "average of the generator": {"ema": 0.99},
    "the code's preset": {"preset": "code"},
    "outputs on public images": {"mode": "public"},
}


def terms(runs: IODRuns) -> Section:
    """Every loss term and importance weight taken away or added."""
    alpha, numbers = runs.study.alphas[0], {}
    teachers = runs.trained(alpha, 0)
    runs.run([teachers])
    cases = {name: runs.iod(teachers, alpha, 0, student_lr=runs.rate(IOD), **own) for name, own in TERMS.items()}
    runs.run(cases.values())
    rows = []
    for name, case in cases.items():
        metrics = runs.metrics(case)
        numbers[name] = dict(metrics)
        rows.append([name, *(f"{100 * metrics[figure]:.1f}" for figure in ("accuracy", "ensemble_weighted"))])
    title = f"## Every term changed alone, Dirichlet {alpha}, seed 0: accuracy in %\n\n"
    return title + table(["", "student", "its ensemble"], rows) + "\n", numbers


def clients(runs: IODRuns) -> Section:
    """More clients on the same samples: the end, and the way there."""
    alpha, numbers = runs.study.alphas[0], {}
    teachers = {count: runs.trained(alpha, 0, clients=count) for count in runs.study.many}
    runs.run(teachers.values())
    rate = runs.rate(IOD)
    cases = {count: runs.iod(own, alpha, 0, student_lr=rate, clients=count) for count, own in teachers.items()}
    runs.run(cases.values())
    rows, way = [], []
    points: list[int] = []
    for count, case in cases.items():
        metrics, records = runs.metrics(case), [r for r in runs.rounds(case) if "accuracy" in r]
        numbers[str(count)] = {"metrics": dict(metrics), "accuracy": {r["round"]: r["accuracy"] for r in records}}
        figures = ("accuracy", "best_teacher", "mean_teacher", "ensemble_uniform", "ensemble_weighted")
        rows.append([str(count), *(f"{100 * metrics[figure]:.1f}" for figure in figures)])
        chosen = [records[round(i * (len(records) - 1) / 4)] for i in range(5)]
        points = [record["round"] for record in chosen]
        way.append([str(count), *(f"{100 * record['accuracy']:.1f}" for record in chosen)])
    header = ["clients", "student", "best teacher", "mean teacher", "uniform ensemble", "weighted ensemble"]
    page = f"## More clients, Dirichlet {alpha}, seed 0: accuracy in %\n\n{table(header, rows)}\n\n"
    page += f"## Accuracy of the student after so many rounds of {runs.study.iterations} iterations, in %\n\n"
    return page + table(["clients", *map(str, points)], way) + "\n", numbers


TARGETS = (None, 10.0, 5.0, 2.0)
ATTACKED = (None, 2.0)


def privacy(runs: IODRuns) -> Section:
    """Accuracy and membership attack against epsilon, with what the figure covers and with everything covered."""
    study, numbers = runs.study, {}
    alpha = study.alphas[-1]  # every client must fill its shards
    teachers = runs.trained(alpha, 0, **study.private)
    runs.run([teachers])
    quiet = {"class_weights": "uniform", "disc_weight": False}  # nothing else is told, with and without privacy
    kinds: Mapping[str, Mapping[str, Any]] = {
        "discriminators alone (the generator's gradients)": {},
        "discriminators and teachers (everything released)": {"teacher_dp": True, "teacher_share": 0.7},
    }
    cases: dict[tuple[str, float | None], Case] = {}
    for kind, own in kinds.items():
        for target in TARGETS:
            noise = {} if target is None else {"epsilon": target, "shards": study.shards, **own}
            trains = target is not None and "teacher_dp" in own
            cases[kind, target] = runs.iod(
                teachers, alpha, 0, own=trains, student_lr=runs.rate(IOD), **study.private, **quiet, **noise
            )
    runs.run(cases.values())
    rows = []
    for (kind, target), case in cases.items():
        metrics, row = runs.metrics(case), [kind, "∞" if target is None else f"{target:g}"]
        own = numbers[f"{kind}, epsilon {target}"] = {"metrics": dict(metrics)}
        row += [f"{100 * metrics[figure]:.1f}" for figure in ("accuracy", "mean_teacher")]
        if target is not None:
            own["privacy"] = runs.summaries[case.name].get("privacy")
        if target in ATTACKED:
            own["attack"] = attack = runs.attack(case)
            row += [f"{attack['auc']:.3f} ({attack['low']:.3f} to {attack['high']:.3f})", f"{100 * attack['tpr']:.1f}"]
        else:
            row += ["", ""]
        rows.append(row)
    header = [
        "covered",
        "epsilon",
        "student, %",
        "mean teacher, %",
        "attack on the student: AUC (95 %)",
        "TPR at 1 % FPR",
    ]
    title = f"## Accuracy and loss-threshold membership attack, Dirichlet {alpha}, seed 0, delta 1e-5, "
    title += f"{study.private['model']}, {study.shards} shards\n\n"
    return title + table(header, rows) + "\n", numbers


def bytes_(runs: IODRuns) -> Section:
    """What travels, and what it buys."""
    alpha, numbers = runs.study.alphas[0], {}
    runs.choose()
    teachers = runs.trained(alpha, 0)
    runs.run([teachers])
    rate = runs.rate(IOD)
    cases = {
        "FedIOD, fp32 images": runs.iod(teachers, alpha, 0, student_lr=rate),
        "FedIOD, uint8 images": runs.iod(teachers, alpha, 0, student_lr=rate, pixels="uint8"),
        "outputs on public images": runs.iod(teachers, alpha, 0, student_lr=rate, mode="public"),
        AVERAGE: runs.brought("oneshot-fedavg", teachers, alpha, 0, {}),
        REFERENCE: runs.reference(alpha, runs.rate(REFERENCE, alpha), 0),
    }
    runs.run(cases.values())
    rows = []
    for name, case in cases.items():
        up, down = runs.megabytes(case)
        accuracy = runs.metrics(case)["accuracy"]
        each = 1e3 * (up + down) / (runs.study.rounds * runs.study.iterations) if name.startswith("FedIOD") else None
        numbers[name] = {"megabytes_up": up, "megabytes_down": down, "accuracy": accuracy}
        iteration = "" if each is None else f"{each:.1f}"
        rows.append([name, f"{up:.2f}", f"{down:.2f}", iteration, f"{100 * accuracy:.1f}"])
    header = ["", "MB up per client", "MB down", "kB per iteration", "accuracy, %"]
    title = f"## Bytes, Dirichlet {alpha}, seed 0\n\nFedIOD saves privacy, not bytes.\n\n"
    return title + table(header, rows) + "\n", numbers


SECTIONS: Mapping[str, Callable[[IODRuns], Section]] = {
    "table": main_table,
    "terms": terms,
    "clients": clients,
    "privacy": privacy,
    "bytes": bytes_,
}


def about(study: Study) -> str:
    return f"""; FedIOD: {study.rounds} rounds of
{study.iterations} iterations, {", ".join(f"{name} {value}" for name, value in study.iod.items())}; data-free baselines:
{", ".join(f"{name} {value}" for name, value in study.free.items())}; multi-round FedAvg spends the teachers' epochs in
{study.reference_rounds} rounds.  Learning rates by validation accuracy at seed 0."""


if __name__ == "__main__":
    run_sections("fediod", "FedIOD", __doc__ or "", STUDIES, SECTIONS, IODRuns, about)
