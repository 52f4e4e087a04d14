"""Runs whose nodes each have one client's data: what server and nodes must agree on before the first round.

The server's test and validation sets judge the network, its training samples are unused. The server learns only a
client's number of samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch.utils.data import default_collate

from fedkern.data import lookup
from fedkern.data.forms import SampleForm
from fedkern.data.types import FederatedData
from fedkern.errors import UserError, printable_name
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import data_of_one, declared_data

if TYPE_CHECKING:
    from fedkern.flower.runs.node_executor import NodeRegistry


def form_of(data: FederatedData) -> dict[str, object]:
    """Return the facts on data that server and nodes must share, as plain values."""
    form = data.form
    facts = {"task": data.task.name, "classes": list(data.classes)}
    if isinstance(form, SampleForm):  # a user's collation may make batches of several lengths
        is_fixed = data.clients[0].collate is default_collate
        return {**facts, "items": [words if is_fixed else words.partition(" ")[0] for words in form.shapes]}
    return facts | {
        "images": list(form.shape), "dtype": form.dtype, "is_raw": form.is_raw, "is_scaled": form.is_scaled,
        "mean": list(form.mean), "std": list(form.std), "augment": form.augment, "bits": form.grey_bits,
        "window": list(form.window or ()),
    }  # fmt: skip


def declare_federation(config: RunConfig, registry: NodeRegistry, warn: Callable[[str, str], None]) -> FederatedData:
    """Return the federation as the server sees it: its own test sets, and every node's number of samples.

    Raises UserError if a node is missing or has data of another form.
    """
    data = data_of_one(config)
    registry.count = config.clients
    registry.wait_for_nodes(warn)
    if missing := [k for k in range(config.clients) if k not in registry.home]:
        raise UserError(
            f"Clients without a node: {', '.join(map(str, missing))}; where nodes have their own data, all must be "
            "connected before the first round."
        )
    form = form_of(data)
    for k in range(config.clients):
        facts = {name: value for name, value in registry.facts[k].items() if name != "samples"}
        for name, value in form.items():
            if facts.get(name) != value:
                theirs = printable_name(str(facts.get(name)), 200)
                way = "give all machines the same classes and kind of samples"
                if name == "classes" and lookup(config.data).function is not None:
                    way = "name them in the function, FederatedData.from_datasets([train], test, classes=[...])"
                if name == "window":  # percentiles are of every folder's own files
                    way = "give --data-option window=CENTRE,WIDTH instead of percentiles"
                raise UserError(
                    f"Client {k}'s data have other {name} than the server's ({theirs}, and here {value}): {way}."
                )
    return declared_data(data, [registry.facts[k]["samples"] for k in range(config.clients)])
