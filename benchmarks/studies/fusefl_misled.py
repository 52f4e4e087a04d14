"""Clients that mislead: a shape that tells the class, a backdoored client, and one whose uploads cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.fusefl_runs import CALIBRATED, ONE_SHOT, PUBLISHED, REFERENCE, SEEDS, Column, FuseFLRuns
from benchmarks.studies.study import Case, spread, table
from fedkern.data import normalise
from fedkern.downstream.saved_network import read_model
from fedkern.models import Ensemble
from fedkern.settings.run_data import kept_data, load_data
from fedkern.settings.stored import load_settings

Section = tuple[str, dict[str, Any]]
BOTH: tuple[Column, ...] = (PUBLISHED, CALIBRATED)
OWN = {name: (PUBLISHED,) if name == "FuseFL" else BOTH for name in ONE_SHOT}
"""The columns of every one-shot method that differ: FuseFL is calibrated in both."""
DISTILLED = ("FedDF, public images", "DENSE")


def cue(runs: FuseFLRuns) -> Section:
    """On two of the clients a shape tells the class: what becomes of the accuracy where it does not."""
    rates, alpha, numbers = runs.rates(), runs.study.alphas[-1], {}

    def one(name: str, seed: int, column: Column) -> Case:
        run = runs.reference if name == REFERENCE else partial(runs.one_shot, name)
        return run(alpha, rates[name, column], seed, cue_clients=2)

    cases = {
        (n, c): [one(n, seed, c) for seed in SEEDS]
        for n, columns in {**OWN, REFERENCE: BOTH[:1]}.items()
        for c in columns
    }
    lr = rates["ensemble", PUBLISHED]
    distilled = runs.distilled(alpha, lr, SEEDS[0], cue_clients=2)
    cases |= {(name, column): [distilled[name]] for name in DISTILLED for column in BOTH}
    runs.run(case for several in cases.values() for case in several)
    rows = []
    for (name, column), several in cases.items():
        records, rate = [runs.record(case, column) for case in several], rates.get((name, column), lr)
        numbers[f"{name}, {column}"] = {"lr": rate, "runs": records}
        drops = [r["cue_tied_accuracy"] - r["cue_random_accuracy"] for r in records]
        kinds = ("accuracy", "cue_tied_accuracy", "cue_random_accuracy")
        figures = [*(spread([r[kind] for r in records]) for kind in kinds), spread(drops)]
        rows.append([f"{name}, {column}", str(rate), *figures])
    header = ["method", "lr", "no shape", "shape of the class", "random shape", "drop"]
    title = f"## Spurious cue on 2 clients, Dirichlet {alpha}, {len(SEEDS)} seeds: accuracy in %\n\n"
    title += "One seed for what is distilled, whose learning rate is that of the networks distilled.\n\n"
    return title + table(header, rows) + "\n", numbers


def backdoor(runs: FuseFLRuns) -> Section:
    """One client's blocks are backdoored: how often its patch succeeds, and what is left of the clean accuracy."""
    rates, alpha, numbers = runs.rates(), runs.study.alphas[-1], {}
    wanted = [(name, column) for name, columns in OWN.items() for column in columns]

    def cases(name: str, column: Column, **changes: Any) -> list[Case]:
        return [runs.one_shot(name, alpha, rates[name, column], seed, **changes) for seed in SEEDS]

    clean = {key: cases(*key) for key in wanted}
    attacked = {key: cases(*key, backdoor_clients=1) for key in wanted}
    runs.run(case for of in (clean, attacked) for several in of.values() for case in several)
    rows = []
    for name, column in wanted:
        before, after = ([runs.record(c, column) for c in of[name, column]] for of in (clean, attacked))
        control = _controls(runs, clean[name, column], column)
        numbers[f"{name}, {column}"] = {
            "lr": rates[name, column], "clean": before, "backdoored": after, "patch on clean models": control,
        }  # fmt: skip
        rows.append([
            f"{name}, {column}", str(rates[name, column]), spread([r["accuracy"] for r in before]),
            spread(control) if control else "", spread([r["accuracy"] for r in after]),
            spread([r["backdoor_accuracy"] for r in after]),
        ])  # fmt: skip
    header = ["method", "lr", "accuracy, nobody backdoored", "patch makes class 0", "accuracy", "attack succeeds"]
    title = f"## One of the clients backdoored, Dirichlet {alpha}, {len(SEEDS)} seeds, in %\n\n"
    title += "Half of client 0's images carry a white patch of 4x4 pixels and the label of class 0.  "
    title += "The attack succeeds on a test image of any other class when the patch makes it class 0; "
    title += "the column before it is the same for "
    title += "models of clients nobody of whom is backdoored.\n\n"
    return title + table(header, rows) + "\n", numbers


