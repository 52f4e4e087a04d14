"""fedkern.accelerate: a network whose convolutions wait, within a call, for the layers behind them.

Modules keep their class, state and repr. A convolution gets a ``_conv_forward`` in its own dictionary, and a network
two hooks, all called with the caller's tensors or module: copies of a module's dictionary compute with their own
tensors. A deep copy is accelerated too, and a pickle loads without fedkern. A `rehearsal` of the first call of each
mode, or a plan, fixes how far a convolution waits.
"""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from fedkern.acceleration import pending
from fedkern.acceleration.layers import GLOBAL_HOOKS, HOOKS, SETTINGS, Windows, has_hooks, is_untouched, square_windows
from fedkern.acceleration.pending import Chain, Node, Norm, Pending, Run, Site, compute_node, compute_pending, is_plain
from fedkern.messages.leaves import map_leaves
from fedkern.ops._conv.conv_norm import choose_norm_kernels, choose_pool_kernels, compute_conv_norm, run_pooling
from fedkern.ops._conv.kernels import Inputs, Pooling, Settings
from fedkern.ops._core.backend import is_intercepted
from fedkern.ops._core.private_torch import WithoutTorchFunction, functorch_active, saved_hooks

M = TypeVar("M", bound=nn.Module)
_CONV_FORWARD: Callable[..., Tensor] = nn.Conv2d._conv_forward
_CHANNELS_LAST = torch.channels_last
_thread = threading.local()
"""``run``: the call of a network that this thread is in; the rest: options of :func:`override_calls`."""
_NO_EPS = 1e-30  # above 0, and nothing beside 1
MOVE = 64
"""Products for which an element counts that is copied into another layout (benchmarks/bench_guest.py)."""

Record = tuple[list[tuple[Site, int]], list[int]]
"""Calls of convolutions that an operator computed (again for results that are used again), with their products, and
the products of all calls."""


Mode = tuple[bool, bool]
"""Whether a network trains, and whether gradients were enabled at the start of its call."""
MODES: tuple[Mode, ...] = ((True, True), (True, False), (False, True), (False, False))
AS_WRITTEN, ACCELERATED, LAST = "-", "+", "="
"""How a mode's calls run: LAST is accelerated, with all convolutions in channels-last."""
LEAST = 0.5
"""Least share of the products of a network's convolutions from which operators pay (benchmarks/bench_guest.py)."""


def put_hooks(module: M, begin: Begin) -> M:
    plain(module)
    for layer in module.modules():
        if is_untouched(layer):
            vars(layer)["_conv_forward"] = Convolution(layer, SETTINGS(layer))
        if type(layer) is nn.Dropout:
            layer.register_forward_pre_hook(DRAW)
    if type(module) is not nn.Conv2d and convolutions(module):  # a convolution alone has nothing to wait for
        module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
        module.register_forward_hook(END, prepend=True, always_call=True)
    return module


def apply_plan(module: M, plan: str) -> M:
    """Accelerate a network, in place, by a plan of :func:`plan_of`: other modes run as written."""
    known, *texts = plan.split(" ")
    put_hooks(module, Begin(dict(zip(MODES, known, strict=True))))
    found = convolutions(module)
    for layer, text in zip(found, texts, strict=True) if len(found) == len(texts) else ():
        layer.plan.update({at: code for at, code in enumerate(text) if code != "."})
    return module


def plan_of(module: nn.Module) -> str:
    """Return how far the convolutions of an accelerated network wait, in the rehearsed modes."""
    begin = begin_of(module)
    known = "".join(begin.modes.get(mode, AS_WRITTEN) if begin else AS_WRITTEN for mode in MODES)
    texts = ("".join(layer.plan.get(at, ".") for at in range(2 * len(MODES))) for layer in convolutions(module))
    return " ".join((known, *texts))


def convolutions(module: nn.Module) -> list[Convolution]:
    found = (vars(layer).get("_conv_forward") for layer in module.modules())
    return [item for item in found if isinstance(item, Convolution)]


def plain(module: M) -> M:
    """Undo :func:`accelerate`, in place, and return the module."""
    for layer in module.modules():
        served = vars(layer).get("_conv_forward")
        if isinstance(served, Convolution) or getattr(served, "func", None) is _CONV_FORWARD:
            del layer._conv_forward
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook) or _is_unpickled(hook)]:
                del hooks[key]
                layer._forward_hooks_always_called.pop(key, None)
                layer._forward_pre_hooks_with_kwargs.pop(key, None)
    return module


