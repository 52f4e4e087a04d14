"""User-defined loops and optimisers: the bits of the built-in training, and sentences where they do not fit."""

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fedkern
from fedkern.engine.local.script_objects import ScriptObjects
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import ClientFailed, UserError
from fedkern.methods import METHODS
from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.report.live.progress_bar import run_headline
from fedkern.settings.config import load_settings
from fedkern.settings.defaults import COMMON
from python_tests.hearing import Hearing
from python_tests.interrupted import KillAt, kill_and_resume, outcome, play_killed
from python_tests.own_networks import Plain, Staged
from python_tests.saved_network import same_network, tensors

pytestmark = pytest.mark.usefixtures("forked_workers")

EXAMPLES = Path(__file__).parents[3] / "examples"
HOW = {"lr": 0.05, "momentum": 0.5, "local_epochs": 2, "rounds": 2}


def loop(model, client):
    """Train as FedAvg does, in the usual few lines.

    The network has dropout, and is in train mode.
    """
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=client.lr, momentum=0.5)
    for _ in range(client.epochs):
        for group in optimizer.param_groups:
            group["lr"] = client.lr
        for batch in client.batches():
            optimizer.zero_grad()
            cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()
            assert len(batch.indices) <= client.batch_size + 1
            assert batch.inputs.device == client.device
    client.report["steps"] = len(optimizer.state)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.5)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


OWN = ScriptObjects(train=loop)


@pytest.fixture
def play(make_config, make_data, tmp_path):
    def play(name, method="fedavg", script=ScriptObjects(), **settings):
        network = {} if script.network is None else {"width": None}
        config = make_config(method, **{**HOW, **network, **settings})
        run(config, out=tmp_path / name, data=make_data(), script=script)
        return tmp_path / name

    return play


# -- a loop ------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", ["cnn", Plain, Staged], ids=["cnn", "plain", "staged"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"local_steps": 3, "lr_steps": "1"}, {"straggler_rate": 0.7}, {"buffers": "local"}, {"aggregator": "median"},
     {"server_rule": "adam"}, {"dp_clip": 0.5, "dp_noise": 0.3, "dp_draws": "seed"}, {"sample_fraction": 0.5},
     {"lr_decay": 0.9, "lr_steps": "1,3"}],
    ids=lambda settings: next(iter(settings), "plain"),
)  # fmt: skip
def test_a_loop_like_fedavg_has_its_bits(settings, kind, play):
    torch.manual_seed(0)
    model = None if kind == "cnn" else kind()
    scripts = {"fedavg": ScriptObjects(model), "own": ScriptObjects(model, loop)}
    assert same_network(*(play(name, script=script, **settings) for name, script in scripts.items()))


class Trainer:
    """A trainer as in libraries: it asks the module for optimiser and loss, and reads its loader every epoch."""

    def fit(self, module, loader, epochs):
        optimizer = module.optimizer()
        for _ in range(epochs):
            for batch in loader:
                optimizer.zero_grad()
                module.step(*batch).backward()
                optimizer.step()


class Module(nn.Module):
    def __init__(self, network, lr):
        super().__init__()
        self.network, self.lr = network, lr

    def step(self, inputs, targets):
        return cross_entropy(self.network(inputs), targets)

    def optimizer(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)


class Loader:
    def __init__(self, client):
        self.client = client

    def __iter__(self):
        return ((batch.inputs, batch.targets) for batch in self.client.batches())


def fit(model, client):
    Trainer().fit(Module(model, client.lr), Loader(client), client.epochs)


