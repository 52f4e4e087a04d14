"""FedLoRA: low-rank adapters of a frozen network travel, and the server merges their products."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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
    - A row of A whose singular value is 0 stays as it was.  A row of 0 would never train.
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
        network = server.build()
        if adapter := next((name for name, _ in user_module(network).named_parameters() if "lora_" in name), None):
            raise UserError(
                f"fedlora makes the adapters, and the network has some already ({adapter}): give it without them, or "
                "train them with fedavg."
            )
        adapters = self._add_adapters(network)
        rng = server.rng("adapters", BEFORE)
        for name, side in adapters.items():
            bound = side.shape[1] ** -0.5 if "lora_A" in name else 0
            adapters[name] = torch.from_numpy(rng.uniform(-bound, bound, side.shape)).float()
        server.state["adapters"] = adapters

    def send(self, server: Server, phase: Phase) -> Message:
        return {"adapters": server.state["adapters"]}

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        network = client.network()
        adapters = self._add_adapters(network, message["adapters"])
        client.fit(self, phase, network)
        return {"adapters": {name: side.detach().cpu().clone() for name, side in adapters.items()}}

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        sides = message["adapters"].items()
        return {"adapters": {name: Values(tuple(side.shape), low=-LARGEST, high=LARGEST) for name, side in sides}}

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        answers = [(upload.message["adapters"], self.weight(server, upload)) for upload in uploads]
        if not answers:
            return
        weights, merged, errors = [weight for _, weight in answers], dict(server.state["adapters"]), []
        for name in [name for name in merged if "lora_A" in name]:
            opposite = name.replace("lora_A", "lora_B")
            pairs = [(adapters[name], adapters[opposite]) for adapters, _ in answers]
            a, merged[opposite], error = ops.lora_merge(pairs, weights, [1.0] * len(pairs), self.options.rank)
            merged[name] = torch.where(a.any(1, keepdim=True), a, merged[name])
            errors.append(error)
        server.state["adapters"], server.report["merge_error"] = merged, max(errors)

    def model(self, server: Server) -> nn.Module:
        network: nn.Module = server.build()
        self._add_adapters(network, server.state["adapters"])
        return network.requires_grad_(False).eval()

    def _add_adapters(self, network: nn.Module, adapters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Freeze a network, adapt its linear layers, and return their adapters by name, without values if not given."""
        o, module = self.options, user_module(network)
        linear = {
            name: layer
            for name, layer in module.named_modules()
            if type(layer) is nn.Linear and layer.weight.requires_grad
        }
        patterns = [pattern.strip() for pattern in o.layers.split(",")]
        names = match_names(module, patterns, [*linear], 'Method option "layers":', "trained linear layer")
        network.requires_grad_(False)
        scale = o.alpha / (o.rank if o.scaling == "rank" else math.sqrt(o.rank))
        adapted = {linear[name]: Adapted(linear[name], o.rank, scale) for name in names}
        for parent in [*network.modules()]:
            for key, child in parent._modules.items():
                if child in adapted:
                    setattr(parent, key, adapted[child])
        module = user_module(network)  # another one if the network is a linear layer
        module.load_state_dict(adapters or {}, strict=False)
        return {name: side for name, side in module.named_parameters() if "lora_" in name}


class Adapted(nn.Module):
    """Frozen linear layer with a low-rank adapter, whose tensors have the names of `peft`.

    ``weight`` is the merged one, for code that reads the weight instead of calling the layer.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base_layer, self.scale, device = linear, scale, linear.weight.device
        self.in_features, self.out_features = linear.in_features, linear.out_features
        a = make_empty(nn.Linear, linear.in_features, rank, False, device=device)
        b = make_empty(nn.Linear, rank, linear.out_features, False, device=device)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": a}), nn.ModuleDict({"default": b})

    @property
    def adapter(self) -> tuple[Tensor, Tensor]:
        """A ``[rank, in]`` and B ``[out, rank]``."""
        return self.get_parameter("lora_A.default.weight"), self.get_parameter("lora_B.default.weight")

    @property
    def weight(self) -> Tensor:
        a, b = self.adapter
        return self.base_layer.weight + self.scale * (b @ a)

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.adapter
        y: Tensor = self.base_layer(x) + self.scale * functional.linear(functional.linear(x, a), b)
        return y
