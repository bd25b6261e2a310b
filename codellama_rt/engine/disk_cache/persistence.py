"""A prefix cache that outlives its process: what joins the store to an engine."""

from __future__ import annotations

from collections.abc import Mapping

from codellama_rt.engine.admission import Admission
from codellama_rt.engine.disk_cache.block_file import encode_identity
from codellama_rt.engine.disk_cache.restorer import Restorer
from codellama_rt.engine.disk_cache.store import PrefixStore
from codellama_rt.engine.disk_cache.write_behind import WriteBehind
from codellama_rt.engine.scheduler import Scheduler
from codellama_rt.engine.sequence import Sequence
from codellama_rt.model.fingerprint import adapter_digest
from codellama_rt.model.interface import KVCache
from codellama_rt.ops import native


class Persistence:
    """Write what enters an engine's prefix cache to a store, and read from it what is asked for.

    Attributes:
        writer: in a thread of its own.
        restorer: reads, in threads of its own; one of the engine's searches.
    """

    def __init__(
        self, store: PrefixStore, kv_cache: KVCache, scheduler: Scheduler, admission: Admission
    ) -> None:
        """Join a store to the parts of an engine.

        Raises:
            ValueError: the cache is not in host memory, or prefixes are not cached.
        """
        blocks = scheduler.blocks
        if not kv_cache.in_host_memory:
            raise ValueError(
                "prefixes are kept on disk only where the KV cache is in host memory, on device "
                f"'cpu', and not in a {type(kv_cache).__name__}"
            )
        if not blocks.prefix_caching:
            raise ValueError("prefixes are kept on disk only with prefix_caching=True")
        self._store, self._block_size = store, blocks.block_size
        self.writer = WriteBehind(store, kv_cache, blocks, self.identity)
        self.restorer = Restorer(store, kv_cache, blocks, self.identity)
        blocks.on_full_block = self.writer.offer
        scheduler.prefix_reader = self.restorer
        admission.num_stored_blocks = self.num_stored_blocks

    def identity(self, sequence: Sequence) -> bytes:
        """Return what sequences must have in common, beside tokens, to share blocks; now."""
        return identity_of(self._store.model, sequence)

    def num_stored_blocks(self, sequence: Sequence) -> int:
        """Return how many leading blocks of a sequence seem to be on disk.

        The last one may hold the first token whose logits are needed, behind others.
        """
        end = -(-sequence.first_logit // self._block_size) * self._block_size
        tokens = sequence.token_ids[:end].tobytes()
        return self._store.num_stored(self.identity(sequence), tokens)

    def stats(self) -> dict[str, int]:
        """Return how many sequences wait for the disk, and totals since the start."""
        return {
            "waiting_for_disk": len(self.restorer.held),
            "prefix_restored_tokens": self.restorer.restored_tokens,
            "prefix_written_bytes": self._store.written_bytes,
            "prefix_dropped_blocks": self.writer.num_dropped,
            "prefix_store_errors": self._store.num_errors,
        }

    def close(self) -> None:
        """Stop reading, and write what has been computed so far; the engine has no requests."""
        self.restorer.give_way(everything=True)
        self.writer.close()


def identity_of(model: Mapping[str, str], sequence: Sequence) -> bytes:
    """Return what a sequence's keys and values depend on beside its tokens, as of now.

    Args:
        model: what the bits of the model's depend on.
        sequence: of `Admission.make_sequence`.
    """
    return encode_identity(
        {
            **model,
            "salt": sequence.cache_salt.caller or "",
            "rope": str(sequence.cache_salt.rope),
            "adapter": "" if sequence.adapter is None else adapter_digest(sequence.adapter),
            "instruction_set": native.isa(),
        }
    )
