"""FedProto: class prototypes averaged over the clients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedkern.methods.base import VECTORS, LocalTraining
from fedkern.methods.common.personal import OfClient, Personal, keep_network, mean_figures, own_network, with_vectors
from fedkern.methods.method_registry import register
from fedkern.methods.options import Options as BaseOptions
from fedkern.methods.protocol import Batch, ClientId, Federation, Message, Phase, Received, Round, Upload
from fedkern.methods.roles import Client, Drawn, Server, TestSet
from fedkern.methods.uploads import Declaration, Maybe, Values, like, make_once
from fedkern.models.networks.staged import Classifier
from fedkern.typed_option import option


@register("fedproto")
class FedProto(LocalTraining):
    """Features pulled to class prototypes that the server averages (FedProto, arXiv 2105.00243).

    f are the pooled features, of width d.  n_kj counts the samples of class j at client k:

        C_k^(j) = mean of f_k(x) over the client's samples of class j
        C^(j)   = sum_k n_kj C_k^(j) / sum_k n_kj
        L       = CE + lambda 1/B sum_b ||f(x_b) - C^(y_b)||^2 / d

    ``weighting=uniform`` replaces n_kj by 1.  Prototypes come from the client's trained network before the average, in
    eval mode, on images without augmentation.  A class that no participant has keeps its prototype.

    ``networks=averaged``, the default, averages the networks as FedAvg does and sends prototypes too, so that one
    network can be compared with those of other methods.  ``networks=personal`` is the paper's setting: every client
    keeps its own network, and only prototypes travel, C (d + 1) numbers and the class ids.  Clients upload these
    networks once, after the last round, booked as one-off.  The figures are then means over clients, and no figures
    exist before.  Personal networks refuse ``--buffers local`` and ``drop``.

    ``predict=prototype`` predicts the nearest prototype by the logits -||f(x) - C^(j)||^2.  A class without a prototype
    has the logit -inf, so the loss of its test samples is infinite.

    Differences from the paper:

    - A class without a prototype adds no distance, and the mean still divides by B.  In the first round that is every
      class.
    - The distance is taken per sample and averaged over d, as in the released code.

    Source: Tan et al., AAAI 2022, equations 3 to 7.
    """

    requires = frozenset({"criterion", "classes", "features"})
    replayable = True
    averages = True

    @dataclass(frozen=True)
    class Options(LocalTraining.Options):
        lam: float = option(1.0, "weight of the distance to the prototypes", low=0, name="lambda")
        networks: str = option(
            "averaged", "clients' networks: averaged, or personal as published (only prototypes travel)",
            choices=("averaged", "personal"),
        )  # fmt: skip
        predict: str = option(
            "head", "prediction by the classifier, or by the nearest prototype", choices=("head", "prototype")
        )

    def __init__(self, options: BaseOptions | None = None, **values: object) -> None:
        super().__init__(options, **values)
        if self.options.networks == "personal":
            self.averages = False

    @property
    def needs(self) -> str:
        return "features"

    # -- the client ------------------------------------------------------------------------------------------------

    def loss(self, model: Classifier, batch: Batch, received: Received) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        features = model.features(batch.inputs)
        em = batch.task.criterion(model.head(features), batch)
        if "means" not in batch.drawn:
            return em
        means, present = batch.drawn["means"], batch.drawn["known"]
        distances = (features - means[batch.targets]).square().mean(1)
        distance = torch.where(present[batch.targets], distances, 0.0).mean()
        return em + self.options.lam * distance, {"loss_em": em.detach(), "loss_proto": distance.detach()}

    def prepare(self, model: Classifier, batch: Batch, received: Received) -> Drawn:
        """Return the global prototypes ``means`` [C, d], and ``known`` bool [C] for the classes that have one."""
        if not self.options.lam or "prototypes" not in received.message:
            return {}
        if "targets" not in received.round_cache:
            means, present = proto_table(received.message["prototypes"], model.head.out_features)
            device = batch.inputs.device
            received.round_cache["targets"] = {"means": means.to(device), "known": present.to(device)}
        targets: Drawn = received.round_cache["targets"]
        return targets

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        if phase.exchange == "collect":
            return {"network": client.state["network"]} if "network" in client.state else {}
        network = client.network()
        answer: Message = {}
        if self.options.networks == "personal":
            client.fit(self, phase, own_network(client, "network", network), message=message)
            keep_network(client, "network", network)
            statistics = True
        else:
            answer = super().client_update(client, phase, message)
            flat = with_vectors(network, {"parameters": answer["parameters"]}, client)
            buffers = {**client.own_buffers, **answer}.get("buffers")
            statistics = buffers is not None or not flat.buffers.numel()
            if buffers is not None:
                flat.load_vectors({"buffers": buffers})
        # Without running statistics (--buffers drop) batch norm uses the batch's own.
        return {**answer, "prototypes": prototypes(network.train(not statistics), client)}

    # -- the server ------------------------------------------------------------------------------------------------

    @property
    def takes_buffers(self) -> bool:
        return self.averages is not False

    def rounds(self, federation: Federation) -> Iterator[Round]:
        yield from super().rounds(federation)
        if self.options.networks == "personal":
            yield Round("collect", exchanges=("collect",), participants="all", one_off=True)

    def send(self, server: Server, phase: Phase) -> Message:
        if phase.exchange == "collect":
            return {}
        travels = ("prototypes",) if self.options.networks == "personal" else (*VECTORS, "prototypes")
        return {name: server.state[name] for name in travels if name in server.state}

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        network: Any = make_once(server.round_cache, "network", server.build)
        if phase.exchange == "collect":  # a client that never took part has no network
            return {"network": Maybe(make_once(server.round_cache, "state", lambda: like(network.state_dict())))}
        vectors = {} if self.options.networks == "personal" else super().expects(server, phase, client, message)
        prototypes = {
            "classes": Values(("classes present",), torch.int64, low=0, high=server.federation.classes - 1),
            "means": Values(("classes present", network.head.in_features)),
            "counts": Values(("classes present",), torch.int64, low=1),
        }
        return {**vectors, "prototypes": prototypes}

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        if phase.exchange == "collect":
            server.state["networks"] = {u.client_id: u.message["network"] for u in uploads}
            return
        uniform = self.options.weighting == "uniform"
        classes = server.federation.classes
        sums: Tensor | None = None
        weights = torch.zeros(classes, dtype=torch.float64)

        def add_prototypes(upload: Upload) -> Upload:
            nonlocal sums
            prototypes = upload.message["prototypes"]
            weight = torch.ones(len(prototypes["classes"])) if uniform else prototypes["counts"]
            if sums is None:
                sums = torch.zeros(classes, prototypes["means"].shape[1], dtype=torch.float64)
            sums[prototypes["classes"]] += weight.double()[:, None] * prototypes["means"].double()
            weights[prototypes["classes"]] += weight.double()
            return upload

        counted = map(add_prototypes, uploads)  # map keeps no upload while the next one arrives
        if self.options.networks == "personal":
            for upload in counted:
                del upload
        else:
            super().server_update(server, phase, counted)
        if sums is not None:
            means, present = proto_table(server.state.get("prototypes"), classes, sums.shape[1])
            seen = weights > 0  # a class that no client sent in this round keeps its prototype
            means[seen] = (sums[seen] / weights[seen, None]).float()
            present |= seen
            server.state["prototypes"] = {"classes": present.nonzero().flatten(), "means": means[present]}

    # -- the evaluated model ---------------------------------------------------------------------------------------

    def model(self, server: Server) -> nn.Module | None:  # type: ignore[override]
        nearest = self.options.predict == "prototype"
        if self.options.networks == "averaged":
            averaged = super().model(server)
            if not nearest or "prototypes" not in server.state:
                return averaged
            network: Any = averaged
            return Nearest(network, *proto_table(server.state["prototypes"], server.federation.classes))
        if "networks" not in server.state:
            return None
        members: dict[int, nn.Module] = {}
        for client, state in server.state["networks"].items():
            network = server.build()
            network.load_state_dict(state)
            if nearest:
                network = Nearest(network.eval(), *proto_table(server.state["prototypes"], server.federation.classes))
            members[int(client)] = network
        return Personal(members)

    def evaluate(self, model: nn.Module, data: TestSet) -> dict[str, float]:
        if not isinstance(model, Personal):
            return super().evaluate(model, data)
        return mean_figures(super().evaluate, zip(model.clients, model.members, strict=True), data)

    def evaluate_own(self, model: nn.Module, data: TestSet, client: Client) -> dict[str, float]:
        if isinstance(model, Personal) and client.id in model.clients:
            model = model.members[model.clients.index(client.id)]
        elif isinstance(model, Personal):
            # Never took part: evaluate the mean of the others' logits.
            data = OfClient(data, None)
        return super().evaluate(model, data)


class Nearest(nn.Module):
    """Nearest-prototype classifier: logits ``-||f(x) - C^(j)||^2``, ``-inf`` for a class without a prototype.

    ``means`` is fp32 [C, d], ``present`` bool [C].
    """

    means: Tensor
    known: Tensor

    def __init__(self, network: Classifier, means: Tensor, present: Tensor) -> None:
        super().__init__()
        self.network = network
        device = next(network.parameters()).device
        self.register_buffer("means", means.to(device))
        self.register_buffer("known", present.to(device))

    def train(self, mode: bool = True) -> Nearest:
        """Keep the network's mode: without running statistics, batch norm must use each batch's own."""
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        distances = torch.cdist(self.network.features(images), self.means).square()
        return -distances.masked_fill(~self.known, torch.inf)


def prototypes(network: Classifier, client: Client) -> Message:
    """Return ``classes`` int64 [C'] ascending, ``means`` fp32 [C', d] and ``counts`` int64 [C']."""
    present, counts = client.labels.unique(return_counts=True)
    row = torch.full((int(present.max()) + 1,), -1)
    row[present] = torch.arange(len(present))
    sums = torch.zeros(len(present), network.head.in_features, dtype=torch.float64)
    with torch.no_grad():
        for batch in client.in_order():
            sums.index_add_(0, row[batch.targets.cpu()], network.features(batch.inputs).double().cpu())
    return {"classes": present, "means": (sums / counts[:, None]).float(), "counts": counts}


def proto_table(message: Message | None, classes: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Return ``means`` fp32 [C, d], zero without a prototype, and ``known`` bool [C]."""
    size = width if message is None else message["means"].shape[1]
    means, present = torch.zeros(classes, size or 0), torch.zeros(classes, dtype=torch.bool)
    if message is not None:
        means[message["classes"]] = message["means"]
        present[message["classes"]] = True
    return means, present
