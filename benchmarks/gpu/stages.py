"""Stages of `all.sh`: their commands, order and time limits."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTED = ("python_tests/ops/cuda", "python_tests/ops/triton", "python_tests/engine")
"""Folders of the tests marked ``gpu``."""
CHOSEN = ("-m", "gpu and not slow", "--maxfail=20")
SANITIZERS = ("memcheck", "racecheck")
SMALL = "gives_the_reference_result or sizes"
"""Words of tests on small inputs: the sanitizers make them ten times slower."""
METHODS = ("fedgid", "fedlpfm", "fusefl", "fediod", "feddra", "fedavg", "fedprox", "scaffold")
NETWORKS = {
    "vit-tiny": {"model": "vit-tiny", "rounds": 2},
    "unet-small": {"data": "segdigits", "model": "unet-small", "rounds": 2},
}
"""Settings of FedAvg with attention, and with a loss of pixels."""
NOT_OPERATORS = {"bench_conv", "bench_flower", "bench_methods", "bench_rounds"}
"""Benchmarks of whole runs."""


@dataclass(frozen=True)
class Stage:
    """A command of `all.sh`.

    Attributes:
        name: as the command line takes it.
        command: words, run in the repository's root.
        seconds: its time limit.
        environment: variables beside those of this process.
        ready: words of a command that succeeds where no work is left, whatever was done before; empty: none.
        goes_on: whether a stage that is cut short resumes later, so that an end of its time is no failure.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: tuple[str, ...] = ()
    goes_on: bool = False


def plan(capability: str, out: Path, data_root: str | None) -> list[Stage]:
    """Return all stages in their order.

    Args:
        capability: the GPU's compute capability, for example "9.0".
        out: folder of results.
        data_root: folder of the binary files of CIFAR-10 and of MNIST's; None: nothing is trained at published scale.
    """
    stages = [build(capability), doctor(), tests(), *repeats(), kernels(out), *operators(out)]
    stages += [*sanitizers(), *rounds(out), *traces(out), *methods(out, data_root)]
    return stages + ([] if data_root is None else plan_published(out, data_root))


def build(capability: str) -> Stage:
    """Return the package in place, its CUDA core for this GPU alone, again on every machine without it."""
    architecture = capability.replace(".", "")
    words = ("-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--editable", ".")
    return Stage(
        "build",
        (sys.executable, *words),
        600,
        {"FEDKERN_CPU": "1", "FEDKERN_CUDA": "1", "CUDAARCHS": f"{architecture}-real"},
        ready=(sys.executable, "-m", "benchmarks.gpu.built", architecture),
    )


def doctor() -> Stage:
    return Stage("doctor", (sys.executable, "-m", "fedkern.run", "doctor"), 120)


def tests() -> Stage:
    """Return the tests on the GPU: half a minute in eight processes."""
    words = ("-m", "pytest", "-q", "-n", "8", *CHOSEN, *TESTED)
    return Stage("tests", (sys.executable, *words), 300)


