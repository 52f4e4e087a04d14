"""Networks of a finished run, read from model.safetensors and best.safetensors as modules."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from fedkern import models
from fedkern.acceleration import plain
from fedkern.data.forms import form_of
from fedkern.engine.client import BUFFERS, PERSONAL, check_own_entries
from fedkern.engine.context import RunContext
from fedkern.engine.local.network import Network
from fedkern.engine.server import Server
from fedkern.engine.store.checkpoints import Checkpoints, advise_rewriting, check_results, checksum, read_newest
from fedkern.engine.store.resuming import load_unedited
from fedkern.engine.store.run_folder import BEST, FORMAT, MODEL, RUNNING, norms
from fedkern.errors import UserError, describe_error, first_of, format_value, require_format
from fedkern.files.filesystem import parse_json
from fedkern.process.torch_modes import reproducible
from fedkern.settings.config import check_format, check_regular, check_run_folder, load_plugins
from fedkern.tasks import Task, task_named
from fedkern.tasks.protocols import Description
from fedkern.tasks.user_tasks import user_module
from fedkern.usercode import named_code


@dataclass(frozen=True)
class Outline:
    """Stand-in for a run's federated data without images: enough for a method to build its module."""

    classes: tuple[str, ...]
    form: Any
    client_sizes: tuple[int, ...]
    task: Task
    clients: tuple[()] = ()
    tests: Mapping[str, Any] = field(default_factory=dict)
    public: None = None


def describe(text: str | None, path: Path) -> dict[str, Any]:
    """Return the description in model.safetensors, from the JSON of its metadata.

    Raises:
        OtherFormat: the file has another format.
        ValueError: the text is not a JSON object that names a network.
    """
    about = None if text is None else parse_json(text)
    if not isinstance(about, dict):
        raise ValueError("it does not say what network it holds")
    require_format(path, about.pop("format", None), FORMAT)
    if not isinstance(about.get("model"), str) or not isinstance(about.get("method"), str):
        raise ValueError("it does not name its network and method")
    return about


@reproducible()
def read_model(
    out: Path | str,
    trusted: Collection[str] = (),
    model: nn.Module | None = None,
    *,
    best: bool = False,
    client: int | None = None,
) -> tuple[nn.Module, Description]:
    """Read the network that a finished run evaluated last, in eval mode on the CPU.

    The run's own network is built from its name alone. Any other module (fused clients, an ensemble) is built by the
    method from the checkpoint, and then loads the tensors. A network evaluated without running statistics uses each
    batch's.

    Args:
        trusted: code that may be imported (see :func:`fedkern.load`).
        model: a module like the one that the run was given.
        best: read the network of the best round (``--patience``).
        client: read this client's own network.

    Returns:
        The module, and its description: ``classes``, ``channels``, ``image_size``, ``mean`` and ``std`` (of images in
            [0, 1]), ``model``, ``width``, ``method`` and ``rounds``, and for image-text data ``pair``, the arguments of
            ``build_pair``.

    Raises:
        UserError: no finished run, a missing, damaged or foreign file, untrusted code, or a missing ``client`` or
            state.
    """
    if best and client is not None:
        raise UserError("best=True is the global network, without what clients keep to themselves: leave client out.")
    # Description and tensors, from a file that may be missing, damaged or of an unfinished run.
    check_regular(out)
    check_format(Path(out))
    path, mend = (Path(out) / BEST, "put the file back") if best else (Path(out) / MODEL, advise_rewriting(out))
    try:
        (Path(out) / MODEL).stat()  # an extended run has a best network before it is finished
        with safe_open(path, framework="pt") as file:
            about = describe((file.metadata() or {}).get("fedkern"), path)
        tensors = load_file(path)
    except (FileNotFoundError, NotADirectoryError):
        check_run_folder(out)
        way_out = f"its run is not finished, continue it with --resume {shlex.quote(str(out))}"
        if finished := (Path(out) / MODEL).exists():
            way_out = "a run with --patience keeps it; take --network last (in Python best=False)"
        raise UserError(f"{out} has no {BEST if finished else MODEL}: {way_out}.") from None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): {mend}.") from None
    # Networks that the file alone cannot restore.
    if best and "samples" in about:
        raise UserError(
            f"{path} holds a module of {about['method']}, built from the server's state in round {about['rounds']}, "
            "which no checkpoint keeps: take --network last (in Python best=False)."
        )
    if client is None and "personal" in about:
        raise UserError(
            f"The clients of {out} keep {first_of(about['personal'], 3)} to themselves, which {path.name} has as it "
            f"began: name a client, fedkern.load({str(out)!r}).model(client=0)."
        )
    # Code that only the file names, and modules of scripts, which the caller gives again.
    name = about["model"]
    if named_code.parse(name) is not None and not named_code.trusts(trusted, name):
        raise named_code.refuse_untrusted(path, name, "it again", f"--model {shlex.quote(name)}")
    if model is None and name.startswith(named_code.INSTANCE):
        raise UserError(
            f"{path} holds a module that a script made ({name.removeprefix(named_code.INSTANCE)}): give such a module "
            "to fedkern.load(DIR, model=MODULE)."
        )
    # The module, from the network's name or by the method.
    module = model if name.startswith(named_code.INSTANCE) else None
    try:
        with models.available(name, module):
            network = _rebuilt(Path(out), about, trusted) if "samples" in about else _plain(about, Path(out), trusted)
    except UserError:
        raise
    except Exception as error:  # what describes no network may fail anywhere
        raise UserError(f"{path} is damaged (no network is as it says: {describe_error(error)}): {mend}.") from None
    # The tensors, after a check that the run wrote them.
    check_results(Path(out), MODEL)
    if best and (entry := read_newest(Path(out))) is not None:
        written = entry["info"]["parts"].get("patience", {}).get("best", {})
        if checksum(path) != written.get("sum"):
            raise UserError(f"{path} is not what the run wrote: {mend}.")
    if about.get("statistics") == "batch":
        _forget_statistics(network, tensors)
    try:
        network.load_state_dict(tensors)
    except RuntimeError:
        kind = f"module of {about['method']}" if "samples" in about else name
        raise UserError(f"{path} does not hold the parameters of a {kind}: {mend}.") from None
    if client is not None:
        with models.available(name, module):
            network = _of_client(network, about, Path(out), trusted, client)
    return plain(network).eval(), about


