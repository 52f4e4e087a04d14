"""Methods, data sets and listeners that raise: named, bounded, and never mistaken for the machine's failures."""

import errno
import traceback

import pytest

import fedkern
from fedkern import UserError
from fedkern.data import DATASETS, register_data
from fedkern.engine.store.record_files import read_summary
from fedkern.errors import MESSAGE, ClientFailed
from fedkern.listeners import Listener
from fedkern.methods import FedAvg, method_registry
from fedkern.run import main
from python_tests.engine.executors.test_ranks import run_torchrun
from python_tests.plugin_sources import unload_all

TINY = {"data": "digits", "clients": 3, "train_samples": 120, "local_steps": 1, "rounds": 1, "threads": 1,
        "model": "mlp", "grad_cam": 0, "progress": False, "pictures": False, "workers": 1}  # fmt: skip


class NoText(Exception):
    """An exception whose ``__str__`` raises."""

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
    method_registry.GIVEN.clear()
    yield
    method_registry.GIVEN.clear()


class Failing(FedAvg):
    """FedAvg in which client 1 fails."""

    raised = staticmethod(lambda: None)

    def client_update(self, client, phase, message):
        if client.id == 1:
            raise type(self).raised()
        return super().client_update(client, phase, message)


@pytest.mark.sampled(2)
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
    def load_failing():
        """Fail to make the data."""
        raise ERRORS[name]()

    try:
        with pytest.raises(UserError, match=r"failing-data.*load_failing") as failed:
            fedkern.simulate("fedavg", out=tmp_path / "run", **{**TINY, "data": "failing-data", "train_samples": None})
        assert len(str(failed.value)) < 2 * MESSAGE
    finally:
        del DATASETS["failing-data"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ERRORS)
def test_a_failing_listener_is_left_out(name, tmp_path):
    class Deaf(Listener):
        def on_round(self, record):
            raise ERRORS[name]()

    run = fedkern.simulate("fedavg", out=tmp_path / "run", listener=Deaf(), **TINY)
    assert len(run.summary["diagnostics"]["listener-Deaf"]) < 2 * MESSAGE


FAILING = """
import errno, os
from fedkern import UserError, register, register_metric
from fedkern.methods import FedAvg
from fedkern.methods.base import Round

class NoText(Exception):
    def __str__(self):
        raise ValueError("no text")

ERRORS = {
    "exception": lambda: ZeroDivisionError("nothing to divide by"),
    "missing file": lambda: FileNotFoundError(errno.ENOENT, "No such file", "/somewhere"),
    "broken pipe": lambda: BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "full disk": lambda: OSError(errno.ENOSPC, "No space left on device", "/somewhere"),
    "exit": lambda: SystemExit(0),
    "end of a generator": GeneratorExit,
    "no text": NoText,
    "long": lambda: ValueError("x" * 3_000_000),
    "user": lambda: UserError("This client has no images: bring some."),
    "long sentence": lambda: UserError("word " * 600_000),
}

def fail(place, round=1):
    if os.environ["FEDKERN_TEST_PLACE"] == place and round == 1:
        raise ERRORS[os.environ["FEDKERN_TEST_ERROR"]]()

@register_metric("worst")
def worst(logits, labels):
    "Worst figure."
    fail("metric")
    return 0.0

@register("failing")
class Failing(FedAvg):
    "FedAvg that fails where the environment says so, in round 2 where there is a round."

    def rounds(self, federation):
        for each in super().rounds(federation):
            yield Round(each.name, cohort=True) if os.environ["FEDKERN_TEST_PLACE"] == "cohort_update" else each

    def start(self, server):
        fail("start")
        super().start(server)

    def send(self, server, phase):
        fail("send", phase.round)
        return super().send(server, phase)

    def expects(self, server, phase, client, message):
        fail("expects", phase.round)
        return super().expects(server, phase, client, message)

    def client_update(self, client, phase, message):
        fail(f"client {client.id}", phase.round)
        return super().client_update(client, phase, message)

    def cohort_update(self, clients, phase, messages):
        fail("cohort_update", phase.round)

    def server_update(self, server, phase, uploads):
        fail("server_update", phase.round)
        super().server_update(server, phase, uploads)
        server.state["rounds"] = phase.round + 1

    def vectors(self, server):
        fail("vectors", server.state["rounds"] - 1)
        return super().vectors(server)

    def model(self, server):
        fail("model")
        return super().model(server)

    def evaluate(self, model, data):
        fail("evaluate")
        return super().evaluate(model, data)

    def evaluate_own(self, model, data, client):
        fail("evaluate_own")
        return super().evaluate_own(model, data, client)

    def oracle_metrics(self, server, clients, sets):
        fail("oracle_metrics")
        return super().oracle_metrics(server, clients, sets)

    def diagnose(self, observed):
        fail("diagnose")
        return super().diagnose(observed)
"""
KINDS = ["exception", "missing file", "broken pipe", "full disk", "exit", "end of a generator", "no text", "long",
         "user", "long sentence"]  # fmt: skip
