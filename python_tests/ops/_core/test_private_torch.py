"""torch's private names: without one the references serve, changed ones are noticed, and all stand in one file."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import sys
import types
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
from fedkern.ops._core import backend, loading, private_torch
from fedkern.ops._fuse.blocks import onednn

PACKAGE = Path(fedkern.__file__).parent

NAMES = [
    "_C._is_tracing",
    "_C._are_functorch_transforms_active",
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "_C._functorch.is_legacy_batchedtensor",
    "_C._functorch.is_batchedtensor",
    "_C._functorch.get_unwrapped",
    "_C._functorch.is_dead_tensor_wrapper",
    "_C._ForceDispatchKeyGuard",
    "_C._dispatch_tls_local_include_set",
    "_C._dispatch_tls_local_exclude_set",
    "autograd.forward_ad._current_level",
    "_C._autograd._top_saved_tensors_default_hooks",
    "_C.DisableTorchFunctionSubclass",
    "_C._autograd._get_current_graph_task_keep_graph",
    "_C._increment_version",
    "_utils._flatten_dense_tensors",
    "_foreach_add",
    "_foreach_add_",
]


def again() -> Any:
    """The module once more, as a new process would import it."""
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
    assert private_torch.PROBLEM == ""
    assert private_torch.table_problem(private_torch.exchange_table()) == ""
    assert private_torch.fused_adam(False) is torch._fused_adam_
    assert private_torch.fused_adam(True) is torch._fused_adamw_
    assert private_torch._engine() is not torch.Tensor.backward
    if torch.backends.mkldnn.is_available():
        assert private_torch.onednn() is not None


def test_an_import_under_a_transform_is_as_any() -> None:
    found = []
    torch.func.vmap(lambda x: (found.append(again()), x)[1])(torch.ones(2))
    with TorchDispatchMode():
        found.append(again())
    with torch.device("meta"), torch.inference_mode():
        found.append(again())
    for module in found:
        assert module.PROBLEM == module.table_problem(module.exchange_table()) == ""


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
def test_without_a_name_the_reference_serves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(*owner(name))
    module = again()
    monkeypatch.undo()
    assert module.PROBLEM.endswith(f"kernels need what torch {torch.__version__} lacks (torch.{name})")
    assert module.may_be_transformed() is True
    assert module.forward_ad._current_level == -1


def test_apply_is_found_without_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_FunctionBase", object)
    module = again()
    assert module.PROBLEM.endswith("(torch._C._FunctionBase.apply)")
    function = torch.autograd.Function
    assert module.apply_of(function) == function.apply


def test_public_calls_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES[-5:]:
        monkeypatch.delattr(*owner(name))
    module = again()
    monkeypatch.undo()
    rows, others = torch.randn(3, 5).unbind(), torch.randn(3, 5).unbind()
    assert module.graph_is_retained() is True
    before = rows[0]._version
    module.increment_version([rows[0]])
    assert rows[0]._version == before + 1
    assert torch.equal(module.flatten_dense(rows), private_torch.flatten_dense(rows))
    for mine, theirs in (
        (module.foreach_add(rows, others, alpha=3), private_torch.foreach_add(rows, others, alpha=3)),
        (in_place(module.foreach_add_, rows, others), in_place(private_torch.foreach_add_, rows, others)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("change", ["gone", "changed", "another signature"])
def test_fused_adam_is_tried(decoupled: bool, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["_fused_adam_", "_fused_adamw_"]
    name, other = reversed(names) if decoupled else names
    if change == "gone":
        monkeypatch.delattr(torch, name)
    else:
        monkeypatch.setattr(torch, name, getattr(torch, other) if change == "changed" else lambda parameters: None)
    loading.tell.cache_clear()
    with pytest.warns(loading.Slower, match=rf"stand in for torch\.{name}, which torch .* lacks or has changed"):
        adam = again().fused_adam(decoupled)
    for a, b in zip(stepped(adam), stepped(private_torch.fused_adam(decoupled)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("change", ["none", "gone", "changed", "another signature"])
def test_backward_is_tried(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, engine = again(), torch.autograd.Variable._execution_engine
    changed = {
        "gone": object(),
        "changed": types.SimpleNamespace(run_backward=lambda *given, **named: None),
        "another signature": types.SimpleNamespace(run_backward=lambda loss: None),
    }
    loading.tell.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(torch.autograd.Variable, "_execution_engine", changed.get(change, engine))
        with warnings.catch_warnings(record=True) as told:
            assert (module._engine() is torch.Tensor.backward) == bool(told) == (change != "none")
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    for _ in range(2):
        module.backward(x.square().sum())
    assert torch.equal(x.grad, 4 * x)
    with pytest.raises(RuntimeError, match="only for scalar outputs"):
        module.backward(x.square())
    with pytest.raises(RuntimeError, match="does not require grad"):
        module.backward(x.detach().sum())


def in_place(add: Callable[..., None], rows: Any, others: Any) -> list[torch.Tensor]:
    rows = [row.clone() for row in rows]
    add(rows, list(others), alpha=-0.5)
    add(rows, 1)
    return rows


def stepped(adam: Callable[..., None]) -> tuple[torch.Tensor, ...]:
    draws = torch.Generator().manual_seed(3)
    x, m, v, count = torch.randn(40, generator=draws), torch.zeros(40), torch.zeros(40), torch.zeros(())
    for _ in range(5):
        count += 1
        gradient = torch.randn(40, generator=draws)
        adam([x], [gradient], [m], [v], [], [count], lr=0.01, beta1=0.9, beta2=0.999, weight_decay=0.1, eps=1e-8,
             amsgrad=False, maximize=False)  # fmt: skip
    return x, m, v


def test_onednn_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    if private_torch.onednn() is None:
        pytest.skip("this torch has no oneDNN")
    module = again()
    loading.tell.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise", lambda *given: given[0], raising=False)
    with pytest.warns(loading.Slower, match=r"stand in for torch\.ops\.mkldnn\._convolution_pointwise, which"):
        assert module.onednn() is None


@pytest.mark.parametrize(("channels", "size"), [(1, 3), (2, 1), (2, 3)])
def test_sums_that_onednn_refuses_go_the_long_way(channels: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 has no fused sum of maps of one channel or one position."""
    known = private_torch.onednn()
    if known is None:
        pytest.skip("this torch has no oneDNN")
    summed = []

    def add(x: torch.Tensor, other: torch.Tensor, *rest: Any) -> torch.Tensor:
        if other.shape[1] == 1 or other.shape[2:].numel() == 1:
            raise RuntimeError("could not create a memory")
        summed.append(other)
        return known.convolve_and_add(x, other, *rest)

    monkeypatch.setattr(onednn, "onednn", lambda: known._replace(convolve_and_add=add, narrow=False))
    x = torch.randn(2, 4, size, size).contiguous(memory_format=torch.channels_last)
    weight, bias, other = torch.randn(channels, 4, 1, 1), torch.randn(channels), torch.randn(2, channels, size, size)
    other = other.contiguous(memory_format=torch.channels_last)
    conv: Any = types.SimpleNamespace(
        padding=(0, 0), stride=(1, 1), dilation=(1, 1), result_shape=lambda *_: other.shape
    )
    with torch.no_grad():
        found = onednn.convolve(conv, onednn.Prepared(), None, x, weight, bias, 1, other, True)
    torch.testing.assert_close(found, (torch.conv2d(x, weight, bias) + other).relu())
    assert bool(summed) == ((channels, size) == (2, 3))


