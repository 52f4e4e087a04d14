"""Settings without effect on data and networks that a Python program has in memory."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fedkern.data import FederatedData
from fedkern.data.sources.datasets import is_dataset
from fedkern.errors import UserError, quote_value

_READING = ("data_root", "cache", "public_samples", "correlation")


def check_in_memory(data: Any, model: object, settings: Mapping[str, Any]) -> None:
    """Raise UserError if data or model in memory would ignore a setting."""
    values = {name: value for name, value in settings.items() if value is not None}
    if isinstance(model, nn.Module) and "width" in values:
        raise UserError("width has no effect on a module: leave it out, or name code that takes a width.")
    if data is None or isinstance(data, str):
        return
    federated = isinstance(data, FederatedData)
    is_shared = not federated and is_dataset(data)
    options = values.get("data_options")
    names = list(options) if isinstance(options, Mapping) else []
    if federated and data.form.offers:  # a backdoor marks samples in memory, too
        names = [name for name in names if not name.startswith("backdoor_")]
    unused = [name for name in _READING if name in values]
    unused += ["partition"] if "partition" in values and not is_shared else []
    unused += ["train_samples"] if "train_samples" in values and federated else []
    if names_unused := (*unused, *names):
        raise UserError(
            f"{names_unused[0]} has no effect on data in memory, whose clients have what they were given: leave it out."
        )
    count = len(data.clients) if federated else len(data) if isinstance(data, (Mapping, list, tuple)) else None
    if count and values.get("clients", count) != count:
        raise UserError(f"clients is {quote_value(values['clients'])}, and the data have {count}: leave it out.")
