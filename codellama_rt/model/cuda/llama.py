"""Llama on the device: `model.llama.decoder_stack` on the device's operators, on its own stream.

Steps of one token per sequence run as CUDA graphs, captured once per bucket of batch sizes and
table widths. Lengths, tables and slots are read on the device, so one graph serves every step of
its bucket. Other steps put the same ops on the stream one by one. Activations have the weights'
dtype.
"""

from __future__ import annotations

import gc
import weakref

import numpy as np

from codellama_rt.model.batch import Batch
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.cuda import ops
from codellama_rt.model.cuda.kv_cache import DeviceKVCache
from codellama_rt.model.cuda.step import Pinned, Room, StepInputs, StepShape
from codellama_rt.model.cuda.tensor import DeviceTensor, Memory, empty
from codellama_rt.model.cuda.weights import DeviceWeights
from codellama_rt.model.llama import Activations, StepArrays, decoder_stack
from codellama_rt.model.rope import RotaryEmbedding
from codellama_rt.ops import native

WORKSPACE_BYTES = 64 << 20  # the default; place() computes what a cache needs
_SMALLEST_WIDTH = 16  # of a bucket's block tables
_SPLIT_KEYS, _NODE_SPLITS, _TICKET_BYTES = 256, 16, 1 << 20  # of attention/plan.cuh


class DeviceLlama:
    """The decoder on the device; it holds weights, scratch memory and graphs."""

    kv_cache_type = DeviceKVCache
    applies_adapters = False
    gives_hidden_states = False

    def __init__(self, config: ModelConfig, weights: DeviceWeights) -> None:
        """Take weights that are on the device."""
        self.config, self.weights = config, weights
        self.rope = RotaryEmbedding(config)
        self._device = native.cuda()
        self._stream = self._device.create_stream()
        self._scratch: Scratch | None = None
        self._room = Room()
        self._graphs: dict[tuple[int, int, int], DecodeGraph] = {}
        self._workspace: Memory | None = None
        self.lend_workspace(WORKSPACE_BYTES)

    def lend_workspace(self, num_bytes: int) -> None:
        """Reserve memory for partial results of attention, which is slow without it."""
        if self._workspace is not None and num_bytes <= self._workspace.num_bytes:
            return
        self._graphs.clear()  # they hold the old workspace's address
        self._workspace = Memory(num_bytes)
        self._enter()

    def _enter(self) -> None:
        """Select this model's stream and workspace; another model may have run before."""
        self._device.set_stream(self._stream)
        if self._device.workspace() != self._workspace.pointer:
            self._device.set_workspace(self._workspace.pointer, self._workspace.num_bytes)

    def __del__(self) -> None:
        """Withdraw the workspace before its memory is freed."""
        workspace = getattr(self, "_workspace", None)
        if workspace and self._device.workspace() == workspace.pointer:
            self._device.set_workspace(0, 0)

    def forward(self, batch: Batch, kv_cache: DeviceKVCache) -> np.ndarray:
        """Compute one step: write the tokens' keys and values and return the requested logits.

        Args:
            batch: the tokens of this step; their blocks must be allocated.
            kv_cache: the KV cache.

        Returns:
            (num_logits, vocab_size) float32: the rows `batch.logit_rows`, in that order.
        """
        self._enter()
        rope = self.rope.lookup(batch.positions, batch.rope_lengths)
        num_seqs = len(batch.seq_lens)
        if len(batch.token_ids) == num_seqs == len(batch.logit_rows):
            return self._graph(batch, kv_cache).run(batch, rope)
        shape = StepShape(
            num_tokens=len(batch.token_ids),
            num_seqs=num_seqs,
            max_blocks=batch.block_tables.shape[1],
            num_logits=len(batch.logit_rows),
            half_head_dim=self.config.head_dim // 2,
        )
        inputs = StepInputs(shape, self._room)
        inputs.fill(batch, rope)
        inputs.copy()
        scratch = self._scratch_for(shape.num_tokens)
        logits = empty((shape.num_logits, self.config.vocab_size), "float32")
        self.compute(inputs, kv_cache, scratch, logits)
        return logits.numpy()

    def compute(
        self, inputs: StepInputs, kv_cache: DeviceKVCache, scratch: Scratch, logits: DeviceTensor
    ) -> None:
        """Put a step on the stream without allocating or waiting."""
        given = inputs.device
        a = scratch.rows(inputs.shape.num_tokens)
        step = StepArrays(
            (given["cos"], given["sin"], given["rope_index"]),
            given["slot_mapping"],
            (given["block_tables"], given["seq_lens"], given["cu_seqlens_q"]),
        )
        ops.embedding(given["token_ids"], self.weights.embedding, out=a.residual)
        decoder_stack(ops, ops.linear, self.weights.layers, self.config, a, step, kv_cache.layers)
        self._logits(given["logit_rows"], a, scratch, logits)

    def _logits(
        self, logit_rows: DeviceTensor, a: Activations, scratch: Scratch, logits: DeviceTensor
    ) -> None:
        """Compute the requested rows only: the embedding op is what selects rows of a table."""
        if logits.shape[0] == 0:
            return
        sublayer, residual = picked = scratch.picked(logits.shape[0])
        ops.embedding(logit_rows, a.sublayer, out=sublayer)
        ops.embedding(logit_rows, a.residual, out=residual)
        ops.add_rms_norm(*picked, self.weights.norm, self.config.norm_eps, out=picked)
        ops.linear(sublayer, self.weights.lm_head, out=logits)

    def _scratch_for(self, num_tokens: int) -> Scratch:
        if self._scratch is None or self._scratch.num_tokens < num_tokens:
            self._scratch = None  # free the old memory first
            self._scratch = Scratch(self.config, self.weights.dtype, num_tokens)
        return self._scratch

    def _graph(self, batch: Batch, kv_cache: DeviceKVCache) -> DecodeGraph:
        num_seqs = _power_of_two(len(batch.seq_lens))
        width = max(_SMALLEST_WIDTH, _power_of_two(batch.block_tables.shape[1]))
        key = (num_seqs, width, id(kv_cache))
        if key not in self._graphs:
            self._graphs[key] = DecodeGraph(self, kv_cache, num_seqs, width)
        return self._graphs[key]