def _controls(runs: FuseFLRuns, cases: Sequence[Case], column: Column) -> list[float]:
    """How often the patch makes clean models say class 0; nothing where the column's classifier is not kept."""
    values = [patched(runs.folder / case.name, calibrated=column == CALIBRATED) for case in cases]
    return [value for value in values if value is not None]


@torch.no_grad()
def patched(folder: Path, *, calibrated: bool, target: int = 0, size: int = 4, batch: int = 500) -> float | None:
    """The share of a finished run's test images of other classes that are said to be ``target`` under the patch.

    Args:
        folder: the run.
        calibrated: with the calibrated classifier of a baseline; FuseFL has only one.  None comes back where the
            classifier before calibration is asked for and the run has not kept it.
        target, size: of the attack, as in :func:`fedkern.data.sharing.backdoor.add_backdoor`.
        batch: images at a time.
    """
    config = load_settings(folder)
    network, about = read_model(folder)
    if config.method != "fusefl" and not calibrated:
        if not isinstance(network, Ensemble):
            return None
        network.head = None  # its members' mean logits
    attack = {"backdoor_clients": 1, "backdoor_target": target, "backdoor_size": size}
    config = config.replace(data_options={**config.data_options, **attack})
    data = kept_data(config, load_data(config))
    split = data.tests["backdoor"]  # every label is the target
    said = [network(normalise(part, about["mean"], about["std"])).argmax(1) for part in split.images.split(batch)]
    return float((torch.cat(said) == split.labels).double().mean())


SPOILED = {
    "FuseFL, level 1 holds NaN": ("FuseFL", "nan", "level1"),
    "FuseFL, level 2 of wrong shape": ("FuseFL", "shape", "level2"),
    "FuseFL, level 2 holds NaN": ("FuseFL", "nan", "level2"),
    "ensemble, holds NaN": ("ensemble", "nan", "train"),
    "one-shot FedAvg, holds NaN": ("one-shot FedAvg", "nan", "train"),
}
"""What client 0 uploads in which round."""


def refused(runs: FuseFLRuns) -> Section:
    """An upload of one client cannot be used and is left out: what the others make without it."""
    rates, alpha, numbers, rows = runs.rates(), runs.study.alphas[-1], {}, []
    sound = {n: [runs.one_shot(n, alpha, rates[n, CALIBRATED], seed) for seed in SEEDS] for n in ONE_SHOT}
    spoiled = {
        title: [runs.spoiled(name, kind, round_name, alpha, rates[name, CALIBRATED], seed) for seed in SEEDS]
        for title, (name, kind, round_name) in SPOILED.items()
    }
    runs.run(case for of in (sound, spoiled) for several in of.values() for case in several)
    for title, cases in spoiled.items():
        before, after = (
            [runs.record(case, CALIBRATED)["accuracy"] for case in several]
            for several in (sound[SPOILED[title][0]], cases)
        )
        said = [runs.summaries[case.name]["diagnostics"]["refused-upload-0"] for case in cases]
        numbers[title] = {"sound": before, "refused": after, "said": said}
        rows.append([title, spread(before), spread(after)])
    title = f"## Client 0's upload cannot be used, Dirichlet {alpha}, {len(SEEDS)} seeds: accuracy in %\n\n"
    title += "Calibrated, with --on-nan skip; without it the run stops.  Every run named the upload it left out, "
    title += f"the first: “{numbers['FuseFL, level 1 holds NaN']['said'][0]}”\n\n"
    return title + table(["what is refused", "every upload sound", "one refused"], rows) + "\n", numbers
