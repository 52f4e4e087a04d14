"""pFedMe's global model: clients move towards personal networks that stay near (T. Dinh et al., arXiv 2006.08848).

    python -m fedkern.run pfedme --plugin examples/papers/pfedme.py --data examples/papers/synthetic.py:synthetic \\
        --model examples/papers/synthetic.py:Linear --local-steps 20 --batch-size 20 --lr 0.01 --server-lr 2

``--server-lr`` is the paper's beta.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedkern import option, register
from fedkern.methods import Client, FedAvg, Message, Phase


@register("pfedme")
class PFedMe(FedAvg):
    """FedAvg whose clients step towards their personal networks, found by a few steps each (arXiv 2006.08848).

    With the batch's mean loss L, theta takes ``inner_steps`` steps on L + lambda/2 ||theta - w||^2 and the decay of the
    released code, and w moves by lr lambda (theta - w).  theta goes on from batch to batch, and starts at the received
    network, as in the released code.
    """

    requires = frozenset({"loss"})
    averages = True

    @dataclass(frozen=True)
    class Options(FedAvg.Options):
        lam: float = option(20.0, "weight of the distance to the client's network", above=0, name="lambda")
        inner_lr: float = option(0.01, "learning rate of the personal network", above=0)
        inner_steps: int = option(5, "steps of the personal network on a batch", low=1)
        decay: float = option(0.001, "weight decay of the personal network", low=0)

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        network, near = client.model(message), client.model(message)
        inner = torch.optim.SGD(near.parameters(), lr=self.options.inner_lr, weight_decay=self.options.decay)
        for _ in range(client.epochs):
            for batch in client.batches():
                for _ in range(self.options.inner_steps):
                    inner.zero_grad()
                    batch.task.loss(near, batch).backward()
                    for theta, w in zip(near.parameters(), network.parameters(), strict=True):
                        theta.grad += self.options.lam * (theta.detach() - w.detach())
                    inner.step()
                with torch.no_grad():
                    for theta, w in zip(near.parameters(), network.parameters(), strict=True):
                        w += client.lr * self.options.lam * (theta - w)
        return client.upload(network)
