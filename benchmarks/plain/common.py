"""Shared parts of the plain methods: flags, data, the averaging of state dicts, evaluation, records."""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fedkern import data, models

EVALUATION_BATCH = 500
CROP_PADDING = 4


def arguments(description: str, **extra: Any) -> argparse.ArgumentParser:
    """Return the flags of every plain method, named as the settings of ``python -m fedkern.run``.

    Args:
        description: one line.
        **extra: defaults of the method's own flags; their types are the flags'.
    """
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--data", default="colordigits")
    add("--data-root")
    add("--data-option", action="append", default=[], help="key=value")
    add("--clients", type=int, default=5)
    add("--partition")
    add("--correlation", type=float)
    add("--train-samples", type=int)
    add("--public-samples", type=int, default=0)
    add("--augment", help="none or crop-flip; the data set's own where left out")
    add("--model", default="cnn")
    add("--width", type=int)
    add("--rounds", type=int, default=20)
    add("--local-epochs", type=int, default=2)
    add("--local-steps", type=int, help="optimiser steps per round, instead of local epochs")
    add("--batch-size", type=int, default=32)
    add("--optimizer", choices=("sgd", "adamw"), default="sgd")
    add("--threads", type=int, default=0, help="0: PyTorch's own choice")
    add("--device", type=device, default=torch.device("cpu"), help="cpu or cuda")
    add("--out", type=Path, help="JSON file for the figures of every round")
    usual = {"lr": 0.05, "lr_end": 1.0, "momentum": 0.9, "weight_decay": 0.0, "eval_every": 1, "seed": 0}
    for name, default in {**usual, **extra}.items():
        add(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser


def device(word: str) -> torch.device:
    """Return the device of this name.

    Raises:
        argparse.ArgumentTypeError: the name is neither cpu nor cuda, or torch sees no GPU.
    """
    if word not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, given {word!r}")
    if word == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no GPU here: leave --device out, or give cpu")
    return torch.device(word)


class Images(Dataset[tuple[Any, ...]]):
    """Normalised images with labels, a teacher's logits or tokens for each."""

    def __init__(self, images: Tensor, *columns: Tensor, augment: str = "none") -> None:
        if augment not in ("none", "crop-flip"):
            raise ValueError(f"augment: expected none or crop-flip, given {augment}")
        self.images, self.columns, self.augment = images, columns, augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image = self.images[index]
        if self.augment == "crop-flip":
            image = crop_and_flip(image)
        return image, *(column[index] for column in self.columns)


def crop_and_flip(image: Tensor) -> Tensor:
    """Return a random window of the image padded by 4 pixels, mirrored half of the time (``[C, H, W]`` both)."""
    height, width = image.shape[1:]
    padded = F.pad(image, (CROP_PADDING,) * 4)
    top, left = torch.randint(0, 2 * CROP_PADDING + 1, (2,)).tolist()
    image = padded[:, top : top + height, left : left + width]
    return image.flip(2) if torch.rand(()) < 0.5 else image


@dataclass
class Federation:
    """Clients' training sets and the test sets by name, normalised.

    Attributes:
        source: the data of fedkern.data.load: splits with uint8 images, masks and texts.
        public: images that no client has; None where there are none.
    """

    source: Any
    clients: list[Images]
    tests: dict[str, Images]
    public: Images | None

    @property
    def sizes(self) -> list[int]:
        return [len(client) for client in self.clients]


def normalise(images: Tensor, source: Any) -> Tensor:
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (source.form.mean, source.form.std))
    return (images.float() / 255 - mean) / std


def load_source(args: argparse.Namespace) -> Any:
    """Return the data and their partition, as a run of fedkern with the same settings has them."""
    return data.load(
        args.data, root=args.data_root, clients=args.clients, partition=args.partition, seed=args.seed,
        train_samples=args.train_samples, public_samples=args.public_samples, correlation=args.correlation,
        options=dict(word.split("=", 1) for word in args.data_option),
    )  # fmt: skip


def load_data(args: argparse.Namespace) -> Federation:
    source = load_source(args)
    augment = args.augment or source.form.augment

    def images(split: Any, augment: str = "none") -> Images:
        return Images(normalise(split.images, source), split.labels, augment=augment)

    tests = {f"{name}_" if name else "": images(split) for name, split in source.tests.items()}
    if len(source.validation):
        tests["validation_"] = images(source.validation)
    public = None if source.public is None else images(source.public, augment)
    return Federation(source, [images(split, augment) for split in source.clients], tests, public)


def build_model(args: argparse.Namespace, source: Any, model: str | None = None, width: int | None = None) -> Any:
    channels, *sides = source.form.shape
    return models.build(
        model or args.model, classes=len(source.classes), channels=channels, image_size=min(sides), seed=args.seed,
        width=width if model else args.width if width is None else width,
    ).to(args.device)  # fmt: skip


