"""Events of a run for its listeners."""

from fedkern.engine.executors.choice import worker_bytes
from fedkern.engine.parts.part import Record, RunPart, register_part
from fedkern.listeners.events import RunInfo
from fedkern.messages.states import State
from fedkern.models.state.freezing import frozen_norms


@register_part("listeners")
class Listening(RunPart):
    """Part that passes events to the listeners, and keeps their states."""

    def begin(self, resumed: bool) -> None:
        run, workers = self._run, self._run.executor.count
        info = RunInfo(
            config=run.config, out=run.out, first_round=run.progress.done, samples=run.context.federation.samples,
            parameters=run.parameters,
            frozen=sum(parameter.numel() for parameter in run.network.parameters() if not parameter.requires_grad),
            frozen_norms=len(frozen_norms(run.network)), rounds=tuple(entry for entry in run.plan if not entry.one_off),
            test_sets={prefix[:-1]: len(data) for prefix, data in run.sets.items()}, data=run.context.data,
            private=not run.notices.disclosure.clients, guarantee=run.guarantee, model=run.networks.model_name,
            workers=workers, worker_bytes=worker_bytes(run.context, run.parameters) if workers > 1 else 0,
        )  # fmt: skip
        run.listener.on_start(info)

    def before_round(self, record: Record) -> None:
        self._run.listener.on_round_start(record.number, record.entry.name, record.participants)
        if record.entry.one_off and record.entry.trains:
            self._run.listener.on_notice(f"set-up: {record.entry.trains}")

    def round_end(self, record: Record) -> None:
        if not record.entry.one_off:
            self._run.listener.on_round(record.public)

    def state(self) -> State:
        return self._run.listener.states()

    def restore(self, state: State) -> None:
        self._run.listener.restore_all(state)
