"""Tests of atomic writes: files are complete under their names or absent, and errors name the way out."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from fedkern.errors import UserError
from fedkern.files import atomic


def test_writes_are_complete_or_absent(tmp_path):
    atomic.write_bytes(tmp_path / "x", b"old")

    def fail(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="the disk is full"):
        atomic.write(tmp_path / "x", fail)
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    with pytest.raises(UserError, match="cannot be written"):
        atomic.write_bytes(tmp_path / "missing" / "x", b"")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: free some space"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full: free some space"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied.: put that right, then try again"),
    ],
    ids=["full", "full by safetensors", "forbidden"],
)
def test_the_way_out_fits_what_went_wrong(error, advice, tmp_path):
    def fail(path):
        raise error

    with pytest.raises(UserError, match=f"x cannot be written.*{advice}"):
        atomic.write(tmp_path / "x", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_file_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    atomic.write_bytes(tmp_path / "x", b"content")
    assert order == ["fsync", "rename", "fsync"]  # file, name, folder