def in_halves(model, client):
    """Accumulate the gradients of two halves of a batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=client.lr, momentum=0.5)
    for _ in range(client.epochs):
        for batch in client.batches():
            optimizer.zero_grad()
            rows = len(batch.targets)
            for half in torch.arange(rows).chunk(2):
                loss = cross_entropy(model(batch.inputs[half]), batch.targets[half], reduction="sum")
                (loss / rows).backward()
            optimizer.step()


def in_bf16(model, client):
    """Train with AMP, a scaler, and a scheduler that lives for one exchange."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, client.epochs)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(client.epochs):
        for batch in client.batches():
            optimizer.zero_grad()
            with torch.autocast(client.device.type, torch.bfloat16):
                loss = cross_entropy(model(batch.inputs), batch.targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        scheduler.step()
    client.report["rate"] = scheduler.get_last_lr()[0]


def test_a_trainer_s_fit_has_the_bits_of_fedavg_and_accumulated_gradients_its_numbers(play):
    torch.manual_seed(0)
    model = Plain()
    usual, fitted, found = (play(str(train), script=ScriptObjects(model, train)) for train in (None, fit, in_halves))
    assert same_network(usual, fitted)
    torch.testing.assert_close(tensors(found), tensors(usual), rtol=1e-4, atol=1e-6)


def test_amp_and_a_scheduler_have_the_same_bits_in_workers(play):
    script = ScriptObjects(train=in_bf16)
    serial, parallel = (play(workers, script=script, workers=workers) for workers in "12")
    assert outcome(serial)[0] == outcome(parallel)[0]
    rates = [record["clients"]["0"]["rate"] for record in read_metrics(serial)]
    assert rates == pytest.approx([0, 0], abs=1e-9)
    assert not same_network(serial, play("sgd", script=OWN))


def test_the_example_has_the_bits_of_fedavg(play):
    example = runpy.run_path(str(EXAMPLES / "own_loop.py"))["train"]
    usual = {"momentum": COMMON["momentum"]}
    assert same_network(play("fedavg", **usual), play("own", script=ScriptObjects(train=example), **usual))


def test_a_loop_has_the_same_bits_in_workers_and_after_a_kill(make_config, make_data, play, tmp_path):
    expected = play("one", script=OWN, workers="1")
    assert outcome(expected)[0] == outcome(play("two", script=OWN, workers="2"))[0]
    play_killed(make_config(**HOW), out=tmp_path / "cut", data=make_data(), script=OWN, at=KillAt("round", 1))
    stored = load_settings(tmp_path / "cut")
    with pytest.raises(UserError, match=r"trains with a script's own train function loop: go on with it in Python"):
        run(stored, out=tmp_path / "cut", data=make_data(), resume=True)
    with pytest.raises(UserError, match=r"began \(train function loop then, SGD\(lr=0.05.* trusted=\[\"train\"\]"):
        run(stored, out=tmp_path / "cut", data=make_data(), resume=True, script=ScriptObjects(optimizer=sgd))
    run(stored, out=tmp_path / "cut", data=make_data(), resume=True, script=OWN)
    assert outcome(tmp_path / "cut") == outcome(expected)


def test_every_change_of_code_is_in_the_diagnostics(digits, tmp_path):
    file, out, quiet = tmp_path / "net.py", tmp_path / "run", {"pictures": False, "progress": False}
    file.write_text("from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))\n")
    name = f"{file}:net"
    fedkern.simulate("fedavg", data=digits(), model=name, train=loop, rounds=1, local_epochs=1, out=out, **quiet)
    again = {"data": digits(), "train": in_halves, "trusted": ["train", name]}
    said = fedkern.load(out, **again).extend(2, **quiet).summary["diagnostics"]["other-code"]
    file.write_text(file.read_text() + "\n# changed\n")
    twice = fedkern.load(out, **again).extend(3, **quiet).summary["diagnostics"]["other-code"]
    assert said.startswith("The run goes on with the training of clients")
    assert twice.startswith(f"{said} The run goes on with the network {name}")


@pytest.fixture
def digits(make_data):
    """Return a function that makes data in memory under the name of a data set."""
    return lambda: dataclasses.replace(make_data(), name="digits")


def test_python_s_words(digits, tmp_path):
    heard = Hearing()
    how = {"model": "cnn", "width": 2, "rounds": 1, "pictures": False, "progress": False, "listener": heard}
    found = fedkern.simulate("fedavg", data=digits(), train=loop, out=tmp_path / "loop", **how)
    words = "local training: train function loop, learning rate 0.05, batch size 32, 2 local epochs"
    assert words in run_headline(heard.info)
    assert found.history.records[0]["clients"]["0"]["steps"] > 0
    fedkern.simulate("fedprox", data=digits(), optimizer=adam, out=tmp_path / "adam", **how)
    (told,) = (
        line for line in run_headline(heard.info) if line.startswith("local training: AdamW(lr=0.01, betas=(0.9, 0")
    )
    assert told.endswith("), batch size 32, 2 local epochs")
    again = fedkern.load(tmp_path / "adam", data=digits(), optimizer=adam).extend(2, progress=False, pictures=False)
    uncut = fedkern.simulate("fedprox", data=digits(), optimizer=adam, out=tmp_path / "two", **{**how, "rounds": 2})
    assert same_network(again.out, uncut.out)
    with pytest.raises(UserError, match="go on with it in Python"):
        fedkern.load(tmp_path / "loop", data=digits()).extend(2)
    assert len(found.extend(2, progress=False, pictures=False).history) == 2  # with the objects that it had
    with pytest.raises(UserError, match=r"model must be .* or what makes it, not 'net.pt': the trained weig"):
        fedkern.load(tmp_path / "loop", data=digits(), model="net.pt")
    again = fedkern.load(tmp_path / "loop", data=digits()).evaluate()
    assert {name: found.metrics[name] for name in again} == pytest.approx(again)


def test_what_is_frozen_stays_as_it_is(play):
    torch.manual_seed(0)
    model = Staged()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    model[1].running_mean.normal_()
    usual, found = play("fedavg", script=ScriptObjects(model)), play("own", script=ScriptObjects(model, loop))
    for name, value in model.state_dict().items():
        if name.startswith(("0.", "1.")):
            assert torch.equal(tensors(found)[name], value), name
    assert tensors(found).keys() == tensors(usual).keys()


def test_an_error_in_a_method_s_own_update_names_file_and_line(digits, tmp_path):
    class Own(FedAvg):
        """FedAvg with a loop that fails inside of torch."""

        def client_update(self, client, phase, message):
            model = client.model(message)
            for batch in client.batches():
                cross_entropy(model(batch.inputs), batch.inputs)
            return client.upload(model)

    line = Own.client_update.__code__.co_firstlineno + 3
    with pytest.raises(ClientFailed, match=rf"Client 0 failed in round 1: .*\(test_script_objects.py, line {line}\)"):
        fedkern.simulate(Own, data=digits(), model="cnn", width=2, out=tmp_path / "run", progress=False, pictures=False)


def test_a_method_s_own_update_has_the_same_words(play, monkeypatch):
    class Own(FedAvg):
        """FedAvg with a loop of its own."""

        name = "own-update"

        def client_update(self, client, phase, message):
            model = client.model(message)
            optimizer = torch.optim.SGD(model.parameters(), lr=client.lr, momentum=0.5)
            for _ in range(client.epochs):
                for batch in client.batches(phase):
                    optimizer.zero_grad()
                    self.loss(model, batch, None).backward()
                    optimizer.step()
            return client.upload(model)

    monkeypatch.setitem(METHODS, "own-update", Own)
    assert same_network(play("fedavg"), play("own", "own-update"))


# -- the state of a client ---------------------------------------------------------------------------------------------


def count_in_place(model, client):
    """Change the state in ways that change no tensor's version counter."""
    counts = client.state.setdefault("counts", {"data": torch.zeros(2), "numpy": torch.zeros(1), "array": np.zeros(1)})
    counts["data"].data.add_(1)
    counts["numpy"].numpy()[0] += 1
    counts["array"][0] += 1
    fused = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=1.0, momentum=0.5, fused=True)
    if "fused" in client.state:
        fused.load_state_dict(client.state["fused"])
    fused.param_groups[0]["params"][0].grad = torch.ones(3)
    fused.step()
    client.state["fused"] = fused.state_dict()
    client.report.update({name: float(value[0]) for name, value in counts.items()})
    client.report["momentum"] = float(client.state["fused"]["state"][0]["momentum_buffer"][0])


