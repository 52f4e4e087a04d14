"""The script in examples/flower_deployment runs unchanged, and gives the bits of one process with all data."""

import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install '.[flower]'")

from fedkern.engine.run import run
from fedkern.settings.config import load_settings
from fedkern.settings.run_data import data_of_one
from python_tests.flower.federation import SCRIPT, commands, deployment, surroundings
from python_tests.flower.flower_processes import processes_of

pytestmark = pytest.mark.flower


@pytest.mark.slow
def test_the_script_gives_the_bits_of_one_process_that_has_all_data(tmp_path):
    commands(tmp_path / "bin")
    folder, single = tmp_path / "federation", tmp_path / "alone"
    environment = surroundings(tmp_path / "bin") | {"FLWR_HOME": str(tmp_path / "no-home")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "accuracy of scaffold over 3 sites: 0." in done.stdout
    assert processes_of(folder) == []
    assert {path.name for path in (folder / "states").iterdir()} == {"north", "east", "south"}

    config = load_settings(folder / "run", device="cpu")
    data = data_of_one(config)
    roots = [str(folder / "data" / site) for site in deployment().SITES]
    parts = [data_of_one(config.replace(data_root=root), node=True) for root in roots]
    assert len({len(part.clients[0]) for part in parts}) == 3
    run(config, data=replace(data, clients=tuple(part.clients[0] for part in parts)), out=single)
    assert (single / "model.safetensors").read_bytes() == (folder / "run/model.safetensors").read_bytes()


def test_private_keys_are_readable_by_their_owner_alone(tmp_path):
    script = deployment()
    private, _ = script.node_key(tmp_path / "node")
    for path in (private, script.certificates(tmp_path / "certificates")["key"]):
        assert path.stat().st_mode & 0o077 == 0
