"""Tests of signals that arrive where Python loses an exception, and of several signals: the run ends once, in order."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.process import interrupts
from fedkern.process.interrupts import Terminated, check, in_order
from fedkern.run import main
from python_tests.interrupted import lose, outcome

BOTH = pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])


@pytest.mark.sampled(1)
@BOTH
def test_a_signal_that_a_callback_swallows_is_raised_again(number, kind, capsys):
    def go():
        with in_order():
            lose(number)
            check()

    with pytest.raises(kind):
        go()
    assert "Exception ignored" not in capsys.readouterr().err
    check()  # nothing is left of it


@BOTH
def test_a_second_signal_does_not_end_the_clean_up(number, kind):
    done = []

    def go():
        try:
            os.kill(os.getpid(), number)
            time.sleep(1)
        finally:
            for sent in (signal.SIGINT, signal.SIGTERM, number):
                os.kill(os.getpid(), sent)
                time.sleep(0.001)
            done.append("cleaned")

    with pytest.raises(kind), in_order():
        go()
    assert done == ["cleaned"]


def test_a_second_signal_gets_through_where_the_first_was_lost():
    def go():
        lose(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        raise AssertionError("not reached")

    with pytest.raises(Terminated), in_order():
        go()


def test_handlers_are_given_back_and_others_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)

    def own(number, frame):
        raise AssertionError("the caller's")

    given = signal.signal(signal.SIGINT, own)
    try:
        with in_order():
            assert signal.getsignal(signal.SIGINT) is own
            assert isinstance(signal.getsignal(signal.SIGTERM), interrupts.Handler)
            with in_order():  # the outer one serves
                pass
            assert isinstance(signal.getsignal(signal.SIGTERM), interrupts.Handler)
    finally:
        signal.signal(signal.SIGINT, given)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("undrawn", "warm_processes")
@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), pytest.param(signal.SIGINT, 130, "inter", marks=pytest.mark.exhaustive)],
)
def test_a_burst_ends_a_command_once_and_resume_gives_the_uninterrupted_run(number, code, word, tmp_path):
    words = ["fedavg", "--data", "digits", "--train-samples", "300", "--rounds", "25", "--clients", "2", "--threads",
             "1", "--workers", "1", "--grad-cam", "0", "--model", "mlp", "--local-steps", "1", "--eval-every",
             "25"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "fedkern.run", *words, "--out", str(tmp_path / "run")], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    manifest = tmp_path / "run" / "checkpoints" / "manifest.json"
    end = time.monotonic() + 60
    while not (manifest.exists() and b"round" in manifest.read_bytes()) and time.monotonic() < end:
        time.sleep(0.01)
    while process.poll() is None:
        process.send_signal(number)
        time.sleep(0.004)
    out, err = process.communicate()
    assert process.returncode == code
    assert "Traceback" not in out + err
    assert (out + err).count(f"{word}") == 1
    assert "--resume" in out + err
    assert 1 <= Checkpoints(tmp_path / "run").open()["round"] < 25
    assert main(["--resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert main([*words, "--quiet", "--out", str(tmp_path / "whole")]) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
