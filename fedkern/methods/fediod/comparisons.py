"""Baselines of the student on a test set: every teacher alone, and the teachers' ensembles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedkern.methods.fediod.discriminators import Discriminators
from fedkern.methods.fediod.losses import importance, mixture, teacher_log_probs
from fedkern.methods.fediod.privacy_options import tells_scores
from fedkern.methods.protocol import Batch, ClientId
from fedkern.methods.roles import Client, Server

KEEP_BYTES = 1 << 30
"""Logits of a whole test set are kept up to this size; for a larger set the teachers run again for every figure."""


class Panel:
    """The teachers' logits on a test set, in the place of both model and data of ``Method.evaluate``.

    :meth:`batches` runs the teachers, and a call returns ``answer`` of the current batch and its teachers' logits.
    """

    def __init__(self, ask: Callable[[Tensor], Tensor], data: Any) -> None:
        self._ask, self._data = ask, data
        self.task = data.task
        self.cases = getattr(data, "cases", None)
        self._cache: list[Tensor] = []
        self._full = False
        self._now: Tensor | None = None
        self.answer: Callable[[Tensor, Tensor], Tensor] = lambda images, logits: logits[0]

    def __len__(self) -> int:
        return len(self._data)

    def batches(self) -> Iterator[Batch]:
        """The test set's batches.

        Keeps the teachers' logits for the next pass.
        """
        cache, size = self._cache if self._full else None, 0
        fresh: list[Tensor] = []
        for i, batch in enumerate(self._data.batches()):
            self._now = self._ask(batch.inputs) if cache is None else cache[i]
            size += self._now.numel() * self._now.element_size()
            if cache is None and size <= KEEP_BYTES:
                fresh.append(self._now)
            yield batch
        if cache is None and size <= KEEP_BYTES:
            self._cache, self._full = fresh, True
        self._now = None

    def __call__(self, images: Tensor) -> Tensor:
        assert self._now is not None
        return self.answer(images, self._now)

    def eval(self) -> Panel:
        """Returns the panel itself, as ``eval`` of a module does."""
        return self


@torch.no_grad()
def oracle_metrics(
    method: Any, server: Server, clients: Mapping[ClientId, Client], sets: Mapping[str, Any]
) -> dict[str, float]:
    """``best_teacher``, ``mean_teacher``, ``ensemble_uniform`` and ``ensemble_weighted`` on every test set.

    Each figure is the accuracy, or the Dice for segmentation.

    * ``best_teacher`` is chosen by this very figure, which nobody in the federation could do.
    * ``ensemble_uniform`` is the plain mean of all teachers' log-probabilities.
    * ``ensemble_weighted`` has the weights that the student learnt with. A test set of a single image, of which the
      discriminators' last map has one position, has no confidences: the class weights alone count there.
    * ``holdout`` is the teachers' mean figure on their clients' own hold-outs, where there are any.
    """
    ids = [k for k in sorted(server.state["classes"]) if "teacher" in clients[k].state]
    members = {k: clients[k] for k in ids}
    if not ids:
        return {}
    figures: dict[str, float] = {}
    for prefix, data in sets.items():
        figures.update({prefix + name: value for name, value in _compared(method, server, members, data).items()})
    holdouts = [
        client.state["teacher"]["holdout"] for client in members.values() if "holdout" in client.state["teacher"]
    ]
    if holdouts:
        figures["holdout"] = sum(holdouts) / len(holdouts)
    return figures


def _compared(method: Any, server: Server, members: Mapping[ClientId, Client], data: Any) -> dict[str, float]:
    o, device, ids = method.options, server.device, list(members)
    bank = method.bank(members)
    panel = Panel(lambda images: teacher_log_probs(bank.logits(images)), data)

    def figure(answer: Callable[[Tensor, Tensor], Tensor]) -> float:
        panel.answer = answer
        return float(panel.task.score(method.evaluate(panel, panel)))

    each = [figure(lambda images, logits, i=i: logits[i]) for i in range(len(ids))]  # type: ignore[misc]
    disclosed = method.disclosed(server, ids).to(device)
    mask = None if o.class_weights == "uniform" else disclosed > 0
    same = torch.ones(len(ids), 1, 1, device=device)
    discriminators = Discriminators(list(members.values()), o) if tells_scores(o) else None

    def weighted(images: Tensor, logits: Tensor) -> Tensor:
        scores = None if discriminators is None else discriminators.judge(images)
        return mixture(logits, importance(disclosed, scores), mask)

    return {
        "best_teacher": max(each),
        "mean_teacher": sum(each) / len(each),
        "ensemble_uniform": figure(lambda images, logits: mixture(logits, same, None)),
        "ensemble_weighted": figure(weighted),
    }
