"""Settings of the clients' local training."""

from dataclasses import dataclass

from fedkern.errors import UserError
from fedkern.files.filesystem import absolute
from fedkern.methods import method_registry
from fedkern.settings.defaults import COMMON
from fedkern.settings.section import Section, Values
from fedkern.typed_option import option


@dataclass(frozen=True)
class TrainingSettings(Section):
    """Settings of the clients' local training."""

    local_epochs: int = option(COMMON["local_epochs"], "local epochs per round", low=1)
    local_steps: int | None = option(None, "local optimiser steps per round, instead of local epochs", low=1)
    batch_size: int = option(COMMON["batch_size"], "samples per mini-batch", low=1)
    optimizer: str = option(COMMON["optimizer"], "optimiser of the clients", choices=("sgd", "adamw"))
    optimizer_state: str = option(
        "new", "optimiser state at the start of a round: new, or kept from the last one", choices=("new", "keep")
    )
    lr: float = option(COMMON["lr"], "learning rate of the clients' optimiser", above=0)
    lr_decay: float = option(1.0, "factor by which the learning rate changes after every round", above=0, high=1)
    lr_steps: str | None = option(
        None,
        "epochs of the whole run (round x local epochs + epoch), or rounds with --local-steps, at which the learning "
        "rate drops: 200,400",
    )
    lr_step_factor: float = option(
        0.1, "factor by which the learning rate changes at each of --lr-steps", above=0, high=1
    )
    lr_end: float = option(
        1.0, "share of the learning rate that is left after a round's local epochs, along half a cosine; 1: constant",
        low=0, high=1,
    )  # fmt: skip
    momentum: float = option(COMMON["momentum"], "momentum of the clients' SGD", low=0, high=1)
    weight_decay: float = option(COMMON["weight_decay"], "weight decay of the clients' optimiser", low=0)
    clip_norm: float = option(0.0, "largest gradient norm of a step; 0: no clipping", low=0)
    teachers: str | None = option(
        None,
        "use networks that the clients have already trained, and skip training: a run folder, or a folder with "
        "client-0.safetensors, client-1.safetensors, ...",
        path=absolute,
    )

    def resolve(self) -> Values:
        values = super().resolve()
        return values if self.lr_steps is None else {**values, "lr_steps": ",".join(map(str, self.lr_epochs))}

    def check(self) -> None:
        super().check()
        if self.momentum >= 1:
            raise UserError("--momentum must be below 1; at 1 the velocity never decays.")
        if self.teachers is not None and not self.kind.takes_teachers:
            able = ", ".join(sorted(name for name, kind in method_registry.METHODS.items() if kind.takes_teachers))
            raise UserError(
                f"--teachers is not for {self.method}, whose clients train round by round; it is for {able}."
            )

    def find_unused(self) -> dict[str, str]:
        ways = super().find_unused()
        if self.local_steps is not None:
            ways["local_epochs"] = "beside --local-steps: leave one of the two out"
        if self.optimizer == "adamw":
            ways["momentum"] = "with --optimizer adamw, which has moments of its own: leave it out"
        if self.local_steps is None and self.local_epochs == 1:
            ways["lr_end"] = "with one local epoch, which has one rate: leave it out"
        if self.lr_steps is None:
            ways["lr_step_factor"] = "without --lr-steps: give that too, or leave it out"
        return ways

    @property
    def lr_epochs(self) -> tuple[int, ...]:
        words = [word.strip() for word in (self.lr_steps or "").split(",")] if self.lr_steps is not None else []
        epochs = [int(word) if word.isdecimal() else 0 for word in words]
        if any(epoch < 1 for epoch in epochs) or sorted(set(epochs)) != epochs:
            raise UserError(
                f'--lr-steps must be epochs of at least 1 in rising order, such as 200,400, not "{self.lr_steps}".'
            )
        return tuple(epochs)
