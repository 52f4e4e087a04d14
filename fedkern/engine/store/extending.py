"""More rounds for a run: its settings and its last checkpoint, so that resuming goes on."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any

from fedkern.engine import config as settings
from fedkern.engine.config import RunConfig
from fedkern.engine.store import atomic, toml
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.resuming import check_unedited
from fedkern.engine.store.run_folder import NODES
from fedkern.errors import UserError
from fedkern.inputs import read_text
from fedkern.methods import registry
from fedkern.methods.base import Federation, Round


def extend(out: Path | str, rounds: int, *, trusted: Collection[str] = ()) -> RunConfig:
    """Gives a run, finished or not, a larger number of rounds.

    Call :func:`fedkern.engine.run` with the returned settings and ``resume=True`` afterwards.  Where the method has no
    schedule over all rounds (``Method.spans``), the network is then, bit for bit, that of a run that had this number of
    rounds from the start.

    Args:
        out: the run folder.
        rounds: communication rounds in all.
        trusted: plugins that may be executed in any case.

    Returns:
        The run's new settings, which are also written to ``config.toml``.

    Raises:
        UserError: there is no run with a checkpoint, its clients are on nodes of Flower, the method plans its own
            rounds, the run promises differential privacy for its rounds, ``rounds`` is not larger than before, or the
            rounds that were played would have been others in such a run.
    """
    out = Path(out)
    stored = RunConfig.load(out, trusted=trusted, device="cpu")
    kind = registry.get(stored.method)
    options = kind.Options.parse(stored.options, method=stored.method)
    if (out / NODES).exists():
        raise UserError(
            f"The states of the clients of {out} are on nodes of Flower, where no run is extended: start a new run "
            f"with rounds={rounds}."
        )
    if kind.one_shot:
        raise UserError(f"{stored.method} is a one-shot method, whose plan has the rounds it needs: nothing to extend.")
    with atomic.FolderLock(out):
        checkpoints = Checkpoints(out)
        entry = checkpoints.peek() and checkpoints.open()
        if not entry:
            raise UserError(f"The run in {out} has no checkpoint yet: start it again with the rounds it should have.")
        before = int(entry["info"]["config"]["rounds"])
        if kind.promises(options):
            raise UserError(
                f"The run in {out} promises differential privacy for its {before} rounds, and more rounds would cost "
                "more: start a new run with --rounds."
            )
        # An extension that was interrupted between its two writes is finished by the same command.
        half = rounds == before != stored.rounds
        if rounds <= before and not half:
            raise UserError(f"The run in {out} has {before} rounds: --rounds must be larger than that, not {rounds}.")
        check_unedited(stored.replace(rounds=before), entry, out)
        method, done = kind(options), entry["plan"]
        if not half and _plan(method, stored, before, done) != _plan(method, stored, rounds, done):
            raise UserError(
                f"The rounds of {stored.method} with these options depend on their number, so a run of {rounds} rounds "
                f"would have begun otherwise: start a new run with --rounds {rounds}."
            )
        longer = stored.replace(rounds=rounds)
        # From the file, not from `stored`, whose device is this machine's.
        table = RunConfig.table(read_text(out / settings.NAME, "utf-8-sig"))
        text = toml.dumps({**table, "rounds": rounds})
        info = {**entry["info"], "config": {**entry["info"]["config"], "rounds": rounds}, "finished": False}
        info.pop("results", None)
        ended = info.pop("final_warnings", ())  # about a network that is not the final one any more
        info["warnings"] = {name: text for name, text in info["warnings"].items() if name not in ended}
        checkpoints.amend(info)
        atomic.write_bytes(out / settings.NAME, text.encode())
    return longer


def _plan(method: Any, config: RunConfig, rounds: int, done: int) -> list[Round]:
    """The first ``done`` rounds of the plan of a run with this number of rounds."""
    federation = Federation(
        rounds=rounds,
        samples=(config.batch_size,) * config.trained_clients,
        classes=2,
        local_epochs=config.local_epochs,
        unit=config.unit,
    )
    return list(islice(method.rounds(federation), done))
