"""Figures of a finished run's network, on the run's own test sets or on those of another data set.

The networks of a finished image-text run serve downstream tasks.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedkern.data import DATASETS, FederatedData, load
from fedkern.data.dataset_registry import lookup
from fedkern.data.forms import form_of
from fedkern.data.images.greys import format_window
from fedkern.data.images.transforms import cut_central_windows
from fedkern.data.sources.items import Items
from fedkern.data.split import Split, join_splits
from fedkern.downstream.saved_network import read_model
from fedkern.engine.batches.reader import Reader
from fedkern.engine.evaluate import Key, batch_size, evaluate, set_evaluation_threads, sets_by_prefix
from fedkern.engine.figures.final_figures import final_figures
from fedkern.engine.figures.intervals import Row, intervals
from fedkern.engine.local.network import place
from fedkern.engine.local.samples import Trial, reader
from fedkern.engine.setup.own_model import as_in_the_run
from fedkern.engine.store.resuming import load_unedited
from fedkern.errors import UserError, first_of, locate_errors
from fedkern.files.filesystem import absolute
from fedkern.methods.base import Method
from fedkern.methods.common.personal import ClientsNetworks
from fedkern.methods.protocol import batch_slices
from fedkern.models import PairNetwork
from fedkern.models.precision import compute_in
from fedkern.process.torch_modes import cpu_threads, reproducible
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import check_sets, finished_data, with_images
from fedkern.tasks.figure_names import metrics_of, set_noun
from fedkern.tasks.protocols import Description
from fedkern.usercode import named_code


def check_shape(data: FederatedData, about: Description, out: Path) -> None:
    """Raise UserError unless the images have the channels, height, width and dtype in ``about``."""
    expected, dtype = (about["channels"], *about["image_size"]), about.get("dtype", "uint8")
    if data.form.dtype != dtype:
        raise UserError(f'Images of "{data.name}" are {data.form.dtype}, and the run in {out} saw {dtype}: give these.')
    if tuple(data.form.shape) != expected:
        sizes = ["x".join(str(side) for side in shape) for shape in (data.form.shape, expected)]
        raise UserError(
            f'The images of "{data.name}" are {sizes[0]} (channels, height, width), but the run in {out} saw '
            f"{sizes[1]}: {_way_out(data.name, tuple(data.form.shape), expected)}."
        )


def _way_out(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Return advice for images that are not ``expected``: matching data options, or another data set."""
    options = DATASETS[name].options if name in DATASETS else {}
    values = {}
    if shape[1:] != expected[1:]:
        values["size"] = str(expected[1]) if expected[1] == expected[2] else None
    if shape[0] != expected[0]:
        values["colour"] = {1: "grey", 3: "rgb"}.get(expected[0])
    if any(option not in options or value is None for option, value in values.items()):
        return "it has no option for such images; name a data set that has with --data"
    return "match them with " + " ".join(f"--data-option {option}={value}" for option, value in values.items())


