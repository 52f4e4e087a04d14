from dataclasses import dataclass

from fedkern import option, register
from fedkern.methods import FedAvg


@register("fedavgm")
class FedAvgM(FedAvg):
    """FedAvg with momentum on the server (arXiv 1909.06335)."""

    @dataclass(frozen=True)
    class Options(FedAvg.Options):
        beta: float = option(0.9, "momentum of the server", low=0, high=1)

    def server_update(self, server, phase, uploads):
        before = server.state["parameters"]
        super().server_update(server, phase, uploads)
        velocity = self.options.beta * server.state.get("velocity", 0.0) + server.state["parameters"] - before
        server.state.update(velocity=velocity, parameters=before + velocity)
