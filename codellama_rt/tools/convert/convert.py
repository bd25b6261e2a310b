"""Convert any readable checkpoint to Meta's layout, Hugging Face's layout, or a quantised one.

Tensors are read, converted and written one at a time. Everything is written to a directory with a
temporary name (`journal`), which is renamed when it is complete; the file without which no
checkpoint opens is written last. After an interruption, the next run resumes.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codellama_rt.checkpoint.formats.meta_directory import is_meta_directory
from codellama_rt.checkpoint.formats.tensor_file import Entry, sync, write_tensor_file
from codellama_rt.checkpoint.model_names import resolve_model
from codellama_rt.checkpoint.open import resolve
from codellama_rt.checkpoint.quantize import check_quantization, is_quantized
from codellama_rt.checkpoint.stored_tensor import Counter, Progress, StoredModel, mapped_files
from codellama_rt.errors import CheckpointError
from codellama_rt.ops.dtypes import FLOAT_DTYPES
from codellama_rt.tools.convert.journal import Journal
from codellama_rt.tools.convert.plan import (
    HUGGING_FACE,
    META,
    TARGETS,
    Options,
    Plan,
    make_plan,
    with_dtype,
    write_texts,
)

_FORMAT = 1  # of the work directory: a different format starts over
_TOKENIZER = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "LICENSE*",
    "USE_POLICY*",
)
_COMPANIONS = (  # files that belong to a model and are copied unchanged
    *_TOKENIZER,
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str = HUGGING_FACE,
    quantization: str | None = None,
    dtype: str = "auto",
    shards: int = 1,
    verify: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint in another layout or quantised.

    Memory is bounded by the largest tensor, whatever the model; `verify` needs as much as running
    the model. If interrupted, no loadable directory is left behind; repeat the call to resume.

    Args:
        model: a directory in Meta's or Hugging Face's layout, a GGUF file, or a name for one.
        out: the directory to create; it must not exist.
        to: "huggingface" (safetensors) or "meta" (consolidated.00.pth and params.json).
        quantization: "int8" or "int4", for the projections and the head; not in Meta's layout.
        dtype: of all floats: "float32", "float16", "bfloat16"; "auto" keeps each tensor's own, or
            uses bfloat16 if some are in GGUF's blocks.
        shards: number of files in Meta's layout.
        verify: compare the result bit for bit, and the logits, before the final rename.
        progress: called with bytes done, total bytes, and a description.

    Returns:
        `out`.

    Raises:
        CheckpointError: the model cannot be read, is already quantised or is written meanwhile, or
            verification failed.
        ValueError: an unknown option, options that contradict each other, or nothing to convert.
        FileExistsError: `out` exists.
        RuntimeError: another process is writing it.
        OSError: it cannot be written; finished work is kept for the next run.

    Example:
        >>> convert("CodeLlama-7b", "CodeLlama-7b-hf")  # doctest: +SKIP
        PosixPath('CodeLlama-7b-hf')
    """
    options = _checked(Options(to, quantization, dtype, shards))
    path, out = resolve_model(model), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} already exists; give --out another name, or remove it")
    stored = resolve(path)
    _check_source(stored, options)
    options = with_dtype(stored, options)
    plan, source = make_plan(stored, options), mapped_files(stored.tensors.values())
    with Journal(out, _identity(path, stored, options)) as journal:
        try:
            _check_space(plan, journal)
            _check_sums(stored, progress)
            _write_tensors(plan, journal, options, progress, source.check)
            _write_companions(stored, journal.output, options)
            write_texts(plan, journal.output, _write_file)
            if verify:
                _verify(plan, path, journal.output, options, progress)
            source.check()
            journal.output.rename(out)
            journal.discard()
        except (CheckpointError, ValueError):  # it would fail again
            journal.discard()
            raise
    return out


