"""Common base of the engine's client and server (protocol: :class:`fedkern.methods.roles.Node`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from fedkern.data.forms import ImageForm
from fedkern.engine.context import RunContext
from fedkern.errors import UserError
from fedkern.messages.leaves import move_to_device
from fedkern.ops._core.checks import to_float
from fedkern.tasks import Task

# The engine's own figures of a client.
TAKEN = ("clipped", "name", "samples", "seconds", "staleness", "update_norm")


class Node:
    """Base of :class:`~fedkern.engine.client.Client` and :class:`~fedkern.engine.server.Server`.

    A method that goes to worker processes may have kept a node or its function (``server.notice``). Only a node's
    context is pickled, so that in a worker a kept node shares the context of the worker's clients: it warns, gives
    notice and builds networks as they do.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self.device = context.device
        self.task: Task = context.data.task
        self.classes: tuple[str, ...] = context.data.classes
        self.report: dict[str, float] = {}
        self.round_cache: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, RunContext]:
        # State, report and caches stay behind: a worker's changes to copies of them would be lost without a word.
        # In a worker they are an AttributeError.
        return {"_context": self._context}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self._images().shape

    @property
    def image_dtype(self) -> torch.dtype:
        return torch.uint8 if self._images().dtype == "uint8" else torch.float32

    @property
    def mean(self) -> tuple[float, ...]:
        return self._images().scale(self._context.config.method)[0]

    @property
    def std(self) -> tuple[float, ...]:
        return self._images().scale(self._context.config.method)[1]

    def _images(self) -> ImageForm:
        form, method = self._context.data.form, self._context.config.method
        if "images" not in form.offers:
            raise UserError(f"{method} with these options needs images [C, H, W]; samples have {form.input_words()}.")
        images: ImageForm = form
        return images

    def noise(self, samples: int, rng: np.random.Generator) -> Any:
        return move_to_device(self._context.data.form.noise(samples, rng), self.device)

    @property
    def public(self) -> Any:
        return self._context.samples.public

    def notice(self, text: str) -> None:
        self._context.notices.notice(text)


def convert_figures(report: Mapping[str, object], owner: str, taken: Collection[str] = ()) -> dict[str, float]:
    """Return a report's figures as Python numbers."""
    numbers = {}
    for name, value in report.items():
        where = f'{owner}["{name}"]'
        if name in taken:
            raise UserError(f"{where} has a name of the engine's: choose one besides {', '.join(sorted(taken))}.")
        try:
            numbers[name] = value if isinstance(value, int) else to_float(value, where)
        except (TypeError, ValueError) as error:
            raise UserError(f"{error}: report a number, or leave it out.") from None
    return numbers
