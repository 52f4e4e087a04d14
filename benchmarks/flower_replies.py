"""A round's replies through Flower's strategies and fedkern's, in an environment that has both.

    python flower_replies.py time RULE MODEL CLIENTS --threads T --pairs N
    python flower_replies.py memory RULE MODEL CLIENTS --variant NAME
    python flower_replies.py ranking RULE MODEL CLIENTS --pairs N

Writes one line of JSON.  "time" takes turns in one process, from the first reply to the new arrays, with all replies in
memory.  "memory" makes each reply's bytes when it is fetched, as a grid does, and prints the highest rise of resident
memory.  "ranking" counts the rounds in which Krum chooses another client than distances in fp64 between the models.
"""

import argparse
import ctypes
import gc
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity

from benchmarks import peak_memory
from fedkern.flower import strategies

OURS, THEIRS = "fedkern", "Flower"
LOW_MEMORY = {OURS: False, "fedkern low memory": True}
SETTINGS: dict[str, dict[str, Any]] = {"FedAvg": {}, "FedAdam": {}, "FedMedian": {}, "Krum": {"num_malicious_nodes": 2}}


def resnet18() -> dict[str, tuple[int, ...]]:
    """Return the shapes of a ResNet-18 for 10 classes: 122 entries, 11.2 million numbers."""
    shapes: dict[str, tuple[int, ...]] = {}

    def block(name: str, into: int, out: int, size: int) -> None:
        shapes[f"{name}.conv.weight"] = (out, into, size, size)
        for entry in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{entry}"] = (out,)
        shapes[f"{name}.bn.num_batches_tracked"] = ()

    block("stem", 3, 64, 3)
    width = 64
    for stage, out in enumerate((64, 128, 256, 512)):
        for i in range(2):
            block(f"{stage}.{i}.0", width, out, 3)
            block(f"{stage}.{i}.1", out, out, 3)
            if width != out:
                block(f"{stage}.{i}.shortcut", width, out, 1)
            width = out
    return shapes | {"head.weight": (10, 512), "head.bias": (10,)}


MODELS: dict[str, Callable[[], dict[str, tuple[int, ...]]]] = {
    "ResNet-18": resnet18,
    "CNN": lambda: {
        "0.weight": (64, 3, 3, 3), "0.bias": (64,), "1.weight": (128, 64, 3, 3), "1.bias": (128,),
        "2.weight": (256, 128, 3, 3), "2.bias": (256,), "3.weight": (256, 2450), "3.bias": (256,),
        "4.weight": (10, 256), "4.bias": (10,),
    },
    "LeNet": lambda: {
        "0.weight": (6, 3, 5, 5), "0.bias": (6,), "1.weight": (16, 6, 5, 5), "1.bias": (16,),
        "2.weight": (120, 400), "2.bias": (120,), "3.weight": (84, 120), "3.bias": (84,),
        "4.weight": (10, 84), "4.bias": (10,),
    },
}  # fmt: skip


def model(name: str, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return the numbers of a model, equal for equal seeds."""
    rng = np.random.default_rng(seed)
    made = {}
    for key, shape in MODELS[name]().items():
        if key.endswith("tracked"):
            made[key] = np.array(seed)
        else:
            numbers = rng.standard_normal(shape, dtype=np.float32)
            made[key] = abs(numbers) if key.endswith("var") else numbers
    return made


def record(model: dict[str, np.ndarray[Any, Any]]) -> ArrayRecord:
    """Return a model as Flower's arrays."""
    return ArrayRecord({key: Array(np.asarray(value)) for key, value in model.items()})


def fresh(arrays: ArrayRecord) -> ArrayRecord:
    """Return the same arrays in new memory, as a grid makes them of received bytes."""
    copied = {key: Array(raw.dtype, raw.shape, raw.stype, bytes(memoryview(raw.data))) for key, raw in arrays.items()}
    return ArrayRecord(copied)


def reply(arrays: ArrayRecord, node: int) -> Message:
    """Return a node's reply to a training message."""
    asked = Message(RecordDict(), node, "train")
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 100 + 7 * node, "loss": 0.5})})
    return Message(content, reply_to=asked)


