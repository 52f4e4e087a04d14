"""Features and stages by forward hooks, for networks with submodules that do not run one after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.acceleration.pending import compute_pending
from fedkern.errors import UserError, suggest_name
from fedkern.messages.leaves import map_leaves
from fedkern.models.precision import to_fp32
from fedkern.models.users.cutting import find_head, move_weights
from fedkern.models.users.user_models import ItemNetwork, OwnNetwork

FEATURE, LOGITS = "feature", "logits"


class _Stop(BaseException):
    """Signal that ends a pass at a stage, of a kind that user-defined code does not catch."""


class Hooked(OwnNetwork):
    """User-defined network with stages and features at named submodules.

    A pass from a stage on runs the whole network on zeros, without gradients and in eval mode up to the stage, and
    replaces the stage's result.  It costs the part before the stage once more.  The results of a pass are remembered
    for the next step, so that ``tail(stages(x, s), s)`` and ``head(features(x))`` are one pass.

    Args:
        features: name of the submodule that gives the features; None: they are the input of ``head``.
        blank: zeros in the form of one sample.
        widths: numbers of features and logits.
        changed: stages with results that the network changes in place later (an in-place ReLU): it gets copies.
    """

    def __init__(
        self, module: nn.Module, head: str | None, stages: Sequence[str], features: str | None, blank: object,
        widths: tuple[int, int] = (0, 0), changed: Collection[str] = (),
    ) -> None:  # fmt: skip
        super().__init__(module, head)
        self.stage_names = (*stages, FEATURE)
        self._blank, self._features, self._changed = blank, features, changed
        self.results, self.calls = dict[str, Tensor](), Counter[str]()
        self._rest = None if features is None else Rest(self, *widths)

    def call(
        self, x: Any, *, stop: str = "", put: tuple[str, Tensor, Callable[[], None]] | None = None
    ) -> dict[str, Tensor]:
        """Call the network up to the stage ``stop``, and return the results so far.

        ``put`` is a stage, the replacement of its result, and a function to call there.
        """
        results, calls = dict[str, Tensor](), Counter[str]()

        def keep_result(stage: str, layer: nn.Module, inputs: tuple[Tensor, ...], *output: Tensor) -> Tensor:
            result: Tensor = compute_pending((output or inputs)[0])
            calls[stage] += 1
            if put is not None and put[0] == stage:
                put[2]()
                result = put[1].reshape(-1, *result.shape[1:])
            results[stage] = result
            if stage == stop:
                raise _Stop
            # Replaces a pending result, by a copy if the network changes it in place later.
            return result.clone() if stage in self._changed else result

        keep_result.takes_computed = True  # type: ignore[attr-defined]
        with ExitStack() as hooks:
            for stage, name in zip(self.stage_names, (*self.stage_names[:-1], self._features), strict=True):
                if name is not None:
                    layer = self.module.get_submodule(name)
                    hooks.enter_context(layer.register_forward_hook(partial(keep_result, stage)))
                else:  # the features are the classifier's input
                    hooks.enter_context(super().head.register_forward_pre_hook(partial(keep_result, stage)))
            with suppress(_Stop):
                results[LOGITS] = to_fp32(self._logits(x))
        if FEATURE in results:
            results[FEATURE] = to_fp32(results[FEATURE].flatten(1))
        self.results, self.calls = results, calls
        return results

    def again(self, stage: str, h: Tensor) -> dict[str, Tensor]:
        """Run the network from a stage on, with ``h`` for the stage's result."""
        modes, grad = [(layer, layer.training) for layer in self.module.modules()], torch.is_grad_enabled()

        def resume() -> None:
            torch.set_grad_enabled(grad)
            for layer, training in modes:
                layer.training = training

        for layer, _ in modes:
            layer.training = False
        try:
            with torch.no_grad():
                inputs = map_leaves(lambda leaf: h.new_zeros((len(h), *leaf.shape[1:]), dtype=leaf.dtype), self._blank)
                return self.call(inputs, put=(stage, h, resume))
        finally:
            resume()

    def after(self, stage: str, h: Tensor) -> dict[str, Tensor]:
        """Return the results after a stage: of the last call if ``h`` comes from there, else of a new one."""
        results = self.results
        return results if results.get(stage) is h and LOGITS in results else self.again(stage, h)

    def stages(self, x: object, upto: str) -> Tensor:
        return self.call(x, stop="" if torch.is_grad_enabled() else upto)[upto]

    def tail(self, h: Tensor, after: str) -> Tensor:
        return h if after == FEATURE else self.after(after, h)[FEATURE]

    def features(self, x: object) -> Tensor:
        """Return the named submodule's result, flattened to ``[B, d]``, or the classifier's input."""
        return self.stages(x, FEATURE)

    @property
    def head(self) -> Any:
        """The linear classifier, or everything after the named features."""
        return super().head if self._rest is None else self._rest

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "results": {}}


