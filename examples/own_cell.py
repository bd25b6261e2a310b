"""Build a MindSpore cell of the graph ops: the feed-forward part of a Llama layer, with its norm.

The cell computes the bits that direct calls compute. It can become a part of any graph. For
example:

    python examples/own_cell.py smollm2-135m-instruct
"""

import argparse

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn

import codellama_rt as clrt
from codellama_rt import ops
from codellama_rt.ops import graph


class FeedForward(nn.Cell):
    """x + down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self, layer, eps: float) -> None:
        """Make parameters of the weights of a layer.

        Args:
            layer: arrays mlp_norm (dim), gate_proj and up_proj (hidden_dim, dim), and down_proj
                (dim, hidden_dim).
            eps: of the norm.
        """
        super().__init__()
        self.eps = eps
        self.norm = _parameter(layer.mlp_norm, "norm")
        self.gate_proj = _parameter(layer.gate_proj, "gate_proj")
        self.up_proj = _parameter(layer.up_proj, "up_proj")
        self.down_proj = _parameter(layer.down_proj, "down_proj")

    @mindspore.jit
    def construct(self, x: Tensor) -> Tensor:  # (num_tokens, dim) float32
        """Return the residual stream after the sublayer, (num_tokens, dim)."""
        normalized = graph.rms_norm(x, self.norm, self.eps)
        gate_up = graph.linear(normalized, (self.gate_proj, self.up_proj))
        return x + graph.linear(graph.silu_and_mul(gate_up), self.down_proj)


def _parameter(array: np.ndarray, name: str) -> Parameter:
    return Parameter(Tensor.from_numpy(array.copy()), name=name, requires_grad=False)


def direct(layer, eps: float, x: np.ndarray) -> np.ndarray:
    """Compute the same with direct calls."""
    normalized = ops.rms_norm(x, layer.mlp_norm, eps)
    gate_up = ops.linear(normalized, (layer.gate_proj, layer.up_proj))
    return x + ops.linear(ops.silu_and_mul(gate_up), layer.down_proj)


def main() -> None:
    """Run the first layer's feed-forward part of a model both ways, and compare the bits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="directory, GGUF file, name or hub id")
    args = parser.parse_args()

    with clrt.LLM(args.model, dtype="bfloat16") as llm:
        layer, eps = llm.model.weights.layers[0], llm.config.norm_eps
        cell = FeedForward(layer, eps)
        x = np.random.default_rng(0).standard_normal((5, llm.config.dim), np.float32)
        computed = cell(Tensor.from_numpy(x)).asnumpy()
        assert np.array_equal(computed, direct(layer, eps, x))
        print(f"{computed.shape} float32, the same bits as by direct calls")


if __name__ == "__main__":
    main()
