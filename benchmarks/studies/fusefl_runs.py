"""What the sections of FuseFL's study have in common: what is held fixed, its cases, and its two columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.studies.study import JPEG, Case, Runs, best_rate, stored_rates

SEEDS = (0, 1, 2)
Column = str
PUBLISHED, CALIBRATED = "as published", "all calibrated"
ONE_SHOT: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "one-shot FedAvg": ("oneshot-fedavg", {"calibrate": True}),
    "ensemble": ("ensemble", {"calibrate": True}),
    "FuseFL": ("fusefl", {}),
}
REFERENCE = "FedAvg, many rounds"
GENERATOR: Mapping[str, Any] = {"ngf": 16, "generator_lr": 0.01, "generator_steps": 30, "synthesis_batch": 128}
"""What makes generators affordable: the published step size moves one that starts anew for every batch too little."""
LINKS = (10, 1000)  # Mbit/s
SAID = {
    "digits": "Not augmented.",
    "cifar10": f"Random crops and flips in local training.  {JPEG} (ResNet-18 of width 64 at 0.5: 85.92 %).",
}
"""What else a page should say, by data set."""


@dataclass(frozen=True)
class Study:
    """What is held fixed.

    Attributes:
        settings: of every run; ``local_epochs`` is a one-shot client's whole budget.
        rounds: those of multi-round FedAvg, over which the same budget is spread.
        rates: learning rates to choose from.
        deep: model and width of a network of eight blocks.
        many: numbers of clients.
    """

    settings: Mapping[str, Any]
    rounds: int
    rates: tuple[float, ...]
    alphas: tuple[float, ...] = (0.1, 0.3, 0.5)
    deep: tuple[str, int] = ("resnet18", 16)
    many: tuple[int, ...] = (10, 20, 50)


_COMMON = {
    "clients": 5, "model": "resnet8", "width": 16, "batch_size": 32, "momentum": 0.9, "weight_decay": 0,
    "grad_cam": 0,
}  # fmt: skip
STUDIES = {
    "digits": Study(
        {"data": "digits", **_COMMON, "public_samples": 200, "local_epochs": 24},
        8,
        (0.01, 0.03, 0.1),
        many=(10, 20),
    ),
    "cifar10": Study(
        {
            "data": "cifar10", **_COMMON, "train_samples": 5000, "public_samples": 1000, "test_samples": 2000,
            "validation_samples": 1000, "local_epochs": 24,
        },
        8,
        (0.01, 0.03, 0.1),
    ),
}  # fmt: skip


class FuseFLRuns(Runs):
    """Names the cases of the study, and reads its two columns from their records."""

    def __init__(self, study: Study, folder: Path, workers: int, settings: Mapping[str, Any]) -> None:
        super().__init__(folder, workers, settings)
        self.study = study

    def one_shot(self, name: str, alpha: float, lr: float, seed: int, *words: str, **changes: Any) -> Case:
        """A one-shot run: ``changes`` are method options, or settings that the study fixes otherwise."""
        method, options = ONE_SHOT[name]
        return self.run_of(method, alpha, lr, seed, options, *words, **changes)

    def run_of(
        self, method: str, alpha: float, lr: float, seed: int, options: Mapping[str, Any], *words: str, **changes: Any
    ) -> Case:
        settings = {**self.study.settings, "partition": f"dirichlet:{alpha}", "lr": lr, "seed": seed}
        settings.update({key: value for key, value in changes.items() if key in SETTINGS})
        options = {**options, **{key: value for key, value in changes.items() if key not in SETTINGS}}
        said = [*words, *(f"{key}={value}" for key, value in changes.items())]
        return self.case(method, settings, options, *said, f"a{alpha}", f"lr{lr}", f"s{seed}")

    def reference(self, alpha: float, lr: float, seed: int, **changes: Any) -> Case:
        """Multi-round FedAvg with the same budget."""
        epochs = self.study.settings["local_epochs"] // self.study.rounds
        settings = {"rounds": self.study.rounds, "local_epochs": epochs, "eval_every": 1000, **changes}
        return self.run_of("fedavg", alpha, lr, seed, {}, **settings)

    def distilled(self, alpha: float, lr: float, seed: int, **changes: Any) -> dict[str, Case]:
        """What is distilled from an ensemble that learnt at ``lr``, calibrated too."""
        generated = {"calibrate": True, **GENERATOR}
        return {
            "FedDF, public images": self.run_of("feddf", alpha, lr, seed, {"calibrate": True}, **changes),
            "FedDF, generator": self.run_of(
                "feddf", alpha, lr, seed, {**generated, "source": "generator"}, "generator", **changes
            ),
            "DENSE": self.run_of("dense", alpha, lr, seed, {**generated, "distill_epochs": 20}, **changes),
        }

    def record(self, case: Case, column: Column) -> dict[str, Any]:
        """The figures of a column: FuseFL's last ones in both; others' before and after their calibration."""
        records = [record for record in self.rounds(case) if "validation_accuracy" in record]
        if column == PUBLISHED and not case.name.startswith("fusefl"):
            records = [record for record in records if record["name"] != "calibrate"]
        return records[-1]

    def uncalibrated(self, case: Case) -> float:
        """The accuracy before calibration."""
        accuracies = [r["accuracy"] for r in self.rounds(case) if r["name"] != "calibrate" and "accuracy" in r]
        return float(accuracies[-1])

    def rates(self, anew: bool = False) -> dict[tuple[str, Column], float]:
        """Every method's learning rate in every column: the main table's, or, for that, from a grid that is run."""
        names = [(name, column) for name in (*ONE_SHOT, REFERENCE) for column in (PUBLISHED, CALIBRATED)]
        study = self.study
        stored = {} if anew else stored_rates(f"fusefl_{study.settings['data']}_table", study.settings, study.rates)
        if stored:
            return {(name, column): stored[f"{name}, alpha {study.alphas[0]}, {column}"] for name, column in names}
        alpha = self.study.alphas[len(self.study.alphas) // 2]
        cases = {(name, lr): self.one_shot(name, alpha, lr, 0) for name in ONE_SHOT for lr in self.study.rates}
        cases |= {(REFERENCE, lr): self.reference(alpha, lr, 0) for lr in self.study.rates}
        self.run(cases.values())
        return {
            (name, column): best_rate(
                {lr: [self.record(cases[name, lr], column)["validation_accuracy"]] for lr in self.study.rates}
            )
            for name, column in names
        }

    def megabytes(self, case: Case, column: Column) -> tuple[float, float]:
        """What a client sends and receives on average until the column's figure stands."""
        record, clients = self.record(case, column), self.summaries[case.name]["clients"]
        return record["bytes_up"] / clients / 1e6, record["bytes_down"] / clients / 1e6


# What `changes` of a run may name beside method options.
SETTINGS = {
    "clients", "model", "width", "local_epochs", "rounds", "cue_clients", "backdoor_clients",
    "public_samples", "train_samples", "eval_every",
}  # fmt: skip
