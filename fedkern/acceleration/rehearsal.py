"""Rehearsal of the first call of each mode, on a copy of the network, which fixes how far its convolutions wait."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedkern.acceleration import calls
from fedkern.acceleration.calls import ACCELERATED, AS_WRITTEN, LAST, LEAST, MODES, Mode, Record
from fedkern.acceleration.comparison import Found, find_far_result
from fedkern.acceleration.layers import HOOKS
from fedkern.acceleration.pending import ABOUT, ADDS, EXTENDING, POOLS, dense_strides, is_half_pooling
from fedkern.errors import describe_error
from fedkern.messages.leaves import leaves
from fedkern.ops._core.private_torch import saved_hooks
from fedkern.streams import seeded_generators

M = TypeVar("M", bound=nn.Module)
_COUNTS = (Tensor.add_, Tensor.__float__)
"""Operations of a batch norm on the number of its batches."""
_MODES = {(True, True): "training", (False, False): "evaluation", (True, False): "training mode without gradients",
          (False, True): "evaluation mode with gradients"}  # fmt: skip


def accelerate(module: M, *, check: bool = True) -> M:
    """Compute a network's convolutions together with the norm, sum, ReLU and max pooling behind them.

    On the CPU in fp32, forward and backward, by :func:`fedkern.ops.conv_norm` and :func:`fedkern.ops.conv_pool` if
    they are faster; all else runs as written. Results differ from torch's by rounding. A call begins and ends with
    ``module(...)``; parts of it that are called alone run as written. So does the whole call under autocast,
    ``torch.compile``, ``torch.export``, ``torch.func``, tracing and with foreign hooks on a submodule.

    The first call in training and the first in evaluation, with gradients and without, are each rehearsed on copies of
    the network and the inputs, with the same seeds: a convolution waits only as far as its result goes there, alone and
    at once, through those steps. All convolutions run in channels-last if operators would else save less than half of
    their products, because maps would be copied. Sizes decide, and the network's results keep their layout.

    Args:
        module: any network; it is changed in place, and keeps its class, state dict and repr. A layer with its
            own forward pass, of its class or set on it, is not changed. Copies compute with their own tensors: deep
            copies and those of a module's dictionary are accelerated too, and a pickle loads without fedkern.
        check: whether to compare the results of a second copy, which runs accelerated. If outputs or buffers are off by
            more than 1e-3 of the largest, or the gradients of weights for random gradients of the outputs by more than
            5 %, the network warns and runs as written in that mode. Without ``check`` only a failing call does that.

    Returns:
        The same module.
    """
    return calls.put_hooks(module, Rehearsal(check))


class Rehearsal(calls.Begin):
    def __init__(self, check: bool) -> None:
        super().__init__({})
        self.check = check

    def rehearse(self, module: nn.Module, args: tuple[object, ...], named: Mapping[str, object]) -> None:
        """Run a copy as written to record the steps behind convolutions, then check an accelerated copy."""
        mode = module.training, torch.is_grad_enabled()
        self.modes[mode] = AS_WRITTEN
        call, recorder = (module, args, dict(named)), Recorder()
        before = [(tensor, tensor.clone()) for tensor in module.buffers()]
        try:
            twin = _copy_call(*call)
        except Exception as error:
            return self._leave(mode, f"the network cannot be copied ({describe_error(error)})")
        try:
            expected = _play_call(*twin, ACCELERATED, recorder)
        except Exception:  # which the call itself raises
            del self.modes[mode]
            return None
        moved = [tensor for tensor, content in before if not torch.allclose(tensor, content, 0, 0, equal_nan=True)]
        own = calls.convolutions(module)
        if moved or any(layer in own for layer, _ in recorder.chains):
            with torch.no_grad():
                for tensor, content in before:
                    tensor.copy_(content)
            return self._leave(mode, "a copy of the network calls layers of the network itself")
        recorder.stop()
        if not recorder.states:  # no convolution was called
            return None
        try:
            results, share = _play_planned(call, ACCELERATED, twin[0])
        except Exception as error:  # a network's code may raise anything about a tensor that it does not know
            return self._leave(mode, describe_error(error))
        self.modes[mode], planned = ACCELERATED if share else AS_WRITTEN, twin[0]
        if share < LEAST and not recorder.keeps_layout:
            with suppress(Exception):  # such as a view that channels-last maps do not have
                recorder, twin = Recorder(), _copy_call(*call)
                _play_call(*twin, LAST, recorder)
                recorder.stop()
                found, share = _play_planned(call, LAST, twin[0])
                if share >= LEAST and not find_far_result(found, expected) and _strides(found) == _strides(expected):
                    results, self.modes[mode], planned = found, LAST, twin[0]
        for part, twin_part in zip(calls.convolutions(module), calls.convolutions(planned), strict=True):
            part.plan = twin_part.plan
        name = find_far_result(results, expected) if self.check else ""
        return self._leave(mode, f"{name} differs when operators compute it") if name else None

    def _leave(self, mode: Mode, reason: str) -> None:
        self.modes[mode] = AS_WRITTEN
        warnings.warn(f"fedkern.accelerate: in {_MODES[mode]} the network runs as written: {reason}.", stacklevel=7)


_Call = tuple[nn.Module, tuple[object, ...], dict[str, object]]


def _copy_call(module: nn.Module, args: tuple[object, ...], named: dict[str, object]) -> _Call:
    """Deep copy a network and the inputs of a call, also tensors that were computed."""
    call: _Call = module, args, named
    parts = leaves([call[1:], *(list(vars(layer).values()) for layer in module.modules())])
    results = (leaf for leaf in parts if isinstance(leaf, Tensor) and not leaf.is_leaf)
    with torch.inference_mode(False):
        return copy.deepcopy(call, {id(tensor): tensor.detach().clone().requires_grad_() for tensor in results})


def _play_planned(call: _Call, way: str, planned: nn.Module) -> tuple[Found, float]:
    """Play a copy by another copy's plan, and return the results and the share of the products that operators save."""
    record: Record = ([], [])
    twin = _copy_call(*call)
    for part, twin_part in zip(calls.convolutions(twin[0]), calls.convolutions(planned), strict=True):
        part.plan = twin_part.plan
    with calls.override_calls(record=record):
        return _play_call(*twin, way), calls.worth(record)


