"""What lies in a converted checkpoint."""

from codellama_rt.checkpoint.formats.safetensors import read_safetensors


def contents(folder):
    """All tensors of a directory in Hugging Face's layout: name to dtype, shape and bytes."""
    return {
        name: (tensor.encoding, tensor.shape, tensor.payload.tobytes())
        for file in folder.glob("*.safetensors")
        for name, tensor in read_safetensors(file).items()
    }


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}
