"""Registry of data sets: description, defaults and options."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedkern.data.data_option import COMMON_OPTIONS, READING, CommonOptions
from fedkern.data.sharing.coloured import PALETTES, Palette
from fedkern.data.sharing.partition import parse_partition
from fedkern.data.sources.captions import CLIENTS, PROMPTS, make_captions
from fedkern.data.sources.cifar import open_cifar10, open_cifar100, open_svhn
from fedkern.data.sources.data_function import DataFunction
from fedkern.data.sources.digits import open_digits
from fedkern.data.sources.idx import open_idx
from fedkern.data.sources.labelled_images import CSV_TASKS, open_csv, open_folder, open_pairs, open_segmentation
from fedkern.data.sources.listing import Reading
from fedkern.data.sources.segdigits import open_segdigits
from fedkern.data.sources.site_folders import LAYOUTS
from fedkern.data.sources.table import AUTO
from fedkern.data.types import DataRequest, FederatedData, Source
from fedkern.errors import UserError, suggest_name
from fedkern.tasks import CLASSIFICATION, RETRIEVAL, SEGMENTATION, TASKS, Task
from fedkern.typed_option import Option, Value
from fedkern.usercode import named_code
from fedkern.usercode.registry import Registry

PROMPT = "a photo of a {class}."
"""Default template of zero-shot prompts."""


@dataclass(frozen=True)
class DatasetInfo:
    """Registry entry of a data set.

    Attributes:
        make: returns a source, which the partition shares out, or federated data; None for data in a program's memory.
        correlation: default, between colour and class; None without colours.
        options: accepted ones, besides `COMMON_OPTIONS`.
        prompts: zero-shot prompts: one template, or prompts by class.
        task: task, unless the labels say another.
    """

    description: str
    make: Callable[[DataRequest], Source | FederatedData] | None
    clients: int
    partition: str
    correlation: float | None = None
    palette: Palette | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    prompts: str | Mapping[str, tuple[str, ...]] = PROMPT
    task: Task = CLASSIFICATION
    function: DataFunction | None = None


def _own_files(reader: Callable[..., Source]) -> Callable[[DataRequest], Source]:
    """Adapt a reader of user files to a request, with the image options as one `Reading`."""

    def make(request: DataRequest) -> Source:
        own = {name: value for name, value in request.options.items() if name not in Reading.__dataclass_fields__}
        return reader(request.root, Reading.of(request), **own)

    return make


_MASK = {
    "mask": Option(
        "exact",
        "object masks of training images: every pixel of ink, or its bounding box, as a detector would give it",
        choices=("exact", "box"),
    )
}

_LAYOUT = {
    "layout": Option(
        "auto", "folders in folders: sites, or patients in classes; auto: sites, but names of patients are refused",
        choices=LAYOUTS,
    )
}  # fmt: skip

_HELD = {
    "path": "the image files", "image": "the image files", "mask": "the mask files", "label": "the labels",
    "text": "the texts", "split": "the splits", "labels": "several labels an image, joined by |",
}  # fmt: skip


def _columns(*options: str) -> dict[str, Option]:
    """Return options that name columns of a CSV file, see `fedkern.data.sources.table.open_table`."""
    named = {name: Option("", f"CSV column with {_HELD[name]}, by default found by its name") for name in options}
    return named | {
        "patient": Option(
            AUTO, "CSV column with the patients, auto: found by its name, empty: no column names patients"
        ),
        "client_column": Option(
            "", "CSV column with the client of every row; by default client, site or hospital, if present"
        ),
    }


DATASETS: Registry[DatasetInfo] = Registry("data set", {
    "colordigits": DatasetInfo(
        "embedded digits on backgrounds coloured by class and client; out-of-distribution test with random colours",
        lambda request: open_digits(), 5, "attribute", 0.7, PALETTES["white"], _MASK,
    ),
    "colormnist": DatasetInfo(
        "MNIST on backgrounds coloured by class and client; out-of-distribution test with random colours",
        lambda request: open_idx("mnist", request.root), 5, "attribute", 0.5, PALETTES["contrast"], _MASK,
    ),
    "colorfashion": DatasetInfo(
        "Fashion-MNIST on backgrounds coloured by class and client; out-of-distribution test with random colours",
        lambda request: open_idx("fashionmnist", request.root), 5, "attribute", 0.5, PALETTES["contrast"], _MASK,
    ),
    "digits": DatasetInfo(
        "UCI's 1,797 handwritten digits enlarged to 32x32; needs no file",
        lambda request: open_digits(), 5, "dirichlet:0.5",
    ),
    "captions": DatasetInfo(
        "embedded digits on textured canvases with captions; clients differ in look and words, one is a small minority",
        lambda request: make_captions(request, **request.options), CLIENTS, "attribute", prompts=PROMPTS,
        task=RETRIEVAL,
        options={
            "minority": Option(0.05, "the last client's share of the canvases; 0 for no minority", low=0, high=0.5),
            "minority_trait": Option(
                "concepts", "what sets the minority apart: words and concepts of its own, or noise on its images",
                choices=("concepts", "noise"),
            ),
            "held_out": Option(1, "clients that do not train; their canvases are the test set unseen", low=0),
            "labels": Option(
                "digit", "what zero-shot and probe tell of a canvas's subject", choices=("digit", "colour")
            ),
        },
    ),
    "segdigits": DatasetInfo(
        "embedded digits on textured grounds; segmentation into background and ten digits; needs no file",
        lambda request: open_segdigits(), 5, "dirichlet:0.5", task=SEGMENTATION,
    ),
    "mnist": DatasetInfo(
        "MNIST, 70,000 handwritten digits (IDX files)",
        lambda request: open_idx("mnist", request.root), 10, "dirichlet:0.5",
    ),
    "fashionmnist": DatasetInfo(
        "Fashion-MNIST, 70,000 pictures of clothes (IDX files)",
        lambda request: open_idx("fashionmnist", request.root), 10, "dirichlet:0.5",
    ),
    "cifar10": DatasetInfo(
        "CIFAR-10, 60,000 colour images of 10 classes (official binary files)",
        lambda request: open_cifar10(request.root), 10, "dirichlet:0.5",
    ),
    "cifar100": DatasetInfo(
        "CIFAR-100, 60,000 colour images of 100 classes (official binary files)",
        lambda request: open_cifar100(request.root, **request.options), 10, "dirichlet:0.5",
        options={"labels": Option("fine", "100 fine classes or 20 coarse ones", choices=("fine", "coarse"))},
    ),
    "svhn": DatasetInfo(
        "SVHN, 99,289 photographed house numbers (official MATLAB files)",
        lambda request: open_svhn(request.root), 10, "dirichlet:0.5",
    ),
    "folder": DatasetInfo(
        "your own images, sorted into folders: train/CLASS and test/CLASS, or CLASS alone; for sites in SITE/...",
        _own_files(open_folder), 5, "dirichlet:0.5", options={**READING, **_LAYOUT},
    ),
    "csv": DatasetInfo(
        "your own images, listed in a CSV file with the columns path,label (or labels: a|b)[,split][,client]",
        _own_files(open_csv), 5, "dirichlet:0.5",
        options={
            **READING,
            "task": Option("auto", "what is learnt, where the columns do not tell", choices=CSV_TASKS),
            "order": Option("", "the classes in their order, separated by | (default: sorted)"),
            **_columns("path", "label", "labels", "split"),
        },
    ),
    "segmentation": DatasetInfo(
        "your own images with masks: folders images and masks, or a CSV file with image,mask[,split][,client]",
        _own_files(open_segmentation), 5, "iid",
        options={
            **READING,
            **_LAYOUT,
            "names": Option("", "classes separated by |, background first (default: numbers)"),
            "ignore": Option(-1, "value in the masks where the class is not known, -1 for none", low=-1, high=255),
            **_columns("image", "mask", "split"),
        },
        task=SEGMENTATION,
    ),
    "pairs": DatasetInfo(
        "your own images with captions: image.jpg and image.txt, or a CSV file image,text[,label][,split][,client]",
        _own_files(open_pairs), 5, "iid", task=RETRIEVAL,
        options={
            **READING,
            **_LAYOUT,
            "crop": Option(
                0, "side of the window that networks see, anywhere in training images, central in others; 0: whole "
                "images", low=0,
            ),
            "longest": Option(112, "words kept of a text", low=1),
            **_columns("image", "text", "label", "split"),
        },
    ),
    "arrays": DatasetInfo(
        "arrays in memory, given through Python (fedkern.FederatedData.from_arrays)", None, 5, "attribute",
    ),
    "datasets": DatasetInfo(
        "data sets of PyTorch, given through Python (fedkern.simulate(METHOD, data=[...], test=...))", None, 5, "iid",
    ),
    "captioned": DatasetInfo(
        "data sets of PyTorch whose images have texts, given through Python", None, 5, "iid", task=RETRIEVAL,
    ),
}, code=lambda info: info.function and info.function.function)  # fmt: skip


def data_names() -> list[str]:
    """Return the names that a user may give: all but those of data in a program's memory."""
    return [name for name, info in DATASETS.items() if info.make is not None]


