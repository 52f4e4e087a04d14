"""Tensors that are not computed yet: results of convolutions, and of what is done with them next.

A norm, an addition, a ReLU and a 2 x 2 max pooling extend what waits; whatever else touches it has it computed.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fedkern.ops._core.private_torch import WithoutTorchFunction, saved_hooks, throw_on_data_ptr

_autocast, _grad_enabled = torch.is_autocast_enabled, torch.is_grad_enabled


WAY_OUT = "give it tensor + 0, or run fedkern.plain(module)"


class Site:
    """A call of a convolution.

    Attributes:
        x, weight, bias: of the call; ``versions`` are those of x and weight.
        stride, padding: of the convolution; ``shape`` is that of its result.
        grad: whether gradients were enabled.
        moved: elements that an operator's call had to copy into another layout, before it and behind it.
    """

    __slots__ = ("bias", "grad", "moved", "padding", "shape", "stride", "versions", "weight", "x")

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, shape: tuple[int, ...]
    ) -> None:
        self.x, self.weight, self.bias, self.stride, self.padding, self.shape = x, weight, bias, stride, padding, shape
        self.versions, self.grad, self.moved = (version(x), version(weight)), _grad_enabled(), 0


class Norm:
    """A batch norm's arguments; ``counted`` once it has moved its running statistics."""

    __slots__ = ("bias", "counted", "eps", "mean", "momentum", "training", "variance", "weight")

    def __init__(
        self, mean: Tensor | None, variance: Tensor | None, weight: Tensor, bias: Tensor, training: bool,
        momentum: float, eps: float,
    ) -> None:  # fmt: skip
        self.mean, self.variance, self.weight, self.bias = mean, variance, weight, bias
        self.training, self.momentum, self.eps = training, momentum, eps
        self.counted = not training or mean is None

    def __call__(self, y: Tensor) -> Tensor:
        """The norm as torch computes it."""
        statistics = (None, None) if self.training and self.counted else (self.mean, self.variance)
        self.counted = True
        return F.batch_norm(y, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)


class GroupNorm:
    """A group norm's arguments; it has no statistics to move."""

    __slots__ = ("bias", "eps", "groups", "weight")
    counted = True

    def __init__(self, groups: int, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.groups, self.weight, self.bias, self.eps = groups, weight, bias, eps

    def __call__(self, y: Tensor) -> Tensor:
        """The norm as torch computes it."""
        return F.group_norm(y, self.groups, self.weight, self.bias, self.eps)


class Chain(NamedTuple):
    """A convolution with what follows it: ``pool(relu(norm(conv(x)) + residual))``.

    Attributes:
        residual: what is added, with its version.
    """

    site: Site
    norm: Norm | GroupNorm | None = None
    residual: tuple[Tensor, int] | None = None
    relu: bool = False
    pool: int = 1


Serve = Callable[[Chain, bool], Tensor | None]
"""Computes a chain by one operator, or says None; the flag: the result has to be contiguous."""


Step = Callable[[Tensor], Tensor]


class Node:
    """A result that may wait.

    Attributes:
        chain: all that leads to it.
        shape: of the result.
        parent, step: the node before and the function of its value, as the network's author wrote it.
        value: the result, once it is computed, with its version then.
        uses: steps that were made of it.
    """

    __slots__ = ("chain", "parent", "run", "shape", "step", "uses", "value", "version")

    def __init__(self, run: Run, chain: Chain, shape: tuple[int, ...], parent: Node | None, step: Step | None) -> None:
        self.run, self.chain, self.shape, self.parent, self.step = run, chain, shape, parent, step
        self.value: Tensor | None = None
        self.version = self.uses = 0


class Run:
    """A call of a network.

    Attributes:
        serve: computes chains.
        made: all that was handed to the network's code.
        norms: nodes whose running statistics have to move, whether somebody uses them or not.
        over: whether the call has ended.
        module, frame, handled: the network, the frame that calls its hooks, and the exception handled at the start.
        depth: calls of the network inside of the call.
    """

    __slots__ = ("depth", "frame", "handled", "made", "module", "norms", "over", "serve")

    def __init__(self, serve: Serve, module: nn.Module, frame: FrameType | None, handled: BaseException | None) -> None:
        self.serve, self.module, self.frame, self.handled, self.depth = serve, module, frame, handled, 0
        self.made: list[weakref.ref[Pending]] = []
        self.norms: list[Node] = []
        self.over = False

    def finish(self) -> None:
        """Computes what outlives the call, and moves the statistics of norms whose results nobody used."""
        for node in self.norms:
            if node.chain.norm is not None and not node.chain.norm.counted:
                with torch.no_grad():
                    value(node)
        self.norms.clear()
        self.compute()

    def compute(self) -> None:
        """Computes what the network's code still holds."""
        for reference in reversed(self.made):  # what comes last releases what it is made of
            if (tensor := reference()) is not None:
                value(tensor.__dict__["node"])


def version(tensor: Tensor) -> int:
    """The count of changes of a tensor; 0 where none is kept, as in inference mode."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def _lost(gradient: Tensor) -> None:
    raise RuntimeError(
        "A torch.autograd.Function took a tensor that fedkern.accelerate has not computed yet, and its gradient would "
        f"be lost: {WAY_OUT}."
    )


_LOST: Any = OrderedDict({0: _lost})


class Pending(Tensor):
    """The handle of a :class:`Node`; its shape, dtype and device are those of the result."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        how = _EXTENDING.get(func)
        if how is not None and not _autocast("cpu") and "out" not in (named := dict(kwargs or {})):
            first = (named.pop("input"),) if "input" in named else ()
            last = (named.pop("other"),) if "other" in named else ()
            result = how(*first, *args, *last, **named)
            if result is not None:
                return result
        elif func in _ABOUT:
            with WithoutTorchFunction():
                return func(*args, **(kwargs or {}))
        elif _writes(func, kwargs):
            _settle((*args, *(kwargs or {}).values()))
        return func(*map(computed, args), **{name: computed(each) for name, each in (kwargs or {}).items()})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(
            f"{func} reads a tensor that fedkern.accelerate has not computed yet, as code that torch.jit has compiled "
            f"does: {WAY_OUT}."
        )


def handle(node: Node) -> Pending:
    """A tensor for the network's code."""
    grad = node.chain.site.grad
    tensor: Pending = Tensor._make_wrapper_subclass(Pending, node.shape, dtype=torch.float32, requires_grad=grad)
    if grad:
        # As register_hook, in a tenth of its time. Only what takes it past __torch_function__, as a custom
        # autograd.Function does, brings it into a graph.
        with WithoutTorchFunction():
            tensor._backward_hooks = _LOST
    throw_on_data_ptr(tensor)  # to_dlpack would end the process
    tensor.__dict__["node"] = node
    node.run.made.append(weakref.ref(tensor))
    return tensor


def computed(item: Any) -> Any:
    """A value with what waits in it computed; contiguous, as torch's convolutions give it."""
    if type(item) is Pending:
        return value(item.__dict__["node"])
    if type(item) in (tuple, list):
        return type(item)(map(computed, item))
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*map(computed, item))
    return {key: computed(each) for key, each in item.items()} if type(item) is dict else item


