"""Steps of local training, replayed as CUDA graphs.

A step of a small network is some hundred kernels.  The host starts them one by one, which takes longer than the GPU
computes.  A CUDA graph holds all kernels of a step, and the host starts the graph in one call.  Kernels and their order
stay those of the eager step, and so do the bits.

The first batches of a shape run eagerly: they load kernels and make workspaces.  Then one step is recorded, which runs
nothing, and serves every later batch of the shape, of this client or another.  Batches are made outside and laid into
a table, as many at once as may be made ahead; a recorded step takes the next one out of it, and writes what is told of
it into a table too, so that the host starts graphs one behind the other and looks at nothing between.  Of an optimiser
with numbers that change from step to step (AdamW's) the forward and backward pass alone is recorded.

fedkern's methods and networks say that they can be recorded (:attr:`fedkern.methods.roles.Objective.replayable`).  What
others wrote may toss a coin on the host, or count, and a recording would repeat one toss.  So their eager step is taken
twice, and a recorded one is compared with it bit for bit: on three batches, and on the first of every later exchange.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from fedkern.engine.local.moments import Snapshot, alike, in_memory
from fedkern.engine.local.network import Trained
from fedkern.methods.protocol import Batch, Received
from fedkern.methods.roles import Objective
from fedkern.models.precision import lower
from fedkern.models.users.python_state import attributes, fields
from fedkern.ops._core.layout import dense_stride
from fedkern.ops._core.private_torch import foreach_add_

EAGER = 2
"""Batches of a shape that run eagerly before a step is recorded."""
LEAST = 5
"""Fewest batches of a shape, still to come in the exchange, for which a step is recorded."""
MOST = 16
"""Recordings that are kept from one exchange to the next: each holds batches and what a step computes of one."""
COMPARED = 3
"""Batches on which a recorded step of somebody's own is compared with the step in Python."""
AHEAD, AHEAD_BYTES = 64, 1 << 24
"""Most batches that are laid into a table at once, and most bytes of them."""

T = TypeVar("T")


class Outcome(NamedTuple):
    """What is told of a batch, or of n batches.

    Attributes:
        loss: 0-d, or [n].
        squared_norm: of the gradient, likewise; None before the optimiser's step.
        figures: what the method observed, one vector [f] or rows [n, f], or none.
        names: of the figures.
    """

    loss: Tensor
    squared_norm: Tensor | None
    figures: tuple[Tensor, ...]
    names: tuple[str, ...]

    def parts(self) -> list[Tensor]:
        """Return the tensors."""
        return [part for part in (self.loss, self.squared_norm, *self.figures) if part is not None]


class Pass(Protocol):
    """Forward and backward pass of a batch, which adds to the gradients, and the optimiser's step where it can be."""

    def __call__(self, batch: Batch, received: Received, *, collect: Callable[[], None] | None = None) -> Outcome:
        """``collect`` is called between the two."""


def replayable(kind: type[Objective], network: nn.Module | None = None) -> bool | None:
    """Return whether a recorded step serves other batches.

    None: nobody says so.

    A ``network`` of somebody's own may compute on the host.
    """
    flag: bool | None = getattr(kind, "replayable", False)
    known = network is None or all(_is_own_module(type(module)) for module in network.modules())
    return flag if known or flag is False else None


