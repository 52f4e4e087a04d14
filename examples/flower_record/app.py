"""A Flower app whose strategy records its rounds, compared with fedkern's FedAvg.

pip install '.[flower]'   # in a checkout of fedkern
python examples/flower_record/app.py
"""

import tempfile

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.utils.data import DataLoader, TensorDataset

import fedkern

CLIENTS, ROUNDS, SEEDS = 4, 5, 2
SETTINGS = {"rounds": ROUNDS, "lr": 0.05, "local_epochs": 1, "batch_size": 32, "momentum": 0.0}


def load_table(hospital: int, patients: int = 200) -> TensorDataset:
    x = torch.randn(patients, 20, generator=torch.Generator().manual_seed(hospital))
    return TensorDataset(x, (x[:, :3].sum(1) > hospital % 3 - 1).long())


def build_network() -> torch.nn.Module:
    return torch.nn.Linear(20, 2)


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    net, table = build_network(), load_table(int(context.node_config["partition-id"]))
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=message.content["config"]["lr"])
    for x, y in DataLoader(table, SETTINGS["batch_size"], shuffle=True):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": len(table)})}
    return Message(RecordDict(content), reply_to=message)


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    (net := build_network()).load_state_dict(arrays.to_torch_state_dict())
    x, y = load_table(10, 1000).tensors
    return MetricRecord({"accuracy": (net(x).argmax(1) == y).float().mean().item()})


class RecordedFedAvg(FedAvg):
    """Flower's FedAvg, which records every round with ``run.round``. Other strategies need the same two methods."""

    def __init__(self, run, **settings):
        super().__init__(**settings)
        self.run, self.size = run, 0

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        records = [record for reply in replies for record in reply.content.array_records.values()]
        self.size = sum(len(array.data) for record in records for array in record.values())
        return super().aggregate_train(server_round, replies)

    def start(self, *args, evaluate_fn, **settings):
        def evaluate_and_record(server_round, arrays):
            metrics = evaluate_fn(server_round, arrays)
            self.run.round(server_round, bytes_up=self.size, bytes_down=self.size, **metrics)
            return metrics

        return super().start(*args, evaluate_fn=evaluate_and_record, **settings)


def make_server(folder: str, seed: int) -> ServerApp:
    server_app, labels = ServerApp(), load_table(10, 1000).tensors[1]

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        torch.manual_seed(seed)
        arrays, config = ArrayRecord(build_network().state_dict()), ConfigRecord({"lr": SETTINGS["lr"]})
        how = {"method": "fedavg", "framework": "Flower", "sizes": {"clients": CLIENTS}, "settings": SETTINGS}
        with fedkern.record(folder, seed=seed, test_labels=labels, **how) as run:
            strategy = RecordedFedAvg(run, fraction_evaluate=0.0, min_available_nodes=CLIENTS)
            strategy.start(grid, arrays, num_rounds=ROUNDS, train_config=config, evaluate_fn=evaluate)

    return server_app


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as runs:
        for seed in range(SEEDS):
            run_simulation(make_server(f"{runs}/flower-{seed}", seed), client_app, num_supernodes=CLIENTS)
        data = fedkern.FederatedData.from_datasets([load_table(k) for k in range(CLIENTS)], test=load_table(10, 1000))
        ours = fedkern.compare("fedavg", seeds=SEEDS, data=data, model=build_network, out=f"{runs}/fedkern", **SETTINGS)
        print(fedkern.compare([runs, ours.folder], out=f"{runs}/result"))
