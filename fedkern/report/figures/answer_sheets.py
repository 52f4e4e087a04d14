"""Figures of a network's answers to test samples: Grad-CAM, segmentation, captions. None if not applicable.

Each takes the run, its data, its network and the code that may be imported.
"""

from collections.abc import Callable, Collection, Mapping

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

from fedkern.data import FederatedData
from fedkern.downstream.run_evaluation import Finished
from fedkern.downstream.saved_network import read_model
from fedkern.errors import UserError
from fedkern.files.image_rows import in_parts
from fedkern.models import StagedNetwork, grad_cam, mass_inside
from fedkern.models.networks.mlp import MLP
from fedkern.report.figures.plots import GREEN, spread_evenly, wrap_text
from fedkern.report.figures.sheet import LINE, Sheet, to_rgb
from fedkern.report.names import label
from fedkern.report.run_contents import Contents
from fedkern.tasks.figure_names import set_title
from fedkern.tasks.retrieval import Gallery

EXAMPLES = 8
"""Most images of a test set."""
SIDE = 1.14
"""Inches of the longer side of an image under Grad-CAM."""
SCALE = "Grad-CAM of the predicted class, relative to the largest value in the image"
_NAMES = {"id": "in distribution", "ood": "out of distribution", "": "test"}
LISTED = 20
"""Most classes of a segmentation in the legend. Colours repeat from the eleventh on."""
CAPTIONED, NEAREST, CAPTION = 6, 3, 140
"""Images with captions, captions of each, and longest caption in characters."""
_WIDE = 5.2
"""Inches of the captions."""


def choose(labels: Tensor, count: int) -> Tensor:
    """Return up to ``count`` rows of ``labels`` int64 ``[n]``: the first image of every class, then the second."""
    order = labels.argsort(stable=True)
    grouped = labels[order]
    start = torch.searchsorted(grouped, grouped, right=False)
    turn = torch.arange(len(order)) - start
    return order[torch.from_numpy(np.lexsort((grouped.numpy(), turn.numpy())).copy())][:count]


def _answers(model: nn.Module, inputs: Tensor) -> Tensor:
    """Move the inputs to the network's device and precision."""
    reference = next(model.parameters())
    return inputs.to(device=reference.device, dtype=reference.dtype)


def gradcam(run: Contents, data: FederatedData, model: nn.Module, trusted: Collection[str] = ()) -> Figure | None:
    """Draw two rows for every test set: images, and the same images with Grad-CAM of the predicted class.

    If masks are known, a white line outlines the object, and a number gives the share of the map inside the object.
    """
    # Maps of an MLP have one position, which Grad-CAM would show as an even colour.
    if not (isinstance(model, StagedNetwork) and not isinstance(model, MLP) and model.maps):
        return None
    chosen = {name: split.subset(choose(split.labels, EXAMPLES)) for name, split in data.tests.items() if len(split)}
    if not chosen:
        return None
    maps, heads, room = [], [], []
    for split in chosen.values():
        cams, predicted = grad_cam(model, _answers(model, data.form.normalise_images(split.images)))
        above = []
        for truth, guess in zip(split.labels.tolist(), predicted.tolist(), strict=True):
            wrong = f", taken for {label(data.classes[guess])}" if truth != guess else ""
            text = wrap_text(f"{label(data.classes[truth])}{wrong}", 9, SIDE)
            above.append((text, "#D55E00" if wrong else "#222222"))
        maps.append(cams)
        heads.append(above)
        room += [0.06 + LINE * max(1 + text.count("\n") for text, _ in above), 0.2]
    sides = [wrap_text(label(_NAMES.get(name, name)), 10, 1.2 * SIDE) for name in chosen]
    left = 0.2 + 0.16 * max(1 + text.count("\n") for text in sides)
    title = f"Grad-CAM of the global model, {run.name}"
    sheet = Sheet(max(map(len, chosen.values())), room, side=SIDE, left=left, title=title, scale=SCALE)
    for block, (split, cams) in enumerate(zip(chosen.values(), maps, strict=True)):
        top, bottom, images = 2 * block, 2 * block + 1, data.form.to_bytes(split.images)
        sheet.beside(top, sides[block], upright=True)
        sheet.beside(bottom, "Grad-CAM", upright=True)
        shares = None if split.masks is None else mass_inside(cams.cpu(), split.masks)
        scaled = (cams / cams.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(cams.dtype).tiny)).cpu()
        for i, (text, colour) in enumerate(heads[block]):
            picture = to_rgb(images[i].numpy())
            sheet.picture(top, i, picture)
            sheet.above(top, i, text, color=colour)
            # The image in dark grey (white at 400 instead of 255), so that the map stands out.
            grey = (picture.mean(axis=2, keepdims=True) * (255 / 400)).astype(np.uint8)
            sheet.picture(bottom, i, grey.repeat(3, axis=2))
            sheet.map(bottom, i, scaled[i].numpy())
            if shares is not None and bool(split.masks[i].any()):
                sheet.outline(bottom, i, split.masks[i].numpy())
                if not bool(shares[i].isnan()):
                    sheet.above(bottom, i, f"{100 * float(shares[i]):.0f} % inside")
    return sheet.figure


