"""Which table of lowerings serves on which processor, and what it decides."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fuse_tables import made
from torch import nn

from fedkern.ops import FusedBlocks
from fedkern.ops._core import processor as processors
from fedkern.ops._fuse.blocks import choice as fuse_choice
from fedkern.ops._fuse.blocks.choice import choose, own_file, serving
from fedkern.ops._fuse.blocks.lowering_costs import Table, Work, write_table

WORKS = [Work("spatial", 20.0, False, 16.0, 9 * 20 * 20 * 256.0)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """No table of the user's own, one thread, an AMD EPYC of Zen 4 with a core for AVX-512."""
    monkeypatch.delenv(fuse_choice.VARIABLE, raising=False)
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(fuse_choice, "active_isa", lambda: "avx512")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    runs_on(tmp_path, monkeypatch, "AuthenticAMD", 25, 17)
    fuse_choice.forget()
    yield
    fuse_choice.forget()


def runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, family: int, model: int) -> None:
    path = tmp_path / f"cpuinfo-{vendor}-{family}-{model}"
    path.write_text(f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: a processor\n\n")
    monkeypatch.setattr(processors, "CPUINFO", path)


def keep(table: Table, path: Path | None = None) -> Path:
    path = path or own_file()
    assert path is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(table, path)
    fuse_choice.forget()
    return path


def ways(table: Table, monkeypatch: pytest.MonkeyPatch, *, direct: bool = True) -> str:
    keep(table)
    return choose(WORKS, 5, False, direct)


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name"),
    [*(("AuthenticAMD", 25, model, "amd-zen4.json") for model in (16, 17, 31, 97, 160)),
     *(("AuthenticAMD", 26, model, "amd-zen5.json") for model in (2, 17, 68)),
     *(("GenuineIntel", 6, model, "intel-xeon-amx.json") for model in (143, 167, 173, 174, 207))],
)  # fmt: skip
def test_a_processor_is_served_by_the_table_of_its_kind(vendor, family, model, name, tmp_path, monkeypatch) -> None:
    runs_on(tmp_path, monkeypatch, vendor, family, model)
    found = serving()
    assert (found.kind, found.path.name) == ("shipped", name)
    assert found.tables[0].covers(processors.processor())
    assert choose(WORKS, 5, False, True) == "direct"


@pytest.mark.parametrize(
    ("vendor", "family", "model"),
    [("GenuineIntel", 6, 151), ("GenuineIntel", 25, 17), ("AuthenticAMD", 25, 33), ("AuthenticAMD", 26, 36)],
)
def test_on_an_unknown_processor_branches_are_computed_apart(vendor, family, model, tmp_path, monkeypatch) -> None:
    """Unless every table sees another way farther ahead than processors were seen to differ."""
    known = serving()
    runs_on(tmp_path, monkeypatch, vendor, family, model)
    found = serving()
    assert (found.kind, found.path) == ("none", None)
    assert found.tables == tuple(table for _, table in fuse_choice.shipped())
    assert found.digest != known.digest
    assert choose(WORKS, 5, False, True) == "separate"  # though 1.5 times slower on the EPYC
    for grouped, way in ((2.4, "separate"), (2.6, "grouped")):
        far = made(1.0, grouped, 1.0, isa="avx2")
        monkeypatch.setattr(fuse_choice, "shipped", lambda far=far: ((Path("far.json"), far),))
        fuse_choice.forget()
        # The table is of this processor now: as if it was of another.
        monkeypatch.setattr(Table, "covers", lambda self, processor: False)
        assert choose(WORKS, 5, False, True) == way
    near = made(1.0, 1.0, 1.0)
    monkeypatch.setattr(fuse_choice, "shipped", lambda: ((Path("far.json"), far), (Path("near.json"), near)))
    fuse_choice.forget()
    assert choose(WORKS, 5, False, True) == "separate"  # one of two sees no lead


def test_ones_own_table_serves_before_the_shipped_one(monkeypatch) -> None:
    shipped = serving()
    path = keep(made(1.0, 2.0, 3.0))
    assert path.name == "AuthenticAMD-25-17-avx512.json"
    own = serving()
    assert (own.kind, own.path) == ("own", path)
    assert own.digest != shipped.digest
    assert choose(WORKS, 5, False, True) == "grouped"
    monkeypatch.setenv(fuse_choice.VARIABLE, "shipped")
    assert serving() == shipped
    path.unlink()
    monkeypatch.delenv(fuse_choice.VARIABLE)
    fuse_choice.forget()
    assert serving() == shipped


def test_a_way_must_be_ahead_of_separate_calls_by_more_than_noise(monkeypatch) -> None:
    assert ways(made(1.0, 1.02, 1.01), monkeypatch) == "separate"
    assert ways(made(1.0, 1.05, 1.01), monkeypatch) == "grouped"
    assert ways(made(1.01, 1.05, 1.0), monkeypatch) == "direct"
    assert ways(made(1.01, 1.05, 1.0), monkeypatch, direct=False) == "grouped"
    assert ways(made(1.01, 1.05, None), monkeypatch) == "grouped"


