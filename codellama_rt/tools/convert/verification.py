"""Check a conversion: every tensor bit for bit, then the logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from codellama_rt.checkpoint import open_checkpoint
from codellama_rt.checkpoint.formats.pth import read_pth
from codellama_rt.checkpoint.formats.safetensors import read_safetensors
from codellama_rt.checkpoint.stored_tensor import Counter, Progress
from codellama_rt.errors import CheckpointError
from codellama_rt.llm.scoring import sequence_logits
from codellama_rt.model.llama import Llama
from codellama_rt.tools.convert.plan import Options, Plan

NUM_TOKENS = 24
# A different row order of q and k changes the order of the sums, and rounding after it. Over the 30
# layers of SmolLM2-135M this moves logits by 3 % of their spread in bfloat16 and by 6 % in int4
# (root mean square; single ones by 13 % and 33 %), not at all in float32. A wrong row order moves
# them by 68 %.
TOLERANCE = 0.2


def verify_tensors(plan: Plan, folder: Path, progress: Progress | None) -> None:
    """Read back every tensor and compare it with its source, converted again.

    Raises:
        CheckpointError: a tensor differs.
    """
    counter = Counter(plan.num_bytes, progress)
    for file, layout in plan.files.items():
        read = read_pth if file.endswith(".pth") else read_safetensors
        found = read(folder / file)
        for entry in layout.entries:
            tensor = found.get(entry.name)
            expected = entry.content()
            if tensor is None or not np.array_equal(tensor.payload, expected):
                raise CheckpointError(
                    f"{file}: tensor {entry.name!r}: expected the bytes that were written, found "
                    "different ones; the disk or the memory is faulty"
                )
            del expected
            tensor.release()
            plan.made_from[entry.name].release()
            counter.add(entry.num_bytes, "comparing tensors")


def verify_logits(source: Path, folder: Path, options: Options) -> None:
    """Run both models, one after the other, and compare the logits.

    Raises:
        CheckpointError: the logits differ by more than rounding explains.
    """
    expected = _logits(source, options.dtype, options.quantization)
    found = _logits(folder, "auto", None)
    difference, spread = np.sqrt(np.square(found - expected).mean()), expected.std()
    if not difference <= TOLERANCE * spread:
        raise CheckpointError(
            f"{folder.name}: expected the logits of {source}, found different ones: they differ by "
            f"{difference:.3g} (root mean square) and spread by {spread:.3g}"
        )


def _logits(path: Path, dtype: str, quantization: str | None) -> np.ndarray:
    checkpoint = open_checkpoint(path, dtype=dtype, quantization=quantization)
    vocab_size = checkpoint.config.vocab_size
    rng = np.random.default_rng(0)
    token_ids = rng.integers(vocab_size, size=NUM_TOKENS).tolist()
    return sequence_logits(Llama(checkpoint.config, checkpoint.weights), token_ids)
