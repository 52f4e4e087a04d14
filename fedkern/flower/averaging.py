"""Flower's FedAvg and FedProx with sums that take replies as they arrive; the base of the other strategies."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedkern.errors import RunFailed, UserError, printable
from fedkern.flower import adapter
from fedkern.flower.adapter import ArrayRecord, ConfigRecord, Grid, Message, MetricRecord, RecordDict, Result, flower
from fedkern.flower.array_bytes import Misfit
from fedkern.flower.exact_mean import ExactMean, NewModel
from fedkern.flower.model_layout import Layout, Model
from fedkern.flower.model_sums import RunningMean, Whole
from fedkern.streams import stream

C = TypeVar("C", bound=type)

LEFT_OUT = "left-out/"
"""Beginning of the names of metrics that list nodes whose replies did not count, by reason."""

_HEAVIEST = 2**53
# Replies that are held until they are added together: larger models are added one by one.
_HELD_BYTES = 64 << 20

# Reasons that speak of the app rather than of a client: where no reply ever fits, the app must be changed.
_OF_THE_APP = frozenset(["keys", "shapes", "dtypes", "size", "records", "weight"])
# Reasons that say nothing of a reply's form.
_OF_NOBODY = frozenset(["absent", "error"])


class LeftOut(NamedTuple):
    """A reply that did not count.

    Attributes:
        round: the round, from 1.
        node: the node's id.
        reason: one word: "absent" (no reply before the deadline), "error" (of the client or the SuperLink), "records",
            "weight", "keys", "shapes", "dtypes", "size", "finite", "variance", "norm" or "twice".
        text: the reason, as the end of a sentence that begins with the reply.
    """

    round: int
    node: int
    reason: str
    text: str


class Combined(NamedTuple):
    """The models of a round, combined.

    Attributes:
        vector: ``[P]``, the floating entries; or the bytes of their arrays (see `adapter.record`).
        whole: the other entries.
        nodes: nodes whose replies were combined; None for all.
    """

    vector: Tensor | Mapping[str, bytes]
    whole: Whole
    nodes: frozenset[int] | None = None


def constructed_like(original: Any, *extra: str) -> Callable[[C], C]:
    """Decorates a strategy so that its signature shows the arguments of Flower's and fedkern's own.

    Args:
        original: Flower's strategy.
        extra: further arguments by name, which are given by name.
    """

    def decorate(cls: C) -> C:
        inherited: Any = cls.__init__  # type: ignore[misc]

        @functools.wraps(inherited)
        def construct(self: Any, *args: Any, **named: Any) -> None:
            inherited(self, *args, **named)

        shown = list(inspect.signature(original.__init__).parameters.values())
        keyword = inspect.Parameter.KEYWORD_ONLY
        own = [inspect.Parameter(name, keyword) for name in extra]
        own += [inspect.Parameter(name, keyword, default=value) for name, value in _OWN.items()]
        construct.__signature__ = inspect.Signature(shown + own)  # type: ignore[attr-defined]
        cls.__init__ = construct  # type: ignore[misc]
        return cls

    return decorate


_OWN = {"seed": 0, "max_update_norm": 0.0, "sums": "exact"}
_SUMS = {
    "exact": "running mean, exact sums",
    "fp64": "running mean, one reply at a time, sums in fp64 in the order of arrival",
    "together": "mean of all replies together, exact sums (memory: replies × model)",
}


@constructed_like(flower.FedAvg)
class FedAvg(flower.FedAvg):
    """Flower's ``FedAvg``: the same constructor and hooks, another aggregation.

    Replies are checked and added to a running mean as they arrive.  Bad replies are left out, and named in the log, in
    :attr:`left_out` and in the round's metrics.  Entries of whole numbers become the largest value of the replies.

    Args:
        *args, **named: those of Flower's strategy of the same name.
        seed: chooses the nodes of every round, together with the round.
        max_update_norm: largest Euclidean norm of a reply's model minus the model sent, over all floating entries; 0:
            no limit.
        sums: "exact": replies are added as they arrive, and the new model's bits do not depend on their order.
            "together": all replies are kept, and averaged once the last is there, which is the fastest; the same bits.
            "fp64": as "exact", but with rounded sums; the last bit of some numbers may depend on the order.

    Attributes:
        left_out: the replies that did not count, of all rounds.

    Raises:
        UserError: an argument of fedkern's is out of range.
        TypeError: as Flower's strategy.
    """

    def __init__(
        self, *args: Any, seed: int = 0, max_update_norm: float = 0.0, sums: str = "exact", **named: Any
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise UserError(f"{type(self).__name__}: seed must be a whole number, not {seed!r}.")
        if isinstance(max_update_norm, bool) or not isinstance(max_update_norm, (int, float)):
            raise UserError(f"{type(self).__name__}: max_update_norm must be a number, not {max_update_norm!r}.")
        if not 0 <= max_update_norm < math.inf:
            raise UserError(
                f"{type(self).__name__}: max_update_norm must be finite and at least 0 (no limit), not "
                f"{max_update_norm!r}."
            )
        if sums not in _SUMS:
            raise UserError(f"{type(self).__name__}: sums must be one of {', '.join(_SUMS)}, not {sums!r}.")
        super().__init__(*args, **named)
        self.seed, self.max_update_norm, self.sums = seed, float(max_update_norm), sums
        self.left_out: list[LeftOut] = []
        self._sent: ArrayRecord | None = None
        self._start: Model | None = None
        self._layout: Layout | None = None
        self._nodes: list[int] = []
        self._ever_fitted = False
        self._room: float = _HELD_BYTES
        for name in ("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"):
            if getattr(self, name) is adapter.aggregate_metricrecords:
                setattr(self, name, mean_of_metrics)

    # -- Flower's hooks ------------------------------------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """See Flower's ``Strategy.start``.

        Raises:
            UserError: the arrays do not hold real numbers, or no reply of the first round has their form.
            RunFailed: no reply of any round has counted.
        """
        before = len(self.left_out)
        result: Result = super().start(
            adapter.StreamedGrid(grid, self), initial_arrays, num_rounds, timeout, train_config, evaluate_config,
            evaluate_fn,
        )  # fmt: skip
        if len(self.left_out) > before and not self._ever_fitted:
            fault = self.left_out[before]
            raise RunFailed(
                f"{type(self).__name__}: no reply of this run has counted, so that the model is as it was; in round "
                f"{fault.round} the reply of node {fault.node} {fault.text}"
            )
        return result

    def summary(self) -> None:
        """Logs the settings."""
        bound = f"{self.max_update_norm:g}" if self.max_update_norm else "none"
        adapter.log(adapter.INFO, "\t├──> fedkern:")
        adapter.log(adapter.INFO, "\t│\t├── Seed of the choice of nodes: %s", self.seed)
        adapter.log(adapter.INFO, "\t│\t├── Largest norm of an update: %s", bound)
        adapter.log(adapter.INFO, "\t│\t└── Aggregation: %s", self._described())
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See Flower's ``FedAvg.configure_train``."""
        if self.fraction_train == 0.0:
            return []
        chosen = self._chosen(grid, self.fraction_train, self.min_train_nodes, server_round, "training")
        self.begin(arrays, chosen)
        return self._messages(server_round, arrays, config, chosen, adapter.MessageType.TRAIN)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See Flower's ``FedAvg.configure_evaluate``."""
        if self.fraction_evaluate == 0.0:
            return []
        chosen = self._chosen(grid, self.fraction_evaluate, self.min_evaluate_nodes, server_round, "evaluation")
        return self._messages(server_round, arrays, config, chosen, adapter.MessageType.EVALUATE)

    @adapter.streaming
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combines the replies of a round.

        Args:
            server_round: the round, from 1.
            replies: the replies, which are read once; from :meth:`start` they come as they arrive.

        Returns:
            The new arrays in the layout of those sent, and the metrics; None where no reply counts.

        Raises:
            UserError: no reply so far has had the form of the arrays sent.
        """
        # Replies in a list are in memory, whatever is done here.
        self._room = math.inf if isinstance(replies, (list, tuple)) else _HELD_BYTES
        if self._sent is None:
            replies = sorted(replies, key=_node)
            self._layout = _layout_of_first(replies)
        if self._layout is None:
            return None, None
        gathered = self._gather(self._layout)
        contents: dict[int, list[RecordDict]] = {}
        left: list[LeftOut] = []
        absent = set(self._nodes) if self._sent is not None else set()
        for reply in replies:
            absent.discard(_node(reply))
            try:
                self._take(reply, gathered, contents)
            except Misfit as misfit:
                left.append(LeftOut(server_round, _node(reply), misfit.reason, printable(str(misfit))))
            del reply  # otherwise it would be held while the next one is fetched
        if isinstance(gathered, ExactMean):
            self._close(gathered, server_round, contents, left)
        left += [LeftOut(server_round, node, "absent", "has not come in time") for node in absent]
        self._tell(server_round, contents, left)
        combined = self._combine(gathered, server_round) if contents else None
        del gathered
        arrays = None
        if combined is not None:
            vector = combined.vector
            if isinstance(vector, Tensor):
                vector = self._step(vector, server_round)
            arrays = adapter.record(self._layout, vector, combined.whole)
        counted = [
            content
            for node, own in sorted(contents.items())
            for content in own
            if combined is None or combined.nodes is None or node in combined.nodes
        ]
        return arrays, self._metrics(counted, left)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """See Flower's ``FedAvg.aggregate_evaluate``; replies are taken in the order of their nodes."""
        found: MetricRecord | None = super().aggregate_evaluate(server_round, sorted(replies, key=_node))
        return found

    # -- the nodes of a round ------------------------------------------------------------------------------------------

    def _chosen(self, grid: Grid, fraction: float, least: int, server_round: int, purpose: str) -> list[int]:
        """Nodes of a round, once enough are connected: a fraction of them, chosen by seed, purpose and round alone."""
        while True:
            there = adapter.nodes(grid)
            count = max(int(len(there) * fraction), least)
            needed = max(self.min_available_nodes, count)
            if len(there) >= needed:
                break
            adapter.log(adapter.INFO, "%s nodes are connected, %s are needed: waiting.", len(there), needed)
            time.sleep(1)
        draws = [
            float(stream(self.seed, f"flower {purpose} nodes", round=server_round, client=place).random())
            for place in range(len(there))
        ]
        places = sorted(sorted(range(len(there)), key=draws.__getitem__)[:count])
        adapter.log(adapter.INFO, "Round %s: %s of %s nodes for %s.", server_round, count, len(there), purpose)
        return [there[place] for place in places]

    def _messages(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, chosen: list[int], kind: str
    ) -> Iterable[Message]:
        config["server-round"] = server_round
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        made: Iterable[Message] = self._construct_messages(content, chosen, kind)
        return made

    def begin(self, arrays: ArrayRecord | None, nodes: Sequence[int]) -> None:
        """Notes what a round sends: replies must have the form of ``arrays``.

        Args:
            arrays: the arrays sent; None where the messages have none, so that the replies' own form counts.
            nodes: the nodes that they are sent to.

        Raises:
            UserError: the arrays do not hold real numbers.
        """
        self._nodes = list(nodes)
        if arrays is None:
            self._sent = self._start = self._layout = None
        elif arrays is not self._sent:
            try:
                layout = Layout.of(arrays)
                self._start = Model(arrays, layout)
            except Misfit as misfit:
                who = type(self).__name__
                raise UserError(f"{who}: the global model {misfit}; it must hold real numbers.") from None
            self._sent, self._layout = arrays, layout

    # -- replies -------------------------------------------------------------------------------------------------------

    def _take(self, reply: Message, gathered: Any, contents: dict[int, list[RecordDict]]) -> None:
        """Checks a reply and adds it to what the round keeps.

        Raises:
            Misfit: the reply does not count.
        """
        if reply.has_error():
            raise Misfit("error", f"is an error: {reply.error.reason}")
        content, node = reply.content, _node(reply)
        arrays, metrics = _only(content, ArrayRecord), _only(content, MetricRecord)
        weight = metrics.get(self.weighted_by_key)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise Misfit("weight", f"has no single number as metric {self.weighted_by_key!r}, its weight")
        if not 0 <= weight <= _HEAVIEST:
            raise Misfit(
                "weight", f"has {weight!r:.30} as {self.weighted_by_key!r}, its weight: it must be from 0 to 2^53"
            )
        assert self._layout is not None
        model = Model(arrays, self._layout)
        if isinstance(gathered, ExactMean) and weight and not self.max_update_norm:
            model.check_finite(but_for_sums=True)
            model.check_variances()
        else:
            model.check_numbers()
        if self.max_update_norm and self._start is not None:
            norm = model.distance(self._start)
            if norm > self.max_update_norm:
                raise Misfit("norm", f"has an update of norm {norm:.6g} where {self.max_update_norm:g} is allowed")
        self._add(gathered, model, float(weight), node)
        contents.setdefault(node, []).append(adapter.without_arrays(content))

    def _tell(self, server_round: int, contents: dict[int, list[RecordDict]], left: list[LeftOut]) -> None:
        """Logs which replies counted.

        Raises:
            UserError: no reply so far has had the form of the arrays sent.
        """
        left.sort()
        self.left_out += left
        counted = sum(map(len, contents.values()))
        adapter.log(adapter.INFO, "Round %s: %s replies count, %s do not.", server_round, counted, len(left))
        for fault in left:
            adapter.log(adapter.WARNING, "Round %s: the reply of node %s %s: left out.", *fault[:2], fault.text)
        self._ever_fitted |= bool(contents)
        ours = [fault for fault in left if fault.reason in _OF_THE_APP]
        if ours and not self._ever_fitted and len(ours) == sum(fault.reason not in _OF_NOBODY for fault in left):
            raise UserError(
                f"{type(self).__name__}: no reply of round {server_round} counts; that of node {ours[0].node} "
                f"{ours[0].text}: let the ClientApp reply with one ArrayRecord like the one sent, and one MetricRecord "
                f"with {self.weighted_by_key!r}."
            )

    def _metrics(self, contents: list[RecordDict], left: list[LeftOut]) -> MetricRecord | None:
        """The round's metrics: the replies' own, and the nodes left out by reason."""
        contents = _alike(contents)
        metrics: MetricRecord | None = None
        if contents:
            metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        if not left:
            return metrics
        metrics = MetricRecord() if metrics is None else metrics
        for reason in sorted({fault.reason for fault in left}):
            metrics[LEFT_OUT + reason] = [fault.node for fault in left if fault.reason == reason]
        return metrics

    # -- what other strategies do differently --------------------------------------------------------------------------

    def _described(self) -> str:
        return _SUMS[self.sums]

    def _gather(self, layout: Layout) -> Any:
        """An empty collection of a round's models."""
        if self.sums == "fp64":
            return RunningMean(layout, exact=False)
        return ExactMean(layout, len(self._nodes), math.inf if self.sums == "together" else self._room)

    def _close(
        self, gathered: ExactMean, server_round: int, contents: dict[int, list[RecordDict]], left: list[LeftOut]
    ) -> None:
        """Averages the models, which may show that replies do not count: moves these from ``contents`` to ``left``."""
        gathered.close(NewModel(gathered.layout, as_arrays=type(self)._step is FedAvg._step))
        for node, nth, misfit in sorted(gathered.refused, key=lambda refused: refused[:2], reverse=True):
            del contents[node][nth]
            if not contents[node]:
                del contents[node]
            left.append(LeftOut(server_round, node, misfit.reason, printable(str(misfit))))

    def _add(self, gathered: Any, model: Model, weight: float, node: int) -> None:
        gathered.add(model, weight, node)

    def _combine(self, gathered: Any, server_round: int) -> Combined | None:
        """The models combined; None where their weights are all 0."""
        if isinstance(gathered, ExactMean):
            averaged = gathered.result()
            if averaged is None:
                return None
            made, whole = averaged
            return Combined(made.data if made.vector is None else made.vector, whole)
        found = gathered.result()
        return None if found is None else Combined(*found)

    def _step(self, vector: Tensor, server_round: int) -> Tensor:
        """The new global model ``[P]``, from the combined one."""
        return vector


