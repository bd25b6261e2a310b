"""Blocks on disk: whatever happens to the files, a block is found as it was, or not at all."""

import errno
import logging
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import stored_prefixes
from helpers.stored_prefixes import (
    BUFFER_BYTES,
    IDENTITY,
    NUM_BLOCKS,
    NUM_BUFFERS,
    NUM_CHAINS,
    check_all,
    contents_of,
    empty,
    is_found,
    save,
    start_writer,
    store_in,
    tokens_of,
)

from codellama_rt.engine.disk_cache import store as store_module
from codellama_rt.engine.disk_cache.block_file import (
    Head,
    PrefixFileError,
    decode_identity,
    read_head,
)

NUM_FLIPS = 500
# All of the 200: CODELLAMA_RT_KILLS=200 python -m pytest tests/engine/disk_cache -k kill
NUM_KILLS = int(os.environ.get("CODELLAMA_RT_KILLS", "12"))
FILE_BYTES = NUM_BUFFERS * BUFFER_BYTES + 1000  # with the head, at most


def files_in(folder):
    return sorted(Path(folder).glob("*.kv"))


def fill(store):
    for chain in range(NUM_CHAINS):
        for count in range(1, NUM_BLOCKS + 1):
            save(store, tokens_of(chain, count))


def only_file(tmp_path):
    store = store_in(tmp_path)
    save(store, tokens_of(0, 1))
    [path] = files_in(tmp_path)
    return store, path


def test_what_is_stored_is_found_by_another_object(tmp_path):
    store = store_in(tmp_path)
    assert check_all(store) == 0
    fill(store)
    again = store_in(tmp_path)
    assert check_all(again) == NUM_CHAINS * NUM_BLOCKS
    assert len(files_in(tmp_path)) == NUM_CHAINS * (NUM_BLOCKS - 1) + 1  # one block is common
    assert store.written_bytes == sum(path.stat().st_size for path in files_in(tmp_path))
    assert (store.num_errors, again.num_errors, again.written_bytes) == (0, 0, 0)


def test_leading_blocks_are_counted(tmp_path):
    store = store_in(tmp_path)
    for count in (1, 2, 4):
        save(store, tokens_of(0, count))
    assert store.num_stored(IDENTITY, tokens_of(0, 6)) == 2
    assert store.num_stored(IDENTITY, tokens_of(0, 2)[:-4]) == 1  # not a whole block
    assert store.num_stored(IDENTITY, tokens_of(1, 6)) == 1
    assert store.num_stored(IDENTITY, b"") == 0


def test_another_identity_finds_nothing(tmp_path):
    store = store_in(tmp_path)
    save(store, tokens_of(0, 1))
    assert not is_found(store, tokens_of(0, 1), b"of another model")
    assert is_found(store, tokens_of(0, 1))


def test_nobody_else_may_read_the_files(tmp_path):
    _, path = only_file(tmp_path / "new")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("part", range(5))