class _Hook:
    """Hook of an accelerated network, pickled as a function that does nothing."""

    takes_computed = True

    def __getattr__(self, name: str) -> object:
        raise AttributeError(f"A hook of fedkern.accelerate has no {name}: before torch.jit.script call fedkern.plain.")

    def __deepcopy__(self, memo: object) -> _Hook:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, (nullcontext(), "__exit__")


def _is_unpickled(hook: object) -> bool:
    return isinstance(getattr(hook, "__self__", None), nullcontext)


class Begin(_Hook):
    """Hook at the beginning of a network's calls.

    Attributes:
        modes: how calls run, by the modes that were rehearsed.
    """

    def __init__(self, modes: dict[Mode, str]) -> None:
        self.modes = modes

    def __deepcopy__(self, memo: object) -> Begin:
        twin = object.__new__(type(self))
        vars(twin).update(vars(self), modes=dict(self.modes))
        return twin

    def rehearse(self, module: nn.Module, args: tuple[object, ...], named: Mapping[str, object]) -> None:
        """Decide on the mode of a call that begins: here only the plan's modes are accelerated."""

    def __call__(self, module: nn.Module, args: tuple[object, ...], named: Mapping[str, object] | None = None) -> None:
        begun: Run | None = getattr(_thread, "run", None)
        if begun is not None and not _is_on_stack(begun):
            begun = _thread.run = None
        if begun is not None:
            begun.depth += module is begun.module
        elif (recorder := getattr(_thread, "recorder", None)) is not None or not _is_watched(module):
            mode = module.training, torch.is_grad_enabled()
            if mode not in self.modes and named is not None:
                self.rehearse(module, args, named)
            if (way := self.modes.get(mode, AS_WRITTEN)) != AS_WRITTEN:
                serve = getattr(_thread, "serve", _serve)
                key, frame = 2 * MODES.index(mode), sys._getframe(1)
                _thread.run = Run(serve, module, key, frame, sys.exception(), recorder, way == LAST)


class _End(_Hook):
    def __call__(self, module: nn.Module, args: object, result: object) -> object:
        begun: Run | None = getattr(_thread, "run", None)
        if begun is None or module is not begun.module:
            return None
        if begun.depth:
            begun.depth -= 1
            return None
        try:
            error = sys.exception()
            if result is None and error is not None and error is not begun.handled:  # the call has failed
                if "data pointer" in str(error):
                    error.add_note(f"fedkern.accelerate has not computed the tensor yet: {pending.WAY_OUT}.")
                if begun.last and "view size" in str(error):
                    error.add_note("fedkern.accelerate lays maps out in channels-last: run fedkern.plain(module).")
                return None
            result = map_leaves(partial(_plain, begun), result)
            begun.end()
            return result
        finally:
            _thread.run = None
            begun.over, begun.frame = True, None


END = _End()


class _Draw(_Hook):
    """Hook before a dropout: numbers are drawn in the order of contiguous maps, as without fedkern."""

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> object:
        begun: Run | None = getattr(_thread, "run", None)
        return None if begun is None or not begun.last else tuple(compute_pending(x).contiguous() for x in args)


DRAW = _Draw()


def _is_on_stack(begun: Run) -> bool:
    """Return whether a call is running: an interrupt leaves a call without its end."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame is not begun.frame:
        frame = frame.f_back
    return frame is not None


def begin_of(module: nn.Module) -> Begin | None:
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Begin)), None)


def call_parts(module: nn.Module, function: Callable[..., object], *args: object) -> Any:
    """Call a function of a network's parts, as a call of the network if it is accelerated."""
    begin = begin_of(module)
    if begin is None:
        return function(*args)
    result = None
    begin(module, args)
    try:
        result = function(*args)
    finally:
        ended = END(module, args, result)
    return result if ended is None else ended


@contextmanager
def override_calls(**how: Any) -> Iterator[None]:
    """Change calls in this thread: another ``serve`` for chains, a ``record``, or a ``recorder`` of a rehearsal."""
    vars(_thread).update(how)
    try:
        yield
    finally:
        for name in how:
            delattr(_thread, name)


