"""FedGID (arXiv 2504.00850): global intervention and distillation against attribute skew.

A client mixes the frozen global encoder's features of random backgrounds into its own features, and pulls its own and
the mixed features towards the global encoder's (docs/methods/fedgid.md):

    L = CE(z_I, y) + CE(z_INV, y) + lambda T^2 [KL_T(f_I || f_G) + KL_T(f_INV || f_G)]

``intervene=image`` is not in the paper: the object on a random background, composed in the image, keeps nothing of its
own background.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkern import ops
from fedkern.errors import UserError
from fedkern.methods.base import LocalTraining
from fedkern.methods.common.frozen import cached_rows, normalises_by_batch
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import Batch, Observed, Received
from fedkern.methods.roles import Client, Drawn, Server
from fedkern.methods.uploads import make_once
from fedkern.models import StagedNetwork, resolve_stage
from fedkern.process.device_copies import send
from fedkern.typed_option import option

CHUNK = 256  # images per pass of the frozen encoder over a bank
CACHE_BYTES = 256 << 20  # larger maps of a bank are not cached but computed per batch
STAGES = ("map", "feature", "layer1", "layer2", "layer3", "layer4")


@register("fedgid")
class FedGID(LocalTraining):
    """Background intervention and global distillation against attribute skew (arXiv 2504.00850)."""

    requires = frozenset({"criterion", "classes", "images", "features"})
    stateless = True
    asynchronous = True
    averages = True
    reduce = LocalTraining.reduce
    replayable = True

    @dataclass(frozen=True)
    class Options(LocalTraining.Options):
        """Options of FedGID (docs/methods/fedgid.md, section 5).

        The option ``lambda`` is the field ``lam``.
        """

        intervention: bool = option(True, "train on features mixed with random backgrounds (+GI)")
        distillation: bool = option(True, "pull features towards the global encoder's (+GD)")
        alpha: float = option(0.6, "weight of a sample's own features in the mixture", low=0, high=1)
        lam: float = option(1.0, "weight of the distillation loss", low=0, name="lambda")
        temperature: float = option(1.0, "temperature of the distillation loss", above=0, infinite=True)
        intervene: str = option(
            "map", "where a sample is mixed with a background: in its features, or in the image, by object masks",
            choices=("map", "image"),
        )  # fmt: skip
        mix_stage: str = option(
            "map", "stage whose features are mixed with backgrounds; map: the second-to-last map stage", choices=STAGES
        )
        kl_direction: str = option(
            "local_global", "KL(local || global) or KL(global || local)", choices=("local_global", "global_local")
        )
        distill_on: str = option("features", "what the distillation compares", choices=("features", "logits"))

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.intervene == "map":
                return
            if not self.intervention:
                raise UserError('Method option "intervene" = image has no effect with intervention=off: leave one out.')
            for name, published in (("alpha", 0.6), ("mix_stage", "map")):
                if getattr(self, name) != published:
                    raise UserError(f'Method option "{name}" has no effect with intervene=image: leave one out.')

    @property
    def needs(self) -> str:
        return "features" if self.masked else "maps"

    @property
    def masked(self) -> bool:
        return bool(self.options.intervene == "image")

    @property
    def _mixes(self) -> bool:
        return bool(self.options.intervention and self.options.alpha < 1)

    # -- the client ------------------------------------------------------------------------------------------------

    def draw(self, client: Client, batch: Batch, rng: np.random.Generator) -> Drawn:
        """Draw a random background for every sample."""
        if not self._mixes:
            return {}
        bank = make_once(client.round_cache, "bank", client.backgrounds)
        if not len(bank):
            return {}
        index = rng.integers(0, len(bank), len(batch.indices))
        drawn: Drawn = {"bank": bank, "index": index}
        if bank.augmented:
            drawn["images"] = bank.take(index, rng)
        return drawn

    def loss(self, model: StagedNetwork, batch: Batch, received: Received) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        o, drawn = self.options, batch.drawn
        # The maps stay at hand for the mixture, which continues from the same stage.
        if self.masked:
            features = model.features(batch.inputs)
        else:
            stage = resolve_stage(model, o.mix_stage)
            maps = model.stages(batch.inputs, upto=stage)
            features = model.tail(maps, after=stage)
        logits = model.head(features)
        em = batch.task.criterion(logits, batch)
        total, figures = em, {"loss_em": em.detach()}

        mixed, mixed_logits, gi = features, logits, em  # an alpha of 1 mixes nothing in
        mixes = "maps" in drawn or "composed" in drawn
        if mixes:
            # Running statistics are for test images, which are not mixtures.
            with batch_statistics_only(model):
                if self.masked:
                    mixed = model.features(drawn["composed"])
                else:
                    blended = ops.blend(maps, drawn["maps"], o.alpha, index=drawn.get("rows"))
                    mixed = model.tail(blended, after=stage)
            mixed_logits = model.head(mixed)
            gi = batch.task.criterion(mixed_logits, batch)
            changed = mixed_logits.detach().argmax(1) != logits.detach().argmax(1)
            figures["intervention_changed"] = changed.float().mean()
        # A client without backgrounds has nothing to mix with.
        intervenes = o.intervention and (mixes or not self._mixes)
        if intervenes:
            total = total + gi
            figures["loss_gi"] = gi.detach()

        # The distillation pulls both views of a sample to the frozen global model's.
        if (anchor := drawn.get("anchor")) is not None:
            u, v = (features, mixed) if o.distill_on == "features" else (logits, mixed_logits)
            if intervenes:
                direction = "student" if o.kl_direction == "local_global" else "teacher"
                gd = ops.dual_kl(u, v, anchor, o.temperature, direction=direction)
            elif o.kl_direction == "local_global":
                gd = ops.kl_div(anchor, u, o.temperature)
            else:
                gd = ops.kl_div(u, anchor, o.temperature)
            total = total + o.lam * gd
            figures["loss_gd"] = gd.detach()
        return total, figures

    # -- the frozen global encoder ---------------------------------------------------------------------------------

    def prepare(self, model: StagedNetwork, batch: Batch, received: Received) -> Drawn:
        """Return ``anchor``, and the backgrounds' ``maps`` with ``rows``, or ``composed`` images.

        ``rows`` int64 [B] is every sample's map (absent: in order). ``composed`` [B, C, H, W] replaces the maps with
        ``intervene=image``.
        """

        def answer() -> Tensor:
            features: Tensor = received.model.features(batch.inputs)
            return received.model.head(features) if self.options.distill_on == "logits" else features

        tensors: Drawn = {}
        if self.options.distillation and self.options.lam:
            tensors["anchor"] = cached_rows("anchor", batch, received, answer)
        if "index" in batch.drawn and self.masked:
            tensors["composed"] = self._compose(batch)
        elif "index" in batch.drawn:
            tensors |= self._background_maps(batch, received, resolve_stage(model, self.options.mix_stage))
        return tensors

    def _compose(self, batch: Batch) -> Tensor:
        """Return every sample's object, or without a known object the whole sample, on its background."""
        drawn, masks = batch.drawn, batch.masks
        assert masks is not None
        backgrounds = drawn["images"] if "images" in drawn else drawn["bank"].take(drawn["index"])
        kept = masks | ~masks.flatten(1).any(1)[:, None, None]
        return torch.where(kept[:, None], batch.inputs, backgrounds)

    def _background_maps(self, batch: Batch, received: Received, stage: str) -> dict[str, Tensor]:
        drawn = batch.drawn
        if "images" in drawn:
            return {"maps": received.model.stages(drawn["images"], upto=stage)}
        bank, index = drawn["bank"], drawn["index"]
        # The global encoder is frozen: with at least as many draws as images, encoding the whole bank once is cheaper.
        if len(bank) <= received.samples * received.epochs and not normalises_by_batch(received.model):
            maps = received.round_cache.get("bank")
            if maps is None:
                chunks = [np.arange(i, min(i + CHUNK, len(bank))) for i in range(0, len(bank), CHUNK)]
                begin = received.model.stages(bank.take(chunks[0]), upto=stage)
                if begin.numel() // len(chunks[0]) * len(bank) * begin.element_size() <= CACHE_BYTES:
                    later = [received.model.stages(bank.take(chunk), upto=stage) for chunk in chunks[1:]]
                    maps = torch.cat([begin, *later])
                received.round_cache["bank"] = maps if maps is not None else ()
            if isinstance(maps, Tensor):
                rows = send(torch.from_numpy(index), maps.device)
                # A recorded pass is valid for one shape only, and no two banks are alike.
                return {"maps": maps.index_select(0, rows)} if maps.is_cuda else {"maps": maps, "rows": rows}
        return {"maps": received.model.stages(bank.take(index), upto=stage)}

    # -- the run ---------------------------------------------------------------------------------------------------

    def check(self, client: Client) -> None:
        if self._mixes and not client.objects_known:
            raise UserError(
                "The background intervention needs to know where the objects are, and this data set has no masks: give "
                "--boxes FILE or --detector PATH_OR_NAME, or, for a Dataset, items with a key `mask`, or turn "
                "it off with --method-option intervention=off."
            )

    def start(self, server: Server) -> None:
        super().start(server)
        network: Any = self.model(server)
        if not self.masked:
            resolve_stage(network, self.options.mix_stage)  # raises on an unknown stage before the run starts

    def diagnose(self, observed: Mapping[str, Observed]) -> dict[str, str]:
        changed = observed.get("intervention_changed")
        if changed is not None and changed.high == 0:
            way = "" if self.masked else "lower alpha, mix at an earlier stage, or "
            return {
                "intervention-inert": f"The intervention never changed a prediction: {way}check that the backgrounds "
                "differ."
            }
        return {}


@contextmanager
def batch_statistics_only(model: nn.Module) -> Iterator[None]:
    """Keep batch norm's running statistics unchanged in train mode."""
    batch_norms = (m for m in model.modules() if model.training and isinstance(m, _BatchNorm))
    layers = [m for m in batch_norms if m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
