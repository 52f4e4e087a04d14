"""Data of a run: loading them, completing the settings by them, and checking both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedkern.data import DETECTION_OPTIONS, FederatedData, load, lookup
from fedkern.data.dataset_registry import read_options
from fedkern.data.forms import SampleForm
from fedkern.data.identity import data_fingerprint, inspect, sample_hashes
from fedkern.data.images import image_cache
from fedkern.data.images.pixels import CACHE_BYTES
from fedkern.data.labels.spelling import SHOWN
from fedkern.data.sharing.cue import add_backdoor
from fedkern.data.sharing.holdout import hold_out, limit_patients
from fedkern.data.sources.dataset_images import as_images, can_be_images
from fedkern.data.sources.items import Items
from fedkern.data.split import Split
from fedkern.data.types import AnySplit, client_label
from fedkern.errors import UserError, first_of
from fedkern.files.image_rows import in_parts, load_rows
from fedkern.methods import method_registry
from fedkern.models import MODELS, Own
from fedkern.models.network_registry import check_gives
from fedkern.process.torch_modes import reproducible
from fedkern.settings.config import RunConfig
from fedkern.settings.section import Values
from fedkern.tasks import TASKS
from fedkern.tasks.figure_names import check_metric_names, check_set_names, metrics_of, set_noun
from fedkern.tasks.partition_statistics import PartitionStatistics


@reproducible()
def load_data(
    config: RunConfig,
    *,
    masks: bool = True,
    notice: Callable[[str], None] | None = None,
    progress: Callable[[str], None] | None = None,
    identify: bool = False,
) -> FederatedData:
    """Return the federated data of the settings, before :func:`kept_data` holds samples out and adds a backdoor.

    Without ``masks`` no detector or boxes file finds objects in the training images.
    """

    def detector(name: str, box_threshold: float, text_threshold: float) -> Any:
        from fedkern.models.pretrained.detector import GroundingDino

        return GroundingDino(name, box_threshold, text_threshold, device=config.device)

    info = lookup(config.data)
    exclusions = {"backdoor_clients", *(() if masks else DETECTION_OPTIONS)}
    options = {key: value for key, value in config.data_options.items() if key not in exclusions}
    # A default of the method holds, a default of the data set is replaced by the sites in the data.
    presets = {"clients": info.clients, "partition": info.partition}
    unset = {name for name, value in presets.items() if name in config.unset and getattr(config, name) == value}
    return load(
        config.data, root=config.data_root, clients=None if "clients" in unset else config.clients,
        partition=None if "partition" in unset else config.partition or info.partition, seed=config.seed,
        train_samples=config.train_samples, public_samples=config.public_samples, correlation=config.correlation,
        options=options, make_detector=detector, notice=notice, progress=progress, cache=config.cache,
        identify=identify,
    )  # fmt: skip


def find_decided(config: RunConfig, data: FederatedData) -> Values:
    """Return the settings that the loaded data decide if nobody gave them: partition, clients, ``client_test``."""
    facts: Values = {"partition": data.statistics.partition, "clients": len(data.clients)}
    if data.client_tests:
        facts["client_test"] = 0.0
    return {name: value for name, value in facts.items() if name in config.unset}


def inspect_items(config: RunConfig, data: FederatedData) -> FederatedData:
    """Return the data, with sights of their data sets if samples are items."""
    is_new = isinstance(data.validation, Items) and not data.sights
    return inspect(data, config.keep_items, CACHE_BYTES) if is_new else data


def with_images(config: RunConfig, data: FederatedData) -> FederatedData:
    """Return the data, with images in place of items if method, network or augmentation need them."""
    if not can_be_images(data):
        return data
    entry = MODELS.get(config.model)
    is_own = entry is None or isinstance(entry.make, Own)
    needs_images = config.kind.serves(data.task) and not config.kind.serves(data)
    reasons = ["the pair of encoders" * ("pairs" in data.task.offers), config.method * needs_images]
    reasons += [f"the network {config.model}" * (not is_own)]
    reasons += [f"--augment {config.augment}"] if config.augment not in (None, "none") else []
    reason = next(filter(None, reasons), "")
    if reason and config.keep_items == "off":
        raise UserError(f"{reason} needs images in memory, and --keep-items off keeps none: leave it out.")
    if not reason:
        return data
    limit = None if config.keep_items == "memory" else CACHE_BYTES
    return as_images(inspect_items(config, data), reason, is_raw=is_own, limit=limit)


def kept_data(config: RunConfig, data: FederatedData) -> FederatedData:
    """Return a run's data without held-out samples and excess images of patients, and with backdoors.

    With private records a validation set drawn from the clients' images is dropped: no noise covers figures on it.
    Clients are backdoored last, so that no held-out sample has the attacker's label.
    """
    data = with_images(config, data)
    data = hold_out(data, held_out=config.held_out_client, share=config.client_test, seed=config.seed)
    if config.records == "private" and data.drawn_validation:
        data = replace(data, validation=data.validation.subset(torch.zeros(0, dtype=torch.int64)))
    if config.unit.name == "patient":
        data = limit_patients(data, config.unit.images, config.seed)
    options = read_options(config.data, config.data_options)[1]
    return add_backdoor(data, options.backdoor_clients, options.backdoor_target, options.backdoor_size, config.seed)


def finished_data(
    config: RunConfig, out: str | Path, *, cache: str | None = None, progress: Callable[[str], None] | None = None
) -> FederatedData:
    """Return the training data of a run in a folder, without masks of objects that would need a detector.

    ``cache`` is the folder of decoded images, by default the run's if it exists.
    """
    config = config.replace(cache=cache or image_cache.recall_cache(out))
    return kept_data(config, load_data(config, masks=False, progress=progress))


@reproducible()
def reload_data(config: RunConfig, form: SampleForm, classes: tuple[str, ...], fingerprint: int) -> FederatedData:
    """Load the data of a run in another process, with the form and classes that the run has found."""
    data = kept_data(config, inspect_items(config, load_data(config)))
    if data_fingerprint(data) != fingerprint:
        raise UserError(
            f"{config.data} gives other data here than on rank 0: let it give the same samples whenever it is called."
        )
    return replace(data, form=form, classes=classes)


@dataclass(frozen=True)
class DataRecipe:
    """Federated data without their samples, which :func:`reload_data` loads when unpickled."""

    config: RunConfig
    data: FederatedData

    def __reduce__(self) -> tuple[Callable[..., FederatedData], tuple[object, ...]]:
        return reload_data, (self.config, self.data.form, self.data.classes, data_fingerprint(self.data))


def data_of_one(config: RunConfig, notice: Callable[[str], None] | None = None, *, node: bool = False) -> FederatedData:
    """Return the data in this machine's folder or of its function, with all training samples at one client.

    A node holds nothing out: the server's sets judge the network.
    """
    if node:
        shares = [name for name in ("test_share", "validation_share") if name in lookup(config.data).options]
        config = config.replace(data_options={**config.data_options, **dict.fromkeys(shares, 0.0)})
    data = load_data(config.replace(clients=1, partition="iid"), notice=notice)
    return with_images(config, replace(inspect_items(config, data), client_names=None, client_tests=()))


def declared_data(data: FederatedData, samples: Sequence[int]) -> FederatedData:
    """Return federated data with clients on other machines, of which only the number of samples is known."""
    count = len(data.classes)

    def stand_in(n: int) -> AnySplit:
        if isinstance(data.clients[0], Items):  # the network is tried on samples of the server
            return data.clients[0].subset(torch.zeros(n, dtype=torch.int64))
        images = torch.zeros((n, data.form.shape[0], 1, 1), dtype=getattr(torch, data.form.dtype))
        return Split(images, data.task.blank(n, count), task=data.task)

    uncounted = np.zeros((len(samples), 0), dtype=np.int64)
    statistics = PartitionStatistics(uncounted, (), "own data", samples=tuple(samples))
    return replace(data, clients=tuple(map(stand_in, samples)), statistics=statistics)


def complete_settings(config: RunConfig, data: FederatedData, *, are_loaded: bool) -> RunConfig:
    """Complete the settings by clients, main figure, augmentation and client threads of the data.

    Data that ``are_loaded`` also decide partition and ``client_test``.
    """
    facts = find_decided(config, data) if are_loaded else {}
    facts |= {"clients": len(data.clients), "main": data.task.main, "better": data.task.better}
    config = config.replace(**facts, augment=config.augment or data.form.augment).with_client_threads()
    config.check()
    return config


def check_data(config: RunConfig, data: FederatedData, only_client: int | None = None) -> None:
    """Raise UserError if settings, method and data do not fit.

    ``only_client`` is the only client with samples on this machine.
    """
    check_kind(config, data)
    check_gives(config.model, data.task.network, config.data, "with --model")
    # Settings for some kinds of samples alone.
    if config.augment not in (None, "none") and not data.form.offers:
        words = data.form.input_words()
        raise UserError(f"--augment {config.augment} is for images [C, H, W]; samples have {words}: leave it out.")
    if config.augment == "jitter" and data.form.offers and data.form.feeds_bytes:
        raise UserError("--augment jitter is for float images, and the data set gives uint8: take another one.")
    if config.keep_items != "auto" and not (data.sights or isinstance(data.validation, Items)):
        raise UserError(f"--keep-items {config.keep_items} is for data sets of PyTorch: leave it out.")
    if config.augment == "window" and all(s.images.shape[2:] == data.form.shape[1:] for s in data.clients):
        raise UserError(
            "--augment window draws the place of a window that is smaller than the images: give one with --data-option "
            "crop=N, which image-text data have, or take another augmentation."
        )
    if config.buffers == "pool" and "pairs" not in data.task.offers:
        raise UserError("--buffers pool is for image-text data, whose networks have batch norm in their heads alone.")
    _check_pairs(config, data)
    # Sets and clients without information or samples.
    if data.statistics.counts.any():  # no counts if clients are on other machines
        _check_varied(data, {"the training set": data.clients})
        clients = {f"client {data.client_label(k)}": [split] for k, split in enumerate(data.clients)}
        _check_varied(data, clients, blank=True)
    if only_client is None and not all(map(len, data.tests.values())):
        raise UserError(f"There are no test {data.form.noun}: name a test split in the data, or a test_share above 0.")
    for k, split in enumerate(data.clients):
        if len(split) == 0 and only_client in (None, k):
            raise UserError(
                f"Client {data.client_label(k)} has no training samples: use fewer clients, more samples, or another "
                f'--partition than "{config.partition}".'
            )


def check_kind(config: RunConfig, data: FederatedData) -> None:
    """Raise UserError unless the data have classes enough, and the method is for their task and kind of samples."""
    kind, offering = config.kind, data.task if can_be_images(data) else data  # items become images where needed
    if len(data.classes) == 1 and "pairs" not in data.task.offers:
        raise UserError(
            f'The data set "{config.data}" has the single class "{data.classes[0]}", expected two or more: name the '
            "folder or the column that holds the classes."
        )
    if not kind.serves(offering):
        able = ", ".join(sorted(name for name, method in method_registry.METHODS.items() if method.serves(offering)))
        if kind.serves(data.task):
            raise UserError(
                f"{config.method} needs images [C, H, W]; samples have {data.form.input_words()}: methods for them are "
                f"{able}."
            )
        tasks = " and ".join(name for name, task in TASKS.items() if kind.serves(task)) or "no task"
        subject = f'the data set "{config.data}" is for {data.task.name}'
        if data.task.name == "own":
            subject = "a loss of your own has no classes (give classes= where outputs are their logits)"
        elif (usual := TASKS.get(data.task.name)) and kind.serves(usual):
            subject = "the loss takes logarithms of probabilities (nn.CrossEntropyLoss takes logits)"
        raise UserError(f"{config.method} is for {tasks}, but {subject}: methods for that are {able}.")


def _check_varied(data: FederatedData, sets: Mapping[str, Sequence[Split]], *, blank: bool = False) -> None:
    """Raise UserError for a set of several equal images, or with ``blank`` of equal pixels."""
    for name, splits in sets.items() if data.form.offers else ():
        parts = (load_rows(split.images[row : row + 4]) for split in splits for row in range(0, len(split), 4))
        head, count = next(parts, None), sum(map(len, splits))
        if head is None or count < 2:
            continue
        model = head.flatten()[:1] if blank else head[:1]
        if all(bool((rows == model).all()) for rows in chain([head], parts)):
            raise UserError(
                f"All {count:,} images of {name} are equal as a network sees them, so that they tell nothing: "
                f"{data.form.outside or 'look at their values, and at --data-option window where it fits the files'}"
            )


def _check_pairs(config: RunConfig, data: FederatedData) -> None:
    """Raise UserError for training on a single image-text pair: batch norm in the heads needs two."""
    if "pairs" not in data.task.offers:
        return
    if config.batch_size < 2:
        raise UserError(
            "--batch-size 1 is too small for image-text data, where every pair is told from the others of its batch: "
            "give 2 or more."
        )
    for k, split in enumerate(data.clients):
        if len(split) == 1 and not config.kind.pooled:
            raise UserError(
                f"Client {data.client_label(k)} has a single image-text pair, and every pair is told from the others "
                "of its batch: use fewer clients, more samples, or another --partition."
            )


def _overlaps(data: FederatedData, marks: Callable[[Split], Collection[object]]) -> str:
    """Name the sets that judge the network and share marks with training samples, with their numbers."""
    splits = (*data.clients, *(() if data.public is None else (data.public,)))
    trained = {mark for split in splits for mark in marks(split)}
    sets = {f"the {set_noun(name)}": [split] for name, split in {**data.tests, "validation": data.validation}.items()}
    overlaps = []
    for name, judging in {**sets, "the clients' own test sets": data.client_tests}.items():
        judged = [mark for split in judging for mark in marks(split)]
        if count := sum(mark in trained for mark in judged):
            overlaps.append(f"{name} ({count} of {len(judged)})")
    return " and ".join(overlaps)


def equal_samples(data: FederatedData) -> list[str]:
    overlaps = _overlaps(data, lambda split: sample_hashes(split, data.sights))
    return [
        f"Some {data.form.noun} are in both training and {overlaps}, so figures there are too good: remove the "
        "duplicates."
    ] * bool(overlaps)


def list_caveats(data: FederatedData) -> list[str]:
    """Return sentences on patients and classes with misleading figures on the test sets."""
    noun = data.form.noun
    overlaps = _overlaps(data, lambda split: set() if split.patients is None else set(split.patients.tolist()))
    sentences = [
        f"Patients whose {noun} are trained on are also in {overlaps}, so that figures there are not those of unknown "
        f"patients: name one client for all {noun} of a patient, or leave {noun} out."
    ] * bool(overlaps)
    if data.statistics.counts.any() and data.form.offers:  # no counts if clients are on other machines
        classes = set(range(len(data.classes)))
        test_classes = classes - _unseen(classes, (*data.tests.values(), data.validation))
        if untrained := sorted(_unseen(test_classes, data.clients)):
            names = first_of([data.classes[label] for label in untrained], SHOWN)
            named, pronoun = (f"Class {names} is", "it") if len(untrained) == 1 else (f"Classes {names} are", "them")
            sentences.append(f"{named} in a test or validation set, but no client trains on {pronoun}.")
    return sentences


def _unseen(classes: set[int], splits: Sequence[Split]) -> set[int]:
    """Return the classes that no image shows, reading only until all were seen."""
    unseen = set(classes)
    parts = ((split.task, rows) for split in splits for part in in_parts(split.labels) for rows in part.split(64))
    for task, labels in takewhile(lambda _: unseen, parts):
        unseen.difference_update(task.shown_classes(labels).tolist())
    return unseen


def check_sets(data: FederatedData, plugins: Mapping[str, str]) -> None:
    """Raise UserError before the training if a set's name is taken, or its figures are undefined."""
    metrics = [*getattr(data.task, "metrics", ()), *(metric.name for metric in metrics_of(plugins))]
    check_metric_names(metrics)
    check_set_names(data.tests, metrics)
    _check_varied(data, {f"the {set_noun(name)}": [split] for name, split in data.tests.items()})
    for name, split in {**data.tests, "validation": data.validation}.items():
        if len(split) and (lacks := split.task.unfit(split)):
            raise UserError(f"The {set_noun(name)} has {lacks}: give it other images, or more of them.")
    for k, split in enumerate(data.client_tests):
        if lacks := split.task.unfit(split):
            raise UserError(
                f"Client {client_label(data.client_names, k)}'s own test set has {lacks}: use a larger --client-test, "
                "or 0."
            )
