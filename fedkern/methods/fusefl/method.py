"""FuseFL (arXiv 2410.20380): one-shot federated learning by progressive model fusion (docs/methods/fusefl.md).

Networks are cut into K blocks. At level l = 1 ... K every client m trains

    fused levels 1 ... l-1 (frozen)  ->  adaptor  ->  its own blocks l ... K  ->  its own classifier

and sends (adaptor, block l). The M pairs side by side are fused level l. In the end the last level's M features are
fused, and the classifiers averaged and calibrated (:mod:`fedkern.methods.common.calibration`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedkern.errors import UserError
from fedkern.methods.base import Method
from fedkern.methods.common.calibration import CalibrationOptions, calibrate_head, collect_statistics, statistics_of
from fedkern.methods.common.figures import with_accuracies
from fedkern.methods.common.frozen import cached_rows
from fedkern.methods.common.oneshot_distill import torch_stream
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import Batch, ClientId, Federation, Message, Phase, Received, Round, Upload
from fedkern.methods.roles import Client, Drawn, Objective, Server, TestSet
from fedkern.methods.uploads import Declaration, make_once
from fedkern.models import MODELS
from fedkern.models.blocks import BlockNetwork, check_alike, cut_network
from fedkern.models.cost import memory_ratio
from fedkern.models.fused import Branch, FusedLevel, FusedNetwork, make_adaptor
from fedkern.models.network_registry import explain_unknown
from fedkern.models.precision import autocasts, to_fp32
from fedkern.models.state.allocate import linear_of
from fedkern.models.state.freezing import constant_buffers
from fedkern.typed_option import option


class LocalPart(nn.Module):
    """Module that a client trains at a level: adaptor, blocks from this level on and classifier.

    The fused levels before (``frozen``) are not in the module, so nothing trains them or puts them in train mode.
    """

    def __init__(
        self, frozen: FusedNetwork | None, adaptor: nn.Module | None, blocks: Sequence[nn.Module], head: nn.Linear
    ) -> None:
        super().__init__()
        self.adaptor = adaptor if adaptor is not None else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self._frozen = (frozen,)  # a tuple hides it from nn.Module

    @property
    def frozen(self) -> FusedNetwork | None:
        return self._frozen[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, classes]`` of the frozen levels' results (level 1: of images)."""
        logits: Tensor = self.head(self.features(x))
        return logits

    @autocasts
    def features(self, x: Tensor) -> Tensor:
        x = self.adaptor(x)
        for block in self.blocks:
            x = block(x)
        return to_fp32(x)


def base_width(network: nn.Module) -> int:
    return next(layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d))


def scaled_width(option: str, network: nn.Module, clients: int) -> int:
    """Return the clients' width: a given number, or for ``"auto"`` round(w / sqrt(M)) of a network of width w.

    M branches of width w' have about M (w' / w)^2 times its parameters, so the fused model is about as large as one
    ordinary model (docs/methods/fusefl.md, section 4).
    """
    if option == "auto":
        return max(1, round(base_width(network) / math.sqrt(clients)))
    if not option.isdecimal() or int(option) < 1:
        raise UserError(f'Method option "width" must be auto or a number from 1, not "{option}".')
    return int(option)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict for a message: contiguous CPU copies."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in module.state_dict().items()
    }


def sent_state(network: nn.Module, level: int) -> dict[str, Tensor]:
    """Return the state dict of a level's block without frozen tensors."""
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    unsent, path = {*constant_buffers(network), *frozen}, f"blocks.{level - 1}"
    block = network.get_submodule(path).state_dict()
    return {name: value for name, value in block.items() if f"{path}.{name}" not in unsent}


def plain_head(states: Sequence[Mapping[str, Tensor]], final: str) -> dict[str, Tensor]:
    """Return the clients' classifiers merged into one, before calibration, for features fused by ``final``.

    The uniform average; with ``concat`` the logits on all branches' features are the mean of the clients'.
    """
    names = ("weight", "bias")
    head = {name: torch.stack([state[name].double() for state in states]).mean(0).float() for name in names}
    if final == "concat":
        head["weight"] = torch.cat([state["weight"] for state in states], 1) / len(states)
    return head