def capsule(**changed: Any) -> object:
    """torch's own exchange table with other entries, kept alive for the whole process."""
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
    """Address of torch's own function that describes a tensor, followed by ``change`` of the description."""
    table = private_torch._Table.from_address(
        private_torch._POINTER(private_torch.exchange_table(), b"dlpack_exchange_api")
    )
    real = private_torch._READ(table.view)

    def read(tensor: torch.Tensor, view: Any) -> int:
        return real(tensor, view) or change(view.contents)

    called = private_torch._READ(read)
    _KEPT.append(called)
    return ctypes.cast(called, ctypes.c_void_p).value or 0


def shifted(view: Any) -> int:
    view.data, view.byte_offset = view.data - 4, 4
    return 0


def turned(view: Any) -> int:
    view.shape, view.strides = view.strides, view.shape
    return 0


def test_an_exchange_table_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert private_torch.table_problem(capsule()) == ""
    assert private_torch.table_problem(capsule(major=2, minor=1)) == "the table is of DLPack 2.1, not 1"
    assert private_torch.table_problem(capsule(view=None)) == "the table cannot describe tensors"
    for change in (shifted, turned):
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
    """A process that has chosen no kernel and told nothing yet."""
    monkeypatch.delenv("FEDKERN_BACKEND", raising=False)
    for name in ("_chosen", "_loaded", "_ordinary"):
        monkeypatch.setattr(backend, name, {})
    loading.tell.cache_clear()


