"""Keys of noise, the server's secret bits, the sentence about a run's epsilon, and missing packages."""

import hashlib
import math
import sys

import pytest
import torch

from fedkern import ops
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.errors import UserError
from fedkern.privacy import Guarantee, need_accounting, server_secret
from fedkern.privacy.dpsgd import need_opacus
from fedkern.privacy.keys import noise_key
from fedkern.report.tables import describe_epsilon

SECRET = bytes(range(16))


def test_a_key_is_a_hash_of_all_that_it_belongs_to():
    seed, offset = noise_key(SECRET, 3, "teacher", 12)
    digest = hashlib.blake2b(b"3/12/teacher", key=SECRET, digest_size=16, person=b"fedkern noise").digest()
    assert seed == int.from_bytes(digest[:8], "little")
    assert offset == int.from_bytes(digest[8:], "little") >> 7 << 6


def test_every_bit_of_the_secret_and_every_part_of_the_name_counts():
    """If the noise followed from a seed alone, an attacker who finds the seed would have all of it."""
    keys = {noise_key(SECRET, 0, "a", 0)}
    number = int.from_bytes(SECRET, "big")
    keys |= {noise_key((number ^ 1 << bit).to_bytes(16, "big"), 0, "a", 0) for bit in range(128)}
    names = ((1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "1/a", 0), (11, "a", 0), (1, "a", 1), (0, "a", 11))
    keys |= {noise_key(SECRET, *name) for name in names}
    assert len({seed for seed, _ in keys}) == len({offset for _, offset in keys}) == 1 + 128 + len(names)


def test_the_operator_takes_every_key():
    zero = torch.zeros(2, 100)
    keys = [noise_key(SECRET, 0, "a", release) for release in range(64)]
    drawn = torch.stack([ops.clip_and_noise(zero, 1.0, 1.0, *key) for key in keys])
    assert torch.unique(drawn).numel() > 0.99 * drawn.numel()
    assert abs(float(drawn.std()) - 1) < 0.03
    assert any(seed >= 1 << 63 for seed, _ in keys)
    assert any(offset >= 1 << 62 for _, offset in keys)


def test_what_is_refused():
    for secret, release in ((b"short", 0), (SECRET * 2, 0), (SECRET, -1)):
        with pytest.raises(ValueError, match="noise_key"):
            noise_key(secret, 0, "a", release)


# -- server secret -----------------------------------------------------------------------------------------------------


def test_a_secret_is_drawn_once(tmp_path):
    secret = server_secret.load_or_create(tmp_path, begun=False)
    assert len(bytes.fromhex(secret)) == 16
    assert server_secret.load_or_create(tmp_path, begun=True) == secret
    assert server_secret.load_or_create(tmp_path, begun=False) == secret  # interrupted before the first checkpoint
    (tmp_path / "other").mkdir()
    assert server_secret.load_or_create(tmp_path / "other", begun=False) != secret


@pytest.mark.parametrize("content", [None, b"", b"0123\n", b"g" * 32 + b"\n", b"\xff" * 33])
def test_a_lost_or_damaged_secret_ends_in_a_sentence(content, tmp_path):
    if content is not None:
        (tmp_path / server_secret.NAME).write_bytes(content)
    with pytest.raises(UserError, match="is missing or damaged, so that this private run cannot repeat its noise"):
        server_secret.load_or_create(tmp_path, begun=True)


def test_nothing_load_or_create_that_came_to_nothing_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.open(fresh=True)
    server_secret.load_or_create(checkpoints.folder, begun=False)
    checkpoints.discard()
    assert not checkpoints.folder.exists()


# -- guarantee ---------------------------------------------------------------------------------------------------------


def test_a_finite_figure_is_said_to_rest_on_its_conditions():
    said = Guarantee(1e-5, {"noise": "the noise"}, follows="the model")
    assert said.statement(8.0) == (
        "Epsilon 8 at delta 1e-05, the largest of any client when one of its images is replaced, is of what the "
        "server receives and the run folder without checkpoints/ while the run's seed stays secret; it covers "
        "the noise and so the model."
    )
    assert "seed" not in said.statement(math.inf)
    several = Guarantee(1e-5, {"noise": "the noise"}, conditions=("this is so", "that is so"))
    assert " while this is so and that is so; it covers the noise." in several.statement(1.0)


def test_a_part_has_another_name_and_is_called_a_part():
    said = Guarantee(1e-5, {"noise": "the noise"}, {"labels": "the labels"}, follows="the model")
    assert said.figure == "epsilon_covered"
    assert said.statement(8.0) == (
        "Epsilon 8 at delta 1e-05, the largest of any client when one of its images is replaced, is of a part of what "
        "the clients release while the run's seed stays secret; it covers the noise, but not the labels: the whole "
        "release has no epsilon."
    )
    assert Guarantee(1e-5, {"noise": "the noise"}).figure == "epsilon"
    assert Guarantee(1e-5, {"noise": "the noise"}).with_records().figure == "epsilon_covered"


@pytest.mark.parametrize("known", [False, True])
def test_the_headline_never_shows_a_part_as_the_whole(known):
    full, part = {"covers": ["a", "b"], "leaves_uncovered": []}, {"covers": ["a"], "leaves_uncovered": ["b", "c"]}
    at = {"delta": 1e-5, "epsilon": 8.0} if known else {}
    value = " 8 at delta 1e-05" if known else ""
    assert describe_epsilon({**full, **at}) == f"epsilon{value} covers everything that clients release: a, b"
    at = {"delta": 1e-5, "epsilon_covered": 8.0} if known else {}
    assert describe_epsilon({**part, **at}) == (
        f"NO epsilon of the whole release: a partial epsilon{value} covers a alone, not b, c"
    )
    for nothing in (None, math.inf):
        assert (
            describe_epsilon({**full, "delta": 1e-5, "epsilon": nothing}) == "no finite epsilon: a release had no noise"
        )


# -- missing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("package", "need"), [("dp_accounting", need_accounting), ("opacus", need_opacus)])
def test_a_missing_package(monkeypatch, package, need):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs {package.replace('_', '-')}: pip install "):
        need()
