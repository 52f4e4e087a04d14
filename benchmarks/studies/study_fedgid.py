"""The evidence for FedGID: does it beat FedAvg where backgrounds mislead, what does each part do, and at what settings.

    python -m benchmarks.studies.study_fedgid digits                      # embedded data, half an hour on two cores
    python -m benchmarks.studies.study_fedgid colormnist --data-root DIR  # about an hour on two cores

``--only SECTION ...`` runs some of the sections: ``parts`` (what each part of FedGID does, and its settings; written to
``benchmarks/studies/results/fedgid_<data>.md`` and ``.json``), ``baselines`` (beside methods for other kinds of skew;
``fedgid_<data>_baselines``) and ``schedule`` (FedAvg and FedGID with more and shorter rounds;
``fedgid_<data>_schedule``).  Each goes on where it was interrupted.

Every variant has the same data, model, rounds and epochs.  Its learning rate comes from the same grid, by the accuracy
on the in-distribution validation split alone (at the lower correlation); the out-of-distribution test chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.studies.study import Case, Runs, arguments, best_rate, command_line, folder_name, publish, spread, table

SEEDS = (0, 1, 2)
FULL = "FedGID (+GI map +GD)"
PARTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "FedAvg": ("fedavg", {}),
    "FedProx": ("fedprox", {}),
    "+GD": ("fedgid", {"intervention": False}),
    "+GI feature": ("fedgid", {"distillation": False, "mix_stage": "feature"}),
    "+GI map": ("fedgid", {"distillation": False}),
    FULL: ("fedgid", {}),
}
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **PARTS,
    "MOON": ("moon", {}),
    "SCAFFOLD": ("scaffold", {}),
    "FedDyn": ("feddyn", {}),
    "FedProto": ("fedproto", {}),
    "FedNTD": ("fedntd", {}),
}
BASELINES = ("FedAvg", "FedProx", "MOON", "SCAFFOLD", "FedDyn", "FedProto", "FedNTD", FULL)
ALPHAS = (0.3, 0.45, 0.6, 0.8)
LAMBDAS = (0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Study:
    """What is held fixed, and the correlations looked at."""

    name: str
    settings: Mapping[str, Any]
    correlations: tuple[float, ...]
    rates: tuple[float, ...]  # learning rates to choose from
    rate_seeds: tuple[int, ...]  # whose mean validation accuracy chooses
    shorter: Mapping[str, Any]  # as many epochs in more and shorter rounds
    full: Mapping[str, Any] | None = None  # one seed on all training samples, FedAvg and FedGID only


_SMALL = {"data": "colormnist", "clients": 5, "width": 16, "data_option": "validation_samples=10000"}
STUDIES = {
    # 247 validation images are too few for one seed to tell learning rates apart.
    "digits": Study(
        "colordigits",
        {"data": "colordigits"},
        (0.7,),
        (0.02, 0.05, 0.1),
        SEEDS,
        {"data": "colordigits", "rounds": 40, "local_epochs": 1},
    ),
    "colormnist": Study(
        "colormnist",
        # Long local training, as published (10 epochs a round): it is what lets the backgrounds mislead. With 12 rounds
        # of 2 epochs and a tuned learning rate FedAvg has almost nothing left to correct at 0.5 (section schedule).
        {**_SMALL, "train_samples": 6000, "rounds": 5, "local_epochs": 5},
        (0.5, 0.8),
        (0.05, 0.1, 0.2),
        (0,),
        {**_SMALL, "train_samples": 6000, "rounds": 12, "local_epochs": 2},
        full={**_SMALL, "rounds": 3, "local_epochs": 3},
    ),
}


class FedGIDRuns(Runs):
    """Names the cases of the study."""

    def __init__(self, study: Study, folder: Path, workers: int, settings: Mapping[str, Any]) -> None:
        super().__init__(folder, workers, settings)
        self.study = study

    def variant(
        self,
        variant: str,
        correlation: float,
        lr: float,
        seed: int,
        settings: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Case:
        method, preset = VARIANTS[variant]
        # Validation and tests are looked at once, at the end: nothing on the way may choose anything.
        every = {"correlation": correlation, "lr": lr, "seed": seed, "eval_every": 1000, "checkpoint_every": 4}
        fixed = {**(settings or self.study.settings), **self.settings}
        words = [variant, *(f"{name}={value}" for name, value in options.items())]
        kind = "shorter" if settings == self.study.shorter else "full"
        words += [f"c{correlation}", f"lr{lr}", f"s{seed}", *([kind] if settings else [])]
        return Case(folder_name(words), arguments(method, {**fixed, **every}, {**preset, **options}))

    def rates(self, variants: Iterable[str], settings: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Runs the grid and chooses every variant's learning rate, by validation accuracy."""
        cases = {
            (v, lr): [self.variant(v, self.study.correlations[0], lr, seed, settings) for seed in self.study.rate_seeds]
            for v in variants
            for lr in self.study.rates
        }
        self.run(case for several in cases.values() for case in several)
        return {
            v: best_rate(
                {lr: [self.metrics(case)["validation_accuracy"] for case in cases[v, lr]] for lr in self.study.rates}
            )
            for v in variants
        }


