"""Forward and backward passes of local training, replayed as CUDA graphs.

The pass of a small network is some hundred kernels.  The host starts them one by one, which takes longer than the GPU
computes.  A CUDA graph holds all kernels of a pass, and the host starts the graph in one call.  Kernels and their order
stay those of the eager pass, and so do the bits.

The first batches of a shape run eagerly: they load kernels and make workspaces.  Then one pass is recorded, which runs
nothing, and every later batch of the shape, of this client or another, is copied into its inputs.  Only methods that
say so are recorded (:attr:`fedkern.methods.roles.Objective.replayable`).  A batch is made, and the optimiser steps,
outside.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from fedkern.methods.protocol import Batch, Received
from fedkern.methods.roles import Objective
from fedkern.models.precision import lower

EAGER = 2
"""Batches of a shape that run eagerly before a pass is recorded."""
LEAST = 5
"""Fewest batches of a shape, still to come in the exchange, for which a pass is recorded."""
MOST = 16
"""Recordings that are kept from one exchange to the next: each holds a batch and what a pass computes of it."""

T = TypeVar("T")


class Outcome(NamedTuple):
    """A batch's loss (0-d), the figures that the method observed (one vector, or none) and the names of the figures."""

    loss: Tensor
    figures: tuple[Tensor, ...]
    names: tuple[str, ...]


Pass = Callable[[Batch, Received], Outcome]
"""Forward and backward pass of a batch, which adds to the gradients."""


def replayable(kind: type[Objective], network: nn.Module | None = None) -> bool:
    """Whether the class says so that has the ``loss``, or a class of fedkern's derived from it.

    A class or a ``network`` of somebody's own may compute on the host, in what it overrides: the class has to say so
    itself, and no module may be another's than torch's and fedkern's.
    """
    if "replayable" not in vars(kind) and not _known(kind):
        return False
    if network is not None and not all(_known(type(module)) for module in network.modules()):
        return False
    for each in kind.__mro__:
        if "replayable" in vars(each):
            return bool(vars(each)["replayable"])
        if "loss" in vars(each):
            return False
    return False


