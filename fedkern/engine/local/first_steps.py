"""Checks of a process's first training steps, for mistakes in user code that raise nothing."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from fedkern.engine.local.network import Network, NetworkPart, Trainable
from fedkern.errors import UserError, first_of, format_value
from fedkern.messages.leaves import leaves
from fedkern.methods.protocol import Batch, Received
from fedkern.methods.roles import Client, Objective
from fedkern.models import OwnNetwork
from fedkern.tasks.user_tasks import user_module

STEPS = 2
"""Steps that are checked. The second one tells a hook that is added once from hooks that pile up."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class UnfitStep(UserError):
    """A training step that cannot train the network as it should, which ends the run."""


class FirstSteps(Objective):
    """A method's ``loss`` whose first calls in this process are checked.

    Args:
        keep_going: whether a loss that is not finite only leaves its client out (``--on-nan skip``).
    """

    def __init__(self, *, keep_going: bool = False) -> None:
        self._left, self._keep_going = STEPS, keep_going
        self._outside: list[Tensor] = []  # leaves of the last loss that are no parameters of the network
        self._hooked: set[str] = set()
        self._clears = False  # whether the loss replaces gradients, as model.zero_grad() does

    def watch(self, client: Client, method: Objective, network: Network | NetworkPart | Trainable) -> Objective:
        if not self._left and not self._clears:
            return method
        self._client, self._method, self._network = client, method, network
        return self

    def loss(self, model: object, batch: Batch, received: Received) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        # After the watched steps, and while a step is recorded, the loss runs unchecked.
        recorded = self._client.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not self._left or recorded:
            result = self._method.loss(model, batch, received)
            if self._clears:
                self._network.attach_gradients()
            return result

        # Compare the network before and after the loss, which may change what it should not.
        module, trained = user_module(self._network.module), self._network.trained_parameters
        flat = not isinstance(self._network, Trainable)  # a Trainable's buffers are in no vector
        before, hooks, gradients = _tensors(module, flat), _hooks(module), [tensor.grad for tensor in trained]
        frozen = self._sum_frozen()
        result = self._method.loss(model, batch, received)
        if self._sum_frozen() != frozen:
            self._client.warn(
                "changed-frozen",
                "A training step writes into frozen parameters, which no message holds: clients of a process share "
                "the changes, and other numbers of workers give other bits. Make them buffers (register_buffer).",
            )
        loss: Any = result[0] if isinstance(result, tuple) else result
        if isinstance(loss, Tensor) and loss.is_leaf and loss.requires_grad and not loss.any():
            return result  # nothing to learn from, such as a batch without pairs
        self._check_loss(loss, batch)
        after = _tensors(module, flat)
        if changed := [name for name in {**before, **after} if before.get(name) != after.get(name)]:
            buffer = changed[0] in dict(module.named_buffers())
            raise UnfitStep(
                f"A training step changed {'buffer' if buffer else 'parameter'} {changed[0]}; a run trains and sends "
                "the tensors that the network had at the start: "
                f"{'write into it in place (copy_)' if buffer else 'freeze or replace it where the network is made'}."
            )

        # The second watched step shows whether hooks pile up.
        grown = {name for name, count in _hooks(module).items() if count > hooks.get(name, 0)}
        if piling := sorted(grown & self._hooked):
            self._client.warn(
                "piling-hooks",
                f"Every training step adds a hook to {piling[0] or 'the network'}, and none is removed: register it "
                "once, or call remove() on its handle.",
            )
        self._hooked, self._left = grown, self._left - 1

        # A loss that clears gradients detaches them from the flat vectors.
        if any(parameter.grad is not view for parameter, view in zip(trained, gradients, strict=True)):
            self._clears = True
            self._network.attach_gradients()
        return result

    def _sum_frozen(self) -> int:
        frozen = getattr(self._network, "frozen", None)
        return 0 if frozen is None or not len(frozen) else int(frozen.view(torch.int32).sum())

    def take(self, client: Client, network: Network, model: nn.Module) -> None:
        """Copy the ``model`` of a user's loop into the client's network, and check the first models."""
        received = [vector.clone() for vector in (network.parameters, network.personal)] if self._left else []
        network.take(model)
        if not received:
            return
        self._left -= 1
        if kinds := {_kind(x) for x in user_module(model).parameters() if x.is_floating_point()} - {"float32"}:
            client.warn(
                "converted-parameters",
                f"The training loop leaves parameters in {', '.join(sorted(kinds))}, and the upload is their rounded "
                "values in float32: keep the model in float32, and use autocast inside the loop.",
            )
        if all(map(torch.equal, received, (network.parameters, network.personal))):
            client.warn(
                "untrained-upload",
                f"The training loop of client {client.label} leaves all parameters bit for bit as it received them: "
                "train the model that it is given, in place.",
            )

    def _check_loss(self, loss: object, batch: Batch) -> None:
        """Check that a loss is a finite number that depends on trained parameters, and on no others."""

        # Messages name the code that is to be changed: the network, the loss function or the method.
        owner = next(kind for kind in type(self._method).__mro__ if "loss" in vars(kind))
        code = getattr(batch.task, "loss_code", type(batch.task))
        name = "The loss of the network's outputs" if is_shipped(code) else getattr(batch.task, "loss_name", "loss_fn")
        name = name if is_shipped(owner) else f"{owner.__name__}.loss"
        if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
            kind = f"a tensor {list(loss.shape)} of {_kind(loss)}" if isinstance(loss, Tensor) else format_value(loss)
            raise UnfitStep(f"{name} must return one floating number, a tensor of no axes, and returns {kind}.")
        # PyTorch's and built-in losses are right, so the network's forward pass is wrong.
        shipped = is_shipped(code) and is_shipped(owner)
        users = (module.module for module in self._network.module.modules() if isinstance(module, OwnNetwork))
        forward = f"forward of {type(next(users, self._network.module)).__name__}"
        if not loss.requires_grad:
            result = f"{forward} returns outputs" if shipped else f"{name} returns a {_kind(loss)}"
            raise UnfitStep(
                f"{result} without a graph, so that no gradient reaches the network: leave out "
                "what cuts the graph off (detach, no_grad, item, argmax, NumPy)."
            )
        # Later losses may diverge, and reading one makes a GPU wait.
        is_first = self._left == STEPS and batch.phase.round <= 0
        if is_first and not self._keep_going and not bool(torch.isfinite(loss)):
            raise UnfitStep(
                f"{name} returns {loss.item()} for the first batch of client {self._client.label}: mend the network, "
                "the loss or the samples."
            )

        # Every trained parameter must be reachable from the loss, and no foreign one.
        found, opaque = _leaves_of(loss)
        known = {id(tensor) for tensor in (*self._network.module.parameters(), *leaves([batch.inputs, batch.data]))}
        outside = [leaf for leaf in found if id(leaf) not in known]
        # A tensor that a loss makes to take its gradient is a new one in the next step.
        own = [leaf for leaf in outside if isinstance(leaf, nn.Parameter) or any(leaf is old for old in self._outside)]
        self._outside = outside if self._left > 1 else []
        if not opaque and {id(x) for x in self._network.trained_parameters}.isdisjoint(id(leaf) for leaf in found):
            result, way = f"{name} returns a loss", "compute it with the model and the outputs that it is given"
            if shipped:
                result, way = f"{forward} returns outputs", "compute them with layers and parameters of self"
            raise UnfitStep(
                f"{result} of none of the network's trained parameters{', only of others' * bool(own)}: {way}, as a "
                "run trains copies of the network."
            )
        text = (
            f"{forward if shipped else name} depends on trainable parameters that are not the network's "
            f"({first_of([str(list(leaf.shape)) for leaf in own], 3)}), which no optimiser steps and no message holds: "
            "make them layers of the network (those of a list by nn.ModuleList), or freeze them with "
            "requires_grad_(False)"
        )
        if own and is_shipped(owner):
            raise UnfitStep(f"{text}.")
        if own:
            self._client.warn("untrained-parameters", f"{text}; a method may also step them itself.")


