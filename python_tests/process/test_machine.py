"""Tests of a process's cores and memory: the limits of its control groups count, and those above them."""

import pytest

from fedkern.process import machine


@pytest.fixture
def texts(monkeypatch):
    """Return the text files that a machine of sixteen cores has, by path."""
    texts = {}

    def read(path):
        if str(path) not in texts:
            raise FileNotFoundError(path)
        return texts[str(path)]

    monkeypatch.setattr(machine.Path, "read_text", read)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(16)))
    return texts


def test_cores_and_memory_are_those_of_the_control_group(texts):
    texts |= {"/sys/fs/cgroup/cpu.max": "150000 100000", "/sys/fs/cgroup/memory.max": "1000", "/proc/meminfo": "x 1 kB"}
    texts["/sys/fs/cgroup/memory.current"] = "400"
    assert machine.usable_cores() == 1
    assert machine.free_memory() == 600
    texts["/sys/fs/cgroup/cpu.max"], texts["/sys/fs/cgroup/memory.max"] = "max 100000", "max"
    assert machine.usable_cores() == 16
    texts["/proc/meminfo"] = "MemTotal: 9 kB\nMemAvailable: 5 kB\n"
    assert machine.free_memory() == 5 << 10


NESTED = "0::/system.slice/run.service/task"
MOUNTED = "31 23 0:28 {root} {place} rw - {kind} cgroup rw,{more}\n"
OWN_GROUP = "/sys/fs/cgroup/system.slice/run.service/task/"
PARENT = "/sys/fs/cgroup/system.slice/"
DOCKER = MOUNTED.format(root="/docker/abc", place="/sys/fs/cgroup", kind="cgroup2", more="x")


def version_1(controller, group, **files):
    return {f"/sys/fs/cgroup/{controller}/{group}/{name}": text for name, text in files.items()}


@pytest.mark.parametrize(("files", "cores", "memory"), [
    ({"/proc/self/cgroup": NESTED, OWN_GROUP + "cpu.max": "100000 100000", OWN_GROUP + "memory.max": "900",
      OWN_GROUP + "memory.current": "100"}, 1, 800),
    ({"/proc/self/cgroup": NESTED, PARENT + "cpu.max": "300000 100000", OWN_GROUP + "cpu.max": "max 100000",
      PARENT + "memory.max": "500", PARENT + "memory.current": "100", OWN_GROUP + "memory.max": "max"}, 3, 400),
    ({"/proc/self/cgroup": NESTED, OWN_GROUP + "memory.max": "900", OWN_GROUP + "memory.current": "700",
      OWN_GROUP + "memory.stat": "anon 1\ninactive_file 600\n", PARENT + "cpu.max": "x"}, 16, 800),
    ({"/proc/self/cgroup": "0::/docker/abc/child", "/proc/self/mountinfo": DOCKER,
      "/sys/fs/cgroup/child/cpu.max": "200000 100000", "/sys/fs/cgroup/memory.max": "70",
      "/sys/fs/cgroup/memory.current": "30"}, 2, 40),
    ({"/proc/self/cgroup": "4:memory:/slurm/job\n2:cpu,cpuacct:/slurm/job/step\n0::/",
      **version_1("cpu", "slurm/job", **{"cpu.cfs_quota_us": "400000", "cpu.cfs_period_us": "100000"}),
      **version_1("cpu", "slurm/job/step", **{"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}),
      **version_1("memory", "slurm/job", **{"memory.limit_in_bytes": "90", "memory.usage_in_bytes": "40"})}, 4, 50),
    ({"/proc/self/cgroup": "3:cpu:/a", "/proc/self/mountinfo": MOUNTED.format(
        root="/", place="/cgroups/cpu,cpuacct", kind="cgroup", more="cpu,cpuacct"),
      "/cgroups/cpu,cpuacct/a/cpu.cfs_quota_us": "250000", "/cgroups/cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
     2, 1 << 20),
    ({}, 16, 1 << 20),
])  # fmt: skip
def test_limits_are_those_of_the_process_group_and_its_parents(files, cores, memory, texts):
    texts |= {"/proc/meminfo": "MemAvailable: 1024 kB\n", **files}
    assert (machine.usable_cores(), machine.free_memory()) == (cores, memory)
