"""fedkern.accelerate: a network whose convolutions wait, within a call, for what follows them.

Modules keep their class, state and repr: a network and its convolutions get a ``forward`` in their own dictionaries.
Beside it stand two ways of copying, by which a pickle holds the plain module, and a deep copy is accelerated again.
"""

from __future__ import annotations

import copy
import inspect
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import CodeType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedkern.deferred import pending
from fedkern.deferred.layers import GLOBAL_HOOKS, HOOKS, Convolution, convolution, hooked
from fedkern.deferred.pending import Chain, Node, Norm, Pending, Run, Serve, Site, computed, handle, shape_of, value
from fedkern.ops._conv.conv_norm import run, serving
from fedkern.ops._conv.conv_pool import pooling, run_pooling
from fedkern.ops._conv.kernels import Inputs, Pooling, Settings
from fedkern.ops._core.backend import intercepted
from fedkern.ops._core.private_torch import functorch_active, saved_hooks

M = TypeVar("M", bound=nn.Module)
_KEYS = ("forward", "__reduce_ex__", "__deepcopy__")
_CHANNELS_LAST = torch.channels_last
_thread = threading.local()
"""``run``: the call of a network that this thread is in; ``serve``, ``record``: of :func:`serving_by`, `recording`."""
_NO_EPS = 1e-30  # above 0, and nothing beside 1
MOVE = 64
"""Products for which an element counts that is copied into another layout (benchmarks/bench_guest.py)."""
Record = tuple[list[tuple[Site, int]], list[int]]
"""Calls of convolutions that were served, more than once where results are used several times, with their products; and
the products of all calls."""


def accelerate(module: M) -> M:
    """Has a network's convolutions computed together with the norm, sum, ReLU and max pooling behind them.

    On the CPU in fp32, forward and backward, by :func:`fedkern.ops.conv_norm` and :func:`fedkern.ops.conv_pool` where
    they serve; all else runs as it is written.  Results differ from torch's by rounding.  A call begins and ends with
    ``module(...)``; parts of it that are called alone run as written.  So does the whole call under autocast,
    ``torch.compile``, ``torch.export``, ``torch.func``, tracing and with anybody's hooks on a submodule.

    Args:
        module: any network; it is changed in place, and keeps its class, state dict and repr.  A deep copy is
            accelerated too, a pickle holds the plain module.

    Returns:
        The same module.
    """
    plain(module)
    for layer in module.modules():
        if type(layer) is nn.Conv2d:
            _install(layer, _Conv(layer))
    if "forward" not in vars(module):  # else it is a convolution alone, with nothing to wait for
        _install(module, _Root(module))
    return module


def plain(module: M) -> M:
    """Takes back :func:`accelerate`, in place; returns the module."""
    for layer in module.modules():
        if isinstance(vars(layer).get("forward"), _Served):
            for key in _KEYS:
                vars(layer).pop(key)
    return module


class _Served:
    """A module's ``forward`` in its dictionary."""

    as_written = True  # gives what the class does: whoever looks for replaced methods need not mind

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @property
    def __signature__(self) -> inspect.Signature:  # torch.export looks for both
        return inspect.signature(MethodType(type(self.module).forward, self.module))

    @property
    def __code__(self) -> CodeType:
        code: CodeType = type(self.module).forward.__code__
        return code

    def written(self, *args: Any, **named: Any) -> Any:
        """What the module's class does."""
        return type(self.module).forward(self.module, *args, **named)


def _install(module: nn.Module, served: _Served) -> None:
    attributes = vars(module)
    attributes["forward"] = served
    for key, function in (("__reduce_ex__", _reduced), ("__deepcopy__", _copied)):
        bound: Any = partial(function, module)
        bound.as_written = True
        attributes[key] = bound


def _reduced(module: Any, protocol: Any) -> tuple[Any, ...]:
    """How a plain module would be pickled."""
    kind: Any = type(module)
    make, args, state, *rest = kind.__reduce_ex__(module, protocol)
    if isinstance(state, dict):
        state = {key: each for key, each in state.items() if key not in _KEYS}
    return make, args, state, *rest


