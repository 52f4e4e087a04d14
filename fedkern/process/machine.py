"""Cores and memory that this process may use, with the limits of its control groups."""

import os
import sys
from contextlib import suppress
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
"""Usual mount point of control groups."""


def usable_cores() -> int:
    """Return the cores of this process's affinity mask, at most the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas: list[float] = []
    for folder in _groups(""):
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (folder / "cpu.max").read_text().split()[:2]
            quotas.append(int(quota) / int(period))
    for folder in _groups("cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):
            limit = int((folder / "cpu.cfs_quota_us").read_text())
            quotas += [limit / int((folder / "cpu.cfs_period_us").read_text())] if limit > 0 else []
    smallest = min(quotas, default=0.0)
    return max(1, min(cores, int(smallest))) if smallest else cores


_MEMORY = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Files of a control group's limit and use, and the reclaimable part of its use, by controller."""


def free_memory() -> int:
    available = _statistic(Path("/proc/meminfo"), "MemAvailable:")
    amounts = [] if available is None else [available << 10]
    for controller, (limit, used, reclaimable) in _MEMORY.items():
        for folder in _groups(controller):
            with suppress(OSError, ValueError):
                free = int((folder / limit).read_text()) - int((folder / used).read_text())
                amounts.append(free + (_statistic(folder / "memory.stat", reclaimable) or 0))
    return max(0, min(amounts, default=sys.maxsize))


def _statistic(path: Path, name: str) -> int | None:
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.split()[:1] == [name]:
                return int(line.split()[1])
    return None


def _groups(controller: str) -> list[Path]:
    group, mounts = "/", {(str(GROUPS / controller), "/")}
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, _, tail = line.partition(":")
            names, _, path = tail.partition(":")
            if controller in names.split(",") and (controller or number == "0"):
                group = path
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            mount, _, tail = line.partition(" - ")
            kind, _, *options = [*tail.split(), ""]
            if kind == ("cgroup" if controller else "cgroup2") and (
                not controller or controller in options[0].split(",")
            ):
                mounts.add((mount.split()[4], mount.split()[3]))
    folders = dict[Path, None]()
    for place, root in sorted(mounts):
        inside = Path(os.path.relpath(group, root))  # a container without a namespace mounts its own group alone
        below = [] if ".." in inside.parts else [inside, *inside.parents]
        folders.update(dict.fromkeys(Path(place) / folder for folder in [*below, Path()]))
    return list(folders)
