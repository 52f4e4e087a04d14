"""Runs that are killed on the way, and the outcome that must be the same once they are resumed."""

import gc
import json
import os
import shutil
import time
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedkern.engine.run import run
from fedkern.engine.store.checkpoints import checksum, entry_sum
from fedkern.engine.store.record_files import read_metrics
from fedkern.listeners import Listener
from fedkern.messages import states
from fedkern.settings.config import load_settings

TIMES = ("seconds", "round_seconds", "phases", "device", "wire")
"""What no two runs have alike: times, and the bytes around the messages, of which a resumed run has more."""


def outcome(out):
    """Return what must be the same bit for bit: the model, the metrics and the summary but for TIMES."""
    metrics = [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(out)]
    summary = {k: v for k, v in json.loads((out / "summary.json").read_text()).items() if k not in TIMES}
    return (out / "model.safetensors").read_bytes(), metrics, summary


def wait_until(condition, seconds=60):
    """Wait for a condition, and fail after the timeout."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def without(found, warning):
    """Return an outcome without this warning, which a run has where the lost part had something to do."""
    model, metrics, summary = found
    told = dict(summary["diagnostics"])
    told.pop(warning, None)
    return model, metrics, {**summary, "diagnostics": told}


def forge(out, change):
    """Change every entry of a run's manifest and make its checksums right, as a forger would."""
    manifest = out / "checkpoints" / "manifest.json"
    content = json.loads(manifest.read_text())
    for entry in content["entries"]:
        change(entry)
        entry["sum"] = entry_sum(entry)
    manifest.write_text(json.dumps(content))


def forge_state(out, name, change):
    """Apply ``change`` to the state in a file of a run's checkpoints, and make the checksums right."""
    path = out / "checkpoints" / name
    state = states.load(path)
    change(state)
    states.save(path, state)
    forge(out, lambda entry: entry["files"].update({name: checksum(path)} if name in entry["files"] else {}))


def undo_rounds(out):
    """Take a run back to the time before its first round: nothing committed, nothing learnt."""
    for path in out.iterdir():
        if path.name != "config.toml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def forget_results(out):
    """Remove from a run's manifest the results that it vouches for."""

    def forget(entry):
        if "results" in entry["info"]:
            entry["info"]["results"] = {}
        del entry["info"]["parts"]["artifacts"]

    forge(out, forget)


class Thing:
    pass


def lose(number):
    """Send a signal to this process whose handler runs in a weak reference's callback."""
    thing = Thing()

    def send_signal(_):
        os.kill(os.getpid(), number)
        for _ in range(100):  # lines on which the handler can run
            time.sleep(0)

    reference = weakref.ref(thing, send_signal)
    del thing
    gc.collect()
    return reference


class Kill(BaseException):
    """Stand-in for kill -9, which no code of fedkern may catch."""


@contextmanager
def killed_at_rename(count, when):
    """Kill the code inside before or after the ``count``-th rename of a file."""
    seen = []
    real = Path.replace

    def replace(self, target):
        if len(seen) == count and when == "before":
            raise Kill
        result = real(self, target)
        seen.append(str(target))
        if len(seen) == count + 1 and when == "after":
            raise Kill
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(Kill):
            yield


def play_killed(config, *, at, **how):
    """Play a run that dies at a hook."""
    with pytest.raises(Kill):
        run(config, listener=at, **how)


def kill_and_resume(config, *, out, at, **how):
    """Play a run that dies at a hook, resume it, and return its outcome."""
    play_killed(config, out=out, at=at, **how)
    run(load_settings(out), out=out, resume=True, **how)
    return outcome(out)


def kill_often(config, *, out, at, **how):
    """Play a run that dies at the hook ``at(attempt)`` until it ends, and return how often it died."""
    for attempt in range(20):
        try:
            run(config, out=out, resume=attempt > 0, listener=at(attempt), **how)
            return attempt
        except Kill:
            pass
    raise AssertionError("the run does not end")


def check_interruption(config, folder, *, at, **how):
    """Check that a run which dies at a hook and is resumed ends as one that nothing interrupts."""
    run(config, out=folder / "whole", **how)
    assert kill_and_resume(config, out=folder / "cut", at=at, **how) == outcome(folder / "whole")


class KillAt(Listener):
    """Listener that kills a run at a hook after ``count`` calls, in all or within one round."""

    def __init__(self, hook, count=0, round=None):
        self.hook, self.count, self.round = hook, count, round

    def _maybe(self, hook, round=None):
        if hook == self.hook and self.round in (None, round):
            self.count -= 1
            if self.count < 0:
                raise Kill

    def on_round_start(self, round, *_):
        self._maybe("round-start", round)

    def on_client(self, round, *_):
        self._maybe("client", round)

    def on_round(self, record):
        self._maybe("round", record["round"])

    def on_end(self, _):
        self._maybe("end")
