"""Baselines of the student on a test set: teachers and their ensembles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fedkern.methods.common.oneshot_members import OwnNetworks
from fedkern.methods.fediod.discriminators import Discriminators
from fedkern.methods.fediod.losses import importance, mixture, teacher_log_probs
from fedkern.methods.fediod.server import stack_class_counts
from fedkern.methods.protocol import Batch, ClientId
from fedkern.methods.roles import Client, Server, TestSet
from fedkern.models.teachers.teacher_stack import TeacherStack

KEEP_BYTES = 1 << 30
"""Logits of a whole test set are kept up to this size; for a larger set the teachers run again for every figure."""


class Panel(nn.Module):
    """Teachers' logits on a test set, as both model and data of ``Method.evaluate``.

    A call returns ``answer`` of the current batch of :meth:`batches` and its teachers' logits.
    """

    def __init__(self, ask: Callable[[Tensor], Tensor], data: TestSet) -> None:
        super().__init__()
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
        """Yield the test set's batches, and keep the teachers' logits for the next pass."""
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

    def forward(self, images: Tensor) -> Tensor:
        assert self._now is not None
        return self.answer(images, self._now)


@torch.no_grad()
def compare_teachers(
    method: OwnNetworks, bank: TeacherStack, server: Server, members: Mapping[ClientId, Client], data: TestSet
) -> dict[str, float]:
    """Return ``best_teacher``, ``mean_teacher``, ``ensemble_uniform`` and ``ensemble_weighted`` on a test set.

    Nobody in the federation could choose ``best_teacher``. ``ensemble_weighted`` has the student's weights, without
    confidences if :meth:`Discriminators.judge` has none.
    """
    o, device, ids = method.options, server.device, list(members)
    panel = Panel(lambda images: teacher_log_probs(bank.logits(images)), data)

    def figure(answer: Callable[[Tensor, Tensor], Tensor]) -> float:
        panel.answer = answer
        return float(panel.task.score(method.evaluate(panel, panel)))

    figures = [figure(lambda images, logits, i=i: logits[i]) for i in range(len(ids))]  # type: ignore[misc]
    disclosed = stack_class_counts(server, ids).to(device)
    mask = None if o.class_weights == "uniform" else disclosed > 0
    uniform = torch.ones(len(ids), 1, 1, device=device)
    discriminators = Discriminators(list(members.values()), o) if o.tells_scores else None

    def mix_weighted(images: Tensor, logits: Tensor) -> Tensor:
        scores = None if discriminators is None else discriminators.judge(images)
        return mixture(logits, importance(disclosed, scores), mask)

    return {
        "best_teacher": max(figures),
        "mean_teacher": sum(figures) / len(figures),
        "ensemble_uniform": figure(lambda images, logits: mixture(logits, uniform, None)),
        "ensemble_weighted": figure(mix_weighted),
    }
