"""Runs on the ranks of torchrun: the bits of one process, whatever happens to a rank."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from fedkern.engine.transport import torchrun_group
from fedkern.engine.transport.connection import SILENCE, silence
from fedkern.errors import UserError
from fedkern.methods import AFL, FedAvg, FedProx, Scaffold
from fedkern.run import main
from python_tests.interrupted import outcome, wait_until, without
from python_tests.plugin_sources import no_plugins  # noqa: F401
from python_tests.test_own_dataset import NEED_PUBLIC, SERVING, words_of, write_images

pytestmark = pytest.mark.usefixtures("warm_processes", "no_plugins")

SMALL = (
    *("--clients", "5", "--train-samples", "100", "--width", "2", "--rounds", "3", "--local-epochs", "1"),
    *("--batch-size", "8", "--threads", "1", "--client-threads", "1", "--quiet"),
)
WITHOUT_SAMPLES = ("--rounds", "2", "--batch-size", "8", "--threads", "1", "--client-threads", "1", "--quiet")
TORCHRUN = ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

DYING = """
import os, signal
from fedkern import register
from fedkern.methods import FedAvg

@register("dying")
class Dying(FedAvg):
    "FedAvg whose rank FEDKERN_TEST_RANK dies once, in the third round."

    def client_update(self, client, phase, message):
        given = os.environ.get
        if phase.round == 2 and given("RANK") == given("FEDKERN_TEST_RANK", "-") and given("FEDKERN_TEST_END"):
            if given("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                os.kill(os.getpid(), int(given("FEDKERN_TEST_END")))
        return super().client_update(client, phase, message)
"""
RAISING = """
from fedkern import register
from fedkern.methods import FedAvg

@register("raising")
class Raising(FedAvg):
    "FedAvg whose client 1 raises."

    def client_update(self, client, phase, message):
        client.warn(f"seen-{client.id}", "as its turn comes")
        if client.id == 1:
            raise ZeroDivisionError("nothing to divide by")
        return super().client_update(client, phase, message)
"""


OF_ROWS = """
import torch
from torch import nn
from torch.utils.data import Dataset
class Rows(Dataset):
    def __init__(self, count, change):
        self.count, self.change = count, change
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        return self.change(torch.linspace(0, index, 6)), index % 3
def seeded(x):
    return x + torch.randn(6, generator=torch.Generator().manual_seed(torch.initial_seed()))
def sets(change):
    return [Rows(count, change) for count in (20, 15, 12)], Rows(10, change)
def rows():
    return sets(seeded)
def local_rows():
    return sets(lambda x: x + torch.randn(6))
class Linear(nn.Linear):
    def __init__(self):
        super().__init__(6, 3)
"""


def run_torchrun(ranks, words, *, restarts=0, seconds=170, **environment):
    """Start torchrun on this machine and wait for it."""
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    return subprocess.run(
        [*launch, "--max-restarts", str(restarts), "-m", "fedkern.run", *words],
        capture_output=True, text=True, timeout=seconds, env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
    )  # fmt: skip


def start_ranks(*words, **environment):
    """Start a rank for each command line, as torchrun would, and return the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(words)), "OMP_NUM_THREADS": "1",
        "LOCAL_WORLD_SIZE": str(len(words)), "TORCHELASTIC_RUN_ID": "tests",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", "fedkern.run", *map(str, own)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, **given, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
        )
        for rank, own in enumerate(words)
    ]  # fmt: skip


def wait_for_ranks(processes, seconds=100):
    """Return exit code, output and errors of every process."""
    found = [(*process.communicate(timeout=seconds), process.returncode) for process in processes]
    return [(code, out, err) for out, err, code in found]


def write_plugin(folder, name, code):
    """Write a plugin's file and return the words of a run of its method."""
    (folder / f"{name}.py").write_text(code)
    return (name, "--plugin", str(folder / f"{name}.py"), "--data", "digits", *SMALL)


