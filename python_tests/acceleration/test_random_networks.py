"""Tests on random networks: accelerated programs compute what they compute as written.

The network in float64 is the truth.  Rounding may put the accelerated network a few times as far from it as the plain
one in fp32, or as rounding what its layers take and their gradients does.  Draws in which rounding decides a ReLU or a
maximum are left out.
"""

import collections
import contextlib
import dataclasses
import random
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import fedkern
from fedkern.messages.leaves import leaves
from fedkern.ops._core import backend
from python_tests.guest_networks import Doubling  # noqa: F401, for the programs

EPS, ERRORS, ROUNDINGS = torch.finfo(torch.float32).eps, 8, 32
"""How far from the truth: errors of the plain network, and roundings of the largest magnitude."""
SENTENCES = {"A tensor was changed in place before fedkern.accelerate": "if self.calls ==",
             "A torch.autograd.Function took a tensor that fedkern.accelerate": "if self.calls ==",
             "modified by an inplace operation": "with torch.",
             "view size is not compatible": "if self.calls =="}  # fmt: skip
"""What an accelerated network may say, and to which programs."""
SHAPES = [(3, 8, 8), (16, 8, 8), (16, 8, 8), (32, 8, 8), (32, 8, 8), (16, 6, 6), (16, 1, 1)]
CONVOLUTIONS = [*["3, 1, 1"] * 8, *["1, 1, 0"] * 3, "3, 2, 1", "1, 2, 0", "5, 1, 2", "5, 1, 0", "3, 1, 0", "3, 1, 2, 2",
                "3, 1, 1, 1, {1}"]  # fmt: skip
NORMS = [*["BatchNorm2d({0})"] * 6, "BatchNorm2d({0}, momentum=None)", "BatchNorm2d({0}, affine=False)",
         "BatchNorm2d({0}, track_running_stats=False)", "GroupNorm({1}, {0})"]  # fmt: skip
SUMS = ["x = x + {0}", "x = {0} + x", "x += {0}", "x = {0}.add_(x)", "x = x.add({0}, alpha=0.5)", "x = x + x",
        "x = torch.add(input={0}, other=x)"]  # fmt: skip
RELUS = ["x = F.relu(x)", "x = x.relu_()", "x = torch.relu(x)", "x = F.relu(x, inplace=True)", "x = nn.ReLU(True)(x)",
         "x = nn.ReLU()(x)", "x = F.relu(F.relu(x))", "x = F.relu(x).relu_()", "x = F.relu(x) + 0.5 * x",
         "x = F.gelu(x)"]  # fmt: skip
POOLS = [*["x = F.max_pool2d(x, 2)"] * 4, "x = nn.MaxPool2d(3, 2, 1)(x)", "x = F.avg_pool2d(x, 2)",
         "x = F.max_pool2d(x, 2, 1)", "x = F.max_pool2d(x, 2, ceil_mode=True)"]  # fmt: skip
STEPS = [
    "x = x * 0.5", "x = x.contiguous(memory_format=torch.channels_last)", "x = x.flatten(2).view(x.shape)",
    "x = x.view(len(x), -1).reshape(x.shape)", "x = x.permute(0, 1, 3, 2)", "x = F.dropout(x, 0.25)", "x.mul_(0.5)",
    "x = x * (torch.rand(x.shape) > 0.2)", "x[:, 0] = 0", "x.data.mul_(1.5)", "x = x + x.detach().mean()", "x += 1",
    *["self.seen = x", "SEEN['map'] = x", "with torch.no_grad(): x = F.relu(x)"] * 2, "x = Doubling.apply(x)",
    "x.requires_grad and x.register_hook(torch.tanh)", "x.requires_grad and x.retain_grad() or SEEN.update(map=x)",
    "x = x + float(x.detach().double().mean())", "x = x.contiguous() if x.is_contiguous() else x * 2",
    "x = torch.relu_(x)",
]  # fmt: skip
FAILURES = ["{0}(x[:, :2])", "x += x[:, :2]", "F.max_pool2d(x, 99)", "{0}(x) + x[:, :2]"]
CHANGES = ["{0}.add_(0.25)", "{0}.mul_(0.5)", "{0}.copy_({0}.flip(0))"]
CONDITIONS = ["", "if not self.training:", *["if self.calls == 2:", "if self.calls == 3:"] * 2]
PARTS = [
    "x = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=True)", "with torch.no_grad(): x = part(x)",
    "x = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)", "with torch.enable_grad(): x = part(x)",
    "x = Recomputed.apply(part, x, *[p for p in self.parameters() if p.requires_grad])",
    "with torch.autograd.graph.save_on_cpu(): x = part(x)",
]  # fmt: skip
HEADS = ["x.mean((2, 3))", "torch.flatten(x, 1)", "x.view(len(x), -1)"]
RESULTS = ["y", "x", "y, x", "x, x", "[y, (x,)]", "dict(y=y, x=x)", "collections.OrderedDict(y=y, x=x)", "Record(y, x)",
           "collections.UserDict(y=y, x=x)", "Pair(y, x)", "collections.deque([y, x])", "dict(y=[Record(y, (x,))])",
           "y, F.relu(x), x"]  # fmt: skip
