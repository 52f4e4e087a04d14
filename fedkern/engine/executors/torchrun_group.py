"""Ranks of one torchrun: which one this process is, how all meet, and how all end together."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from fedkern.engine.executors.connection import Connection, Ended, Lost, first_line, how, silence
from fedkern.errors import RunFailed, UserError
from fedkern.messages.packets import Packet
from fedkern.ops import Accumulator
from fedkern.ops._aggregate.reference import risen
from fedkern.process import versions
from fedkern.process.interrupts import check

Result = TypeVar("Result")
GO_ON = "go on from its last checkpoint with --resume, or have torchrun do so with --max-restarts"
LEAVING = 10.0
"""Seconds that an ending rank gives the others to hear of it."""


@dataclass(frozen=True)
class LaunchedRank:
    """This process among the ranks.

    Attributes:
        rank, size: its rank, and the number of ranks.
        local, here: its number on this machine, and the number of ranks on this machine.
        restarts, most_restarts: how often torchrun has restarted the ranks, and how often it may.
        job: name of the torchrun, the same after a restart.
    """

    rank: int
    size: int
    local: int
    here: int
    restarts: int
    most_restarts: int
    job: str


def launched() -> LaunchedRank | None:
    """This process among the ranks; None where torchrun has not started it."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    try:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, size, local, here = (int(environment[name]) for name in names)
        restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
        most = int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    except (KeyError, ValueError):
        return None
    return LaunchedRank(rank, size, local, here, restarts, most, _job())


def _job() -> str:
    """The id that torchrun was given or has drawn; where it has none, torchrun's process on this machine."""
    name = os.environ["TORCHELASTIC_RUN_ID"]
    if name not in ("", "none"):
        return name
    parent = os.getppid()
    try:
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        began = ""
    return f"{socket.gethostname()} {parent} {began}"


