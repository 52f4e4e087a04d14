"""Flower's strategies with an optimiser on the server: FedAvgM, FedAdam, FedYogi and FedAdagrad."""

import math
from typing import Any

from torch import Tensor

from fedkern import ops
from fedkern.errors import UserError
from fedkern.flower.adapter import flower
from fedkern.flower.strategies.averaging import FedAvg, constructed_like, zero_moments


class _Optimised(FedAvg):
    """The running mean, and a step of `fedkern.ops.server_step` from the old model towards it.

    Running statistics of batch norms take the mean itself: they are no parameters, and a step could make a variance
    negative.
    """

    rule: str
    moments = 2

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._moments: list[Tensor] = []

    def _settings(self, server_round: int) -> dict[str, float]:
        raise NotImplementedError

    def _step(self, vector: Tensor, server_round: int) -> Tensor:
        layout = self._layout
        if layout is None or self._start is None:
            raise UserError(f"{type(self).__name__}: call configure_train before aggregate_train.")
        if [moment.numel() for moment in self._moments] != [layout.size] * self.moments:
            self._moments = [zero_moments(layout) for _ in range(self.moments)]
        states: dict[str, Any] = dict(zip(("first", "second")[: self.moments], self._moments, strict=True))
        options = {**states, **self._settings(server_round)}
        model = ops.server_step(self._start.vector(), [vector], [1.0], self.rule, similarities=False, **options).model
        for entry in layout.floating:
            if entry.statistic:
                model[entry.begin : entry.end] = vector[entry.begin : entry.end]
        return model


@constructed_like(flower.FedAvgM)
class FedAvgM(_Optimised, flower.FedAvgM):
    """Flower's ``FedAvgM``: momentum on the server (arXiv 1909.06335). See :class:`FedAvg` for fedkern's arguments."""

    rule, moments = "momentum", 1

    def _settings(self, server_round: int) -> dict[str, float]:
        return {"learning_rate": self.server_learning_rate, "beta1": self.server_momentum}

    def _step(self, vector: Tensor, server_round: int) -> Tensor:
        return super()._step(vector, server_round) if self.server_opt else vector


@constructed_like(flower.FedAdam)
class FedAdam(_Optimised, flower.FedAdam):
    """Flower's ``FedAdam`` (arXiv 2003.00295), with its correction of the step size in early rounds."""

    rule = "adam"

    def _settings(self, server_round: int) -> dict[str, float]:
        past = server_round + 1.0  # Flower's count, one ahead of the number of steps
        rate = self.eta * math.sqrt(1 - self.beta_2**past) / (1 - self.beta_1**past)
        return {"learning_rate": rate, "beta1": self.beta_1, "beta2": self.beta_2, "tau": self.tau}


@constructed_like(flower.FedYogi)
class FedYogi(_Optimised, flower.FedYogi):
    """Flower's ``FedYogi`` (arXiv 2003.00295). See :class:`FedAvg` for fedkern's arguments."""

    rule = "yogi"

    def _settings(self, server_round: int) -> dict[str, float]:
        return {"learning_rate": self.eta, "beta1": self.beta_1, "beta2": self.beta_2, "tau": self.tau}


@constructed_like(flower.FedAdagrad)
class FedAdagrad(_Optimised, flower.FedAdagrad):
    """Flower's ``FedAdagrad`` (arXiv 2003.00295). See :class:`FedAvg` for fedkern's arguments."""

    rule = "adagrad"

    def _settings(self, server_round: int) -> dict[str, float]:
        return {"learning_rate": self.eta, "beta1": self.beta_1, "tau": self.tau}