Section = tuple[str, dict[str, Any]]


def _compared(
    runs: FedGIDRuns, c: float, rows: Mapping[str, tuple[float, Sequence[Case]]], numbers: dict[str, Any]
) -> list[str]:
    """The lines of a table of finished runs: learning rate and a case per seed by name."""
    lines = []
    for name, (lr, cases) in rows.items():
        metrics = [runs.metrics(case) for case in cases]
        numbers[f"{name}, correlation {c}"] = {"lr": lr, "runs": metrics}
        columns = ("ood_accuracy", "id_accuracy", "ood_gradcam_in_object", "ood_confidence")
        lines.append([name, str(lr), *(spread([m[column] for m in metrics]) for column in columns)])
    header = ["variant", "lr", "OOD accuracy", "ID accuracy", "Grad-CAM in object, OOD", "confidence, OOD"]
    title = f"## Correlation {c}: mean ± standard deviation over {len(SEEDS)} seeds, in %"
    return [title, "", table(header, lines), ""]


def baselines(runs: FedGIDRuns) -> Section:
    """FedGID beside every baseline."""
    correlations, rates = runs.study.correlations, runs.rates(BASELINES)
    cases = {(v, c): [runs.variant(v, c, rates[v], seed) for seed in SEEDS] for c in correlations for v in BASELINES}
    runs.run(case for several in cases.values() for case in several)
    page, numbers = [], {}
    for c in correlations:
        page += _compared(runs, c, {v: (rates[v], cases[v, c]) for v in BASELINES}, numbers)
    return "\n".join(page), numbers


def parts(runs: FedGIDRuns) -> Section:
    """What each part does, and at what settings."""
    correlations, rates = runs.study.correlations, runs.rates(PARTS)
    strongest = correlations[-1]
    runs.run(runs.variant(v, c, rates[v], seed) for c in correlations for v in PARTS for seed in SEEDS)
    sweep = [("alpha", alpha) for alpha in ALPHAS] + [("lambda", lam) for lam in LAMBDAS]
    swept = {(k, x): runs.variant(FULL, strongest, rates[FULL], 0, **{k: x}) for k, x in sweep}
    runs.run(swept.values())
    knob, value = max(sweep, key=lambda entry: runs.metrics(swept[entry])["validation_accuracy"])
    tuned = f"FedGID, {knob} {value}"
    runs.run(runs.variant(FULL, c, rates[FULL], seed, **{knob: value}) for c in correlations for seed in SEEDS)

    def cases(variant: str, c: float) -> list[Case]:
        base, changes = (FULL, {knob: value}) if variant == tuned else (variant, {})
        return [runs.variant(base, c, rates[base], seed, **changes) for seed in SEEDS]

    page, numbers = ["The last row has the setting of the two sweeps below with the best validation accuracy.", ""], {}
    for c in correlations:
        shown = {v: (rates[FULL if v == tuned else v], cases(v, c)) for v in (*PARTS, tuned)}
        page += _compared(runs, c, shown, numbers)
    for name in ("alpha", "lambda"):
        rows = []
        for (k, x), case in swept.items():
            if k == name:
                m = runs.metrics(case)
                columns = ("validation_accuracy", "id_accuracy", "ood_accuracy")
                rows.append([str(x), *(f"{100 * m[column]:.1f}" for column in columns)])
                numbers[f"{name} {x}"] = m
        page += [f"## {name} of FedGID, correlation {strongest}, seed 0, in %", ""]
        page += [table([name, "validation", "ID accuracy", "OOD accuracy"], rows), ""]
    if runs.study.full:
        page += full_set(runs, rates, numbers)
    return "\n".join(page), numbers