def alone(words, out):
    """Return the outcome of the run in one process."""
    assert main([*words, "--workers", "1", "--out", str(out)]) == 0
    return outcome(out)


# -- the bits of one process ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_two_ranks(tmp_path):
    small = ("--rounds", "3", "--clients", "3", "--sample-fraction", "0.7", "--choose", "loss", "--grad-cam", "0")
    words = ("fedavg", "--data", "digits", *SMALL, *small)
    ranks = compare_ranks(words, tmp_path)
    assert [out for _, out, _ in ranks] == [f"{tmp_path / 'ranks'}\n", ""]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", [name for name in SERVING if name not in NEED_PUBLIC])
def test_images_of_a_data_set_of_ones_own(method, tmp_path):
    settings = words_of(method, write_images(tmp_path / "x.npz"))
    flags = [f"--{name}={value}" for name, value in settings.items() if "." not in name]
    options = [f"--method-option={name.partition('.')[2]}={settings[name]}" for name in settings if "." in name]
    compare_ranks((method, *flags, *options, "--quiet"), tmp_path)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["rows", "local_rows"])
def test_rows_of_a_data_set_of_ones_own(name, tmp_path):
    (tmp_path / "own.py").write_text(OF_ROWS)
    code = ("--data", f"{tmp_path / 'own.py'}:{name}", "--model", f"{tmp_path / 'own.py'}:Linear")
    compare_ranks(("scaffold", *code, *WITHOUT_SAMPLES), tmp_path)


def compare_ranks(words, folder):
    """Play a command on two ranks and in one process, with equal outcomes."""
    ranks = wait_for_ranks(start_ranks(*2 * [(*words, "--out", folder / "ranks")]))
    assert [code for code, _, _ in ranks] == [0, 0], ranks
    assert outcome(folder / "ranks") == alone(words, folder / "serial")
    return ranks


def compare_torchrun(ranks, words, folder, **environment):
    """Play a command under torchrun and in one process, with equal outcomes."""
    serial = alone(words, folder / "serial")
    done = run_torchrun(ranks, (*words, "--out", str(folder / "ranks")), **environment)
    assert done.returncode == 0, done.stderr
    assert outcome(folder / "ranks") == serial
    return done


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ("fedavg", "--data", "digits")),
        (4, ("fedavg", "--data", "digits")),
        (2, ("scaffold", "--data", "digits", "--sample-fraction", "0.6")),
        (2, ("fedavg", "--data", "digits", "--sample-fraction", "0.6", "--compress", "int8")),
        (4, ("fedgid", "--data", "colordigits")),
        (2, ("fedlpfm", "--data", "digits")),
        (2, ("ditto", "--data", "digits", "--client-test", "0.2")),
        *(
            (ranks, (method, "--data", "digits", "--sample-fraction", "0.8"))
            for method, ranks in (("fedavg", 1), ("scaffold", 4), ("feddyn", 2))
        ),
    ],
    ids=lambda given: given if isinstance(given, int) else given[0],
)
def test_the_bits_of_one_process(ranks, words, tmp_path):
    done = compare_torchrun(ranks, (*words, *SMALL), tmp_path)
    assert done.stdout == f"{tmp_path / 'ranks'}\n"


@pytest.mark.exhaustive
def test_workers_beside_ranks_are_told_once(tmp_path):
    words = ("fedavg", "--data", "digits", *SMALL)
    done = run_torchrun(2, (*words, "--workers", "3", "--out", str(tmp_path / "ranks")))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("--workers 3 changes nothing here") == 1
    assert without(outcome(tmp_path / "ranks"), "no-workers") == alone(words, tmp_path / "serial")


@pytest.mark.exhaustive
def test_warnings_come_in_client_order(tmp_path):
    compare_torchrun(2, (*write_plugin(tmp_path, "raising", RAISING), "--on-error", "skip"), tmp_path)
    names = [name for name in outcome(tmp_path / "ranks")[2]["diagnostics"] if name.startswith("seen-")]
    assert names == [f"seen-{k}" for k in range(5)]


