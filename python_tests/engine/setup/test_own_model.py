"""Runs of user-defined networks: by file, by module, by registered name, and as a module."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fedkern
from fedkern.api import read_request
from fedkern.data.forms import ImageForm
from fedkern.downstream.membership_attack import attack
from fedkern.downstream.saved_network import read_model
from fedkern.engine.context import RunContext
from fedkern.engine.local.script_objects import ScriptObjects
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.methods import METHODS
from fedkern.models import MODELS, available, register_model
from fedkern.models.users.user_models import LEVELS
from fedkern.settings.config import RunConfig, load_settings
from fedkern.tasks import CLASSIFICATION
from python_tests import own_networks
from python_tests.hearing import Hearing
from python_tests.interrupted import KillAt, outcome, play_killed
from python_tests.own_networks import Plain, Raw, Staged
from python_tests.saved_network import same_network, tensors

STAGED, PLAIN, RAW = (f"python_tests.own_networks:{kind.__name__}" for kind in (Staged, Plain, Raw))
HAS = {STAGED: "stages", PLAIN: "features", RAW: "logits"}


@pytest.fixture
def own(make_config):
    """Return a function for the settings of a run whose network has no width."""
    return lambda method="fedavg", **settings: make_config(method, **{"width": None, "model": STAGED, **settings})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "networks.py"
    path.write_text(Path(own_networks.__file__).read_text())
    return path


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "settings",
    [{}, {"aggregator": "krum:byzantine=0"}, {"aggregator": "geometric_median"},
     {"server_rule": "adam", "clip_update_norm": 0.1}, {"dp_clip": 1.0, "dp_noise": 0.1}],
    ids=["mean", "krum", "median", "rules", "noise"],
)  # fmt: skip
def test_a_mask_of_infinities_travels_as_any_buffer(own, make_data, tmp_path, settings):
    """The uploads count, and the run is that of the same network without the mask."""
    for name in ("Plain", "Masked"):
        run(own(model=f"python_tests.own_networks:{name}", **settings), out=tmp_path / name, data=make_data())
    expected, given = tensors(tmp_path / "Plain"), tensors(tmp_path / "Masked")
    mask = given.pop("mask")
    assert torch.equal(mask == -torch.inf, torch.ones(3, 3).triu(1).bool())
    assert not mask[mask.isfinite()].any() or "dp_noise" in settings
    if "dp_noise" in settings:  # the mask takes places of the noise's stream
        assert all(tensor.isfinite().all() for tensor in given.values())
        return
    torch.testing.assert_close(given, expected)


class Scaling(nn.Module):
    """A network that scales its input in place, or a copy of the input."""

    def __init__(self, copies):
        super().__init__()
        torch.manual_seed(0)
        self.copies, self.body = copies, nn.Sequential(nn.Flatten(), nn.Linear(1024, 8), nn.ReLU())
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.body((x.clone() if self.copies else x).sub_(0.1).mul_(1.3)))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", ["moon", "ensemble", "fedproto", "fml", "fedntd"])
def test_networks_that_share_a_batch_do_not_see_each_other_s_changes_of_it(method, tmp_path):
    data = {"data": "digits", "train_samples": 120, "clients": 2, "partition": "iid"}
    rounds = {} if method == "ensemble" else {"rounds": 2}
    how = {"progress": False, "pictures": False, "workers": 1, "threads": 1, "lr": 0.1, "batch_size": 16}
    shared, copied = (
        fedkern.simulate(method, model=Scaling(copies), out=tmp_path / str(copies), **data, **rounds, **how)
        for copies in (True, False)
    )
    assert shared.metrics == copied.metrics
    assert same_network(shared.out, copied.out)


# -- methods -------------------------------------------------------------------------------------------------------

ONESHOT = {"rounds": None, "local_epochs": 4}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("method", "model", "settings"),
    [
        ("fedavg", RAW, {}),
        ("moon", PLAIN, {}),
        *(("fedavg", STAGED, how) for how in ({"precision": "bf16"}, {"buffers": "local"}, {"buffers": "drop"})),
        ("fusefl", STAGED, {**ONESHOT, "options": {"blocks": 3, "virtual_features": 20, "calibration_epochs": 1}}),
    ],
)
def test_methods_train_it(method, model, settings, own, make_data, tmp_path):
    summary = run(own(method, model=model, **settings), out=tmp_path / "run", data=make_data())
    assert 0 <= summary["metrics"]["id_accuracy"] <= 1
    assert summary["model"] == model
    module, about = read_model(tmp_path / "run", trusted=[model])
    assert about["model"] == model
    logits = module(torch.randn(2, 3, 8, 8))
    assert (logits.shape, logits.dtype) == ((2, 3), torch.float32)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("channels", [1, pytest.param(3, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    ("method", "model", "settings"),
    [
        ("fedavg", "Whole", {"precision": "bf16"}),
        ("fedgid", "Looking", {"options": {"mix_stage": "layer1"}}),
        ("fusefl", "Looking", {**ONESHOT, "options": {"blocks": 2, "virtual_features": 20, "calibration_epochs": 1}}),
    ],
)
def test_images_and_maps_have_the_strides_of_a_data_loader(method, model, settings, channels, own, make_data, tmp_path):
    """These networks raise on other strides: in training, trials, evaluation and Grad-CAM."""

    def first(split):
        return dataclasses.replace(split, images=split.images[:, :channels])

    data = make_data((8, 6), two_tests=False)
    data = dataclasses.replace(
        data, clients=tuple(map(first, data.clients)), validation=first(data.validation),
        form=ImageForm((channels, 8, 8), data.form.mean[:channels], data.form.std[:channels]),
        tests={name: first(split) for name, split in data.tests.items()},
    )  # fmt: skip
    config = own(method, model=f"python_tests.own_networks:{model}", grad_cam=4, **settings)
    assert run(config, out=tmp_path / "run", data=data)["metrics"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_it_or_says_what_it_needs(method, make_small, tmp_path):
    kind = METHODS[method]
    if not kind.serves(CLASSIFICATION):
        pytest.skip("for image-text pairs")
    for model in (STAGED, PLAIN, RAW):
        out = tmp_path / model.rpartition(":")[2]
        config, data = make_small(method, width=None, model=model)
        if LEVELS.index(kind(kind.Options.parse(config.options)).needs) <= LEVELS.index(HAS[model]):
            assert run(config, out=out, data=data)["metrics"]
            continue
        with pytest.raises(UserError, match=rf"{method} needs .*fedavg"):
            run(config, out=out, data=data)
        assert not out.exists()


@pytest.mark.parametrize(
    ("method", "model", "said"),
    [
        ("fedgid", PLAIN, r"fedgid needs modules that run one after another .* methods that can use it are .*moon"),
        ("fusefl", PLAIN, r"fusefl needs modules that run"),
        ("moon", RAW, rf"moon needs a linear layer .* which the network {RAW} has not: .* fedavg, "),
    ],
)
def test_a_method_that_needs_more(method, model, said, own, make_data, refuses, tmp_path):
    settings = {"rounds": None} if METHODS[method].one_shot else {}
    with refuses(said) as error:
        run(own(method, model=model, **settings), out=tmp_path / "run", data=make_data())
    assert "fedgid, " not in str(error.value).partition("methods that can use it")[2]


@pytest.mark.exhaustive
def test_grad_cam_of_a_network_with_stages(own, make_data, tmp_path):
    assert "id_gradcam_in_object" in run(own(grad_cam=16), out=tmp_path / "staged", data=make_data())["metrics"]
    assert "id_gradcam_in_object" not in run(own(model=PLAIN), out=tmp_path / "plain", data=make_data())["metrics"]


def test_tied_weights_stay_tied(own, make_data, tmp_path):
    run(own(model=RAW), out=tmp_path, data=make_data())
    saved = tensors(tmp_path)
    assert torch.equal(saved["one.weight"], saved["two.weight"])
    module, _ = read_model(tmp_path, trusted=[RAW])
    assert module.module.one.weight is module.module.two.weight


# -- what does not fit ---------------------------------------------------------------------------------------------


class Wrong(nn.Module):
    """A network whose output is given."""

    def __init__(self, give):
        super().__init__()
        self.layer, self.give = nn.Linear(192, 5), give

    def forward(self, x):
        return self.give(self.layer(x.flatten(1)))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Plain().half(), "in float16: only float32"),
        (3, "model must be an nn.Module, a class"),
        (
            Wrong(lambda y: y),
            r"gives \[2, 5\] for 2 images, where the 3 classes of .* need \[2, 3\]: let it take the argument",
        ),
        (Wrong(lambda y: (y, y)), "must give a tensor of logits, or an object with the attribute logits"),
        (Wrong(lambda y: y[:, :3] / 0), "not finite"),
        (Wrong(lambda y: y.view(7)), r"cannot take the images of \w+, 3x8x8 \(channels, height, width\): RuntimeErr"),
    ],
)
def test_a_network_is_looked_at_before_anything_is_written(module, said, make_config, make_data, tmp_path):
    with pytest.raises(UserError, match=said):
        run(make_config(), out=tmp_path / "run", data=make_data(), script=ScriptObjects(module))
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive
def test_classes_of_pixels(tmp_path):
    name = "python_tests.own_networks:Pixels"
    settings = {"data": "segdigits", "rounds": 1, "local_epochs": 1, "train_samples": 20, "clients": 2, "threads": 1}
    summary = run(RunConfig.make("fedavg", model=name, **settings), out=tmp_path / "run")
    assert "dice" in summary["metrics"]
    with pytest.raises(UserError, match=r"gives \[2, 11\] for 2 images, where .*: let it give logits of every pixel"):
        run(RunConfig.make("fedavg", model=STAGED, **settings), out=tmp_path / "other")


# -- a module ------------------------------------------------------------------------------------------------------


def test_a_module_begins_with_its_own_weights_and_is_not_changed(make_config, make_data, tmp_path):
    module = Staged()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    config = make_config(lr=1e-12, momentum=0, rounds=1)
    summary = run(config, out=tmp_path, data=make_data(), script=ScriptObjects(module))
    assert summary["model"] == "module:Staged"
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    for name, value in tensors(tmp_path).items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(value, before[name])
    with pytest.raises(UserError, match=r"holds a module that a script made \(Staged\)"):
        read_model(tmp_path)
    read, _ = read_model(tmp_path, model=Staged())
    assert torch.equal(read.module[0].weight, tensors(tmp_path)["0.weight"])
    assert attack(tmp_path, data=make_data(), keep=False, model=Staged())["members"] == 42


def test_a_module_is_resumed_with_the_module(make_config, make_data, tmp_path):
    config, data, module = make_config(rounds=3), make_data(), Staged()
    run(config, out=tmp_path / "whole", data=data, script=ScriptObjects(module))
    play_killed(config, out=tmp_path / "cut", data=data, script=ScriptObjects(module), at=KillAt("client", 4))
    with pytest.raises(UserError, match="go on with it in Python"):
        run(load_settings(tmp_path / "cut"), out=tmp_path / "cut", data=data, resume=True)
    with pytest.raises(UserError, match=r"module:Staged -> module:Plain"):
        run(config, out=tmp_path / "cut", data=data, resume=True, script=ScriptObjects(Plain()))
    changed = Staged()
    changed[9] = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 3))
    with pytest.raises(UserError, match="module:Staged has other parameters than when the run"):
        run(config, out=tmp_path / "cut", data=data, resume=True, script=ScriptObjects(changed))
    heard = Hearing()
    run(config, out=tmp_path / "cut", data=data, resume=True, script=ScriptObjects(module), listener=heard)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert not heard.notices


def test_other_initial_weights_are_said(make_config, make_data, tmp_path):
    play_killed(make_config(), out=tmp_path, data=make_data(), script=ScriptObjects(Staged()), at=KillAt("round"))
    heard = Hearing()
    run(make_config(), out=tmp_path, data=make_data(), resume=True, script=ScriptObjects(Staged()), listener=heard)
    assert "module:Staged has other initial weights since the run" in heard.notices[0]


# -- code ----------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_killed_and_resumed_a_file_ends_alike(file, own, make_data, tmp_path):
    name, data = f"{file}:Staged", make_data()
    config = own("fedgid", model=name, rounds=3)
    run(config, out=tmp_path / "whole", data=data)
    play_killed(config, out=tmp_path / "cut", data=data, at=KillAt("client", 4))
    stored = load_settings(tmp_path / "cut")
    assert stored.model == name
    assert stored.model_sha256.startswith("sha256:")
    with pytest.raises(UserError, match=r"names code to run, .*networks.py:Staged.* --model .*networks.py:Staged"):
        run(stored, out=tmp_path / "cut", data=data, resume=True)
    heard = Hearing()
    run(config, out=tmp_path / "cut", data=data, resume=True, trusted=[name], listener=heard)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert not heard.notices
    assert name not in MODELS


def test_a_file_that_has_changed(file, own, make_data, tmp_path):
    name, data, text = f"{file}:Staged", make_data(), file.read_text()
    out = tmp_path / "run"
    play_killed(own(model=name), out=out, data=data, at=KillAt("round"))
    file.write_text(text.replace("nn.Conv2d(4, 6, 3", "nn.Conv2d(4, 7, 3").replace("nn.Linear(6,", "nn.Linear(7,"))
    with pytest.raises(UserError, match=r"networks.py:Staged has other parameters than when the run in"):
        run(load_settings(out), out=out, data=data, resume=True, trusted=[name])
    file.write_text(text.replace("nn.ReLU(), nn.Max", "nn.Tanh(), nn.Max"))
    run(load_settings(out), out=out, data=data, resume=True, trusted=[name])
    warning = json.loads((out / "summary.json").read_text())["diagnostics"]["other-code"]
    assert re.search("goes on with the network .*networks.py:Staged as it is now", warning)


def test_a_registered_name(own, make_data, refuses, tmp_path):
    register_model("mine")(Staged)
    try:
        run(own(model="mine"), out=tmp_path / "run", data=make_data())
        assert read_model(tmp_path / "run")[1]["model"] == "mine"
        options = {"models": "mine,cnn:2"}
        run(own("ensemble", model="mine", **ONESHOT, options=options), out=tmp_path / "both", data=make_data())
    finally:
        del MODELS["mine"]
    with pytest.raises(UserError, match='there is no model "mine"'):
        run(own(model="mine"), out=tmp_path / "other", data=make_data())
    with refuses(r"python_tests.own_networks:Staged is code: register that network", "other"):
        run(own("ensemble", **ONESHOT, options={"models": STAGED}), out=tmp_path / "other", data=make_data())


# -- workers -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.sampled(1)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_module_of_main_works_in_forked_workers_of_one_thread(own, make_data, tmp_path, processes, threads):
    class Here(Staged):
        """A network that a notebook's cell defines."""

    Here.__module__ = "__main__"
    config = own(workers="2", threads=threads, client_threads=threads)
    summary = run(config, out=tmp_path / "2", data=make_data(), script=ScriptObjects(Here()))
    said = summary["diagnostics"].get("no-workers", "")
    assert ("Here, which is defined in __main__, cannot be sent" in said) is (threads > 1)
    assert len(processes) == (2 if threads == 1 else 0)


