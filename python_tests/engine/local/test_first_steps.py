"""Checks of a process's first training steps, and a user's network in a run, whose own modes are respected."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, cross_entropy, linear
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import fedkern
from fedkern.errors import UserError
from fedkern.methods import FedAvg, method_registry
from python_tests.saved_network import same_network

HERE = {"progress": False, "pictures": False, "threads": 1, "workers": 1, "rounds": 2, "batch_size": 8}


def clinic(seed, count=24):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())


SITES = {"data": [clinic(0), clinic(1)], "test": clinic(2)}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def simulate(tmp_path, name="run", method="fedavg", model=None, **given):
    return fedkern.simulate(method, model=model or network(), out=tmp_path / name, **{**SITES, **HERE, **given})


SCRIPT, TEACHER = network(), network()
WEIGHTS, CENTRES = torch.zeros(2, requires_grad=True), nn.Parameter(torch.zeros(2))


class Weighted(nn.Module):
    def __init__(self, trained):
        super().__init__()
        self.s = nn.Parameter(torch.zeros(()), requires_grad=trained)

    def forward(self, outputs, targets):
        return torch.exp(-self.s) * cross_entropy(outputs, targets) + self.s


class Changing(nn.Module):
    """A network that changes its own parameters in its first training step."""

    def __init__(self, change):
        super().__init__()
        self.first, self.last, self.change = nn.Linear(4, 3), nn.Linear(3, 2), change

    def forward(self, x):
        if self.training:
            self.change(self)
        return self.last(self.first(x).tanh().to(self.last.weight.dtype)).float()


def replace(module):
    module.first.weight = nn.Parameter(module.first.weight.detach().clone())


class Detaching(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


class Closed(nn.Linear):
    def forward(self, x):
        return SCRIPT(x)


class Listed(nn.Linear):
    """A network with a layer in a list, which registers nothing."""

    def __init__(self):
        super().__init__(4, 2)
        self.layers = [nn.Linear(4, 4)]

    def forward(self, x):
        return super().forward(self.layers[0](x))


def alter(change):
    return {"model": Changing(change)}


REFUSED = {
    "none": ({"loss_fn": lambda o, t: None}, "loss_fn must return one number.* NoneType"),
    "float": ({"loss_fn": lambda o, t: float(cross_entropy(o, t).detach())}, "loss_fn must return one number.* float"),
    "whole number": ({"loss_fn": lambda o, t: (o.argmax(1) != t).sum()}, r"loss_fn must .* a tensor \[\] of int64"),
    "detached": ({"loss_fn": lambda o, t: cross_entropy(o.detach(), t)}, "loss_fn returns a float32 without a graph"),
    "detaching network": ({"model": Detaching(4, 2)}, "forward of Detaching returns outputs without a graph"),
    "nan": ({"loss_fn": lambda o, t: cross_entropy(o, t) * torch.nan}, "loss_fn returns nan for the first batch of"),
    "script's network": ({"batch_loss": lambda model, batch: cross_entropy(SCRIPT(batch[0]), batch[1])},
                         "loss of none of the network's trained parameters, only of others"),
    "closed-over network": ({"model": Closed(4, 2)}, "forward of Closed returns outputs of none .* parameters of self"),
    "its inputs": ({"batch_loss": lambda model, batch: batch[0].requires_grad_().mean()}, "none of the network's tr"),
    "module": ({"loss_fn": Weighted(True)}, r"loss_fn depends on trainable parameters .* \(\[\]\)"),
    "closed-over": ({"loss_fn": lambda o, t: cross_entropy(o + CENTRES, t)}, r"that are not the network's \(\[2\]\)"),
    "plain tensor": ({"loss_fn": lambda o, t: cross_entropy(o * WEIGHTS.exp(), t)}, r"the network's \(\[2\]\)"),
    "teacher": ({"batch_loss": lambda model, batch: (model(batch[0]) - TEACHER(batch[0])).square().mean()},
                r"the network's \(.* and 1 more\).* or freeze them with requires_grad_\(False\)"),
    "list of layers": ({"model": Listed()}, r"forward of Listed depends on .* by nn\.ModuleList"),
    "freezes": (alter(lambda module: module.first.requires_grad_(False)), "changed parameter first.we"),
    "replaces": (alter(replace), "changed parameter first.weight"),
    "moves": (alter(lambda module: setattr(module.first.weight, "data", module.first.weight.data.clone())),
              "changed parameter first.weight"),
    "converts": (alter(lambda module: module.half().float() and module.last.double()), "changed parameter"),
    "adds": (alter(lambda module: setattr(module, "late", nn.Linear(1, 1))), "changed parameter late.we"),
    "buffer": (alter(lambda module: module.register_buffer("late", torch.ones(1))), "buffer late; .* in place"),
    "in the loss": ({"batch_loss": lambda model, batch: cross_entropy(
        model[:2].requires_grad_(False) and model(batch[0]), batch[1])}, "changed parameter 0.w"),
    "other parameters": ({"optimizer": lambda parameters: torch.optim.SGD(SCRIPT.parameters(), 0.1)},
                         "optimizer makes SGD of parameters that it was not given: make it of the argument"),
    "more parameters": ({"optimizer": lambda parameters: torch.optim.Adam([*parameters, CENTRES])},
                        "optimizer makes Adam of parameters that it was not given"),
    "no parameters": ({"optimizer": lambda parameters: torch.optim.SGD([{"params": []}], 0.1)}, "of no parameters"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "said"), REFUSED.values(), ids=REFUSED)
def test_what_would_not_train_the_network_is_refused(given, said, tmp_path):
    with pytest.raises(UserError, match=said) as told:
        simulate(tmp_path, **copy.copy(given))
    assert "\n" not in str(told.value)
    assert ".py, line" not in str(told.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [{"workers": 2}, {"on_error": "skip"}])
def test_the_sentence_comes_from_every_process_and_ends_the_run(settings, tmp_path):
    with pytest.raises(UserError, match=r"^loss_fn returns a float32 without a graph") as told:
        simulate(tmp_path, loss_fn=REFUSED["detached"][0]["loss_fn"], **settings)
    assert told.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def hooking(model, batch):
    model[0].register_forward_hook(lambda *_: None)
    return cross_entropy(model(batch[0]), batch[1])


def hooking_once(model, batch):
    if not model[0]._forward_hooks:
        model[0].register_forward_hook(lambda *_: None)
    return cross_entropy(model(batch[0]), batch[1])


class OwnParameters(FedAvg):
    """A method with a parameter besides the network's."""

    requires = frozenset({"loss"})

    def loss(self, model, batch, received):
        return super().loss(model, batch, received) + CENTRES.sum()