def _is_own_module(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("fedkern", "torch")


Play = Callable[[Iterable[Batch]], Iterator[Outcome]]
"""Takes batches through their steps, in order; an outcome may be that of several batches."""


class Recorded(NamedTuple):
    """A recorded step.

    Attributes:
        tables: [rows, elements], where a step reads the tensors of a batch from.
        counter: int64 [1], the row that the next replay is for, which it moves by one.
        records: fp64 [rows, values], where it writes what is told of the batch.
        replay: runs the step.
        outcome: an outcome's tensors of one batch, for their shapes, and its names.
        lasting: whether the step does not depend on what the client received.
    """

    tables: list[Tensor]
    counter: Tensor
    records: Tensor
    replay: Callable[[], None]
    outcome: Outcome
    lasting: bool

    @property
    def rows(self) -> int:
        """Most batches at once."""
        return len(self.records)

    def __call__(self, batches: Sequence[Batch]) -> Outcome:
        for table, tensors in zip(self.tables, zip(*map(_tensors, batches), strict=True), strict=True):
            torch.stack([in_memory(tensor) for tensor in tensors], out=table[: len(batches)])
        self.counter.zero_()
        for _ in batches:
            self.replay()
        loss, *columns = self.records[: len(batches)].clone().split([part.numel() for part in self.outcome.parts()], 1)
        squared = None if self.outcome.squared_norm is None else columns.pop(0)[:, 0]
        return self.outcome._replace(loss=loss[:, 0], squared_norm=squared, figures=tuple(columns))


class Graphs:
    """The recorded steps of clients on one GPU, those of a lane.

    All graphs share a pool of memory: they are never replayed side by side, and a graph's outcome is copied before
    another graph runs.

    Attributes:
        off: whether a step could not be recorded; no other step is recorded then.
        held: see :meth:`hold`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.off = False
        self._of: tuple[Any, ...] = ()
        self._recorded: dict[Hashable, Recorded] = {}
        self._eager = Counter[Hashable]()
        self._values: dict[Hashable, int] = {}  # numbers that are told of a batch
        self.held: dict[str, Tensor] = {}
        self._strangers: set[tuple[Any, type]] = set()  # networks and methods whose steps are not recorded
        self._compare: dict[Hashable, int] = {}  # batches on which a stranger's step is still compared
        self._fleeting = False  # whether a step of this network and method depends on what was received
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

    @contextmanager
    def ahead(self) -> Iterator[Callable[[], None]]:
        """Work on the stream of its own, after all earlier work of the current stream, which goes on beside it.

        Yields a function that waits until the work is done.
        """
        done = torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield done.synchronize
            done.record(self._stream)

    def lasting(self) -> bool:
        """Return whether a step has been recorded that serves all clients and rounds."""
        return bool(self._recorded) and not self._fleeting

    def hold(self, name: str, tensor: Tensor) -> Tensor:
        """Return a copy at the address of the last one of that name and size, where a recorded step will find it."""
        buffer = self.held.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            self.held[name] = buffer = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        return buffer.copy_(tensor)

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Record what ``work`` starts on the GPU without running it: a function that runs it, and ``work``'s result.

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
        network: Trained,
        method: Objective,
        received: Received,
        run: Pass,
        sizes: Mapping[int, int],
        failed: Callable[[Exception], None],
        *,
        ahead: bool,
        settings: Hashable,
        strange: bool = False,
    ) -> Iterator[Play]:
        """Context of an exchange's training: a function that takes its batches through ``run``, in order.

        Steps are recorded where that is worth it.

        Args:
            network: what is trained, in the mode it is trained in.
            sizes: number of batches of the exchange, by size.
            failed: called with the reason where a step cannot be recorded.
            ahead: whether a batch may be asked for before ``run`` is done with the one before, and nothing happens
                between two of them.
            settings: what ``run`` has beside tensors.
            strange: whether nobody knows that ``run`` can be recorded.
        """
        addresses = tuple((name, tensor.data_ptr()) for name, tensor in self.held.items())
        of = (network, method, ahead, settings, addresses, *_state(network))
        if of != self._of:
            self._of, self._fleeting = of, False
            self._recorded.clear()
            self._eager.clear()
            self._values.clear()
            self._compare.clear()
        remaining, owner = dict(sizes), (network, type(method))
        self._compare = {key: max(1, count) for key, count in self._compare.items()}

        def find_recording(batch: Batch, key: Hashable) -> Recorded | None:
            size = len(batch.indices)
            remaining[size] = remaining.get(size, 0) - 1
            recording = self._recorded.pop(key, None)
            if recording is not None:
                self._recorded[key] = recording  # the one that was used last is the last
                return recording
            self._eager[key] += 1
            # Clients of few batches share a recording that lasts; whether one does is known once it is made.
            worth = remaining[size] + 1 >= LEAST or (self._eager[key] > EAGER + LEAST and not self._fleeting)
            allowed = not self.off and owner not in self._strangers
            if allowed and key is not None and self._eager[key] > EAGER and worth and self._room():
                try:
                    if strange:
                        self._check_repeats(run, batch, received, network, method)
                        self._compare[key] = COMPARED
                    self._recorded[key] = self._record(run, batch, received, network, self._values[key], ahead)
                except Exception as error:
                    give_up(error)
            return self._recorded.get(key)

        def give_up(error: Exception) -> None:
            self._strangers.add(owner)
            self.off = self.off or not strange
            failed(error)

        def play(batches: Iterable[Batch]) -> Iterator[Outcome]:
            waiting: list[Batch] = []
            step: Any = None
            last: Hashable = None
            for key, batch in ((_signature(batch, self.device), batch) for batch in batches):
                if waiting and key != last:
                    yield step(waiting)
                    waiting = []
                recording, last = find_recording(batch, key), key
                if recording is None:
                    outcome = run(batch, received)
                    self._values[key] = sum(part.numel() for part in outcome.parts())
                    yield outcome
                    continue
                if strange and self._compare[key]:
                    self._compare[key] -= 1
                    outcome, is_same = self._compare_step(recording, run, batch, received, network)
                    yield outcome
                    if not is_same:
                        self._recorded.clear()
                        give_up(RuntimeError("a recorded step gives other numbers than the same step in Python"))
                    continue
                step = recording
                waiting.append(batch)
                if len(waiting) == step.rows:
                    yield step(waiting)
                    waiting = []
            if waiting:
                yield step(waiting)

        try:
            with self.stream():
                yield play
        finally:
            lasting = {key: recording for key, recording in self._recorded.items() if recording.lasting}
            if len(lasting) < len(self._recorded):
                self._fleeting = True
            if self._fleeting:  # the next recording may need what only an eager pass makes of the next message
                self._eager.clear()
            self._recorded = dict(list(lasting.items())[-MOST:])

    def _check_repeats(self, run: Pass, batch: Batch, received: Received, network: Trained, method: Objective) -> None:
        """Take a step twice, and back.

        Raises:
            RuntimeError: it gives other numbers, draws on the host or changes what the network or the method holds.
        """
        before = Snapshot(self._list_written(network), self.device)
        fields_before = {**attributes(network.module), **fields(method)}
        objects = [(thing, dict(vars(thing))) for thing in (*network.module.modules(), method)]
        try:
            outcome = run(batch, received)
            if moved := before.moved_generator():
                raise RuntimeError(f"it draws from the generator of {moved} on the host")
            fields_now = {**attributes(network.module), **fields(method)}
            if changed := [name for name, value in fields_now.items() if fields_before.get(name) != value]:
                raise RuntimeError(f"it changes {', '.join(changed)}")
            after = Snapshot(self._list_written(network), self.device)
            before.restore()
            if not (_same(outcome, run(batch, received)) and after.holds()):
                raise RuntimeError("it does not repeat its own bits")
        finally:
            before.restore()
            for thing, values in objects:
                vars(thing).clear()
                vars(thing).update(values)

    def _compare_step(
        self, step: Recorded, run: Pass, batch: Batch, received: Received, network: Trained
    ) -> tuple[Outcome, bool]:
        """Take a step in Python and recorded: the first's outcome and state, and whether the other's are the same."""
        before = Snapshot(self._list_written(network), self.device)
        outcome = run(batch, received)
        after = Snapshot(self._list_written(network), self.device)
        before.restore()
        is_same = _same(outcome, step([batch])) and after.holds()
        if not is_same:
            after.restore()
        return outcome, is_same

    def _list_written(self, network: Trained) -> list[Tensor]:
        """Return what a step writes to."""
        module = network.module
        return [*module.parameters(), *module.buffers(), *network.gradient_vectors, *self.held.values()]

    def _room(self) -> bool:
        """Return whether a second pass as large as the largest eager one fits: its memory is kept apart."""
        if self.device.type != "cuda":
            return True
        return 2 * torch.cuda.memory_reserved(self.device) < torch.cuda.get_device_properties(self.device).total_memory

    def _record(
        self, run: Pass, batch: Batch, received: Received, network: Trained, values: int, ahead: bool
    ) -> Recorded:
        tensors = [in_memory(tensor) for tensor in _tensors(batch)]
        bytes_each = sum(tensor.nbytes for tensor in tensors)
        rows = max(1, min(AHEAD, AHEAD_BYTES // max(1, bytes_each))) if ahead else 1
        tables = [tensor.new_zeros(rows, len(tensor)) for tensor in tensors]
        counter = torch.zeros(1, dtype=torch.int64, device=self.device)
        marks = torch.arange(rows, device=self.device)[:, None]
        records = torch.zeros(rows, values, dtype=torch.float64, device=self.device)
        # A loss that reads these fails, instead of being replayed with one batch's values.
        unread: Any = {name: _Unread(f"batch.{name}") for name in ("indices", "phase", "epoch", "masks")}
        unread |= {} if batch.raw is None else {"raw": _Unread("batch.data")}
        drawn: dict[str, Any] = {name: _Unread(f'batch.drawn["{name}"]') for name in batch.drawn}
        drawn |= _constants(batch)
        watched = _Watched(received)

        def work() -> Outcome:
            inputs, targets, *drawn_tensors = (
                table.index_select(0, counter).as_strided(like.shape, dense_stride(like))
                for table, like in zip(tables, _tensors(batch), strict=True)
            )
            draws = {**drawn, **dict(zip(_drawn_tensors(batch), drawn_tensors, strict=True))}
            static = replace(batch, inputs=inputs, targets=targets, drawn=draws, **unread)
            with _gradients_apart(network.trained_parameters) as collect:
                outcome = run(static, cast(Received, watched), collect=collect)
            row = torch.cat([part.reshape(-1).double() for part in outcome.parts()])
            torch.where(marks == counter, row, records, out=records)
            counter.add_(1)
            return outcome

        replay, outcome = self.record(work)
        return Recorded(tables, counter, records, replay, outcome, not watched.read)


def _same(left: Outcome, right: Outcome) -> bool:
    pairs = zip(left.parts(), right.parts(), strict=True)
    return left.names == right.names and all(alike(a.double().reshape(-1), b.double().reshape(-1)) for a, b in pairs)


class _Unread:
    """Stands for what changes from batch to batch without being a tensor: whoever looks at it is told so."""

    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    def _refuse(self, *_: object) -> NoReturn:
        raise RuntimeError(f"a recorded step cannot read {self.__dict__['_name']}")

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


def _drawn_tensors(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors that were drawn for a batch."""
    return {name: value for name, value in batch.drawn.items() if isinstance(value, Tensor)}


def _tensors(batch: Batch) -> list[Tensor]:
    """All tensors of a batch."""
    return [batch.inputs, batch.targets, *_drawn_tensors(batch).values()]


def _constants(batch: Batch) -> dict[str, bool | int | float | str]:
    """Return the numbers and words that were drawn for a batch."""
    return {name: value for name, value in batch.drawn.items() if isinstance(value, bool | int | float | str)}


def _signature(batch: Batch, device: torch.device) -> Hashable:
    """Equal for batches that one recorded step can serve.

    None for a batch that none can serve.
    """
    tensors = _tensors(batch)
    if not all(isinstance(tensor, Tensor) and tensor.device.type == device.type for tensor in tensors):
        return None  # tokens of texts are no tensor: they are as long as the longest text of a batch
    shapes = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
    constants = tuple((name, type(value), repr(value)) for name, value in _constants(batch).items())
    return shapes, tuple(_drawn_tensors(batch)), tuple(batch.drawn), constants, batch.fresh


@contextmanager
def _gradients_apart(parameters: Sequence[nn.Parameter]) -> Iterator[Callable[[], None]]:
    """Inside, a backward pass leaves gradients of their own.

    The function adds all of them to the old ones at once.

    Else each is added by a kernel of its own.
    """
    flat = [parameter.grad for parameter in parameters]

    def put_back() -> None:
        for parameter, gradient in zip(parameters, flat, strict=True):
            parameter.grad = gradient

    def collect() -> None:
        pairs = [(old, own.grad) for old, own in zip(flat, parameters, strict=True) if own.grad is not None]
        put_back()
        if pairs:
            foreach_add_([old for old, _ in pairs], [new for _, new in pairs])

    for parameter in parameters:
        parameter.grad = None
    try:
        yield collect
    finally:
        put_back()


def _state(network: Trained) -> tuple[object, ...]:
    """Return what a recorded step has taken over from a network and from the process, beside the values of tensors."""
    layers = list(network.module.modules())
    modules = tuple((id(module), module.training, getattr(module, "track_running_stats", None)) for module in layers)
    tensors = tuple(
        (id(tensor), tensor.data_ptr(), tensor.requires_grad)
        for module in layers
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )
    return lower(), network.gradients.data_ptr(), modules, tensors


def _set_sync_debug_mode(mode: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode(mode)
