"""Methods that a script gives to fedkern.simulate and fedkern.load as classes and objects."""

import pickle
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import fedkern
from fedkern.api import read_request
from fedkern.methods import FedAvg, FedIOD, FedLPFM, FedProx, method_registry, option, script_methods
from fedkern.run import main

TINY = {"data": "digits", "train_samples": 120, "clients": 3, "model": "mlp", "threads": 1, "grad_cam": 0,
        "local_steps": 2, "workers": 1, "progress": False, "pictures": False}  # fmt: skip
QUIET = {"progress": False, "pictures": False, "workers": 1}


class Slow(FedAvg):
    """FedAvg whose server goes only a part of the way."""

    @dataclass(frozen=True)
    class Options(FedAvg.Options):
        share: float = option(1.0, "share of the way", above=0, high=1)

    def server_update(self, server, phase, uploads):
        before = server.state["parameters"]
        super().server_update(server, phase, uploads)
        server.state["parameters"] = torch.lerp(before, server.state["parameters"], self.options.share)


class Half(FedAvg):
    """Another class."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method_registry.GIVEN.clear()
    yield
    method_registry.GIVEN.clear()


def memory():
    """Return two clients whose classes are the brighter halves of images."""
    rng = np.random.default_rng(0)

    def pair(n):
        labels = rng.integers(0, 2, n)
        images = rng.integers(0, 120, (n, 8, 8), dtype=np.uint8)
        images[labels == 0, :4] += 120
        return images, labels

    return fedkern.FederatedData.from_arrays([pair(20), pair(20)], pair(20))


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))


def text(weight):
    return f"class Slow(FedAvg):\n    def weight(self, server, upload):\n        return {weight}\n"


def define(weight):
    """Return a class without a file, as a notebook defines it."""
    scope = {"FedAvg": FedAvg}
    exec(text(weight), scope)
    return scope["Slow"]


def test_options_are_given_by_name_or_as_an_object():
    assert FedProx(mu=0.3).options == FedProx.Options(mu=0.3) == FedProx(FedProx.Options(mu=0.3)).options
    assert FedProx().options == FedProx.Options()
    assert FedLPFM(lam=0.4).options.lam == 0.4
    assert FedIOD(mode="public").options.mode == "public"
    assert FedProx.Options(mu=0.3).given_values() == {"mu": 0.3}
    assert FedProx.Options("uniform").given_values() == {"weighting": "uniform"}
    assert FedLPFM(lam=0.4).options.given_values() == {"lambda": 0.4}
    assert pickle.loads(pickle.dumps(FedProx.Options(mu=0.3))).given_values() == {"mu": 0.3}


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda: FedProx(mus=0.3), 'Unknown method option "mus" of FedProx. Did you mean "mu"?'),
    (lambda: FedIOD(iteration=3), 'Did you mean "iterations"?'),
    (lambda: FedProx(mu=-1), 'Method option "mu" must be at least 0, not -1.'),
    (lambda: FedProx(0.3), "FedProx takes options by name, FedProx(NAME=VALUE), or an object FedProx.Options(...)"),
    (lambda: FedProx(FedProx.Options(), mu=0.3), "not both: leave one out"),
])  # fmt: skip
def test_a_wrong_option_is_one_sentence(make, sentence):
    with pytest.raises(fedkern.UserError, match=re.escape(sentence)):
        make()


def test_an_object_means_its_name_and_the_options_it_was_made_with():
    named = fedkern.simulate(FedProx(mu=0.1), rounds=1, out="one", **TINY)
    two = fedkern.simulate("fedprox", mu=0.1, rounds=1, out="two", **TINY)
    assert named.config.to_dict() == two.config.to_dict()
    assert named.metrics == two.metrics
    assert fedkern.load("one", method=FedProx(mu=0.1)).metrics == named.metrics

    def options(method):
        return read_request(method, "digits", None, {})[0].options

    assert options(FedLPFM) == options(FedLPFM()) == options("fedlpfm")
    assert options(FedLPFM())["lambda"] == 0.9 != FedLPFM().options.lam  # the data set's default
    assert options(FedLPFM(temperature=2.0)) == {**options("fedlpfm"), "temperature": 2.0}
    assert options(FedLPFM(lam=FedLPFM().options.lam))["lambda"] == FedLPFM().options.lam


def test_a_class_without_a_name_is_stored_and_given_again(capsys):
    settings = {"data": memory(), "threads": 1, "grad_cam": 0, "lr": 0.1, **QUIET}
    long = fedkern.simulate(Slow(share=0.5), model=network(), rounds=2, out="long", **settings)
    run = fedkern.simulate(Slow(share=0.5), model=network(), rounds=1, out="run", **settings)
    assert run.config.method == f"class:{__name__}:Slow"
    assert run.config.options["share"] == 0.5
    assert run.config.method_sha256 == script_methods.fingerprint(Slow)
    method_registry.GIVEN.clear()  # as in another process
    with pytest.raises(fedkern.UserError, match=re.escape("go on with it in Python, fedkern.load('run', method=Slow)")):
        fedkern.load("run")
    assert main(["--resume", "run"]) == 2
    assert "method=Slow" in capsys.readouterr().err
    again = fedkern.load("run", method=Slow, data=memory(), model=network())
    assert again.metrics == run.metrics
    assert again.evaluate()["accuracy"] == run.metrics["accuracy"]
    assert again.predict(np.zeros((1, 1, 8, 8), np.uint8)).shape == (1, 2)
    again.extend(2, **QUIET)
    assert again.metrics == long.metrics
    state = long.model().state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.model().state_dict().items())


def test_the_folder_of_a_class_has_its_plain_name():
    run = fedkern.simulate(Slow, rounds=1, **TINY)
    assert run.out.name.startswith("Slow-digits-")
    assert run.config.options["share"] == 1.0


def test_what_differs_is_said(monkeypatch):
    method, second = define("1.0"), define("2.0")
    run = fedkern.simulate(method, rounds=1, out="run", **TINY)
    assert fedkern.load("run", method=define("1.0")).metrics == run.metrics
    Path("moved_of_a_test.py").write_text("from fedkern.methods import FedAvg\n" + text("1.0"))
    monkeypatch.syspath_prepend(".")
    from moved_of_a_test import Slow as Moved

    assert fedkern.load("run", method=Moved).metrics == run.metrics
    way = r'put back the former one, or give trusted=\["method"\] to fedkern\.load'
    with pytest.raises(fedkern.UserError, match=rf"the class Slow has changed since the run in run began .* {way}"):
        fedkern.load("run", method=second)
    longer = fedkern.load("run", method=second, trusted=["method"]).extend(2, **QUIET)
    assert "goes on with the class Slow as it is now" in longer.summary["diagnostics"]["other-code"]
    with pytest.raises(fedkern.UserError, match="is Slow, not Half: give that class"):
        fedkern.load("run", method=Half)
    settings = Path("run/config.toml")
    content = settings.read_text()
    settings.write_text(re.sub(r"(?m)^method_sha256 = .*\n", "", content))
    with pytest.raises(fedkern.UserError, match="the class Slow has changed since the run in run began"):
        fedkern.load("run", method=method)
    settings.write_text(content)
    fedkern.simulate(second, rounds=1, out="other", **TINY)  # a cell of a notebook was changed and run again
    assert run.extend(3, **QUIET).summary["rounds"] == 3
    fedkern.simulate(FedProx(mu=0.1), rounds=1, out="prox", **TINY)
    with pytest.raises(fedkern.UserError, match="one of the method fedprox, not of Slow: leave method out"):
        fedkern.load("prox", method=Slow)
    with pytest.raises(fedkern.UserError, match=r"has mu=0\.1, not mu=0\.5: give method=fedprox without options"):
        fedkern.load("prox", method=FedProx(mu=0.5))


class Beside(FedAvg):
    """A method with an argument that is no option."""

    def __init__(self, mu=0.1):
        super().__init__()
        self.mu = mu


class Needing(FedAvg):
    """A method with two arguments."""

    def __init__(self, left, second):
        super().__init__()


class Bare(FedAvg):
    """A method whose options are no dataclass."""

    class Options(FedAvg.Options):
        share: float = option(1.0, "share of the way")


class Foreign(FedAvg):
    """A method whose options have their own kind of class."""

    class Options:
        share = 1.0


@pytest.mark.parametrize(("method", "settings", "sentence"), [
    (3, {}, "method must be the name of a method, a class derived from fedkern.methods.Method or an object of one"),
    (dict, {}, "not <class 'dict'>"),
    (Slow(share=0.5), {"share": 0.2}, "share is given twice, in Slow(...) and beside it"),
    (Slow(share=0.5), {"options": {"share": 0.2}}, "share is given twice"),
    (Slow, {"shares": 0.2}, 'Slow and its runs have no setting "shares". Did you mean "share"'),
    (Slow, {"quiet": True}, 'no setting "quiet". Did you mean "progress=False"?'),
    (Slow, {"share": 2.0}, 'Method option "share" must be'),
    (Beside(mu=0.5), {}, "Beside has mu beside its options"),
    (Needing, {}, "Needing cannot be made from its options, as a run makes it (TypeError"),
    (Bare, {}, "Bare.Options declares share without effect: put @dataclass(frozen=True)"),
    (Foreign, {}, "Foreign.Options must derive from the options of its base: class Options(FedAvg.Options)"),
])  # fmt: skip
def test_a_mistake_is_one_sentence_and_leaves_nothing(method, settings, sentence, tmp_path):
    with pytest.raises(fedkern.UserError, match=re.escape(sentence)):
        fedkern.simulate(method, rounds=1, **TINY, **settings)
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import fedkern
from fedkern.methods import FedAvg


class Mine(FedAvg):
    '''A method of a script.'''

    def weight(self, server, upload):
        return 1.0


if __name__ == "__main__":
    fedkern.simulate(Mine, data="digits", train_samples=120, clients=3, model="mlp", threads=1, grad_cam=0,
                     local_steps=2, workers=2, rounds=2, pictures=False, out="run")
"""


