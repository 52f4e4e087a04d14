"""The Python interface: :func:`simulate` runs a method, :func:`load` opens the folder of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.data import FederatedData
from fedkern.data.dataset_registry import open_code
from fedkern.data.identity import data_fingerprint
from fedkern.data.sources.dataset_images import read_images
from fedkern.data.sources.datasets import PAIRS, is_dataset, items_like
from fedkern.data.sources.items import Items
from fedkern.downstream.prediction import outputs
from fedkern.downstream.saved_network import read_model
from fedkern.engine.local.script_objects import ScriptObjects
from fedkern.engine.run import run
from fedkern.engine.store import initial_weights
from fedkern.engine.store.checkpoints import read_newest
from fedkern.engine.store.record_files import DataFacts, read_metrics, read_summary
from fedkern.engine.store.run_folder import RUNS, check_free, check_vacant, reserve, run_name
from fedkern.errors import ADVICE, UserError, format_value, hint_owners, suggest_name
from fedkern.files.filesystem import check_new, check_text, expand
from fedkern.listeners.events import Listener, Listeners, Record, Summary
from fedkern.methods import Method, method_registry, script_methods
from fedkern.process.extras import import_extra
from fedkern.process.torch_modes import reproducible
from fedkern.settings.config import RunConfig, load_settings
from fedkern.settings.defaults import NETWORKS
from fedkern.settings.error_wording import is_data_option, python_words
from fedkern.settings.in_memory import check_in_memory
from fedkern.settings.run_data import kept_data
from fedkern.tasks import Task
from fedkern.tasks.user_tasks import user_module
from fedkern.typed_option import Value
from fedkern.usercode import named_code, plugins
from fedkern.usercode.registry import check_hooks


class History:
    """The records of a run's rounds, in order.

    A figure by name, ``history["accuracy"]``, is a list with a value for every round. A loop gives the rounds' records,
    which are dicts. A notebook shows the history as a table.
    """

    def __init__(self, records: Sequence[Record], main: str, tests: Collection[str] = ()) -> None:
        self.records = [dict(record) for record in records]
        self._main, self._tests = main, tests  # the main figure, and names of the test sets

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __repr__(self) -> str:
        return f"<fedkern.History, rounds: {len(self)}>"

    def _repr_html_(self) -> str:
        from fedkern.report.live.notebook import rounds_table

        return rounds_table(self.records, f"rounds: {len(self)}", self._main, tests=self._tests)

    def __getitem__(self, name: str) -> list[Any]:
        """Return a figure of every round, None where the round has none: ``history["accuracy"]``.

        Raises:
            KeyError: no round has the figure.
        """
        if not any(name in record for record in self.records):
            raise KeyError(f"no round has {name!r}; there are {', '.join(self.names)}")
        return [record.get(name) for record in self.records]

    @property
    def names(self) -> list[str]:
        """Names of the figures that at least one round has."""
        return list(dict.fromkeys(name for record in self.records for name in record))

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with a row for every round.

        Nested figures become ``clients.0.loss`` and so on.

        Raises:
            UserError: pandas is not installed.
        """
        return import_extra("to_pandas needs pandas", "pandas", "pandas").json_normalize(self.records)


