"""Tensors that are not computed yet: the result of a convolution, and of the steps behind it.

A norm, an addition, a ReLU and a 2 x 2 max pooling extend the one chain that waits, as far as a rehearsal saw them. The
last of them, or any other operation, computes the chain.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fedkern.ops._core.private_torch import WithoutTorchFunction, saved_hooks, throw_on_data_ptr

_autocast, _grad_enabled = torch.is_autocast_enabled, torch.is_grad_enabled


WAY_OUT = "give it tensor + 0, or run fedkern.plain(module)"


Noted = list[tuple[Tensor, int]]
"""Tensors with their versions."""


@dataclass(slots=True, eq=False)
class Site:
    """Call of a convolution.

    Attributes:
        last: whether torch's layers would give its result, and what follows, channels-last.
        opens: whether only convolutions and sums take the chain's result, which may have an operator's layout.
        moved: elements that an operator's call had to copy into another layout.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: int
    padding: int
    shape: tuple[int, ...]
    last: bool
    opens: bool
    grad: bool = field(default_factory=_grad_enabled)
    moved: int = 0
    noted: Noted = field(init=False)

    def __post_init__(self) -> None:
        self.noted = _note_versions(self.x, self.weight, self.bias)


@dataclass(slots=True, eq=False)
class Norm:
    """Arguments of a batch norm, or with ``groups`` of a group norm.

    Attributes:
        counted: whether the running statistics are updated already, or need no update.
    """

    weight: Tensor
    bias: Tensor
    eps: float
    mean: Tensor | None = None
    variance: Tensor | None = None
    training: bool = False
    momentum: float = 0.0
    groups: int = 0
    noted: Noted = field(init=False)
    counted: bool = field(init=False)

    def __post_init__(self) -> None:
        self.noted = _note_versions(self.weight, self.bias, self.mean, self.variance)
        self.counted = not self.training or self.mean is None

    def __call__(self, y: Tensor) -> Tensor:
        if self.groups:
            return F.group_norm(y, self.groups, self.weight, self.bias, self.eps)
        statistics = (None, None) if self.training and self.counted else (self.mean, self.variance)
        self.count()
        return F.batch_norm(y, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)

    def count(self) -> None:
        self.counted = True
        if self.training:
            del self.noted[2:]


class Chain(NamedTuple):
    """Convolution with the steps behind it: ``pool(relu(norm(conv(x)) + residual))``.

    Attributes:
        residual: the summand, with its version.
    """

    site: Site
    norm: Norm | None = None
    residual: tuple[Tensor, int] | None = None
    relu: bool = False
    pool: int = 1


Serve = Callable[[Chain, bool], Tensor | None]
"""Computes a chain by one operator, or returns None; the flag: the result has to be contiguous."""


Step = Callable[[Tensor], Tensor]


@dataclass(slots=True, eq=False)
class Node:
    """Result that may wait.

    Attributes:
        parent, step: the node before and the function of its value, as the network's author wrote it.
        taken: whether a function took the value, so that others may hold a view of it.
    """

    run: Run
    chain: Chain
    shape: tuple[int, ...]
    parent: Node | None = None
    step: Step | None = None
    value: Tensor | None = None
    taken: bool = False


@dataclass(slots=True, eq=False)
class Run:
    """A call of a network.

    Attributes:
        serve: computes chains.
        module, key: the network, and the key of its convolutions' plans for calls without gradients.
        frame, handled: the frame that calls its hooks, and the exception handled at the start.
        recorder: of the rehearsal that this is, or None.
        last, converts: whether all convolutions run in channels-last, and one has begun.
        depth: calls of the network inside of the call.
        over: whether the call has ended.
        waits, left: the one node that waits, if any, and the steps that the rehearsal saw behind it.
        made: the handles.
        results: maps of the network's result and their contiguous copies, by id.
    """

    serve: Serve
    module: nn.Module
    key: int
    frame: FrameType | None
    handled: BaseException | None
    recorder: Any
    last: bool
    converts: bool = False
    depth: int = 0
    over: bool = False
    waits: Node | None = None
    left: int = 0
    made: list[weakref.ref[Pending]] = field(default_factory=list)
    results: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def settle(self) -> None:
        if self.waits is not None:
            compute_node(self.waits, dense=not self.waits.chain.site.opens)

    def end(self) -> None:
        self.settle()
        for reference in self.made:
            if (tensor := reference()) is not None:
                compute_node(tensor.__dict__["node"])

    def make_result(self, node: Node, steps: int) -> Tensor:
        """Return the result of a node: a handle if ``steps`` follow, else the tensor."""
        self.waits, self.left = node, steps
        if steps > 0:
            return make_handle(node)
        result = compute_node(node, dense=not node.chain.site.opens)
        return make_handle(node) if node.chain.site.opens else result


