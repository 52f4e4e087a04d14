"""Tests of FlatParameters: the module must not notice."""

import copy
import io
import pickle
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fedkern import models
from fedkern.ops import FlatParameters, adamw_step, sgd_step
from fedkern.ops import flat as flat_module

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Network with a convolution, batch norm with its integer buffer, a tied pair and an odd buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.encode = nn.Linear(8, 5, bias=False)
        self.decode = nn.Linear(8, 5)
        self.decode.weight = self.encode.weight
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.frozen = nn.Parameter(torch.randn(2, 3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return (self.encode(x) + self.decode(x)) * self.scale


def net(channels_last: bool = False) -> Net:
    torch.manual_seed(0)
    module = Net()
    return module.to(memory_format=torch.channels_last) if channels_last else module


def batch() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def train(module: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        module(batch()).pow(2).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("channels_last", [False, True])
def test_state_strides_and_outputs_stay(channels_last: bool) -> None:
    plain, module = net(channels_last), net(channels_last)
    identities = [id(t) for t in (*module.parameters(), *module.buffers())]
    flat = FlatParameters(module)
    assert [id(t) for t in (*module.parameters(), *module.buffers())] == identities
    before, after = plain.state_dict(), module.state_dict()
    assert list(before) == list(after)
    for key, value in before.items():
        assert torch.equal(value, after[key])
        assert value.stride() == after[key].stride()
        assert value.dtype == after[key].dtype
    assert torch.equal(plain(batch()), module(batch()))
    assert flat.is_flat


def laid_out(tensors: Iterable[Tensor]) -> Tensor:
    """Return the elements of tensors, each from a multiple of eight on."""
    vector = torch.zeros(0)
    for tensor in tensors:
        vector = torch.cat([vector, torch.zeros(-len(vector) % 8), tensor.detach().reshape(-1)])
    return vector


def test_vector_holds_everything_once_in_order() -> None:
    module = net()
    flat = FlatParameters(module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    buffers = [b for b in module.buffers() if b.is_floating_point()]
    assert torch.equal(flat.parameters, laid_out(parameters))
    assert torch.equal(flat.frozen, laid_out([module.frozen]))
    assert torch.equal(flat.buffers, laid_out(buffers))
    assert torch.equal(flat.vector, laid_out([*parameters, module.frozen, *buffers]))
    assert {tensor.data_ptr() % 16 for tensor in [*parameters, module.frozen, *buffers]} == {0}
    all_places, named = flat.places(), {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert list(all_places["frozen"]) == ["frozen"]
    for kind, places in all_places.items():
        for name, place in places.items():
            assert torch.equal(getattr(flat, kind)[place], named[name].detach().reshape(-1))
    assert sum(map(len, all_places.values())) == len(flat.layout()) + 2  # the number of batches, and the mask
    assert flat.parameters.data_ptr() == flat.vector.data_ptr()
    assert flat.vector.is_contiguous()
    assert torch.equal(flat.integers, torch.tensor([1, 0, 1, 0]))
    assert [name for name, *_ in flat.layout()].count("encode.weight") == 1
    assert "decode.weight" not in [name for name, *_ in flat.layout()]
    assert "parameters + " in repr(flat)


def test_vectors_fit_a_module_of_another_dtype() -> None:
    wide, narrow = FlatParameters(nn.Linear(3, 5)), FlatParameters(nn.Linear(3, 5).bfloat16())
    narrow.load(wide.vector)
    assert torch.equal(narrow.module.bias, wide.module.bias.bfloat16())
    assert {tensor.data_ptr() % 16 for flat in (wide, narrow) for tensor in flat.module.parameters()} == {0}


def test_a_buffer_that_views_a_parameter_is_found_among_the_parameters() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    module[0].register_buffer("shadow", module[0].bias.data)
    places = FlatParameters(module).places()
    assert places["parameters"]["0.shadow"] == places["parameters"]["0.bias"]
    assert set(places["buffers"]) == {"1.running_mean", "1.running_var"}


def test_writes_go_both_ways() -> None:
    module = net(True)
    flat = FlatParameters(module)
    flat.vector.mul_(2)
    assert torch.equal(module.conv.weight, net(True).conv.weight * 2)
    with torch.no_grad():
        module.norm.running_mean.fill_(7)
        module.encode.weight.fill_(3)
    assert int((flat.vector == 7).sum()) == 8
    assert torch.equal(module.decode.weight, torch.full((5, 8), 3.0))


def test_training_is_unchanged() -> None:
    plain, module = net(), net()
    flat = FlatParameters(module)
    train(plain)
    train(module)
    assert flat.is_flat
    assert torch.equal(flat.vector, FlatParameters(plain).vector)
    assert flat.integers[-1] == 3


def test_load_and_load_state_dict() -> None:
    module, source_net = net(), net()
    flat = FlatParameters(module)
    train(source_net)
    module.load_state_dict(source_net.state_dict())
    assert flat.is_flat
    source = FlatParameters(source_net)
    assert torch.equal(flat.vector, source.vector)
    flat.load(torch.zeros_like(flat.vector, dtype=torch.float64))
    assert not module.conv.weight.any()
    flat.load_vectors({"parameters": source.parameters})
    assert not flat.buffers.any()
    flat.load_vectors({"buffers": source.buffers})
    flat.load_vectors({"frozen": source.frozen})
    flat.load_integers(torch.tensor([0, 1, 1, 9]))
    assert torch.equal(flat.vector, source.vector)
    assert module.norm.num_batches_tracked.item() == 9
    assert module.norm.num_batches_tracked.dtype == torch.int64
    assert module.mask.tolist() == [False, True, True]
    flat.copy_(source)
    assert torch.equal(flat.integers, source.integers)


@pytest.mark.parametrize("left_out", ["", "parameters", "buffers", "integers"])
def test_load_vectors(left_out: str) -> None:
    """Given vectors go to their own places.

    Other entries of a message are no vectors of the module.
    """
    flat = FlatParameters(net())
    own = {name: getattr(flat, name).detach().clone() for name in ("parameters", "buffers", "integers")}
    given = {name: vector + 1 for name, vector in own.items() if name != left_out}
    given["integers"] = given.get("integers", own["integers"]).clamp(max=1)  # of a boolean mask too
    if left_out == "integers":
        del given["integers"]
    versions = [tensor._version for tensor in flat.module.parameters()]
    flat.load_vectors({**given, "logits": torch.zeros(3)})
    for name, before in own.items():
        assert torch.equal(getattr(flat, name), given.get(name, before)), name
    counted = [tensor._version for tensor in flat.module.parameters()]
    assert all(after > before for after, before in zip(counted, versions, strict=True))


def test_loading_is_seen_by_autograd() -> None:
    module = net()
    flat = FlatParameters(module)
    for write in (lambda: flat.load(flat.vector.clone()), lambda: (flat.vector.zero_(), flat.mark_changed())):
        loss = module(batch()).sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_copies_pickles_and_saved_files() -> None:
    module = net(True)
    flat = FlatParameters(module)
    train(module)
    size = 4 * flat.vector.numel()
    for twin in (copy.deepcopy(flat), pickle.loads(pickle.dumps(flat))):
        assert twin.is_flat
        assert twin.module is not module
        assert torch.equal(twin.vector, flat.vector)
        twin.vector.zero_()
        assert flat.vector.any()
    copied = copy.deepcopy(module)
    assert torch.equal(FlatParameters(copied).vector, flat.vector)
    assert copied.decode.weight is copied.encode.weight
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(FlatParameters(again).vector, flat.vector)
    # All tensors lie in one storage, which is written once.
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    assert len(buffer.getvalue()) < size + 20_000
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True)["conv.weight"], module.conv.weight)


def test_a_pickle_holds_every_tensor_once() -> None:
    """Pickle writes the whole storage of each tensor, and every storage is the vector."""
    module = models.build("resnet8", classes=10, channels=3, image_size=32, seed=0)
    module.to(memory_format=torch.channels_last)
    plain = len(pickle.dumps(module))
    flat = FlatParameters(module)
    before, memory = flat.vector.clone(), flat.vector.data_ptr()
    written = pickle.dumps(flat)
    assert len(written) < 1.02 * plain
    again = pickle.loads(written)
    assert again.is_flat
    assert again.layout() == flat.layout()
    assert torch.equal(again.vector, before)
    assert torch.equal(again.integers, flat.integers)
    assert flat.is_flat
    assert flat.module is module
    assert flat.vector.data_ptr() == memory


def test_the_storage_is_torchs_own() -> None:
    """The storage can be freed and resized again, as FSDP does with its parameters, and every tensor follows."""
    module = net()
    flat = FlatParameters(module)
    before = flat.vector.clone()
    assert all(p.untyped_storage().resizable() for p in (*module.parameters(), flat.gradients()))
    storage = module.conv.weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    assert flat.vector.untyped_storage().nbytes() == 0
    held = [torch.empty(size, dtype=torch.uint8) for _ in range(4)]  # another place than before
    storage.resize_(size)
    flat.vector.copy_(before)
    assert held
    assert flat.is_flat
    assert torch.equal(FlatParameters(copy.deepcopy(module)).vector, before)


def test_several_dtypes() -> None:
    module = net()
    module.encode.half()
    module.decode.weight = module.encode.weight
    flat = FlatParameters(module)
    assert set(flat.groups) == {torch.float32, torch.float16}
    assert flat.groups[torch.float16].parameters.numel() == 40
    assert flat.groups[torch.float16].buffers.numel() == 0
    with pytest.raises(ValueError, match=r"several dtypes \(torch.float32, torch.float16\); use groups\[dtype\]"):
        _ = flat.vector
    assert flat.gradients(torch.float16).shape == (40,)
    twin = copy.deepcopy(flat)
    twin.groups[torch.float16].vector.zero_()
    flat.copy_(twin)
    assert not module.encode.weight.any()


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_are_one_vector(channels_last: bool) -> None:
    plain, module = net(channels_last), net(channels_last)
    flat = FlatParameters(module)
    gradients = flat.gradients()
    for k in range(2):
        for m in (plain, module):
            m(batch()).pow(2).mean().backward()
        if k:
            module.zero_grad(set_to_none=True)
            module(batch()).pow(2).mean().backward()
            plain.zero_grad()
            plain(batch()).pow(2).mean().backward()
        assert flat.gradients() is gradients  # collects what was replaced
        for (name, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
            if not p.requires_grad:
                assert p.grad is None
                continue
            assert p.grad.stride() == p.stride(), name
            torch.testing.assert_close(p.grad, q.grad)
        view = torch.as_strided(gradients, (8, 3, 3, 3), module.conv.weight.stride(), flat.layout()[0][4])
        assert flat.layout()[0][0] == "conv.weight"
        torch.testing.assert_close(view, plain.conv.weight.grad)
    gradients.zero_()
    assert not module.conv.weight.grad.any()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    before = flat.parameters.clone()
    module(batch()).pow(2).mean().backward()
    optimizer.step()
    torch.testing.assert_close(flat.parameters, before - gradients)
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float32"):
        flat.gradients(torch.float64)


@pytest.mark.parametrize("channels_last", [False, True])
def test_views_under_functional_call_and_transforms(channels_last: bool) -> None:
    module = net(channels_last).eval()
    flat = FlatParameters(module)
    vector = flat.parameters.clone()
    views = flat.views(vector)
    for name, value in module.named_parameters():
        if not value.requires_grad:
            assert name not in views
            continue
        assert torch.equal(views[name], value)
        assert views[name].stride() == value.stride()

    def loss(vector: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(module, flat.views(vector), (x,)).pow(2).mean()

    gradient = torch.func.grad(loss)(vector, batch())
    module(batch()).pow(2).mean().backward()
    torch.testing.assert_close(gradient, flat.gradients())
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(vector, batch()[:, None])
    torch.testing.assert_close(gradients[1], torch.func.grad(loss)(vector, batch()[1:2]))
    assert set(flat.views(flat.vector)) == {name for name, *_ in flat.layout()}
    with pytest.raises(ValueError, match="vector must have shape"):
        flat.views(torch.zeros(3))


def test_compiled_module() -> None:
    module = net()
    flat = FlatParameters(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    train(compiled, 2)
    plain = net()
    train(plain, 2)
    assert flat.is_flat
    torch.testing.assert_close(flat.vector, FlatParameters(plain).vector)


def test_awkward_modules() -> None:
    assert FlatParameters(nn.ReLU()).vector.numel() == 0
    assert FlatParameters(nn.ReLU()).integers.numel() == 0
    assert FlatParameters(nn.ReLU()).views(torch.empty(0)) == {}
    empty = nn.Linear(3, 0)
    assert FlatParameters(empty).vector.numel() == 0
    expanded = nn.Module()
    expanded.w = nn.Parameter(torch.randn(3, 1).expand(3, 4))
    values = expanded.w.detach().clone()
    assert FlatParameters(expanded).vector.numel() == 12
    assert torch.equal(expanded.w, values)
    aliased = nn.Module()
    aliased.a = nn.Parameter(torch.randn(4))
    aliased.b = nn.Parameter(aliased.a.detach())  # another parameter over the same memory
    flat = FlatParameters(aliased)
    assert flat.vector.numel() == 4
    flat.vector.fill_(2)
    assert torch.equal(aliased.a, aliased.b)


def test_a_complex_module() -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.randn(2, 3, dtype=torch.complex64))
    flat, values = FlatParameters(module), torch.arange(6) * (1 + 2j)
    flat.load(values)
    assert torch.equal(module.w, values.reshape(2, 3))
    assert torch.equal(flat.views(values)["w"], module.w)
    with pytest.raises(TypeError, match=r"vector must be a floating-point tensor, not torch\.complex64"):
        FlatParameters(nn.Linear(2, 2)).load(values)


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (torch.zeros(3), TypeError, "module must be a torch.nn.Module, not Tensor"),
        (nn.LazyLinear(3), ValueError, "'weight' is not initialised yet"),
        (nn.Linear(2, 2, device="meta"), ValueError, "'weight' is on the meta device"),
    ],
)
def test_wrong_modules(module: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        FlatParameters(module)  # type: ignore[arg-type]


def test_overlapping_tensors_are_refused() -> None:
    module = nn.Module()
    memory = torch.randn(6)
    module.a, module.b = nn.Parameter(memory[:4]), nn.Parameter(memory[2:])
    with pytest.raises(ValueError, match="'a' and 'b' overlap in memory"):
        FlatParameters(module)


def test_wrong_vectors() -> None:
    flat = FlatParameters(net())
    with pytest.raises(ValueError, match="other must be a module of the same layout"):
        flat.copy_(FlatParameters(net(True)))
    module = net()
    with pytest.raises(RuntimeError, match="cannot be used under"):
        torch.func.vmap(lambda x: (FlatParameters(module), x)[1])(torch.ones(2))


READS = {
    "vector": lambda f: f.vector,
    "parameters": lambda f: f.parameters,
    "buffers": lambda f: f.buffers,
    "groups": lambda f: f.groups,
    "integers": lambda f: f.integers,
    "load": lambda f: f.load(torch.zeros(3)),
    "load_vectors": lambda f: f.load_vectors({"integers": torch.zeros(4, dtype=torch.int64)}),
    "load_integers": lambda f: f.load_integers(torch.zeros(4, dtype=torch.int64)),
    "copy_": lambda f: f.copy_(f),
    "copy_ of another": lambda f: FlatParameters(net()).copy_(f),
    "layout": lambda f: f.layout(),
    "views": lambda f: f.views(torch.zeros(3)),
    "gradients": lambda f: f.gradients(),
    "gradients of a dtype": lambda f: f.gradients(torch.float32),
    "mark_changed": lambda f: f.mark_changed(),
}


def _other(module: Net) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.load_state_dict(_other(m), assign=True),
        lambda m: m.half().float(),
        lambda m: m.double(),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: setattr(m.norm, "bias", nn.Parameter(torch.zeros(8))),
        lambda m: setattr(m, "scale", torch.tensor(2.0)),
        lambda m: m.norm.double(),
        lambda m: setattr(m.conv.weight, "data", m.conv.weight.data + 1),
        lambda m: setattr(m.conv, "weight", nn.Parameter(m.conv.weight.data)),  # another parameter in the same memory
        lambda m: setattr(m.norm, "running_mean", m.norm.running_mean + 1),
        lambda m: setattr(m, "norm", nn.BatchNorm2d(8)),
        lambda m: setattr(m, "more", nn.Linear(2, 2)),
        lambda m: m.register_buffer("other", torch.ones(2)),
        lambda m: delattr(m, "scale"),
        lambda m: setattr(m.conv, "bias", nn.Parameter(torch.zeros(8))),
        lambda m: setattr(m.decode, "weight", nn.Parameter(torch.zeros(5, 8))),  # tied no longer
    ],
)
def test_nothing_stale_is_read_or_written(change: object) -> None:
    module = net()
    flat = FlatParameters(module)
    flat.gradients()
    flat.check()
    change(module)  # type: ignore[operator]
    assert not flat.is_flat
    for name, read in READS.items():
        with pytest.raises(RuntimeError, match="the module is no longer flat: '"):
            pytest.fail(f"{name} gave {read(flat)}")
    assert repr(flat)
    assert flat.flatten() is flat
    flat.check()
    if len(flat.groups) == 1:
        flat.load(torch.zeros_like(flat.vector))
        assert not module.conv.weight.any()
    assert len(flat.integers) == sum(b.numel() for b in module.buffers() if not b.is_floating_point())


@pytest.mark.parametrize("made", ["module", "vectors", "gradients"])
def test_inference_mode_leaves_the_module_trainable(made: str) -> None:
    with torch.inference_mode(made == "module"):
        module = net()
    with torch.inference_mode(made != "gradients"):
        flat = FlatParameters(module)
    with torch.inference_mode():
        gradients = flat.gradients()
        flat.load(flat.vector * 2)
    assert not any(tensor.is_inference() for tensor in (flat.vector, gradients))
    if made == "module":  # its parameters are inference tensors, as they were
        return
    train(module)
    assert flat.gradients() is gradients
    assert gradients.any()


def test_parameters_that_share_memory_have_no_gradient_vector() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight.data = module[0].weight.data
    flat = FlatParameters(module)
    with pytest.raises(ValueError, match=r"'1\.weight' shares memory with '0\.weight' without being the same"):
        flat.gradients()
    module[1].weight = module[0].weight
    flat.flatten()
    module(torch.randn(2, 3)).sum().backward()
    assert torch.equal(flat.gradients()[:9].view(3, 3), module[0].weight.grad)


def _step(rule: str, flat: FlatParameters, gradients: Tensor, moments: tuple[Tensor, Tensor], number: int) -> None:
    if rule == "sgd":
        sgd_step(flat.parameters, gradients, moments[0], lr=0.1, momentum=0.9, weight_decay=0.1)
    else:
        adamw_step(flat.parameters, gradients, *moments, number, lr=0.1, weight_decay=0.1)


def _optimiser(rule: str, module: nn.Module) -> torch.optim.Optimizer:
    if rule == "sgd":
        return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    return torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)


def train_both(rule: str, flat: FlatParameters, plain: nn.Module, *, unused: bool = False) -> None:
    """Take three steps with each, after the first with the convolution alone if the others are ``unused``."""
    optimiser, gradients = _optimiser(rule, plain), flat.gradients()
    moments = torch.zeros_like(gradients), torch.zeros_like(gradients)
    for number in (1, 2, 3):
        gradients.zero_()
        optimiser.zero_grad(set_to_none=not unused)
        for own in (plain, flat.module):
            used = own.conv if unused and number > 1 else own
            used(batch()).square().mean().backward()
        _step(rule, flat, gradients, moments, number)
        optimiser.step()


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("frozen", [["conv.weight"], ["norm.weight", "norm.bias"], ["encode.weight"], []])
def test_steps_leave_frozen_parameters(rule: str, frozen: list[str]) -> None:
    """Frozen parameters are skipped, as in torch.optim."""
    plain, module = net(), net()
    for own in (plain, module):
        for name in frozen:
            own.get_parameter(name).requires_grad_(False)
    flat = FlatParameters(module)
    trained = [p for p in plain.parameters() if p.requires_grad]
    assert len(flat.gradients()) == len(flat.parameters) == len(laid_out(trained))
    untrained = [p for p in plain.parameters() if not p.requires_grad]
    assert torch.equal(flat.frozen, laid_out(untrained))
    assert len(flat.buffers) == len(laid_out(b for b in plain.buffers() if b.is_floating_point()))
    train_both(rule, flat, plain)
    for (name, got), expected in zip(module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, expected)
        assert got.requires_grad or torch.equal(got, net().get_parameter(name))


PERSONAL = ("norm.weight", "norm.running_mean", "norm.num_batches_tracked", "encode.weight")


def test_personal_tensors_are_in_no_vector_that_travels() -> None:
    module, plain = net(), FlatParameters(net())
    flat = FlatParameters(module, personal=PERSONAL)
    assert torch.equal(flat.personal, laid_out([module.norm.weight, module.encode.weight]))
    assert torch.equal(flat.personal_buffers, laid_out([module.norm.running_mean]))
    assert torch.equal(flat.buffers, laid_out([module.scale, module.norm.running_var]))
    assert len(flat.integers) == len(plain.integers) - 1
    places, all_places = flat.places(), plain.places()
    assert set(places["parameters"]) == set(all_places["parameters"]) - set(PERSONAL)
    assert set(places["personal"]) == {"norm.weight", "encode.weight"}
    assert set(places["personal_buffers"]) == {"norm.running_mean"}
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for kind, places_of_kind in places.items():
        for name, place in places_of_kind.items():
            assert torch.equal(getattr(flat, kind)[place], named[name].detach().reshape(-1)), name
    before = {name: named[name].detach().clone() for name in PERSONAL}
    flat.load_vectors({name: getattr(flat, name) + 1 for name in ("parameters", "buffers")})
    assert all(torch.equal(named[name], value) for name, value in before.items())
    copies = copy.deepcopy(flat), pickle.loads(pickle.dumps(flat))
    assert all(layout.layout() == flat.layout() for layout in copies)


def test_personal_gradients_are_those_of_the_whole() -> None:
    module, plain = net(), FlatParameters(net())
    flat = FlatParameters(module, personal=PERSONAL)
    assert flat.gradients().shape == flat.parameters.shape
    assert flat.personal_gradients().shape == flat.personal.shape
    for own in (module, plain.module):
        own(batch()).pow(2).mean().backward()
    for name, parameter in plain.module.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(module.get_parameter(name).grad, parameter.grad), name
    trained = [module.norm.weight, module.encode.weight]
    assert torch.equal(flat.personal_gradients(), laid_out([p.grad for p in trained]))
    flat.personal_gradients().zero_()
    assert not module.encode.weight.grad.any()
    assert module.conv.weight.grad.any()


def test_frozen_tensors_stay_with_the_frozen_and_a_frozen_module_keeps_its_layout() -> None:
    module = net()
    module.encode.weight.requires_grad_(False)
    flat = FlatParameters(module, personal=PERSONAL)
    assert set(flat.places()["personal"]) == {"norm.weight"}
    assert set(flat.places()["frozen"]) == {"frozen", "encode.weight"}
    linear, frozen = nn.Linear(3, 5), nn.Linear(3, 5).requires_grad_(False)
    assert FlatParameters(linear, ["bias"]).layout() == FlatParameters(frozen, ["bias"]).layout()


def test_what_cannot_be_personal() -> None:
    with pytest.raises(ValueError, match="personal must hold names of the module's tensors, which 'head' is not"):
        FlatParameters(net(), ["head"])
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight.data = module[0].weight.data
    with pytest.raises(ValueError, match=r"shares memory with '0\.weight' without being the same"):
        FlatParameters(module, ["1.weight"]).personal_gradients()


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_steps_take_an_unused_parameter_as_one_of_gradient_zero(rule: str) -> None:
    """Gradients in one vector cannot be missing, like those of torch.optim after ``zero_grad(set_to_none=False)``."""
    plain, module = net(), net()
    train_both(rule, FlatParameters(module), plain, unused=True)
    torch.testing.assert_close([*module.parameters()], [*plain.parameters()])
    assert not torch.equal(module.decode.bias, net().decode.bias)


def test_a_module_frozen_as_a_whole_keeps_its_layout() -> None:
    """A teacher or a model in evaluation takes the vectors of the model that is trained."""
    module, fixed = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    flat, frozen = FlatParameters(module), FlatParameters(fixed.requires_grad_(False))
    assert frozen.layout() == flat.layout()
    frozen.load_vectors({"parameters": flat.parameters})
    assert torch.equal(fixed[0].weight, module[0].weight)
    with pytest.raises(ValueError, match="Sequential has no gradients: all its parameters are frozen"):
        frozen.gradients()
    gradients = flat.gradients()
    module.requires_grad_(False)
    assert flat.is_flat
    frozen.copy_(flat)
    module.requires_grad_(True)
    assert flat.gradients() is gradients


def test_freezing_single_parameters_is_noticed() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    flat = FlatParameters(module)
    flat.gradients()
    module[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"requires_grad of '0\.weight' was changed.*call flatten\(\)"):
        _ = flat.parameters
    assert not flat.is_flat
    flat.flatten()
    assert torch.equal(flat.parameters, laid_out(module[1].parameters()))
    assert torch.equal(flat.frozen[:12].view(4, 3), module[0].weight)
    flat.load_vectors({"frozen": torch.ones_like(flat.frozen)})
    assert bool((module[0].weight == 1).all())
    assert bool((module[1].running_mean == 0).all())
    assert copy.deepcopy(flat).layout() == pickle.loads(pickle.dumps(flat)).layout() == flat.layout()
    with pytest.raises(ValueError, match=r"here \('1\.weight'.*there \('0\.weight'"):
        flat.copy_(FlatParameters(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))))
    for requires_grad in (False, True):  # as a whole, where each has another layout
        module.requires_grad_(requires_grad)
        with pytest.raises(RuntimeError, match="requires_grad of"):
            flat.gradients()
    assert len(flat.flatten().gradients()) == len(laid_out(module.parameters()))


