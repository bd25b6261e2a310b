"""The tensors of a LoRA adapter's modules: read, checked, and made into what the model applies."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from codellama_rt import ops
from codellama_rt.checkpoint.adapter_config import MAX_RANK, AdapterConfig
from codellama_rt.checkpoint.finiteness import require_finite
from codellama_rt.checkpoint.stored_tensor import StoredTensor
from codellama_rt.checkpoint.tensor_names import expected_shapes, pairs_first, place_of
from codellama_rt.errors import CheckpointError
from codellama_rt.model.config import ModelConfig
from codellama_rt.model.lora import LoraAdapter, LowRank, TokenRows, projection_widths
from codellama_rt.model.weights import LlamaWeights, Weight, layer_shapes

Place = tuple[int | None, str]  # layer, None outside of them, and field of the weights
_CHUNK_ROWS = 256  # of a weight that is in float32 at a time


@dataclass
class AdapterModule:
    """One module's tensors by kind ("lora_A"), and its name, "model.layers.0.mlp.up_proj"."""

    name: str
    parts: dict[str, StoredTensor] = field(default_factory=dict)


class AdapterReader:
    """Makes an adapter of a file's tensors, module after module.

    Args:
        file: for messages.
        asked: of the adapter.
        config: of the model.
        weights: of the model, or None.
    """

    def __init__(
        self, file: Path, asked: AdapterConfig, config: ModelConfig, weights: LlamaWeights | None
    ) -> None:
        """Read nothing yet."""
        self._file, self._asked, self._config, self._weights = file, asked, config, weights
        vocabulary = (config.vocab_size, config.dim)
        top = {"embedding": vocabulary, "norm": (config.dim,), "lm_head": vocabulary}
        self._shapes = layer_shapes(config) | top
        self._changes: dict[Place, LowRank] = {}
        self._whole: dict[Place, np.ndarray] = {}
        self._saved: set[Place] = set()  # those of `_whole`, and others that change nothing
        self._tokens: TokenRows | None = None

    def read(self, place: Place, module: AdapterModule) -> None:
        """Take one module's tensors.

        Raises:
            CheckpointError: they do not fit the model, the configuration or one another.
        """
        module.parts.pop("original", None)
        if "weight" in module.parts:
            self._read_whole(place, module)
        if "trainable_tokens" in module.parts:
            self._read_tokens(place, module)
        if not module.parts:
            return
        if len(self._shapes[place[1]]) < 2:
            raise self._fault(module, f"expected a weight, found {', '.join(module.parts)}")
        width = self._shapes[place[1]][0]
        bias = self._read(module, "bias", (width,)) if "bias" in module.parts else None
        change = self._read_low_rank(place, module) if module.parts else LowRank()
        self._changes[place] = self._with_bias(place, module, change, bias)

    def adapter(self, path: Path) -> LoraAdapter:
        """Return all that was read.

        Raises:
            CheckpointError: parts that the configuration names are missing, or exclude others.
        """
        self._check_complete()
        layers: list[dict[str, LowRank]] = [{} for _ in range(self._config.n_layers)]
        for (layer, name), change in self._changes.items():
            if layer is not None:
                layers[layer][name] = change
        return LoraAdapter(
            path,
            layers,
            projection_widths(self._config),
            {name: change for (layer, name), change in self._changes.items() if layer is None},
            self._whole,
            self._tokens,
            self._config.tie_word_embeddings,
        )

    def _check_complete(self) -> None:
        names = [name.rpartition(".")[0] for name in expected_shapes(self._config)]
        for name in {*names, "lm_head"}:
            is_asked = any(end and name.endswith(end) for end in self._asked.modules_to_save)
            if is_asked and place_of(name) not in self._saved:
                raise CheckpointError(
                    f"{self._file}: expected a weight of {name}, which modules_to_save names"
                )
        ends = {name for layer, name in (*self._changes, *self._whole) if layer is None} - {"norm"}
        if self._asked.token_ids and self._tokens is None:
            raise CheckpointError(
                f"{self._file}: expected trainable_tokens_delta of embed_tokens, found none"
            )
        if self._tokens is not None and ends:
            raise CheckpointError(
                f"{self._file}: trainable tokens beside other changes of {', '.join(sorted(ends))} "
                "are not supported; merge the adapter with PEFT"
            )
        if self._config.tie_word_embeddings and self._asked.ties and ends:
            raise CheckpointError(
                f"{self._file}: ensure_weight_tying is not supported for {', '.join(sorted(ends))} "
                "of a model whose head is the embedding; merge the adapter with PEFT"
            )

    def _read_whole(self, place: Place, module: AdapterModule) -> None:
        array = self._read(module, "weight", self._shapes[place[1]], keeps_dtype=True)
        array, base = self._in_order(place, array), self._base(place)
        self._saved.add(place)
        with np.errstate(over="ignore"):
            if not isinstance(base, np.ndarray) or (array.astype(base.dtype) != base).any():
                self._whole[place] = array

    def _read_tokens(self, place: Place, module: AdapterModule) -> None:
        ids = np.array(self._asked.token_ids, np.int64)
        if place != (None, "embedding") or not len(ids) or ids.max() >= self._config.vocab_size:
            raise self._fault(
                module,
                "expected trainable_token_indices of embed_tokens, with ids below "
                f"{self._config.vocab_size}",
            )
        values = self._read(module, "trainable_tokens", (len(ids), self._config.dim))
        order = np.argsort(ids)
        self._tokens = TokenRows(ids[order], np.ascontiguousarray(values[order]))

    def _read_low_rank(self, place: Place, module: AdapterModule) -> LowRank:
        """Read A and B, and the magnitudes of DoRA or the bias of B."""
        is_embedding = place[1] == "embedding"
        names = [f"lora_{'embedding_' * is_embedding}{side}" for side in "AB"]
        self._check_parts(module, names, is_embedding)
        self._asked.check_target(module.name)
        out, width = self._shapes[place[1]]
        if is_embedding:
            out, width = width, out
        rank = self._rank(module, names, out, width)
        down = self._read(module, names[0], (rank, width))
        up = self._in_order(place, self._read(module, names[1], (out, rank)))
        scale = self._asked.scale(module.name, rank)
        up = self._scaled(module, up, scale)
        if is_embedding:
            down = np.ascontiguousarray(down.T)
        shift = factor = None
        if self._asked.lora_bias:
            bias = self._in_order(place, self._read(module, "lora_B.bias", (out,)))
            shift = self._scaled(module, bias, scale)
        if self._asked.use_dora:
            magnitude = self._read(module, "lora_magnitude_vector", (out,))
            factor = self._factor(place, module, self._in_order(place, magnitude), down, up)
            up = self._scaled(module, up, factor[:, None])
        return LowRank(down, up, factor, shift)

    def _check_parts(self, module: AdapterModule, names: list[str], is_embedding: bool) -> None:
        expected = [*names]
        if self._asked.use_dora:
            expected.append("lora_magnitude_vector")
        if self._asked.lora_bias:
            expected.append("lora_B.bias")
            if is_embedding:
                raise self._fault(module, "lora_bias of embeddings is not supported")
        missing = [name for name in expected if name not in module.parts]
        others = [name for name in module.parts if name not in expected]
        if missing or others:
            found = f"no {missing[0]}" if missing else f"{others[0]} as well"
            raise self._fault(module, f"expected {' and '.join(expected)}, found {found}")

    def _rank(self, module: AdapterModule, names: list[str], out: int, width: int) -> int:
        down, up = (module.parts[name].shape for name in names)
        for name, found, size, words in (
            (names[0], down[1:], width, f"(rank, {width})"),
            (names[1], up[:1] if len(up) == 2 else (), out, f"({out}, rank)"),
        ):
            if found != (size,):
                raise CheckpointError(
                    f"{self._file}: {module.name}.{name}: expected {words}, found "
                    f"{module.parts[name].shape}"
                )
        if down[0] != up[1] or not 1 <= down[0] <= MAX_RANK:
            raise self._fault(
                module, f"expected one rank from 1 to {MAX_RANK}, found {down[0]} and {up[1]}"
            )
        return down[0]

    def _factor(
        self,
        place: Place,
        module: AdapterModule,
        magnitude: np.ndarray,
        down: np.ndarray,
        up: np.ndarray,
    ) -> np.ndarray:
        """Return DoRA's magnitudes / the lengths of W + scale * B A: of its rows, or columns."""
        weight = self._whole.get(place)
        weight = self._base(place) if weight is None else weight
        if weight is None:
            raise self._fault(
                module,
                "DoRA needs the model's weights, on device='cpu' with runtime='direct'; "
                "elsewhere merge the adapter with LLM(adapter=...)",
            )
        lengths = np.sqrt(_squares(weight, down, up, by_column=place[1] == "embedding"))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            factor = (magnitude / lengths).astype(np.float32)
        require_finite(factor, f"{self._file}: {module.name}: lora_magnitude_vector / lengths")
        return factor

    def _with_bias(
        self, place: Place, module: AdapterModule, change: LowRank, bias: np.ndarray | None
    ) -> LowRank:
        """Let the bias be another one, and DoRA leave it alone."""
        layer, name = place
        old = None
        if self._weights is not None and self._weights.biases and layer is not None:
            old = self._weights.biases[layer].get(name)
        if bias is not None and old is None:
            has_one = self._weights is None and name in self._config.biased
            words = (
                "a changed bias needs the model's weights; merge the adapter with LLM(adapter=...)"
            )
            raise self._fault(module, words if has_one else "expected no bias: the model has none")
        if old is None or (bias is None and change.factor is None):
            return change
        old = old.astype(np.float32)
        new = old if bias is None else self._in_order(place, bias)
        shift = new - (old if change.factor is None else change.factor * old)
        shift = shift if change.shift is None else shift + change.shift
        require_finite(shift, f"{self._file}: {module.name}: bias")
        return LowRank(change.down, change.up, change.factor, shift)

    def _scaled(self, module: AdapterModule, array: np.ndarray, scale: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array * scale)
        require_finite(array, f"{self._file}: {module.name}: scale times lora_B")
        return array

    def _read(
        self,
        module: AdapterModule,
        part: str,
        shape: tuple[int, ...],
        *,
        keeps_dtype: bool = False,
    ) -> np.ndarray:
        """Take a tensor out of a module, as float32 or in its own dtype."""
        tensor = module.parts.pop(part)
        if tensor.shape != shape:
            resized = part == "weight" and shape == self._shapes["embedding"]
            raise CheckpointError(
                f"{self._file}: {module.name}.{part}: expected {shape}, found {tensor.shape}"
                + "; the vocabulary was resized: merge the adapter with PEFT" * resized
            )
        rows = tensor.decode(0, shape[0])
        array = np.array(rows, rows.dtype if keeps_dtype else np.float32)
        require_finite(array, f"{self._file}: {module.name}.{part}")
        return array

    def _in_order(self, place: Place, rows: np.ndarray) -> np.ndarray:
        """Return rows in the order of the model's, which GGUF files have another one for."""
        if place[1] in ("q_proj", "k_proj") and self._config.rope_interleaved:
            return np.ascontiguousarray(pairs_first(rows, self._config.head_dim))
        return rows

    def _base(self, place: Place) -> Weight | None:
        layer, name = place
        if self._weights is None:
            return None
        return getattr(self._weights if layer is None else self._weights.layers[layer], name)

    def _fault(self, module: AdapterModule, words: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: {module.name}: {words}")


def _squares(weight: Weight, down: np.ndarray, up: np.ndarray, *, by_column: bool) -> np.ndarray:
    """Return the sum of squares of each row of W + up down, float64; or of each column.

    By column, `down` is (rows of W, rank) and the change its product with `up` transposed.
    """
    sums = []
    for begin in range(0, weight.shape[0], _CHUNK_ROWS):
        end = min(begin + _CHUNK_ROWS, weight.shape[0])
        rows = ops.embedding(np.arange(begin, end, dtype=np.int32), weight)
        rows += down[begin:end] @ up.T if by_column else up[begin:end] @ down
        sums.append(np.square(rows, dtype=np.float64).sum(axis=0 if by_column else 1))
    return np.sum(sums, axis=0) if by_column else np.concatenate(sums)
