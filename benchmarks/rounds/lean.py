"""The lean loop: one network reused for every client, in-place updates over all tensors at once, no framework."""

import torch
from torch.nn import functional as F

from .task import contest


def main() -> None:
    """Play the task's rounds."""
    contested = contest(optimizer=False)
    task = contested.task
    module = task.network().train()
    parameters = [parameter.data for parameter in module.parameters()]
    leaves = list(module.parameters())
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    # One vector for weights and running statistics each would be no faster: _foreach_ calls a kernel per tensor too,
    # but without Python between them.
    state = parameters + buffers
    server = [tensor.clone() for tensor in state]
    for round in range(task.rounds):
        contested.begin()
        total = [torch.zeros_like(tensor) for tensor in state]
        for client in range(task.clients):
            torch._foreach_copy_(state, server)
            velocity = None
            for images, labels in task.batches(client, round):
                gradients = torch.autograd.grad(F.cross_entropy(module(images), labels), leaves)
                if velocity is None:
                    velocity = list(gradients)
                else:
                    torch._foreach_mul_(velocity, task.momentum)
                    torch._foreach_add_(velocity, gradients)
                torch._foreach_add_(parameters, velocity, alpha=-task.lr)
            torch._foreach_add_(total, state, alpha=1 / task.clients)
        server = total
    torch._foreach_copy_(state, server)
    contested.finish(module.state_dict())


if __name__ == "__main__":
    main()