def is_shipped(code: object) -> bool:
    return str(getattr(code, "__module__", "")).partition(".")[0] in ("fedkern", "torch")


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tensors(module: nn.Module, buffers: bool) -> dict[str, tuple[object, ...]]:
    """Return identity, memory and kind of every parameter, and of floating buffers if asked, by name."""
    floating = [(name, tensor) for name, tensor in module.named_buffers() if buffers and tensor.is_floating_point()]
    return {
        name: (id(x), 0 if x.is_meta else x.data_ptr(), x.requires_grad, x.dtype, x.device)
        for name, x in (*module.named_parameters(), *floating)
    }


def _hooks(module: nn.Module) -> dict[str, int]:
    modules = {name: sum(len(getattr(layer, kind)) for kind in _HOOKS) for name, layer in module.named_modules()}
    return modules | {name: len(tensor._backward_hooks or ()) for name, tensor in module.named_parameters()}


def _leaves_of(loss: Tensor) -> tuple[list[Tensor], bool]:
    """Return the leaves of a loss's graph, and whether a function may hide others (a reentrant checkpoint)."""
    found: list[Tensor] = [] if loss.grad_fn is not None else [loss]
    opaque, seen, waiting = False, {loss.grad_fn}, [loss.grad_fn] if loss.grad_fn is not None else []
    while waiting:
        node: Any = waiting.pop()
        if isinstance(node, BackwardCFunction):
            opaque |= not node._forward_cls.__module__.startswith("fedkern.")  # type: ignore[attr-defined]
        elif node.name() == "torch::autograd::AccumulateGrad":
            found.append(node.variable)
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        waiting += new
    return found, opaque
