"""The evidence for FedIOD: does its student beat teachers and baselines, what does each part do, what is private.

    python -m benchmarks.studies.study_fediod digits                      # embedded data
    python -m benchmarks.studies.study_fediod mnist --data-root DIR       # the four IDX files
    python -m benchmarks.studies.study_fediod cifar10 --data-root DIR     # the official binary files

``--only SECTION ...`` runs some of the sections: ``table`` (every baseline on the same teachers, two heterogeneities,
three seeds), ``clients`` (how many, and how fast the student learns), ``privacy`` (accuracy and membership attack
against epsilon) and ``bytes``.  Each goes on where it was interrupted and writes
``benchmarks/studies/results/fediod_<study>_<section>.md`` and ``.json``.  ``study_fediod_segment`` is the same for
segmentation, and ``fedkern reproduce benchmarks/studies/fediod_terms.toml`` takes every loss term and weight away.

The clients' networks are trained once for every split (``ensemble``) and brought to every other method
(``--teachers``), so that all distil or average the same ones.  Settings are chosen by the validation accuracy at seed 0
alone: the learning rate of the clients' training at every heterogeneity, and those of the server, of which every method
that distils has four to choose from, at the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.studies.fediod_runs import AVERAGE, IOD, REFERENCE, IODRuns, Study
from benchmarks.studies.study import JPEG, Case, run_sections, spread, table
from fedkern.privacy.guarantee import EPSILON, PART

SEEDS = (0, 1, 2)

_COMMON = {"clients": 5, "batch_size": 32, "momentum": 0.9, "weight_decay": 3e-4, "grad_cam": 0}
# With the generator at 2e-3 its sigmoid may saturate for good where the discriminators win (MNIST, Dirichlet 0.1, seed
# 2: white images from round 15 of 40 on, a student at chance); at 1e-3 with twice the rounds the same run gives 77 %.
_SMALL = {
    "batch": 32, "ngf": 16, "ndf": 16, "student_steps": 3, "generator_lr": 1e-3, "student_lr": 0.05, "warmup": 0.5,
    "critic_layers": 0, "w_real": 8.0, "w_balance": 2.0,
}  # fmt: skip
# A generator drawn anew for every batch, as published, makes noise in 10 steps (MNIST: students of 15 to 18 %, of 69 %
# without): it goes on learning here.
_FREE = {
    "ngf": 16, "generator_steps": 10, "synthesis_batch": 128, "distill_epochs": 30, "distill_batch": 64,
    "restart": False,
}  # fmt: skip
STUDIES = {
    "digits": Study(
        {"data": "digits", **_COMMON, "model": "resnet8", "width": 8, "public_samples": 200, "local_epochs": 20},
        30, 10, 10, iod={**_SMALL, "generator_lr": 2e-3}, free=_FREE, many=(2, 5, 10),
        private={"model": "resnet8-gn"}, shards=5,
    ),
    "mnist": Study(
        {
            "data": "mnist", **_COMMON, "train_samples": 10000, "public_samples": 1000, "test_samples": 5000,
            "validation_samples": 1000, "model": "resnet8", "width": 8, "local_epochs": 10,
        },
        40, 30, 10, iod=_SMALL, free=_FREE, private={"model": "resnet8-gn"},
    ),
    "cifar10": Study(
        {
            "data": "cifar10", **_COMMON, "train_samples": 10000, "public_samples": 1000, "test_samples": 2000,
            "validation_samples": 1000, "model": "resnet8", "width": 8, "local_epochs": 10,
        },
        40, 30, 10, iod=_SMALL, free={**_FREE, "synthesis_batch": 64, "distill_batch": 32},
        private={"model": "resnet8-gn"},
    ),
}  # fmt: skip

Section = tuple[str, dict[str, Any]]


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
    for (alpha, seed), networks in teachers.items():
        for name in study.students:
            cases[name, alpha, seed] = runs.student(name, networks, alpha, seed)
        cases[AVERAGE, alpha, seed] = runs.brought("oneshot-fedavg", networks, alpha, seed, {})
        cases[REFERENCE, alpha, seed] = runs.reference(alpha, runs.rate(REFERENCE, alpha), seed)
    runs.run(cases.values())
    page, numbers = "", {}
    for alpha in study.alphas:
        values = {name: [runs.metrics(cases[name, alpha, s])[study.figure] for s in SEEDS] for name in _names(cases)}
        for name, figure in FROM_IOD.items():
            values[name] = [runs.metrics(cases[IOD, alpha, s])[figure] for s in SEEDS]
        rates = {name: shown(runs.chosen(name)) for name in study.students}
        rates[REFERENCE] = shown({"lr": runs.rate(REFERENCE, alpha)})
        rows = [[name, rates.get(name, ""), spread(values[name])] for name in _order(values)]
        lr = runs.rate("teachers", alpha)
        title = f"## {study.partition(alpha)}: {study.figure} in %, mean ± standard deviation over {len(SEEDS)} seeds; "
        page += f"{title}teachers' learning rate {lr}\n\n{table(['', 'settings chosen', study.figure], rows)}\n\n"
        numbers[study.partition(alpha)] = {study.figure: values, "rates": rates, "teachers": lr}
    page += "The best teacher is chosen by these very figures, which nobody in the federation could do.\n"
    return page, numbers


def shown(settings: Mapping[str, Any]) -> str:
    words = {True: "on", False: "off"}
    return ", ".join(
        f"{name.replace('_', ' ')} {words[value] if isinstance(value, bool) else f'{value:g}'}"
        for name, value in settings.items()
    )


def _names(cases: Mapping[tuple[str, Any, int], Case]) -> list[str]:
    return list(dict.fromkeys(name for name, _, _ in cases))


def _order(names: Mapping[str, Any]) -> list[str]:
    first = [IOD, *FROM_IOD, AVERAGE]
    return [*first, *(name for name in names if name not in first)]


def clients(runs: IODRuns) -> Section:
    """More clients on the same samples: the end, and the way there."""
    alpha, numbers = runs.study.alphas[0], {}
    usual = runs.study.settings["clients"]
    changes = {count: {"clients": count} if count != usual else {} for count in runs.study.many}
    teachers = {count: runs.trained(alpha, 0, **own) for count, own in changes.items()}
    runs.run(teachers.values())
    cases = {count: runs.iod(own, alpha, 0, **changes[count]) for count, own in teachers.items()}
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


def reached(private: Mapping[str, Any] | None) -> str:
    """A run's epsilon; "of a part" where not all that clients release is covered."""
    if not private:
        return "∞"
    return f"{private[EPSILON]:.3g}" if EPSILON in private else f"{private[PART]:.3g} of a part"


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
    for kind, settings in kinds.items():
        for target in TARGETS:
            # The study can be repeated, which is for once worth more than bits that nobody knows.
            noise = {} if target is None else {"epsilon": target, "shards": study.shards, "noise": "seed", **settings}
            trains = target is not None and "teacher_dp" in settings
            cases[kind, target] = runs.iod(teachers, alpha, 0, own=trains, **study.private, **quiet, **noise)
    runs.run(cases.values())
    rows = []
    for (kind, target), case in cases.items():
        metrics, private = runs.metrics(case), runs.summaries[case.name].get("privacy")
        entry = numbers[f"{kind}, epsilon {target}"] = {"metrics": dict(metrics)}
        # Private records do not tell of teachers that are not covered: they are those of the run without privacy.
        teacher = metrics.get("mean_teacher", runs.metrics(cases[kind, None])["mean_teacher"])
        row = [kind, reached(private), *(f"{100 * figure:.1f}" for figure in (metrics["accuracy"], teacher))]
        if target is not None:
            entry["privacy"] = private
        if target in ATTACKED:
            entry["attack"] = attack = runs.attack(case)
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
    cases = {
        "FedIOD, fp32 images": runs.iod(teachers, alpha, 0),
        "FedIOD, uint8 images": runs.iod(teachers, alpha, 0, pixels="uint8"),
        "outputs on public images": runs.iod(teachers, alpha, 0, mode="public"),
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
        rows.append([name, f"{up:.3f}", f"{down:.3f}", iteration, f"{100 * accuracy:.1f}"])
    header = ["", "MB up per client", "MB down", "kB per iteration", "accuracy, %"]
    title = f"## Bytes, Dirichlet {alpha}, seed 0\n\nFedIOD saves privacy, not bytes.\n\n"
    return title + table(header, rows) + "\n", numbers


SECTIONS: Mapping[str, Callable[[IODRuns], Section]] = {
    "table": main_table,
    "clients": clients,
    "privacy": privacy,
    "bytes": bytes_,
}


PUBLISHED = {
    "cifar10": f"  {JPEG} (CIFAR-10 at full size: 82.78 %, CIFAR-100: 45.36 %).",
    "segmentation": "  Published, on BraTS: Dice 75.38 %.",
}


def about(study: Study) -> str:
    free = f" data-free baselines: {_listed(study.free)};" if study.free else ""
    return f"""; FedIOD: {study.rounds} rounds of {study.iterations} iterations, {_listed(study.iod)};{free} multi-round
FedAvg spends the teachers' epochs in {study.reference_rounds} rounds.  Settings by validation at
seed 0.{PUBLISHED.get(study.settings["data"], "")}"""


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


if __name__ == "__main__":
    run_sections("fediod", "FedIOD", __doc__ or "", STUDIES, SECTIONS, IODRuns, about)