def told(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if issubclass(one.category, loading.Slower)]


def several() -> None:
    x = torch.randn(4, 5)
    assert torch.equal(ops.kl_div(x, -x), ops.kl_div(x, -x))
    ops.entropy(x)
    ops.weighted_mean([x[0], x[1]], [1, 2])


@pytest.mark.usefixtures("fresh")
def test_a_problem_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(several) == []
    monkeypatch.setattr(backend, "_chosen", {})
    monkeypatch.setattr(backend, "_ordinary", {})
    monkeypatch.setattr(private_torch, "PROBLEM", "kernels need what torch 9.0 lacks (torch._C._x)")
    assert told(several) == [
        "plain PyTorch serves every operator, because kernels need what torch 9.0 lacks (torch._C._x)"
    ]
    rows = [row for row in backend.status() if row.backend != "reference" and row.reason != "not implemented"]
    assert all(not row.serves and "torch 9.0 lacks" in row.reason for row in rows)


@pytest.mark.usefixtures("fresh")
def test_other_machines_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than on Linux on x86-64 there is no core, which is no choice of the user's."""
    monkeypatch.setattr(loading.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(loading.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(loading, "_installed_core", lambda name: None)

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(loading.importlib, "import_module", absent)
    assert told(several) == [
        "plain PyTorch serves every operator, because fedkern's compiled kernels are made for Linux on x86-64, and "
        "this is Darwin on arm64"
    ]
    monkeypatch.setattr(loading.platform, "system", lambda: "Linux")
    monkeypatch.setattr(loading.platform, "machine", lambda: "x86_64")
    with pytest.raises(loading.Unavailable, match=r"^fedkern\._cpu was not built$"):
        loading.load_core("_cpu")


@pytest.mark.exhaustive
def test_without_all_names_everything_runs_its_reference() -> None:
    """In a process of its own: gradients, vmap, torch.func, a state that is written in place, and one sentence."""
    code = f"""
import functools
import torch
NAMES = {NAMES}
hidden = []
for name in NAMES:
    *path, last = name.split(".")
    owner = functools.reduce(getattr, path, torch)
    hidden.append((owner, last, getattr(owner, last)))
    delattr(owner, last)
from fedkern.ops._core import private_torch
for name in hidden:  # which torch itself calls
    setattr(*name)
from torch.nn import functional as F
from fedkern import ops
from fedkern.ops._core import backend

x, y = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
expected = F.kl_div(F.log_softmax(x, 1), F.softmax(y, 1), reduction="batchmean")
found = ops.kl_div(x, y)
torch.testing.assert_close(found, expected)
torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))
mapped = torch.func.vmap(ops.entropy)(torch.stack([x, y]).detach())
torch.testing.assert_close(mapped, torch.stack([ops.entropy(x), ops.entropy(y)]).detach())
torch.func.grad(lambda z: ops.kl_div(z, y))(x.detach())
total = ops.Accumulator(4)
total.add(torch.ones(4))
assert torch.equal(total.mean(), torch.ones(4))
flat, step = torch.ones(4), torch.full((4,), 2.0)
ops.sgd_step(flat, step, lr=0.5)
assert torch.equal(flat, torch.zeros(4))
ops.FlatParameters(torch.nn.Linear(2, 2))
blocks = ops.FusedBlocks([torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()) for _ in range(2)]).eval()
assert blocks(torch.randn(2, 1, 6, 6)).shape == (2, 4, 4, 4)
assert not any(row.serves for row in backend.status() if row.backend != "reference")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("plain PyTorch serves every operator, because kernels need what torch ") == 1, done.stderr
    assert all(f"torch.{name}" in done.stderr for name in NAMES)


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
