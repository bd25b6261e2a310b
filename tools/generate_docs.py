"""Write the op tables of docs/operators.md and of csrc's README files from the schema.

With `--check`, write nothing and fail if a table does not match the schema.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- op table: written by tools/generate_docs.py -->", "<!-- end of op table -->"
# Code Llama 7B over bfloat16 weights and cache; `linear` is its widest, gate and up in one.
SIZES = {
    "num_keys": 16384,
    "num_seqs": 1,
    "num_positions": 16384,
    "num_blocks": 256,
    "max_blocks": 256,
    "block_size": 64,
    "num_pairs": 8,
    "n_heads": 32,
    "n_kv_heads": 32,
    "head_dim": 128,
    "dim": 4096,
    "hidden_dim": 11008,
    "in_features": 4096,
    "out_features": 22016,
    "vocab_size": 32016,
}
STORED = ("table", "weight", "cache", "key", "value", "norm", "proj")  # bfloat16; the rest float32


def load_schema() -> ModuleType:
    """Return the schema alone: it imports nothing, so no kernel has to be built."""
    path = REPOSITORY / "codellama_rt" / "ops" / "schema.py"
    spec = importlib.util.spec_from_file_location("schema", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["schema"] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


SCHEMA = load_schema()


def short_table() -> str:
    """Return the table for users: what to call and what it does."""
    rows = [("op", "what it does"), ("---", "---")]
    for op in SCHEMA.OPS.values():
        rows.append((f"`{op.name}({', '.join([*op.inputs, *attributes(op)])})`", op.doc))
    return table(rows)


def full_table() -> str:
    """Return the table for kernels: shapes, dtypes, what is written, and what bounds it."""
    heads = (
        "op",
        "inputs",
        "outputs",
        "attributes",
        "requires",
        "bytes at 1 token",
        "FLOP/byte at 1 / 512",
        "source file",
        "from",
    )
    rows = [heads, ("---",) * len(heads)]
    for op in SCHEMA.OPS.values():
        inputs = "; ".join(describe(name, tensor) for name, tensor in op.inputs.items())
        outputs = "; ".join(describe(name, tensor) for name, tensor in op.outputs.items())
        at_one, intensity = cost(op, 1), [f"{cost(op, n)[1]:.3g}" for n in (1, 512)]
        rows.append(
            (
                f"`{op.name}`",
                inputs,
                outputs or "in place",
                ", ".join(attributes(op)),
                ", ".join(f"`{rule}`" for rule in op.constraints),
                size(at_one[0]),
                " / ".join(intensity),
                f"[{source_file(op.name)}]({source_file(op.name)})",
                op.source,
            )
        )
    return table(rows)


def describe(name: str, tensor: object) -> str:
    """Return `name` (axes) dtype, and whether it is written."""
    floats = {
        SCHEMA.FLOATS: "float",
        SCHEMA.CACHED: "float, int8 or int4",
        SCHEMA.WEIGHTS: "float or quantised",
        SCHEMA.INT32: "int32",
        SCHEMA.FLOAT32: "float32",
    }
    dtype = f"as `{tensor.dtypes[1:]}`" if isinstance(tensor.dtypes, str) else floats[tensor.dtypes]
    text = f"`{name}` ({', '.join(tensor.axes)}) {dtype}".replace("*", "\\*")
    return text + (", **written**" * tensor.written) + (", up to three" * tensor.repeated)


def attributes(op: object) -> list[str]:
    """Return the attributes as keyword arguments."""
    return [f"{name}={attribute.default}" for name, attribute in op.attributes.items()]


def cost(op: object, num_tokens: int) -> tuple[int, float]:
    """Return bytes, and FLOPs per byte, of a step of the 7B model at 16,384 tokens."""
    keys = SIZES["num_keys"]
    scores = num_tokens * (keys - num_tokens) + num_tokens * (num_tokens + 1) // 2
    sizes = SIZES | {"num_tokens": num_tokens, "num_scores": scores}
    items = {}
    for name, tensor in {**op.inputs, **op.outputs}.items():
        stored = name in ("key", "value") and op.name == "flash_attention"
        stored |= name not in ("key", "value") and name.endswith(STORED)
        is_float = tensor.dtypes not in (SCHEMA.INT32, SCHEMA.FLOAT32)
        dtype = "bfloat16" if stored and is_float else "float32"
        items[name] = SCHEMA.ITEM_SIZE[dtype]
    num_bytes = op.num_bytes(sizes, items)
    return num_bytes, op.flops(sizes) / num_bytes


def size(num_bytes: int) -> str:
    """Return a size with a unit."""
    for unit, scale in (("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes} B"


def source_file(name: str) -> str:
    """Return the kernel's file, beside csrc/README.md; `add_rms_norm` lives with `rms_norm`."""
    for stem in (name, name.partition("_")[2]):
        for folder in ("ops", "attention", "linear"):
            path = f"cpu/{folder}/{stem}.cc"
            if (REPOSITORY / "csrc" / path).is_file():
                return path
    raise FileNotFoundError(f"no kernel file for {name} in csrc")


def table(rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def replaced(text: str, content: str) -> str:
    """Return the text with the part between the two markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the file must contain the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


ASCEND_OPS = (
    "rms_norm",
    "add_rms_norm",
    "rope_and_cache",
    "reshape_and_cache",
    "paged_attention",
    "silu_and_mul",
)
HBM_BYTES_PER_SECOND = 1.6e12  # of an Atlas A2 (910B), by its vendor's data sheet


def ascend_table() -> str:
    """Return the bytes the Ascend kernels move for one token, and the minimum time for them."""
    rows = [("op", "bytes at 1 token", "FLOP/byte", "floor"), ("---",) * 4]
    for name in ASCEND_OPS:
        op = SCHEMA.OPS[name]
        items = {}
        for argument, tensor in {**op.inputs, **op.outputs}.items():
            fixed = tensor.dtypes in (SCHEMA.INT32, SCHEMA.FLOAT32)
            items[argument] = SCHEMA.ITEM_SIZE["float32" if fixed else "float16"]
        sizes = SIZES | {"num_tokens": 1, "num_scores": SIZES["num_keys"]}
        num_bytes = op.num_bytes(sizes, items)
        floor_us = num_bytes / HBM_BYTES_PER_SECOND * 1e6
        intensity = op.flops(sizes) / num_bytes
        rows.append((f"`{name}`", size(num_bytes), f"{intensity:.3g}", f"{floor_us:.3g} us"))
    return table(rows)


DOCUMENTS: dict[str, Callable[[], str]] = {
    "docs/operators.md": short_table,
    "csrc/README.md": full_table,
    "csrc/ascend/README.md": ascend_table,
}


def main() -> None:
    """Write or check every document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    args = parser.parse_args()
    for name, make in DOCUMENTS.items():
        path = REPOSITORY / name
        old = path.read_text(encoding="utf-8")
        new = replaced(old, make())
        if new != old and args.check:
            sys.exit(f"{name}: the op table differs from the schema; run tools/generate_docs.py")
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
