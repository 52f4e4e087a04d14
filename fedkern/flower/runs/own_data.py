"""Runs whose nodes have the data of one client each: what server and nodes must agree on before the first round.

The server has a folder of the same kind: its test and validation sets judge the network, its training samples are not
used.  Of a client's data it learns the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fedkern.data.types import FederatedData
from fedkern.errors import UserError, printable_name
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import data_of_one, declared_data

if TYPE_CHECKING:
    from fedkern.flower.runs.node_registry import NodeRegistry


def form_of(data: FederatedData) -> dict[str, Any]:
    """What the data of server and nodes must have in common, as plain values.

    Raises:
        UserError: the samples are no images.
    """
    if "images" not in data.form.offers:
        raise UserError(
            "nodes have images, and the samples of these data are none: play the clients with fedkern.simulate."
        )
    return {
        "task": data.task.name, "classes": list(data.classes), "images": list(data.form.shape),
        "mean": list(data.form.mean), "std": list(data.form.std), "augment": data.form.augment,
        "bits": data.form.grey_bits, "window": list(data.form.window or ()),
    }  # fmt: skip


def declared(config: RunConfig, registry: NodeRegistry, warn: Callable[[str, str], None]) -> FederatedData:
    """The federation as the server sees it: its own test sets, and the number of samples of every node.

    Raises:
        UserError: a node is missing, or has data of another form.
    """
    data = data_of_one(config)
    registry.count = config.clients
    registry.meet(warn)
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
                way = "give all folders the same classes and kind of images"
                if name == "window":  # percentiles are of every folder's own files
                    way = "give --data-option window=CENTRE,WIDTH instead of percentiles"
                raise UserError(
                    f"Client {k}'s data have other {name} than the server's ({theirs}, and here {value}): {way}."
                )
    return declared_data(data, [registry.facts[k]["samples"] for k in range(config.clients)])
