"""Membership attack on the model of a finished run."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkern.data import FederatedData, Split
from fedkern.data.images.image_cache import recall_cache
from fedkern.downstream.saved_network import read_model
from fedkern.engine.batches.reader import BATCH
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.store.record_files import plain
from fedkern.engine.store.resuming import load_unedited
from fedkern.engine.store.run_folder import ATTACKS
from fedkern.errors import UserError
from fedkern.files import atomic
from fedkern.files.image_rows import in_parts
from fedkern.methods.base import Method
from fedkern.methods.protocol import batch_slices
from fedkern.privacy import membership_attack
from fedkern.process.torch_modes import reproducible
from fedkern.settings.config import FOLDER, RunConfig, load_settings
from fedkern.settings.run_data import kept_data, load_data

Result = dict[str, Any]
"""Entries of attack.json."""


@reproducible()
def attack(
    out: Path | str,
    *,
    data: FederatedData | None = None,
    data_root: str | None = None,
    keep: bool = True,
    trusted: Collection[str] = (),
    model: nn.Module | None = None,
    best: bool = False,
) -> Result:
    """Attack the model of a finished run: members are the clients' training samples, the others are test images.

    Samples that the run holds out (``--client-test``, ``--held-out-client``) are neither. So are samples that a method
    keeps from the training (see ``Method.untrained``), because other parts of the method may have seen them.

    The test set is that of the training distribution (``id``, if there are several). If the clients' samples follow
    another distribution, the area differs from 0.5 for that reason alone. Images of one patient or case depend on each
    other, and are the groups of :func:`fedkern.privacy.membership_attack` if the data name them.

    Args:
        data: the in-memory federated data of the run.
        data_root: current folder of the data files.
        keep: write the result into the run folder.
        trusted: code that may be imported (see :func:`fedkern.load`).
        model: a module like the one that the run was given.
        best: attack the network of the best round.

    Returns:
        The entries of :class:`fedkern.privacy.Attack`, and ``network`` ("best" or "last"), ``independent`` (the unit
            "image", "patient" or "case" of the intervals), ``member_loss`` and ``other_loss`` (means in nats, null in
            the file if infinite), ``clients`` (the area for each client's members), ``left_out`` (images without a
            known pixel, if any) and ``untrained`` (samples that the method kept from the training, if any).
    """
    out = Path(out)
    moved = {} if data_root is None else {"data_root": data_root}
    config = load_unedited(out, trusted=trusted, device="cpu", cache=recall_cache(out), **moved)
    network, about = read_model(out, trusted, model, best=best)
    if "items" in about:
        raise UserError(f"The membership attack is for images, and the samples of {out} are none.")
    data = kept_data(config, load_data(config, masks=False) if data is None else data)
    if "classes" not in data.task.offers:
        raise UserError(f"The membership attack is for classes of images or pixels, and {out} is for {data.task.name}.")
    splits, untrained = find_trained(config, data)
    test = data.tests["id" if "id" in data.tests else next(iter(data.tests))]
    test_losses = losses(network, test, data)
    members = [losses(network, split, data) for split in splits]
    member_losses = torch.cat(members)
    _check(member_losses, test_losses, out)
    independent, groups = group_samples(splits, test)
    outcome = membership_attack(member_losses, test_losses, groups=groups)
    result = {
        "network": "best" if best else "last",
        **outcome.to_dict(),
        "independent": independent,
        "member_loss": float(member_losses.mean()),
        "other_loss": float(test_losses.mean()),
        "clients": [membership_attack(values, test_losses).auc if len(values) > 1 else None for values in members],
    }
    left_out = sum(len(split) for split in (test, *splits)) - len(member_losses) - len(test_losses)
    result |= {name: count for name, count in (("left_out", left_out), ("untrained", untrained)) if count}
    if keep:
        write(out, result)
    return result


def find_trained(config: RunConfig, data: FederatedData) -> tuple[list[Split], int]:
    """Return every client's samples without those that the method keeps from the training, and their number."""
    # A network of --teachers may have trained on any sample.
    if config.kind.untrained is Method.untrained or config.teachers is not None:
        return list(data.clients), 0
    method = config.new_method()
    context = RunContext(config, data)
    splits, count = [], 0
    for k, split in enumerate(data.clients):
        in_training = torch.ones(len(split), dtype=torch.bool)
        in_training[torch.from_numpy(method.untrained(Client(context, k, {})))] = False
        splits.append(split if in_training.all() else split.subset(in_training.nonzero().flatten()))
        count += int((~in_training).sum())
    return splits, count


def group_samples(members: Sequence[Split], test: Split) -> tuple[str, tuple[Tensor, Tensor] | None]:
    """Return the independent unit, and the groups of the members' and the others' images (None: images)."""
    splits = (*members, test)
    loss_rows = [torch.cat([(part[:, None] >= 0).flatten(1).any(1) for part in in_parts(own.labels)]) for own in splits]
    for name, numbers in (("patient", [s.patients for s in splits]), ("case", [s.cases for s in splits])):
        groups = [n[rows] for n, rows in zip(numbers, loss_rows, strict=True) if n is not None]
        if len(groups) == len(splits):
            of_members, of_others = torch.cat(groups[:-1]), groups[-1]
            if name == "case":  # members and others number their cases separately, and share none
                of_others = of_others + int(of_members.max()) + 1 - int(of_others.min())
            return name, (of_members, of_others)
    return "image", None


def result_path(out: Path | str, network: str = "last") -> Path:
    """Return the path of a run's attack.json, with ``--records private`` in checkpoints/, which is not public."""
    private = load_settings(out, device="cpu").records == "private"
    return Path(out) / (FOLDER if private else "") / ATTACKS[network]


def write(out: Path | str, result: Result) -> None:
    text, path = json.dumps(plain(result), indent=2, allow_nan=False), result_path(out, result["network"])
    if path.parent != Path(out):
        atomic.make_folder(path.parent)
    atomic.write_bytes(path, (text + "\n").encode())


@torch.no_grad()
def losses(model: nn.Module, split: Split, data: FederatedData) -> Tensor:
    """Return the cross-entropy of every image, for segmentation the mean over known pixels, fp64 ``[n]``.

    Images without a known pixel are left out, so that n may be less than the split's length.
    """
    values = []
    for rows in batch_slices(len(split), BATCH):
        logits = model(data.form.normalise_images(split.images[rows])).double()
        values.append(split.task.sample_losses(logits, split.labels[rows]))
    return torch.cat(values)


def _check(members: Tensor, test_losses: Tensor, out: Path) -> None:
    for values, noun in ((members, "training samples"), (test_losses, "test images")):
        if len(values) < 2:
            raise UserError(
                f"The membership attack compares at least two training samples with two test images, and {out} has "
                f"{len(values)} {noun} with known answers: attack a run on more data."
            )
        if bool(values.isnan().any()):
            raise UserError(
                f"The model of {out} has losses that are not numbers (NaN) on {int(values.isnan().sum())} of its "
                f"{len(values)} {noun}, which no attack can compare: train it again with a lower learning rate."
            )
