"""FedAvg as a plain PyTorch loop that records itself, compared with fedkern's FedAvg and SCAFFOLD."""

import tempfile
from copy import deepcopy

import torch
from torch.utils.data import DataLoader, TensorDataset

import fedkern


def load_table(hospital, patients=200):
    x = torch.randn(patients, 20, generator=torch.Generator().manual_seed(hospital))
    return TensorDataset(x, (x[:, :3].sum(1) > hospital % 3 - 1).long())


def train(net, table):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for x, y in DataLoader(table, 32, shuffle=True):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.state_dict()


tables, test, build = [load_table(k) for k in range(6)], load_table(10, 1000), lambda: torch.nn.Linear(20, 2)
settings = {"rounds": 15, "lr": 0.05, "local_epochs": 1, "batch_size": 32, "momentum": 0.0}
with tempfile.TemporaryDirectory() as runs:
    for seed in range(3):
        torch.manual_seed(seed)
        net, (x, y) = build(), test.tensors
        how = {"method": "my loop", "framework": "PyTorch", "settings": settings, "test_labels": y}
        with fedkern.record(f"{runs}/loop-{seed}", seed=seed, **how) as run:
            for number in range(1, 16):
                states = [train(deepcopy(net), table) for table in tables]
                net.load_state_dict({name: sum(state[name] for state in states) / 6 for name in states[0]})
                run.round(number, accuracy=(net(x).argmax(1) == y).float().mean(), bytes_up=6 * 168, bytes_down=6 * 168)
    data = fedkern.FederatedData.from_datasets(tables, test=test)
    ours = fedkern.compare(["fedavg", "scaffold"], data=data, model=build, out=f"{runs}/fedkern", **settings)
    print(fedkern.compare([runs, ours.folder], out=f"{runs}/result"))
