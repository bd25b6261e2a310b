"""One model, many threads, tasks and processes: each call gives what it gives alone."""

import asyncio
import gc
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.concurrent_calls import SHORT, calls
from helpers.tiny_llm import KV_MEMORY, make_folder

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.hf.causal_lm import LlamaForCausalLM
from codellama_rt.llm.llm import LLM

THREADS, CALLS = 8, 12  # of each entry in each thread
ENDLESS = SamplingParams(max_tokens=200, ignore_eos=True)
TIMEOUT_S = 600  # of what would otherwise hang for ever; a loaded machine is slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("threads") / "model")


@pytest.fixture(scope="module")
def model(folder):
    model = LlamaForCausalLM.from_pretrained(folder, kv_memory="1MB", max_model_len=256)
    yield model
    stats = model.llm.engine.stats()
    assert stats["kv_blocks_free"] == stats["kv_blocks"], "blocks leaked"
    model.llm.close()


def in_threads(work, num_threads=THREADS):
    """`work(number of the thread)` in several threads at once; their results."""
    start = threading.Barrier(num_threads)

    def run(number):
        start.wait()
        return work(number)

    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(run, range(num_threads), timeout=TIMEOUT_S))


ENTRIES = ["generate", "stream", "infill", "chat", "logits", "forward"]
ENTRIES += ["greedy", "sample", "beams", "streamer"]


def test_all_entries_are_known(model):
    assert list(calls(model)) == ENTRIES


@pytest.mark.parametrize("entry", ENTRIES)
def test_one_entry_from_many_threads(model, entry):
    call = calls(model)[entry]
    expected = [call(i) for i in range(CALLS)]
    for found in in_threads(lambda _: [call(i) for i in range(CALLS)]):
        assert found == expected


def test_all_entries_at_once(model):
    each = list(calls(model).values())
    expected = [[call(i) for i in range(CALLS)] for call in each]

    def work(number):
        order = [(number * 3 + k) % len(each) for k in range(len(each))]
        return {k: [each[k](i) for i in range(CALLS)] for k in order}

    for found in in_threads(work):
        assert [found[k] for k in range(len(each))] == expected


def test_requests_of_an_engine_from_many_threads(model):
    """Each thread adds, steps and aborts; together they get every output, once."""
    engine, outputs = model.llm.engine, []
    expected = {i: model.llm.generate([[1, 5 + i]], SHORT)[0].token_ids for i in range(THREADS)}

    def work(number):
        for k in range(CALLS):
            name = f"{number} {k}"
            engine.add_request(name, [1, 5 + number], SHORT)
            engine.add_request(f"aborted {name}", [1, 5], SHORT)
            if k % 2:
                outputs.extend(engine.step())
            engine.abort(f"aborted {name}")
            while engine.has_unfinished():
                outputs.extend(engine.step())

    in_threads(work)
    gained = {}
    for output in outputs:
        gained.setdefault(output.request_id, []).extend(output.token_ids)
    for i in range(THREADS):
        for k in range(CALLS):  # threads note the outputs of two steps in either order
            assert sorted(gained[f"{i} {k}"]) == sorted(expected[i])


def test_tasks_of_an_event_loop(model):
    each = list(calls(model).values())
    expected = [call(i) for call in each for i in range(4)]

    async def main():
        tasks = [asyncio.to_thread(call, i) for call in each for i in range(4)]
        return await asyncio.wait_for(asyncio.gather(*tasks), TIMEOUT_S)

    assert asyncio.run(main()) == expected


# Processes


def test_a_forked_child_has_the_model_too(folder):
    """Also when another thread is in the middle of a step as the process forks."""
    with LLM(folder, kv_memory=KV_MEMORY) as llm:
        expected = llm.generate([[1, 5]], SHORT)[0].token_ids
        stop = threading.Event()

        def work():
            while not stop.is_set():
                llm.generate([[1, 7, 9]] * 3, SHORT)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            for _ in range(20):
                child = os.fork()
                if child == 0:
                    signal.alarm(TIMEOUT_S)
                    same = llm.generate([[1, 5]], SHORT)[0].token_ids == expected
                    os._exit(0 if same else 1)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finally:
            stop.set()
            thread.join()
        assert llm.generate([[1, 5]], SHORT)[0].token_ids == expected


def generate_in_child(folder, queue):
    with LLM(folder, kv_memory=KV_MEMORY) as llm:
        queue.put(llm.generate([[1, 5]], SHORT)[0].token_ids)


