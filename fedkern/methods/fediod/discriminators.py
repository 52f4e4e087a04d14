"""Discriminators of the clients, which never leave them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkern.methods.common.oneshot_distill import torch_stream
from fedkern.methods.fediod import private_messages as private
from fedkern.methods.fediod.iod_options import IODOptions
from fedkern.methods.fediod.losses import confidence, patch_entropy
from fedkern.methods.protocol import BEFORE, Phase, batch_slices
from fedkern.methods.roles import Client
from fedkern.methods.uploads import make_once
from fedkern.models.networks.discriminator import PatchDiscriminators, whole_image
from fedkern.models.optimisers import Adam
from fedkern.process.device_copies import send


class Discriminators:
    """Discriminators of one client or of a cohort, side by side.

    ``client.state["critics"]`` holds every shard's state, for the shard in use as views of the live tensors, so that
    nothing is copied during a round.
    """

    def __init__(self, clients: Sequence[Client], options: IODOptions) -> None:
        o = options
        self._clients, self._options = list(clients), o
        self._shards = [private.shards(client, o) for client in clients]
        self._here = [0] * len(clients)
        self._steps = [0] * len(clients)
        channels, height, width = clients[0].image_shape
        drawn = [torch_stream(client, "critic/0", BEFORE) for client in clients]
        layers = o.critic_layers or whole_image(height, width)
        module = PatchDiscriminators(drawn, channels=channels, ndf=o.ndf, layers=layers)
        self.module = module.to(clients[0].device)
        self._parts = module.parts()
        self._adam = Adam([part[name] for part in self._parts for name in part], o.critic_lr, (0.5, 0.999))
        for slot, client in enumerate(clients):
            critics = client.state.setdefault("critics", {})
            for shard in range(len(self._shards[slot])):  # all now: the keys must not reveal which shard served
                if shard not in critics:
                    critics[shard] = self._fresh(client, shard)
            self._load(slot, 0)

    def _fresh(self, client: Client, shard: int) -> dict[str, Any]:
        layout, drawn = self.module, [torch_stream(client, f"critic/{shard}", BEFORE)]
        weights = PatchDiscriminators(drawn, channels=layout.channels, ndf=layout.ndf, layers=layout.layers).parts()[0]
        mean, square = ({name: torch.zeros_like(tensor) for name, tensor in weights.items()} for _ in range(2))
        return {"weights": weights, "mean": mean, "square": square, "steps": 0}

    # -- shards: a client's slot holds one discriminator at a time -------------------------------------------------

    def bring(self, choice: Callable[[Client], int]) -> None:
        """Load the discriminator of the shard ``choice(client)`` into every client's slot.

        Also if it is there already, so that the time does not reveal the choice.
        """
        for slot, client in enumerate(self._clients):
            if len(self._shards[slot]) > 1:
                self._point(slot)
                entry = client.state["critics"][self._here[slot]]  # the slot's memory is needed for another shard
                entry["weights"] = {name: tensor.clone() for name, tensor in entry["weights"].items()}
                self._here[slot] = choice(client)
                self._load(slot, self._here[slot])

    @torch.no_grad()
    def _load(self, slot: int, shard: int) -> None:
        client, part = self._clients[slot], self._parts[slot]
        entry, state = client.state["critics"][shard], self._adam.state
        for name, tensor in part.items():
            tensor.copy_(entry["weights"][name])
            device = tensor.device
            state[tensor] = {
                "step": torch.full((), float(entry["steps"]), device=device if device.type == "cuda" else "cpu"),
                "exp_avg": entry["mean"][name].to(device, copy=True),
                "exp_avg_sq": entry["square"][name].to(device, copy=True),
            }
        self._steps[slot] = entry["steps"]
        self._point(slot)

    def _point(self, slot: int) -> None:
        part, state = self._parts[slot], self._adam.state
        self._clients[slot].state["critics"][self._here[slot]] = {
            "weights": dict(part),
            "mean": {name: state[tensor]["exp_avg"] for name, tensor in part.items()},
            "square": {name: state[tensor]["exp_avg_sq"] for name, tensor in part.items()},
            "steps": self._steps[slot],
        }

    # -- training and answers --------------------------------------------------------------------------------------

    def real(self, slot: int, phase: Phase, iteration: int) -> Tensor | None:
        """Return a client's real images of an iteration, ``[batch, C, H, W]``, or None when its samples are used up.

        A round goes once through the samples in random order, with shards it draws every batch anew from the loaded
        one.
        """
        client, size = self._clients[slot], self._options.batch
        batches = self._options.count_batches(client.declared)
        if iteration >= batches:
            return None
        shards = self._shards[slot]
        augmentation = client.rng("real-augmentation", phase)
        if len(shards) > 1:
            chosen = np.resize(client.rng("real", phase).permutation(shards[self._here[slot]]), size)
        else:
            at = Phase(phase.round, phase.name, "update")
            order = make_once(client.round_cache, "order", lambda: client.rng("real", at).permutation(client.samples))
            chosen = np.resize(order, batches * size)[iteration * size : (iteration + 1) * size]
        images: Tensor = client.batch(chosen, augmentation).inputs
        return images

    def train(self, fake: Tensor, real: dict[int, Tensor], lr: float) -> Tensor | None:
        """Take one step of the discriminators with ``real`` images (by slot), against the same ``fake`` ones.

        Return losses ``[K]``, 0 without real images, or None if ``real`` is empty.
        """
        if not real:
            return None
        module = self.module
        blank = next(iter(real.values()))
        stack = torch.stack([real.get(slot, blank) for slot in range(len(self._clients))])
        module.requires_grad_(True)
        with torch.enable_grad():
            entropies = patch_entropy(module(fake), False).mean(1) + patch_entropy(module(stack), True).mean(1)
            active = send(torch.tensor([0.5 if k in real else 0.0 for k in range(len(self._clients))]), stack.device)
            losses = entropies * active
            named = dict(module.named_parameters())
            gradients = torch.autograd.grad(losses.sum(), list(named.values()))
        module.requires_grad_(False)
        cut = {name: g.contiguous().tensor_split(module.count) for name, g in zip(named, gradients, strict=True)}
        for slot, part in enumerate(self._parts):
            for name, tensor in part.items():
                tensor.grad = cut[name][slot] if slot in real else None
        self._adam.lr = lr
        self._adam.step()
        self._adam.zero_grad()
        for slot in real:
            self._steps[slot] += 1
            self._clients[slot].state["critics"][self._here[slot]]["steps"] = self._steps[slot]
        return losses.detach()

    def judge(self, images: Tensor) -> Tensor | None:
        """Return confidences ``[K, n]`` of any number of images, in slices for batch norm.

        None for a single image whose last map has one position, which batch norm cannot normalise.
        """
        count, layers = len(images), self.module.layers
        if count * (images.shape[2] >> layers) * (images.shape[3] >> layers) == 1:
            return None
        return torch.cat([self.look(images[part])[1] for part in batch_slices(count, self._options.batch)], 1)

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return realism losses and confidences ``[K, B]``, with gradients to the images."""
        patches = self.module(images)
        return patch_entropy(patches, True), confidence(patches)
