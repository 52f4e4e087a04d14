"""User-defined tasks, and classification with a user-defined loss or additional metrics."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, SupportsFloat, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.errors import UserError, describe_error, format_value
from fedkern.files.filesystem import check_text
from fedkern.messages.leaves import join_batches, leaves, map_leaves, move_to_device
from fedkern.models.precision import autocast_on, to_fp32
from fedkern.models.users.cutting import find_logits
from fedkern.tasks.classification import CLASSIFICATION, Classification
from fedkern.tasks.cross_entropy import cross_entropy as mean_cross_entropy
from fedkern.tasks.cross_entropy import repeatable
from fedkern.tasks.protocols import JudgedSet, TaskBatch
from fedkern.tasks.task import Task, better_values
from fedkern.usercode.named_code import explain_errors

_GRAPH = threading.Lock()
"""Held while parameters take part in a graph, as threads may evaluate sets side by side."""
_LARGE = threading.Lock()
"""Held while a set gathers more than an eighth of `MOST`."""
MOST = 1 << 30
"""Most bytes of a set's outputs and targets that are concatenated, for the loss and for metrics."""
ELEMENTWISE = {"MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"}
"""PyTorch's losses of outputs and targets of one shape."""
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def cross_entropy(outputs: object, targets: Tensor) -> Tensor:
    """Return the default loss of whole-number targets."""
    return mean_cross_entropy(find_logits(outputs), targets.long() if targets.dtype in INTEGERS else targets)


