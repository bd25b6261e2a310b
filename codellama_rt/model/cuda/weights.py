"""The weights of a model in device memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from codellama_rt.model.cuda.quantize import FORMATS, quantize
from codellama_rt.model.cuda.tensor import DeviceTensor, to_device
from codellama_rt.model.weights import LayerWeights, LlamaWeights
from codellama_rt.ops.quantized import Quantized

ACTIVATION_DTYPES = ("bfloat16", "float16")
Weight = DeviceTensor | Quantized


@dataclass(frozen=True)
class DeviceLayer:
    """One layer; projections of the same input are multiplied as one."""

    attention_norm: DeviceTensor
    qkv_proj: tuple[Weight, Weight, Weight]
    o_proj: Weight
    mlp_norm: DeviceTensor
    gate_up_proj: tuple[Weight, Weight]
    down_proj: Weight


@dataclass(frozen=True)
class DeviceWeights:
    """A model's weights; embedding and head stay in 16 bits when the layers are quantised.

    Attributes:
        dtype: of activations: "bfloat16" or "float16".
    """

    dtype: str
    embedding: DeviceTensor
    layers: tuple[DeviceLayer, ...]
    norm: DeviceTensor
    lm_head: DeviceTensor


def upload(weights: LlamaWeights, quantization: str | None = None) -> DeviceWeights:
    """Copy a checkpoint's weights to the device, quantising them if requested.

    Args:
        weights: float arrays on the host.
        quantization: None, "int8" or "int4", for the layers' projections.

    Raises:
        ValueError: a dtype without kernels for the device.
    """
    dtype = str(weights.layers[0].q_proj.dtype)
    if dtype not in ACTIVATION_DTYPES:
        raise ValueError(
            f"weights on cuda are bfloat16 or float16, these are {dtype}; "
            "load them with dtype='bfloat16'"
        )
    if quantization is not None and quantization not in FORMATS:
        raise ValueError(f"quantization must be None, int8 or int4 on cuda, got {quantization!r}")
    embedding = to_device(weights.embedding)
    tied = weights.lm_head is weights.embedding
    return DeviceWeights(
        dtype=dtype,
        embedding=embedding,
        layers=tuple(_layer(layer, quantization) for layer in weights.layers),
        norm=to_device(weights.norm),
        lm_head=embedding if tied else to_device(weights.lm_head),
    )


def _layer(layer: LayerWeights, quantization: str | None) -> DeviceLayer:
    def put(array: np.ndarray) -> Weight:
        if quantization is None:
            return to_device(array)
        payload = to_device(quantize(array, quantization))
        return Quantized(payload, FORMATS[quantization], array.shape)

    return DeviceLayer(
        attention_norm=to_device(layer.attention_norm),
        qkv_proj=(put(layer.q_proj), put(layer.k_proj), put(layer.v_proj)),
        o_proj=put(layer.o_proj),
        mlp_norm=to_device(layer.mlp_norm),
        gate_up_proj=(put(layer.gate_proj), put(layer.up_proj)),
        down_proj=put(layer.down_proj),
    )