@torch.no_grad()
def segmentation(run: Contents, data: FederatedData, model: nn.Module, trusted: Collection[str] = ()) -> Figure:
    split = next(iter(data.tests.values()))
    highest = torch.cat([part.flatten(1).amax(1) for part in in_parts(split.labels)])  # the class of an image
    split = split.subset(choose(highest, EXAMPLES))
    predicted = model(_answers(model, data.form.normalise_images(split.images))).argmax(1).cpu()
    colours = colormaps["tab10"](np.arange(max(len(data.classes) - 1, 1)) % 10)[:, :3]
    legend = [(label(name), colour) for name, colour in zip(data.classes[1:], colours[:LISTED], strict=False)]
    rows, title = ("image", "truth", "model"), f"Segmentation of {run.name}"
    sheet = Sheet(len(split), [0.0] * len(rows), side=1.15, left=0.75, title=title, legend=legend)
    for row, name in enumerate(rows):
        sheet.beside(row, name)
    for column in range(len(split)):
        image = to_rgb(split.images[column].numpy()) / 255.0
        for row, laid in enumerate((None, split.labels[column], predicted[column])):
            sheet.picture(row, column, image if laid is None else overlay_classes(image, laid.numpy(), colours))
    return sheet.figure


def overlay_classes(
    image: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], colours: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Mix foreground pixels with the colour of their class, and darken unlabelled ones."""
    result = image.copy()
    front = labels > 0
    result[front] = 0.4 * result[front] + 0.6 * colours[labels[front] - 1]
    result[labels < 0] *= 0.5
    return result


def retrieval(run: Contents, data: FederatedData, model: nn.Module, trusted: Collection[str] = ()) -> Figure | None:
    try:
        module, about = read_model(run.folder, trusted, model)
        finished = Finished(run.folder, run.config, module, about, data)
    except UserError:  # the method has no pair of encoders, as the report says
        return None
    name, split = next(iter(data.tests.items()))
    network, texts = finished.networks[0], split.texts or ()
    gallery = Gallery.of(split.ids, texts)
    rows = gallery.images[torch.tensor(spread_evenly(len(gallery.images), CAPTIONED))]
    captions: dict[int, set[str]] = {}
    for image, text in gallery.pairs.tolist():
        captions.setdefault(int(gallery.images[image]), set()).add(texts[text])
    distinct = list(dict.fromkeys(texts))  # equal captions would fill the places of the nearest ones with one text
    scores = finished.image_embeddings(network, split.subset(rows)) @ finished.text_embeddings(network, distinct).T
    ranked = scores.cpu().nan_to_num(-2.0).argsort(dim=1, descending=True, stable=True)
    where = f" {set_title(name)}" if name in ("id", "ood") else f" of {set_title(name)}" if name else ""
    network_words = " by the first client's network" if len(finished.networks) > 1 else ""
    title = f"Test images{where} and the nearest of {len(distinct):,} captions{network_words}, {run.name}"
    legend = [("✓ a caption of the image", GREEN)]
    sheet = Sheet(1, [0.12] * len(rows), side=1.25, left=0.1, right=_WIDE, title=title, legend=legend)
    for number, row in enumerate(rows.tolist()):
        order = [(distinct[at], distinct[at] in captions[row]) for at in ranked[number].tolist()]
        place, right = next((i, text) for i, (text, own) in enumerate(order) if own)
        beyond = [(f"place {place + 1}: {right}", True)] if place >= NEAREST else []
        sheet.picture(number, 0, to_rgb(split.images[row].numpy()))
        sheet.after(number, [caption_lines(text, own) for text, own in (*order[:NEAREST], *beyond)])
    return sheet.figure


def caption_lines(text: str, own: bool) -> tuple[str, str]:
    """Return a caption in at most two lines, and its colour. ``own`` marks a caption of the image."""
    lines = wrap_text("✓ " * own + label(text, CAPTION), 9, _WIDE - 0.4).split("\n")
    return "\n".join(lines[:2]) + " …" * (len(lines) > 2), GREEN if own else "#222222"


ANSWERS: Mapping[str, Callable[..., Figure | None]] = {
    "gradcam": gradcam, "segmentation": segmentation, "retrieval": retrieval,
}  # fmt: skip
"""The figures by picture name."""
