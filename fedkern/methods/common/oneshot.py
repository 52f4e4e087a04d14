"""Base of one-shot methods: every client trains its whole budget once, perhaps on an architecture of its own."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkern import models
from fedkern.errors import UserError
from fedkern.methods.base import VECTORS, Method, vectors_of
from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.methods.common.calibration import CalibrationOptions, calibrate_head, collect_statistics, statistics_of
from fedkern.methods.common.figures import class_counts
from fedkern.methods.options import Options
from fedkern.methods.protocol import BEFORE, ClientId, Federation, Message, Phase, Round, Upload
from fedkern.methods.roles import Architecture, Client, Objective, Server
from fedkern.methods.uploads import Declaration, Values, all_finite, like, make_once
from fedkern.models.network_registry import explain_unknown
from fedkern.models.state import freezing
from fedkern.models.state.freezing import train_mode
from fedkern.models.users.user_models import channels_last
from fedkern.ops import FlatParameters
from fedkern.typed_option import option

Architectures = tuple[tuple[str, int | None] | None, ...]
"""Architectures of the clients in turn: (name, width), or None for the run's own network. A user-defined network may
have no width."""


def parse_models(text: str) -> Architectures:
    """Parse ``"resnet8:16,cnn"`` into the clients' (name, width) in turn, None for the run's network."""
    if not text:
        return (None,)
    result: list[tuple[str, int | None] | None] = []
    for entry in text.split(","):
        name, colon, width = (part.strip() for part in entry.partition(":"))
        if name not in models.MODELS:
            raise UserError(f'Method option "models": {explain_unknown(entry.strip(), name)}')
        if colon and not (width.isdecimal() and int(width) > 0):
            raise UserError(f'Method option "models": the width of {name} must be a positive number, not "{width}".')
        result.append((name, int(width) if colon else models.MODELS[name].width))
    return tuple(result)


CLASS_WEIGHTS = (
    "weight of a client for a class in the ensemble: counts (its share of the class's samples, which clients then "
    "tell; a mean of log-probabilities), or uniform (equal among all; discloses nothing)"
)
"""Help of the option ``class_weights``."""


@dataclass(frozen=True)
class TeacherOptions(Options):
    """Options of methods with an ensemble of networks that every client trains alone."""

    models: str = option(
        "", "networks of the clients in turn, as name[:width] separated by commas; empty: --model for all"
    )
    class_weights: str = option("uniform", CLASS_WEIGHTS, choices=("counts", "uniform"))
    teacher_temperature: float = option(
        1.0, "temperature of the clients' log-probabilities in an ensemble with class_weights=counts", above=0
    )
    weight_floor: float = option(
        0.0, "least weight of a client for a class with class_weights=counts, as a share of all samples of the class; "
        "0: a client without the class has no say in it", low=0, high=1,
    )  # fmt: skip
    fresh_statistics: bool = option(
        True, "after training, compute the batch norms' running statistics anew on the client's own samples"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_weights == "uniform" and (self.teacher_temperature != 1 or self.weight_floor):
            raise UserError(
                'Method options "teacher_temperature" and "weight_floor" are for class_weights=counts, and change no '
                "prediction with equal weights: leave them out."
            )


def floor_counts(counts: Tensor, floor: float) -> Tensor:
    """Return class counts ``[K, C]`` of at least a share ``floor`` of all clients' samples of the class."""
    return torch.maximum(counts, floor * counts.sum(0))


