"""What a LoRA adapter's adapter_config.json asks for: an allow-list of PEFT's keys.

A key that this reader does not know may change the result, so it must be at a neutral value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from codellama_rt.checkpoint.formats.strict_json import read_object
from codellama_rt.checkpoint.patterns import STEPS_TO_PARSE, Budget, Pattern
from codellama_rt.errors import CheckpointError
from codellama_rt.model.config_fields import ConfigFields

MAX_RANK = 4096
_READ = {  # by `AdapterConfig`
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "bias",
    "init_lora_weights",
    "modules_to_save",
    "trainable_token_indices",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "ensure_weight_tying",
}
_HARMLESS = {  # of training, of other software, or without effect on linear layers
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "fan_in_fan_out",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "runtime_config",
    "qalora_group_size",
    "merge_weights",
}
_REMEDIES = {  # what is known of keys that change the result and are not supported
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported",
    "use_qalora": "QA-LoRA is not supported; merge the adapter with PEFT",
    "layer_replication": "replicated layers are not supported; merge the adapter with PEFT",
    "target_parameters": "parameters outside of linear layers are not supported",
    "megatron_config": "adapters of Megatron's layers are not supported",
    "arrow_config": "routing between adapters is not supported",
    "lora_ga_config": "LoRA-GA changes the base model; convert the adapter with PEFT's "
    "save_pretrained(path_initial_model_for_weight_conversion=...)",
}
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")  # which left the base model as it was
_START_REMEDY = (
    "this start changes the base model's weights, and the adapter is relative to them; convert it "
    "with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), or merge it there"
)
_Patterns = tuple[tuple[Pattern, float], ...]


class AdapterConfig:
    """The values of one adapter_config.json, checked.

    Args:
        path: of the file.

    Raises:
        CheckpointError: it is damaged, not LoRA's, or asks for what is not supported.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the file."""
        self._fields = fields = ConfigFields(read_object(path), str(path))
        self._budget = Budget()
        if fields.values.get("peft_type") != "LORA":
            raise fields.fault("peft_type", "'LORA'")
        _check_keys(fields)
        _check_start(fields)
        if fields.values.get("bias", "none") not in ("none", "all", "lora_only"):
            raise fields.fault("bias", "'none', 'all' or 'lora_only'")
        self.use_dora = fields.flag("use_dora", False)
        self.lora_bias = fields.flag("lora_bias", False)
        if self.use_dora and self.lora_bias:
            raise fields.fault("lora_bias", "false", "DoRA with a bias of B is not supported")
        self.ties = fields.flag("ensure_weight_tying", False)
        self.modules_to_save = _names(fields, "modules_to_save") or ()
        self.token_ids = _token_ids(fields)
        self._root = fields.flag("use_rslora", False)
        self._rank = fields.integer("r", None, high=MAX_RANK)
        self._alpha = fields.number("lora_alpha")
        self._ranks = self._patterns("rank_pattern", f"integers from 1 to {MAX_RANK}")
        self._alphas = self._patterns("alpha_pattern", "finite numbers above 0")
        self._targets = self._modules("target_modules")
        self._excluded = self._modules("exclude_modules")
        self._layers = _layers(fields)
        self._check_layers_pattern()

    def scale(self, module: str, rank: int) -> np.float32:
        """Return alpha / rank; with rsLoRA (arXiv:2312.03732) alpha / sqrt(rank).

        Args:
            module: PEFT's name, such as "model.layers.0.self_attn.q_proj".
            rank: of the tensors.

        Raises:
            CheckpointError: the configuration says another rank.
        """
        expected = self._first("rank_pattern", self._ranks, module, self._rank)
        if expected not in (None, rank):
            raise CheckpointError(
                f"{self._fields.source}: r, rank_pattern: expected the rank of {module}, {rank}, "
                f"found {expected:g}"
            )
        alpha = self._first("alpha_pattern", self._alphas, module, self._alpha)
        with np.errstate(over="ignore"):
            scale = np.float32(alpha / (math.sqrt(rank) if self._root else rank))
        if not np.isfinite(scale):
            raise CheckpointError(
                f"{self._fields.source}: lora_alpha, alpha_pattern: expected a scale in the range "
                f"of float32, found {alpha:g} for {module}"
            )
        return scale

    def check_target(self, module: str) -> None:
        """Reject low-rank tensors of a module that PEFT would not have given any.

        Raises:
            CheckpointError: PEFT would leave the tensors out.
        """
        for key, is_right in (
            ("target_modules", self._is_target(module)),
            ("exclude_modules", not self._matches("exclude_modules", self._excluded, module)),
        ):
            if not is_right:
                raise self._fields.fault(
                    key, f"modules with {module}, which has tensors", "PEFT would not apply them"
                )

    def _is_target(self, module: str) -> bool:
        if self._targets is None:
            return True
        if self._targets == "all-linear":
            return module.endswith("_proj")
        if not self._matches("target_modules", self._targets, module):
            return False
        by_name = isinstance(self._targets, frozenset) and module not in self._targets
        if self._layers is None or not by_name:
            return True
        parts = module.split(".")
        return "layers" in parts and int(parts[parts.index("layers") + 1]) in self._layers

    def _matches(self, key: str, wanted: Any, module: str) -> bool:
        if isinstance(wanted, frozenset):
            parts = module.split(".")
            return any(".".join(parts[i:]) in wanted for i in range(len(parts)))
        return wanted is not None and self._tried(key, wanted.is_whole, module)

    def _first(self, key: str, patterns: _Patterns, module: str, default: Any) -> Any:
        """Return the value of the first pattern for a module, as PEFT's `get_pattern_key`."""
        for pattern, value in patterns:
            if self._tried(key, pattern.ends_name, module):
                return value
        return default

    def _tried(self, key: str, match: Any, module: str) -> bool:
        try:
            return match(module, self._budget)
        except ValueError as error:
            raise self._fields.fault(key, str(error)) from None

    def _pattern(self, key: str, text: str) -> Pattern:
        try:
            self._budget.spend(STEPS_TO_PARSE + len(text))
            return Pattern(text)
        except ValueError as error:
            raise self._fields.fault(key, str(error)) from None

    def _patterns(self, key: str, kind: str) -> _Patterns:
        values = self._fields.values.get(key)
        if values is not None and not isinstance(values, dict):
            raise self._fields.fault(key, "an object")
        found = []
        for text, value in (values or {}).items():
            one = ConfigFields({key: value}, self._fields.source)
            try:
                is_rank = key == "rank_pattern"
                number = one.integer(key, high=MAX_RANK) if is_rank else one.number(key)
            except CheckpointError:
                raise self._fields.fault(key, f"patterns with {kind}") from None
            found.append((self._pattern(key, text), number))
        return tuple(found)

    def _modules(self, key: str) -> frozenset[str] | Pattern | str | None:
        """Return names, a pattern, or "all-linear"."""
        value = self._fields.values.get(key)
        if isinstance(value, str):
            is_word = value.lower() == "all-linear" and key == "target_modules"
            return "all-linear" if is_word else self._pattern(key, value) if value else None
        names = _names(self._fields, key)
        return None if names is None else frozenset(names)

    def _check_layers_pattern(self) -> None:
        """Reject patterns for another name than "layers", which a Llama's list of layers has."""
        value = self._fields.values.get("layers_pattern")
        names = (value,) if isinstance(value, str) else _names(self._fields, "layers_pattern")
        patterns = [self._pattern("layers_pattern", name) for name in names or () if name]
        if patterns and not any(
            self._tried("layers_pattern", pattern.is_whole, "layers") for pattern in patterns
        ):
            raise self._fields.fault("layers_pattern", "a pattern of 'layers'")