class OwnTask(Task):
    """Task by a user-defined loss and metrics.

    Args:
        loss_fn: ``loss_fn(outputs, targets)``, a function or a module. None: the cross-entropy.
        metrics: by name: ``metric(outputs, targets)`` of all samples of a set, on the CPU; or an object with
            ``update(outputs, targets)`` and ``compute()``, such as torchmetrics'. With ``batch_loss`` they take a model
            and a batch, and a function's values are averaged over batches.
        main: name of the main figure. Default: the first metric that has ``higher_is_better``, else ``"loss"``.
        better: whether larger (``"max"``) or smaller (``"min"``) values of the main figure are better. Default: by
            ``higher_is_better``, and ``"min"`` for the loss; without either a metric needs it.
        batch_loss: ``batch_loss(model, batch)`` instead of ``loss_fn``; it calls the network itself. ``batch`` is what
            ``collate_fn`` returned.

    Attributes:
        loss_name, loss_code: the argument that gives the loss, and the loss.
        takes_batches: whether the loss is a ``batch_loss``.
    """

    name, target, network, noun = "own", "own", "any", "samples"
    built_in: ClassVar[tuple[str, ...]] = ("loss",)
    """Names of the figures that need no metric."""

    def __init__(
        self,
        loss_fn: Callable[..., Tensor] | None = None,
        metrics: Mapping[str, Any] | None = None,
        main: str | None = None,
        better: Literal["max", "min"] | None = None,
        batch_loss: Callable[..., Tensor] | None = None,
    ) -> None:
        check_metrics({} if metrics is None else metrics)
        if loss_fn is not None and batch_loss is not None:
            raise UserError("loss_fn and batch_loss are both given: leave one of the two out.")
        self.loss_fn, self.batch_loss, self.takes_batches = loss_fn, batch_loss, batch_loss is not None
        self.loss_name = "batch_loss" if self.takes_batches else "loss_fn"
        self.loss_code = next(loss for loss in (batch_loss, loss_fn, cross_entropy) if loss is not None)
        functions = cross_entropy, nn.functional.cross_entropy
        self.takes_logits = isinstance(self.loss_code, nn.CrossEntropyLoss) or self.loss_code in functions
        self.plain_loss = self.loss_code in functions or _is_plain(self.loss_code)
        self.metrics = dict(metrics or {})
        self.functions = {name: metric for name, metric in self.metrics.items() if not _stateful(metric)}
        self._copies: dict[torch.device, nn.Module] = {}
        self._takes_gradients = False  # known after the first batch that is evaluated
        _check_loss(self.loss_name, self.loss_code)
        if "loss" in self.metrics:
            raise UserError("metrics has one called loss, which is the loss itself: give it another name.")
        self.labelled = False  # whether targets are whole numbers, one a sample
        for key, metric in self.metrics.items():
            if not callable(metric) and not _stateful(metric):
                raise UserError(f"the metric {key} must be a function, or an object with update and compute.")
        self.offers = frozenset({"loss"} if self.takes_batches else {"loss", "criterion"})  # type: ignore[misc]
        directions = {key: better_values(metric) for key, metric in self.metrics.items()}
        usual = "accuracy" if "accuracy" in self.built_in else next(filter(directions.get, directions), "loss")
        self.main = usual if main is None else main  # type: ignore[misc]
        names = (*self.built_in, *self.metrics)
        if self.main not in names:
            raise UserError(f"main must be one of {', '.join(names)}, not {self.main!r}.")
        self.better = better or directions.get(self.main, "min" if self.main == "loss" else "max")  # type: ignore[misc,assignment]
        if self.better is None:
            raise UserError(f'better= is missing: say whether "min" or "max" is the better {self.main}.')
        if self.better not in ("max", "min"):
            raise UserError(f'better must be "max" or "min", not {better!r}.')

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.loss_fn, self.metrics, self.main, self.better, self.batch_loss)

    def __deepcopy__(self, memo: object) -> OwnTask:
        return self

    def code(self) -> dict[str, object]:
        metrics = {f"metrics.{name}": metric for name, metric in self.metrics.items()}
        return {"main": self.main, "better": self.better, self.loss_name: self.loss_code, **metrics}

    def with_loss_copied(self) -> OwnTask:
        return type(self)(deepcopy(self.loss_fn), self.metrics, self.main, self.better, deepcopy(self.batch_loss))

    def header(self, output_bytes: int, sizes: Mapping[str, int]) -> list[str]:
        large = [name or "test" for name, size in sizes.items() if output_bytes * size > MOST]
        lines = ["loss of a set: of all its samples at once"]
        if large or not output_bytes:
            reason = f" (outputs of {', '.join(large)} take more than 1 GB)" if large else ""
            lines = [f"loss of a set: mean over batches, by their targets{reason}"]
        if self.takes_batches and self.functions:
            lines.append(f"{', '.join(self.functions)}: mean over batches; use update and compute for a whole set")
        if self.labelled:
            way = "a loss_fn of (outputs, targets) with " if self.takes_batches else ""
            lines.append(f"accuracy, AUROC and calibration: give {way}classes=, where outputs are logits of classes")
        return lines

    def output_bytes(
        self, pair: tuple[object, object], play_last: Callable[[], tuple[object, object]], largest: int
    ) -> int:
        shapes = [str(["N", *part.shape[1:]]).replace("'", "") for part in pair if isinstance(part, Tensor)]
        kind = self.loss_code if inspect.isfunction(self.loss_code) else type(self.loss_code)
        if kind.__name__ in ELEMENTWISE and kind.__module__.startswith("torch.") and len({*shapes}) == 2:
            raise UserError(f"The loss needs outputs and targets of the same shape, not {shapes[0]} and {shapes[1]}.")
        forms = {sample_form(pair), sample_form(play_last())}
        # Outputs that are leaves with a gradient: the loss takes that gradient itself.
        if len(forms) > 1 or () in forms or any(leaf.is_leaf and leaf.requires_grad for leaf in tensors(pair)):
            return 0
        size = sum(leaf.nbytes // len(leaf) for leaf in tensors(pair))
        self.check_size(size * largest)
        return size

    def check_size(self, size: int) -> None:
        if size > MOST and self.functions:
            raise UserError(
                f"The outputs and targets for {', '.join(self.functions)} take more than 1 GB: use an object with "
                "update and compute, which sees a batch at a time."
            )

    def count_known(self, batch: TaskBatch) -> int:
        return len(batch.indices)

    def loss(self, model: nn.Module, batch: TaskBatch) -> Tensor:
        if self.takes_batches:
            with autocast_on(next(model.parameters()).device):
                return to_fp32(self._call_loss(user_module(model), batch.data))
        return self.criterion(model(batch.inputs), batch)

    def criterion(self, outputs: object, batch: TaskBatch) -> Tensor:
        return self._call_loss(outputs, batch.targets)

    def _call_loss(self, *arguments: object) -> Tensor:
        name, function = self.loss_name, self.loss_code
        with explain_errors(name, function, arguments):
            value: Any = repeatable(self._place_loss(function, arguments), arguments[0])(*arguments)
        if not isinstance(value, Tensor) or value.dim():
            raise _not_one_number(name, value)
        return value

    def _place_loss(self, function: Callable[..., object], arguments: tuple[object, ...]) -> Callable[..., object]:
        """Return the loss on the arguments' device, if it is a module with tensors."""
        if not isinstance(function, nn.Module):
            return function
        weight = next(iter(function.state_dict().values()), None)
        device = next((leaf.device for leaf in leaves(arguments) if isinstance(leaf, Tensor)), None)
        if weight is None or device is None or weight.device == device:
            return function
        if device not in self._copies:
            self._copies[device] = deepcopy(function).to(device)
        return self._copies[device]

    def evaluate_batch(self, model: nn.Module, batch: TaskBatch, *, lossless: bool = False) -> tuple[object, float]:
        """Return outputs (None with a ``batch_loss``) and loss (0 if ``lossless``) of a batch."""

        def play() -> tuple[object, float]:
            if self.takes_batches:
                return None, self.loss(model, batch).item()
            outputs = model(batch.inputs)
            return outputs, 0.0 if lossless else self.criterion(outputs, batch).item()

        if not self._takes_gradients:
            try:
                return play()
            except (UserError, RuntimeError) as error:
                if "does not require grad" not in str(error):
                    raise
            self._takes_gradients = True  # an evaluation that has drawn by then is repeated from its own seeds
        # The loss or the network takes gradients itself, also of parameters that were frozen for the evaluation.
        with _GRAPH, torch.enable_grad():
            parameters = [*model.parameters()]
            frozen = [] if any(tensor.requires_grad for tensor in parameters) else parameters
            for parameter in frozen:
                parameter.requires_grad_(True)
            try:
                return play()
            finally:
                for parameter in frozen:
                    parameter.requires_grad_(False)

    def set_loss(self, outputs: object, targets: object) -> float | None:
        """Return the loss of a whole set, or None if it takes gradients of the network."""
        for gradients in (False, True):
            try:
                with torch.set_grad_enabled(gradients):
                    return self._call_loss(outputs, targets).item()
            except (UserError, RuntimeError) as error:
                if "does not require grad" not in str(error):
                    raise
        return None

    def share(self, targets: object, content: object, samples: int) -> float:
        """Return a batch's weight in means over batches: its counted targets, by their class weights."""
        if isinstance(targets, Tensor) and targets.dim() and targets.dtype in INTEGERS:
            _, weight, ignored = torch_loss(self.loss_code) or TorchLoss()
            counted = targets[targets != ignored]
            return float(counted.numel() if weight is None else weight.to(counted.device)[counted].sum())
        sizes = [len(leaf) for leaf in tensors([targets, content]) if leaf.dim()]
        return float(sizes[0] if sizes else samples)

    @torch.no_grad()
    def figures(self, model: nn.Module, data: JudgedSet) -> dict[str, float]:
        evaluation = SetEvaluation(self, model, data)
        with evaluation.turn:
            for _ in evaluation.batches():
                pass
            figures = evaluation.figures()
        return {self.main: figures[self.main], **figures}


class SetEvaluation:
    """Pass of a network over a set, for a user-defined loss and metrics.

    The loss is of all samples at once if their outputs (``data.output_bytes``) fit, else a mean over batches. Hold
    ``turn`` during the pass, as threads evaluate sets side by side.
    """

    def __init__(self, task: OwnTask, model: nn.Module, data: JudgedSet) -> None:
        size = getattr(data, "output_bytes", 0)
        self._task, self._model, self._lossless = task, model, 0 < size <= MOST
        self._data = data
        self.turn: AbstractContextManager[object] = _LARGE if MOST >> 3 < size <= MOST else nullcontext()
        self._functions = task.functions
        self._objects = {name: deepcopy(metric) for name, metric in task.metrics.items() if _stateful(metric)}
        self._sums = dict.fromkeys(("loss", *(self._functions if task.takes_batches else ())), 0.0)
        self._pairs: list[tuple[object, object]] = []
        self._sizes: list[int] = []
        self._count, self._bytes, self._shares, self._device = 0, 0, 0.0, torch.device("cpu")
        for metric in self._objects.values():
            getattr(metric, "reset", lambda: None)()

    def batches(self) -> Iterator[tuple[object, object]]:
        takes_batches = self._task.takes_batches
        for batch in self._data.batches():
            outputs, loss = self._task.evaluate_batch(self._model, batch, lossless=self._lossless)
            share = self._task.share(batch.targets, batch.data, len(batch.indices))
            self._shares += share
            self._count += len(batch.indices)
            self._device = next((leaf.device for leaf in tensors(outputs)), self._device)
            pair = user_module(self._model), batch.data
            if not takes_batches:
                pair = map_leaves(_on_cpu, outputs), map_leaves(_on_cpu, batch.targets)
            with autocast_on(next(self._model.parameters()).device) if takes_batches else nullcontext():
                values = {name: _number(name, self._functions[name], *pair) for name in self._sums if name != "loss"}
                for name, metric in self._objects.items():
                    with explain_errors(name, metric, pair):
                        metric.update(*(pair if takes_batches else _copies(pair)))
            for name, value in {"loss": loss, **values}.items() if share else ():  # the mean of no targets is NaN
                self._sums[name] += share * value
            if not takes_batches and (self._functions or self._lossless):
                self._gather(pair, len(batch.indices))
            yield outputs, batch.targets

    def _gather(self, pair: tuple[object, object], samples: int) -> None:
        self._pairs.append(pair)
        self._sizes.append(len(next(tensors(pair))) if sample_form(pair) else samples)
        self._bytes += sum(leaf.nbytes for leaf in tensors(pair))
        self._task.check_size(self._bytes)

    def figures(self) -> dict[str, float]:
        if not self._count:
            raise ValueError("data: expected at least one sample, given none")
        values = {name: value / self._shares if self._shares else math.nan for name, value in self._sums.items()}
        pairs, self._pairs = self._pairs, []
        at_once = self._lossless and self._bytes <= MOST and all(sample_form(pair) for pair in pairs)
        outputs: object = None
        targets: object = None
        if pairs and (at_once or self._functions):
            try:
                outputs, targets = (join_batches(list(part), self._sizes) for part in zip(*pairs, strict=True))
            except (RuntimeError, UserError) as error:
                at_once = False
                if self._functions:
                    raise UserError(
                        f"The outputs or targets of batches cannot be concatenated for {', '.join(self._functions)} "
                        f"({describe_error(error)}): use an object with update and compute, which sees a batch at a "
                        "time."
                    ) from error
        pairs.clear()  # copies of all of them follow
        if self._lossless:
            loss = self._task.set_loss(*move_to_device((outputs, targets), self._device)) if at_once else None
            values["loss"] = self._mean_loss() if loss is None else loss
        functions = {} if self._task.takes_batches else self._functions
        values |= {name: _number(name, metric, *_copies((outputs, targets))) for name, metric in functions.items()}
        values |= {name: _number(name, metric.compute) for name, metric in self._objects.items()}
        return {**{name: values[name] for name in self._task.metrics}, "loss": values["loss"]}

    def _mean_loss(self) -> float:
        """Return the mean of the batches' losses, in another pass over the set."""
        loss = 0.0
        for batch in self._data.batches():
            if share := self._task.share(batch.targets, batch.data, len(batch.indices)):
                loss += share * self._task.evaluate_batch(self._model, batch)[1]
        return loss / self._shares if self._shares else math.nan


class TorchLoss(NamedTuple):
    """Options of torch's cross-entropy, or of NLL, where outputs are ``logarithms`` of probabilities."""

    logarithms: bool = False
    weight: Tensor | None = None
    ignored: int = -100


def torch_loss(loss: object) -> TorchLoss | None:
    """Return the options of torch's cross-entropy or NLL, in any form, or None."""
    function, options = (loss.func, loss.keywords) if isinstance(loss, partial) and not loss.args else (loss, {})
    if type(loss) is nn.NLLLoss or type(loss) is nn.CrossEntropyLoss:
        function = F.nll_loss if type(loss) is nn.NLLLoss else F.cross_entropy
        options = {"weight": loss.weight, "ignore_index": loss.ignore_index}
    if not any(function is known for known in (cross_entropy, F.cross_entropy, F.nll_loss)):
        return None
    return TorchLoss(function is F.nll_loss, options.get("weight"), options.get("ignore_index", -100))


def _is_plain(loss: object) -> bool:
    if type(loss) is not nn.CrossEntropyLoss or loss.weight is not None or loss._forward_hooks:
        return False
    return (loss.ignore_index, loss.reduction, loss.label_smoothing) == (-100, "mean", 0)


def sample_form(values: object) -> tuple[tuple[object, ...], ...]:
    """Return dtype and shape of a sample in batched tensors, empty if sample counts differ."""
    found = [leaf for leaf in leaves(values) if leaf is not None]
    is_per_sample = all(isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == len(found[0]) for leaf in found)
    return tuple((leaf.dtype, *leaf.shape[1:]) for leaf in found) if is_per_sample else ()


def tensors(values: object) -> Iterator[Tensor]:
    return (leaf for leaf in leaves(values) if isinstance(leaf, Tensor))


def check_object(name: str, value: object) -> None:
    if isinstance(value, type):
        raise UserError(f"{name} is the class {value.__name__}: make an object of it, {value.__name__}().")


def check_metrics(metrics: object) -> None:
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) and name.strip() for name in metrics):
        raise UserError(f'metrics must be a dict by name, such as {{"mae": FUNCTION}}, not {format_value(metrics)}.')
    for name, metric in metrics.items():
        check_text(name, "the metric", "give it another name")
        check_object(f"the metric {name}", metric)


