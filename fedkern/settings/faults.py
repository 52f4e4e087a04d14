"""Settings of faults: clients that fail, are slow or diverge, and uploads that are too large."""

from dataclasses import dataclass

from fedkern.errors import UserError
from fedkern.settings.devices import read_devices
from fedkern.settings.federation import AVERAGING, FederationSettings
from fedkern.typed_option import flag, option


@dataclass(frozen=True)
class FaultSettings(FederationSettings):
    """Settings of faults."""

    on_nan: str = option(
        "stop",
        "when a client diverges (NaN or Inf) or its upload is refused: stop the run, or skip the client",
        choices=("stop", "skip"),
    )
    on_error: str = option(
        "stop",
        "when a client's part of the method raises an exception: stop the run, or skip the client",
        choices=("stop", "skip"),
    )
    max_update_norm: float = option(
        0.0,
        "averaging methods: refuse a client's update (its parameters minus those sent) above this Euclidean norm; "
        "0: no limit",
        low=0,
    )
    clip_update_norm: float = option(
        0.0, "averaging methods: scale a client's update down to at most this Euclidean norm; 0: no limit", low=0
    )
    dropout_rate: float = option(
        0.0, "averaging methods: probability that a client fails in a round before its upload", low=0, high=1
    )
    straggler_rate: float = option(
        0.0,
        "averaging methods: probability that a client is slow in a round, at a random fraction of the others' speed",
        low=0,
        high=1,
    )
    devices: str | None = option(
        None,
        "averaging methods: TOML file with the clients' devices, their compute, links and hours, by which rounds take "
        "simulated seconds",
        path=read_devices,
    )
    deadline: float | None = option(
        None,
        "when a round ends for slow clients: with --straggler-rate in multiples of the time that the others need (1 if "
        "left out), with --devices in simulated seconds",
        low=1,
    )
    stragglers: str = option(
        "keep",
        "at the deadline, keep what a slow client has trained so far, or drop the client from the round",
        choices=("keep", "drop"),
    )

    def check(self) -> None:
        super().check()
        self.check_able(self.method_instance.averages, AVERAGING, "max_update_norm", "clip_update_norm")
        rounds = self.method_instance.averages is not False and not self.kind.one_shot
        self.check_able(rounds, f"{AVERAGING} round by round", "dropout_rate", "straggler_rate", "devices")
        if self.straggler_rate and self.devices is not None:
            raise UserError(
                "--devices says how fast every client is, and --straggler-rate draws it: leave one of the two out."
            )
        given = next(self.given_flags("straggler_rate", "deadline"), None)
        if given is not None and self.kind.is_private(self.method_options):
            raise UserError(
                f"{given} is not for {self.method} with differential privacy, whose epsilon counts all steps of a "
                "client: leave one of the two out."
            )
        self.check_whole_rounds("--dropout-rate", self.dropout_rate > 0)
        for name, plain in (("deadline", None), ("stragglers", "keep")):
            self.check_whole_rounds(flag(name), getattr(self, name) != plain)
            if getattr(self, name) != plain and not self.straggler_rate and None in (self.devices, self.deadline):
                raise UserError(
                    f"{flag(name)} is about slow clients: give --straggler-rate too, or --devices with a --deadline, "
                    "or leave it out."
                )
        if self.clip_update_norm and self.kind.follows_own_update:
            raise UserError(
                f"--clip-update-norm is not for {self.method}, whose clients keep a gradient of their whole update: "
                "take --max-update-norm, which refuses an update that is too large."
            )