# -- initial weights -----------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(Staged().state_dict(), path)
    return path


def test_initial_weights_of_a_file(weights, own, make_data, tmp_path):
    module = Staged()
    module.load_state_dict(load_file(weights))
    config = own(init=str(weights), rounds=2)
    run(config, out=tmp_path / "run", data=make_data())
    run(own(rounds=2), out=tmp_path / "same", data=make_data(), script=ScriptObjects(module))
    run(own(rounds=2), out=tmp_path / "other", data=make_data())
    found = [tensors(tmp_path / name)["0.weight"] for name in ("run", "same", "other")]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    play_killed(config, out=tmp_path / "cut", data=make_data(), at=KillAt("round"))
    stored = load_settings(tmp_path / "cut")
    assert len(stored.init_sha256) == 64
    content = weights.read_bytes()
    save_file(Staged().state_dict(), weights)
    resume = functools.partial(run, out=tmp_path / "cut", data=make_data(), resume=True, trusted=[STAGED])
    with pytest.raises(UserError, match="is not the file that the run began with"):
        resume(stored)
    weights.write_bytes(content)
    resume(stored)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "run")


def test_a_run_goes_on_from_another_runs_folder(make_config, make_data, tmp_path):
    begun, data = tmp_path / "first", make_data()
    run(make_config(), out=begun, data=data)
    run(make_config(init=str(begun / "model.safetensors"), rounds=3), out=tmp_path / "file", data=data)
    config = make_config(init=str(begun), rounds=3)
    play_killed(config, out=tmp_path / "cut", data=data, at=KillAt("round", 1))
    stored = load_settings(tmp_path / "cut")
    assert stored.init_sha256 == load_settings(tmp_path / "file").init_sha256
    content = (begun / "model.safetensors").read_bytes()
    (begun / "model.safetensors").write_bytes((tmp_path / "file" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="is not what the run wrote"):
        run(stored, out=tmp_path / "cut", data=data, resume=True)
    shutil.rmtree(begun / "checkpoints")  # then only the other run knows
    with pytest.raises(UserError, match="does not hold the network that the run began with: put that network back"):
        run(stored, out=tmp_path / "cut", data=data, resume=True)
    (begun / "model.safetensors").write_bytes(content)
    run(stored, out=tmp_path / "cut", data=data, resume=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "file")


def test_a_folder_that_has_no_network_to_begin_with(make_config, make_data, refuses, tmp_path):
    data = make_data()
    play_killed(make_config(rounds=3), out=tmp_path / "cut", data=data, at=KillAt("round", 1))
    for init, config, said in (
        ("cut", {}, r"is the folder of a run that is not finished: finish it with --resume"),
        (".", {}, r"is a folder without model.safetensors: name the folder of a finished run, or a"),
        ("done", {"model": "mlp"}, r"done is not for mlp: its \S+ has shape"),
    ):
        if init == "done":
            run(make_config(), out=tmp_path / "done", data=data)
        with refuses(said):
            run(make_config(init=str(tmp_path / init), **config), out=tmp_path / "run", data=data)
    config = load_settings(tmp_path / "done")
    play_killed(config, out=tmp_path / "done", data=data, at=KillAt("round-start"), resume=True, rounds=9)
    with pytest.raises(UserError, match="not finished"):
        run(make_config(init=str(tmp_path / "done")), out=tmp_path / "run", data=data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("4.bias"), r"is not for \S+: it has no 4.bias, of shape \[6\]"),
        (lambda t: t.update({"9.weight": torch.zeros(5, 6)}), r"its 9.weight has shape \[5, 6\], not \[3, 6\]"),
        (lambda t: t.update(other=torch.zeros(1)), r"its other \[1\] has no place"),
        (lambda t: t.update({"0.bias": torch.full((4,), torch.nan)}), "0.bias has values that are not finite"),
        (lambda t: t.update({"0.bias": torch.zeros(4, dtype=torch.int32)}), "its 0.bias is torch.int32"),
    ],
)
def test_weights_of_another_network(change, said, weights, own, make_data, refuses, tmp_path):
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    with refuses(said):
        run(own(init=str(weights)), out=tmp_path / "run", data=make_data())


