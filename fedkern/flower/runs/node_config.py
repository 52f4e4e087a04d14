"""The entries of a node's ``--node-config`` that fedkern reads (see `fedkern.flower.runs.client_app`)."""

from collections.abc import Mapping

from fedkern.errors import UserError

UserConfig = Mapping[str, bool | float | int | str]
"""A run-config or a node's configuration, as Flower gives them."""
STAYS = 600.0
"""Default seconds that a client daemon waits for the next message."""


def own_client(node_config: UserConfig) -> int:
    client, of = (node_config.get(name) for name in ("partition-id", "num-partitions"))
    if type(client) is not int or client < 0 or (of is not None and (type(of) is not int or client >= of)):
        raise UserError(
            f"partition-id must be a number from 0 to num-partitions - 1, not {client!r}: start the node with "
            "--node-config 'partition-id=K num-partitions=N'."
        )
    return client


def folder(node_config: UserConfig, name: str) -> str | None:
    return str(node_config[name]) if node_config.get(name) else None