def full_set(runs: FedGIDRuns, rates: Mapping[str, float], numbers: dict[str, Any]) -> list[str]:
    """FedAvg and FedGID on all training samples, one seed."""
    first, settings = runs.study.correlations[0], dict(runs.study.full or {})
    cases = {v: runs.variant(v, first, rates[v], 0, settings) for v in ("FedAvg", FULL)}
    runs.run(cases.values())
    rows = []
    for v, case in cases.items():
        m = runs.metrics(case)
        numbers[f"{v}, all training samples"] = m
        rows.append([v, *(f"{100 * m[name]:.2f}" for name in ("ood_accuracy", "id_accuracy", "ood_gradcam_in_object"))])
    schedule = f"{settings['rounds']} rounds of {settings['local_epochs']} epochs"
    title = f"## All training samples, correlation {first}, seed 0, {schedule}, in %"
    return [title, "", table(["variant", "OOD accuracy", "ID accuracy", "Grad-CAM in object, OOD"], rows), ""]


def schedule(runs: FedGIDRuns) -> Section:
    """FedAvg and FedGID with as many epochs in more and shorter rounds, which leave FedAvg less to correct."""
    shorter = runs.study.shorter
    names, c = ("FedAvg", FULL), runs.study.correlations[0]
    rates, numbers = runs.rates(names, shorter), {}
    cases = {v: [runs.variant(v, c, rates[v], seed, shorter) for seed in SEEDS] for v in names}
    runs.run(case for several in cases.values() for case in several)
    lines = _compared(runs, c, {v: (rates[v], cases[v]) for v in names}, numbers)
    note = f"{shorter['rounds']} rounds of {shorter['local_epochs']} epochs."
    return "\n".join([note, "", *lines]), {**numbers, "settings": dict(shorter)}


SECTIONS: Mapping[str, Callable[[FedGIDRuns], Section]] = {"parts": parts, "baselines": baselines, "schedule": schedule}


def main() -> None:
    files = {"colormnist": "the four MNIST files"}
    args = command_line("study_fedgid", (__doc__ or "").split("\n")[0], STUDIES, files, SECTIONS)
    chosen = STUDIES[args.study]
    runs = FedGIDRuns(chosen, args.out, args.workers, {"data_root": args.data_root} if args.data_root else {})
    for section in args.only:
        page, numbers = SECTIONS[section](runs)
        held = numbers.get("settings", chosen.settings)
        settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in held.items())
        about = f"""Made by `python -m benchmarks.studies.study_fedgid {args.study} --only {section}`: {settings};
the rest as `python -m fedkern.run METHOD --data {chosen.name}` sets it.  Learning rates from {chosen.rates}, chosen by
validation accuracy."""
        name = f"fedgid_{args.study}" + ("" if section == "parts" else f"_{section}")
        publish(name, f"FedGID on {chosen.name}", about, page, numbers, runs.versions())


if __name__ == "__main__":
    main()
