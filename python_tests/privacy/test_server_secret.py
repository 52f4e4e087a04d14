"""The server's secret bits: drawn once, stored, never drawn again for a run that has begun."""

import pytest

from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.errors import UserError
from fedkern.privacy import server_secret


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