def value(node: Node, dense: bool = True) -> Tensor:
    """The result of a node, computed once; ``dense``: contiguous, else as the operator gave it."""
    result = node.value
    if result is not None and not (dense and not result.is_contiguous()):
        return result
    if node.run.over:
        raise RuntimeError("a tensor of a call of an accelerated network that failed is not there any more")
    grad = node.chain.site.grad
    if grad == _grad_enabled() and not _autocast("cpu") and saved_hooks(True) is None:
        result = _found(node, dense)
    else:  # as where the convolution stands: a checkpoint counts what is saved inside of it
        with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=False), saved_tensors_hooks(_same, _same):
            result = _found(node, dense)
    node.value, node.version, node.parent, node.step = result, version(result), None, None
    return result


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _found(node: Node, dense: bool) -> Tensor:
    result = _computed(node, dense) if node.value is None else node.value
    if result.is_contiguous() or not dense:
        return result
    node.chain.site.moved += result.numel()
    return result.contiguous()


def _computed(node: Node, dense: bool) -> Tensor:
    site, residual, parent = node.chain.site, node.chain.residual, node.parent
    changed = (version(site.x), version(site.weight)) != site.versions
    if changed or (residual is not None and version(residual[0]) != residual[1]):
        raise _changed()
    before = parent
    while before is not None and before.value is None:
        before = before.parent
    if before is None and (served := node.run.serve(node.chain, dense)) is not None:
        if isinstance(node.chain.norm, Norm):
            node.chain.norm.counted = True
        return served
    if parent is None:
        x = site.x if site.x.is_contiguous() else site.x.contiguous()
        return F.conv2d(x, site.weight, site.bias, site.stride, site.padding)
    assert node.step is not None
    y = value(parent)
    if version(y) != parent.version:
        raise _changed()
    return node.step(y)


def _changed() -> RuntimeError:
    return RuntimeError(
        "A tensor was changed in place before fedkern.accelerate computed what an earlier step takes of it: write the "
        "change without in-place operations, or run fedkern.plain(module)."
    )


