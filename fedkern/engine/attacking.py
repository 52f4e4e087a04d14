"""The membership attack on what a finished run released."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.data import FederatedData, normalise
from fedkern.engine import atomic, checkpoint
from fedkern.engine.config import RunConfig
from fedkern.engine.folder import ATTACK
from fedkern.engine.records import plain
from fedkern.engine.run import kept_data, load_data
from fedkern.engine.saved import read_model
from fedkern.errors import UserError
from fedkern.methods.cuts import cuts
from fedkern.privacy import membership_attack


def attack(
    out: Path | str,
    *,
    data: FederatedData | None = None,
    data_root: str | None = None,
    keep: bool = True,
    trusted: Collection[str] = (),
) -> dict[str, Any]:
    """Attacks the model of a finished run: members are its clients' training samples, the others its test images.

    What the run set aside (``--client-test``, ``--held-out-client``) is neither.  Samples that a method keeps from the
    training for itself, such as agnostic FL's for its losses, count as members: the weights were made with them.
    The test set of the training distribution is taken (``id``, where there are several).  Where the clients' samples
    follow another distribution than the test set, the area is not 0.5 for that reason alone.

    Args:
        out: the run folder.
        data: the federated data of the run in memory, instead of loading them.
        data_root: where the data files are now.
        keep: write the result into the run folder: see :func:`write`.
        trusted: what may be imported, see :func:`fedkern.engine.run`.

    Returns:
        ``auc``, ``low``, ``high``, ``tpr``, ``members``, ``others`` (see :class:`fedkern.privacy.Attack`),
        ``member_loss`` and ``other_loss`` (means, in nats; infinite ones are null in the file), ``clients``, the area
        for each client's members alone, and, where images without a known pixel were left out, ``left_out``: how many.

    Raises:
        UserError: the run is not finished or damaged, its data are gone, its task has no labels to lose on, there are
            fewer than two members or others, the model's losses are not numbers, or the result cannot be written.
    """
    out = Path(out)
    config = RunConfig.load(out, device="cpu", **({} if data_root is None else {"data_root": data_root}))
    model, _ = read_model(out, trusted)
    data = kept_data(config, load_data(config, masks=False) if data is None else data)
    if data.task not in ("classification", "segmentation"):
        raise UserError(f"The membership attack is for classification and segmentation, and {out} is for {data.task}.")
    test = data.tests["id" if "id" in data.tests else next(iter(data.tests))]
    others = losses(model, test, data)
    members = [losses(model, split, data) for split in data.clients]
    every = torch.cat(members)
    _check(every, others, out)
    found = membership_attack(every, others)
    result = {
        **found.to_dict(),
        "member_loss": float(every.mean()),
        "other_loss": float(others.mean()),
        "clients": [membership_attack(own, others).auc if len(own) > 1 else None for own in members],
    }
    left_out = sum(len(split) for split in (test, *data.clients)) - len(every) - len(others)
    if left_out:
        result["left_out"] = left_out
    if keep:
        write(out, result)
    return result


def place(out: Path | str) -> Path:
    """Where a run's attack.json is: in the run folder; with ``--records private`` in checkpoints/, which is not told.

    Raises:
        UserError: there is no run in the folder.
    """
    private = RunConfig.load(out, device="cpu").records == "private"
    return Path(out) / checkpoint.FOLDER / ATTACK if private else Path(out) / ATTACK


def write(out: Path | str, result: dict[str, Any]) -> None:
    """Writes what :func:`attack` found to attack.json (see :func:`place`), completely or not at all."""
    text, path = json.dumps(plain(result), indent=2, allow_nan=False), place(out)
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise atomic.unwritable(path.parent, error) from None
    atomic.write_bytes(path, (text + "\n").encode())


@torch.no_grad()
def losses(model: nn.Module, split: Any, data: FederatedData, batch: int = 500) -> Tensor:
    """The cross-entropy of every image of a split, fp64 [n]; for segmentation the mean over its known pixels.

    Images without a known pixel have no loss and are left out: n is then less than the split's length.
    """
    values = []
    for rows in cuts(len(split), batch):
        images, labels = split.images[rows], split.labels[rows]
        logits = model(normalise(images, data.mean, data.std)).double()
        if labels.dim() == 1:
            values.append(F.cross_entropy(logits, labels, reduction="none"))
            continue
        known = (labels >= 0).flatten(1)
        loss = F.cross_entropy(logits, labels.clamp_min(0), reduction="none").flatten(1)
        pixels = known.sum(1)
        mean = torch.where(known, loss, 0.0).sum(1) / pixels
        values.append(mean[pixels > 0])
    return torch.cat(values)


def _check(members: Tensor, others: Tensor, out: Path) -> None:
    """Raises UserError where there is nothing to compare."""
    for values, what in ((members, "training samples"), (others, "test images")):
        if len(values) < 2:
            raise UserError(
                f"The membership attack compares at least two training samples with two test images, and {out} has "
                f"{len(values)} {what} with known answers: attack a run on more data."
            )
        if bool(values.isnan().any()):
            raise UserError(
                f"The model of {out} has losses that are not numbers (NaN) on {int(values.isnan().sum())} of its "
                f"{len(values)} {what}, which no attack can compare: train it again with a lower learning rate."
            )