def loader(dataset: Images, batch_size: int, device: torch.device) -> DataLoader[Any]:
    """Return shuffled batches without a last batch of a single sample, which batch norm could not normalise."""
    return DataLoader(
        dataset, batch_size=batch_size, shuffle=True, drop_last=len(dataset) > 1 and len(dataset) % batch_size == 1,
        pin_memory=device.type == "cuda",
    )  # fmt: skip


def on(batches: Iterable[Sequence[Tensor]], device: torch.device) -> Iterator[list[Tensor]]:
    """Yield the batches of a loader, on the device."""
    for batch in batches:
        yield [column.to(device, non_blocking=True) for column in batch]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def optimizer(parameters: Iterable[nn.Parameter], args: argparse.Namespace) -> torch.optim.Optimizer:
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(parameters, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of state dicts, of integer buffers the largest."""
    total = sum(weights)
    mean: dict[str, Tensor] = {}
    for key, value in states[0].items():
        if value.is_floating_point():
            mean[key] = torch.zeros_like(value)
            for state, weight in zip(states, weights, strict=True):
                mean[key] += state[key] * (weight / total)
        else:
            mean[key] = torch.stack([state[key] for state in states]).amax(0)
    return mean


def train(
    model: nn.Module,
    dataset: Images,
    args: argparse.Namespace,
    loss_of: Callable[..., Tensor],
    after_backward: Callable[[], None] | None = None,
) -> None:
    """Train a client's local epochs: ``loss_of(model, *batch)``, and ``after_backward`` between gradients and step."""
    model.train()
    step = optimizer(model.parameters(), args)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(step, args.local_epochs, eta_min=args.lr * args.lr_end)
    batches = loader(dataset, args.batch_size, args.device)
    for _ in range(args.local_epochs):
        for batch in on(batches, args.device):
            step.zero_grad()
            loss = loss_of(model, *batch)
            loss.backward()
            if after_backward is not None:
                after_backward()
            step.step()
        rate.step()


def frozen(model: nn.Module) -> Any:
    """Return a frozen copy in eval mode."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def evaluate(model: nn.Module, tests: Mapping[str, Images]) -> dict[str, float]:
    """Return accuracy, mean cross-entropy and mean probability of the true class on every test set."""
    model.eval()
    figures: dict[str, float] = {}
    for name, dataset in tests.items():
        correct, loss, confidence = 0, 0.0, 0.0
        for images, labels in on(DataLoader(dataset, batch_size=EVALUATION_BATCH), device_of(model)):
            logits = model(images)
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            correct += int((logits.argmax(1) == labels).sum())
            confidence += float(logits.softmax(1).gather(1, labels[:, None]).sum())
        figures[f"{name}accuracy"] = correct / len(dataset)
        figures[f"{name}loss"] = loss / len(dataset)
        figures[f"{name}confidence"] = confidence / len(dataset)
    return figures


class Records:
    """Figures and seconds of every round, printed as they come and written to ``--out`` at the end."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._rounds = args, []
        self._begun = time.perf_counter()

    def due(self, number: int, rounds: int) -> bool:
        """Return whether round ``number``, from 1, of so many is evaluated."""
        return number % self._args.eval_every == 0 or number == rounds

    def start(self) -> None:
        """Begin a round."""
        self._begun = time.perf_counter()

    def add(self, figures: Mapping[str, float]) -> None:
        """End a round."""
        number, seconds = len(self._rounds) + 1, time.perf_counter() - self._begun
        self._rounds.append({"round": number, "round_seconds": seconds, **figures})
        said = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if name.endswith(("accuracy", "_r1")))
        print(f"round {number}: {seconds:.2f} s{', ' if said else ''}{said}", flush=True)

    def write(self) -> None:
        if self._args.out:
            self._args.out.write_text(json.dumps({"rounds": self._rounds}) + "\n")


def start(description: str | None, flags: Mapping[str, Any]) -> tuple[argparse.Namespace, Federation]:
    """Read the flags, seed, and load the data."""
    args = prepare(description, flags)
    return args, load_data(args)


def prepare(description: str | None, flags: Mapping[str, Any]) -> argparse.Namespace:
    args = arguments((description or "").split("\n")[0], **flags).parse_args()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def average_clients(model: nn.Module, federation: Federation, train_client: Callable[[nn.Module, int], None]) -> None:
    """Train a copy of ``model`` for each client by ``train_client(copy, k)``, and load the mean into ``model``."""
    states = []
    for k in range(len(federation.clients)):
        local = copy.deepcopy(model)
        train_client(local, k)
        states.append(local.state_dict())
    model.load_state_dict(average(states, federation.sizes))


def run_rounds(
    args: argparse.Namespace, model: nn.Module, federation: Federation, update: Callable[[int], None]
) -> None:
    """Call ``update(round)``, which leaves the new global network in ``model``, evaluate, and keep the records."""
    records = Records(args)
    for number in range(1, args.rounds + 1):
        records.start()
        update(number - 1)
        records.add(evaluate(model, federation.tests) if records.due(number, args.rounds) else {})
    records.write()
