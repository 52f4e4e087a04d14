"""The command that a method's page prints: what it gave when it was run as printed, and how long it took.

    python -m benchmarks.studies.page_commands --mnist DIR --cifar10 DIR [--only METHOD ...]

Each command is one run of the method's study (seed 0), in the shortest words that set the same.  It is run on one
thread, and ``benchmarks/studies/results/page_commands.json`` keeps its figure and processor time, which the pages show
(``benchmarks.page_figures``).
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.recorded import recorded_versions
from benchmarks.studies import study_feddra, study_fedgid, study_fediod
from benchmarks.studies.fediod_runs import IOD, STUDENTS, IODRuns
from benchmarks.studies.study import RESULTS, Case
from fedkern.cli.flags import parse
from fedkern.cli.repeat import command_line
from fedkern.cli.request import effective
from fedkern.comparison import published
from fedkern.settings.config import RunConfig

FILE = RESULTS / "page_commands.json"
NOWHERE = Path("runs-of-the-pages")  # names of folders are made of it, nothing is run there


@dataclass(frozen=True)
class Command:
    """A page's command.

    Attributes:
        case: the run of the study.
        files: whose folder stands for ``DIR``: ``mnist``, ``cifar10``, or none.
        figure: the metric of ``summary.json`` that the page shows.
        scale: 100 for what the page has in per cent.
    """

    case: Case
    files: str
    figure: str
    scale: float = 100.0

    def text(self) -> str:
        """The command with ``DIR`` in place of the data's folder."""
        config = effective(parse([*self.case.arguments, *(["--data-root", "DIR"] if self.files else [])]))
        # How often what is looked at and kept, and on how many threads, is left to the defaults.
        usual = RunConfig.make(config.method, data=config.data)
        quiet = {name: getattr(usual, name) for name in ("eval_every", "checkpoint_every", "grad_cam", "threads")}
        return command_line(config.method, config.replace(**quiet, data_root="DIR" if self.files else None))


def commands() -> Mapping[str, Command]:
    """By method, in the order of the pages."""
    gid = study_fedgid.FedGIDRuns(study_fedgid.STUDIES["digits"], NOWHERE, 1, {})
    dra = study_feddra.DRARuns(study_feddra.STUDIES["captions"], NOWHERE, 1, {})
    results = json.loads((RESULTS / "fedgid_digits.json").read_text())
    return {
        "fedgid": Command(
            gid.variant(study_fedgid.FULL, 0.7, results[f"{study_fedgid.FULL}, correlation 0.7"]["lr"], 0),
            "", "ood_accuracy",
        ),
        "fusefl": Command(_cell("fusefl", "FuseFL of width 7"), "cifar10", "accuracy"),
        "fedlpfm": Command(_fedlpfm(), "cifar10", "accuracy"),
        "fediod": Command(_fediod(), "mnist", "accuracy"),
        "feddra": Command(dra.of("FedDRA", dra.rate(), 0), "", "worst_client_loss", 1.0),
    }  # fmt: skip


def _cell(paper: str, name: str, *flags: str) -> Case:
    """A cell of a paper, or of the file ``NAME.toml``, with seed 0."""
    file = published.read(paper)
    return Case(name, (*file.words(file.find(name).command), *flags, "--seed", "0"))


def _fedlpfm() -> Case:
    """At the rate of the page's table."""
    table = json.loads((RESULTS / "fedlpfm_cifar10_table.json").read_text())
    lr = table["Fed-LPFM, class split (2 a client)"]["lr"]
    return _cell(str(Path(__file__).with_name("fedlpfm_changes.toml")), "two classes: Fed-LPFM", "--lr", str(lr))


def _fediod() -> Case:
    """On teachers that it trains itself, as the table's were."""
    study = study_fediod.STUDIES["mnist"]
    runs = IODRuns(study, NOWHERE, 1, {})
    table = json.loads((RESULTS / "fediod_mnist_table.json").read_text())["dirichlet:0.1"]
    chosen = next(one for one in STUDENTS[IOD][1] if study_fediod.shown(one) == table["rates"][IOD])
    teachers = runs.teachers(0.1, table["teachers"], 0)
    return runs.iod(teachers, 0.1, 0, own=True, chosen=chosen)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.page_commands", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--mnist", help="folder of the four IDX files")
    parser.add_argument("--cifar10", help="folder of CIFAR-10's binary files")
    every = commands()
    parser.add_argument("--only", nargs="+", choices=every, default=list(every), help="methods (default: all)")
    args = parser.parse_args()
    for name in args.only:
        command = every[name]
        root = {"mnist": args.mnist, "cifar10": args.cifar10, "": ""}[command.files]
        if root is None:
            parser.error(f"{name} needs --{command.files}")
        result = _run(command, root)
        kept = json.loads(FILE.read_text()) if FILE.exists() else {}
        FILE.write_text(json.dumps({**kept, name: result, "versions": recorded_versions()}, indent=1) + "\n")
        print(name, result, flush=True)


def _run(command: Command, root: str) -> dict[str, object]:
    text = command.text()
    words = [root if word == "DIR" else word for word in shlex.split(text)][1:]
    with tempfile.TemporaryDirectory(prefix="page-") as folder:
        out = Path(folder) / "run"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words, "--threads", "1", "--out", str(out), "--quiet"], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        summary = json.loads((out / "summary.json").read_text())
    # Of the processor, since other work may share the machine.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"command": text, "figure": summary["metrics"][command.figure], "processor_seconds": seconds}


if __name__ == "__main__":
    main()
