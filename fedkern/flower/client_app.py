"""The ClientApp of a whole fedkern run over Flower: ``fedkern.flower.client_app:app`` in a project's pyproject.toml.

Flower runs it on every node, with these entries of ``--node-config``:

| entry | holds |
|---|---|
| `partition-id`, `num-partitions` | which client this node is, from 0, and of how many; a simulation gives both |
| `data-root` | folder of the data on this machine, instead of that of the run-config |
| `state-dir` | folder of the client's states, instead of that of the run-config |
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from fedkern.engine.run import data_of_one
from fedkern.errors import UserError
from fedkern.files import cache_folder, expand
from fedkern.flower import run_settings
from fedkern.flower.adapter import INFO, ClientApp, Context, Message, log, opened, replied
from fedkern.flower.node_client import Letter, NodeClients, failed
from fedkern.flower.own_data import form_of
from fedkern.flower.portable import Malformed, pack
from fedkern.inputs import parse_json

app = ClientApp()

STATES = "flower"
"""Folder of the clients' states in the user's cache."""
_here: tuple[Any, NodeClients] | None = None  # of the last message of this process, with what they were made of


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Says which client this node is and, where its folder holds its own data alone, what data they are."""
    header, _ = opened(message)
    asked = parse_json(header)
    found: dict[str, Any] = {"client": own_client(context)}
    if isinstance(asked, dict) and asked.get("data") is True:
        settings = run_settings.read(context.run_config, _data_root(context))
        data = data_of_one(settings.config, lambda text: log(INFO, text))
        found["data"] = {"samples": len(data.clients[0]), **form_of(data)}
    return replied(message, pack(found))


@app.train()
def answer(message: Message, context: Context) -> Message:
    """Answers a message of the run's server."""
    header, parcel = opened(message)
    letter = Letter.read(parse_json(header))
    if letter.client != own_client(context):
        raise Malformed(f"is for client {letter.client}, and this node is client {own_client(context)}")
    try:
        return replied(message, _clients(letter, context).answer(letter, parcel))
    except Malformed as why:
        return replied(message, failed(letter, f"the message of the server {why}", ""))
    except UserError as error:
        return replied(message, failed(letter, str(error), ""))
    except Exception as error:  # anything of data, method or plugin: the server says it, and decides
        told = f"{type(error).__name__}: {error}"
        return replied(message, failed(letter, told, traceback.format_exc()))


def own_client(context: Context) -> int:
    """The client that this node is.

    Raises:
        UserError: the node's configuration does not say it.
    """
    given, of = (context.node_config.get(name) for name in ("partition-id", "num-partitions"))
    if type(given) is not int or given < 0 or (of is not None and (type(of) is not int or given >= of)):
        raise UserError(
            f"partition-id must be a number from 0 to num-partitions - 1, not {given!r}: start the node with "
            "--node-config 'partition-id=K num-partitions=N'."
        )
    return given


def _clients(letter: Letter, context: Context) -> NodeClients:
    """The clients of this process; those of another run, or with other settings, are dropped."""
    global _here
    run = context.run_config
    node = {name: value for name, value in context.node_config.items() if name != "partition-id"}
    whose = own_client(context) if run.get("flower.own-data") else None
    made_of = (letter.run, letter.attempt, letter.threads, letter.client_threads, dict(run), node, whose)
    if _here is not None and _here[0] == made_of:
        return _here[1]
    forget()
    settings = run_settings.read(run, _data_root(context))
    given = str(node.get("state-dir") or settings.state)
    base = expand(given) if given else cache_folder(STATES)
    clients = NodeClients(
        settings.config,
        Path(base),
        lambda text: log(INFO, text),
        own_data=settings.own_data,
        half=settings.transport == "bf16",
    )
    _here = made_of, clients
    return clients


def _data_root(context: Context) -> str | None:
    given = context.node_config.get("data-root")
    return str(given) if given else None


def forget() -> None:
    """Drops the clients of this process; the next message begins with what is on the disk."""
    global _here
    if _here is not None:
        _here[1].close()
    _here = None
