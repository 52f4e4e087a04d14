"""Methods that worker processes import, whose clients show tests what they do."""

import dataclasses
import os
import signal
from pathlib import Path

import torch

from fedkern.methods import FedAvg
from fedkern.models import CNN, ModelEntry


def narrow(*, classes, channels, width, stem):
    """Return a network that another file has put into the registry."""
    return CNN(classes=classes, channels=channels, width=max(1, width // 2))


NARROW = ModelEntry("narrow", "a cnn of half the width", 8, 8, narrow)


class Raising(FedAvg):
    """FedAvg whose client 1 raises in the second round."""

    def client_update(self, client, phase, message):
        if client.id == 1 and phase.round == 1:
            raise ZeroDivisionError("nothing to divide by")
        return super().client_update(client, phase, message)


class Dying(FedAvg):
    """FedAvg whose client 1 ends its process, every time."""

    def client_update(self, client, phase, message):
        if client.id == 1 and os.environ.get("FEDKERN_TEST_PARENT") != str(os.getpid()):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().client_update(client, phase, message)


class DyingOnce(FedAvg):
    """FedAvg whose clients count their rounds in states that are written as a round ends.

    Client 2 ends its worker process once.
    """

    def rounds(self, federation):
        for entry in super().rounds(federation):
            yield dataclasses.replace(entry, states="round")

    def client_update(self, client, phase, message):
        mark = Path(os.environ["FEDKERN_TEST_MARK"])
        if client.id == 2 and os.environ["FEDKERN_TEST_PARENT"] != str(os.getpid()) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        client.state["rounds"] = client.report["rounds"] = client.state.get("rounds", 0) + 1
        return super().client_update(client, phase, message)


class Telling(FedAvg):
    """FedAvg whose clients warn and notice, each with its own words."""

    def client_update(self, client, phase, message):
        client.warn("one-name", f"client {client.id} warned first")
        client.warn(f"name-{client.id}", f"round {phase.round}")
        client.notice(f"client {client.id} is at work")
        return super().client_update(client, phase, message)


class Writing(FedAvg):
    """FedAvg whose clients write into received messages, after their training."""

    def client_update(self, client, phase, message):
        result = super().client_update(client, phase, message)
        message["parameters"].zero_()
        return result


class Unportable(FedAvg):
    """FedAvg whose clients answer with an object that cannot be pickled."""

    def client_update(self, client, phase, message):
        return {**super().client_update(client, phase, message), "more": lambda: 0}


class Counting(FedAvg):
    """FedAvg whose clients report their number of threads."""

    requires = FedAvg.requires

    def client_update(self, client, phase, message):
        client.warn("threads", str(torch.get_num_threads()))
        return super().client_update(client, phase, message)


class Sending(FedAvg):
    """FedAvg whose server sends an object that cannot be pickled, in the first round."""

    def send(self, server, phase):
        message = super().send(server, phase)
        return {**message, "more": lambda: 0} if phase.round == 0 else message

    def expects(self, server, phase, client, message):
        return super().expects(server, phase, client, {k: v for k, v in message.items() if k != "more"})


class Keeping(FedAvg):
    """FedAvg that keeps the server's ``notice`` and uses it where clients work."""

    def start(self, server):
        super().start(server)
        self.notice = server.notice

    def client_update(self, client, phase, message):
        self.notice(f"client {client.id}")
        return super().client_update(client, phase, message)
