"""How work is cut among blocks, as plain C++ on the host: attention to 131,072 tokens, linear."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.builders import ends, int32

REPOSITORY = Path(__file__).resolve().parents[3]
INCLUDES = [f"-I{REPOSITORY / 'csrc'}", f"-I{REPOSITORY / 'tests/emulators/cuda'}"]
SPLIT, NODE, ROWS, FEW = 256, 16, 16, 16
FIELDS = (
    "seq", "kv_head", "first_row", "end_row", "first_key", "end_key", "partial", "node_partial",
    "ticket", "last_ticket", "split", "splits",
)  # fmt: skip


class Case(ctypes.Structure):
    """Case of attention_plan_probe.cc."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("cu_seqlens_q", "seq_lens", "block_tables")),
        *((name, ctypes.c_int32) for name in (
            "num_seqs", "n_heads", "n_kv_heads", "block_size", "max_blocks", "few_queries",
            "causal",
        )),
    ]  # fmt: skip


def make(seq_lens, queries, heads, *, block_size=64, few_queries=FEW, rng=None):
    """(structure, arrays that it points to)."""
    lens, bounds = int32(seq_lens), ends(queries)
    pages = -(-int(lens.max(initial=1)) // block_size)
    tables = np.arange(len(lens) * pages, dtype=np.int32)
    if rng is not None:
        rng.shuffle(tables)
    tables = tables.reshape(len(lens), pages)
    case = Case(
        bounds.ctypes.data, lens.ctypes.data, tables.ctypes.data, len(lens), *heads, block_size,
        pages, few_queries, 1,
    )  # fmt: skip
    return case, (bounds, lens, tables)


def compiled(folder, stem):
    library = folder / f"{stem}.so"
    sources = [Path(__file__).with_name(f"{stem}.cc"), REPOSITORY / "tests/emulators/cuda/emu.cc",
               REPOSITORY / "csrc/cuda/runtime/runtime.cc"]  # fmt: skip
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-DCLRT_EMULATE",
               "-DCLRT_CUDA", *INCLUDES]  # fmt: skip
    subprocess.run(["c++", *options, *map(str, sources), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    loaded = compiled(tmp_path_factory.mktemp("plan"), "attention_plan_probe")
    for name in ("plan_output_row", "plan_key_row"):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


@pytest.fixture(scope="module")
def linear_plan(tmp_path_factory):
    loaded = compiled(tmp_path_factory.mktemp("plan"), "linear_plan_probe")
    loaded.plan_count.restype = ctypes.c_int64
    return loaded


def totals(plan, case):
    out = np.zeros(3, np.int32)
    plan.plan_totals(ctypes.byref(case), out.ctypes.data_as(ctypes.c_void_p))
    return dict(zip(("units", "partial_rows", "tickets"), out.tolist(), strict=True))


def all_units(plan, case, num_workers):
    """(units of each worker, all of them in order)."""
    counts, units = [], []
    for worker in range(num_workers):
        most = -(-totals(plan, case)["units"] // num_workers) + 1
        out = np.zeros((most, len(FIELDS)), np.int32)
        pointer = out.ctypes.data_as(ctypes.c_void_p)
        counts.append(plan.plan_units(ctypes.byref(case), worker, num_workers, pointer))
        units.append(out[: counts[-1]])
    return counts, np.concatenate(units)


CASES = {
    "one-131072": ([131_072], [1], (32, 32)),
    "one-100000-grouped": ([100_000], [1], (64, 8)),
    "verified-131072": ([131_072], [16], (8, 1)),
    "batch": ([131_072, 1, 0, 256, 257, 4096, 100_000], [1] * 7, (8, 2)),
    "with-a-chunk": ([5000, 131_072, 40], [3, 700, 1], (4, 2)),
    "thirty-two": ([16_384] * 32, [1] * 32, (8, 8)),
    "seventy": (
        [300 * (i % 5) for i in range(70)],
        [(1, 0, 20, 4)[i % 4] for i in range(70)],
        (4, 2),
    ),
}


@pytest.mark.parametrize("num_workers", [1, 7, 132 * 4])
@pytest.mark.parametrize("name", CASES)
def test_units_cover_every_key_of_every_row_once(plan, name, num_workers):
    seq_lens, queries, (n_heads, n_kv_heads) = CASES[name]
    case, _ = make(seq_lens, queries, (n_heads, n_kv_heads))
    counts, units = all_units(plan, case, num_workers)
    assert max(counts) - min(counts) <= 1
    covered = {}
    for unit in units:
        seq, kv_head, first_row, end_row, first_key, end_key = unit[:6].tolist()
        assert 0 < end_row - first_row <= ROWS
        assert first_key % SPLIT == 0
        covered.setdefault((seq, kv_head, first_row, end_row), []).append((first_key, end_key))
    rows = {}
    for (seq, kv_head, first_row, end_row), parts in covered.items():
        bounds = [0, *(end for _, end in parts)]
        assert [first for first, _ in parts] == bounds[:-1]  # ascending, without a gap
        assert bounds[-1] == seq_lens[seq]
        rows.setdefault((seq, kv_head), []).extend(range(first_row, end_row))
    expected = {
        (seq, head): list(range(count * n_heads // n_kv_heads))
        for seq, count in enumerate(queries) if 0 < count <= FEW for head in range(n_kv_heads)
    }  # fmt: skip
    assert rows == expected


@pytest.mark.parametrize("name", CASES)
def test_partial_results_and_counters_have_places_of_their_own(plan, name):
    seq_lens, queries, heads = CASES[name]
    case, _ = make(seq_lens, queries, heads)
    limits = totals(plan, case)
    _, units = all_units(plan, case, 528)
    places, tickets, groups = np.zeros(limits["partial_rows"], np.int8), {}, {}
    for unit in units.tolist():
        it = dict(zip(FIELDS, unit, strict=True))
        rows = it["end_row"] - it["first_row"]
        assert not places[it["partial"] : it["partial"] + rows].any()
        places[it["partial"] : it["partial"] + rows] = 1
        group = (it["seq"], it["kv_head"], it["first_row"])
        node = it["split"] // NODE
        tickets.setdefault(it["ticket"], set()).add((*group, node))
        groups.setdefault(it["last_ticket"], set()).add(group)
        if it["split"] % NODE == 0:
            assert not places[it["node_partial"] : it["node_partial"] + rows].any()
            places[it["node_partial"] : it["node_partial"] + rows] = 2
    assert all(len(owners) == 1 for owners in (*tickets.values(), *groups.values()))
    assert not tickets.keys() & groups.keys()
    assert max(groups) < limits["tickets"]


def test_a_worker_of_100000_keys_has_no_more_than_its_share(plan):
    """32 heads at 100k on 132 SMs: the busiest has 1.3 % more than the mean."""
    case, _ = make([100_000], [1], (32, 32))
    counts, _ = all_units(plan, case, 132 * 4)
    assert max(counts) / (sum(counts) / len(counts)) < 1.02


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("few_too", [0, 1])
def test_blocks_cover_every_row_once_the_late_ones_first(plan, rows, few_too):
    queries, group = [3, 700, 1, 17, 0], 4
    case, _ = make([5000, 131_072, 40, 17, 9], queries, (8, 2))
    covered, ends_of = {}, {}
    most = sum(queries) * group // rows + len(queries)  # as the launch has it
    for block in range(most + 3):
        out = np.zeros(5, np.int32)
        pointer = out.ctypes.data_as(ctypes.c_void_p)
        if not plan.plan_block(ctypes.byref(case), block, rows, few_too, pointer):
            assert block > 0
            continue
        assert block < most
        seq, first_row, end_row, first_key, end_key = out.tolist()
        assert first_key == 0
        assert end_key == plan.plan_visible_keys(ctypes.byref(case), seq, end_row - 1)
        covered.setdefault(seq, []).extend(range(first_row, end_row))
        ends_of.setdefault(seq, []).append(end_key)
    expected = {
        seq: list(range(count * group))
        for seq, count in enumerate(queries) if count > FEW or (few_too and count)
    }  # fmt: skip
    assert {seq: sorted(some) for seq, some in covered.items()} == expected
    assert all(some == sorted(some, reverse=True) for some in ends_of.values())


def test_keys_are_gathered_from_their_pages(plan):
    rng = np.random.default_rng(3)
    case, (_, lens, tables) = make([131_072, 70_001], [1, 5], (8, 2), block_size=48, rng=rng)
    for _ in range(200):
        seq, kv_head = int(rng.integers(2)), int(rng.integers(2))
        key = int(rng.integers(lens[seq]))
        expected = (int(tables[seq, key // 48]) * 2 + kv_head) * 48 + key % 48
        assert plan.plan_key_row(ctypes.byref(case), seq, kv_head, key) == expected


def test_rows_are_queries_times_heads_of_a_group(plan):
    case, (bounds, lens, _) = make([131_072, 50], [9, 4], (8, 2))
    for seq, kv_head, row in ((0, 0, 0), (0, 1, 35), (1, 1, 15), (1, 0, 7)):
        query, head = divmod(row, 4)
        expected = (int(bounds[seq]) + query) * 8 + kv_head * 4 + head
        assert plan.plan_output_row(ctypes.byref(case), seq, kv_head, row) == expected
        count = int(bounds[seq + 1] - bounds[seq])
        visible = int(lens[seq]) - count + query + 1
        assert plan.plan_visible_keys(ctypes.byref(case), seq, row) == visible


@pytest.mark.parametrize("rows", [16, 128])
@pytest.mark.parametrize("sizes", [(12_288,), (4096, 1024, 1024), (40, 7, 130), (16, 128, 1)])
def test_tiles_cover_every_row_of_every_weight_once(linear_plan, sizes, rows):
    n = np.array(sizes, np.int64)
    pointer = n.ctypes.data_as(ctypes.c_void_p)
    seen, out = [], np.zeros(3, np.int64)
    for index in range(linear_plan.plan_count(pointer, len(n), rows)):
        linear_plan.plan_tile(
            pointer, len(n), ctypes.c_int64(index), rows, out.ctypes.data_as(ctypes.c_void_p)
        )
        weight, first, column = out.tolist()
        for row in range(first, min(first + rows, sizes[weight])):
            seen.append((weight, row, column + row - first))
    starts = np.concatenate([[0], n.cumsum()])
    assert seen == [
        (weight, row, int(starts[weight]) + row)
        for weight, size in enumerate(sizes) for row in range(size)
    ]  # fmt: skip
