"""Client-level differential privacy of a run (`fedkern.privacy.accounting`): mechanism, epsilon and checks.

The server of a method sees no single upload. Every round has one upload, the noised mean of the clients' clipped
changes (`fedkern.engine.uploads.private_mean`), so whatever the server computes from it costs no more.
"""

import math
from bisect import bisect_right
from collections import Counter

from torch import Tensor

from fedkern.engine.context import RunContext
from fedkern.engine.hooks import message_for
from fedkern.engine.participation import Participation
from fedkern.engine.server import Server
from fedkern.errors import UserError
from fedkern.messages.states import State
from fedkern.methods.base import VECTORS, Method, Phase
from fedkern.methods.uploads import Values, like
from fedkern.privacy.accounting import ClientGuarantee, ClientLevel
from fedkern.settings.config import RunConfig


class ClientPrivacy:
    """Client-level differential privacy of one run.

    Attributes:
        level: the mechanism of the next round.
        used_clip: the norm of the last round, NaN before the first.
        amplified: whether epsilon uses amplification by sampling: clients are drawn in secret and keep no state.
        secret: 32 hexadecimal digits that seed noise and draws; empty: the run's seed does.
    """

    def __init__(
        self, config: RunConfig, method: Method, server: Server, context: RunContext, participation: Participation
    ) -> None:
        assert config.dp_clip is not None
        assert config.dp_noise is not None
        self._config, self._participation = config, participation
        self.level = ClientLevel.parse(config.dp_clip, config.dp_noise, config.delta)
        self.used_clip = math.nan
        if config.dp_noise and self.level.delta * config.trained_clients >= 1:
            context.notices.warn(
                "large-delta",
                f"--dp-delta {self.level.delta:g} is one in the number of clients ({config.trained_clients}) or more: "
                "even a rule that publishes a client's data would count as private, so choose a smaller one.",
            )
        check(config, method, server, context)
        self.secret = ""
        plan = list(method.rounds(server.federation))
        are_drawn = config.sampled_clients < config.trained_clients
        sampled = are_drawn and all(entry.participants == "sampled" for entry in plan)
        # Records of clients reveal participants, and so do numbers of uploads if the seed decides who drops out.
        late = config.stragglers == "drop" or (config.devices is not None and config.deadline is not None)
        hidden = config.records == "private" and not config.dropout_rate and not late
        stateless = method.stateless and config.buffers != "local" and config.optimizer_state != "keep"
        self.amplified = bool(self.level.noise) and sampled and hidden and stateless
        # The most rounds of any one client, by rounds done.
        self._most = list(range(len(plan) + 1))
        if not self.amplified and are_drawn:
            requests: Counter[int] = Counter()
            for number, entry in enumerate(plan):
                requests.update(participation.clients(entry, number))
                self._most[number + 1] = max(requests.values())
        self.allowed_rounds, limit = len(plan), config.max_epsilon
        if limit is not None:
            self.allowed_rounds = bisect_right(range(1, len(plan) + 1), limit, key=self.epsilon)
            if not self.allowed_rounds:
                raise UserError(
                    f"--max-epsilon {limit:g} is less than the epsilon of the first round, {self.epsilon(1):.3g}: take "
                    "more --dp-noise, or a larger --max-epsilon."
                )
        self.planned = self.epsilon(self.allowed_rounds) if self.level.noise else math.inf

    def keep(self, secret: str) -> None:
        """Seed the noise, and a draw of clients that epsilon counts, from a secret."""
        self.secret = secret
        if self.amplified:
            self._participation.secret = secret

    # -- epsilon ---------------------------------------------------------------------------------------------------

    def epsilon(self, rounds: int) -> float:
        if self.amplified:
            config = self._config
            return self.level.epsilon(rounds, drawn=config.sampled_clients, of=config.trained_clients)
        return self.level.epsilon(self._most[rounds])

    def guarantee(self) -> ClientGuarantee | None:
        if not self.level.noise:
            return None
        conditions = ["the server, which gets every client's update as it is, is trusted and keeps checkpoints/"]
        if self.amplified:
            conditions.append("who takes part in a round stays secret")
        if self._config.dp_draws == "seed":
            conditions.append("the run's seed stays secret")
        base = ClientGuarantee(
            self.level.delta,
            {"networks": "the networks of all rounds and all that is computed from them"},
            conditions=tuple(conditions),
            planned=self.planned,
            rounds=self.allowed_rounds,
        )
        guarantee = base if self._config.records == "private" else base.with_records()
        assert isinstance(guarantee, ClientGuarantee)
        return guarantee

    def figures_after(self, rounds: int) -> dict[str, float]:
        guarantee = self.guarantee()
        figures = {} if guarantee is None else {guarantee.figure: self.epsilon(rounds)}
        return figures if self.level.quantile is None else {**figures, "dp_clip": self.used_clip}

    def report(self, rounds: int) -> State:
        """Return the ``privacy`` entry of summary.json, empty without noise."""
        guarantee = self.guarantee()
        if guarantee is None:
            return {}
        epsilon = self.epsilon(rounds)
        draw = {"drawn": self._config.sampled_clients, "of": self._config.trained_clients} if self.amplified else {}
        return {
            **guarantee.to_dict(), guarantee.figure: epsilon, "rounds": rounds, "clip": self.level.clip,
            "noise": self.level.noise, **draw, "statement": guarantee.statement(epsilon),
        }  # fmt: skip


