"""`codellama-rt convert` and `codellama-rt estimate`: what comes before a model is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from codellama_rt.cli.errors import reported_errors, tell
from codellama_rt.cli.options import (
    DebugOption,
    DeviceOption,
    DtypeName,
    DtypeOption,
    KvDtypeOption,
    QuantizationName,
    QuantizationOption,
    RepackOption,
    checked_size,
)


def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Directory in Meta's or Hugging Face's layout, GGUF file, hub id or short name.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist yet.")],
    to: Annotated[
        Literal["huggingface", "meta"],
        typer.Option(help="Layout: huggingface (safetensors) or meta (consolidated.*.pth)."),
    ] = "huggingface",
    quantization: Annotated[
        QuantizationName | None,
        typer.Option(help="Quantise the weights; the result opens as it lies."),
    ] = None,
    dtype: Annotated[
        DtypeName, typer.Option(help="Dtype of the floats; auto: as stored.")
    ] = "auto",
    shards: Annotated[int, typer.Option(help="Number of files of Meta's layout.")] = 1,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare tensors and logits with the source.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Write a checkpoint in another layout, or with quantised weights.

    If interrupted, no loadable directory is left behind; rerun the command to resume.
    """
    with reported_errors(debug):
        from codellama_rt.cli.progress import ProgressBar
        from codellama_rt.tools.convert.convert import convert as write_converted

        with ProgressBar(f"converting {model}") as bar:
            written = write_converted(
                model,
                out,
                to=to,
                quantization=quantization,
                dtype=dtype,
                shards=shards,
                verify=verify,
                progress=bar.update,
            )
        size = sum(file.stat().st_size for file in written.iterdir())
        verified = "; tensors and logits are those of the source" if verify else ""
        tell(f"{written}: {size / 1e9:.2f} GB{verified}")


def estimate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint, a config.json, or a name such as CodeLlama-34b.",
            show_default=False,
        ),
    ],
    context: Annotated[
        int | None, typer.Option(help="Tokens per sequence (default: what the model says).")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    repack: RepackOption = True,
    kv_dtype: KvDtypeOption = "auto",
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            callback=checked_size,
            help="Memory to fit into, such as 80GB (default: free here).",
        ),
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            callback=checked_size,
            help="Read bandwidth per second, such as 3350GB (default: measured).",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
    debug: DebugOption = False,
) -> None:
    """Estimate a model's memory, what of it fits here, and its highest possible speed.

    Only headers are read; a published name or a config.json needs no checkpoint at all. With
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
                "--device cuda: estimate counts what a run on the host takes; for a GPU give its "
                "--memory and --bandwidth: weights and caches in floats take the same bytes there"
            )
        require_options(device, kv_dtype, quantization, context=context, batch=batch)
        require_length(find_variant(model), context)
        opened = find_model(model)
        length = context or opened.config.max_position_embeddings
        available = available_bytes() if memory is None else parse_bytes(memory)
        speed = read_bandwidth() if bandwidth is None else parse_bytes(bandwidth)
        ways = estimate_report.compare(
            opened,
            Plan(
                device=device,
                dtype=dtype,
                quantization=quantization,
                repack=repack,
                kv_dtype=kv_dtype,
            ),
            context=length,
            num_seqs=batch,
            available=available,
            bandwidth=speed,
        )
        if as_json:
            print(json.dumps(estimate_report.as_json(ways, available, speed), indent=1))
        else:
            print(estimate_report.render(ways, length, batch, available, speed))