def _writes(func: Any, kwargs: Mapping[str, Any] | None) -> bool:
    """Whether a function of torch may change an argument."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__setitem__", "__set__") or name.startswith("__i") or "out" in (kwargs or {})


def _settle(args: Iterable[Any]) -> None:
    """Computes what waits in the call before a tensor of it changes."""
    for each in args:
        if type(each) is Pending:
            each.__dict__["node"].run.compute()
            return


# -- what extends a chain ----------------------------------------------------------------------------------------------


def _waiting(x: Any) -> Node | None:
    """The node of a tensor that waits, in the mode of gradients in which it was begun; else None."""
    node: Node | None = x.__dict__["node"] if type(x) is Pending else None
    fresh = node is not None and node.value is None and node.chain.site.grad == _grad_enabled()
    return node if fresh else None


def shape_of(x: Tensor) -> tuple[int, ...]:
    """The shape of a tensor, which may wait."""
    return x.__dict__["node"].shape if type(x) is Pending else tuple(x.shape)


def _extended(x: Any, node: Node, step: Step, chain: Chain, inplace: Step | None = None) -> Any:
    node.uses += 1
    shape = node.shape
    if inplace is None:
        if chain.pool > node.chain.pool:
            shape = (*shape[:2], shape[2] // 2, shape[3] // 2)
        return handle(Node(node.run, chain, shape, node, step))
    # Memory is written again only where no other step reads the value before.
    x.__dict__["node"] = Node(node.run, chain, shape, node, lambda y: step(y) if node.uses > 1 else inplace(y))
    return x


def _batch_norm(
    x: Any, mean: Any, variance: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor | None:  # fmt: skip
    node = _waiting(x)
    if node is None or node.parent is not None or weight is None or bias is None or eps <= 0:
        return None
    norm = Norm(mean, variance, weight, bias, training or mean is None, momentum, eps)
    result = _extended(x, node, norm, Chain(node.chain.site, norm))
    if not norm.counted:
        node.run.norms.append(result.__dict__["node"])
    return result


def _group_norm(x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor | None:
    node = _waiting(x)
    if node is None or node.parent is not None or weight is None or bias is None or eps <= 0:
        return None
    norm = GroupNorm(num_groups, weight, bias, eps)
    return _extended(x, node, norm, Chain(node.chain.site, norm))


def _relu(x: Any, inplace: bool = False) -> Tensor | None:
    node = _waiting(x)
    if node is None:
        return None
    site, norm, residual, relu, pool = node.chain
    if relu:
        return x
    return _extended(x, node, torch.relu, Chain(site, norm, residual, True, pool), torch.relu_ if inplace else None)


def _relu_(x: Any) -> Tensor | None:
    return _relu(x, True)


def _takes_sum(x: Any) -> Node | None:
    node = _waiting(x)
    open_ = node is not None and node.chain.residual is None and not node.chain.relu and node.chain.pool == 1
    return node if open_ else None


def _add(x: Any, other: Any, *, alpha: float = 1, inplace: bool = False) -> Tensor | None:
    if alpha != 1 or not isinstance(other, Tensor) or not isinstance(x, Tensor) or x is other:
        return None
    node = _takes_sum(x)
    if node is None and not inplace:
        x, other = other, x
        node = _takes_sum(x)
    if node is None or shape_of(other) != node.shape:
        return None
    if type(other) is Pending:
        other = value(other.__dict__["node"], dense=False)
    if type(other) is not Tensor or other.dtype is not torch.float32 or other.device.type != "cpu":
        return None
    writes = (lambda y: y.add_(other)) if inplace else None
    chain = Chain(node.chain.site, node.chain.norm, (other, version(other)))
    return _extended(x, node, lambda y: y + other, chain, writes)


def _add_(x: Any, other: Any, *, alpha: float = 1) -> Tensor | None:
    return _add(x, other, alpha=alpha, inplace=True)


def _max_pool(
    x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:  # fmt: skip
    node = _waiting(x)
    pairs = [(kernel_size, 2), (kernel_size if stride is None or stride == [] else stride, 2), (padding, 0)]
    square = all(actual in (size, (size, size), [size, size]) for actual, size in (*pairs, (dilation, 1)))
    if node is None or not square or ceil_mode or return_indices or min(node.shape[2:]) < 2:
        return None
    site, norm, residual, relu, pool = node.chain
    if pool > 1 or residual is not None:
        return None
    return _extended(x, node, lambda y: F.max_pool2d(y, 2), Chain(site, norm, None, relu, 2))


_EXTENDING: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _relu_),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), _add_),
    **dict.fromkeys((torch.max_pool2d, F.max_pool2d), _max_pool),
}
_ABOUT = {
    Tensor.dim, Tensor.size, Tensor.__len__, Tensor.numel,
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "is_cuda")),
}  # fmt: skip
"""What can be told without the values."""
