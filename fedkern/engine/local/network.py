"""Network whose parameters, buffers and gradients are flat vectors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkern import ops
from fedkern.errors import UserError
from fedkern.methods.base import VECTORS
from fedkern.models.pretrained.weight_files import bare_names, describe_misfits
from fedkern.models.state import freezing
from fedkern.models.state.freezing import constant_buffers, freeze_bn_after, frozen_norms, train_mode
from fedkern.models.users.python_state import hash_attributes
from fedkern.models.users.user_models import channels_last
from fedkern.tasks.user_tasks import user_module


class Network:
    """A module on a device, flattened. Convolutional weights are channels-last, so images should be too.

    Attributes:
        parameters: fp32 [P], a view of the trained parameters that travel.
        personal: fp32 [A], a view of the trained parameters that a client keeps to itself.
        frozen: fp32 [F], a view of the untrained parameters, which no message holds.
        buffers: fp32 [Q], a view of the floating buffers (running statistics) that travel.
        constants: layer, key, tensor and initial value of every buffer that no message holds.
        statistics: False if the buffers hold nothing meaningful, so that eval mode must use the batch's statistics.
        fixed: whether batch norm trains with the statistics in the buffers, unchanged.
        attributes: Python state of users' modules when the network is made.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module = place(module, device)
        self._flat = freezing.flatten(module)
        self.parameters: Tensor = self._flat.parameters
        self.personal: Tensor = self._flat.personal
        self._own = freezing.tensors(user_module(module))
        self.frozen: Tensor = self._flat.frozen
        self.buffers: Tensor = self._flat.buffers
        self.constants = []
        for path, _, key in (name.rpartition(".") for name in constant_buffers(module)):
            layer = module.get_submodule(path)
            self.constants.append((layer, key, layer.get_buffer(key), layer.get_buffer(key).clone()))
        self._still = frozen_norms(module) if len(self.frozen) else []
        self._gradients: tuple[Tensor, ...] = ()
        # A causal mask, for example, is infinite without divergence.
        infinite = self.buffers.isinf()
        self._infinite = infinite if bool(infinite.any()) else None
        self._personal_buffers = self._flat.personal_buffers
        self._infinite_personal = self._personal_buffers.isinf()
        self._lacking: list[tuple[_BatchNorm, bool]] = []
        """Layers that evaluate by the batch's statistics, and their ``track_running_stats`` before."""
        self.statistics = True
        self.fixed = self._untrained = False
        self.attributes = hash_attributes(module)

    @property
    def places(self) -> dict[str, dict[str, slice]]:
        """Slices of each tensor in the vectors of :meth:`read`, by vector and name."""
        return self._flat.places()

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @property
    def gradients(self) -> Tensor:
        """Gradients of ``parameters``, fp32 [P]. Every parameter's ``.grad`` is a view of its part."""
        return self.gradient_vectors[0]

    @property
    def gradient_vectors(self) -> tuple[Tensor, ...]:
        """``gradients``, and the gradients fp32 [A] of ``personal``, if any."""
        if not self._gradients:
            self.attach_gradients()
        return self._gradients

    def attach_gradients(self) -> None:
        personal_gradients = (self._flat.personal_gradients(),) if len(self.personal) else ()
        self._gradients = (self._flat.gradients(), *personal_gradients)

    def finite(self) -> Tensor:
        """Return bool 0-d: whether all parameters and buffers are finite, except buffers infinite from the start."""
        finite = all_finite(self.parameters) & (self.finite_buffers() if len(self.buffers) else True)
        kept = self._personal_buffers
        if len(self.personal) or len(kept):
            finite &= (
                all_finite(self.personal) & (torch.isfinite(kept) | (self._infinite_personal & ~kept.isnan())).all()
            )
        return finite

    def finite_buffers(self, part: slice = slice(None)) -> Tensor:
        buffers = self.buffers[part]
        if self._infinite is None:
            return all_finite(buffers)
        return (torch.isfinite(buffers) | (self._infinite[part] & ~buffers.isnan())).all()

    def read(self) -> dict[str, Tensor]:
        """Return copies of ``parameters`` fp32 [P], ``buffers`` fp32 [Q] and ``integers`` int64 [R], if not empty."""
        optional = {"buffers": self.buffers.clone(), "integers": self._flat.integers}
        return {"parameters": self.parameters.clone(), **{name: x for name, x in optional.items() if x.numel()}}

    def write(self, message: Mapping[str, Tensor]) -> None:
        """Copy a message's vectors into the network, and reset its ``constants``."""
        for layer, name, buffer, value in self.constants:
            layer._buffers[name] = buffer.copy_(value)
        self._flat.load_vectors(message)

    def read_personal(self) -> dict[str, Tensor]:
        return freezing.copies(self._own)

    def write_personal(self, tensors: Mapping[str, Tensor]) -> None:
        freezing.write(self._own, tensors)

    def take(self, module: nn.Module) -> None:
        """Copy a module's tensors into the network by name, except frozen ones."""
        target = user_module(self.module)
        state = target.state_dict()
        source = bare_names(user_module(module).state_dict(), state)
        fixed = {name for name, parameter in target.named_parameters() if not parameter.requires_grad}
        fixed |= {*constant_buffers(target)}
        if unfit := describe_misfits(state, source):
            raise UserError(f"The trained network is no longer the run's: {next(iter(unfit.values()))}.")
        target.load_state_dict({name: state[name] if name in fixed else source[name] for name in state})

    @torch.no_grad()  # tensors that eval() derives must be copyable
    def eval_mode(self) -> None:
        """Put the module in eval mode.

        Without meaningful running statistics, each batch norm that learns them uses the batch's statistics.
        """
        self.train_mode()  # so that eval() derives others from the weights written since
        learning = [layer for layer in self.module.modules() if isinstance(layer, _BatchNorm) and layer.training]
        self.module.eval()
        for layer in learning if not self.statistics else ():
            self._lacking.append((layer, layer.track_running_stats))
            layer.track_running_stats, layer.training = False, True

    def train_mode(self) -> None:
        """Put the module in train mode, but frozen batch norm and fixed statistics in eval mode."""
        for layer, tracks in self._lacking:
            layer.track_running_stats = tracks
        self._lacking.clear()
        self.module.train()
        for layer in self._still:
            layer.eval()
        if self.fixed:
            freeze_bn_after(self.module)
        if self._untrained:
            self.module.requires_grad_(False)  # a user's train() may thaw parts

    def freeze(self) -> None:
        """Freeze all parameters, unless some are frozen already (offsets would change)."""
        if not len(self.frozen):
            self._untrained = True
            self.module.requires_grad_(False)


