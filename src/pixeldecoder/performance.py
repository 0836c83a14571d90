"""A network in, the same network out with another attention kernel, fewer bits or compiled blocks."""

import os
from typing import Literal

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements
from torch import nn

from pixeldecoder.hub import cache_folder
from pixeldecoder.models.layers import PatchBlock
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel

Quantization = Literal["none", "int8", "float8", "float8-storage"]


def set_attention(model: PixelDecoderTransformer2DModel, backend: str) -> None:
    """Use one attention kernel, by diffusers' name; "auto": what suits the device. Other models are left alone.

    Raises:
        ValueError: an unknown name, or a package or device that the kernel needs is not there.
    """
    chosen = None
    if backend != "auto":
        names = [name.value for name in AttentionBackendName]
        if backend not in names:
            raise ValueError(f'no attention backend "{backend}": expected "auto" or one of {", ".join(names)}')
        chosen = AttentionBackendName(backend)
        try:
            _check_attention_backend_requirements(chosen)
        except (RuntimeError, ImportError, AssertionError) as error:
            raise ValueError(f'attention backend "{backend}" cannot be used here: {error}') from None
    for module in model.modules():
        if isinstance(module, AttentionModuleMixin):
            module.processor._attention_backend = chosen


def quantize(model: PixelDecoderTransformer2DModel, kind: Quantization) -> None:
    """Store the large matrices of the patch blocks in 8 bits, in place; the rest stays where accuracy needs it.

    Args:
        model: on the CPU or where it will run.
        kind: "int8": torchao, weights and activations, scaled by row and token; "float8": the same in float8, on GPUs
            that multiply it (compute capability 8.9 and newer); "float8-storage": diffusers' layerwise casting, weights
            in float8 until they are used, on any device, for memory alone; "none".

    Raises:
        ValueError: torchao is not installed, or the device has no float8.
    """
    if kind == "none":
        return
    if kind == "float8-storage":
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=model.dtype)
        return
    if kind == "float8" and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)):
        raise ValueError(
            'float8 products need an NVIDIA GPU of compute capability 8.9 or newer: use "int8", or "float8-storage" to '
            "save memory alone"
        )
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError:
        raise ValueError(f"{kind} needs torchao: pip install 'pixeldecoder[quantize]'") from None
    config = (
        Int8DynamicActivationInt8WeightConfig()
        if kind == "int8"
        else Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    )
    for block in model.modules():
        if isinstance(block, PatchBlock):
            quantize_(block, config, filter_fn=_is_large)


def _is_large(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "adaln" not in name and "lora_" not in name


def compile_blocks(model: PixelDecoderTransformer2DModel) -> None:
    """`torch.compile` the parts of the blocks that attention does not belong to, for every size at once; what is
    compiled is kept in the cache folder, for the next process."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    model.compile_repeated_blocks(dynamic=True)
