"""The membership attack on what a finished run released."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.data import FederatedData, normalise
from fedkern.engine import atomic
from fedkern.engine.config import RunConfig
from fedkern.engine.run import load_data
from fedkern.engine.saved import read_model
from fedkern.errors import UserError
from fedkern.privacy import membership_attack

FILE = "attack.json"


def attack(out: Path | str, *, data: FederatedData | None = None, data_root: str | None = None) -> dict[str, Any]:
    """Attacks the model of a finished run: members are its clients' training samples, the others its test images.

    The test set of the training distribution is taken (``id``, where there are several).  Where the clients' samples
    follow another distribution than the test set, the area is not 0.5 for that reason alone.

    Args:
        out: the run folder; the result is written there as attack.json.
        data: the federated data of the run in memory, instead of loading them.
        data_root: where the data files are now.

    Returns:
        ``auc``, ``low``, ``high``, ``tpr``, ``members``, ``others`` (see :class:`fedkern.privacy.Attack`),
        ``member_loss`` and ``other_loss`` (means, in nats), and ``clients``, the area for each client's members alone.

    Raises:
        UserError: the run is not finished or damaged, its data are gone, or its task has no labels to lose on.
    """
    out = Path(out)
    config = RunConfig.load(out, **({} if data_root is None else {"data_root": data_root}))
    model, _ = read_model(out)
    data = load_data(config, masks=False) if data is None else data
    if data.task not in ("classification", "segmentation"):
        raise UserError(f"The membership attack is for classification and segmentation, and {out} is for {data.task}.")
    test = data.tests["id" if "id" in data.tests else next(iter(data.tests))]
    others = losses(model, test, data)
    members = [losses(model, split, data) for split in data.clients]
    found = membership_attack(torch.cat(members), others)
    result = {
        **found.to_dict(),
        "member_loss": float(torch.cat(members).mean()),
        "other_loss": float(others.mean()),
        "clients": [membership_attack(own, others).auc if len(own) > 1 else None for own in members],
    }
    text = json.dumps(result, indent=2, allow_nan=False)
    atomic.write_bytes(out / FILE, (text + "\n").encode())
    return result


@torch.no_grad()
def losses(model: nn.Module, split: Any, data: FederatedData, batch: int = 500) -> Tensor:
    """The cross-entropy of every image of a split, fp64 [n], the mean over pixels for segmentation."""
    values = []
    for images, labels in zip(split.images.split(batch), split.labels.split(batch), strict=True):
        logits = model(normalise(images, data.mean, data.std)).double()
        loss = F.cross_entropy(logits, labels, reduction="none")
        values.append(loss.flatten(1).mean(1) if loss.dim() > 1 else loss)
    return torch.cat(values)
