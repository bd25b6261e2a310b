"""Host arrays on the device, and what comes back."""

import numpy as np

from codellama_rt.model.cuda import tensor

POISON = 0x7F  # of outputs: large numbers or NaN, whatever the dtype


def put(*arrays):
    """Each array on the device."""
    moved = [tensor.to_device(np.asarray(array)) for array in arrays]
    return moved[0] if len(moved) == 1 else moved


def poisoned(shape, dtype):
    """An output that holds nothing that looks like a result."""
    out = tensor.empty(shape, dtype)
    element = tensor.element(dtype)
    tensor.copy(out, np.full(out.nbytes, POISON, np.uint8).view(element).reshape(shape))
    return out


def get(*tensors):
    """Each tensor on the host."""
    arrays = [t.numpy() for t in tensors]
    return arrays[0] if len(arrays) == 1 else arrays