def test_changes_of_a_state_in_place_are_kept(play):
    script = ScriptObjects(train=count_in_place)
    serial, parallel = (play(workers, script=script, workers=workers, rounds=3) for workers in "12")
    seen = [record["clients"]["0"] for record in read_metrics(serial)]
    for name in ("data", "numpy", "array"):
        assert [report[name] for report in seen] == [1, 2, 3]
    assert [report["momentum"] for report in seen] == [1, 1.5, 1.75]
    assert outcome(serial)[0] == outcome(parallel)[0]


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("x", lambda client: {1}, "is of type set: take tensors"),
        ("x", lambda client: client.state, "holds itself"),
        ("x", lambda client: torch.inference_mode()(torch.ones)(1), "is an inference-mode"),
        ("x", lambda client: [len], "is of type builtin_function_or_method: take tensors"),
        ("x", lambda _: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), "is of type SGD: take tensors"),
        ("x", lambda _: torch.eye(2).to_sparse(), "is a tensor of torch.sparse_coo .*: take a strided one"),
        ("x", lambda _: torch.ones(1, dtype=torch.complex64), "is a tensor of .* torch.complex64 .*: take a strid"),
        ("personal", lambda _: torch.ones(1), "is an entry of fedkern's own: take another name"),
        ("encoders", lambda _: {}, "is an entry of fedkern's own: take another name"),
        ("buffers_local", lambda _: {}, "is an entry of fedkern's own: take another name"),
    ],
)
def test_what_a_state_cannot_hold_is_one_sentence(name, make, said, play):
    def train(model, client):
        if client.id == 1:
            client.state[name] = make(client)

    with pytest.raises(ClientFailed, match=rf"Client 1 failed in round 1: client.state\['{name}'\]\S* {said}"):
        play("run", script=ScriptObjects(train=train))