class Scratch:
    """Activations of up to `num_tokens` tokens on the device."""

    def __init__(self, config: ModelConfig, dtype: str, num_tokens: int) -> None:
        """Allocate the activations."""
        self.num_tokens = num_tokens
        self._config = config
        self._arrays = {
            name: empty((num_tokens, width), "float32" if name == "lse" else dtype)
            for name, width in Activations.widths(config).items()
        }
        self._picked = tuple(empty((num_tokens, config.dim), dtype) for _ in range(2))

    def rows(self, num_tokens: int) -> Activations:
        """Return the first rows of every activation."""
        rows = {name: array.rows(0, num_tokens) for name, array in self._arrays.items()}
        return Activations.over(self._config, rows)

    def picked(self, num_rows: int) -> tuple[DeviceTensor, DeviceTensor]:
        """Return the buffers for the rows whose logits are requested: sublayer and residual."""
        sublayer, residual = self._picked
        return sublayer.rows(0, num_rows), residual.rows(0, num_rows)


class DecodeGraph:
    """A step of up to `num_seqs` sequences with one token each, captured once."""

    def __init__(
        self, model: DeviceLlama, kv_cache: DeviceKVCache, num_seqs: int, width: int
    ) -> None:
        """Allocate what the graph uses; it is captured at the first run."""
        self._model = weakref.proxy(model)  # the model owns the graph: no reference cycle
        self._kv_cache = kv_cache
        self._device = native.cuda()
        shape = StepShape(num_seqs, num_seqs, width, num_seqs, model.config.head_dim // 2)
        self._inputs = StepInputs(shape, Room())
        self._scratch = Scratch(model.config, model.weights.dtype, num_seqs)
        self._logits = empty((num_seqs, model.config.vocab_size), "float32")
        self._pinned = Pinned(self._logits.nbytes)
        self._graph = 0

    def run(self, batch: Batch, rope: tuple) -> np.ndarray:
        """Return the step's logits."""
        self._inputs.fill(batch, rope)
        if self._graph:
            self._device.launch_graph(self._graph)
        else:
            self._step()  # loads the kernels, which a capture must not do
            self._device.synchronize()
            self._graph = self._capture()
        self._device.synchronize()
        num_logits = len(batch.logit_rows)
        logits = self._pinned.bytes.view(np.float32).reshape(self._logits.shape)
        return logits[:num_logits].copy()

    def _capture(self) -> int:
        collects = gc.isenabled()
        gc.disable()  # memory freed by Python meanwhile would break the capture
        self._device.begin_capture()
        try:
            self._step()
        except Exception:
            self._device.destroy_graph(self._device.end_capture())
            raise
        finally:
            if collects:
                gc.enable()
        return self._device.end_capture()

    def _step(self) -> None:
        self._inputs.copy()
        self._model.compute(self._inputs, self._kv_cache, self._scratch, self._logits)
        self._device.copy_async(self._pinned.pointer, self._logits.device_ptr, self._logits.nbytes)

    def __del__(self) -> None:
        """Destroy the graph."""
        if getattr(self, "_graph", 0):
            self._device.destroy_graph(self._graph)


def workspace_bytes(config: ModelConfig, num_keys: int, num_seqs: int) -> int:
    """Return the most memory that splitting a step of one token per sequence takes.

    The splitting is that of csrc/cuda/attention/plan.cuh.

    Args:
        config: of the model.
        num_keys: tokens of all sequences together.
        num_seqs: sequences.
    """
    splits = num_keys // _SPLIT_KEYS + num_seqs
    nodes = splits // _NODE_SPLITS + num_seqs
    return _TICKET_BYTES + config.n_heads * (splits + nodes) * (config.head_dim + 4) * 4


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
