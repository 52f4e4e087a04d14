"""Settings of client-level differential privacy (``--dp-clip``, ``--dp-noise``), and those that exclude them."""

from __future__ import annotations

from typing import Protocol

from fedkern.errors import UserError

USUAL_DELTA = 1e-5
_MEAN = "mean"


class Settings(Protocol):
    """What of a run's settings is looked at here (`fedkern.settings.config.RunConfig`)."""

    @property
    def trained_clients(self) -> int: ...
    @property
    def dp_clip(self) -> float | None: ...
    @property
    def dp_noise(self) -> float | None: ...
    @property
    def dp_delta(self) -> float | None: ...
    @property
    def dp_draws(self) -> str: ...
    @property
    def aggregator(self) -> str: ...
    @property
    def clip_update_norm(self) -> float: ...
    @property
    def fix_statistics(self) -> int | None: ...
    @property
    def privacy_unit(self) -> str: ...


def delta_of(config: Settings) -> float:
    """The delta at which epsilon is told: ``dp_delta``, or where that is open 1e-5 or clients^-1.1, the smaller."""
    return min(USUAL_DELTA, config.trained_clients**-1.1) if config.dp_delta is None else config.dp_delta


def check(config: Settings) -> None:
    """Checks the settings against each other; what depends on the method's plan is checked before the run starts.

    Raises:
        UserError: settings do not fit together.
    """
    if (config.dp_clip is None) != (config.dp_noise is None):
        given, other = ("--dp-clip", "--dp-noise") if config.dp_noise is None else ("--dp-noise", "--dp-clip")
        raise UserError(f"{given} needs {other}: give both, or leave both out.")
    if config.dp_clip is None:
        for flag, there in (("--dp-delta", config.dp_delta is not None), ("--dp-draws", config.dp_draws != "secret")):
            if there:
                raise UserError(f"{flag} is about the noise of --dp-noise: give --dp-clip and --dp-noise too, or leave "
                                "it out.")  # fmt: skip
        return
    if config.aggregator != _MEAN:
        raise UserError(
            f"--aggregator {config.aggregator} is not for --dp-clip, which bounds what a client changes in a sum of "
            "updates: leave one of the two out."
        )
    if config.clip_update_norm:
        raise UserError("--clip-update-norm clips what --dp-clip clips already: leave it out.")
    if config.fix_statistics is not None and config.dp_noise:
        raise UserError(
            "--fix-statistics keeps batch norm's running statistics as they are, and the noise of --dp-noise moves "
            "them: leave one of the two out."
        )
    if config.privacy_unit != "image":
        raise UserError(
            f"--privacy-unit {config.privacy_unit} is for methods that protect a client's samples, and --dp-noise "
            "protects whole clients: leave one of the two out."
        )
