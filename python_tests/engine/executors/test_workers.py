"""Clients side by side in worker processes: the bits of clients one after another, whatever happens to the workers."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from fedkern import ops
from fedkern.engine import evaluate as evaluation
from fedkern.engine.context import RunContext
from fedkern.engine.executors import choice
from fedkern.engine.executors import workers as module
from fedkern.engine.executors.fork_server import ForkServer
from fedkern.engine.executors.workers import Workers
from fedkern.engine.local.samples import Samples
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import ClientFailed, RunFailed
from fedkern.listeners import Listener
from fedkern.methods import METHODS
from fedkern.models import MODELS
from fedkern.models.precision import compute_in
from fedkern.process import machine
from fedkern.settings.config import load_settings
from fedkern.tasks import CLASSIFICATION
from python_tests import worker_methods
from python_tests.hearing import Hearing
from python_tests.interrupted import Kill, KillAt, outcome, without
from python_tests.smallest import SETTINGS

SHORT = {"fedavg", "feddra", "fediod", "fedgid", "fedlpfm", "fusefl", "scaffold"}
EVERY = [method if method in SHORT else pytest.param(method, marks=pytest.mark.slow) for method in sorted(METHODS)]


class At(Listener):
    """A listener that acts after the n-th client of the run."""

    def __init__(self, count, act):
        self.left, self.act = count, act

    def on_client(self, round, client, info):
        if self.left == 0:
            self.act()
        self.left -= 1


def living(processes, within=10.0):
    """Return the processes that have not ended in time, where zombies count as ended."""
    deadline = time.monotonic() + within
    while True:
        found = [process for process in processes if not _has_ended(process)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def _has_ended(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def compare_workers(config, data, folder, listener=None):
    """Return the outcomes of a run with one worker and with two, without warnings about lost workers."""
    run(config.replace(workers="1"), out=folder / "serial", data=data)
    run(config.replace(workers="2"), out=folder / "workers", data=data, listener=listener)
    return outcome(folder / "serial"), outcome(folder / "workers")


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", EVERY)
def test_every_method(method, make_data, make_pairs, make_public, make_config, tmp_path, processes):
    plan = {"rounds": None} if METHODS[method].one_shot else {"rounds": 2}
    config = make_config(method, **{**plan, "grad_cam": 0, **SETTINGS.get(method, {})})
    pairs = not METHODS[method].serves(CLASSIFICATION)
    serial, side_by_side = compare_workers(config, make_pairs() if pairs else make_public(make_data(), 12), tmp_path)
    assert side_by_side == serial
    assert len(processes) == (0 if METHODS[method].pooled else 2)
    assert not living(processes)


@pytest.mark.exhaustive
def test_fediods_graphs_in_workers(make_data, make_config, tmp_path, processes):
    """Discriminators and graphs stay in the workers between calls when clients are asked one by one."""
    options = {**SETTINGS["fediod"]["options"], "batched": False}
    config = make_config("fediod", options=options, grad_cam=0)
    data = make_data()
    kills = At(20, lambda: os.kill(processes[0], signal.SIGKILL))
    serial, side_by_side = compare_workers(config, data, tmp_path, kills)
    assert kills.left < 0
    assert len(processes) == 3
    assert without(side_by_side, "lost-worker") == serial
    assert not living(processes)


# -- what happens to workers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count", [pytest.param(0, marks=pytest.mark.exhaustive), 3], ids=["at once", "in the second round"]
)
def test_a_lost_worker_is_replaced(count, make_data, make_config, tmp_path, processes):
    config = make_config("fedgid", rounds=3, buffers="local")
    kills = At(count, lambda: os.kill(processes[1], signal.SIGKILL))
    serial, side_by_side = compare_workers(config, make_data(), tmp_path, kills)
    assert len(processes) == 3
    told = side_by_side[2]["diagnostics"].get("lost-worker")
    assert told is None or "was killed" in told  # it may have had nothing to do
    assert without(side_by_side, "lost-worker") == serial
    assert not living(processes)


@pytest.mark.usefixtures("forked_workers")
def test_states_of_a_lost_workers_earlier_clients_are_written(make_data, make_config, tmp_path, monkeypatch, processes):
    """The worker of client 2 has answered for another client, whose state waits for the end of the round."""
    monkeypatch.setitem(METHODS, "fedavg", worker_methods.DyingOnce)
    monkeypatch.setenv("FEDKERN_TEST_PARENT", str(os.getpid()))
    monkeypatch.setenv("FEDKERN_TEST_MARK", str(tmp_path / "mark"))
    serial, side_by_side = compare_workers(make_config(), make_data(), tmp_path)
    assert len(processes) == 3
    assert "lost-worker" in side_by_side[2]["diagnostics"]
    assert without(side_by_side, "lost-worker") == serial


@pytest.mark.exhaustive
def test_a_worker_that_is_lost_while_it_is_told_something(make_data, make_config, tmp_path, monkeypatch, processes):
    """The client is played again also if sending the message, not a missing reply, reveals the loss."""
    forget, killed = Workers.forget, []

    def late(self, client):
        worker = self._at.get(client)
        if not killed and worker is not None and worker.client is not None:
            killed.append(worker.process)
            os.kill(worker.process, signal.SIGKILL)
            assert not living(killed)
        forget(self, client)

    monkeypatch.setattr(Workers, "forget", late)
    serial, side_by_side = compare_workers(make_config(clients=6), make_data((20, 13, 9, 20, 13, 9)), tmp_path)
    assert killed
    assert without(side_by_side, "lost-worker") == serial


@pytest.mark.parametrize("make", [pytest.param(worker_methods.narrow, marks=pytest.mark.exhaustive), None])
def test_a_network_of_the_users_own(make, make_data, make_config, tmp_path, monkeypatch, processes):
    """A network that cannot be sent is forked."""
    entry = dataclasses.replace(worker_methods.NARROW, make=make or (lambda **given: worker_methods.narrow(**given)))
    monkeypatch.setitem(MODELS, "narrow", entry)
    serial, side_by_side = compare_workers(make_config(model="narrow"), make_data(), tmp_path)
    assert len(processes) == 2
    assert side_by_side == serial


@pytest.mark.exhaustive
def test_a_worker_that_is_lost_every_time(make_data, make_config, tmp_path, monkeypatch, processes):
    monkeypatch.setitem(METHODS, "fedavg", worker_methods.Dying)
    monkeypatch.setenv("FEDKERN_TEST_PARENT", str(os.getpid()))
    with pytest.raises(RunFailed, match=r"client 1 was lost 3 times in this round \(it was killed") as failed:
        run(make_config(workers="2"), out=tmp_path / "run", data=make_data())
    assert failed.value.exit_code == 1
    assert len(processes) == 4
    assert not living(processes)


@pytest.mark.exhaustive
def test_the_process_that_forks_is_lost(make_data, make_config, tmp_path, monkeypatch, processes):
    """The workers end with their forking process, and the run continues in its own process."""
    nurseries = []
    ready = ForkServer.ready
    monkeypatch.setattr(ForkServer, "ready", lambda self: nurseries.append(self) or ready(self))
    kills = At(1, lambda: (nurseries[0]._process.kill(), nurseries[0]._process.wait()))
    serial, side_by_side = compare_workers(make_config(rounds=3), make_data(), tmp_path, kills)
    told = side_by_side[2]["diagnostics"]
    assert "one after another, as the process that starts workers was lost" in told["no-workers"]
    assert without(without(side_by_side, "no-workers"), "lost-worker") == serial
    assert not living(processes)


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.exhaustive)])
def test_a_client_that_raises(workers, make_data, make_config, tmp_path, monkeypatch, processes):
    monkeypatch.setitem(METHODS, "fedavg", worker_methods.Raising)
    config = make_config(workers=workers, rounds=3)
    with pytest.raises(ClientFailed, match=r"Client 1 failed in round 2: ZeroDivisionError: nothing to div") as failed:
        run(config, out=tmp_path / "stopped", data=make_data())
    assert "worker_methods.py" in failed.value.traceback
    assert not living(processes)
    summary = run(config.replace(on_error="skip"), out=tmp_path / "skipped", data=make_data())
    assert "Client 1 failed in round 2: ZeroDivisionError" in summary["diagnostics"]["failing-client-1"]
    dropped = [entry for record in read_metrics(tmp_path / "skipped") for entry in record.get("dropped", [])]
    (raised,) = re.findall(r"ZeroDivisionError: nothing to divide by \(worker_methods\.py, line \d+\)", str(dropped))
    assert dropped == [{"round": 2, "client": 1, "reason": raised}]


@pytest.mark.exhaustive
def test_what_cannot_be_sent_back(make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "fedavg", worker_methods.Unportable)
    with pytest.raises(RuntimeError, match="client 0 has something that cannot be pickled"):
        run(make_config(workers="2"), out=tmp_path / "run", data=make_data())


@pytest.mark.exhaustive
def test_what_cannot_be_sent_out_stays(make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "fedavg", worker_methods.Sending)
    serial, side_by_side = compare_workers(make_config(), make_data(), tmp_path)
    assert side_by_side == serial


@pytest.mark.usefixtures("forked_workers")
def test_clients_tell(make_data, make_config, tmp_path, monkeypatch, processes):
    """Diagnostics come from the first client in order, and notices arrive."""
    monkeypatch.setitem(METHODS, "fedavg", worker_methods.Telling)
    heard = Hearing()
    serial, side_by_side = compare_workers(make_config(), make_data(), tmp_path, heard)
    assert side_by_side == serial
    assert side_by_side[2]["diagnostics"]["one-name"] == "client 0 warned first"
    assert sorted(heard.notices) == sorted(2 * [f"client {k} is at work" for k in range(3)])
    assert len(processes) == 2


@pytest.mark.exhaustive
def test_a_notice_that_was_kept(make_data, make_config, tmp_path, monkeypatch, processes):
    """A method that keeps ``notice`` in ``start`` can be sent to workers, and its notices arrive."""
    monkeypatch.setitem(METHODS, "fedavg", worker_methods.Keeping)
    heard = Hearing(lock=threading.RLock())
    run(make_config(workers="2", rounds=1), out=tmp_path / "run", data=make_data(), listener=heard)
    assert len(processes) == 2
    assert sorted(heard.notices) == ["client 0", "client 1", "client 2"]


@pytest.mark.usefixtures("forked_workers")
def test_a_client_that_writes_into_its_message(make_data, make_config, tmp_path, monkeypatch):
    """The server's message stays the same.

    A changed message for the next client of the same worker is the method's own fault.
    """
    monkeypatch.setitem(METHODS, "fedavg", worker_methods.Writing)
    run(make_config(workers="2", rounds=1), out=tmp_path / "run", data=make_data())


@pytest.mark.usefixtures("forked_workers")
def test_held_uploads_are_bounded(make_data, make_config, tmp_path, monkeypatch):
    """With room for none, a finished worker waits until the server has seen all earlier uploads."""
    monkeypatch.setattr(module, "HELD_BYTES", 0)
    held = []
    unwatched = Workers._hear

    def hear(self, *args):
        unwatched(self, *args)
        held.append(len(self._replies))

    monkeypatch.setattr(Workers, "_hear", hear)
    data = make_data((40, 5, 5, 5, 5, 5))
    serial, side_by_side = compare_workers(make_config(clients=6), data, tmp_path)
    assert side_by_side == serial
    assert max(held) <= 2


@pytest.mark.exhaustive
def test_other_workers_after_an_interruption(make_data, make_config, tmp_path):
    config, data = make_config("fedgid", rounds=4, buffers="local"), make_data()
    run(config.replace(workers="1"), out=tmp_path / "whole", data=data)
    with pytest.raises(Kill):
        run(config.replace(workers="2"), out=tmp_path / "cut", data=data, listener=KillAt("client", 7))
    stored = load_settings(tmp_path / "cut")
    run(stored.replace(workers="3"), out=tmp_path / "cut", data=data, resume=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.exhaustive
def test_workers_compute_in_the_same_precision_with_the_same_forced_kernels(make_data, make_config, tmp_path):
    with ops.use_backend("reference"):
        serial, side_by_side = compare_workers(make_config("fedgid", precision="bf16"), make_data(), tmp_path)
    assert side_by_side == serial


@pytest.mark.exhaustive
@pytest.mark.parametrize("workers", ["1", "2"])
def test_threads_of_clients(workers, make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "fedavg", worker_methods.Counting)
    config = make_config(workers=workers, threads=1, client_threads=2)
    summary = run(config, out=tmp_path / "run", data=make_data())
    assert summary["diagnostics"]["threads"] == "2"


# -- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batches_side_by_side(precision, make_data, make_config, monkeypatch):
    """Bits and predictions are those of one batch after another, in every precision."""
    monkeypatch.setattr(evaluation, "CPU_BATCH", 3)
    context = RunContext(make_config(), make_data(), lambda text: None)
    network, method = context.networks.build().eval(), METHODS["fedavg"](METHODS["fedavg"].Options())
    begun = set()
    forward = type(network).forward

    def note_thread(self, images):
        begun.add(threading.get_ident())
        return forward(self, images)

    monkeypatch.setattr(type(network), "forward", note_thread)
    found = []
    for at_once in (1, 2, 3):
        sets = Samples(context.config, context.data, context.device, context.networks).test_sets
        with compute_in(precision):
            figures = evaluation.evaluate(method, network, sets, nullcontext, at_once, seed=0)
        found.append((figures, {name: data.predictions.tolist() for name, data in sets.items()}))
        assert all(data.pool is None for data in sets.values())
        assert at_once == 1 or threading.get_ident() not in begun
        begun.clear()
    assert found[0] == found[1] == found[2]
    with compute_in("fp32"):
        figures = evaluation.evaluate(method, network, sets, nullcontext, seed=0)
    assert (figures == found[0][0]) == (precision == "fp32")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["fedavg", "fedlpfm", "feddra"])
def test_test_sets_side_by_side(method, make_data, make_pairs, make_public, make_config, tmp_path, monkeypatch):
    """Two test sets at a time give the figures of one at a time, also on clients' own sets."""
    plan = {"rounds": None} if METHODS[method].one_shot else {"rounds": 2}
    settings = {**plan, "grad_cam": 0, "client_test": 0.3, **SETTINGS.get(method, {})}
    config = make_config(method, **settings)
    data = make_pairs() if not METHODS[method].serves(CLASSIFICATION) else make_public(make_data(), 12)
    found, seen = [], []
    real = evaluation._side_by_side
    for at_once in (1, 2):
        monkeypatch.setattr(
            evaluation,
            "_side_by_side",
            lambda task, keys, _: seen.append(len(keys)) or real(task, keys, at_once),  # noqa: B023
        )
        run(config, out=tmp_path / str(at_once), data=data)
        found.append(outcome(tmp_path / str(at_once)))
    assert found[0] == found[1]
    assert max(seen) == 3