def _known(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("fedkern", "torch")


class Recorded(NamedTuple):
    """A recorded pass.

    Attributes:
        inputs: the tensors that the pass reads a batch from.
        replay: runs the pass.
        outcome: where every replay writes to.
        lasting: whether the pass does not depend on what the client received.
    """

    inputs: list[Tensor]
    replay: Callable[[], None]
    outcome: Outcome
    lasting: bool

    def __call__(self, batch: Batch) -> Outcome:
        for own, given in zip(self.inputs, _tensors(batch), strict=True):
            own.copy_(given, non_blocking=True)
        self.replay()
        loss, figures, names = self.outcome
        return Outcome(loss.clone(), tuple(figure.clone() for figure in figures), names)


class Graphs:
    """The recorded passes of a process's clients on one GPU.

    All graphs share a pool of memory: they are never replayed side by side, and a graph's outcome is copied before
    another graph runs.

    Attributes:
        off: whether a pass could not be recorded; no other pass is recorded then.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.off = False
        self._of: tuple[Any, ...] = ()
        self._recorded: dict[Hashable, Recorded] = {}
        self._eager = Counter[Hashable]()
        self._fleeting = False  # whether a pass of this network and method depends on what was received
        self._last: Any = None  # torch gives up a pool that no graph uses

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    @cached_property
    def _pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Work on a stream of its own, after all earlier work and before all later work of the current stream.

        The default stream cannot be recorded, and autograd adds up a parameter's gradient on the stream of the
        parameter's first use in a graph that is still alive.  So eager passes run on the stream of the recorded ones.
        """
        outer = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outer.wait_stream(self._stream)

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Records what ``work`` starts on the GPU without running it: a function that runs it, and ``work``'s result.

        Raises:
            RuntimeError: ``work`` did what cannot be recorded, for example read a value of a tensor.
        """
        if self._last is None:
            torch.cuda.empty_cache()  # memory that eager passes have freed cannot serve recorded ones
        graph, pool = torch.cuda.CUDAGraph(), self._pool
        collects, syncs = gc.isenabled(), torch.cuda.get_sync_debug_mode()
        try:
            gc.disable()  # a finaliser may call the driver, which ends the recording
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            _set_sync_debug_mode(2)  # an error instead of waiting, which would break the recording and torch's state
            result = work()
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        finally:
            _set_sync_debug_mode(syncs)
            if collects:
                gc.enable()
        graph.capture_end()
        self._last = graph
        return graph.replay, result

    @contextmanager
    def replaying(
        self,
        network: Any,
        method: Objective,
        received: Received,
        run: Pass,
        sizes: Mapping[int, int],
        failed: Callable[[Exception], None],
    ) -> Iterator[Callable[[Batch], Outcome]]:
        """Context of an exchange's training: runs ``run`` on a batch, as a recorded pass where that is worth it.

        Args:
            network: what is trained, in the mode it is trained in.
            sizes: number of batches of the exchange, by size.
            failed: called with the reason where a pass cannot be recorded.
        """
        of = (network, method, *_state(network))
        if of != self._of:
            self._of, self._fleeting = of, False
            self._recorded.clear()
            self._eager.clear()
        left = dict(sizes)

        def step(batch: Batch) -> Outcome:
            size, key = len(batch.indices), _signature(batch, self.device)
            left[size] = left.get(size, 0) - 1
            recorded = self._recorded.pop(key, None)
            if recorded is not None:
                self._recorded[key] = recorded  # the one that was used last is the last
                return recorded(batch)
            self._eager[key] += 1
            # Clients of few batches share a recording that lasts; whether one does is known once it is made.
            worth = left[size] + 1 >= LEAST or (self._eager[key] > EAGER + LEAST and not self._fleeting)
            if not self.off and key is not None and self._eager[key] > EAGER and worth and self._room():
                try:
                    self._recorded[key] = self._record(run, batch, received)
                except Exception as error:
                    self.off = True
                    failed(error)
                else:
                    return self._recorded[key](batch)
            return run(batch, received)

        try:
            with self.stream():
                yield step
        finally:
            lasting = {key: made for key, made in self._recorded.items() if made.lasting}
            if len(lasting) < len(self._recorded):
                self._fleeting = True
            if self._fleeting:  # the next recording may need what only an eager pass makes of the next message
                self._eager.clear()
            self._recorded = dict(list(lasting.items())[-MOST:])

    def _room(self) -> bool:
        """Whether a second pass as large as the largest eager one fits: its memory is kept apart."""
        if self.device.type != "cuda":
            return True
        return 2 * torch.cuda.memory_reserved(self.device) < torch.cuda.get_device_properties(self.device).total_memory

    def _record(self, run: Pass, batch: Batch, received: Received) -> Recorded:
        given, targets, *others = inputs = [tensor.clone() for tensor in _tensors(batch)]
        # A loss that reads these fails, instead of being replayed with one batch's values.
        unread: Any = {name: _Unread(f"batch.{name}") for name in ("indices", "phase", "epoch")}
        drawn: dict[str, Any] = {name: _Unread(f'batch.drawn["{name}"]') for name in batch.drawn}
        drawn |= {**_constants(batch), **dict(zip(_drawn(batch), others, strict=True))}
        static = replace(batch, inputs=given, targets=targets, drawn=drawn, **unread)
        watched = _Watched(received)
        replay, outcome = self.record(lambda: run(static, cast(Received, watched)))
        return Recorded(inputs, replay, outcome, not watched.read)


class _Unread:
    """Stands for what changes from batch to batch without being a tensor: whoever looks at it is told so."""

    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError(f"a recorded pass cannot read {self.__dict__['_name']}")

    __getattr__ = __getitem__ = __eq__ = __bool__ = __index__ = __len__ = __iter__ = __lt__ = __gt__ = _refuse
    __add__ = __radd__ = __mul__ = __rmul__ = __mod__ = __float__ = __array__ = _refuse
    __hash__ = None  # type: ignore[assignment]


class _Watched:
    """Stands for what a client received and notes whether anything of it is read."""

    def __init__(self, received: Received) -> None:
        self._received, self.read = received, False

    def __getattr__(self, name: str) -> Any:
        self.read = True
        return getattr(self._received, name)


def _drawn(batch: Batch) -> dict[str, Tensor]:
    """The tensors that were drawn for a batch."""
    return {name: value for name, value in batch.drawn.items() if isinstance(value, Tensor)}


def _tensors(batch: Batch) -> list[Tensor]:
    """All tensors of a batch."""
    return [batch.inputs, batch.targets, *_drawn(batch).values()]


def _constants(batch: Batch) -> dict[str, Any]:
    """The numbers and words that were drawn for a batch."""
    return {name: value for name, value in batch.drawn.items() if isinstance(value, bool | int | float | str)}


def _signature(batch: Batch, device: torch.device) -> Hashable:
    """Equal for batches that one recorded pass can serve; None for a batch that none can serve."""
    tensors = _tensors(batch)
    if not all(isinstance(tensor, Tensor) and tensor.device.type == device.type for tensor in tensors):
        return None  # tokens of texts are no tensor: they are as long as the longest text of a batch
    shapes = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
    constants = tuple((name, type(value), repr(value)) for name, value in _constants(batch).items())
    return shapes, tuple(_drawn(batch)), tuple(batch.drawn), constants, batch.fresh


def _state(network: Any) -> tuple[Any, ...]:
    """What a recorded pass has taken over from a network and from the process, beside the values of tensors."""
    held = list(network.module.modules())
    modules = tuple((id(module), module.training, getattr(module, "track_running_stats", None)) for module in held)
    tensors = tuple(
        (id(each), each.data_ptr(), each.requires_grad)
        for module in held
        for each in (*module._parameters.values(), *module._buffers.values())
        if each is not None
    )
    return lower(), network.gradients.data_ptr(), modules, tensors


def _set_sync_debug_mode(mode: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode(mode)