def lookup(name: str) -> DatasetInfo:
    """Return the registry entry of a data set.

    Raises:
        UserError: an unknown name (the message suggests the nearest one), or code that a run folder names.
    """
    name = named_code.absolute(name)
    if name not in DATASETS:
        hint = suggest_name(name, data_names())
        if named_code.parse(name) is not None:
            raise UserError(f"the data set {name} is code, which a run folder may not name alone: give --data {name}.")
        if "/" in name or os.path.exists(name):  # noqa: PTH110 (the name may be too long)
            hint = f" Your own images are --data folder, or csv for a list of them, with --data-root {name}."
            hint = " Your own function is --data FILE.py:NAME." if name.endswith(".py") else hint
        if name.lower().endswith((".npy", ".npz")):
            hint = f" Arrays need a function that loads them: --data FILE.py:NAME --data-root {name}."
        if name.lower().endswith((".nii", ".nii.gz", ".dcm")):
            hint = suggest_name("nifti", DATASETS)
        raise UserError(f'unknown data set "{name}": expected one of {", ".join(data_names())}.{hint}')
    return DATASETS[name]


def _find_option(data: str, key: str) -> Option:
    """Return an option labelled for messages, or raise UserError for an unknown key."""
    choices = {**lookup(data).options, **COMMON_OPTIONS}
    if key not in choices:
        hint = suggest_name(key, choices)
        raise UserError(f'data set "{data}" has no option "{key}": expected one of {", ".join(choices)}.{hint}')
    return dataclasses.replace(choices[key], name=key, label=f'option {key} of data set "{data}"')


