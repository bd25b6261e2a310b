"""torch: the matrix products of a layer, in every float dtype."""

from __future__ import annotations

from time import perf_counter

import torch
from orders import serve

COPIES_BYTES = 2**28  # of weights used in turn: more than any cache


class Torch:
    """Weights of one shape."""

    def open(self, n: int, k: int, dtype: str, threads: int) -> dict:
        """Make weights (n, k) that take turns."""
        torch.set_num_threads(threads)
        kind = getattr(torch, dtype)
        copies = max(1, COPIES_BYTES // (n * k * kind.itemsize))
        self.weights = [torch.randn(n, k).to(kind) for _ in range(copies)]
        return {"version": torch.__version__}

    def linear(self, num_tokens: int, runs: int) -> dict:
        """Return the seconds of each run of x (num_tokens, k) times a weight transposed."""
        x = torch.randn(num_tokens, self.weights[0].shape[1]).to(self.weights[0].dtype)
        seconds = []
        with torch.inference_mode():
            for i in range(runs):
                started = perf_counter()
                torch.nn.functional.linear(x, self.weights[i % len(self.weights)])
                seconds.append(perf_counter() - started)
        return {"seconds": seconds}


if __name__ == "__main__":
    serve(Torch())