def check(config: RunConfig, method: Method, server: Server, context: RunContext) -> None:
    """Check that the server of a method only adds vectors up, once a round, which noise on their sum covers."""
    name = config.method
    if method.guarantee(server) is not None:
        raise UserError(f"--dp-clip is not for {name}, which has differential privacy of its own: leave it out.")
    seen = set()
    for entry in method.rounds(server.federation):
        exchange = entry.exchanges[0] if entry.one_off else next(iter(entry.exchanges[1:]), None)
        if exchange is not None:
            raise UserError(
                f'--dp-clip is not for {name} with these options, whose clients upload more ("{exchange}") than a '
                "change of the network: leave it out, or choose other options."
            )
        if "parameters" not in method.reduce or entry.cohort or isinstance(entry.participants, tuple):
            raise UserError(
                f"--dp-clip is not for {name} with these options, whose server does more with uploads than adding them "
                "up: leave it out."
            )
        phase = Phase(0, entry.name, entry.exchanges[0])
        if phase in seen:
            continue
        seen.add(phase)
        message = message_for(method.send(server, phase), 0, method.may_skip_clients) or {}
        for key, due in method.expects(server, phase, 0, message).items():
            fits = key in method.reduce and (key not in VECTORS or size_of(due) == server.state[key].numel())
            if not fits and key != "integers":
                raise UserError(
                    f'--dp-clip is not for {name} with these options, whose clients upload "{key}", which the server '
                    "does not only add up: leave it out, or choose other options."
                )
    if config.buffers == "pool":  # last, because a setting mends it: FedDRA has pool by default
        raise UserError(
            "--buffers pool has clients upload sums over their samples, which --dp-clip does not bound: take --buffers "
            "average, local or drop."
        )
    if config.dp_noise and context.words() is not None:
        raise UserError(
            f"--dp-noise does not cover the vocabulary that --text-encoder {config.text_encoder} learns from the "
            "clients' texts: take a text encoder of transformers, or leave --dp-noise out."
        )


def size_of(due: object) -> int:
    """Return the length of a declared vector ``[P]``, or -1 for anything else."""
    declared = like(due) if isinstance(due, Tensor) else due
    shape = declared.shape if isinstance(declared, Values) else ()
    return shape[0] if len(shape) == 1 and isinstance(shape[0], int) else -1
