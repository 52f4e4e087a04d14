"""User-defined networks: making any module, and using it as a classifier of the run."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.acceleration import plain
from fedkern.acceleration.calls import call_parts
from fedkern.acceleration.pending import compute_pending
from fedkern.errors import UserError
from fedkern.messages.leaves import Keywords, Positional, leaves, map_leaves
from fedkern.models.networks.staged import StagedNetwork
from fedkern.models.networks.unet import UNet
from fedkern.models.precision import autocasts, reduced_dtype, to_fp32
from fedkern.models.users.cutting import Cut, NotCut, find_cut, find_head, find_logits, move_weights
from fedkern.ops._core.layout import plain_strides
from fedkern.ops._core.private_torch import functorch_active
from fedkern.streams import seeded_generators
from fedkern.usercode import named_code
from fedkern.usercode.named_code import Named, host_code

N = TypeVar("N", bound=nn.Module)
X = TypeVar("X")
Y = TypeVar("Y")
GIVEN = ("classes", "channels", "image_size", "width", "seed")
"""Arguments that a class or function gets by name if its signature has them."""

LEVELS = ("logits", "features", "maps", "stages")
"""Abilities of a network that a method may need, each with all before: logits; features and their classifier; stages
that can be left and entered; stages that are modules."""


class OwnNetwork(nn.Module):
    """User-defined module as a classifier.

    The state dict has the module's own names.  The parameters keep their memory format, and images arrive with the
    strides that a DataLoader gives: a user's code may call ``view`` on all maps.

    Attributes:
        module: the user's module.

    Args:
        module: gives logits, or an object or mapping with ``logits``.
        head: name of the linear layer that gives the logits, or None.
    """

    own = True

    def __init__(self, module: nn.Module, head: str | None = None) -> None:
        nn.Module.__init__(self)
        self.module: Any = module
        self._head = head
        self._changes_inputs: dict[Any, bool] = {}  # by kind of call

    @property
    def head(self) -> Any:
        """The linear classifier ``[B, d] -> [B, C]``.

        Raises:
            AttributeError: no linear layer gives the logits.
        """
        if self._head is None:
            raise AttributeError("head: the logits of this network are not the result of a linear layer")
        return self.module.get_submodule(self._head)

    @autocasts
    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = find_logits(self._call_on_copy(self.module, plain_strides(x)))
        return logits

    def _call_on_copy(self, call: Callable[[X], Y], x: X, part: object = None) -> Y:
        """Call ``module``, or a part of it, so that its changes to the inputs in place do not reach the caller.

        The first call of a kind works on a copy and finds out whether later calls need one.
        """
        kind = part, self.training, torch.is_grad_enabled()
        changes = self._changes_inputs.get(kind)
        if changes is False or (changes is None and not _comparable(x)):
            return call(x)
        copies = map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, x)
        output = call(copies)
        if changes is None:
            pairs = zip(_tensors(copies), _tensors(x), strict=True)
            self._changes_inputs[kind] = any(copy._version or not torch.equal(copy, leaf) for copy, leaf in pairs)
        return output

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, classes]`` (or ``[B, classes, H, W]``) of images ``[B, C, H, W]``."""
        return to_fp32(self._logits(x))

    def features(self, x: Tensor) -> Tensor:
        """Return the classifier's input ``[B, d]`` for images ``[B, C, H, W]``."""
        inputs_of_head: list[Tensor] = []

        def remember(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            inputs_of_head.append(compute_pending(inputs[0]))

        remember.takes_computed = True  # type: ignore[attr-defined]
        with self.head.register_forward_pre_hook(remember):
            self._logits(x)
        return to_fp32(inputs_of_head[-1])

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the module's own state dict."""
        return self.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}module.{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ItemNetwork(OwnNetwork):
    """User-defined module for samples of any kind, with ``raw`` output for a user-defined loss, or logits."""

    def __init__(self, module: nn.Module, head: str | None, raw: bool = False) -> None:
        super().__init__(module, head)
        self.raw = raw

    @autocasts
    def _logits(self, x: Any) -> Any:
        output = self._call_on_copy(self._call, x)
        return output if self.raw else find_logits(output)

    def _call(self, x: object) -> Any:
        if isinstance(x, Positional):
            return self.module(*x)
        return self.module(**x) if isinstance(x, Keywords) else self.module(x)

    def forward(self, x: Any) -> Any:
        output = self._logits(x)
        if reduced_dtype() is None:
            return output
        return map_leaves(
            lambda leaf: to_fp32(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, output
        )


class StagedOwn(OwnNetwork, StagedNetwork):  # type: ignore[override]
    """User-defined module of submodules that run one after another, which can be entered and left between stages."""

    def __init__(self, module: nn.Module, cut: Cut) -> None:
        super().__init__(module, cut.head)
        self._cut = cut
        self.stage_names = tuple(name for name, _ in cut.stages)
        self.width = self.head.in_features

    def stage(self, name: str) -> nn.Sequential:
        pieces = dict(self._cut.stages)[name]
        return nn.Sequential(*(self.module.get_submodule(piece) if piece else nn.Flatten() for piece in pieces))

    @property
    def pooling(self) -> nn.Module:
        return nn.Sequential(*self.stage("feature"), nn.Flatten())

    @property
    def maps(self) -> tuple[str, ...]:
        return self.stage_names[: self._cut.maps]

    @autocasts
    def _run(self, x: Tensor, begin: int, last: int) -> Tensor:
        if 0 < begin <= last and self.stage_names[begin - 1] in self._cut.changed:
            x = x.clone()  # the caller's map must not change
        if begin == 0:
            x = self._call_on_copy(lambda x: call_parts(self.module, self._pieces, x, 0, last), plain_strides(x), last)
        else:
            x = call_parts(self.module, self._pieces, x, begin, last)
        return to_fp32(x) if last == len(self.stage_names) - 1 else x

    def _pieces(self, x: Tensor, begin: int, last: int) -> Tensor:
        for _, pieces in self._cut.stages[begin : last + 1]:
            for piece in pieces:
                x = self.module.get_submodule(piece)(x) if piece else x.flatten(1)
        return x

    features = StagedNetwork.features


def _tensors(x: object) -> list[Tensor]:
    return [leaf for leaf in leaves(x) if isinstance(leaf, Tensor)]


def _comparable(x: object) -> bool:
    """Return whether the values of a batch can be read now: not while a call is traced or recorded."""
    tensors = _tensors(x)
    if not tensors or torch.compiler.is_compiling() or torch.jit.is_tracing() or functorch_active():
        return False
    is_plain = all(type(leaf) is Tensor and not leaf.is_meta and not leaf.is_inference() for leaf in tensors)
    return is_plain and not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


def find_level(network: nn.Module) -> str:
    """Return the best of ``LEVELS`` that a network offers to methods."""
    if isinstance(network, StagedNetwork):
        return "stages"
    if len(getattr(network, "stage_names", ())) > 1:
        return "maps"
    return "features" if hasattr(network, "features") and hasattr(network, "head") else "logits"


class Own:
    """Maker of a user-defined network from a class, a function or a module.

    A pickle holds the name of the code, which the other process imports.

    Attributes:
        source: a class or function that returns a module, or the module itself, which is copied with its weights.
        text: the network's name in messages.
        named: location of the code; None for a registered class or function, and for a module.
        sha256: of the file with the code, if any.

    Raises:
        UserError: ``source`` is neither, or needs an argument that it does not get.
    """

    def __init__(
        self,
        source: Callable[..., nn.Module] | nn.Module,
        text: str,
        *,
        named: Named | None = None,
        sha256: str | None = None,
    ) -> None:
        self.source, self.text, self.named, self.sha256 = source, text, named, sha256
        self._cuts: dict[Any, Cut | str | None] = {}
        self._latest: tuple[Any, nn.Module] | None = None
        self.takes: tuple[str, ...] = () if isinstance(source, nn.Module) else self._arguments()

    def __reduce__(self) -> tuple[object, ...]:
        cuts = {"_cuts": self._cuts}
        if self.named is not None:
            return _open_again, (self.named, self.sha256), cuts
        return Own, (self.source, self.text), cuts

    def _arguments(self) -> tuple[str, ...]:
        if not callable(self.source):
            raise UserError(
                f"the model {self.text} is {type(self.source).__name__}, not a class or function that returns an "
                "nn.Module."
            )
        try:
            parameters = inspect.signature(self.source).parameters.values()
        except (TypeError, ValueError):
            return ()
        stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        for entry in parameters:
            by_name = entry.kind is not inspect.Parameter.POSITIONAL_ONLY
            if entry.default is entry.empty and entry.kind not in stars and not (by_name and entry.name in GIVEN):
                raise UserError(
                    f"the model {self.text} needs the argument {entry.name}, and gets only {', '.join(GIVEN)}, by "
                    f"name: give {entry.name} a default."
                )
        return tuple(parameter.name for parameter in parameters if parameter.name in GIVEN)

    def __call__(
        self, *, classes: int, channels: int, sides: Sequence[int], seed: int, word: int, width: int | None
    ) -> Any:
        """Make the network on the CPU, with initial weights from the seed ``word``."""
        module = self._copy(classes, channels, min(sides), seed, word, width)
        if isinstance(module, (StagedNetwork, UNet)):
            return self._mark_scalable(module)
        key = classes, channels, tuple(sides), width
        if key not in self._cuts:
            images = torch.randn((2, channels, *sides), generator=torch.Generator().manual_seed(0))
            self._cuts[key] = self._cut(module, images)
        cut = self._cuts[key]
        return self._mark_scalable(StagedOwn(module, cut) if isinstance(cut, Cut) else OwnNetwork(module, cut))

    def on_items(
        self, *, classes: int, seed: int, word: int, width: int | None, head: str | None, raw: bool
    ) -> ItemNetwork:
        """Make the network for samples of any kind, on the CPU, with `ItemNetwork`'s arguments."""
        return self._mark_scalable(ItemNetwork(self._copy(classes, None, None, seed, word, width), head, raw))

    def _mark_scalable(self, network: N) -> N:
        convolutions = any(isinstance(layer, nn.Conv2d) for layer in network.modules())
        setattr(network, "scales", "width" in self.takes and convolutions)  # noqa: B010 (no tensor or module)
        return network

    def _copy(self, *arguments: Any) -> nn.Module:
        """Return a copy of :meth:`_module`, because the code may be slow, for example to read pretrained weights."""
        if self._latest is None or self._latest[0] != arguments:
            module = self._module(*arguments)
            _check_modes(self._copy_module(module), self.text)
            self._latest = arguments, module
        return self._copy_module(self._latest[1])

    def _module(
        self, classes: int, channels: int | None, side: int | None, seed: int, word: int, width: int | None
    ) -> nn.Module:
        if width is not None and "width" not in self.takes:
            raise UserError(f"--width {width} is not for {self.text}, which takes no argument width: leave width out.")
        if isinstance(self.source, nn.Module):
            check_bare(self.source, self.text)
            module = self._copy_module(self.source).cpu()
            module.train(True)  # may freeze parts, which then count as frozen from the beginning
            return module
        values = {"classes": classes or None, "channels": channels, "image_size": side, "seed": seed, "width": width}
        for name in [name for name in self.takes if values[name] is None]:
            if inspect.signature(self.source).parameters[name].default is inspect.Parameter.empty:
                way = "give one with --width" if name == "width" else "the data name none, so give it a default"
                raise UserError(f"the model {self.text} needs the argument {name}: {way}.")
        with seeded_generators(word), host_code(self.named.file if self.named else ""):
            try:
                module = self.source(**{name: values[name] for name in self.takes if values[name] is not None})
            except UserError:
                raise
            except (Exception, SystemExit) as error:
                raise UserError(f"the model {self.text} cannot be made: {type(error).__name__}: {error}.") from error
        if not isinstance(module, nn.Module):
            raise UserError(f"the model {self.text} gives {type(module).__name__}, not an nn.Module.")
        check_module(module, self.text)
        module.train(True)  # a user-defined train() may return None
        return module.cpu()

    def _copy_module(self, module: nn.Module) -> nn.Module:
        try:
            return plain(copy.deepcopy(module))  # as after the pickling for workers
        except Exception as error:  # a module may hold anything
            raise UserError(
                f"the model {self.text} cannot be copied, and every client has a copy: {type(error).__name__}: {error}."
            ) from None

    def _cut(self, module: nn.Module, images: Tensor) -> Cut | str | None:
        attributes = (getattr(owner, "stages", None) for owner in (module, self.source))
        declared = next((stages for stages in attributes if stages is not None and not callable(stages)), None)
        try:
            return find_cut(module, images, declared)
        except NotCut as error:
            if declared is not None:
                raise UserError(
                    f"the model {self.text} has an attribute stages, but cannot be cut there, as {error}: leave the "
                    "attribute out, or call the modules one after another in forward."
                ) from None
        except UserError as error:
            raise UserError(f"the model {self.text}: {error}") from None
        except Exception:  # the run reports unsuitable images by itself
            return None
        try:
            return find_head(module, images)
        except Exception:
            return None


def _open_again(named: Named, sha256: str | None) -> Own:
    maker = load_maker(named)
    if maker.sha256 != sha256:
        raise UserError(f"the model {named} has changed since the run began")
    return maker


def load_maker(named: Named) -> Own:
    source, digest = named_code.load(named, "the model")
    if isinstance(source, nn.Module):
        raise UserError(f"the model {named} is a module, not a class or function: write a function that returns it.")
    return Own(source, str(named), named=named, sha256=digest)


def unwrap_module(module: Any) -> Any:
    """Return the module inside of DataParallel and torch.compile, for the names of its state dict."""
    while isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(module, "_orig_mod"):
        module = module._orig_mod if hasattr(module, "_orig_mod") else module.module
    return module


def check_bare(module: nn.Module, text: str) -> None:
    """Raise UserError if a part of a module is wrapped, which adds a prefix to names in the state dict."""
    wrappers = nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule
    for name, part in module.named_modules():
        if isinstance(part, wrappers) or hasattr(part, "_orig_mod"):
            raise UserError(
                f"the model {text}{name and f', its {name},'} is wrapped in {type(part).__name__}: give the module "
                "inside (._orig_mod after torch.compile, .module after DataParallel; of TorchScript the source)."
            )


def check_module(module: nn.Module, text: str) -> None:
    check_bare(module, text)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise UserError(
                f"the model {text} has lazy layers ({name} has no shape yet): call it once on a batch before it is "
                "returned."
            )
        if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            raise UserError(
                f"the model {text} has {name}, which is no plain tensor with values: give it an ordinary one."
            )
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype is not torch.float32:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"the model {text} has {name} in {kind}: only float32 is trained, call .float() on it.")
    for name, tensor in module.named_buffers():
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            raise UserError(f"the model {text} has {name}, an expanded tensor, which cannot be loaded: clone() it.")
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(f"the model {text} has {name} in its state dict, which is no tensor and cannot be saved.")
        if name == "__metadata__" or name.encode(errors="ignore").decode() != name:
            raise UserError(f"the model {text} has {name!r} in its state dict, and no file holds that name: rename it.")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise UserError(f"the model {text} has no parameters that require gradients, so there is nothing to train.")


def _check_modes(module: nn.Module, text: str) -> None:
    """Raise UserError if ``eval()`` changes the tensors of the module (a copy), which messages are written into."""
    modes = [getattr(layer, name) for layer in module.modules() for name in ("train", "eval")]
    if all(getattr(mode, "__func__", mode) in (nn.Module.train, nn.Module.eval) for mode in modes):
        return
    module.train(True)  # a user-defined mode may have no default
    trial = move_weights(module)  # merged weights may begin at zero
    before, memory = _weights_of(trial), _memory_of(trial)
    trial.eval()
    after, memory_after = _weights_of(trial), _memory_of(trial)
    unchanged = {name for name in before.keys() & after.keys() if torch.equal(before[name], after[name])}
    changed = [name for name in {**before, **after} if name not in unchanged]
    if changed := changed + [name for name, place in memory.items() if memory_after.get(name) != place]:
        raise UserError(
            f"eval() of the model {text} changes {changed[0]}, and clients and server exchange weights in train mode: "
            "give adapters merge_weights=False, or leave the weights as they are in eval()."
        )


def _weights_of(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(module.named_parameters()), **module.state_dict()}
    return {name: tensor.detach().clone().nan_to_num() for name, tensor in tensors.items()}


def _memory_of(module: nn.Module) -> dict[str, int]:
    return {name: buffer.data_ptr() for name, buffer in module.named_buffers()}


@torch.no_grad()
def check_output(network: nn.Module, text: str, form: Any, output: Sequence[int], classes: int, source: str) -> None:
    """Raise UserError if a network has no logits for the classes of the data, and leave it in train mode."""
    images = form.noise(2, np.random.default_rng(0))
    network.eval()
    try:
        logits = network(images)
    except Exception as error:  # a network's code may raise anything
        reason = str(error).strip().split("\n")[0].rstrip(".")
        way = " (they are uint8: begin the network with x.float() / 255, or let the data set give floats)"
        raise UserError(
            f"the network {text} cannot take the images of {source}, {'x'.join(map(str, form.shape))} "
            f"(channels, height, width): {type(error).__name__}: {reason}{way * form.feeds_bytes}."
        ) from None
    network.train()
    expected = [2, *output]
    if not isinstance(logits, Tensor):
        raise UserError(
            f"the network {text} must give a tensor of logits, or an object with the attribute logits, and gives "
            "neither."
        )
    if list(logits.shape) != expected:
        way = "let it take the argument classes" if logits.shape[1:2] != (classes,) else (
            "let it give logits of every pixel" if len(expected) == 4 else "let it give one row of logits an image"
        )  # fmt: skip
        raise UserError(
            f"the network {text} gives {list(logits.shape)} for 2 images, where the {classes} classes of "
            f"{source} need {expected}: {way}."
        )
    if not bool(torch.isfinite(logits).all()):
        raise UserError(f"the network {text} gives values that are not finite for random images.")


def channels_last(module: nn.Module) -> bool:
    is_own = any(getattr(part, "own", False) is True for part in module.modules())
    return not is_own and any(parameter.dim() == 4 for parameter in module.parameters())
