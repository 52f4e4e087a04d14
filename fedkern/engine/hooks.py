"""Calls of the server's half of a method, in its random streams, with the method named in errors."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.rounds.progress import Progress
from fedkern.engine.server import Server
from fedkern.errors import RAISED, RunFailed, UserError, error_origin, locate_errors
from fedkern.messages.leaves import leaves
from fedkern.methods.base import ClientId, Declaration, Message, Phase, Upload
from fedkern.methods.uploads import all_finite, infinite_as_sent


class MethodCode:
    """Context that names method and round when the method's code raises (see :func:`fedkern.errors.locate_errors`).

    Errors out of the uploads are the engine's and clients'. A built-in method's UserError before the first round is
    about settings, and passes unchanged.
    """

    def __init__(self, kind: type, name: str, progress: Progress, role: str = "method") -> None:
        self._kind, self._owner, self.progress = kind, f"the {role} {name}", progress
        self._from_uploads: BaseException | None = None

    @contextmanager
    def __call__(self, part: str, whom: str = "") -> Iterator[None]:
        try:
            yield
        except RAISED as error:
            settings = self.progress.entry is None and isinstance(error, UserError)
            if error is self._from_uploads or (settings and not error_origin(error, self._kind)):
                raise
            with locate_errors(f"`{part}` of {self._owner} failed{whom} {self.progress.when()}", self._kind):
                raise

    def passing(self, uploads: Iterable[Upload]) -> Iterator[Upload]:
        """Yield the uploads, whose errors are not the method's."""
        try:
            yield from uploads
        except BaseException as error:
            self._from_uploads = error
            raise


class Hooks:
    """Calls of a method's server, or of the pooling of statistics, in an exchange."""

    def __init__(self, callee: str, handler: Any, server: Server, context: RunContext, code: MethodCode) -> None:
        self.callee, self._handler, self._server, self._context, self._code = callee, handler, server, context, code

    @property
    def own(self) -> bool:
        return self.callee == "method"

    def send(self, phase: Phase) -> object:
        with self._context.drawing(self._server, phase), self._code("send"):
            return self._handler.send(self._server, phase)

    def messages(self, outgoing: object, clients: Iterable[ClientId]) -> dict[ClientId, Message]:
        per_client = messages_for(outgoing, clients, getattr(self._handler, "may_skip_clients", False))
        messages = {k: message for k, message in per_client.items() if message is not None}
        if type(self._handler).__module__.startswith("fedkern."):
            return messages
        # A user's server may write into its tensors while clients still have to work.
        copies: dict[int, Any] = {}
        for leaf in leaves(messages):
            if isinstance(leaf, Tensor) and id(leaf) not in copies:
                copies[id(leaf)] = leaf.detach().clone()
        with self._code("send"):
            return copy.deepcopy(messages, copies)

    def declare_upload(self, phase: Phase, client: ClientId, message: Message) -> Declaration:
        with self._code("expects"):
            declared: Declaration = self._handler.expects(self._server, phase, client, message)
            return declared

    @property
    def on_gpu(self) -> tuple[str, ...]:
        """Vectors that may stay on the GPU, as the server only adds them up.

        Empty for a user-defined ``client_update``, which may compute on the CPU with the result of ``train``, and for
        the pooling.
        """
        update = getattr(self._handler, "client_update", None)
        # Not __module__, which functools.wraps copies.
        module = getattr(update, "__globals__", {}).get("__name__", "")
        return tuple(self._handler.reduce) if self.own and module.startswith("fedkern.") else ()

    def cohort_update(
        self, clients: Mapping[ClientId, Client], phase: Phase, sent: Mapping[ClientId, Message]
    ) -> dict[ClientId, Message] | None:
        """Return the uploads of a cohort that works together, or None if its clients work on their own."""
        if not self.own:
            return None
        with self._context.drawing(self._server, phase), self._code("cohort_update"):
            uploads = self._handler.cohort_update(clients, phase, sent)
            return None if uploads is None else dict(uploads)

    def server_update(self, phase: Phase, uploads: Iterator[Upload]) -> None:
        passing = self._code.passing(uploads)
        with self._context.drawing(self._server, phase), self._code("server_update"):
            self._handler.server_update(self._server, phase, passing)
        for _ in passing:  # every client works, even where server_update stops reading
            pass

    def check_model(self) -> None:
        with self._code("vectors"):
            vectors = self._handler.vectors(self._server)
        check_finite({**self._server.state, **vectors}, self._code.progress.when(), self._context)

    def network(self) -> nn.Module | None:
        """Return the network that the method evaluates and saves, in eval mode, or None if there is none yet."""
        with self._code("model"):
            network: nn.Module | None = self._handler.model(self._server)
        # :meth:`check_model` has checked a flat network.
        if network is not None and not self._context.networks.is_flat(network):
            network.eval()
            check_finite(network.state_dict(), f"in round {self._code.progress.done}", self._context)
        return network


def messages_for(outgoing: Any, clients: Iterable[int], may_skip_clients: bool = False) -> dict[int, Message | None]:
    """Return the clients' messages out of ``send``: one message for all clients, or a dict by client id.

    Args:
        may_skip_clients: whether ``send`` may leave clients out, or return None for all. The message of such a client
            is None.
    """
    # Checked once for all clients: a message for every client of a large federation is a long dict.
    if not outgoing or not all(isinstance(key, int) for key in outgoing):
        return dict.fromkeys(clients, outgoing)
    messages: dict[int, Message | None] = {}
    for k in clients:
        if k not in outgoing and not may_skip_clients:
            raise ValueError(f"send: expected a message for client {k}, which takes part; given none")
        messages[k] = outgoing.get(k)
    return messages


def message_for(outgoing: Any, client: int, may_skip_clients: bool = False) -> Message | None:
    return messages_for(outgoing, [client], may_skip_clients)[client]


def check_finite(tensors: Mapping[str, object], when: str, context: RunContext) -> None:
    """Check that a model's tensors are finite, except buffers infinite from the start."""
    for name, value in tensors.items():
        if isinstance(value, Tensor) and not all_finite(value):
            if name == "buffers" and infinite_as_sent(value, context.networks.initial_buffers[name]):
                continue
            raise RunFailed(
                f"The model {when} is not finite ({name}), though every upload was: nothing of that round is kept; "
                "lower --lr, or refuse large updates with --max-update-norm."
            )