class Run:
    """The folder of a run, from :func:`simulate` or :func:`load`.

    Attributes:
        out: the folder.
        config: the run's settings.
    """

    @python_words()
    def __init__(
        self,
        out: Path | str,
        *,
        data: FederatedData | None = None,
        script: ScriptObjects = ScriptObjects(),
        trusted: Collection[str] = (),
        method: Method | type[Method] | None = None,
    ) -> None:
        self.out = out = folder_of(out)
        self._kind: type[Method] | None = None
        options: dict[str, Value] = {}
        if method is not None:
            self._kind, options = _class_of(method)
        self.config = load_settings(out, trusted=trusted, given=self._kind, device="cpu")
        for name, value in method_registry.given_options(self.config.method, options).items():
            if self.config.options.get(name) != value:
                raise UserError(
                    f"The run in {out} has {name}={self.config.options.get(name)}, not {name}={value}: give "
                    f"method={method_registry.short_name(self.config.method)} without options, or start a new run."
                )
        self._data, self._script, self._trusted = data, script, tuple(trusted)
        for name in self._trusted:
            if named_code.absolute(name) == self.config.data:
                open_code(name)

    def _kept_data(self) -> FederatedData | None:
        """Return the run's in-memory data without its holdout, None if a data set's name locates the data."""
        return None if self._data is None else kept_data(self.config, self._data)

    def _give_method(self) -> None:
        """Register the run's own class again, in case a notebook has since defined another one of its name."""
        if self._kind is not None:
            script_methods.give_class_again(self._kind, self.config.method, self.out)

    def __repr__(self) -> str:
        return f"<fedkern.Run {self.config.method} on {self.config.data} in {str(self.out)!r}>"

    def _repr_html_(self) -> str:
        from fedkern.report.live.notebook import run_table

        summary = read_summary(self.out)
        return self.history._repr_html_() if summary is None else run_table(summary, self.out, self.config.main)

    @property
    def summary(self) -> Summary:
        """Contents of ``summary.json``.

        Raises:
            UserError: the run is not finished.
        """
        if (contents := read_summary(self.out)) is None:
            raise UserError(f"The run in {self.out} is not finished: continue it with resume().")
        return contents

    @property
    def metrics(self) -> dict[str, float]:
        """The final figures by name, as in ``summary.json``."""
        return dict(self.summary["metrics"])

    @property
    def history(self) -> History:
        """The records of the rounds so far."""
        return History(read_metrics(self.out), self.config.main, () if self._data is None else self._data.tests)

    @python_words()
    def model(self, *, best: bool = False, client: int | None = None) -> nn.Module:
        """Return the network of the finished run, in eval mode on the CPU. Images must be normalised.

        A user-defined network is a module of its own class, with the names and frozen parameters of its state dict.
        Methods without a global network, such as ``local``, return the ensemble of their clients' networks, which are
        its ``members``.

        Args:
            best: return the network of the round with the best validation figure, which a run with ``patience`` keeps,
                instead of the last round's.
            client: return the network of this client, by number, if clients keep parts of the network (``personal``) or
                whole networks to themselves.

        Raises:
            UserError: the run is not finished, has kept no such network, or a file is damaged. Or clients keep parts to
                themselves, and no ``client`` is named.
        """
        self._give_method()
        return user_module(self._network(best=best, client=client))

    def _network(self, *, best: bool = False, client: int | None = None) -> nn.Module:
        return read_model(self.out, self._trusted, self._script.network, best=best, client=client)[0]

    @property
    def _sees_images(self) -> bool:
        return "items" not in DataFacts.read(self.out).form

    @property
    def predicts(self) -> str:
        """``"probabilities"`` or ``"outputs"``: what :meth:`predict` returns."""
        data = self._data
        return "outputs" if data and "classes" not in data.offers and not self._sees_images else "probabilities"

    @python_words()
    def predict(self, images: Any) -> Any:
        """Return probabilities of the classes, or the network's outputs if a user-defined loss has no classes.

        :attr:`predicts` says which of the two.

        Args:
            images: uint8 ``[n, C, H, W]``, a tensor or an array, of the run's image size. Or an image file or a
                sequence of files, which are read and resized as in the run's training. If the run is of PyTorch data
                sets: such a data set, or a network's inputs, tensors or arrays ``[n, ...]``: one, a tuple or a dict by
                argument.

        Returns:
            fp32 ``[n, classes]``, for segmentation ``[n, classes, H, W]``. In multi-label tasks, every label has its
                own probability. Outputs have the form that the network gives them.

        Raises:
            UserError: the run is not finished or is for image-text pairs, images have another shape or dtype, or a file
                cannot be read.
        """
        from fedkern.downstream.prediction import Predictor

        self._give_method()
        if self._data is not None and not self._sees_images:
            return outputs(self._network(), self._data, images, self.config.batch_size)
        predictor = Predictor.open(self.out, self._trusted, self._script.network)
        if is_dataset(images):
            return predictor.probabilities(read_images(predictor.task, images))
        if isinstance(images, np.ndarray):
            try:
                images = torch.from_numpy(np.ascontiguousarray(images))
            except TypeError:
                raise UserError(f"images must be uint8, but are {images.dtype}.") from None
        if isinstance(images, Tensor):
            return predictor.probabilities(images)
        files = [images] if isinstance(images, (str, Path)) else images
        must = "images must be a tensor, an array, or image files"
        return predictor.probabilities_of([*map(Path, _paths(files, must))])

    @python_words()
    def export(self, out: str | Path, format: str | None = None, *, best: bool = False) -> list[Path]:
        """Write the network for other programs, and a JSON file that describes it, and return both paths.

        Files of ``torch.export`` and ONNX take images in [0, 1] and return logits. For samples that are no images they
        hold the user's module unchanged. Texts, waves and other inputs take any length that the network takes. The JSON
        file has the classes, the image size and the inputs, such as ``int64 [B, L]``, where a number is the only
        length, and ``grey_bits`` if image files have more than 8 bits. The file is read again before it takes its name,
        an ONNX file with onnxruntime if that is installed.

        Args:
            out: the file, which must not exist.
            format: ``"torch-export"``, ``"onnx"`` or ``"state-dict"``. None: by the suffix ``.pt2``, ``.onnx``, ``.pt``
                or ``.pth``.
            best: see :meth:`model`.

        Raises:
            UserError: the suffix contradicts the format or names none, a package for the format is missing, the network
                cannot be written in it or read again, or the file exists or cannot be written. No file is left then.
        """
        from fedkern.downstream.model_export import export, exportable, find_format

        self._give_method()
        kind = find_format(format, out)
        check_new(Path(out), "export")
        return export(exportable(self.out, self._trusted, self._script.network, best=best), Path(out), kind)

    @python_words()
    @reproducible()
    def evaluate(
        self,
        data: Any = None,
        *,
        data_root: str | Path | None = None,
        data_options: Mapping[str, object] | None = None,
        cache: str | Path | None = None,
    ) -> dict[str, float]:
        """Return the network's figures on the run's test sets, or on those of other ``data``.

        Args:
            data: name of another data set, or federated data in memory, with the run's classes or some of them. For a
                run on PyTorch data sets, another one. None: the run's own. Only the test sets and the validation set
                are read.
            data_root: folder of the data's files, for the run's own data the current one.
            data_options: options of the other data set.
            cache: folder of decoded images. None: for the run's own data the folder that the run used, if it still
                exists.

        Returns:
            The figures by test set, as in ``summary.json``: ``accuracy``, ``id_auroc``, ``validation_loss`` ...

        Raises:
            UserError: the run is not finished, the data have other classes, another image size or another task, or a
                cache is given for data in memory.
        """
        from fedkern.downstream.run_evaluation import evaluate_run

        self._give_method()
        source = self._kept_data() if data is None else data
        if self._data is not None and isinstance(self._data.validation, Items) and is_dataset(data):
            source = replace(self._data, tests={"": items_like(self._data.clients[0], data, "data")}, client_tests=())
        return evaluate_run(
            self.out, data=source, data_root=None if data_root is None else str(data_root), cache=cache,
            data_options=table_of(data_options, "data_options"), trusted=self._trusted, model=self._script.network,
        )[0]  # fmt: skip

    @python_words()
    def resume(
        self,
        *,
        progress: bool = True,
        listener: Listener | Sequence[Listener] | None = None,
        pictures: bool = True,
        workers: str | int = "auto",
        cache: str | Path | None = None,
    ) -> Run:
        """Continue an interrupted run, and return the run. A finished run does not change.

        Display, listeners, pictures, workers and the cache of decoded images are those of :func:`simulate`.

        Raises:
            UserError: the run's code, data or files have changed, or ``cache`` or ``workers`` is wrong.
        """
        return self._go_on({"workers": workers, "cache": cache}, progress, listener, pictures)

    @python_words()
    def extend(
        self,
        rounds: int,
        *,
        progress: bool = True,
        listener: Listener | Sequence[Listener] | None = None,
        pictures: bool = True,
        workers: str | int = "auto",
        cache: str | Path | None = None,
    ) -> Run:
        """Give the run, finished or not, more rounds: ``rounds`` communication rounds in all. Returns the run.

        If the method has no schedule over all rounds, the network is then, bit for bit, that of a run that had this
        number of rounds from the start. Files of the former network, such as the pictures, are moved to a folder
        ``round-NNNN`` of the run folder. Other arguments are those of :meth:`resume`.

        Raises:
            UserError: the run has no checkpoint, or already has as many rounds. Or its method plans its own rounds,
                depends on their number, or promises differential privacy for them.
        """
        try:
            return self._go_on({"workers": workers, "cache": cache, "rounds": rounds}, progress, listener, pictures)
        finally:
            self.config = load_settings(self.out, trusted=self._trusted, given=self._kind, device="cpu")

    def _go_on(
        self, new: Mapping[str, object], progress: bool, listener: Listener | Sequence[Listener] | None, pictures: bool
    ) -> Run:
        self._give_method()
        changes = RunConfig.read(new)
        rounds = changes.pop("rounds", None)
        config = load_settings(self.out, trusted=self._trusted, **changes)
        _play(
            config, self.out, self._data, self._script, progress, listener, pictures, resume=True,
            trusted=self._trusted, rounds=rounds,
        )  # fmt: skip
        return self

    def _network_for_pictures(self) -> nn.Module | None:
        """Return the network for pictures, if it was a script's module that clients share as a whole."""
        return None if self._script.network is None or self.config.keeps_parts else self._network()

    @python_words()
    @reproducible()
    def plot(self) -> list[Path]:
        """Draw the run's pictures into its folder, over older ones.

        Returns:
            Their paths, in a list that a notebook displays as pictures.
        """
        from fedkern.report.figures.pictures import write_pictures
        from fedkern.report.live.notebook import Pictures

        self._give_method()
        data, model, root = self._kept_data(), self._network_for_pictures(), self.config.data_root
        return Pictures(write_pictures(self.out, data=data, model=model, data_root=root, trusted=self._trusted))

    @python_words()
    @reproducible()
    def report(self) -> Path:
        """Write ``report.html``, one file of the run to read in a browser, over an older one, and return its path.

        Raises:
            UserError: a file of the run is damaged, or the folder cannot be written.
        """
        from fedkern.report.pages.run_page import write_report

        self._give_method()
        network = None if read_summary(self.out) is None else self._network_for_pictures()
        return write_report(self.out, data=self._kept_data(), model=network, trusted=self._trusted)


