"""Steps of a server from its network towards the clients' average (``--server-rule``)."""

from typing import Any

import torch
from torch import Tensor

from fedkern import ops
from fedkern.typed_option import Option, named_options, spell_options, with_options

MEAN = "mean"
_MOMENTS = {"first": ("momentum", "adam", "yogi", "adagrad"), "second": ("adam", "yogi", "adagrad")}


def _option(name: str, default: float) -> Option:
    return Option(default, name, low=0.0, high=1.0) if name.startswith("beta") else Option(default, name, above=0.0)


def _options(rule: str, **defaults: float) -> tuple[Option, ...]:
    options = {name: _option(name, default) for name, default in defaults.items()}
    return named_options(f"--server-rule {rule}", **options)


# Defaults of arXiv 1909.06335 (momentum) and 2003.00295 (others), not those of `ops.server_step`.
SERVER_RULES: dict[str, tuple[Option, ...]] = {
    MEAN: (),
    "momentum": _options("momentum", beta1=0.9),
    "adam": _options("adam", beta1=0.9, beta2=0.99, tau=1e-3),
    "yogi": _options("yogi", beta1=0.9, beta2=0.99, tau=1e-3),
    "adagrad": _options("adagrad", beta1=0.0, tau=1e-3),
}
"""Options of every rule, by its name."""


class ServerRule:
    """Server optimiser (:func:`fedkern.ops.server_step`): FedAvgM, FedAdam, FedYogi or FedAdagrad.

    ``learning_rate`` None is 1 for the mean and momentum, 0.1, 0.01 and 0.1 for Adam, Yogi and Adagrad.
    """

    def __init__(self, text: str, learning_rate: float | None = None) -> None:
        self.name, self.options = with_options("--server-rule", text, SERVER_RULES)
        self.learning_rate, self.used = learning_rate, False

    @property
    def text(self) -> str:
        """The name with all options, however the user spelled them."""
        return spell_options(self.name, self.options)

    @property
    def plain(self) -> bool:
        """True if the server takes the average unchanged."""
        return self.name == MEAN and self.learning_rate in (None, 1.0)

    def step(self, state: dict[str, Tensor], average: Tensor) -> Tensor:
        """Return the new network fp32 [P], and keep the moments ``server_first`` and ``server_second`` in ``state``."""
        self.used = True
        moments = {}
        for name, rules in _MOMENTS.items():
            if self.name in rules:
                former = state.get(f"server_{name}")
                # A copy: a checkpoint of the round before may still be written from the former tensor.
                moments[name] = torch.zeros_like(average) if former is None else former.clone()
        settings: dict[str, Any] = {**moments, **self.options, "learning_rate": self.learning_rate}
        result = ops.server_step(state["parameters"], [average], [1.0], self.name, similarities=False, **settings)
        state.update({f"server_{name}": moment for name, moment in moments.items()})
        return result.model
