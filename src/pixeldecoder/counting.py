"""A network and a size in; operations, and bytes that pass through memory, of one step out, by part.

Everything runs on the meta device: nothing is computed, and the numbers are exact for how the network runs on a GPU.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from pixeldecoder.models.adapter import SigmaAwareAdapter, SigmaGate
from pixeldecoder.models.layers import AttentionProcessor, PatchBlock, PixelBlock, RMSNorm
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.plan import count_flops, default_chunk_size
from pixeldecoder.presets import PRESETS

PARTS = {
    SigmaAwareAdapter: "adapter",
    PatchBlock: "patch blocks",
    PixelBlock: "pixel blocks",
    SigmaGate: "gates",
    PixelDecoderTransformer2DModel: "ends",
}
"""Parts by the innermost of these that runs; the ends are embeddings, positions, output. Attention is told apart."""
FREE = ("empty", "new_empty", "_unsafe_view", "detach", "lift_fresh")
"""Operations that pass nothing through memory, besides views."""
WRITTEN = ("copy_", "fill_", "zero_")
"""Operations that write over a tensor without reading it."""
GPUS = {
    "A100 80 GB": (312, 2.04),
    "RTX 4090": (165, 1.01),
    "H100 SXM": (989, 3.35),
    "B200": (2250, 8.0),
}
"""TFLOP/s of dense bfloat16 products with float32 sums, and TB/s of memory, by NVIDIA's data sheets."""


@dataclass
class Counts:
    """What one step takes, and the adapter, which runs once an image."""

    flops: Counter[str] = field(default_factory=Counter)
    """Of matrix products, convolutions and attention, by part; a multiplication and its addition are two."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Read and written by all other operations, by part."""
    least_flops: float = 0.0
    """Of a step: what the method's formulas cannot do without."""

    def step(self, what: Counter[str]) -> int:
        return what.total() - what["adapter"]

    def image(self, what: Counter[str], steps: int) -> int:
        return steps * self.step(what) + what["adapter"]

    def roofline(self, steps: int, tera_flops: float, tera_bytes: float) -> float:
        """Seconds of an image that products at that rate, and then the other operations at that rate, would take."""
        return self.image(self.flops, steps) / tera_flops / 1e12 + self.image(self.bytes, steps) / tera_bytes / 1e12