@reproducible()
def evaluate_run(
    out: Path | str,
    *,
    data: str | FederatedData | None = None,
    data_root: str | None = None,
    data_options: Mapping[str, object] | None = None,
    cache: str | Path | None = None,
    trusted: Collection[str] = (),
    model: nn.Module | None = None,
    best: bool = False,
    own_tests: bool = False,
    progress: Callable[[str], None] | None = None,
) -> tuple[dict[str, float], tuple[str, ...], list[Row]]:
    """Evaluate the network of a finished run: return its figures, the names of the test sets, and intervals.

    Arguments are those of :meth:`fedkern.api.Run.evaluate`, :meth:`fedkern.api.Run.model` and :func:`fedkern.load`.
    ``own_tests`` adds intervals on the clients' own test sets.
    """
    # Network, settings and data are read as the run had them, with the network's classes.
    has_own = not best and _own_networks(out, trusted)
    module, about = read_model(out, trusted, model, best=best, client=0 if has_own else None)
    config = load_unedited(out, trusted=trusted, device="cuda" if torch.cuda.is_available() else "cpu")
    loaded = read_data(
        out, config, about, data, data_root=data_root, data_options=data_options, cache=cache, progress=progress
    )
    loaded = _fit_classes(with_images(config, loaded), about, Path(out))
    check_sets(loaded, config.plugins)
    if progress is not None and config.records != "private":
        for line in list_sets(loaded):
            progress(line)
    if loaded.form.outside and config.records != "private":
        (progress or warnings.warn)(loaded.form.outside)
    method = config.new_method()
    flat, device = "samples" not in about, torch.device(config.device)
    # Placed and frozen as the run's: PyTorch chooses kernels by strides and by whether weights need gradients.

    def place_on_device(module: nn.Module) -> nn.Module:
        module = as_in_the_run(module, config)
        return place(module, device).requires_grad_(False) if flat else module.to(device)

    judge: Method | ClientsNetworks = method
    if has_own:
        network = lambda k: place_on_device(read_model(out, trusted, model, client=k)[0])  # noqa: E731
        judge = ClientsNetworks(method, range(config.trained_clients), network)
    module = place_on_device(module)
    # Answers are kept, as intervals need them.
    sets = _sets(sets_by_prefix(loaded), module, about, config)
    usual = own_tests and type(method).evaluate_own is Method.evaluate_own  # else a client's state is needed
    own = _sets(dict(enumerate(loaded.client_tests if usual else ())), module, about, config)
    code = partial(locate_errors, f"`evaluate` of the method {config.method} failed", config.kind)
    with cpu_threads(config.threads), compute_in(config.precision):
        if isinstance(loaded.validation, Items):
            Trial(loaded, config.kind, lambda: deepcopy(module).cpu()).check_tests()
        threads = config.client_threads if has_own else config.threads  # as in the run
        with set_evaluation_threads(config.replace(threads=threads), flat and not has_own) as at_once:
            figures = evaluate(judge, module, sets, code, at_once, seed=config.seed, keep=True)
            for k, test_set in own.items():
                evaluate(judge, module, {f"client_{k}_": test_set}, code, at_once, seed=config.seed, keep=True)
        is_paired = len(loaded.clients) == config.trained_clients  # else networks and sites are no pairs
        rows = intervals(sets, own, loaded, config.seed, is_paired) if config.records != "private" else []
        return {**figures, **final_figures(sets, loaded.classes).metrics, **figures}, tuple(loaded.tests), rows


def read_data(
    out: Path | str,
    config: RunConfig,
    about: Description,
    data: str | FederatedData | None,
    *,
    data_root: str | None,
    data_options: Mapping[str, object] | None,
    cache: str | Path | None,
    progress: Callable[[str], None] | None,
    training: bool = False,
) -> FederatedData:
    """Read the data to try a run's network on: the run's own, or others with the same size and colours.

    Args:
        about: description of the network, see :func:`read_model`.
        training: whether training samples are needed too. The run's own data may then get other ``labels``.
    """
    options = dict(data_options or {})
    if isinstance(data, FederatedData):
        if cache is not None:
            raise UserError("cache is for image files, and these data are in memory: leave it out.")
        return data
    if data is not None and not isinstance(data, str):
        raise UserError(
            f"data must be the name of a data set or FederatedData, not {type(data).__name__}: a Dataset is "
            "FederatedData.from_datasets([DATASET], DATASET)."
        )
    folder = None if cache is None else absolute(str(cache))
    if data is None or named_code.names_stored_code(data, config.data, data_root, options):
        if options.keys() - ({"labels"} if training else ()):
            way = "of the run's own data only labels may change" if training else "the run's own data keep theirs"
            raise UserError(f"--data-option is for another data set, named with --data: {way}.")
        # The window is that of the training.
        stored = {name: value for name, value in config.data_options.items() if name != "window"}
        options = {**_as_trained(config.data, about, config), **stored, **options}
        config = config.replace(data_root=data_root or config.data_root, data_options=options)
        return finished_data(config, out, cache=folder, progress=progress)
    again = data == config.data and data_root is not None and _same_files(data_root, config.data_root)
    trained = _as_trained(data, about, config)
    if training:
        trained.pop("task", None)  # the labels are for another task
    share = (1, "iid") if lookup(data).function is None else (None, None)  # a function shares out by itself
    return load(
        data, root=data_root, clients=share[0], partition=share[1], seed=config.seed,
        options={**(config.data_options if again else {}), **trained, **options},  # the split of the training
        cache=folder, progress=progress, judged=not (again or training),
    )  # fmt: skip


