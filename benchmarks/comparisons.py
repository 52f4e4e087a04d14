"""Results of the benchmarks: a :class:`Comparison` per row, a JSON file per operator, device and machine."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.recorded import UNRECORDED

RESULTS = Path(__file__).parent / "results"
# What of a machine moves ratios.
IDENTITY = ("cpu", "cores", "isa", "gpu", "backend", "torch")
# More of the same.  Files recorded before they were noted lack them, so a missing one is not known: no difference.
CHIP = ("family", "model", "stepping", "implementer", "part", "l2", "l3")
# What a processor's name says beside maker and model: marks, the clock, and words that most names have.
NOISE = re.compile(r"\((?:r|tm|c)\)|@.*|\b(?:[0-9]+-core|processor|cpu)\b", re.IGNORECASE)


@dataclass
class Comparison:
    """Row of a benchmark's table.

    Attributes:
        group: operator, for example ``"kl_div"``.
        case: shape and setting.
        ours: which implementation is judged.
        seconds: median time of one call, by implementation; on a GPU the time of its kernels.
        speedup: median over pairs of (other's time / our time), by implementation.
        scatter: interquartile range over median of each implementation's times; a page marks wide scatter.
        model_bytes: bytes the operator must move at least.
        copy_seconds: median time of copying ``model_bytes`` (half read, half written) in the same run, if asked for.
        note: what a reader must know, for example which path serves this size.
        device: "cpu" or "cuda".
        test: the pytest node that measured it, relative to benchmarks/.
        peak_bytes: the most memory a call takes beyond its inputs, by implementation.
        wall_seconds: on a GPU, wall time of one of many calls in a row, by implementation.
        missing: implementations that cannot run here, with the reason.
        time: when it was measured, as an ISO date with time.
        sources: the hash over what of csrc/ the operator is built from (see sources.py), or "" where no compiled core
            served.
        backend: the backend that was forced, else the first that could serve.
        startup_seconds: of whole runs, from the start of the process until the first round begins, by implementation.
        first_seconds: of whole runs, the first round, which ``seconds`` leaves out, by implementation.
        accuracy: of whole runs, the final accuracy, by implementation.
    """

    group: str
    case: str
    ours: str
    threads: int
    pairs: int
    seconds: dict[str, float]
    speedup: dict[str, float]
    scatter: dict[str, float]
    model_bytes: int = 0
    copy_seconds: float | None = None
    note: str = ""
    device: str = "cpu"
    test: str = ""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    wall_seconds: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    time: str = ""
    sources: str = ""
    backend: str = ""
    startup_seconds: dict[str, float] = field(default_factory=dict)
    first_seconds: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Return the row's identity among the others."""
        return self.group, self.case, self.device, self.threads

    @property
    def bandwidth(self) -> float:
        """Return model bytes over our time, in GB/s."""
        return self.model_bytes / self.seconds[self.ours] / 1e9

    @property
    def copy_fraction(self) -> float | None:
        """Return our bandwidth over the copy's."""
        return None if self.copy_seconds is None else self.copy_seconds / self.seconds[self.ours]

    @property
    def where(self) -> str:
        """Return the device in words, with a CPU's threads."""
        if self.device != "cpu":
            return self.device
        return f"{self.threads} thread{'s' if self.threads > 1 else ''}"

    def record(self) -> dict[str, Any]:
        """Return all attributes as plain JSON values."""
        return asdict(self)


@dataclass
class Recorded:
    """Results file: its machine, its rows, and its name without suffix."""

    machine: dict[str, Any]
    rows: list[Comparison]
    name: str


def read_results(folder: Path = RESULTS) -> dict[str, list[Recorded]]:
    """Return the recorded operators by name, each with an entry per machine, CPUs first.

    Other JSON files are left alone.
    """
    groups: dict[str, list[Recorded]] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not isinstance(content.get("results"), list) or "machine" not in content:
            continue
        rows = [Comparison(**record) for record in content["results"] if "speedup" in record]
        if rows:
            groups.setdefault(rows[0].group, []).append(Recorded(content["machine"], rows, path.stem))
    return {group: sorted(files, key=lambda one: one.rows[0].device) for group, files in groups.items()}


class Recorder:
    """Writer of results as they come, so that a killed run loses only its current row.

    Args:
        machine: asked for the machine when the first row is there.
        collected: every test of the files that pytest looked through, those not selected included.
        anew: drop the rows that this run does not measure from the files of the operators that it does.
    """

    def __init__(
        self,
        machine: Callable[[], dict[str, Any]],
        folder: Path = RESULTS,
        *,
        collected: Collection[str] = (),
        anew: bool = False,
    ) -> None:
        self.folder, self.collected, self.anew = folder, collected, anew
        self.rows: list[Comparison] = []
        self.written: dict[Path, None] = {}
        self._ask, self._machine = machine, {}

    @property
    def machine(self) -> dict[str, Any]:
        """Return the machine of this run."""
        self._machine = self._machine or self._ask()
        return self._machine

    def refusal(self, group: str, device: str) -> str:
        """Return the reason why rows of this operator cannot be recorded, or ""."""
        return "" if self.anew else _refusal(_path(self.folder, group, device, self.machine), self.machine)

    def add(self, row: Comparison) -> None:
        """Write the file of the row's operator with all rows of this run."""
        self.rows.append(row)
        mates = [recorded for recorded in self.rows if (recorded.group, recorded.device) == (row.group, row.device)]
        paths = write_results(mates, self.machine, self.folder, collected=self.collected, anew=self.anew)
        self.written.update(dict.fromkeys(paths))


def write_results(
    comparisons: Iterable[Comparison],
    machine: dict[str, Any],
    folder: Path = RESULTS,
    *,
    collected: Iterable[str] = (),
    anew: bool = False,
) -> list[Path]:
    """Write ``<group>-<processor>.json`` (``<group>-cuda-<gpu>.json`` for a GPU's rows), see :func:`slug`.

    A forced backend follows the processor, and a number tells machines apart that share all this, for example two ISA
    levels of one processor: their files are left alone.  Rows of the same machine that this run did not measure stay
    where their test still exists, so that a run of a few tests adds to a file and a case that was renamed leaves no
    ghost behind.

    Args:
        collected: every test of the files that pytest looked through, those not selected included.
        anew: leave nothing of the files' earlier rows.

    Raises:
        ValueError: the rows that would stay were recorded with another minor version of torch.
    """
    tests = set(collected)
    files = {test.partition("::")[0] for test in tests}

    def exists(row: Comparison) -> bool:
        return bool(row.test) and (row.test in tests or row.test.partition("::")[0] not in files)

    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for row in comparisons:
        groups.setdefault((row.group, row.device), []).append(row)
    paths = []
    for (group, device), rows in sorted(groups.items()):
        path = _path(folder, group, device, machine)
        if not anew and _refusal(path, machine):
            raise ValueError(_refusal(path, machine))
        kept = [] if anew else [row for row in _keep(path, rows) if exists(row)]
        content = {"machine": machine, "results": [row.record() for row in [*kept, *rows]]}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        partial.replace(path)
        paths.append(path)
    return paths


def processor(machine: Mapping[str, Any]) -> str:
    """Return the name of the processor, of a GPU's rows the GPU."""
    return str(machine.get("gpu") or machine.get("cpu") or "unknown")


def name_machine(machine: Mapping[str, Any]) -> str:
    """Return the processor as pages say it: "Intel(R) Xeon(R) Processor" of two cores is "Intel Xeon, 2 cores"."""
    name = " ".join(NOISE.sub(" ", processor(machine)).split())
    return f"{name}, {machine['cores']} cores" if "cores" in machine else name


def name_date(machine: Mapping[str, Any]) -> str:
    """Return the day of a measurement and its commit, as captions end."""
    commit = machine["commit"]
    return f"{machine['time'][:10]}{', commit unrecorded' if commit == UNRECORDED else f' at commit `{commit}`'}."


def slug(machine: Mapping[str, Any]) -> str:
    """Return the processor in a file's name: "Intel(R) Xeon(R) CPU @ 2.20GHz" is "intel-xeon"."""
    return re.sub(r"[^a-z0-9]+", "-", NOISE.sub(" ", processor(machine)).lower()).strip("-") or "unknown"


def _path(folder: Path, group: str, device: str, machine: dict[str, Any]) -> Path:
    """Return this machine's file, whatever its torch."""
    parts = [group, *([] if device == "cpu" else [device]), slug(machine), machine.get("backend", "")]
    start = "-".join(part for part in parts if part)
    path, number = folder / f"{start}.json", 1
    while path.exists() and machine_difference(_machine_of(path), machine, torch=False):
        number += 1
        path = folder / f"{start}-{number}.json"
    return path


def _machine_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()).get("machine", {})