@python_words()
def simulate(
    method: str | Method | type[Method],
    *,
    data: object = None,
    test: object = None,
    validation: object = None,
    public: object = None,
    model: str | nn.Module | Callable[..., nn.Module] | None = None,
    train: Callable[..., None] | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    batch_loss: Callable[..., Tensor] | None = None,
    metrics: Mapping[str, object] | None = None,
    collate_fn: Callable[..., object] | None = None,
    main: str | None = None,
    better: Literal["max", "min"] | None = None,
    task: Task | None = None,
    classes: Sequence[str] | int | None = None,
    normalize: tuple[object, object] | None = None,
    groups: str | Callable[[int], object] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    listener: Listener | Sequence[Listener] | None = None,
    pictures: bool = True,
    **settings: Any,
) -> Run:
    """Run a federated method in this process and its workers, and return the finished run.

    Settings, names and defaults are those of the command line::

        run = fedkern.simulate("fedgid", data="digits", rounds=5, clients=4, alpha=0.5, out="runs/x")
        run.metrics["accuracy"]

    Args:
        method: name of the method, or a class derived from :class:`fedkern.methods.Method`, or an object of one, whose
            options are those it was made with. A class needs no registered name.
        data: name of a data set, federated data in memory, or map-style PyTorch data sets: a dict by client's name, a
            list with one for each client, or a single one, which ``partition`` divides among ``clients``.
        test, validation, public, loss_fn, batch_loss, metrics, collate_fn: for PyTorch data sets, see
            :meth:`fedkern.FederatedData.from_datasets`.
        main, better, task, classes, normalize, groups: for PyTorch data sets too.
        model: name of a network, its code (``FILE.py:NAME``), a module, which is copied with its weights as the initial
            ones, or a class or function that makes a module, whose weights then follow from the seed.
        train: ``train(model, client)`` in place of the local training of FedAvg's family: an ordinary loop over
            ``client.batches()``, after which the model's parameters are the upload (docs/training.md).
        out: the run folder, by default ``runs/<method>-<data>-<time>``.
        progress: whether to show the run's progress on standard error.
        listener: a listener or a list of listeners, which also get the run's events (docs/listeners.md).
        pictures: whether to draw the pictures into the run folder at the end. A picture that fails is a warning.
        **settings: settings of the run (``fedkern METHOD --help``), options of the method, ``data_options`` and
            ``options`` as dicts, and ``plugins``, a list of files and modules. Paths may be texts or ``Path``.
            ``optimizer`` may be a factory, ``lambda parameters: torch.optim.AdamW(parameters)``, and ``init`` a module.
            A name that both the run and the method have means the run's.

    Returns:
        The finished :class:`Run`.

    Raises:
        UserError: a mistake in the arguments, such as an unknown name or a value out of range.
    """
    from fedkern.report.figures.pictures import PICTURE_LIST, PICTURES

    where = None if out is None else folder_of(out)
    about = {
        "test": test, "validation": validation, "public": public, "loss_fn": loss_fn,
        "batch_loss": batch_loss, "metrics": metrics, "collate_fn": collate_fn, "main": main, "better": better,
        "task": task, "classes": classes, "normalize": normalize, "groups": groups,
    }  # fmt: skip
    check_in_memory(data, model, settings)
    data = federate(data, about, {**settings, "model": model})
    script = ScriptObjects.of(model, train, settings)
    start = settings.pop("init") if isinstance(settings.get("init"), nn.Module) else None
    config, memory = read_request(method, data, model, settings)
    names = {name for name, value in settings.items() if value is not None}
    config = config.for_user(names if start is None else names - {"init_partial"})
    if pictures and where is not None:
        check_vacant(where)
        check_free(where, (*PICTURES.values(), PICTURE_LIST))
    folder = reserve(RUNS, run_name(config), "name a run folder with out=") if where is None else where
    if start is not None:
        config = config.replace(init=initial_weights.of_module(start, folder))
    try:
        _play(config, folder, memory, script, progress, listener, pictures, resume=False)
    finally:
        if where is None and not any(folder.iterdir()):
            folder.rmdir()
    kind = None if isinstance(method, str) else type(method) if isinstance(method, Method) else method
    return Run(folder, data=memory, script=script, trusted=[config.model, config.data, *config.plugins], method=kind)