# -- when there are workers ----------------------------------------------------------------------------------------


def test_short_runs_start_none(make_data, make_config, tmp_path, processes):
    run(make_config(), out=tmp_path / "run", data=make_data())
    assert not processes


@pytest.mark.parametrize(
    ("settings", "cores", "memory", "count"),
    [
        ({"threads": 8}, 8, 1 << 40, 3),  # as many as clients
        ({"threads": 8, "client_threads": 4}, 8, 1 << 40, 2),
        ({"threads": 2}, 8, 1 << 40, 2),
        ({"threads": 1}, 8, 1 << 40, 1),  # asked for one thread
        ({"threads": 8, "client_threads": 1}, 2, 1 << 40, 2),
        ({"threads": 8}, 8, choice.BASE_BYTES, 0),
        ({"threads": 8, "sample_fraction": 0.6}, 8, 1 << 40, 2),
        ({"threads": 1, "workers": "2"}, 1, 0, 2),  # what is said counts
        ({"threads": 8, "workers": "1"}, 8, 1 << 40, 1),
    ],
)
def test_how_many(settings, cores, memory, count, make_data, make_config, monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: cores)
    monkeypatch.setattr(machine, "free_memory", lambda: memory)
    config = make_config(**settings).with_client_threads()
    assert choice.workers_for(config, RunContext(config, make_data()), 100, 1000) == count


