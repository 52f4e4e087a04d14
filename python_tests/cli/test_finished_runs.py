"""predict and export: a finished run's network on the user's images, and as a file for other programs."""

import csv
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fedkern
from fedkern.data.sources.digits import open_digits
from fedkern.downstream import prediction
from fedkern.downstream.saved_network import read_model
from fedkern.engine.evaluate import set_evaluation_threads
from fedkern.errors import UserError
from fedkern.run import main
from fedkern.settings.config import RunConfig, load_settings
from python_tests.plugin_sources import EXAMPLES, Marked, no_plugins, unload_all  # noqa: F401

TINY = ["--train-samples", "200", "--clients", "2", "--rounds", "2", "--threads", "1", "--grad-cam", "0", "--quiet"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory, undrawing):
    """Return a run on the embedded digits, and the first images of its test set as files in nested folders."""
    folder = tmp_path_factory.mktemp("digits")
    with undrawing():
        assert main(["fedavg", "--data", "digits", *TINY, "--model", "mlp", "--out", str(folder / "run")]) == 0
    test = open_digits().tests[""]
    split = test.take(torch.arange(30))
    for row, image in enumerate(split.images):
        place = folder / "images" / f"{int(split.labels[row])}" / f"{row:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(place)
    return folder, split


def expected_logits(folder, split):
    """Return the logits of the run's network for ``split``, and the network's description."""
    module, about = read_model(folder / "run")
    mean, std = (torch.tensor(about[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        return module((split.images.float() / 255 - mean) / std), about


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_evaluate_repeats_the_figures_of_the_run(digits, result):
    folder, _ = digits
    text, _ = result("evaluate", str(folder / "run"), "--json")
    summary = json.loads((folder / "run" / "summary.json").read_text())["metrics"]
    metrics = json.loads(text)["metrics"]
    assert metrics["accuracy"] == summary["accuracy"]
    assert {name: summary[name] for name in metrics} == metrics
    assert json.loads((folder / "run" / "evaluate.json").read_text())["metrics"] == metrics


OF_THREADS = [
    {"data": "digits", "model": "mlp", "buffers": "drop", "train_samples": 64},
    *(
        pytest.param(given, marks=pytest.mark.slow)
        for given in (
            {"data": "digits", "model": "efficientnet-b0"},
            {"data": "digits", "model": "efficientnet-b0", "buffers": "local", "method": "fedprox"},
            {"data": "segdigits", "model": "unet"},
            {"data": "captions", "method": "feddra"},
            {"data": "digits", "method": "fusefl", "rounds": None, "local_epochs": 2},
        )
    ),
]


@pytest.mark.parametrize("given", OF_THREADS, ids=lambda given: "-".join(map(str, given.values())))
def test_evaluate_repeats_a_run_of_two_threads_also_one_that_went_on(given, tmp_path):
    """Sets or batches run side by side on one thread each: 1x1 maps and sums depend on it, and on the memory format."""
    settings = {"method": "fedavg", "rounds": 1, "clients": 2, "train_samples": 320, "local_epochs": 1, "threads": 2,
                "client_threads": 1, "workers": 1, "grad_cam": 0, **given}  # fmt: skip
    run = fedkern.simulate(out=tmp_path / "run", progress=False, pictures=False, **settings)

    def repeat():
        before = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
        found = run.evaluate()
        assert len(found) > 10
        assert {name: before.get(name) for name in found} == found
        return before

    printed = repeat()
    (tmp_path / "run" / "summary.json").unlink()
    run.resume(progress=False, pictures=False)
    assert repeat() == printed
    if settings["method"] in ("fedavg", "fedprox"):  # others' plans depend on the number of rounds
        run.extend(2, progress=False, pictures=False, workers=1)
        assert repeat() != printed


def test_threads_of_an_evaluation():
    def of(own, **given):
        before = torch.get_num_threads()
        with set_evaluation_threads(RunConfig.make("fedavg", data="digits", device="cpu", **given), own) as at_once:
            found = at_once, torch.get_num_threads()
        assert torch.get_num_threads() == before
        return found

    assert of(True, threads=4, client_threads=1) == (4, 1)
    assert of(True, threads=5, client_threads=2) == (2, 2)
    assert of(True, threads=3, client_threads=2) == (1, 3)
    assert of(True, threads=2, client_threads=2) == (1, 2)
    assert of(False, threads=4, client_threads=1) == (1, 4)  # a method's module may be traced


PATIENT = ["--data", "digits", "--train-samples", "300", "--clients", "3", "--model", "mlp", "--threads", "1",
           "--workers", "1", "--grad-cam", "0", "--lr", "1.2", "--momentum", "0.9", "--local-epochs", "1",
           "--rounds", "25", "--patience", "1", "--quiet"]  # fmt: skip


@pytest.mark.exhaustive
def test_every_command_reads_the_network_that_it_is_asked_for(digits, result, tmp_path):
    images = str(digits[0] / "images")
    result("fedavg", *PATIENT, "--out", "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["stopped"]["by"] == "patience"
    found = {}
    for network in ("last", "best"):
        options = ["--network", network] * (network == "best")
        evaluated = json.loads(result("evaluate", "run", "--json", *options)[0])
        assert f"network of the {network} round" in " ".join(result("evaluate", "run", *options)[0].split())
        assert evaluated["network"] == network
        attacked = json.loads(result("attack", "run", "--json", *options)[0])
        assert attacked["network"] == network
        assert f"network of the {network} round" in " ".join(result("attack", "run", *options)[0].split())
        result("predict", "run", images, "--out", f"{network}.csv", *options)
        written, _ = result("export", "run", "--format", "state-dict", *options)
        state = torch.load(written.splitlines()[0], weights_only=True)
        module, _ = read_model("run", best=network == "best")
        assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
        found[network] = evaluated["metrics"], attacked["auc"], (tmp_path / f"{network}.csv").read_text()
    assert all(last != best for last, best in zip(found["last"], found["best"], strict=True))
    best = summary["best"]["metrics"]
    assert {name: found["best"][0][name] for name in best} == best
    made = {f"{kind}.json" for kind in ("evaluate", "evaluate-best", "attack", "attack-best")} | {"best.pt", "model.pt"}
    assert made < {path.name for path in (tmp_path / "run").iterdir()}
    result("extend", "run", "--rounds", "40", "--quiet")
    assert made < {path.name for path in (tmp_path / "run" / f"round-{summary['rounds']:04d}").iterdir()}


@pytest.mark.parametrize("command", ["evaluate", "predict", "export", "attack"])
def test_a_run_without_a_best_network_and_a_network_of_no_name(command, digits, fails):
    words = [command, str(digits[0] / "run"), *([str(digits[0] / "images")] if command == "predict" else [])]
    assert "has no best.safetensors: a run with --patience keeps it" in fails(*words, "--network", "best")
    assert "--network: invalid choice: 'first'" in fails(*words, "--network", "first")


@pytest.mark.parametrize("command", ["extend", "report"])
def test_other_commands_take_no_network(command, fails):
    assert "does not take" in fails(command, "run", "--network", "best")


def test_evaluate_on_other_data(digits, result, tmp_path):
    folder, split = digits
    for row, image in enumerate(split.images):
        for place in ("train", "test"):
            path = tmp_path / "data" / place / str(int(split.labels[row])) / f"{place}{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = image[0].numpy().copy()
            pixels[0, 0] ^= place == "train"  # the sets share no file, and hardly a pixel differs
            Image.fromarray(pixels).save(path)
    logits, about = expected_logits(folder, split)
    size = f"size={about['image_size'][0]}"
    command = ["evaluate", str(folder / "run"), "--data", "folder", "--data-root", "data", "--data-option", size]
    out, _ = result(*command, "--data-option", "colour=grey")
    assert "accuracy" in out
    metrics = json.loads((folder / "run" / "evaluate-folder.json").read_text())["metrics"]
    right = logits.argmax(1) == split.labels
    assert metrics["accuracy"] == pytest.approx(float(right.double().mean()))


def test_evaluate_refuses_data_that_the_network_was_not_made_for(digits, fails):
    folder, _ = digits
    run = str(folder / "run")
    before = sorted((folder / "run").iterdir())
    assert "it has no option for such images" in fails("evaluate", run, "--data", "colordigits")
    assert "is for segmentation" in fails("evaluate", run, "--data", "segdigits")
    assert "keep theirs" in fails("evaluate", run, "--data-option", "size=8")
    assert sorted((folder / "run").iterdir()) == before


def test_predictions_are_those_of_the_network_whatever_the_batch_and_some_are_shown(
    digits, result, tmp_path, monkeypatch
):
    folder, split = digits
    command = ["predict", str(folder / "run"), str(folder / "images")]
    out, said = result(*command)
    assert said == ""  # no terminal, no bar
    shown = out.splitlines()
    assert shown[-1] == "30 images: predictions.csv"
    assert len(shown) == 7  # five images, an ellipsis and the file
    rows = table(tmp_path / "predictions.csv")
    assert len(rows) == 30
    logits, about = expected_logits(folder, split)
    expected = logits.softmax(1)
    for row in rows:
        number = int(row["path"][-6:-4])
        assert row["predicted"] == about["classes"][int(expected[number].argmax())]
        values = torch.tensor([float(row[name]) for name in about["classes"]])
        torch.testing.assert_close(values, expected[number], rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(prediction, "BATCH", 8)
    assert result(*command, "--out", "again.csv")[0].splitlines()[:-1] == shown[:-1]
    for row, before in zip(table(tmp_path / "again.csv"), rows, strict=True):
        assert (row["path"], row["predicted"]) == (before["path"], before["predicted"])
    assert result(*command, "--out", "quiet.csv", "--json")[1] == ""


@pytest.mark.usefixtures("undrawn")
def test_segmentation_gives_masks_of_the_images_own_size(result, tmp_path):
    command = ["fedavg", "--data", "segdigits", "--train-samples", "60", "--clients", "2", "--rounds", "1"]
    command += ["--local-steps", "2", "--threads", "1", "--width", "4", "--quiet", "--out", "run"]
    assert main(command) == 0
    _, about = read_model("run")
    mode = "L" if about["channels"] == 1 else "RGB"
    rng = np.random.default_rng(0)
    (tmp_path / "mine").mkdir()
    for name, size in (("a", (40, 30)), ("b", (64, 64))):
        shape = (*size[::-1],) if mode == "L" else (*size[::-1], 3)
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8), mode).save(tmp_path / "mine" / f"{name}.png")
    result("predict", "run", "mine", "--out", "found")
    for name, size in (("a", (40, 30)), ("b", (64, 64))):
        with Image.open(tmp_path / "found" / f"{name}.png") as mask:
            assert (mask.size, mask.mode) == (size, "L")
            assert np.asarray(mask).max() < len(about["classes"])


def test_an_exported_program_gives_the_same_logits(digits, result, tmp_path):
    folder, split = digits
    out, _ = result("export", str(folder / "run"), "--out", "model.pt2")
    assert out.splitlines() == ["model.pt2", "model.pt2.json"]
    program = torch.export.load(tmp_path / "model.pt2").module()
    about = json.loads((tmp_path / "model.pt2.json").read_text())
    expected, described = expected_logits(folder, split)
    for count in (1, 7, 30):
        logits = program(split.images[:count].float() / 255)
        torch.testing.assert_close(logits, expected[:count], rtol=1e-4, atol=1e-4)
    assert about["classes"] == described["classes"]
    assert about["input"].endswith("in [0, 1]")


def test_an_exported_state_dict_is_the_networks(digits, result, tmp_path):
    folder, _ = digits
    result("export", str(folder / "run"), "--format", "state-dict", "--out", "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    module, about = read_model(folder / "run")
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
    assert json.loads((tmp_path / "model.pt.json").read_text())["mean"] == about["mean"]


def test_an_exported_onnx_file_gives_the_same_logits(digits, result, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    folder, split = digits
    result("export", str(folder / "run"), "--out", "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    expected, _ = expected_logits(folder, split)
    for count in (1, 7):
        (logits,) = session.run(None, {"images": (split.images[:count].float() / 255).numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected[:count], rtol=1e-4, atol=1e-4)


OTHER = SimpleNamespace(graph=SimpleNamespace(nodes=[]), module=lambda: lambda images: images.flatten(1)[:, :10])


def unreadable(*_):
    raise ValueError("no such operator\nat line 3")


@pytest.mark.parametrize(
    ("name", "broken", "said"),
    [
        ("torch.export.load", unreadable, "written of this network and read again (no such operator): take --format"),
        ("torch.export.load", lambda _: OTHER, "differ from"),
        ("torch.export.save", unreadable, "(no such operator)"),
        ("torch.export.export", lambda *_, **__: {}[3], "(3)"),
        (
            "fedkern.files.atomic.write_bytes",
            lambda path, _: (_ for _ in ()).throw(UserError(f"{path}: full.")),
            "full",
        ),
    ],
)
def test_an_export_that_cannot_be_read_again_leaves_nothing(name, broken, said, digits, fails, monkeypatch, tmp_path):
    monkeypatch.setattr(name, broken)
    assert said in fails("export", str(digits[0] / "run"), "--out", "model.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def exporter(monkeypatch):
    """Replace the packages of ONNX: the exporter logs, and writes a file for the checker."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")

    class Program:
        def save(self, path, **_):
            Path(path).write_text("network")

    def run(*_, **__):
        for name in ("nms", "roi_align"):
            log.warning("torchvision is not installed. Skipping torchvision::%s", name)
        log.warning("an operator is not known")
        return Program()

    known = SimpleNamespace(checker=SimpleNamespace(check_model=lambda path: Path(path).read_text()))
    monkeypatch.setitem(sys.modules, "onnx", known)
    monkeypatch.setitem(sys.modules, "onnxscript", SimpleNamespace())
    monkeypatch.setattr("fedkern.downstream.model_export.find_spec", {"onnxruntime": None}.get)
    monkeypatch.setattr("torch.onnx.export", run)
    return known


def test_the_exporter_of_onnx_says_nothing_of_torchvision(digits, exporter, result, caplog):
    result("export", str(digits[0] / "run"), "--format", "onnx", "--out", "model.onnx")
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == ["an operator is not known"]


@pytest.mark.parametrize("where", ["checker", "runtime", "answer"])
def test_an_onnx_file_that_cannot_be_read_leaves_nothing(where, digits, exporter, fails, monkeypatch, tmp_path):
    if where == "checker":
        exporter.checker.check_model = unreadable
    else:
        session = SimpleNamespace(run=lambda *_: [np.eye(2, 10, dtype=np.float32)])
        monkeypatch.setattr("fedkern.downstream.model_export.find_spec", lambda name: name)
        opened = unreadable if where == "runtime" else lambda path: session if Path(path).exists() else None
        made = SimpleNamespace(InferenceSession=lambda path, providers: opened(path))
        monkeypatch.setitem(sys.modules, "onnxruntime", made)
    said = "outputs differ" if where == "answer" else "onnx can be written of this network and read again ("
    assert said in fails("export", str(digits[0] / "run"), "--format", "onnx", "--out", "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_plugins", "undrawn")
def test_a_plugin_given_again_may_be_executed(result, fails, tmp_path):
    plugin = Marked(tmp_path / "plugin")
    flag = ["--plugin", str(plugin.path)]
    result("mine", "--data", "digits", *TINY, "--model", "mlp", "--out", "run", *flag)
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(image)
    commands = (
        ["evaluate", "run"], ["predict", "run", str(image)], ["export", "run"], ["extend", "run", "--rounds", "3"],
    )  # fmt: skip
    for command in commands:
        unload_all()
        plugin.change()
        assert f"--plugin {plugin.path}" in fails(*command)
        unload_all()
        result(*command, *flag)
    (tmp_path / "other.py").write_text((EXAMPLES / "fedavgm.py").read_text())
    assert "has no plugin" in fails("extend", "run", "--rounds", "4", *flag, "--plugin", "other.py")
    assert load_settings("run", trusted=[str(plugin.path)]).rounds == 3


@pytest.mark.usefixtures("undrawn")
def test_evaluate_knows_the_held_out_client(result, tmp_path):
    held = ["--held-out-client", "1", "--clients", "3"]
    result("fedavg", "--data", "digits", *TINY, "--model", "mlp", *held, "--out", "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    metrics = json.loads(result("evaluate", "run", "--json")[0])["metrics"]
    assert "held_out_accuracy" in metrics
    assert {name: summary[name] for name in metrics} == metrics


def test_mistakes_end_in_one_sentence_and_leave_nothing(digits, fails, tmp_path):
    folder, _ = digits
    run, image = str(folder / "run"), str(next((folder / "images").rglob("*.png")))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no image")
    before = sorted(tmp_path.iterdir())
    assert "needs images behind the run folder" in fails("predict", run)
    assert "needs the folder of a finished run" in fails("predict")
    assert "absent.png" in fails("predict", run, "absent.png")
    assert "holds no image file" in fails("predict", run, "empty")
    assert "is named twice" in fails("predict", run, image, image)
    assert "broken.png" in fails("predict", run, image, "broken.png")
    assert "make it, or name another --out" in fails("predict", run, image, "--out", "nowhere/a.csv")
    assert 'not "onx". Did you mean' in fails("export", run, "--format", "onx")
    assert "model.pt is a name of --format state-dict" in fails("export", run, "--format", "onnx", "--out", "model.pt")
    assert "does not take" in fails("export", run, "--formt", "onnx")
    assert "empty" in fails("export", "empty")
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "predictions.csv").write_text("mine")
    assert "is there already" in fails("predict", run, image)
    assert (tmp_path / "predictions.csv").read_text() == "mine"
    assert "Name predict first" in fails("--quiet", "predict", run)
