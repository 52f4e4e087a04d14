"""Flower's robust strategies and the geometric median: rules that compare all replies of a round."""

import torch
from torch import Tensor

from fedkern import ops
from fedkern.flower.adapter import flower
from fedkern.flower.array_bytes import Misfit
from fedkern.flower.model_layout import Layout, Model
from fedkern.flower.model_sums import AllModels
from fedkern.flower.strategies.averaging import Combined, FedAvg, Gathered, constructed_like


class _Robust(FedAvg):
    """A rule over all models of a round, in replies × model of memory for any ``low_memory``.

    A client's reported weight only counts in Multi-Krum's mean of the chosen models. A reply of weight 0 is left out.
    """

    _averages = False

    def _describe_rule(self) -> str:
        return "a rule over all replies of a round (memory: replies × model)"

    def _gather(self, layout: Layout) -> AllModels:
        return AllModels(layout, self._start)

    def _add(self, gathered: Gathered, model: Model, weight: float, node: int) -> None:
        if not weight:
            raise Misfit("empty", f"has 0 as {self.weighted_by_key!r}, its weight, and is no part of the choice")
        super()._add(gathered, model, weight, node)

    def _combine(self, gathered: Gathered, server_round: int) -> Combined | None:
        assert isinstance(gathered, AllModels)  # _gather
        gathered.sort()
        return self._apply_rule(gathered)

    def _apply_rule(self, models: AllModels) -> Combined | None:
        return Combined(models.by_coordinate(self._rule), models.integers(rank=self._rank(len(models.nodes))))

    def _rank(self, count: int) -> int:
        """Return the rank among ``count`` values that an integer entry takes."""
        return (count - 1) // 2

    def _rule(self, vectors: list[Tensor]) -> Tensor:
        """Combine at least one vector ``[n]`` coordinate by coordinate."""
        raise NotImplementedError


@constructed_like(flower.FedMedian)
class FedMedian(_Robust, flower.FedMedian):
    """Flower's ``FedMedian``: the median of every coordinate (arXiv 1803.01498)."""

    def _rule(self, vectors: list[Tensor]) -> Tensor:
        return ops.median(vectors)


@constructed_like(flower.FedTrimmedAvg)
class FedTrimmedAvg(_Robust, flower.FedTrimmedAvg):
    """Flower's ``FedTrimmedAvg``: the mean without the ``beta`` largest and smallest share (arXiv 1803.01498)."""

    def _rule(self, vectors: list[Tensor]) -> Tensor:
        return ops.trimmed_mean(vectors, int(self.beta * len(vectors)))

    def _rank(self, count: int) -> int:
        return count - 1 - int(self.beta * count)


@constructed_like(flower.FedAvg)
class GeometricMedian(_Robust):
    """The point with the least sum of distances to the replies' models (RFA, arXiv 1912.13445)."""

    def _apply_rule(self, models: AllModels) -> Combined | None:
        return Combined(ops.geometric_median(models.vectors), models.integers(rank=self._rank(len(models.nodes))))


@constructed_like(flower.MultiKrum)
class MultiKrum(_Robust, flower.MultiKrum):
    """Flower's ``MultiKrum``: the weighted mean of the models closest to others (arXiv 1703.02757).

    Distances are between the models' floating entries themselves, in fp64, so that updates much smaller than the
    weights are ranked correctly.
    """

    def _apply_rule(self, models: AllModels) -> Combined | None:
        # The models of the smallest scores, the first of equal ones.
        count = len(models.nodes)
        squares = torch.zeros(count, count, dtype=torch.float64)
        for run in models.layout.segments:
            squares += ops.pairwise_distances(models.rows(run)).square_()
        other_squares = squares[~torch.eye(count, dtype=torch.bool)].view(count, max(count - 1, 0))
        near = max(1, count - self.num_malicious_nodes - 2)
        scores = other_squares.sort(dim=1).values[:, :near].sum(1).tolist()
        chosen = sorted(sorted(range(count), key=scores.__getitem__)[: self.num_nodes_to_select])
        weights = [models.weights[i] for i in chosen]
        vector = models.by_coordinate(lambda rows: ops.weighted_mean(rows, weights), chosen)
        return Combined(vector, models.integers(chosen), frozenset(models.nodes[i] for i in chosen))


@constructed_like(flower.Krum)
class Krum(MultiKrum, flower.Krum):
    """Flower's ``Krum``: the model that is closest to others (see :class:`MultiKrum`)."""