def _strides(results: Found) -> list[object]:
    return [tensor.stride() for name, tensor in results.items() if name.startswith("output") and tensor is not None]


def _play_call(
    module: nn.Module, args: tuple[object, ...], named: dict[str, object], way: str, recorder: Recorder | None = None
) -> Found:
    """Return the outputs, gradients and buffers of a call of a copy, by name."""
    for layer in module.modules():
        for name in HOOKS if layer is not module else ():  # those of fedkern
            for key in [key for key, hook in getattr(layer, name).items() if hook is not calls.DRAW]:
                del getattr(layer, name)[key]
    for key in [key for key, hook in module._forward_hooks.items() if hook is not calls.END]:
        del module._forward_hooks[key]
    module.zero_grad()
    begin = calls.begin_of(module)
    assert begin is not None
    begin.modes = dict.fromkeys(MODES, way)
    with seeded_generators(0):
        with recorder or nullcontext(), calls.override_calls(recorder=recorder):
            result = module(*args, **named)
        outputs = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in leaves((args, named)) if isinstance(leaf, Tensor)]
        operands = [tensor for tensor in (*inputs, *module.parameters()) if tensor.requires_grad]
        if operands and (graded := [leaf for leaf in outputs if leaf.requires_grad]):
            draws = torch.Generator().manual_seed(0)
            grads = [torch.randn(tensor.shape, generator=draws).to(tensor) for tensor in graded]
            torch.autograd.backward(graded, grads, inputs=operands)
    found: Found = {f"output {number}": leaf.detach() for number, leaf in enumerate(outputs)}
    found |= {f"the gradient of input {number}": leaf.grad for number, leaf in enumerate(inputs)}
    found |= {f"the gradient of {name}": tensor.grad for name, tensor in module.named_parameters()}
    return found | {name: tensor.detach() for name, tensor in module.named_buffers()}


