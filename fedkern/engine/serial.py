"""The in-process engine: clients one after another on one scratch network."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedkern import models, ops
from fedkern.engine.config import RunConfig
from fedkern.engine.local import Context, Diverged, Schedule, train
from fedkern.engine.network import Network
from fedkern.engine.samples import CACHE_BYTES, Bank, ClientData
from fedkern.methods.base import Federation, LocalTraining, Message, Step, Upload
from fedkern.streams import stream


class Bench:
    """What all clients and the server of a run share: settings, data, three networks, named warnings.

    One network trains, one is the frozen global copy, one is the server's; each is made on first use and reused.
    """

    def __init__(self, config: RunConfig, data: Any) -> None:
        self.config, self.data = config, data
        self.device = torch.device(config.device)
        self.federation = Federation(
            rounds=config.rounds,
            samples=data.client_sizes,
            classes=len(data.classes),
            local_epochs=config.local_epochs,
        )
        images = [*(split.images for split in data.clients), *(split.images for split in data.tests.values())]
        self.cache = 4 * sum(image.numel() for image in images) <= CACHE_BYTES
        self.warnings: dict[str, str] = {}
        self._networks: dict[str, Network] = {}
        self._clients: dict[int, ClientData] = {}
        self._frozen_key: tuple[Any, ...] = ()
        self._initial_buffers: Message | None = None

    def build(self) -> nn.Module:
        """A freshly initialised network from the run's own stream, always the same."""
        channels, height, width = self.data.image_shape
        return models.build(
            self.config.model,
            classes=self.federation.classes,
            channels=channels,
            image_size=min(height, width),
            seed=self.config.seed,
            width=self.config.width,
        )

    def network(self, name: str) -> Network:
        """The network called ``"local"``, ``"frozen"`` or ``"server"``."""
        if name not in self._networks:
            network = Network(self.build(), self.device)
            if name != "local":
                network.freeze()
            self._networks[name] = network
        return self._networks[name]

    def initial(self) -> Message:
        """The vectors of a fresh network."""
        return Network(self.build(), torch.device("cpu")).read()

    def initial_buffers(self) -> Message:
        """Its ``buffers`` and ``integers``, for clients that start from them."""
        if self._initial_buffers is None:
            self._initial_buffers = {name: value for name, value in self.initial().items() if name != "parameters"}
        return self._initial_buffers

    def client_data(self, client: int) -> ClientData:
        if client not in self._clients:
            data = self.data
            augment = self.config.augment or data.augment
            made = ClientData(data.clients[client], data.mean, data.std, self.device, augment, self.cache)
            if not self.cache:
                self._clients.clear()  # one client's images at a time
            self._clients[client] = made
        return self._clients[client]

    def frozen(self, message: Message, buffers: Mapping[str, Tensor] | None) -> nn.Module:
        """The frozen copy of a received network, in eval mode; written once for clients that got the same vectors."""
        network = self.network("frozen")
        # The tensors themselves are kept in the key, so that no other tensor can come to have their identity.
        key = (message["parameters"], *(buffers or {}).values(), *message.values())
        if len(key) != len(self._frozen_key) or any(a is not b for a, b in zip(key, self._frozen_key, strict=True)):
            network.write({**message, **(buffers or {})})
            network.statistics = self.config.buffers == "average" or bool(buffers)
            network.eval_mode()
            self._frozen_key = key
        return network.module

    def warn(self, name: str, text: str) -> None:
        self.warnings.setdefault(name, text)


