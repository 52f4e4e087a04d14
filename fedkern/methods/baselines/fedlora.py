"""FedLoRA: low-rank adapters of a frozen network travel, and the server merges their products."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkern import ops
from fedkern.errors import UserError
from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import BEFORE, ClientId, Message, Phase, Upload
from fedkern.methods.roles import Client, Server
from fedkern.methods.uploads import Declaration, Values
from fedkern.models.state.allocate import make_empty
from fedkern.models.state.freezing import match_names
from fedkern.tasks.user_tasks import user_module
from fedkern.typed_option import option

LARGEST = 1e6
"""Largest entry of an adapter that the server accepts, so that no product overflows."""


@register("fedlora")
class FedLoRA(FedAvg):
    """Low-rank adapters of a frozen network's linear layers travel, and their products are merged (arXiv 2402.11505).

    Start from a pretrained network: ``--init WEIGHTS``, or a ``--model`` that loads its weights.  The network never
    changes and never travels.  Every ``nn.Linear`` W x + b becomes

        y = W x + b + s B A x        A [rank, in], B [out, rank]

    s is alpha / rank, or alpha / sqrt(rank) with ``scaling=root`` (arXiv 2312.03732).  Clients train A and B.  The
    server takes the matrix of rank ``rank`` that is nearest to the weighted mean of the products B_k A_k
    (`fedkern.ops.lora_merge`).  Means of A and of B would have another product.  ``merge_error`` in the records is the
    relative error of that matrix, the largest of all layers.

    A client sends and gets rank (in + out) numbers of 4 bytes for every layer.  The names of layers and tensors are
    those of `peft`, which loads the adapters.

    What the papers leave open:

    - A begins with uniform numbers of +-1 / sqrt(in), as in `peft`, and B with 0.
    - The rows of a merged A are orthogonal, with the norm that rows of A begin with.  B has the singular values.  A row
      without a singular value is the one before.
    - Layers that are frozen already get no adapter.  ``layers`` names others.

    ``--buffers local`` and ``drop``, ``--personal``, ``--compress``, ``--aggregator``, ``--server-rule``, ``--dp-clip``
    and ``--max-update-norm`` are for means of parameters, and are refused.

    Source: Hu et al., ICLR 2022; Bai et al., NeurIPS 2024 (FlexLoRA), here with one rank for all clients.
    """

    requires = frozenset({"loss"})
    averages = False
    asynchronous = False  # counts on whole rounds
    reduce = ()
    pools_statistics = False

    @dataclass(frozen=True)
    class Options(FedAvg.Options):
        rank: int = option(8, "rank of the adapters", low=1)
        alpha: float = option(16.0, "scale of the adapters, over the rank or its root", above=0)
        scaling: str = option("rank", "divisor of alpha: the rank, or its square root", choices=("rank", "root"))
        layers: str = option("*", "names of the linear layers with adapters, as patterns separated by commas")

    @property
    def takes_buffers(self) -> bool:
        return False  # a frozen network keeps its statistics

    def start(self, server: Server) -> None:
        module = user_module(server.build())
        if adapter := next((name for name, _ in module.named_parameters() if "lora_" in name), None):
            raise UserError(
                f"fedlora makes the adapters, and the network has some already ({adapter}): give it without them, or "
                "train them with fedavg."
            )
        linear = {
            name: layer
            for name, layer in module.named_modules()
            if type(layer) is nn.Linear and layer.weight.requires_grad
        }
        patterns = [pattern.strip() for pattern in self.options.layers.split(",")]
        chosen = match_names(module, patterns, [*linear], 'Method option "layers":', "trained linear layer")
        rng, rank = server.rng("adapters", BEFORE), self.options.rank
        server.state["adapters"] = {
            name: {
                "A": torch.from_numpy(rng.uniform(-1, 1, (rank, layer.in_features)) / layer.in_features**0.5).float(),
                "B": torch.zeros(layer.out_features, rank),
            }
            for name, layer in linear.items()
            if name in chosen
        }

    def send(self, server: Server, phase: Phase) -> Message:
        return {"adapters": server.state["adapters"]}

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        network = client.network()
        layers = self._add_adapters(network, message["adapters"])
        client.fit(self, phase, network)
        copies = {name: [side.detach().cpu().clone() for side in layer.adapter] for name, layer in layers.items()}
        return {"adapters": {name: {"A": a, "B": b} for name, (a, b) in copies.items()}}

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        return {
            "adapters": {
                name: {side: Values(tuple(x.shape), low=-LARGEST, high=LARGEST) for side, x in pair.items()}
                for name, pair in server.state["adapters"].items()
            }
        }

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        answers = [(upload.message["adapters"], self.weight(server, upload)) for upload in uploads]
        if not answers:
            return
        weights, errors, merged = [weight for _, weight in answers], [], {}
        for name, before in server.state["adapters"].items():
            pairs = [(adapters[name]["A"], adapters[name]["B"]) for adapters, _ in answers]
            a, b, error = ops.lora_merge(pairs, weights, [1.0] * len(pairs), self.options.rank)
            merged[name] = _rescale(a, b, before["A"])
            errors.append(error)
        server.state["adapters"], server.report["merge_error"] = merged, max(errors)

    def model(self, server: Server) -> nn.Module:
        network: nn.Module = server.build()
        self._add_adapters(network, server.state["adapters"])
        return network.requires_grad_(False).eval()

    def _add_adapters(self, network: nn.Module, adapters: Mapping[str, Mapping[str, Tensor]]) -> dict[str, "Adapted"]:
        """Freeze a network, replace its linear layers in place, and return the new layers by name."""
        o = self.options
        scale = o.alpha / (o.rank if o.scaling == "rank" else math.sqrt(o.rank))
        linear: Any = dict(user_module(network.requires_grad_(False)).named_modules())
        layers = {name: Adapted(linear[name], pair, scale) for name, pair in adapters.items()}
        replacements = {linear[name]: layer for name, layer in layers.items()}
        for parent in [*network.modules()]:
            for key, child in parent._modules.items():
                if child in replacements:
                    setattr(parent, key, replacements[child])
        return layers


class Adapted(nn.Module):
    """Frozen linear layer with a low-rank adapter, whose tensors have the names of `peft`."""

    def __init__(self, linear: nn.Linear, pair: Mapping[str, Tensor], scale: float) -> None:
        super().__init__()
        self.base_layer, self.scale = linear, scale
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for side in "AB":
            adapter = make_empty(nn.Linear, *pair[side].shape[::-1], False, device=linear.weight.device)
            adapter.load_state_dict({"weight": pair[side]})
            self.add_module(f"lora_{side}", nn.ModuleDict({"default": adapter}))

    @property
    def adapter(self) -> tuple[Tensor, Tensor]:
        """A ``[rank, in]`` and B ``[out, rank]``."""
        return self.get_parameter("lora_A.default.weight"), self.get_parameter("lora_B.default.weight")

    @property
    def weight(self) -> Tensor:
        """The merged weight, for code that reads the weight instead of calling the layer."""
        a, b = self.adapter
        return self.base_layer.weight + self.scale * (b @ a)

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.adapter
        y: Tensor = self.base_layer(x) + self.scale * functional.linear(functional.linear(x, a), b)
        return y


def _rescale(a: Tensor, b: Tensor, before: Tensor) -> dict[str, Tensor]:
    """Give the rows of a merged A the norm of the start, 1 / sqrt(3), without a change of B A."""
    norms = a.norm(dim=1)
    sizes = torch.where(norms > 0, norms * math.sqrt(3), 1)
    return {"A": torch.where(norms[:, None] > 0, a / sizes[:, None], before), "B": b * sizes}