CALLS = [
    *["net.train(); do.step(net, x)"] * 3, *["net.eval(); do.look(net, x, torch.no_grad())"] * 2,
    "net.eval(); do.look(net, x, torch.inference_mode())", "net.train(); do.look(net, x, torch.no_grad())",
    "net.train(); {0}.eval(); do.step(net, x)", "net.eval(); do.step(net, x)", "net.train(); do.step(net, x, x * 2)",
    "net.train(); do.step(net, x[:1])", "net.train(); do.step(net, x.detach().requires_grad_())",
    "net.train(); do.step(net, x.contiguous(memory_format=torch.channels_last))",
    "do.step(net, x, call=lambda x: torch.func.functional_call(net, "
    "{{name: p * 1.5 for name, p in net.named_parameters()}}, x))",
]  # fmt: skip
BETWEEN = [
    "import copy; net = copy.deepcopy(net)", "import pickle; net = pickle.loads(pickle.dumps(net))", "net = clone(net)",
    "net.to(memory_format=torch.channels_last)", "{0}.requires_grad_(False)", "x = x.transpose(2, 3)",
    "{0}.weight.requires_grad_(False)", "{0}.register_forward_hook(lambda layer, args, out: out * 1.5)", "{0}.eps = 1",
    "{0}.register_full_backward_hook(lambda layer, into, out: do.note('hook', out[0]))", "{0}.bias = None",
    "net.register_forward_hook(lambda net, args, out: do.note('hook', args[0]))", "{0}.momentum = None",
    "{0}.weight = nn.Parameter({0}.weight * 2)", "{0}.register_forward_pre_hook(lambda layer, args: args[0] * 1.5)",
]  # fmt: skip