def version_of(tensor: Tensor) -> int:
    """Return the count of changes of a tensor, 0 in inference mode."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def _note_versions(*tensors: Tensor | None) -> Noted:
    return [(item, version_of(item)) for item in tensors if item is not None]


def _refuse_gradient(gradient: Tensor) -> None:
    raise RuntimeError(
        "A torch.autograd.Function took a tensor that fedkern.accelerate has not computed yet, and its gradient would "
        f"be lost: {WAY_OUT}."
    )


_LOST: Any = OrderedDict({0: _refuse_gradient})


class Pending(Tensor):
    """Handle of a :class:`Node`, with the shape, dtype and device of the result."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        extend = EXTENDING.get(func)
        if extend is not None and not _autocast("cpu") and "out" not in (named := dict(kwargs or {})) and _is_calm():
            leading = (named.pop("input"),) if "input" in named else ()
            trailing = (named.pop("other"),) if "other" in named else ()
            result = extend(*leading, *args, *trailing, **named)
            if result is not None:
                return result
        elif func in ABOUT:
            with WithoutTorchFunction():
                return func(*args, **(kwargs or {}))
        for item in (*args, *(kwargs or {}).values()):
            if type(item) is Pending:
                item.__dict__["node"].run.settle()
                item.__dict__["node"].taken = True
        return func(*map(compute_pending, args), **{name: compute_pending(x) for name, x in (kwargs or {}).items()})

    def dim(self) -> int:
        return 4

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> NoReturn:  # type: ignore[override]
        raise RuntimeError(
            f"{func} reads a tensor that fedkern.accelerate has not computed yet, as code that torch.jit has compiled "
            f"does: {WAY_OUT}."
        )


def make_handle(node: Node) -> Pending:
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


def compute_pending(item: Any) -> Any:
    """Return a value with all waiting tensors computed, in torch's layout."""
    if type(item) is Pending:
        return compute_node(item.__dict__["node"])
    return type(item)(map(compute_pending, item)) if type(item) in (tuple, list) else item


def compute_node(node: Node, dense: bool = True) -> Tensor:
    """Return the result of a node, computed once, with torch's strides (``dense``) or the operator's."""
    if node.value is None:
        _compute(node, dense)
    elif dense:
        node.value = _lay_out(node.value, node.chain.site)
    assert node.value is not None
    return node.value


def _compute(node: Node, dense: bool) -> None:
    if node.run.over:
        raise RuntimeError("a tensor of a call of an accelerated network that failed is not there any more")
    if node.run.waits is node:
        node.run.waits = None
    grad = node.chain.site.grad
    if grad == _grad_enabled() and not _autocast("cpu") and _is_calm():
        node.value = _compute_value(node, dense)
    else:  # as where the convolution stands: a checkpoint counts what is saved inside of it
        with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=False), saved_tensors_hooks(_same, _same):
            node.value = _compute_value(node, dense)
    node.parent = node.step = None


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _is_calm() -> bool:
    return saved_hooks(True) is None


def dense_strides(shape: tuple[int, ...], last: bool) -> tuple[int, ...]:
    _, channels, height, width = shape
    if last:
        return channels * height * width, 1, channels * width, channels
    return channels * height * width, height * width, width, 1


def _lay_out(result: Tensor, site: Site) -> Tensor:
    if result.stride() == dense_strides(tuple(result.shape), site.last):
        return result
    site.moved += result.numel()
    return result.clone(memory_format=torch.channels_last if site.last else torch.contiguous_format)


def _compute_value(node: Node, dense: bool) -> Tensor:
    chain, parent = node.chain, node.parent
    marks = chain.site.noted + (chain.norm.noted if chain.norm else []) + ([chain.residual] if chain.residual else [])
    for tensor, version in marks:
        if version_of(tensor) != version:
            raise RuntimeError(
                "A tensor was changed in place before fedkern.accelerate computed what an earlier step takes of it: "
                "write the change without in-place operations, or run fedkern.plain(module)."
            )
    before = parent
    while before is not None and before.value is None:
        before = before.parent
    if before is None and (served := node.run.serve(chain, dense and not chain.site.last)) is not None:
        if chain.norm is not None:
            chain.norm.count()
        return _lay_out(served, chain.site) if dense else served
    if parent is None:
        site = chain.site
        x = site.x if site.last or site.x.is_contiguous() else site.x.contiguous()
        return F.conv2d(x, site.weight, site.bias, site.stride, site.padding)
    assert node.step is not None
    return node.step(compute_node(parent))


# -- what extends a chain ----------------------------------------------------------------------------------------------


def _waiting(x: object) -> Node | None:
    node: Node | None = x.__dict__["node"] if type(x) is Pending else None
    return node if node is not None and node.run.waits is node and node.chain.site.grad == _grad_enabled() else None


