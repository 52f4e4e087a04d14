"""Code of a method, data set or listener that raises anything: named, bounded, and never taken for the machine's."""

import errno

import pytest

import fedkern
from fedkern import UserError
from fedkern.data import DATASETS, register_data
from fedkern.engine import Listener
from fedkern.errors import MESSAGE, ClientFailed, RunFailed
from fedkern.methods import FedAvg, registry

TINY = {"data": "digits", "clients": 3, "train_samples": 120, "local_steps": 1, "rounds": 1, "threads": 1,
        "model": "mlp", "grad_cam": 0, "progress": False, "pictures": False, "workers": 1}  # fmt: skip


class NoText(Exception):
    """An exception whose text cannot be made."""

    def __str__(self):
        raise ValueError("no text")


ERRORS = {
    "broken pipe": lambda: BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "full disk": lambda: OSError(errno.ENOSPC, "No space left on device", "/somewhere"),
    "missing file": lambda: FileNotFoundError(errno.ENOENT, "No such file", "/somewhere"),
    "exit": lambda: SystemExit(0),
    "exit with a text": lambda: SystemExit("bye"),
    "no text": NoText,
    "long": lambda: ValueError("x" * 3_000_000),
    "words": lambda: ValueError("word " * 600_000),
    "memory": lambda: MemoryError("Unable to allocate 9 GiB"),
    "end of a generator": GeneratorExit,
}


@pytest.fixture(autouse=True)
def classes():
    registry.GIVEN.clear()
    yield
    registry.GIVEN.clear()


class Failing(FedAvg):
    """FedAvg in which client 1 fails."""

    raised = staticmethod(lambda: None)

    def client_update(self, client, step, message):
        if client.id == 1:
            raise type(self).raised()
        return super().client_update(client, step, message)


@pytest.mark.parametrize("name", ERRORS)
def test_a_failing_client_is_named_and_may_be_skipped(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Failing, "raised", staticmethod(ERRORS[name]))
    with pytest.raises(ClientFailed, match="Client 1 failed in round 1: ") as failed:
        fedkern.simulate(Failing, out=tmp_path / "stopped", **TINY)
    assert "test_failing_code.py" in failed.value.traceback
    assert len(str(failed.value)) < 2 * MESSAGE
    assert len(failed.value.traceback) < 40_000
    run = fedkern.simulate(Failing, out=tmp_path / "skipped", on_error="skip", **TINY)
    assert "failing-client-1" in run.summary["diagnostics"]


@pytest.mark.parametrize("part", ["server_update", "send", "model", "evaluate"])
@pytest.mark.parametrize("name", [name for name in ERRORS if name != "memory"])
def test_a_failing_server_names_method_part_and_round(name, part, tmp_path):
    def fail(self, *_, **__):
        raise ERRORS[name]()

    kind = type("Served", (FedAvg,), {"__doc__": "FedAvg.", "__module__": __name__, part: fail})
    with pytest.raises(RunFailed, match=rf"{part} of .*Served in round 1 failed: ") as failed:
        fedkern.simulate(kind, out=tmp_path / "run", **TINY)
    assert "test_failing_code.py" in failed.value.traceback
    assert len(str(failed.value)) < 2 * MESSAGE


def test_an_ordinary_error_of_the_server_keeps_its_type(tmp_path):
    def fail(self, *_):
        raise ValueError("no such layer")

    kind = type("Ordinary", (FedAvg,), {"__doc__": "FedAvg.", "__module__": __name__, "server_update": fail})
    with pytest.raises(ValueError, match="no such layer") as failed:
        fedkern.simulate(kind, out=tmp_path / "run", **TINY)
    assert "server_update" in "".join(failed.value.__notes__)
    assert "in round 1" in "".join(failed.value.__notes__)


@pytest.mark.parametrize("name", [name for name in ERRORS if name != "memory"])
def test_a_failing_data_function_is_named(name, tmp_path):
    @register_data("failing-data")
    def made():
        """Data that cannot be made."""
        raise ERRORS[name]()

    try:
        with pytest.raises(UserError, match=r"failing-data.*made") as failed:
            fedkern.simulate("fedavg", out=tmp_path / "run", **{**TINY, "data": "failing-data", "train_samples": None})
        assert len(str(failed.value)) < 2 * MESSAGE
    finally:
        del DATASETS["failing-data"]


@pytest.mark.parametrize("name", ERRORS)
def test_a_failing_listener_is_left_out(name, tmp_path):
    class Deaf(Listener):
        def on_round(self, record):
            raise ERRORS[name]()

    run = fedkern.simulate("fedavg", out=tmp_path / "run", listener=Deaf(), **TINY)
    assert len(run.summary["diagnostics"]["listener-Deaf"]) < 2 * MESSAGE