def sanitizers() -> list[Stage]:
    """Return the CUDA tests on small inputs under NVIDIA's checkers."""
    return [
        Stage(
            tool,
            ("bash", "cmake/sanitize.sh", "cuda", TESTED[0], *CHOSEN, "-k", SMALL),
            590,
            {"SANITIZER": tool, "PYTHON": sys.executable, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for tool in SANITIZERS
    ]


def kernels(out: Path) -> Stage:
    """Return every kernel of both backends and the reference beside a copy."""
    words = ("-m", "benchmarks.gpu.kernels", "--results", str(out / "results"), "--missing")
    return Stage("kernels", (sys.executable, *words), 590, goes_on=True)


def operators(out: Path) -> list[Stage]:
    """Return the operators' benchmarks beside eager PyTorch, torch.compile and others."""
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py") if path.stem not in NOT_OPERATORS)
    return [
        Stage(
            f"operators {name.removeprefix('bench_')}",
            (sys.executable, "-m", "pytest", "-q", f"benchmarks/{name}.py", "--device", "cuda", "--record", "--results",
             str(out / "results")),
            590,
        )
        for name in names
    ]  # fmt: skip


TRACED = {
    "fedgid": "--rounds 2",
    "fediod": "--rounds 2 --local-epochs 2",
    "feddra": "--rounds 2",
    "fusefl": "--local-epochs 4",
    "fedlpfm": "--rounds 2",
    "resnet18": "--model resnet18 --width 64 --clients 10 --rounds 2 --precision bf16",
}
"""Flags of short runs of which a round is looked at; ``resnet18`` is FedAvg's."""


def traces(out: Path) -> list[Stage]:
    """Return a round of every method under PyTorch's profiler: the host's waits, and the GPU's idle time."""
    return [
        Stage(
            f"trace {name}",
            (sys.executable, "-m", "benchmarks.gpu.trace", "fedavg" if name == "resnet18" else name, *words.split(),
             "--grad-cam", "0", "--quiet", "--workers", "1", "--device", "cuda", "--out", str(out / "traces" / name)),
            200,
        )
        for name, words in TRACED.items()
    ]  # fmt: skip


def methods(out: Path, data_root: str | None) -> list[Stage]:
    """Return every method's whole run beside plain PyTorch, where the larger setting needs CIFAR-10's files."""
    words = (sys.executable, "-m", "benchmarks.bench_methods", "--device", "cuda", "--repeats", "2", "--variants",
             "plain", "fedkern", "bf16", "reference", "--results", str(out / "results"))  # fmt: skip
    stages = []
    for setting, flags in (("default", ()), ("large", ("--data-root", data_root))):
        if None not in flags:
            stages += [
                Stage(
                    f"methods {method} {setting}",
                    (*words, "--methods", method, "--settings", setting, *map(str, flags)),
                    590,
                )
                for method in METHODS
            ]
    return stages


ROUNDS = ("lenet-10", "cnn-10", "cnn-50", "resnet8-10", "resnet18-10")
"""Networks and clients of bench_rounds.py that are played."""


def rounds(out: Path) -> list[Stage]:
    """Return the rounds of the engine beside the lean loop, after a first play of each that measures memory."""
    return [
        Stage(
            f"rounds {name}",
            (sys.executable, "-m", "pytest", "-q", f"benchmarks/bench_rounds.py::test_rounds[{name}-1]", "--rounds",
             "full", "--device", "cuda", "--record", "--results", str(out / "results")),
            590,
        )
        for name in ROUNDS
    ]  # fmt: skip


def repeats() -> list[Stage]:
    """Return every method, attention and a loss of pixels twice with one seed: both runs must have the same bits."""
    words = (sys.executable, "-m", "benchmarks.gpu.repeats")
    return [Stage(f"repeats {name}", (*words, name, "--device", "cuda"), 300) for name in (*METHODS, *NETWORKS)]


FUSEFL = (
    "--data cifar10 --model resnet18 --clients 5 --partition dirichlet:0.5 --local-epochs 200 --batch-size 128 "
    "--lr 0.01 --momentum 0.9 --weight-decay 0 --method-option width=64 --method-option final_fuse=sum --method-option "
    "adaptor_init=random --method-option frozen_bn=code --method-option ccvr_compat=true"
)
FEDIOD_SIZES = (
    "w_real=1", "w_balance=0", "disc_weight=true", "iterations=0", "batch=64", "warmup=0", "student_steps=5", "ngf=64",
    "ndf=128", "critic_layers=2", "generator_lr=1e-4", "critic_lr=1e-4", "student_lr=5e-3",
)  # fmt: skip
"""The paper's objective with the sizes and rates of the released script."""
FEDIOD = (
    "--data cifar10 --model resnet8-t --clients 20 --partition dirichlet:1.0:plain --rounds 500 --local-epochs 500 "
    "--batch-size 256 --lr 0.0025 --momentum 0.9 --weight-decay 0.0003 --eval-every 5 "
    + " ".join(f"--method-option {option}" for option in FEDIOD_SIZES)
)
FEDGID = "--data colormnist --correlation 0.5 --clients 10 --rounds 100 --local-epochs 1 --eval-every 5"
PUBLISHED = {"fusefl": (FUSEFL, 900), "fediod": (FEDIOD, 1200), "fedgid": (FEDGID, 900)}
"""Settings of the methods' papers by method, and seconds after which a stage stops; its run goes on the next time."""


def plan_published(out: Path, data_root: str) -> list[Stage]:
    """Return runs at published scale: FedIOD's teachers come first, because their ensemble bounds its student."""
    return [
        Stage(
            f"published {method}",
            (sys.executable, "-m", "benchmarks.gpu.published", method, *words.split(), "--data-root", data_root,
             "--device", "cuda", "--out", str(out / "published" / method)),
            seconds,
            goes_on=True,
        )
        for method, (words, seconds) in PUBLISHED.items()
    ]  # fmt: skip
