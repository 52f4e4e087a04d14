"""The evidence for FedDRA: do robust client weights lift the worst client, what do they cost the mean, and why.

    python -m benchmarks.studies.study_feddra captions     # embedded data
    python -m benchmarks.studies.study_feddra tiny         # the same in a few minutes, to see that it works

``--only SECTION ...`` runs some of the sections: ``table`` (FedDRA and every baseline), ``held_out`` (a client that
no method trains on), ``ablations`` (robust weights only, anchors only, one stage, where the weights act),
``statistics`` (those of batch norm, with and without robust weights), ``sweeps`` (rho and mu) and ``alternating`` (what
both stages in every round cost, and why).  Each goes on where it was interrupted, takes about an hour or less on two
cores, and writes ``benchmarks/studies/results/feddra_<study>_<section>.md`` and ``.json``.

The last client of the captions is a small minority with words, colours and digits of its own.  Figures: recall at 1,
mean of both directions, among 500 pairs of all clients' distributions, of the minority's, and of a client that nobody
trained on; and the contrastive loss in batches of 32 on every client's own test set, its mean and its worst.  The
learning rate of all methods is the baseline's best of a grid, by the recall on the validation set (first seed) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.studies.study import Case, Runs, best_rate, run_sections, spread, stored_rates, table

FULL, BASELINE = "FedDRA", "FedAvg, uniform"
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    BASELINE: ("fedavg", {"weighting": "uniform"}),
    "FedAvg, by samples": ("fedavg", {}),
    "FedProx": ("fedprox", {"weighting": "uniform"}),
    "FedDyn": ("feddyn", {"weighting": "uniform"}),
    "SCAFFOLD": ("scaffold", {"weighting": "uniform"}),
    "agnostic FL": ("afl", {}),
    FULL: ("feddra", {}),
    f"{FULL}, weights off": ("feddra", {"dro": False}),
    f"{FULL}, both stages in every round": ("feddra", {"stage_schedule": "per_round"}),
    "local only": ("local", {}),
    "centralised": ("centralised", {}),
}
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "robust weights only": {"stages": "one", "anchors": False},
    "anchors only": {"stages": "one", "dro": False},
    "two stages only": {"dro": False, "anchors": False},
    "none of the three": {"stages": "one", "dro": False, "anchors": False},
    "one stage": {"stages": "one"},
    "both stages in every round": {"stage_schedule": "per_round"},
    "both stages in every round, two steps of the first": {"stage_schedule": "per_round", "alignment_steps": 2},
    "weights on losses": {"dro_apply": "loss"},
    "weights as in the released code": {"dro_apply": "loss_code"},
    "losses on training samples": {"loss_split": "train"},
}
LONGER = "one stage, as many steps as both"
ALTERNATING: Mapping[str, Mapping[str, Any]] = {
    "one stage": {"stages": "one"},
    LONGER: {"stages": "one"},
    "both stages in every round": {"stage_schedule": "per_round"},
    "the same, the second from the average of the first": {"stage_schedule": "per_round", "joint_start": "average"},
}
FIGURES = {
    "R@1": ("i2t_r1", "t2i_r1"),
    "minority R@1": ("minority_i2t_r1", "minority_t2i_r1"),
    "unseen R@1": ("unseen_i2t_r1", "unseen_t2i_r1"),
    "mean loss": ("mean_client_loss",),
    "worst loss": ("worst_client_loss",),
}
LATE = {"drift in the last third": "drift", "training loss in the last third": "contrastive"}
"""Figures of clients' records instead of the last model: the length of their updates and the contrastive loss of their
own samples while they train."""
VALIDATION = ("validation_i2t_r1", "validation_t2i_r1")


@dataclass(frozen=True)
class Study:
    """What is held fixed.

    Attributes:
        settings: of every run.
        options: FedDRA's.
        seeds: of every row.
        rates: learning rates to choose from.
        rhos, mus: of the sweeps.
    """

    settings: Mapping[str, Any]
    options: Mapping[str, Any]
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    rhos: tuple[float, ...] = (0.0, 0.03, 0.3, 1.0, 2.0)
    mus: tuple[float, ...] = (0.0, 1.0, 16.0, 128.0)


_COMMON = {
    "data": "captions", "clients": 5, "batch_size": 32, "eval_every": 1000, "optimizer": "adamw", "buffers": "pool",
}  # fmt: skip
STUDIES = {
    "captions": Study(
        {**_COMMON, "width": 32, "rounds": 15, "local_steps": 20, "checkpoint_every": 15},
        {"rho": 0.1, "alignment_steps": 10, "stage_schedule": "sequential"},
    ),
    "tiny": Study(
        {
            **_COMMON, "width": 16, "rounds": 2, "local_steps": 2, "train_samples": 300,
            "test_samples": 64, "validation_samples": 64,
        },
        {"rho": 0.2, "alignment_steps": 1, "stage_schedule": "sequential"}, (0,), (1e-3,), (0.2,), (1.0,),
    ),
}  # fmt: skip


class DRARuns(Runs):
    """Names the cases of the study."""

    def __init__(self, study: Study, folder: Path, workers: int, settings: Mapping[str, Any]) -> None:
        super().__init__(folder, workers, settings)
        self.study = study

    def of(self, name: str, lr: float, seed: int, *, changed: Mapping[str, Any] | None = None, **options: Any) -> Case:
        """A run of a method of the table; ``changed`` settings and ``options`` are what it differs in."""
        method, defaults = METHODS[name]
        settings = {**self.study.settings, "lr": lr, "seed": seed, **(changed or {})}
        if method == "centralised":  # as many steps as all clients together
            settings["local_steps"] *= settings["clients"]
        every = {**(self.study.options if method == "feddra" else {}), **defaults, **options}
        differing = {**defaults, **(changed or {}), **options}
        words = [f"{key}={value}" for key, value in differing.items()]
        return self.case(method, settings, every, *words, f"lr{lr}", f"s{seed}")

    def stored(self) -> dict[str, float]:
        """The main table's learning rates, where it was made with the same settings."""
        return stored_rates(f"feddra_{self.study.settings['data']}_table", self.study.settings, self.study.rates)

    def rate(self, anew: bool = False) -> float:
        """The learning rate of every method: the main table's, or, for that, the baseline's from a grid that is run."""
        stored = {} if anew else self.stored()
        if BASELINE in stored:
            return stored[BASELINE]
        cases = {lr: self.of(BASELINE, lr, self.study.seeds[0]) for lr in self.study.rates}
        self.run(cases.values())
        return best_rate({lr: [self.figure(case, VALIDATION)] for lr, case in cases.items()})

    def figure(self, case: Case, names: Iterable[str]) -> float:
        """The mean of some figures of a finished run."""
        metrics = self.metrics(case)
        return mean(self.late(case, LATE[name]) if name in LATE else metrics[name] for name in names)

    def late(self, case: Case, record: str) -> float:
        """The mean of what clients recorded over the last third of the rounds."""
        rounds = [entry["clients"] for entry in self.rounds(case)]
        return mean(client[record] for clients in rounds[-max(1, len(rounds) // 3) :] for client in clients.values())


Section = tuple[str, dict[str, Any]]


def _compared(
    runs: DRARuns,
    title: str,
    lr: float,
    rows: Mapping[str, Callable[[float, int], Case]],
    figures: Mapping[str, tuple[str, ...]] = FIGURES,
) -> Section:
    """A table of the figures of several kinds of runs over the study's seeds."""
    seeds = runs.study.seeds
    cases = {name: [make(lr, seed) for seed in seeds] for name, make in rows.items()}
    runs.run(case for row in cases.values() for case in row)
    means = {
        name: {figure: [runs.figure(case, names) for case in row] for figure, names in figures.items()}
        for name, row in cases.items()
    }
    lines = [
        [name, *(spread(values, *(() if figure.endswith("R@1") else (1.0, 2))) for figure, values in row.items())]
        for name, row in means.items()
    ]
    one = "" if len(seeds) > 1 else f"  Seed {seeds[0]} alone."
    numbers = {name: {"lr": lr, **row} for name, row in means.items()}
    note = f"Learning rate {lr:g}.  Recall in per cent; losses in nats, less is better.{one}"
    return f"## {title}\n\n{table(['', *figures], lines)}\n\n{note}\n", numbers


def main_table(runs: DRARuns) -> Section:
    """FedDRA and every baseline."""
    rows = {name: _row(runs, name) for name in METHODS}
    return _compared(runs, "Every method", runs.rate(anew=True), rows)


def _row(runs: DRARuns, name: str, **given: Any) -> Callable[[float, int], Case]:
    return partial(runs.of, name, **given)


def held_out(runs: DRARuns) -> Section:
    """A majority client, and the minority, left out of the training."""
    rows = {}
    for client, which in ((1, "client 1"), (runs.study.settings["clients"] - 1, "the minority")):
        for name in (BASELINE, FULL):
            rows[f"{name} without {which}"] = _row(runs, name, changed={"held_out_client": client})
    more = {**FIGURES, "held out R@1": ("held_out_i2t_r1", "held_out_t2i_r1")}
    return _compared(runs, "A client held out", runs.rate(), rows, more)


def ablations(runs: DRARuns) -> Section:
    """What each part of FedDRA does."""
    rows = {name: _row(runs, FULL, **options) for name, options in ABLATIONS.items()}
    return _compared(runs, "Ablations", runs.rate(), rows)


def statistics(runs: DRARuns) -> Section:
    """Batch norm's statistics in evaluation, and robust weights that see losses under them.

    Averaged (as published) they are those of no client's data.  Pooled, they are those of the new global network over
    all clients' samples, and may be what batch norm trains with from a round on (FixBN); or every batch is evaluated
    under its own.
    """
    rounds = runs.study.settings["rounds"]
    ways: dict[str, dict[str, Any]] = {
        "pooled": {},
        "averaged": {"buffers": "average"},
        "pooled, trained with in the last third": {"freeze_bn_after": rounds - rounds // 3},
        "of every test batch": {"buffers": "drop"},
    }
    rows = {
        f"robust weights {'on' if weights else 'off'}, statistics {way}": _row(
            runs, FULL, changed=changed, **({} if weights else {"dro": False})
        )
        for way, changed in ways.items()
        for weights in (True, False)
    }
    return _compared(runs, "Batch norm", runs.rate(), rows)


def sweeps(runs: DRARuns) -> Section:
    """The radius of the set of weights, and the weight of the anchors."""
    rows = {f"rho {rho:g}": _row(runs, FULL, rho=rho) for rho in runs.study.rhos}
    rows |= {f"mu {mu:g}": _row(runs, FULL, mu=mu) for mu in runs.study.mus}
    return _compared(runs, "rho and mu", runs.rate(), rows)


def alternating(runs: DRARuns) -> Section:
    """What both stages in every round cost, and why: more steps, or modules that are every client's own.

    A client's second stage goes on from what it made of the alignment modules in its first.  Where every client has the
    same distribution, drift between them has no cause but chance.
    """
    study = runs.study
    longer = {"local_steps": study.settings["local_steps"] + study.options["alignment_steps"]}
    which: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "robust weights on": ({}, {}),
        "robust weights off": ({}, {"dro": False}),
        "robust weights off, clients alike": ({"partition": "iid"}, {"dro": False}),
    }
    rows = {
        f"{name}, {where}": _row(
            runs, FULL, changed={**(longer if name == LONGER else {}), **partition}, **weights, **options
        )
        for where, (partition, weights) in which.items()
        for name, options in ALTERNATING.items()
    }
    figures = {name: names for name, names in FIGURES.items() if name != "minority R@1"}  # alike: none
    figures |= {name: (name,) for name in LATE}
    return _compared(runs, "Both stages in every round", runs.rate(), rows, figures)


SECTIONS: Mapping[str, Callable[[DRARuns], Section]] = {
    "table": main_table,
    "alternating": alternating,
    "held_out": held_out,
    "ablations": ablations,
    "statistics": statistics,
    "sweeps": sweeps,
}


def about(study: Study) -> str:
    options = ", ".join(f"{name} {value}" for name, value in study.options.items())
    return f""".
FedDRA's options: {options}.  The learning rate is the best of {study.rates} for FedAvg by validation recall.
Seeds {study.seeds}.  Centralised training takes as many steps as all clients together."""


if __name__ == "__main__":
    run_sections("feddra", "FedDRA", __doc__ or "", STUDIES, SECTIONS, DRARuns, about)