# -- what happens to ranks -----------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_costs_a_round_and_no_bit(rank, tmp_path):
    words = write_plugin(tmp_path, "dying", DYING)
    given = {"FEDKERN_TEST_RANK": str(rank), "FEDKERN_TEST_END": str(int(signal.SIGKILL))}
    done = compare_torchrun(2, words, tmp_path, restarts=1, **given)
    # Whoever notices the end first says so: torchrun, or the other rank, whose connection to the killed one breaks.
    assert any(words in done.stderr for words in ("SIGKILL", "-9", "was lost"))


@pytest.mark.exhaustive
def test_a_killed_rank_ends_all(tmp_path):
    words = write_plugin(tmp_path, "dying", DYING)
    given = {"FEDKERN_TEST_RANK": "1", "FEDKERN_TEST_END": str(int(signal.SIGKILL))}
    rank0, rank1, rank2 = wait_for_ranks(start_ranks(*3 * [(*words, "--out", tmp_path / "ranks")], **given))
    assert rank1[0] == -signal.SIGKILL
    assert (rank0[0], rank2[0]) == (1, 1)
    assert rank0[2].count("error: ") == 1
    assert "Rank 1 was lost, as its connection was closed: go on from its last checkpoint with --resume" in rank0[2]
    assert rank2[2] == ""
    assert main(["--resume", str(tmp_path / "ranks"), "--plugin", str(tmp_path / "dying.py"), "--quiet"]) == 0
    assert outcome(tmp_path / "ranks") == alone(words, tmp_path / "serial")


@pytest.mark.exhaustive
def test_a_rank_that_hangs_is_lost(tmp_path):
    words = write_plugin(tmp_path, "dying", DYING)
    given = {"FEDKERN_TEST_RANK": "1", "FEDKERN_TEST_END": str(int(signal.SIGSTOP)), SILENCE: "4"}
    processes = start_ranks(*2 * [(*words, "--out", tmp_path / "ranks")], **given)
    rank0 = wait_for_ranks(processes[:1])[0]
    processes[1].kill()
    wait_for_ranks(processes[1:])
    assert rank0[0] == 1
    assert "Rank 1 was lost, as it was silent for 4 seconds" in rank0[2]


