"""Which tokens end an output."""

from collections.abc import Mapping
from typing import Any

from codellama_rt.engine.stop_strings import Tokenizer
from codellama_rt.model.config import ModelConfig


def end_token_ids(
    config: ModelConfig, generation_config: Mapping[str, Any], tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """Return every token that some part of a checkpoint names as an end, each once.

    Checkpoints that were tuned for conversations often name the end of a turn in one place only.

    Args:
        config: of the model; ids without a row in it are left out.
        generation_config: its "eos_token_id" comes first.
        tokenizer: with `end_ids`, which come last; or None.
    """
    stated = generation_config.get("eos_token_id") or ()
    stated = (stated,) if isinstance(stated, int) else stated
    further = () if tokenizer is None else sorted(tokenizer.end_ids)
    ids = dict.fromkeys((*stated, *config.eos_token_ids, *further))
    return tuple(token_id for token_id in ids if token_id < config.vocab_size)
