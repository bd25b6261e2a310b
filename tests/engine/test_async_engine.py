"""AsyncEngine: the outputs of `Engine.step`, read by tasks, which come and go as they like."""

import asyncio
import threading
import time
from dataclasses import replace

import pytest
from helpers.held_steps import holding
from helpers.paged_fakes import drain, engine_of, greedy_tokens

from codellama_rt.engine.async_engine import AsyncEngine
from codellama_rt.engine.request import Request
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.errors import QueueFullError

LONG = SamplingParams(max_tokens=200, ignore_eos=True)


def prompt(i):
    return [1, 2 + i % 7, 3 + i % 11, 4 + i % 50]


def params(i):
    return SamplingParams(
        n=1 + i % 3, temperature=i % 2, seed=i, max_tokens=5 + i % 9, ignore_eos=True
    )


async def read(engine, i, its_params=None):
    tokens = {}
    async for output in engine.generate(prompt(i), its_params or params(i)):
        tokens.setdefault(output.index, []).extend(output.token_ids)
        reason = output.finish_reason
    return tokens, reason


async def tokens_of(stream):
    return [token_id async for output in stream for token_id in output.token_ids]


def blocks_in_use(engine):
    blocks = engine.scheduler.blocks
    return blocks.num_blocks - blocks.num_free


def test_streams_are_those_of_the_engine():
    expected = engine_of(num_blocks=512)
    for i in range(24):
        expected.add_request(str(i), prompt(i), params(i))
    whole = drain(expected)
    engine = engine_of(num_blocks=512)

    async def main():
        async with AsyncEngine(engine) as streams:
            return await asyncio.gather(*(read(streams, i) for i in range(24)))

    for i, (tokens, reason) in enumerate(asyncio.run(main())):
        assert reason == "length"
        assert tokens == {k: whole[str(i), k].token_ids for k in range(params(i).n)}
    assert blocks_in_use(engine) == 0


def test_thousands_of_cancellations_leave_nothing():
    """Tasks are cancelled before their request is queued, while it waits, and while it runs."""
    engine = engine_of(num_blocks=48, max_num_seqs=8)

    async def main():
        with holding(engine) as steps:  # too few for any request to end
            async with AsyncEngine(engine) as streams:
                for round_ in range(40):
                    tasks = [asyncio.create_task(read(streams, i, LONG)) for i in range(50)]
                    for _ in range(round_ % 5):
                        steps.allow(5)
                        made = steps.num_made + 2  # the others are made meanwhile
                        while steps.num_made < made:
                            await asyncio.sleep(0.001)
                    for task in tasks:
                        task.cancel()
                    ends = await asyncio.gather(*tasks, return_exceptions=True)
                    assert {type(end) for end in ends} == {asyncio.CancelledError}
                steps.allow(1000)
                tokens, _ = await read(streams, 0, SamplingParams(max_tokens=4, ignore_eos=True))
                await streams.drain()
                return tokens

    assert len(asyncio.run(main())[0]) == 4
    assert not engine.has_unfinished()
    assert blocks_in_use(engine) == 0


def test_a_reader_that_stands_still_holds_up_nobody():
    engine = engine_of(num_blocks=256)

    async def main():
        async with AsyncEngine(engine) as streams:
            slow = await streams.add_request(prompt(0), LONG)
            first = await anext(slow)
            await asyncio.gather(*(read(streams, i) for i in range(8)))
            await streams.drain()  # the slow one's request has ended too, unread
            rest = [output async for output in slow]
        return [first, *rest]

    outputs = asyncio.run(main())
    assert sum(len(output.token_ids) for output in outputs) == 200
    assert outputs[-1].finish_reason == "length"


def test_abort_from_another_thread():
    engine = engine_of(num_blocks=256)

    async def main():
        async with AsyncEngine(engine) as streams:
            with holding(engine) as steps:
                stream = await streams.add_request(prompt(1), LONG, request_id="mine")
                steps.allow()
                await anext(stream)
                thread = threading.Thread(target=streams.abort, args=("mine",))
                thread.start()
                thread.join()
            outputs = [output async for output in stream]
            streams.abort("mine")  # nothing is left of it
            return outputs

    outputs = asyncio.run(main())
    assert outputs[-1].finish_reason == "abort"
    assert sum(len(output.token_ids) for output in outputs) < 199
    assert blocks_in_use(engine) == 0


