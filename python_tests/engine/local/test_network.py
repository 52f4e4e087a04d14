"""A user's network in a run: its own ``train()`` and ``eval()`` are respected, and a server may write in place."""

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, linear
from torch.utils.data import TensorDataset

import fedkern
from fedkern.methods import method_registry
from python_tests.saved_network import same_network

HOW = {"progress": False, "pictures": False, "threads": 1, "client_threads": 1}


def site(seed, count=30):
    draws = torch.Generator().manual_seed(seed)
    return TensorDataset(3 + 2 * torch.randn(count, 5, generator=draws), torch.randint(0, 3, (count,), generator=draws))


SITES = [site(1), site(2)]


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
    how = {"data": SITES, "test": site(3), "rounds": 2, "batch_size": 100, **HOW}
    losses = [
        fedkern.simulate("fedavg", model=model(), workers=1, out=tmp_path / model.__name__, **how).metrics["loss"]
        for model in (kind, function, Norms)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) != pytest.approx(losses[2], abs=1e-5)


@pytest.mark.parametrize("buffers", ["drop", "local"])
@pytest.mark.parametrize("kind", [Kept, Frozen, Norms])
def test_statistics_that_nobody_learns_stay_where_others_are_dropped(kind, buffers, tmp_path):
    how = {"rounds": 1, "local_epochs": 1, "buffers": buffers, "workers": 1, **HOW}
    run = fedkern.simulate("fedavg", data=SITES, test=site(3), model=kind(), out=tmp_path / "run", **how)
    state = run.model().state_dict()
    assert "second.running_mean" not in state
    assert kind is Norms or torch.equal(state["first.running_mean"], kind().first.running_mean)
    loaded = fedkern.load(run.out, model=kind(), data=SITES, test=site(3))
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
            method, data=SITES, test=site(3), model=kind(), rounds=3, workers=1, out=tmp_path / name, **HOW
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
    how = {"data": [*SITES, site(4)], "test": site(3), "rounds": 3, **HOW}
    folders = [tmp_path / name for name in ("new", "one", "two")]
    for out, function, workers in zip(folders, (None, write, write), (1, 1, 2), strict=True):
        server = method_that_writes(method_registry.get(method), function)
        fedkern.simulate(server, model=Product(), workers=workers, out=out, **how)
    assert same_network(*folders[:2])
    assert same_network(*folders[1:])