# -- what is already there -----------------------------------------------------------------------------------------


def test_a_start_from_every_kind_of_file(own, make_data, tmp_path):
    torch.manual_seed(5)
    expected, memory = Staged().state_dict(), dataclasses.replace(make_data(), name="digits")
    state = {f"module.{name}": value for name, value in expected.items()}
    save_file(state, tmp_path / "w.safetensors")
    for name, content in {"w.pt": state, "w.pth": state, "w.ckpt": {"state_dict": state, "epoch": 3}}.items():
        torch.save(content, tmp_path / name)
    for path in sorted(tmp_path.iterdir()):
        config, data = read_request("fedavg", memory, STAGED, {"init": path})
        with available(STAGED, None):
            network = RunContext(config, data).networks.build()
        assert all(map(torch.equal, network.module.state_dict().values(), expected.values())), path.name


@pytest.mark.sampled(1)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_start_from_a_module(is_wrapped, make_data, tmp_path):
    torch.manual_seed(5)
    module, out, memory = Staged(), tmp_path / "run", dataclasses.replace(make_data(), name="digits")
    how = {"model": STAGED, "rounds": 1, "lr": 1e-12, "progress": False, "pictures": False, "batch_size": 4}
    fedkern.simulate("fedavg", data=memory, init=nn.DataParallel(module) if is_wrapped else module, out=out, **how)
    for name, value in module.state_dict().items():
        if name.endswith(("weight", "bias")):
            torch.testing.assert_close(tensors(out)[name], value, msg=name)
    if is_wrapped:
        return
    assert load_file(out / "init.safetensors").keys() == module.state_dict().keys()
    moved = out.rename(tmp_path / "moved")  # config.toml has no path of its own folder
    again = fedkern.load(moved, data=memory, trusted=[STAGED]).extend(2, progress=False, pictures=False)
    assert len(again.history) == 2
    (moved / "init.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"moved/init\.safetensors. is not the file that the run began with"):
        fedkern.load(moved, data=memory, trusted=[STAGED]).extend(3, progress=False)


def test_a_module_as_start_hides_no_setting_without_effect(make_data, refuses, tmp_path):
    memory = dataclasses.replace(make_data(), name="digits")
    with refuses("lr_step_factor has no effect without lr_steps"):
        fedkern.simulate("fedavg", data=memory, model=STAGED, init=Staged(), lr_step_factor=0.5, out=tmp_path / "run")


def test_a_wrapped_or_accelerated_module_is_the_run_s_network(make_data, make_config, tmp_path):
    """Workers get the plain network, which can be pickled."""
    torch.manual_seed(5)
    plain, network = Staged(), fedkern.accelerate(Staged())
    network.load_state_dict(plain.state_dict())
    wrapped = nn.DataParallel(plain)
    runs = {"plain": (plain, "1"), "one": (network, "1"), "two": (network, "2"), "wrapped": (wrapped, "1")}
    for name, (model, workers) in runs.items():
        script = ScriptObjects.of(model, None, {})
        run(make_config(width=None, workers=workers), out=tmp_path / name, data=make_data(), script=script)
        assert same_network(tmp_path / "plain", tmp_path / name)
    assert any("_conv_forward" in vars(layer) for layer in network.modules())
    assert fedkern.load(tmp_path / "wrapped", model=nn.DataParallel(plain)).model() is not None


def test_a_partial_start_lists_what_does_not_fit(own, make_data, refuses, tmp_path):
    torch.manual_seed(5)
    big = Staged(classes=7)
    torch.save({**big.state_dict(), "extra": torch.zeros(2)}, tmp_path / "big.pt")
    with refuses(r"not \[3, 6\]; --init-partial takes what fits\.$", "no"):
        run(own(init=str(tmp_path / "big.pt")), out=tmp_path / "no", data=make_data())
    told, out = Hearing(), tmp_path / "run"
    frozen = own(init=str(tmp_path / "big.pt"), init_partial=True, freeze="0.*,1.*,4.*")
    run(frozen, out=out, data=make_data(), listener=told)
    (said,) = (text for text in told.notices if "big.pt" in text)
    assert re.search(
        r"9 of 11 tensors of \S+ are taken; its 9.weight has shape \[7, 6\], not \[3, 6\]; its 9.bias has shape \[7\], "
        r"not \[3\]; its extra \[2\] has no place\.$", said
    )  # fmt: skip
    for name, value in big.state_dict().items():
        if name[0] in "014":
            assert torch.equal(tensors(out)[name], value), name
    torch.save({"far": torch.zeros(1)}, tmp_path / "far.pt")
    with pytest.raises(UserError, match=r"far.pt is not for \S+: it has no 0.weight, of shape \[4, 3, 3, 3\]\.$"):
        run(own(init=str(tmp_path / "far.pt"), init_partial=True), out=tmp_path / "no", data=make_data())
    torch.save(big, tmp_path / "whole.pt")  # a pickle that runs code
    with pytest.raises(UserError, match=r"whole.pt does not hold a state dict, tensors by name and nothing else"):
        run(own(init=str(tmp_path / "whole.pt")), out=tmp_path / "no", data=make_data())


# -- transformers --------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[3] / "docs" / "models.md"


@pytest.mark.exhaustive
def test_an_image_classifier_of_transformers(own, make_data, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra [foundation]")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**small, image_size=8, patch_size=4, num_labels=5)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    (code,) = re.findall(r"```python\n(from pathlib .*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "classifier.py").write_text(code)
    name = f"{tmp_path}/classifier.py:Classifier"
    out = tmp_path / "run"
    run(own("moon", model=name, lr=1e-12, rounds=1), out=out, data=make_data())
    saved = tensors(out)
    begun = transformers.ViTForImageClassification.from_pretrained(tmp_path / "vit").state_dict()
    shared = [key for key in begun if not key.startswith("classifier")]
    assert len(shared) > 10
    for key in shared:
        torch.testing.assert_close(saved[f"network.{key}"], begun[key])
    assert saved["network.classifier.weight"].shape == (3, 8)
    assert json.loads((out / "summary.json").read_text())["model"] == name
    read_model(out, trusted=[name])


REMEMBERING = """

class Scaled(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.{name} = {first}

    def forward(self, x):
        {change}
        return super().forward(x)


class Net(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.body = nn.ModuleList([nn.Identity(), Scaled(64 * channels, 8)])
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        return self.fc(self.body[1](x.flatten(1)).relu())
"""
CHANGES = {
    "the first call": ("scale", "None", "self.scale = self.scale or float(x.std()); x = x / self.scale"),
    "a later client": ("calls", "[0, 0]", "self.calls[1] += len(x) == 3"),
    "nothing": ("mean", "[0.5]", "x = x - self.mean[0]"),
}


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("change", CHANGES)
def test_one_warning_names_the_state_of_a_network_in_python(change, workers, file, make_data, make_config, tmp_path):
    name, initial, text = CHANGES[change]
    file.write_text("from torch import nn\n" + REMEMBERING.format(name=name, first=initial, change=text))
    config = make_config(width=None, workers=workers, grad_cam=0, model=f"{file}:Net")
    # Only the last client has a batch of three images.
    heard = Hearing()
    summary = run(config, out=tmp_path / "run", data=make_data((20, 12, 11)), listener=heard)
    found = [text for name, text in heard.told if name == "python-state"]
    assert len(found) == (change != "nothing")
    assert [summary["diagnostics"]["python-state"]] == found if found else "python-state" not in summary["diagnostics"]
    assert all(f"The network changes body.1.{name} as it runs" in text for text in found)
    assert all("registered buffer" in text and "workers" in text for text in found)