PARTS = ["start", "send", "expects", "cohort_update", "server_update", "vectors", "model", "evaluate", "evaluate_own",
         "oracle_metrics", "diagnose", "metric"]  # fmt: skip
COMMAND = (
    *("failing", "--data", "digits", "--clients", "3", "--train-samples", "120", "--local-steps", "1", "--rounds", "2"),
    *("--eval-every", "2", "--threads", "1", "--model", "mlp", "--client-test", "0.2", "--quiet"),
)
# Every kind of failure is tried at one place, and every place with one kind; the others are exhaustive.
SAMPLE = {("client 1", kind, "1") for kind in KINDS} | {("client 1", "broken pipe", "2"), ("client 1", "user", "2")}
SAMPLE |= {(part, KINDS[i % len(KINDS)], "1") for i, part in enumerate(PARTS)}


def cases():
    for place in ("client 1", *PARTS):
        for kind in KINDS:
            for workers in ("1", "2") if place == "client 1" else ("1",):
                marks = () if (place, kind, workers) in SAMPLE else pytest.mark.exhaustive
                yield pytest.param(place, kind, workers, marks=marks, id=f"{place}-{kind}-{workers}")


@pytest.fixture
def command(tmp_path, monkeypatch, capfd, undrawn):
    """Return a function that runs the failing method.

    The function returns exit code and standard error, and the summary if there is one.
    """
    plugin = tmp_path / "failing.py"
    plugin.write_text(FAILING)

    def run(place, kind, *words, out="run"):
        monkeypatch.setenv("FEDKERN_TEST_PLACE", place)
        monkeypatch.setenv("FEDKERN_TEST_ERROR", kind)
        try:
            code = main([*COMMAND, "--plugin", str(plugin), "--out", str(tmp_path / out), *words])
        except Exception as error:  # what the command line lets pass: the interpreter prints it, with exit code 1
            traceback.print_exception(error)
            code = 1
        return code, capfd.readouterr().err

    yield run
    unload_all()


def check(place, kind, code, err):
    assert code == (2 if kind in ("user", "long sentence") or place == "metric" else 1), err
    assert "failing.py" in err
    assert err.count("(failing.py, line") <= 1
    assert len(err) < 50_000
    part = "evaluate" if place == "metric" else place
    when = {"start": "before the first round"}.get(place, "in round 2")
    assert (f"Client 1 failed {when}: " if place == "client 1" else f"`{part}` of the method ") in err
    assert when in err


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("place", "kind", "workers"), [*cases()])
def test_place_and_round_of_a_failure_are_named(place, kind, workers, command, tmp_path):
    code, err = command(place, kind, "--workers", workers)
    check(place, kind, code, err)
    if place == "client 1":
        code, err = command(place, kind, "--workers", workers, "--on-error", "skip", out="skipped")
        assert code == 0, err
        text = read_summary(tmp_path / "skipped")["diagnostics"]["failing-client-1"]
        assert "Client 1 failed in round 2: " in text
        assert "(failing.py, line" in text
        assert len(text) < 2 * MESSAGE


@pytest.mark.exhaustive
@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize(("kind", "skip"), [(kind, k % 2 == 1) for k, kind in enumerate(KINDS)])
def test_failures_on_ranks_are_named(kind, skip, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    words = [*COMMAND, "--plugin", str(tmp_path / "failing.py"), "--out", str(tmp_path / "run")]
    words += ["--on-error", "skip"] * skip
    done = run_torchrun(2, words, FEDKERN_TEST_PLACE="client 1", FEDKERN_TEST_ERROR=kind)
    if skip:
        assert done.returncode == 0, done.stderr
        assert "(failing.py, line" in read_summary(tmp_path / "run")["diagnostics"]["failing-client-1"]
    else:
        assert done.returncode == 1  # torchrun's own
        assert done.stderr.count("error: Client 1 failed in round 2: ") == 1
        assert "failing.py, line" in done.stderr
        assert len(done.stderr) < 60_000
