"""The evidence for FuseFL: does progressive fusion beat its baselines, and what does each of its parts do.

    python -m benchmarks.studies.study_fusefl digits                      # embedded data
    python -m benchmarks.studies.study_fusefl cifar10 --data-root DIR     # the official binary files

``--only SECTION ...`` runs some of the sections: ``table`` (all baselines, three heterogeneities, three seeds),
``datafree``, ``alike`` (all under the same classifiers; more clients, more blocks), ``edges`` (learning rates beyond
the grid).  Each goes on where it was interrupted and writes
``benchmarks/studies/results/fusefl_<study>_<section>.md``, ``.json``.

``fedkern reproduce fusefl`` plays every method at its own and at the other's width, and
``fedkern reproduce benchmarks/studies/fusefl_parts.toml`` every part changed alone, and all as in the released code.

Most sections take an hour or less on two cores; ``alike`` takes longer.

All one-shot methods train equally long on the same split.  Calibration is a part of FuseFL and not of its baselines, so
there are two columns: as published, and with every method's classifier calibrated alike.  The learning rate of a method
in a column comes from the same grid, by the accuracy of that column on the validation split at the middle heterogeneity
(seed 0) alone; ``table`` runs that grid, the other sections take the rates from its results where these are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.studies.fusefl_alike import alike
from benchmarks.studies.fusefl_runs import (
    CALIBRATED,
    GENERATOR,
    LINKS,
    ONE_SHOT,
    PUBLISHED,
    REFERENCE,
    SAID,
    SEEDS,
    STUDIES,
    Column,
    FuseFLRuns,
    Study,
)
from benchmarks.studies.level_probe import probe
from benchmarks.studies.study import (
    RATES_HEADER,
    Case,
    beyond,
    run_sections,
    spread,
    table,
    transfer_seconds,
    tried_rates,
)

Section = tuple[str, dict[str, Any]]


def main_table(runs: FuseFLRuns) -> Section:
    """All baselines at every heterogeneity: both columns, bytes, memory, and probes of every level."""
    rates = runs.rates(anew=True)

    def case(name: str, alpha: float, seed: int, column: Column) -> Case:
        lr = rates[name, column]
        return runs.reference(alpha, lr, seed) if name == REFERENCE else runs.one_shot(name, alpha, lr, seed)

    names, columns = (*ONE_SHOT, REFERENCE), (PUBLISHED, CALIBRATED)
    runs.run(case(n, a, s, c) for a in runs.study.alphas for n in names for s in SEEDS for c in columns)
    page, numbers = "", {}
    for alpha in runs.study.alphas:
        rows = []
        for name in names:
            row = [name]
            for column in columns:
                records = [runs.record(case(name, alpha, seed, column), column) for seed in SEEDS]
                numbers[f"{name}, alpha {alpha}, {column}"] = {"lr": rates[name, column], "runs": records}
                missing = column == CALIBRATED and name == REFERENCE
                row += ["", ""] if missing else [str(rates[name, column]), spread([r["accuracy"] for r in records])]
            rows.append([*row, *_otherwise(runs, name, [case(name, alpha, s, CALIBRATED) for s in SEEDS])])
        header = ["method", "lr", PUBLISHED, "lr", CALIBRATED, "before calibration", *VOTES]
        page += f"## Dirichlet {alpha}: accuracy, mean ± standard deviation over {len(SEEDS)} seeds, in %\n\n"
        page += table(header, rows) + "\n\n"
    page += _cost(runs, {name: case(name, runs.study.alphas[0], 0, PUBLISHED) for name in names})
    page += "\n## Linear probe of every level (K = 2), Dirichlet "
    page += f"{runs.study.alphas[0]}, seed 0, accuracy in %\n\nFeatures averaged over positions and clients; logistic "
    page += "regression on all training images.\n\n"
    rows = []
    for name in names:
        accuracies = probe(runs.folder / case(name, runs.study.alphas[0], 0, PUBLISHED).name, blocks=2)
        numbers[f"{name}, probes"] = accuracies
        rows.append([name, *(f"{100 * value:.1f}" for value in accuracies)])
    return page + table(["method", "level 1", "level 2"], rows) + "\n", numbers


VOTES: Mapping[str, str] = {"vote": "vote_accuracy", "mean probability": "probability_accuracy"}
"""Other ways in which an ensemble answers, and their figures."""


def _otherwise(runs: FuseFLRuns, name: str, cases: list[Case]) -> list[str]:
    """What was before calibration, and an ensemble's vote and mean probability."""
    cells = ["" if name == REFERENCE else spread([runs.uncalibrated(case) for case in cases])]
    for figure in VOTES.values():
        values = [runs.record(case, PUBLISHED).get(figure) for case in cases]
        cells.append(spread([value for value in values if value is not None]) if values[0] is not None else "")
    return cells


