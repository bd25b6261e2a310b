"""GGUF models in several files, as `llama-gguf-split` writes them, and GGUF files in directories.

Parts are named `<name>-00001-of-00003.gguf`; the first one has the metadata of the model.
"""

from __future__ import annotations

import re
from pathlib import Path

from codellama_rt.checkpoint.formats.gguf_file import GgufFile, read_gguf
from codellama_rt.checkpoint.stored_tensor import StoredTensor
from codellama_rt.errors import CheckpointError
from codellama_rt.model.config_fields import ConfigFields

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAX_PARTS = 9999


def read_gguf_parts(path: Path) -> GgufFile:
    """Read a GGUF file, with the further ones of a model that is split.

    Args:
        path: the file; of a split model any part.

    Returns:
        The metadata of the first part and the tensors of all; its path is that of the first part.

    Raises:
        CheckpointError: as `read_gguf`; or a part is missing, of another model, or out of order.
    """
    file = read_gguf(path)
    count = _number(file, "split.count", 1)
    if count <= 1:
        return file
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(
            f"{path}: split.count: expected a file name that ends in -00001-of-{count:05}.gguf, "
            f"found part {_number(file, 'split.no', 0) + 1} of {count} under this name"
        )
    names = [f"{match['stem']}-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    parts = [file if name == path.name else read_gguf(path.with_name(name)) for name in names]
    return GgufFile(parts[0].path, parts[0].metadata, _joined(parts))


def _joined(parts: list[GgufFile]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for i, part in enumerate(parts):
        for key, expected in (("split.no", i), ("split.count", len(parts))):
            if _number(part, key, None) != expected:
                found = part.metadata.get(key, "nothing")
                raise CheckpointError(f"{part.path}: {key}: expected {expected}, found {found!r}")
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{part.path}: tensor {name!r}: expected it in one part, found it in "
                    f"{tensors[name].file.name} as well"
                )
            tensors[name] = tensor
    total = _number(parts[0], "split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(
            f"{parts[0].path}: split.tensors.count: expected {len(tensors)}, as many as the parts "
            f"have, found {total}"
        )
    return tensors


def _number(file: GgufFile, key: str, default: int | None) -> int | None:
    high = 2**31 if key == "split.tensors.count" else _MAX_PARTS
    return ConfigFields(file.metadata, str(file.path)).integer(key, default, low=0, high=high)


def find_gguf(folder: Path) -> Path | None:
    """Return the GGUF model in a directory, None if it has no such file.

    A projector of images (mmproj-...) beside a model is none.

    Raises:
        CheckpointError: there are several; the parts of a split model count as one.
    """
    files = [file for file in folder.glob("*.gguf") if not file.name.startswith("mmproj")]
    return only_model(folder, sorted(files))


def only_model(where: Path | str, files: list[Path]) -> Path | None:
    """Return the one model among files, by its first part; None if there are no files.

    Raises:
        CheckpointError: there are several.
    """
    models = [file for file in files if not _is_later_part(file)]
    if len(models) > 1:
        raise CheckpointError(
            f"{where}: expected one GGUF model, found "
            f"{', '.join(file.name for file in models[:8])}; give one of these files"
        )
    return next(iter(models or files), None)


def _is_later_part(file: Path) -> bool:
    match = _PART.fullmatch(file.name)
    return match is not None and int(match["number"]) != 1