def test_an_error_ends_its_own_request():
    engine = engine_of(num_blocks=256)

    def fail(token_ids, logits):
        raise ZeroDivisionError("of the caller's processor")

    async def main():
        async with AsyncEngine(engine) as streams:
            other = asyncio.create_task(read(streams, 1))
            with pytest.raises(ZeroDivisionError, match="the caller's"):
                async for _ in streams.generate(
                    prompt(0), replace(LONG, logits_processors=(fail,))
                ):
                    pass
            return await other

    assert asyncio.run(main())[1] == "length"
    assert blocks_in_use(engine) == 0


def test_wrong_requests_are_refused_at_once():
    engine = engine_of(num_blocks=64, max_queued_tokens=20)

    async def main():
        async with AsyncEngine(engine) as streams:
            with pytest.raises(ValueError, match="must be a token id"):
                await anext(streams.generate([1000]))
            with pytest.raises(QueueFullError, match="prompt tokens wait") as refused:
                await anext(streams.generate(list(range(21))))
            assert refused.value.pending_tokens == 0
            with holding(engine) as steps:
                one = await streams.add_request(prompt(0), LONG, request_id="one")
                with pytest.raises(ValueError, match="in use"):
                    await streams.add_request(prompt(0), LONG, request_id="one")
                steps.allow()
                await anext(one)
                closing = asyncio.create_task(streams.close())
                await asyncio.sleep(0)  # it has begun
            await closing
            assert [output.finish_reason async for output in one][-1] == "abort"
            with pytest.raises(RuntimeError, match="closed"):
                await streams.add_request(prompt(0), LONG)

    asyncio.run(main())


def test_a_step_that_raises_ends_what_is_unfinished():
    engine = engine_of(num_blocks=64)

    async def main():
        async with AsyncEngine(engine) as streams:
            with holding(engine) as steps:
                stream = await streams.add_request(prompt(0), LONG)
                steps.allow()
                await anext(stream)

                def fail():
                    raise OSError("no memory for the copy")

                steps.step = fail
                steps.allow()
                with pytest.raises(OSError, match="no memory"):
                    async for _ in stream:
                        pass
            return await read(streams, 1)

    assert asyncio.run(main())[1] == "length"
    assert blocks_in_use(engine) == 0


def test_event_loops_of_several_threads():
    engine = engine_of(num_blocks=512)
    streams = AsyncEngine(engine)
    results = {}

    def run(i):
        results[i] = asyncio.run(read(streams, i))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(streams.close())
    for i, (tokens, reason) in results.items():
        assert [len(its) for its in tokens.values()] == [params(i).max_tokens] * params(i).n
        assert reason == "length"
    assert blocks_in_use(engine) == 0


def test_the_stream_of_a_loop_that_is_gone_ends():
    engine = engine_of(num_blocks=256)
    streams = AsyncEngine(engine)

    async def leave():
        await anext(await streams.add_request(prompt(0), LONG))

    asyncio.run(leave())
    assert asyncio.run(read(streams, 1))[1] == "length"
    asyncio.run(streams.drain())
    asyncio.run(streams.close())
    assert blocks_in_use(engine) == 0


def test_a_name_is_free_once_its_request_has_ended():
    engine = engine_of(num_blocks=256)
    params = SamplingParams(max_tokens=6, ignore_eos=True)

    async def main():
        async with AsyncEngine(engine) as streams:
            first = await streams.add_request(prompt(1), params, request_id="name")
            while streams.num_unfinished:
                time.sleep(0.001)  # nobody sorts the mail
            second = await streams.add_request(prompt(2), params, request_id="name")
            return [await tokens_of(second), await tokens_of(first)]

    second, first = asyncio.run(main())
    assert first == greedy_tokens(6, prompt(1))
    assert second == greedy_tokens(6, prompt(2))