def _checked(options: Options) -> Options:
    check_quantization(options.quantization)
    for name, value, known in (
        ("to", options.to, TARGETS),
        ("dtype", options.dtype, ("auto", *FLOAT_DTYPES)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if isinstance(options.shards, bool) or not isinstance(options.shards, int):
        raise TypeError(f"shards must be an int, got {type(options.shards).__name__}")
    if options.shards < 1 or (options.shards > 1 and options.to != META):
        raise ValueError(f"shards must be 1 or more files of Meta's layout, got {options.shards}")
    if options.quantization is not None and options.to == META:
        raise ValueError("Meta's layout does not support quantised weights; omit quantization")
    return options


def _is_written_so(stored: StoredModel) -> bool:
    """Return whether the files are what would be written: floats, and not in pickles."""
    return all(t.is_float and t.file.suffix == ".safetensors" for t in stored.tensors.values())


def _check_source(stored: StoredModel, options: Options) -> None:
    if stored.quantization is not None:
        raise CheckpointError(
            f"{stored.path}: expected weights to convert, found them already quantised to "
            f"{stored.quantization}; convert the original"
        )
    is_file = not stored.path.is_dir()
    found = None if is_file else META if is_meta_directory(stored.path) else HUGGING_FACE
    is_same = found == options.to and options.to != META and _is_written_so(stored)
    if is_same and options.quantization is None and options.dtype == "auto":
        raise ValueError(
            f"{stored.path} is already in that layout; give a quantization, a dtype or to='meta'"
        )


def _files_of(stored: StoredModel) -> set[Path]:
    """Return the files that have the weights."""
    tensors = stored.tensors.values()
    return {mapping.path for tensor in tensors for mapping in tensor.mappings()}


def _identity(path: Path, stored: StoredModel, options: Options) -> dict[str, Any]:
    """Return the facts that identify a conversion."""
    beside = [path] if path.is_file() else [p for p in path.iterdir() if p.is_file()]
    files = sorted({*(file.absolute() for file in beside), *_files_of(stored)})
    described = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {"format": _FORMAT, "source": str(path.resolve()), "files": described, **vars(options)}


def _check_space(plan: Plan, journal: Journal) -> None:
    """Fail before hours of work if the disk is too small."""
    done = sum(file.stat().st_size for file in journal.output.iterdir())
    free, needed = shutil.disk_usage(journal.output).free, plan.num_bytes - done
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{needed / 1e9:.2f} GB are needed, and the disk has {free / 1e9:.2f} GB",
            str(journal.output.parent.parent),
        )


def _check_sums(stored: StoredModel, progress: Progress | None) -> None:
    """Verify the checksums that .pth and .bin files have, before their bytes are taken over.

    Raises:
        CheckpointError: a file is damaged.
    """
    files = sorted(file for file in _files_of(stored) if file.suffix in (".pth", ".bin"))
    if not files:
        return
    from codellama_rt.checkpoint.formats.pth import verify_pth  # a machine that others never need

    counter = Counter(sum(file.stat().st_size for file in files), progress)
    for file in files:
        verify_pth(file, lambda count: counter.add(count, "verifying checksums"))


def _write_tensors(
    plan: Plan,
    journal: Journal,
    options: Options,
    progress: Progress | None,
    check_source: Callable[[], None],
) -> None:
    counter = Counter(plan.num_bytes, progress)
    for file, layout in plan.files.items():
        done = journal.done(file, layout)

        def written(entry: Entry) -> None:
            check_source()  # before the journal says that the tensor is right
            plan.made_from[entry.name].release()
            is_packed = options.quantization is not None and is_quantized(entry.name)
            what = f"quantising to {options.quantization}" if is_packed else "copying"
            counter.add(entry.num_bytes, what)

        if done:
            counter.add(sum(entry.num_bytes for entry in layout.entries[: len(done)]), "resuming")
        synced = functools.partial(journal.add, file)
        write_tensor_file(journal.output / file, layout, written, synced, done)


def _write_companions(stored: StoredModel, folder: Path, options: Options) -> None:
    """Write the files that belong to a model beside its weights.

    A tokenizer is rewritten if it comes from a GGUF file, or if Hugging Face's options are missing
    beside Meta's file.
    """
    if stored.path.is_dir():
        for pattern in _TOKENIZER if options.to == META else _COMPANIONS:
            for file in stored.path.glob(pattern):
                shutil.copy(file, folder)
    if options.to == META or not (stored.path.is_file() or is_meta_directory(stored.path)):
        return
    from codellama_rt.text.chat import read_chat_template
    from codellama_rt.text.tokenizer import has_tokenizer, load_tokenizer
    from codellama_rt.text.tokenizer.save_tokenizer import save_tokenizer

    path, metadata = stored.path, stored.metadata
    if has_tokenizer(path, metadata):
        template = None if metadata is None else read_chat_template(path, metadata)
        save_tokenizer(load_tokenizer(path, metadata=metadata), folder, template)


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        sync(file)


def _verify(
    plan: Plan, source: Path, folder: Path, options: Options, progress: Progress | None
) -> None:
    from codellama_rt.tools.convert.verification import verify_logits, verify_tensors

    verify_tensors(plan, folder, progress)
    verify_logits(source, folder, options)
