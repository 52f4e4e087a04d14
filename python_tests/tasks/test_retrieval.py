"""Tests of recall at k: against counting by hand, with ties, several captions per image, and large galleries."""

import itertools

import pytest
import torch
from torch.nn import functional

from fedkern.tasks import retrieval
from fedkern.tasks.retrieval import Gallery, recalls


def unit(*shape: int) -> torch.Tensor:
    return functional.normalize(torch.randn(*shape), dim=1)


def count(queries: torch.Tensor, gallery: torch.Tensor, k: int, right: list[set[int]]) -> float:
    """Count the recall of one query after another, by sorting."""
    scores = queries.double() @ gallery.double().T
    hits = [bool(set(row.argsort(descending=True)[:k].tolist()) & own) for row, own in zip(scores, right, strict=True)]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("chunk", [3, 512])
def test_it_is_what_sorting_gives(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    images = unit(40, 8)
    texts = functional.normalize(images + 0.6 * torch.randn(40, 8), dim=1)
    made = recalls(images, texts, (1, 5, 10))
    own = [{row} for row in range(40)]
    for k in (1, 5, 10):
        assert made[f"i2t_r{k}"] == pytest.approx(count(images, texts, k, own))
        assert made[f"t2i_r{k}"] == pytest.approx(count(texts, images, k, own))
    assert 0 < made["i2t_r1"] < made["i2t_r10"] <= 1
    assert recalls(images, images)["i2t_r1"] == 1
    assert recalls(images, texts, (40, 99)) == pytest.approx(
        {f"{way}_r{k}": 1 for way in ("i2t", "t2i") for k in (40, 99)}
    )


def test_several_captions_belong_to_an_image() -> None:
    images, texts = unit(7, 4), unit(21, 4)
    pairs = torch.stack([torch.arange(21) % 7, torch.arange(21)], 1)[torch.randperm(21)]
    made = recalls(images, texts, (2,), pairs=pairs)
    assert made["i2t_r2"] == pytest.approx(count(images, texts, 2, [{i, i + 7, i + 14} for i in range(7)]))
    assert made["t2i_r2"] == pytest.approx(count(texts, images, 2, [{i % 7} for i in range(21)]))


def test_a_query_without_a_partner_does_not_count() -> None:
    images, texts = unit(5, 4), unit(4, 4)
    pairs = torch.tensor([[0, 0], [3, 2]])
    assert recalls(images, texts, (4,), pairs=pairs)["i2t_r4"] == 1
    made = recalls(images, texts, (1,), pairs=pairs)
    hits = [int((images[i] @ texts.T).argmax()) == t for i, t in pairs.tolist()]
    assert made["i2t_r1"] == pytest.approx(sum(hits) / 2)


def test_equal_scores_count_as_in_a_random_order() -> None:
    collapsed = torch.ones(30, 4) / 2
    assert recalls(collapsed, collapsed) == pytest.approx(
        {f"{way}_r{k}": k / 30 for way in ("i2t", "t2i") for k in (1, 5, 10)}, abs=1e-9
    )
    # One candidate is ahead, then four are level, two of them right: all orders of the four, first two places.
    image = torch.tensor([[1.0, 0.0]])
    level, ahead = torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6])
    texts = torch.stack([ahead, level, level, level, level, torch.tensor([0.0, 1.0])])
    pairs = torch.tensor([[0, 1], [0, 4]])
    orders = list(itertools.permutations((1, 2, 3, 4)))
    expected = sum(bool({1, 4} & set(order[:2])) for order in orders) / len(orders)
    assert recalls(image, texts, (1, 3, 5), pairs=pairs)["i2t_r1"] == 0
    assert recalls(image, texts, (3,), pairs=pairs)["i2t_r3"] == pytest.approx(expected)
    assert recalls(image, texts, (5,), pairs=pairs)["i2t_r5"] == 1


def test_embeddings_that_are_not_numbers_find_nothing() -> None:
    broken = torch.full((20, 4), torch.nan)
    assert recalls(broken, unit(20, 4), (1,))["i2t_r1"] == pytest.approx(1 / 20)


def test_the_gallery_of_a_split() -> None:
    made = Gallery.of(("a", "a", "b", "c"), ("one", "two", "two", "three"))
    assert made.images.tolist() == [0, 2, 3]
    assert sorted(map(tuple, made.pairs.tolist())) == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 3)]
    assert Gallery.of(None, ("x", "y")).pairs.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(("images", "texts", "options", "words"), [
    (unit(3, 4), unit(3, 5), {}, r"expected \[I, d\] and \[T, d\], got \[3, 4\] and \[3, 5\]"),
    (unit(3, 4), unit(4, 4), {}, "expected for 3 images and 4 texts"),
    (torch.empty(0, 4), torch.empty(0, 4), {}, "at least one each"),
    (unit(3, 4), unit(3, 4), {"ks": (0,)}, "ks: expected"),
    (unit(3, 4), unit(3, 4), {"pairs": torch.tensor([[0, 3]])}, "texts below 3"),
    (unit(3, 4), unit(3, 4), {"pairs": torch.empty(0, 2)}, "pairs: expected int64"),
])  # fmt: skip
def test_wrong_arguments(images: torch.Tensor, texts: torch.Tensor, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recalls(images, texts, **options)