class Author:
    """Writer of a program: the layers of a network, its forward pass, and calls with what happens between them."""

    def __init__(self, seed):
        self.random, self.margin, self.layers, self.lines, self.maps = random.Random(seed), " " * 8, [], [], {}
        self.net, self.pick, self.shape = nn.Module(), self.random.choice, self.random.choice(SHAPES)

    def chance(self, probability):
        return self.random.random() < probability

    def write(self, *lines):
        self.lines += [self.margin + "    " * depth + line for depth, line in enumerate(filter(None, lines))]

    def apply(self, line):
        """Write a line that makes a map of ``x`` if it is defined for maps of such shapes."""
        maps = {name: torch.zeros(2, *shape) for name, shape in {**self.maps, "x": self.shape}.items()}
        scope = {**globals(), **maps, "self": self.net}
        with contextlib.suppress(RuntimeError):
            exec(line, scope)
            self.write(line)
            self.shape = tuple(scope["x"].shape[1:])

    def add_layer(self, kind):
        """Return the name of a layer, in some cases of an earlier one of the same kind."""
        if kind not in self.layers or self.chance(0.7):
            setattr(self.net, f"m{len(self.layers)}", eval(f"nn.{kind}"))
            self.layers.append(kind)
        return f"self.m{self.pick([number for number, layer in enumerate(self.layers) if layer == kind])}"

    def disturb(self):
        """Write what may happen between two layers."""
        kind = self.pick([*["nothing"] * 20, *["step"] * 5, *["change"] * 6, *["read", "failure"] * self.wild])
        tensors = [f"self.{name}" for name, tensor in self.net.state_dict().items() if tensor.is_floating_point()]
        name, condition = self.pick([*tensors[-6:], *[*self.maps][-2:]]), self.pick(CONDITIONS[0 if self.wild else 2 :])
        change = self.pick(CHANGES).format(name)
        if kind == "step" and (condition or not self.wild):
            self.write(condition, self.pick(STEPS))
        elif kind == "step":
            self.apply(self.pick(STEPS))
        elif kind == "failure":
            self.write("try:", self.pick(FAILURES).format(f"self.m{self.pick(range(len(self.layers)))}"))
            self.write("except RuntimeError:", "x = x * 1.5")
        elif kind == "read":
            self.write(self.pick([f"x = x + {name}.mean()", f"self.seen = {name} * 1"]))
        elif kind == "change" and name in tensors and "calls" not in condition and self.chance(0.4):
            if not name.endswith("bias"):  # an operator's backward pass takes the values of the call
                condition = "if not torch.is_grad_enabled():"
            self.write(condition, change.replace(name, f"{name}.data"))
        elif kind == "change":
            self.write(condition, f"with torch.{self.pick(['no_grad', 'inference_mode'])}():", change)

    def write_block(self):
        """Write a convolution with what may follow it: as usual, but for later calls, or in any order."""
        self.wild = self.chance(0.4)
        if self.chance(0.6):
            self.maps[f"h{len(self.lines)}"] = self.shape
            self.write(f"h{len(self.lines)} = x")
        kind = f"Conv2d({{0}}, {self.pick([16, 32, '{0}', '{0}'])}, {self.pick(CONVOLUTIONS)}, bias={self.chance(0.4)})"
        for layer in [kind] + [self.pick(NORMS)] * self.chance(0.75):
            layer = self.add_layer(layer.format(self.shape[0], 1 if self.shape[0] % 4 else 4))
            self.apply(f"x = {layer}(x)")
            self.disturb()
        if self.maps and self.chance(0.7):
            summand = self.pick([name for name in self.maps if self.maps[name] == self.shape] or [*self.maps])
            if (shape := self.maps[summand]) != self.shape or self.chance(0.2):
                kind = f"Conv2d({shape[0]}, {self.shape[0]}, 1, {shape[1] // self.shape[1]}, bias=False)"
                summand = f"{self.add_layer(kind)}({summand})"
            self.apply(self.pick(SUMS).format(summand))
            self.disturb()
        steps = [self.pick(RELUS)] * self.chance(0.9) + [self.pick(POOLS)] * self.chance(0.4)
        for line in steps if self.chance(0.8) else steps[::-1]:
            self.apply(line)
            self.disturb()

    def write_part(self):
        """Write a block as a function that is called in a mode or without storing its maps."""
        maps = dict(self.maps)
        self.write("def part(x):")
        self.margin += "    "
        self.write_block()
        self.write("return x")
        self.maps, self.margin = maps, self.margin[4:]
        self.write(self.pick(PARTS))

    def write_program(self):
        shape = ", ".join(map(str, self.shape))
        for _ in range(self.pick([1, 2, 3, 4])):
            self.pick([self.write_block] * 3 + [self.write_part])()
        if self.chance(0.2):
            self.apply("x = torch.cat([x, x * 2], 1)")
        head = self.pick(HEADS)
        features = eval(head, {"torch": torch, "x": torch.zeros(1, *self.shape)}).shape[1]
        calls = [f"x = torch.randn(3, {shape}).to(do.dtype)", f"net = do.accelerate(net, check={self.chance(0.2)})"]
        for number in range(self.pick([3, 4])):
            layer = f"net.m{self.pick(range(len(self.layers)))}"
            calls += [self.pick(BETWEEN).format(layer)] * self.chance(0.3 if number else 0.1)
            calls += [self.pick(CALLS if number and self.chance(0.6) else CALLS[:1]).format(layer)]
        return "\n".join([
            "class Net(nn.Module):", "    def __init__(self):", "        super().__init__()", "        self.calls = 0",
            *[f"        self.m{number} = nn.{layer}" for number, layer in enumerate(self.layers)],
            f"        self.fc = nn.Linear({features}, 4)", "    def forward(self, x):", "        self.calls += 1",
            *self.lines, f"        y = self.fc({head})", f"        return {self.pick(RESULTS)}",
            "def play(do, net):", *[f"    {line}" for line in calls],
        ])  # fmt: skip


