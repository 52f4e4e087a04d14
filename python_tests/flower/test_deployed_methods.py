"""Every method on a real SuperLink and real SuperNodes has the bits of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install '.[flower]'")

from fedkern.run import main
from python_tests.flower.federation import Federation
from python_tests.interrupted import outcome

pytestmark = [pytest.mark.flower, pytest.mark.exhaustive]

CLIENTS = 2
SMALL = {
    "--train-samples": 60, "--width": 2, "--batch-size": 8, "--local-steps": 2, "--grad-cam": 0, "--threads": 1,
    "--client-threads": 1, "--clients": CLIENTS, "--on-nan": "skip", "--on-error": "skip", "--workers": 1,
}  # fmt: skip
DIGITS = {"--data": "digits", "--rounds": 2}
METHODS = {
    "fedavg": (DIGITS, {}),
    "scaffold": (DIGITS, {"control": "I"}),
    "fedgid": ({"--rounds": 2}, {"background_pool": "shared"}),
    "fusefl": ({"--data": "digits", "--local-steps": None, "--local-epochs": 2}, {"blocks": 2}),
    "fedlpfm": ({**DIGITS, "--public-samples": 20, "--partition": "iid"}, {}),
    "fediod": (
        {**DIGITS, "--local-steps": None, "--local-epochs": 1},
        {"nz": 4, "ngf": 2, "ndf": 2, "batch": 8, "student_steps": 2, "iterations": 3, "absent": 0.3, "batched": False},
    ),
    "feddra": ({"--data": "captions", "--train-samples": 80, "--rounds": 1, "--width": 4}, {"alignment_steps": 1}),
}
OF_SIMULATIONS = {"fediod", "fusefl"}
"""Methods whose summary has figures of all clients' data, which nodes do not give."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation")
    with Federation(folder) as made:
        made.start_nodes(
            *({"num_partitions": CLIENTS, "state_dir": str(folder / f"states-{k}")} for k in range(CLIENTS))
        )
        yield made
    assert made.processes() == []


def words(method: str) -> list[str]:
    flags, options = METHODS[method]
    given = {name: value for name, value in {**SMALL, **flags}.items() if value is not None}
    listed = [str(word) for flag in given.items() for word in flag]
    chosen = [word for key, value in options.items() for word in ("--method-option", f"{key}={value}")]
    return [method, *listed, *chosen]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_on_supernodes(method, federation, tmp_path):
    alone, run, project = tmp_path / "alone", tmp_path / "run", tmp_path / "project"
    assert main([*words(method), "--quiet", "--out", str(alone)]) == 0
    assert main([*words(method), "--out", str(run), "--flower", str(project)]) == 0
    ended = federation.run(project)
    assert ended.completed, ended.log
    expected, found = outcome(alone), outcome(run)
    assert found[0] == expected[0]
    assert found[1] == expected[1]
    assert found[2]["metrics"].items() <= expected[2]["metrics"].items()
    if method not in OF_SIMULATIONS:
        assert found[2] == expected[2]
    assert len(residents(federation)) >= CLIENTS
    assert json.loads((run / "summary.json").read_text())["wire"]["up"] > 0


def residents(federation: Federation) -> list[int]:
    """The processes that stay with the clients."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in federation.processes()}
    return [pid for pid, command in commands.items() if b"client_daemon import live" in command]
