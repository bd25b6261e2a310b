"""What surrounds the endpoints: metrics, models, the page, the API's description, adapters."""

import contextlib
import json
import re
from pathlib import Path

import pytest
from helpers.adapter_files import write_adapter
from helpers.held_steps import holding
from helpers.served import request_bytes, serving, wait_for
from helpers.speculating import speculate_always
from prometheus_client.parser import text_string_to_metric_families

from codellama_rt import LLM, SamplingParams
from codellama_rt.serve.app import ROUTES
from codellama_rt.serve.openapi import description

REPOSITORY = Path(__file__).resolve().parents[2]
# All that vLLM 0.32 has, but for lora_requests_info, which only a server with adapters has.
VLLM = """
    gauge: num_requests_running num_requests_waiting num_requests_waiting_by_reason
    gauge: kv_cache_usage_perc cache_config_info engine_sleep_state
    counter: prompt_tokens generation_tokens prompt_tokens_cached request_success num_preemptions
    counter: prefix_cache_queries prefix_cache_hits admission_rejections corrupted_requests
    counter: external_prefix_cache_queries external_prefix_cache_hits
    counter: spec_decode_num_drafts spec_decode_num_draft_tokens spec_decode_num_accepted_tokens
    counter: spec_decode_num_accepted_tokens_per_pos
    histogram: time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds
    histogram: request_time_per_output_token_seconds request_queue_time_seconds
    histogram: request_inference_time_seconds request_prefill_time_seconds
    histogram: request_decode_time_seconds request_prompt_tokens request_generation_tokens
    histogram: request_params_n request_params_max_tokens request_prefill_kv_computed_tokens
    histogram: iteration_tokens_total request_num_preemptions
"""


def families(server):
    text = server.get("/metrics").body.decode()
    return {one.name: one for one in text_string_to_metric_families(text)}


def total(family):
    return sum(one.value for one in family.samples)


def by_label(family, label):
    return {one.labels[label]: one.value for one in family.samples}


@pytest.mark.parametrize("prefix", ["codellama_rt", "vllm"])
def test_metrics_have_vllms_names_and_types(open_llm, prefix):
    with open_llm() as llm, serving(llm, metrics_prefix=prefix, names=("m",)) as server:
        fields = {"prompt": ["def f(" * 20] * 2, "max_tokens": 5, "n": 2, "ignore_eos": True}
        server.post("/v1/completions", **fields)
        server.wait_until_idle()
        found = families(server)
    for line in VLLM.strip().splitlines():
        kind, _, names = line.strip().partition(": ")
        for name in names.split():
            assert found[f"{prefix}:{name}"].type == kind, name

    for name, expected in {
        "generation_tokens": 20,
        "request_success": 4,
        "num_preemptions": 0,
        "external_prefix_cache_queries": 0,
        "corrupted_requests": 0,
        "spec_decode_num_drafts": 0,
        "engine_sleep_state": 1,
    }.items():
        assert total(found[f"{prefix}:{name}"]) == expected, name
    assert total(found[f"{prefix}:prompt_tokens_cached"]) > 0
    counts = {one.name: one.value for one in found[f"{prefix}:iteration_tokens_total"].samples}
    computed = llm.engine.stats()["computed_tokens"]
    assert counts[f"{prefix}:iteration_tokens_total_sum"] == computed > 20
    for family in found.values():
        for sample in family.samples:
            assert sample.labels["model_name"] == "m"
        if family.type == "histogram" and family.name.endswith("_seconds"):
            bounds = [float(one.labels["le"]) for one in family.samples if "le" in one.labels]
            assert bounds[-2:] == [50000.0, float("inf")]
    counts = {s.name: s.value for s in found[f"{prefix}:e2e_request_latency_seconds"].samples}
    assert counts[f"{prefix}:e2e_request_latency_seconds_count"] == 4


def test_metrics_of_speculation(open_llm):
    with open_llm(speculation="suffix") as llm, serving(llm) as server:
        speculate_always(llm.engine)
        fields = {"prompt": "x = 1\n" * 40, "max_tokens": 200, "temperature": 0}
        server.post("/v1/completions", **fields, ignore_eos=True)
        found, stats = families(server), llm.engine.stats()
    drafts = found["codellama_rt:spec_decode_num_drafts"]
    assert 0 < total(drafts) <= stats["draft_tokens"]
    by_position = by_label(
        found["codellama_rt:spec_decode_num_accepted_tokens_per_pos"], "position"
    )
    assert sum(by_position.values()) == stats["accepted_tokens"] > 0
    assert list(by_position) == [str(i) for i in range(len(by_position))]
    counts = [total(drafts), *by_position.values()]
    assert counts == sorted(counts, reverse=True)


def test_metrics_of_preemptions(open_llm):
    with (
        open_llm(kv_memory="150kB", block_size=16, max_model_len=256) as llm,
        serving(llm) as server,
    ):
        fields = {"prompt": ["a", "b", "c", "d"], "max_tokens": 200, "ignore_eos": True}
        server.post("/v1/completions", **fields)
        found, stats = families(server), llm.engine.stats()
    histogram = found["codellama_rt:request_num_preemptions"]
    counts = {one.name.rpartition("_")[2]: one.value for one in histogram.samples}
    assert (counts["count"], counts["sum"]) == (4, stats["preemptions"])
    assert stats["preemptions"] > 0