class NetworkPart:
    """The trained part of a network: submodules that are neighbours in the network's vectors.

    The other submodules stay in eval mode. The method's loss has to keep gradients from them.

    Attributes:
        module: the whole network.
        parameters, gradients: fp32 [P'], views of the part's parameters and their gradients.
    """

    def __init__(self, network: Network, names: Sequence[str]) -> None:
        self.module, self.names, self._network = network.module, tuple(names), network
        children = dict(network.module.named_children())
        if missing := [name for name in names if name not in children]:
            raise ValueError(f"parts: expected names of {', '.join(children)}, given {', '.join(missing)}")
        self.trained_parameters = [x for name in names for x in children[name].parameters() if x.requires_grad]
        self._stretches = {kind: _stretch(network.places[kind], self.names) for kind in VECTORS}
        self.parameters = network.parameters[self._stretches["parameters"]]
        self.gradients = network.gradients[self._stretches["parameters"]]
        self.gradient_vectors = (self.gradients,)
        self.attach_gradients = network.attach_gradients

    def train_mode(self) -> None:
        self._network.train_mode()
        for name, child in self.module.named_children():
            if name not in self.names:
                child.eval()

    def finite(self) -> Tensor:
        return all_finite(self.parameters) & self._network.finite_buffers(self._stretches["buffers"])

    def read(self) -> dict[str, Tensor]:
        vectors = self._network.read()
        result = {name: vectors[name][where].clone() for name, where in self._stretches.items() if name in vectors}
        return {name: vector for name, vector in result.items() if vector.numel()}


def _stretch(places: Mapping[str, slice], names: tuple[str, ...]) -> slice:
    inside = [name.partition(".")[0] in names for name in places]
    if not any(inside):
        return slice(0, 0)
    begin, end = inside.index(True), len(inside) - inside[::-1].index(True)
    if not all(inside[begin:end]):
        raise ValueError(f"parts: expected neighbours in the network's vectors, given {', '.join(names)}")
    slices = list(places.values())[begin:end]
    return slice(slices[0].start, slices[-1].stop)


class Trainable:
    """A module whose parameters that require gradients are one flat vector.

    Attributes:
        parameters, gradients: fp32 [P], views of the trained parameters and their gradients.
        fixed: as for :class:`Network`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.fixed = False
        if not (trained := [parameter for parameter in module.parameters() if parameter.requires_grad]):
            raise ValueError("module: expected a parameter that requires gradients, given none")
        self._flat = ops.FlatParameters(nn.ParameterList(trained))
        self.trained_parameters = trained
        self.parameters: Tensor = self._flat.parameters
        self.gradients: Tensor = self._flat.gradients()
        self.gradient_vectors = (self.gradients,)
        self.attach_gradients = self._flat.gradients

    def train_mode(self) -> None:
        train_mode(self.module)
        if self.fixed:
            freeze_bn_after(self.module)

    def finite(self) -> Tensor:
        buffers = (buffer for buffer in self.module.buffers() if buffer.is_floating_point())
        return torch.stack([all_finite(tensor) for tensor in (self.parameters, *buffers)]).all()

    def release(self) -> None:
        for parameter in self.trained_parameters:
            parameter.grad = None


Trained = Network | NetworkPart | Trainable
"""Object of a training loop: a flat network, a part of it, or a module."""


def all_finite(tensor: Tensor) -> Tensor:
    """Return bool 0-d: whether no element is NaN or infinite, in a pass that writes nothing."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return torch.stack(torch.aminmax(tensor)).isfinite().all()  # NaN is both


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module to a device, with channels-last convolutional weights in built-in networks."""
    layout: dict[str, Any] = {"memory_format": torch.channels_last} if channels_last(module) else {}
    return module.to(device, **layout)
