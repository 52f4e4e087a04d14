"""An epoch of FedDRA's stages through the engine against the same network in plain PyTorch with eager losses.

A call is a client's exchange as the engine runs it: the received vectors are loaded, an epoch is trained on them with
anchors, the vectors are read.  The plain loop trains the same ``PairNetwork`` from a state dict with two
cross-entropies on the matrix of similarities, mean squared errors to a frozen copy, and ``torch.optim.AdamW``; in the
first stage it asks local and frozen encoders, as the released code does, although they are the same there.  FedDRA may
take no longer; the third contestant, where alignment layers compute all tokens, shows what their short way to the first
one saves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import compare, device

from fedkern.data import FederatedData, PartitionStatistics, Split
from fedkern.engine import RunConfig
from fedkern.engine.context import RunContext
from fedkern.engine.parties import Client
from fedkern.methods import FedDRA, Step
from fedkern.methods.feddra import ALIGNMENT
from fedkern.models.attention import TransformerLayer

SAMPLES, BATCH, SIDE = 144, 32, 32
WORDS = tuple(f"word{i}" for i in range(64))
AT_MOST = 1.03


def federation() -> FederatedData:
    """One client with random images and texts of 8 to 24 words; what they show does not change the time."""
    rng = np.random.default_rng(0)

    def split(count: int) -> Split:
        images = rng.integers(0, 256, (count, 3, SIDE, SIDE)).astype(np.uint8)
        texts = tuple(" ".join(rng.choice(WORDS, rng.integers(8, 24))) for _ in range(count))
        return Split(torch.from_numpy(images), torch.zeros(count, dtype=torch.int64), texts=texts)

    client = split(SAMPLES)
    return FederatedData(
        name="random", classes=("one",), clients=(client,), validation=split(8), tests={"": split(8)}, mean=(0.5,) * 3,
        std=(0.25,) * 3, augment="none", statistics=PartitionStatistics.of([client.labels.numpy()], ("one",), "iid"),
    )  # fmt: skip


def whole_layers(network: Any) -> Any:
    """The same network whose alignment layers compute every token and return the first."""

    class Whole(TransformerLayer):
        def first(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return self(tokens, mask)[:, 0]

    for layer in (network.image_align, network.text_align):
        layer.__class__ = Whole
    return network


def plain(bench: RunContext, stage: str, network: Any) -> Callable[[], Any]:
    """The epoch without fedkern's loop, operators and optimiser."""
    network = bench.place(network)
    state, glob = copy.deepcopy(network.state_dict()), copy.deepcopy(network).eval().requires_grad_(False)
    data, truth = bench.client_data(0), torch.arange(BATCH, device=device())
    frozen = stage == "alignment"
    trained = [p for n, p in network.named_parameters() if not frozen or n.partition(".")[0] in ALIGNMENT]
    kept = FedDRA().rows(Client(bench, 0, {}))[0]

    def epoch() -> Any:
        network.load_state_dict(state)
        network.train()
        adam = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05)
        order = np.random.default_rng(1).permutation(kept)
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch = data.batch(order[start : start + BATCH])
            mask = batch.tokens.mask
            with torch.set_grad_enabled(not frozen):
                image, text = network.encode_image(batch.images), network.encode_text(batch.tokens)
            x, y = network.project_image(image), network.project_text(text, mask)
            with torch.no_grad():
                zx, zy = glob.image_embedding(batch.images), glob.text_embedding(batch.tokens)
            similarities = x @ y.T / 0.07
            loss = F.cross_entropy(similarities, truth) + F.cross_entropy(similarities.T, truth)
            loss = loss + F.mse_loss(x, zx) + F.mse_loss(y, zy)
            adam.zero_grad()
            loss.backward()
            adam.step()
        return loss.detach()

    return epoch


@pytest.mark.parametrize("stage", ["alignment", "joint"])
@pytest.mark.parametrize("width", [48, 96])
def test_epoch(benchmark: Any, stage: str, width: int) -> None:
    config = RunConfig.make(
        "feddra", data="captions", clients=1, width=width, batch_size=BATCH, local_steps=SAMPLES * 9 // 10 // BATCH,
        device=device().type, threads=1, fix_statistics=1,
    )  # fmt: skip
    bench = RunContext(config, federation())
    stages = "two" if stage == "alignment" else "one"
    method = FedDRA(FedDRA.Options(stages=stages, alignment_steps=config.local_steps or 1))
    client = Client(bench, 0, {})
    message = {**{name: x.to(device()) for name, x in bench.initial().items()}, "weight": 1.0}
    step = Step(0, "train", stage)
    compare(
        benchmark,
        "feddra_step",
        f"{stage} stage, width {width}",
        {
            "fedkern": lambda: method.client_update(client, step, message),
            "plain PyTorch": plain(bench, stage, bench.build()),
            "plain PyTorch, all tokens": plain(bench, stage, whole_layers(bench.build())),
        },
        floors={"plain PyTorch": 1 / AT_MOST},
        gpu_floors={"plain PyTorch": 1 / AT_MOST},
        threads=1,
        note=f"{config.local_steps} batches of {BATCH} pairs, {SIDE} pixels, texts of up to 24 words",
    )