def train_another(model, client):
    copied = copy.deepcopy(model)
    for batch in client.batches():
        cross_entropy(copied(batch.inputs), batch.targets).backward()


def halve(model, client):
    assert [*client.batches()]
    model[0].weight.data.mul_(2)
    model[2].half()


def drifting():
    module = Changing(lambda module: module.first.weight.data.add_(1))
    module.first.requires_grad_(False)
    return module


TOLD = {
    "frozen": ({"model": drifting()}, "changed-frozen", "writes into frozen parameters"),
    "other model": ({"train": train_another}, "untrained-upload", "loop of client 0 leaves all parameters bit for bit"),
    "half": ({"train": halve}, "converted-parameters", "leaves parameters in float16, and the upload is"),
    "part": ({"optimizer": lambda parameters: torch.optim.SGD(parameters[:1], lr=0.1)}, "partly-trained",
             "steps 1 of the network's 4 parameters and leaves 0.bias, 2.weight, 2.bias as they are"),
    "hooks": ({"batch_loss": hooking}, "piling-hooks", "Every training step adds a hook to 0, and none is removed"),
    "method": ({"method": OwnParameters}, "untrained-parameters", "OwnParameters.loss depends on trainable parameters"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "name", "said"), TOLD.values(), ids=TOLD)
def test_what_may_be_meant_is_a_warning(given, name, said, tmp_path):
    run = simulate(tmp_path, **given)
    diagnostics = run.summary["diagnostics"]
    assert re.search(said, diagnostics[name])
    assert set(diagnostics) <= {name, "chance-level", "majority-level", "collapsed-class", "python-state"}
    if name == "partly-trained":
        assert run.config.training.endswith(" of 1 of 4 parameters")