# -- sentences ---------------------------------------------------------------------------------------------------------


def broken(model, client):
    raise KeyError("no such thing")


def leaving(model, client):
    return nn.Linear(1, 1)


def shrinking(model, client):
    model.head = nn.Linear(1, 1)


def replacing_state(model, client):
    client.state = [1]


def counting(model, client):
    next(client.batches(8))


def diverging(model, client):
    next(model.parameters()).data.fill_(float("nan"))


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (broken, r"Client 0 failed in round 1: KeyError: 'no such thing' \(test_script_objects.py, line \d+\)"),
        (leaving, r"train must return nothing, not Linear.*: what it leaves in the model .* is the upload"),
        (shrinking, r"The trained network is no longer the run's: its head.weight has shape \[1, 1\], not"),
        (counting, r"client.batches takes a phase or nothing, not 8: client.in_order\(8\) gives all samples in stored"),
        (replacing_state, "Client 0 failed in round 1: client.state must stay a dict"),
        (diverging, "round 1.*not finite"),
    ],
)
def test_a_wrong_loop_is_one_sentence(train, said, play):
    with pytest.raises((ClientFailed, UserError), match=said):
        play("run", script=ScriptObjects(train=train))


def test_a_client_that_diverges_or_whose_state_cannot_be_kept_is_skipped(play):
    def train(model, client):
        (diverging if client.id == 0 else loop)(model, client)
        if client.id == 1:
            client.state["x"] = {1}

    found = play("run", script=ScriptObjects(train=train), on_nan="skip", on_error="skip")
    assert [[drop["client"] for drop in record["dropped"]] for record in read_metrics(found)] == [[0, 1], [0, 1]]


