"""Finished image-text run: its networks, and the data of a downstream task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from fedkern.data import FederatedData, Split
from fedkern.data.images.transforms import cut_central_windows
from fedkern.data.split import join_splits
from fedkern.downstream.image_shapes import check_shape
from fedkern.downstream.run_evaluation import read_data
from fedkern.downstream.saved_network import read_model
from fedkern.engine.store.resuming import load_unedited
from fedkern.errors import UserError
from fedkern.methods.protocol import batch_slices
from fedkern.models import PairNetwork, Tokens
from fedkern.process.torch_modes import reproducible
from fedkern.settings.config import RunConfig
from fedkern.tasks.protocols import Description

SEEN = "seen"
BATCH = 250


class Finished:
    """A finished run and the data of one of its downstream tasks.

    Attributes:
        networks: the global pair of encoders, or without one every client's pair, in eval mode.
        data: the run's federated data, or another data set.
        form: form of the images, as the networks see them.
    """

    def __init__(self, out: Path, config: RunConfig, model: nn.Module, about: Description, data: FederatedData) -> None:
        self.out, self.config, self.data = out, config, data
        members = [model] if isinstance(model, PairNetwork) else list(getattr(model, "members", ()))
        if not members or not all(isinstance(member, PairNetwork) for member in members):
            raise UserError(
                f"{out} holds {about['model']}, trained by {config.method}: downstream tasks are for pairs of an image "
                "and a text encoder."
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.networks: list[PairNetwork] = [member.to(self.device).eval() for member in members]
        self.form = replace(data.form, mean=about["mean"], std=about["std"])
        check_shape(data, about, out)

    @classmethod
    @reproducible()
    def open(
        cls,
        out: Path | str,
        *,
        data: str | None = None,
        data_root: str | None = None,
        data_options: Mapping[str, object] | None = None,
        cache: str | None = None,
        trusted: Collection[str] = (),
        best: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> Self:
        """Read a run folder, and the run's own data or another data set.

        Args:
            data: another data set, whose training samples form one pool. Without ``data_root`` and ``data_options`` the
                code of the run's own data means these.
            data_root: folder of the data's files, for the run's own data the current one.
            data_options: options of the other data set. The run's own data only take ``labels``, which moves no sample
                to another client or split.
            cache: folder of decoded images (None: for the run's own data the run's folder).
            trusted: code that may be imported, see :func:`fedkern.load`.
            best: read the network of the best round.
        """
        config = load_unedited(out, trusted=trusted, device="cpu")
        module, about = read_model(out, trusted, best=best)
        loaded = read_data(
            out, config, about, data, data_root=data_root, data_options=data_options, cache=cache, progress=progress,
            training=True,
        )  # fmt: skip
        return cls(Path(out), config, module, about, loaded)

    @property
    def sets(self) -> dict[str, Split]:
        """The test sets by name, ``"seen"`` for that of the training clients' distribution."""
        return {name or SEEN: split for name, split in self.data.tests.items()}

    def train(self) -> Split:
        """Return all clients' training samples at the networks' image size, for probes and decoders."""
        return cut_central_windows(join_splits(self.data.clients), self.data.form.shape[1:])

    def images(self, split: Split) -> Iterator[Tensor]:
        """Yield the images of a split in batches, normalised as in training: fp32, channels-last."""
        for rows in batch_slices(len(split), BATCH):
            yield self.form.normalise_images(split.images[rows].to(self.device))

    @torch.no_grad()
    def image_embeddings(self, network: PairNetwork, split: Split) -> Tensor:
        """Return unit vectors fp32 ``[n, 128]``."""
        return torch.cat([network.image_embedding(images) for images in self.images(split)])

    @torch.no_grad()
    def text_embeddings(self, network: PairNetwork, texts: tuple[str, ...] | list[str]) -> Tensor:
        tokens = network.tokenize(texts)
        parts = []
        all_rows = torch.arange(len(texts))
        for rows in (all_rows[cut] for cut in batch_slices(len(texts), BATCH)):
            part: Tokens = tokens.take(rows).to(self.device)
            parts.append(network.text_embedding(part))
        return torch.cat(parts)

    @torch.no_grad()
    def features(self, network: PairNetwork, split: Split, kind: str) -> Tensor:
        """Return features of every image for a probe, fp32 ``[n, d]``.

        Args:
            kind: ``"token"`` (the first token after the alignment layer), ``"mean"`` (of the encoder's patch tokens),
                or ``"embedding"`` (the unit vector of the shared space).
        """

        def of(images: Tensor) -> Tensor:
            sequence = network.encode_image(images)
            if kind == "mean":
                return sequence[:, 1:].mean(1)
            return network.image_align.first_token(sequence) if kind == "token" else network.project_image(sequence)

        return torch.cat([of(images) for images in self.images(split)])
