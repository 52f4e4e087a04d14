"""Tests of every network, fedkern's and users', on gray and colour, and every method, to the end of every command.

    pytest python_tests/test_common_runs.py -m slow -n 2
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 FEDKERN_CPU_ISA=avx2 pytest ...       # as on older processors
    LD_PRELOAD=libc_malloc_debug.so.0 MALLOC_CHECK_=3 pytest ...                           # ends what overwrites memory

``-k quick`` plays a minute's worth.  Each case is a process of its own, which a fault in native code ends alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedkern.methods import METHODS
from fedkern.models import MODELS
from python_tests import common_networks
from python_tests.same_runs import settings_of

pytestmark = pytest.mark.slow

QUICK = {"gray-View", "gray-Shortcut", "colour-Shortcut", "gray-mlp", "gray-vit-tiny", "afl"}
ZOO = [name for name, entry in MODELS.items() if entry.gives == "classes"]
PIXELS = [name for name, entry in MODELS.items() if entry.gives == "pixels"]
NETWORKS = [
    *(f"{name}{width}" for name in ZOO for width in ("", "-narrow")),
    *PIXELS,
    *(network.__name__ for network in common_networks.OWN),
]
PLAYER = """
import contextlib, io, json, sys
from fedkern.run import main

for words in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(words)
    print(json.dumps([words[0], code, out.getvalue()]), flush=True)
    if code:
        sys.exit(code)
"""


def _cases(names: list[str]) -> list[object]:
    return [pytest.param(name, id=f"quick-{name}" if name in QUICK else name) for name in names]


def _images(root: Path, mode: str, *, masks: bool) -> None:
    """Return three classes by brightness, 24 images to train with and 12 to test with.

    The masks have a bright half.
    """
    rng = np.random.default_rng(0)
    for number in range(36):
        pixels = rng.integers(0, 100, (32, 32) if mode == "gray" else (32, 32, 3), dtype=np.uint8)
        name = f"{number}.png"
        if masks:
            pixels[number % 16 :] += 100
            mask = np.zeros((32, 32), np.uint8)
            mask[number % 16 :] = 1
            files = {root / "images" / name: pixels, root / "masks" / name: mask}
        else:
            split = "test" if number % 3 == 0 else "train"
            files = {root / split / "abc"[number // 12] / name: pixels + np.uint8(50 * (number // 12))}
        for path, array in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)


def _play(tmp_path: Path, words: list[str], code: list[str], images: Path | None) -> None:
    """Play a run with its pictures, and every command on the finished run.

    ``evaluate`` must give the run's figures.
    """
    commands = [
        [*words, *code, "--out", "run"],
        ["evaluate", "run", *code, "--json"],
        ["report", "run", *code],
        *([["predict", "run", str(images), *code], ["export", "run", *code]] if images else []),
    ]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("OMP_NUM_THREADS", None)  # two threads, as a person's run has
    played = subprocess.run(
        [sys.executable, "-P", "-c", PLAYER], input=json.dumps(commands), cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    outputs = [json.loads(line) for line in played.stdout.splitlines()]
    ended = {name: code for name, code, _ in outputs}
    assert (played.returncode, len(ended)) == (0, len(commands)), (ended, played.stderr[-3000:])
    again = json.loads(outputs[1][2])["metrics"]
    figures = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    shared = again.keys() & figures.keys()
    assert any(name.endswith("loss") for name in shared)
    assert {name: again[name] for name in shared} == {name: figures[name] for name in shared}
    assert list((tmp_path / "run").glob("*.png"))


@pytest.mark.parametrize("case", _cases([f"{mode}-{name}" for name in NETWORKS for mode in ("gray", "colour")]))
def test_a_network_from_its_run_to_its_export(case, tmp_path):
    mode, _, name = case.partition("-")
    pixels = name in PIXELS
    _images(tmp_path / "data", mode, masks=pixels)
    words = [
        *("fedavg", "--data", "segmentation" if pixels else "folder", "--data-root", "data"),
        *("--data-option", "size=32", "--data-option", f"colour={'grey' if mode == 'gray' else 'rgb'}"),
        *("--clients", "2", "--partition", "iid", "--rounds", "1", "--local-epochs", "1", "--batch-size", "6"),
        *(["--width", "4"] if name.endswith("-narrow") else []),
    ]
    images = tmp_path / "data" / ("images" if pixels else "test")
    if hasattr(common_networks, name):
        _play(tmp_path, words, ["--model", f"{common_networks.__file__}:{name}"], images)
    else:
        _play(tmp_path, [*words, "--model", name.removesuffix("-narrow")], [], images)


@pytest.mark.parametrize("method", _cases(sorted(METHODS)))
def test_a_method_from_its_run_to_its_report(method, tmp_path):
    given = settings_of(method, "retrieval" if method == "feddra" else "classification")
    del given["grad_cam"], given["threads"]
    options = given.pop("options", {})
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    words += [f"--method-option={name}={value}" for name, value in options.items()]
    _play(tmp_path, [method, *words], [], None)