class Client:
    """A client of the serial engine (see :class:`fedkern.methods.base.Client`)."""

    def __init__(self, bench: Bench, client: int, state: dict[str, Any]) -> None:
        self.id = client
        self.samples = bench.federation.samples[client]
        self.state = state
        self.scratch: dict[str, Any] = {}
        self.report: dict[str, float] = {}
        self._bench = bench

    @property
    def objects_known(self) -> bool:
        return self._bench.data.clients[self.id].masks is not None

    def train(self, method: LocalTraining, step: Step, message: Message) -> Message:
        bench, config = self._bench, self._bench.config
        network = bench.network("local")
        own = None
        if config.buffers != "average":
            own = self.state.get("buffers_local") if config.buffers == "local" else None
            network.write(own or bench.initial_buffers())
        network.write(message)
        received = Context(
            message=message,
            step=step,
            samples=self.samples,
            epochs=config.local_epochs,
            parameters=message["parameters"].to(bench.device),
            frozen=lambda: bench.frozen(message, own),
        )
        schedule = Schedule(
            lr=config.lr * config.lr_decay ** max(step.round, 0),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            epochs=config.local_epochs,
            batch_size=config.batch_size,
        )
        self.report = train(self, method, step, network, bench.client_data(self.id), received, schedule)
        result = {name: value.cpu() for name, value in network.read().items()}
        if config.buffers == "average":
            return result
        if config.buffers == "local":
            self.state["buffers_local"] = {name: value for name, value in result.items() if name != "parameters"}
        return {"parameters": result["parameters"]}

    def backgrounds(self, fill: str = "mean") -> Bank:
        data = self._bench.client_data(self.id)
        bank = data.backgrounds(fill)
        if len(bank) == 0:
            self.warn(
                "background-bank-empty",
                f"No object was detected in any image of client {self.id}: it trains without the intervention.",
            )
        elif len(bank) < 0.5 * self.samples:
            self.warn(
                "background-bank-sparse",
                f"Objects were detected in {len(bank)} of the {self.samples} images of client {self.id}: its "
                "background bank is small.",
            )
        return bank

    def background_images(self) -> Message:
        return self._bench.client_data(self.id).background_images()

    def make_backgrounds(self, message: Mapping[str, Tensor], fill: str = "mean") -> Bank:
        return self._bench.client_data(self.id).make_backgrounds(message, fill)

    def rng(self, purpose: str, step: Step) -> np.random.Generator:
        name = purpose if step.exchange == "update" else f"{purpose}/{step.exchange}"
        return stream(self._bench.config.seed, name, round=step.round, client=self.id)

    def warn(self, name: str, text: str) -> None:
        self._bench.warn(name, text)


class Server:
    """The server of the serial engine (see :class:`fedkern.methods.base.Server`)."""

    def __init__(self, bench: Bench, state: dict[str, Any] | None = None) -> None:
        self.federation = bench.federation
        self.state: dict[str, Any] = {} if state is None else state
        self.scratch: dict[str, Any] = {}
        self._bench = bench

    def initial(self) -> Message:
        vectors = self._bench.initial()
        return vectors if self._bench.config.buffers == "average" else {"parameters": vectors["parameters"]}

    def network(self, message: Message) -> nn.Module:
        network = self._bench.network("server")
        network.write(message)
        network.statistics = self._bench.config.buffers == "average"
        network.eval_mode()
        return network.module

    def accumulator(self, size: int) -> Any:
        return ops.Accumulator(size)


def sample_clients(config: RunConfig, round: int) -> list[int]:
    """The clients of a round in ascending order, drawn from the round's own stream."""
    count = max(1, round_half_up(config.sample_fraction * config.clients))
    if count >= config.clients:
        return list(range(config.clients))
    chosen = stream(config.seed, "sampling", round=round).choice(config.clients, size=count, replace=False)
    return sorted(int(k) for k in chosen)


def round_half_up(value: float) -> int:
    return math.floor(value + 0.5)


class Exchange:
    """One exchange of a round: sends, lets the clients work one after another, yields their uploads."""

    def __init__(self, engine: Any, step: Step, participants: list[int], one_off: bool) -> None:
        self.engine, self.step = engine, step
        self.participants, self.one_off = participants, one_off
        self.seconds = 0.0

    def uploads(self, outgoing: Any) -> Iterator[Upload]:
        """Runs the clients lazily: the next one starts when the server is done with the last one's upload."""
        engine, step = self.engine, self.step
        for k in self.participants:
            message = message_for(outgoing, k)
            start = time.perf_counter()
            engine.ledger.book(k, "down", message, one_off=self.one_off)
            client = engine.client(k)
            before = engine.client_fingerprint(client)
            try:
                answer = engine.method.client_update(client, step, message)
            except Diverged as problem:
                engine.dropped(problem)
                self.seconds += time.perf_counter() - start
                continue
            engine.ledger.book(k, "up", answer, one_off=self.one_off)
            info: dict[str, Any] = {"samples": client.samples, **client.report}
            sent, got = message.get("parameters"), answer.get("parameters")
            if isinstance(sent, Tensor) and isinstance(got, Tensor) and sent.shape == got.shape:
                info["drift"] = float(torch.linalg.vector_norm(got - sent))
            engine.client_done(client, before, info, time.perf_counter() - start)
            self.seconds += time.perf_counter() - start
            # Handed over for good: while the next client trains, only the server may still hold this upload.
            handover = [Upload(k, client.samples, answer)]
            del answer, got, client
            yield handover.pop()


def message_for(outgoing: Any, client: int) -> Message:
    """The client's message out of what ``send`` returned: one for all, or a dict by client id."""
    if outgoing and all(isinstance(key, int) for key in outgoing):
        if client not in outgoing:
            raise ValueError(f"send: expected a message for client {client}, which takes part; given none")
        return outgoing[client]
    return outgoing
