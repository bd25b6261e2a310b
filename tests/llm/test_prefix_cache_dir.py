"""Prefixes on disk as a user of LLM has them: options, a second process's worth, export, import."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import adapter_files
from helpers.tiny_llm import KV_MEMORY, make_folder

from codellama_rt.engine.disk_cache.block_file import read_block, read_head
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.llm import LLM
from codellama_rt.llm.prefix_cache import require_prefix_cache

# More: CODELLAMA_RT_LLM_KILLS=50 python -m pytest tests/llm/test_prefix_cache_dir.py -k kill
NUM_KILLS = int(os.environ.get("CODELLAMA_RT_LLM_KILLS", "3"))
PROMPT = [1, *(3 + 5 * i % 400 for i in range(99))]
PARAMS = SamplingParams(max_tokens=6, temperature=0.8, seed=3, logprobs=1, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("llm") / "model")


def opened(folder, cache=None, **options):
    options = {"kv_memory": KV_MEMORY, "block_size": 16, **options}
    return LLM(folder, prefix_cache_dir=cache, **options)


def answer(llm, **options):
    """Tokens and logprobs of an answer, and how many tokens came from disk."""
    [completion] = llm.generate([PROMPT], PARAMS, **options)
    restored = llm.engine.stats().get("prefix_restored_tokens")
    return completion.token_ids, list(completion.logprobs), restored


@pytest.fixture(scope="module")
def expected(folder):
    with opened(folder) as llm:
        return answer(llm)[:2]


def test_a_second_model_restores_what_the_first_has_computed(folder, tmp_path, expected):
    cache = tmp_path / "deep" / "cache"
    with opened(folder, cache) as llm:
        assert answer(llm) == (*expected, 0)
    with opened(folder, str(cache), prefix_cache_bytes=10**8) as llm:
        assert answer(llm) == (*expected, 96)
        assert llm.engine.stats()["prefix_store_errors"] == 0


def test_kills_of_a_model_that_writes_leave_only_sound_blocks(folder, tmp_path, expected):
    """Wherever a process is killed, the next one answers with the same bits."""
    code = (
        "import sys; from codellama_rt import LLM, SamplingParams; "
        f"llm = LLM({str(folder)!r}, kv_memory={KV_MEMORY!r}, block_size=16, "
        f"prefix_cache_dir={str(tmp_path)!r}); print('begun', flush=True)\n"
        "for i in range(10**6):\n"
        f"    llm.generate([{PROMPT}, [1, *({PROMPT} * 2)[3 + i % 97 : 100 + i % 97]]], "
        "SamplingParams(max_tokens=2, ignore_eos=True)); llm.reset_prefix_cache()"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    rng, most = random.Random(5), 0
    for _ in range(NUM_KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout.readline() == "begun\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(rng.random() * 0.2)
        process.kill()
        process.communicate()
        with opened(folder, tmp_path) as llm:
            tokens, logprobs, restored = answer(llm)
            assert (tokens, logprobs) == expected
            assert llm.engine.stats()["prefix_store_errors"] == 0
            block = [memoryview(bytearray(its.nbytes)) for its in llm.kv_cache.block_buffers(0)]
        for path in tmp_path.glob("*.kv"):
            with path.open("rb") as file:
                head, start = read_head(file.fileno())
                read_block(file.fileno(), start, head.checksums[0], block)
        most = max(most, restored)
    assert most == 96


def test_what_nobody_closed_is_written_when_the_process_ends(folder, tmp_path, expected):
    code = (
        "from codellama_rt import LLM; "
        f"llm = LLM({str(folder)!r}, kv_memory={KV_MEMORY!r}, block_size=16, "
        f"prefix_cache_dir={str(tmp_path)!r}); llm.generate({PROMPT})"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    with opened(folder, tmp_path) as llm:
        assert answer(llm) == (*expected, 96)


def test_adapters_and_salts_have_prefixes_of_their_own(folder, tmp_path, expected):
    def ask(**options):
        with opened(folder, tmp_path) as llm:
            if "adapter" in options:
                options["adapter"] = llm.load_adapter(options["adapter"])
            return answer(llm, **options)

    with opened(folder) as llm:
        paths = [
            adapter_files.write_adapter(tmp_path / f"adapter {i}", llm.config, seed=i)
            for i in range(2)
        ]
    assert ask() == (*expected, 0)
    found = [ask(adapter=path) for path in paths]
    assert [restored for *_, restored in found] == [0, 0]
    assert len({tuple(tokens) for tokens, *_ in [*found, expected]}) == 3
    for path, first in zip(paths, found, strict=True):
        assert ask(adapter=path) == (*first[:2], 96)
    assert ask(cache_salt="mine") == (*expected, 0)
    assert ask(cache_salt="mine") == (*expected, 96)
    assert ask(cache_salt="yours") == (*expected, 0)
    with opened(folder, tmp_path, adapter=paths[0]) as llm:  # merged: other weights
        assert answer(llm)[2] == 0


def test_other_options_find_nothing(folder, tmp_path, expected):
    with opened(folder, tmp_path) as llm:
        answer(llm)
    for options in ({"kv_dtype": "int8"}, {"dtype": "float32"}, {"quantization": "int8"},
                    {"block_size": 32}, {"rope_theta": 5e4},
                    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}):  # fmt: skip
        with opened(folder, tmp_path, **options) as llm:
            assert answer(llm)[2] == 0, options
    with opened(folder, tmp_path, num_threads=1, max_num_batched_tokens=32) as llm:
        assert answer(llm) == (*expected, 96)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "int4"])
def test_export_and_import(tmp_path, kv_dtype):
    folder = make_folder(tmp_path / "model", name="mqa_fp16_sharded")
    path = tmp_path / "prefix.kv"
    with opened(folder, kv_dtype=kv_dtype) as llm:
        expected = answer(llm)
        assert llm.export_prefix(PROMPT, path) == 96
        assert llm.engine.stats()["kv_blocks_free"] == llm.engine.stats()["kv_blocks"]
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["prefix.kv"]
    with opened(folder, tmp_path / "cache", kv_dtype=kv_dtype) as llm:
        assert llm.import_prefix(path) == 96
        before = llm.engine.stats()["computed_tokens"]
        assert answer(llm)[:2] == expected[:2]
        assert llm.engine.stats()["computed_tokens"] - before == len(PROMPT) - 96 + 5
        assert llm.import_prefix(path) == 96  # all of it is there
        assert llm.engine.stats()["kv_blocks_free"] == llm.engine.stats()["kv_blocks"]
    with opened(folder, tmp_path / "cache", kv_dtype=kv_dtype) as llm:
        assert answer(llm) == (*expected[:2], 96)  # an imported prefix is kept like any other


def test_an_exported_prefix_has_a_salt(folder, tmp_path, expected):
    path = tmp_path / "prefix.kv"
    with opened(folder) as llm:
        assert llm.export_prefix(PROMPT, path, cache_salt="a") == 96
        assert llm.generate([PROMPT], PARAMS)[0].stats["cached_tokens"] == 0
    with opened(folder) as llm:
        for other in (None, "b"):
            words = f"another salt than this model's: 'a', not '{other or ''}'"
            with pytest.raises(ValueError, match=words):
                llm.import_prefix(path, cache_salt=other)
        assert llm.import_prefix(path, cache_salt="a") == 96
        for salt, cached in ((None, 0), ("b", 0), ("a", 96)):
            [completion] = llm.generate([PROMPT], PARAMS, cache_salt=salt)
            assert completion.stats["cached_tokens"] >= cached
            assert bool(completion.stats["cached_tokens"]) == bool(cached)
            assert (completion.token_ids, list(completion.logprobs)) == expected
    with opened(folder) as llm:
        llm.export_prefix(PROMPT, path)
        with pytest.raises(ValueError, match="another salt than this model's: '', not 'a'"):
            llm.import_prefix(path, cache_salt="a")


def test_a_text_is_exported_as_it_would_be_completed(folder, tmp_path):
    text = "def add(first, second):\n    return first + second\n" * 4
    with opened(folder) as llm:
        count = llm.export_prefix(text, tmp_path / "prefix")
        assert count == len(llm.generate(text, PARAMS)[0].prompt_token_ids) // 16 * 16 > 0
    with opened(folder) as llm:
        llm.import_prefix(tmp_path / "prefix")
        assert llm.generate(text, PARAMS)[0].stats["cached_tokens"] >= count - 16


def test_a_cache_too_small_takes_the_beginning(folder, tmp_path):
    with opened(folder) as llm:
        llm.export_prefix(PROMPT, tmp_path / "prefix")
        block_bytes = llm.kv_cache.num_bytes // llm.kv_cache.num_blocks
    with opened(folder, kv_memory=4 * block_bytes, max_model_len=64) as llm:
        assert llm.import_prefix(tmp_path / "prefix") == 64


def test_what_import_refuses(folder, tmp_path):
    path = tmp_path / "prefix"
    with opened(folder) as llm:
        llm.export_prefix(PROMPT, path)
        with pytest.raises(ValueError, match="at least one block of 16 tokens, got 15"):
            llm.export_prefix(PROMPT[:15], path)
        sound = path.read_bytes()
        for at in (3, 40, 200, len(sound) - 1):
            damaged = bytearray(sound)
            damaged[at] ^= 16
            path.write_bytes(damaged)
            llm.reset_prefix_cache()
            with pytest.raises(ValueError, match="prefix: "):
                llm.import_prefix(path)
            path.write_bytes(sound[:at])
            with pytest.raises(ValueError, match="prefix: "):
                llm.import_prefix(path)
        stats = llm.engine.stats()
        assert stats["kv_blocks_free"] == stats["kv_blocks"]
        with pytest.raises(FileNotFoundError):
            llm.import_prefix(tmp_path / "absent")
    path.write_bytes(sound)
    for options, word in (
        ({"kv_dtype": "int8"}, "kv dtype than this model's: 'bfloat16', not 'int8'"),
        ({"dtype": "float32", "kv_dtype": "bfloat16"}, "another (config|weights)"),
        ({"block_size": 32}, "in blocks of 32 tokens"),
    ):
        with opened(folder, **options) as llm, pytest.raises(ValueError, match=word):
            llm.import_prefix(path)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"device": "cuda"}, ValueError, "device 'cpu' has, got device 'cuda'"),
        ({"device": "ascend"}, ValueError, "got device 'ascend'"),
        ({"prefix_caching": False}, ValueError, "needs prefix_caching=True"),
        ({"folder": 3}, TypeError, "expected str, bytes or os.PathLike object, not int"),
        ({"max_bytes": "many"}, ValueError, "a memory size is a number and a unit"),
        ({"max_bytes": 0}, ValueError, "must be positive"),
        ({"max_bytes": 1.5}, TypeError, "an int of bytes or a str"),
    ],
)
def test_options_that_cannot_be(given, error, words):
    options = {"folder": "x", "max_bytes": "1GB", "device": "cpu", "prefix_caching": True, **given}
    with pytest.raises(error, match=words):
        require_prefix_cache(options.pop("folder"), options.pop("max_bytes"), **options)
    if given.get("device"):  # without a folder all is well
        require_prefix_cache(None, "1GB", **options)
