"""Lanes: clients of one GPU that work at the same time, each on its own stream and network.

A client of a small network leaves most of a GPU idle. The host starts recorded steps much faster than the GPU runs
them, so it starts the next clients before it takes the first one's upload. There are no threads: clients are started,
and their uploads taken, in client order.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedkern.engine.context import RunContext
from fedkern.engine.executors.executor import Handler
from fedkern.engine.local.captured import is_replayable
from fedkern.methods.base import LocalTraining
from fedkern.methods.roles import Objective

MOST = 8
"""Most clients at the same time."""

DRAWING = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU
"""PyTorch's layers that draw from a generator that clients share."""

T = TypeVar("T")


def lanes(context: RunContext, method: Handler) -> int:
    """Return how many clients may work at the same time.

    More than one need a built-in ``client_update`` and recorded steps that depend on no other client, and neither
    client state nor a shared generator may be used.
    """
    networks, config = context.networks, context.config
    graphs = networks.graphs
    if graphs is None or graphs.off or not graphs.lasting() or context.script.functions or context.teachers is not None:
        return 1
    if config.buffers == "local" or config.keeps_parts or config.optimizer_state == "keep" or networks.added_models:
        return 1
    if not isinstance(method, LocalTraining) or type(method).client_update is not LocalTraining.client_update:
        return 1
    module, kind = networks.get("local").module, type(method)
    if (
        any(isinstance(layer, DRAWING) for layer in module.modules())
        or kind.prepare is not Objective.prepare
        or not is_replayable(kind, module)
        or context.data.task.code()
    ):
        return 1
    return min(MOST, 1 + room(context.device))


def room(device: torch.device) -> int:
    """Return how many times the process's memory on the device is still free."""
    if device.type != "cuda":
        return MOST
    return int(torch.cuda.mem_get_info(device)[0] // max(1, torch.cuda.memory_reserved(device)))


def side_by_side(begun: Iterable[Callable[[], T]], count: int) -> Iterator[T]:
    """Yield results in order, with ``count`` pieces of work begun before the first result is taken."""
    waiting: list[Callable[[], T]] = []
    for finish in begun:
        waiting.append(finish)
        del finish  # it holds its result
        if len(waiting) == count:
            yield waiting.pop(0)()
    while waiting:
        yield waiting.pop(0)()


def on_this_stream(value: object) -> None:
    """Keep a tensor's memory until the current stream is done with it."""
    if isinstance(value, Tensor) and value.is_cuda:
        value.record_stream(torch.cuda.current_stream(value.device))
