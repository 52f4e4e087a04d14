"""Times of checkpoints, and their content beside states."""

import time

from fedkern.engine.parts.part import Record, RunPart, Summary, register_part
from fedkern.engine.store import record_files
from fedkern.engine.store.run_folder import checksum_results
from fedkern.errors import NoEffect, UserError
from fedkern.files.atomic import Unwritable
from fedkern.messages.states import State


@register_part("checkpoints")
class Checkpointing(RunPart):
    """Part that commits after every one-off round, every few communication rounds, and the last one."""

    def before_round(self, record: Record) -> None:
        self._run.store.check_lock()

    def round_end(self, record: Record) -> None:
        run, store, progress = self._run, self._run.store, self._run.progress
        due = record.entry.one_off or progress.done % run.config.checkpoint_every == 0
        if not (due or record.last or record.stop is not None):
            return
        begun = time.perf_counter()
        store.check_lock()
        info = self._info(finished=False)
        try:
            store.checkpoints.commit(
                round=progress.done, plan=progress.planned, server=run.server.state,
                participation=run.participation.state(), messages=run.participation.in_flight(), info=info,
                before=store.metrics.sync, booked=run.ledger.changed_rows(),
            )  # fmt: skip
        except UserError as error:
            # After a full disk, a run must be resumable.
            if store.checkpoints.entries or isinstance(error, Unwritable):
                raise
            raise NoEffect(str(error)) from None
        if store.releases is not None:
            store.releases.forget(store.checkpoints.entries[0]["plan"])
        run.timing.add({"checkpoint": time.perf_counter() - begun})

    def finish(self, summary: Summary) -> None:
        store = self._run.store
        store.checkpoints.amend({**self._info(finished=True), "results": checksum_results(store.out)})

    def _info(self, finished: bool) -> State:
        store = self._run.store
        return dict(record_files.plain({**store.facts, **store.part_states(), "finished": finished}))
