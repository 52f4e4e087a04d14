"""User-defined data sets: a function's options and result."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch

from fedkern.data.data_option import COMMON_OPTIONS, READING
from fedkern.data.forms import ImageForm
from fedkern.data.images.image_files import ImageReader
from fedkern.data.sharing.partition import PartitionSpec, parse_partition
from fedkern.data.sources.items import Items
from fedkern.data.sources.listing import Reading
from fedkern.data.split import Split
from fedkern.data.types import DataRequest, FederatedData, Pool, Source
from fedkern.errors import UserError
from fedkern.tasks import Task, task_of
from fedkern.typed_option import Option
from fedkern.usercode.code_identity import digest, identity_table
from fedkern.usercode.named_code import explain_errors, host_code
from fedkern.usercode.registry import keyword_options

PARAMETERS = ("root", "clients", "partition", "seed", "reading")
"""Parameters of a registered function that are no options."""


class DataFunction:
    """Registered function that replaces a built-in reader.

    ``takes`` names its `PARAMETERS`, and ``options`` the other parameters, with `READING` if it takes ``reading``.
    """

    def __init__(self, name: str, function: Callable[..., object], task: Task, clients: int, partition: str) -> None:
        self.name, self.function, self.task, self._clients, self._partition = name, function, task, clients, partition
        self.takes = frozenset(PARAMETERS) & frozenset(inspect.signature(function).parameters)
        self._own = {key: _option(name, key, default) for key, default in keyword_options(function, PARAMETERS).items()}
        self.options = {**READING, **self._own} if "reading" in self.takes else self._own

    def identity(self) -> dict[str, str]:
        """Return the code's identity, which stands for data drawn from the seed."""
        return {"function": digest(identity_table({"function": self.function}))}

    def make(self, request: DataRequest) -> Source | FederatedData:
        """Call the function and return its Source or FederatedData, under the data set's name."""
        spec = parse_partition(self._partition if request.partition is None else request.partition)
        clients, seed = self._clients if request.clients is None else request.clients, request.seed
        settings: dict[str, Any] = {"root": request.root, "clients": clients, "partition": spec.text, "seed": seed}
        if "reading" in self.takes:
            settings["reading"] = Reading.of(request)
        settings = {name: settings[name] for name in self.takes}
        with explain_errors(self._who, self.function), host_code():
            data = self.function(**settings, **{key: request.options[key] for key in self._own})
        if isinstance(data, Source):
            data = data.with_pools(self._with_task)
            self._check_source(data)
            return data
        if isinstance(data, tuple) and len(data) == 2:
            data = FederatedData.from_datasets(*data, partition=spec.text, count=clients, seed=seed)
        if not isinstance(data, FederatedData):
            raise self._wrong(
                f"returns {type(data).__name__}, expected fedkern.data.Source, FederatedData, or a pair of PyTorch "
                "data sets, the clients' and the test set"
            )
        if not isinstance(data.validation, Items):
            self._check_federated(data)
        self._check_given(data, clients, spec)
        for flag, value in (("train", request.train_samples), ("public", request.public_samples)):
            if value:
                raise UserError(f'data set "{self.name}" shares its samples out by itself: leave --{flag}-samples out')
        return dataclasses.replace(data, name=self.name)

    def _check_given(self, data: FederatedData, clients: int, spec: PartitionSpec) -> None:
        if clients not in (len(data.clients), self._clients) or (
            "clients" in self.takes and clients != len(data.clients)
        ):
            raise UserError(
                f'data set "{self.name}" has {len(data.clients)} clients, not {clients}: leave --clients out'
                + ", or have its function give a single data set" * (clients == 1)
            )
        # A resumed run repeats the data's own partition text.
        shares = (parse_partition(self._partition).text, data.statistics.partition)
        if "partition" not in self.takes and len(data.clients) > 1 and spec.text not in shares:
            raise UserError(f'data set "{self.name}" shares its samples out by itself: leave --partition out')

    def _check_source(self, source: Source) -> None:
        pool = source.train
        if not len(pool):
            raise self._wrong("returns no training sample")
        for where, pool_of_set in {"train": pool, "validation": source.validation, **source.tests}.items():
            self._check_labels(pool_of_set, where, len(source.classes))
        if isinstance(pool.read, ImageReader):  # files are decoded when a split needs them
            channels = pool.read.files.shape[2]
        else:
            try:
                channels = pool.take(torch.zeros(1, dtype=torch.int64)).images.shape[1]
            except (ValueError, TypeError) as error:  # Split names what is wrong
                raise self._wrong(f"returns a pool that cannot be read ({error})") from None
        self._check_channels(channels, source)
        if not source.tests:
            raise self._wrong("returns no test set")

    def _check_federated(self, data: FederatedData) -> None:
        if data.task != self.task:
            raise self._other(data.task)
        if not data.clients or not data.tests:
            raise self._wrong(f"returns no {'test set' if data.clients else 'client'}")
        splits = {f"client {k}": split for k, split in enumerate(data.clients)}
        for where, part in {**splits, "validation": data.validation, **data.tests}.items():
            self._check_labels(part, where, len(data.classes))
            self._check_channels(part.images.shape[1], data.form)

    def _check_channels(self, channels: int, data: Source | ImageForm) -> None:
        if not channels == len(data.mean) == len(data.std):
            raise self._wrong(
                f"returns images of {channels} channels with {len(data.mean)} means and {len(data.std)} standard "
                "deviations"
            )

    def _with_task(self, pool: Pool) -> Pool:
        try:
            return dataclasses.replace(pool, task=task_of(pool.labels, pool.texts, pool.targets, self.task.name))
        except ValueError:
            raise self._other(pool.task) from None

    def _other(self, task: Task) -> UserError:
        return self._wrong(f"returns data for {task.name}, but is registered for {self.task.name}")

    def _check_labels(self, part: Pool | Split, where: str, classes: int) -> None:
        try:
            self.task.check_range(part.labels, classes, where or "the test set")
        except ValueError as error:
            raise self._wrong(f"returns {error}") from None

    @property
    def _who(self) -> str:
        return f'data set "{self.name}": {self.function.__qualname__} of {self.function.__module__}'

    def _wrong(self, problem: str) -> UserError:
        return UserError(f"{self._who} {problem}")


def _option(name: str, key: str, default: object) -> Option:
    if key in COMMON_OPTIONS:
        raise TypeError(f'data set "{name}": {key} is an option of every data set, and cannot be a parameter')
    if isinstance(default, Option):
        return default
    if isinstance(default, bool) or not isinstance(default, (str, int, float)):
        raise TypeError(
            f'data set "{name}": expected a text, a number or an Option as the default of {key}, given {default!r}'
        )
    return Option(default, f"option of {name}")
