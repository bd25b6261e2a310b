"""`codellama-rt convert` and `codellama-rt estimate`: what comes before a model is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from codellama_rt.cli.errors import reported_errors, tell

_Debug = Annotated[bool, typer.Option("--debug", help="Errors with their traceback.")]


def convert(
    model: Annotated[
        str, typer.Argument(help="Directory in Meta's or Hugging Face's layout, GGUF file or name.")
    ],
    out: Annotated[Path, typer.Option(help="The directory to write; nothing may be there.")],
    to: Annotated[
        str, typer.Option(help="Layout: huggingface (safetensors), meta (consolidated.*.pth).")
    ] = "huggingface",
    quantization: Annotated[
        str | None, typer.Option(help="Of the weights: int8, int4; it opens as it lies.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the floats: auto (their own), float32, float16, bfloat16.")
    ] = "auto",
    shards: Annotated[int, typer.Option(help="Files of Meta's layout.")] = 1,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare tensors and logits with the source.")
    ] = False,
    debug: _Debug = False,
) -> None:
    """Write a checkpoint in another layout, or with quantised weights.

    Interrupted, it leaves no checkpoint, and the same command goes on where it was.
    """
    with reported_errors(debug):
        from codellama_rt.cli.progress import ProgressBar
        from codellama_rt.tools.convert.convert import convert as write_converted

        with ProgressBar(f"converting {model}") as bar:
            written = write_converted(
                model, out, to=to, quantization=quantization, dtype=dtype, shards=shards,
                verify=verify, progress=bar.update,
            )  # fmt: skip
        size = sum(file.stat().st_size for file in written.iterdir())
        verified = "; tensors and logits are those of the source" if verify else ""
        tell(f"{written}: {size / 1e9:.2f} GB{verified}")


def estimate(
    model: Annotated[
        str, typer.Argument(help="A checkpoint, a config.json, or a name such as CodeLlama-34b.")
    ],
    context: Annotated[
        int | None, typer.Option(help="Tokens a sequence; what the model was trained at.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, ascend; for a GPU see --memory.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto, float32, float16, bfloat16.")
    ] = "auto",
    quantization: Annotated[str | None, typer.Option(help="Of the weights: int8, int4.")] = None,
    kv_dtype: Annotated[
        str, typer.Option(help="Of the KV cache: auto, float32, float16, bfloat16, int8, int4.")
    ] = "auto",
    memory: Annotated[
        str | None, typer.Option(help="To fit into, such as 80GB; by default what is free here.")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(help="Read in a second, such as 3350GB; by default measured here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, in bytes.")] = False,
    debug: _Debug = False,
) -> None:
    """Tell what a model takes of memory, what of it fits here, and how fast it can be at most.

    Nothing but headers is read, and for a published name or a config.json no file is needed. With
    --memory and --bandwidth the figures are those of another machine.
    """
    with reported_errors(debug):
        from codellama_rt.cli import estimate_report
        from codellama_rt.llm.arguments import require_options
        from codellama_rt.llm.memory import available_bytes, parse_bytes
        from codellama_rt.llm.memory_plan import find_model
        from codellama_rt.llm.plan import Plan
        from codellama_rt.llm.variants import find_variant, require_length
        from codellama_rt.tools.limits import read_bandwidth

        if device == "cuda":
            raise ValueError(
                "estimate counts what runs on the host take; for a GPU give its --memory and "
                "--bandwidth: weights and caches in floats take the same bytes there"
            )
        require_options(device, kv_dtype, quantization, context=context, batch=batch)
        require_length(find_variant(model), context)
        opened = find_model(model)
        length = context or opened.config.max_position_embeddings
        available = available_bytes() if memory is None else parse_bytes(memory)
        speed = read_bandwidth() if bandwidth is None else parse_bytes(bandwidth)
        ways = estimate_report.compare(
            opened,
            Plan(device=device, dtype=dtype, quantization=quantization, kv_dtype=kv_dtype),
            context=length,
            num_seqs=batch,
            available=available,
            bandwidth=speed,
        )
        if as_json:
            print(json.dumps(estimate_report.as_json(ways, available, speed), indent=1))
        else:
            print(estimate_report.render(ways, length, batch, available, speed))