def _cost(runs: FuseFLRuns, cases: Mapping[str, Case]) -> str:
    """Bytes, their transfer times and memory of each case, calibrated and not."""
    rows = []

    def row(title: str, case: Case, up: float, down: float) -> None:
        ratio = runs.metrics(case).get("memory_ratio")
        rows.append([title, *_transfer(up, down), "1.00" if ratio is None else f"{ratio:.2f}"])

    for name, case in cases.items():
        if case.name.startswith("fusefl"):  # its calibration is a part of it
            record = runs.record(case, CALIBRATED)
            row(f"{name}, not calibrated", case, record["levels_up_bytes"] / 1e6, record["levels_down_bytes"] / 1e6)
            row(f"{name}, calibrated", case, *runs.megabytes(case, CALIBRATED))
            continue
        for column in (PUBLISHED,) if name == REFERENCE else (PUBLISHED, CALIBRATED):
            row(f"{name}, {column}", case, *runs.megabytes(case, column))
    header = ["method", *TRANSFER, "memory"]
    title = "## Cost: bytes of a client, their transfer, memory of the model beside one of the same width\n\n"
    return f"{title}{table(header, rows)}\n"


TRANSFER = ("MB up", "MB down", *(f"s at {link} Mbit/s" for link in LINKS))


def _transfer(up: float, down: float) -> list[str]:
    """The cells under :data:`TRANSFER` of so many megabytes."""
    return [f"{up:.3f}", f"{down:.3f}", *(f"{transfer_seconds((up + down) * 1e6, link):.2f}" for link in LINKS)]


def datafree(runs: FuseFLRuns) -> Section:
    """Distillation of the ensemble, FedDF on public and on generated images and DENSE, beside what is distilled."""
    rates, alpha, numbers = runs.rates(), runs.study.alphas[0], {}
    lr = rates["ensemble", PUBLISHED]
    distilled = runs.distilled(alpha, lr, 0)
    columns = (PUBLISHED, CALIBRATED)
    cases = {(name, column): case for name, case in distilled.items() for column in columns}
    cases |= {(n, column): runs.one_shot(n, alpha, rates[n, column], 0) for n in ONE_SHOT for column in columns}
    runs.run(cases.values())
    rows = []
    for name in (*distilled, *ONE_SHOT):
        row = [name]
        for column in columns:
            record = runs.record(cases[name, column], column)
            used = lr if name in distilled else rates[name, column]
            numbers[f"{name}, {column}"] = {"lr": used, **record}
            row += [str(used), f"{100 * record['accuracy']:.1f}"]
        levels = numbers[f"{name}, probes"] = probe(runs.folder / cases[name, PUBLISHED].name, blocks=2)
        row += _transfer(*runs.megabytes(cases[name, PUBLISHED], PUBLISHED))
        rows.append([*row, *(f"{100 * value:.1f}" for value in levels)])
    title = f"## Distillation of the ensemble, Dirichlet {alpha}, seed 0, accuracy in %\n\nWhat is distilled is the "
    title += f"as-published ensemble, so its learning rate ({lr}) is that of the distilled networks in both columns; "
    title += f"they are not averaged over seeds.  Generators: {', '.join(f'{k} {v}' for k, v in GENERATOR.items())}; "
    title += "20 batches of images for DENSE, 2,048 images for FedDF.  "
    title += "Transfer and linear probes of both levels are those of the as-published column.\n\n"
    header = ["method", "lr", PUBLISHED, "lr", CALIBRATED, *TRANSFER, "probe, level 1", "level 2"]
    return title + table(header, rows) + "\n", numbers


def edges(runs: FuseFLRuns) -> Section:
    """One learning rate further where the main table's is the edge of its grid."""
    rates, grid, numbers, rows = runs.rates(), runs.study.rates, {}, []
    alpha = runs.study.alphas[len(runs.study.alphas) // 2]
    tried = {(name, column): [rates[name, column], *beyond(rates[name, column], grid)] for name, column in rates}
    tried = {key: lrs for key, lrs in tried.items() if len(lrs) > 1 and key[0] != REFERENCE}
    cases = {(name, lr): runs.one_shot(name, alpha, lr, 0) for (name, _), lrs in tried.items() for lr in lrs}
    runs.run(cases.values())
    for (name, column), lrs in tried.items():
        records = {lr: runs.record(cases[name, lr], column) for lr in lrs}
        row, numbers[f"{name}, {column}"] = tried_rates(f"{name}, {column}", records)
        rows.append(row)
    return f"## Dirichlet {alpha}, seed 0\n\n{table(RATES_HEADER, rows)}\n", numbers


SECTIONS: Mapping[str, Callable[[FuseFLRuns], Section]] = {
    "table": main_table,
    "datafree": datafree,
    "alike": alike,
    "edges": edges,
}


def about(study: Study) -> str:
    return f"""; K = 2 and
FuseFL's width over the root of the clients unless it says otherwise; multi-round FedAvg spends the same epochs in
{study.rounds} rounds.  Learning rates from {study.rates}, chosen per column by validation accuracy;
figures "before calibration" are those of the calibrated runs, at their learning rates.
{SAID[study.settings["data"]]}"""


if __name__ == "__main__":
    run_sections("fusefl", "FuseFL", __doc__ or "", STUDIES, SECTIONS, FuseFLRuns, about)