def test_frozen_parameters_of_another_dtype() -> None:
    module = nn.Sequential(nn.Linear(3, 4).half().requires_grad_(False), nn.Linear(4, 2))
    flat = FlatParameters(module)
    assert len(flat.groups[torch.float16].frozen) == 20  # the bias begins at a multiple of eight
    assert flat.gradients(torch.float16).shape == (0,)
    assert flat.gradients(torch.float32).shape == (10,)


SAVED = {
    "torch.save of the module": lambda m: _save(m),
    "torch.save of the state": lambda m: _save(m.state_dict()),
    "torch.save of a part": lambda m: _save({"weight": m.state_dict()["conv.weight"]}),
    "torch.save of a layer's state": lambda m: _save(m.conv.state_dict()),
    "torch.save of a copy": lambda m: _save(copy.deepcopy(m)),
    "torch.save of a copied layer": lambda m: _save(copy.deepcopy(m.norm)),
    "pickle of the state": lambda m: pickle.dumps(m.state_dict()),
    "pickle of a copy": lambda m: pickle.dumps(copy.deepcopy(m)),
    "safetensors": lambda m: safetensors.torch.save(m.contiguous_state()),
}


def _save(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Saved(Net):
    """Network of tensors that are large beside a file's own description."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40))

    def contiguous_state(self) -> dict[str, Tensor]:
        return {key: value.contiguous() for key, value in self.state_dict().items() if key != "decode.weight"}


@pytest.mark.parametrize("how", list(SAVED))
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_library_saves_it_as_an_ordinary_module(how: str, channels_last: bool) -> None:
    module = Saved()
    module = module.to(memory_format=torch.channels_last) if channels_last else module
    ordinary = SAVED[how](copy.deepcopy(module))
    flat = FlatParameters(module)
    written = SAVED[how](module)
    if how.startswith("pickle"):  # it names storages by their addresses, decimal numbers of any length
        ordinary, written = (re.sub(rb"\d{9,}", b"0", saved) for saved in (ordinary, written))
    # torch.save of the module itself writes one storage instead of one a tensor.
    assert len(ordinary) - (20_000 if how == "torch.save of the module" else 0) <= len(written) <= len(ordinary)
    assert b"fedkern.ops" not in written
    assert flat.is_flat


@pytest.mark.parametrize("kind", ["module", "copy", "layer"])
def test_save_model_of_safetensors(kind: str, tmp_path: Path) -> None:
    module, loaded = Saved(), Saved()
    FlatParameters(module)
    source, target = {
        "module": (module, loaded), "copy": (copy.deepcopy(module), loaded), "layer": (module.more, loaded.more)
    }[kind]  # fmt: skip
    safetensors.torch.save_model(source, str(tmp_path / "model.safetensors"))
    safetensors.torch.load_model(target, str(tmp_path / "model.safetensors"))
    for key, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[key]), key


def test_save_pretrained_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    module = transformers.BertForMaskedLM(config)  # ties two weights
    module.save_pretrained(tmp_path / "ordinary")
    FlatParameters(module)
    module.save_pretrained(tmp_path / "flat")
    assert (tmp_path / "flat" / "model.safetensors").read_bytes() == (
        tmp_path / "ordinary" / "model.safetensors"
    ).read_bytes()


def test_a_state_dict_still_views_the_module() -> None:
    module = net(True)
    flat = FlatParameters(module)
    state = module.state_dict()
    assert state["encode.weight"].untyped_storage() is state["decode.weight"].untyped_storage()
    state["conv.weight"].fill_(3)
    state["scale"].fill_(5)
    assert bool((module.conv.weight == 3).all())
    assert float(module.scale) == 5
    assert module.state_dict(keep_vars=True)["conv.weight"] is module.conv.weight
    assert module.state_dict(keep_vars=True)["scale"] is module.scale
    assert flat.is_flat
    loss = module(batch()).sum()
    module.state_dict()
    loss.backward()  # nothing was written
    loss = module(batch()).sum()
    state["encode.weight"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_state_dict_is_walked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks of the module's parts would take quadratic time."""
    inner = net()
    FlatParameters(inner)
    walked = []
    monkeypatch.setattr(flat_module, "_tensors_of", lambda module: walked.append(module) or iter(()))
    for module in (inner, nn.Sequential(nn.Linear(2, 2), inner), inner.conv):
        state = module.state_dict()
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())
    assert walked == [inner, inner, inner.conv]


def test_state_dict_hooks_of_others_stay() -> None:
    module = net()
    handle = module.conv.register_state_dict_post_hook(_more)
    FlatParameters(module)
    assert "conv.more" in module.state_dict()
    assert "conv.more" in copy.deepcopy(module).state_dict()
    handle.remove()
    assert "conv.more" not in module.state_dict()
    handle = module.norm.register_state_dict_post_hook(_more)
    assert "norm.more" in pickle.loads(pickle.dumps(module)).state_dict()
    handle.remove()
    assert "norm.more" not in module.state_dict()


def _more(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    state[prefix + "more"] = torch.zeros(1)
