"""Prefixes on disk and an engine: what is restored has the bits that computing it would give."""

import logging
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers.builders import running_on
from helpers.faults import Faults
from helpers.goldens import make_engine, tiny_golden
from helpers.paged_fakes import HashModel, collect, drain, engine_of, generate
from helpers.schedules import MODELS, run_schedule, undisturbed

from codellama_rt import ops
from codellama_rt.engine.branches import Branches
from codellama_rt.engine.disk_cache import restorer, write_behind
from codellama_rt.engine.disk_cache import store as store_module
from codellama_rt.engine.disk_cache.store import PrefixStore
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.model.fingerprint import fingerprint
from codellama_rt.model.kv_cache import KV_DTYPES

STRIDE = 29  # every 29th call of a step is interrupted
SIZE = 4
PROMPT = [1, *range(3, 40)]  # nine blocks, and two tokens
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
CHECKPOINTS = {"int4": "mqa_fp16_sharded"}  # head_dim 32


def store_in(folder, size=SIZE, max_bytes=10**7, **model):
    return PrefixStore(str(folder), max_bytes, model, block_size=size)


def engine_on(folder, num_blocks=64, **options):
    options = {"prefix_store": store_in(folder), **options}
    return engine_of(num_blocks, SIZE, **options)


def answer(engine, prompt=PROMPT, params=PARAMS, name="a"):
    """The tokens of one request, and how many were computed."""
    before = engine.stats()["computed_tokens"]
    engine.add_request(name, prompt, params)
    gained = drain(engine)
    return gained[name, 0].token_ids, engine.stats()["computed_tokens"] - before


def fill(folder, prompts=(PROMPT,), **options):
    """Compute prompts with an engine that is closed then."""
    engine = engine_on(folder, **options)
    for prompt in prompts:
        answer(engine, prompt)
    engine.close()
    return engine.stats()


def expected(prompt=PROMPT):
    return generate(prompt, PARAMS, prefix_caching=False).token_ids


def tokens_in(blocks):
    return SIZE * blocks


class SlowStore(PrefixStore):
    """Reads a block only when it may."""

    def __init__(self, folder):
        super().__init__(str(folder), 10**7, {}, block_size=SIZE)
        self.may_read = threading.Semaphore(0)
        self.counting = threading.Lock()
        self.num_asked = 0

    def load(self, *block):
        with self.counting:
            self.num_asked += 1
        assert self.may_read.acquire(timeout=60)
        return super().load(*block)


def reading_until_stopped(store, monkeypatch):
    """Let readers finish the files under way as soon as they are told to stop, and no sooner."""
    stop = restorer._Restoration.stop

    def stop_and_let_read(restoration):
        stop(restoration)
        store.may_read.release(restorer._NUM_READERS)

    monkeypatch.setattr(restorer._Restoration, "stop", stop_and_let_read)


class SlowWriter(PrefixStore):
    """Writes a block only when it may."""

    def __init__(self, folder):
        super().__init__(str(folder), 10**7, {}, block_size=SIZE)
        self.may_write = threading.Semaphore(0)

    def save(self, *block):
        assert self.may_write.acquire(timeout=60)
        super().save(*block)


def test_a_second_engine_computes_only_what_is_not_in_a_full_block(tmp_path):
    stats = fill(tmp_path)
    assert stats["prefix_written_bytes"] == sum(p.stat().st_size for p in tmp_path.iterdir()) > 0
    assert stats["prefix_restored_tokens"] == stats["prefix_store_errors"] == 0
    engine = engine_on(tmp_path)
    assert answer(engine) == (expected(), len(PROMPT) - tokens_in(9) + 5)
    stats = engine.stats()
    assert stats["prefix_restored_tokens"] == stats["prefix_hit_tokens"] == tokens_in(9)
    assert stats["prefix_queried_tokens"] == len(PROMPT)
    assert stats["kv_blocks_free"] == stats["kv_blocks"]
    assert answer(engine, name="b")[0] == expected()
    assert engine.stats()["prefix_restored_tokens"] == tokens_in(9)  # the second time from memory
    engine.close()
    assert engine.stats()["prefix_written_bytes"] == 0 or engine.stats()["prefix_dropped_blocks"]