class Counting:
    """A loss that depends on how often it was called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, batch):
        self.calls += 1
        return cross_entropy(model(batch[0]), batch[1]) * self.calls


def reentrant(model, batch):
    x = batch[0].clone().requires_grad_()
    return cross_entropy(checkpoint(model, x, use_reentrant=True), batch[1])


def with_a_temporary(model, batch):
    shift = torch.zeros(4, requires_grad=True)
    loss = cross_entropy(model(batch[0] + shift), batch[1])
    return loss + loss.detach()


def with_a_penalty(model, batch):
    x = (batch[0] * torch.rand(len(batch[0]), 1)).requires_grad_()
    outputs = model(x)
    (gradient,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    return cross_entropy(outputs, batch[1]) + gradient.square().mean()


def with_backward(model, batch):
    cross_entropy(model(batch[0]), batch[1]).backward()
    model.zero_grad()
    return cross_entropy(model(batch[0]), batch[1])


def without_pairs(model, batch, calls=[]):  # noqa: B006
    calls.append(batch)
    return cross_entropy(model(batch[0]), batch[1]) if len(calls) > 1 else torch.zeros((), requires_grad=True)


def with_an_inner_step(model, batch):
    names, parameters = zip(*model.named_parameters(), strict=True)
    steps = torch.autograd.grad(cross_entropy(model(batch[0]), batch[1]), parameters, create_graph=True)
    moved = {name: parameter - 0.1 * step for name, parameter, step in zip(names, parameters, steps, strict=True)}
    return cross_entropy(torch.func.functional_call(model, moved, (batch[0],)), batch[1])


class Force(nn.Module):
    """The gradient of an energy."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


class Freezing(nn.Module):
    """A network that freezes its first layer in train(), as fine-tuning does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

    def train(self, mode=True):
        self.first.requires_grad_(False)
        return super().train(mode)

    def forward(self, x):
        return self.last(self.first(x).tanh())


ACCEPTED = {
    "freezing": {"model": Freezing(), "weight_decay": 0.1},
    "gradient of inputs": {"batch_loss": with_a_penalty},
    "gradient of parameters": {"batch_loss": with_an_inner_step},
    "cleared gradients": {"batch_loss": with_backward},
    "without pairs": {"batch_loss": without_pairs},
    "network's gradient": {"model": Force(), "loss_fn": lambda o, t: (o[:, 0] - t).square().mean()},
    "counting": {"batch_loss": Counting()},
    "fixed weight": {"loss_fn": Weighted(False)},
    "hook": {"batch_loss": hooking_once},
    "checkpoint": {"batch_loss": reentrant},
    "temporary": {"batch_loss": with_a_temporary},
    "groups": {"optimizer": lambda parameters: torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.1)},
}


@pytest.mark.parametrize("given", ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_fine_trains_without_a_word(given, tmp_path):
    run = simulate(tmp_path, **given)
    assert {*run.summary["diagnostics"]} <= {"chance-level", "majority-level", "collapsed-class", "python-state"}
    before, after = given.get("model", network()).state_dict(), run.model().state_dict()
    unmoved = [name for name, value in before.items() if torch.equal(value, after[name])]
    expected = {Force: ["energy.2.bias"], Freezing: ["first.weight", "first.bias"]}
    assert unmoved == expected.get(type(given.get("model")), [])


def test_an_error_in_the_network_names_its_line(tmp_path):
    with pytest.raises(UserError, match=r"ZeroDivisionError: .* \(test_first_steps\.py, line"):
        simulate(tmp_path, model=Changing(lambda module: 1 / 0))


def test_no_step_is_taken_beside_those_of_the_run(tmp_path):
    loss = Counting()
    simulate(tmp_path, batch_loss=loss, rounds=1, local_epochs=1)
    assert loss.calls == 2 * 3 + 1  # three batches of each client, and the evaluation


# -- network -----------------------------------------------------------------------------------------------------------


HOW = {"progress": False, "pictures": False, "threads": 1, "client_threads": 1}


def site(seed, count=30):
    draws = torch.Generator().manual_seed(seed)
    return TensorDataset(3 + 2 * torch.randn(count, 5, generator=draws), torch.randint(0, 3, (count,), generator=draws))


NETWORK_SITES = [site(1), site(2)]


class Norms(nn.Module):
    """Two batch norms with the statistics of another data set."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.BatchNorm1d(5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.first.running_mean.normal_()
        self.first.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


class Kept(Norms):
    """A network that keeps a batch norm in eval mode, by a method whose mode has no default."""

    def train(self, mode):
        super().train(mode)
        self.first.eval()


class Frozen(Norms):
    def __init__(self):
        super().__init__()
        self.first.requires_grad_(False)


