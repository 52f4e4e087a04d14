"""The runs of FedIOD's studies: what is fixed, the same teachers for every method, settings chosen by validation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.studies.study import Case, Runs, best_rate
from fedkern.downstream import membership_attack

IOD, REFERENCE, AVERAGE = "FedIOD", "FedAvg, many rounds", "one-shot FedAvg"
STUDENTS: Mapping[str, tuple[str, tuple[Mapping[str, Any], ...]]] = {
    # name: method, the settings of its server to choose from
    IOD: (
        "fediod",
        tuple({"critic_lr": rate, "disc_weight": on} for rate in (2e-4, 4e-4) for on in (False, True)),
    ),
    "FedDF, public images": ("feddf", tuple({"distill_lr": rate} for rate in (1e-3, 3e-3, 1e-2, 3e-2))),
    "DENSE": ("dense", tuple({"distill_lr": rate} for rate in (0.005, 0.01, 0.02, 0.05))),
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
        choices: those of FedIOD to choose from, where they are not those of ``STUDENTS``.
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
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    alphas: tuple[Any, ...] = (0.1, 1.0)
    iod: Mapping[str, Any] = field(default_factory=dict)
    choices: tuple[Mapping[str, Any], ...] = ()
    free: Mapping[str, Any] = field(default_factory=dict)
    many: tuple[int, ...] = (2, 5, 10, 20)
    private: Mapping[str, Any] = field(default_factory=dict)
    shards: int = 20
    students: tuple[str, ...] = tuple(STUDENTS)
    figure: str = "accuracy"

    def partition(self, alpha: Any) -> str:
        """The ``--partition`` of a heterogeneity."""
        return alpha if isinstance(alpha, str) else f"dirichlet:{alpha}"


class IODRuns(Runs):
    """Names the cases of the study and brings the same teachers to all of them."""

    def __init__(self, study: Study, folder: Path, workers: int, settings: Mapping[str, Any]) -> None:
        super().__init__(folder, workers, settings)
        self.study = study
        self._rates: dict[tuple[str, Any], float] = {}
        self._chosen: dict[str, Mapping[str, Any]] = {}

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
            settings["eval_every"] = max(1, self.study.rounds // 5)  # as often as the way there is shown
        return self.case(method, settings, options, *words, *_said(changes), f"a{alpha}", f"lr{lr}", f"s{seed}")

    def iod(
        self, teachers: Case, alpha: Any, seed: int, *, own: bool = False, chosen: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Case:  # fmt: skip
        """FedIOD with the settings ``chosen``; ``changes`` are method options, or settings that the study fixes."""
        settings = {key: value for key, value in changes.items() if key in SETTINGS}
        iod_options = {key: value for key, value in changes.items() if key not in SETTINGS}
        iod_options = {**(self.chosen(IOD) if chosen is None else chosen), **iod_options}
        options = {"iterations": self.study.iterations, "holdout": 0, **self.study.iod, **iod_options}
        return self.brought("fediod", teachers, alpha, seed, options, *_said(iod_options), own=own, **settings)

    def student(
        self, name: str, teachers: Case, alpha: Any, seed: int, chosen: Mapping[str, Any] | None = None
    ) -> Case:
        """A method that distils the teachers, with the settings ``chosen``."""
        method, choice = STUDENTS[name][0], self.chosen(name) if chosen is None else chosen
        if method == "fediod":
            return self.iod(teachers, alpha, seed, chosen=choice)
        options = {} if method == "feddf" else dict(self.study.free)
        return self.brought(method, teachers, alpha, seed, {**options, **choice}, *_said(choice))

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
        self.run([teachers])
        grids = {name: STUDENTS[name][1] for name in study.students}
        if study.choices:
            grids[IOD] = study.choices
        cases = {name: [self.student(name, teachers, alpha, 0, one) for one in grid] for name, grid in grids.items()}
        self.run(case for each in cases.values() for case in each)
        for name, grid in grids.items():
            best = best_rate({i: [self.metrics(case)[self.validated]] for i, case in enumerate(cases[name])})
            self._chosen[name] = grid[int(best)]

    @property
    def validated(self) -> str:
        """The figure that chooses."""
        return f"validation_{self.study.figure}"

    def rate(self, name: str, alpha: Any) -> float:
        """The learning rate chosen for the clients: ``"teachers"``, or of multi-round FedAvg."""
        if not self._rates:
            self.choose()
        return self._rates[name, alpha]

    def chosen(self, name: str) -> Mapping[str, Any]:
        """The settings chosen for a method that distils."""
        if not self._chosen:
            self.choose()
        return self._chosen[name]

    def trained(self, alpha: Any, seed: int, **changes: Any) -> Case:
        """The teachers at the learning rate chosen, which the caller runs."""
        return self.teachers(alpha, self.rate("teachers", alpha), seed, **changes)

    def attack(self, case: Case) -> dict[str, Any]:
        """The membership attack on a finished run, made once."""
        path = membership_attack.place(self.folder / case.name)
        if not path.exists():
            membership_attack.attack(self.folder / case.name)
        result: dict[str, Any] = json.loads(path.read_text())
        return result

    def megabytes(self, case: Case) -> tuple[float, float]:
        """What a client sends and receives on average in the whole run, what is sent once (class counts) included."""
        sent, clients = self.summaries[case.name]["bytes"], self.summaries[case.name]["clients"]
        up, down = ((sent[way] + sent[f"one_off_{way}"]) / clients / 1e6 for way in ("up", "down"))
        return up, down


SETTINGS = {"clients", "model", "width"}
"""What `changes` of FedIOD may name beside method options."""


def _said(changes: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in changes.items()]
