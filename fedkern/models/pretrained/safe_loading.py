"""Safe loading of pre-trained networks through transformers, with checks of folders and loaded weights."""

import functools
import hashlib
import importlib
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from fedkern.errors import UserError
from fedkern.files.filesystem import describe_file_kind, describe_special_file, expand, read_json
from fedkern.process.extras import import_extra

ADAPTER = "adapter_config.json"
_UNADAPTED = (
    f"a PEFT adapter ({ADAPTER}), whose file names the network that it belongs to and code to load: merge the adapter "
    "into that network with PEFT's merge_and_unload() and save the result with save_pretrained"
)


class Loaded(NamedTuple):
    """Network of transformers with ``missing`` tensors, tokenizer, and contents of preprocessor_config.json."""

    network: Any
    missing: Collection[str]
    tokenizer: Any
    settings: dict[str, Any]


class Pretrained:
    """Image-text network of transformers: a local folder, or a name that transformers resolves.

    A folder may have pytorch_model.bin (loaded with ``weights_only=True``), a network by name must have safetensors.
    """

    def __init__(self, model: str | Path, role: str) -> None:
        self.name, self.role, self.folder = str(model), role, expand(model)
        if not self.folder.is_dir() and (self.folder.is_absolute() or self.name.startswith((".", "~"))):
            raise UserError(f"the {role} folder {self.folder} does not exist.")

    @property
    def identity(self) -> dict[str, str]:
        return {"model": self.name, **({"content": self._content} if self.folder.is_dir() else {})}

    @functools.cached_property
    def _content(self) -> str:
        """Hash of the folder's weights and settings, so that new weights get a new cache."""
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        # With safetensors present, transformers does not read pytorch_model.bin.
        safe = any(path.suffix == ".safetensors" for path in files)
        digest = hashlib.blake2b(digest_size=16)
        for path in files:
            pickled = not safe and path.suffix == ".bin" and path.name.startswith("pytorch_model")
            if path.suffix in (".json", ".safetensors", ".txt") or pickled:
                with path.open("rb") as file:
                    digest.update(path.name.encode())
                    digest.update(hashlib.file_digest(file, "blake2b").digest())
        return digest.hexdigest()

    def load(self, kind: str, user: str, title: str, hint: str = "") -> Loaded:
        """Load the network as transformers' class ``kind``.

        For messages: ``user`` needs the network, ``title`` is the network with its article, ``hint`` is added for
        names.
        """
        local = self.folder.is_dir()
        if local:
            check_folder(self.folder, self.role)
        place = str(self.folder) if local else self.name
        with import_transformers(title, user, place if local else f"{place}{hint}") as transformers:
            if not local and transformers.utils.find_adapter_config_file(place) is not None:
                raise ValueError(f"it is {_UNADAPTED}.")
            network_class = getattr(transformers, kind)
            network, report = network_class.from_pretrained(place, output_loading_info=True, **weight_args(local=local))
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, **without_code(local=local))
            file = transformers.utils.cached_file(
                place, "preprocessor_config.json", local_files_only=local, _raise_exceptions_for_missing_entries=False
            )
            settings = read_json(file) if file else {}
        return Loaded(network, report["missing_keys"], tokenizer, settings)


def without_code(*, local: bool) -> dict[str, bool]:
    """Return arguments of every ``from_pretrained``: no Python code of a folder, no downloads if ``local``."""
    return {"local_files_only": local, "trust_remote_code": False}


def weight_args(*, local: bool) -> dict[str, bool | None]:
    """Return arguments of ``from_pretrained`` that allow pickled weights in ``local`` folders alone."""
    return {**without_code(local=local), "use_safetensors": None if local else True, "weights_only": True}


def check_folder(folder: Path, kind: str) -> None:
    """Raise UserError for a folder with irregular files, or with references to code or weights in other places.

    transformers would wait for a named pipe, and load kernels named in config.json or the base network of an adapter.
    """
    for path in (*folder.iterdir(), *folder.glob("*/*")):
        if fault := describe_special_file(path):
            raise UserError(f"the folder {folder} of the {kind} has {fault}, {path.name}: put a regular file there.")
    if describe_file_kind(folder / ADAPTER) != "missing":
        raise UserError(f"the folder {folder} of the {kind} holds {_UNADAPTED}.")
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return  # transformers reports a missing or damaged file
    if kernels := [name for name in _find_texts(config, "attn_implementation") if "/" in name]:
        raise UserError(
            f"the config.json of the {kind} in {folder} names code to be downloaded and run (attn_implementation "
            f"{kernels[0]}): take that entry out."
        )


def _find_texts(value: object, ending: str) -> Iterator[str]:
    """Yield the strings in a JSON value with keys that end in ``ending``."""
    waiting = [value]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, list):
            waiting += entry
        elif isinstance(entry, dict):
            waiting += entry.values()
            yield from (text for key, text in entry.items() if key.endswith(ending) and isinstance(text, str))


@contextmanager
def import_transformers(title: str, user: str, where: str | Path) -> Iterator[ModuleType]:
    """Import transformers, silence it, and turn its errors into one sentence."""
    transformers = import_extra(f"the {user} needs transformers", "foundation", "transformers")
    try:
        with quiet(transformers):
            yield transformers
    except Exception as error:  # transformers raises many exception types for a wrong folder or name
        if "trust_remote_code" in str(error):
            raise UserError(
                f"cannot load {title} from {where}: it comes with Python code of its own, which is not run; take a "
                "network that transformers has the code of."
            ) from error
        raise UserError(f"cannot load {title} from {where}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def check_complete(name: str, network: nn.Module, used: nn.Module, missing: Collection[str]) -> None:
    """Raise UserError if the folder has no values for tensors of ``used``, which transformers initialises at random.

    ``used`` is ``network`` or a part of it, ``missing`` the ``missing_keys`` of the loading report.
    """
    needed = {id(tensor) for tensor in used.state_dict(keep_vars=True).values() if tensor.is_floating_point()}
    state = network.state_dict(keep_vars=True)
    absent = [key for key in state if key in missing and id(state[key]) in needed and not key.endswith("mask_token")]
    if absent:
        raise UserError(
            f"the {name} lacks {len(absent)} of the {len(needed)} tensors of the "
            f"{getattr(network.config, 'model_type', 'network')} that its config.json describes, such as "
            f"{', '.join(absent[:3])}: copy the folder's weights anew, all of them, or give it the config.json that "
            "they were saved with."
        )


@contextmanager
def quiet(transformers: ModuleType) -> Iterator[None]:
    """Silence transformers and the hub's client, because fedkern reports failures itself, and keep them from asking.

    For a sub-network in config.json, transformers asks on standard input whether to run its code, even with
    ``trust_remote_code=False``.  With no time for an answer it raises instead.
    """
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    chatter = transformers.utils.logging
    has_progress_bar = chatter.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    chatter.disable_progress_bar()
    code = importlib.import_module("transformers.dynamic_module_utils")
    patience = getattr(code, "TIME_OUT_REMOTE_CODE", 0)
    code.TIME_OUT_REMOTE_CODE = 0  # type: ignore[attr-defined]
    try:
        yield
    finally:
        code.TIME_OUT_REMOTE_CODE = patience  # type: ignore[attr-defined]
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if has_progress_bar:
            chatter.enable_progress_bar()
