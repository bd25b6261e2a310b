"""GET /metrics, for Prometheus, under vLLM's names and types."""

from __future__ import annotations

from collections.abc import Iterator
from time import time
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from starlette.requests import Request
from starlette.responses import Response

from codellama_rt.serve.service import Service

# name -> (entry of Engine.stats(), help)
_GAUGES = {
    "num_requests_running": ("running", "Sequences that are being computed."),
    "num_requests_waiting": ("waiting", "Sequences that wait for their turn."),
    "kv_cache_usage_perc": ("kv_usage", "Used part of the KV cache, 0 to 1."),
    "gpu_cache_usage_perc": ("kv_usage", "An older name of kv_cache_usage_perc."),
    "pending_prompt_tokens": ("pending_prompt_tokens", "Prompt tokens yet to be computed."),
}
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "generation_tokens": ("generated_tokens", "Tokens generated."),
    "prompt_tokens_cached": ("prefix_hit_tokens", "Prompt tokens found in the prefix cache."),
    "num_preemptions": ("preemptions", "Sequences that lost their blocks for a while."),
    "prefix_cache_queries": ("prefix_queried_tokens", "Tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_hit_tokens", "Tokens found there."),
    "gpu_prefix_cache_queries": ("prefix_queried_tokens", "An older name."),
    "gpu_prefix_cache_hits": ("prefix_hit_tokens", "An older name."),
    "corrupted_requests": ("corrupt_outputs", "Outputs that ended with logits of NaN."),
    "spec_decode_num_draft_tokens": ("draft_tokens", "Tokens proposed."),
    "spec_decode_num_accepted_tokens": ("accepted_tokens", "Proposed tokens that were right."),
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": "first_token_seconds",
    "inter_token_latency_seconds": "inter_token_seconds",
    "e2e_request_latency_seconds": "total_seconds",
    "request_queue_time_seconds": "queue_seconds",
    "request_prefill_time_seconds": "prefill_seconds",
    "request_prompt_tokens": "prompt_tokens",
    "request_generation_tokens": "output_tokens",
    "request_num_preemptions": "preemptions",
    "iteration_tokens_total": "step_tokens",
    "step_time_seconds": "step_seconds",
}
_SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")


async def metrics(request: Request) -> Response:
    """Return all metrics in Prometheus' text format."""
    service: Service = request.app.state.service
    registry = CollectorRegistry()
    registry.register(_Collector(service))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Collector:
    """The metrics of a service as of now."""

    def __init__(self, service: Service) -> None:
        self._service, self._prefix = service, service.settings.metrics_prefix
        self._labels = {"model_name": service.names[0], "engine": "0"}

    def describe(self) -> list[Metric]:
        """Return nothing: the metrics have no fixed list."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        stats = self._service.engine.engine.stats()
        for name, (entry, text) in _GAUGES.items():
            yield self._family(GaugeMetricFamily, name, text, [({}, stats[entry])])
        for name, (entry, text) in _COUNTERS.items():
            yield self._family(CounterMetricFamily, name, text, [({}, stats[entry])])
        yield from self._of_the_disk(stats)
        yield from self._of_drafts(stats["drafts"])
        yield from self._by_label(stats)
        if self._service.settings.adapters:
            yield self._of_adapters()
        for name, entry in _HISTOGRAMS.items():
            yield self._histogram(name, stats["histograms"][entry])
        for name, histogram in self._service.observed.histograms.items():
            yield self._histogram(name, histogram.snapshot())

    def _by_label(self, stats: dict[str, Any]) -> Iterator[Metric]:
        reasons = [({"finished_reason": k}, v) for k, v in stats["finish_reasons"].items()]
        yield self._family(CounterMetricFamily, "request_success", "Outputs that ended.", reasons)
        rejected = [({"reason": k}, v) for k, v in self._service.observed.rejections.items()]
        yield self._family(CounterMetricFamily, "admission_rejections", "Answers 503.", rejected)
        deferred = stats.get("waiting_for_disk", 0)
        waiting = [
            ({"reason": "capacity"}, max(0, stats["waiting"] - deferred)),
            ({"reason": "deferred"}, deferred),
        ]
        yield self._family(
            GaugeMetricFamily, "num_requests_waiting_by_reason", "Sequences that wait.", waiting
        )
        states = [({"sleep_state": name}, int(name == "awake")) for name in _SLEEP_STATES]
        yield self._family(GaugeMetricFamily, "engine_sleep_state", "It never sleeps.", states)
        cache = self._service.engine.engine.kv_cache
        sizes = {"block_size": str(cache.block_size), "num_gpu_blocks": str(cache.num_blocks)}
        yield self._family(GaugeMetricFamily, "cache_config_info", "The KV cache.", [(sizes, 1)])

    def _of_the_disk(self, stats: dict[str, Any]) -> Iterator[Metric]:
        """Yield what was looked up on disk: tokens that were not in memory, or are from there."""
        hits = stats.get("prefix_restored_tokens")
        missed = stats["prefix_queried_tokens"] - stats["prefix_hit_tokens"]
        for name, text, value in (
            ("queries", "Tokens looked up on disk.", 0 if hits is None else missed + hits),
            ("hits", "Tokens read from disk.", hits or 0),
        ):
            name = f"external_prefix_cache_{name}"
            yield self._family(CounterMetricFamily, name, text, [({}, value)])

    def _of_drafts(self, drafts: dict[int, int]) -> Iterator[Metric]:
        """Yield counts of drafts, given how many had which number of right tokens."""
        name, text = "spec_decode_num_drafts", "Decoding steps of a sequence with a proposal."
        yield self._family(CounterMetricFamily, name, text, [({}, sum(drafts.values()))])
        by_position = [
            ({"position": str(i)}, sum(times for right, times in drafts.items() if right > i))
            for i in range(max(drafts, default=0))
        ]
        name = "spec_decode_num_accepted_tokens_per_pos"
        text = "Proposed tokens that were right, by their place."
        yield self._family(CounterMetricFamily, name, text, by_position)

    def _of_adapters(self) -> Metric:
        """Return which adapters are at work; the value is the time of this answer."""
        scheduler, adapters = self._service.engine.engine.scheduler, self._service.settings.adapters
        labels = {"max_lora": str(len(adapters))}
        for state in ("running", "waiting"):
            used = {id(sequence.adapter) for sequence in list(getattr(scheduler, state))}
            names = [name for name, adapter in adapters.items() if id(adapter) in used]
            labels[f"{state}_lora_adapters"] = ",".join(names)
        text = "Adapters at work."
        return self._family(GaugeMetricFamily, "lora_requests_info", text, [(labels, time())])

    def _family(
        self, kind: Any, name: str, text: str, samples: list[tuple[dict[str, str], float]]
    ) -> Metric:
        family = kind(f"{self._prefix}:{name}", text)
        suffix = "_total" if kind is CounterMetricFamily else ""
        for labels, value in samples:
            labels = {**self._labels, **labels}
            family.add_sample(f"{self._prefix}:{name}{suffix}", labels, value)
        return family

    def _histogram(self, name: str, counts: dict[str, Any]) -> Metric:
        family = HistogramMetricFamily(
            f"{self._prefix}:{name}", name.replace("_", " "), labels=list(self._labels)
        )
        buckets = [(str(bound), count) for bound, count in counts["buckets"]]
        buckets.append(("+Inf", counts["count"]))
        family.add_metric(list(self._labels.values()), buckets, counts["sum"])
        return family
