"""A decoder's name and how it is to run in; a pipeline on its device out."""

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements
from diffusers.utils import logging
from torch import nn

from pixeldecoder.autoencoders import load_image_encoder
from pixeldecoder.errors import blaming, naming
from pixeldecoder.hub import cache_folder, download, is_code, repository, unreachable
from pixeldecoder.latents import SPACES
from pixeldecoder.models.layers import PatchBlock
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.plan import Limits, must_offload

logger = logging.get_logger(__name__)

Quantization = Literal["none", "int8", "float8", "float8-storage"]


@dataclass(frozen=True)
class Execution:
    """Where and how a decoder runs. It can be pickled, and so sent to another process."""

    device: str = "auto"
    """"cpu", "cuda" or "mps"; "auto": the fastest there is."""
    dtype: str = "auto"
    """Of the weights; "auto": bfloat16, but float32 on a CPU that has no instructions for it."""
    quantize: Quantization = "none"
    attention: str = "auto"
    """Kernel, as in `set_attention`."""
    compile: bool = False
    """As in `compile_blocks`."""
    loras: tuple[tuple[str, float], ...] = ()
    """Files, folders or Hub ids, each with its strength."""
    limits: Limits = field(default_factory=Limits)

    def load(self, name: str, place: bool = True) -> PixelDecoderPipeline:
        """A decoder by name.

        Args:
            name: as for `PixelDecoderPipeline.from_pretrained`.
            place: move it to the device, or where its weights do not fit arrange that its blocks take turns there.

        Raises:
            ValueError: no such decoder, device or kernel, or a LoRA of another network.
        """
        device = torch_device(self.device)
        with blaming(f"{name} could not be loaded"):
            pipeline = PixelDecoderPipeline.from_pretrained(name, dtype=torch_dtype(self.dtype, device))
        model, target = pipeline.transformer, torch.device(device)
        if not isinstance(model, PixelDecoderTransformer2DModel):
            raise ValueError(f"{name}: expected a decoder, got a pipeline with {type(model).__name__}")
        pipeline.set_progress_bar_config(desc="steps", leave=False)
        load_loras(pipeline, self.loras)
        set_attention(model, self.attention)
        quantize(model, self.quantize)
        if not place:
            return pipeline
        if must_offload(model, target, self.limits.max_memory):
            logger.warning("the weights take turns on the device: slower, but they fit")
            model.enable_group_offload(
                target, offload_type="block_level", num_blocks_per_group=1, use_stream=device == "cuda"
            )
            for part in (pipeline.encoder, pipeline.text_encoder):
                if part is not None:
                    part.to(target)
        else:
            pipeline.to(target)
        if self.compile:
            compile_blocks(model)
        return pipeline


def torch_dtype(name: str, device: str) -> torch.dtype:
    """The dtype of that name; "auto": bfloat16 where the device computes it fast, else float32."""
    if name != "auto":
        return getattr(torch, name)
    fast = device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def torch_device(name: str, option: str = "--device") -> str:
    """The device of that name, "auto" the fastest.

    Raises:
        ValueError: this machine has none.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [device for device, there in available.items() if there]
    if name != "auto" and name not in usable:
        raise ValueError(f"{option} {name}: this machine has none; available: {', '.join(usable)}")
    return usable[0] if name == "auto" else name


def lora_file(name: str) -> Path:
    """A LoRA's file: itself, the one of a folder, or of a Hub repository."""
    path = Path(os.path.expanduser(name))
    path = path if path.exists() else download(name, ["*.safetensors"])
    if path.is_file():
        return path
    files = sorted(path.glob("*.safetensors"))
    usual = path / "pytorch_lora_weights.safetensors"
    if usual not in files and len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"--lora {name}: expected one .safetensors file, found {names}")
    return usual if usual in files else files[0]


