"""Tests of torch's private names, and of GPUs and drivers that cannot run the kernels."""

import ctypes
import importlib.util
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fedkern
from fedkern import ops
from fedkern.errors import UserError
from fedkern.ops._core import backend, devices, loading, private_torch
from python_tests.ops.emulated_core import build

PACKAGE = Path(fedkern.__file__).parent

NAMES = [
    "_C._is_tracing", "_C._are_functorch_transforms_active", "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack", "_C._functorch.is_legacy_batchedtensor", "_C._functorch.is_batchedtensor",
    "_C._functorch.is_functorch_wrapped_tensor", "_C._functorch.get_unwrapped",
    "_C._functorch.is_dead_tensor_wrapper", "_C._ForceDispatchKeyGuard", "_C._dispatch_tls_local_include_set",
    "_C._dispatch_tls_local_exclude_set", "autograd.forward_ad._current_level",
    "_C._autograd._top_saved_tensors_default_hooks", "_C.DisableTorchFunction",
    "_C._autograd._get_current_graph_task_keep_graph", "_C._increment_version",
    "_foreach_add", "_foreach_add_", "_fused_adam_", "_fused_adamw_", "autograd.Variable._execution_engine",
]  # fmt: skip


def again() -> Any:
    """Import the module again, as a new process would."""
    spec = importlib.util.spec_from_file_location("private_torch_again", private_torch.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def owner(name: str) -> tuple[Any, str]:
    *path, last = name.split(".")
    found: Any = torch
    for part in path:
        found = getattr(found, part)
    return found, last


def test_this_torch_is_as_expected() -> None:
    assert private_torch.table_problem(private_torch.exchange_table()) == ""


def test_an_import_under_a_transform_is_as_any() -> None:
    found = []
    torch.func.vmap(lambda x: (found.append(again()), x)[1])(torch.ones(2))
    with TorchDispatchMode():
        found.append(again())
    with torch.device("meta"), torch.inference_mode():
        found.append(again())
    for module in found:
        assert module.table_problem(module.exchange_table()) == ""


def test_the_table_is_read_under_a_transform() -> None:
    said = []

    def look(x: torch.Tensor) -> torch.Tensor:
        said.append(private_torch.table_problem(private_torch.exchange_table()))
        return x.sum()

    torch.func.grad(look)(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2, 2))
    with TorchDispatchMode():
        said.append(private_torch.table_problem(private_torch.exchange_table()))
    assert said == [""] * 3


@pytest.mark.parametrize("name", NAMES)
def test_a_torch_without_a_name_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(*owner(name))
    with pytest.raises(UserError, match=rf"^fedkern uses torch\.{name}.*, which torch .* lacks: install a torch from"):
        again()


def test_a_backward_pass_adds_up_and_refuses_what_torch_refuses() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    for _ in range(2):
        private_torch.backward(x.square().sum())
    assert torch.equal(x.grad, 4 * x)
    with pytest.raises(RuntimeError, match="only for scalar outputs"):
        private_torch.backward(x.square())
    with pytest.raises(RuntimeError, match="does not require grad"):
        private_torch.backward(x.detach().sum())


def capsule(**changed: Any) -> object:
    """Return torch's exchange table with other entries, kept alive for the whole process."""
    table = private_torch._Table.from_address(
        private_torch._POINTER(private_torch.exchange_table(), b"dlpack_exchange_api")
    )
    copy = private_torch._Table.from_buffer_copy(table)
    for name, value in changed.items():
        setattr(copy, name, value)
    _KEPT.append(copy)
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
        ("PyCapsule_New", ctypes.pythonapi)
    )
    return new(ctypes.addressof(copy), b"dlpack_exchange_api", None)


_KEPT: list[Any] = []


def reading(change: Callable[[Any], int]) -> int:
    """Return the address of torch's function that describes a tensor, followed by ``change`` of the description."""
    table = private_torch._Table.from_address(
        private_torch._POINTER(private_torch.exchange_table(), b"dlpack_exchange_api")
    )
    real = private_torch._READ(table.view)

    def read(tensor: torch.Tensor, view: Any) -> int:
        return real(tensor, view) or change(view.contents)

    called = private_torch._READ(read)
    _KEPT.append(called)
    return ctypes.cast(called, ctypes.c_void_p).value or 0


def shift(view: Any) -> int:
    view.data, view.byte_offset = view.data - 4, 4
    return 0


def turn(view: Any) -> int:
    view.shape, view.strides = view.strides, view.shape
    return 0


