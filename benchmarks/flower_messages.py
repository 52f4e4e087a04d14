"""Cost of Flower for a run whose clients are on SuperNodes: seconds of a round, and of an iteration of FedIOD.

    python -m benchmarks.flower_messages            # writes results/flower_messages_<cpu>.json
    python -m benchmarks.flower_messages --dry

In an environment with flwr and fedkern.  A SuperLink and two SuperNodes run on this machine, with Flower's own
intervals.  The network is so small that nearly all is the cost of a message.  Variants are the same run

* ``in process``: in one process, clients one after another;
* ``resident``: over Flower, the clients' processes staying (`fedkern.flower.runs.client_daemon`), the default;
* ``no resident``: over Flower with ``flower.resident=0``, a process for every message.

A repeat plays all three; figures are medians of the rounds after the first (FedAvg), and of one round of several
iterations (FedIOD), over the repeats.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import comparisons, machines
from fedkern.engine.store.record_files import read_metrics

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples/flower_deployment/deploy.py"
CLIENTS, ROUNDS, ITERATIONS, REPEATS = 2, 8, 8, 2
VARIANTS = ("in process", "resident", "no resident")
COMMON = [
    "--data", "digits", "--train-samples", "160", "--width", "2", "--batch-size", "8", "--grad-cam", "0", "--threads",
    "1", "--client-threads", "1", "--clients", str(CLIENTS),
]  # fmt: skip
METHODS: Mapping[str, list[str]] = {
    "fedavg": ["--rounds", str(ROUNDS), "--local-steps", "2"],
    "fediod": [
        "--rounds", "1", "--local-epochs", "1",
        *(word for option in ("ngf=2", "ndf=2", "batch=8", "student_steps=2", f"iterations={ITERATIONS}",
                              "batched=false") for word in ("--method-option", option)),
    ],
}  # fmt: skip


def results_path(machine: Mapping[str, Any], folder: Path = comparisons.RESULTS) -> Path:
    """Return the file with the results of a machine."""
    return folder / f"flower_messages_{comparisons.slug(machine)}.json"


def seconds_of(method: str, run: Path) -> float:
    """Return the seconds of a round of a finished run, or of an iteration of FedIOD, without evaluation."""
    spent = [record["phases"]["train"] + record["phases"]["aggregate"] for record in read_metrics(run)]
    return spent[-1] / ITERATIONS if method == "fediod" else statistics.median(spent[1:])


def command(*words: str) -> None:
    """Run fedkern's command.

    Raises:
        SystemExit: the command failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "fedkern.run", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"fedkern {' '.join(words)}\n{done.stdout}")


def measure(methods: Sequence[str], repeats: int, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Return seconds by method and variant, one of each repeat."""
    deploy = _deploy()
    port = deploy.free_port()
    seconds: dict[str, dict[str, list[float]]] = {name: {variant: [] for variant in VARIANTS} for name in methods}
    with deploy.Processes(folder) as processes:
        processes.start(
            "superlink",
            ["flower-superlink", "--host", deploy.HOST, "--port", str(port), "--insecure",
             "--disable-runtime-dependency-installation"],
            "Uvicorn running on",
        )  # fmt: skip
        os.environ["FLWR_HOME"] = str(folder / "home")
        (folder / "home").mkdir()
        (folder / "home/config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{deploy.HOST}:{port}"\ninsecure = true\n'
        )
        for k in range(CLIENTS):
            config = f'partition-id={k} num-partitions={CLIENTS} state-dir="{folder}/states-{k}"'
            processes.start(
                f"site-{k}",
                ["flower-supernode", "--superlink", f"{deploy.HOST}:{port}", "--insecure", "--port",
                 str(deploy.free_port()), "--node-config", config],
                "SuperNode ID",
            )  # fmt: skip
        for repeat in range(repeats):
            for method in methods:
                for variant in VARIANTS:
                    run = folder / f"{method}-{repeat}-{variant.replace(' ', '-')}"
                    words = [method, *COMMON, *METHODS[method], "--seed", str(repeat), "--out", str(run)]
                    if variant == "in process":
                        command(*words, "--workers", "1", "--quiet")
                    else:
                        project = run.with_name(f"{run.name}-project")
                        command(*words, "--flower", str(project))
                        asked = "flower.resident=0" if variant == "no resident" else ""
                        command("flower", str(project), *(["--run-config", asked] if asked else []))
                    seconds[method][variant].append(seconds_of(method, run))
                    print(f"{method}, {variant}, seed {repeat}: {seconds[method][variant][-1]:.4f} s", flush=True)
    return seconds


def _deploy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flower_deployment", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flower_messages", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--dry", action="store_true", help="write no results")
    args = parser.parse_args(arguments)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        samples = measure(args.methods, args.repeats, Path(folder))
    if not args.dry:
        machine = machines.machine("cpu")
        content = {
            "machine": machine,
            "common": COMMON,
            "methods": dict(METHODS),
            "iterations": ITERATIONS,
            "seconds": samples,
        }
        results_path(machine).write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
