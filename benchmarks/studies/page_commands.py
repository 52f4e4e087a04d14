"""Run of the command that a method's page prints: its figure and its processor time.

    python -m benchmarks.studies.page_commands --mnist DIR --cifar10 DIR [--only METHOD ...]

Each command is a cell of a study with seed 0, in the shortest words that set the same.  It is run on one thread, and
``benchmarks/studies/results/page_commands.json`` keeps its figure and processor time, which the pages show
(``benchmarks.page_figures``).
"""

import argparse
import json
import resource
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.page import RESULTS
from benchmarks.recorded import recorded_versions
from benchmarks.studies.run import read_study
from fedkern.cli.flags import parse_run
from fedkern.cli.repeat import command_line
from fedkern.cli.request import effective_config
from fedkern.settings.config import RunConfig

FILE = RESULTS / "page_commands.json"


@dataclass(frozen=True)
class Command:
    """Command of a page.

    Attributes:
        study, cell: the run.
        figure: the metric of ``summary.json`` that the page shows.
        files: whose folder stands for ``DIR``: ``mnist``, ``cifar10``, or none.
        flags: further settings of the command, such as the learning rate that the cell's sweep chose.
        scale: 100 for what the page has in per cent.
    """

    study: str
    cell: str
    figure: str
    files: str = ""
    flags: str = ""
    scale: float = 100.0

    def text(self) -> str:
        """Return the command with ``DIR`` in place of the data's folder."""
        study, root = read_study(self.study), ["--data-root", "DIR"] if self.files else []
        words = [*study.words(study.find(self.cell).command), *self.flags.split(), "--seed", "0", *root]
        config = effective_config(parse_run(words))
        # How often what is looked at and kept, and on how many threads, is left to the defaults.
        usual = RunConfig.make(config.method, data=config.data)
        quiet = {name: getattr(usual, name) for name in ("eval_every", "checkpoint_every", "grad_cam", "threads")}
        return command_line(config.method, config.replace(**quiet, data_root="DIR" if self.files else None))


COMMANDS = {
    "fedgid": Command("fedgid_parts", "colordigits: FedGID", "ood_accuracy", flags="--lr 0.05"),
    "fusefl": Command("fusefl", "FuseFL of width 7", "accuracy", "cifar10"),
    "fedlpfm": Command("fedlpfm_changes", "two classes: Fed-LPFM", "accuracy", "cifar10", "--lr 0.1"),
    "fediod": Command("fediod_terms", "FedIOD by itself", "accuracy", "mnist"),
    "feddra": Command("feddra_parts", "FedDRA", "worst_client_loss", scale=1.0),
}
"""By method, in the order of the pages."""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.page_commands", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--mnist", help="folder of the four IDX files")
    parser.add_argument("--cifar10", help="folder of CIFAR-10's binary files")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="methods (default: all)")
    args = parser.parse_args()
    for name in args.only:
        command = COMMANDS[name]
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
