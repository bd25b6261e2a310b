"""PyTorch's .pth files: tensors of floats as views of the mapped archive; no code in them is run.

The archive has `<folder>/data.pkl`, which says of each tensor where it lies in which storage, and a
member `<folder>/data/<key>` for each storage.
"""

import math
from pathlib import Path

from codellama_rt.checkpoint.formats.pth_pickle import (
    MAX_PICKLE_BYTES,
    RefusedPickleError,
    TensorDescription,
    read_tensor_pickle,
)
from codellama_rt.checkpoint.formats.pth_zip import read_zip
from codellama_rt.checkpoint.stored_tensor import ENCODINGS, StoredTensor, map_file
from codellama_rt.errors import CheckpointError


def read_pth(path: Path) -> dict[str, StoredTensor]:
    """Maps a file that torch.save wrote and lists its tensors.

    Args:
        path: the file, a dictionary of names and tensors of float32, float16 or bfloat16.

    Returns:
        The tensors by name; none has been read.

    Raises:
        CheckpointError: no such archive, a damaged one, or a pickle that names anything else than
            tensors in storages of floats.
    """
    members = read_zip(path, map_file(path))
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].count("/") != 1:
        raise CheckpointError(f"{path}: expected one data.pkl in a folder, found {len(pickles)}")
    folder = pickles[0].removesuffix("data.pkl")
    order = members.get(folder + "byteorder")
    if order is not None and order[:16].tobytes() != b"little":
        raise CheckpointError(f"{path}: expected little-endian numbers, found others")
    raw = members[pickles[0]]
    try:
        descriptions = read_tensor_pickle(raw[: MAX_PICKLE_BYTES + 1].tobytes())
    except RefusedPickleError as error:
        raise CheckpointError(f"{path}: expected a dictionary of tensors, found {error}") from None
    return {
        name: _tensor(path, name, description, members.get(f"{folder}data/{description.storage}"))
        for name, description in descriptions.items()
    }


def _tensor(path: Path, name: str, said: TensorDescription, storage) -> StoredTensor:
    def fault(expected: str, found: object) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r:.200}: expected {expected}, found {found}")

    if storage is None:
        raise fault(f"its bytes in data/{said.storage}", "no such member")
    itemsize = ENCODINGS[said.encoding].itemsize
    if storage.nbytes != said.storage_size * itemsize:
        raise fault(f"a storage of {said.storage_size} {said.encoding}", f"{storage.nbytes} bytes")
    size, stride = math.prod(said.shape), 1
    if not size:
        raise fault("a shape of positive sizes", said.shape)
    for axis, found in zip(reversed(said.shape), reversed(said.strides), strict=True):
        if axis > 1 and found != stride:
            raise fault("its elements one after another", f"strides {said.strides}")
        stride *= axis
    if said.offset + size > said.storage_size:
        raise fault(
            f"elements within its storage of {said.storage_size}",
            f"{said.shape} from {said.offset}",
        )
    payload = storage[said.offset * itemsize : (said.offset + size) * itemsize]
    return StoredTensor(name, path, said.encoding, said.shape, payload)
