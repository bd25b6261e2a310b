"""The prefix cache on disk as an option of `LLM`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property

from codellama_rt.engine.disk_cache.store import PrefixStore
from codellama_rt.llm.memory import parse_bytes
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.fingerprint import fingerprint
from codellama_rt.model.interface import KVCache
from codellama_rt.model.weights import LlamaWeights


def require_prefix_cache(
    folder: str | os.PathLike[str] | None,
    max_bytes: int | str,
    *,
    device: str,
    prefix_caching: bool,
) -> None:
    """Refuse options of a prefix cache on disk that no model could be opened with.

    Raises:
        TypeError: not a path, or not a size.
        ValueError: not a positive size, a device whose memory cannot be read as bytes, or
            `prefix_caching` is off.
    """
    parse_bytes(max_bytes)
    if folder is None:
        return
    os.fspath(folder)
    if device != "cpu":
        raise ValueError(
            "prefix_cache_dir needs a KV cache in host memory, which device 'cpu' has, got device "
            f"{device!r}"
        )
    if not prefix_caching:
        raise ValueError("prefix_cache_dir needs prefix_caching=True")


class PrefixFiles:
    """What an `LLM` needs to recognise its keys and values in files.

    Args:
        config: of the model.
        weights: as the kernels read them.
        kv_cache: of the model.
    """

    def __init__(self, config: ModelConfig, weights: LlamaWeights, kv_cache: KVCache) -> None:
        self._is_possible = kv_cache.in_host_memory
        self._config, self._weights = config, weights if self._is_possible else None
        self._kv_dtype, self._block_size = kv_cache.dtype, kv_cache.block_size

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """What the bits of the keys and values depend on.

        Raises:
            ValueError: the KV cache is not in host memory.
        """
        if not self._is_possible:
            raise ValueError(
                "prefixes can be exported and imported on device 'cpu' only, whose KV cache is in "
                "host memory"
            )
        return fingerprint(
            self._config, self._weights, kv_dtype=self._kv_dtype, block_size=self._block_size
        )

    def open_store(
        self, folder: str | os.PathLike[str] | None, max_bytes: int | str
    ) -> PrefixStore | None:
        """Open a folder for the model's prefixes, if one is given."""
        if folder is None:
            return None
        return PrefixStore(
            os.path.abspath(folder),
            parse_bytes(max_bytes),
            self.identity,
            block_size=self._block_size,
        )
