"""Command line of the benchmarks: the device, the recorded rows, and the gate under recorded speed-ups."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import comparisons, gate, harness, shown

HERE = Path(__file__).parent
GATE_SECONDS = 60
_begin = time.monotonic()
_collected: set[str] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fedkern benchmarks")
    group.addoption(
        "--record", action="store_true", help="write benchmarks/results/<operator>-<processor>.json, row by row"
    )
    group.addoption("--anew", action="store_true", help="with --record: start the measured operators' files again")
    group.addoption("--results", type=Path, default=comparisons.RESULTS, help="another folder for --record")
    group.addoption("--shown", action="store_true", help="the rows of docs/speed.md alone, in a quarter of an hour")
    group.addoption(
        "--gate-short", action="store_true", help="fail where a speed-up is below benchmarks/floors.toml, in a minute"
    )
    group.addoption("--gate-afresh", action="store_true", help="with --gate-short: be one process of several")
    group.addoption("--set-floors", action="store_true", help="write benchmarks/floors.toml, or add a process to it")
    group.addoption("--floors", type=Path, default=gate.FLOORS, help="another floors.toml")
    group.addoption(
        "--rounds", default="", choices=("small", "full"), help="play bench_rounds.py's rounds: hours, or a small trial"
    )
    group.addoption(
        "--environment", action="append", default=[], metavar="FRAMEWORK=DIR", help="a framework's virtual environment"
    )
    group.addoption("--data-root", type=Path, help="folder of CIFAR-10's binary files for bench_rounds.py")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the operators run")


def pytest_configure(config: pytest.Config) -> None:
    settings = harness.SETTINGS
    settings.device = config.getoption("--device")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    if sum(map(bool, map(config.getoption, ("--record", "--gate-short", "--set-floors")))) > 1:
        raise pytest.UsageError("--record, --gate-short and --set-floors measure differently; give one of them")
    if config.getoption("--anew") and not config.getoption("--record"):
        raise pytest.UsageError("--anew says what --record does with earlier rows; give both")
    if config.getoption("--record"):
        settings.recorder = comparisons.Recorder(
            harness.machine, config.getoption("--results"), collected=_collected, anew=config.getoption("--anew")
        )
    settings.rounds = config.getoption("--rounds")
    settings.data_root = config.getoption("--data-root")
    for word in config.getoption("--environment"):
        framework, _, folder = word.partition("=")
        if not (Path(folder) / "bin" / "python").exists():
            raise pytest.UsageError(f"--environment {word}: expected FRAMEWORK=DIR with a DIR/bin/python")
        settings.environments[framework] = Path(folder).absolute()
    if config.getoption("--record") and settings.rounds == "small":
        raise pytest.UsageError("--rounds small is a trial, which --record does not take")
    if config.getoption("--gate-short"):
        settings.floors = gate.read_floors(config.getoption("--floors"))
        if not config.getoption("--gate-afresh"):
            settings.afresh = ["--gate-short", "--gate-afresh", "--floors", str(config.getoption("--floors"))]
        if not settings.floors.rows:
            raise pytest.UsageError(
                f"{config.getoption('--floors')} holds no floors; write it with pytest benchmarks --set-floors"
            )
    if config.getoption("--set-floors"):
        before, machine = gate.read_floors(config.getoption("--floors")), harness.machine()
        facts = {fact: machine[fact] for fact in (*comparisons.IDENTITY, *comparisons.CHIP) if fact in machine}
        is_same = before.rows and not comparisons.machine_difference(before.machine, machine)
        settings.seen = gate.Floors(facts, before.rows if is_same else {})


def _name(item: pytest.Item) -> str:
    return item.nodeid.rpartition("benchmarks/")[2]


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Measure every operator with one and with two threads."""
    if "threads" in metafunc.fixturenames:
        metafunc.parametrize("threads", [1, 2])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own_items = [item for item in items if HERE in item.path.parents]
    # Of a file whose tests were named one by one, the others were not looked for: they may well exist.
    named = {Path(arg.partition("::")[0]).name for arg in config.args if "::" in arg}
    _collected.update(_name(item) for item in own_items if item.path.name not in named)
    wanted: set[str] | None = None
    if harness.SETTINGS.floors is not None:
        wanted = {node for node, floor in harness.SETTINGS.floors.rows.items() if floor.can_hold}
    elif config.getoption("--shown") or config.getoption("--set-floors"):
        wanted = {node for node, _, _ in shown.nodes()}
    if wanted is not None:
        left = [item for item in own_items if _name(item) not in wanted]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


@pytest.fixture
def node(request: pytest.FixtureRequest, benchmark: Any) -> str:
    """Return the running test's name relative to benchmarks/, and put it into pytest-benchmark's record."""
    harness.SETTINGS.benchmark = benchmark
    return _name(request.node)


@pytest.fixture(autouse=True)
def _within_a_minute() -> None:
    if harness.SETTINGS.floors is not None and time.monotonic() - _begin > GATE_SECONDS:
        pytest.skip(f"the gate has taken its {GATE_SECONDS} seconds")


@pytest.fixture(autouse=True)
def _on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed the inputs, and make them where the operators run."""
    torch.manual_seed(0)
    # Whole rounds say themselves what lies where: data and their random numbers are the CPU's.
    if harness.SETTINGS.device == "cpu" or request.path.stem == "bench_rounds":
        yield
        return
    torch.set_default_device(harness.SETTINGS.device)
    yield
    torch.set_default_device(None)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    settings = harness.SETTINGS
    if harness.COMPARISONS or harness.GATED:
        terminalreporter.section("speed-ups: median of per-pair ratios")
        terminalreporter.write_line("\n".join(harness.GATED) or harness.table(harness.COMPARISONS))
    if settings.recorder:
        for path in settings.recorder.written:
            terminalreporter.write_line(f"wrote {path}")
    if settings.seen is not None and settings.seen.rows:
        gate.write_floors(settings.seen, config.getoption("--floors"))
        terminalreporter.write_line(f"wrote {config.getoption('--floors')}: {len(settings.seen.rows)} floors")