class TorchrunGroup:
    """The ranks, as this process sees them.

    Attributes:
        launched: this process among them; ``rank`` and ``size`` are its own.
        connections: by rank: on rank 0 to all others, on another rank to rank 0.
        odd: on rank 0, the ISA level of PyTorch on ranks where it is another, by rank (see `versions.kernels`).
    """

    def __init__(self, launched: LaunchedRank) -> None:
        self.launched, self.rank, self.size = launched, launched.rank, launched.size
        self.connections: dict[int, Connection] = {}
        self.odd: dict[int, str] = {}
        self._group: Any = None
        self._between_gpus: Any = None

    def meet(self, words: Sequence[str]) -> None:
        """Connects the ranks and compares what they were started with.

        Raises:
            UserError: a rank was started with another command line, or has another version of fedkern or PyTorch; or
                :func:`silence` is misstated.
            RunFailed: the ranks cannot be connected.
        """
        global _met
        if not hasattr(os, "memfd_create"):
            raise UserError("Ranks of torchrun share memory as only Linux has it: start the run without torchrun.")
        limit = timedelta(seconds=silence())
        try:
            patiently(lambda: self._connect(limit))
        except Exception as error:
            raise RunFailed(
                f"The {self.size} ranks cannot be connected ({first_line(error)}): see whether all machines reach "
                f"{os.environ.get('MASTER_ADDR')}, and name their network in GLOO_SOCKET_IFNAME."
            ) from None
        _met = True
        others = range(1, self.size) if self.rank == 0 else [0]
        self.connections = {other: Connection(other, serving=self.rank != 0) for other in others}
        installed = {name: versions.versions()[name] for name in ("fedkern", "torch")}
        if self.rank:
            self.connections[0].say((list(words), installed, versions.kernels()))
            return
        ours = versions.kernels()
        for rank, connection in self.connections.items():
            while (hello := self.heard(connection, 0.5)) is None:
                self.check()
            theirs, their_versions, kernels = hello.value
            if theirs != list(words):
                raise UserError(
                    f"Rank {rank} was started with other arguments than rank 0 ({' '.join(theirs)}): start torchrun "
                    "with the same command on every machine."
                )
            if their_versions != installed:
                raise UserError(
                    f"Rank {rank} has {_listed(their_versions)}, and rank 0 {_listed(installed)}: install the same "
                    "versions on every machine."
                )
            # Rank 0 sends the others its own backend and instruction set to compute with.
            if kernels["torch"] != ours["torch"]:
                self.odd[rank] = kernels["torch"]

    def _connect(self, limit: timedelta) -> None:
        store, rank, size = next(rendezvous("env://", timeout=limit))
        store = dist.PrefixStore(f"fedkern/{_agreed(store, rank, size, limit.total_seconds())}", store)
        # Messages are tensors in a machine's own memory, also where clients train on GPUs.
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
        # Its collectives never meet the connections' packets.
        self._group = dist.new_group(backend="gloo", timeout=limit)

    def heard(self, connection: Connection, seconds: float) -> Packet | None:
        """The next packet on a connection of rank 0, as `Connection.get` has it; raises as `check` for a lost rank."""
        try:
            return connection.get(seconds)
        except (Lost, Ended):
            self.check()
            raise

    def check(self) -> None:
        """Raises RunFailed on rank 0 where another rank has failed or is lost; after Ctrl-C its exception instead."""
        check()
        for rank, connection in self.connections.items():
            if isinstance(connection.over, Ended):
                raise RunFailed(f"Rank {rank} failed: {connection.over.said}")
            if isinstance(connection.over, Lost):
                raise RunFailed(f"Rank {rank} was lost, as {connection.over}: {GO_ON}.")

    def reduced(self, local: Accumulator, device: str) -> tuple[Tensor, Tensor]:
        """Adds up the exact accumulators of all ranks, in a reduction of integers that every rank takes part in.

        Args:
            local: what this rank adds, an exact accumulator of the same size on every rank, in main memory.
            device: the run's device; with "cuda" the integers travel between GPUs, over NCCL.

        Returns:
            On rank 0 the digits, int64 [3, P], and their positions, int8 [P], of the sum; elsewhere nothing of use.

        Raises:
            Lost: a rank is gone.
        """
        state = local.state_dict()
        nccl = device == "cuda" and dist.is_nccl_available()
        where = f"cuda:{self.launched.local}" if nccl else "cpu"

        def reduce() -> tuple[Tensor, Tensor]:
            if nccl and self._between_gpus is None:
                self._between_gpus = dist.new_group(backend="nccl", timeout=timedelta(seconds=silence()))
            group = self._between_gpus if nccl else self._group
            before = state["top"].to(where)
            top = before.clone()
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
            digits = risen(state["digits"].to(where), top.long() - before.long())
            dist.reduce(digits, 0, dist.ReduceOp.SUM, group=group)
            return digits.cpu(), top.cpu()

        try:
            return patiently(reduce)
        except Exception as error:
            raise Lost(how(error)) from None

    def leave(self, code: int, reason: str = "") -> None:
        """Tells the other ranks that this one ends (see `Connection.leave`), and waits until they know.

        Rank 0 also waits for their answer: a connection that closes too early may lose what it was told last.
        """
        for connection in self.connections.values():
            connection.leave(code, reason)
        until = time.monotonic() + LEAVING
        for connection in self.connections.values():
            connection.left(until, heard=self.rank == 0)


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _agreed(store: Any, rank: int, size: int, seconds: float) -> str:
    """A name for this start of the ranks that no earlier start has used.

    torchrun's store outlives a restart, and not every machine counts the same restarts.  Without a name of its own, a
    start would find the addresses of lost ranks in the store.  Rank 0 draws a name; a rank believes it once rank 0 has
    answered a word that the rank has drawn itself.

    Args:
        store: where torchrun's ranks find each other.
        rank, size: of this process, and the number of ranks.
        seconds: how long to wait for the others.

    Raises:
        TimeoutError: not all ranks have come in time.
    """
    until, token, last = time.monotonic() + seconds, uuid.uuid4().hex, ""
    if rank == 0:
        store.set("fedkern/name", token)
    while time.monotonic() < until:
        if rank == 0:
            words = [f"fedkern/{token}/{other}" for other in range(1, size)]
            if store.check(words):
                store.set(f"fedkern/{token}/all", " ".join(store.get(word).decode() for word in words))
                return token
        elif store.check(["fedkern/name"]):
            name = store.get("fedkern/name").decode()
            if name != last:
                last = name
                store.set(f"fedkern/{name}/{rank}", token)
            answer = f"fedkern/{name}/all"
            if store.check([answer]) and token in store.get(answer).decode().split():
                return name
        time.sleep(0.02)
    raise TimeoutError(f"not all ranks have come within {seconds:g} seconds")


def patiently(work: Callable[[], Result]) -> Result:
    """Does ``work`` in a thread, because a signal reaches no thread that waits inside torch.distributed."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not future.done():
        check()
        wait([future], timeout=0.2)
    return future.result()


_present: TorchrunGroup | None = None
_begun = _met = False


def present() -> TorchrunGroup | None:
    """The ranks that this process belongs to, where it is rank 0 of several."""
    return _present if _present is not None and _present.rank == 0 else None


def begun() -> bool:
    """Whether this process has begun to meet other ranks, so that threads may wait inside gloo."""
    return _begun


def met() -> bool:
    """Whether this process has met other ranks, so that an error of rank 0 ends all of them."""
    return _met


@contextmanager
def joined(launched: LaunchedRank) -> Iterator[TorchrunGroup]:
    """Has this process belong to its ranks inside the block, whose end all other ranks learn on rank 0.

    An exception is told to the other ranks as its exit code: rank 0 says it.
    """
    global _present, _begun
    _present, _begun = TorchrunGroup(launched), True
    try:
        yield _present
    except BaseException as error:
        if not launched.rank:
            _present.leave(error.exit_code if isinstance(error, UserError) else 1)
        raise
    finally:
        _present = None