@pytest.mark.exhaustive
def test_long_runs_begin_without_them(make_data, make_config, tmp_path, monkeypatch, processes):
    """With ``auto`` the first client works in the run's process, and shows how long the run will take."""
    monkeypatch.setattr("fedkern.engine.executors.choice.workers_for", lambda *_: 2)
    monkeypatch.setattr(module, "WORTH_STARTING", 0.0)
    config, data = make_config(rounds=3), make_data()
    run(config, out=tmp_path / "auto", data=data)
    assert len(processes) == 2
    run(config.replace(workers="1"), out=tmp_path / "serial", data=data)
    assert outcome(tmp_path / "auto") == outcome(tmp_path / "serial")


def test_a_slow_start_is_no_waiting(make_data, make_config, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(ForkServer, "ready", lambda self: False)
    config, data = make_config(rounds=2), make_data()
    serial, side_by_side = compare_workers(config, data, tmp_path)
    assert side_by_side == serial
    assert not processes


LONG = ["fedavg", "--rounds", "500", "--train-samples", "200", "--model", "cnn", "--width", "8", "--grad-cam", "0"]


def start_run(out, *flags):
    """Return a run in its own process group, once its workers have begun, and the workers' pids."""
    words = [sys.executable, "-m", "fedkern.run", *LONG, "--workers", "2", "--quiet", "--out", str(out), *flags]
    process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        children = _children(process.pid)
        workers = [grandchild for child in children for grandchild in _children(child)]
        if len(workers) == 2 and (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size:
            return process, [*children, *workers]
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate()[1])


def _children(process):
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []


def test_nothing_is_left_after_kill(tmp_path):
    process, workers = start_run(tmp_path / "run")
    lines = [file.read_bytes() for pid in workers if (file := Path(f"/proc/{pid}/cmdline")).exists()]
    # Forked from what has loaded everything, not started anew; a library may ask uname meanwhile.
    assert any(b"fedkern.run" in line for line in lines)
    assert not any(b"python" in line and b"fedkern.run" not in line for line in lines)
    process.kill()
    process.wait()
    assert not living(workers)
    process.stderr.close()


@pytest.mark.exhaustive
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_group_ends_in_order(number, code, tmp_path):
    """A terminal sends Ctrl-C to the whole group, but only the run answers, in one line."""
    process, workers = start_run(tmp_path / "run")
    os.killpg(process.pid, signal.SIGINT) if number == signal.SIGINT else process.terminate()
    assert process.wait(60) == code
    said = process.stderr.read()
    process.stderr.close()
    assert said.splitlines()[-1].startswith("interrupted; " if code == 130 else "terminated; ")
    assert "Traceback" not in said
    assert not living(workers)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["scaffold", pytest.param("feddyn", marks=pytest.mark.exhaustive)])
