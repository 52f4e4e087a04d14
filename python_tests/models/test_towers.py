"""Image-text pairs: vocabularies, the small encoders, alignment layers and heads."""

import json

import pytest
import torch
from torch import nn

from fedkern import ops
from fedkern.errors import UserError
from fedkern.models import PairNetwork, Tokens, Vocabulary, build_pair, learn_vocabulary
from fedkern.models.networks.attention import TransformerLayer, head_count
from fedkern.models.networks.small_encoders import ImageEncoder
from fedkern.models.pretrained.vocabulary import CLS, PAD, SPECIAL, UNKNOWN
from fedkern.models.towers import IMAGE_ENCODERS, PARTS

TEXTS = ("a red three above a blue seven", "A blue seven, left of a green one!", "a red three")
PICTURE = {"channels": 3, "image_size": (16, 16), "mean": (0.5,) * 3, "std": (0.2,) * 3}


def make(image: str = "conv", text: str = "words", **options: object) -> PairNetwork:
    settings = {**PICTURE, "width": 16, "longest": 12, "vocabulary": learn_vocabulary(TEXTS).tokens, **options}
    return build_pair(image, text, **settings)


# vocabularies


def test_words_by_frequency() -> None:
    made = learn_vocabulary(TEXTS)
    assert made.tokens == ("a", "blue", "red", "seven", "three", "above", "green", "left", "of", "one")
    assert learn_vocabulary(reversed(TEXTS)).tokens == made.tokens
    assert learn_vocabulary(TEXTS, size=3).tokens == ("a", "blue", "red")
    assert made.encode("A RED, cow") == [len(SPECIAL), len(SPECIAL) + 2, UNKNOWN]


def test_texts_are_padded_and_cut() -> None:
    made = learn_vocabulary(TEXTS).tokenize(TEXTS, 6)
    assert made.ids.shape == made.mask.shape == (3, 6)
    assert made.ids[:, 0].tolist() == [CLS] * 3
    assert made.mask.sum(1).tolist() == [6, 6, 4]
    assert (made.ids[~made.mask] == PAD).all()
    short = made.take(torch.tensor([2, 2]))
    assert short.ids.shape == (2, 4)
    assert learn_vocabulary(TEXTS).tokenize(["", "a"], 6).mask.tolist() == [[True, False], [True, True]]
    assert learn_vocabulary(TEXTS).tokenize([], 6).ids.shape[0] == 0


# layers


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_layer_is_torchs(norm_first: bool) -> None:
    layer = TransformerLayer(128, norm_first=norm_first)
    theirs = nn.TransformerEncoderLayer(
        128, 2, 512, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )
    own, state = layer.state_dict(), theirs.state_dict()
    names = {"self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "project.", "linear1.": "widen.",
             "linear2.": "narrow.", "norm1.": "norm1.", "norm2.": "norm2."}  # fmt: skip
    for name in state:
        prefix = next(p for p in names if name.startswith(p))
        state[name] = own[name.replace(prefix, names[prefix])]
    theirs.load_state_dict(state)
    tokens = torch.randn(3, 5, 128)
    mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
    expected = theirs(tokens, src_key_padding_mask=~mask)
    torch.testing.assert_close(layer(tokens, mask)[mask], expected[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(tokens), theirs(tokens), rtol=1e-5, atol=1e-5)


def test_sizes_of_the_published_setting() -> None:
    class Encoder(ImageEncoder):
        width, grid = 768, (14, 14)

    with torch.device("meta"):
        pair = PairNetwork(Encoder(), Encoder())
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in pair.named_children()}
    assert tuple(sizes) == PARTS
    assert sizes["image_align"] == sizes["text_align"] == 7_087_872
    assert sizes["image_head"] == sizes["text_head"] == 1_841_280
    assert sum(sizes.values()) == 17_858_304
    assert [head_count(width) for width in (768, 192, 96, 16, 70)] == [12, 3, 1, 1, 1]


# pairs


@pytest.mark.parametrize("image", IMAGE_ENCODERS)
def test_unit_vectors_with_gradients_everywhere(image: str) -> None:
    pair = make(image)
    images, tokens = torch.randn(3, 3, 16, 16), pair.tokenize(TEXTS)
    sequence, words = pair.encode_image(images), pair.encode_text(tokens)
    assert sequence.shape == (3, 1 + pair.grid[0] * pair.grid[1], 16)
    assert words.shape == (*tokens.ids.shape, 16)
    x, y = pair(images, tokens)
    assert x.shape == y.shape == (3, 128)
    torch.testing.assert_close(torch.cat([x, y]).norm(dim=1), torch.ones(6))
    (x * torch.randn_like(x) + y * torch.randn_like(y)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in pair.parameters())
    silent = {name for name, p in pair.named_parameters() if not p.grad.any()}
    # Batch norm takes the mean away, and attention does not see a constant of the keys.
    assert {name.split(".")[0] for name in silent} <= {"image_head", "text_head"}


