"""OpenVINO GenAI on a GGUF file: prompts and batches of sequences, by its own counters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from orders import serve


class OpenVino:
    """One model on the CPU."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def open(self, model: str, threads: int, vocab_size: int) -> dict:
        """Read a GGUF file; the floats are computed as OpenVINO chooses."""
        self.vocab_size = vocab_size
        settings = {"INFERENCE_NUM_THREADS": threads}
        self.pipeline = openvino_genai.LLMPipeline(Path(model), "CPU", settings)
        return {"version": openvino_genai.__version__}

    def batch(self, num_seqs: int, depth: int, steps: int) -> dict:
        """Return the seconds of a step of all sequences, after prompts of `depth` tokens."""
        # Its mean time per token is divided by the sequences; the times of the steps are not.
        at = self._generate(num_seqs, depth, steps + 1).raw_metrics.m_new_token_times
        return {"seconds": float(np.median(np.diff(at))) / 1e3}

    def prefill(self, num_tokens: int) -> dict:
        """Return the seconds of one prompt, up to its first new token."""
        return {"seconds": self._generate(1, num_tokens, 1).get_ttft().mean / 1e3}

    def _generate(self, num_seqs: int, num_tokens: int, new: int) -> openvino_genai.PerfMetrics:
        ids = self.rng.integers(3, self.vocab_size, (num_seqs, num_tokens))
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
        )
        settings = openvino_genai.GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, ignore_eos=True, do_sample=False
        )
        return self.pipeline.generate(inputs, settings).perf_metrics


if __name__ == "__main__":
    serve(OpenVino())
