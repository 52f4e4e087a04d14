"""Registry of networks by name, which builds and initialises them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from fedkern.errors import UserError, suggest_name
from fedkern.models.networks.cnn import CNN, RandomFilters
from fedkern.models.networks.efficientnet import EfficientNetB0
from fedkern.models.networks.mlp import MLP
from fedkern.models.networks.mobilenet import MobileNetV2
from fedkern.models.networks.resnet import ResNet, ResNet8T, Stem
from fedkern.models.networks.staged import StagedNetwork
from fedkern.models.networks.unet import UNet
from fedkern.models.networks.vit import ViT
from fedkern.models.state.allocate import allocate
from fedkern.models.users.user_models import Own, load_maker
from fedkern.streams import stream
from fedkern.usercode import named_code
from fedkern.usercode.named_code import FORMS
from fedkern.usercode.registry import Registry, name_of

# Up to this size the ImageNet stem (which divides the size by 4) would leave the last stage a map of one or two pixels.
CIFAR_STEM_UP_TO = 64


Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class ModelEntry:
    """Network in ``MODELS``: its line in the command ``list``, and how :func:`build` makes it.

    Attributes:
        name: the name on the command line.
        description: one line.
        width: default number of channels of the first stage; None for a user-defined network.
        smallest: smallest image side in pixels that leaves every stage at least one position.
        make: builds the module: ``make(classes=, channels=, width=, stem=)``.  A :class:`fedkern.models.Own`
            initialises the module too.
        sized: whether ``make`` also takes ``image_size=``, the images' smaller side.
        gives: logits of ``"classes"`` of an image, of ``"pixels"``, or ``"any"`` for a user-defined network, whose
            output is checked.
    """

    name: str
    description: str
    width: int | None
    smallest: int
    make: Callable[..., StagedNetwork | UNet] | Own
    sized: bool = False
    gives: str = "classes"

    @property
    def code(self) -> Callable[..., nn.Module] | None:
        """The class or function that a user has registered, or None."""
        return self.make.source if isinstance(self.make, Own) and not isinstance(self.make.source, nn.Module) else None


def _any_size(make: Callable[..., Network]) -> Callable[..., Network]:
    """Drop the argument ``stem`` of networks with the same first layers for images of any size."""

    def make_without_stem(*, stem: Stem, **settings: Any) -> Network:
        return make(**settings)

    return make_without_stem


_cnn, _filters, _mlp, _vit = _any_size(CNN), _any_size(RandomFilters), _any_size(MLP), _any_size(ViT)
_unet, _unet_small = _any_size(partial(UNet, depth=4)), _any_size(partial(UNet, depth=3))
_resnet8, _resnet10, _resnet18 = (partial(ResNet, blocks) for blocks in ((1, 1, 1), (1, 1, 1, 1), (2, 2, 2, 2)))


def group_norm(make: Callable[..., Network]) -> Callable[..., Network]:
    """Wrap ``make`` to give the same network with group norm (Wu and He, arXiv 1803.08494) in place of batch norm.

    Samples are then independent, as per-sample gradients need.  A layer has at most 32 groups, of at least four
    channels.
    """

    def make_with_groups(**settings: Any) -> Network:
        network = make(**settings)
        for module in list(network.modules()):
            for name, layer in list(module.named_children()):
                if isinstance(layer, nn.BatchNorm2d):
                    channels = layer.num_features
                    groups = max(n for n in range(1, min(32, max(1, channels // 4)) + 1) if channels % n == 0)
                    setattr(module, name, nn.GroupNorm(groups, channels))
        return network

    return make_with_groups


_SHIPPED = {
    entry.name: entry
    for entry in (
        ModelEntry("cnn", "three 3x3 convolutions of 32, 64 and 128 channels, batch norm, 95 thousand parameters", 32,
                   8, _cnn),
        ModelEntry("resnet8", "ResNet of 3 basic blocks, 16, 32 and 64 channels, 78 thousand parameters", 16, 4,
                   _resnet8),
        ModelEntry("resnet8-t", "FedIOD's ResNet-8: 128 to 512 channels, pooled to 2x2, 4.9 million parameters", 128,
                   8, ResNet8T),
        ModelEntry("resnet18", "ResNet-18, CIFAR stem up to 64 pixels, ImageNet stem above, 11.2 million parameters",
                   64, 8, _resnet18),
        ModelEntry("mobilenetv2", "MobileNetV2, fewer strides up to 64 pixels, 2.2 million parameters", 32, 8,
                   MobileNetV2),
        ModelEntry("efficientnet-b0", "EfficientNet-B0, one stride fewer up to 64 pixels, 4.0 million parameters", 32,
                   16, EfficientNetB0),
        ModelEntry("resnet10", "ResNet-18 with one basic block per stage, 4.9 million parameters", 64, 8, _resnet10),
        ModelEntry("cnn-gn", "cnn with group norm, for DP-SGD", 32, 8, group_norm(_cnn)),
        ModelEntry("resnet8-gn", "resnet8 with group norm, for DP-SGD", 16, 4, group_norm(_resnet8)),
        ModelEntry("resnet18-gn", "resnet18 with group norm, for DP-SGD", 64, 8, group_norm(_resnet18)),
        ModelEntry("mlp", "three hidden layers of 256 units with batch norm, for small images", 256, 1, _mlp,
                   sized=True),
        ModelEntry("random-filters", "32 random 3x3 filters averaged over a 4x4 grid, for fedcgs", 32, 4, _filters),
        ModelEntry("vit-tiny", "vision transformer of 12 layers and width 192 (DeiT-Ti), 5.4 million parameters", 192,
                   8, _vit, sized=True),
        ModelEntry("unet", "U-Net of depth 4 with batch norm for segmentation, 1.9 million parameters", 16, 16, _unet,
                   gives="pixels"),
        ModelEntry("unet-small", "U-Net of depth 3 and width 8 for segmentation, 121 thousand parameters", 8, 8,
                   _unet_small, gives="pixels"),
        ModelEntry("unet-small-gn", "unet-small with group norm, for DP-SGD", 8, 8, group_norm(_unet_small),
                   gives="pixels"),
    )
}  # fmt: skip
MODELS: Registry[ModelEntry] = Registry("model", _SHIPPED, code=lambda entry: entry.code)
_GIVES = {"classes": "classes of images", "pixels": "classes of pixels"}


F = TypeVar("F", bound=Callable[..., nn.Module])


def register_model(name: str) -> Callable[[F], F]:
    """Decorate a class or function that makes a network, so that ``--model NAME`` and ``RunConfig.make`` know it.

    The function gets the arguments ``classes``, ``channels``, ``image_size``, ``width`` and ``seed`` if its signature
    has them.  It returns an ``nn.Module`` with logits ``[B, classes]`` (``[B, classes, H, W]`` for segmentation).

    Args:
        name: letters, digits, ``_``, ``-`` and ``.``; no other model may have it.

    Raises:
        UserError: the name is taken or has other characters, or the signature needs another argument.
    """

    def add(make: F) -> F:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise UserError(f'"{name}" cannot be a model\'s name: use letters, digits, "_", "-" and ".".')
        if not MODELS.takes(name, make):
            raise UserError(f'there is a model "{name}" already: register yours by another name.')
        description = MODELS.describe(name, make, f"{name_of(make)} of {make.__module__}")
        MODELS[name] = ModelEntry(name, description, None, 1, Own(make, name), gives="any")
        return make

    return add


@contextmanager
def available(name: str, module: nn.Module | None = None) -> Iterator[None]:
    """Add a run's unregistered network to ``MODELS`` inside the block.

    Args:
        name: a registered name; code, ``FILE.py:NAME`` or ``MODULE:NAME``, which is imported; or the name that
            ``module`` gets.
        module: a user-defined network, or a class or function that makes one.

    Raises:
        UserError: the code cannot be imported.
    """
    location = named_code.parse(name) if name not in MODELS else None
    if module is None and location is None:
        yield
        return
    make = load_maker(location) if location is not None and module is None else Own(module, name)  # type: ignore[arg-type]
    MODELS[name] = ModelEntry(name, "a network of your own", None, 1, make, gives="any")
    try:
        yield
    finally:
        MODELS.pop(name, None)


def list_added(settings: str) -> tuple[ModelEntry, ...]:
    """Return the added or replaced entries of ``MODELS`` with names in the text ``settings``."""
    entries = [entry for name, entry in MODELS.items() if entry is not _SHIPPED.get(name) and name in settings]
    # Entries of files first: another process runs them, and they may define the others.
    return tuple(sorted(entries, key=lambda entry: not isinstance(entry.make, Own) or entry.make.named is None))


def explain_unknown(name: str, title: str | None = None) -> str:
    if named_code.parse(name) is not None:
        return (
            f"{name} is code: register that network with @fedkern.register_model(NAME) and give its name here, or give "
            "the code to --model."
        )
    name = title or name
    if name.endswith((".pt", ".pth", ".safetensors")):
        return f'"{name}" is a file of weights: name their network with --model, and the file with --init.'
    if ".py" in name:
        return f'"{name}" names no network: write FILE.py:NAME, with a class or function that returns an nn.Module.'
    return f'there is no model "{name}", choose one of {", ".join(MODELS)}, or {FORMS}.{suggest_name(name, MODELS)}'


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter and buffer of ``module`` its starting value, drawing from ``generator`` alone.

    Convolutions are normal with variance 2 / fan_out, counted within a group (He et al., arXiv 1502.01852).  Linear
    layers are uniform in ±1 / sqrt(fan_in), and norms are the identity.  A layer of another type with parameters needs
    a method ``initialise(generator)``.

    Raises:
        TypeError: a layer of another type has a parameter or buffer, but no such method.
    """
    for name, layer in module.named_modules():
        if callable(getattr(layer, "initialise", None)):
            layer.initialise(generator)
        elif isinstance(layer, nn.Conv2d):
            fan_out = layer.weight.numel() // layer.in_channels
            nn.init.normal_(layer.weight, std=math.sqrt(2) / math.sqrt(fan_out), generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            layer.reset_parameters()
        elif any(True for _ in layer.parameters(recurse=False)) or any(True for _ in layer.buffers(recurse=False)):
            raise TypeError(f"no initial value is known for {type(layer).__name__} at {name or 'the root'!r}")


def build(
    name: str,
    *,
    classes: int,
    channels: int,
    image_size: int,
    seed: int | torch.Generator,
    width: int | None = None,
    sides: Sequence[int] | None = None,
) -> Any:
    """Build a network with float32 parameters on the CPU.

    The global random generators are neither read nor moved.  The network is a :class:`StagedNetwork`, or a
    :class:`UNet` if ``MODELS[name].gives`` is ``"pixels"``.  A user-defined network has the initial weights of its own
    code, with global generators that begin at ``seed``.

    Args:
        name: a name of ``MODELS``.
        classes: number of classes, at least 1.
        channels: image channels, 1 or 3 as a rule.
        image_size: the smaller image side in pixels, which decides the stem.
        seed: the run's root seed (the weights come from its own stream), or a CPU generator to draw from.
        width: channels of the first stage; None is the network's default.
        sides: height and width of the images, on which a user-defined network is tried; None for square images.

    Raises:
        UserError: the name is unknown, the images are too small, or a number is not positive.
    """
    if name not in MODELS:
        raise UserError(explain_unknown(name))
    entry = MODELS[name]
    if isinstance(entry.make, Own):
        return entry.make(
            classes=classes, channels=channels, sides=sides or (image_size, image_size), width=width,
            seed=seed if isinstance(seed, int) else seed.initial_seed(), word=_word(seed),
        )  # fmt: skip
    width = (entry.width or 0) if width is None else width
    for argument, value in (("classes", classes), ("channels", channels), ("width", width)):
        if value < 1:
            raise UserError(f"the model's {argument} must be at least 1, got {value}.")
    if image_size < entry.smallest:
        raise UserError(f"{name} needs images of at least {entry.smallest} pixels, got {image_size}.")
    stem: Stem = "cifar" if image_size <= CIFAR_STEM_UP_TO else "imagenet"

    # On the meta device the layers' own initialisation touches no memory and no generator.
    with torch.device("meta"):
        sized = {"image_size": image_size} if entry.sized else {}
        model = entry.make(classes=classes, channels=channels, width=width, stem=stem, **sized)
    allocate(model)
    if not isinstance(seed, torch.Generator):
        seed = torch.Generator().manual_seed(_word(seed))
    initialise(model, seed)
    return model


def build_any(
    name: str, *, classes: int, width: int | None, seed: int | torch.Generator, head: str | None, raw: bool,
    inputs: str,
) -> Any:  # fmt: skip
    """Build a user-defined network for samples of any kind.

    Args:
        name: a registered user-defined network.
        classes, width, seed: see :func:`build`.
        head: name of the linear layer that gives the logits, or None.
        raw: whether a user-defined loss takes the whole output, instead of the logits.
        inputs: a sample's inputs, in words, for the error message.

    Raises:
        UserError: the network is unknown, or a built-in one, which is for images.
    """
    entry = MODELS.get(name)
    if entry is None or not isinstance(entry.make, Own):
        raise UserError(
            f"the network {name} is for images [C, H, W] with a class, uint8 or float32; samples have {inputs}: give a "
            "module of your own, model=MODULE, or name its code, --model FILE.py:NAME."
        )
    root = seed if isinstance(seed, int) else seed.initial_seed()
    return entry.make.on_items(classes=classes, seed=root, word=_word(seed), width=width, head=head, raw=raw)


def _word(seed: int | torch.Generator) -> int:
    """Return 63 bits of a generator, or of a run's stream of initial weights."""
    if isinstance(seed, torch.Generator):
        return int(torch.randint(2**63 - 1, (), generator=seed))
    return int(stream(seed, "model", round=-1).integers(2**63))


def check_gives(model: str, needed: str, data: str, where: str) -> None:
    """Raise UserError if a network does not give the output that the data need, and list networks that do.

    Names that are not in ``MODELS`` pass.
    """
    fitting = [name for name, entry in MODELS.items() if entry.gives in (needed, "any")]
    if needed in ("classes", "pixels") and model in MODELS and model not in fitting:
        raise UserError(
            f'The network {model} gives {_GIVES[MODELS[model].gives]}, and the data set "{data}" needs '
            f"{_GIVES[needed]}: choose one of {', '.join(fitting)} {where}."
        )