def test_what_a_slow_reader_gets_at_once_is_what_the_steps_gave():
    engine, expected = engine_of(num_blocks=256), engine_of(num_blocks=256)
    params = SamplingParams(
        n=2, max_tokens=20, temperature=1.0, seed=1, logprobs=1, prompt_logprobs=1, ignore_eos=True
    )
    expected.add_request("r", prompt(1), params)
    whole = drain(expected)

    async def main():
        async with AsyncEngine(engine) as streams:
            stream = await streams.add_request(prompt(1), params, request_id="r")
            while streams.num_unfinished:
                time.sleep(0.001)
            return [output async for output in stream]

    outputs = asyncio.run(main())
    assert len(outputs) == 2
    for output in outputs:
        total = whole["r", output.index]
        assert (output.token_ids, output.text) == (total.token_ids, total.text)
        assert (output.logprobs, output.finish_reason) == (total.logprobs, "length")
        assert list(output.prompt_logprobs) == list(total.prompt_logprobs)
        assert output.metrics.output_tokens == 20


def test_readers_are_woken_seldom_but_for_first_and_last_tokens():
    """Also where others begin and end meanwhile."""
    engine = engine_of(num_blocks=256)

    async def main():
        async with AsyncEngine(engine, stream_interval_s=3600) as streams:
            stream = await streams.add_request(prompt(1), LONG)
            first = await anext(stream)
            for i in range(10):
                await read(streams, i)
            return [first, *[output async for output in stream]]

    outputs = asyncio.run(main())
    assert sum(len(output.token_ids) for output in outputs) == 200
    assert 2 <= len(outputs) <= 3


@pytest.mark.parametrize("seconds", [0, 0.001])
def test_readers_are_woken_in_time_whatever_happens_meanwhile(seconds):
    """One who waits for the middle of a stream gets it while nobody else begins or ends."""
    engine = engine_of(num_blocks=256)
    may_step = threading.Semaphore(0)
    engine.on_step = lambda record: may_step.acquire()

    async def main():
        async with AsyncEngine(engine, stream_interval_s=seconds) as streams:
            stream = await streams.add_request(prompt(1), LONG)
            for _ in range(20):
                may_step.release()  # no step comes before this one is read
                assert len((await asyncio.wait_for(anext(stream), 60)).token_ids) == 1
            streams.abort(stream.request_id)
            may_step.release(1000)

    asyncio.run(main())


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_an_interval_that_cannot_be(seconds):
    with pytest.raises(ValueError, match="stream_interval_s must be at least 0"):
        AsyncEngine(engine_of(num_blocks=8), stream_interval_s=seconds)


def test_requests_come_while_outputs_are_delivered(monkeypatch):
    """A task adds its stream at any moment, also between two that the thread looks at."""
    engine = engine_of(num_blocks=256)

    async def main():
        async with AsyncEngine(engine) as streams:
            is_finished, others = Request.is_finished, iter(range(10**6))

            def come_and_go(request):
                name = f"other-{next(others) // 2}"
                if streams._streams.pop(name, None) is None:
                    streams._streams[name] = next(iter(streams._streams.values()))
                return is_finished.fget(request)

            monkeypatch.setattr(Request, "is_finished", property(come_and_go))
            found = await asyncio.wait_for(
                asyncio.gather(*(read(streams, i) for i in range(8))), timeout=60
            )
            monkeypatch.undo()
            for name in [name for name in streams._streams if name.startswith("other-")]:
                del streams._streams[name]
            return found

    assert [reason for _, reason in asyncio.run(main())] == ["length"] * 8


def test_nobody_waits_for_a_thread_that_has_ended(monkeypatch):
    engine = engine_of(num_blocks=64)

    def fail(self, outputs):
        raise ZeroDivisionError("of our own")

    async def main():
        streams = AsyncEngine(engine)
        monkeypatch.setattr(AsyncEngine, "_deliver", fail)
        with pytest.raises(RuntimeError, match="has failed: ZeroDivisionError"):
            await asyncio.wait_for(read(streams, 0), timeout=60)
        with pytest.raises(RuntimeError, match="closed"):
            streams.check_open()
        await streams.close()

    asyncio.run(main())