def is_plain(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is an ordinary fp32 tensor on the CPU, of a shape."""
    kind = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return kind and tensor.dtype is torch.float32 and tensor.is_cpu and tensor.shape == shape


def shape_of(x: Tensor) -> tuple[int, ...]:
    return x.__dict__["node"].shape if type(x) is Pending else tuple(x.shape)


def _extend_chain(x: Tensor, node: Node, step: Step, chain: Chain, inplace: bool = False) -> Tensor:
    shape = node.shape
    if chain.pool > node.chain.pool:
        shape = (*shape[:2], shape[2] // 2, shape[3] // 2)
    after = Node(node.run, chain, shape, node, step)
    result = node.run.make_result(after, node.run.left - 1)
    if not inplace:
        return result
    x.__dict__["node"] = after
    return x if type(result) is Pending else result


def _takes_norm(
    x: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, *statistics: Tensor | None
) -> Node | None:
    """Return the node that a norm may extend, or None. Torch raises its errors where the norm is called."""
    node = _waiting(x)
    if node is None or node.parent is not None or weight is None or bias is None or eps <= 0:
        return None
    for item in (weight, bias, *statistics):
        if item is not None and not is_plain(item, node.shape[1:2]):
            return None
    return node


def _batch_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor | None:  # fmt: skip
    node = _takes_norm(x, eps, weight, bias, running_mean, running_var)
    if node is None or weight is None or bias is None or (running_mean is None and not training):
        return None
    batch, _, height, width = node.shape
    if training and batch * height * width == 1:
        return None
    norm = Norm(weight, bias, eps, running_mean, running_var, training, momentum)
    return _extend_chain(x, node, norm, Chain(node.chain.site, norm))


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    node = _takes_norm(x, eps, weight, bias)
    if node is None or weight is None or bias is None or num_groups < 1 or node.shape[1] % num_groups:
        return None
    norm = Norm(weight, bias, eps, groups=num_groups)
    return _extend_chain(x, node, norm, Chain(node.chain.site, norm))


def _relu(x: Tensor, inplace: bool = False) -> Tensor | None:
    node = _waiting(x)
    if node is None or node.chain.relu:
        return None
    return _extend_chain(x, node, torch.relu_ if inplace else torch.relu, node.chain._replace(relu=True), inplace)


def _takes_sum(x: object) -> Node | None:
    node = _waiting(x)
    open_ = node is not None and node.chain.residual is None and not node.chain.relu and node.chain.pool == 1
    return node if open_ else None


def _add(x: object, term: object, *, alpha: float = 1, inplace: bool = False) -> Tensor | None:
    if alpha != 1 or not isinstance(term, Tensor) or not isinstance(x, Tensor) or x is term:
        return None
    node, summand, writes = _takes_sum(x), term, inplace
    if node is None:
        node, summand, writes = _takes_sum(term), x, False
        before = x.__dict__["node"] if type(x) is Pending else None
        if inplace and (before is None or before.taken):  # others would see the sum
            return None
    if node is None or shape_of(summand) != node.shape:
        return None
    if type(summand) is Pending:
        summand = compute_node(summand.__dict__["node"], dense=False)
    if not is_plain(summand, node.shape):
        return None
    chain = Chain(node.chain.site, node.chain.norm, (summand, version_of(summand)))
    return _extend_chain(x, node, (lambda y: y.add_(summand)) if writes else lambda y: y + summand, chain, inplace)


def is_half_pooling(
    x: object, kernel_size: object, stride: object = None, padding: object = 0, dilation: object = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> bool:  # fmt: skip
    """Return whether arguments of max pooling describe adjacent windows of 2 x 2."""
    pairs = [(kernel_size, 2), (kernel_size if stride is None or stride == [] else stride, 2), (padding, 0)]
    square = all(actual in (size, (size, size), [size, size]) for actual, size in (*pairs, (dilation, 1)))
    return square and not ceil_mode and not return_indices


def _max_pool(x: Tensor, *args: Any, **named: Any) -> Tensor | None:
    node = _waiting(x)
    if node is None or not is_half_pooling(x, *args, **named) or min(node.shape[2:]) < 2:
        return None
    if node.chain.pool > 1 or node.chain.residual is not None:
        return None
    return _extend_chain(x, node, lambda y: F.max_pool2d(y, 2), node.chain._replace(pool=2))


POOLS = (torch.max_pool2d, F.max_pool2d)
_relu_, _add_ = partial(_relu, inplace=True), partial(_add, inplace=True)
EXTENDING: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _relu_),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), _add_),
    **dict.fromkeys(POOLS, _max_pool),
}
ADDS = {function for function, extend in EXTENDING.items() if extend in (_add, _add_)}
ABOUT = {
    Tensor.dim, Tensor.size, Tensor.__len__, Tensor.numel,
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "is_cuda")),
}  # fmt: skip
"""Attributes and methods that need no values."""
