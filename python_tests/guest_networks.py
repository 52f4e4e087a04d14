"""Networks as their authors write them in plain torch.nn: fifteen ways, and whole networks of the literature."""

import torch
import torch.nn.functional as F
from torch import nn

from fedkern.messages.leaves import leaves


def block(channels_in, channels_out, stride=1, bias=False):
    return nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=bias), nn.BatchNorm2d(channels_out)


class Head(nn.Module):
    """Global average and classifier behind ``maps``."""

    def __init__(self, channels, classes=5):
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.maps(x), 1), 1))


class TwoBlocks(Head):
    """Two blocks of 16 channels, for ``maps`` to use."""

    def __init__(self):
        super().__init__(16)
        (self.c1, self.b1), (self.c2, self.b2) = block(3, 16), block(16, 16)


def sequential():
    layers = []
    for inputs, outputs in ((3, 16), (16, 16), (16, 32)):
        layers += [*block(inputs, outputs), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))


class Functional(Head):
    """Network of functions and methods, in place and not.

    It pools before and behind the ReLU, and uses a view.
    """

    def __init__(self):
        super().__init__(32)
        (self.c1, self.b1), (self.c2, self.b2), (self.c3, self.b3) = block(3, 16), block(16, 16), block(16, 32)

    def maps(self, x):
        x = F.max_pool2d(F.relu(self.b1(self.c1(x))), 2)
        x = self.b2(self.c2(x)).relu_()
        x = torch.relu(F.max_pool2d(self.b3(self.c3(x)), (2, 2)))
        return x.view(x.size(0), x.size(1), -1, x.shape[3])


class Residual(Head):
    """Residual blocks, with a projection and without, that add in place."""

    def __init__(self):
        super().__init__(32)
        self.stem, self.stem_norm = block(3, 16)
        (self.c1, self.b1), (self.c2, self.b2) = block(16, 16), block(16, 16)
        (self.c3, self.b3), (self.c4, self.b4) = block(16, 32, 2), block(32, 32)
        self.down = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
        self.relu = nn.ReLU(inplace=True)

    def maps(self, x):
        x = self.relu(self.stem_norm(self.stem(x)))
        out = self.b2(self.c2(self.relu(self.b1(self.c1(x)))))
        out += x
        x = self.relu(out)
        return F.relu(self.b4(self.c4(F.relu(self.b3(self.c3(x))))) + self.down(x))


class Bottleneck(Head):
    def __init__(self):
        super().__init__(32)
        self.c1, self.b1 = nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.c2, self.b2 = block(16, 16)
        self.c3, self.b3 = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.short = nn.Conv2d(3, 32, 1, bias=False)

    def maps(self, x):
        out = self.b3(self.c3(F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))))))
        return F.relu(out.add(self.short(x)))


class Dropping(Head):
    """Network with dropout and a bias before the norm."""

    def __init__(self):
        super().__init__(16)
        self.c1, self.b1 = block(3, 16, bias=True)
        self.c2, self.b2 = block(16, 16)

    def maps(self, x):
        x = F.relu(self.b1(F.dropout(self.c1(x), 0.3, self.training)))
        return F.relu(self.b2(F.dropout2d(self.c2(x), 0.2, self.training)))


class Plain(Head):
    """Network without norms."""

    def __init__(self):
        super().__init__(16)
        self.c1, self.c2 = nn.Conv2d(3, 16, 5, padding=2), nn.Conv2d(16, 16, 3, padding=1)

    def maps(self, x):
        return F.relu(self.c2(F.max_pool2d(F.relu(self.c1(x)), 2)))


class PreActivation(Head):
    """Network with norms before convolutions.

    The stem's raw result is used twice.
    """

    def __init__(self):
        super().__init__(16)
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.b1, self.c1, self.b2 = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.c2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)

    def maps(self, x):
        x = self.stem(x)
        return F.relu(x + self.c2(F.relu(self.b2(self.c1(F.relu(self.b1(x)))))))


class Branching(TwoBlocks):
    """Network with a result that is used twice, and a branch on the data."""

    def maps(self, x):
        raw = self.b1(self.c1(x))
        x = F.relu(raw) + 0.1 * raw
        if float(x.detach().mean()) > 0:
            x = self.b2(self.c2(x))
        return torch.cat([x, raw], 1)[:, :16]


class Looping(Head):
    """Network with a shared layer in a loop of random length."""

    def __init__(self):
        super().__init__(16)
        self.stem, self.norm = block(3, 16)
        self.conv, self.other = block(16, 16)

    def maps(self, x):
        x = F.relu(self.norm(self.stem(x)))
        for _ in range(1 + int(torch.randint(3, ()))):
            x = F.relu(self.other(self.conv(x)) + x)
        return x


