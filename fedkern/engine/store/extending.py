"""Extension of a run by more rounds, in its settings and its last checkpoint."""

import re
from collections.abc import Collection
from itertools import islice
from pathlib import Path

from fedkern.engine.store.checkpoints import Checkpoints, Entry
from fedkern.engine.store.record_files import Metrics
from fedkern.engine.store.resuming import check_unedited
from fedkern.engine.store.run_folder import ATTACKS, NODES, RESULTS
from fedkern.errors import UserError
from fedkern.files import atomic, toml
from fedkern.files.filesystem import describe_file_kind, read_json
from fedkern.methods.base import Federation, Method, Round
from fedkern.settings.config import FOLDER, RunConfig, load_settings, stored_settings
from fedkern.settings.config import NAME as SETTINGS

REPORT = "report.html"
PICTURE_LIST = "pictures.json"
"""File with the names of the drawn pictures, which depend on the run's task, network and method."""
_PICTURE = re.compile(r"[a-z0-9_]+\.png")
OF_A_NETWORK = (
    *RESULTS, *ATTACKS.values(), REPORT, PICTURE_LIST,
    *(f"{network}.{form}{suffix}" for network in ("model", "best") for form in ("onnx", "pt2", "pt")
      for suffix in ("", ".json")),
    "evaluate.json", "evaluate-*.json",
)  # fmt: skip
"""Patterns of files about the run's last network: the run's, and those of commands on the run."""


def check_extension(out: Path, rounds: int | None, *, trusted: Collection[str] = ()) -> int | None:
    """Check, without writing, that a run, finished or not, may have more rounds.

    Without a schedule over all rounds (``Method.schedule_note``), the extended network is, bit for bit, that of a run
    with this number of rounds from the start.

    Args:
        rounds: communication rounds in all; None: those of ``config.toml``, of an interrupted extension.

    Returns:
        The run's future communication rounds, or None if they stay.

    Raises:
        UserError: there is no run with a checkpoint, its clients are on nodes of Flower, the method plans its own
            rounds, the run promises differential privacy for its rounds, ``rounds`` is not larger than before, or such
            a run would have begun with other rounds.
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
    """Give a run more rounds, move the former network's results to ``round-NNNN``, and return whether any moved.

    After an interruption between the three writes, ``config.toml`` has the new number of rounds and the last checkpoint
    the old one: the same command, or resuming, finishes the extension.
    """
    # From the file, as the run's settings have this machine's device.
    text = toml.dumps({**stored_settings(out), "rounds": entry["info"]["config"]["rounds"]})
    atomic.write_bytes(out / SETTINGS, text.encode())
    folder = former_results_folder(out, entry["round"])
    names = [name for pattern in OF_A_NETWORK for name in sorted(path.name for path in out.glob(pattern))]
    for name in [*names, *pictures(out), *(f"{FOLDER}/{name}" for name in ATTACKS.values())]:
        if describe_file_kind(out / name):
            continue
        atomic.make_folder(folder)
        atomic.make_folder((folder / name).parent)
        with atomic.report_unwritable(folder / name):
            (out / name).replace(folder / name)
    checkpoints.amend(entry["info"])
    return folder.exists()


def pictures(out: Path) -> list[str]:
    try:
        return [name for name in read_json(out / PICTURE_LIST)["pictures"] if _PICTURE.fullmatch(name)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def former_results_folder(out: Path, round: int) -> Path:
    """Return the folder for results of a run's network after ``round`` rounds, once the run has more."""
    return out / f"round-{round:04d}"


def _plan(method: Method, config: RunConfig, rounds: int, done: int) -> list[Round]:
    federation = Federation(
        rounds=rounds, samples=(config.batch_size,) * config.trained_clients, classes=2,
        local_epochs=config.local_epochs, unit=config.unit, seed=config.seed,
    )  # fmt: skip
    return list(islice(method.rounds(federation), done))
