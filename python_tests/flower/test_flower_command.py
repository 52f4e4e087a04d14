"""``fedkern flower PROJECT_DIR`` on a real SuperLink and in Flower's own simulation."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedkern[flower]'")

from federation import Federation
from test_deployment import faulty, quickstart

from fedkern.flower.local_superlink import processes_of

pytestmark = [pytest.mark.flower, pytest.mark.exhaustive]


def started(federation: Federation, project: Path, *words: str, **variables: str) -> subprocess.Popen:
    environment = {**federation.environment(federation.folder / "users-home"), **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "fedkern.run", "flower", str(project), *words], cwd=federation.folder, env=environment,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def played(*args, timeout=300, **named) -> tuple[int, str, str]:
    process = started(*args, **named)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def address(federation: Federation) -> list[str]:
    return ["--superlink", f"127.0.0.1:{federation.port}", "--insecure"]


def test_the_command_follows_a_run_and_its_exit_code_tells_how_it_ended(tmp_path):
    (tmp_path / "federation").mkdir()
    kept = tmp_path / "kept"
    with Federation(tmp_path / "federation") as federation:
        federation.start_nodes({"fault": "raises"}, {})
        good = faulty(tmp_path / "good", 2)
        code, out, err = played(federation, good, *address(federation), "--out", str(kept))
        assert code == 0, err
        assert "completed in" in out
        assert "Round 1: 1 replies count, 1 do not." in err
        assert json.loads((kept / "run.json").read_text())["status"] == "finished:completed"
        assert "Round 1: 1 replies count, 1 do not." in (kept / "log.txt").read_text()

        # A client's traceback is shown even where the log is not.
        bad = faulty(tmp_path / "bad", 2)
        (bad / "client_app.py").write_text((bad / "client_app.py").read_text().replace('fault == "raises"', "True"))
        code, out, err = played(federation, bad, *address(federation), "--quiet")
        assert code == 1
        assert "in a_broken_pipeline" in err
        assert "ZeroDivisionError: division by zero at this site" in err
        assert "error: Run " in err
        assert "no reply of this run has counted" in err.splitlines()[-1]
        assert out == ""

        # What Flower refuses is one sentence.
        code, _, err = played(federation, good, *address(federation), "--run-config", "nonesuch=1")
        assert code == 2
        assert "error: Flower: " in err
        assert "Traceback" not in err


def test_ctrl_c_stops_the_run(tmp_path):
    (tmp_path / "federation").mkdir()
    marker = tmp_path / "hangs"
    with Federation(tmp_path / "federation") as federation:
        federation.start_nodes({"hangs_in_round": 1, "marker": str(marker)})
        process = started(federation, faulty(tmp_path / "project", 1, deadline=500.0), *address(federation))
        limit = time.monotonic() + 90
        while not marker.exists():
            assert time.monotonic() < limit
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "stopping run" in err
        (found,) = json.loads(federation.flwr("ls", "fedkern", "--format", "json").stdout)["runs"]
        assert found["status"] == "finished:stopped"


def test_a_foreign_superlink_on_the_default_port_does_not_take_a_simulation(tmp_path):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Flower's simulation needs ray: pip install 'flwr[simulation]'")
    (tmp_path / "federation").mkdir()
    with Federation(tmp_path / "federation") as foreign:
        before = set(foreign.processes())
        with tempfile.TemporaryDirectory() as short:  # Ray's sockets have paths of at most 107 characters
            places = {"TMPDIR": str(tmp_path), "RAY_TMPDIR": short}
            default = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(foreign.port), **places}
            code, out, err = played(foreign, quickstart(tmp_path / "project"), "--nodes", "3", **default)
        assert code == 0, err
        assert "SuperLink: a simulation on this machine" in err
        assert "Round 1: 3 replies count, 0 do not." in err
        assert "completed in" in out
        assert json.loads(foreign.flwr("ls", "fedkern", "--format", "json").stdout)["runs"] == []
        assert set(processes_of(tmp_path)) <= before
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("fedkern-flower-")]
