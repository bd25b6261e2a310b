"""Prefixes whose blocks' contents follow from their tokens, and a process that stores them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from array import array
from pathlib import Path

from codellama_rt.engine.disk_cache.store import PrefixStore

BLOCK_SIZE, NUM_BUFFERS, BUFFER_BYTES = 4, 6, 1500
NUM_CHAINS, NUM_BLOCKS = 12, 6
IDENTITY = b"of the tests"


def store_in(folder: object, max_bytes: int = 10**8) -> PrefixStore:
    return PrefixStore(str(folder), max_bytes, {}, block_size=BLOCK_SIZE)


def tokens_of(chain: int, num_blocks: int) -> bytes:
    """The first blocks of one of the prefixes; all begin with one common block."""
    common = [7] * BLOCK_SIZE
    own = [chain, *range(100, 100 + BLOCK_SIZE * (NUM_BLOCKS - 1))]
    return array("i", [*common, *own][: num_blocks * BLOCK_SIZE]).tobytes()


def contents_of(tokens: bytes) -> list[memoryview]:
    """What a block holds that ends with these tokens."""
    seed = hashlib.blake2b(tokens).digest()
    return [
        memoryview(bytearray(hashlib.shake_128(seed + bytes([i])).digest(BUFFER_BYTES)))
        for i in range(NUM_BUFFERS)
    ]


def empty() -> list[memoryview]:
    return [memoryview(bytearray(BUFFER_BYTES)) for _ in range(NUM_BUFFERS)]


def save(store: PrefixStore, tokens: bytes) -> None:
    store.save(IDENTITY, tokens, contents_of(tokens), lambda: True)


def is_found(store: PrefixStore, tokens: bytes, identity: bytes = IDENTITY) -> bool:
    """Whether a block can be loaded; fails if it is not the one."""
    found = empty()
    if not store.load(identity, tokens, found):
        return False
    assert found == contents_of(tokens), "a wrong block"
    return True


def check_all(store: PrefixStore) -> int:
    """Load every block of every prefix, and return how many are there."""
    return sum(
        is_found(store, tokens_of(chain, count))
        for chain in range(NUM_CHAINS)
        for count in range(1, NUM_BLOCKS + 1)
    )


def start_writer(folder: Path, max_bytes: int, seed: int) -> subprocess.Popen:
    """A process that stores and reads blocks without end; it says so by a line when it begins."""
    command = [sys.executable, __file__, str(folder), str(max_bytes), str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    return process


def _write_for_ever(folder: str, max_bytes: int, seed: int) -> None:
    import random

    rng = random.Random(seed)
    store = store_in(folder, max_bytes)
    print("begun", flush=True)
    while True:
        chain = rng.randrange(NUM_CHAINS)
        for count in range(1, NUM_BLOCKS + 1):
            save(store, tokens_of(chain, count))
            is_found(store, tokens_of(rng.randrange(NUM_CHAINS), count))


if __name__ == "__main__":
    _write_for_ever(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