class _Chain:
    """Steps behind the calls of a convolution: the fewest, and the functions that take the last result."""

    def __init__(self) -> None:
        self.steps, self.opens, self.closes = 9, False, False

    def end(self, steps: int, opens: bool | None = None) -> None:
        """End after ``steps`` at the latest, before a convolution or sum (``opens``) or another function."""
        self.steps = min(self.steps, steps)
        self.opens, self.closes = self.opens or opens is True, self.closes or opens is False

    @property
    def code(self) -> str | None:
        """Return the code in a plan, None for a convolution that runs as written."""
        if self.steps < 0:
            return None
        return "abcdefghij"[self.steps] if self.opens and not self.closes else str(self.steps)


class _State(NamedTuple):
    """Result in a chain: the steps before it, the mode of gradients, its place in the graph, and its layout."""

    chain: _Chain
    steps: int
    grad: bool
    graph: Any
    last: bool
    result: Tensor

    def is_as_made(self) -> bool:
        """Return whether no autograd.Function or change of the mode of gradients came between."""
        return self.grad == torch.is_grad_enabled() and self.graph is self.result.grad_fn and saved_hooks(True) is None


class Recorder(TorchFunctionMode):
    """Record of how far results of convolutions pass through consecutive steps only.

    Attributes:
        convolution: the convolution that is called, and the key of its plan.
        states: of the results of convolutions and steps, by id.
        chains: of the convolutions that were called, by the keys of their plans.
        keeps_layout: whether torch has faults on the network's channels-last maps: it may end the process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolution: tuple[calls.Convolution, int] | None = None
        self.states: dict[int, _State] = {}
        self.chains: dict[tuple[calls.Convolution, int], _Chain] = {}
        self.keeps_layout = False
        self._extended: set[int] = set()
        self._latest: _State | None = None

    def stop(self) -> None:
        """End all chains, at the latest where a result is still held, and write the plans of the convolutions."""
        self._end_latest()
        for state in self.states.values():
            if sys.getrefcount(state.result) > 2:  # after the backward pass, whose graph counts
                state.chain.end(state.steps, False)
        for (convolution, key), chain in self.chains.items():
            if (code := chain.code) is not None:
                convolution.plan[key] = code

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        named = kwargs or {}
        tensors = [leaf for leaf in leaves((args, named)) if isinstance(leaf, Tensor)]
        counts = func in _COUNTS and len(tensors) == 1 and tensors[0].dtype is torch.int64 and not tensors[0].dim()
        if func in ABOUT or counts:
            return func(*args, **named)
        convolution, self.convolution = self.convolution, None
        state, operands = self._latest, tensors[: 2 if func in ADDS else 1]
        if state is not None and not (
            func in EXTENDING and "out" not in named and (func not in POOLS or is_half_pooling(*args, **named))
            and state.is_as_made() and any(tensor is state.result for tensor in operands)
        ):  # fmt: skip
            self._end_latest()
            state = None
        self._latest = None
        takes = func is F.conv2d if convolution is not None else state is not None and func in ADDS
        for tensor in tensors:
            if state is not None and tensor is state.result and id(tensor) not in self._extended:
                self._extended.add(id(tensor))
            elif (taken := self.states.get(id(tensor))) is not None:
                opens = takes and id(tensor) not in self._extended and taken.is_as_made()
                taken.chain.end(taken.steps, opens)
        last = state.last if state is not None else any(map(calls.is_last, tensors[:2]))
        result = func(*args, **named)
        if func is F.conv2d and tensors[1].shape[1] < 16 and tensors[1][0, 0].numel() == 1:  # with few channels
            self.keeps_layout |= result.shape != (len(result), len(tensors[1]), *tensors[0].shape[2:])  # and a stride
        self.keeps_layout |= func is F.group_norm
        if convolution is not None and func is F.conv2d:
            self._go_on(result, self.chains.setdefault(convolution, _Chain()), 0, last)
        elif state is not None:
            self._go_on(result, state.chain, state.steps + 1, last)
        return result

    def _go_on(self, result: Tensor, chain: _Chain, steps: int, last: bool) -> None:
        if result.dim() != 4 or result.stride() != dense_strides(tuple(result.shape), last):
            chain.end(steps - 1, False)
        self._extended.discard(id(result))
        self._latest = _State(chain, steps, torch.is_grad_enabled(), result.grad_fn, last, result)
        self.states[id(result)] = self._latest

    def _end_latest(self) -> None:
        if self._latest is not None:
            self._latest.chain.end(self._latest.steps)
            self._latest = None
