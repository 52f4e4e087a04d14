"""DPFedAvg: replies clipped and noise added on the server, with the epsilon of every round."""

import math
import secrets
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedkern.errors import UserError
from fedkern.flower.adapter import ArrayRecord, MetricRecord, RecordDict, flower
from fedkern.flower.array_bytes import Misfit
from fedkern.flower.model_layout import Layout, Model
from fedkern.flower.model_sums import NewModel, RunningMean
from fedkern.flower.strategies.averaging import Combined, FedAvg, Gathered, LeftOut, constructed_like
from fedkern.privacy.accounting import ClientLevel, keep_variances
from fedkern.streams import stream

EPSILON = "epsilon-of-arrays"
"""Name of the metric with the epsilon of all arrays so far, which does not cover the clients' metrics."""

_PIECE = 1 << 20


@constructed_like(flower.FedAvg, "noise_multiplier", "clipping_norm", "delta", "noise_seed")
class DPFedAvg(FedAvg):
    """Federated averaging with node-level differential privacy on the server (arXiv 1710.06963).

    A reply's update, its model minus the model sent, is scaled down to the norm C = ``clipping_norm``. The new model is
    the old one plus the sum of the updates over n, plus Gaussian noise of deviation ``noise_multiplier * C / n`` on
    every floating entry. n is the number of nodes asked, whoever answers. All nodes weigh the same. Other entries keep
    their values. Batch norm variances fall to no less than a tenth of their old value.

    The guarantee holds for the replacement of one node's whole data set. A round is one release of the Gaussian
    mechanism of sensitivity 2 C / n for every node asked. The choice of nodes is not secret, so there is no
    amplification by sampling. Epsilon is that of the node asked most often. It covers the arrays, not the metrics that
    clients report, and not which replies were left out.

    Args:
        *args, **named: those of :class:`FedAvg`.
        noise_multiplier: deviation of the noise on the sum of the updates over C. 0: no noise and no finite epsilon.
        clipping_norm: C, greater than 0.
        delta: the delta at which epsilon is reported.
        noise_seed: seed of the noise, for tests. None: the operating system's randomness. Whoever knows the seed can
            take the noise away.

    Raises:
        UserError: an argument is out of range, or dp-accounting is not installed.
    """

    def __init__(
        self,
        *args: Any,
        noise_multiplier: float,
        clipping_norm: float,
        delta: float = 1e-5,
        noise_seed: int | None = None,
        **named: Any,
    ) -> None:
        for name, value, good, condition in (
            ("noise_multiplier", noise_multiplier, 0 <= noise_multiplier < math.inf, "finite and at least 0"),
            ("clipping_norm", clipping_norm, 0 < clipping_norm < math.inf, "finite and above 0"),
            ("delta", delta, 0 < delta < 1, "between 0 and 1"),
        ):
            if not good:
                raise UserError(f"DPFedAvg: {name} must be {condition}, not {value}.")
        super().__init__(*args, **named)
        self.noise_multiplier, self.clipping_norm = float(noise_multiplier), float(clipping_norm)
        self.delta, self.noise_seed = float(delta), noise_seed
        self._asked: Counter[int] = Counter()
        self._level = ClientLevel(self.clipping_norm, self.noise_multiplier, self.delta)
        self._level.epsilon(1)  # a missing package shows here, not after the first round

    def epsilon(self) -> float:
        """Return epsilon at ``delta`` of the arrays of all rounds so far, 0 before the first round."""
        return self._level.epsilon(max(self._asked.values(), default=0))

    def _describe_rule(self) -> str:
        return (
            f"sum of updates clipped to norm {self.clipping_norm:g}, noise {self.noise_multiplier:g}, "
            f"epsilon at delta {self.delta:g}"
        )

    def begin(self, arrays: ArrayRecord | None, nodes: Sequence[int]) -> None:
        """Note the arrays and nodes of a round, as :meth:`FedAvg.begin`.

        Raises:
            UserError: the messages have no arrays, or a node is asked twice.
        """
        if arrays is None or len(set(nodes)) != len(nodes):
            raise UserError("DPFedAvg: every node of a round must be sent one message with the global arrays.")
        super().begin(arrays, nodes)

    def _gather(self, layout: Layout) -> RunningMean:
        if self._start is None or not self._nodes:
            raise UserError("DPFedAvg: call configure_train before aggregate_train.")
        self._asked.update(self._nodes)
        return RunningMean(layout)

    def _add(self, gathered: Gathered, model: Model, weight: float, node: int) -> None:
        assert self._start is not None
        assert isinstance(gathered, RunningMean)  # _gather
        if node in gathered.nodes or node not in self._nodes:
            raise Misfit("twice", "is not the one reply to this round's message")
        gathered.nodes.append(node)
        gathered.add_update(model, self._start, self._level.factor(model.distance(self._start)))

    def _combine(self, gathered: Gathered, server_round: int) -> Combined | None:
        assert self._start is not None
        assert self._layout is not None
        assert isinstance(gathered, RunningMean)  # _gather
        model, count = NewModel(self._layout, False, torch.float64), len(self._nodes)
        if gathered.result(model) is None or model.vector is None:
            return None
        old = self._start.vector()
        vector = model.vector.mul_(len(gathered.nodes) / count).add_(old)
        if deviation := self._level.deviation(count):
            rng = self._noise(server_round)
            for part in vector.split(_PIECE):
                part.add_(torch.from_numpy(rng.standard_normal(len(part))), alpha=deviation)
        for entry in self._layout.floating:
            if entry.variance:
                keep_variances(vector[entry.begin : entry.end], old[entry.begin : entry.end])
        return Combined(vector.to(self._layout.dtype), self._start.integers)

    def _noise(self, server_round: int) -> np.random.Generator:
        if self.noise_seed is not None:
            return stream(self.noise_seed, "flower noise", round=server_round)
        return np.random.Generator(np.random.Philox(key=secrets.randbits(128)))

    def _metrics(self, contents: list[RecordDict], faults: list[LeftOut]) -> MetricRecord | None:
        metrics = super()._metrics(contents, faults) or MetricRecord()
        metrics[EPSILON] = self.epsilon()
        return metrics
