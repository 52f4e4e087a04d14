"""Flower's FedAvg and FedProx with fedkern's mean, which leaves bad replies out: the base of the other strategies.

Between clients and servers that both use fedkern, a model can travel as one flat vector.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fedkern.errors import RunFailed, UserError, make_printable, printable_name
from fedkern.flower import adapter
from fedkern.flower.adapter import ArrayRecord, ConfigRecord, Grid, Message, MetricRecord, RecordDict, Result, flower
from fedkern.flower.array_bytes import DTYPE_NAMES, FLOATS, Misfit
from fedkern.flower.model_layout import Layout, Model
from fedkern.flower.model_sums import AllModels, Integers, NewModel, RunningMean
from fedkern.ops._core.checks import check_count, check_flag, check_number
from fedkern.streams import stream

__all__ = ["pack", "unpack"]


def pack(state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> adapter.ArrayRecord:
    """Write a state dict as one vector of all floating entries, and an array for every other entry.

    Args:
        state: tensors by name, on any device, as ``module.state_dict()`` returns them.
        dtype: float32, float64, float16 or bfloat16, to which the vector is rounded. None: the widest dtype of the
            floating entries.

    Returns:
        A record that `fedkern.flower.strategies` and :func:`unpack` read.

    Raises:
        UserError: an entry is not a tensor of real numbers, or ``dtype`` is another one.
    """
    dtypes = tuple(FLOATS.values())
    if dtype is not None and dtype not in dtypes:
        raise UserError(f"pack: dtype must be float32, float64, bfloat16 or float16, not {dtype}.")
    forms = []
    for key, value in state.items():
        is_tensor = isinstance(value, Tensor)
        if not is_tensor or value.is_complex() or (value.is_floating_point() and value.dtype not in dtypes):
            kind = value.dtype if is_tensor else type(value).__name__
            raise UserError(f"pack: {key!r} must be a tensor of real numbers, not {kind}.")
        forms.append((key, tuple(value.shape), str(value.dtype).removeprefix("torch.")))
    layout = Layout(forms)
    layout.flat = DTYPE_NAMES[dtype or layout.dtype]
    parts = [state[entry.key].detach().cpu().reshape(-1).to(FLOATS[layout.flat]) for entry in layout.floating]
    vector = torch.cat(parts) if parts else torch.empty(0, dtype=FLOATS[layout.flat])
    integer_arrays = {entry.key: state[entry.key].detach().cpu().numpy() for entry in layout.integers}
    return adapter.make_record(layout, vector, integer_arrays)


def unpack(record: adapter.ArrayRecord) -> OrderedDict[str, Tensor]:
    """Read a record as a state dict, flat or plain, with every entry in its own dtype.

    Args:
        record: what :func:`pack` returned, or any ``ArrayRecord``.

    Returns:
        Tensors by name, on the CPU, which share no memory with the record.

    Raises:
        UserError: the record's arrays cannot be read.
    """
    try:
        layout = Layout.of(record)
        model = Model(record, layout)
    except Misfit as misfit:
        raise UserError(f"unpack: the record {misfit}.") from None
    state: OrderedDict[str, Tensor] = OrderedDict()
    for entry in layout.entries:
        if entry.floating:
            state[entry.key] = model.entry(entry).to(FLOATS[entry.dtype], copy=True).reshape(entry.shape)
        else:
            state[entry.key] = torch.from_numpy(model.integers[entry.key].copy())
    return state


C = TypeVar("C", bound=type)
R = TypeVar("R")
Gathered = RunningMean | AllModels

LEFT_OUT = "left-out/"
"""Prefix of the metrics that list, by reason, nodes whose replies did not count."""

_HEAVIEST = 2**53
# An update of so many times the median norm is worth a warning.
_FAR = 1000
# Rounds without a reply that counts, at the end of a run, after which the run has failed.
_LAST_ROUNDS = 2

# Reasons that speak of the app rather than of a client: where no reply ever fits, the app must be changed.
_OF_THE_APP = frozenset(["keys", "shapes", "dtypes", "size", "records", "weight"])
# Reasons that say nothing of a reply's form.
_OF_NOBODY = frozenset(["absent", "error", "empty"])


class LeftOut(NamedTuple):
    """A reply that did not count.

    Attributes:
        round: the round, from 1.
        node: the node's id.
        reason: one word: "absent" (no reply before the deadline), "error" (of the client or the SuperLink), "records",
            "weight", "empty" (a weight of 0, where a rule compares replies), "metrics", "keys", "shapes", "dtypes",
            "size", "finite", "variance", "norm", "twice" or "unreadable" (reading the reply raised another exception).
        text: the reason, as the end of a sentence that begins with the reply.
    """

    round: int
    node: int
    reason: str
    text: str


class Combined(NamedTuple):
    """The models of a round, combined.

    Attributes:
        vector: the floating entries, ``[P]``, or the bytes of their arrays (see `adapter.make_record`).
        nodes: nodes whose replies were combined, None for all.
    """

    vector: Tensor | Mapping[str, bytes]
    integers: Integers
    nodes: frozenset[int] | None = None


def constructed_like(original: Any, *extra: str) -> Callable[[C], C]:
    """Decorate a strategy to show the arguments of Flower's strategy, ``extra`` ones and fedkern's."""

    def decorate(cls: C) -> C:
        inherited: Any = cls.__init__  # type: ignore[misc]

        @functools.wraps(inherited)
        def construct(self: object, *args: Any, **named: Any) -> None:
            inherited(self, *args, **named)

        parameters = list(inspect.signature(original.__init__).parameters.values())
        keyword = inspect.Parameter.KEYWORD_ONLY
        options = [inspect.Parameter(name, keyword) for name in extra]
        options += [inspect.Parameter(name, keyword, default=value) for name, value in _OWN.items()]
        construct.__signature__ = inspect.Signature(parameters + options)  # type: ignore[attr-defined]
        cls.__init__ = construct  # type: ignore[misc]
        return cls

    return decorate


_OWN = {"seed": 0, "max_update_norm": 0.0, "low_memory": False}


@constructed_like(flower.FedAvg)
class FedAvg(flower.FedAvg):
    """Flower's ``FedAvg``: the same constructor and hooks, another aggregation.

    Bad replies are left out, and named in the log, in :attr:`left_out` and in the round's metrics. Entries of integers
    become the largest value of the replies. The order in which replies arrive changes no bit.

    Args:
        *args, **named: those of Flower's strategy of the same name.
        seed: chooses the nodes of every round, together with the round.
        max_update_norm: largest Euclidean norm of a reply's model minus the model sent, over all floating entries. 0:
            no limit.
        low_memory: whether to add replies to exact sums as they arrive, 25 bytes for every number of the model, instead
            of keeping them until the last one arrives. This is slower. Rules that compare replies always keep them.

    Attributes:
        left_out: the replies of all rounds that did not count, to training and evaluation messages.

    Raises:
        UserError: one of fedkern's own arguments is out of range.
        TypeError: as Flower's strategy.
    """

    def __init__(
        self, *args: Any, seed: int = 0, max_update_norm: float = 0.0, low_memory: bool = False, **named: Any
    ) -> None:
        try:
            self.seed = check_count(seed, "seed", -(1 << 63))
            self.max_update_norm = check_number(max_update_norm, "max_update_norm")
            check_flag(low_memory, "low_memory")
        except (TypeError, ValueError) as error:
            raise UserError(f"{type(self).__name__}: {error}.") from None
        super().__init__(*args, **named)
        self.low_memory = low_memory
        self.left_out: list[LeftOut] = []
        self._sent: ArrayRecord | None = None
        self._start: Model | None = None
        self._layout: Layout | None = None
        self._nodes: list[int] = []
        self._evaluating: list[int] = []
        self._ever_fitted = False
        self._lost: list[LeftOut] = []  # the first fault of each of the last rounds, in which no reply has counted
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
        **named: Any,
    ) -> Result:
        """Run the rounds as Flower's ``Strategy.start``, which passes on arguments of other names too.

        Raises:
            UserError: the arrays do not hold real numbers, or no reply of the first round has their form.
            RunFailed: no reply of any round has counted, or none of the last two rounds.
        """
        self._lost = []
        result: Result = super().start(
            adapter.StreamedGrid(grid, self), initial_arrays, num_rounds, timeout, train_config, evaluate_config,
            evaluate_fn, **named,
        )  # fmt: skip
        if self._lost and (len(self._lost) >= _LAST_ROUNDS or not self._ever_fitted):
            fault, name = self._lost[0], type(self).__name__
            rounds = f"of the last {len(self._lost)} rounds" if self._ever_fitted else "of this run"
            raise RunFailed(
                f"{name}: no reply {rounds} has counted, so that the model is as it was before round {fault.round}; in "
                f"round {fault.round} the reply of node {fault.node} {fault.text}"
            )
        return result

    def summary(self) -> None:
        """Log the settings."""
        bound = f"{self.max_update_norm:g}" if self.max_update_norm else "none"
        adapter.log(adapter.INFO, "\t├──> fedkern:")
        adapter.log(adapter.INFO, "\t│\t├── Seed of the choice of nodes: %s", self.seed)
        adapter.log(adapter.INFO, "\t│\t├── Largest norm of an update: %s", bound)
        adapter.log(adapter.INFO, "\t│\t└── Aggregation: %s", self._describe_rule())
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the nodes of a round and build their messages, as Flower's ``FedAvg.configure_train``."""
        if self.fraction_train == 0.0:
            return []
        chosen = self._choose_nodes(grid, self.fraction_train, self.min_train_nodes, server_round, "training")
        self.begin(arrays, chosen)
        return self._messages(server_round, arrays, config, chosen, adapter.MessageType.TRAIN)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the nodes of an evaluation and build their messages, as Flower's ``FedAvg.configure_evaluate``."""
        if self.fraction_evaluate == 0.0:
            return []
        chosen = self._choose_nodes(grid, self.fraction_evaluate, self.min_evaluate_nodes, server_round, "evaluation")
        return self._messages(server_round, arrays, config, chosen, adapter.MessageType.EVALUATE)

    @adapter.streaming
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine the replies of a round.

        Args:
            server_round: the round, from 1.
            replies: the replies, read once. From :meth:`start` they come as they arrive.

        Returns:
            The new arrays in the layout of those sent, and the metrics. None where no reply counts.

        Raises:
            UserError: no reply so far has had the form of the arrays sent.
        """
        if self._sent is None:
            replies = sorted(replies, key=_node)
            self._layout = _layout_of_first(replies)
        if self._layout is None:
            return None, None
        gathered = self._gather(self._layout)
        contents: list[_Content] = []
        faults: list[LeftOut] = []
        absent = set(self._nodes) if self._sent is not None else set()
        for reply in replies:
            absent.discard(_node(reply))
            try:
                with _threads():
                    contents.append(self._take(reply, gathered))
            except Exception as error:  # whatever a reply makes of the code that reads it
                faults.append(_left_out(server_round, reply, error))
            del reply  # otherwise it would be held while the next one is fetched
        faults += [LeftOut(server_round, node, "absent", "has not come in time") for node in absent]
        with _threads():
            combined = self._combine(gathered, server_round) if contents else None
            if isinstance(gathered, AllModels):
                for place, misfit in sorted(gathered.refused.items(), reverse=True):
                    node, text = contents.pop(place).node, make_printable(str(misfit))
                    faults.append(LeftOut(server_round, node, misfit.reason, text))
            self._tell(server_round, len(contents), faults)
            self._warn_of_far(server_round, gathered.nodes, gathered.norms())
            del gathered
            arrays = None
            if combined is not None:
                vector = combined.vector
                vector = self._step(vector, server_round) if isinstance(vector, Tensor) else vector
                arrays = adapter.make_record(self._layout, vector, combined.integers)
        contents.sort(key=lambda content: content.node)
        if combined is not None and combined.nodes is not None:
            contents = [content for content in contents if content.node in combined.nodes]
        return arrays, self._metrics(contents, faults)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Combine the metrics of an evaluation.

        Replies that do not count are left out, as in training.

        Args:
            server_round: the round, from 1.
            replies: the replies.

        Returns:
            The metrics. None where no reply counts and none is left out.
        """
        contents: list[_Content] = []
        faults: list[LeftOut] = []
        absent = set(self._evaluating)
        self._evaluating = []
        for reply in sorted(replies, key=_node):
            absent.discard(_node(reply))
            try:
                contents.append(_Content(_node(reply), _content(reply), self._weight(_content(reply))))
            except Exception as error:  # as in aggregate_train
                faults.append(_left_out(server_round, reply, error))
        faults += [LeftOut(server_round, node, "absent", "has not come in time") for node in absent]
        if contents or faults:
            self._log(server_round, len(contents), faults, "replies of the evaluation")
        return self._aggregate_replies(contents, faults, self.evaluate_metrics_aggr_fn)

    # -- the nodes of a round ------------------------------------------------------------------------------------------

    def _choose_nodes(self, grid: Grid, fraction: float, minimum: int, server_round: int, purpose: str) -> list[int]:
        """Wait for enough nodes and return a fraction of them, chosen by seed, purpose and round alone."""
        while True:
            connected = adapter.nodes(grid)
            count = max(int(len(connected) * fraction), minimum)
            needed = max(self.min_available_nodes, count)
            if len(connected) >= needed:
                break
            adapter.log(adapter.INFO, "%s nodes are connected, %s are needed: waiting.", len(connected), needed)
            time.sleep(1)
        draws = [
            float(stream(self.seed, f"flower {purpose} nodes", round=server_round, client=place).random())
            for place in range(len(connected))
        ]
        places = sorted(sorted(range(len(connected)), key=draws.__getitem__)[:count])
        adapter.log(adapter.INFO, "Round %s: %s of %s nodes for %s.", server_round, count, len(connected), purpose)
        return [connected[place] for place in places]

    def _messages(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, chosen: list[int], kind: str
    ) -> Iterable[Message]:
        config["server-round"] = server_round
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        messages: Iterable[Message] = self._construct_messages(content, chosen, kind)
        return messages

    def begin(self, arrays: ArrayRecord | None, nodes: Sequence[int]) -> None:
        """Note the arrays and nodes of a round. Replies must have the form of ``arrays``, or of each other if None.

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
                name = type(self).__name__
                raise UserError(f"{name}: the global model {misfit}; it must hold real numbers.") from None
            self._sent, self._layout = arrays, layout

    def begin_evaluation(self, nodes: Sequence[int]) -> None:
        """Note the nodes of an evaluation."""
        self._evaluating = list(nodes)

    # -- replies -------------------------------------------------------------------------------------------------------

    def _take(self, reply: Message, gathered: Gathered) -> _Content:
        content, node = _content(reply), _node(reply)
        arrays = _only(content, ArrayRecord)
        weight = self._weight(content)
        assert self._layout is not None
        model = Model(arrays, self._layout, self._start)
        is_summed = weight > 0 and isinstance(gathered, AllModels) and self._averages
        model.check_numbers(but_for_sums=is_summed and not self.max_update_norm)
        if self.max_update_norm and self._start is not None:
            norm = model.distance(self._start)
            if not norm <= self.max_update_norm:
                raise Misfit("norm", f"has an update of norm {norm:.6g} where {self.max_update_norm:g} is allowed")
        self._add(gathered, model, weight, node)
        return _Content(node, adapter.without_arrays(content), weight)

    def _weight(self, content: RecordDict) -> float:
        metrics = _only(content, MetricRecord)
        weight = metrics.get(self.weighted_by_key)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise Misfit("weight", f"has no single number as metric {self.weighted_by_key!r}, its weight")
        if not 0 <= weight <= _HEAVIEST:
            shown = "a number of too many digits" if _too_large(weight) else f"{weight!r:.30}"
            raise Misfit("weight", f"has {shown} as {self.weighted_by_key!r}, its weight: it must be from 0 to 2^53")
        for name, value in metrics.items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, bool) or not isinstance(number, (int, float)) or _too_large(number):
                    raise Misfit(
                        "metrics", f"has the metric {printable_name(str(name), 80)!r} that is no number of fp64"
                    )
        return float(weight)

    def _log(self, server_round: int, counted: int, faults: list[LeftOut], to: str) -> None:
        faults.sort()
        self.left_out += faults
        adapter.log(adapter.INFO, "Round %s: %s %s count, %s do not.", server_round, counted, to, len(faults))
        for fault in faults:
            adapter.log(adapter.WARNING, "Round %s: the reply of node %s %s: left out.", *fault[:2], fault.text)

    def _tell(self, server_round: int, counted: int, faults: list[LeftOut]) -> None:
        """Log which replies counted, and fail if the app's replies can never fit."""
        self._log(server_round, counted, faults, "replies")
        self._ever_fitted |= bool(counted)
        if counted:
            self._lost = []
        elif faults:
            self._lost += [fault for fault in faults if fault.reason != "empty"][:1]  # weights of 0 are no fault
            adapter.log(adapter.WARNING, "Round %s: no reply counts, the model stays as it was.", server_round)
        ours = [fault for fault in faults if fault.reason in _OF_THE_APP]
        if ours and not self._ever_fitted and len(ours) == sum(fault.reason not in _OF_NOBODY for fault in faults):
            raise UserError(
                f"{type(self).__name__}: no reply of round {server_round} counts; that of node {ours[0].node} "
                f"{ours[0].text}: let the ClientApp reply with one ArrayRecord like the one sent, and one MetricRecord "
                f"with {self.weighted_by_key!r}."
            )

    def _warn_of_far(self, server_round: int, nodes: list[int], norms: list[float]) -> None:
        if len(norms) < 2 or self._start is None:
            return
        median = sorted(norms)[(len(norms) - 1) // 2] or self._start.norm()
        for node, norm in zip(nodes, norms, strict=True):
            if norm > _FAR * median > 0:
                adapter.log(
                    adapter.WARNING,
                    "Round %s: the update of node %s has a norm of about %.3g, where the median is %.3g: it counts; "
                    "max_update_norm leaves such updates out.", server_round, node, norm, median,
                )  # fmt: skip

    def _metrics(self, contents: list[_Content], faults: list[LeftOut]) -> MetricRecord | None:
        return self._aggregate_replies(contents, faults, self.train_metrics_aggr_fn)

    def _aggregate_replies(
        self, contents: list[_Content], faults: list[LeftOut], rule: Callable[[list[RecordDict], str], MetricRecord]
    ) -> MetricRecord | None:
        contents = _most_common_form(contents)
        metrics: MetricRecord | None = None
        if any(content.weight for content in contents):
            metrics = rule([content.record for content in contents], self.weighted_by_key)
        elif contents:
            adapter.log(adapter.WARNING, "The weights of all replies are 0, so that their metrics have no mean.")
        if not faults:
            return metrics
        metrics = MetricRecord() if metrics is None else metrics
        for reason in sorted({fault.reason for fault in faults}):
            metrics[LEFT_OUT + reason] = [fault.node for fault in faults if fault.reason == reason]
        return metrics

    # -- what other strategies do differently --------------------------------------------------------------------------

    _averages = True
    """Whether the rule is a weighted mean, in which non-finite numbers show."""

    def _describe_rule(self) -> str:
        kind = "exact sums of replies as they arrive" if self.low_memory else "all replies (memory: replies × model)"
        return f"weighted mean, {kind}"

    def _gather(self, layout: Layout) -> Gathered:
        return (RunningMean if self.low_memory else AllModels)(layout, self._start)

    def _add(self, gathered: Gathered, model: Model, weight: float, node: int) -> None:
        gathered.add(model, weight, node)

    def _combine(self, gathered: Gathered, server_round: int) -> Combined | None:
        assert self._layout is not None
        as_arrays = type(self)._step is FedAvg._step
        if isinstance(gathered, RunningMean):
            averaged = gathered.result(NewModel(self._layout, as_arrays))
        else:
            gathered.sort()
            model = gathered.mean(as_arrays)
            counted = [i for i, weight in enumerate(gathered.weights) if weight]
            averaged = None if model is None else (model, gathered.integers(counted))
        if averaged is None:
            return None
        model, integer_arrays = averaged
        return Combined(model.data if model.vector is None else model.vector, integer_arrays)

    def _step(self, vector: Tensor, server_round: int) -> Tensor:
        """Return the new global model ``[P]``, from the combined one."""
        return vector


@constructed_like(flower.FedProx)
class FedProx(FedAvg, flower.FedProx):
    """Flower's ``FedProx``: :class:`FedAvg` that sends ``proximal-mu`` to the clients (arXiv 1812.06127)."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Add ``proximal-mu`` to the messages, as Flower's ``FedProx.configure_train``."""
        config["proximal-mu"] = self.proximal_mu
        return super().configure_train(server_round, arrays, config, grid)


def mean_of_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Average the replies' metrics by weight, as Flower's default, with the same bits for every order of replies.

    Args:
        contents: replies with one MetricRecord each, of the same names.
        weighted_by_key: name of the metric that is the weight, which the result leaves out.

    Returns:
        Floats, and lists of floats. No entries where the weights are all 0.
    """
    records = [_only(content, MetricRecord) for content in contents]
    weights = [float(record[weighted_by_key]) for record in records]
    metrics = MetricRecord()
    for name in records[0] if any(weights) else ():
        if name == weighted_by_key:
            continue
        values = [record[name] for record in records]
        if isinstance(values[0], list):
            metrics[name] = [_mean(column, weights) for column in zip(*values, strict=True)]
        else:
            metrics[name] = _mean(values, weights)
    return metrics


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    pairs = [(weight, value) for weight, value in zip(weights, values, strict=True) if weight]
    total = math.fsum(weights)
    if not all(math.isfinite(value) for _, value in pairs):
        return float(sum(value for _, value in pairs))  # NaN or an infinity, which fsum may refuse
    shares = [weight * value for weight, value in pairs]
    if all(map(math.isfinite, shares)):
        with contextlib.suppress(OverflowError):
            return math.fsum(shares) / total
    return math.fsum(weight / total * math.ldexp(value, -64) for weight, value in pairs) * 2.0**64


class _Content(NamedTuple):
    node: int
    record: RecordDict
    weight: float


def _most_common_form(contents: list[_Content]) -> list[_Content]:
    """Return the replies whose metrics have the most common names and lengths."""

    def form(content: _Content) -> tuple[tuple[str, int], ...]:
        record = _only(content.record, MetricRecord)
        return tuple(sorted((name, len(value) if isinstance(value, list) else -1) for name, value in record.items()))

    counts = Counter(map(form, contents))
    if len(counts) < 2:
        return contents
    best = min(counts, key=lambda kind: (-counts[kind], kind))
    majority = [content for content in contents if form(content) == best]
    minority = [content.node for content in contents if form(content) != best]
    adapter.log(
        adapter.WARNING, "%s replies have metrics of other names than most, those of nodes %s: these are left out of "
        "the metrics.", len(minority), ", ".join(map(str, minority)),
    )  # fmt: skip
    return majority


def _content(reply: Message) -> RecordDict:
    if reply.has_error():
        raise Misfit("error", f"is an error: {reply.error.reason}")
    return reply.content


def _left_out(server_round: int, reply: Message, error: Exception) -> LeftOut:
    if not isinstance(error, Misfit):
        error = Misfit("unreadable", f"cannot be read ({type(error).__name__}: {printable_name(str(error), 200)})")
    return LeftOut(server_round, _node(reply), error.reason, make_printable(str(error)))


def _too_large(number: float) -> bool:
    return isinstance(number, int) and abs(number) > sys.float_info.max


def _only(content: RecordDict, kind: type[R]) -> R:
    records = adapter.find_records(content, kind)
    if len(records) != 1:
        raise Misfit("records", f"has {len(records)} {kind.__name__}s where one is expected")
    return records[0]


def _layout_of_first(replies: Iterable[Message]) -> Layout | None:
    """Return the form of the first readable reply, if the arrays sent are unknown."""
    for reply in replies:
        for arrays in () if reply.has_error() else adapter.find_records(reply.content, ArrayRecord):
            with contextlib.suppress(Misfit):
                return Layout.of(arrays)
    return None


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    """Use one thread, unless the environment sets how OpenMP's threads wait.

    Client processes may keep all cores busy, and threads that spin between the parts of a sum then cost more than they
    bring.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(before if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _node(reply: Message) -> int:
    return int(reply.metadata.src_node_id)


def zero_moments(layout: Layout) -> Tensor:
    """Return zeros ``[P]`` for an optimiser's moment: fp64 for fp64 models, else fp32."""
    return torch.zeros(layout.size, dtype=torch.float64 if layout.dtype == torch.float64 else torch.float32)
