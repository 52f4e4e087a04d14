"""``fedkern flower PROJECT_DIR`` on a real SuperLink and in Flower's own simulation."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install '.[flower]'")

from python_tests.flower.federation import CONNECTION, Federation, commands, surroundings
from python_tests.flower.flower_processes import processes_of
from python_tests.flower.test_deployed_runs import in_one_process, project, records
from python_tests.flower.test_deployment import faulty
from python_tests.interrupted import wait_until

pytestmark = [pytest.mark.flower, pytest.mark.exhaustive]

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Flower's simulation needs ray: pip install 'flwr[simulation]'"
)


def start(environment: dict[str, str], project: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fedkern.run", "flower", str(project), *words], cwd=project.parent, env=environment,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def play(environment: dict[str, str], project: Path, *words: str) -> tuple[int, str, str]:
    process = start(environment, project, *words)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.fixture
def simulation(tmp_path):
    """Yield the environment of a simulation whose processes and folders the test can find."""
    commands(tmp_path / "bin")
    with tempfile.TemporaryDirectory() as short:  # Ray's sockets have paths of at most 107 characters
        yield surroundings(tmp_path / "bin") | {"FLWR_HOME": str(tmp_path / "home"), "RAY_TMPDIR": short}


def test_the_command_follows_a_run_and_its_exit_code_tells_how_it_ended(tmp_path):
    (tmp_path / "federation").mkdir()
    with Federation(tmp_path / "federation") as federation:
        environment = federation.environment(federation.home)
        federation.start_nodes({"fault": "raises"}, {})
        good = faulty(tmp_path / "good", 2)
        code, out, err = play(environment, good)
        assert code == 0, err
        assert "Round 1: 1 replies count, 1 do not." in out

        bad = faulty(tmp_path / "bad", 2)
        (bad / "client_app.py").write_text((bad / "client_app.py").read_text().replace('fault == "raises"', "True"))
        code, out, err = play(environment, bad, "--superlink", CONNECTION)
        assert code == 1
        assert "in a_broken_pipeline" in out
        assert "ZeroDivisionError: division by zero at this site" in out
        assert err.startswith("error: Run ")
        assert "no reply of this run has counted" in err.splitlines()[-1]

        for wrong, words in ((good, ["--run-config", "nonesuch=1"]), (tmp_path / "nonesuch", [])):
            code, out, err = play(environment, wrong, *words)
            assert code == 2
            assert err.startswith("error: Flower: ")
            assert len(err.splitlines()) == 1
            assert out == ""


def test_ctrl_c_stops_the_run(tmp_path):
    (tmp_path / "federation").mkdir()
    marker = tmp_path / "hangs"
    with Federation(tmp_path / "federation") as federation:
        federation.start_nodes({"hangs_in_round": 1, "marker": str(marker)})
        process = start(federation.environment(federation.home), faulty(tmp_path / "project", 1, deadline=500.0))
        wait_until(marker.exists, 90)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "stopping run" in err
        (found,) = federation.ask("ls", CONNECTION)["runs"]
        assert found["status"] == "finished:stopped"


@needs_ray
def test_a_foreign_superlink_on_the_default_port_does_not_take_a_simulation(tmp_path, simulation):
    (tmp_path / "federation").mkdir()
    with Federation(tmp_path / "federation") as foreign:
        before = set(foreign.processes())
        default = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(foreign.port)}
        nodes = ["--federation-config", "num-supernodes=3"]
        code, out, err = play(simulation | default, faulty(tmp_path / "project", 3), *nodes)
        assert code == 0, err
        assert "Round 1: 3 replies count, 0 do not." in out
        assert foreign.ask("ls", CONNECTION)["runs"] == []
        assert set(processes_of(tmp_path)) == before


@needs_ray
def test_a_simulation_ends_at_ctrl_c_and_resumes_with_the_same_bits(tmp_path, simulation):
    words = ["--clients", "3", "--rounds", "60"]
    made = project(tmp_path, "scaffold", *words)
    process = start(simulation, made)
    wait_until(lambda: records(tmp_path) or process.poll() is not None, 200)
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert processes_of(tmp_path) == []
    assert len(records(tmp_path)) < 60

    code, out, err = play(simulation, made, "--run-config", "resume=true")
    assert code == 0, out + err
    assert processes_of(tmp_path) == []
    assert [record["round"] for record in records(tmp_path)] == list(range(1, 61))
    assert (tmp_path / "run/model.safetensors").read_bytes() == in_one_process(tmp_path, "scaffold", *words)
