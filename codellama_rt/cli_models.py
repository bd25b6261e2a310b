"""`codellama-rt convert` and `codellama-rt estimate`: what comes before a model is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from codellama_rt.cli_errors import reported_errors, tell

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
        from codellama_rt.convert import convert as write_converted
        from codellama_rt.progress import ProgressBar

        with ProgressBar(f"converting {model}") as bar:
            written = write_converted(
                model, out, to=to, quantization=quantization, dtype=dtype, shards=shards,
                verify=verify, progress=bar.update,
            )  # fmt: skip
        size = sum(file.stat().st_size for file in written.iterdir())
        verified = "; tensors and logits are those of the source" if verify else ""
        tell(f"{written}: {size / 1e9:.2f} GB{verified}")
