"""Settings of the rounds: number, participants, aggregation, and end of the run."""

import math
import re
from dataclasses import dataclass
from typing import cast

from fedkern.errors import UserError
from fedkern.methods import method_registry
from fedkern.methods.aggregators import AGGREGATORS, MEAN, Rule
from fedkern.methods.server_rules import SERVER_RULES, ServerRule
from fedkern.settings.data import DataSettings
from fedkern.settings.defaults import COMMON
from fedkern.settings.section import Values
from fedkern.typed_option import Option, flag, named_options, option, spell_options, with_options
from fedkern.usercode import named_code
from fedkern.usercode.named_code import FORMS

AVERAGING = "that average the clients' parameters"
COMPRESSORS = {
    "topk": named_options(
        "--compress topk", share=Option(0.05, "share of the coordinates that travel", above=0, high=0.5)
    ),
    "int8": (),
}
"""Options of compressions of updates (`fedkern.engine.uploads.compression`), by name."""
_STALENESS = Option(0.5, "power by which a stale upload weighs less", low=0)
POLICIES = {
    "fedbuff": named_options(
        "--asynchronous fedbuff", buffer=Option(10, "uploads to a step", low=1), staleness=_STALENESS
    ),
    "fedasync": named_options(
        "--asynchronous fedasync", mixing=Option(0.6, "weight of an upload", above=0, high=1), staleness=_STALENESS
    ),
}
"""Options of policies of asynchronous rounds (`fedkern.engine.uploads.asynchronous`), by name."""
_TARGET = re.compile(r"\s*([A-Za-z]\w*)\s*(>=|<=)\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*")
_CHOICES = re.compile("uniform|size|loss|power-of-choice:[0-9]{1,9}")


def stop_target(text: str) -> tuple[str, str, float]:
    if (match := _TARGET.fullmatch(text)) is None:
        raise UserError(f'--stop-at must be FIGURE>=VALUE or FIGURE<=VALUE, such as accuracy>=0.9, not "{text}".')
    return match[1], match[2], float(match[3])


