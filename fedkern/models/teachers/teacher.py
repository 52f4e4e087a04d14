"""Frozen teachers: any network or callable that gives logits."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedkern.errors import UserError
from fedkern.models.networks.staged import Classifier
from fedkern.models.precision import cast_frozen, reduced_dtype
from fedkern.ops._core.layout import plain_strides

Identity = Mapping[str, str | int | float]


class GroupedHead(nn.Linear):
    """Linear head with rows by class, whose logit is the log of the mean of its rows' exponentials.

    Args:
        weight: ``[R, d]``.
        bias: ``[R]``.
        sizes: number of rows of every class, of sum R.
    """

    def __init__(self, weight: Tensor, bias: Tensor, sizes: Sequence[int]) -> None:
        super().__init__(weight.shape[1], len(sizes), device="meta")
        self.weight, self.bias, self._sizes = nn.Parameter(weight), nn.Parameter(bias), list(sizes)

    def forward(self, features: Tensor) -> Tensor:
        groups = super().forward(features).split(self._sizes, dim=1)
        return torch.stack([group.logsumexp(1) - math.log(group.shape[1]) for group in groups], 1)


class Teacher:
    """Frozen network from normalised images ``[B, C, H, W]`` to logits ``[B, classes]``.

    The network is made on first use, so a teacher with all logits in the cache costs nothing.

    Args:
        load: makes the network, or another callable from images to logits.
        identity: everything that decides the logits of an image, for the cache on disk.  None: no such cache.
        batch: images per pass.
    """

    def __init__(
        self,
        name: str,
        classes: int,
        load: Callable[[], Callable[..., Any]],
        *,
        device: torch.device | str = "cpu",
        identity: Identity | None = None,
        batch: int = 256,
    ) -> None:
        self.name, self.classes, self.device, self.identity = name, classes, torch.device(device), identity
        self.batch, self._load = batch, load

    @cached_property
    def network(self) -> Any:
        network = self._load()
        if isinstance(network, nn.Module):
            network.to(self.device).eval().requires_grad_(False)
        if isinstance(network, Classifier) and network.head.out_features != self.classes:
            raise wrong_classes(self.name, network.head.out_features, self.classes)
        return network

    @property
    def classifier(self) -> Classifier:
        """The network, as a classifier that can be tuned."""
        if not isinstance(self.network, Classifier):
            raise UserError(
                f"the teacher {self.name} gives logits alone, and tuning needs features: take "
                "teacher_tuning=zero-shot, or a network of fedkern or CLIP."
            )
        return self.network

    @cached_property
    def _low_precision(self) -> Classifier:
        return cast_frozen(self.classifier)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters()) if isinstance(self.network, nn.Module) else 0

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        network = self.classifier if reduced_dtype() is None else self._low_precision
        return network.features(images.to(self.device)).float()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        network = self.network
        try:
            if isinstance(network, Classifier):
                answer = network.head(self.features(images))
            else:
                answer = network(plain_strides(images.to(self.device)))
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's own code may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"the teacher {self.name} failed on images {list(images.shape)} ({reason}).") from error
        return self.check_logits(answer, len(images))

    def check_logits(self, logits: object, count: int) -> Tensor:
        """Return ``logits`` as fp32 ``[count, classes]``."""
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != count:
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"the teacher {self.name} must give logits [{count}, {self.classes}], but gave {shape}.")
        if logits.shape[1] != self.classes:
            raise wrong_classes(self.name, logits.shape[1], self.classes)
        if not bool(torch.isfinite(logits).all()):
            raise UserError(f"the teacher {self.name} gave logits that are NaN or infinite: look at its weights.")
        return logits.float()


def wrong_classes(name: str, count: int, expected: int) -> UserError:
    return UserError(
        f"the teacher {name} knows {count} classes and the data have {expected}: take a teacher for these data."
    )


def teacher_of(
    function: object, name: str, classes: int, device: torch.device | str = "cpu", identity: Identity | None = None
) -> Teacher:
    if not callable(function):
        raise UserError(
            f"the teacher {name} is of type {type(function).__name__}: name a function or module that takes images."
        )
    load = partial(cast, Any, function)  # unlike a lambda that returns the function it can be pickled
    return Teacher(name, classes, load, device=device, identity=identity)


def trained_teacher(network: nn.Module, name: str, classes: int, device: torch.device | str = "cpu") -> Teacher:
    """Return a trained network as a teacher, with the hash of its weights in its identity."""
    return teacher_of(network, name, classes, device, {"model": name, "weights": hash_state(network)})


def hash_state(module: nn.Module) -> str:
    """Return a hash of a module's state, independent of device and memory format."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        digest.update(f"{name}{list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