ABOUT = (
    "test", "validation", "public", "loss_fn", "batch_loss", "metrics", "collate_fn", "main", "better", "task",
    "classes", "normalize", "groups",
)  # fmt: skip
"""Arguments about PyTorch data sets."""
_LOADERS = {
    "num_workers": "workers are the clients' processes, which read their samples",
    **dict.fromkeys(("sampler", "shuffle"), "every epoch takes all samples of a client in random order"),
}


def federate(data: Any, about: Mapping[str, object], settings: Mapping[str, object]) -> str | FederatedData | None:
    """Make federated data of PyTorch data sets in ``data``, and return other data unchanged.

    Raises:
        UserError: arguments about data sets stand beside other data, or an item is not a data set.
    """
    arguments: dict[str, Any] = {name: value for name, value in about.items() if value is not None}
    if unknown := [name for name in arguments if name not in ABOUT]:
        raise UserError(f'There is no argument "{unknown[0]}".{suggest_name(unknown[0], ABOUT)}')
    if data is None or isinstance(data, (str, FederatedData)):
        for name in arguments:
            way = f" {ADVICE[name]}" if name == "task" else ""
            raise UserError(f"{name} is for data sets of PyTorch, data=[...] or a dict: leave it out.{way}")
        return data
    how = {"samples": "train_samples", "seed": "seed"}
    if not isinstance(data, (Mapping, list, tuple)):
        how |= {"count": "clients", "partition": "partition"}
    beside_classes = settings.get("data") == PAIRS or settings.get("model") is None
    given_too = RunConfig.read({key: settings[key] for key in how.values() if settings.get(key) is not None})
    options = {name: given_too[key] for name, key in how.items() if key in given_too}
    found = FederatedData.from_datasets(
        data, arguments.pop("test", None), **arguments, **options, beside_classes=beside_classes
    )
    if found.name == PAIRS and not beside_classes:
        raise UserError("model has no effect on images with texts: leave it out, or give classes as whole numbers.")
    return found


