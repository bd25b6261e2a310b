"""Thousands of requests of all kinds, one after another: memory and descriptors stay as they are.

CODELLAMA_RT_SOAK=20000 is the full count; the suite asks less.
"""

import asyncio
import os
import random

from helpers.served import request_bytes, serving, wait_for

NUM_REQUESTS = int(os.environ.get("CODELLAMA_RT_SOAK", "600"))
AT_ONCE = 8
MOST_GROWTH_MB = 12.0  # Python's own memory goes up and down by some of it
MIXED = (
    ("/v1/completions", {"prompt": "def f(", "max_tokens": 6, "n": 2}),
    ("/v1/completions", {"prompt": "def g(", "max_tokens": 6, "stream": True, "logprobs": 3}),
    ("/v1/completions", {"prompt": "x = " * 40, "max_tokens": 1, "echo": True, "logprobs": 1}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 1900, "ignore_eos": True, "stream": True}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 1900, "ignore_eos": True}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "[a-z]+"}}),
    ("/v1/completions", {"prompt": 5}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5}),
    ("/v1/fim/completions", {"prompt": "def f(", "suffix": "):", "max_tokens": 5, "stream": True}),
    ("/infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": 5}),
    ("/completion", {"prompt": "x" * 200, "n_predict": 4, "stream": True, "n_probs": 2}),
    ("/tokenize", {"prompt": "def f("}),
    ("/nowhere", {}),
)


def memory_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def ask(address, i, rng):
    """One request, of a prompt of its own; whoever asks for much, and some others, leave early."""
    path, body = MIXED[i % len(MIXED)]
    if isinstance(body.get("prompt"), str):
        body = {**body, "prompt": f"{body['prompt']} {i}"}
    reader, writer = await asyncio.open_connection(*address)
    writer.write(request_bytes(path, body, headers="Connection: close\r\n"))
    if body.get("max_tokens") == 1900 or rng.random() < 0.1:
        reading = asyncio.create_task(reader.read(rng.randrange(1, 2000)))
        await asyncio.wait({reading}, timeout=rng.random() * 0.05)
        reading.cancel()
    else:
        assert (await reader.read(-1)).startswith(b"HTTP/1.1 ")
    writer.transport.abort()


def test_mixed_requests(open_llm):
    seen = []  # (answers, MB, descriptors)

    def note(num_answers):
        seen.append((num_answers, memory_mb(), len(os.listdir("/proc/self/fd"))))
        print("{} answers: {:.1f} MB, {} descriptors".format(*seen[-1]), flush=True)

    with open_llm() as llm, serving(llm) as server:

        async def some(requests, rng):
            async def client():
                for i in requests:
                    await ask(server.address, i, rng)

            await asyncio.gather(*(client() for _ in range(AT_ONCE)))

        rng, tenth = random.Random(1), NUM_REQUESTS // 10
        for first in range(0, NUM_REQUESTS, tenth):
            asyncio.run(some(iter(range(first, min(first + tenth, NUM_REQUESTS))), rng))
            server.wait_until_idle()
            wait_for(lambda: not server.server.server_state.connections)
            note(min(first + tenth, NUM_REQUESTS))
    _, before, descriptors = seen[2]
    assert seen[-1][1] - before < MOST_GROWTH_MB
    assert max(count for _, _, count in seen[3:]) <= descriptors + AT_ONCE
