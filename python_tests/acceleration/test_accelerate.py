"""Tests of fedkern.accelerate: operators compute the numbers of the network as written, and nobody notices."""

import copy
import pickle
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import fedkern
from benchmarks.guests import LeNet, densenet, mobilenet, resnet, squeezenet, vgg
from fedkern.acceleration import calls, pending
from fedkern.ops._core import backend
from python_tests.guest_networks import WAYS, Doubling, Head, block, close, equal, play, sequential

SERVED = {
    "sequential": 6, "functional": 6, "residual": 12, "bottleneck": 2, "dropping": 0, "plain": 4, "pre-activation": 4,
    "branching": 2, "looping": 4, "asserting": 2, "squeezing": 2, "unet": 4, "unused": 0, "stopping": 3, "two": 0,
}  # fmt: skip
"""Convolutions of a call in each mode that an operator serves, at least."""
core = pytest.mark.skipif(not backend.active_isa().startswith("avx"), reason="the kernel serves AVX2 and AVX-512")


@pytest.fixture
def images():
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def fast(network):
    """Return the accelerated network, without checks and counts of its calls."""
    return fedkern.accelerate(network, check=False)


def make_network(name, seed=0):
    torch.manual_seed(seed)
    return WAYS[name]()


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
def test_what_waits_has_the_bits_of_what_is_written(name, images, monkeypatch):
    """The results equal those of the plain network, because torch's own layers compute every step."""
    monkeypatch.setattr(calls, "_serve", lambda chain, dense: None)
    network = make_network(name)
    assert equal(play(fedkern.accelerate(copy.deepcopy(network)), images), play(network, images))


@core
@pytest.mark.parametrize("name", WAYS)
def test_operators_serve_what_they_can(name, images, served_chains):
    network = make_network(name)
    found = play(fast(copy.deepcopy(network)), images)
    assert len(served_chains) >= SERVED[name]
    close(found, play(network, images))


@core
@pytest.mark.parametrize(("taps", "expected"), [(3, 1), (1, 0)])
def test_what_copies_would_cost_more_than_they_save_runs_as_written(taps, expected, images, served_chains):
    """A 1 × 1 convolution amid the network's own code saves less than copying its maps costs."""
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 32, taps, padding=taps // 2, bias=False)
    network = nn.Sequential(nn.Conv2d(3, 32, 7, padding=3), nn.GELU(), conv, nn.BatchNorm2d(32), nn.GELU())
    fast(network)(images)
    assert len(served_chains) == expected


@core
def test_the_operators_results_between_convolutions_are_not_moved(images, served_chains):
    network = fast(make_network("residual"))
    network(images)
    assert [chain.site.x.is_contiguous(memory_format=torch.channels_last) for chain in served_chains[1:]] == [True] * 5


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("name", ["sequential", "residual"])
def test_a_batch_of_one_and_none(name, batch, images):
    network = make_network(name).eval()
    found = fedkern.accelerate(copy.deepcopy(network))
    torch.testing.assert_close(found(images[:batch]), network(images[:batch]), rtol=1e-4, atol=1e-4)


def inference(network, images):
    with torch.inference_mode():
        return network(images)


def functional_call(network, images):
    given = {name: value * 1.1 for name, value in network.named_parameters()}
    return torch.func.functional_call(network, given, images)


def map_images(network, images):
    network.eval()
    return torch.vmap(lambda image: network(image[None])[0])(images)


def take_gradient(network, images):
    network.eval()
    return torch.func.grad(lambda given: network(given).square().sum())(images)


def autocast_around(network, images):
    with torch.autocast("cpu", torch.bfloat16):
        return network(images).float()


@pytest.mark.parametrize("way", [inference, functional_call, map_images, take_gradient, autocast_around])
def test_other_ways_to_call(way, images):
    network = make_network("residual")
    expected = way(copy.deepcopy(network), images)
    torch.testing.assert_close(way(fedkern.accelerate(network), images), expected, rtol=2e-3, atol=2e-3)