_ARGUMENTS = ("data", *ABOUT, "model", "out", "progress", "listener", "pictures", "fedkern.load(DIR).resume()")


def read_request(
    method: str | Method | type[Method],
    data: str | FederatedData | None,
    model: str | Callable[..., nn.Module] | None,
    arguments: Mapping[str, Any],
) -> tuple[RunConfig, FederatedData | None]:
    settings = dict(arguments)
    settings |= {table: table_of(settings.get(table), table) for table in ("options", "data_options")}
    settings["plugins"] = plugins_of(settings.get("plugins"))
    plugins.load_given(settings["plugins"])
    name, made_with = find_method(method)
    memory = data if isinstance(data, FederatedData) else None
    option_names = method_registry.option_names(name)
    fields = {entry.field for entry in RunConfig.list_options()} | {"options", "data_options", "plugins"}
    options = settings.pop("options")
    for key in [key for key in settings if key in option_names and key not in fields]:
        options[key] = settings.pop(key)
    for setting in settings:
        if setting in _LOADERS:
            raise UserError(f"{setting} is a DataLoader's: {_LOADERS[setting]}, so leave it out.")
        if setting not in fields:
            hint = suggest_name(setting, {*fields, *option_names, *_ARGUMENTS})
            hint += hint_owners(setting, method_registry.option_owners())
            if is_data_option(setting):
                hint = f' Did you mean data_options={{"{setting}": ...}}?'
            raise UserError(f'{method_registry.short_name(name)} and its runs have no setting "{setting}".{hint}')
    for list_name in ("freeze", "personal", "stages"):
        if isinstance(settings.get(list_name), (list, tuple)):
            settings[list_name] = ",".join(map(str, settings[list_name]))
    if memory is not None:
        settings = {"clients": len(memory.clients), **settings, "data": memory.name}
        model = NETWORKS.get(memory.task.network) if model is None else model
    elif isinstance(data, str):
        settings["data"] = open_code(data)
    if isinstance(model, str):
        settings["model"] = model
    given_options = method_registry.given_options(name, options)
    if twice := [name for name in given_options if name in made_with]:
        short = method_registry.short_name(name)
        raise UserError(f"{twice[0]} is given twice, in {short}(...) and beside it: leave one of the two out.")
    given_options |= method_registry.given_options(name, made_with)
    return RunConfig.make(name, options=given_options, **cast(Any, settings)), memory


