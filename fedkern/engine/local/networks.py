"""Construction of a run's networks, their copies on the run's device, and networks that the clients bring."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkern import models
from fedkern.acceleration.calls import apply_plan
from fedkern.data.types import FederatedData
from fedkern.engine.local.captured import Graphs
from fedkern.engine.local.first_steps import FirstSteps
from fedkern.engine.local.linear_pass import LINEAR
from fedkern.engine.local.network import Network, place
from fedkern.engine.store import initial_weights
from fedkern.engine.store.checkpoints import Checkpoints, Entry, checksum
from fedkern.errors import UserError
from fedkern.files.filesystem import expand
from fedkern.messages import states
from fedkern.methods.base import VECTORS, Message, Phase
from fedkern.models.network_registry import check_gives, list_added
from fedkern.models.precision import cast_frozen
from fedkern.models.pretrained.weight_files import bare_names, load_by_name, read_state_dict
from fedkern.models.state import freezing
from fedkern.models.state.freezing import freeze_parameters
from fedkern.models.users.hooked import find_taps
from fedkern.settings.config import FOLDER, RunConfig
from fedkern.tasks.user_tasks import user_module

SUFFIXES = (".safetensors", ".pt", ".pth")
OF_DATA = (
    "data", "data_options", "partition", "correlation", "clients", "train_samples", "public_samples",
    "held_out_client", "client_test", "seed",
)  # fmt: skip
"""Settings that decide which images a client has."""


class ClientTeachers:
    """The folder of ``--teachers``, read network by network, on demand.

    It has ``client-K.safetensors``, ``client-K.pt`` or ``client-K.pth`` with a state dict for every client K (from 0),
    or is the folder of a run of FedIOD, which has teachers, or of ``ensemble``, which has members.
    """

    def __init__(self, folder: str) -> None:
        self.root = expand(folder)
        self._sound: set[str] = set()  # checkpoint files with verified checksums
        self._asked_run = False  # whether a run was searched for a network

    def load(self, client: int, module: nn.Module) -> None:
        """Load a client's trained weights into ``module``, in place."""
        paths = (self.root / f"client-{client}{suffix}" for suffix in SUFFIXES)
        if (path := next(filter(Path.exists, paths), None)) is None:
            self._load_of_run(client, module)
        else:
            _load_state(path, client, module)
        kinds = dict.fromkeys(dict(module.named_parameters()), "parameters")
        for name, value in module.state_dict().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise UserError(
                    f"--teachers: the network of client {client} in {path or self.root} cannot be used: its "
                    f"{kinds.get(name, 'buffers')} are not finite ({name}); bring one whose training has not diverged."
                )

    def other_data(self, config: Mapping[str, object], fingerprint: int) -> str | None:
        """Return a warning if the networks come from a run on other data, or None."""
        entry = self._checkpoint[0] if self._asked_run else None
        if entry is None or entry["info"]["data"] == fingerprint:
            return None
        theirs, number = entry["info"]["config"], entry["info"]["data"]
        names = [name for name in OF_DATA if name == "data" or theirs.get(name) != config.get(name)]

        def text(settings: Mapping[str, object], number: int) -> str:
            words = [f"{name.replace('_', '-')} {settings.get(name, 'unset')}" for name in names]
            return f"{', '.join(words)}; fingerprint {number:08x}"

        return (
            f"The networks that --teachers brings from {self.root} were trained on other data "
            f"({text(theirs, number)}) than this run's ({text(config, fingerprint)}): a client's network may "
            "have trained on other clients' images or on its test images."
        )

    # -- a run folder ----------------------------------------------------------------------------------------------

    @cached_property
    def _checkpoint(self) -> tuple[Entry | None, dict[int, str], dict[str, int]]:
        checkpoints = Checkpoints(self.root)
        try:
            entry = checkpoints.peek()
            return (entry, *checkpoints.files_of(entry)) if entry is not None else (None, {}, {})
        except UserError as error:
            raise UserError(f"--teachers: {error}") from None

    def _load_of_run(self, client: int, module: nn.Module) -> None:
        self._asked_run = True
        entry, files, _ = self._checkpoint
        vectors = self._part(files[client], "teacher") if client in files else None
        if vectors is None and entry is not None:
            vectors = self._part(entry["server"], "members", client)
        if vectors is None:
            raise UserError(
                f"--teachers: {self.root} has neither client-{client}.safetensors (nor .pt, .pth) nor a run's network "
                f"of client {client}: give a folder of such files, or that of a run of fediod or ensemble."
                if self.root.is_dir()
                else f"--teachers: there is no folder {self.root}."
            )
        # A copy is flattened: the module itself may be part of a network that is flat already.
        flat = freezing.flatten(place(copy.deepcopy(module).cpu(), torch.device("cpu")))
        for name in VECTORS:
            size, expected = vectors[name].numel() if name in vectors else 0, getattr(flat, name).numel()
            if size != expected:
                raise UserError(
                    f"--teachers: the network of client {client} in {self.root} is of another architecture ({size:,} "
                    f"{name} instead of {expected:,}): give the --model and the models it was trained with."
                )
        flat.load_vectors(vectors)
        module.load_state_dict(flat.module.state_dict())

    def _part(self, name: str, *keys: str | int) -> Any:
        path = self.root / FOLDER / name
        # All members of an ensemble are in one file, whose checksum is computed only once.
        if name not in self._sound and checksum(path) != self._checkpoint[2].get(name):
            raise UserError(f"--teachers: {path} is missing or damaged: bring the networks of another run.")
        self._sound.add(name)
        try:
            return states.part(path, *keys)
        except ValueError as error:
            raise UserError(f"--teachers: {error}.") from None


