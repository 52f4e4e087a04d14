"""More rounds for a run: its settings and its last checkpoint, so that resuming goes on."""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import islice
from pathlib import Path

from fedkern.engine.store.checkpoints import Checkpoints, Entry
from fedkern.engine.store.record_files import Metrics
from fedkern.engine.store.resuming import check_unedited
from fedkern.engine.store.run_folder import ATTACKS, NODES
from fedkern.engine.store.saved_model import RESULTS
from fedkern.errors import UserError
from fedkern.files import atomic
from fedkern.files.inputs import read_json, standing
from fedkern.methods.base import Federation, Method, Round
from fedkern.settings import toml
from fedkern.settings.config import RunConfig
from fedkern.settings.run_format import FOLDER
from fedkern.settings.run_format import NAME as SETTINGS
from fedkern.settings.stored import load_settings, stored_settings

REPORT = "report.html"
PICTURE_LIST = "pictures.json"
"""File with the names of the pictures drawn, which depend on the run's task, network and method."""
_PICTURE = re.compile(r"[a-z0-9_]+\.png")
OF_A_NETWORK = (
    *RESULTS, *ATTACKS.values(), REPORT, PICTURE_LIST,
    *(f"{network}.{form}{more}" for network in ("model", "best") for form in ("onnx", "pt2", "pt")
      for more in ("", ".json")),
    "evaluate.json", "evaluate-*.json",
)  # fmt: skip
"""Files in a run folder that tell of the run's last network, as patterns: the run's, and those of commands on it."""


def check_extension(out: Path, rounds: int | None, *, trusted: Collection[str] = ()) -> int | None:
    """Check that a run, finished or not, may have more rounds.

    Nothing is written.

    Where the method has no schedule over all rounds (``Method.schedule_note``), the network is then, bit for bit, that
    of a run that had this number of rounds from the start.

    Args:
        out: the run folder.
        rounds: communication rounds in all; None: those of ``config.toml``, where an extension was interrupted.
        trusted: plugins that may be executed in any case.

    Returns:
        The communication rounds that the run is to have; None where it goes on with those that it has.

    Raises:
        UserError: there is no run with a checkpoint, its clients are on nodes of Flower, the method plans its own
            rounds, the run promises differential privacy for its rounds, ``rounds`` is not larger than before, or the
            rounds that were played would have been others in such a run.
    """
    stored = load_settings(out, trusted=trusted, device="cpu")
    kind, options, entry = stored.kind, stored.method_options, Checkpoints(out).peek()
    before = None if entry is None else int(entry["info"]["config"]["rounds"])
    if rounds is None:
        if before is None or stored.rounds <= before:
            return None
        rounds = stored.rounds
    if (out / NODES).exists():
        raise UserError(
            f"The states of the clients of {out} are on nodes of Flower, where no run is extended: start a new run "
            f"with rounds={rounds}."
        )
    if kind.one_shot:
        raise UserError(f"{stored.method} is a one-shot method, whose plan has the rounds it needs: nothing to extend.")
    if entry is None or before is None:
        raise UserError(f"The run in {out} has no checkpoint yet: start it again with the rounds it should have.")
    if kind.is_private(options):
        raise UserError(
            f"The run in {out} promises differential privacy for its {before} rounds, and more rounds would cost "
            "more: start a new run with --rounds."
        )
    if rounds <= before:
        raise UserError(f"The run in {out} has {before} rounds: --rounds must be larger than that, not {rounds}.")
    check_unedited(stored.replace(rounds=before), entry, out)
    Metrics(out).check_entry(entry)
    method, done = kind(options), entry["plan"]
    if _plan(method, stored, before, done) != _plan(method, stored, rounds, done):
        raise UserError(
            f"The rounds of {stored.method} with these options depend on their number, so a run of {rounds} rounds "
            f"would have begun otherwise: start a new run with --rounds {rounds}."
        )
    return rounds


def write_extension(checkpoints: Checkpoints, entry: Entry, out: Path) -> bool:
    """Give a run more rounds, and move what was made of the former network to a folder ``round-NNNN``.

    After an interruption between the three writes, ``config.toml`` has the new number of rounds and the last checkpoint
    the old one: the same command, or resuming, finishes the extension.

    Args:
        checkpoints: of the run, opened.
        entry: the newest checkpoint :func:`~fedkern.engine.store.resuming.change_rounds`.
        out: the run folder.

    Returns:
        Whether anything was moved.
    """
    # From the file, not from the run's settings, whose device is this machine's.
    text = toml.dumps({**stored_settings(out), "rounds": entry["info"]["config"]["rounds"]})
    atomic.write_bytes(out / SETTINGS, text.encode())
    set_aside(out, entry["round"])
    checkpoints.amend(entry["info"])
    return aside(out, entry["round"]).exists()


def pictures(out: Path) -> list[str]:
    """Names of the pictures that were drawn into a run folder, as its list says.

    Empty without a list.
    """
    try:
        return [name for name in read_json(out / PICTURE_LIST)["pictures"] if _PICTURE.fullmatch(name)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def aside(out: Path, round: int) -> Path:
    """Folder of a run for what was made of its network after ``round`` rounds, once the run has more."""
    return out / f"round-{round:04d}"


def set_aside(out: Path, round: int) -> None:
    """Move what the run and the commands on it have made of the network after ``round`` rounds to :func:`aside`.

    Raises:
        UserError: the folder is a link, or cannot be made.
    """
    names = [name for pattern in OF_A_NETWORK for name in sorted(path.name for path in out.glob(pattern))]
    for name in [*names, *pictures(out), *(f"{FOLDER}/{name}" for name in ATTACKS.values())]:
        if standing(out / name):
            continue
        target = aside(out, round) / name
        atomic.make_folder(aside(out, round))
        atomic.make_folder(target.parent)
        with atomic.writing(target):
            (out / name).replace(target)


def _plan(method: Method, config: RunConfig, rounds: int, done: int) -> list[Round]:
    """Return the first ``done`` rounds of the plan of a run with this number of rounds."""
    federation = Federation(
        rounds=rounds, samples=(config.batch_size,) * config.trained_clients, classes=2,
        local_epochs=config.local_epochs, unit=config.unit, seed=config.seed,
    )  # fmt: skip
    return list(islice(method.rounds(federation), done))