class HookedItems(Hooked, ItemNetwork):
    """User-defined network for samples of any kind, with features at a named submodule."""


class Rest:
    """The head: everything after the features, callable like a classifier."""

    def __init__(self, network: Hooked, in_features: int, out_features: int) -> None:
        self._network, self.in_features, self.out_features = network, in_features, out_features

    def __call__(self, z: Tensor) -> Tensor:
        return self._network.after(FEATURE, z)[LOGITS]


def find_taps(network: Any, stages: Sequence[str], features: str | None, form: Any, text: str) -> tuple[Any, ...]:
    """Return the class of a ``network`` with these taps and its other arguments, after a trial on two samples."""
    # Arguments that do not fit the network.
    items = isinstance(network, ItemNetwork)
    if not isinstance(network, OwnNetwork) or (items and network.raw):
        raise UserError(
            f"--features and --stages are for a network of your own that gives logits, not {text}: leave them out."
        )
    if items and stages:
        raise UserError("--stages is for images, and the samples of these data are none: leave it out.")
    kind: type[Hooked] = HookedItems if items else Hooked
    samples = form.noise(2, np.random.default_rng(0))
    blank = map_leaves(lambda leaf: torch.zeros_like(leaf[:1]), samples)
    paths = [name for name, _ in network.module.named_modules() if name]
    for flag, name in [("stages", stage) for stage in stages] + [("features", features)] * (features is not None):
        if name not in paths:
            raise UserError(f'--{flag}: the network {text} has no submodule "{name}".{suggest_name(str(name), paths)}')
    head = None if items else find_head(network.module, samples)
    if head is None and features is None:
        raise UserError(f"--stages: {text} ends in no linear layer, whose input are the features: give --features too.")
    # Calls of every tap in both modes on moved weights, which show if a tap is called once, stays unchanged, and
    # determines the logits.
    trial, changed = kind(move_weights(network.module), head, stages, features, blank), set[str]()

    def results_of(stop: str = "") -> dict[str, Tensor]:
        torch.manual_seed(0)  # dropout
        return trial.call(map_leaves(torch.clone, samples), stop=stop)

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for training in (False, True):
            trial.train(training)
            results, calls = results_of(), trial.calls
            for name in trial.stage_names:
                option = f"--stages {name}" if name != FEATURE else f"--features {features}"
                result, times = results.get(name), calls[name]
                if times != 1 or not isinstance(result, Tensor) or len(result) != 2:
                    mode = " in train mode" * training
                    raise UserError(
                        f"{option}: {text} calls it {times} times{mode}, or it gives no tensor of a row a sample."
                    )
                before = results_of(name)[name]  # stopped here, so unchanged by later submodules
                changed |= set() if torch.equal(result, before) else {name}
                if not training and not torch.allclose(
                    trial.again(name, before)[LOGITS], results[LOGITS], rtol=1e-3, atol=1e-4
                ):
                    raise UserError(
                        f"{option}: the logits of {text} depend on more than it gives: name a later submodule."
                    )
    return kind, head, stages, features, blank, (results[FEATURE].shape[1], results[LOGITS].shape[1]), changed