@torch.no_grad()
def refresh_statistics(client: Client, module: nn.Module, rows: np.ndarray | None = None) -> None:
    """Replace the batch norms' running statistics by their mean over one pass, and put the module in eval mode.

    The averages of training lag behind its last steps, the more so the higher the last learning rate. As with
    ``torch.optim.swa_utils.update_bn``, all batches count alike; here their sizes differ by at most one sample.
    Samples come in random order and are not augmented. Batch norms that did not train keep their statistics.

    Source: Izmailov et al., arXiv 1803.05407, section 3.2.

    Args:
        rows: int64, positions of the samples; None: all of the client's.
    """
    norms = [layer for layer in train_mode(module).modules() if isinstance(layer, _BatchNorm) and layer.training]
    module.eval()
    momenta = {layer: layer.momentum for layer in norms if layer.track_running_stats}
    for layer in momenta:
        layer.train().reset_running_stats()
        layer.momentum = None  # the mean of all batches
    order = client.rng("batch norm", BEFORE).permutation(client.samples if rows is None else rows)
    for part in np.array_split(order, -(-len(order) // client.task.outside)) if momenta else ():
        module(client.batch(part).inputs)
    for layer, momentum in momenta.items():
        layer.momentum = momentum
    module.eval()


class OwnNetworks(Objective, Method):
    """Base of methods with an architecture per client (option ``models``)."""

    def __init__(self, options: Options | None = None, **values: object) -> None:
        super().__init__(options, **values)
        self.architectures = parse_models(self.options.models)

    def architecture(self, client: ClientId) -> Architecture:
        entry = self.architectures[client % len(self.architectures)]
        return {} if entry is None else {"model": entry[0], "width": entry[1]}


def flatten(module: nn.Module) -> FlatParameters:
    """Return the module as flat vectors, a built-in one in channels-last."""
    if channels_last(module):
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return freezing.flatten(module)


def copy_vectors(flat: FlatParameters) -> Message:
    """Return CPU copies of ``parameters`` fp32 [P], ``buffers`` fp32 [Q], ``integers`` int64 [R], if any."""
    tensors = {"parameters": flat.parameters, "buffers": flat.buffers, "integers": flat.integers}
    return {name: value.detach().cpu().clone() for name, value in tensors.items() if value.numel()}


def load(flat: FlatParameters, message: Message) -> nn.Module:
    """Write the vectors of a message into a module and return the module.

    Raises:
        ValueError: a vector is missing, or its size differs from the module's.
    """
    for name in VECTORS:
        if name not in message and getattr(flat, name).numel():
            raise ValueError(f"it sent no {name}")
    flat.load_vectors(message)
    return flat.module


PROBES = 16
"""Number of noise images on which a member's logits must be finite before the server accepts the member."""


class OneShot(FedAvg):
    """Base of one-shot methods: one round of training, and a second round with ``calibrate``.

    The second round replaces the classifier by one from class statistics (`fedkern.methods.common.calibration`).
    ``--local-epochs`` is a client's whole budget, and all clients take part.
    """

    @dataclass(frozen=True)
    class Options(CalibrationOptions, FedAvg.Options):
        """Options of every one-shot method."""

        calibrate: bool = option(False, "train the classifier anew on features drawn from class statistics (CCVR)")

    one_shot = True
    averages = True
    reduce = FedAvg.reduce
    ignored_settings = frozenset({"lr_decay", "optimizer_state"})  # clients train once
    takes_teachers = True
    needs_statistics = False
    """Whether the server uses the clients' networks in eval mode, so that batch norm needs running statistics."""

    @property
    def calibrates(self) -> bool:
        return bool(self.options.calibrate)

    @property
    def needs(self) -> str:
        return "features" if self.calibrates else super().needs

    def start(self, server: Server) -> None:
        super().start(server)
        if self.calibrates and "features" not in server.task.offers:
            raise UserError(
                f"calibrate draws a classifier's features of whole images, and this run is for {server.task.name}: "
                "leave it out."
            )
        if self.calibrates and not isinstance(server.build().head, nn.Linear):
            raise UserError(
                "A classifier from class statistics is linear, and --features takes the linear classifier away: leave "
                "one of the two out."
            )
        needed = (self.needs_statistics or self.calibrates) and "buffers" not in server.state
        if needed and flatten(server.build()).buffers.numel():
            raise UserError(
                f"{self.name} needs the running statistics of the clients' networks: use --buffers average, not local "
                "or drop."
            )

    def rounds(self, federation: Federation) -> Iterator[Round]:
        yield Round("train", participants="all", trains="clients' networks")
        if self.calibrates:
            yield Round("calibrate", exchanges=("statistics",), participants="all", trains="classifier")

    def send(self, server: Server, phase: Phase) -> Message | dict[int, Message]:
        return self.publish(server) if phase.exchange == "statistics" else super().send(server, phase)

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        if phase.exchange == "statistics":
            network = self.statistics_network(client, message)
            return collect_statistics(network.features, client.in_order(), len(client.classes), self.options)
        return super().client_update(client, phase, message)

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        if phase.exchange == "statistics":
            return make_once(server.round_cache, "statistics", lambda: statistics_of(self.head(server), self.options))
        return super().expects(server, phase, client, message)

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        if phase.exchange == "statistics":
            self.replace_head(server, calibrate_head(server, phase, uploads, self.head(server), self.options))
        else:
            super().server_update(server, phase, uploads)

    # -- the calibrated model: the averaged network, unless a method overrides these -------------------------------

    def publish(self, server: Server) -> Message | dict[ClientId, Message]:
        """Return the message, or one per client, for the features of the statistics."""
        return vectors_of(server.state)

    def statistics_network(self, client: Client, message: Message) -> Any:
        """Return the network of the statistics' ``features``, in eval mode."""
        return load(flatten(client.network()), message).eval()

    def head(self, server: Server) -> nn.Linear:
        """Return the classifier to calibrate."""
        network: Any = load(flatten(server.build()), server.state)
        head: nn.Linear = network.head
        return head

    @torch.no_grad()
    def replace_head(self, server: Server, head: nn.Linear) -> None:
        """Put the calibrated classifier into the server's state."""
        flat = flatten(server.build())
        network: Any = load(flat, server.state)
        network.head.weight.copy_(head.weight)
        network.head.bias.copy_(head.bias)
        server.state.update(copy_vectors(flat))


class MemberNetworks(OwnNetworks, OneShot):
    """Base of one-shot methods whose server keeps every client's network, with an architecture from ``models``.

    The ensemble is the mean of the members' logits t_k, as published. ``class_weights=counts`` takes FedIOD's instead,
    with n_kc samples (labelled pixels) of class c at client k, and n_c at all clients. T is ``teacher_temperature``:

        v_kc = max(n_kc, weight_floor n_c),    m_c(x) = sum_k v_kc / (sum_j v_jc) log softmax(t_k(x) / T)_c

    The clients upload exact counts: these methods claim no privacy.
    """

    @dataclass(frozen=True)
    class Options(TeacherOptions, OneShot.Options):
        """Options of methods that keep the clients' networks."""

    needs_statistics = True
    averages = False  # every network also counts by itself

    @property
    def needs(self) -> str:
        return "features"

    def build_members(self, build: Callable[..., nn.Module], messages: Mapping[ClientId, Message]) -> list[nn.Module]:
        """Return networks with these vectors, in eval mode, by ascending client id."""
        return [load(flatten(build(**self.architecture(k))), messages[k]).eval() for k in sorted(messages)]

    def collect_members(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> Iterator[Upload]:
        """Store in ``server.state["members"]`` and yield the uploads whose networks have finite logits on noise.

        The server refuses the others. UserError if no upload is left, or a refusal stops the run.
        """
        members = server.state["members"] = {}
        for upload in uploads:
            k = upload.client_id
            (network,) = self.build_members(server.build, {k: upload.message})
            with torch.no_grad():
                is_sound = all_finite(network(server.noise(PROBES, server.rng("probe", phase))))
            if not is_sound:
                server.refuse(k, f"The network of client {k} cannot be used: its logits are not finite")
                continue
            members[k] = {**vectors_of(upload.message), "samples": upload.samples}
            if "classes" in upload.message:
                members[k]["classes"] = upload.message["classes"].cpu()
            yield upload
        if not members:
            raise UserError("Every client's network was refused: lower --lr, or set --clip-norm.")

    @property
    def by_class(self) -> bool:
        return bool(self.options.class_weights == "counts")

    def member_weights(self, server: Server) -> Tensor | None:
        """Return the members' weights by class ``[M, C]``, or None for equal weights."""
        if not self.by_class:
            return None
        members = server.state["members"]
        return floor_counts(torch.stack([members[k]["classes"] for k in sorted(members)]), self.options.weight_floor)

    def ensemble(self, server: Server, pool: Literal["concat", "mean"] = "concat") -> models.Ensemble:
        """Return the ensemble of the accepted networks."""
        return models.Ensemble(
            self.build_members(server.build, server.state["members"]), self.member_weights(server), pool=pool,
            temperature=self.options.teacher_temperature,
        )  # fmt: skip

    def start(self, server: Server) -> None:
        super().start(server)
        if self.by_class and "classes" not in server.task.offers:
            raise UserError(
                f"class_weights=counts weighs networks class by class, and this run is for {server.task.name}: leave "
                "it out."
            )
        for client in range(len(self.architectures)):
            server.build(**self.architecture(client))  # raises where one does not fit the images

    def send(self, server: Server, phase: Phase) -> Message | dict[int, Message]:
        if phase.exchange == "update" and self.options.models:
            return {}  # every client starts from fresh weights of its own architecture
        return super().send(server, phase)

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        if phase.exchange != "update":
            return super().client_update(client, phase, message)
        architecture = self.architecture(client.id)
        module = client.network(**architecture)
        is_loaded = client.load_pretrained(module)
        if architecture and not is_loaded:
            client.fit(self, phase, module)
        if architecture or is_loaded:
            answer = copy_vectors(flatten(module))
        else:
            answer = super().client_update(client, phase, message)
        if self.options.fresh_statistics and not is_loaded:
            refresh_statistics(client, load(flatten(module), answer))
            answer = {**copy_vectors(flatten(module)), "parameters": answer["parameters"]}
        return {**answer, "classes": class_counts(client)} if self.by_class else answer

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        if phase.exchange != "update":
            return super().expects(server, phase, client, message)
        architecture = self.architecture(client)
        declared = make_once(
            server.round_cache,
            f"member {architecture}",
            lambda: like(copy_vectors(flatten(server.build(**architecture)))),
        )
        return {**declared, "classes": Values((server.federation.classes,), low=0)} if self.by_class else declared


def exhaust(uploads: Iterable[Upload]) -> None:
    """Run through unused uploads, so that every client does its part."""
    for _ in uploads:
        pass
