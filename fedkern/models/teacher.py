"""Frozen teachers: the base class, and any callable that gives logits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedkern.errors import UserError
from fedkern.models.precision import frozen, lower
from fedkern.models.staged import StagedNetwork
from fedkern.ops._core.layout import plain_strides

Identity = Mapping[str, str | int | float]


class Teacher:
    """A frozen classifier: a trunk that gives features, and a linear head on the features.

    Trunk and head are made on first use (:meth:`load`), so a teacher whose logits are all cached costs nothing.

    Attributes:
        name: name in messages.
        classes: number of classes C of the data.
        device: device of trunk and head.
        identity: everything that decides the logits of an image; names the cache file.  None if that is not known:
            then no logits are cached on disk.
        batch: images per pass.
    """

    batch = 256

    def __init__(self, name: str, classes: int, device: torch.device | str, identity: Identity | None) -> None:
        self.name, self.classes, self.device = name, classes, torch.device(device)
        self._identity = identity
        self._parts: tuple[nn.Module, nn.Linear] | None = None
        self._cast: nn.Module | None = None

    @property
    def identity(self) -> Identity | None:
        return self._identity

    def load(self) -> tuple[nn.Module, nn.Linear]:
        """Makes the trunk (normalised images ``[B, C, H, W]`` to features ``[B, d]``) and the head.

        Raises:
            UserError: the teacher cannot be loaded, or gives logits without features.
        """
        raise NotImplementedError

    @property
    def parts(self) -> tuple[nn.Module, nn.Linear]:
        """Trunk and head, frozen and in eval mode."""
        if self._parts is None:
            trunk, head = self.load()
            trunk.to(self.device).eval().requires_grad_(False)
            head.to(self.device).requires_grad_(False)
            if head.out_features != self.classes:
                raise wrong_classes(self.name, head.out_features, self.classes)
            self._parts = trunk, head
        return self._parts

    @property
    def parameters(self) -> int:
        """Number of parameters; a head that is part of the trunk counts once."""
        return sum(p.numel() for p in nn.ModuleList(self.parts).parameters())

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The trunk's features fp32 ``[B, d]`` of normalised images ``[B, C, H, W]``.

        Raises:
            UserError: the teacher gives logits without features.
        """
        trunk, _ = self.parts
        if lower() is not None:
            if self._cast is None:
                self._cast = frozen(trunk)
            trunk = self._cast
        features: Tensor = trunk(images.to(self.device))
        return features.float()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits fp32 ``[B, classes]`` of normalised images ``[B, C, H, W]``.

        Raises:
            UserError: the logits have another shape, or are not finite.
        """
        head = self.parts[1]
        return self.checked(head(self.features(images)), len(images))

    def checked(self, logits: Any, count: int) -> Tensor:
        """``logits`` as fp32 ``[count, classes]``.

        Raises:
            UserError: ``logits`` is no tensor, has another shape, or is not finite.
        """
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != count:
            what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"the teacher {self.name} must give logits [{count}, {self.classes}], but gave {what}.")
        if logits.shape[1] != self.classes:
            raise wrong_classes(self.name, logits.shape[1], self.classes)
        if not bool(torch.isfinite(logits).all()):
            raise UserError(f"the teacher {self.name} gave logits that are NaN or infinite: look at its weights.")
        return logits.float()


def wrong_classes(name: str, count: int, expected: int) -> UserError:
    """The error for a teacher whose number of classes is not that of the data."""
    return UserError(
        f"the teacher {name} knows {count} classes and the data have {expected}: take a teacher for these data."
    )


class CallableTeacher(Teacher):
    """Any frozen callable: normalised images fp32 ``[B, C, H, W]`` to logits ``[B, classes]``.

    Args:
        network: called without gradients; a module is put in eval mode, moved to ``device`` and frozen.
        identity: see :class:`Teacher`; without it the logits are not cached on disk.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        classes: int,
        *,
        name: str = "callable",
        device: torch.device | str = "cpu",
        identity: Identity | None = None,
    ) -> None:
        super().__init__(name, classes, device, identity)
        if not callable(network):
            raise UserError(
                f"the teacher {name} is of type {type(network).__name__}: name a function or module that takes images."
            )
        if isinstance(network, nn.Module):
            network.to(self.device).eval().requires_grad_(False)
        self.network = network

    def load(self) -> tuple[nn.Module, nn.Linear]:
        if isinstance(self.network, StagedNetwork):
            return Features(self.network), self.network.head
        raise UserError(
            f"the teacher {self.name} gives logits alone, and tuning needs features: take teacher_tuning=zero-shot, or "
            "a network of fedkern or CLIP."
        )

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters()) if isinstance(self.network, nn.Module) else 0

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        try:
            if isinstance(self.network, StagedNetwork):
                return super().logits(images)
            answer = self.network(plain_strides(images.to(self.device)))
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's own code may raise anything
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"the teacher {self.name} failed on images {list(images.shape)} ({what}).") from error
        return self.checked(answer, len(images))


def trained_teacher(network: nn.Module, name: str, classes: int, device: torch.device | str = "cpu") -> CallableTeacher:
    """A trained network as a teacher; the hash of its weights is part of its identity."""
    identity = {"model": name, "weights": content(network)}
    return CallableTeacher(network, classes, name=name, device=device, identity=identity)


class Features(nn.Module):
    """The pooled features ``[B, d]`` of a staged network, of images ``[B, C, H, W]`` that ``prepare`` has changed."""

    def __init__(self, network: StagedNetwork, prepare: Callable[[Tensor], Tensor] = lambda images: images) -> None:
        super().__init__()
        self.network, self.prepare = network, prepare

    def forward(self, images: Tensor) -> Tensor:
        return self.network.features(self.prepare(images))


def content(module: nn.Module) -> str:
    """Hash of a module's state, independent of device and memory format."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        digest.update(f"{name}{list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
