"""Where each of the five methods is the right tool: gains over FedAvg and the nearest rival, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.page import by_seed, decimal, load
from benchmarks.recorded import UNRECORDED
from benchmarks.studies.study import RESULTS, table
from fedkern.comparison.seed_statistics import paired
from fedkern.tasks.figure_names import direction

NOT_PLAYED = "not played"
WHY = ("method", "the right tool where")
GAINS = ("compared", "as published, over FedAvg", "ours, over FedAvg", "over the nearest rival", "commit, day")
COST = ("cost", "elsewhere")


@dataclass(frozen=True)
class Sample:
    """A figure by seed, the larger the better; how many times it is shown; commit and day of its runs."""

    values: Mapping[int, float]
    scale: float
    made: str


@dataclass(frozen=True)
class Contest:
    """A method, or its variant of a name, beside another one; None: not all runs are finished."""

    own: Sample | None
    other: Sample | None
    rival: str
    variant: str = ""

    @property
    def made(self) -> list[str]:
        """Commit and day of both, where both are played."""
        return [] if self.own is None or self.other is None else [self.own.made, self.other.made]

    def gain(self) -> str:
        """The mean difference, paired by seed, with its 95 % interval; above 0: the method is better."""
        if self.own is None or self.other is None:
            gain = NOT_PLAYED
        else:
            difference = paired(self.own.values, self.other.values)
            assert difference is not None, f"no seed in common with {self.rival}"
            digits = 1 if self.own.scale == 100 else 2
            mean, low, high = (
                "" if each is None else decimal(self.own.scale * each, digits, "+")
                for each in (difference.mean, difference.low, difference.high)
            )
            gain = f"{mean} [{low}, {high}]" if low else f"{mean}, one seed"
        return ", ".join(filter(None, (f"{self.variant}: {gain}" if self.variant else gain, self.rival)))


@dataclass(frozen=True)
class Setting:
    """What is compared, on which data, and the contests: as published, our variant, if any, and with the rival."""

    figure: str
    published: Contest
    rival: Contest
    ours: Contest | None = None

    @property
    def contests(self) -> list[Contest]:
        """All contests."""
        return [each for each in (self.published, self.ours, self.rival) if each is not None]

    def cells(self) -> list[str]:
        """The texts below :data:`GAINS`."""
        made = "; ".join(dict.fromkeys(made for each in self.contests for made in each.made))
        ours = "" if self.ours is None else self.ours.gain()
        return [self.figure, self.published.gain(), ours, self.rival.gain(), made]


@dataclass(frozen=True)
class Tool:
    """A method: its page below docs/, where it is the right tool, its cost beside FedAvg, and what is better elsewhere.

    ``settings``: of those with most contests played the first is shown.
    """

    name: str
    page: str
    right: str
    settings: Sequence[Setting]
    cost: str
    elsewhere: str

    @property
    def setting(self) -> Setting:
        """The setting that is shown: the first with most contests played."""
        return max(self.settings, key=lambda each: sum(bool(contest.made) for contest in each.contests))


def reproduced(paper: str, cell: str) -> Sample | None:
    """A cell's figure in the results of ``reproduce --json``; None where it was not played."""
    name = f"reproduction_{paper}"
    rows = load(name)["rows"] if (RESULTS / f"{name}.json").exists() else []
    row = next((each for each in rows if each["name"] == cell and each["ours"] is not None), None)
    if row is None:
        return None
    falls = direction(row["figure"], {}) == "min"
    commits = ", ".join(f"`{build.partition(' ')[2]}`" for build in row["fedkern"].split(", "))
    made = f"{commits}, {row.get('date', 'no day')}"
    return Sample({seed: -value if falls else value for seed, value in by_seed(row).items()}, 1 if falls else 100, made)


def sent(paper: str, cell: str, clients: int) -> float:
    """Megabytes of a client in both directions, mean of a cell's runs."""
    row = next(each for each in load(f"reproduction_{paper}")["rows"] if each["name"] == cell)
    return float(row["bytes"]) / clients / 1e6


def studied(name: str, *path: str, figure: str = "") -> Sample:
    """Fractions by seed at a path in a study's results; ``figure``: that of the runs that stand there."""
    content: Any = load(name)
    made = content["versions"]["commit"]
    for key in path:
        content = content[key]
    values = [run[figure] for run in content] if figure else content
    return Sample(dict(enumerate(values)), 100, made if made == UNRECORDED else f"`{made}`, no day")


def in_full(at: str = "../") -> list[str]:
    """The table of docs/methods/README.md; ``at``: the way to docs/."""
    rows = [
        [f"[{each.name}]({at}{each.page})", each.right, *each.setting.cells(), each.cost, each.elsewhere]
        for each in tools()
    ]
    return _text([*WHY, *GAINS, *COST], rows)


def in_short(at: str = "docs/") -> list[str]:
    """The table of README.md: gains alone."""
    return _text([WHY[0], *GAINS], [[f"[{each.name}]({at}{each.page})", *each.setting.cells()] for each in tools()])


def _text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    first, _, *lines = table(header, rows).split("\n")
    text = "Mean differences, paired by seed, in brackets 95 % intervals of Student's t; above 0, the method is better."
    return [text, "", first, "|---" * len(header) + "|", *lines]


