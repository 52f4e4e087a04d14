"""The evidence for compressed uploads (``--compress``): accuracy against bytes, beside FedAvg with fewer rounds.

    python -m benchmarks.studies.study_compress digits                      # embedded data
    python -m benchmarks.studies.study_compress cifar10 --data-root DIR     # the official binary files

FedAvg on the clients of ``fedlpfm_changes.toml`` under Dirichlet 0.1.  Bytes are saved without compression too, and
both ways stand beside every compression: whole uploads until the round that reaches as many bytes, which is in the
records of a run that is there, and whole uploads in fewer rounds of more epochs, which train as long.  The network has
batch norm, whose running statistics travel whole (``--buffers average``) or not at all (``drop``).  The learning rate
of every row comes from one grid, by the accuracy on the validation split (seed 0) alone.

It takes about an hour of one core, goes on where it was interrupted, and writes
``benchmarks/studies/results/compress_<study>_table.md`` and ``.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.studies.study import JPEG, Case, Runs, best_rate, run_sections, spread, table

SEEDS = (0, 1, 2)
WHOLE = "none"
BUFFERS = ("average", "drop")
COMPRESSIONS = ("int8", "topk:share=0.1", "topk:share=0.05", "topk:share=0.01")
FEWER = (5, 10)
"""Local epochs in place of one, in so many times fewer rounds."""
LATE = 5
"""Rounds at the end whose mean stands beside the last one: accuracies swing from round to round."""


@dataclass(frozen=True)
class Study:
    """Settings of every run, and learning rates to choose from."""

    settings: Mapping[str, Any]
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)


_COMMON = {
    "clients": 5, "model": "cnn", "batch_size": 32, "momentum": 0.9, "weight_decay": 5e-4, "local_epochs": 1,
    "eval_every": 1, "checkpoint_every": 10, "grad_cam": 0,
}  # fmt: skip
STUDIES = {
    "digits": Study(
        {"data": "digits", **_COMMON, "width": 8, "rounds": 20, "public_samples": 300, "partition": "dirichlet:0.1"}
    ),
    "cifar10": Study(
        {
            "data": "cifar10", **_COMMON, "width": 16, "rounds": 30, "train_samples": 5000, "public_samples": 5000,
            "test_samples": 2000, "validation_samples": 1000, "partition": "dirichlet:0.1",
        }
    ),
}  # fmt: skip


class CompressRuns(Runs):
    """Names the cases of the study."""

    def __init__(self, study: Study, folder: Path, workers: int, settings: Mapping[str, Any]) -> None:
        super().__init__(folder, workers, settings)
        self.study = study

    @property
    def changes(self) -> dict[str, dict[str, Any]]:
        """Settings of every row of the table."""
        rounds = self.study.settings["rounds"]
        fewer = {epochs: {"rounds": rounds // epochs, "local_epochs": epochs} for epochs in FEWER}
        return {
            WHOLE: {},
            **{name: {"compress": name} for name in COMPRESSIONS},
            **{f"{WHOLE}, {one['rounds']} rounds of {epochs} epochs": one for epochs, one in fewer.items()},
        }

    def of(self, row: str, buffers: str, lr: float, seed: int) -> Case:
        """A run."""
        settings = {**self.study.settings, **self.changes[row], "buffers": buffers, "lr": lr, "seed": seed}
        return self.case("fedavg", settings, None, row, buffers, f"lr{lr}", f"s{seed}")

    def best(self, rows: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """The learning rates of rows, each with a setting of ``--buffers``."""
        cases = {(*row, lr): self.of(*row, lr, SEEDS[0]) for row in rows for lr in self.study.rates}
        self.run(cases.values())
        scores = {key: [self.metrics(case)["validation_accuracy"]] for key, case in cases.items()}
        return {row: best_rate({lr: scores[*row, lr] for lr in self.study.rates}) for row in rows}

    def figures(self, case: Case, whole: Case) -> dict[str, Any]:
        """Accuracy and bytes of a run, and the round of ``whole`` that reaches as many bytes of uploads."""
        sent, last = self.summaries[case.name]["bytes"], self.rounds(case)[-LATE:]
        reached = next(record for record in self.rounds(whole) if record["bytes_up"] >= sent["up"])
        return {
            "accuracy": self.metrics(case)["accuracy"], "late": mean(record["accuracy"] for record in last),
            "up": sent["up"], "down": sent["down"],
            "stopped": {name: reached[name] for name in ("round", "accuracy")},
        }  # fmt: skip


Section = tuple[str, dict[str, Any]]


def main_table(runs: CompressRuns) -> Section:
    """Every compression and every way to do without, three seeds."""
    keys = [(row, buffers) for buffers in BUFFERS for row in runs.changes]
    rates = runs.best(keys)
    cases = {key: [runs.of(*key, rates[key], seed) for seed in SEEDS] for key in keys}
    runs.run(case for several in cases.values() for case in several)
    numbers: dict[str, Any] = {}
    for row, buffers in keys:
        pairs = zip(cases[row, buffers], cases[WHOLE, buffers], strict=True)
        numbers[f"{row}, {buffers}"] = {"lr": rates[row, buffers], "runs": [runs.figures(*pair) for pair in pairs]}
    page = f"## Mean ± standard deviation over {len(SEEDS)} seeds, accuracy in %; last rounds: mean of {LATE}\n\n"
    return page + table(HEADER, cells(numbers)) + "\n", numbers


HEADER = ("uploads", "`--buffers`", "lr", "MB up", "MB down", "accuracy", "minus none", "last rounds",
          "none, as many bytes")  # fmt: skip


def cells(numbers: Mapping[str, Any]) -> list[list[str]]:
    """The lines under :data:`HEADER` of a finished table's numbers, with differences seed by seed."""
    lines = []
    for buffers in BUFFERS:
        rows = {key.removesuffix(f", {buffers}"): row for key, row in numbers.items() if key.endswith(f", {buffers}")}
        whole = [run["accuracy"] for run in rows[WHOLE]["runs"]]
        for name, row in rows.items():
            several = row["runs"]
            accuracies, stopped = [run["accuracy"] for run in several], [run["stopped"] for run in several]
            # A round's bytes, and so the round, are the same for every seed.
            cut = f"{spread([one['accuracy'] for one in stopped])}, round {stopped[0]['round']}"
            lines.append([
                name, buffers, f"{row['lr']:g}", *(f"{several[0][way] / 1e6:.2f}" for way in ("up", "down")),
                spread(accuracies),
                "" if name == WHOLE else spread([a - b for a, b in zip(accuracies, whole, strict=True)]),
                spread([run["late"] for run in several]) if name in (WHOLE, *COMPRESSIONS) else "",
                cut if name in COMPRESSIONS else "",
            ])  # fmt: skip
    return lines


SECTIONS: Mapping[str, Callable[[CompressRuns], Section]] = {"table": main_table}


def about(study: Study) -> str:
    jpeg = f"  {JPEG}." if study.settings["data"] == "cifar10" else ""
    return f".  FedAvg.  Learning rates from {study.rates}, chosen per row by validation accuracy.{jpeg}"


if __name__ == "__main__":
    run_sections("compress", "Compressed uploads", __doc__ or "", STUDIES, SECTIONS, CompressRuns, about)
