"""What surrounds the endpoints: metrics, models, the page, the API's description, adapters."""

import json
import re
from pathlib import Path

import pytest
from helpers.adapter_files import write_adapter
from helpers.served import serving
from prometheus_client.parser import text_string_to_metric_families

from codellama_rt import LLM, SamplingParams
from codellama_rt.serve.app import ROUTES
from codellama_rt.serve.openapi import description

REPOSITORY = Path(__file__).resolve().parents[2]
VLLM = """
    gauge: num_requests_running num_requests_waiting num_requests_waiting_by_reason
    gauge: kv_cache_usage_perc cache_config_info
    counter: prompt_tokens generation_tokens prompt_tokens_cached request_success num_preemptions
    counter: prefix_cache_queries prefix_cache_hits admission_rejections
    counter: spec_decode_num_draft_tokens spec_decode_num_accepted_tokens
    histogram: time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds
    histogram: request_time_per_output_token_seconds request_queue_time_seconds
    histogram: request_inference_time_seconds request_prefill_time_seconds
    histogram: request_decode_time_seconds request_prompt_tokens request_generation_tokens
    histogram: request_params_n request_params_max_tokens request_prefill_kv_computed_tokens
"""


def families(server):
    text = server.get("/metrics").body.decode()
    return {one.name: one for one in text_string_to_metric_families(text)}


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

    def total(name):
        return sum(one.value for one in found[f"{prefix}:{name}"].samples)

    assert total("generation_tokens") == 20
    assert total("request_success") == 4
    assert total("prompt_tokens_cached") > 0
    for family in found.values():
        for sample in family.samples:
            assert sample.labels["model_name"] == "m"
        if family.type == "histogram" and family.name.endswith("_seconds"):
            bounds = [float(one.labels["le"]) for one in family.samples if "le" in one.labels]
            assert bounds[-2:] == [50000.0, float("inf")]
    counts = {s.name: s.value for s in found[f"{prefix}:e2e_request_latency_seconds"].samples}
    assert counts[f"{prefix}:e2e_request_latency_seconds_count"] == 4


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
