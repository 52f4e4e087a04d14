"""Commands whose standard output or error is closed, as daemons have them, or full: they go on without a traceback.

What is printed is lost on a full disk, which the exit code tells.
"""

import subprocess
import sys

import pytest

RUN = f"{sys.executable} -m fedkern.run"
TINY = ("fedavg --data digits --train-samples 60 --clients 2 --model mlp --threads 1 --grad-cam 0 --local-steps 1 "
        "--rounds 1")  # fmt: skip


def shell(words, folder):
    return subprocess.run(["bash", "-c", words], cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("where", [
    "<&- >&- 2>&-",
    *(pytest.param(where, marks=pytest.mark.exhaustive)
      for where in (">/dev/full 2>/dev/full", ">&- 2>&-", ">&-", "2>&-", ">/dev/full", "2>/dev/full")),
])  # fmt: skip
def test_a_run_goes_on(where, tmp_path):
    done = shell(f"{RUN} {TINY} --workers 2 --out run {where}", tmp_path)
    assert done.returncode == (">/dev/full" in where.split())
    assert "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(("command", "where"), [
    ("list", ">/dev/full"), ("no-such-command", "2>/dev/full"),
    *(pytest.param(command, where, marks=pytest.mark.exhaustive) for command, where in (
        ("list", "2>/dev/full"), ("list", ">&- 2>&-"),
        ("no-such-command", ">/dev/full"), ("no-such-command", ">&- 2>&-"),
        ("doctor", ">/dev/full"), ("doctor", ">&- 2>&-"), ("doctor", "2>/dev/full"),
    )),
])  # fmt: skip
def test_other_commands_neither(command, where, tmp_path):
    done = shell(f"{RUN} {command} {where}", tmp_path)
    assert done.returncode == (2 if command == "no-such-command" else where == ">/dev/full")
    assert "Traceback" not in done.stdout + done.stderr
    assert where != ">/dev/full" or command == "no-such-command" or "No space left" in done.stderr


def test_a_reader_that_has_gone_still_ends_a_command(tmp_path):
    done = shell(f"set -o pipefail; {RUN} list | true", tmp_path)
    assert done.returncode in (0, 141)
    assert "Traceback" not in done.stderr
