"""A user's own task: a loss, figures of all outputs and targets, and which of them is the main one."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedkern.errors import UserError, described, shown
from fedkern.files.filesystem import check_text
from fedkern.messages.leaves import leaves, mapped, together
from fedkern.models.cutting import logits_of
from fedkern.models.precision import autocast_on, full
from fedkern.tasks.base import Task
from fedkern.tasks.cross_entropy import cross_entropy as mean_cross_entropy
from fedkern.tasks.cross_entropy import repeatable
from fedkern.usercode.execution import explained

_GRAPH = threading.Lock()
"""Held while parameters take part in a graph: sets may be evaluated side by side, in threads."""
MOST = 1 << 30
"""Bytes of outputs and targets that are concatenated for metrics at most."""


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """The loss of whole-number targets where nobody gives one."""
    return mean_cross_entropy(logits_of(outputs), targets)


class OwnTask(Task):
    """A task by a loss and figures.

    Args:
        loss_fn: ``loss_fn(outputs, targets)``, a function or a module.  None: the cross-entropy.
        metrics: by name: ``metric(outputs, targets)`` of all samples of a set, on the CPU; or an object with
            ``update(outputs, targets)`` and ``compute()``, as those of torchmetrics.  With ``batch_loss`` they take a
            model and a batch, and a function's values are averaged over batches.
        main: name of the main figure.  Open: the first metric that says ``higher_is_better``, else ``"loss"``.
        better: whether larger (``"max"``) or smaller (``"min"``) values of the main figure are the better ones.  Open:
            as its ``higher_is_better`` says, else ``"min"`` for the loss and ``"max"`` for a metric.
        batch_loss: ``batch_loss(model, batch)`` in place of ``loss_fn``, which calls the network itself.  ``batch`` is
            what ``collate_fn`` returned.

    Attributes:
        loss_name, loss_code: the argument that gives the loss, and the loss.
        takes_batches: whether the loss is a ``batch_loss``.

    Raises:
        UserError: ``main`` is no figure, or something is no function, or a function of other arguments.
    """

    name, target, network, noun = "own", "own", "any", "samples"

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
        self.metrics = dict(metrics or {})
        self._copies: dict[torch.device, nn.Module] = {}
        self._takes_gradients = False  # known after the first batch that is evaluated
        _check_loss(self.loss_name, self.loss_code)
        if "loss" in self.metrics:
            raise UserError("metrics has one called loss, which is the loss itself: give it another name.")
        for each, metric in self.metrics.items():
            if not callable(metric) and not _stateful(metric):
                raise UserError(f"the metric {each} must be a function, or an object with update and compute.")
        self.offers = frozenset({"loss"} if self.takes_batches else {"loss", "criterion"})  # type: ignore[misc]
        higher = {each: getattr(metric, "higher_is_better", None) for each, metric in self.metrics.items()}
        first = next((each for each, up in higher.items() if up is not None), "loss")
        self.main = first if main is None else main  # type: ignore[misc]
        if self.main not in ("loss", *self.metrics):
            raise UserError(f"main must be one of {', '.join(('loss', *self.metrics))}, not {self.main!r}.")
        up = higher.get(self.main, self.main != "loss")
        self.better = better or ("max" if up or up is None else "min")  # type: ignore[misc]
        if self.better not in ("max", "min"):
            raise UserError(f'better must be "max" or "min", not {better!r}.')

    def __reduce__(self) -> Any:
        return type(self), (self.loss_fn, self.metrics, self.main, self.better, self.batch_loss)

    def __deepcopy__(self, memo: Any) -> OwnTask:
        return self

    def code(self) -> dict[str, Any]:
        metrics = {f"metrics.{name}": metric for name, metric in self.metrics.items()}
        return {"main": self.main, "better": self.better, self.loss_name: self.loss_code, **metrics}

    def with_loss_copied(self) -> OwnTask:
        losses = deepcopy(self.loss_fn), deepcopy(self.batch_loss)
        return type(self)(losses[0], self.metrics, self.main, self.better, losses[1])

    def header(self) -> list[str]:
        functions = [name for name, metric in self.metrics.items() if not _stateful(metric)]
        if not self.takes_batches or not functions:
            return []
        return [f"{', '.join(functions)}: means over batches, by samples; an object with update and compute sees a set"]

    def known(self, batch: Any) -> int:
        return len(batch.indices)

    def loss(self, model: Any, batch: Any) -> Tensor:
        if self.takes_batches:
            with autocast_on(next(model.parameters()).device):
                return full(self._checked(inner(model), batch.data))
        return self.criterion(model(batch.inputs), batch)

    def criterion(self, outputs: Any, batch: Any) -> Tensor:
        return self._checked(outputs, batch.targets)

    def _checked(self, *arguments: Any) -> Tensor:
        name, function = self.loss_name, self.loss_code
        with explained(name, function):
            value: Any = repeatable(self._placed(function, arguments), arguments[0])(*arguments)
        if not isinstance(value, Tensor) or value.dim():
            what = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{name} must return one number, a tensor of no axes, and returns {what}: take the mean.")
        return value

    def _placed(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """A loss that is a module with tensors (weights of classes) on the device of what it is given."""
        weight = next(iter(function.state_dict().values()), None) if isinstance(function, nn.Module) else None
        device = next((leaf.device for leaf in leaves(arguments) if isinstance(leaf, Tensor)), None)
        if weight is None or device is None or weight.device == device:
            return function
        if device not in self._copies:
            self._copies[device] = deepcopy(function).to(device)
        return self._copies[device]

    def _evaluated(self, model: nn.Module, batch: Any) -> tuple[object, float]:
        """Return the outputs and the loss of a batch; the outputs are None where the loss calls the network."""

        def play() -> tuple[object, float]:
            if self.takes_batches:
                return None, self.loss(model, batch).item()
            outputs = model(batch.inputs)
            return outputs, self.criterion(outputs, batch).item()

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
            frozen = [] if any(each.requires_grad for each in parameters) else parameters
            for each in frozen:
                each.requires_grad_(True)
            try:
                return play()
            finally:
                for each in frozen:
                    each.requires_grad_(False)

    @torch.no_grad()
    def figures(self, model: nn.Module, data: Any) -> dict[str, float]:
        """Returns the metrics' values by name, and ``loss``, the mean over samples."""
        total, count, size = 0.0, 0, 0
        # Copies: sets may be evaluated side by side, in threads.
        objects = {name: deepcopy(metric) for name, metric in self.metrics.items() if _stateful(metric)}
        functions = {name: metric for name, metric in self.metrics.items() if name not in objects}
        pairs: list[tuple[Any, Any]] = []
        sizes: list[int] = []
        sums = dict.fromkeys(functions if self.takes_batches else (), 0.0)
        for metric in objects.values():
            getattr(metric, "reset", lambda: None)()
        for batch in data.batches():
            samples = len(batch.indices)
            count += samples
            pair: tuple[Any, Any]
            outputs, loss = self._evaluated(model, batch)
            total += samples * loss
            if self.takes_batches:
                pair = inner(model), batch.data
            else:
                pair = mapped(_on_cpu, outputs), mapped(_on_cpu, batch.targets)
                if functions:
                    pairs.append(pair)
                    sizes.append(samples)
                    size += sum(leaf.nbytes for leaf in leaves(pair) if isinstance(leaf, Tensor))
                    if size > MOST:
                        raise UserError(
                            f"The outputs and targets for {', '.join(functions)} take more than 1 GB: use an object "
                            "with update and compute, which sees a batch at a time."
                        )
            with autocast_on(next(model.parameters()).device) if self.takes_batches else nullcontext():
                for name, metric in functions.items() if self.takes_batches else ():
                    sums[name] += samples * _number(name, metric, *pair)
                for name, metric in objects.items():
                    with explained(name, metric):
                        metric.update(*pair)
        if not count:
            raise ValueError("data: expected at least one sample, given none")
        values = {name: value / count for name, value in sums.items()}
        if pairs:
            try:
                outputs, targets = (together(list(part), sizes) for part in zip(*pairs, strict=True))
            except RuntimeError as error:
                raise UserError(
                    f"The outputs or targets of batches cannot be concatenated for {', '.join(functions)} "
                    f"({described(error)}): use an object with update and compute, which sees a batch at a time."
                ) from error
            values |= {name: _number(name, metric, outputs, targets) for name, metric in functions.items()}
        values |= {name: _number(name, metric.compute) for name, metric in objects.items()}
        figures = {**{name: values[name] for name in self.metrics}, "loss": total / count}
        return {self.main: figures[self.main], **figures}