def factory(found):
    return lambda parameters: found(parameters)


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("fedavg", {"train": "loop"}, "train must be a function of a model and a client, not 'loop'"),
        ("fedavg", {"train": lambda model: None}, r"train must be a function of a model and a client: too many "
         r"positional arguments \(test_script_objects.py, line \d+\)"),
        ("fedavg", {"optimizer": lambda: None}, r"optimizer must be a function of a list of parameters: too .*line"),
        ("fedavg", {"optimizer": torch.optim.SGD([torch.zeros(1)])}, "a function of .*, not an object of type SGD"),
        ("fedavg", {"train": loop, "momentum": 0.5}, "momentum has no effect beside a function train"),
        ("fedavg", {"train": loop, "freeze_bn_after": 1}, "freeze_bn_after has no effect beside a function train"),
        ("fedavg", {"train": loop, "optimizer": sgd}, "optimizer has no effect beside a function train"),
        ("fedavg", {"optimizer": sgd, "lr": 0.1}, "lr has no effect beside a function optimizer"),
        ("fedavg", {"optimizer": factory(lambda p: None)}, r"optimizer must return a torch.optim.Optimizer, not None"),
        ("fedavg", {"optimizer": factory(torch.optim.LBFGS)}, "makes LBFGS, which evaluates a batch several times"),
        ("fedavg", {"optimizer": lambda p: torch.optim.Optimizer(p, {"lr": None})}, "with a learning rate of None"),
        ("fedavg", {"optimizer": factory(lambda p: 1 / 0)}, r"optimizer fails \(ZeroDivisionError.*test_script_"),
        ("fediod", {"optimizer": sgd, "teacher_dp": True, "epsilon": 8.0},
         "fediod with differential privacy has an optimiser"),
        *(
            (method, {"train": loop}, f"would drop what {method} adds to local training: write a class derived from it")
            for method in ("fedprox", "scaffold", "feddyn", "fedgid", "moon", "fedproto", "fedntd", "feddra", "fusefl",
                           "fediod", "fedlpfm", "ensemble", "local", "centralised", "afl", "fml")
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 12 else "",
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(method, given, said, digits, refuses, tmp_path):
    with refuses(said):
        fedkern.simulate(method, data=digits(), out=tmp_path / "run", progress=False, pictures=False, **given)


def test_a_method_that_changes_only_its_server_takes_a_loop(digits, tmp_path):
    class Late(FedAvg):
        """FedAvg that weighs the third client twice."""

        def weight(self, server, upload):
            return 2.0 if upload.client_id == 2 else 1.0

    how = {"data": digits(), "model": "cnn", "width": 2, "rounds": 2, "pictures": False, "progress": False}
    run = fedkern.simulate(Late, out=tmp_path / "a", momentum=0.5, **how)
    two = fedkern.simulate(Late, out=tmp_path / "b", train=loop, **how)
    assert same_network(run.out, two.out)


# -- an optimiser ------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["fedavg", "fedprox", "scaffold", "feddyn", "moon", "fedgid", "fml"])
def test_torch_s_sgd_has_the_bits_of_the_built_in_one(method, play):
    assert same_network(play("in", method), play("own", method, script=ScriptObjects(optimizer=sgd)))


def test_the_run_s_schedule_multiplies_the_rates(play):
    how = {"lr_steps": "1,3", "lr_step_factor": 0.5, "clip_norm": 0.1}
    inside, own_loop = play("in", **how), play("own", script=ScriptObjects(optimizer=sgd), **how)
    torch.testing.assert_close(tensors(own_loop), tensors(inside), rtol=1e-5, atol=1e-6)


class Doubling(torch.optim.SGD):
    """An optimiser that doubles its rate in every step, as a warm-up does."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["lr"] *= 2


def schedule_by(make, kind=float):
    """Return a factory whose schedule steps after each step of the optimiser."""

    def factory(parameters):
        optimizer = torch.optim.SGD(parameters, lr=kind(0.05))
        schedule = make(optimizer)
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        return optimizer

    return factory


class Halving(torch.optim.SGD):
    """An optimiser that steps in train mode, and halves the parameters in eval mode."""

    def train(self):
        self.trains = True

    @torch.no_grad()
    def eval(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.mul_(0.5)

    def step(self):
        assert self.trains
        super().step()


FACTORIES = {
    "exponential": schedule_by(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)),
    "lambda": schedule_by(lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))),
    "tensor": schedule_by(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2), torch.tensor),
    "step": lambda parameters: Doubling(parameters, lr=0.001),
    "eval": lambda parameters: Halving(parameters, lr=0.05),
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("name", list(FACTORIES))
def test_a_factory_keeps_its_own_schedule(name, decay, play):
    """Multiplying the rate of SGD is multiplying its gradients."""

    def as_pytorch(model, client):
        optimizer, factor = FACTORIES[name](list(model.parameters())), decay**client.phase.round
        getattr(optimizer, "train", int)()
        for _ in range(client.epochs):
            for batch in client.batches():
                optimizer.zero_grad()
                (factor * cross_entropy(model(batch.inputs), batch.targets)).backward()
                optimizer.step()
        getattr(optimizer, "eval", int)()

    runs = [
        tensors(play(kind, script=ScriptObjects(**{kind: function}), lr_decay=decay))
        for kind, function in (("optimizer", FACTORIES[name]), ("train", as_pytorch))
    ]
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("factory", "settings"),
    [(sgd, {}), (adam, {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1})],
    ids=["sgd", "adamw"],
)
def test_a_kept_state_goes_on_in_the_next_round(factory, settings, play, make_config, make_data, tmp_path):
    keep = {**settings, "optimizer_state": "keep"}
    built_in, own = play("in", **keep), play("own", script=ScriptObjects(optimizer=factory), **keep)
    fresh = tensors(play("fresh", **settings))
    torch.testing.assert_close(tensors(own), tensors(built_in), rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(tensors(built_in)[name], fresh[name]) for name in fresh)
    config, script = make_config(**{**HOW, **keep}), ScriptObjects(optimizer=factory)
    again = kill_and_resume(config, out=tmp_path / "cut", data=make_data(), script=script, at=KillAt("round", 1))
    assert again == outcome(own)
    assert outcome(play("two", script=script, workers="2", **keep))[0] == outcome(own)[0]


class Counting(torch.optim.SGD):
    """An optimiser that counts steps in its group, as schedule-free optimisers do."""

    def step(self, closure=None):
        self.param_groups[0]["steps"] = self.param_groups[0].get("steps", 0) + 1
        return super().step(closure)


class Remembering(torch.optim.SGD):
    """An optimiser that keeps a list for every parameter."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].setdefault("norms", []).append(float(parameter.grad.norm()))
        return super().step(closure)


class Marked(torch.optim.SGD):
    """An optimiser with an object in its group whose copies have other texts."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.05, momentum=0.9)
        self.param_groups[0]["mark"] = object()


def test_an_object_in_a_group_is_no_change_of_it(play):
    script = ScriptObjects(optimizer=Marked)
    assert play("run", script=script, optimizer_state="keep", rounds=2)


@pytest.mark.parametrize(("kind", "name"), [(Counting, "steps"), (Remembering, "norms"), (Doubling, "lr")])
def test_a_state_that_cannot_be_kept_is_refused(kind, name, play):
    """The optimiser would otherwise begin the next round with a part of its state."""
    script = ScriptObjects(optimizer=lambda parameters: kind(parameters, lr=0.05))
    with pytest.raises(UserError, match=f"optimizer_state keep: {kind.__name__} has {name}, which cannot be kept"):
        play("keep", script=script, optimizer_state="keep", rounds=1)
    assert (play("new", script=script, rounds=1) / "summary.json").exists()


def test_kept_states_cost_the_secrecy_of_draws(play):
    """A client's state reveals when it was drawn, so epsilon of client-level privacy counts without secret sampling."""
    how = {"dp_clip": 0.5, "dp_noise": 1.0, "sample_fraction": 0.4, "buffers": "drop"}
    told = {}
    for state in ("new", "keep"):
        out = play(state, optimizer_state=state, **how)
        told[state] = json.loads((out / "summary.json").read_text())["privacy"]["epsilon"]
    assert told["keep"] > told["new"]