def _forget_statistics(module: nn.Module, state: Collection[str]) -> None:
    """Let each batch norm without running statistics in the state dict use the batch's own."""
    for name, layer in norms(module):
        if f"{name}.running_mean".removeprefix(".") not in state:
            layer.track_running_stats = False
            for buffer in RUNNING:
                setattr(layer, buffer, None)


def _plain(about: Description, out: Path, trusted: Collection[str]) -> nn.Module:
    if "pair" not in about and about["model"] not in models.MODELS:
        load_plugins(out, trusted)
    return form_of(about).build(
        task_named(about["task"]), {**about, "classes": len(about["classes"])}, about.get("seed", 0)
    )


def _rebuilt(out: Path, about: Description, trusted: Collection[str]) -> nn.Module:
    context = _context(out, about, trusted, about["samples"])
    state = Checkpoints(out).last_server_state()
    if state is None:
        method = context.config.method
        raise UserError(f"{out} has no checkpoint left, without which the module of {method} cannot be rebuilt.")
    module = context.config.new_method().model(Server(context, state))
    if module is None:
        raise UserError(f"{out} holds the checkpoint of a run that is not finished.")
    return module


def _context(out: Path, about: Description, trusted: Collection[str], sizes: Sequence[int]) -> RunContext:
    """Return the context of a finished run, without data, whose clients have ``sizes`` samples."""
    config = load_unedited(out, trusted=trusted, device="cpu")
    config = config.replace(init=None, choose="uniform")  # files that only the rounds needed, and that may be gone
    config.refuse_untrusted_code(out, trusted)
    outline = Outline(tuple(about["classes"]), form_of(about), tuple(sizes), task_named(about["task"]))
    return RunContext(config, outline, described={name: about[name] for name in ("pair",) if name in about})


def _of_client(network: nn.Module, about: Description, out: Path, trusted: Collection[str], client: int) -> nn.Module:
    config = load_unedited(out, trusted=trusted, device="cpu")
    count = config.trained_clients
    if not config.own_networks or "samples" in about:
        raise UserError(f"The clients of {out} have no networks of their own beside the global one: leave client out.")
    if type(client) is not int or not 0 <= client < count:
        raise UserError(f"client must be a number from 0 to {count - 1}, not {format_value(client)}.")
    context, state = _context(out, about, trusted, [1] * count), Checkpoints(out).last_client_state(client)
    check_own_entries(context, state, client)
    module = context.networks.build()
    user_module(module).load_state_dict(user_module(network).state_dict(), strict=False)  # which may lack statistics
    wrapper = Network(module, torch.device("cpu"))
    stand_in: Any = SimpleNamespace(id=client, state=state)
    try:
        wrapper.write({**config.new_method().own_vectors(stand_in, wrapper.read()), **state.get(BUFFERS, {})})
        wrapper.write_personal(state.get(PERSONAL, {}))
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise UserError(f"The checkpoint in {out} is damaged (the state of client {client}: {error}).") from None
    client_network = _plain(about, out, trusted)
    client_network.load_state_dict(wrapper.module.state_dict())
    if about.get("statistics") == "batch" and BUFFERS not in state:
        _forget_statistics(client_network, network.state_dict())
    return client_network
