"""The figures of a finished run's network, on the run's own test sets or on those of another data set."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedkern.data import FederatedData, load
from fedkern.engine.config import RunConfig
from fedkern.engine.evaluate import CPU_BATCH, check_sets, evaluate
from fedkern.engine.final_figures import final_figures
from fedkern.engine.network import cpu_threads
from fedkern.engine.run import load_data
from fedkern.engine.samples import BATCH, TestSet
from fedkern.engine.store.saved_model import read_model
from fedkern.errors import UserError
from fedkern.methods import registry
from fedkern.models.precision import computing

VALIDATION = "validation_"


def evaluate_run(
    out: Path | str,
    *,
    data: str | FederatedData | None = None,
    data_root: str | None = None,
    data_options: Mapping[str, object] | None = None,
    trusted: Collection[str] = (),
    model: nn.Module | None = None,
) -> dict[str, float]:
    """Evaluates the network of a finished run.

    Args:
        out: the run folder.
        data: name of another data set, or federated data in memory; None: the run's own.  Only the test sets and the
            validation set are looked at.
        data_root: folder of the data's files; for the run's own data the folder where they are now.
        data_options: options of the other data set.
        trusted: what may be imported, see :func:`fedkern.engine.run`.
        model: the run's network, where a script made it.

    Returns:
        The figures by test set, as in ``summary.json``: ``accuracy``, ``id_auroc``, ``validation_loss`` ...

    Raises:
        UserError: the folder has no finished run, or the data have other classes, another image size or another task.
    """
    module, about = read_model(out, trusted, model)
    config = RunConfig.load(out, trusted=trusted, device="cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(data, FederatedData):
        loaded = data
    elif data is None:
        if data_options:
            raise UserError("--data-option is for another data set, named with --data: the run's own data keep theirs.")
        loaded = load_data(config.replace(data_root=data_root or config.data_root), masks=False)
    else:
        loaded = load(data, root=data_root, clients=1, partition="iid", seed=config.seed, options=data_options or {})
    _check_fits(loaded, about, Path(out))
    check_sets(loaded)
    kind = registry.get(config.method)
    method = kind(kind.Options.parse(config.options, method=config.method))
    module = module.to(config.device).eval()
    sets = _sets(loaded, module, about, config)
    with cpu_threads(config.threads), computing(config.precision):
        found = evaluate(method, module, sets, keep=True)
    return {**found, **final_figures(sets, loaded.classes).metrics, **found}


def _sets(data: FederatedData, module: nn.Module, about: Mapping[str, Any], config: RunConfig) -> dict[str, TestSet]:
    splits = {f"{name}_" if name else "": split for name, split in data.tests.items()}
    if len(data.validation):
        splits[VALIDATION] = data.validation
    device = torch.device(config.device)
    # The batch size of the run's own evaluations, on which figures without running statistics depend.
    batch = CPU_BATCH if device.type == "cpu" and config.statistics else BATCH
    mean, std = tuple(about["mean"]), tuple(about["std"])
    sets = {}
    for prefix, split in splits.items():
        tokens = None if split.texts is None else module.tokenize(split.texts).to(device)  # type: ignore[operator]
        sets[prefix] = TestSet(split, mean, std, device, False, batch, tokens=tokens)
    return sets


def _check_fits(data: FederatedData, about: Mapping[str, Any], out: Path) -> None:
    task = about.get("task", "classification")
    if data.task != task:
        raise UserError(f'The run in {out} is for {task}, and the data set "{data.name}" is for {data.task}.')
    expected = (about["channels"], *about["image_size"])
    if tuple(data.image_shape) != expected:
        shown = ["x".join(str(side) for side in shape) for shape in (data.image_shape, expected)]
        raise UserError(
            f'The images of "{data.name}" are {shown[0]} (channels, height, width), but the run in {out} saw '
            f"{shown[1]}: match them with --data-option size=N or colour=grey, where the data set has these options."
        )
    if task != "retrieval" and list(data.classes) != list(about["classes"]):
        raise UserError(
            f'The classes of "{data.name}" are {_named(data.classes)}, but the network in {out} tells '
            f"{_named(about['classes'])}: name data with the same classes in the same order."
        )


def _named(classes: Collection[str]) -> str:
    names = list(classes)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
