"""Tests of forks: shared positions in open files, until they are opened again, and threads that forbid a fork."""

import os
import socket
import tempfile
import threading

from fedkern.process.forking import cut_connections, has_threads, read_positions, reopen_files


def test_a_fork_has_positions_of_its_own(tmp_path):
    (tmp_path / "values").write_bytes(bytes(range(100)))
    read = os.open(tmp_path / "values", os.O_RDONLY)
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    with tempfile.TemporaryFile(dir=tmp_path) as gone:  # has no name any more
        gone.write(b"abc")
        gone.seek(1)
        os.lseek(read, 40, os.SEEK_SET)
        positions = read_positions()
        assert (positions[read], positions[gone.fileno()]) == (40, 1)
        assert log not in positions
        assert not {0, 1, 2} & {*positions}
        if not (child := os.fork()):
            reopen_files(positions)
            fits = os.read(read, 3) == bytes([40, 41, 42]) and os.read(gone.fileno(), 1) == b"b"
            os.write(log, b"child")
            os._exit(0 if fits else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert os.read(read, 1) == bytes([40])
        assert os.lseek(gone.fileno(), 0, os.SEEK_CUR) == 1
    os.write(log, b" parent")
    assert (tmp_path / "log").read_bytes() == b"child parent"  # which both write has one position
    os.close(read)
    os.close(log)


def test_a_fork_ends_its_share_in_connections():
    near, peer = socket.socketpair()
    kept, far = socket.socketpair()
    if not (child := os.fork()):
        cut_connections(kept.fileno())
        kept.send(near.recv(1) or b"nothing")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert far.recv(9) == b"nothing"
    peer.send(b"a")
    assert near.recv(1) == b"a"  # the parent's is as before
    for end in (near, peer, kept, far):
        end.close()


def test_threads_of_fedkern_do_not_count():
    end = threading.Event()
    for name, counts in (("fedkern-lock", False), ("reader", True)):
        thread = threading.Thread(target=end.wait, name=name)
        thread.start()
        found = has_threads()
        end.set()
        thread.join()
        end.clear()
        assert found == counts
        assert not has_threads()
