"""Ranks of one torchrun: this process's rank, the connections of all, and their common end."""

import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import Store, TCPStore

from fedkern.engine.transport.connection import WINDOW, Connection, Ended, Lost, silence
from fedkern.errors import RunFailed, UserError
from fedkern.messages.packets import Packet
from fedkern.process import versions
from fedkern.process.interrupts import check

GO_ON = "go on from its last checkpoint with --resume, or have torchrun do so with --max-restarts"
LEAVING = 10.0
"""Seconds that an ending rank gives the others to notice."""
_ADDRESS = "fedkern/address"  # entry of torchrun's store: rank 0's address and token
_HELLO = 64  # most bytes of a rank's greeting
_LOOK = 0.1  # seconds between two checks for another rank


@dataclass(frozen=True)
class LaunchedRank:
    """This process among the ranks.

    Attributes:
        local, local_size: its number on this machine, and the number of ranks on this machine.
        restarts, max_restarts: how often torchrun has restarted the ranks, and how often it may.
        job: name of the torchrun, the same after a restart.
    """

    rank: int
    size: int
    local: int
    local_size: int
    restarts: int
    max_restarts: int
    job: str


def find_rank() -> LaunchedRank | None:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, size, local, local_size = (int(os.environ[name]) for name in names)
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        max_restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    except (KeyError, ValueError):
        return None
    return LaunchedRank(rank, size, local, local_size, restarts, max_restarts, _job())


def _job() -> str:
    if (name := os.environ["TORCHELASTIC_RUN_ID"]) not in ("", "none"):
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
        launched: this process among the ranks.
        connections: by rank: on rank 0 to all others, on another rank to rank 0.
        other_isas: on rank 0, differing ISA levels of PyTorch by rank (see `versions.kernels`).
    """

    def __init__(self, launched: LaunchedRank) -> None:
        self.launched, self.rank, self.size = launched, launched.rank, launched.size
        self.connections: dict[int, Connection] = {}
        self.other_isas: dict[int, str] = {}

    def meet(self, words: Sequence[str]) -> None:
        """Connect the ranks and compare their command lines and versions."""
        global _met
        if not hasattr(os, "memfd_create"):
            raise UserError("Ranks of torchrun share memory as only Linux has it: start the run without torchrun.")
        try:
            ends = self._connect(silence())
        except (OSError, RuntimeError) as error:  # RuntimeError: of torch's store
            reason = " ".join((str(error).splitlines() or [type(error).__name__])[0].split())
            raise RunFailed(
                f"The {self.size} ranks cannot be connected ({reason}): see whether all machines reach "
                f"{os.environ.get('MASTER_ADDR')} and each other."
            ) from None
        _met = True
        self.connections = {rank: Connection(end, 0 if self.rank else WINDOW) for rank, end in ends.items()}
        installed = {name: versions.versions()[name] for name in ("fedkern", "torch")}
        if self.rank:
            self.connections[0].say((list(words), installed, versions.kernels()))
            return
        ours = versions.kernels()
        for rank, connection in self.connections.items():
            while (hello := self.receive_from(connection, 0.5)) is None:
                self.check()
            theirs, their_versions, kernels = hello.value
            if theirs != list(words):
                raise UserError(
                    f"Rank {rank} was started with other arguments than rank 0 ({' '.join(theirs)}): start torchrun "
                    "with the same command on every machine."
                )
            if their_versions != installed:
                raise UserError(
                    f"Rank {rank} has {_list_versions(their_versions)}, and rank 0 {_list_versions(installed)}: "
                    "install the same versions on every machine."
                )
            # Backend and instruction set need no check: rank 0 sends its own to the others.
            if kernels["torch"] != ours["torch"]:
                self.other_isas[rank] = kernels["torch"]

    def _connect(self, seconds: float) -> dict[int, socket.socket]:
        until, host, port = time.monotonic() + seconds, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._store = TCPStore(host, port, None, serves, timedelta(seconds=seconds), wait_for_workers=False)
        if self.rank:
            return find_rank_0(self._store, self.rank, until)
        with socket.create_connection((host, port)) as route:
            own, peer = route.getsockname()[0], route.getpeername()[0]
        return accept_ranks(self._store, host if own == peer else own, self.size, until)

    def receive_from(self, connection: Connection, seconds: float) -> Packet | None:
        try:
            return connection.get(seconds)
        except (Lost, Ended):
            self.check()
            raise

    def check(self) -> None:
        """Raise RunFailed on rank 0 if another rank has failed or is lost, or a pending interrupt."""
        check()
        for rank, connection in self.connections.items():
            if isinstance(connection.over, Ended):
                raise RunFailed(f"Rank {rank} failed: {connection.over.said}")
            if isinstance(connection.over, Lost):
                raise RunFailed(f"Rank {rank} was lost, as {connection.over}: {GO_ON}.")

    def leave(self, code: int, reason: str = "") -> None:
        """Announce this rank's end (see `Connection.leave`), and wait until the other ranks know.

        Rank 0 also waits for their answer: a connection that closes too early may lose its last words.
        """
        for connection in self.connections.values():
            connection.leave(code, reason)
        until = time.monotonic() + LEAVING
        for connection in self.connections.values():
            connection.wait_until_told(until, heard=self.rank == 0)


def _list_versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def accept_ranks(store: Store, address: str, size: int, until: float) -> dict[int, socket.socket]:
    """Return the connections of rank 0 to all others, by rank.

    The others find rank 0's address and token in the store, and have to show the token.
    """
    token, ends = secrets.token_hex(16), dict[int, socket.socket]()
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6) as server:
        server.settimeout(_LOOK)
        store.set(_ADDRESS, f"{address} {server.getsockname()[1]} {token}")
        while missing := [str(rank) for rank in range(1, size) if rank not in ends]:
            check()
            if time.monotonic() > until:
                raise TimeoutError(f"nothing came from rank {', '.join(missing)}")
            with suppress(OSError, ValueError):  # ValueError: it is no rank
                end = server.accept()[0]
                end.settimeout(1.0)
                rank, shown = end.recv(_HELLO).decode().split()
                if shown == token:
                    ends[int(rank)] = end
    for end in ends.values():
        end.sendall(token.encode())
    return ends


def find_rank_0(store: Store, rank: int, until: float) -> dict[int, socket.socket]:
    """Return the connection to rank 0, by its rank.

    The store may hold the address of an earlier start, so an address counts once rank 0 answers there.
    """
    while (seconds := until - time.monotonic()) > 0:
        check()
        if store.check([_ADDRESS]):
            host, port, token = store.get(_ADDRESS).decode().split()
            with suppress(OSError):
                end = socket.create_connection((host, int(port)), seconds)
                end.sendall(f"{rank} {token}".encode())
                if end.recv(_HELLO) == token.encode():
                    return {0: end}
        time.sleep(_LOOK)
    raise TimeoutError("rank 0 did not answer")


_present: TorchrunGroup | None = None
_met = False


def find_main_group() -> TorchrunGroup | None:
    """Return this process's ranks if it is rank 0 of several."""
    return _present if _present is not None and _present.rank == 0 else None


def is_connected() -> bool:
    """Return whether this process has met other ranks, so that an error of rank 0 ends all of them."""
    return _met


@contextmanager
def join_ranks(launched: LaunchedRank) -> Iterator[TorchrunGroup]:
    """Join the process group for the block, and notify the others of rank 0's error."""
    global _present
    _present = TorchrunGroup(launched)
    try:
        yield _present
    except BaseException as error:
        if not launched.rank:
            _present.leave(error.exit_code if isinstance(error, UserError) else 1)
        raise
    finally:
        _present = None
