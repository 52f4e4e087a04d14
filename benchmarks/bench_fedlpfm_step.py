"""Fed-LPFM's local steps with cached teacher logits against FedAvg's, through the engine's own training loop.

A call is a client's exchange as the engine runs it: the received vectors are loaded, two batches of 64 are trained on,
the vectors are read.  Fed-LPFM may take at most 10 % longer.  The teacher that looks at every batch
(``teacher_view=same``), a frozen ResNet-8 of width 32, shows what the cache saves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness import compare, device

from fedkern import models
from fedkern.data import FederatedData, PartitionStatistics, Split
from fedkern.engine import RunConfig
from fedkern.engine.context import RunContext
from fedkern.engine.parties import Client
from fedkern.methods import FedAvg, FedLPFM, LocalTraining, Step
from fedkern.models.teacher import NetworkTeacher

SAMPLES, BATCH, CLASSES, SIDE = 128, 64, 10, 32
STEP = Step(0, "train", "update")
AT_MOST = 1.1


def federation() -> FederatedData:
    """One client with random images; what they show does not change the time."""
    rng = np.random.default_rng(0)

    def split(count: int) -> Split:
        images = rng.integers(0, 256, (count, 3, SIDE, SIDE)).astype(np.uint8)
        return Split(torch.from_numpy(images), torch.from_numpy(rng.integers(0, CLASSES, count)))

    client, classes = split(SAMPLES), tuple(str(c) for c in range(CLASSES))
    return FederatedData(
        name="random",
        classes=classes,
        clients=(client,),
        validation=split(8),
        tests={"": split(8)},
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        augment="none",
        statistics=PartitionStatistics.of([client.labels.numpy()], classes, "iid"),
    )


def exchange(method: LocalTraining, bench: RunContext, teachers: int) -> Callable[[], Any]:
    """A client's exchange, its teachers' logits known from an earlier round."""
    client, message = Client(bench, 0, {}), {name: x.to(device()) for name, x in bench.initial().items()}
    if isinstance(method, FedLPFM):
        generator = torch.Generator().manual_seed(1)
        client.state["teacher_logits"] = {
            i: torch.randn(SAMPLES, CLASSES, generator=generator, device="cpu") for i in range(teachers)
        }
        network = models.build("resnet8", classes=CLASSES, channels=3, image_size=SIDE, seed=0, width=32)
        teacher = NetworkTeacher(network, "resnet8", device())
        network.to(memory_format=torch.channels_last)
        method._made = dict.fromkeys(range(teachers), teacher)
    return lambda: method.client_update(client, STEP, message)


@pytest.mark.parametrize(("model", "width", "teachers"), [("cnn", 32, 1), ("cnn", 32, 3), ("resnet8", 16, 1)])
def test_step(benchmark: Any, model: str, width: int, teachers: int) -> None:
    config = RunConfig.make(
        "fedavg", data="cifar10", clients=1, local_epochs=1, batch_size=BATCH, model=model, width=width,
        augment="none", device=device().type, threads=1,
    )  # fmt: skip
    bench = RunContext(config, federation())

    def fedlpfm(**options: Any) -> Callable[[], Any]:
        return exchange(FedLPFM(FedLPFM.Options(teachers=teachers, **options)), bench, teachers)

    compare(
        benchmark,
        "fedlpfm_step",
        f"{model} of width {width}, {teachers} teacher{'s' * (teachers > 1)}",
        {
            "fedkern": fedlpfm(),
            "FedAvg": exchange(FedAvg(), bench, 0),
            "teacher in every step": fedlpfm(teacher_view="same"),
        },
        floors={"FedAvg": 1 / AT_MOST},
        gpu_floors={"FedAvg": 1 / AT_MOST},
        beside=("teacher in every step",),
        threads=1,
        note="two batches of 64 images of 32 pixels",
    )
