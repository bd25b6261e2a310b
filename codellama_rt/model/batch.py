"""The integers a model step needs, laid out for the kernels."""

from dataclasses import dataclass

import numpy as np


@dataclass(slots=True)
class Batch:
    """The tokens of one step; int32, C-contiguous. `slot = block_id * block_size + offset`.

    Args:
        token_ids: (num_tokens,), the chunks one after another.
        positions: (num_tokens,) of each token in its sequence.
        cu_seqlens_q: (num_seqs + 1,); tokens [cu[i], cu[i + 1]) are those of chunk i.
        seq_lens: (num_seqs,) tokens in the cache after this step.
        block_tables: (num_seqs, max_blocks), padded with -1.
        slot_mapping: (num_tokens,), where each token's key and value go.
        logit_rows: (num_logits,) indices into num_tokens.
        rope_lengths: (num_tokens,) lengths that set a dynamic RoPE's base; None for other models.
        adapted: pairs of a LoraAdapter and the indices of its tokens, (count,) int64.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    cu_seqlens_q: np.ndarray
    seq_lens: np.ndarray
    block_tables: np.ndarray
    slot_mapping: np.ndarray
    logit_rows: np.ndarray
    rope_lengths: np.ndarray | None = None
    adapted: tuple[tuple[object, np.ndarray], ...] = ()
