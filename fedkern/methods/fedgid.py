"""FedGID (arXiv 2504.00850): global intervention and distillation against attribute skew.

A client mixes random backgrounds, seen by the frozen global encoder, into its own features while keeping the label
(intervention), and pulls both features towards the global encoder's (distillation):

    L = CE(z_I, y) + CE(z_INV, y) + lambda [KL(f_I || f_G) + KL(f_INV || f_G)]

Nothing but the model travels, so every round costs the bytes of FedAvg.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedkern import ops
from fedkern.methods.base import (
    Batch,
    Client,
    ClientId,
    Federation,
    LocalTraining,
    Message,
    Received,
    Round,
    Server,
    Step,
    Upload,
    option,
    register,
)

STAGES = ("map", "feature", "layer1", "layer2", "layer3", "layer4")


@register("fedgid")
class FedGID(LocalTraining):
    """Background intervention and global distillation against attribute skew (arXiv 2504.00850)."""

    @dataclass(frozen=True)
    class Options(LocalTraining.Options):
        """Section 1 of the paper's knobs; ``lambda`` is the field ``lam``."""

        intervention: bool = option(True, "train on features mixed with random backgrounds (+GI)")
        distillation: bool = option(True, "pull features towards the global encoder's (+GD)")
        alpha: float = option(0.6, "weight of a sample's own features in the mixture", low=0, high=1)
        lam: float = option(1.0, "weight of the distillation loss", low=0, name="lambda")
        temperature: float = option(1.0, "temperature of the distillation loss", above=0)
        mix_stage: str = option("map", "where features and backgrounds meet; map: the last map but one", choices=STAGES)
        kl_direction: str = option(
            "local_global", "KL(local || global) or KL(global || local)", choices=("local_global", "global_local")
        )
        distill_on: str = option("features", "what is distilled", choices=("features", "logits"))
        background_pool: str = option(
            "own", "a client's own backgrounds, or everybody's (sent once)", choices=("own", "shared")
        )
        exclude_same_class: bool = option(False, "never mix with a background of the sample's own class")
        background_fill: str = option(
            "mean", "what erased objects become: the mean colour, or black", choices=("mean", "zero")
        )
        alpha_sampling: str = option(
            "constant", "alpha per sample: constant, uniform in [alpha, 1], or Beta with mean alpha",
            choices=("constant", "uniform", "beta"),
        )  # fmt: skip
        alpha_concentration: float = option(4.0, "sum of the two parameters of the Beta distribution", above=0)
        gi_start_round: int = option(0, "rounds before the intervention starts", low=0)
        gd_start_round: int = option(0, "rounds before the distillation starts", low=0)
        gd_ramp: int = option(0, "rounds over which lambda then rises linearly", low=0)
        tail_bn_updates: bool = option(False, "let mixed features update batch norm's running statistics")

    # -- what is on in a round -------------------------------------------------------------------------------------

    def intervenes(self, step: Step) -> bool:
        """Whether L_GI is part of the loss of this round."""
        return self.options.intervention and step.round >= self.options.gi_start_round

    def mixes(self, step: Step) -> bool:
        """Whether features are really mixed: with a constant alpha of 1 the mixture is the sample itself."""
        own_only = self.options.alpha == 1 and self.options.alpha_sampling != "beta"
        return self.intervenes(step) and not own_only

    def distillation_weight(self, step: Step) -> float:
        """Lambda of this round, after the warm-up and the ramp."""
        o = self.options
        done = step.round - o.gd_start_round
        if not o.distillation or done < 0:
            return 0.0
        return o.lam * min(1.0, (done + 1) / o.gd_ramp) if o.gd_ramp else o.lam

    # -- the client ------------------------------------------------------------------------------------------------

    def draw(self, client: Client, batch: Batch, rng: np.random.Generator) -> dict[str, Any]:
        """A random background for every sample, and its alpha where that is random."""
        return {}

    def loss(self, model: Any, batch: Batch, received: Received) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        return cross_entropy(model(batch.images), batch.labels)


_ = (
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    contextmanager,
    torch,
    nn,
    ops,
    ClientId,
    Federation,
    Message,
    Round,
    Server,
    Upload,
)