def test_costs_are_those_of_the_threads_in_use(monkeypatch) -> None:
    one, two = made(1.0, 1.2, 9.0), made(9.0, 1.2, 1.0)
    both = made(1.0, 1.2, 9.0, threads=(1, 2))
    both.rows[2] = two.rows[1]  # type: ignore[index]
    for threads, way in ((1, "grouped"), (2, "direct"), (16, "separate")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert ways(both, monkeypatch) == way  # of 16 nothing is known: 1.2 times is not enough
        if threads == 2:
            assert ways(one, monkeypatch) == "separate"
            assert ways(made(1.0, 1.3, 9.0), monkeypatch) == "grouped"


def test_another_isa_level_tells_nothing_of_the_direct_way(monkeypatch) -> None:
    monkeypatch.setattr(fuse_choice, "active_isa", lambda: "avx2")
    found = serving()
    assert (found.kind, found.path.name) == ("shipped", "amd-zen4.json")
    assert choose(WORKS, 5, False, True) != "direct"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: "", "it is no JSON"),
        (lambda text: text[:-30], "it is no JSON"),
        (lambda text: "[" * 100_000, "it is no JSON"),
        (lambda text: "\udcff", "it is no JSON"),
        (lambda text: "[]", "it is no table of format 1"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "it is no table of format 1"),
        (lambda text: text.replace('"vendor": "AuthenticAMD", ', ""), "it lacks what a table has"),
        (lambda text: text.replace('"isa": "avx512"', '"isa": 512'), "it lacks what a table has"),
        (lambda text: text.replace("[[17, 17]]", "17"), "it lacks what a table has"),
        (lambda text: text.replace("9.5", "NaN", 1), "it has the cost nan"),
        (lambda text: text.replace("9.5", "-1", 1), "it has the cost -1"),
        (lambda text: text.replace("9.5", '"9.5"', 1), "it has the cost '9.5'"),
        (lambda text: text.replace("9.5", "[1]", 1), r"it has the cost \[1\]"),
        (lambda text: text.replace('"1": [', '"0": ['), "it has 0 where a whole number of at least 1 belongs"),
        (lambda text: text.replace('"halve", 5', '"halve", 0'), "it has 0 where a whole number"),
        (lambda text: text.replace('"halve"', '"third"'), "it has a row of the unknown kind 'third'"),
        (lambda text: text.replace('"halve"', '"pool"'), "it has no row of the kind halve"),
        (lambda text: text.replace('"rows": {', '"rows": {}, "more": {'), "it has no rows"),
        (lambda text: text.replace("[[17, 17]]", "[[18, 20]]"), "it was measured on a processor .*model 18-20; avx512"),
        (lambda text: text.replace("AuthenticAMD", "GenuineIntel"), "it was measured on a processor .GenuineIntel"),
        (lambda text: text.replace('"isa": "avx512"', '"isa": "avx2"'), "it was measured on a processor .*avx2"),
        (lambda text: text + " " * (4 << 20), "it has more than"),
        (lambda text: text.replace("9.5", f'"{"9" * 5000}"', 1), "it has the cost '9{39}"),
        (
            lambda text: text.replace("17, 17", "1, 1").replace("a processor", "a\\nb"),
            r"it was measured on a\\nb \(Auth",
        ),
    ],
)
def test_a_damaged_or_foreign_table_is_ignored_in_one_sentence(change, reason, monkeypatch) -> None:
    shipped = serving()
    table = made(1.0, 2.0, 9.5)
    path = keep(table)
    path.write_bytes(change(table.text()).encode(errors="surrogateescape"))
    fuse_choice.forget()
    with pytest.warns(
        UserWarning, match=rf"is ignored, .*\({reason}.*\): run python -m fedkern\.run tune again\.$"
    ) as told:
        assert choose(WORKS, 5, False, True) == "direct"
    assert [str(each.message).count("\n") for each in told] == [0]
    assert serving()[:5] == shipped[:5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(WORKS, 5, False, True)  # told once


def test_a_folder_or_a_dead_link_in_the_tables_place_is_ignored() -> None:
    path = own_file()
    assert path is not None
    path.mkdir(parents=True)
    assert "is ignored" in serving().problem
    path.rmdir()
    path.symlink_to("nowhere")
    fuse_choice.forget()
    assert "is ignored" in serving().problem


def test_a_table_can_be_named(tmp_path, monkeypatch) -> None:
    path = keep(made(1.0, 2.0, 3.0), tmp_path / "named.json")
    monkeypatch.setenv(fuse_choice.VARIABLE, str(path))
    assert (serving().kind, serving().path) == ("named", path)
    assert choose(WORKS, 5, False, True) == "grouped"
    path.write_text(json.dumps({"format": 1}))
    fuse_choice.forget()
    with pytest.raises(ValueError, match=r"FEDKERN_LOWERINGS names .*named\.json, which is no table of lowerings"):
        choose(WORKS, 5, False, True)


def test_without_a_home_folder_the_shipped_table_serves(monkeypatch) -> None:
    monkeypatch.delenv("FEDKERN_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/")

    def nobody(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    assert own_file() is None
    assert serving().kind == "shipped"


@torch.no_grad()
def test_blocks_follow_the_table_and_the_threads(monkeypatch) -> None:
    blocks = [nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.ReLU()).eval() for _ in range(3)]
    fused, x = FusedBlocks(blocks), torch.randn(2, 3, 8, 8)
    seen: list[str] = []
    for name in ("grouped", "separate"):
        inner = getattr(fused._folded, name)
        way = lambda *args, name=name, inner=inner: seen.append(name) or inner(*args)  # noqa: E731
        monkeypatch.setattr(fused._folded, name, way)
    keep(made(1.0, 2.0, None, threads=(1, 2)))
    fused(x)
    keep(made(2.0, 1.0, None))
    fused(x)
    mixed = made(1.0, 2.0, None, threads=(1, 2))
    mixed.rows[2] = made(2.0, 1.0, None).rows[1]  # type: ignore[index]
    keep(mixed)
    fused(x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    fused(x)
    assert seen == ["grouped", "separate", "grouped", "separate"]
