"""The entries of a node's ``--node-config`` that fedkern reads (see `fedkern.flower.runs.client_app`)."""

from __future__ import annotations

from collections.abc import Mapping

from fedkern.errors import UserError

UserConfig = Mapping[str, bool | float | int | str]
"""A run-config, or the configuration of a node, as Flower gives them."""
STAYS = 600.0
"""Seconds that a client daemon waits for the next message, where the run-config does not say."""


def own_client(node_config: UserConfig) -> int:
    """Return the client that the node is.

    Raises UserError where the node's configuration does not say it.
    """
    client, of = (node_config.get(name) for name in ("partition-id", "num-partitions"))
    if type(client) is not int or client < 0 or (of is not None and (type(of) is not int or client >= of)):
        raise UserError(
            f"partition-id must be a number from 0 to num-partitions - 1, not {client!r}: start the node with "
            "--node-config 'partition-id=K num-partitions=N'."
        )
    return client


def folder(node_config: UserConfig, name: str) -> str | None:
    """Return the folder on this machine that an entry names.

    None: that of the run-config.
    """
    return str(node_config[name]) if node_config.get(name) else None
