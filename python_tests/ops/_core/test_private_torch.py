"""Tests of torch's private names: missing ones are named, changed ones are noticed, and all stand in one file."""

import ctypes
import importlib.util
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fedkern
from fedkern import ops
from fedkern.errors import UserError
from fedkern.ops._core import backend, loading, private_torch

PACKAGE = Path(fedkern.__file__).parent

NAMES = [
    "_C._is_tracing", "_C._are_functorch_transforms_active", "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack", "_C._functorch.is_legacy_batchedtensor", "_C._functorch.is_batchedtensor",
    "_C._functorch.is_functorch_wrapped_tensor", "_C._functorch.get_unwrapped",
    "_C._functorch.is_dead_tensor_wrapper", "_C._ForceDispatchKeyGuard", "_C._dispatch_tls_local_include_set",
    "_C._dispatch_tls_local_exclude_set", "autograd.forward_ad._current_level",
    "_C._autograd._top_saved_tensors_default_hooks", "_C.DisableTorchFunctionSubclass",
    "_C._autograd._get_current_graph_task_keep_graph", "_C._increment_version", "_utils._flatten_dense_tensors",
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