def count(
    model: PixelDecoderTransformer2DModel, height: int, width: int, text_tokens: int = 0, chunk_size: int | None = None
) -> Counts:
    """One eager step over a whole image, and the adapter before it.

    Bytes are those of the inputs and outputs of each operation but matrix products, convolutions and attention; what
    is repeated along a dimension is read once. RMSNorm is one operation, as on a GPU.

    Args:
        model: on the meta device; its hooks and attention are left as they are needed to count.
        height, width: of the image in pixels, multiples of the latent cells.
        text_tokens: tokens of the prompt.
        chunk_size: as for the network; by default a GPU's.
    """
    config = model.config

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    if chunk_size is None:
        chunk_size = default_chunk_size(model, torch.device("cuda"))
    text = None if config.text_embed_dim is None else empty(1, text_tokens, config.text_embed_dim)
    rotary = model.image_rotary(height, width)
    with torch.no_grad(), _Counting(model) as counting:
        features = None
        if model.adapter is not None:
            cell = config.scale * config.latent_downscale_factor
            latents = empty(1, config.latent_channels, height // cell, width // cell)
            features = model.encode_latents(latents, height, width)
        model(
            empty(1, 3, height, width), empty(1), text, sigma=empty(1), latent_features=features,
            chunk_size=chunk_size, image_rotary_emb=rotary,
        )  # fmt: skip
    counts, dim = counting.counts, config.num_attention_heads * config.attention_head_dim
    counts.least_flops = sum(count_flops(model, height * width // config.patch_size**2, text_tokens))
    if text is not None:  # embedded once an image, and not asking in the last block
        counts.least_flops -= 2 * text_tokens * dim * (config.text_embed_dim + dim)
    return counts


def table(decoder: str, size: int, steps: int | None = None) -> list[str]:
    """What a square image takes in bfloat16, without a prompt's encoder, as lines of text.

    Args:
        decoder: as for `PixelDecoderPipeline.from_pretrained`; of a released name nothing is fetched.
        size: side in pixels.
        steps: by default those that the decoder was made for.

    Raises:
        ValueError: no such decoder, or a size that is no multiple of its cells.
    """
    if decoder in PRESETS:
        config, own = PRESETS[decoder].config, PRESETS[decoder].num_inference_steps
    else:
        pipeline = PixelDecoderPipeline.from_pretrained(decoder)
        config, own = pipeline.transformer.config, pipeline.config.default_num_inference_steps
    with torch.device("meta"):
        model = PixelDecoderTransformer2DModel.from_config(config).to(torch.bfloat16)
    cell = math.lcm(model.config.patch_size, model.config.scale * model.config.latent_downscale_factor)
    if size < 1 or size % cell:
        raise ValueError(f"size {size}: expected a multiple of {cell}, a latent cell")
    steps = steps or own
    text_tokens = 0 if model.config.text_embed_dim is None else model.config.max_text_length
    counts = count(model, size, size, text_tokens)
    flops, passed = counts.flops, counts.bytes
    lines = [f"{decoder}, {size} px, whole, {text_tokens} text tokens, bfloat16", f"{'':28}{'TFLOP':>10}{'GB':>10}"]

    def row(name: str, tera_flops: float, giga_bytes: float) -> str:
        return f"{name:28}{tera_flops / 1e12:10.3f}{giga_bytes / 1e9:10.2f}"

    for part in sorted(flops.keys() | passed.keys(), key=lambda part: (part == "adapter", -flops[part])):
        lines.append(row("adapter, once an image" if part == "adapter" else part, flops[part], passed[part]))
    lines.append(row("a step", counts.step(flops), counts.step(passed)))
    excess = counts.step(flops) / counts.least_flops
    lines.append(f"{'least for a step':28}{counts.least_flops / 1e12:10.3f}{'':10}  {excess:.4f} times that runs")
    lines.append(row(f"an image of {steps} steps", counts.image(flops, steps), counts.image(passed, steps)))
    for name, (tera_flops, tera_bytes) in GPUS.items():
        seconds = counts.roofline(steps, tera_flops, tera_bytes)
        lines.append(f"{f'{name}, by its data sheet':28}{seconds:10.3f} s an image at least: arithmetic, not measured")
    return lines


class _Counting(TorchDispatchMode):
    """Adds up every operation for the part that runs."""

    def __init__(self, model: PixelDecoderTransformer2DModel):
        super().__init__()
        self.counts = Counts()
        self.parts = ["ends"]
        self.fused = False
        for module in model.modules():
            if type(module) in PARTS:
                module.register_forward_pre_hook(self._before_part)
                module.register_forward_hook(self._after_part)
            if isinstance(module, RMSNorm):
                module.register_forward_pre_hook(self._before_norm)
                module.register_forward_hook(self._after_norm)
        model.set_attn_processor(_CountedAttention(self))

    def _before_part(self, module: nn.Module, args: Any) -> None:
        once = self.parts[-1] == "adapter"  # has the gates' share of the latents in it
        self.parts.append("adapter" if once else PARTS[type(module)])

    def _after_part(self, module: nn.Module, args: Any, output: Any) -> None:
        self.parts.pop()

    def _before_norm(self, module: nn.Module, args: Any) -> None:
        self.fused = True

    def _after_norm(self, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        self.fused = False
        self.counts.bytes[self.parts[-1]] += _bytes(args[0]) + _bytes(output)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        name, part = function._schema.name.removeprefix("aten::"), self.parts[-1]
        if flops := flop_registry.get(function.overloadpacket):
            self.counts.flops[part] += flops(*args, **kwargs, out_val=output)
        elif not self.fused and not name.startswith(FREE) and not _is_view(function):
            read = args[1:] if name in WRITTEN else args
            self.counts.bytes[part] += sum(map(_bytes, (*_tensors(read), *_tensors(output))))
        return output


class _CountedAttention(AttentionProcessor):
    def __init__(self, counting: _Counting):
        self.counting = counting

    def __call__(self, attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        shapes = (x.transpose(1, 2).shape for x in (query, key, value))
        self.counting.counts.flops[f"attention of {self.counting.parts[-1]}"] += sdpa_flop_count(*shapes)
        return torch.empty_like(query, memory_format=torch.contiguous_format)


def _is_view(function: Any) -> bool:
    return any(result.alias_info and not result.alias_info.is_write for result in function._schema.returns)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _bytes(tensor: torch.Tensor) -> int:
    """What is in memory: without repetitions."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    count = tensor.itemsize
    for size in sizes:
        count *= size
    return count
