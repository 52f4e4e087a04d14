"""Every method under one classifier: what is the fusion's doing, and what the calibration's.

The main table calibrates each method as its own option does: FuseFL's classifier reads the mean of its branches'
features, the ensemble's all members' side by side.  Here both get both, at two learning rates of the calibration, and
the network averaged over many rounds, which the main table does not calibrate, the same on its only features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.studies.fusefl_runs import CALIBRATED, PUBLISHED, REFERENCE, SEEDS, FuseFLRuns
from benchmarks.studies.recalibrate import Classifier, Pool, recalibrate
from benchmarks.studies.study import Case, spread, table

RATES = (0.01, 0.1)
"""Learning rates of the calibration: FuseFL's own, and one that its few passes get further with."""
POOLS: Mapping[Pool, str] = {"mean": "the branches' mean", "concat": "all side by side"}
BOTH = ("FuseFL", "ensemble")
LONGER = 3


def alike(runs: FuseFLRuns) -> tuple[str, dict[str, Any]]:
    """All under the same classifiers at every heterogeneity; the two with more clients, deeper, trained longer."""
    rates, alphas, numbers = runs.rates(), runs.study.alphas, {}

    def case(name: str, alpha: float, seed: int) -> Case:
        if name == REFERENCE:
            return runs.reference(alpha, rates[name, PUBLISHED], seed)
        return runs.one_shot(name, alpha, rates[name, CALIBRATED], seed)

    names = (*BOTH, REFERENCE)
    main = {(name, alpha): [case(name, alpha, seed) for seed in SEEDS] for name in names for alpha in alphas}
    others = _others(runs)
    runs.run([*(case for row in main.values() for case in row), *(case for row in others.values() for case in row)])

    rows = []
    for name in names:
        for one in _classifiers("full"):
            if name not in BOTH and one.pool != "concat":
                continue  # of one branch both are the same
            by_alpha = [_accuracies(runs, main[name, alpha], one) for alpha in alphas]
            for alpha, accuracies in zip(alphas, by_alpha, strict=True):
                numbers[f"{name}, {one.name}, alpha {alpha}"] = accuracies
            reads = POOLS[one.pool] if name in BOTH else "one network's features"
            rows.append([name, reads, f"{one.lr:g}", *(spread(accuracies) for accuracies in by_alpha)])
    header = ["method", "the classifier reads", "its lr", *(f"Dirichlet {alpha}" for alpha in alphas)]
    page = f"## Calibrated alike: accuracy, mean ± standard deviation over {len(SEEDS)} seeds, in %\n\n"
    page += table(header, rows) + "\n\n"

    rows = []
    for title, cases in others.items():
        covariance = "diagonal" if title.endswith("clients") else "full"
        row = [title]
        for one in _classifiers(covariance):
            for name, case in zip(BOTH, cases, strict=True):
                (accuracy,) = _accuracies(runs, [case], one)
                numbers[f"{name}, {title}, {one.name}"] = accuracy
                row.append(f"{100 * accuracy:.1f}")
        rows.append(row)
    header = ["", *(f"{name}, {POOLS[c.pool]}, {c.lr:g}" for c in _classifiers("full") for name in BOTH)]
    page += "Local learning rates are the main table's: chosen with FuseFL's classifier on the mean, the ensemble's on "
    page += f"all; for {REFERENCE}, not calibrated.\n\n"
    page += f"## More clients, deeper, longer: Dirichlet {alphas[0]}, seed 0, in %\n\nWith more clients covariances "
    page += f"are diagonal.  Longer: {LONGER} times the epochs.\n\n{table(header, rows)}\n"
    return page, numbers


def _others(runs: FuseFLRuns) -> dict[str, Sequence[Case]]:
    """FuseFL's and the ensemble's runs by what is changed."""
    rates, alpha, study = runs.rates(), runs.study.alphas[0], runs.study
    model, width = study.deep
    deep = {"model": model, "width": width}
    epochs = LONGER * study.settings["local_epochs"]

    def case(name: str, **changes: Any) -> Case:
        return runs.one_shot(name, alpha, rates[name, CALIBRATED], 0, **changes)

    cases = {f"{m} clients": [case(name, clients=m, covariance="diagonal") for name in BOTH] for m in study.many}
    whole = case("ensemble", **deep)
    for k in (2, 4, 8):
        cases[f"{model} of width {width}, K = {k}"] = [case("FuseFL", **deep, blocks=k, adaptor="cnn1x1"), whole]
    cases[f"{epochs} epochs"] = [case(name, local_epochs=epochs) for name in BOTH]
    return cases


def _classifiers(covariance: str) -> list[Classifier]:
    return [Classifier(pool, lr, covariance) for pool in POOLS for lr in RATES]


def _accuracies(runs: FuseFLRuns, cases: Sequence[Case], one: Classifier) -> list[float]:
    every = _classifiers(one.covariance)  # all at once: a run's features are computed once
    return [recalibrate(runs.folder / case.name, every)[one.name]["accuracy"] for case in cases]
