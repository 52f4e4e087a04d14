"""Grad-CAM against its formula, and memory of networks from the meta device."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedkern import UserError, models
from fedkern.models.gradcam import grad_cam, gradcam_stage, mass_inside, object_share
from fedkern.models.state.allocate import allocate
from fedkern.process import machine


def make(name: str = "cnn", size: int = 32, **options):
    model = models.build(name, classes=4, channels=3, image_size=size, seed=0, **options).double()
    images = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.train()
    with torch.no_grad():
        model(images)  # running statistics that are not the identity
    return model, images


def test_it_is_the_papers_formula_sample_by_sample():
    model, images = make()
    cam, classes = grad_cam(model, images, stage="layer2")
    model.eval()
    assert torch.equal(classes, model(images).argmax(1))
    for i in range(5):
        h = model.stages(images[i : i + 1], "layer2").detach().requires_grad_()
        model.head(model.tail(h, "layer2"))[0, classes[i]].backward()
        expected = sum(h.grad[0, c].mean() * h.detach()[0, c] for c in range(h.shape[1])).relu()
        expected = F.interpolate(expected[None, None], size=(32, 32), mode="bilinear", align_corners=False)[0, 0]
        torch.testing.assert_close(cam[i], expected, rtol=1e-10, atol=1e-12)


def test_the_model_is_left_as_it_was():
    model, images = make()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        cam, _ = grad_cam(model, images)
    assert cam.max() > 0
    assert not cam.requires_grad
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_the_stage_is_the_last_with_seven_positions():
    network, images = make("cnn")
    assert gradcam_stage(network, images) == "layer2"
    assert gradcam_stage(network, images[:0, :, :28, :28]) == "layer2"
    assert gradcam_stage(network, images[..., :8, :8]) == "layer1"
    assert gradcam_stage(*make("resnet8")) == "layer3"
    assert gradcam_stage(*make("resnet18", 224, width=4)) == "layer4"
    with pytest.raises(ValueError, match="no positions"):
        grad_cam(*make(), stage="feature")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["vit-tiny", "mlp", "cnn", "mobilenetv2"])
def test_the_size_of_images_is_asked_of_images_not_of_parameters(name, channels):
    """ViT's positions are a parameter with four axes, but not a convolution's."""
    model = models.build(name, classes=4, channels=channels, image_size=32, seed=0).eval()
    images = torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(1))
    cam, classes = grad_cam(model, images)
    assert cam.shape == (2, 32, 32)
    assert bool(cam.isfinite().all() & (cam >= 0).all())
    with torch.no_grad():
        assert torch.equal(classes, model(images).argmax(1))
    inside = object_share(model, [(images, torch.ones(2, 32, 32, dtype=torch.bool))])
    assert inside.get("gradcam_in_object", 1.0) == pytest.approx(1.0)


def test_mass_inside():
    cam = torch.tensor([[[1.0, 3.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    masks = torch.tensor(
        [[[True, False], [True, False]], [[True, True], [True, True]], [[False, False], [False, False]]]
    )
    share = mass_inside(cam, masks)
    assert share[0] == 0.25
    assert share[1:].isnan().all()  # no mass; no object


def test_the_share_over_batches_is_the_share_over_all():
    model, images = make()
    masks = torch.rand(5, 32, 32, generator=torch.Generator().manual_seed(2)) > 0.7
    masks[3] = False
    share = object_share(model, [(images, masks)])
    parts = object_share(model, [(images[:2], masks[:2]), (images[2:2], masks[2:2]), (images[2:], masks[2:])])
    assert share == pytest.approx(parts)
    assert share["object_area"] == pytest.approx(masks[[0, 1, 2, 4]].double().mean().item())
    assert object_share(model, []) == {}
    everywhere = object_share(model, [(images, torch.ones(5, 32, 32, dtype=torch.bool))])
    assert everywhere["gradcam_in_object"] == pytest.approx(1.0)


# -- allocate ----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("kept", torch.ones(2, device="cpu"))
        self.register_buffer("none", None)


def test_as_to_empty():
    with torch.device("meta"):
        ours, torchs = Tied(), Tied()
    allocate(ours)
    torchs.to_empty(device="cpu")
    for kind in ("named_parameters", "named_buffers"):
        a, b = (dict(getattr(module, kind)(remove_duplicate=False)) for module in (ours, torchs))
        assert list(a) == list(b)
        for name, tensor in a.items():
            assert type(tensor) is type(b[name])
            assert (tensor.shape, tensor.dtype, tensor.requires_grad, tensor.device) == (
                b[name].shape, b[name].dtype, b[name].requires_grad, b[name].device,
            )  # fmt: skip
    assert ours.first.weight is ours.second.weight
    assert ours.kept.tolist() == [1, 1]


def test_a_network_without_memory_is_refused_before_it_takes_any(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 1_000_000_000)
    with pytest.raises(UserError, match=r"takes 0\.5 GB, twice that with its copies, and the machine has 1\.0 GB free"):
        models.build("mlp", classes=10, channels=1, image_size=8, seed=0, width=1 << 13)