@constructed_like(flower.FedProx)
class FedProx(FedAvg, flower.FedProx):
    """Flower's ``FedProx``: :class:`FedAvg` that sends ``proximal-mu`` to the clients (arXiv 1812.06127)."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See Flower's ``FedProx.configure_train``."""
        config["proximal-mu"] = self.proximal_mu
        return super().configure_train(server_round, arrays, config, grid)


def mean_of_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Weighted mean of the replies' metrics, as Flower's default; its bits do not depend on the order of the replies.

    Args:
        contents: replies with one MetricRecord each, of the same names.
        weighted_by_key: name of the metric that is the weight, which the result leaves out.

    Returns:
        Floats, and lists of floats.  No entries where the weights are all 0.
    """
    records = [_only(content, MetricRecord) for content in contents]
    weights = [float(record[weighted_by_key]) for record in records]
    made = MetricRecord()
    for name in records[0] if any(weights) else ():
        if name == weighted_by_key:
            continue
        values = [record[name] for record in records]
        if isinstance(values[0], list):
            made[name] = [_mean(column, weights) for column in zip(*values, strict=True)]
        else:
            made[name] = _mean(values, weights)
    return made


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    shares = [weight * value for weight, value in zip(weights, values, strict=True)]
    if not all(map(math.isfinite, shares)):
        return float(np.sum(shares) / np.sum(weights))  # NaN or an infinity, which fsum may refuse
    return math.fsum(shares) / math.fsum(weights)


def _alike(contents: list[RecordDict]) -> list[RecordDict]:
    """The replies whose metrics have the names and lengths that most have."""

    def form(content: RecordDict) -> tuple[Any, ...]:
        record = _only(content, MetricRecord)
        return tuple(sorted((name, len(value) if isinstance(value, list) else -1) for name, value in record.items()))

    counts = Counter(map(form, contents))
    if len(counts) < 2:
        return contents
    best = min(counts, key=lambda kind: (-counts[kind], kind))
    kept = [content for content in contents if form(content) == best]
    adapter.log(
        adapter.WARNING, "%s replies have metrics of other names than most: these are left out of the metrics.",
        len(contents) - len(kept),
    )  # fmt: skip
    return kept


def _only(content: RecordDict, kind: type[Any]) -> Any:
    found = adapter.records(content, kind)
    if len(found) != 1:
        raise Misfit("records", f"has {len(found)} {kind.__name__}s where one is expected")
    return found[0]


def _layout_of_first(replies: Iterable[Message]) -> Layout | None:
    """The form of the first reply that can be read, where nobody has told what was sent."""
    for reply in replies:
        for arrays in () if reply.has_error() else adapter.records(reply.content, ArrayRecord):
            with contextlib.suppress(Misfit):
                return Layout.of(arrays)
    return None


def _node(reply: Message) -> int:
    return int(reply.metadata.src_node_id)


def like_states(layout: Layout) -> Tensor:
    """Zeros ``[P]`` for an optimiser's moment: fp64 for fp64 models, else fp32."""
    return torch.zeros(layout.size, dtype=torch.float64 if layout.dtype == torch.float64 else torch.float32)
