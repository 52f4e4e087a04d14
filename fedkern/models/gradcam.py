"""Grad-CAM (Selvaraju et al., arXiv 1610.02391): image regions that a network uses, and the object's share."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkern.models.networks.staged import StagedNetwork

# The last map of the paper's networks is 7x7 (224 pixels / 32); a coarser map cannot separate object and surroundings.
SMALLEST_MAP = 7


def gradcam_stage(model: StagedNetwork, images: Tensor) -> str:
    """Return the last stage with a map of at least 7x7 positions, or the first stage, for images ``[B, C, H, W]``.

    The paper's map has 7x7 (``layer4`` of a ResNet-18 at 224 pixels).  Small images need an earlier stage.
    """
    best = model.stage_names[0]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            h = images.new_zeros(1, *images.shape[1:])
            for i, name in enumerate(model.maps):
                h = model._run(h, i, i)
                if min(h.shape[2:]) >= SMALLEST_MAP:
                    best = name
    finally:
        model.train(training)
    return best


def grad_cam(model: StagedNetwork, images: Tensor, *, stage: str | None = None) -> tuple[Tensor, Tensor]:
    """Compute the class activation map of every image's predicted class, in eval mode.

    The model's state and gradients do not change.  With h the map of ``stage`` and z the logit of the class, the
    channel weights are the spatial mean of dz/dh and the map is relu(sum over channels of weight times h), enlarged
    bilinearly to the image.

    Args:
        model: a staged network.
        images: normalised images ``[B, C, H, W]``, in the model's dtype and on its device.
        stage: a map stage of the model; None takes the last one with at least 7x7 positions, or the first.

    Returns:
        The maps ``[B, H, W]``, non-negative, in the model's dtype and not scaled, and the predicted classes, int64
            ``[B]``.

    Raises:
        ValueError: ``stage`` is unknown or is ``"feature"``, which has no positions.
    """
    height, width = images.shape[2:]
    stage = gradcam_stage(model, images) if stage is None else stage
    if stage == "feature":
        raise ValueError('stage must be one of the map stages, got "feature", which has no positions')
    if images.shape[0] == 0:
        return images.new_zeros((0, height, width)), torch.zeros(0, dtype=torch.int64, device=images.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            maps = model.stages(images, upto=stage)
        with torch.enable_grad():
            maps.requires_grad_(True)
            logits = model.head(model.tail(maps, after=stage))
            predicted = logits.detach().argmax(1)
            # In eval mode samples are independent, so one backward pass of the sum gives every sample's own gradient.
            (gradient,) = torch.autograd.grad(logits.gather(1, predicted[:, None]).sum(), maps)
    finally:
        model.train(training)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    cam = (weights * maps.detach()).sum(1, keepdim=True).clamp_min(0)
    return F.interpolate(cam, size=(height, width), mode="bilinear", align_corners=False).squeeze(1), predicted


def mass_inside(cam: Tensor, masks: Tensor) -> Tensor:
    """Return the share of each map's mass that lies on the object.

    Args:
        cam: non-negative maps ``[B, H, W]``.
        masks: bool ``[B, H, W]``, True on the object.

    Returns:
        ``[B]`` in [0, 1]; NaN where the map is zero everywhere or the image has no object.
    """
    total = cam.sum(dim=(1, 2))
    inside = (cam * masks).sum(dim=(1, 2))
    defined = (total > 0) & masks.flatten(1).any(1)
    return torch.where(defined, inside / total, torch.full_like(total, torch.nan))


def object_share(model: StagedNetwork, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Average the Grad-CAM mass of the predicted class inside the object over a test set with exact masks.

    Args:
        model: a staged network.
        batches: pairs of normalised images ``[B, C, H, W]`` and masks bool ``[B, H, W]``, True on the object.

    Returns:
        ``gradcam_in_object``: the mean share in [0, 1].  ``object_area``: the mean share of the image that the object
            covers, which is the score of an even map.  Images without an object or with an empty map are left out; the
            result is empty if no image is left.
    """
    shares: list[Tensor] = []
    areas: list[Tensor] = []
    stage: str | None = None
    for images, masks in batches:
        stage = stage or gradcam_stage(model, images)
        masks = masks.to(images.device)
        cam, _ = grad_cam(model, images, stage=stage)
        share = mass_inside(cam, masks)
        counted = ~share.isnan()
        shares.append(share[counted].double().cpu())
        areas.append(masks[counted].double().mean(dim=(1, 2)).cpu())
    share, area = (torch.cat(values) if values else torch.zeros(0) for values in (shares, areas))
    if share.numel() == 0:
        return {}
    return {"gradcam_in_object": share.mean().item(), "object_area": area.mean().item()}
