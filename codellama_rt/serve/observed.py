"""What is counted of requests, besides what the engine counts itself."""

from __future__ import annotations

from collections import Counter

from codellama_rt.engine.metrics import TOKEN_BUCKETS, Histogram
from codellama_rt.engine.output import Output
from codellama_rt.engine.sampling_params import SamplingParams

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
           120.0, 300.0, 600.0, 1800.0, 7200.0, 20000.0, 50000.0)  # fmt: skip
_SAMPLES = (1.0, 2.0, 5.0, 10.0, 20.0, 64.0)


class Observed:
    """Histograms of requests, by vLLM's names."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.histograms = {
            "request_params_n": Histogram(_SAMPLES),
            "request_params_max_tokens": Histogram(TOKEN_BUCKETS),
            "request_inference_time_seconds": Histogram(SECONDS),
            "request_decode_time_seconds": Histogram(SECONDS),
            "request_time_per_output_token_seconds": Histogram(SECONDS),
            "request_prefill_kv_computed_tokens": Histogram(TOKEN_BUCKETS),
        }
        self.rejections: Counter[str] = Counter()  # answers of 503, by reason

    def begin(self, params: SamplingParams) -> None:
        """Count a request's parameters."""
        self.histograms["request_params_n"].observe(params.n)
        if params.max_tokens is not None:
            self.histograms["request_params_max_tokens"].observe(params.max_tokens)

    def end(self, output: Output) -> None:
        """Count the times of a sample that has ended."""
        times = output.metrics
        computing = times.total_seconds - times.queue_seconds
        decode = computing - times.prefill_seconds
        self.histograms["request_inference_time_seconds"].observe(computing)
        self.histograms["request_decode_time_seconds"].observe(decode)
        if times.output_tokens > 1:
            per_token = decode / (times.output_tokens - 1)
            self.histograms["request_time_per_output_token_seconds"].observe(per_token)
        if output.index == 0:
            computed = times.prompt_tokens - times.cached_tokens
            self.histograms["request_prefill_kv_computed_tokens"].observe(computed)
