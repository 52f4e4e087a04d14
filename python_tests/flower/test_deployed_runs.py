"""Complete fedkern runs on a real SuperLink and real SuperNodes, and their failures."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install '.[flower]'")

from fedkern.run import main
from python_tests.flower.federation import Federation, Node, surroundings
from python_tests.interrupted import wait_until

pytestmark = [pytest.mark.flower, pytest.mark.exhaustive]

SMALL = [
    "--data", "digits", "--model", "cnn", "--width", "4", "--train-samples", "160", "--local-steps", "2",
    "--threads", "1", "--client-threads", "1",
]  # fmt: skip
BROKEN = '''
from fedkern.methods import LocalTraining, register


@register("broken")
class Broken(LocalTraining):
    """A method whose loss fails at every client."""

    def loss(self, model, batch, received):
        return a_broken_loss()


def a_broken_loss():
    raise ZeroDivisionError("division by zero at this site")
'''


MORTAL = '''
import os
import signal
from pathlib import Path

from torch.nn.functional import cross_entropy

from fedkern.methods import LocalTraining, register


@register("mortal")
class Mortal(LocalTraining):
    """A method that ends the process of client 1 once, as the system does where memory is short."""

    def loss(self, model, batch, received):
        home = Path(os.environ["FLWR_HOME"])
        if home.name == "node-1" and not (home / "ended").exists():
            (home / "ended").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return cross_entropy(model(batch.inputs), batch.targets)
'''


def project(folder: Path, method: str, *words: str) -> Path:
    """Return a project of a run whose folder is ``folder / "run"``."""
    made = folder / "project"
    assert main([method, *SMALL, *words, "--out", str(folder / "run"), "--flower", str(made)]) == 0
    return made


def plugin_project(folder: Path, method: str, code: str, *words: str) -> Path:
    """Return a project of a plugin's method, made by another process, as plugins stay registered."""
    (folder / f"{method}.py").write_text(code)
    given = ["--plugin", str(folder / f"{method}.py"), *words, "--out", str(folder / "run")]
    subprocess.run(
        [sys.executable, "-m", "fedkern.run", method, *SMALL, *given, "--flower", str(folder / "project")],
        check=True, env=surroundings(folder / "bin"), cwd=folder,
    )  # fmt: skip
    return folder / "project"


def in_one_process(folder: Path, method: str, *words: str) -> bytes:
    """Return the network of the same run in this process."""
    assert main([method, *SMALL, *words, "--workers", "1", "--quiet", "--out", str(folder / "alone")]) == 0
    return (folder / "alone/model.safetensors").read_bytes()


def configs(federation: Federation, count: int) -> list[dict]:
    """Return the ``node_config`` of the clients' nodes, each with its own folder for states."""
    return [
        {"num_partitions": count, "state_dir": str(federation.folder / f"states-{k}")} for k in range(count)
    ]  # fmt: skip


def records(folder: Path) -> list[dict]:
    path = folder / "run/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def reasons_of(folder: Path) -> dict[int, dict[int, str]]:
    """Return the reasons of left-out clients, by round and client."""
    found: dict[int, dict[int, str]] = {record["round"]: {} for record in records(folder)}
    for record in records(folder):
        for entry in record.get("dropped", []):
            found[entry["round"]][entry["client"]] = entry["reason"]
    return found


def works(node: Node) -> bool:
    return "Receiving: train message" in node.read_log()


def test_a_killed_server_app_resumes_with_the_same_bits(tmp_path):
    words = ["--clients", "2", "--rounds", "3"]
    made = project(tmp_path, "scaffold", *words)
    (tmp_path / "federation").mkdir()
    with Federation(tmp_path / "federation") as federation:
        federation.start_nodes(*configs(federation, 2))
        killed = federation.submit(made)
        wait_until(lambda: len(records(tmp_path)) >= 1, 120)
        (server,) = federation.pids_of("flwr-serverapp")
        os.kill(server, signal.SIGKILL)
        wait_until(lambda: not federation.pids_of("flwr-serverapp"), 120)
        assert len(records(tmp_path)) < 3
        outcome = federation.run(made, resume=True)
        assert outcome.is_completed, outcome.log
        assert outcome.run != killed
    assert federation.processes() == []
    assert [record["round"] for record in records(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "run/model.safetensors").read_bytes() == in_one_process(tmp_path, "scaffold", *words)


def test_a_client_that_fails_ends_the_run_with_its_traceback(tmp_path):
    made = plugin_project(tmp_path, "broken", BROKEN, "--clients", "2", "--rounds", "1", "--on-error", "stop")
    (tmp_path / "federation").mkdir()
    with Federation(tmp_path / "federation") as federation:
        federation.start_nodes(*configs(federation, 2))
        done = subprocess.run(
            [sys.executable, "-m", "fedkern.run", "flower", str(made)],
            env=federation.environment(federation.home), cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "in a_broken_loss" in done.stdout
    assert "ZeroDivisionError: division by zero at this site" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: Run ")


def test_a_client_whose_process_is_killed_is_left_out_and_back_in_the_next_round(tmp_path):
    made = plugin_project(tmp_path, "mortal", MORTAL, "--clients", "2", "--rounds", "2")
    (tmp_path / "federation").mkdir()
    with Federation(tmp_path / "federation") as federation:
        federation.start_nodes(*configs(federation, 2))
        outcome = federation.run(made)
        assert outcome.is_completed, outcome.log
    assert federation.processes() == []
    losses, second = reasons_of(tmp_path).values()
    assert list(losses) == [1]
    assert "The process of this client ended before it had answered" in losses[1]
    assert second == {}


def test_a_node_that_does_not_answer_costs_the_deadline_and_is_back_in_the_next_round(tmp_path):
    made = project(tmp_path, "scaffold", "--clients", "2", "--rounds", "2")
    (tmp_path / "federation").mkdir()
    with Federation(tmp_path / "federation") as federation:
        _, node = federation.start_nodes(*configs(federation, 2))
        run = federation.submit(made, **{"flower.deadline": 40.0})
        wait_until(lambda: works(node), 120)
        os.killpg(node.process.pid, signal.SIGSTOP)
        wait_until(lambda: len(records(tmp_path)) == 1, 120)
        os.killpg(node.process.pid, signal.SIGCONT)
        outcome = federation.wait_for(run)
        assert outcome.is_completed, outcome.log
    losses, second = reasons_of(tmp_path).values()
    assert list(losses) == [1]
    assert "had not answered after 40 seconds" in losses[1]
    assert second == {}
