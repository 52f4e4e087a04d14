"""Tests of freed memory, which stays with the process unless the user has said otherwise."""

import json
import os
import subprocess
import sys

import pytest

FAULTS = """
import json, resource
import torch
from fedkern.process.allocator import keep_freed_memory

def faults():
    torch.set_num_threads(1)
    found = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(1 << 20) for _ in range(8)]  # of 4 MB
        del blocks
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found[4:])

before = faults()
kept = keep_freed_memory()
print(json.dumps([before, kept, faults()]))
"""


def count_faults(**environment: str) -> tuple[int, bool, int]:
    found = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**os.environ, **environment}, check=True, capture_output=True, text=True
    )
    before, kept, after = json.loads(found.stdout)
    return before, kept, after


@pytest.mark.exhaustive
@pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="glibc"
)
def test_freed_memory_stays():
    # A small block that happens to lie above the freed ones keeps them in the process without our help.
    for _ in range(20):
        before, kept, after = count_faults()
        if before > 8 * 256:
            break
    assert kept
    assert before > 8 * 256  # pages, of 4 kB or more, mapped anew: otherwise this test shows nothing
    assert after < before / 20


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")]
)
def test_the_user_has_the_last_word(name, value):
    _, kept, _ = count_faults(**{name: value})
    assert not kept
