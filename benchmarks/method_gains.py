"""Gains of the five methods over others, paired by seed, where each is the right tool, and its cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.page import RESULTS, by_seed, decimal, load, read_rows, table
from fedkern.comparison.seed_statistics import compare_pairs
from fedkern.tasks.figure_names import direction

PUBLISHED = "as published"


@dataclass(frozen=True)
class Sample:
    """Figure by seed, the larger the better, with its scale in tables, and commit and day of its runs."""

    values: Mapping[int, float]
    scale: float
    made: str


@dataclass(frozen=True)
class Contest:
    """Form of a method beside another method in a setting, where a sample is None while its runs are unfinished."""

    setting: str
    form: str
    own: Sample | None
    rival: str
    rival_sample: Sample | None

    @property
    def commits(self) -> list[str]:
        """Return commit and day of both, where both are played."""
        return [] if self.own is None or self.rival_sample is None else [self.own.made, self.rival_sample.made]

    def ends(self) -> tuple[float, float, float]:
        """Return the mean difference, paired by seed, and the ends of its 95 % interval.

        Above 0 the method is better.
        """
        assert self.own is not None
        assert self.rival_sample is not None
        found = compare_pairs(self.own.values, self.rival_sample.values)
        assert found is not None, f"no seed in common with {self.rival}"
        assert found.low is not None and found.high is not None, f"one seed in common with {self.rival}"  # noqa: PT018
        mean, low, high = (round(self.own.scale * value, 3) for value in (found.mean, found.low, found.high))
        return mean, low, high

    def cells(self) -> list[str]:
        """Return the row of the table of differences."""
        assert self.own is not None
        mean, low, high = (decimal(value, 1 if self.own.scale == 100 else 2, "+") for value in self.ends())
        return [self.setting, self.form, self.rival, f"{mean} [{low}, {high}]", "; ".join(dict.fromkeys(self.commits))]


@dataclass(frozen=True)
class Tool:
    """Method: its page below docs/, unit and contests, where it is the right tool, its cost, and alternatives."""

    name: str
    page: str
    unit: str
    contests: Sequence[Contest]
    right: str
    cost: str
    alternatives: str


def read_sample(paper: str, cell: str) -> Sample | None:
    """Return a cell's figure in the results of a study, or None where it was not played."""
    row = read_rows(paper).get(cell) if (RESULTS / f"{paper}.json").exists() else None
    if row is None or row["ours"] is None:
        return None
    falls = direction(row["figure"], {}) == "min"
    commits = ", ".join(f"`{build.partition(' ')[2]}`" for build in row["fedkern"].split(", "))
    made = f"{commits}, {row.get('date', 'no day')}"
    return Sample({seed: -value if falls else value for seed, value in by_seed(row).items()}, 1 if falls else 100, made)


def contests(
    paper: str, settings: Mapping[str, str], forms: Mapping[str, str], rivals: Mapping[str, str]
) -> list[Contest]:
    """Return every form beside every rival in every setting, with cells by their names in the tables."""
    return [
        Contest(setting, form, read_sample(paper, prefix + own), rival, read_sample(paper, prefix + theirs))
        for setting, prefix in settings.items()
        for rival, theirs in rivals.items()
        for form, own in forms.items()
    ]


def differences(name: str = "") -> list[str]:
    """Return the table of paired differences, of one method or of all, without unplayed cells."""
    rows = [
        [f"[{tool.name}]({tool.page})", *contest.cells()]
        for tool in tools() if name in ("", tool.name) for contest in tool.contests if contest.commits
    ]  # fmt: skip
    header = ["method", "setting", "form", "compared with", "difference [95 % interval]", "commit, day"]
    return table(header, rows).split("\n")


def in_use() -> list[str]:
    """Return the table of docs/methods/README.md."""
    rows = [[f"[{tool.name}](../{tool.page})", tool.right, tool.cost, tool.alternatives] for tool in tools()]
    return table(["method", "the right tool where", "cost", "elsewhere"], rows).split("\n")


def tools() -> list[Tool]:
    """Return the five methods."""
    return [_fedgid(), _fusefl(), _fedlpfm(), _fediod(), _feddra()]


def _fedgid() -> Tool:
    settings = {f"{data}, tie {tie}": f"{data} {tie}: " for data, tie in
                (("ColorMNIST", "0.8"), ("ColorMNIST", "0.5"), ("slides", "0.8"))}  # fmt: skip
    forms = {PUBLISHED: "both: as published", "`intervene=image`": "image with GD"}
    rivals = {"FedAvg": "FedAvg", "jitter": "FedAvg with jitter"}
    drawn = {PUBLISHED: "FedGID as published", "`intervene=image`": "FedGID: intervene=image"}
    drawings = contests("openclipart_scenes", {"drawings on photographs, tie 0.95": ""}, drawn, rivals)
    return Tool(
        "FedGID", "fedgid.md", "points of accuracy", [*contests("fedgid", settings, forms, rivals), *drawings],
        "backgrounds mislead, and masks tell the object from the background",
        "the same bytes; every batch also passes the received network, and the last stages of its own, or with "
        "`intervene=image` all of them, a second time",
        "channel jitter, where colours alone mislead",
    )  # fmt: skip