def test_built_in_pairs_are_small() -> None:
    vocabulary = [f"word{i}" for i in range(70)]
    sizes = [
        sum(
            p.numel()
            for p in build_pair(name, **{**PICTURE, "image_size": (32, 32)}, vocabulary=vocabulary).parameters()
        )
        for name in IMAGE_ENCODERS
    ]
    assert sizes == [640_952, 1_040_384]


@pytest.mark.parametrize(
    ("size", "grid"), [((16, 16), (4, 4)), ((32, 32), (8, 8)), ((64, 64), (8, 8)), ((33, 50), (4, 6))]
)
def test_tokens_of_every_image_size(size: tuple[int, int], grid: tuple[int, int]) -> None:
    pair = make(image_size=size)
    assert pair.grid == grid
    assert pair.encode_image(torch.randn(2, 3, *size)).shape == (2, 1 + grid[0] * grid[1], 16)


def test_padding_changes_nothing() -> None:
    pair = make().eval()
    tokens = pair.tokenize(TEXTS)
    longer = Tokens(*(nn.functional.pad(part, (0, 3)) for part in tokens))
    torch.testing.assert_close(pair.text_embedding(longer), pair.text_embedding(tokens))
    single = pair.tokenize(TEXTS[2:])
    torch.testing.assert_close(pair.text_embedding(single)[0], pair.text_embedding(tokens)[2], rtol=1e-5, atol=1e-6)
    noisy = Tokens(torch.where(tokens.mask, tokens.ids, 5), tokens.mask)
    torch.testing.assert_close(pair.text_embedding(noisy), pair.text_embedding(tokens))


def test_it_comes_back_from_its_description() -> None:
    pair = make("vit", seed=3).eval()
    again = build_pair(**json.loads(json.dumps(pair.about))).eval()
    again.load_state_dict(pair.state_dict())
    images, tokens = torch.randn(2, 3, 16, 16), pair.tokenize(TEXTS[:2])
    assert torch.equal(again.tokenize(TEXTS[:2]).ids, tokens.ids)
    for made, loaded in zip(pair(images, tokens), again(images, tokens), strict=True):
        assert torch.equal(made, loaded)


def test_weights_come_from_the_seed_and_no_part_disturbs_another() -> None:
    before = torch.random.get_rng_state()
    original, repeated, third = make(seed=1), make(seed=1), make("vit", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), repeated.parameters(), strict=True))
    for name in PARTS[1:]:
        parts = zip(getattr(original, name).parameters(), getattr(third, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in parts)
    assert not torch.equal(next(make(seed=2).parameters()), next(original.parameters()))


def test_it_flattens_and_compiles_like_any_module() -> None:
    pair = make()
    images, tokens = torch.randn(4, 3, 16, 16), pair.tokenize([*TEXTS, TEXTS[0]])
    expected = [part.detach().clone() for part in pair(images, tokens)]
    flat = ops.FlatParameters(pair)
    assert sum(place.stop - place.start for place in flat.places()["parameters"].values()) == sum(
        p.numel() for p in pair.parameters()
    )
    torch.testing.assert_close(pair(images, tokens), expected)


@pytest.mark.parametrize(("options", "words"), [
    ({"image": "konv"}, 'no image encoder "konv": give conv, vit or a local folder. Did you mean "conv"?'),
    ({"text": "word"}, 'no text encoder "word": give words or a local folder. Did you mean "words"?'),
    ({"image_size": (8, 8)}, "needs images of at least 16 pixels, got 8"),
    ({"width": 18}, "must be a multiple of 4, got 18"),
])  # fmt: skip
def test_mistakes(options: dict, words: str) -> None:
    with pytest.raises(UserError) as error:
        make(**{"vocabulary": ("a",), **options})
    assert words in str(error.value)


def test_a_built_in_text_encoder_needs_words() -> None:
    with pytest.raises(ValueError, match="vocabulary: expected"):
        make(vocabulary=None)
    assert len(Vocabulary(())) == len(SPECIAL)


def test_equal_texts_give_no_gradient_out_of_rounding() -> None:
    """Behind batch norm equal rows differ only by rounding, which must not become a direction."""
    network = make().train()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def slope(texts: list[str]) -> float:
        network.zero_grad()
        x, y = network(images, network.tokenize(texts))
        ops.contrastive(x, y, 0.07).backward()
        squares = [float(p.grad.square().sum()) for p in network.parameters() if p.grad is not None]
        return sum(squares) ** 0.5

    assert slope([TEXTS[0]] * 4) < slope([TEXTS[0], TEXTS[1], "a green one", "a seven"])