def plugins_of(value: object) -> list[str]:
    return [] if value is None else _paths(value, "plugins must be a list of files and modules")


def _paths(value: object, must: str) -> list[str]:
    paths = None if isinstance(value, (str, os.PathLike)) or not isinstance(value, Iterable) else [*value]
    if paths is None or not all(isinstance(path, (str, os.PathLike)) for path in paths):
        raise UserError(f"{must}, not {format_value(value)}.")
    return [os.fspath(path) for path in paths]


def table_of(value: object, name: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{name} must be a dict of values by name, not {format_value(value)}.")
    return dict(value)


def folder_of(out: object) -> Path:
    """Return the path of an argument ``out``, or raise UserError. An empty path would be the current folder."""
    if not isinstance(out, (str, os.PathLike)) or not os.fspath(out):
        raise UserError(f"out must be the path of a folder, not {format_value(out)}.")
    check_text(str(out), "the folder")
    return expand(Path(out))


def find_method(method: str | Method | type[Method]) -> tuple[str, dict[str, Value]]:
    """Return the name of a run's method, and the options of a given method object."""
    if isinstance(method, str):
        method_registry.get(method)
        return method, {}
    kind, options = _class_of(method)
    return script_methods.give_class(kind), options


def _class_of(method: Method | type[Method]) -> tuple[type[Method], dict[str, Value]]:
    if isinstance(method, Method):
        return type(method), dict(script_methods.options_of(method))
    if isinstance(method, type) and issubclass(method, Method):
        return method, {}
    raise UserError(
        "method must be the name of a method, a class derived from fedkern.methods.Method or an object of one "
        f"(fedkern.compare takes several), not {format_value(method)}."
    )


@python_words()
def load(
    out: str | Path,
    *,
    method: Method | type[Method] | None = None,
    data: object = None,
    model: nn.Module | Callable[..., nn.Module] | None = None,
    train: Callable[..., None] | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    trusted: Collection[str] = (),
    **about: Any,
) -> Run:
    """Open the folder of a run.

    Example::

        run = fedkern.load("runs/x")
        run.summary["metrics"]

    Args:
        out: the run folder.
        method: the run's method, if it was a class of a script: the class, or an object with the run's options.
        data: the run's data, if they were in memory, or the name of the code that makes them.
        model: the run's network, if it was a module of a script, or a class or function that makes one.
        train, optimizer: functions that the run trains with, for :meth:`Run.resume`.
        trusted: code that the folder names and that may be imported, such as ``["MODULE:NAME"]``. Code that has changed
            since the run began is refused, unless it is named here, which gives a warning: by that name, or as
            ``"method"``, ``"model"``, ``"train"``, ``"optimizer"``, ``"loss_fn"`` or ``"batch_loss"`` (with metrics and
            collation).
        **about: arguments of :func:`simulate` about PyTorch data sets, if ``data`` are such.

    Returns:
        The :class:`Run`, finished or not.

    Raises:
        UserError: there is no run, or ``method`` or ``data`` is not the run's.
    """
    if not (model is None or callable(model)):
        code = isinstance(model, str) and named_code.parse(model)
        way = f"give {named_code.trust(str(code))} for code" if code else "the trained weights are in the run folder"
        given = format_value(model)
        raise UserError(f"model must be the module that the run trains, or what makes it, not {given}: {way}.")
    trusted = [trusted] if isinstance(trusted, str) else [*trusted]
    trusted += [data] if isinstance(data, str) else []  # the code of a data set, which is named again
    run = Run(out, script=ScriptObjects.of(model, train, {"optimizer": optimizer}), trusted=trusted, method=method)
    if isinstance(data, str) and named_code.absolute(data) != run.config.data:
        raise UserError(f'The run in {out} learns from {run.config.data}, not from "{data}": leave data out.')
    memory = federate(None if isinstance(data, str) else data, about, vars(run.config))
    if isinstance(memory, FederatedData):
        run._data = memory
        if (entry := read_newest(run.out)) and entry["info"]["data"] != data_fingerprint(kept_data(run.config, memory)):
            raise UserError(
                f"The data are not those of the run in {out}: give those, and others to evaluate(data=...)."
            )
    return run


@reproducible()
def _play(
    config: RunConfig,
    out: Path,
    data: FederatedData | None,
    script: ScriptObjects,
    progress: bool,
    listener: Listener | Sequence[Listener] | None,
    pictures: bool,
    *,
    resume: bool,
    trusted: Collection[str] = (),
    rounds: int | None = None,
) -> None:
    from fedkern.report.figures.pictures import find_pictures, finished_pictures
    from fedkern.report.live.notebook import choose_display

    view = choose_display(quiet=not progress, json=False)
    heard = Listeners(*_listeners(listener), view)
    try:
        run(config, out=out, resume=resume, listener=heard, data=data, script=script, trusted=trusted, rounds=rounds)
    except KeyboardInterrupt as interrupt:
        if out.exists():
            interrupt.add_note(f'fedkern.load("{out}", ...).resume() continues after the last complete round.')
        raise
    finally:
        view.close()
    if not pictures:
        return
    code = trusted if resume else [part for _, part in config.code()]
    network = None if script.network is None or config.keeps_parts else read_model(out, code, script.network)[0]
    shared = None if heard.info is None else heard.info.data
    if shared is None and data is not None and not find_pictures(out):  # the run was finished before, without pictures
        shared = kept_data(config, data)
    warn = partial(view.on_warning, "no-picture")
    _, undrawn = finished_pictures(out, data=shared, model=network, data_root=config.data_root, trusted=code, warn=warn)
    if undrawn is not None:
        again = f"draw them with fedkern.load({str(out)!r}).plot()"
        view.on_warning("no-pictures", f"The run is complete, but not its pictures ({undrawn}): {again}.")


def _listeners(listener: Listener | Sequence[Listener] | None) -> list[Listener]:
    listeners = [] if listener is None else [listener] if isinstance(listener, Listener) else listener
    for item in listeners if isinstance(listeners, (list, tuple)) else [listeners]:
        if not isinstance(item, Listener):
            hint, kind = "", f"an object of type {type(item).__name__}"
            if isinstance(item, type):
                hint = f": make one, {item.__name__}()" if issubclass(item, Listener) else ""
                kind = f"the class {item.__name__}"
            raise UserError(f"listener must be a fedkern.listeners.Listener or a list of them, not {kind}{hint}.")
        check_hooks(type(item))
    return [*listeners]
