"""Other libraries' attention on the same memory, if their wheels work, and why not if they do not.

Each peer is a callable that puts one pass over all of a case's copies on torch's current stream.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
from cuda_cases import BLOCK_SIZE, HEAD_DIM, DecodeCase
from cuda_timing import Work

from codellama_rt.model.cuda.tensor import DeviceTensor
from codellama_rt.ops import native

FA3_PAGE = 256  # tokens: preferred by its TMA copies; the same memory, in larger pages
DIFFERENCE = 2.0**-5  # between two libraries' bfloat16 results
_said: set[str] = set()


def say_once(text: str) -> None:
    """Print a reason, the first time only."""
    if text not in _said:
        _said.add(text)
        print(text, flush=True)


def imported(name: str) -> ModuleType | None:
    """Import a library; None and a message if that fails."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a wheel built for another torch fails in many ways
        say_once(f"no peer {name}: {type(error).__name__}: {str(error).splitlines()[:1]}")
        return None


def usable_torch() -> ModuleType | None:
    """Return torch if it has a device."""
    torch = imported("torch")
    if torch is not None and not torch.cuda.is_available():
        say_once("no peer torch: it sees no CUDA device")
        return None
    return torch


@contextlib.contextmanager
def on_our_stream(torch: ModuleType) -> Iterator[object]:
    """Make torch use our stream."""
    stream = torch.cuda.ExternalStream(native.cuda().stream())
    with torch.cuda.stream(stream):
        yield stream


def captured(torch: ModuleType, name: str, work: Work) -> Work | None:
    """Return a peer's graph; the peer itself if capture fails; None if it cannot run at all."""
    try:
        with on_our_stream(torch):
            for _ in range(2):
                work()
            torch.cuda.synchronize()
    except Exception as error:
        say_once(f"{name} does not run here: {str(error).splitlines()[:1]}")
        torch.cuda.synchronize()
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with on_our_stream(torch) as stream, torch.cuda.graph(graph, stream=stream):
            work()
    except Exception as error:
        say_once(f"{name} is timed without a graph: {str(error).splitlines()[:1]}")
        return _switched(torch, work)
    return _switched(torch, graph.replay)


def _switched(torch: ModuleType, work: Work) -> Work:
    def run() -> None:
        with on_our_stream(torch):
            work()

    return run


def decode_peers(case: DecodeCase) -> dict[str, Work]:
    """Return all peers that support the case's step, captured."""
    torch = usable_torch()
    if torch is None:
        return {}
    makers = {
        "FlashInfer": lambda: flashinfer_decode(
            torch, case, tensor_cores=case.n_kv_heads < case.n_heads
        ),
        "FlashAttention-3": lambda: fa3_decode(torch, case),
        "torch SDPA cuDNN": lambda: sdpa_decode(torch, case, "CUDNN_ATTENTION"),
        "torch SDPA flash": lambda: sdpa_decode(torch, case, "FLASH_ATTENTION"),
    }
    return _all(torch, makers)


def _all(torch: ModuleType, makers: dict[str, Callable[[], Work | None]]) -> dict[str, Work]:
    peers = {}
    for name, make in makers.items():
        try:
            with on_our_stream(torch):
                work = make()
        except Exception as error:  # an interface of another version
            say_once(f"{name} cannot be set up: {type(error).__name__}: {str(error)[:200]}")
            continue
        graph = captured(torch, name, work) if work else None
        if graph:
            peers[name] = graph
    return peers


