"""Vectors of an upload that stay on the rank of torchrun where the client worked (see `Method.reduce`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedkern.engine.uploads.declared import examined
from fedkern.engine.uploads.filters import Asked, Encoder, Filter, Keep
from fedkern.methods.base import ClientId, Message
from fedkern.methods.uploads import Kept, like


class Reduction(Filter):
    """Has ranks keep the vectors that the method's server only adds up; they are added up there."""

    def encoders(self, asked: Asked) -> Mapping[ClientId, Encoder]:
        names = asked.hooks.reduced(asked.phase)
        if not names:
            return {}
        return {k: Reducing(names, _without_tensors(asked.declared(k))) for k in asked.sent}


@dataclass(frozen=True)
class Reducing:
    """Checks an upload and keeps vectors of it where its client works.

    Attributes:
        names: names of the vectors that stay.
        declared: declaration of the upload, without tensors (see `fedkern.methods.uploads`).
    """

    names: tuple[str, ...]
    declared: Any

    def encode(
        self, client: ClientId, sent: Message, upload: Any, keep: Keep | None
    ) -> tuple[Any, dict[str, Any] | None]:
        """See :meth:`Encoder.encode`; an upload that does not fit travels whole, and the server says why."""
        found: dict[str, Any] = {}
        if keep is None or examined(sent, upload, self.declared, found) or not upload:
            return upload, None
        stay = {name: upload[name] for name in self.names if name in upload}
        for name, vector in stay.items():
            keep(client, name, vector)
        stand_ins = {name: Kept(client, name, vector.numel(), vector.dtype) for name, vector in stay.items()}
        return {**upload, **stand_ins}, found


def _without_tensors(declared: Any) -> Any:
    """A declaration with the shapes and dtypes of its tensors in their place."""
    if isinstance(declared, Mapping):
        return {name: _without_tensors(value) for name, value in declared.items()}
    return like(declared) if isinstance(declared, Tensor) else declared
