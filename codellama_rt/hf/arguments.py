"""Arguments that scripts written for Transformers pass: harmless ones, and those not supported."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple


class Arguments(NamedTuple):
    """What one call of Transformers takes besides the arguments that this runtime has.

    Attributes:
        harmless: names of arguments that change no result here.
        unsupported: name -> the values that ask for nothing (None always does), and what else to
            do.
    """

    harmless: frozenset[str]
    unsupported: Mapping[str, tuple[tuple, str]]


_CACHE = "keys and values stay in the paged cache"
_CACHES = ("static", "dynamic", "hybrid", "sliding_window", "offloaded", "offloaded_static")
_OFF = (False,)

GENERATE = Arguments(
    frozenset(
        (
            *("cache_implementation", "cache_config", "return_legacy_cache", "low_memory"),
            *("synced_gpus", "use_model_defaults", "disable_compile", "compile_config"),
            *("token_type_ids", "trust_remote_code", "prefill_chunk_size", "return_attention_mask"),
        )
    ),
    {
        "cache_implementation": (_CACHES, "open the model with kv_dtype='int8' or 'int4'"),
        "assistant_model": ((), "speculative decoding is not supported"),
        "assistant_tokenizer": ((), "speculative decoding is not supported"),
        "prompt_lookup_num_tokens": ((), "open the model with speculation='suffix'"),
        "num_beam_groups": ((1,), "use num_beams"),
        "diversity_penalty": ((0.0,), "use num_beams"),
        "constraints": ((), "use prefix_allowed_tokens_fn"),
        "force_words_ids": ((), "use prefix_allowed_tokens_fn"),
        "penalty_alpha": ((0.0,), "contrastive search was removed from Transformers, too"),
        "dola_layers": ((), "the layers have no heads of their own"),
        "guidance_scale": ((1.0,), "combine the logits of two prompts in a logits_processor"),
        "negative_prompt_ids": ((), "combine the logits of two prompts in a logits_processor"),
        "negative_prompt_attention_mask": ((), "it belongs to negative_prompt_ids"),
        "watermarking_config": ((), "write a logits_processor"),
        "encoder_repetition_penalty": ((1.0,), "use repetition_penalty"),
        "encoder_no_repeat_ngram_size": ((0,), "use no_repeat_ngram_size"),
        "custom_generate": ((), "code beside a checkpoint is never run"),
        "output_attentions": (_OFF, "the kernels never form the attention matrix"),
        "output_hidden_states": (_OFF, "call the model with the result"),
        "past_key_values": ((), _CACHE),
        "position_ids": ((), "positions follow from attention_mask"),
        "cache_position": ((), "positions follow from attention_mask"),
        "inputs_embeds": ((), "give input_ids"),
        "decoder_input_ids": ((), "the model has no encoder; give input_ids"),
        "encoder_outputs": ((), "the model has no encoder; give input_ids"),
        "generator": ((), "use seed"),
    },
)

FROM_PRETRAINED = Arguments(
    frozenset(
        (
            *("trust_remote_code", "low_cpu_mem_usage", "device_map", "max_memory", "use_cache"),
            *("use_safetensors", "offload_folder", "offload_state_dict", "offload_buffers"),
            *("_fast_init", "resume_download", "local_files_only", "use_flash_attention_2"),
            *("tp_plan", "use_fast", "weights_only", "ignore_mismatched_sizes"),
        )
    ),
    {
        "revision": (("main",), "download that revision and give its directory"),
        "subfolder": (("",), "give the subfolder's path"),
        "variant": ((), "give a directory that holds only that variant"),
        "load_in_8bit": (_OFF, "use quantization='int8'"),
        "load_in_4bit": (_OFF, "use quantization='int4'"),
        "quantization_config": ((), "use quantization='int8' or 'int4'"),
        "config": ((), "the checkpoint's config.json is read; change it there"),
        "state_dict": ((), "write the weights into a directory"),
        "from_tf": (_OFF, "convert the checkpoint to safetensors"),
        "from_flax": (_OFF, "convert the checkpoint to safetensors"),
        "gguf_file": ((), "give the file's path as the model"),
        "output_loading_info": (_OFF, "a checkpoint that does not fit raises CheckpointError"),
        "output_hidden_states": (_OFF, "give it where the model is called"),
        "output_attentions": (_OFF, "the kernels never form the attention matrix"),
        "force_download": (_OFF, "delete the copy in the hub's cache"),
        "cache_dir": ((), "set HF_HOME"),
        "token": ((), "set HF_TOKEN"),
        "use_auth_token": ((), "set HF_TOKEN"),
    },
)

TOKENIZER = Arguments(
    frozenset(("trust_remote_code", "use_fast", "local_files_only", "resume_download", "verbose")),
    {name: FROM_PRETRAINED.unsupported[name] for name in ("revision", "subfolder", "gguf_file")},
)

CALL = Arguments(
    frozenset(("use_cache", "token_type_ids")),
    {
        "return_dict": ((True,), "the result is a dictionary that is indexed like a tuple, too"),
        "output_attentions": (_OFF, "the kernels never form the attention matrix"),
        "past_key_values": ((), _CACHE),
        "position_ids": ((), "positions follow from attention_mask"),
        "cache_position": ((), "positions follow from attention_mask"),
        "inputs_embeds": ((), "give input_ids"),
    },
)


def supported(call: str, given: Mapping[str, Any], known: Arguments) -> dict[str, Any]:
    """Return the arguments without those that change nothing; of these a warning tells.

    Args:
        call: what was called, for messages.
        given: the caller's further arguments.
        known: those of Transformers.

    Raises:
        TypeError: an argument asks for something that is not supported.
    """
    for name, (neutral, remedy) in known.unsupported.items():
        value = given.get(name)
        is_plain = isinstance(value, (int, float, str))  # `in` compares arrays item by item
        if value is not None and not (is_plain and value in neutral):
            raise TypeError(f"{call} does not support {name}: {remedy}")
    ignored = sorted(given.keys() & known.harmless)
    if ignored:
        warnings.warn(
            f"{call} ignores {', '.join(ignored)}: no result depends on it here", stacklevel=3
        )
    left_out = known.harmless | known.unsupported.keys()
    return {name: value for name, value in given.items() if name not in left_out}