class Writing(Head):
    """A network whose maps are a function."""

    def __init__(self, write):
        super().__init__(16)
        (self.c1, self.b1), (self.c2, self.b2) = block(3, 16), block(16, 16)
        self.write = write

    def maps(self, x):
        return self.write(self, x)


def made_of(write):
    torch.manual_seed(0)
    return Writing(write)


def autocast_inside(net, x):
    x = net.b1(net.c1(x))
    with torch.autocast("cpu", torch.bfloat16):
        return F.relu(net.b2(net.c2(F.relu(x)))).float()


def in_place_handle(net, x):
    activated = net.b1(net.c1(x))
    two = F.relu(activated)
    activated.mul_(3)  # after the ReLU took it
    return activated + two


def two_norms(net, x):
    raw = net.c1(x)
    return net.b1(raw) + net.b2(raw)


def lists(net, x):
    maps = net.b1(net.c1(x))
    return torch.cat([maps, F.relu(maps)], 1)[:, 8:24] + torch.stack((maps, maps)).mean(0)


def numpy(net, x):
    maps = F.relu(net.b1(net.c1(x)))
    return maps + float(maps.detach().numpy().mean())


def other_argument(net, x):
    return torch.add(x.mean(1, keepdim=True), net.b1(net.c1(x)), alpha=2).relu() + torch.where(
        x[:, :1] > 0, net.c1(x), 0
    )


WRITTEN = autocast_inside, in_place_handle, two_norms, lists, numpy, other_argument


@pytest.mark.parametrize("write", WRITTEN, ids=lambda write: write.__name__)
def test_other_ways_to_write(write, images, monkeypatch):
    network = made_of(write)
    expected = play(copy.deepcopy(network), images)
    close(play(fedkern.accelerate(copy.deepcopy(network)), images), expected)
    monkeypatch.setattr(calls, "_serve", lambda chain, dense: None)
    assert equal(play(fedkern.accelerate(network), images), expected)


def tied(network):
    network[4].weight = nn.Parameter(network[4].weight.detach())
    network[8].weight = nn.Parameter(torch.cat([network[4].weight.detach()] * 2))
    network[0].weight.requires_grad_(False)


def spectral(network):
    spectral_norm(network[4])


def add_weight_norm(network):
    parametrizations.weight_norm(network[4])


def prune_weight(network):
    prune.l1_unstructured(network[4], "weight", amount=0.3)


def set_stride(network):
    network[4].stride = (2, 2)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("change", [tied, spectral, add_weight_norm, prune_weight, set_stride])
def test_other_layers(change, late, images):
    torch.manual_seed(0)
    network = sequential()
    fast_copy = fedkern.accelerate(copy.deepcopy(network)) if late else copy.deepcopy(network)
    for model in (network, fast_copy):
        torch.manual_seed(1)
        change(model)
    fast_copy = fast_copy if late else fedkern.accelerate(fast_copy)
    close(play(fast_copy, images), play(network, images))


def test_second_derivatives(images):
    network = make_network("sequential")
    for model in (network, fast_copy := fedkern.accelerate(copy.deepcopy(network))):
        x = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    for weight, two in zip(network.parameters(), fast_copy.parameters(), strict=True):
        torch.testing.assert_close(two.grad, weight.grad, rtol=1e-2, atol=1e-2 * float(weight.grad.abs().max()))