def _copied(module: Any, memo: dict[int, Any]) -> Any:
    """A deep copy, accelerated as the module is."""
    if hasattr(type(module), "__deepcopy__"):
        result = type(module).__deepcopy__(module, memo)
    else:
        make, args, state, *_ = _reduced(module, 4)
        result = memo[id(module)] = make(*copy.deepcopy(args, memo))
        result.__setstate__(copy.deepcopy(state, memo))
    _install(result, type(vars(module)["forward"])(result))
    return result


class _Root(_Served):
    """The forward of a network: a call in which convolutions wait."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.within(self.written, *args, **named)

    def within(self, function: Any, *args: Any, **named: Any) -> Any:
        """Calls a function of the network or of parts of it as a call of the network."""
        if getattr(_thread, "run", None) is not None or _watched(self.module):
            return function(*args, **named)
        _thread.run = begun = Run(getattr(_thread, "serve", _serve))
        try:
            result = _plain(function(*args, **named))
            begun.finish()
            return result
        finally:
            _thread.run = None
            begun.over = True


def called(module: nn.Module, function: Any, *args: Any) -> Any:
    """Calls a function of parts of a network; as a call of the network where it is accelerated."""
    root = vars(module).get("forward")
    return root.within(function, *args) if isinstance(root, _Root) else function(*args)


@contextmanager
def serving_by(serve: Serve) -> Iterator[None]:
    """Inside, in this thread, another function computes the chains of calls."""
    _thread.serve = serve
    try:
        yield
    finally:
        del _thread.serve


@contextmanager
def recording() -> Iterator[Record]:
    """Inside, in this thread, convolutions of calls are noted."""
    record: Record = ([], [])
    _thread.record = record
    try:
        yield record
    finally:
        del _thread.record


def _result(conv: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a convolution's result."""
    batch, _, height, width = shape
    side, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    height, width = (height + 2 * padding - side) // stride + 1, (width + 2 * padding - side) // stride + 1
    return batch, conv.out_channels, height, width


def _products(shape: tuple[int, ...], weight: Tensor) -> int:
    """The products that a convolution's result of this shape takes."""
    batch, _, height, width = shape
    return batch * height * width * weight.numel()


def _plain(result: Any) -> Any:
    """A network's result, in which nothing waits; objects with tensors are looked into as far as attributes."""
    if isinstance(result, (Tensor, tuple, list)) or type(result) is dict:
        return computed(result)
    for name, each in list(getattr(result, "__dict__", {}).items()):
        if type(each) is Pending:
            object.__setattr__(result, name, computed(each))  # a dataclass may be frozen
    if isinstance(result, dict):
        result.update({key: computed(each) for key, each in result.items() if type(each) is Pending})
    return result


def _watched(module: nn.Module) -> bool:
    """Whether something looks at the layers of a network, or takes their operations apart."""
    if torch.compiler.is_compiling() or intercepted() or functorch_active() or torch.is_autocast_enabled("cpu"):
        return True
    if any(GLOBAL_HOOKS) or torch.jit.is_tracing() or saved_hooks(True) is not None:
        return True
    return any(not takes_computed(hook) for hook in _hooks(module))


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Hooks of a network's parts, and those of gradients that it has itself; parts of TorchScript count as hooks."""
    layers: list[Any] = [module]
    while layers:
        layer = layers.pop()
        if isinstance(layer, torch.jit.ScriptModule):
            yield layer
        elif layer is not None:
            attributes = vars(layer)
            layers += attributes["_modules"].values()
            if hooked(layer):
                for name in HOOKS if layer is not module else HOOKS[2:]:
                    yield from attributes[name].values()


def takes_computed(hook: Any) -> bool:
    """Whether a hook computes what it is given by itself, with :func:`fedkern.deferred.pending.computed`."""
    return getattr(getattr(hook, "func", hook), "takes_computed", False) is True