def test_generated_tokens_are_kept_too(tmp_path):
    fill(tmp_path)
    longer = [*PROMPT, *expected()]
    engine = engine_on(tmp_path)
    assert answer(engine, longer)[0] == expected(longer)
    assert engine.stats()["prefix_restored_tokens"] == tokens_in(len(longer) // SIZE - 1)
    # the last block holds the last token, whose logits are needed


def test_of_the_block_with_the_last_token_only_that_is_computed(tmp_path):
    prompt = [*PROMPT, 60, 61]  # ten blocks
    fill(tmp_path, [prompt])
    engine = engine_on(tmp_path)
    assert answer(engine, prompt) == (expected(prompt), 1 + 5)
    stats = engine.stats()
    assert stats["prefix_restored_tokens"] == tokens_in(10)
    assert stats["prefix_hit_tokens"] == len(prompt) - 1
    assert stats["kv_blocks_free"] == stats["kv_blocks"]
    assert answer(engine, prompt, name="b") == (expected(prompt), 1 + 5)
    assert engine.stats()["prefix_restored_tokens"] == tokens_in(10)  # the second time from memory


def test_without_room_for_a_copy_the_block_with_the_last_token_is_computed(tmp_path):
    prompt, params = [*PROMPT, 60, 61], SamplingParams(max_tokens=1, ignore_eos=True)
    fill(tmp_path, [prompt])
    engine = engine_on(tmp_path, num_blocks=10)
    assert answer(engine, prompt, params) == (expected(prompt)[:1], SIZE)


def test_a_prefix_that_goes_on_otherwise(tmp_path):
    fill(tmp_path)
    prompt = [*PROMPT[:18], *range(50, 60)]
    engine = engine_on(tmp_path)
    assert answer(engine, prompt)[0] == expected(prompt)
    assert engine.stats()["prefix_restored_tokens"] == tokens_in(4)


def test_what_memory_has_is_not_read(tmp_path):
    fill(tmp_path)
    engine = engine_on(tmp_path)
    answer(engine, PROMPT[:22])
    assert engine.stats()["prefix_restored_tokens"] == tokens_in(5)
    answer(engine)
    assert engine.stats()["prefix_restored_tokens"] == tokens_in(9)


def test_prompt_logprobs_need_all_logits(tmp_path):
    fill(tmp_path)
    engine = engine_on(tmp_path)
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    assert answer(engine, params=params)[1] == len(PROMPT)
    assert engine.stats()["prefix_restored_tokens"] == 0


def test_a_cache_too_small_for_the_prefix_takes_the_memory_of_others(tmp_path):
    fill(tmp_path)
    engine = engine_on(tmp_path, num_blocks=11)
    other = list(range(40, 60))
    assert answer(engine, other)[0] == expected(other)
    assert answer(engine)[0] == expected()
    assert engine.stats()["prefix_restored_tokens"] == tokens_in(9)
    assert answer(engine, other, name="c")[0] == expected(other)


@pytest.mark.parametrize("num_bad", [0, 4, 8])
def test_a_damaged_block_and_those_behind_it_are_computed(tmp_path, num_bad, caplog):
    fill(tmp_path)
    store = store_in(tmp_path)
    engine = engine_on(tmp_path, prefix_store=store)
    tokens = np.array(PROMPT[: tokens_in(num_bad + 1)], np.int32).tobytes()
    identity = engine._persistence.identity(
        engine.admission.make_request("x", PROMPT).samples[0].sequence
    )
    path = Path(store._path_of(tokens, store.hashes(identity)))
    contents = bytearray(path.read_bytes())
    contents[-3] ^= 4
    path.write_bytes(contents)
    assert answer(engine)[0] == expected()
    stats = engine.stats()
    assert stats["prefix_restored_tokens"] == tokens_in(num_bad)
    assert stats["prefix_store_errors"] == 1
    assert "a block is damaged" in caplog.text
    engine.close()
    assert path.exists()  # written again
    again = engine_on(tmp_path)
    answer(again)
    assert again.stats()["prefix_restored_tokens"] == tokens_in(9)


def test_an_unusable_folder_is_told_once_and_everything_is_computed(tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        engine = engine_on(tmp_path / "file")
        for i in range(3):
            assert answer(engine, name=str(i))[0] == expected()
        engine.close()
    assert len(caplog.records) == 1
    assert engine.stats()["prefix_store_errors"] > 0


def test_a_collision_of_hashes_with_a_prefix_in_memory(tmp_path, monkeypatch):
    """The beginning comes from memory, so that only the file itself can tell it from the other."""

    class LastBlock:
        """A hash of the last block alone, so that it is the same behind any beginning."""

        def __init__(self):
            self.block = b""

        def update(self, block):
            self.block = block[-4 * SIZE :]

        def hexdigest(self):
            return ((self.block.hex() or "0") * 32)[:32]

    monkeypatch.setattr(store_module, "_new_hasher", lambda _: LastBlock())
    one, other = [1, 5, 6, 7, *PROMPT[4:]], [1, 8, 9, 10, *PROMPT[4:]]
    fill(tmp_path, [one])
    engine = engine_on(tmp_path)
    answer(engine, other[:6])
    assert answer(engine, other)[0] == expected(other)
    assert engine.stats()["prefix_restored_tokens"] == 0
    assert answer(engine, one)[0] == expected(one)


def test_other_sequences_go_on_while_one_is_read(tmp_path):
    fill(tmp_path)
    store = SlowStore(tmp_path)
    engine = engine_on(tmp_path, prefix_store=store)
    other = list(range(40, 60))
    engine.add_request("read", PROMPT, PARAMS)
    engine.add_request("other", other, PARAMS)
    gained = {}
    while ("other", 0) not in gained or gained["other", 0].end is None:
        collect(gained, engine.step())
    assert ("read", 0) not in gained
    assert store.num_asked <= restorer._NUM_READERS
    assert gained["other", 0].token_ids == expected(other)
    assert engine.step() == []  # it waits a little, and can be left
    store.may_read.release(100)
    collect(gained, [])
    while engine.has_unfinished():
        collect(gained, engine.step())
    assert gained["read", 0].token_ids == expected()
    assert engine.stats()["prefix_restored_tokens"] == tokens_in(9)


def test_requests_with_one_prefix_have_it_read_once(tmp_path):
    fill(tmp_path)
    store = SlowStore(tmp_path)
    engine = engine_on(tmp_path, prefix_store=store)
    prompts = {str(i): [*PROMPT, 40 + i] for i in range(4)}
    prompts["short"] = PROMPT[:15]
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, PARAMS)
    store.may_read.release(100)
    gained = drain(engine)
    for name, prompt in prompts.items():
        assert gained[name, 0].token_ids == expected(prompt)
    assert store.num_asked == 9


def test_an_abort_while_reading_leaves_nothing(tmp_path):
    fill(tmp_path)
    store = SlowStore(tmp_path)
    engine = engine_on(tmp_path, prefix_store=store)
    engine.add_request("a", PROMPT, PARAMS)
    engine.step()
    assert engine.stats()["kv_blocks_free"] == 64 - 9
    engine.abort("a")
    assert not engine.has_unfinished()
    store.may_read.release(100)
    assert answer(engine, name="b")[0] == expected()
    assert engine.stats()["kv_blocks_free"] == 64


def test_closing_while_reading(tmp_path, monkeypatch):
    fill(tmp_path)
    store = SlowStore(tmp_path)
    engine = engine_on(tmp_path, prefix_store=store)
    engine.add_request("a", PROMPT, PARAMS)
    engine.step()
    reading_until_stopped(store, monkeypatch)
    engine.close()
    assert store.num_asked <= restorer._NUM_READERS  # the files under way were the last
    assert engine.stats()["kv_blocks_free"] == 64
    engine.close()


def test_a_block_whose_memory_was_given_away_is_not_stored(tmp_path):
    store = SlowWriter(tmp_path)
    engine = engine_on(tmp_path, num_blocks=11, prefix_store=store)
    other = list(range(20, 58))
    for prompt in (PROMPT, other):  # the writer has begun with the first; now it is overwritten
        assert answer(engine, prompt)[0] == expected(prompt)
    store.may_write.release(100)
    engine.close()
    assert engine.stats()["prefix_dropped_blocks"] >= 8
    again = engine_on(tmp_path)
    assert answer(again)[0] == expected()
    assert again.stats()["prefix_restored_tokens"] == 0
    assert answer(again, other)[0] == expected(other)
    assert again.stats()["prefix_restored_tokens"] == tokens_in(9)


def test_a_running_sequence_that_needs_a_block_gets_it_from_one_that_is_read(tmp_path, monkeypatch):
    fill(tmp_path)
    store = SlowStore(tmp_path)
    engine = engine_on(tmp_path, num_blocks=14, prefix_store=store)
    other = list(range(40, 52))
    engine.add_request("other", other, SamplingParams(max_tokens=30, ignore_eos=True))
    engine.step()
    engine.add_request("read", PROMPT, PARAMS)
    engine.step()
    gained = {}
    reading_until_stopped(store, monkeypatch)
    while engine.scheduler.prefix_reader.held:
        collect(gained, engine.step())
    assert ("other", 0) not in gained or gained["other", 0].end is None
    store.may_read.release(100)
    while engine.has_unfinished():
        collect(gained, engine.step())
    assert gained["read", 0].token_ids == expected()
    assert engine.stats()["preemptions"] == 0


def test_branches_take_the_blocks_of_what_is_read(tmp_path):
    fill(tmp_path)
    store = SlowStore(tmp_path)
    engine = engine_on(tmp_path, num_blocks=12, prefix_store=store)
    engine.add_request("read", PROMPT, PARAMS)
    engine.step()
    store.may_read.release(100)
    with Branches(engine) as branches:
        branches.logits([branches.add(list(range(3, 43)))])
    gained = drain(engine)
    assert gained["read", 0].token_ids == expected()


def test_a_preempted_sequence_is_read_back(tmp_path):
    engine = engine_on(tmp_path, num_blocks=12)
    engine.add_request("a", PROMPT, PARAMS)
    gained = {}
    collect(gained, engine.step())
    engine._persistence.writer.flush()
    engine.scheduler.preempt(engine.scheduler.running[0])
    engine.add_request("b", list(range(3, 43)), PARAMS, priority=-1)  # takes its memory
    while engine.has_unfinished():
        collect(gained, engine.step())
    assert gained["a", 0].token_ids == expected()
    assert engine.stats()["prefix_restored_tokens"] >= tokens_in(5)


def test_an_adapter_and_a_salt_have_prefixes_of_their_own(tmp_path):
    # Under dynamic RoPE scaling the salt is the class of the length.
    from codellama_rt.model.config import RopeScaling

    model = HashModel(rope_scaling=RopeScaling("dynamic", 2.0))
    longer = [*PROMPT, 40, 41, 42, 43]
    engine = engine_on(tmp_path, model=model)
    tokens = {len(prompt): answer(engine, prompt)[0] for prompt in (PROMPT, longer)}
    engine.close()
    for prompt, restored in ((PROMPT, 9), (longer, 10), ([*PROMPT[:-1], 50], 9)):
        again = engine_on(tmp_path, model=model)
        found = answer(again, prompt)[0]
        assert again.stats()["prefix_restored_tokens"] == tokens_in(restored)
        alone = generate(prompt, PARAMS, model=model, prefix_caching=False).token_ids
        assert found == alone
        assert found == tokens.get(len(prompt)) or prompt[-1] == 50


def test_a_forked_child_reads_and_writes(tmp_path):
    engine = engine_on(tmp_path)
    other = list(range(40, 60))  # five blocks
    answer(engine)
    child = os.fork()
    if not child:
        is_right = answer(engine, other, name="child")[0] == expected(other)
        engine.close()
        os._exit(not is_right)
    _, status = os.waitpid(child, 0)
    assert status == 0
    engine.close()
    again = engine_on(tmp_path)
    assert answer(again, other)[0] == expected(other)
    assert again.stats()["prefix_restored_tokens"] == tokens_in(5)


def test_without_threads_everything_is_computed(tmp_path, monkeypatch):
    fill(tmp_path)

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    engine = engine_on(tmp_path)
    monkeypatch.setattr(restorer, "start_new_thread", refuse)
    monkeypatch.setattr(write_behind, "start_new_thread", refuse)
    other = list(range(40, 60))
    for prompt in (PROMPT, other):
        assert answer(engine, prompt)[0] == expected(prompt)
    assert engine.stats()["prefix_restored_tokens"] == 0
    engine.close()  # writes what it has, in this thread
    monkeypatch.undo()
    engine = engine_on(tmp_path)
    answer(engine, other)
    assert engine.stats()["prefix_restored_tokens"] == tokens_in(5)


def test_what_cannot_be_read_as_bytes_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="prefix_caching=True"):
        engine_on(tmp_path, prefix_caching=False)
    from helpers import paged_fakes

    monkeypatch.setattr(paged_fakes.FakeKVCache, "in_host_memory", False)
    with pytest.raises(ValueError, match="host memory, on device 'cpu', and not in a FakeKVCache"):
        engine_on(tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_raises_at_any_call_loses_nothing(tmp_path, error):
    fill(tmp_path, [PROMPT, [*PROMPT[:20], *range(40, 60)]])
    requests = {"a": PROMPT, "b": [*PROMPT[:20], *range(40, 60)], "c": list(range(50, 60))}
    tokens = {name: expected(prompt) for name, prompt in requests.items()}

    def run(step, faults):
        engine = engine_on(tmp_path, num_blocks=30, max_num_batched_tokens=16)
        for name, prompt in requests.items():
            engine.add_request(name, prompt, PARAMS)
        gained, steps = {}, 0
        while engine.has_unfinished():
            steps += 1
            try:
                outputs = faults.call(engine.step) if steps == step else engine.step()
            except (KeyboardInterrupt, RuntimeError) as raised:
                assert str(raised) == "injected"  # noqa: PT017 (any step may raise or not)
            else:
                collect(gained, outputs)
        for name in requests:
            assert gained[name, 0].token_ids == tokens[name], faults.raised_in
        engine.close()
        stats = engine.stats()
        assert stats["kv_blocks_free"] == stats["kv_blocks"], faults.raised_in
        return stats

    for step in (1, 2, 3):
        counting = Faults()
        run(step, counting)
        for at in range(step * 5, counting.count, STRIDE):
            run(step, Faults(at, error))


@pytest.mark.parametrize("seed", range(60))
def test_outputs_do_not_depend_on_what_is_on_disk(tmp_path_factory, seed):
    """Random requests, schedules, preemptions, memory, and damage, on one folder for all seeds."""
    folder = tmp_path_factory.getbasetemp() / "prefixes of all seeds"
    rng = random.Random(seed)
    engine = engine_on(
        folder,
        num_blocks=rng.choice([30, 60, 200]),
        max_num_batched_tokens=rng.choice([16, 33, 512]),
        max_num_seqs=rng.randrange(1, 9),
        prefix_store=store_in(folder, max_bytes=rng.choice([10**4, 10**6])),
    )
    pending = {str(i): random_prompt(rng) for i in range(12)}
    prompts, gained, unwanted = dict(pending), {}, set()
    while pending or engine.has_unfinished():
        if pending and rng.random() < 0.5:
            name, prompt = pending.popitem()
            engine.add_request(name, prompt, PARAMS, priority=rng.randrange(2))
        if engine.scheduler.running and rng.random() < 0.2:
            engine.scheduler.preempt(rng.choice(engine.scheduler.running))
        if engine.table.requests and rng.random() < 0.03:
            unwanted.add(name := rng.choice(list(engine.table.requests)))
            engine.abort(name)
        if rng.random() < 0.1:
            damage(rng, folder)
        collect(gained, engine.step())
    engine.close()
    assert engine.stats()["kv_blocks_free"] == engine.stats()["kv_blocks"]
    for name in prompts.keys() - unwanted:
        assert gained[name, 0].token_ids == expected(prompts[name]), prompts[name]


def random_prompt(rng):
    common = PROMPT[: rng.randrange(1, len(PROMPT))]
    return [*common, *(rng.randrange(3, 12) for _ in range(rng.randrange(1, 20)))]


def damage(rng, folder):
    files = list(Path(folder).glob("*.kv"))
    if not files:
        return
    path = rng.choice(files)
    try:
        contents = bytearray(path.read_bytes()) or bytearray(1)  # it may have been cut to nothing
        contents[rng.randrange(len(contents))] ^= 1 << rng.randrange(8)
        path.write_bytes(contents[: rng.choice([len(contents), rng.randrange(len(contents))])])
    except FileNotFoundError:  # deleted meanwhile, for the budget
        return


# ---- the real model -----------------------------------------------------------------------------


def model_of(kv_dtype):
    return tiny_golden(CHECKPOINTS.get(kv_dtype, "gqa_theta1e6_bf16")).model()


def real_engine(model, folder, kv_dtype, **options):
    identity = fingerprint(model.config, model.weights, kv_dtype=kv_dtype, block_size=16)
    store = store_in(folder, 16, **identity) if folder is not None else None
    return make_engine(model, kv_dtype=kv_dtype, prefix_store=store, **options)


def rows_and_blocks(engine, prompt):
    """The logits of what was computed, and the bytes of the prompt's blocks."""
    logits = []
    forward = engine.model.forward

    class Spy:
        config, applies_adapters = engine.model.config, True
        weights = engine.model.weights

        def forward(self, *arguments):
            logits.append(forward(*arguments).tobytes())
            return logits[-1] and np.frombuffer(logits[-1], np.float32).reshape(
                -1, self.config.vocab_size
            )

    engine.model = Spy()
    engine.add_request("x", prompt, SamplingParams(max_tokens=5, ignore_eos=True))
    tokens, blocks = [], None
    while engine.has_unfinished():
        for output in engine.step():
            tokens += output.token_ids
        if engine.scheduler.running:
            block_ids = list(engine.scheduler.running[0].block_ids)
            blocks = [
                [bytes(buffer) for buffer in engine.kv_cache.block_buffers(block_id)]
                for block_id in block_ids[: len(prompt) // 16]
            ]
    return tokens, blocks, logits[-5:]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_restored_blocks_and_logits_have_the_bits_of_computed_ones(tmp_path, kv_dtype):
    model = model_of(kv_dtype)
    prompt = [1, *(3 + 7 * i % 400 for i in range(100))]
    alone = rows_and_blocks(real_engine(model, None, kv_dtype), prompt)
    first = real_engine(model, tmp_path, kv_dtype)
    assert rows_and_blocks(first, prompt) == alone
    first.close()
    second = real_engine(model, tmp_path, kv_dtype)
    assert rows_and_blocks(second, prompt) == alone
    stats = second.stats()
    assert stats["prefix_restored_tokens"] == 96
    assert stats["prefix_store_errors"] == 0


def test_what_bits_depend_on_is_told_apart(tmp_path):
    """One prompt, computed by one engine, is found by none that would compute other bits."""
    model = model_of("float32")
    prompt = [1, *range(3, 60)]

    def restored(its_model, kv_dtype="bfloat16", **options):
        engine = real_engine(its_model, tmp_path, kv_dtype, **options)
        engine.add_request("x", prompt, SamplingParams(max_tokens=2))
        while engine.has_unfinished():
            engine.step()
        engine._persistence.writer.flush()
        return engine.stats()["prefix_restored_tokens"]

    assert restored(model) == 0
    assert restored(model) == 48
    assert restored(model, "float16") == 0
    assert restored(model, "int8") == 0
    others = [tiny_golden("gqa_theta1e6_bf16").model(dtype="float32")]
    others.append(tiny_golden("gqa_theta1e6_bf16").model(quantization="int8"))
    for other in others:
        assert restored(other) == 0
    for isa in ops.available_isas()[1:]:
        with running_on(isa):
            assert restored(model) == 0
            assert restored(model) == 48
    assert restored(model) == 48


@pytest.mark.parametrize(("name", "seeds"), [(name, range(4)) for name in MODELS])
def test_random_schedules_with_what_earlier_ones_left(tmp_path, name, seeds):
    isa = ops.available_isas()[0]
    restored = 0
    for seed in seeds:
        recorder = run_schedule(name, isa, 1000 + seed, tmp_path)
        restored += recorder.counts["restored"]
        for request, rows in recorder.rows.items():
            expected_rows, expected_tokens = undisturbed(name, isa, request)
            assert rows == expected_rows, (seed, request)
            for sample, token_ids in expected_tokens.items():
                assert recorder.token_ids[request, sample] == token_ids, (seed, request)
    assert restored > 0
