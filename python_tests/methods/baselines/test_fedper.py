"""FedPer: FedAvg with a personal head, or other personal parts."""

import pytest
import torch
from torch import nn

from fedkern.errors import UserError
from python_tests.personal_runs import play, same


@pytest.mark.sampled(1)
@pytest.mark.parametrize("model", ["cnn", "resnet8", "mlp"])
def test_it_keeps_the_networks_last_layer(tmp_path, model):
    settings = {"model": model, "rounds": 1}
    run = play(tmp_path / "run", "fedper", **settings)
    named = play(tmp_path / "named", "fedavg", personal="head.*", **settings)
    own = [run.model(client=k).state_dict() for k in range(3)]
    assert all(same(state, named.model(client=k).state_dict()) for k, state in enumerate(own))
    assert run.metrics == named.metrics
    assert {name for name in own[0] if not torch.equal(own[0][name], own[1][name])} == {"head.weight", "head.bias"}


def test_other_parts_can_be_named(tmp_path):
    run = play(tmp_path / "run", "fedper", rounds=1, personal=["layer3.*", "head.*"])
    left, second = (run.model(client=k).state_dict() for k in (0, 1))
    differing = {name.partition(".")[0] for name in left if not torch.equal(left[name], second[name])}
    assert differing == {"layer3", "head"}


def test_the_last_layer_of_a_network_of_a_script(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(1024, 8), nn.ReLU(), nn.Linear(8, 10))
    run = play(tmp_path / "run", "fedper", model=network, width=None, rounds=1)
    left, second = (run.model(client=k).state_dict() for k in (0, 1))
    assert {name for name in left if not torch.equal(left[name], second[name])} == {"3.weight", "3.bias"}


class Scaled(nn.Module):
    """A network whose logits are not the result of a linear layer."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(1024, 10)

    def forward(self, x):
        return 2 * self.line(x.flatten(1))


def test_a_network_without_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="fedper needs a linear layer with a bias as its last step"):
        play(tmp_path / "run", "fedper", model=Scaled(), width=None)
