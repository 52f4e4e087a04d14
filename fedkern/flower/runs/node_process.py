"""The clients of a process on a node, made at the first message of a run and kept for the next ones."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedkern.engine.executors.executor import Answer
from fedkern.errors import ClientFailed, Malformed, UserError
from fedkern.files.filesystem import cache_folder, expand, parse_json
from fedkern.flower.runs import node_config, run_settings
from fedkern.flower.runs.node_client import ClientRequest, NodeClients, pack_reply
from fedkern.flower.runs.node_config import UserConfig
from fedkern.flower.runs.own_data import form_of
from fedkern.settings.run_data import data_of_one

STATES = "flower"
"""Folder of the clients' states in the user's cache."""
Notice = Callable[[str], None]
_here: tuple[Any, NodeClients] | None = None  # of the last message of this process, with what they were made of


def answer_message(header: str, packed: bytes, run_config: UserConfig, node: UserConfig, notice: Notice) -> bytes:
    """Return the answer to a message of the run's server. A client that cannot answer says why.

    ``header`` is a :class:`~fedkern.flower.runs.node_client.ClientRequest` as JSON text. Raises Malformed for another
    client's message.
    """
    request, client = ClientRequest.read(parse_json(header)), node_config.own_client(node)
    if request.client != client:
        raise Malformed(f"is for client {request.client}, and this node is client {client}")
    try:
        return _clients(request, run_config, node, notice).answer(request, packed)
    except Malformed as why:
        failure = ClientFailed(client, f"the message of the server {why}")
    except UserError as error:
        failure = ClientFailed(client, str(error))
    except Exception as error:  # anything of data, method or plugin: the server says it, and decides
        failure = ClientFailed(client, f"{type(error).__name__}: {error}", traceback.format_exc())
    return pack_reply(request, Answer(client, problem=failure))


def describe_data(run_config: UserConfig, node: UserConfig, notice: Notice) -> dict[str, object]:
    settings = run_settings.read_run_config(run_config, node_config.folder(node, "data-root"))
    data = data_of_one(settings.config, notice, node=True)
    return {"samples": len(data.clients[0]), **form_of(data)}


def _clients(request: ClientRequest, run_config: UserConfig, node: UserConfig, notice: Notice) -> NodeClients:
    """Return the clients of this process, after dropping clients of another run or other settings."""
    global _here
    alike = {name: value for name, value in node.items() if name != "partition-id"}
    owner = request.client if run_config.get("flower.own-data") else None
    made_of = (request.run, request.attempt, request.threads, request.client_threads, dict(run_config), alike, owner)
    if _here is not None and _here[0] == made_of:
        _here[1].notice = notice
        return _here[1]
    drop_clients()
    settings = run_settings.read_run_config(run_config, node_config.folder(node, "data-root"))
    folder = node_config.folder(node, "state-dir") or settings.state
    base = expand(folder) if folder else cache_folder(STATES)
    clients = NodeClients(
        settings.config, Path(base), notice, own_data=settings.own_data, half=settings.transport == "bf16"
    )
    _here = made_of, clients
    return clients


def drop_clients(run: str | None = None) -> None:
    """Drop the clients of this process or of a run. The next message begins with the state on the disk."""
    global _here
    if _here is not None and run in (None, _here[0][0]):
        _here[1].close()
        _here = None