@pytest.mark.slow
def test_ctrl_c_ends_all_ranks_and_the_run_goes_on(tmp_path):
    words = ("fedavg", "--data", "digits", *SMALL, "--rounds", "60")
    out = tmp_path / "ranks"
    processes = start_ranks(*2 * [(*words, "--out", out)])
    wait_until(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") > 2)
    for process in processes:
        process.send_signal(signal.SIGINT)
    rank0, rank1 = wait_for_ranks(processes, 30)
    assert (rank0[0], rank1[0]) == (130, 130), (rank0[2], rank1[2])
    assert rank0[2].strip().endswith(f"interrupted; continue with: python -m fedkern.run --resume {out}")
    assert rank1[1:] == ("", "")
    ranks = wait_for_ranks(start_ranks(*2 * [("--resume", out, "--quiet")]))
    assert [code for code, _, _ in ranks] == [0, 0], ranks
    assert outcome(out) == alone(words, tmp_path / "serial")


@pytest.mark.exhaustive
def test_an_error_is_one_sentence_of_rank_0(tmp_path):
    out, digits = ("--out", tmp_path / "ranks"), ("fedavg", "--data", "digits", *SMALL)
    raising = (*write_plugin(tmp_path, "raising", RAISING), *out)
    for words, extra, code, sentence in (
        (raising, (), 1, "error: Client 1 failed in round 1: ZeroDivisionError: nothing to divide by"),
        (("fedavg", "--data", "cifar10", "--data-root", tmp_path / "nothing", *out), (), 2, "error: "),
        (("fedavg", "--ranks", "2"), (), 2, 'error: Unknown flag "--ranks"'),
        ((*digits, *out), ("--seed", "1"), 2, "error: Rank 1 was started with other arguments than rank 0 (fedavg --"),
    ):
        rank0, rank1 = wait_for_ranks(start_ranks(words, (*words, *extra)))
        assert (rank0[0], rank1) == (code, (code, "", ""))
        assert rank0[2].count("error: ") == 1
        assert sentence in rank0[2]
        assert not (tmp_path / "ranks").exists()


@pytest.mark.exhaustive
def test_other_commands_are_for_rank_0(tmp_path):
    rank0, rank1 = wait_for_ranks(start_ranks(("list", "--json"), ("list", "--json")))
    assert "fedavg" in json.loads(rank0[1])["methods"]
    assert rank1 == (0, "", "")


# -- what torchrun says ---------------------------------------------------------------------------------------------


def test_torchruns_variables(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert torchrun_group.find_rank() is None
    for name, value in zip(TORCHRUN, ("none", "3", "4", "1", "2"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "5")
    found = torchrun_group.find_rank()
    assert (found.rank, found.size, found.local, found.local_size) == (3, 4, 1, 2)
    assert (found.restarts, found.max_restarts) == (2, 5)
    assert str(os.getppid()) in found.job  # torchrun's own id says nothing
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    assert torchrun_group.find_rank().job == "job-7"
    monkeypatch.delenv("WORLD_SIZE")
    assert torchrun_group.find_rank() is None


def test_every_start_of_the_ranks_finds_its_own():
    store, until = dist.HashStore(), time.monotonic() + 20
    with socket.create_server(("127.0.0.1", 0)) as stranger:  # whoever has the port of an earlier start now
        store.set("fedkern/address", f"127.0.0.1 {stranger.getsockname()[1]} {'0' * 32}")
        found = {}

        def meet(rank):
            found[rank] = torchrun_group.find_rank_0(store, rank, until)[0]

        waiting = [threading.Thread(target=meet, args=(rank,)) for rank in (2, 1)]
        for thread in waiting:
            thread.start()
        for _ in waiting:
            stranger.accept()[0].close()
    ends = torchrun_group.accept_ranks(store, "127.0.0.1", 3, until)
    for thread in waiting:
        thread.join(10)
    for rank, end in ends.items():
        end.sendall(f"you are {rank}".encode())
        assert found[rank].recv(64).decode() == f"you are {rank}"


def test_ranks_that_do_not_come():
    store = dist.HashStore()
    with pytest.raises(TimeoutError, match="nothing came from rank 1, 2"):
        torchrun_group.accept_ranks(store, "127.0.0.1", 3, time.monotonic() + 0.2)
    with pytest.raises(TimeoutError, match="rank 0 did not answer"):  # refused, where an earlier start listened
        torchrun_group.find_rank_0(store, 1, time.monotonic() + 0.2)


def test_the_time_of_silence(monkeypatch):
    monkeypatch.delenv(SILENCE, raising=False)
    assert silence() == 600
    for text in ("0", "nan", "soon"):
        monkeypatch.setenv(SILENCE, text)
        with pytest.raises(UserError, match=f'must be a number of seconds from 1 on, not "{text}"'):
            silence()


# -- what a server only adds up ------------------------------------------------------------------------------------


class Looking(FedAvg):
    def server_update(self, server, phase, uploads):
        super().server_update(server, phase, uploads)


class Weighing(FedProx):
    def weight(self, server, upload):
        return float(upload.message["parameters"].norm())


class Declaring(Looking):
    reduce = ("parameters",)


def test_what_a_method_declares_holds_for_its_own_class():
    assert FedAvg.reduce == FedProx.reduce == ("parameters", "buffers")
    assert Scaffold.reduce == ("parameters", "buffers", "control")
    assert Looking.reduce == Weighing.reduce == AFL.reduce == ()
    assert Declaring.reduce == ("parameters",)