def _result(windows: Windows, channels: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    batch, _, height, width = shape
    side, stride, padding = windows
    height, width = (height + 2 * padding - side) // stride + 1, (width + 2 * padding - side) // stride + 1
    return batch, channels, height, width


def _products(shape: tuple[int, ...], weight: Tensor) -> int:
    batch, _, height, width = shape
    return batch * height * width * weight.numel()


def _plain(begun: Run, part: object) -> object:
    """Return a part of a network's result, computed and laid out as written, also in an object's attributes."""
    if isinstance(part, Tensor):
        value: Tensor = compute_pending(part)
        if begun.last and is_last(value):
            value = begun.results.setdefault(id(value), (value, value.contiguous()))[1]
        return value
    for name, item in list(getattr(part, "__dict__", {}).items()):
        if isinstance(item, Tensor) and (changed := _plain(begun, item)) is not item:
            object.__setattr__(part, name, changed)
    return part


def _is_watched(module: nn.Module) -> bool:
    """Return whether anything observes the layers of a network, or takes their operations apart."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_intercepted() or functorch_active():
        return True
    if torch.is_autocast_enabled("cpu") or any(GLOBAL_HOOKS) or saved_hooks(True) is not None:
        return True
    layers: list[Any] = [module]
    for layer in layers:  # which grow; module.modules() takes three times as long
        if isinstance(layer, ScriptModule):
            return True
        attributes = vars(layer)
        if parts := attributes["_modules"]:
            layers += [part for part in parts.values() if part is not None]
        names = HOOKS[2:] if layer is module else HOOKS  # the network's own hooks see computed results
        if has_hooks(layer) and not all(takes_computed(hook) for name in names for hook in attributes[name].values()):
            return True
    return False


def takes_computed(hook: object) -> bool:
    """Return whether a hook computes pending arguments itself."""
    return getattr(getattr(hook, "func", hook), "takes_computed", False) is True


class Convolution:
    """``_conv_forward`` of a convolution, whose result waits if an operator may compute it.

    Attributes:
        plan: for each mode of gradients of each mode of calls, the steps that the result waits for: a digit, or a
            letter from ``a`` if only convolutions and sums take the last result.
    """

    def __init__(self, layer: nn.Module, settings: tuple[object, ...], plan: Mapping[int, str] | None = None) -> None:
        self._layer, self._settings, self.plan = weakref.ref(layer), settings, dict(plan or {})
        self._known: dict[tuple[tuple[int, ...], ...], bool] = {}

    def __deepcopy__(self, memo: dict[int, nn.Module]) -> Convolution:
        layer = self._layer()
        return self if layer is None else Convolution(memo.get(id(layer), layer), SETTINGS(layer), self.plan)

    def __reduce__(self) -> tuple[object, ...]:
        return partial, (_CONV_FORWARD, self._owner())

    def _owner(self) -> object:
        names = "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
        layer = self._layer()
        return SimpleNamespace(**dict(zip(names, self._settings if layer is None else SETTINGS(layer), strict=True)))

    def compute_as_written(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer = self._layer()
        return _CONV_FORWARD(self._owner() if layer is None else layer, compute_pending(x), weight, bias)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        begun: Run | None = getattr(_thread, "run", None)
        if begun is None:
            return self.compute_as_written(x, weight, bias)
        begun.settle()
        if begun.last and type(x) is Tensor and not functorch_active():
            with WithoutTorchFunction():  # which a recorder would see
                begun.last = begun.converts or not (is_last(x) or is_last(weight))  # else it is so as written
                begun.converts = True
                x = x.contiguous(memory_format=_CHANNELS_LAST) if x.dim() == 4 else x
        key = begun.key + torch.is_grad_enabled()
        if begun.recorder is not None:
            begun.recorder.convolution = self, key
            return self.compute_as_written(x, weight, bias)
        layer = self._layer()
        windows = square_windows(*(self._settings if layer is None else SETTINGS(layer)))
        node: Node | None = x.__dict__["node"] if type(x) is Pending else None
        record: Record | None = getattr(_thread, "record", None)
        shape = pending.shape_of(x)
        if record is not None and windows is not None and len(shape) == 4:
            record[1].append(_products(_result(windows, weight.shape[0], shape), weight))
        code = self.plan.get(key)
        if code is None or windows is None or not self._serves(windows, weight, bias, shape):
            return self.compute_as_written(x, weight, bias)
        if torch.is_autocast_enabled("cpu") or functorch_active() or saved_hooks(True) is not None or (
            torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        ):  # fmt: skip
            return self.compute_as_written(x, weight, bias)
        last = begun.last or (is_last(x) if node is None else node.chain.site.last) or is_last(weight)
        if node is not None:
            x = compute_node(node, dense=False)
        if not is_plain(x, shape):
            return self.compute_as_written(x, weight, bias)
        shape = _result(windows, weight.shape[0], shape)
        # torch's layers decide on the layout at every step
        if last and not begun.last and min(4 * weight.shape[0], *shape[2:]) < 4:
            return self.compute_as_written(x, weight, bias)
        site = Site(x, weight, bias, windows[1], windows[2], shape, last, code.isalpha())
        return begun.make_result(Node(begun, Chain(site), shape), int(code, 36) % 10)

    def _serves(self, windows: Windows, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> bool:
        """Return whether an operator may compute the convolution: a rule on shapes alone."""
        sizes = tuple(weight.shape)
        if not is_plain(weight, sizes) or (bias is not None and not is_plain(bias, sizes[:1])):
            return False
        key = shape, sizes, windows
        if key not in self._known:
            self._known[key] = _fits(weight, windows, shape)
        return self._known[key]


def is_last(tensor: Tensor) -> bool:
    """Return whether torch's convolutions treat a tensor as channels-last."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=_CHANNELS_LAST)


def _fits(weight: Tensor, windows: Windows, shape: tuple[int, ...]) -> bool:
    side, stride, padding = windows
    if len(shape) != 4 or shape[0] == 0 or shape[1] != weight.shape[1] or min(_result(windows, 1, shape)) < 1:
        return False
    x = torch.empty(shape, memory_format=_CHANNELS_LAST)
    weight, units = weight.detach(), torch.ones(len(weight))
    if stride == 1 and choose_pool_kernels(x, weight, None, padding) is not None:
        return True
    if padding != side // 2:
        return False
    return choose_norm_kernels(Inputs(x, weight, units, units), Settings(units, units, stride=stride)) is not None


def _serve(chain: Chain, dense: bool) -> Tensor | None:
    """Compute a chain by an operator, or None if the layers as written are needed, or faster than copies."""
    site = chain.site
    products = _products(site.shape, site.weight)
    result = _serve_pool(chain, dense)
    if result is None and site.padding == site.weight.shape[2] // 2:
        result = _serve_norm(chain, dense, products)
    record: Record | None = getattr(_thread, "record", None)
    if result is not None and record is not None:
        record[0].append((site, products))
    return result


def _serve_pool(chain: Chain, dense: bool) -> Tensor | None:
    """Compute a chain without norm by ``conv_pool``, which reads and writes maps of either layout."""
    site = chain.site
    if chain.norm is not None or chain.residual is not None or chain.pool == 1 or site.stride > 1:
        return None
    kernel = choose_pool_kernels(site.x, site.weight, site.bias, site.padding)
    if kernel is None:
        return None
    return run_pooling(kernel, site.x, site.weight, site.bias, Pooling(site.padding, chain.relu, dense))


def _serve_norm(chain: Chain, dense: bool, products: int) -> Tensor | None:
    site, norm, x, bias = chain.site, chain.norm, chain.site.x, chain.site.bias
    if site.last and site.weight.shape[1] % 16 and site.weight[0, 0].numel() == 1:  # filling x up takes longer
        return None
    moved = 0 if x.is_contiguous(memory_format=_CHANNELS_LAST) else x.numel()
    behind = math.prod(site.shape) // chain.pool**2 if dense else 0
    residual = None if chain.residual is None else chain.residual[0]
    spared = sum(item.numel() for item in (x, residual) if item is not None and is_last(item)) if dense else 0
    if MOVE * (moved + behind - spared) * (2 if norm is None else 1) > products:  # half is won without a norm's passes
        return None
    if moved:
        x = x.contiguous(memory_format=_CHANNELS_LAST)
    if norm is None:  # one that changes nothing, and adds the bias
        zeros, units = x.new_zeros(len(site.weight)), x.new_ones(len(site.weight))
        norm, bias = Norm(units, zeros if bias is None else bias, _NO_EPS, zeros, units), None
    after = site.stride, chain.relu, chain.pool
    shift = norm.bias
    if norm.groups:
        settings = Settings(None, None, 0.0, norm.eps, *after, False, True, norm.groups)
    else:
        tracks = norm.training and not norm.counted
        mean, variance = (norm.mean, norm.variance) if tracks or not norm.training else (None, None)
        if bias is not None and variance is not None and not norm.training:
            shift, bias = shift + bias * norm.weight * torch.rsqrt(variance + norm.eps), None
        settings = Settings(mean, variance, norm.momentum, norm.eps, *after, tracks, norm.training)
    inputs = Inputs(x, site.weight, norm.weight, shift, bias, residual)
    kernel = choose_norm_kernels(inputs if bias is None or norm.groups else inputs._replace(bias=None), settings)
    if kernel is None:
        return None
    site.moved += moved
    return compute_conv_norm(kernel, inputs, settings)


def worth(record: Record) -> float:
    """Return the share of products that operators save, after recomputation and copies, at least 0."""
    served = dict(record[0])
    again = sum(products for _, products in record[0]) - sum(served.values())
    moved = MOVE * sum(site.moved for site in served)
    return max(0.0, (sum(served.values()) - again - moved) / max(sum(record[1]), 1))