def test_a_flipped_bit_is_found(tmp_path, part):
    store, path = only_file(tmp_path)
    sound = path.read_bytes()
    rng = random.Random(part)
    # A third of them in the head, which is small.
    with path.open("rb") as file:
        length = read_head(file.fileno())[1]
    for i in range(NUM_FLIPS // 5):
        damaged = bytearray(sound)
        at = rng.randrange(length if i % 3 == 0 else len(sound))
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert not is_found(store, tokens_of(0, 1)), f"bit flipped in byte {at}"
        assert not path.exists()
        assert store.num_errors == i + 1
    save(store, tokens_of(0, 1))
    assert is_found(store, tokens_of(0, 1))


def test_a_cut_or_longer_file_is_found(tmp_path):
    store, path = only_file(tmp_path)
    sound = path.read_bytes()
    cuts = [*range(300), *range(300, len(sound), 97), len(sound) - 1]
    for length in cuts:
        path.write_bytes(sound[:length])
        assert not is_found(store, tokens_of(0, 1)), length
        assert not path.exists()
    path.write_bytes(sound + b"x")
    assert not is_found(store, tokens_of(0, 1))


def test_zeros_in_place_of_the_contents_are_found(tmp_path):
    """What a machine without power leaves of a file that was never flushed."""
    store, path = only_file(tmp_path)
    size = path.stat().st_size
    for start in (0, size // 2, size - 4096):
        save(store, tokens_of(0, 1))
        with path.open("r+b") as file:
            file.seek(start)
            file.write(bytes(min(4096, size - start)))
        assert not is_found(store, tokens_of(0, 1))


def test_the_first_error_is_logged_once(tmp_path, caplog):
    store, path = only_file(tmp_path)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            path.write_bytes(b"no prefix")
            assert not is_found(store, tokens_of(0, 1))
    assert [record.name for record in caplog.records] == ["codellama_rt.engine.disk_cache.store"]
    assert str(path) in caplog.text
    assert store.num_errors == 3


class ConstantHash:
    """The hash of an attacker's dreams: everything collides."""

    def update(self, _):
        pass

    def hexdigest(self):
        return "0" * 32


def test_a_forged_collision_finds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_new_hasher", lambda _: ConstantHash())
    store = store_in(tmp_path)
    save(store, tokens_of(0, 2))
    for chain in range(NUM_CHAINS):
        for count in range(1, NUM_BLOCKS + 1):
            assert is_found(store, tokens_of(chain, count)) is ((chain, count) == (0, 2))
            save(store, tokens_of(chain, count))  # its name is taken
    assert not is_found(store, tokens_of(0, 2), b"of another model")
    assert len(files_in(tmp_path)) == 1
    assert store.num_errors == 0


def test_the_same_last_block_behind_another_beginning_is_not_taken(tmp_path, monkeypatch):
    """The tokens of a block may be equal, and those before it differ: all are compared."""
    monkeypatch.setattr(store_module, "_new_hasher", lambda _: ConstantHash())
    store = store_in(tmp_path)
    one, other = tokens_of(0, 3), tokens_of(1, 3)
    assert one[-16:] == other[-16:]
    save(store, one)
    assert not store.load(IDENTITY, other, empty())


def test_the_budget_is_kept(tmp_path):
    budget = 20 * FILE_BYTES
    store = store_in(tmp_path, budget)
    for chain in range(NUM_CHAINS):
        for count in range(1, NUM_BLOCKS + 1):
            save(store, tokens_of(chain, count))
            assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= budget
    assert check_all(store) >= 19


def test_the_ends_of_what_was_used_longest_ago_go_first(tmp_path):
    store = store_in(tmp_path, 12 * FILE_BYTES)
    now = 10**18
    for chain in (0, 1):
        for count in range(1, NUM_BLOCKS + 1):
            save(store, tokens_of(chain, count))
    for path in files_in(tmp_path):  # the heads were written first, so they are the oldest
        os.utime(path, ns=(now, now))
    store.touch(IDENTITY, tokens_of(0, NUM_BLOCKS))  # now: much later
    for count in range(2, NUM_BLOCKS + 1):
        save(store, tokens_of(2, count))
    assert all(is_found(store, tokens_of(0, count)) for count in range(1, NUM_BLOCKS + 1))
    assert all(is_found(store, tokens_of(2, count)) for count in range(1, NUM_BLOCKS + 1))
    left = [is_found(store, tokens_of(1, count)) for count in range(2, NUM_BLOCKS + 1)]
    assert left == sorted(left, reverse=True)  # what is left is reachable
    assert not left[-1]


def test_a_block_larger_than_the_budget_is_not_stored(tmp_path):
    store = store_in(tmp_path, BUFFER_BYTES)
    fill(store)
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_bytes(bytes(10**6))
    (tmp_path / "folder.kv").mkdir()
    store = store_in(tmp_path, 3 * FILE_BYTES)
    fill(store)
    assert (tmp_path / "notes.txt").exists()
    assert len(files_in(tmp_path)) >= 2  # the folder is one
    assert store.num_errors == 0


def test_a_block_that_was_overwritten_meanwhile_is_not_stored(tmp_path):
    store = store_in(tmp_path)
    tokens = tokens_of(0, 1)
    store.save(IDENTITY, tokens, contents_of(tokens), lambda: False)
    assert list(tmp_path.iterdir()) == []
    assert (store.written_bytes, store.num_errors) == (0, 0)


def test_what_a_killed_process_left_is_deleted_and_what_is_being_written_is_not(tmp_path):
    (tmp_path / "0123.kv-unfinished").write_bytes(bytes(5000))
    seen = []

    def look_while_writing():
        fill(store_in(tmp_path))
        seen.extend(path.name for path in tmp_path.glob("*unfinished"))
        return True

    tokens = tokens_of(0, 1)
    store = store_in(tmp_path)
    store.save(IDENTITY, tokens, contents_of(tokens), look_while_writing)
    assert len(seen) == 1
    assert seen != ["0123.kv-unfinished"]
    assert not list(tmp_path.glob("*unfinished"))
    assert check_all(store) == NUM_CHAINS * NUM_BLOCKS


@pytest.mark.parametrize("room", [0, 1, 100, 2000, BUFFER_BYTES * NUM_BUFFERS])
def test_a_full_disk(tmp_path, monkeypatch, room, caplog):
    left = [room]
    writev = os.writev

    def write_until_full(file, buffers):
        part = memoryview(b"".join(buffers))[: left[0]]
        if not part:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= len(part)
        return writev(file, [part])

    monkeypatch.setattr(store_module.os, "writev", write_until_full)
    monkeypatch.setattr(store_module, "monotonic", lambda: 1.0)
    store = store_in(tmp_path)
    fill(store)
    assert list(tmp_path.iterdir()) == []
    assert store.num_errors == 1  # it does not try again for a while
    assert "No space left" in caplog.text
    monkeypatch.setattr(store_module.os, "writev", writev)
    monkeypatch.setattr(store_module, "monotonic", lambda: store._paused_until + 1)
    fill(store)
    assert check_all(store) == NUM_CHAINS * NUM_BLOCKS


def test_short_reads_and_writes_are_continued(tmp_path, monkeypatch):
    writev, preadv = os.writev, os.preadv
    monkeypatch.setattr(store_module.os, "writev", lambda f, b: writev(f, [b[0][:700]]))
    monkeypatch.setattr(store_module.os, "preadv", lambda f, b, at: preadv(f, [b[0][:700]], at))
    store = store_in(tmp_path)
    fill(store)
    assert check_all(store) == NUM_CHAINS * NUM_BLOCKS


def test_more_buffers_than_one_call_takes(tmp_path):
    store = store_in(tmp_path)
    blocks = [memoryview(bytearray([i % 251])) for i in range(3000)]
    tokens = tokens_of(0, 1)
    store.save(IDENTITY, tokens, blocks, lambda: True)
    found = [memoryview(bytearray(1)) for _ in blocks]
    assert store.load(IDENTITY, tokens, found)
    assert found == blocks


def test_a_limit_of_the_system_on_the_size_of_files(tmp_path):
    """A real error in the middle of a file: the kernel's, in a process of its own."""
    code = f"""
import sys, resource
sys.path.insert(0, {str(Path(stored_prefixes.__file__).parent.parent)!r})
from helpers.stored_prefixes import *
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
store = store_in({str(tmp_path)!r})
save(store, tokens_of(0, 1))
assert not is_found(store, tokens_of(0, 1))
print(store.num_errors, store.written_bytes)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == "1 0\n", found.stderr
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize("flag", [os.O_CREAT, os.O_NONBLOCK])
def test_a_folder_that_may_not_be_written_or_read(tmp_path, monkeypatch, flag):
    fill(store_in(tmp_path))
    open_file = os.open

    def refuse(path, flags, *mode):
        if flags & flag:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return open_file(path, flags, *mode)

    monkeypatch.setattr(store_module.os, "open", refuse)
    store = store_in(tmp_path)
    files_in(tmp_path)[0].unlink()
    fill(store)
    found = check_all(store)
    assert found == (0 if flag == os.O_NONBLOCK else check_all(store_in(tmp_path)))
    assert store.num_errors > 0


@pytest.mark.parametrize("below", ["", "/below"])
def test_a_file_in_place_of_the_folder(tmp_path, below):
    (tmp_path / "file").write_text("x")
    store = store_in(f"{tmp_path}/file{below}")
    fill(store)
    assert check_all(store) == 0
    assert store.num_errors > 0


def test_a_folder_that_vanishes(tmp_path):
    store = store_in(tmp_path / "cache")
    save(store, tokens_of(0, 1))
    files_in(tmp_path / "cache")[0].unlink()
    (tmp_path / "cache").rmdir()
    fill(store)
    assert check_all(store) == 0


def test_what_is_no_file(tmp_path):
    """A pipe under a block's name does not hold anyone up."""
    store, path = only_file(tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert not is_found(store, tokens_of(0, 1))
    assert not path.exists()
    path.mkdir()
    assert not is_found(store, tokens_of(0, 1))


@pytest.mark.parametrize("name", [b"", b"[" * 10000, b'{"a": 1}', b"\xff", b"[]"])
def test_what_is_no_identity(name):
    with pytest.raises(PrefixFileError):
        decode_identity(name)


def test_a_head_of_any_shape_comes_back(tmp_path):
    head = Head(b"{}", bytes(8), 3, ((1, 2), (3, 4), (2**32 - 1, 0)))
    path = tmp_path / "head"
    path.write_bytes(head.encode() + b"rest")
    with path.open("rb") as file:
        assert read_head(file.fileno()) == (head, len(head.encode()))


def test_kills_at_any_time_leave_only_sound_blocks(tmp_path):
    budget = 30 * FILE_BYTES
    rng = random.Random(1)
    for i in range(NUM_KILLS):
        process = start_writer(tmp_path, budget, seed=i)
        try:
            process.wait(rng.random() * 0.1)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL, "it must go on until it is killed"
        process.stdout.close()
        store = store_in(tmp_path, budget)
        assert check_all(store) >= 0
        assert store.num_errors == 0, "a killed process leaves no damaged file"
    store = store_in(tmp_path, budget)
    for count in range(1, NUM_BLOCKS + 1):
        save(store, tokens_of(NUM_CHAINS, count))
    assert not list(tmp_path.glob("*unfinished"))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= budget


def test_several_processes_use_one_folder(tmp_path):
    budget = 30 * FILE_BYTES
    processes = [start_writer(tmp_path, budget, seed) for seed in range(3)]
    store = store_in(tmp_path, budget)
    for _ in range(40):
        check_all(store)
        total = 0
        for path in tmp_path.iterdir():
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
        assert total <= 1.5 * budget
    for process in processes:
        assert process.poll() is None, "another process disturbed it"
        process.kill()
        process.wait()
        process.stdout.close()
    assert store.num_errors == 0
