"""The table of many clients: rows come back, commits write only changes, and damage is named."""

import json

import numpy as np
import pytest

from fedkern.engine.store import client_table
from fedkern.engine.store.client_table import ClientTable, Row, read_rows
from fedkern.errors import UserError


def row(client, plan):
    return Row(f"client-{client:05d}-{plan:06d}.safetensors", 1000 * client + plan, (plan, plan, 0, 0))


def test_rows_come_back(tmp_path):
    table, known, places = ClientTable(tmp_path), {}, []
    rng = np.random.default_rng(0)
    for plan in range(1, 60):
        changed = {int(k): row(int(k), plan) for k in rng.choice(400, 20, replace=False)}
        changed[500] = Row(None, None, (plan, 0, 0, 0))
        known |= changed
        places.append((table.add(plan, changed), dict(known)))
    assert table.rows == known
    for place, rows in places[-3:]:
        assert read_rows(tmp_path, place) == rows
    again = ClientTable(tmp_path)
    again.open(places[-2][0])
    assert again.rows == places[-2][1]
    place = again.add(60, {3: Row()})  # over what was added after that checkpoint
    assert read_rows(tmp_path, place) == {**places[-2][1], 3: Row()}


def test_a_commit_writes_what_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(client_table, "SLACK", 0)
    table, total, changes, files = ClientTable(tmp_path), 0, 0, set()
    before = None
    for plan in range(1, 301):
        changed = {(7 * plan + i) % 1000: row((7 * plan + i) % 1000, plan) for i in range(7)}
        changes += len(client_table._line(changed))
        place = table.add(plan, changed)
        unmoved = before is not None and before["file"] == place["file"]
        total += place["bytes"] - (before["bytes"] if unmoved else 0)
        files.add(place["file"])
        before = place
    assert 2 < len(files) < 20  # begun anew now and then
    assert total < 4 * changes
    assert place["bytes"] < 3 * len(client_table._line(table.rows))


def test_line_ends_of_windows_are_named(tmp_path):
    table = ClientTable(tmp_path)
    for plan in (1, 2):
        place = table.add(plan, {1: row(1, plan)})
    path = tmp_path / place["file"]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(ValueError, match=r"not what the run wrote, as its line ends became CRLF: mend the file by"):
        read_rows(tmp_path, place)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, place: path.unlink(),
        lambda path, place: path.write_bytes(path.read_bytes()[:-1]),
        lambda path, place: path.write_bytes(path.read_bytes().replace(b"1", b"2")),
        lambda path, place: place.update(file="../elsewhere.jsonl"),
        lambda path, place: place.update(file=3),
        lambda path, place: place.update(bytes=10**18),
        lambda path, place: place.update(bytes=-1),
        lambda path, place: place.pop("sum"),
    ],
)
def test_damage_is_a_value_error(damage, tmp_path):
    place = ClientTable(tmp_path).add(1, {1: row(1, 1)})
    damage(tmp_path / place["file"], place)
    with pytest.raises(ValueError, match="is missing or damaged"):
        read_rows(tmp_path, place)
    with pytest.raises(ValueError, match="is missing or damaged"):
        ClientTable(tmp_path).open(place)


@pytest.mark.parametrize(
    "content",
    [
        [1], {"1": 2}, {"x": [None, None, []]}, {"1": ["../../etc/passwd", 3, []]}, {"1": [None, None, [1, 2]]},
        {"1": ["client-00001-000001.safetensors", "3", []]}, {"1": [None, None, ["a", 0, 0, 0]]},
    ],
)  # fmt: skip
def test_rows_of_somebody_else_are_looked_at(content, tmp_path):
    import zlib

    line = (json.dumps(content) + "\n").encode()
    (tmp_path / "clients-000001.jsonl").write_bytes(line)
    place = {"file": "clients-000001.jsonl", "bytes": len(line), "sum": zlib.crc32(line)}
    with pytest.raises(ValueError, match="is damaged"):
        read_rows(tmp_path, place)


def test_a_table_that_cannot_be_lengthened_is_one_sentence(tmp_path):
    table = ClientTable(tmp_path)
    (tmp_path / table.add(1, {1: row(1, 1)})["file"]).unlink()
    with pytest.raises(UserError, match=r"clients-000001\.jsonl cannot be written"):
        table.add(2, {1: row(1, 2)})