def _refusal(path: Path, machine: dict[str, Any]) -> str:
    """Return the reason why rows measured here must not join this machine's file, or ""."""
    difference = machine_difference(_machine_of(path), machine) if path.exists() else ""
    return difference and f"{path.name}: {difference}; --anew starts the file again, without the rows it holds"


def _keep(path: Path, rows: Sequence[Comparison]) -> list[Comparison]:
    if not path.exists():
        return []
    tests, keys = {row.test for row in rows}, {row.key for row in rows}
    old = [Comparison(**record) for record in json.loads(path.read_text())["results"]]
    return [row for row in old if row.test not in tests and row.key not in keys]


def machine_difference(recorded: dict[str, Any], current: dict[str, Any], *, torch: bool = True) -> str:
    """Return the reason why ratios of two machines cannot be compared, or "".

    ``torch`` counts by its minor version.
    """
    known = [name for name in CHIP if name in recorded and name in current]
    for name in (*IDENTITY, *known):
        if name == "torch" and not torch:
            continue
        old, new = (str(info.get(name, "")) for info in (recorded, current))
        if name == "torch":
            old, new = (".".join(version.split(".")[:2]) for version in (old, new))
        if old != new:
            if name == "backend":
                old, new = (f"{backend} forced" if backend else "free choice" for backend in (old, new))
            return f"recorded with {name} {old or 'unknown'}, but here it is {new or 'unknown'}"
    return ""