# -- what programs use -------------------------------------------------------------------------------------------------

SEEN = {}
Record, Pair = dataclasses.make_dataclass("Record", ["y", "x"], frozen=True), collections.namedtuple("Pair", ["y", "x"])


class Recomputed(torch.autograd.Function):
    """A part whose maps are not stored, as in reversible networks."""

    @staticmethod
    def forward(ctx, part, x, *parameters):
        ctx.part = part
        ctx.save_for_backward(x, *parameters)
        return part(x.detach() * 1)

    @staticmethod
    def backward(ctx, gradient):
        x, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.part(x * 1)
        return None, *torch.autograd.grad(y, [x, *parameters], gradient, allow_unused=True)


def clone(module):
    """Return a copy by the dictionaries of modules, as in meta-learning."""
    twin = module.__new__(type(module))
    twin.__dict__ = module.__dict__.copy()
    twin._parameters = {name: p if p is None else nn.Parameter(p * 1.5) for name, p in module._parameters.items()}
    twin._buffers = {name: b if b is None else b * 1 for name, b in module._buffers.items()}
    twin._modules = {name: clone(part) for name, part in module._modules.items()}
    return twin


class Recorder:
    """Record of what a program sees: names, types and layouts, and values in float64."""

    def __init__(self, dtype, accelerate):
        self.dtype, self.accelerate, self.log = dtype, accelerate, []

    def note(self, name, tensor, *about):
        if tensor is not None:
            about += type(tensor), tensor.shape, tensor.requires_grad, tensor.is_leaf
            tensor = tensor.detach().double().clone(memory_format=torch.contiguous_format)
        self.log.append(((name, *about), tensor))

    def note_results(self, net, parts):
        """Record results, the maps that the network's code has stored, and buffers."""
        for part in parts:
            self.note("result", part, part.stride(), [part is twin for twin in parts], part._is_view())
        parts += [tensor for tensor in (SEEN.pop("map", None), vars(net).pop("seen", None)) if tensor is not None]
        for name, tensor in [*(("map", part * 1) for part in parts), *net.named_buffers()]:
            self.note(name, tensor)

    def look(self, net, x, mode):
        torch.manual_seed(len(self.log))
        with mode:
            self.note_results(net, list(leaves(net(x))))

    def step(self, net, *inputs, call=None):
        """Record a step of gradient descent."""
        torch.manual_seed(len(self.log))
        parts = [part for x in inputs for part in leaves((call or net)(x))]
        self.note_results(net, parts)
        loss = sum((part * torch.arange(part.numel()).cos().view(part.shape)).mean() for part in parts)
        if loss.requires_grad:
            loss.backward()
        for x in (*inputs, *parts):
            self.note("gradient of a map", x.grad if x.is_leaf or x.retains_grad else None)
        for name, parameter in net.named_parameters():
            self.note(f"gradient of {name}", parameter.grad)
            if parameter.grad is not None:
                parameter.data.sub_(parameter.grad)
        net.zero_grad()


class Decisions(TorchFunctionMode):
    """Record of the numbers whose signs decide which way a gradient goes."""

    def __init__(self, noise):
        super().__init__()
        self.noise, self.generator, self.log = noise, torch.Generator(), []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name in ("relu", "relu_"):
            self.log.append(args[0].detach().double().clone())
        elif name == "max_pool2d":
            size, stride, padding = args[1], kwargs["stride"] or args[1], kwargs["padding"]
            x = F.pad(args[0].detach().double(), [padding, padding + size] * 2, value=-torch.inf)
            windows = x.unfold(2, size, stride).unfold(3, size, stride).flatten(4)
            self.log.append(-windows.topk(2).values.diff().nan_to_num(0, 0, 0))
        if self.noise and name in ("conv2d", "batch_norm", "group_norm", "linear"):
            args = self.add_noise(args[0]), *args[1:]
            if args[0].requires_grad:
                args[0].register_hook(self.add_noise)
        return function(*args, **kwargs)

    def add_noise(self, tensor):
        return tensor * (1 + self.noise * torch.randn(tensor.shape, dtype=torch.float64, generator=self.generator))


