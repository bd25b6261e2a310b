"""GET /metrics, for Prometheus, under vLLM's names and types."""

from __future__ import annotations

from collections.abc import Iterator
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
}
# Those of an engine that speculates, or whose prefixes are on disk.
_OPTIONAL_COUNTERS = {
    "spec_decode_num_draft_tokens": ("draft_tokens", "Tokens proposed."),
    "spec_decode_num_accepted_tokens": ("accepted_tokens", "Proposed tokens that were right."),
    "external_prefix_cache_hits": ("prefix_restored_tokens", "Tokens read from disk."),
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": "first_token_seconds",
    "inter_token_latency_seconds": "inter_token_seconds",
    "e2e_request_latency_seconds": "total_seconds",
    "request_queue_time_seconds": "queue_seconds",
    "request_prefill_time_seconds": "prefill_seconds",
    "request_prompt_tokens": "prompt_tokens",
    "request_generation_tokens": "output_tokens",
    "step_time_seconds": "step_seconds",
}


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
        for name, (entry, text) in _OPTIONAL_COUNTERS.items():
            if entry in stats:
                yield self._family(CounterMetricFamily, name, text, [({}, stats[entry])])
        yield from self._by_label(stats)
        for name, entry in _HISTOGRAMS.items():
            yield self._histogram(name, stats["histograms"][entry])
        for name, histogram in self._service.observed.histograms.items():
            yield self._histogram(name, histogram.snapshot())

    def _by_label(self, stats: dict[str, Any]) -> Iterator[Metric]:
        reasons = [({"finished_reason": k}, v) for k, v in stats["finish_reasons"].items()]
        yield self._family(CounterMetricFamily, "request_success", "Outputs that ended.", reasons)
        rejected = [({"reason": k}, v) for k, v in self._service.observed.rejections.items()]
        yield self._family(CounterMetricFamily, "admission_rejections", "Answers 503.", rejected)
        waiting = [({"reason": "capacity"}, stats["waiting"]), ({"reason": "deferred"}, 0)]
        yield self._family(
            GaugeMetricFamily, "num_requests_waiting_by_reason", "Sequences that wait.", waiting
        )
        cache = self._service.engine.engine.kv_cache
        sizes = {"block_size": str(cache.block_size), "num_gpu_blocks": str(cache.num_blocks)}
        yield self._family(GaugeMetricFamily, "cache_config_info", "The KV cache.", [(sizes, 1)])

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
