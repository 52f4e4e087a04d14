"""Tests of FedLoRA: what travels, the merge on the server, refusals, and its adapters beside those of peft."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedkern
from fedkern.errors import UserError
from fedkern.methods import FedLoRA, Upload
from python_tests.interrupted import Kill, KillAt
from python_tests.saved_network import same_network, tensors

LAYERS = {"embed": 4 + 8, "mix.linear1": 8 + 16, "mix.linear2": 16 + 8, "head": 8 + 3}
"""Inputs and outputs of the layers of `Net` that are adapted."""


class Net(nn.Module):
    """Classifier with a shared layer, and a transformer that reads weights in eval mode instead of calling layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.mix = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.again = self.head

    def forward(self, x):
        return self.again(self.mix(self.embed(x)[:, None])[:, 0])


def make_table(rows, seed):
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :3].argmax(1))


torch.manual_seed(0)
GIVEN = {
    "data": [make_table(40, 1), make_table(20, 2)], "test": make_table(60, 3), "model": Net(), "rounds": 2,
    "local_epochs": 2, "lr": 0.1, "rank": 2, "progress": False, "pictures": False, "threads": 1, "client_threads": 1,
}  # fmt: skip


@pytest.mark.usefixtures("forked_workers")
def test_adapters_alone_travel_and_change(tmp_path):
    uncut = fedkern.simulate("fedlora", **GIVEN, out=tmp_path / "whole")
    fedkern.simulate("fedlora", **GIVEN, workers=2, out=tmp_path / "two")
    with pytest.raises(Kill):
        fedkern.simulate("fedlora", **GIVEN, listener=KillAt("round", 1), out=tmp_path / "cut")
    fedkern.load(tmp_path / "cut", **{name: GIVEN[name] for name in ("data", "test", "model")}).resume()
    assert same_network(tmp_path / "whole", tmp_path / "two")
    assert same_network(tmp_path / "whole", tmp_path / "cut")
    for record in uncut.history.records:
        numbers = 2 * sum(LAYERS.values())  # of each of two clients
        assert record["bytes_up"] == record["bytes_down"] == record["round"] * 2 * 4 * numbers
        assert 0 < record["merge_error"] < 1
    assert uncut.metrics["accuracy"] > 0.6

    begun, state = GIVEN["model"].state_dict(), tensors(tmp_path / "whole")
    plain = {name.replace("base_layer.", ""): value for name, value in state.items() if "lora_" not in name}
    assert all(torch.equal(value, begun[name]) for name, value in plain.items())
    assert {name.partition(".lora_A")[0] for name in state if ".lora_A." in name} - {"again"} == set(LAYERS)

    network, x = uncut.model(), make_table(9, 4).tensors[0]
    with torch.no_grad():
        fast = network(x)  # the transformer's fused layer
    torch.testing.assert_close(fast, network.requires_grad_()(x))
    assert (fast - GIVEN["model"].eval()(x)).abs().max() > 0.1


def test_the_server_merges_products():
    method, draw = FedLoRA(rank=2), torch.Generator().manual_seed(0)
    pairs = [(torch.randn(2, 5, generator=draw), torch.randn(7, 2, generator=draw)) for _ in range(3)]
    start = (torch.ones(2, 5), torch.zeros(7, 2))

    def merge(*uploads):
        named = [dict(zip(("x.lora_A", "x.lora_B"), pair, strict=True)) for pair in (start, *uploads)]
        server = SimpleNamespace(state={"adapters": named[0]}, report={})
        method.server_update(server, None, [Upload(k, 1 + k, {"adapters": x}) for k, x in enumerate(named[1:])])
        return *server.state["adapters"].values(), server.report.get("merge_error")

    mean = sum(share * b @ a for share, (a, b) in zip((1 / 6, 1 / 3, 1 / 2), pairs, strict=True))
    u, values, v = torch.linalg.svd(mean)
    a, b, error = merge(*pairs)
    torch.testing.assert_close(b @ a, u[:, :2] * values[:2] @ v[:2])
    torch.testing.assert_close(a @ a.T, values[:2].diag())
    assert error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-4)
    assert all(torch.equal(x, y) for found in (merge(), merge(start)) for x, y in zip(found[:2], start, strict=True))


class Adapters(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 3))
        self.lora_A = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"model": Adapters()}, r"fedlora makes the adapters, and the network has some already \(lora_A.weight\)"),
        ({"layers": "tail.*"}, r'option "layers": tail\.\* matches no trained linear layer: its parts are'),
        ({"compress": "int8"}, "compress is for methods that average the clients' parameters, which fedlora"),
        ({"aggregator": "median"}, "aggregator is for methods that average"),
        ({"server_rule": "adam"}, "server_rule is for methods whose server averages"),
        ({"max_update_norm": 1.0}, "max_update_norm is for methods that average"),
        ({"dp_clip": 1.0, "dp_noise": 1.0}, "dp_clip is for methods that average"),
        ({"asynchronous": "fedasync"}, "fedlora counts on whole rounds"),
        ({"buffers": "local"}, r"buffers=.local. is not for fedlora"),
        ({"personal": "head.*"}, "personal is for methods whose clients train the whole"),
    ],
)  # fmt: skip
def test_refusals(settings, text, tmp_path):
    with pytest.raises(UserError, match=text):
        fedkern.simulate("fedlora", **{**GIVEN, **settings}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scaling", ["rank", "root"])
def test_peft_trains_and_loads_the_same_adapters(scaling, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra [foundation]")
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    given = {**GIVEN, "model": network, "alpha": 3.0, "scaling": scaling, "rounds": 1}
    run = fedkern.simulate("fedlora", **given, out=tmp_path / "run")
    settings = peft.LoraConfig(r=2, lora_alpha=3, use_rslora=scaling == "root", target_modules=["0", "2"])
    theirs, ours = peft.get_peft_model(copy.deepcopy(network), settings), run.model()
    state = {f"base_model.model.{name}": value.clone() for name, value in ours.state_dict().items()}
    theirs.load_state_dict(state)
    x, classes = make_table(30, 5).tensors
    torch.testing.assert_close(theirs(x), ours(x))
    assert (ours(x) - network(x)).abs().max() > 0.01

    for name, parameter in ours.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), classes).backward()
            optimizer.step()
    trained = {f"base_model.model.{name}": value for name, value in ours.state_dict().items()}
    torch.testing.assert_close(dict(theirs.state_dict()), trained)
    assert any(not torch.equal(trained[name], value) for name, value in state.items())