def load_loras(pipeline: PixelDecoderPipeline, loras: Sequence[tuple[str, float]]) -> None:
    """Onto the decoder, added up by their strengths.

    Raises:
        ValueError: of another network, or no LoRA at all.
    """
    if not loras:
        return
    import peft  # noqa: F401  # diffusers would not say which extra has it

    modules = dict(pipeline.transformer.named_modules())
    strengths = {}
    for index, (name, strength) in enumerate(loras):
        path, adapter = lora_file(name), f"lora{index}"
        with naming(f"--lora {name}"):
            try:
                state = pipeline.lora_state_dict(path)
            except OSError as error:
                raise ValueError(f"not a readable file of tensors ({' '.join(str(error).split())})") from None
            parts: dict[str, set[str]] = {}
            for key, tensor in state.items():
                # peft would take what fits, and say nothing of the rest.
                module, _, part = key.removeprefix("transformer.").partition(".lora_")
                weight, side = getattr(modules.get(module), "weight", None), {"A.weight": 1, "B.weight": 0}.get(part)
                parts.setdefault(module, set()).add(part)
                if weight is None:
                    raise ValueError(f"not of this decoder, which has no such layer: {key} {tuple(tensor.shape)}")
                if side is None and part not in ("B.bias", "magnitude_vector", "magnitude_vector.weight"):
                    raise ValueError(f"expected LoRA layers, found {key}")
                if side is not None and (tensor.ndim != weight.ndim or tensor.shape[side] != weight.shape[side]):
                    ours = f"is {tuple(weight.shape)} there"
                    raise ValueError(f"not of this decoder, which {ours}: {key} {tuple(tensor.shape)}")
            if half := next((module for module, own in parts.items() if not {"A.weight", "B.weight"} <= own), None):
                raise ValueError(f"one of the two sides of {half} is missing")
            with blaming("not a LoRA of this decoder"):  # such as two sides of other ranks
                pipeline.load_lora_weights(state, adapter_name=adapter)
            if adapter not in getattr(pipeline.transformer, "peft_config", {}):
                raise ValueError("none of its tensors is a LoRA of this decoder")
        strengths[adapter] = strength
    pipeline.set_adapters(list(strengths), list(strengths.values()))


def load_diffusion_pipeline(name: str, dtype: torch.dtype, arguments: dict[str, Any]) -> Any:
    """`arguments` are those its call is to take."""
    path = Path(os.path.expanduser(name))
    source = str(path) if path.exists() else repository(name)
    try:
        with blaming(f"{name} could not be loaded"):
            pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype)
    except OSError as error:
        raise ValueError(str(error)) if path.exists() else unreachable(name, error) from None
    taken = inspect.signature(pipe.__call__).parameters
    if unknown := [key for key in arguments if key not in taken]:
        raise ValueError(f"--pipeline-args: {type(pipe).__name__} has no {unknown[0]}: expected {', '.join(taken)}")
    return pipe


def image_encoder(name: str, pipeline: PixelDecoderPipeline) -> Any:
    """For `upscale`: the encoder of that name, or `None` for the decoder's own."""
    if name == "auto":
        if pipeline.encoder is not None:
            return None
        if trained := pipeline.config.encoder_name:
            if is_code(trained):  # no file has a module imported
                raise ValueError(f"the decoder was trained with the encoder {trained}: give --encoder {trained}")
            try:
                return load_encoder(trained, pipeline.device)
            except ValueError as error:
                raise ValueError(f"the decoder was trained with the encoder {trained}: {error}") from None
        if pipeline.config.latent_space not in SPACES:
            raise ValueError("the decoder has no encoder and does not tell its latent space: give --encoder")
        name = pipeline.config.latent_space
    return load_encoder(name, pipeline.device)


def load_encoder(name: str, device: Any) -> Any:
    """The encoder of that name; of one's own, ValueErrors tell what goes wrong in it."""
    with blaming(f"{name} could not be loaded"):
        encoder = load_image_encoder(name, device)

    def checked(image: torch.Tensor) -> torch.Tensor:
        with blaming(f'encoder "{name}"'), naming(f'encoder "{name}"'):
            latents = encoder(image)
        if not isinstance(latents, torch.Tensor) or latents.ndim != 4:
            got = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise ValueError(f'encoder "{name}": expected latents (B, C, h, w), got {got}')
        return latents

    checked.autoencoder = getattr(encoder, "autoencoder", None)  # type: ignore[attr-defined]
    return checked


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
