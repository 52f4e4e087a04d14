"""Tests of misspelt hooks of users' classes: an error with the hook's name, while helpers pass."""

import pytest

import fedkern
from fedkern.engine.parts.part import PARTS
from fedkern.listeners import Listener
from fedkern.methods.baselines.fedavg import FedAvg


class Helped(FedAvg):
    """Method with names like those of hooks, which the class or its user calls."""

    losses = evaluate_all = classmethod(len)

    def weights(self, factor):
        return factor

    def server_update(self, server, exchange, uploads):
        self.terms_of = self.weights(2)
        super().server_update(server, exchange, uploads)


def wrong(self, *values):
    super(type(self), self).server_udpate(*values)


@pytest.mark.parametrize(
    ("base", "members", "hook"),
    [
        (FedAvg, {"server_udpate": wrong}, "server_update"),
        (Helped, {"client_updates": staticmethod(wrong)}, "client_update"),
        (FedAvg, {"losss": wrong}, "loss"),
        (FedAvg, {"stateles": True}, "stateless"),
        (FedAvg, {"Option": FedAvg.Options}, "Options"),
        (Listener, {"on_round_ended": wrong}, "on_round"),
        (Listener, {"on_train_begin": wrong}, "on_start"),
        (fedkern.Part, {"rounds_end": wrong}, "round_end"),
    ],
)
def test_a_misspelt_hook_is_named(base, members, hook, tmp_path):
    kind = type("Mine", (base,), {**members, "__doc__": "A class of a script."})
    run = {"data": "digits", "rounds": 1, "out": tmp_path / "run", "progress": False}
    doors = {
        fedkern.Part: fedkern.register_part("mine"),
        Listener: lambda kind: fedkern.simulate("fedavg", listener=kind(), **run),
    }
    with pytest.raises(fedkern.UserError, match=f'^Mine has "{next(iter(members))}", .* Did you mean "{hook}"'):
        doors.get(base, lambda kind: fedkern.simulate(kind, **run))(kind)
    assert not [*tmp_path.iterdir()]
    assert "mine" not in PARTS


def test_a_helper_is_no_hook(tmp_path):
    given = {"data": "digits", "train_samples": 60, "model": "mlp", "rounds": 1, "local_steps": 1, "clients": 2}
    given |= {"listener": type("Mine", (Listener,), {"on_message": wrong})(), "out": tmp_path / "run"}
    run = fedkern.simulate(Helped, **given, workers=1, threads=1, progress=False, pictures=False)
    assert run.summary["rounds"] == 1