@dataclass(frozen=True)
class FederationSettings(DataSettings):
    """Settings of the rounds and the server."""

    sample_fraction: float = option(1.0, "fraction of the clients that train in each round", above=0, high=1)
    choose: str = option(
        "uniform",
        "how the clients of a round are drawn: uniform; size (by samples, which count twice without --method-option "
        "weighting=uniform); loss (the highest last training losses, clients that have not trained first) or "
        "power-of-choice:D (of D drawn by size those with the highest losses), whose means are biased towards clients "
        f"with high losses; or a function, {FORMS}",
        path=named_code.absolute,
    )
    rounds: int = option(COMMON["rounds"], "communication rounds", low=1, high=100_000)
    compress: str | None = option(
        None, "averaging methods: compress the clients' updates, with error feedback: topk:share=S or int8"
    )
    aggregator: str = option(
        MEAN,
        lambda: (
            "averaging methods: rule that combines the clients' networks, as NAME or NAME:key=value,...: "
            + ", ".join(AGGREGATORS)
        ),
    )
    server_rule: str = option(
        MEAN,
        "averaging methods: server optimiser that steps towards the clients' average, as NAME or NAME:key=value,...: "
        + ", ".join(SERVER_RULES),
    )
    server_lr: float | None = option(
        None,
        "averaging methods: learning rate of the server; if left out, 1 for mean and momentum, 0.1 for adam and "
        "adagrad, 0.01 for yogi",
        above=0,
    )
    asynchronous: str | None = option(
        None,
        "averaging methods: let the server step as uploads arrive, without waiting for whole rounds: "
        "fedbuff:buffer=K,staleness=A or fedasync:mixing=M,staleness=A; every step counts as a round",
    )
    eval_every: int = option(1, "evaluate every N rounds, and always after the last", low=1)
    stop_at: str | None = option(
        None, "end the run once a figure of the records reaches this value: accuracy>=0.9, loss<=0.1"
    )
    patience: int | None = option(
        None,
        "end the run after N evaluations without a better main figure on the validation set; best.safetensors keeps "
        "the network of the best round",
        low=1,
    )
    max_seconds: float | None = option(
        None, "most seconds of work, over all resumptions; a round that would exceed them is not run", above=0
    )
    max_bytes: float | None = option(
        None, "most bytes up and down, set-up rounds included; a round that would exceed them is not run", above=0
    )

    def resolve(self) -> Values:
        values = {**super().resolve(), "aggregator": Rule(self.aggregator).text}
        values["server_rule"] = ServerRule(self.server_rule).text
        for setting, entries in (("compress", COMPRESSORS), ("asynchronous", POLICIES)):
            if (text := getattr(self, setting)) is not None:
                values[setting] = spell_options(*with_options(flag(setting), text, entries))
        return values

    def check(self) -> None:
        super().check()
        if not _CHOICES.fullmatch(self.choose) and named_code.parse(self.choose) is None:
            raise UserError(
                f"--choose must be uniform, size, loss, power-of-choice:D with a number D, or {FORMS}, not "
                f'"{self.choose}".'
            )
        for name in self.given_flags("sample_fraction", "choose") if self.kind.one_shot else ():
            raise UserError(f"{name} is not for {self.method}, a one-shot method, in which every client trains once.")
        self.check_whole_rounds("--choose", self.choose != "uniform")
        for name in ("stop_at", "patience", "max_seconds", "max_bytes"):
            if self.kind.one_shot and getattr(self, name) is not None:
                raise UserError(
                    f"{flag(name)} is not for {self.method}, a one-shot method, whose rounds belong together: leave it "
                    "out."
                )
        self.check_able(self.method_instance.averages, AVERAGING, "compress")
        self.check_able(self.method_instance.averages is not False, AVERAGING, "aggregator")
        once = "whose server averages the clients' parameters once a round"
        self.check_able(self.method_instance.allows_server_rule, once, "server_rule", "server_lr")
        if self.stop_at is not None:
            stop_target(self.stop_at)
        if self.asynchronous is not None:
            self._check_asynchronous()

    def find_unused(self) -> dict[str, str]:
        way = "where all clients take part in every round: lower --sample-fraction, or leave it out"
        return {**super().find_unused(), **({"choose": way} if self.sample_fraction == 1 else {})}

    def _check_asynchronous(self) -> None:
        if not (self.kind.asynchronous and self.method_instance.averages):
            able = ", ".join(name for name, kind in method_registry.METHODS.items() if kind.asynchronous)
            silent = self.kind.asynchronous is None or self.method_instance.averages is None
            reason = "overrides a hook and does not set `asynchronous` again" if silent else "counts on whole rounds"
            raise UserError(
                f"--asynchronous is for methods whose class declares that stale uploads do no harm ({able}), and "
                f"{self.method} {reason}: leave it out, or choose another method."
            )
        _, options = self.policy
        if options.get("buffer", 1) > self.trained_clients and "clients" not in self.unset:
            raise UserError(
                f"--asynchronous {self.asynchronous} steps after the uploads of {options['buffer']} clients, and the "
                f"run has {self.trained_clients}: take a smaller buffer, or more clients."
            )

    def check_whole_rounds(self, name: str, is_given: bool) -> None:
        """Raise UserError if ``--asynchronous`` forbids a setting about rounds that end for all."""
        if is_given and self.asynchronous is not None:
            raise UserError(
                f"{name} is about rounds that all their clients begin and end, and --asynchronous has none: leave one "
                "of the two out."
            )

    def check_able(self, able: bool | None, deed: str, *names: str) -> None:
        """Raise UserError for given settings of methods that do ``deed`` if the method is not ``able`` to.

        None: the method's class overrides hooks and does not declare ``averages`` again.
        """
        if not able and (name := next(self.given_flags(*names), None)):
            reason = f"which {self.method} with these options does not do: leave it out."
            if able is None:
                reason = (
                    f"and {self.kind.__name__} has a server_update or average of its own: declare averages = True in "
                    "the class if it does so too, or leave it out."
                )
            raise UserError(f"{name} is for methods {deed}, {reason}")

    @property
    def policy(self) -> tuple[str, Values]:
        return cast(tuple[str, Values], with_options("--asynchronous", self.asynchronous or "", POLICIES))

    @property
    def sampled_clients(self) -> int:
        return max(1, math.floor(self.sample_fraction * self.trained_clients + 0.5))

    @property
    def clients_of_a_round(self) -> int:
        """Number of clients in a round, 1 for a pooled method."""
        return 1 if self.kind.pooled else self.sampled_clients
