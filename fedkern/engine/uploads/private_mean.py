"""Noised mean of a round's clipped changes, in place of the uploads (`fedkern.engine.client_privacy`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from fedkern import ops
from fedkern.engine.client_privacy import ClientPrivacy, size_of
from fedkern.engine.server import Server
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.engine.uploads.filters import ExchangeRequest, Filter, register_filter
from fedkern.messages.states import State
from fedkern.methods.base import VECTORS, ClientId, Message, Method, Upload
from fedkern.models.state import freezing
from fedkern.privacy.accounting import CHANNEL, ClientLevel, keep_variances
from fedkern.privacy.keys import SECRET_BYTES, NoiseKey, noise_key
from fedkern.settings.config import RunConfig
from fedkern.streams import stream

RELEASED = -1
"""Client id of the released mean, in its `Upload`, its noise key and the digests of releases."""


class ClippedSum:
    """Sum of the clients' changes in fp64, each clipped to a norm as a whole."""

    def __init__(self, level: ClientLevel, start: Mapping[str, Tensor]) -> None:
        self._level, self._start = level, dict(start)
        self._sum = ops.Accumulator(sum(vector.numel() for vector in start.values()))
        self._within = 0  # updates that were no longer than the norm

    def add(self, message: Message) -> tuple[float, float]:
        """Add a client's vectors, fp32 ``[P_i]`` by name.

        Returns:
            The norm of the client's change, and its clipping factor in (0, 1].
        """
        # Equal infinities, of a mask among the buffers, differ by nothing.
        change = torch.cat(
            [
                torch.where(message[name] == before, 0.0, message[name].double() - before.double())
                for name, before in self._start.items()
            ]
        )
        norm = float(torch.linalg.vector_norm(change))
        factor = self._level.factor(norm)
        self._within += factor == 1
        self._sum.add(change.mul_(factor))
        return norm, factor

    def release(self, clients: int, key: NoiseKey) -> Message:
        """Return the start plus the noised sum over ``clients``, as vectors fp32 ``[P_i]`` by name."""
        total = self._sum.mean().mul_(self._sum.count) if self._sum.count else torch.zeros(self._sum.size).double()
        if deviation := self._level.split_noise(clients)[0] * self._level.clip:
            total += ops.clip_and_noise(torch.zeros(len(total)), 1.0, deviation, key.seed, key.offset)
        parts = total.div_(clients).split([vector.numel() for vector in self._start.values()])
        return {
            name: (before.double() + part).to(before.dtype)
            for (name, before), part in zip(self._start.items(), parts, strict=True)
        }

    def noisy_share(self, clients: int, key: NoiseKey) -> float:
        """Return the noisy share of the updates within the norm, in [0, 1]. A client without one counts as half."""
        deviation = self._level.split_noise(clients)[1]
        noise = float(ops.clip_and_noise(torch.zeros(1), 1.0, deviation, key.seed, key.offset)) if deviation else 0.0
        return min(1.0, max(0.0, 0.5 + (self._within - self._sum.count / 2 + noise) / clients))


@register_filter("private_mean")
class PrivateMean(Filter):
    """Filter that replaces all uploads by their private mean."""

    def __init__(self, privacy: ClientPrivacy, config: RunConfig, method: Method, server: Server) -> None:
        self._privacy, self._config, self._method, self._server = privacy, config, method, server

    @classmethod
    def build(cls, run: RunObjects) -> PrivateMean | None:
        return None if run.private is None else cls(run.private, run.config, run.method, run.server)

    def state(self) -> State:
        level = self._privacy.level
        return {} if level.quantile is None else {"clip": level.clip, "used": self._privacy.used_clip}

    def restore(self, state: State) -> None:
        self._privacy.level = replace(self._privacy.level, clip=state["clip"])
        self._privacy.used_clip = state["used"]

    def combine(
        self, asked: ExchangeRequest, uploads: Iterator[Upload], note: Callable[[ClientId, Mapping[str, float]], None]
    ) -> Iterator[Upload]:
        """Yield one upload, the private mean (see :meth:`Filter.combine`)."""
        return self._mean(asked, uploads, note) if asked.hooks.own else uploads

    def _mean(
        self, asked: ExchangeRequest, uploads: Iterator[Upload], note: Callable[[ClientId, Mapping[str, float]], None]
    ) -> Iterator[Upload]:
        declared, state = asked.declaration_of(asked.participants[0]), self._server.state
        # Changes count from the global network's vectors, or from zero if clients upload changes.
        names = [name for name in self._method.reduce if name in declared]
        start = {name: state[name] if name in VECTORS else torch.zeros(size_of(declared[name])) for name in names}
        level = self._privacy.level
        total = ClippedSum(level, start)
        for upload in uploads:
            norm, factor = total.add(upload.message)
            note(upload.client_id, {"update_norm": norm, **({"clipped": factor} if factor < 1 else {})})
            del upload  # free this upload before the next one arrives
        message = total.release(asked.clients, self._key(CHANNEL, asked))
        self._privacy.used_clip = level.clip
        if level.quantile is not None:
            self._privacy.level = level.adapt(total.noisy_share(asked.clients, self._key("dp_clip", asked)))
        if "buffers" in message and level.noise:
            values = message["buffers"][self._variances]
            keep_variances(values, start["buffers"][self._variances])
            message["buffers"][self._variances] = values
        if "integers" in declared:  # numbers of batches, which no noise covers, stay as they are
            message["integers"] = state["integers"]
        yield Upload(RELEASED, 1, message, share=asked.clients / self._server.federation.clients)

    def _key(self, channel: str, asked: ExchangeRequest) -> NoiseKey:
        secret = self._privacy.secret
        material = bytes.fromhex(secret) if secret else stream(self._config.seed, "privacy").bytes(SECRET_BYTES)
        return noise_key(material, RELEASED, f"{channel}/{asked.phase.exchange}", asked.plan)

    @cached_property
    def _variances(self) -> Tensor:
        return variances(self._server.build())


def variances(network: nn.Module) -> Tensor:
    """Return where running variances are among a network's floating buffers, bool ``[Q]``."""
    flat = freezing.flatten(network)
    mask = torch.zeros(len(flat.buffers), dtype=torch.bool)
    for name, place in flat.places()["buffers"].items():
        mask[place] = name.endswith("running_var")
    return mask
