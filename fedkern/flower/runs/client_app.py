"""The ClientApp of a whole run over Flower: ``fedkern.flower.runs.client_app:app`` in a project's pyproject.toml.

Every node runs the app with these entries of ``--node-config``:

| entry | holds |
|---|---|
| `partition-id`, `num-partitions` | the node's client, from 0, and the number of clients (given by a simulation) |
| `data-root` | folder of the data on this machine, instead of the run-config's |
| `state-dir` | folder of the client's states on this machine, instead of the run-config's |

A SuperNode starts a process for every message, which hands the message on to `client_daemon`. So imports that need
torch stand where they are used.
"""

import math
from typing import Any

from fedkern.files.filesystem import parse_json
from fedkern.flower.adapter import INFO, ClientApp, Context, Message, for_one_message, log, make_reply, unpack_message
from fedkern.flower.runs import client_daemon
from fedkern.flower.runs.node_config import STAYS, own_client

app = ClientApp()


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Say which client this node is, and describe its own data if asked. End the run's process when the run ends."""
    header, _ = unpack_message(message)
    request = parse_json(header)
    if isinstance(request, dict) and isinstance(request.get("end"), str):
        if not for_one_message():
            from fedkern.flower.runs import node_process

            node_process.drop_clients(request["end"])
        elif client_daemon.is_possible():
            client_daemon.end_daemon(request["end"], context.node_config)
        return make_reply(message, b"")
    from fedkern.flower.array_bytes import pack_value
    from fedkern.flower.runs.node_client import PROTOCOL

    entries: dict[str, Any] = {"protocol": PROTOCOL, "client": own_client(context.node_config)}
    if isinstance(request, dict) and request.get("data") is True:
        from fedkern.flower.runs.node_process import describe_data

        entries["data"] = describe_data(context.run_config, context.node_config, _notice)
    return make_reply(message, pack_value(entries))


@app.train()
def answer(message: Message, context: Context) -> Message:
    header, packed = unpack_message(message)
    reply: bytes | None = None
    stays = _idle_seconds(context.run_config.get("flower.resident", STAYS))
    if stays > 0 and for_one_message():
        reply = client_daemon.ask_daemon(header, packed, context.run_config, context.node_config, _notice, stays)
    if reply is None:
        from fedkern.flower.runs import node_process

        reply = node_process.answer_message(header, packed, context.run_config, context.node_config, _notice)
    return make_reply(message, reply)


def _idle_seconds(value: bool | float | int | str) -> float:
    """Return how many seconds a client daemon stays, 0 for an invalid value."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        return 0.0
    return seconds if math.isfinite(seconds) else 0.0


def _notice(text: str) -> None:
    log(INFO, "%s", text)