def test_an_exchange_table_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert private_torch.table_problem(capsule()) == ""
    assert private_torch.table_problem(capsule(major=2, minor=1)) == "the table is of DLPack 2.1, not 1"
    assert private_torch.table_problem(capsule(view=None)) == "the table cannot describe tensors"
    for change in (shift, turn):
        assert private_torch.table_problem(capsule(view=reading(change))) == "it describes a small tensor wrongly"
    assert private_torch.table_problem(capsule(view=reading(lambda _: 1))) == "it fails on a tensor of the CPU"
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", capsule(major=2))
    with pytest.raises(loading.Unsuited, match=r"otherwise than fedkern reads them: the table is of DLPack 2"):
        private_torch.exchange_table()
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    with pytest.raises(loading.Unsuited, match=r"shows no tensors to C extensions, as 2\.11 and"):
        private_torch.exchange_table()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend a process that has chosen no kernel and printed no warning yet."""
    monkeypatch.delenv("FEDKERN_BACKEND", raising=False)
    for name in ("_chosen", "_loaded", "_ordinary"):
        monkeypatch.setattr(backend, name, {})
    loading.warn_once.cache_clear()


def list_warnings(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if issubclass(warning.category, loading.Slower)]


def several() -> None:
    x = torch.randn(4, 5)
    assert torch.equal(ops.kl_div(x, -x), ops.kl_div(x, -x))
    ops.entropy(x)
    ops.weighted_mean([x[0], x[1]], [1, 2])


@pytest.mark.usefixtures("fresh")
def test_other_machines_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other platforms than Linux on x86-64 have no core, and the user cannot change that."""
    monkeypatch.setattr(loading.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(loading.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(loading, "_installed_core", lambda name: None)

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(loading.importlib, "import_module", absent)
    assert list_warnings(several) == [
        "plain PyTorch serves every operator, because fedkern's compiled kernels are made for Linux on x86-64, and "
        "this is Darwin on arm64"
    ]
    monkeypatch.setattr(loading.platform, "system", lambda: "Linux")
    monkeypatch.setattr(loading.platform, "machine", lambda: "x86_64")
    with pytest.raises(loading.Unavailable, match=r"^fedkern\._cpu was not built$"):
        loading.load_core("_cpu")


def test_private_names_stand_in_one_file() -> None:
    private = re.compile(
        r"\btorch(?:\.\w+)*\._(?!_)\w+|^from torch(?:\.\w+)*\._\w+[\w.]* import"
        r"|^from torch[\w.]* import .*\b_(?!BatchNorm)\w"
    )
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "private_torch.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if private.search(line)
    ]
    assert not found, "\n".join(found)


def test_a_default_device_is_no_mode_that_watches() -> None:
    class Watching(TorchFunctionMode):
        pass

    assert not private_torch.function_modes()
    with torch.device("meta"):
        assert not private_torch.function_modes()
        with Watching():
            assert private_torch.function_modes()
    with Watching():
        assert private_torch.function_modes()


# -- devices -----------------------------------------------------------------------------------------------------------


BUILT_FOR = [80, 90, 100]


def fake_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int], hip: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", hip)


def fake_core(runtime: int = 13000, driver: int = 13000, built_for: list[int] = BUILT_FOR) -> Any:
    return SimpleNamespace(
        architectures=lambda: built_for,
        versions=lambda: (runtime, driver),
        take_tensors=lambda *_: None,
        blend_fits=lambda *_: 0,
    )


def why_not(core: Any) -> str:
    try:
        devices.check_cuda(core)
    except loading.Unavailable as error:
        return str(error)
    return ""


@pytest.mark.exhaustive
def test_the_core_says_what_it_was_built_for() -> None:
    try:
        core = build()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert core.architectures() == BUILT_FOR
    assert core.versions() == (13000, 13000)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_gpus_of_supported_kinds_and_newer_ones_are_served(monkeypatch: Any, capability: tuple[int, int]) -> None:
    fake_gpus(monkeypatch, capability)
    assert why_not(fake_core()) == ""
    assert devices.only_forced("triton") == ""


def test_no_gpu_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch)
    assert why_not(fake_core(driver=0)) == ""
    assert devices.only_forced("triton") == ""


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, (7, 5))
    assert why_not(fake_core()) == (
        "GPU 0 (Tesla T4) is of sm_75, and fedkern._cuda was built for sm_80, sm_90, sm_100 and newer"
    )
    assert "sm_75, and Triton supports sm_80 and newer" in devices.only_forced("triton")
    assert devices.only_forced("cuda") == ""
    fake_gpus(monkeypatch, (9, 0), (7, 5))
    assert "GPU 1 (Tesla T4) is of sm_75" in why_not(fake_core())
    assert "CUDA_VISIBLE_DEVICES can hide it" in why_not(fake_core())


