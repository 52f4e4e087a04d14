"""Server as the engine implements it (protocol: :class:`fedkern.methods.roles.Server`)."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from fedkern import ops
from fedkern.engine.context import Node, RunContext
from fedkern.engine.store.artifacts import prepare_artifact
from fedkern.errors import UserError, warn_instead
from fedkern.messages.states import State
from fedkern.methods.aggregators import Rule
from fedkern.methods.base import Message, Phase
from fedkern.methods.server_rules import ServerRule
from fedkern.streams import stream


class Server(Node):
    """The server (see :class:`fedkern.methods.roles.Server`)."""

    def __init__(self, context: RunContext, state: State | None = None) -> None:
        super().__init__(context)
        self.federation = context.federation
        self.trained_vectors = context.networks.trained_vectors
        self.state: State = {} if state is None else state
        self.marks: set[str] = set()  # see `fedkern.engine.marks`
        self.refused: list[tuple[int, str]] = []  # in the current exchange
        self.showing = False  # whether log_image keeps the artifacts of this round
        self.artifacts: dict[str, tuple[Tensor, tuple[str, ...]]] = {}
        self.traffic: Mapping[str, Mapping[str, int]] = {}
        rule = Rule(context.config.aggregator)
        self.aggregator = rule if rule.entry.function is not None else None
        optimiser = ServerRule(context.config.server_rule, context.config.server_lr)
        self.optimiser = None if optimiser.plain else optimiser
        # Makes an accumulator for vectors that stay on the GPU.
        self.summing: Callable[[ops.Accumulator], object] | None = None

    def warn(self, name: str, text: str) -> None:
        if self._context.notices.disclosure.server:
            self._context.notices.warn(name, text)

    def build(self, *, model: str | None = None, width: int | None = None, classes: int | None = None) -> Any:
        return self._context.networks.place(self._context.networks.build(model=model, width=width, classes=classes))

    def rng(self, purpose: str, phase: Phase) -> np.random.Generator:
        name = f"server/{purpose}" + ("" if phase.exchange == "update" else f"/{phase.exchange}")
        return stream(self._context.config.seed, name, round=phase.round)

    def initial(self) -> Message:
        vectors = self._context.networks.initial()
        return vectors if self._context.config.statistics else {"parameters": vectors["parameters"]}

    def network(self, message: Message) -> nn.Module:
        network = self._context.networks.get("server")
        network.train_mode()  # before the weights change that eval() has derived others from
        network.write(message)
        network.statistics = self._context.config.statistics
        network.eval_mode()
        return network.module

    def accumulator(self, size: int) -> Any:
        total = ops.Accumulator(size)
        return total if self.summing is None else self.summing(total)

    def log_image(self, name: str, value: Tensor | Callable[[], Tensor], axes: tuple[str, ...] = ("", "")) -> None:
        if self.showing:
            warn = self._context.notices.warn
            with warn_instead(lambda why: warn("no-picture", f"The picture {name} is missing: {why}.")):
                self.artifacts[name] = prepare_artifact(name, value if isinstance(value, Tensor) else value()), axes

    def refuse(self, client: int, reason: str) -> None:
        if not self._context.notices.disclosure.server:
            reason = f"The upload of client {self._context.data.client_label(client)} was refused"
        if self._context.config.on_nan == "stop":
            raise UserError(f"{reason}; leave such uploads out with --on-nan skip.")
        self.refused.append((client, reason))
        self._context.notices.warn(f"refused-upload-{client}", f"{reason}; it was left out.")