def _fusefl() -> Tool:
    width = "fusefl_cifar10_width"
    parameters = [load(width)[f"{name}, width 7"]["parameters"] for name in ("FuseFL", "one-shot FedAvg")]
    setting = {"CIFAR-10, Dirichlet 0.1, five clients": ""}
    narrow = {"one-shot FedAvg, equal upload": "one-shot FedAvg of width 7",
              "one-shot FedAvg, equal memory": "one-shot FedAvg of width 16",
              "ensemble, equal memory": "ensemble of width 7"}  # fmt: skip
    played = contests("fusefl", setting, {"width 7": "FuseFL of width 7"}, narrow)
    wide = {"ensemble, width 16": "ensemble of width 16"}
    return Tool(
        "FuseFL", "fusefl.md", "points of accuracy",
        [*played, *contests("fusefl", setting, {"width 16": "FuseFL of width 16"}, wide)],
        "there is one round, and uploads must be as small as one narrow network",
        f"the upload of one-shot FedAvg, {parameters[0] / parameters[1]:.1f} times the parameters at inference",
        "an ensemble, where uploads may have its size",
    )  # fmt: skip


def _fedlpfm() -> Tool:
    splits = ("two classes a client", "Dirichlet 0.1", "IID")
    settings = {f"CIFAR-10, {split}": f"{split}: " for split in splits}
    forms, rivals = {"`mapping=mean`": "Fed-LPFM"}, {name: name for name in ("FedAvg", "FedProx", "FML", "FedCGS")}
    drawings = {"drawings by artist, balanced accuracy": "balanced accuracy: "}
    there = {"FedAvg": "FedAvg", "FedCGS, random filters": "FedCGS on 32 random filters"}
    corrected = {"`prior=counts`": "Fed-LPFM"}
    played = contests("openclipart_classes", drawings, corrected, there)
    long = {f"CIFAR-10, {split}, 100 rounds": f"{split} for 100 rounds: " for split in splits[:2]}
    played += contests("fedlpfm_teachers", long, corrected, {"FedAvg": "FedAvg", "FedProx": "FedProx"})
    return Tool(
        "Fed-LPFM", "fedlpfm.md", "points of accuracy",
        [*contests("fedlpfm", settings, forms, rivals), *played],
        "clients see few classes, the network must be small, and the teacher may not be shared",
        "the same bytes; every client runs the teacher once over its images",
        "the teacher's own features, where clients can run the teacher at inference; public labelled images, where "
        "there are any",
    )  # fmt: skip


IOD_TABLES = ("MNIST 0.1", "MNIST 1.0", "CIFAR-10 0.1")
"""Of the study fediod_teachers, by data and Dirichlet's parameter."""


def _fediod() -> Tool:
    rows = read_rows("fediod_teachers")  # of five clients, bytes in both directions
    sizes = [f"{rows[f'MNIST 0.1: {name}']['bytes'] / 5e6:,.1f}" for name in ("FedIOD cosine", "FedAvg in ten rounds")]
    rivals = {f"{name} with counts": f"{name} cosine with both" for name in ("FedDF", "DENSE", "ensemble")}
    forms = {"defaults": "FedIOD cosine", "temperature, floor": "FedIOD cosine with both"}
    settings = {name.replace(" ", ", Dirichlet "): f"{name}: " for name in IOD_TABLES}
    played = contests("fediod_teachers", settings, forms, {"FedAvg in ten rounds": "FedAvg in ten rounds", **rivals})
    return Tool(
        "FedIOD", "fediod.md", "points of accuracy", played,
        "networks differ or stay private, class counts may be told, and no public images exist",
        f"{sizes[0]} MB a client in both directions, FedAvg's ten rounds {sizes[1]} MB",
        "FedDF with `class_weights=counts`, where there are public images; the weighted ensemble, where its size is no "
        "matter; FedAvg, where there are many rounds",
    )  # fmt: skip


def _feddra() -> Tool:
    settings = {f"{figure} loss, minority of {share}": f"{share}: {figure} loss: "
                for share in ("10 %", "20 %") for figure in ("worst", "mean")}  # fmt: skip
    forms = {"two stages": "FedDRA: two stages", "weights": "robust weights",
             "weights, anchors": "robust weights and anchors"}  # fmt: skip
    rivals = {"uniform FedAvg": "FedAvg uniform", "FedProx": "FedProx"}
    artists = {f"{figure} loss, drawings by artist": f"{figure} loss: " for figure in ("worst", "mean")}
    forms_there = {"two stages": "FedDRA", "weights": "robust weights"}
    return Tool(
        "FedDRA", "feddra.md", "nats less",
        [*contests("feddra", settings, forms, rivals), *contests("openclipart", artists, forms_there, rivals)],
        "images have texts, and the worst client counts more than the mean",
        "with both stages the alignment modules travel twice a round; clients judge the model on held samples",
        "FedAvg with `weighting=uniform`, at equal steps or for less effort",
    )  # fmt: skip