def strategy(name: str, rule: str, start: ArrayRecord, clients: int) -> Any:
    """Return a variant's strategy at the beginning of a round's answers."""
    if name == THEIRS:
        made = getattr(flower, rule)(**SETTINGS[rule])
        if hasattr(made, "eta"):
            made.current_arrays = {key: array.numpy() for key, array in start.items()}
        return made
    made = getattr(strategies, rule)(low_memory=LOW_MEMORY[name], **SETTINGS[rule])
    made.begin(start, range(clients))
    return made


def variants(rule: str) -> list[str]:
    """Return the variants of a rule: rules that need all replies have no sums."""
    return [*LOW_MEMORY, THEIRS] if rule in ("FedAvg", "FedAdam") else [OURS, THEIRS]


def hand_out(replies: list[Message], begin: list[float], clock: Callable[[], float]) -> Iterator[Message]:
    """Yield the replies, one after another, and note when the first is asked for."""
    begin.append(clock())
    while replies:
        yield replies.pop(0)


def times(rule: str, name: str, clients: int, pairs: int) -> dict[str, list[float]]:
    """Return seconds of each variant, in turns of which the first is not counted."""
    start, records = record(model(name, 0)), [record(model(name, node + 1)) for node in range(clients)]
    names = variants(rule)
    # One thread is timed in its own processor time: the machine may be shared.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    samples: dict[str, list[float]] = {variant: [] for variant in names}
    for turn in range(pairs + 1):
        for variant in names[turn % len(names) :] + names[: turn % len(names)]:
            # Flower's median takes the arrays out of the replies: everybody gets replies of his own.
            replies = [reply(arrays.copy(), node) for node, arrays in enumerate(records)]
            judged = strategy(variant, rule, start, clients)
            begin = [clock()] if variant == THEIRS else []
            arrays, _ = judged.aggregate_train(1, replies if variant == THEIRS else hand_out(replies, begin, clock))
            # Flower begins when the last reply is there; all of them are there here.
            seconds = clock() - begin[0]
            assert arrays is not None
            del arrays, replies, judged
            if turn:
                samples[variant].append(seconds)
    return samples


def peak(rule: str, name: str, clients: int, variant: str) -> int:
    """Return the highest rise of resident memory, from before the first reply."""
    start, made = record(model(name, 0)), record(model(name, 1))

    def fetch() -> Iterator[Message]:
        for node in range(clients):
            yield reply(fresh(made), node)

    def run() -> None:
        # Flower's grid collects the replies of a round before it gives them to the strategy.
        replies: Iterable[Message] = list(fetch()) if variant == THEIRS else fetch()
        judged = strategy(variant, rule, start, clients)
        assert judged.aggregate_train(1, replies)[0] is not None

    run()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    rise = peak_memory.peak_bytes(run, torch.device("cpu"))
    if rise is None:
        raise SystemExit("the kernel does not tell the peak of resident memory")
    return rise


def ranking(clients: int, size: int, rounds: int) -> dict[str, int]:
    """Count rounds in which Krum and fp64 distances choose differently: updates of 1e-5 beside weights of 0.05."""
    wrong = {OURS: 0, THEIRS: 0}
    for seed in range(rounds):
        rng = np.random.default_rng(seed)
        base = 0.05 * rng.standard_normal(size)
        models = [(base + 1e-5 * rng.standard_normal(size)).astype(np.float32) for _ in range(clients)]
        wide = np.stack(models).astype(np.float64) - base
        squares = np.stack([((wide - row) ** 2).sum(1) for row in wide])
        scores = [np.sort(row)[1 : clients - 3].sum() for row in squares]  # the clients - 2 - 2 closest others
        wanted = models[int(np.argmin(scores))]
        for variant in wrong:
            judged = strategy(variant, "Krum", record({"w": base.astype(np.float32)}), clients)
            arrays, _ = judged.aggregate_train(1, [reply(record({"w": vector}), i) for i, vector in enumerate(models)])
            wrong[variant] += not np.array_equal(arrays["w"].numpy(), wanted)
    return wrong


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("time", "memory", "ranking"))
    parser.add_argument("rule", choices=SETTINGS)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("clients", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--variant", default=OURS, choices=(*LOW_MEMORY, THEIRS))
    asked = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(asked.threads)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    if asked.what == "time":
        figures: Any = times(asked.rule, asked.model, asked.clients, asked.pairs)
    elif asked.what == "memory":
        figures = peak(asked.rule, asked.model, asked.clients, asked.variant)
    else:
        figures = ranking(asked.clients, 100_000, asked.pairs)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