def test_a_spawned_child_opens_its_own(folder, model):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=generate_in_child, args=(folder, queue))
    child.start()
    assert queue.get(timeout=TIMEOUT_S) == model.llm.generate([[1, 5]], SHORT)[0].token_ids
    child.join()
    assert child.exitcode == 0


# Nothing lost, nothing endless


def test_outputs_of_requests_wait_for_the_next_step(folder):
    with LLM(folder, kv_memory=KV_MEMORY) as llm:
        expected = llm.generate([[1, 2, 3]], SHORT)[0].token_ids
        llm.engine.add_request("mine", [1, 2, 3], SHORT)
        llm.generate([[1, 5]], ENDLESS)
        assert llm.engine.has_unfinished()
        outputs = llm.engine.step()
        assert [output.request_id for output in outputs] == ["mine"] * 6
        assert [token_id for output in outputs for token_id in output.token_ids] == expected
        assert outputs[-1].finished
        assert not llm.engine.has_unfinished()
        assert llm.engine.step() == []


@pytest.mark.parametrize("end", ["close", "abort", "close elsewhere"])
def test_a_stream_ends_when_its_request_does(folder, end):
    llm = LLM(folder, kv_memory=KV_MEMORY)
    job = llm.jobs.submit([1, 5], ENDLESS)
    pieces = llm.jobs.stream(job)
    next(pieces)
    if end == "abort":
        llm.engine.abort(job.name)
    elif end == "close":
        llm.close()
    else:
        closing = threading.Thread(target=llm.close)
        closing.start()
        closing.join()
    signal.alarm(TIMEOUT_S)
    assert list(pieces) == []
    signal.alarm(0)
    assert job.completions[0].finish_reason == "abort"
    llm.close()


def test_close_ends_calls_of_other_threads(folder):
    for _ in range(5):
        llm = LLM(folder, kv_memory=KV_MEMORY)
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(llm.generate, [[1, 5 + i]], ENDLESS) for i in range(4)]
            while llm.engine.stats()["prompt_tokens"] < 8:
                time.sleep(0.001)
            llm.close()
            for future in futures:
                assert future.result(TIMEOUT_S)[0].finish_reason in ("abort", "length")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_closed_model_refuses(folder, entry):
    model = LlamaForCausalLM.from_pretrained(folder, kv_memory=KV_MEMORY)
    call = calls(model)[entry]
    model.llm.close()
    model.llm.close()
    if entry == "streamer":
        assert call(0) == ""  # the exception is that of the thread; its reader must not wait
        return
    with pytest.raises(RuntimeError, match="closed"):
        call(0)


def test_a_stream_that_garbage_collection_drops_inside_a_step(model):
    """Its finalizer runs wherever an object is allocated, in a step of the same thread, too."""
    llm = model.llm
    expected = llm.generate([[1, 5]], SHORT)[0].token_ids

    def drop_in_a_cycle():
        cycle = [llm.stream([1, 9], ENDLESS)]
        next(cycle[0])
        cycle.append(cycle)

    forward = llm.model.forward

    def collect_and_forward(*args):
        gc.collect()
        return forward(*args)

    llm.model.forward = collect_and_forward
    try:
        for _ in range(5):
            drop_in_a_cycle()
            assert llm.generate([[1, 5]], SHORT)[0].token_ids == expected
    finally:
        del llm.model.forward
    assert llm.engine.stats()["running"] == 0


def test_a_signal_handler_may_abort_but_not_step(model):
    llm, seen = model.llm, []
    expected = llm.generate([[1, 5]], SHORT)[0].token_ids

    def handler(*_):
        assert llm.engine.abort("doomed") == []
        with pytest.raises(RuntimeError, match="from inside its own step"):
            llm.engine.step()
        seen.append(llm.engine.owner.is_inside())

    forward = llm.model.forward

    def forward_and_signal(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        return forward(*args)

    previous = signal.signal(signal.SIGUSR1, handler)
    llm.model.forward = forward_and_signal
    try:
        llm.engine.add_request("doomed", [1, 9], ENDLESS)
        assert llm.generate([[1, 5]], SHORT)[0].token_ids == expected
    finally:
        del llm.model.forward
        signal.signal(signal.SIGUSR1, previous)
    assert len(seen) >= 6
    assert "doomed" not in llm.engine.table.requests
    llm.engine.step()