def tools() -> list[Tool]:
    """The five methods."""
    return [_fedgid(), _fusefl(), _fedlpfm(), _fediod(), _feddra()]


def _fedgid() -> Tool:
    def cell(name: str) -> Sample | None:
        return reproduced("fedgid", f"ColorMNIST 0.8: {name}")

    def earlier(name: str, kind: str = "") -> Sample:
        return studied(f"fedgid_colormnist{kind}", f"{name}, correlation 0.8", "runs", figure="ood_accuracy")

    figure, both, average = "accuracy on other backgrounds, points; ColorMNIST, 0.8", "FedGID (+GI map +GD)", "FedAvg"
    return Tool(
        "FedGID", "fedgid.md", "backgrounds mislead, and masks tell the object from the background",
        [
            Setting(
                figure, Contest(cell("both: as published"), cell(average), ""),
                Contest(cell("image with GD"), cell("FedAvg with jitter"), "FedAvg with channel jitter"),
                Contest(cell("image with GD"), cell(average), "", "`intervene=image`"),
            ),
            Setting(
                figure, Contest(earlier(both), earlier(average), ""),
                Contest(earlier(both, "_baselines"), earlier("FedDyn", "_baselines"), "FedDyn"),
                Contest(earlier("FedGID, lambda 3.0"), earlier(average), "", "lambda 3"),
            ),
        ],
        "the same bytes; every batch also passes the received network, and the last stages of its own, or with "
        "`intervene=image` all of them, a second time",
        "channel jitter, where colours alone mislead",
    )  # fmt: skip


def _fusefl() -> Tool:
    width = "fusefl_cifar10_width"
    parameters = [load(width)[f"{name}, width 7"]["parameters"] for name in ("FuseFL", "one-shot FedAvg")]
    figure, others = "accuracy, points; CIFAR-10, Dirichlet 0.1, five clients", ("one-shot FedAvg", "ensemble")
    rivals = ("one-shot, of equal upload", "an ensemble of equal memory")
    played = [Contest(reproduced("fusefl", "FuseFL of width 7"), reproduced("fusefl", f"{other} of width 7"), rival)
              for other, rival in zip(others, rivals, strict=True)]  # fmt: skip
    earlier = [
        Contest(*(studied(width, f"{name}, width 7", "calibrated") for name in ("FuseFL", other)), rival)
        for other, rival in zip(others, rivals, strict=True)
    ]
    return Tool(
        "FuseFL", "fusefl.md", "there is one round, and uploads must be as small as one narrow network",
        [Setting(figure, *played), Setting(figure, *earlier)],
        f"the upload of one-shot FedAvg, {parameters[0] / parameters[1]:.1f} times the parameters at inference",
        "an ensemble, where uploads may have its size; FedAvg, where there are rounds",
    )  # fmt: skip


def _fedlpfm() -> Tool:
    def cell(name: str) -> Sample | None:
        return reproduced("fedlpfm", f"two classes a client: {name}")

    return Tool(
        "Fed-LPFM", "fedlpfm.md", "clients see few classes, and a teacher was trained on images like theirs",
        [Setting(
            "accuracy, points; CIFAR-10, two classes a client, EfficientNet-Lite0 as teacher",
            Contest(cell("Fed-LPFM"), cell("FedAvg"), ""),
            Contest(cell("Fed-LPFM"), cell("FedCGS"), "FedCGS on the teacher's features"),
        )],
        "the same bytes; every client runs the teacher once over its images",
        "the teacher's own features, where clients can run the teacher at inference; public labelled images, where "
        "there are any",
    )  # fmt: skip


def _fediod() -> Tool:
    def cell(name: str) -> Sample | None:
        return reproduced("fediod", f"MNIST: {name}")

    sizes = [f"{sent('fediod', f'MNIST: {name}', clients=5):,.1f}" for name in ("FedIOD", "FedAvg in ten rounds")]
    return Tool(
        "FedIOD", "fediod.md", "networks differ or stay private, class counts may be told, and no public images exist",
        [Setting(
            "accuracy, points; MNIST, Dirichlet 0.1, five clients",
            Contest(cell("FedIOD"), cell("FedAvg in ten rounds"), "ten rounds"),
            Contest(cell("FedIOD"), cell("FedDF with counts"), "FedDF told the class counts"),
        )],
        f"{sizes[0]} MB a client in both directions, FedAvg's ten rounds {sizes[1]} MB",
        "FedDF with `class_weights=counts`, where there are public images; the weighted ensemble, where its size is no "
        "matter; FedAvg, where there are rounds",
    )  # fmt: skip


def _feddra() -> Tool:
    def cell(name: str) -> Sample | None:
        return reproduced("feddra", f"10 %: worst loss: {name}")

    return Tool(
        "FedDRA", "feddra.md", "images have texts, and the worst client counts more than the mean",
        [Setting(
            "the worst client's loss, nats less; captions, a noisier minority of a tenth",
            Contest(cell("FedDRA: two stages"), cell("FedAvg uniform"), ""),
            Contest(cell("robust weights"), cell("FedProx"), "FedProx"),
            Contest(cell("robust weights"), cell("FedAvg uniform"), "", "robust weights alone"),
        )],
        "with both stages the alignment modules travel twice a round; clients judge the model on held samples",
        "FedAvg with `weighting=uniform`, which has not been told from it",
    )  # fmt: skip