def test_a_gpu_between_what_the_core_was_built_for_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code serves later GPUs of its own generation, PTX those newer than it."""
    fake_gpus(monkeypatch, (9, 0))
    assert "is of sm_90" in why_not(fake_core(built_for=[80, 100]))
    fake_gpus(monkeypatch, (8, 0))
    assert "is of sm_80" in why_not(fake_core(built_for=[86]))


def test_a_driver_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, (9, 0))
    assert "built with CUDA 13.0 and the driver serves 12.6: update" in why_not(fake_core(driver=12060))
    assert "update the driver (580.65.06 or newer), or build with" in why_not(fake_core(driver=12060))
    assert why_not(fake_core(runtime=12090, driver=12060)) == ""  # drivers serve their own major version
    fake_gpus(monkeypatch, (12, 0))
    assert "newer than fedkern._cuda" in why_not(fake_core(runtime=12090, driver=12080))
    assert why_not(fake_core(runtime=12090, driver=13000)) == ""


def test_the_driver_that_a_core_needs_is_its_major_versions() -> None:
    assert (
        devices.driver_for(fake_core(runtime=12080))
        == devices.driver_for(fake_core(runtime=12090))
        == ("525.60.13 or newer")
    )
    assert devices.driver_for(fake_core(runtime=13010)) == "580.65.06 or newer"
    assert devices.driver_for(fake_core(runtime=14020)) == "one for CUDA 14.0 or newer"


def test_gpus_that_torch_cannot_use_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int = 0) -> tuple[int, int]:
        raise RuntimeError("CUDA error: uncorrectable ECC error\nCompile with TORCH_USE_CUDA_DSA")

    fake_gpus(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    assert why_not(fake_core()) == "torch cannot use the GPUs (CUDA error: uncorrectable ECC error)"
    assert devices.only_forced("triton") == why_not(fake_core())


def test_a_core_of_older_sources_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, (9, 0))
    assert "older sources" in why_not(SimpleNamespace())


@pytest.fixture
def fresh_gpus(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend a process without choices yet, whose torch and CUDA core know CUDA.

    Triton's kernels are stand-ins.
    """
    monkeypatch.setattr(private_torch, "raw_stream", lambda index: 0)
    monkeypatch.setattr(private_torch, "check_stream", lambda: None)  # of the GPUs that fake_gpus makes up
    monkeypatch.setattr(backend, "load_core", lambda name: fake_core())
    monkeypatch.setattr(backend, "is_interpreted", lambda: False)
    kernel = backend.Kernel(lambda: "triton's", frozenset(backend.DTYPES), frozenset({"cuda"}))
    monkeypatch.setitem(backend._kernels["blend"], "triton", kernel)


def choose() -> Any:
    return backend._choose("blend", "cuda")[0]


def reason(name: str) -> str:
    (row,) = (row for row in backend.status() if (row.operator, row.backend) == ("blend", name))
    return "" if row.serves else row.reason


@pytest.mark.usefixtures("fresh_gpus")
def test_cuda_serves_a_gpu_it_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, (9, 0))
    assert type(choose()).__name__ == "BlendKernels"
    assert choose().gpu
    assert reason("cuda") == reason("triton") == ""


@pytest.mark.usefixtures("fresh_gpus")
def test_an_old_driver_leaves_the_call_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "load_core", lambda name: fake_core(driver=12060))
    fake_gpus(monkeypatch, (9, 0))
    assert choose() == "triton's"
    assert "the driver serves 12.6" in reason("cuda")
    assert reason("triton") == ""


@pytest.mark.usefixtures("fresh_gpus")
@pytest.mark.parametrize(
    ("capability", "hip", "of_cuda", "of_triton"),
    [((7, 5), None, "sm_75", "sm_75"), ((9, 4), "6.4", "ROCm build (HIP 6.4)", "never tried on ROCm (HIP 6.4)")],
)
def test_an_old_gpu_and_rocm_are_left_to_the_reference(capability, hip, of_cuda, of_triton, monkeypatch) -> None:
    fake_gpus(monkeypatch, capability, hip=hip)
    assert choose() is None
    assert of_cuda in reason("cuda")
    assert of_triton in reason("triton")
    with backend.use_backend("cuda"), pytest.raises(RuntimeError, match=r"'cuda' was forced, but .* because "):
        choose()
    with backend.use_backend("triton"):
        assert choose() == "triton's"
        assert reason("triton") == ""


@pytest.mark.usefixtures("fresh_gpus")
def test_nothing_is_asked_again_for_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    fake_gpus(monkeypatch, (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: asked.append(index) or (7, 5))
    x = SimpleNamespace(device=torch.device("cuda"))
    assert backend.select("blend", x) is None
    before = len(asked)
    assert before
    assert backend.select("blend", x) is None
    assert len(asked) == before