def test_two_threads_at_once(images):
    network = make_network("residual").eval()
    fast_copy = fedkern.accelerate(copy.deepcopy(network))
    found, expected = {}, network(images)

    def play(number):
        found[number] = [fast_copy(images + 0 * i) for i in range(5)]

    threads = [threading.Thread(target=play, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in (result for group in found.values() for result in group):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert len(found) == 4


# -- channels-last -----------------------------------------------------------------------------------------------------


@core
@pytest.mark.parametrize(
    ("make", "way"), [(squeezenet, "="), (mobilenet, "="), (densenet, "="), (LeNet, "+"), (resnet, "+"), (vgg, "+")]
)
def test_networks_whose_maps_would_be_copied_run_in_channels_last(make, way):
    """SqueezeNet's dropout draws the same numbers as in contiguous maps."""
    torch.manual_seed(0)
    network = make((1, 1, 1)) if make is resnet else make()
    images = torch.randn(4, 3, 32, 32)
    accelerated = fedkern.accelerate(copy.deepcopy(network))
    close(play(accelerated, images), play(network, images))
    assert calls.plan_of(accelerated)[:4] == f"{way}--{way}"


class Viewing(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


@core
@pytest.mark.parametrize(("end", "way"), [(nn.ReLU(), "="), (Viewing(), "-"), (nn.GroupNorm(4, 64), "-")])
def test_what_follows_gets_the_layout_that_it_needs(end, way):
    """Views and group norms, in which torch fails or ends the process in channels-last, get contiguous maps."""
    torch.manual_seed(0)
    network, images = nn.Sequential(*list(mobilenet())[:-3], end), torch.randn(4, 3, 32, 32)
    accelerated = fedkern.accelerate(copy.deepcopy(network))
    close(play(accelerated, images), play(network, images))
    assert calls.plan_of(accelerated)[0] == way
    assert accelerated(images).stride() == network(images).stride()
    images = images.contiguous(memory_format=torch.channels_last)
    if way == "=":
        assert accelerated(images).stride() == network(images).stride()


def test_a_network_without_convolutions_is_not_touched():
    network = fedkern.accelerate(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    assert not network._forward_hooks
    assert not network._forward_pre_hooks


# -- a bias before the norm -------------------------------------------------------------------------------------------


def make_biased(frozen=False):
    torch.manual_seed(0)
    network = sequential()
    for at in (0, 4, 8):
        network[at].bias = nn.Parameter(torch.linspace(-2, 2, network[at].out_channels))
        if frozen:
            network[at + 1].eval()
            network[at + 1].running_mean.normal_()
    return network


@core
def test_a_bias_that_the_norm_takes_out_again(images, served_chains):
    """The running mean moves by the bias, evaluation takes the bias off, and its gradient is zero."""
    plain, accelerated = make_biased(), fast(make_biased())
    for _ in range(3):
        expected, found = play(plain, images), play(accelerated, images)
    assert len(served_chains) == 18
    assert all(torch.count_nonzero(found[2][f"{at}.bias"]) == 0 for at in (0, 4, 8))
    assert all(float(expected[2][f"{at}.bias"].abs().max()) < 1e-3 for at in (0, 4, 8))
    close(found, expected)


def test_a_step_on_nan_ends_as_in_torch(images):
    results = []
    for network in (make_biased(), fedkern.accelerate(make_biased())):
        network(images * float("nan")).square().sum().backward()
        results.append((network[1].running_mean, network[0].bias.grad))
    assert all(torch.isnan(part).all() for result in results for part in result)


@core
def test_a_bias_before_a_frozen_norm_has_its_gradient(images, served_chains):
    grads = []
    for network in (make_biased(frozen=True), fast(make_biased(frozen=True))):
        network(images).square().sum().backward()
        grads.append([network[at].bias.grad for at in (0, 4, 8)])
    assert len(served_chains) == 3
    for left, two in zip(*grads, strict=True):
        torch.testing.assert_close(two, left, rtol=1e-3, atol=1e-3 * float(left.abs().max()))


# -- nobody notices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sequential", "residual"])
def test_a_network_looks_as_before(name):
    network = make_network(name)
    copied = copy.deepcopy(network)
    before = repr(network), [type(layer) for layer in network.modules()]
    assert fedkern.accelerate(copied) is copied
    assert (repr(copied), [type(layer) for layer in copied.modules()]) == before
    assert [*copied.state_dict()] == [*network.state_dict()]
    keys = [vars(layer).keys() for layer in network.modules()]
    for made_plain in (copied, pickle.loads(pickle.dumps(copied))):
        fedkern.plain(made_plain)
        assert [vars(layer).keys() for layer in made_plain.modules()] == keys
        assert not made_plain._forward_hooks
        assert not made_plain._forward_pre_hooks


def test_a_pickle_loads_without_fedkern(tmp_path, monkeypatch):
    torch.save(fedkern.accelerate(sequential()), tmp_path / "network.pt")
    for name in [name for name in sys.modules if name.partition(".")[0] == "fedkern"]:
        monkeypatch.setitem(sys.modules, name, None)
    network = torch.load(tmp_path / "network.pt", weights_only=False)
    images = torch.ones(2, 3, 16, 16)
    assert torch.equal(network.eval()(images), sequential().eval()(images)) or network(images).shape == (2, 5)


def test_others_see_what_they_saw(images):
    plain = sequential().eval()
    network = fedkern.accelerate(copy.deepcopy(plain))
    for made, kind in ((torch.fx.symbolic_trace(network), torch.fx.GraphModule), (_quantise(network), nn.Sequential)):
        assert isinstance(made, kind)
        torch.testing.assert_close(made(images), plain(images), rtol=1e-4, atol=1e-4)


def _quantise(network):
    """Return the network with modules of its convolutions' classes swapped, as quantisation does."""
    made = copy.deepcopy(network)
    for name, layer in made.named_children():
        if type(layer) is nn.Conv2d:
            setattr(made, name, nn.Sequential(copy.deepcopy(layer), nn.Identity()))
    return made


def test_opacus_validator_sees_the_layers():
    validators = pytest.importorskip("opacus.validators", reason="needs the extra [privacy]")
    found = [validators.ModuleValidator.validate(make) for make in (sequential(), fedkern.accelerate(sequential()))]
    assert list(map(str, found[0])) == list(map(str, found[1]))
    assert len(found[0]) == 3


@core
def test_a_deep_copy_is_accelerated_for_itself(images, served_chains):
    network = fast(make_network("sequential"))
    copied = copy.deepcopy(network)
    with torch.no_grad():
        network[0].weight.zero_()
    expected = fedkern.plain(copy.deepcopy(copied)).eval()(images)
    served_chains.clear()
    torch.testing.assert_close(copied.eval()(images), expected, rtol=1e-4, atol=1e-4)
    assert len(served_chains) == 3
    assert served_chains[0].site.weight is copied[0].weight


def test_a_part_that_is_called_alone_runs_as_written(images):
    network = fedkern.accelerate(make_network("functional"))
    assert type(network.c1(images)) is torch.Tensor
    assert torch.equal(network.maps(images), fedkern.plain(copy.deepcopy(network)).maps(images))


class Keeping(Head):
    def __init__(self):
        super().__init__(16)
        self.c1, self.b1 = block(3, 16)

    def maps(self, x):
        self.kept = self.b1(self.c1(x))
        self.first = self.c1(x)
        return F.relu(self.kept)


def test_what_outlives_a_call_is_computed_before_it_ends(images):
    network = Keeping().eval()
    copied = fedkern.accelerate(copy.deepcopy(network))
    network(images)
    copied(images)
    with torch.no_grad():
        copied.c1.weight.zero_()
        copied.b1.bias.zero_()
    torch.testing.assert_close(copied.kept + 0, network.kept, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(copied.first * 1, network.first, rtol=1e-4, atol=1e-4)


def test_a_call_that_fails_leaves_nothing_that_is_computed_later(images):
    class Failing(Keeping):
        fails = False

        def maps(self, x):
            x = self.c1(x)
            if self.fails:
                self.raw = x
                raise KeyError("here")
            return F.relu(self.b1(x))

    network = fast(Failing())
    network(images)
    network.fails = True
    with pytest.raises(KeyError, match="here"):
        network(images)
    with pytest.raises(RuntimeError, match="of a call of an accelerated network that failed"):
        network.raw + 0
    assert type(network.c1(images)) is torch.Tensor


class Interrupted(Keeping):
    stops = True

    def forward(self, x):
        x = F.relu(self.b1(self.c1(x)))
        if self.stops:
            raise KeyboardInterrupt
        return x


def test_the_call_after_an_interrupt_is_one_of_its_own(images):
    network = fedkern.accelerate(Interrupted().eval())
    with pytest.raises(KeyboardInterrupt):
        network(images)
    network.stops = False
    assert type(network(images)) is torch.Tensor
    assert type(network.c1(images)) is torch.Tensor


# -- hooks -------------------------------------------------------------------------------------------------------------


def on_layer(network, seen):
    return [network[2].register_forward_hook(lambda layer, given, out: seen.append(type(out)))]


def before_layer(network, seen):
    return [network[2].register_forward_pre_hook(lambda layer, given: seen.append(type(given[0])))]


def on_everything(network, seen):
    hook = torch.nn.modules.module.register_module_forward_hook
    return [hook(lambda layer, given, out: seen.append(type(out)))]


def on_gradients(network, seen):
    return [network[3].register_full_backward_hook(lambda layer, given, got: seen.append(type(got[0])))]


def on_root_gradients(network, seen):
    return [network.register_full_backward_hook(lambda layer, given, got: seen.append(type(got[0])))]


@pytest.mark.parametrize("put", [on_layer, before_layer, on_everything, on_gradients, on_root_gradients])
def test_with_somebody_s_hooks_a_network_runs_as_written(put, images):
    network, seen = make_network("sequential"), []
    copied = fedkern.accelerate(copy.deepcopy(network))
    handles = put(copied, seen)
    found = play(copied, images)
    for handle in handles:
        handle.remove()
    assert seen
    assert set(seen) == {torch.Tensor}
    assert equal(found, play(network, images))


@core
def test_a_hook_on_the_network_itself_sees_its_result(images, served_chains):
    network, seen = fast(make_network("sequential")), []
    network.register_forward_hook(lambda layer, given, out: seen.append((type(out), type(given[0]))))
    network(images)
    assert seen == [(torch.Tensor, torch.Tensor)]
    assert len(served_chains) == 3


@core
def test_fedkern_s_own_hooks_are_given_what_is_computed(images, served_chains):
    from fedkern.data.forms import ImageForm
    from fedkern.models.users.hooked import find_taps
    from fedkern.models.users.user_models import OwnNetwork

    network = make_network("functional").eval()
    own = [OwnNetwork(copy.deepcopy(network), "fc"), OwnNetwork(fast(copy.deepcopy(network)), "fc")]
    torch.testing.assert_close(own[1].features(images), own[0].features(images), rtol=1e-4, atol=1e-4)
    assert len(served_chains) == 3
    kind, *taps = find_taps(own[0], ["b2"], None, ImageForm((3, 16, 16), (0.5,) * 3, (0.2,) * 3), "net")
    plain, quick = (kind(net.module, *taps) for net in own)
    served_chains.clear()
    maps = [net.stages(images, upto="b2") for net in (plain, quick)]
    assert type(maps[1]) is torch.Tensor
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-4, atol=1e-4)
    logits = [net.head(net.tail(given * 2, after="b2")) for net, given in zip((plain, quick), maps, strict=True)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert served_chains


class Table(dict):
    """Mapping like transformers' results, whose entries are attributes too."""

    def __init__(self, **given):
        super().__init__(given)
        vars(self).update(given)


def test_results_that_are_attributes_and_entries_are_computed(images):
    class Several(Keeping):
        def forward(self, x):
            maps = self.b1(self.c1(x))
            return Table(logits=self.fc(F.relu(maps).mean((2, 3))), maps=maps)

    found = fedkern.accelerate(Several())(images)
    assert type(found) is Table
    assert type(found.logits) is type(found.maps) is type(found["maps"]) is torch.Tensor


# -- told, never silent ------------------------------------------------------------------------------------------------


@torch.jit.script
def double_relu(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) * 2


def doubling(net, x):
    return Doubling.apply(net.b1(net.c1(x)))


def scripting(net, x):
    return double_relu(net.b1(net.c1(x)))


def changing(net, x):
    x = x + 0
    raw = net.b1(net.c1(x))
    x.add_(1)
    return F.relu(raw)


def rectifying(net, x):
    return F.relu(net.b1(net.c1(x)))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (doubling, "A torch.autograd.Function took a tensor that fedkern.accelerate has not computed yet"),
        (scripting, "TorchScript interpreter"),
        (changing, "A tensor was changed in place before fedkern.accelerate computed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_cannot_wait_is_told(write, said, images):
    """A call that differs from the rehearsal is an error.

    After a rehearsal with such a call no layer waits.
    """
    images = images.contiguous(memory_format=torch.channels_last)  # which no convolution copies
    network, plain = fedkern.accelerate(made_of(write)), made_of(write)
    torch.testing.assert_close(network(images), plain(images), rtol=1e-4, atol=1e-4)
    network = fedkern.accelerate(made_of(rectifying))
    network(images)
    network.write = write
    with pytest.raises(RuntimeError, match=said):
        network(images).sum().backward()
    with pytest.raises(AttributeError, match=r"before torch\.jit\.script call fedkern\.plain"):
        torch.jit.script(network)


@pytest.fixture
def alone(tmp_path):
    """Yield a group of one process, for DDP and FSDP."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def shard(network):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    return torch.distributed.fsdp.fully_shard(network, mesh=mesh)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("around", [nn.parallel.DistributedDataParallel, shard], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("inside", [True, False])
def test_distributed(inside, around, images, served_chains):
    network = make_network("residual")
    network(images).square().sum().backward()
    expected = [p.grad for p in network.parameters()]
    network.zero_grad()
    wrapped = around(fast(network)) if inside else fast(around(network))
    wrapped(images).square().sum().backward()
    for p, grad in zip(wrapped.parameters(), expected, strict=True):
        found = p.grad.full_tensor() if around is shard else p.grad
        torch.testing.assert_close(found, grad, rtol=1e-2, atol=1e-2 * float(grad.abs().max()))
    assert len(served_chains) == (0 if around is shard else 6) or not backend.active_isa().startswith("avx")


@pytest.mark.exhaustive
def test_compiled(images):
    network = make_network("sequential").eval()
    compiled = torch.compile(fedkern.accelerate(copy.deepcopy(network)), backend="eager")
    torch.testing.assert_close(compiled(images), network(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict, images):
    network, axes = make_network("sequential").eval(), {"input": {0: torch.export.Dim("batch", min=1)}}
    served = fedkern.accelerate(copy.deepcopy(network))
    program = torch.export.export(served, (images,), dynamic_shapes=axes, strict=strict)
    assert torch.equal(program.module()(images[:1]), network(images[:1]))


@core
def test_another_network_around_it_is_no_call_of_its_own(images, served_chains):
    inner = fast(make_network("sequential"))
    outer = fast(nn.Sequential(nn.Conv2d(3, 3, 1), inner))
    outer(images)
    assert len(served_chains) == 3


def test_a_tensor_tells_what_is_known_without_being_computed(images):
    seen = []

    def write(net, x):
        raw = net.c1(x)
        seen.append((raw.shape, raw.dtype, raw.dim(), len(raw), raw.device.type))
        waits = type(raw) is pending.Pending and raw.__dict__["node"].value is None
        seen.append(waits)
        return net.b1(raw)

    fast(Writing(write))(images)
    assert seen[-2:] == [
        (torch.Size([6, 16, 16, 16]), torch.float32, 4, 6, "cpu"),
        backend.active_isa().startswith("avx"),
    ]
