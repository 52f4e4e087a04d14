"""Settings of privacy: of whole clients by noise on the server's mean, of samples, and of the records."""

from dataclasses import dataclass

from fedkern.errors import UserError
from fedkern.methods.aggregators import MEAN
from fedkern.privacy import IMAGE, UNITS, ClientLevel, Unit
from fedkern.settings.faults import FaultSettings
from fedkern.settings.federation import AVERAGING
from fedkern.settings.model import ModelSettings
from fedkern.settings.section import Values
from fedkern.typed_option import option

PATIENT_IMAGES = 4
"""Default of ``--patient-images``."""
USUAL_DELTA = 1e-5


@dataclass(frozen=True)
class PrivacySettings(FaultSettings, ModelSettings):
    """Settings of privacy."""

    dp_clip: str | None = option(
        None,
        "averaging methods: client-level differential privacy, with --dp-noise. A client's change in a round is scaled "
        "down to at most this Euclidean norm, and all clients weigh the same. adaptive:Q lets the norm follow the "
        "quantile Q of the changes, adaptive:0.5 their median",
    )
    dp_noise: float | None = option(
        None,
        "averaging methods: standard deviation of the Gaussian noise that the server adds to the sum of the clients' "
        "changes, in multiples of --dp-clip. 0 only clips and gives no guarantee. More noise makes epsilon smaller, "
        "and more clients in a round make the noise on their mean smaller",
        low=0,
    )
    dp_delta: float | None = option(
        None, "delta at which epsilon is reported; if left out, the smaller one of 1e-5 and clients^-1.1",
        above=0, high=0.5,
    )  # fmt: skip
    max_epsilon: float | None = option(
        None, "largest epsilon of --dp-noise; a round that would exceed it is not run", above=0
    )
    dp_draws: str = option(
        "secret",
        "seed of the noise of --dp-noise: 128 secret random bits, or the run's seed. With the run's seed a run can be "
        "repeated, but epsilon only holds while nobody else knows the seed",
        choices=("secret", "seed"),
    )
    privacy_unit: str = option(
        UNITS[0],
        "unit that differential privacy protects: an image, or a patient with all images. For patients the data must "
        "name them, and an image without a patient counts as a separate patient",
        choices=UNITS,
    )
    patient_images: int | None = option(
        None, f"most images of a patient, drawn once, with --privacy-unit patient; if left out, {PATIENT_IMAGES}",
        low=1,
    )  # fmt: skip
    records: str | None = option(
        None,
        "what records, pictures and the terminal show: all, or private (nothing about single clients and nothing that "
        "epsilon does not cover). If left out: private with differential privacy, else all",
        choices=("all", "private"),
    )

    def resolve(self) -> Values:
        values = super().resolve()
        if self.records is None:
            promised = self.kind.is_private(self.method_options) or bool(self.dp_noise)
            values["records"] = "private" if promised else "all"
        return values

    def check(self) -> None:
        super().check()
        self.check_able(self.method_instance.averages is not False, AVERAGING, "dp_clip", "dp_noise")
        self._check_client_level()
        self.check_whole_rounds("--dp-clip", self.dp_clip is not None)
        if self.choose != "uniform" and (self.dp_clip is not None or self.kind.is_private(self.method_options)):
            raise UserError(
                f"--choose {self.choose} lets the clients' data decide who takes part, and epsilon counts on clients "
                "that are drawn uniformly and in secret: leave it out of runs with differential privacy."
            )
        self.check_whole_rounds("--buffers pool", self.buffers == "pool")
        if self.patient_images is not None and self.privacy_unit != "patient":
            raise UserError("--patient-images is for --privacy-unit patient: give that too, or leave it out.")

    def _check_client_level(self) -> None:
        # Clip and noise belong together, and delta and draws to the noise.
        if (self.dp_clip is None) != (self.dp_noise is None):
            name, needed = ("--dp-clip", "--dp-noise") if self.dp_noise is None else ("--dp-noise", "--dp-clip")
            raise UserError(f"{name} needs {needed}: give both, or leave both out.")
        if self.dp_clip is None:
            for name in self.given_flags("dp_delta", "dp_draws", "max_epsilon"):
                raise UserError(
                    f"{name} is about the noise of --dp-noise: give --dp-clip and --dp-noise too, or leave it out."
                )
            return
        assert self.dp_noise is not None
        ClientLevel.parse(self.dp_clip, self.dp_noise, self.delta)
        if self.max_epsilon is not None and not self.dp_noise:
            raise UserError("--max-epsilon needs noise, and --dp-noise 0 has no epsilon: leave one of the two out.")
        # The bound on a client holds for its change in a mean of updates, with no state left at clients.
        if self.aggregator != MEAN:
            raise UserError(
                f"--aggregator {self.aggregator} is not for --dp-clip, which bounds what a client changes in a sum of "
                "updates: leave one of the two out."
            )
        if self.compress is not None:
            raise UserError(
                f"--compress {self.compress} keeps what an update has lost at its client, and --dp-noise counts on "
                "clients that keep nothing: leave one of the two out."
            )
        if self.clip_update_norm:
            raise UserError("--clip-update-norm clips what --dp-clip clips already: leave it out.")
        if self.kind.follows_own_update:
            raise UserError(
                f"--dp-clip is not for {self.method}, whose clients keep a gradient of their whole update, which the "
                "server scales down: leave it out."
            )
        # Noise on uploads covers neither other figures nor statistics that must not move.
        if self.own_networks and self.dp_noise:
            raise UserError(
                f"--dp-noise is not for {self.method if self.personal is None else '--personal'}: it covers what "
                "clients upload, and not the figures of networks that every client keeps to itself."
            )
        if self.freeze_bn_after is not None and self.dp_noise:
            raise UserError(
                "--freeze-bn-after keeps batch norm's running statistics as they are, and the noise of --dp-noise "
                "moves them: leave one of the two out."
            )
        if self.privacy_unit != "image":
            raise UserError(
                f"--privacy-unit {self.privacy_unit} is for methods that protect a client's samples, and --dp-noise "
                "protects whole clients: leave one of the two out."
            )

    @property
    def unit(self) -> Unit:
        return Unit("patient", self.patient_images or PATIENT_IMAGES) if self.privacy_unit == "patient" else IMAGE

    @property
    def delta(self) -> float:
        """The delta of epsilon, by default the smaller of 1e-5 and clients^-1.1."""
        return min(USUAL_DELTA, self.trained_clients**-1.1) if self.dp_delta is None else self.dp_delta
