"""Names of figures and test sets for people: ``ood_macro_f1`` is F1, mean of the classes, out of distribution."""

from __future__ import annotations

from collections.abc import Collection

from fedkern.privacy.guarantee import PART

_TEST_SETS = {
    "id": "in distribution", "ood": "out of distribution", "validation": "validation", "minority": "minority",
    "unseen": "unseen client", "held_out": "held-out client",
}  # fmt: skip
TEST_SETS = ("", *_TEST_SETS)
"""Test sets that data of fedkern may have, in the order of tables; a single test set is ``""``."""
RECALLS = {f"{way}_r{k}": f"{text}, recall at {k}"
           for way, text in (("i2t", "image to text"), ("t2i", "text to image")) for k in (1, 5, 10)}  # fmt: skip
_FIGURES = {
    "macro_auroc": "AUROC, mean of the labels",
    "mean_average_precision": "average precision, mean of the labels",
    "macro_f1": "F1, mean of the classes",
    "exact_match": "images with all labels right",
    "auroc": "AUROC, one class against the rest, mean",
    "ece": "expected calibration error",
    "dice": "Dice, mean of the classes",
    "iou": "intersection over union",
    "hd95": "Hausdorff distance (95 %) in pixels",
    "confidence": "confidence in the true class",
    "gradcam_in_object": "Grad-CAM mass inside the object",
    "object_area": "area of the object",
    "gallery": "candidates in retrieval",
    PART: "epsilon of the covered part alone",
    **RECALLS,
    **{f"{which}_client_{name}": f"{which} client: {text}"
       for which in ("mean", "worst") for name, text in RECALLS.items()},
}  # fmt: skip


def split_metric(name: str, own: Collection[str] = ()) -> tuple[str, str]:
    """Splits ``"ood_accuracy"`` into test set ``"ood"`` and figure ``"accuracy"``; the only test set is ``""``.

    Args:
        name: the figure's whole name.
        own: names of test sets that the user chose.
    """
    for test_set in (*sorted(own, key=len, reverse=True), *TEST_SETS):
        if test_set and name.startswith(f"{test_set}_"):
            return test_set, name[len(test_set) + 1 :]
    return "", name


def figure_title(name: str) -> str:
    """A figure's name for people: ``"hd95"`` is ``"Hausdorff distance (95 %) in pixels"``; unknown names stay."""
    return _FIGURES.get(name, name.replace("_", " "))


def short_title(name: str) -> str:
    """A figure's name for an axis or a column."""
    return {"dice": "Dice", "i2t_r1": "recall at 1, image to text", "auroc": "AUROC"}.get(name, figure_title(name))


def set_title(name: str) -> str:
    """A test set's name for people: ``"id"`` is ``"in distribution"``; a name without a longer one stays."""
    return _TEST_SETS.get(name, name)
