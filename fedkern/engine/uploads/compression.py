"""Compressed updates with error feedback (``--compress``), for methods whose server averages parameters.

A client sends C(u + r) instead of its update u, the change of the sent parameters, and keeps the error: r <- u + r -
C(u + r), zero at first. The server adds C(u + r) to the sent parameters. Every exchange has its own residuals. Only
``parameters`` of an upload are compressed.

- ``topk``: the share of the coordinates that are largest in absolute value, with memory of the rest (Stich et al.,
  NeurIPS 2018, arXiv 1809.07599). Of equal ones the first counts.
- ``int8``: stochastic rounding to 255 levels between -m and m, as in QSGD (Alistarh et al., NeurIPS 2017, arXiv
  1610.02132), with m the largest absolute value of every 1,024 coordinates.

Error feedback for any such C: Karimireddy et al., ICML 2019, arXiv 1901.09847.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fedkern.engine.setup.run_objects import RunObjects
from fedkern.engine.uploads.encoders import Departure, Encoder
from fedkern.engine.uploads.filters import Arrival, ExchangeRequest, Filter, register_filter
from fedkern.errors import UserError
from fedkern.methods.base import ClientId, Declaration, Message, Phase
from fedkern.methods.uploads import Values, all_finite, why_refused
from fedkern.settings.federation import COMPRESSORS
from fedkern.streams import stream
from fedkern.typed_option import with_options

CHUNK = 1024
"""Coordinates that share a scale."""
LEVELS = 127
Draw = Callable[[int], Tensor]
"""Returns n uniform numbers in [0, 1), fp32 ``[n]``."""


class Compressor(Protocol):
    """A compression of vectors, fp32 ``[P]``."""

    def declare(self, size: int) -> Declaration: ...

    def compress(self, vector: Tensor, draw: Draw) -> Message: ...

    def restore(self, message: Message, size: int) -> Tensor:
        """Return the vector fp32 ``[P]`` of a compressed message."""
        ...


@dataclass(frozen=True)
class TopK:
    """The ``share`` of the coordinates that are largest in absolute value, at least one."""

    share: float

    def _count(self, size: int) -> int:
        return min(size, max(1, round(self.share * size)))

    def declare(self, size: int) -> Declaration:
        count = self._count(size)
        index = torch.int32 if size < 1 << 31 else torch.int64
        return {"indices": Values((count,), index, low=0, high=size - 1), "values": Values((count,))}

    def compress(self, vector: Tensor, draw: Draw) -> Message:
        magnitude, count = vector.abs(), self._count(vector.numel())
        # Nine times as fast as torch's topk, which picks any of equal values.
        threshold = float(np.partition(magnitude.numpy(), -count)[-count])
        chosen = magnitude > threshold
        chosen[(magnitude == threshold).nonzero().squeeze(1)[: count - int(chosen.sum())]] = True
        indices = chosen.nonzero().squeeze(1)
        return {"indices": indices.to(self.declare(vector.numel())["indices"].dtype), "values": vector[indices]}

    def restore(self, message: Message, size: int) -> Tensor:
        indices = message["indices"].long()
        if not bool((indices[1:] > indices[:-1]).all()):
            raise ValueError("has indices of parameters that do not rise")
        return torch.zeros(size).index_copy_(0, indices, message["values"])


@dataclass(frozen=True)
class Int8:
    """Stochastic rounding to multiples of a 127th of the largest absolute value of every `CHUNK` coordinates."""

    def declare(self, size: int) -> Declaration:
        return {
            "levels": Values((size,), torch.int8, low=-LEVELS, high=LEVELS),
            "scales": Values((-(-size // CHUNK),), low=0),
        }

    def compress(self, vector: Tensor, draw: Draw) -> Message:
        size = vector.numel()
        chunks = pad(vector, (0, -size % CHUNK)).view(-1, CHUNK)
        scales = chunks.abs().amax(1) / LEVELS
        # A scale may underflow to zero, and a level be a rounding above 127.
        levels = chunks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        levels = levels.view(-1)[:size].add_(draw(size)).floor_().clamp_(-LEVELS, LEVELS)
        return {"levels": levels.to(torch.int8), "scales": scales}

    def restore(self, message: Message, size: int) -> Tensor:
        levels = pad(message["levels"], (0, -size % CHUNK)).float().view(-1, CHUNK)
        return levels.mul_(message["scales"][:, None]).view(-1)[:size]


MADE: dict[str, Callable[..., Compressor]] = {"topk": TopK, "int8": Int8}


@register_filter("compress")
class Compression(Filter):
    """Filter whose clients compress their updates, which the server restores."""

    keeps_client_state = True

    @classmethod
    def build(cls, run: RunObjects) -> Compression | None:
        config = run.config
        return None if config.compress is None else cls(config.compress, config.seed)

    def __init__(self, text: str, seed: int) -> None:
        name, options = with_options("--compress", text, COMPRESSORS)
        self._compressor = MADE[name](**options)
        self._text, self._seed = text, seed
        self._starts: dict[ClientId, Tensor] = {}  # parameters from which this exchange's updates count

    def encoders(self, asked: ExchangeRequest) -> Mapping[ClientId, Encoder]:
        starts = {k: asked.declaration_of(k).get("parameters") for k in asked.sent} if asked.hooks.own else {}
        self._starts = {k: start for k, start in starts.items() if _is_vector(start)}
        if self._starts and asked.entry.cohort:
            raise UserError(
                f"--compress {self._text} is for clients that work on their own, and those of the round "
                f'"{asked.entry.name}" work together: leave it out.'
            )
        return {k: Compressing(self._compressor, start, self._seed, asked.phase) for k, start in self._starts.items()}

    def declare_encoded(self, asked: ExchangeRequest, declared: Declaration) -> Declaration:
        start = declared.get("parameters")
        if not asked.hooks.own or not _is_vector(start):
            return declared
        return {**declared, "parameters": self._compressor.declare(start.numel())}

    def decode(self, arrival: Arrival) -> str:
        start, message = self._starts.get(arrival.client), arrival.message
        if start is None or not isinstance(message, Mapping) or not isinstance(message.get("parameters"), Mapping):
            return ""  # an upload that does not fit has travelled whole
        sent, size = message["parameters"], start.numel()
        if why := why_refused({"parameters": sent}, {"parameters": self._compressor.declare(size)}):
            return why
        try:
            update = self._compressor.restore(sent, size)
        except ValueError as error:
            return str(error)
        arrival.message = {**message, "parameters": update.add_(start)}
        return ""


@dataclass(frozen=True)
class Compressing:
    """Compression of one client's update, the change of ``start``, fp32 ``[P]``."""

    compressor: Compressor
    start: Tensor
    seed: int
    phase: Phase
    on_gpu: tuple[str, ...] = ()

    def encode(self, leaving: Departure) -> tuple[Any, None]:
        """Compress an upload, or send an unfit upload unchanged, for the server to refuse."""
        message, start, name = leaving.message, self.start, self.phase.exchange
        trained = message.get("parameters") if isinstance(message, Mapping) else None
        if not _is_vector(trained) or trained.shape != start.shape:
            return message, None
        update = trained.detach().to(start.device) - start
        if name in leaving.state:
            update += leaving.state[name]
        if not all_finite(update):
            return message, None
        rng = stream(self.seed, f"compress/{name}", round=self.phase.round, client=leaving.client)
        sent = self.compressor.compress(update, lambda size: torch.from_numpy(rng.random(size, np.float32)))
        leaving.state[name] = update - self.compressor.restore(sent, len(update))
        return {**message, "parameters": sent}, None


def _is_vector(value: object) -> TypeGuard[Tensor]:
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        return False
    return value.dim() == 1 and value.dtype == torch.float32 and value.numel() > 0