def _same_files(root: str, stored: str | None) -> bool:
    """Return whether two data roots are one file or folder, or a file and its folder."""
    if stored is None:
        return False
    pair = [Path(absolute(path)).resolve() for path in (root, stored)]
    return pair[0] == pair[1] or any(a.is_file() and a.parent == b for a, b in (pair, reversed(pair)))


def _own_networks(out: Path | str, trusted: Collection[str]) -> bool:
    """Return whether a run is judged by its clients' networks. Errors of its folder are reported later."""
    try:
        return load_unedited(out, trusted=trusted, device="cpu").own_networks
    except UserError:
        return False


def list_sets(data: FederatedData) -> Iterator[str]:
    for name, split in data.tests.items():
        all_rows, names = torch.arange(len(split)), data.client_names or data.form.sites
        sites = [] if split.homes is None else [(site, split.homes == k) for k, site in enumerate(names)]
        parts = [("", all_rows), *((f"{site} ", all_rows[rows]) for site, rows in sites if rows.any())]
        people = [None if split.patients is None else len(split.patients[rows].unique()) for _, rows in parts]
        counts = [
            f"{site}{len(rows):,}" + ("" if number is None else f" of {number:,} patient{'s' * (number != 1)}")
            for (site, rows), number in zip(parts, people, strict=True)
        ]
        yield f"the {set_noun(name)}: {data.form.noun} {', '.join(counts)}"


def _as_trained(data: str, about: Description, config: RunConfig) -> dict[str, object]:
    """Return the options that size, colour and scale images and read labels as in the training."""
    values: dict[str, object] = {}
    options, (height, width) = lookup(data).options, about["image_size"] if "items" not in about else (0, 1)
    if "bits" in options:
        values = {"bits": about["grey_bits"], "window": format_window(about["window"])}
    if {"size", "colour"} <= {*options} and height == width:
        values |= {"size": height, "colour": "grey" if about["channels"] == 1 else "rgb"}
        trained = lookup(config.data).options  # of a user's data set they may have other names
        if {"crop", "size"} <= {*options} & {*trained} and config.data_options.get("crop"):
            # The network sees parts of larger images.
            values |= {"size": config.data_options.get("size", trained["size"].default), "crop": height}
    if data == config.data == "segmentation":
        values["names"] = "|".join(about["classes"])
    named = data == "csv" and about["task"] in (lookup(data).options["task"].choices or ())
    return {**values, "task": about["task"]} if named else values


def _sets(splits: Mapping[Key, Split], module: nn.Module, about: Description, config: RunConfig) -> dict[Key, Reader]:
    device = torch.device(config.device)
    size = batch_size(device, config.statistics)
    form = form_of(about)
    sets: dict[Key, Reader] = {}
    member: Any = next(iter(getattr(module, "members", (module,))))  # clients' own networks have the same words
    for prefix, split in splits.items():
        tokens = split.task.tokens(split, lambda: member.tokenize)
        sets[prefix] = reader(split, form, device, seed=config.seed, tokens=tokens, size=size)
        sets[prefix].metrics = metrics_of(config.plugins)
        sets[prefix].output_bytes = len(split) * (config.output_bytes or 0)
    return sets


def _fit_classes(data: FederatedData, about: Description, out: Path) -> FederatedData:
    task, classes = data.task, list(about["classes"])
    if data.task.name != about["task"]:
        raise UserError(f'The run in {out} is for {about["task"]}, and the data set "{data.name}" is for {task.name}.')
    if isinstance(data.validation, Items) != ("items" in about):
        noun = "samples that are no images" if "items" in about else "images"
        raise UserError(f'The run in {out} is of {noun}, and the data set "{data.name}" is of {data.form.noun}.')
    if isinstance(data.validation, Items):
        return replace(data, classes=tuple(classes))
    check_shape(data, about, out)
    if list(data.classes) == classes:
        return data
    places = task.places(data.classes, classes)
    if places is None:
        raise UserError(
            f'The classes of "{data.name}" are {first_of(data.classes, 5)}, but the network in {out} has '
            f"{first_of(classes, 5)}: name data with some of these classes (masks: in the same order) and no others."
        )

    def relabel(split: Split) -> Split:
        return replace(split, labels=task.map_labels(split.labels, places, len(classes)))

    tests = {name: relabel(split) for name, split in data.tests.items()}
    own = tuple(map(relabel, data.client_tests))
    return replace(data, classes=tuple(classes), tests=tests, validation=relabel(data.validation), client_tests=own)