# -- the comparison ----------------------------------------------------------------------------------------------------


def play(text, dtype=torch.float32, accelerate=None, noise=0):
    """Return what a program sees, the decisions that it takes, and the error that it ends with."""
    scope = {**globals(), "__name__": "drawn"}
    exec(text, scope)
    sys.modules["drawn"] = types.SimpleNamespace(**scope)
    SEEN.clear()
    torch.manual_seed(0)
    net, recorder = scope["Net"](), Recorder(dtype, accelerate or (lambda net, check: net))
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data += 0.3 * torch.rand(tensor.shape) if tensor.is_floating_point() else 0
    decisions, error = Decisions(noise), None
    try:
        with contextlib.nullcontext() if accelerate else decisions:
            scope["play"](recorder, net.to(dtype))
    except Exception as raised:
        error = raised
    return recorder.log, decisions.log, error


def bound_error(truth, *values):
    """Return how far from the truth another algorithm's result may be."""
    error = max(float((value - truth).abs().max()) for value in values)
    return ERRORS * error + ROUNDINGS * EPS * float(truth.abs().max())


def judge(text, served_chains):
    """Return the faults of an accelerated network.

    None where rounding decides, torch refuses the program, or no operator serves it.
    """
    # torch ends the process, or writes beyond its memory: where the input of a group norm is frozen, and in the
    # gradient of the weights of a strided 1x1 convolution of few channels.
    if "channels_last" in text and re.search(r"GroupNorm|Conv2d\((\d|1[0-5]), \d+, 1, [2-9]", text):
        return None
    if re.search(r"if self.calls == \d:\n.*(channels_last|contiguous\(\)|dropout|permute)", text):  # unrehearsed
        return None
    exact, plain, noisy = play(text, torch.float64), play(text), play(text, torch.float64, noise=EPS)
    if exact[2] or plain[2] or noisy[2]:
        return None
    for truth, *values in zip(exact[1], plain[1], noisy[1], strict=True):
        zeros = (truth == 0) & (values[0] == 0) & (values[1] == 0)
        if not bool((zeros | (truth.abs() > bound_error(truth, *values))).all()):
            return None
    served_chains.clear()
    found, _, error = play(text, accelerate=fedkern.accelerate)
    if error is not None and not any(sentence in str(error) and way in text for sentence, way in SENTENCES.items()):
        return [repr(error)]
    if not served_chains:
        return None
    faults = [] if error or len(found) == len(exact[0]) else ["another number of tensors"]
    for (about, value), *runs in zip(found, plain[0], exact[0], noisy[0], strict=False):
        expected, truths = runs[0][0], [tensor for _, tensor in runs]
        if about != expected:
            faults.append(f"{about} is not {expected}")
        elif value is not None:
            limit, distance = bound_error(truths[1], *truths), float((value - truths[1]).abs().max())
            if about[0] == "result" and not limit < 0.01 * float(truths[1].abs().max()):
                return None  # a network that diverges, or draws other numbers in float64
            if not distance <= limit:
                faults.append(f"{about[0]}: {distance:.1e} off, where {limit:.1e} is rounding")
    return faults


@pytest.mark.parametrize(
    "seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(8, 200))]
)
@pytest.mark.filterwarnings("error:fedkern", "ignore:None of the inputs")
@pytest.mark.skipif(not backend.active_isa().startswith("avx"), reason="the kernel serves AVX2 and AVX-512")
def test_random_networks_compute_what_they_compute_as_written(seed, served_chains):
    texts = (Author(f"{seed} {attempt}").write_program() for attempt in range(100))
    text, faults = next((text, faults) for text in texts if (faults := judge(text, served_chains)) is not None)
    assert not faults, text