class Asserting(TwoBlocks):
    """Network that looks at shapes, strides and dtypes, and takes a strided view."""

    def maps(self, x):
        out = self.c1(x)
        b, c, h, w = out.shape
        assert (out.dim(), out.ndim, out.size(1), len(out), out.numel()) == (4, 4, c, b, b * c * h * w)
        assert (out.dtype, out.requires_grad) == (torch.float32, torch.is_grad_enabled())
        x = F.relu(self.b1(out))
        assert x.is_contiguous()
        assert x.stride() == (c * h * w, h * w, w, 1)
        x = torch.as_strided(x, (b, c, h, w // 2), x.stride())
        return F.relu(self.b2(self.c2(x)))


class Squeezing(Head):
    """Network with squeeze and excitation, group norm and a leaky ReLU."""

    def __init__(self):
        super().__init__(16)
        self.c1, self.b1 = block(3, 16)
        self.c2, self.g2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.GroupNorm(4, 16)
        self.down, self.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def maps(self, x):
        x = F.leaky_relu(self.b1(self.c1(x)), 0.1)
        x = F.relu(self.g2(self.c2(x)))
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class UNet(Head):
    """Encoder and decoder with a shortcut."""

    def __init__(self):
        super().__init__(16)
        (self.c1, self.b1), (self.c2, self.b2), (self.c3, self.b3) = block(3, 16), block(16, 32), block(48, 16)

    def maps(self, x):
        fine = F.relu(self.b1(self.c1(x)))
        two = F.relu(self.b2(self.c2(F.max_pool2d(fine, 2))))
        return F.relu(self.b3(self.c3(torch.cat([fine, F.interpolate(two, scale_factor=2)], 1))))


class Unused(TwoBlocks):
    """Network with unused results, whose statistics move."""

    def maps(self, x):
        x = F.relu(self.b1(self.c1(x)))
        self.b2(self.c2(x))
        return x


class Stopping(TwoBlocks):
    """Network with a part without gradients."""

    def maps(self, x):
        with torch.no_grad():
            x = F.relu(self.b1(self.c1(x)))
        raw = self.b2(self.c2(x))
        with torch.no_grad():
            gate = F.relu(raw)
        return raw + gate


class Two(nn.Module):
    """Network with several outputs, in a dict."""

    def __init__(self):
        super().__init__()
        self.c1, self.b1 = block(3, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        maps = self.b1(self.c1(x))
        return {"logits": self.fc(F.relu(maps).mean((2, 3))), "maps": [maps, (maps, F.relu(maps))]}


class Doubling(torch.autograd.Function):
    """Hidden doubling that torch's functions do not see."""

    @staticmethod
    def forward(ctx, given):
        return given * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


WAYS = {
    "sequential": sequential, "functional": Functional, "residual": Residual, "bottleneck": Bottleneck,
    "dropping": Dropping, "plain": Plain, "pre-activation": PreActivation, "branching": Branching, "looping": Looping,
    "asserting": Asserting, "squeezing": Squeezing, "unet": UNet, "unused": Unused, "stopping": Stopping, "two": Two,
}  # fmt: skip


# -- what they compute ------------------------------------------------------------------------------------------------


def play(network, images, seed=5):
    """Return the outputs in both modes, and gradients and buffers after a step in train mode."""
    network.train()
    network.zero_grad()
    torch.manual_seed(seed)
    out = list(leaves(network(images)))
    sum(
        (leaf * torch.linspace(-1, 1, leaf.numel(), dtype=leaf.dtype).view(leaf.shape)).sum() for leaf in out
    ).backward()
    network.eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        later = list(leaves(network(images)))
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return [leaf.detach() for leaf in out], later, gradients, dict(network.named_buffers())


def equal(got, wanted, exact=True):
    """Return whether two results of :func:`play` have the same bits.

    Unless ``exact``, gradients of several sums may differ by rounding.
    """
    pairs = [*zip(got[0], wanted[0], strict=True), *zip(got[1], wanted[1], strict=True)]
    pairs += [(got[3][name], wanted[3][name]) for name in got[3]]
    gradients = [(got[2][name], wanted[2][name]) for name in got[2]]
    largest = max((float(grad.abs().max()) for grad in wanted[2].values() if grad is not None), default=0.0)
    near = all(a is b is None or torch.allclose(a, b, rtol=1e-5, atol=1e-5 * largest) for a, b in gradients)
    equal_values = all(torch.equal(a, b) for a, b in pairs)
    return equal_values and (near if not exact else all(a is b is None or torch.equal(a, b) for a, b in gradients))


def close(got, wanted):
    """Check that two results differ by rounding only.

    A ReLU that rounding flips changes a gradient.
    """
    for a, b in zip((*got[0], *got[1]), (*wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    torch.testing.assert_close(got[3], wanted[3], rtol=1e-4, atol=1e-5)
    assert [name for name, grad in got[2].items() if grad is None] == [n for n, b in wanted[2].items() if b is None]
    flat = [torch.cat([grad.flatten() for grad in found[2].values() if grad is not None]) for found in (got, wanted)]
    assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < 5e-2