def test_metrics_of_a_cache_on_disk(open_llm, tmp_path):
    options = {"prefix_cache_dir": tmp_path, "prefix_cache_bytes": 10**7, "block_size": 16}
    prompt = "def f(x):\n    return x\n" * 9
    for is_first in (True, False):
        with open_llm(**options) as llm, serving(llm) as server:
            answer = server.post("/v1/completions", prompt=prompt, max_tokens=1)
            num_tokens = answer.json["usage"]["prompt_tokens"]
            found = families(server)
        queries, hits = (
            total(found[f"codellama_rt:external_prefix_cache_{name}"])
            for name in ("queries", "hits")
        )
        assert queries == num_tokens
        assert hits == (0 if is_first else num_tokens // 16 * 16)


def test_metrics_of_adapters(open_llm, tmp_path):
    with open_llm(max_num_seqs=1) as llm:
        write_adapter(tmp_path / "lora", llm.config)
        adapters = {name: llm.load_adapter(tmp_path / "lora") for name in ("mine", "other")}
        with serving(llm, names=("base",), adapters=adapters) as server:
            assert labels_of_adapters(server) == ("2", "", "")
            with contextlib.ExitStack() as connections, holding(llm.engine) as steps:
                for name in ("mine", "base", "other"):
                    body = {"model": name, "prompt": "a", "stream": True, "ignore_eos": True}
                    sent = request_bytes("/v1/completions", {**body, "max_tokens": 1900})
                    connection = connections.enter_context(server.connect())
                    connection.sendall(sent)
                    assert connection.recv(12) == b"HTTP/1.1 200"
                steps.allow()
                wait_for(lambda: labels_of_adapters(server) == ("2", "mine", "other"))


def labels_of_adapters(server):
    [sample] = families(server)["codellama_rt:lora_requests_info"].samples
    names = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
    return tuple(sample.labels[name] for name in names)


def test_the_dashboard_asks_for_metrics_that_exist(served):
    served.post("/v1/completions", prompt="a", max_tokens=2)
    board = json.loads((REPOSITORY / "examples" / "grafana_dashboard.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"codellama_rt:(\w+)", target["expr"])
    }
    assert len(asked) > 10
    text = served.get("/metrics").body.decode()
    for name in asked - {"admission_rejections_total"}:  # without one there is no sample
        assert f"codellama_rt:{name}{{" in text, name


def test_models(served):
    names = ["codellama", "codellama:7b"]
    for path in ("/v1/models", "/models"):
        assert [card["id"] for card in served.get(path).json["data"]] == names
    card = served.get("/v1/models/codellama:7b").json
    assert (card["root"], card["max_model_len"]) == ("codellama", 2048)


def test_adapters_are_models(folder, open_llm, tmp_path):
    with open_llm() as llm:
        write_adapter(tmp_path / "lora", llm.config)
        adapter = llm.load_adapter(tmp_path / "lora")
        expected = {
            name: llm.generate("def f(", SamplingParams(max_tokens=12), adapter=its)[0].text
            for name, its in (("base", None), ("mine", adapter))
        }
        assert expected["base"] != expected["mine"]
        with serving(llm, names=("base",), adapters={"mine": adapter}) as server:
            assert [card["parent"] for card in server.get("/v1/models").json["data"]] == [
                None,
                "base",
            ]
            for name, text in expected.items():
                fields = {"prompt": "def f(", "max_tokens": 12, "temperature": 0, "model": name}
                answer = server.post("/v1/completions", **fields).json
                assert (answer["model"], answer["choices"][0]["text"]) == (name, text)


def test_the_page_needs_no_other_host(served):
    answer = served.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = answer.body.decode()
    assert not re.search(r"https?://|src=|@import|url\(", page)
    paths = {path.lstrip("/") for _, paths, _ in ROUTES for path in paths}
    used = set(re.findall(r'(?:fetch|events|llamaCpp)\("([^"]+)"', page))
    assert used == {"completion", "infill", "v1/chat/completions", "v1/models"} <= paths


def test_the_description_has_every_path_and_field(served):
    found = served.get("/openapi.json").json
    assert found == description()
    paths = {paths[0] for _, paths, _ in ROUTES} - {"/", "/metrics", "/openapi.json"}
    assert {path for path in paths if "{" not in path} == found["paths"].keys()
    schema = found["components"]["schemas"]["CompletionRequest"]
    assert {"prompt", "suffix", "structured_outputs", "temperature"} <= schema["properties"].keys()
    assert schema["required"] == ["prompt"]


def test_a_closed_engine_is_not_healthy(folder):
    llm = LLM(folder, kv_memory="4MB")
    with serving(llm) as server:
        assert server.get("/health").status == 200
        llm.close()
        assert server.get("/health").status == 503
        assert server.post("/v1/completions", prompt="a").status in (500, 503)


def test_the_version(served):
    from codellama_rt import __version__

    assert served.get("/version").json == {"version": __version__}