CALIBRATE = "calibrate"
Levels = Mapping[int, Mapping[ClientId, Message]]
"""Pairs ``{"block": state dict, "adaptor": state dict}`` by level (from 1) and client."""


@register("fusefl")
class FuseFL(Objective, Method):
    """One-shot federated learning by progressive model fusion (arXiv 2410.20380)."""

    requires = frozenset({"classes", "images", "features"})
    replayable = True

    @dataclass(frozen=True)
    class Options(CalibrationOptions, Method.Options):
        """Options of FuseFL (docs/methods/fusefl.md, section 5)."""

        blocks: int = option(2, "number of blocks of the network", low=1)
        adaptor: str = option(
            "cnn1x1",
            "module between a fused level and the next block: a 1x1 convolution, the average or the sum",
            choices=("cnn1x1", "avg", "sum"),
        )
        adaptor_init: str = option("average", "initial weights of a cnn1x1 adaptor", choices=("average", "random"))
        final_fuse: str = option(
            "mean",
            "fusion of the last level's features: mean, sum (released code), or concat (side by side, for a "
            "wider classifier)",
            choices=("mean", "sum", "concat"),
        )
        frozen_bn: str = option(
            "owner",
            "batch norm statistics of frozen levels in training: the owner's, the batch's, or as in the released code",
            choices=("owner", "batch", "code"),
        )
        width: str = option(
            "auto",
            "channels of a client's first stage; auto: those of the narrowest network over the square root of "
            "the number of clients",
        )
        models: str = option(
            "", "networks of the clients in turn, for example resnet18,resnet10; empty: --model for all"
        )

    one_shot = True

    @property
    def needs(self) -> str:
        return "stages"

    @property
    def takes_buffers(self) -> bool:
        return False

    # -- the plan --------------------------------------------------------------------------------------------------

    def start(self, server: Server) -> None:
        kinds, clients = self._models(), server.federation.clients
        # One width for all, that of the narrowest: blocks of different widths cannot be fused.
        widths = self._widths([server.build(model=name) for name in kinds], clients)
        networks = _Networks(self, server, widths)
        used = range(min(clients, len(kinds)))
        for j in used:
            if len(networks.of(j).blocks) != self.options.blocks:
                raise UserError(
                    f"Client {j}'s network has {len(networks.of(j).blocks)} blocks, but the method option blocks says "
                    f"{self.options.blocks}."
                )
        check_alike([networks.shapes(j) for j in used])
        if server.federation.local_epochs < self.options.blocks:
            raise UserError(
                f"--local-epochs {server.federation.local_epochs} cannot be divided over {self.options.blocks} levels: "
                f"raise it to {self.options.blocks} or more, or lower the method option blocks."
            )
        model = server.build().state_dict().values()
        server.report["model_bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in model)
        server.state.update({"widths": widths, "levels": {}, "heads": {}, "seen": {}})

    def _widths(self, networks: Sequence[nn.Module], clients: int) -> list[int]:
        """Return the width of every kind of network, 0 for a user-defined one without a width."""
        scale = [getattr(network, "scales", True) for network in networks]
        if self.options.width != "auto" and not all(scale):
            raise UserError(
                f'Method option "width" is {self.options.width}, but the network takes no argument width: leave the '
                "option out."
            )
        widths = [scaled_width(self.options.width, n, clients) for n, can in zip(networks, scale, strict=True) if can]
        return [min(widths) if can else 0 for can in scale]

    def rounds(self, federation: Federation) -> Iterator[Round]:
        for level in range(1, self.options.blocks + 1):
            yield Round(f"level{level}", participants="all", trains="blocks")
        if self.options.calibrate:
            yield Round(CALIBRATE, participants="all", trains="classifier")

    def epochs(self, level: int, budget: int) -> int:
        """Return the local epochs of a level (counted from 1) out of a client's whole budget.

        Remaining epochs go to the first levels, on which the others build.
        """
        epochs, remainder = divmod(budget, int(self.options.blocks))
        return epochs + (level <= remainder)

    def _models(self) -> list[str | None]:
        if not self.options.models:
            return [None]
        names = [name.strip() for name in self.options.models.split(",")]
        for name in names:
            if name not in MODELS:
                hint = " Widths are given by the method option width." if ":" in name else ""
                raise UserError(f'Method option "models": {explain_unknown(name)}{hint}')
        return list(names)

    def network(self, place: Client | Server, client: ClientId, widths: list[int]) -> BlockNetwork:
        """Return the network of ``client`` in blocks, freshly initialised.

        The same at the server and at every client.

        Override this method to use blocks of your own. All clients' networks need the same number of blocks and, block
        by block, results of the same shape.
        """
        kind = client % len(widths)
        build: Any = getattr(place, "build", place.network)
        return cut_network(build(model=self._models()[kind], width=widths[kind] or None), self.options.blocks)

    # -- what travels ----------------------------------------------------------------------------------------------

    def send(self, server: Server, phase: Phase) -> Message | dict[ClientId, Message]:
        """Send every client the other clients' (adaptor, block) pairs of the level before.

        The client has kept its own pair. A client that missed a level (``--on-nan skip``) gets all levels since its
        last upload.
        """
        level, state = phase.round + 1, server.state
        messages: dict[ClientId, Message] = {}
        for k in range(server.federation.clients):
            message: Message = {"widths": list(state["widths"])}
            if phase.name != CALIBRATE:
                epochs = [self.epochs(i, server.federation.local_epochs) for i in range(1, level + 1)]
                message.update(epochs=epochs[-1], first=sum(epochs[:-1]))
            new = {i: state["levels"][i] for i in range(max(1, state["seen"].get(k, 0)), level)}
            message["others"] = {i: {j: pair for j, pair in pairs.items() if j != k} for i, pairs in new.items()}
            if "statistics" in state:
                message["statistics"] = state["statistics"]
            messages[k] = message
        return messages

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        level = phase.round + 1
        networks = _Networks(self, client, message["widths"])
        levels = _gather_levels(client, message)
        if phase.name == CALIBRATE:
            fused = self._fuse(client, networks, levels)
            return collect_statistics(fused.features, client.in_order(), len(client.classes), self.options)
        network = networks.of(client.id)
        if "local" in client.state:
            for i, state in client.state["local"]["blocks"].items():
                network.blocks[i - 1].load_state_dict(state)
            network.head.load_state_dict(client.state["local"]["head"])
        adaptor = frozen = None
        if level > 1:
            shape, branches = networks.shapes(client.id)[level - 2], len(levels[level - 1])
            draw = torch_stream(client, "adaptor", phase) if self.options.adaptor_init == "random" else None
            adaptor = make_adaptor(self.options.adaptor, shape, branches, generator=draw).to(client.device)
            frozen = self._fuse(client, networks, levels)
        if frozen is not None and self.options.frozen_bn != "owner":
            frozen.normalise_by_batch()
        part = LocalPart(frozen, adaptor, list(network.blocks)[level - 1 :], network.head)
        client.fit(self, phase, part, epochs=message["epochs"], first=message["first"])

        block, sent = tensors_of(network.blocks[level - 1]), sent_state(network, level)
        pair: Message = {"block": {name: value for name, value in block.items() if name in sent}}
        if adaptor is not None and any(True for _ in adaptor.parameters()):
            pair["adaptor"] = tensors_of(adaptor)
        later = {i: tensors_of(block) for i, block in enumerate(network.blocks, start=1) if i > level}
        local = {"blocks": later, "head": tensors_of(network.head)}
        client.state.update(levels=levels, own={"level": level, "pair": pair}, local=local)
        upload: Message = dict(pair)
        if level == self.options.blocks:
            upload["head"] = tensors_of(network.head)
        if frozen is not None and self.options.frozen_bn == "code":
            upload["statistics"] = _statistics(frozen, levels)
        return upload

    def loss(self, model: LocalPart, batch: Batch, received: Received) -> Tensor:
        return cross_entropy(model(batch.drawn["inputs"]), batch.targets)

    def prepare(self, model: LocalPart, batch: Batch, received: Received) -> Drawn:
        """Return the frozen levels' joined results on the batch, computed once if they stay the same."""
        frozen, x = model.frozen, batch.inputs
        if frozen is None:
            return {"inputs": x}
        return {"inputs": cached_rows("joined", batch, received, lambda: frozen.run_levels(x), frozen)}

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        if phase.name == CALIBRATE:
            head = calibrate_head(server, phase, uploads, self._plain_head(server), self.options)
            self._report_traffic(server)
            server.state["head"] = tensors_of(head)
            return
        level, state = phase.round + 1, server.state
        accepted: dict[ClientId, Message] = {}
        for upload in uploads:
            state["seen"][upload.client_id] = level
            message = dict(upload.message)
            if "head" in message:
                state["heads"][upload.client_id] = message.pop("head")
            if "statistics" in message:
                # In the released code one Python object serves all clients: the last client's statistics stay.
                state["statistics"] = message.pop("statistics")
            accepted[upload.client_id] = message
        # In client order, so that the order of arrival changes nothing.
        state["levels"][level] = dict(sorted(accepted.items()))
        state["heads"] = dict(sorted(state["heads"].items()))
        self._report_traffic(server)
        if level == self.options.blocks:
            fused = self.model(server)
            assert fused is not None
            server.report["parameters"] = sum(p.numel() for p in fused.parameters())
            server.report["memory_ratio"] = memory_ratio(fused, server.build())

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        if phase.name == CALIBRATE:
            return make_once(
                server.round_cache, CALIBRATE, lambda: statistics_of(self._plain_head(server), self.options)
            )
        level, levels = phase.round + 1, server.state["levels"]
        networks = make_once(server.round_cache, "networks", lambda: _Networks(self, server, server.state["widths"]))
        network = networks.of(client)
        expected: dict[str, Any] = {"block": sent_state(network, level)}
        if level > 1:
            shape = networks.shapes(client)[level - 2]
            adaptor = make_adaptor(self.options.adaptor, shape, len(levels[level - 1]))
            if any(True for _ in adaptor.parameters()):
                expected["adaptor"] = adaptor.state_dict()
            if self.options.frozen_bn == "code":
                expected["statistics"] = {
                    i: {
                        j: {key: x for key, x in networks.of(j).blocks[i - 1].named_buffers() if key in pair["block"]}
                        for j, pair in pairs.items()
                    }
                    for i, pairs in levels.items()
                }
        if level == self.options.blocks:
            expected["head"] = network.head.state_dict()
        return expected

    def _report_traffic(self, server: Server) -> None:
        report, clients = server.report, server.federation.clients
        for name, ways in server.traffic.items():
            report.update({f"{name}_{way}_bytes": total / clients for way, total in ways.items()})
        for way in ("up", "down"):
            totals = (report.get(f"level{level}_{way}_bytes", 0.0) for level in range(1, self.options.blocks + 1))
            report[f"levels_{way}_bytes"] = sum(totals)

    # -- the fused model -------------------------------------------------------------------------------------------

    def model(self, server: Server) -> nn.Module | None:
        """Return the fused network once its last level is complete, None before."""
        state = server.state
        if len(state["levels"]) < self.options.blocks:
            return None
        plain = self._plain_head(server)
        head = linear_of(state["head"], server.device) if "head" in state else None
        levels = _with_statistics(state["levels"], state.get("statistics", {}))
        fused = self._fuse(server, _Networks(self, server, state["widths"]), levels)
        frozen: list[Any] = list(fused.levels)
        return FusedNetwork(frozen, head or plain, final=self.options.final_fuse, plain_head=head and plain)

    def evaluate(self, model: nn.Module, data: TestSet) -> dict[str, float]:
        """Return the task's figures and ``uncalibrated_accuracy``.

        That is the accuracy of the averaged classifier before calibration.
        """
        head, plain_head = (model.head, model.plain_head) if isinstance(model, FusedNetwork) else (None, None)
        if not isinstance(model, FusedNetwork) or head is None or plain_head is None:
            return super().evaluate(model, data)

        def answer(images: Tensor) -> tuple[Tensor, Tensor]:
            features = model.features(images)
            return head(features), plain_head(features).argmax(1)[None]

        return with_accuracies(("uncalibrated_accuracy",), answer, data)

    def _plain_head(self, server: Server) -> nn.Linear:
        return linear_of(plain_head(list(server.state["heads"].values()), self.options.final_fuse), server.device)

    def _fuse(self, place: Client | Server, networks: _Networks, levels: Levels) -> FusedNetwork:
        frozen: list[FusedLevel] = []
        for level, pairs in sorted(levels.items()):
            shapes = networks.shapes(next(iter(pairs)))[max(0, level - 2) : level]
            adaptor = None
            if level > 1:
                adaptor = make_adaptor(self.options.adaptor, shapes[0], len(levels[level - 1])).to(place.device)
            branches = [Branch(networks.of(j).blocks[level - 1], adaptor, pair) for j, pair in pairs.items()]
            frozen.append(FusedLevel(branches))
        return FusedNetwork(frozen, final=self.options.final_fuse)


class _Networks:
    """Cache of the clients' networks in blocks, one per entry of ``widths``."""

    def __init__(self, method: FuseFL, place: Client | Server, widths: list[int]) -> None:
        self._method, self._place, self._widths = method, place, widths
        self._made: dict[int, BlockNetwork] = {}
        self._shapes: dict[int, list[tuple[int, ...]]] = {}

    def of(self, client: ClientId) -> BlockNetwork:
        kind = client % len(self._widths)
        if kind not in self._made:
            self._made[kind] = self._method.network(self._place, client, self._widths)
        return self._made[kind]

    def shapes(self, client: ClientId) -> list[tuple[int, ...]]:
        kind = client % len(self._widths)
        if kind not in self._shapes:
            self._shapes[kind] = self.of(client).interfaces(self._place.image_shape)
        return self._shapes[kind]


def _gather_levels(client: Client, message: Message) -> dict[int, dict[ClientId, Message]]:
    """Return all pairs so far: the client's kept levels, its own last pair, and the message's."""
    levels = {i: dict(pairs) for i, pairs in client.state.get("levels", {}).items()}
    last = client.state.get("own", {"level": 0})
    for i, received in message["others"].items():
        pairs = dict(received)
        if last["level"] == i:
            pairs[client.id] = last["pair"]
        levels[i] = dict(sorted(pairs.items()))
    return _with_statistics(levels, message.get("statistics", {}))


def _with_statistics(
    levels: Levels, statistics: Mapping[int, Mapping[ClientId, Mapping[str, Tensor]]]
) -> dict[int, dict[ClientId, Message]]:
    changed = {i: dict(pairs) for i, pairs in levels.items()}
    for i, by_client in statistics.items():
        for j, buffers in by_client.items():
            changed[i][j] = {**changed[i][j], "block": {**changed[i][j]["block"], **buffers}}
    return changed


def _statistics(fused: FusedNetwork, levels: Levels) -> dict[int, dict[ClientId, dict[str, Tensor]]]:
    parts: list[Any] = list(fused.levels)
    return {
        i: dict(zip(levels[i], level.statistics(), strict=True)) for i, level in zip(sorted(levels), parts, strict=True)
    }