class Adaptive(Norms):
    """A network that evaluates with the statistics of each batch."""

    def train(self, mode=True):
        super().train(mode)
        self.first.train()


class ByFunction(Norms):
    """A network that passes statistics, and so the mode, to the function."""

    statistics = ("running_mean", "running_var")

    def forward(self, x):
        mean, variance = (getattr(self.first, name, None) for name in self.statistics)
        x = batch_norm(x, mean, variance, self.first.weight, self.first.bias, mean is None)
        return self.head(self.second(x))


class ByBatch(ByFunction):
    statistics = ("none", "none")


@pytest.mark.parametrize(("kind", "function"), [(Kept, ByFunction), (Adaptive, ByBatch)])
def test_modes_are_those_of_the_network_s_own_train(kind, function, tmp_path):
    how = {"data": NETWORK_SITES, "test": site(3), "rounds": 2, "batch_size": 100, **HOW}
    losses = [
        fedkern.simulate("fedavg", model=model(), workers=1, out=tmp_path / model.__name__, **how).metrics["loss"]
        for model in (kind, function, Norms)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) != pytest.approx(losses[2], abs=1e-5)


@pytest.mark.parametrize("buffers", ["drop", "local"])
@pytest.mark.parametrize("kind", [Kept, Frozen, Norms])
def test_statistics_that_nobody_learns_stay_where_others_are_dropped(kind, buffers, tmp_path):
    how = {"rounds": 1, "local_epochs": 1, "buffers": buffers, "workers": 1, **HOW}
    run = fedkern.simulate("fedavg", data=NETWORK_SITES, test=site(3), model=kind(), out=tmp_path / "run", **how)
    state = run.model().state_dict()
    assert "second.running_mean" not in state
    assert kind is Norms or torch.equal(state["first.running_mean"], kind().first.running_mean)
    loaded = fedkern.load(run.out, model=kind(), data=NETWORK_SITES, test=site(3))
    assert loaded.evaluate()["loss"] == run.metrics["loss"]


class Product(nn.Module):
    """A network that computes a weight in every call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 5)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(linear(x, self.a @ self.b))


class Cached(Product):
    """A network that computes the weight once for evaluation, as adapters that merge into a cache do."""

    weight = None

    def train(self, mode=True):
        super().train(mode)
        self.weight = None if mode else self.a @ self.b if self.weight is None else self.weight
        return self

    def forward(self, x):
        return super().forward(x) if self.weight is None else self.head(linear(x, self.weight))


class Thawed(Product):
    def train(self, mode=True):
        self.a.requires_grad_(mode)
        return super().train(mode)


@pytest.mark.parametrize("method", ["fedavg", "moon"])
def test_what_eval_derives_follows_the_weights(method, tmp_path):
    runs = [
        fedkern.simulate(
            method, data=NETWORK_SITES, test=site(3), model=kind(), rounds=3, workers=1, out=tmp_path / name, **HOW
        )
        for name, kind in (("plain", Product), ("cached", Cached), ("thawed", Thawed))
    ]
    assert all(same_network(runs[0].out, run.out) for run in runs[1:])
    assert len({run.metrics["loss"] for run in runs}) == 1


def by_data(old, new):
    old.data.copy_(new)


def by_numpy(old, new):
    old.numpy()[:] = new.numpy()


def method_that_writes(base, write):
    class Server(base):
        """A mean that takes in each upload as it comes."""

        requires = base.requires

        def server_update(self, server, phase, uploads):
            old = server.state["parameters"]
            mean = server.state["parameters"] = old if write else old.clone()
            for number, upload in enumerate(uploads, 2):
                (write or by_data)(mean, mean + (upload.message["parameters"] - mean) / number)

    return Server


@pytest.mark.parametrize("write", [by_data, by_numpy])
@pytest.mark.parametrize("method", ["fedntd", "moon"])
def test_a_server_may_write_into_its_state(method, write, tmp_path):
    how = {"data": [*NETWORK_SITES, site(4)], "test": site(3), "rounds": 3, **HOW}
    folders = [tmp_path / name for name in ("new", "one", "two")]
    for out, function, workers in zip(folders, (None, write, write), (1, 1, 2), strict=True):
        server = method_that_writes(method_registry.get(method), function)
        fedkern.simulate(server, model=Product(), workers=workers, out=out, **how)
    assert same_network(*folders[:2])
    assert same_network(*folders[1:])