def check_object(name: str, value: Any) -> None:
    """Raise UserError for a class where an object of the class is meant."""
    if isinstance(value, type):
        raise UserError(f"{name} is the class {value.__name__}: make an object of it, {value.__name__}().")


def check_metrics(metrics: Any) -> None:
    """Raise UserError for metrics that are no functions or objects by name."""
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) and name.strip() for name in metrics):
        raise UserError(f'metrics must be a dict by name, such as {{"mae": FUNCTION}}, not {shown(metrics)}.')
    for name, metric in metrics.items():
        check_text(name, "the metric", "give it another name")
        check_object(f"the metric {name}", metric)


def inner(model: Any) -> Any:
    """The user's own module."""
    return model.module if getattr(model, "own", False) is True else model


def _on_cpu(leaf: Any) -> Any:
    return leaf.detach().cpu() if isinstance(leaf, Tensor) and (leaf.requires_grad or not leaf.is_cpu) else leaf


def _stateful(metric: Any) -> bool:
    return all(callable(getattr(metric, name, None)) for name in ("update", "compute"))


_FIRST = {
    "loss_fn": ("(outputs, targets)", "model network", "batch_loss"),
    "batch_loss": ("(model, batch)", "outputs output logits input", "loss_fn"),
}
"""What a loss takes, names of a first parameter that belong to the other kind of loss, and the argument for that."""


def _check_loss(name: str, loss: object) -> None:
    """Raise UserError where a loss is no function, or by the name of its first parameter one of other arguments."""
    check_object(name, loss)
    if not callable(loss):
        raise UserError(f"{name} must be a function or a module, not an object of type {type(loss).__name__}.")
    takes, names, other = _FIRST[name]
    try:
        function = loss.forward if isinstance(loss, nn.Module) else loss
        parameter = next(iter(inspect.signature(function).parameters), "")
    except (TypeError, ValueError):
        return
    if parameter and parameter in names.split():
        raise UserError(
            f"{name} takes {takes}, and the first parameter of this one is called {parameter}: give it as {other}=, or "
            "rename the parameter."
        )


def _number(name: str, metric: Callable[..., Any], *arguments: Any) -> float:
    with explained(name, metric):
        return float(metric(*arguments))
