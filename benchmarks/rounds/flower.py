"""Flower's simulation: a ServerApp with its FedAvg, ClientApps on Ray's workers (flwr 1.41's message API)."""

from __future__ import annotations

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from .task import Contest, Task, contest


def client_app(folder: str, threads: int) -> ClientApp:
    """Return an app that trains a client's partition of the task."""
    app = ClientApp()
    kept: dict[str, Any] = {}  # a worker's own task and network, made once

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if not kept:
            torch.set_num_threads(threads)
            kept["task"] = Task.load(folder)
            kept["module"] = kept["task"].network()
        task, module = kept["task"], kept["module"]
        module.load_state_dict(message.content["arrays"].to_torch_state_dict())
        client = int(context.node_config["partition-id"])
        task.train(module, client, int(message.content["config"]["server-round"]) - 1)
        content = {"arrays": ArrayRecord(module.state_dict()), "metrics": MetricRecord({"num-examples": task.samples})}
        return Message(content=RecordDict(content), reply_to=message)

    return app


class Marked(FedAvg):
    """FedAvg of every client that notes when a round begins."""

    def __init__(self, contested: Contest) -> None:
        count = contested.task.clients
        super().__init__(fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
        self.contested = contested

    def configure_train(self, server_round: int, *rest: Any, **named: Any) -> Any:
        self.contested.begin()
        return super().configure_train(server_round, *rest, **named)


def main() -> None:
    """Play the task's rounds."""
    contested = contest(optimizer=False)
    task = contested.task
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        result = Marked(contested).start(
            grid=grid, initial_arrays=ArrayRecord(task.network().state_dict()), num_rounds=task.rounds
        )
        contested.finish(result.arrays.to_torch_state_dict())

    run_simulation(
        server_app=server_app,
        client_app=client_app(str(task.folder), contested.threads),
        num_supernodes=task.clients,
        backend_config={
            "init_args": {"num_cpus": contested.workers, "include_dashboard": False},
            # A worker that asks for no GPU is shown none.
            "client_resources": {"num_cpus": 1, "num_gpus": float(task.device.type == "cuda") / contested.workers},
        },
    )


if __name__ == "__main__":
    main()