def test_open_files_do_not_follow_the_clients(method, make_data, make_config, tmp_path, processes):
    """Many clients with states in one exchange need few descriptors in every process, and give Serial's bits."""
    clients, open_files = 130, []
    data = make_data(sizes=(2,) * clients)

    def count(*_):
        for process in (os.getpid(), *processes):
            open_files.append(len([*Path(f"/proc/{process}/fd").iterdir()]))

    config = make_config(method, rounds=1, local_epochs=1)
    run(config, out=tmp_path / "one", data=data)
    run(config.replace(workers="2"), out=tmp_path / "two", data=data, listener=Hearing(on_client=count))
    assert len(processes) == 2
    assert len(open_files) > clients
    assert max(open_files) < 64 + 60
    assert outcome(tmp_path / "two")[:2] == outcome(tmp_path / "one")[:2]


def test_a_tensor_that_is_packed_again_and_again_is_sent_once():
    from fedkern.messages.packets import Packer, Unpacker

    packer, unpacker, shared = Packer(), Unpacker(), torch.arange(5.0)
    before = None
    for client in range(500):
        packet = packer.pack((shared, torch.full((3,), float(client))))
        packet.files = {number: os.dup(descriptor) for number, descriptor in packet.files.items()}
        again, own = unpacker.unpack(packet)
        before = again if before is None else before
        assert again is before
        assert own.tolist() == [client] * 3
    early = packer.pack([torch.full((3,), 1.0) for _ in range(3)])
    assert len(packer._files) <= 64
    assert early.files
    packer.clear()