def user_module(model: nn.Module) -> nn.Module:
    wrapper: Any = model
    return wrapper.module if getattr(model, "own", False) is True else model


def _on_cpu(leaf: object) -> object:
    return leaf.detach().cpu() if isinstance(leaf, Tensor) and (leaf.requires_grad or not leaf.is_cpu) else leaf


def _copies(pair: tuple[object, object]) -> tuple[object, object]:
    """Return copies of outputs and targets, which a metric may change, if possible."""
    with suppress(UserError):
        pair = map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, pair)
    return pair


def _stateful(metric: object) -> bool:
    return all(callable(getattr(metric, name, None)) for name in ("update", "compute"))


_FIRST = {
    "loss_fn": ("(outputs, targets)", "model network", "batch_loss"),
    "batch_loss": ("(model, batch)", "outputs output logits input", "loss_fn"),
}
"""Arguments of a loss, names of a first parameter that belong to the other kind of loss, and the other argument's
name."""


def _check_loss(name: str, loss: object) -> None:
    """Raise UserError if a loss is not callable, or its first parameter is named like the other kind's."""
    check_object(name, loss)
    if not callable(loss):
        raise UserError(f"{name} must be a function or a module, not an object of type {type(loss).__name__}.")
    takes, names, twin = _FIRST[name]
    try:
        function = loss.forward if isinstance(loss, nn.Module) else loss
        parameter = next(iter(inspect.signature(function).parameters), "")
    except (TypeError, ValueError):
        return
    if parameter and parameter in names.split():
        raise UserError(
            f"{name} takes {takes}, and the first parameter of this one is called {parameter}: give it as {twin}=, or "
            "rename the parameter."
        )