def flashinfer_decode(torch: ModuleType, case: DecodeCase, tensor_cores: bool) -> Work | None:
    """Return its batch decode over our own cache; the plan is made outside the timing."""
    flashinfer = imported("flashinfer")
    if flashinfer is None:
        return None
    room = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        room, "HND", use_tensor_cores=tensor_cores
    )
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda") * case.blocks
    last = torch.full((case.batch,), case.length - (case.blocks - 1) * BLOCK_SIZE)
    wrapper.plan(
        starts,
        torch.from_numpy(case.table.reshape(-1)).cuda(),
        last.to(torch.int32).cuda(),
        case.n_heads,
        case.n_kv_heads,
        HEAD_DIM,
        BLOCK_SIZE,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    query = torch.from_dlpack(case.query)
    caches = [tuple(torch.from_dlpack(c) for c in pair) for pair in case.caches]
    case.run()
    ours, theirs = torch.from_dlpack(case.out[0]), wrapper.run(query, caches[-1])
    require_equal("FlashInfer", (ours.float() - theirs.float()).abs().max().item())
    return lambda: [wrapper.run(query, pair) for pair in caches]


def require_equal(name: str, difference: float) -> None:
    """Reject a peer that computes something else."""
    if not difference <= DIFFERENCE:
        raise ValueError(f"its results differ from ours by {difference}")


def fa3_decode(torch: ModuleType, case: DecodeCase) -> Work | None:
    """Return its decode with a paged cache, token-major in pages of 256, its preferred layout."""
    fa3 = imported("flash_attn_interface")
    if fa3 is None:
        return None
    pages = case.blocks * BLOCK_SIZE // FA3_PAGE  # per sequence; the remaining memory is unused
    if pages == 0:
        return None
    length = min(case.length, pages * FA3_PAGE)
    shape = (case.batch * pages, FA3_PAGE, case.n_kv_heads, HEAD_DIM)
    caches = [tuple(_taken_as(torch, c, shape) for c in pair) for pair in case.caches]
    order = np.random.default_rng(0).permutation(case.batch * pages).astype(np.int32)
    table = torch.from_numpy(order.reshape(case.batch, pages)).cuda()
    lens = torch.full((case.batch,), length, dtype=torch.int32, device="cuda")
    query = torch.from_dlpack(case.query)[:, None]
    return lambda: [
        fa3.flash_attn_with_kvcache(query, *pair, cache_seqlens=lens, page_table=table, causal=True)
        for pair in caches
    ]


def sdpa_decode(torch: ModuleType, case: DecodeCase, backend: str) -> Work:
    """Return decode over the same bytes as contiguous keys and values: SDPA has no paged cache."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = (case.batch, case.n_kv_heads, case.blocks * BLOCK_SIZE, HEAD_DIM)
    caches = [
        tuple(_taken_as(torch, c, shape)[:, :, : case.length] for c in pair) for pair in case.caches
    ]
    query = torch.from_dlpack(case.query)[:, :, None]

    def run() -> None:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            for pair in caches:
                torch.nn.functional.scaled_dot_product_attention(
                    query, *pair, enable_gqa=case.n_kv_heads < case.n_heads
                )

    return run


def _taken_as(torch: ModuleType, cache: DeviceTensor, shape: tuple[int, ...]) -> object:
    """Return a cache's memory, which holds random numbers, in another shape."""
    return torch.from_dlpack(cache).reshape(-1)[: int(np.prod(shape))].view(shape)


def prefill_peers(tensors: list[DeviceTensor], ours: DeviceTensor) -> dict[str, Work]:
    """Return causal attention of one sequence, (length, heads, head_dim) each."""
    torch = usable_torch()
    if torch is None:
        return {}
    makers = {
        "FlashAttention-3": lambda: fa3_prefill(torch, tensors, ours),
        "FlashInfer fa3": lambda: flashinfer_prefill(torch, tensors, ours),
        "torch SDPA cuDNN": lambda: sdpa_prefill(torch, tensors, ours, "CUDNN_ATTENTION"),
        "torch SDPA flash": lambda: sdpa_prefill(torch, tensors, ours, "FLASH_ATTENTION"),
    }
    return _all(torch, makers)


def _compared(torch: ModuleType, name: str, ours: DeviceTensor, theirs: object) -> None:
    difference = (torch.from_dlpack(ours).float() - theirs.reshape(ours.shape).float()).abs().max()
    require_equal(name, difference.item())


def fa3_prefill(torch: ModuleType, tensors: list[DeviceTensor], ours: DeviceTensor) -> Work | None:
    """Return FlashAttention-3's prefill."""
    fa3 = imported("flash_attn_interface")
    if fa3 is None:
        return None
    query, key, value = (torch.from_dlpack(t)[None] for t in tensors)

    def run() -> object:
        out = fa3.flash_attn_func(query, key, value, causal=True)
        return out[0] if isinstance(out, tuple) else out

    _compared(torch, "FlashAttention-3", ours, run())
    return run


def flashinfer_prefill(
    torch: ModuleType, tensors: list[DeviceTensor], ours: DeviceTensor
) -> Work | None:
    """Return the prefill of FlashInfer's Hopper kernels."""
    flashinfer = imported("flashinfer")
    if flashinfer is None:
        return None
    query, key, value = (torch.from_dlpack(t) for t in tensors)

    def run() -> object:
        return flashinfer.single_prefill_with_kv_cache(
            query, key, value, causal=True, backend="fa3"
        )

    _compared(torch, "FlashInfer", ours, run())
    return run


def sdpa_prefill(
    torch: ModuleType, tensors: list[DeviceTensor], ours: DeviceTensor, backend: str
) -> Work:
    """Return torch's scaled_dot_product_attention with one of its backends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value = (torch.from_dlpack(t).transpose(0, 1)[None] for t in tensors)

    def run() -> object:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True
            )

    _compared(torch, backend, ours, run()[0].transpose(0, 1))
    return run
