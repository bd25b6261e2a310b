"""Where an answer ends: the names that end one in whatever checkpoint they occur."""

from collections.abc import Iterable, Sequence

# Those that llama.cpp takes as ends by their name. Code Llama's own "▁<EOT>" is none of them: it
# ends a filling, and is a token like any other elsewhere.
END_NAMES = frozenset(
    (
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|end_of_turn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|EOT|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",
        "[EOT]",
        "[EOS]",
        "<EOT>",
        "< EOT >",
        "_<EOT>",
    )
)


def find_end_ids(pieces: Sequence[str], stated: Iterable[int | None]) -> frozenset[int]:
    """Return the ids that end an answer.

    Args:
        pieces: the vocabulary by id.
        stated: ids that the tokenizer's own configuration names as ends; None is left out.
    """
    named = (i for i, piece in enumerate(pieces) if piece in END_NAMES)
    return frozenset(i for i in stated if i is not None).union(named)
