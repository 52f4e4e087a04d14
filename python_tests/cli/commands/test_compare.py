"""compare: methods over seeds and settings, and finished runs."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fedkern.comparison import cell_runner
from fedkern.process import machine
from fedkern.run import main
from python_tests.interrupted import outcome, without

TINY = ["--data", "digits", "--train-samples", "120", "--clients", "3", "--model", "mlp", "--threads", "1",
        "--grad-cam", "0", "--local-steps", "2", "--workers", "1", "--rounds", "1"]  # fmt: skip


@pytest.fixture
def cores(monkeypatch):
    """Pretend that the machine has four cores."""
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)


def test_a_comparison_goes_on_where_it_stopped(result, monkeypatch, tmp_path, capsys):
    words = ["compare", "fedprox", "fedavg", *TINY, "--seeds", "2", "--method-option", "mu=0.5"]
    played, real = [], cell_runner.run

    def interrupt_third(config, **settings):
        played.append((config.method, config.seed))
        if len(played) == 3:
            raise KeyboardInterrupt
        return real(config, **settings)

    monkeypatch.setattr(cell_runner, "run", interrupt_third)
    assert main(words) == 130
    assert played == [("fedprox", 0), ("fedavg", 0), ("fedprox", 1)]
    said = capsys.readouterr().err.splitlines()[-1]
    (folder,) = (tmp_path / "comparisons").iterdir()
    assert said.startswith("interrupted; go on with: python -m fedkern.run compare fedprox fedavg --data digits")
    assert said.endswith(f" --out comparisons/{folder.name}")
    out, err = result(*said.partition("fedkern.run ")[2].split())
    assert played[3:] == [("fedprox", 1), ("fedavg", 1)]
    assert "1/4  fedprox, seed 0" in err
    assert "finished before" in err
    assert "±" in out
    assert (folder / "comparison.md").read_text().startswith("# fedprox, fedavg on digits")
    out, _ = result(*words, "--out", str(folder), "--json")
    assert len(played) == 5
    found = json.loads(out)
    assert [row["seeds"] for row in found["table"]] == [2, 2]
    assert r"\begin{tabular}" in (folder / "comparison.tex").read_text()


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.exhaustive)])
def test_sigterm_inside_a_run_says_how_to_go_on(jobs, cores, capsys, tmp_path):
    def stop():
        while not (tmp_path / "x/fedavg_seed=0/config.toml").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    words = ["compare", "fedavg", *TINY[:-1], "100000", "--eval-every", "100000", "--seeds", "1", "--out", "x"]
    threading.Thread(target=stop, daemon=True).start()
    assert main([*words, "--jobs", jobs]) == 143
    assert capsys.readouterr().err.splitlines()[-1].startswith("terminated; go on with: ")
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("threads", ["1", pytest.param("2", marks=pytest.mark.exhaustive)])
def test_runs_that_play_at_once_have_the_bits_of_runs_alone(threads, cores, capsys, tmp_path):
    """On one thread a run is a fork of this process. On two, where OpenMP forbids forks, it is a new process."""
    words = ["compare", "fedavg", *TINY, "--threads", threads, "--seeds", "2", "--sweep", "lr=0.05,1e30", "--out"]
    assert main([*words, "x"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert main([*words, "y", "--jobs", "2"]) == 1
    assert sorted(line[5:24] for line in capsys.readouterr().err.splitlines()) == sorted(line[5:24] for line in lines)
    for seed in "01":
        name = f"fedavg_lr=0.05_seed={seed}"
        assert without(outcome(tmp_path / "y" / name), "shared-machine") == outcome(tmp_path / "x" / name)
    assert "Up to 2 runs shared the machine" in Path("y/comparison.md").read_text()
    assert list(Path("y").glob("*.log")) == []


def eventually_gone(group):
    """Return whether all processes of a group end, once init has reaped the killed ones."""
    for _ in range(1000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.skipif(machine.usable_cores() < 2, reason="needs two cores")
def test_a_killed_and_an_interrupted_run_go_on_with_the_same_command(tmp_path):
    words = ["compare", "fedavg", "fedprox", *TINY[:-1], "20", "--checkpoint-every", "2", "--seeds", "1", "--out"]
    command = [sys.executable, "-m", "fedkern.run", *words, "x", "--jobs", "2"]
    written = [Path("x/fedavg_seed=0/metrics.jsonl"), Path("x/fedprox_seed=0/config.toml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(runs := children.read_text().split()) < 2 or not all(path.exists() for path in written):
            time.sleep(0.01)
        os.kill(int(runs[1]), signal.SIGSTOP)
        os.kill(int(runs[0]), signal.SIGKILL)
        failure = next(line for line in process.stderr if "  failed: " in line)
        assert "fedavg, seed 0  failed: The process of the run was lost (it was killed" in failure
        os.kill(int(runs[1]), signal.SIGCONT)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 130
        assert "interrupted; go on with: " in process.stderr.read()
    assert eventually_gone(process.pid)
    assert main([*words, "x", "--jobs", "2"]) == main([*words, "y"]) == 0
    for folder in (path.parent for path in written):
        assert without(outcome(folder), "shared-machine") == outcome(Path("y") / folder.name)


def test_tasks_of_an_array_script_play_the_runs(result, monkeypatch, tmp_path):
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    words = ["compare", "fedavg", *TINY, "--seeds", "2", "--out", "it's out"]
    result(*words, "--slurm")
    script = Path("it's out/slurm.sh").absolute()
    assert "#SBATCH --array=0-1\n#SBATCH --cpus-per-task=1\n" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)
    subprocess.run(["bash", script], env={**os.environ, "SLURM_ARRAY_TASK_ID": "0"}, cwd="/", check=True)
    result(*words, "--task", "1")
    assert result(*words)[1].count("finished before") == 2


def test_the_best_setting_by_validation_runs_with_every_seed(result, tmp_path):
    sweep = ["--sweep", "lr=0.0001,0.2", "--select", "validation", "--seeds", "2"]
    out, _ = result("compare", "fedavg", "fedprox", *TINY, *sweep, "--out", "x")
    assert "was chosen by validation accuracy of seed 0" in out
    names = sorted(path.name for path in (tmp_path / "x").iterdir() if path.is_dir())
    assert len(names) == 6
    assert "fedavg_lr=0.0001_seed=0" in names
    assert "fedavg_lr=0.0001_seed=1" not in names or "fedavg_lr=0.2_seed=1" not in names


def test_a_failed_run_is_told_and_the_others_finish(capsys, tmp_path):
    words = ["compare", "fedavg", *TINY, "--seeds", "1", "--sweep", "lr=0.05,1e30", "--out", "x"]
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert "error: fedavg lr=1e+30, seed 0: Client" in err
    assert "No run of fedavg lr=1e+30 succeeded." in out
    assert "Failed: fedavg lr=1e+30" in (tmp_path / "x/comparison.md").read_text()


@pytest.mark.exhaustive
def test_finished_runs_are_grouped_and_their_differences_told(result, fails):
    for lr in ("0.05", "0.1"):
        for seed in ("0", "1"):
            result("fedavg", *TINY, "--lr", lr, "--seed", seed, "--quiet", "--out", f"r/{lr}-{seed}")
    out, _ = result("compare", "r", "--out", "y", "--target", "accuracy=0.99")
    assert "fedavg lr=0.05" in out
    assert "| reached by 0 of 2 | – | – |" in Path("y/comparison.md").read_text()
    assert "Besides the method, the groups differ in lr (0.05 for fedavg lr=0.05; 0.1 for fedavg lr=0.1)." in out
    assert "given twice" in fails("compare", "r", "r/0.05-0")
    assert 'no round has the figure "foo"' in fails("compare", "r", "--target", "foo=1").lower()
    assert "is for new runs" in fails("compare", "r", "--seeds", "2")
    assert "is a folder and fedavg is a method" in fails("compare", "r", "fedavg")
    copied = ["fedavg", *TINY, "--lr", "0.05", "--quiet", "--out", "copy"]
    result(*copied)
    assert "same method, settings and seed" in fails("compare", "copy", "r/0.05-0")
    assert "other settings (lr: 0.05 -> 0.1)" in _refuse_moved(fails)


def _refuse_moved(fails):
    os.renames("copy", "z/fedavg_seed=0")
    return fails("compare", "fedavg", *TINY, "--lr", "0.1", "--out", "z")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Nothing to compare"),
        (("fedavg", "--sedes", "3"), 'Did you mean "--seeds"'),
        (("fedavg", "--resume", "x"), "--resume is not for compare"),
        (("fedavg", "--sweep", "lr=1,2", "--lr", "3"), "swept and given"),
        (("fedavg", "--data", "cifar10", "--quiet"), "--data-root DIR"),
        (("fedavg", "--data", "cifar10", "--threads", "1", "--jobs", "2", "--out", "x/y"), "--data-root DIR"),
        (("fedavg", "--threads", "3", "--jobs", "2"), "may use 4 cores: give --jobs 1, or --threads 2, which may"),
        (("fedavg", "--jobs", "0"), '--jobs must be a whole number from 1 on, not "0"'),
        (("fedavg", "--jobs", "2", "--workers", "2"), "one process each, and the runs have --workers 2"),
        (("fedavg", "--slurm", "--jobs", "2"), "one run a task, and --jobs 2 plays several"),
        (("fedavg", "--slurm", "--task", "0"), "all tasks, and --task 0 plays one"),
        (("fedavg", "--task", "3"), 'from 0 to 2, not "3"'),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(words, said, cores, fails, tmp_path):
    assert said in fails("compare", *words)
    assert list(tmp_path.iterdir()) == []


def test_help_and_place_of_the_command(result, fails):
    out, _ = result("compare", "--help")
    assert "--sweep NAME=V,V" in out
    assert fails("--quiet", "compare", "fedavg").startswith("error: Name compare first")
