"""Digests of the messages that left the clients of a private run after the checkpoints that it can be resumed from.

A resumed run replays the rounds after its checkpoint, from the clients' states there and with the same noise. If a
replayed message equals the earlier one bit for bit, nothing more is released. If it differs, both are released, which
leaks more than epsilon says:

* On another processor, device or version of PyTorch the same data give other last bits. Under the same noise, the
  difference of the two messages is a function of the data that no noise covers.
* A client whose secret bits were not yet in a checkpoint draws other bits. Under other noise, the two messages are two
  releases.

So every message's digest is on the disk before the server gets the message, and a replay ends before it sends a message
that differs.
"""

import json
from pathlib import Path

from fedkern.errors import UserError
from fedkern.files import atomic
from fedkern.messages.states import digest

NAME = "releases.jsonl"
DIVERGED = "diverged"
"""Message of a client that diverged, as its divergence is a release too."""


class Releases:
    """Digests of a run's messages, as JSON lines ``[plan, exchange, client, digest]`` (the server is client -1)."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._due: dict[tuple[int, str, int], str] = {}

    def open(self, plan: int) -> None:
        """Read the digests that a run continuing with round ``plan`` has to repeat.

        An incomplete last line is dropped: its message never left the client.
        """
        try:
            text = self._path.read_bytes() if self._path.exists() else b""
            if (complete := text[: text.rfind(b"\n") + 1]) != text:
                atomic.write_bytes(self._path, complete)
            lines = [json.loads(line) for line in complete.decode().splitlines()]
            self._due = {(int(at), str(name), int(k)): str(digest) for at, name, k, digest in lines if at >= plan}
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{self._path} is damaged ({error}), so that nobody can tell what this private run has released: start "
                "it again in a new folder."
            ) from None

    def add(self, plan: int, exchange: str, client: int, message: object) -> None:
        """Write a message's digest to the disk, before the message leaves its client.

        Raises:
            UserError: a different message left before the run was interrupted, or the disk is full.
        """
        key, message_digest = (plan, exchange, client), digest(message)
        if (before := self._due.pop(key, None)) is None:
            line = json.dumps([*key, message_digest]) + "\n"
            with atomic.open_in_place(self._path, "ab", durable=True) as file:
                file.write(line.encode())
        elif before != message_digest:
            sender, given = ("the server", "the mean of a round") if client < 0 else (f"client {client}", "its answer")
            raise UserError(
                f"This private run was interrupted after {sender} had released {given}, and what would be "
                "released in its place now differs: both together would tell more than epsilon says. Resume it with "
                "the processor or GPU, the PyTorch and the threads that it was interrupted with; where those are the "
                "same, start it again (what it released so far then comes on top of the new run's epsilon)."
            )

    def forget(self, plan: int) -> None:
        """Drop digests of rounds before ``plan``, which no kept checkpoint would replay."""
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            atomic.write_bytes(self._path, "".join(line for line in lines if json.loads(line)[0] >= plan).encode())
