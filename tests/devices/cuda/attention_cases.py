"""Cases of attention that several tests run, and how."""

from device_arrays import get, poisoned, put
from helpers.builders import paged

from codellama_rt.model.cuda import ops


def run(case, **attributes):
    """paged_attention on the device, its outputs poisoned before: (out, lse)."""
    query = case.query
    out = poisoned(query.shape, query.dtype.name), poisoned(query.shape[:2], "float32")
    return get(*ops.paged_attention(*put(*case.arguments), out=out, **attributes))


def long_case(rng, queries, seq_len=700, block_size=64, dtype="bfloat16", head_dim=128):
    """One sequence, four query heads over two."""
    return paged(
        rng, [seq_len], [queries], heads=(4, 2), head_dim=head_dim, block_size=block_size,
        dtype=dtype, cache_dtype=dtype,
    )  # fmt: skip