@pytest.mark.exhaustive
def test_a_class_of_main_runs_in_forked_workers_and_is_loaded_from_its_module(tmp_path, monkeypatch):
    (tmp_path / "script_of_a_test.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script_of_a_test.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert re.search(r"2 workers of some \d+ MB", said)
    monkeypatch.syspath_prepend(tmp_path)
    from script_of_a_test import Mine

    run = fedkern.load("run", method=Mine)
    assert run.config.method == "class:__main__:Mine"
    assert "no-workers" not in run.summary["diagnostics"]
    assert run.extend(3, **QUIET).summary["rounds"] == 3


def test_the_fingerprint_is_that_of_a_class_and_its_bases(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = textwrap.dedent(
        """
        from fedkern.methods import FedAvg
        def share():
            return 1
        class Base(FedAvg):
            def weight(self, server, upload):
                return share()
        class Derived(Base):
            '''Two.'''
        """
    )

    def fingerprints(text, name):
        Path(name).with_suffix(".py").write_text(text)
        module = __import__(name)
        return script_methods.fingerprint(module.Base), script_methods.fingerprint(module.Derived)

    before = fingerprints(text, "first_of_a_test")
    assert fingerprints("import json\n" + text.replace("Two", "2") + "\nprint\n", "second_of_a_test") == before
    changed = fingerprints(text.replace("return 1", "return 2"), "third_of_a_test")
    assert changed[0] != before[0]
    assert changed[1] != before[1]
    assert script_methods.fingerprint(define("1.0")) == script_methods.fingerprint(define("1.0"))
    assert script_methods.fingerprint(define("upload.samples in {'a', 'b'}")) != script_methods.fingerprint(define("1"))