# -- the user's own files ----------------------------------------------------------------------------------------------


def _load_state(path: Path, client: int, module: nn.Module) -> None:
    tensors = read_state_dict(path, f"--teachers: {path}")
    try:
        module.load_state_dict(dict(bare_names(tensors, module.state_dict())))
    except RuntimeError as error:
        reason = str(error).split("\n", 1)[-1].strip().split("\n")[0].rstrip(". ")
        raise UserError(
            f"--teachers: {path} is not a {type(module).__name__} as client {client} has it "
            f"({textwrap.shorten(reason, 160, placeholder=' ...')}): give the --model and the models it was trained "
            "with."
        ) from None


class Networks:
    """Networks of a run: one trained in every lane (`fedkern.engine.local.lanes`), one frozen, one the server's.

    Each is made on first use and reused.

    Attributes:
        slots: networks by name and lane.
        lane_graphs: recorded steps of local training by lane; None on the CPU.
        unfit: a sentence on the weights of ``--init`` that the network has not taken.
    """

    def __init__(
        self, config: RunConfig, data: FederatedData, device: torch.device, describe: Callable[[], Mapping[str, object]]
    ) -> None:
        self._config, self._data, self.device, self._describe = config, data, device, describe
        self.unfit = ""
        self.lane = 0
        self.slots: dict[tuple[str, int], Network] = {}
        self.lane_graphs: dict[int, Graphs | None] = {}
        self._first_steps: dict[tuple[str, str], FirstSteps] = {}
        # A message's vector, its version and its copy on the device.
        self._sent: tuple[Tensor, int, Tensor] | None = None
        self._frozen: tuple[list[Any], nn.Module | None] = [], None  # the vectors of a frozen network, and the network

    # -- making ----------------------------------------------------------------------------------------------------

    def build(
        self, *, model: str | None = None, width: int | None = None, classes: int | None = None, seed: int | None = None
    ) -> nn.Module:
        """Build a network on the CPU, from the run's seed (always the same network) or another ``seed``.

        With ``--init`` the run's own network has the weights of that file or run, whatever the seed.
        """
        config, network = self._config, self._build_network(model, width, classes, seed)
        if model not in (None, config.model):
            return network
        if config.init is not None and classes is None:
            weights, partial = self._initial_weights, config.init_partial
            self.unfit = load_by_name(network, weights, config.init, self.model_name, partial)
        if config.features or config.stages:
            kind, *taps = self._taps  # before .module, which only a user's network has
            network = kind(network.module, *taps)
        if config.plan not in (None, LINEAR):
            apply_plan(user_module(network), config.plan)
        if config.freeze is not None:
            freeze_parameters(user_module(network), config.freeze.split(","), self.model_name)
        if config.keeps_parts:
            freezing.keep(user_module(network), self._personal(network), self.model_name)
        return network

    def _build_network(self, model: str | None, width: int | None, classes: int | None, seed: int | None) -> nn.Module:
        config, task, form = self._config, self._data.task, self._data.form
        if model is not None:  # the run's own network was checked before
            check_gives(model, task.network, config.data, "in the method option that names it")
        about = {
            "model": config.model if model is None else model,
            "classes": len(self._data.classes) if classes is None else classes,
            "width": config.width if width is None and model in (None, config.model) else width,
            **(self._describe() if model is None else {}),
        }
        network: nn.Module = form.build(task, about, config.seed if seed is None else seed)
        return network

    def _personal(self, network: nn.Module) -> list[str]:
        if self._config.personal is not None:
            return self._config.personal.split(",")
        head = getattr(network, "head", None)  # unknown for a user's network before its first samples
        return [f"{name}.*" for name, module in user_module(network).named_modules() if module is head]

    @cached_property
    def _initial_weights(self) -> Mapping[str, Tensor]:
        return initial_weights.read(str(self._config.init), self._config.init_sha256)

    @cached_property
    def _taps(self) -> tuple[Any, ...]:
        """Points where ``--features`` and ``--stages`` take the results of the run's network."""
        stages = [name.strip() for name in (self._config.stages or "").split(",") if name.strip()]
        network = self._build_network(None, None, None, None)
        return find_taps(network, stages, self._config.features, self._data.form, self.model_name)

    @property
    def model_name(self) -> str:
        return str(self._data.task.network_name(self._config))

    @cached_property
    def added_models(self) -> tuple[models.ModelEntry, ...]:
        return list_added(" ".join(map(str, (self._config.model, *self._config.options.values()))))

    def initial(self) -> Message:
        return Network(self.build(), torch.device("cpu")).read()

    @cached_property
    def initial_buffers(self) -> Message:
        return {name: value for name, value in self.initial().items() if name != "parameters"}

    @cached_property
    def initial_personal(self) -> Message:
        return freezing.copies(freezing.tensors(user_module(self.build()))) if self._config.keeps_parts else {}

    @property
    def trained_vectors(self) -> tuple[str, ...]:
        """The vectors of a trained network that go to the server."""
        return VECTORS if self._config.buffers == "average" else ("parameters",)

    # -- on the device ---------------------------------------------------------------------------------------------

    def place(self, module: nn.Module) -> nn.Module:
        return place(module, self.device)

    def get(self, name: str) -> Network:
        key = name, self.lane if name == "local" else 0
        if key not in self.slots:
            self.slots[key] = Network(self.build(), self.device)
            if name != "local":
                self.slots[key].freeze()
        return self.slots[key]

    def is_flat(self, module: nn.Module) -> bool:
        server = self.slots.get(("server", 0))
        return server is not None and server.module is module

    @contextmanager
    def on_lane(self, lane: int) -> Iterator[None]:
        self.lane = lane
        try:
            yield
        finally:
            self.lane = 0

    @property
    def graphs(self) -> Graphs | None:
        if self.lane not in self.lane_graphs:
            self.lane_graphs[self.lane] = Graphs(self.device) if self.device.type == "cuda" else None
        return self.lane_graphs[self.lane]

    def first_steps(self, phase: Phase) -> FirstSteps:
        new = FirstSteps(keep_going=self._config.on_nan == "skip")
        return self._first_steps.setdefault((phase.name, phase.exchange), new)

    def begin_exchange(self) -> None:
        """Forget vectors received before, whose tensors may have changed without a new version."""
        self._frozen, self._sent = ([], None), None

    def send(self, vector: Tensor) -> Tensor:
        """Return a message's vector on the device, for reading, sent once for all clients of a round."""
        if self.device.type == "cpu" or vector.device.type != "cpu" or vector.is_inference():
            return vector.to(self.device)
        if (last := self._sent) is None or last[0] is not vector or last[1] != vector._version:
            self._sent = last = vector, vector._version, vector.to(self.device)
        return last[2]

    def frozen(
        self,
        message: Message,
        buffers: Mapping[str, Tensor] | None,
        own_tensors: Mapping[str, Tensor] | None = None,
        client: int | None = None,
    ) -> nn.Module:
        """Return a received network, frozen, in eval mode.

        Clients that received the same vectors share the copy, unless the network has constant buffers, which its
        forward pass may change.

        Args:
            buffers: the client's own buffers (``--buffers local``), or None.
            own_tensors: the client's personal parts (``--personal``) by name, or None.
        """
        network = self.get("frozen")
        vectors = (message["parameters"], *(buffers or {}).values(), *message.values(), *(own_tensors or {}).values())
        # The key holds the tensors themselves, so that no new tensor can get the identity of a freed one.
        counted = [isinstance(x, Tensor) and not x.is_inference() for x in vectors]  # others are numbers
        key = [(x, x._version if has_version else 0) for x, has_version in zip(vectors, counted, strict=True)]
        key += [(client, 0)] if network.constants else []
        old_key, module = self._frozen
        if module is None or [(id(x), version) for x, version in key] != [(id(x), version) for x, version in old_key]:
            network.train_mode()  # before the weights change that eval() has derived others from
            network.write({**message, **(buffers or {})})
            network.write_personal(own_tensors or {})
            network.statistics = self._config.statistics or bool(buffers)
            network.eval_mode()
            self._frozen = key, (module := cast_frozen(network.module))
        return module
