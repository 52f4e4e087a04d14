"""A ServerApp like the quickstart's with a deadline, which notes the replies that did not count."""

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from task import Net

from fedkern.flower.strategies import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    torch.manual_seed(0)
    settings = context.run_config
    count = settings["nodes"]
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
    result = strategy.start(
        grid=grid, initial_arrays=ArrayRecord(Net().state_dict()), train_config=ConfigRecord({"lr": 0.1}),
        num_rounds=settings["rounds"], timeout=settings["deadline"],
    )  # fmt: skip
    Path("left_out.json").write_text(json.dumps(strategy.left_out))
    torch.save(result.arrays.to_torch_state_dict(), "final_model.pt")