def _check_keys(fields: ConfigFields) -> None:
    for key in sorted(fields.values.keys() - _READ - _HARMLESS):
        value = fields.values[key]
        if value is not None and value is not False and value not in ("", [], {}):
            remedy = _REMEDIES.get(key, "it is unknown and may change the result")
            raise fields.fault(key, "null, false or nothing", remedy)


def _check_start(fields: ConfigFields) -> None:
    value = fields.values.get("init_lora_weights")
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, str) or value.lower() not in _PLAIN_STARTS:
        expected = f"true, false, {', '.join(map(repr, _PLAIN_STARTS))}"
        raise fields.fault("init_lora_weights", expected, _START_REMEDY)


def _names(fields: ConfigFields, key: str) -> tuple[str, ...] | None:
    value = fields.values.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise fields.fault(key, "a list of names")
    return tuple(value)


def _layers(fields: ConfigFields) -> frozenset[int] | None:
    value = fields.values.get("layers_to_transform")
    if value is None or value == []:
        return None
    layers: Iterable[Any] = value if isinstance(value, list) else [value]
    if any(type(layer) is not int or layer < 0 for layer in layers):
        raise fields.fault("layers_to_transform", "numbers of layers")
    return frozenset(layers)


def _token_ids(fields: ConfigFields) -> tuple[int, ...]:
    """Return the ids whose embeddings are replaced, in the order of their rows."""
    key = "trainable_token_indices"
    value = fields.values.get(key)
    if isinstance(value, dict):
        if len(value) > 1 or any(name.split(".")[-1] != "embed_tokens" for name in value):
            raise fields.fault(key, "ids of embed_tokens")
        value = next(iter(value.values()), None)
    ids = [] if value is None else value
    is_list = isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids)
    if not is_list or len(set(ids)) < len(ids):
        raise fields.fault(key, "a list of token ids, each once")
    return tuple(ids)