SEEN = "seen"
BATCH = 250


class Finished:
    """A finished run and the data of one of its downstream tasks.

    Attributes:
        networks: the global pair of encoders, or without one every client's pair, in eval mode.
        data: the run's federated data, or another data set.
        form: form of the images, as the networks see them.
    """

    def __init__(self, out: Path, config: RunConfig, model: nn.Module, about: Description, data: FederatedData) -> None:
        self.out, self.config, self.data = out, config, data
        members = [model] if isinstance(model, PairNetwork) else list(getattr(model, "members", ()))
        if not members or not all(isinstance(member, PairNetwork) for member in members):
            raise UserError(
                f"{out} holds {about['model']}, trained by {config.method}: downstream tasks are for pairs of an image "
                "and a text encoder."
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.networks: list[PairNetwork] = [member.to(self.device).eval() for member in members]
        self.form = replace(data.form, mean=about["mean"], std=about["std"])
        check_shape(data, about, out)

    @classmethod
    @reproducible()
    def open(
        cls,
        out: Path | str,
        *,
        data: str | None = None,
        data_root: str | None = None,
        data_options: Mapping[str, object] | None = None,
        cache: str | None = None,
        trusted: Collection[str] = (),
        best: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> Self:
        """Read a run folder, and the run's own data or another data set.

        Args:
            data: another data set, whose training samples form one pool. Without ``data_root`` and ``data_options`` the
                code of the run's own data means these.
            data_root: folder of the data's files, for the run's own data the current one.
            data_options: options of the other data set. The run's own data only take ``labels``, which moves no sample
                to another client or split.
            cache: folder of decoded images (None: for the run's own data the run's folder).
            trusted: code that may be imported, see :func:`fedkern.load`.
            best: read the network of the best round.
        """
        config = load_unedited(out, trusted=trusted, device="cpu")
        module, about = read_model(out, trusted, best=best)
        loaded = read_data(
            out, config, about, data, data_root=data_root, data_options=data_options, cache=cache, progress=progress,
            training=True,
        )  # fmt: skip
        return cls(Path(out), config, module, about, loaded)

    @property
    def sets(self) -> dict[str, Split]:
        """The test sets by name, ``"seen"`` for that of the training clients' distribution."""
        return {name or SEEN: split for name, split in self.data.tests.items()}

    def train(self) -> Split:
        """Return all clients' training samples at the networks' image size, for probes and decoders."""
        return cut_central_windows(join_splits(self.data.clients), self.data.form.shape[1:])

    def images(self, split: Split) -> Iterator[Tensor]:
        """Yield the images of a split in batches, normalised as in training: fp32, channels-last."""
        for rows in batch_slices(len(split), BATCH):
            yield self.form.normalise_images(split.images[rows].to(self.device))

    @torch.no_grad()
    def image_embeddings(self, network: PairNetwork, split: Split) -> Tensor:
        """Return unit vectors fp32 ``[n, 128]``."""
        return torch.cat([network.image_embedding(images) for images in self.images(split)])

    @torch.no_grad()
    def text_embeddings(self, network: PairNetwork, texts: tuple[str, ...] | list[str]) -> Tensor:
        tokens, rows = network.tokenize(texts), torch.arange(len(texts))
        slices = batch_slices(len(texts), BATCH)
        return torch.cat([network.text_embedding(tokens.take(rows[cut]).to(self.device)) for cut in slices])

    @torch.no_grad()
    def features(self, network: PairNetwork, split: Split, kind: str) -> Tensor:
        """Return features of every image for a probe, fp32 ``[n, d]``.

        Args:
            kind: ``"token"`` (the first token after the alignment layer), ``"mean"`` (of the encoder's patch tokens),
                or ``"embedding"`` (the unit vector of the shared space).
        """

        def of(images: Tensor) -> Tensor:
            sequence = network.encode_image(images)
            if kind == "mean":
                return sequence[:, 1:].mean(1)
            return network.image_align.first_token(sequence) if kind == "token" else network.project_image(sequence)

        return torch.cat([of(images) for images in self.images(split)])