def given_options(name: str, options: Mapping[str, object]) -> dict[str, Value]:
    """Convert the given options and make paths absolute, without defaults, see :func:`read_options`."""
    return {key: _find_option(name, key).read(value) for key, value in options.items()}


def read_options(name: str, options: Mapping[str, object]) -> tuple[dict[str, Value], CommonOptions]:
    """Check options, fill in defaults, and return the data set's own and the common ones."""
    given: dict[str, Any] = {key: _find_option(name, key).convert(value) for key, value in options.items()}
    own = {key: given.pop(key, option.default) for key, option in lookup(name).options.items()}
    return own, CommonOptions(**given)


F = TypeVar("F", bound=Callable[..., Any])
_DECLARED = "_fedkern_data"
"""Function attribute that holds the arguments of `register_data`."""


def register_data(
    name: str, *, clients: int = 10, partition: str | None = None, task: str = "classification", prompts: str = PROMPT
) -> Callable[[F], F]:
    """Register a function as a data set, for ``--data NAME`` in a plugin and for ``--data FILE.py:FUNCTION``.

    The function returns one of three things:

    - :class:`fedkern.data.Source`: fixed pools, which the partition shares out;
    - :class:`fedkern.data.FederatedData`: samples that are already assigned to clients;
    - a pair (training, test) of PyTorch data sets, as :meth:`fedkern.data.FederatedData.from_datasets` takes them.
      Training data are a dict or list of the clients' data sets, or one data set to share out.

    It is called with those of the arguments ``root`` (``--data-root``), ``clients``, ``partition`` (a text) and
    ``seed`` that its signature has.  A parameter ``reading`` gets a :class:`fedkern.data.Reading` of the image-file
    options (`fedkern.data.READING`), which the data set then accepts.  Every other parameter is an option of the data
    set, given as ``--data-option key=value``.  Its default is a text, a number or a :class:`fedkern.data.Option`, and
    decides the option's type.

    Args:
        name: the data set's name; ``list`` shows the first line of the docstring.
        clients: default number of clients.
        partition: default partition; None: ``dirichlet:0.5``, and ``iid`` for several labels per image.
        task: a name in `fedkern.tasks.TASKS`, such as ``"segmentation"``; labels for ``"multilabel"`` are uint8
            ``[n, L]``, 1 where an image has the label.
        prompts: template of zero-shot prompts, with ``{class}`` for a class's name.

    Raises:
        ValueError: another function has the name, or ``clients``, ``partition`` or ``task`` is invalid.
        TypeError: a name has no docstring, or a parameter cannot be an option.
    """
    if (kind := TASKS.get(task)) is None:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, given {task!r}")
    shares = partition or kind.partition or "dirichlet:0.5"
    parse_partition(shares)
    if clients < 1:
        raise ValueError(f"clients: expected at least 1, given {clients}")

    def add(function: F) -> F:
        description = DATASETS.describe(name, function, "" if named_code.parse(name) is None else name)
        entry = DataFunction(name, function, kind, clients, shares)
        DATASETS[name] = DatasetInfo(
            description=description, make=entry.make, clients=clients, partition=shares, options=entry.options,
            prompts=prompts, task=kind, function=entry,
        )  # fmt: skip
        with suppress(AttributeError):  # an object without attributes
            function.__dict__[_DECLARED] = {"clients": clients, "partition": shares, "task": task, "prompts": prompts}
        return function

    return add


def open_code(text: str) -> str:
    """Register the function ``FILE.py:NAME`` or ``MODULE:NAME`` as a data set, and return its absolute name.

    A function decorated with `register_data` keeps its settings; other texts are returned unchanged.  Only the user's
    input may get here: nothing that a run folder names is imported.
    """
    named = named_code.parse(text)
    if named is None or str(named) in DATASETS:
        return named_code.absolute(text)
    function, _ = named_code.load(named, "the data set")
    if not callable(function):
        raise UserError(f"the data set {named} is {type(function).__name__}, not a function that returns data.")
    try:
        register_data(str(named), **getattr(function, "__dict__", {}).get(_DECLARED, {}))(function)
    except (TypeError, ValueError) as error:
        raise UserError(f"the data set {named} cannot be registered: {error}.") from None
    return str(named)
