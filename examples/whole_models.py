"""Averages of whole models as they come: state dicts in a plain loop, lists of NumPy arrays as Flower has them.

python examples/whole_models.py
"""

import copy

import torch

from fedkern import ops

torch.manual_seed(0)
server = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
samples = [600, 500, 700]
clients = [copy.deepcopy(server) for _ in samples]
for client in clients:  # in the place of local training
    client[0].weight.data += 0.1 * torch.randn(32, 20)

server.load_state_dict(ops.tree.weighted_mean([client.state_dict() for client in clients], samples))
print("weights:", server[0].weight[0, :3].tolist())

# A Flower strategy's aggregate_fit has `[parameters_to_ndarrays(result.parameters) for _, result in results]`.
uploads = [[tensor.numpy() for tensor in client.state_dict().values()] for client in clients]
arrays = ops.tree.median(uploads)
print("arrays:", [array.shape for array in arrays])