def _number(name: str, metric: Callable[..., SupportsFloat], *arguments: object) -> float:
    with explain_errors(name, metric, arguments):
        value = metric(*arguments)
        if isinstance(value, Tensor) and value.numel() != 1:
            raise _not_one_number(name, value)
        return float(value)


def _not_one_number(name: str, value: object) -> UserError:
    result = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    return UserError(f"{name} must return one number, a tensor of no axes, and returns {result}: take the mean.")


TAKEN = ("accuracy", "loss", "confidence", "balanced_accuracy", "macro_f1", "auroc", "ece")
"""Names of the figures of every classification."""


class OwnClassification(OwnTask, Classification):
    """Classification with a user-defined loss of logits and classes, or with user-defined metrics.

    Args:
        loss_fn, metrics: as in `OwnTask`. Outputs are logits, for NLL logarithms of probabilities.
        main, better: the main figure (None: the accuracy) and its better values.
    """

    name, target, network, noun = "classification", "class", "classes", "samples"
    built_in = TAKEN[:3]
    concurrent = False
    member_figures = Task.member_figures

    def __init__(
        self,
        loss_fn: Callable[..., Tensor] | None = None,
        metrics: Mapping[str, object] | None = None,
        main: str | None = None,
        better: Literal["max", "min"] | None = None,
        batch_loss: None = None,
    ) -> None:
        super().__init__(loss_fn, metrics, main, better)
        if name := next((name for name in self.metrics if name in TAKEN), None):
            raise UserError(f"metrics has one called {name}, which every classification has: give it another name.")
        if main is None and self.better == "min":
            raise UserError('better="min" is of the main figure, the accuracy: name another one with main=.')
        options = torch_loss(self.loss_code) or TorchLoss()
        self.ignored, self._logarithms = options.ignored, options.logarithms  # type: ignore[misc]
        # Logarithms of probabilities are not linear in the features.
        self.offers = CLASSIFICATION.offers - ({"features"} if options.logarithms else set())  # type: ignore[misc]

    @torch.no_grad()
    def figures(self, model: nn.Module, data: JudgedSet) -> dict[str, float]:
        return self.figures_of_client(model, data, None)

    def figures_of_client(self, model: nn.Module, data: JudgedSet, client: int | None) -> dict[str, float]:
        evaluation = SetEvaluation(self, model, data)
        with evaluation.turn:
            pairs = cast("Iterator[tuple[Tensor, Tensor]]", evaluation.batches())
            figures = self.figures_of(pairs, data, client) | evaluation.figures()
        return {self.main: figures[self.main], **figures}

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.exp() if self._logarithms else super().probabilities(logits)
