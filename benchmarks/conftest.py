"""Command line of the benchmarks: where they run, what is recorded, and the gate under recorded speed-ups."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import comparisons
import gate
import harness
import pytest
import torch

HERE = Path(__file__).parent
SHORT_GATE_SECONDS = 50
_begin = time.monotonic()
_collected: set[str] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fedkern benchmarks")
    group.addoption(
        "--record", action="store_true", help="write benchmarks/results/<operator>-<processor>.json, row by row"
    )
    group.addoption("--anew", action="store_true", help="with --record: start the measured operators' files again")
    group.addoption("--results", type=Path, default=comparisons.RESULTS, help="another folder for --record")
    group.addoption("--gate", action="store_true", help="fail where a speed-up is below benchmarks/floors.toml")
    group.addoption("--gate-short", action="store_true", help="two short rows per operator, less strictly, in a minute")
    group.addoption("--floors", type=Path, default=gate.FLOORS, help="another floors.toml for --gate")
    group.addoption(
        "--rounds", default="", choices=("small", "full"), help="play bench_rounds.py's rounds: hours, or a small trial"
    )
    group.addoption(
        "--environment", action="append", default=[], metavar="FRAMEWORK=DIR", help="a framework's virtual environment"
    )
    group.addoption("--data-root", type=Path, help="folder of CIFAR-10's binary files for bench_rounds.py")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the operators run")


def pytest_configure(config: pytest.Config) -> None:
    harness.SETTINGS.device = config.getoption("--device")
    if harness.SETTINGS.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    harness.SETTINGS.short = config.getoption("--gate-short")
    if config.getoption("--anew") and not config.getoption("--record"):
        raise pytest.UsageError("--anew says what --record does with earlier rows; give both")
    if config.getoption("--record"):
        harness.SETTINGS.recorder = comparisons.Recorder(
            harness.machine, config.getoption("--results"), collected=_collected, anew=config.getoption("--anew")
        )
    harness.SETTINGS.rounds = config.getoption("--rounds")
    harness.SETTINGS.data_root = config.getoption("--data-root")
    for given in config.getoption("--environment"):
        framework, _, folder = given.partition("=")
        if not (Path(folder) / "bin" / "python").exists():
            raise pytest.UsageError(f"--environment {given}: expected FRAMEWORK=DIR with a DIR/bin/python")
        harness.SETTINGS.environments[framework] = Path(folder).absolute()
    if config.getoption("--record") and harness.SETTINGS.rounds == "small":
        raise pytest.UsageError("--rounds small is a trial, which --record does not take")
    if config.getoption("--gate") or harness.SETTINGS.short:
        if config.getoption("--record"):
            raise pytest.UsageError("--record measures at length and without a gate; run it alone")
        harness.SETTINGS.floors = gate.read_floors(config.getoption("--floors"))
        if not harness.SETTINGS.floors.rows:
            raise pytest.UsageError(
                f"{config.getoption('--floors')} holds no floors; write it with python -m benchmarks.report --floors"
            )


def _name(item: pytest.Item) -> str:
    return item.nodeid.rpartition("benchmarks/")[2]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if HERE in item.path.parents]
    # Of a file whose tests were named one by one, the others were not looked for: they may well exist.
    named = {Path(arg.partition("::")[0]).name for arg in config.args if "::" in arg}
    _collected.update(_name(item) for item in here if item.path.name not in named)
    if harness.SETTINGS.short and harness.SETTINGS.floors is not None:
        floors = harness.SETTINGS.floors
        wanted = floors.short_tests(harness.SETTINGS.device, harness.names_here(floors))
        left = [item for item in here if _name(item) not in wanted]
        if left:
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True)
def _within_a_minute() -> None:
    if harness.SETTINGS.short and time.monotonic() - _begin > SHORT_GATE_SECONDS:
        pytest.skip(f"the short gate has taken its {SHORT_GATE_SECONDS} seconds")


# Steps of methods and whole rounds say themselves what lies where: data, generators and their random numbers are the
# CPU's.
OWN_DEVICES = {"bench_feddra_step", "bench_fediod_step", "bench_fedlpfm_step", "bench_fusefl_level", "bench_rounds"}


@pytest.fixture(autouse=True)
def _on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seeds the inputs, and makes them where the operators run."""
    torch.manual_seed(0)
    if harness.SETTINGS.device == "cpu" or request.path.stem in OWN_DEVICES:
        yield
        return
    torch.set_default_device(harness.SETTINGS.device)
    yield
    torch.set_default_device(None)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not harness.COMPARISONS:
        return
    terminalreporter.section("speed-ups: median of per-pair ratios")
    terminalreporter.write_line(harness.table(harness.COMPARISONS))
    for row in harness.COMPARISONS:
        broken = [f"{floor:g}× {name}" for name, floor in row.broken_promises().items()]
        if row.too_much_overhead:
            broken.append(f"an overhead of {1e6 * row.at_most:g} µs")
        if broken and not row.loaded:
            line = f"below what is promised: {row.group} {row.case} ({row.where}): {', '.join(broken)}"
            terminalreporter.write_line(line)
    if harness.SETTINGS.recorder:
        for path in harness.SETTINGS.recorder.written:
            terminalreporter.write_line(f"wrote {path}")
