"""Loading: from a data set's name to the clients' splits, the validation set and the tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkern.data.data_option import DETECTION_OPTIONS, CommonOptions, check_single
from fedkern.data.dataset_registry import DATASETS, DatasetInfo, lookup, read_options
from fedkern.data.forms import ImageForm
from fedkern.data.identity import identify_memory, identify_source, pixel_hashes, sample_pool
from fedkern.data.images.background import MaskSource, extract_background
from fedkern.data.images.detections import BoxesFile, Detections, Detector
from fedkern.data.images.image_cache import report_unused, stored_images
from fedkern.data.images.transforms import cut_central_windows
from fedkern.data.sharing.coloured import paint
from fedkern.data.sharing.cue import add_backdoor, add_cues
from fedkern.data.sharing.groups import grouped_rows, training_cases, unit_noun
from fedkern.data.sharing.partition import PartitionSpec, parse_partition, share_samples
from fedkern.data.sources.copies import find_copies
from fedkern.data.sources.items import Items
from fedkern.data.split import Split, rows_of
from fedkern.data.types import DataRequest, FederatedData, Pool, Source
from fedkern.errors import UserError
from fedkern.streams import stream
from fedkern.tasks.partition_statistics import PartitionStatistics


def load(
    name: str,
    *,
    root: str | Path | None = None,
    clients: int | None = None,
    partition: str | None = None,
    seed: int = 0,
    train_samples: int | None = None,
    public_samples: int = 0,
    correlation: float | None = None,
    options: Mapping[str, object] | None = None,
    make_detector: Callable[[str, float, float], Detector] | None = None,
    notice: Callable[[str], None] | None = None,
    progress: Callable[[str], None] | None = None,
    cache: str | Path | None = None,
    identify: bool = False,
    judged: bool = False,
) -> FederatedData:
    """Load a data set and share it out among clients.

    The train/validation/test split is fixed.  ``seed`` decides which training samples are kept, which client holds
    them, and the colours.  The same arguments always give the same tensors.

    Args:
        name: a key of `fedkern.data.DATASETS`.
        root: folder of the data set's files: its own folder, the folder above, or torchvision's layout.
        clients: number of clients (default: the number of sites under ``attribute``, else the data set's).
        partition: a specification for `fedkern.data.parse_partition` (default: ``attribute`` where a column or folders
            of the user's files name two or more sites, else the data set's).  Coloured sets give every client its own
            colours under any partition except ``iid``, where all clients share one colour map.
        seed: the run's root seed.
        train_samples: number of training samples shared out in total (default: all); the validation set shrinks in
            proportion.
        public_samples: number of training samples that no client gets: the public split.  With ``train_samples`` the
            public samples come from the remaining ones, so that the clients' data do not change.
        correlation: coloured sets only, probability in [0, 1] that a sample shows its client's colour of its class.
        options: the data set's own ``key=value`` options and `COMMON_OPTIONS`.
        make_detector: makes the detector of the option ``detector`` from its name, box threshold and text threshold,
            for example `fedkern.models.pretrained.detector.GroundingDino`.
        notice: called with progress messages of a long detection or decoding, and with notes on the data, such as sites
            that the partition does not use.
        progress: called with the progress messages instead of ``notice``.
        cache: folder that keeps decoded image files, see `image_cache.store_files`.  Without one, images of more than a
            gigabyte go to a temporary file.  Images in a file are :class:`~fedkern.files.image_rows.ImageRows`, which
            read rows on demand.
        identify: fill in the data's identity, for which all images are read once more.  Data drawn from the seed are
            identified by the function that draws them.
        judged: load validation and test sets only; every client gets one image.  All images are the test set where the
            user's files name no split, unless ``test_share`` is given.

    Returns:
        The clients' splits, the validation set, the tests and their statistics.

    Raises:
        UserError: an invalid name, file, partition or value.

    Example:
        >>> data = load("digits", clients=5, partition="dirichlet:0.5", seed=0)
        >>> data.clients[0].images.shape[1:]
        torch.Size([1, 32, 32])
    """
    # Check the request before any file is read.
    info = lookup(name)
    progress, notice = progress or notice, notice or (lambda text: None)
    own_options, common = read_options(name, options or {})
    if judged and info.function is None and "test_share" in own_options and "test_share" not in (options or {}):
        own_options["test_share"] = 1.0
    spec = None if partition is None else parse_partition(partition)
    correlation = _check_correlation(name, info, correlation)
    if info.make is None:
        raise UserError(
            f'data set "{name}" is given through Python, to fedkern.simulate(METHOD, data=...); a run of it goes on '
            "with fedkern.load(DIR, ...).resume(), where load gets the same data"
        )
    request = DataRequest(
        root, clients, partition, seed, own_options, train_samples, public_samples, common.test_samples,
        common.validation_samples, cache, progress,
    )  # fmt: skip
    # A source is shared out here; federated data come with their clients.
    data = info.make(request)
    drawn = info.function.identity() if info.function is not None and "seed" in info.function.takes else None
    check_single(name, data.train.task if isinstance(data, Source) else data.task, common)
    if isinstance(data, Source):
        shares = {"is_identified": identify and drawn is None, "is_judged": judged and info.palette is None}
        data = _share_out(name, info, data, request, spec, notice, **shares)
    else:
        if identify and drawn is None and not isinstance(data.validation, Items):  # a run inspects items itself
            data = dataclasses.replace(data, identity=identify_memory(data))
        report_unused(cache, progress)
        data = _subsample_sets(data, common)
    if identify and drawn is not None:
        data = dataclasses.replace(data, identity=drawn)
    if info.palette is not None:
        data = paint(data, info.palette, correlation, str(own_options["mask"]), seed)
    # Find the objects before cues and patches are drawn over them.
    background = _background_source(options or {}, common, data, make_detector, progress)
    if background is not None:
        data = extract_background(data, background)
    data = add_cues(data, common.cue_clients, common.cue_size, seed)
    return add_backdoor(data, common.backdoor_clients, common.backdoor_target, common.backdoor_size, seed)


def _share_out(
    name: str,
    info: DatasetInfo,
    source: Source,
    request: DataRequest,
    spec: PartitionSpec | None,
    notice: Callable[[str], None],
    *,
    is_identified: bool,
    is_judged: bool,
) -> FederatedData:
    """Share a source's pools out among clients and read their samples, see :func:`load`."""
    # Sites of the data are the clients, unless the user asks for another partition.
    for text in source.notices:
        notice(text)
    spec = spec or _default_partition(name, info, source)
    clients = request.clients
    if clients is None:
        clients = source.groups if spec.name == "attribute" and source.groups is not None else info.clients
    _check_partition(name, info, source, spec, clients)
    for text in _unused_sites(source, spec):
        notice(text)
    names = source.sites if spec.name == "attribute" and source.sites else None

    # Choose the rows of all sets before any is read: images are decoded in one pass.
    train_rows, public_rows = _training_rows(name, source.train, request)
    parts = _shares(source, spec, train_rows, clients, request.seed)
    labels = source.train.labels[train_rows].numpy()
    statistics = PartitionStatistics.of([labels[part] for part in parts], source.classes, spec.text, source.train.task)
    client_rows = [train_rows[torch.from_numpy(part[: 1 if is_judged else None])] for part in parts]
    validation, share = source.validation, len(train_rows) / max(len(source.train), 1)
    count = request.validation_samples or max(1, round(share * len(validation)))
    rows = {
        "public": (source.train, public_rows),
        "validation": (validation, _first_rows(validation, count, "validation", _homes(source, validation))),
    } | {
        f"test {key}": (pool, _first_rows(pool, request.test_samples, f"test/{key}", _homes(source, pool)))
        for key, pool in source.tests.items()
    }

    # If a run reads only part of the training images, a sample identifies them.  The sample is read before images are
    # stored, because the store holds only the rows of the run.
    is_complete = len(train_rows) + len(public_rows) == len(source.train)
    samples = [sample_pool(source.train)] if is_identified and (info.palette or not is_complete) else []
    are_clients = spec.name == "attribute" or clients == 1  # clients that the data name
    reads = [(source.train, torch.cat(client_rows)), *rows.values()]
    with stored_images(reads, request.cache, request.progress):
        splits = tuple(dataclasses.replace(source.train.take(chosen), homes=None) for chosen in client_rows)
        sets = {key: _center_cropped(source, pool.take(chosen), are_clients) for key, (pool, chosen) in rows.items()}
    tests = {key: sets[f"test {key}"] for key in source.tests}
    for split in (sets["validation"], *tests.values()):  # an unreadable mask must fail before the run begins
        if split.full is not None:
            split.full.load_masks()

    # Coloured sets are identified by their grey images, as the seed draws the colours.
    identity: dict[str, str] = {}
    if is_identified and info.palette:
        identity = identify_source(source, {"train": samples, "test": [sample_pool(source.tests[""])]}, [])
    elif is_identified:
        identity = _identify(name, source, splits, sets, samples, names or (), notice)

    client_tests: tuple[Split, ...] = ()
    if names is not None and source.own_tests:
        client_tests = _own_tests(name, source, rows["test "][1], tests[""])
    pools = (source.train, source.validation, *source.tests.values())
    shape = len(source.mean), *sets["validation"].images.shape[2:]
    return FederatedData(
        name=name,
        classes=source.classes,
        clients=splits,
        validation=sets["validation"],
        tests=tests,
        form=ImageForm(shape, source.mean, source.std, source.augment, **source.files),
        statistics=dataclasses.replace(statistics, names=names, own_tests=tuple(map(len, client_tests))),
        image_ids=frozenset(image for pool in pools for image in pool.ids),
        public=sets["public"] if len(public_rows) else None,
        client_tests=client_tests,
        client_names=names,
        drawn_validation=source.drawn_validation,
        identity=identity,
    )


def _center_cropped(source: Source, split: Split, are_clients: bool) -> Split:
    """Return a split that is not augmented: central windows if the source has ``crop``.

    Homes are dropped unless ``are_clients``: only then do the sites that the data name match the clients.
    """
    split = split if are_clients else dataclasses.replace(split, homes=None)
    return cut_central_windows(split, (source.crop, source.crop)) if source.crop else split


def _identify(
    name: str,
    source: Source,
    clients: Sequence[Split],
    sets: Mapping[str, Split],
    samples: Sequence[Split],
    sites: Sequence[str],
    notice: Callable[[str], None],
) -> dict[str, str]:
    """Return the identity of the data, and report equal images.

    ``samples`` represent the training images where a run reads only a part of them.
    """
    used = [*clients, sets["public"]]
    contents = {"train": samples or used} | {key: [split] for key, split in sets.items() if key != "public"}
    pixels: list[bytes] = []
    identity = identify_source(source, contents, pixels)
    if source.compared:
        if samples:  # the hashes so far are those of the sample
            pixels = pixel_hashes(used) + pixels
            contents["train"] = [*used, *samples]
        for text in find_copies(name, source.classes, contents, pixels, sites, source.files.get("outside", "")):
            notice(text)
    return identity


def _subsample_sets(data: FederatedData, common: CommonOptions) -> FederatedData:
    def subsample(split: Split, count: int, purpose: str) -> Split:
        return split if count == 0 or count >= len(split) else split.subset(_first_rows(split, count, purpose))

    tests = {key: subsample(split, common.test_samples, f"test/{key}") for key, split in data.tests.items()}
    validation = subsample(data.validation, common.validation_samples, "validation")
    return dataclasses.replace(data, tests=tests, validation=validation)


def _background_source(
    options: Mapping[str, object],
    common: CommonOptions,
    data: FederatedData,
    make_detector: Callable[[str, float, float], Detector] | None,
    notice: Callable[[str], None] | None,
) -> MaskSource | None:
    """Return the mask source that the options name, or None for the data set's own masks."""
    if common.boxes and common.detector:
        raise UserError("give either a boxes file or a detector to find the objects, not both")
    if common.boxes:
        return BoxesFile(common.boxes, data.image_ids)
    if not common.detector:
        for option in DETECTION_OPTIONS:
            if option in options and option not in ("boxes", "detector"):
                raise UserError(f'option {option} of data set "{data.name}" has no effect without the option detector')
        return None
    if make_detector is None:
        raise UserError(f'the detector "{common.detector}" needs a make_detector that loads it')
    detector = make_detector(common.detector, common.box_threshold, common.text_threshold)
    return Detections(detector, common.detector_cache or None, notice)


def _check_correlation(name: str, info: DatasetInfo, correlation: float | None) -> float:
    if info.correlation is None:
        if correlation is not None:
            coloured = ", ".join(key for key, entry in DATASETS.items() if entry.palette)
            raise UserError(f'data set "{name}" has no colours to correlate; --correlation is for {coloured}')
        return 0.0
    correlation = info.correlation if correlation is None else correlation
    if not 0 <= correlation <= 1:
        raise UserError(f"the correlation between colour and class must lie in [0, 1], got {correlation}")
    return correlation


def _default_partition(name: str, info: DatasetInfo, source: Source) -> PartitionSpec:
    """Return ``attribute`` where the user's files name two or more sites, else the default partition."""
    if source.unnamed or len(source.sites) > 1:
        if source.lost:
            raise UserError(
                f'data set "{name}": all images of {", ".join(source.lost[:4])} in {source.named_by} were drawn into '
                "the test or validation set; name more images there, or the split of every image"
            )
        return parse_partition("attribute" if source.named_by else info.partition)
    return parse_partition(source.train.task.partition or info.partition)


def _unused_sites(source: Source, spec: PartitionSpec) -> Iterator[str]:
    """Yield sentences on named sites that the partition does not use."""
    if not source.named_by:
        return
    named = source.named_by[:1].upper() + source.named_by[1:]
    if not spec.info.by_groups:
        count = f"{len(source.sites)} client{'s' * (len(source.sites) != 1)}" if source.sites else "clients"
        yield f"{named} names {count} and is not used: --partition {spec.text} shares the samples out."
    elif source.lost:
        yield f"{named} names {', '.join(source.lost[:4])} too, which has no training image left and is no client."


def _check_partition(name: str, info: DatasetInfo, source: Source, spec: PartitionSpec, clients: int) -> None:
    if spec.info.needs_classes and (instead := source.train.task.classless(len(source.classes))):
        raise UserError(
            f'data set "{name}" has {instead}, so "{spec.text}" cannot share it out; take iid or quantity:ALPHA, or '
            "attribute with a column client"
        )
    if not spec.info.by_groups:
        return
    if source.unnamed:
        raise UserError(
            f'data set "{name}": some training images name a client and others do not ({source.unnamed} of '
            f"{len(source.train)} in {source.named_by}); name one for all of them, or ask for a --partition that does "
            "not use it"
        )
    if source.groups is None and not (spec.name == "attribute" and info.palette):
        hint = "" if "client_column" not in info.options else ", or name the column of the clients with --client-column"
        raise UserError(
            f'data set "{name}" has no attribute (contexts, sites or colours) to partition by; take iid, '
            f"dirichlet:ALPHA or classes:S{hint}"
        )
    if spec.name == "attribute" and source.groups is not None and clients != source.groups:
        by = f" by {source.named_by}" if source.named_by else ""
        raise UserError(
            f'data set "{name}" assigns its contexts or sites{by} to {source.groups} clients, not {clients}; take '
            f"--clients {source.groups} or another partition"
        )


def _own_tests(name: str, source: Source, rows: Tensor, test: Split) -> tuple[Split, ...]:
    """Return every client's part of ``test``, whose images are ``rows`` of the test pool."""
    groups = source.tests[""].groups
    assert groups is not None
    splits = tuple(test.subset((groups[rows] == k).nonzero().flatten()) for k in range(len(source.sites)))
    for site, split in zip(source.sites, splits, strict=True):
        if not len(split):
            raise UserError(
                f'data set "{name}": test_samples={len(rows)} leaves the site {site} without a test image; take more'
            )
    return splits


def _shares(source: Source, spec: PartitionSpec, rows: Tensor, clients: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Return every client's positions in ``rows``.

    Patients, cases and images with several texts stay whole.  Under ``attribute`` rows go to the clients that the data
    name, if any.
    """
    pool = source.train
    labels, classes = pool.task.shared_classes(pool.labels[rows].numpy(), len(source.classes))
    owners = pool.groups[rows].numpy() if spec.info.by_groups and pool.groups is not None else None
    for k, site in enumerate(source.sites):
        if spec.name == "attribute" and owners is not None and k not in owners:
            raise UserError(f"the client {site} would have no training sample; take more --train-samples")
    units = {name: rows_of(getattr(pool, name), rows) for name in ("ids", "cases", "patients")}
    return share_samples(spec, labels, clients, seed, classes, owners=owners, **units)


def _training_rows(name: str, pool: Pool, request: DataRequest) -> tuple[Tensor, Tensor]:
    """Return the clients' training rows and the public rows, both sorted."""
    count, public, seed = request.train_samples, request.public_samples, request.seed
    own_cases = pool.cases if pool.patients is None else None
    cases = grouped_rows(pool.ids, None, pool.patients) if own_cases is None else own_cases.numpy()
    if cases is not None:
        mine, public_rows = training_cases(name, cases, count, public, seed, unit_noun(pool.cases, pool.patients))
        return torch.from_numpy(mine), torch.from_numpy(public_rows)
    if public >= len(pool):
        raise UserError(
            f'data set "{name}" has {len(pool)} training samples, so it cannot give {public} public ones and train on '
            "the others"
        )
    if count is None:
        count = len(pool) - public
        if not public:
            return torch.arange(len(pool)), torch.arange(0)
    elif not 1 <= count <= len(pool) - public:
        beside = f" beside {public} public ones" if public else ""
        raise UserError(f'data set "{name}" has {len(pool)} training samples, so it cannot give {count}{beside}')
    chosen = stream(seed, "train-samples").choice(len(pool), size=count, replace=False)
    remaining = np.setdiff1d(np.arange(len(pool)), chosen)
    public_rows = stream(seed, "public-samples").choice(remaining, size=public, replace=False)
    return torch.from_numpy(np.sort(chosen).astype(np.int64)), torch.from_numpy(np.sort(public_rows).astype(np.int64))


def _homes(source: Source, pool: Pool) -> npt.NDArray[np.int64] | None:
    return pool.groups.numpy() if source.sites and pool.groups is not None else None


def _first_rows(pool: Pool | Split, count: int, purpose: str, homes: npt.NDArray[np.int64] | None = None) -> Tensor:
    """Return ``count`` rows (0: all) by a fixed random choice, sorted.

    At least one per site if ``count`` allows.
    """
    if count == 0 or count >= len(pool):
        return torch.arange(len(pool))
    order = stream(0, f"subset/{purpose}").permutation(len(pool))
    if homes is not None:
        place = np.empty(len(pool))
        for site in np.unique(homes):
            site_rows = order[homes[order] == site]
            place[site_rows] = (np.arange(len(site_rows)) + 0.5) / len(site_rows)
            place[site_rows[0]] = -1
        order = order[np.argsort(place[order], kind="stable")]
    return torch.from_numpy(np.sort(order[:count]).astype(np.int64))
