"""Commands on the ranks of torchrun: the run that a restart of the ranks resumes."""

import pytest
import torch

from fedkern.cli import torchrun
from fedkern.cli.request import Request
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.transport.torchrun_group import LaunchedRank
from fedkern.errors import UserError
from fedkern.settings.config import RunConfig


def launch(**given):
    plain = {"rank": 0, "size": 1, "local": 0, "local_size": 1, "restarts": 0, "max_restarts": 0, "job": "ours"}
    return LaunchedRank(**{**plain, **given})


def test_a_restart_resumes_the_run_that_was_its_own(tmp_path):
    out = tmp_path / "run"
    request = Request("run", method="fedavg", out=out)
    assert torchrun._again(request, launch(restarts=1, max_restarts=2)) is request  # nothing was written
    out.mkdir()
    (out / "config.toml").write_text("")
    assert torchrun._again(request, launch(max_restarts=2)) is request  # the first start: the run is another's
    again = torchrun._again(request, launch(restarts=1, max_restarts=2))
    assert (again.command, again.resume, again.out) == ("resume", out, None)
    checkpoints = Checkpoints(out)
    checkpoints.open()
    checkpoints.commit(round=1, plan=1, server={}, info={"torchrun": "ours"})
    assert torchrun._again(request, launch(restarts=1, max_restarts=2)).command == "resume"
    assert torchrun._again(request, launch(max_restarts=2)).command == "resume"  # restarted for another machine
    assert torchrun._again(request, launch()) is request
    assert torchrun._again(request, launch(restarts=1, max_restarts=2, job="another")) is request


def test_a_restart_needs_a_folder_of_a_name():
    request = Request("run", method="fedavg")
    assert torchrun._again(request, launch()) is request
    with pytest.raises(UserError, match="name the folder with --out"):
        torchrun._again(request, launch(max_restarts=1))


def test_a_restart_of_extend(tmp_path, monkeypatch):
    (tmp_path / "config.toml").write_text(RunConfig.make("fedavg", rounds=7, device="cpu").to_toml())
    asked = Request("extend", folder=tmp_path, arguments={"rounds": 7}, quiet=True)
    assert torchrun._again(asked, launch()) is asked
    again = torchrun._again(asked, launch(restarts=1, max_restarts=1))
    assert (again.command, again.resume, again.quiet) == ("resume", tmp_path, True)
    monkeypatch.setattr(torchrun.torchrun_group, "find_rank", lambda: launch(restarts=1, max_restarts=1, size=1))
    assert torchrun.play_on_ranks(asked, ["extend"], lambda again: int(again.command != "resume")) == 0
    extension = Request("extend", folder=tmp_path, arguments={"rounds": 9})  # the first start did not come so far
    assert torchrun._again(extension, launch(restarts=1, max_restarts=1)) is extension


def test_ranks_take_a_gpu_each(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    request = Request("run", method="fedavg")
    torchrun._take_gpu(request, launch(size=4, rank=3, local=1, local_size=2))
    torchrun._take_gpu(Request("run", method="fedavg", settings={"device": "cpu"}), launch(size=4, local_size=4))
    assert taken == [1]
    with pytest.raises(UserError, match="This machine has 2 GPUs for 4 ranks: give torchrun --nproc-per-node 2, or"):
        torchrun._take_gpu(request, launch(size=4, local_size=4))
    with pytest.raises(UserError, match="a GPU of its own: give --device cuda instead of cuda:1"):
        torchrun._take_gpu(Request("run", method="fedavg", settings={"device": "cuda:1"}), launch(size=2, local_size=2))


def test_only_rank_0_does_what_is_no_run(monkeypatch):
    done = []
    for rank in (0, 1):
        monkeypatch.setattr(torchrun.torchrun_group, "find_rank", lambda rank=rank: launch(rank=rank, size=2))
        code = torchrun.play_on_ranks(Request("list"), ["list"], lambda request: done.append(request.command) or 3)
        assert code == (0 if rank else 3)
    assert done == ["list"]