class _Conv(_Served):
    """The forward of a convolution, whose result waits where an operator may serve it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._known: dict[tuple[tuple[int, ...], ...], bool] = {}

    def __call__(self, x: Any) -> Any:
        begun: Run | None = getattr(_thread, "run", None)
        if begun is None:
            return self.written(x)
        record: Record | None = getattr(_thread, "record", None)
        if record is not None and isinstance(self.module.padding, tuple):
            record[1].append(_products(_result(self.module, shape_of(x)), self.module.weight))
        node: Node | None = x.__dict__["node"] if type(x) is Pending else None
        layer = None if node is None and type(x) is not Tensor else convolution(self.module)
        serves = layer is not None and self._serves(layer, shape_of(x)) and not torch.is_autocast_enabled("cpu")
        if layer is None or not serves or functorch_active() or saved_hooks(True) is not None:
            return self.written(x if node is None else value(node))
        if node is not None:
            x = value(node, dense=False)
        if x.dtype is not torch.float32 or x.device.type != "cpu":
            return self.written(x)
        weight, bias, _, stride, padding = layer
        shape = _result(self.module, x.shape)
        return handle(Node(begun, Chain(Site(x, weight, bias, stride, padding, shape)), shape, None, None))

    def _serves(self, layer: Convolution, shape: tuple[int, ...]) -> bool:
        """Whether an operator may serve the convolution on maps of this shape: a rule on shapes alone."""
        key = shape, layer[2:]
        if key not in self._known:
            self._known[key] = _fits(layer, shape)
        return self._known[key]


def _fits(layer: Convolution, shape: tuple[int, ...]) -> bool:
    weight, _, side, stride, padding = layer
    if len(shape) != 4 or shape[0] == 0 or weight.dtype is not torch.float32 or weight.device.type != "cpu":
        return False
    x = torch.empty(shape, memory_format=_CHANNELS_LAST)
    weight, ones = weight.detach(), torch.ones(len(weight))
    if stride == 1 and pooling(x, weight, None, padding) is not None:
        return True
    if padding != side // 2:
        return False
    return serving(Inputs(x, weight, ones, ones), Settings(ones, ones, stride=stride)) is not None


def _serve(chain: Chain, dense: bool) -> Tensor | None:
    """A chain by an operator; None where the layers have to run as written, or are faster than copies around it."""
    site = chain.site
    products = _products(site.shape, site.weight)
    result = _pooled(chain, dense)
    if result is None and site.padding == site.weight.shape[2] // 2:
        result = _normed(chain, dense, products)
    record: Record | None = getattr(_thread, "record", None)
    if result is not None and record is not None:
        record[0].append((site, products))
    return result


def _pooled(chain: Chain, dense: bool) -> Tensor | None:
    """A chain without norm by ``conv_pool``, which reads and writes maps of either layout."""
    site = chain.site
    if chain.norm is not None or chain.residual is not None or chain.pool == 1 or site.stride > 1:
        return None
    kernel = pooling(site.x, site.weight, site.bias, site.padding)
    if kernel is None:
        return None
    return run_pooling(kernel, site.x, site.weight, site.bias, Pooling(site.padding, chain.relu, dense))


def _normed(chain: Chain, dense: bool, products: int) -> Tensor | None:
    """A chain by ``conv_norm``."""
    site, norm, x, bias = chain.site, chain.norm, chain.site.x, chain.site.bias
    moved = 0 if x.is_contiguous(memory_format=_CHANNELS_LAST) else x.numel()
    behind = math.prod(site.shape) // chain.pool**2 if dense else 0
    if MOVE * (moved + behind) * (2 if norm is None else 1) > products:  # half is won without a norm's passes
        return None
    if moved:
        x = x.contiguous(memory_format=_CHANNELS_LAST)
    residual = None if chain.residual is None else chain.residual[0]
    if norm is None:  # one that changes nothing, and adds the bias
        none, ones = x.new_zeros(len(site.weight)), x.new_ones(len(site.weight))
        norm, bias = Norm(none, ones, ones, none if bias is None else bias, False, 0.0, _NO_EPS), None
    after = site.stride, chain.relu, chain.pool
    shift = norm.bias
    if isinstance(norm, pending.GroupNorm):
        settings = Settings(None, None, 0.0, norm.eps, *after, False, True, norm.groups)
    else:
        tracks = norm.training and not norm.counted
        mean, variance = (norm.mean, norm.variance) if tracks or not norm.training else (None, None)
        if bias is not None and variance is not None and not norm.training:
            shift, bias = shift + bias * norm.weight * torch.rsqrt(variance + norm.eps), None
        settings = Settings(mean, variance, norm.momentum, norm.eps, *after, tracks, norm.training)
    inputs = Inputs(x, site.weight, norm.weight, shift, bias, residual)
    kernel = serving(inputs if settings.groups else inputs._replace(bias=None), settings)
    if kernel is None:
        return None
    site.moved += moved
    return run(kernel, inputs, settings)
