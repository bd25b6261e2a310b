"""One prefix of an engine's cache as one file: to keep, to copy, to begin with elsewhere."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress

from codellama_rt.engine.disk_cache.block_file import (
    Buffers,
    Head,
    PrefixFileError,
    check_size,
    checksums,
    decode_identity,
    read_block,
    read_head,
    write_file,
)
from codellama_rt.engine.disk_cache.persistence import identity_of
from codellama_rt.engine.engine import Engine
from codellama_rt.engine.request_checks import checked_prompt
from codellama_rt.engine.sequence import Sequence, int32_list
from codellama_rt.model.lora import LoraAdapter

Path = str | os.PathLike[str]


class _Holder:
    """Who owns blocks that are written to a file, or read from one; an engine calls it a search."""

    is_computing = True  # they will be free again without anybody's help
    _age = -1

    def __init__(self) -> None:
        self.live: dict[Sequence, None] = {}

    def give_way(self, *, everything: bool = False) -> bool:
        """Keep them."""
        return False

    def recover(self) -> None:
        """Nothing is left half done."""


def export_prefix(
    engine: Engine,
    model: Mapping[str, str],
    token_ids: Collection[int],
    path: Path,
    adapter: LoraAdapter | None = None,
    cache_salt: str | None = None,
) -> int:
    """Write the full blocks of a prefix that has been computed to a file, and flush it.

    Args:
        engine: has them in its cache.
        model: what the bits of its keys and values depend on, of `model.fingerprint`.
        token_ids: the prefix.
        path: of the file; one that exists is replaced when the new one is complete.
        adapter: that it was computed with.
        cache_salt: the same; it stands in the file.

    Returns:
        The number of tokens in the file.

    Raises:
        ValueError: the prefix has no full block.
        RuntimeError: a part of it is not in the cache any more.
        OSError: the file cannot be written.
    """
    size = engine.kv_cache.block_size
    num_blocks = len(token_ids) // size
    if not num_blocks:
        raise ValueError(
            f"a prefix to export has at least one block of {size} tokens, got {len(token_ids)}"
        )
    sequence = _sequence(engine, token_ids, adapter, cache_salt)
    with _held(engine, sequence, num_blocks) as (reader, first):
        if first < num_blocks:
            raise RuntimeError(
                f"only {first * size} of {num_blocks * size} tokens are in the KV cache: other "
                "requests have taken the memory; raise kv_memory, or try again"
            )
        blocks = [engine.kv_cache.block_buffers(block_id) for block_id in reader.block_ids]
        head = Head(
            identity_of(model, sequence),
            reader.token_ids.tobytes(),
            0,
            tuple(checksums(block) for block in blocks),
        )
        _write(path, head, blocks)
    return num_blocks * size


def import_prefix(
    engine: Engine,
    model: Mapping[str, str],
    path: Path,
    adapter: LoraAdapter | None = None,
    cache_salt: str | None = None,
) -> int:
    """Read the blocks of a file into an engine's prefix cache, as far as they fit.

    Args:
        engine: takes them.
        model: as in `export_prefix`.
        path: of a file that `export_prefix` has written.
        adapter: that the requests will have.
        cache_salt: the same; that of the file.

    Returns:
        The number of leading tokens that the cache has now.

    Raises:
        ValueError: the file is damaged, or its keys and values would not be computed like that by
            this model, on this machine; nothing of it is used.
        OSError: the file cannot be read.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _read(engine, model, file, adapter, cache_salt)
    except PrefixFileError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None
    finally:
        os.close(file)


def _read(
    engine: Engine,
    model: Mapping[str, str],
    file: int,
    adapter: LoraAdapter | None,
    cache_salt: str | None,
) -> int:
    head, start = read_head(file)
    size, num_tokens = engine.kv_cache.block_size, len(head.tokens) // 4
    prompt = int32_list()
    prompt.frombytes(head.tokens)
    if head.first_block or num_tokens != head.num_blocks * size:
        raise PrefixFileError(f"it does not hold a prefix in blocks of {size} tokens")
    sequence = _sequence(engine, prompt, adapter, cache_salt)
    _require_same(decode_identity(head.identity), decode_identity(identity_of(model, sequence)))
    with _held(engine, sequence, head.num_blocks) as (reader, first):
        blocks = [engine.kv_cache.block_buffers(block_id) for block_id in reader.block_ids]
        num_bytes = sum(buffer.nbytes for buffer in engine.kv_cache.block_buffers(0))
        check_size(file, start, head.num_blocks * num_bytes)
        for i in range(first, len(blocks)):
            read_block(file, start + i * num_bytes, head.checksums[i], blocks[i])
        reader.num_computed = len(reader.token_ids)
    return len(reader.token_ids)


def _require_same(found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    for name in sorted({*found, *expected}):
        its, ours = found.get(name, ""), expected.get(name, "")
        if its != ours:
            raise PrefixFileError(
                f"its keys and values depend on another {name.replace('_', ' ')} than this "
                f"model's: {its!r}, not {ours!r}"
            )


def _write(path: Path, head: Head, blocks: list[Buffers]) -> None:
    """Write a file under another name, flush it, and give it its own."""
    unfinished = f"{os.fspath(path)}.{secrets.token_hex(8)}"
    file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        write_file(file, head.encode(), iter(blocks))
        os.fsync(file)
        os.rename(unfinished, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)
        os.close(file)


def _sequence(
    engine: Engine,
    token_ids: Collection[int],
    adapter: LoraAdapter | None,
    cache_salt: str | None,
) -> Sequence:
    prompt = checked_prompt(token_ids, engine.model.config.vocab_size)
    return engine.admission.make_sequence(prompt, (0, 0, 0), adapter, cache_salt)


@contextmanager
def _held(engine: Engine, sequence: Sequence, num_blocks: int) -> Iterator[tuple[Sequence, int]]:
    """Own a prefix's blocks for a while; at the end those that are computed are cached.

    Args:
        engine: whose they are.
        sequence: begins with the prefix.
        num_blocks: of the prefix.

    Returns:
        A sequence with as many of the blocks as there is room for, and how many of these are in the
        cache already.
    """
    holder, blocks = _Holder(), engine.scheduler.blocks
    with engine.owner:
        engine.check_open()
        whole = sequence.prefix(num_blocks * blocks.block_size)
        missing = max(0, blocks.num_needed(whole) - blocks.num_free)
        first = blocks.num_cached_blocks(whole)
        reader = sequence.prefix((num_blocks - missing) * blocks.block_size)
        reader.first_logit = first * blocks.block_size
        engine.steps.searches.add(holder)
        holder.live[reader] = None
        blocks.allocate(reader, is_request=False)
    try:
        yield reader, first
    finally:
        with engine.owner:
            blocks.index_blocks(reader)
            blocks.release(reader)
            engine.steps.searches.discard(holder)
