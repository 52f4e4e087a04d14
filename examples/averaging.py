"""A round of federated averaging by hand: flat parameters, a robust average, Adam on the server.

python examples/averaging.py
"""

import copy

import torch

from fedkern import ops

torch.manual_seed(0)
server = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
weights = [600, 500, 700, 100]
clients = [copy.deepcopy(server) for _ in weights]
flat = ops.FlatParameters(server)  # every parameter and buffer becomes a view of one vector
uploads = []
for client in clients:
    vector = ops.FlatParameters(client).vector
    vector += 0.1 * torch.randn_like(vector)  # in the place of local training
    uploads.append(vector)
uploads[3] *= 100  # a client that went wrong

mean = ops.weighted_mean(uploads, weights)
robust = ops.trimmed_mean(uploads, trim=1)
far, near = ((average - flat.vector).norm() for average in (mean, robust))
print(f"distance of the mean: {far:.1f}, of the trimmed mean: {near:.1f}")

with torch.no_grad():
    flat.vector.copy_(robust)  # the network has the average now
assert torch.equal(torch.cat([server[0].weight.flatten(), server[0].bias]), robust[: 21 * 32])
