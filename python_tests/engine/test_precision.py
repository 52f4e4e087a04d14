"""--precision: networks in bf16, everything else in fp32."""

import dataclasses
import math
from collections import defaultdict
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

import fedkern
from fedkern import models
from fedkern.downstream.saved_network import read_model
from fedkern.engine.context import RunContext
from fedkern.engine.local.network import Network
from fedkern.engine.run import run
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import ClientFailed, UserError
from fedkern.methods import METHODS, FedAvg
from fedkern.methods.fedgid import FedGID
from fedkern.models.precision import DTYPES, compute_in, reduced_dtype
from fedkern.settings.config import RunConfig, load_settings
from python_tests.hearing import Hearing
from python_tests.interrupted import KillAt, outcome, play_killed
from python_tests.smallest import SETTINGS

BF16 = {"precision": "bf16"}


def tensors(value):
    """Yield all tensors in nested dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for entry in value.values() for x in tensors(entry)] if isinstance(value, dict) else []


# -- every method ----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_runs_and_keeps_fp32(method, make_small, tmp_path):
    config, data = make_small(method, 2, grad_cam=4, **BF16)
    summary = run(config, out=tmp_path, data=data)
    assert all(math.isfinite(value) for name, value in summary["metrics"].items() if not name.endswith("hd95"))
    kept = load_file(tmp_path / "model.safetensors")
    assert all(bool(torch.isfinite(x).all()) for x in kept.values())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.open(fresh=False)
    states = [checkpoints.server_state(), *(checkpoints.client_state(k) for k in range(config.clients))]
    found = [*kept.values(), *(x for state in states for x in tensors(state))]
    assert not {x.dtype for x in found} & {torch.bfloat16, torch.float16}
    network, _ = read_model(tmp_path, client=0 if METHODS[method].keeps_head else None)
    assert {p.dtype for p in network.parameters()} == {torch.float32}


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["fedavg", "moon"])
def test_accuracy_is_that_of_fp32(method, tmp_path):
    settings = {
        "threads": 1, "grad_cam": 0, "device": "cpu", "data": "digits", "train_samples": 500, "partition": "iid",
        "clients": 3, "model": "cnn", "width": 8, "batch_size": 16, "lr": 0.02, "rounds": 4, "local_epochs": 3,
        "eval_every": 4,
    }  # fmt: skip
    found = {}
    for precision in ("fp32", "bf16"):
        config = RunConfig.make(method, precision=precision, **settings)
        found[precision] = run(config, out=tmp_path / precision)["metrics"]
    assert found["bf16"] != found["fp32"]  # it was another computation
    # So short a training is chaotic: one step is compared closely in python_tests/models/test_precision.py.
    assert found["bf16"]["accuracy"] > found["fp32"]["accuracy"] - 0.15


@pytest.mark.exhaustive
def test_image_text_pairs_and_segmentation(make_pairs, make_config, tmp_path):
    # Small steps: at 1e-3 rounding alone moves this loss by up to 12 % from seed to seed, at 1e-4 by 1 %.
    settings = {"rounds": 1, "width": 16, "local_steps": 5, "optimizer": "adamw", "lr": 1e-4, "buffers": "pool"}
    loss = {}
    for precision in ("fp32", "bf16"):
        config = make_config("fedavg", precision=precision, data="captions", **settings)
        run(config, out=tmp_path / precision, data=make_pairs())
        loss[precision] = read_metrics(tmp_path / precision)[0]["loss"]
    assert loss["bf16"] != loss["fp32"]
    assert loss["bf16"] == pytest.approx(loss["fp32"], rel=0.03)
    dice = {}
    for precision in ("fp32", "bf16"):
        config = RunConfig.make(
            "fedavg", data="segdigits", precision=precision, rounds=2, local_epochs=2, train_samples=120, clients=2,
            threads=1, device="cpu",
        )  # fmt: skip
        dice[precision] = run(config, out=tmp_path / f"seg-{precision}")["metrics"]["dice"]
    assert abs(dice["bf16"] - dice["fp32"]) < 0.08


# -- the run ---------------------------------------------------------------------------------------------------------


def test_it_is_stored_and_a_run_goes_on_in_its_own(make_data, make_config, tmp_path):
    config = make_config("fedgid", **BF16, rounds=3)
    run(config, out=tmp_path / "whole", data=make_data())
    play_killed(config, out=tmp_path / "cut", data=make_data(), at=KillAt("round", 0))
    assert 'precision = "bf16"' in (tmp_path / "cut" / "config.toml").read_text()
    with pytest.raises(UserError, match="precision: bf16 -> fp32"):
        run(config.replace(precision="fp32"), out=tmp_path / "cut", resume=True, data=make_data())
    run(load_settings(tmp_path / "cut"), out=tmp_path / "cut", resume=True, data=make_data())
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert reduced_dtype() is None  # nothing of it is left behind


def test_an_unknown_one_is_refused(make_config):
    with pytest.raises(UserError, match=r"precision.*fp32, bf16.*fp16"):
        make_config(precision="fp16")


def test_fp32_never_meets_autocast(make_data, make_config, tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("autocast in fp32")

    monkeypatch.setattr(torch, "autocast", forbidden)
    run(make_config("fedgid"), out=tmp_path / "fp32", data=make_data())
    with pytest.raises(ClientFailed, match="AssertionError: autocast in fp32"):
        run(make_config("fedgid", **BF16), out=tmp_path / "bf16", data=make_data())


def test_draws_are_the_same(make_data, make_config, tmp_path, monkeypatch):
    drawn = defaultdict(list)
    real = FedGID.loss

    def loss(self, model, batch, received):
        own = [batch.indices, batch.drawn["index"], batch.inputs.numpy()]
        drawn[str(reduced_dtype())].append(own)
        return real(self, model, batch, received)

    monkeypatch.setattr(FedGID, "loss", loss)
    for precision in ("fp32", "bf16"):
        config = make_config("fedgid", precision=precision, sample_fraction=0.6, augment="crop")
        run(config, out=tmp_path / precision, data=make_data())
    assert len(drawn["None"]) == len(drawn["torch.bfloat16"]) > 4
    for a, b in zip(drawn["None"], drawn["torch.bfloat16"], strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("lacking", [False, True])
def test_emulated_bf16_is_told(lacking, make_data, make_config, tmp_path, monkeypatch):
    known = {"architecture": "x86_64", "avx512_bf16": not lacking, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    told = {}
    for name, precision in (("bf16", BF16), ("fp32", {})):
        heard = Hearing()
        run(make_config(**precision), out=tmp_path / name, data=make_data(), listener=heard)
        told[name] = heard.warnings.get("emulated-bf16", "")
    assert ("neither AVX512-BF16 nor AMX-BF16" in told["bf16"]) is lacking
    assert not told["fp32"]


# -- weights that are cast -------------------------------------------------------------------------------------------


def test_a_step_is_seen_inside_a_callers_autocast():
    """Autocast would use its cached copies of the weights, which steps on the flat vector do not touch."""
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = Network(models.build("cnn", classes=3, channels=3, image_size=8, width=8, seed=0), torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16), compute_in("bf16"):
        before = network.module(images)
        network.parameters.detach().mul_(1.5)
        after = network.module(images)
        copied = Network(models.build("cnn", classes=3, channels=3, image_size=8, width=8, seed=1), torch.device("cpu"))
        copied.write(network.read())
        assert torch.equal(after, copied.module(images))
    assert not torch.equal(before, after)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_inside_a_callers_autocast_is_the_same(precision, make_data, make_config, tmp_path):
    config = make_config("fedgid", precision=precision)
    run(config, out=tmp_path / "alone", data=make_data())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(config, out=tmp_path / "inside", data=make_data())
    assert outcome(tmp_path / "inside") == outcome(tmp_path / "alone")


def test_the_received_network_is_cast_once_and_anew_for_every_message(make_data, make_config):
    context = RunContext(make_config(**BF16), make_data())
    images = torch.randn(4, 3, 8, 8)
    message = context.networks.initial()
    with compute_in("bf16"):
        own = context.networks.get("server")
        own.write(message)
        own.eval_mode()
        frozen = context.networks.frozen(message, None)
        assert frozen is context.networks.frozen(message, None)
        weights = {name: p.dtype for name, p in frozen.named_parameters()}
        assert weights["layer1.0.weight"] == torch.bfloat16
        assert weights["head.weight"] == weights["layer1.1.weight"] == torch.float32
        assert torch.equal(frozen(images), own.module(images))  # what autocast gives that casts at every call
        changed = {**message, "parameters": message["parameters"] * 1.5}
        own.write(changed)
        assert torch.equal(context.networks.frozen(changed, None)(images), own.module(images))
    assert context.networks.get("frozen").parameters.dtype == torch.float32


@pytest.mark.exhaustive
def test_differential_privacy_trains_in_fp32(make_data, make_config, tmp_path, monkeypatch):
    seen = set()
    fediod = METHODS["fediod"]
    real = fediod.loss

    def loss(self, model, batch, received):
        with torch.no_grad():
            seen.add((reduced_dtype(), model.stages(batch.inputs, upto="layer1").dtype))
        return real(self, model, batch, received)

    monkeypatch.setattr(fediod, "loss", loss)
    options = {**SETTINGS["fediod"]["options"], "teacher_dp": True, "epsilon": 50.0, "batched": False}
    config = make_config("fediod", **BF16, model="cnn-gn", width=8, options=options)
    data = make_data()
    big = dataclasses.replace(data, clients=tuple(make_data((30, 24, 20)).clients))
    run(config, out=tmp_path, data=big)
    assert seen == {(None, torch.float32)}


def test_what_a_loss_sees_is_fp32_but_for_maps(make_data, make_config, tmp_path, monkeypatch):
    seen = {}

    def loss(self, model, batch, received):
        maps = model.stages(batch.inputs, upto="layer1")
        features = model.tail(maps, after="layer1")
        logits = model.head(features)
        seen.update(maps=maps.dtype, features=features.dtype, logits=logits.dtype)
        seen.update(received=received.model(batch.inputs).dtype, parameter=next(model.parameters()).dtype)
        result = torch.nn.functional.cross_entropy(logits, batch.targets)
        seen.update(loss=result.dtype)
        return result

    monkeypatch.setattr(FedAvg, "loss", loss)
    run(make_config(**BF16), out=tmp_path, data=make_data())
    assert seen.pop("maps") == torch.bfloat16
    assert set(seen.values()) == {torch.float32}


class Products(torch.nn.Linear):
    """A linear layer that notes the dtypes of its products."""

    seen: ClassVar[list] = []

    def forward(self, x):
        y = super().forward(x)
        self.seen.append((self.training, y.dtype))
        return y


*ROWS, TEST = [TensorDataset(torch.randn(20, 4), torch.randn(20, 1)) for _ in range(3)]
QUIETLY = {"rounds": 1, "workers": 1, "threads": 1, "progress": False, "pictures": False}


def test_a_loss_of_the_whole_batch_runs_in_bf16(tmp_path):
    def loss(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    for precision in ("fp32", "bf16"):
        Products.seen.clear()
        how = {"data": ROWS, "test": TEST, "model": Products(4, 1), "metrics": {"again": loss}}
        out = tmp_path / precision
        fedkern.simulate("fedavg", batch_loss=loss, precision=precision, out=out, **how, **QUIETLY)
        expected = DTYPES[precision] or torch.float32
        assert {dtype for training, dtype in Products.seen if training} == {expected}
        assert Products.seen[-1] == (False, expected)  # of the metric in the last evaluation


def test_a_loop_is_told_that_it_chooses_its_precision(tmp_path):
    how = {"data": ROWS, "test": TEST, "model": torch.nn.Linear(4, 1), "loss_fn": torch.nn.functional.mse_loss}
    for precision in ("fp32", "bf16"):
        out, loop = tmp_path / precision, lambda model, client: None
        run = fedkern.simulate("fedavg", out=out, precision=precision, train=loop, **how, **QUIETLY)
        assert ("loop-precision" in run.summary["diagnostics"]) == (precision == "bf16")
