"""Commands on the ranks of torchrun: ``torchrun ... -m fedkern.run METHOD ...``."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from fedkern.cli.request import Request
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.transport import torchrun_group
from fedkern.engine.transport.torchrun_group import LaunchedRank
from fedkern.errors import UserError
from fedkern.settings.config import NAME, load_settings

RUNS = ("run", "resume", "extend")
"""Commands that play a run. Any other command is for rank 0 alone."""


def play_on_ranks(request: Request, words: Sequence[str], handle: Callable[[Request], int]) -> int:
    """Handle a request with ``handle``, under torchrun on all ranks, and return the exit code."""
    launched = torchrun_group.find_rank()
    if launched is None:
        return handle(request)
    if request.command not in RUNS:
        return handle(request) if launched.rank == 0 else 0
    if launched.size == 1:
        return handle(_again(request, launched))
    from fedkern.cli.backend_check import check_backend

    check_backend()
    _take_gpu(request, launched)
    with torchrun_group.join_ranks(launched) as ranks:
        ranks.meet(words)
        if launched.rank:
            from fedkern.engine.executors.ranks import serve

            return serve(ranks)
        code = handle(_again(request, launched))
        ranks.leave(code)
        return code


def _take_gpu(request: Request, launched: LaunchedRank) -> None:
    """Give this rank the GPU of its number on this machine, if any."""
    import torch

    device = request.settings.get("device", "auto")
    if ":" in device:
        raise UserError(f"Every rank of torchrun has a GPU of its own: give --device cuda instead of {device}.")
    if device == "cpu" or not torch.cuda.is_available():
        return
    count = torch.cuda.device_count()
    if count < launched.local_size:
        raise UserError(
            f"This machine has {count} GPU{'s' * (count != 1)} for {launched.local_size} ranks: give torchrun "
            f"--nproc-per-node {count}, or fedkern --device cpu."
        )
    torch.cuda.set_device(launched.local)


def _again(request: Request, launched: LaunchedRank) -> Request:
    """Return the request of this start of the ranks, which after a restart continues the earlier run."""
    if request.command == "run":
        if request.out is None:
            if not launched.max_restarts:
                return request
            raise UserError("torchrun --max-restarts goes on in the run's folder: name the folder with --out.")
        if launched.max_restarts and (request.out / NAME).exists():
            # A restart that another machine asked for is not counted on this one.
            entry = Checkpoints(request.out).peek()
            if launched.restarts if entry is None else entry["info"].get("torchrun") == launched.job:
                return replace(request, command="resume", resume=request.out, out=None, config=None)
    if request.command == "extend" and launched.max_restarts and request.folder is not None:
        stored = load_settings(request.folder, device="cpu")
        if stored.rounds == request.arguments["rounds"]:  # extended before the restart
            return replace(request, command="resume", resume=request.folder, folder=None, arguments={})
    return request
