"""A network, an image size and a memory budget in; how to run it, and what it will take, out."""

import logging
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from torch import nn

from pixeldecoder import heap
from pixeldecoder.errors import out_of_memory
from pixeldecoder.files import parse_size
from pixeldecoder.models.base import HALO, LatentDecoder
from pixeldecoder.models.layers import attention
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.tiling import Tiles, cut, tiled_latents

logger = logging.getLogger(__name__)
_Cut = TypeVar("_Cut")
_Result = TypeVar("_Result")

MIB = 2**20
OVERLAP = 64
"""Pixels that neighbouring tiles share, by default, or a quarter of a small tile."""
CHUNK_BYTES = {"cpu": 8 * MIB}
"""Largest tensor of a chunk: small enough for a CPU's cache; elsewhere large enough to keep the device busy."""
OTHER_CHUNK_BYTES = 128 * MIB
SMALLEST_CHUNK = 16
SMALLEST_BAND = 8
"""Rows of latent cells below which the bands of a base are not made."""
STATUS = Path("/proc/self/status")
"""Where a process on Linux reads its own memory."""
OVERHEAD = 1.25
"""Time of a whole pass over that of its matrix products and attention."""
CGROUP = Path("/sys/fs/cgroup")
"""Where a container on Linux reads its limits."""
LESS = 0.8
"""Of what a plan would have taken, what the next one may take."""
WORKSPACE = 96 * MIB
"""Bytes that libraries allocate for themselves: oneDNN's kernels, cuBLAS' workspace, fragments."""
SMALLEST_ENCODED = 256
"""Side in pixels below which the tiles of an encoder are not made."""
ENCODER_TENSORS = {
    "AutoencoderKL": 5,
    "AutoencoderKLFlux2": 5,
    "AutoencoderKLQwenImage": 13,
    "AutoencoderTiny": 5,
    "TinyLatentEncoder": 5,
}
"""How many tensors of a stage's width and size an encoder holds at most. Measured at 768 px on a CPU, in this order:
4.3, 5.0, 13.1, 4.1 and 2.4."""


@dataclass(frozen=True)
class Limits:
    """What a decode may take, and how it may be cut.

    Raises:
        ValueError: a size of another type, or of nothing; whether it fits the image and the network, `plan` says.
    """

    tile_size: int | Literal["auto"] | None = "auto"
    """Side in pixels of the tiles; `None` for the whole image; "auto" tiles what is larger than the network is made
    for, or than the memory allows."""
    tile_overlap: int | None = None
    """Pixels that neighbouring tiles share; by default 64, or a quarter of a small tile."""
    chunk_size: int | None = None
    """Patches at a time, apart from attention; by default what suits the device, fewer if memory is short."""
    max_memory: int | str | None = None
    """Bytes, or a string such as "6GB" or "6GiB", that all of it may take; by default what is free."""

    def __post_init__(self) -> None:
        for name in ("tile_size", "tile_overlap", "chunk_size"):
            value = getattr(self, name)
            if not isinstance(value, Integral | None) and (name, value) != ("tile_size", "auto"):
                unit = "patches" if name == "chunk_size" else "pixels"
                raise ValueError(f"{name} is {value!r}: expected a whole number of {unit}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"expected a chunk size of at least 1 patch, got {self.chunk_size}")


@dataclass(frozen=True)
class Plan:
    """How an image of `height` x `width` pixels is decoded."""

    height: int
    width: int
    tiles: Tiles
    """One tile is the whole image."""
    chunk_size: int
    memory: int
    """Peak in bytes with the weights, of the process on a CPU, else of what is allocated on the device."""
    matrix_flops: float
    """Operations of the matrix products in one pass over the image."""
    attention_flops: float
    """Those of attention."""
    base_rows: int | None
    """Rows of latent cells that the base decodes at a time; `None` where there is no base, or for all at once."""
    base_flops: float
    """Operations of the base's one pass over the image."""

    @property
    def tiled(self) -> bool:
        return self.tiles.count > 1

    def options(self) -> dict[str, Any]:
        """The command's options that cut an image so again."""
        cut = {"tile": str(max(self.tiles.height, self.tiles.width)) if self.tiled else "none"}
        return cut | {"chunk": self.chunk_size} | ({"tile_overlap": self.tiles.overlap} if self.tiled else {})

    def __str__(self) -> str:
        how = f"{self.tiles.count} tiles of {self.tiles.width} x {self.tiles.height} px" if self.tiled else "whole"
        return (
            f"{self.width} x {self.height} px, {how}, {self.chunk_size} patches at a time, "
            f"{self.memory / 1e9:.1f} GB of memory"
        )


def plan(
    model: PixelDecoderTransformer2DModel,
    height: int,
    width: int,
    batch: int = 1,
    text_tokens: int = 0,
    limits: Limits = Limits(),
    *,
    trained_size: int | None = None,
    device: torch.device | None = None,
    offload: bool = False,
) -> Plan:
    """Choose chunks and tiles that stay within a memory budget; one tile if the decoder is made for the size.

    Args:
        model: in the dtype it will run in.
        height, width: of the image in pixels, multiples of the patch size.
        batch: images at a time.
        text_tokens: tokens of the prompt.
        limits: of tiles, chunks and memory.
        trained_size: side in pixels of the largest square image that the decoder is made for, if known.
        device: where the model will run; by default where it is.
        offload: its blocks will take turns there. (Blocks that already do are recognised.)

    Raises:
        ValueError: neither what was asked for nor any choice left open fits; the message says what to change.
    """
    patch = model.config.patch_size
    device = device or model.device
    budget = memory_budget(device, limits.max_memory)
    tile_size, tile_overlap, chunk_size = limits.tile_size, limits.tile_overlap, limits.chunk_size
    chunks = [default_chunk_size(model, device) if chunk_size is None else chunk_size]
    while chunk_size is None and chunks[-1] > SMALLEST_CHUNK:
        chunks.append(max(SMALLEST_CHUNK, chunks[-1] // 4))

    cell = model.config.scale * model.config.latent_downscale_factor
    bands: list[int | None] = [None]
    rows = -(-height // cell)
    while model.base is not None and rows > SMALLEST_BAND:
        bands.append(rows := max(SMALLEST_BAND, rows // 2))
    longest = max(height, width)
    if tile_size == "auto":
        beyond = trained_size and (height * width > trained_size**2 or longest > 2 * trained_size)
        first = trained_size if beyond and trained_size else max(longest, 2 * patch)
        sides = [first]
        smallest = max(4 * (OVERLAP if tile_overlap is None else tile_overlap), 2 * patch)
        while sides[-1] > smallest:
            sides.append(max(smallest, sides[-1] // 2 // patch * patch))
    else:
        sides = [max(longest, 2 * patch) if tile_size is None else tile_size]
    for side in sides:
        overlap = min(OVERLAP, side // 4) if tile_overlap is None else tile_overlap
        tiles = cut(height, width, side, overlap if side < longest else 0, patch)
        for chunk, rows_at_a_time in product(chunks, bands):
            memory = peak_memory(
                model, height, width, batch, text_tokens, tiles, chunk, device, offload, rows_at_a_time
            )
            if memory <= budget:
                flops = count_flops(model, tiles.height // patch * (tiles.width // patch), text_tokens)
                matrix, attended = (batch * tiles.count * x for x in flops)
                once = batch * count_base_flops(model.base, height, width, rows_at_a_time)
                return Plan(height, width, tiles, chunk, memory, matrix, attended, rows_at_a_time, once)
    what = f"{tiles.width} x {tiles.height} px tiles" if tiles.count > 1 else "the whole image"
    raise ValueError(
        f"{width} x {height} px would take {memory / 1e9:.2f} GB with {what} and {chunk} patches at a time, but "
        f"{budget / 1e9:.2f} GB may be used: allow more memory, or make "
        + ("a smaller image" if tile_size == "auto" else "smaller tiles or a smaller image")
    )


def plan_encoder(
    autoencoder: nn.Module | None, height: int, width: int, batch: int, cell: int, max_memory: int | str | None = None
) -> Tiles:
    """How to cut an image for its encoder, so that it stays within a memory budget; one tile where it may.

    Args:
        autoencoder: where it will run. What is no convolutional network of `ENCODER_TENSORS` is given the whole image.
        height, width: in pixels, multiples of `cell`.
        batch: images at a time.
        cell: pixels to a latent cell's side.
        max_memory: as in `Limits`.

    Raises:
        ValueError: the smallest tiles do not fit.
    """
    config: Any = getattr(autoencoder, "config", {})
    tensors, sides = ENCODER_TENSORS.get(type(autoencoder).__name__), [max(height, width, 2 * cell)]
    if tensors is None or autoencoder is None:
        return cut(height, width, sides[0], 0, cell)
    if "base_dim" in config:
        widths = [config.base_dim * factor for factor in config.dim_mult]
    else:
        names = "encoder_block_out_channels", "block_out_channels"  # the bundled encoder has one width
        widths = next((config[name] for name in names if name in config), [config.get("channels")])
    weight = next(autoencoder.parameters())
    # Stage i works at 1 / 2^i of the size.
    values = tensors * max(channels / 4**stage for stage, channels in enumerate(widths))
    held = held_memory(weight.device) + WORKSPACE + 24 * batch * height * width
    budget = memory_budget(weight.device, max_memory)
    smallest = max(SMALLEST_ENCODED, 2 * cell)
    while sides[-1] > smallest:
        sides.append(max(smallest, sides[-1] // 2 // cell * cell))
    for side in sides:
        tiles = cut(height, width, side, side // 4 if side < sides[0] else 0, cell)
        memory = held + int(values * weight.itemsize * batch * tiles.height * tiles.width)
        if memory <= budget:
            return tiles
    raise ValueError(
        f"to encode {width} x {height} px would take {memory / 1e9:.2f} GB with {tiles.width} x {tiles.height} px "
        f"tiles, but {budget / 1e9:.2f} GB may be used: allow more memory, or give a smaller image"
    )


def encode_in_tiles(
    encoder: Callable[[torch.Tensor], torch.Tensor],
    autoencoder: nn.Module | None,
    image: torch.Tensor,
    cell: int,
    max_memory: int | str | None = None,
) -> torch.Tensor:
    """The latents of an image (B, 3, H, W), whole or in tiles as `plan_encoder` says of its `autoencoder`."""

    def cut_for(memory: int | str | None) -> Tiles:
        return plan_encoder(autoencoder, image.shape[-2], image.shape[-1], len(image), cell, memory)

    def run(tiles: Tiles) -> torch.Tensor:
        return encoder(image) if tiles.count == 1 else tiled_latents(encoder, image, tiles)

    return within_memory(cut_for, run, image.device, max_memory)


def within_memory(
    plan_for: Callable[[int | str | None], _Cut],
    run: Callable[[_Cut], _Result],
    device: torch.device,
    max_memory: int | str | None = None,
) -> _Result:
    """Run what is planned; if the device runs out of memory all the same, as others use it too, plan for less memory
    until the plan is another, say so, and run that.

    Args:
        plan_for: a budget, as in `Limits`; raises ValueError if nothing is so small.
        run: may be called several times.

    Raises:
        RuntimeError, MemoryError: of the smallest plan there is.
    """
    budget, held = memory_budget(device, max_memory), held_memory(device)
    made = plan_for(max_memory)
    while True:
        try:
            return run(made)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            failed = error.with_traceback(None)  # whose frames hold what is to be free
        release_memory(device)
        before, taken = made, getattr(made, "memory", budget) - held - WORKSPACE
        held = held_memory(device)
        while _same_cut(made, before):
            taken = int(LESS * taken)
            budget = held + WORKSPACE + taken
            try:
                made = plan_for(budget)
            except ValueError:
                raise failed from None
        logger.warning(f"out of memory: trying once more with {made}")


def _same_cut(one: Any, other: Any) -> bool:
    if isinstance(one, Plan):
        return (one.tiles, one.chunk_size, one.base_rows) == (other.tiles, other.chunk_size, other.base_rows)
    return one == other


def default_chunk_size(model: PixelDecoderTransformer2DModel, device: torch.device) -> int:
    """Patches whose modulation after attention, the largest tensor there is, takes `CHUNK_BYTES`."""
    config = model.config
    bytes_ = 4 * config.patch_size**2 * config.pixel_dim * model.dtype.itemsize
    return max(SMALLEST_CHUNK, CHUNK_BYTES.get(device.type, OTHER_CHUNK_BYTES) // bytes_)


def memory_budget(device: torch.device, max_memory: int | str | None = None) -> int:
    """Bytes that may be held in all, by what is held already and what is free, or as given.

    Raises:
        ValueError: not a size.
    """
    if max_memory is not None:
        try:
            return parse_size(max_memory)
        except ValueError as error:
            raise ValueError(f"max_memory {error}") from None
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    else:
        free = min(psutil.virtual_memory().available, _free_in_container())
    return held_memory(device) + int(0.95 * free)


def _free_in_container() -> float:
    """Bytes below the limit of a control group, infinity without one. The kernel counts the cache of files that were
    read, such as weights, as used, but gives it up when memory is short: it is free."""
    limit, used, parts = (CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.is_file() or not limit.read_text().strip().isdigit():
        return math.inf
    stat = dict(line.split() for line in parts.read_text().splitlines())
    return int(limit.read_text()) - int(used.read_text()) + int(stat["inactive_file"])


def held_memory(device: torch.device) -> int:
    """Bytes allocated on a device, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return psutil.Process().memory_info().rss


def release_memory(device: torch.device) -> None:
    """Give what was freed back to the system: PyTorch keeps it on a GPU, and glibc in the gaps of its heaps."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "cpu":
        heap.trim()


def measured_peak(device: torch.device) -> int:
    """Most bytes that were allocated on a GPU, or resident in this process, at any time."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = STATUS.read_text() if STATUS.is_file() else ""
    if match := re.search(r"^VmHWM:\s*(\d+)", status, re.MULTILINE):  # on Linux `ru_maxrss` begins with the parent's
        return 1024 * int(match[1])
    import resource  # noqa: PLC0415 (Windows has none)

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory(
    model: PixelDecoderTransformer2DModel,
    height: int,
    width: int,
    batch: int,
    text_tokens: int,
    tiles: Tiles,
    chunk_size: int,
    device: torch.device,
    offload: bool = False,
    base_rows: int | None = None,
) -> int:
    """Peak in bytes of a decode: what is held now, and the tensors of the phase that needs most."""
    config, item = model.config, model.dtype.itemsize
    dim = config.num_attention_heads * config.attention_head_dim
    pixel_attn = config.num_pixel_attention_heads * config.pixel_attention_head_dim
    pixel_values = config.patch_size**2 * config.pixel_dim  # of a patch
    whole = batch * height * width // config.patch_size**2
    tile = batch * tiles.height * tiles.width // config.patch_size**2
    chunk = min(chunk_size * batch, tile)

    canvas = 12 * batch * height * width  # float32 RGB
    features = adapter = 0
    if model.adapter is not None:
        injections = len(model.adapter.heads) + config.inject_pixels
        kept = dim + (dim if config.per_channel_gate else 1)  # and what the gates make of them
        features = injections * whole * kept * item
        adapter = 5 * whole * config.adapter_dim * item
        if tiles.count > 1:
            features += injections * tile * kept * item
    if model.base is not None:
        features += canvas
        adapter = max(adapter, base_memory(model.base, height, width, batch, base_rows) * item)
    summed = 4 if model.dtype == torch.float16 else item  # what blocks add to, which float16 does not hold
    tokens = tile * dim * summed
    text = batch * text_tokens * dim * item
    joint = 3 * (tile * dim * item + text)  # queries, keys and values
    patches = min(tile, chunk * max(1, pixel_values // dim))
    patch_chunk = patches * 12 * dim * item  # the MLP: three tensors of 8/3 of the width, and four of one width
    patch_phase = 2 * tokens + joint + 2 * text + patch_chunk
    pixel_chunk = chunk * 12 * pixel_values * summed
    pixel_phase = 2 * tokens + tile * pixel_values * summed + 4 * tile * pixel_attn * item + pixel_chunk
    tile_canvas = 12 * tile * config.patch_size**2
    network = (2 if tiles.count > 1 else 1) * canvas + 2 * tile_canvas + max(patch_phase, pixel_phase)
    if offload or _is_group_offload_enabled(model):
        # A block, and the next one, which is being loaded meanwhile.
        weights = 2 * max(weight_bytes(m) for m in model.modules() if type(m).__name__ in model._no_split_modules)
    else:
        weights = 0 if model.device == device else weight_bytes(model)
    return held_memory(device) + weights + WORKSPACE + features + int(1.1 * max(adapter, network, 3 * canvas))


def base_memory(base: LatentDecoder, height: int, width: int, batch: int, rows: int | None) -> int:
    """Values that a base holds at most for an image of that size in pixels, decoding so many rows of cells at a time:
    eight tensors at the autoencoder's size, or two of a band and four at full size."""
    scale, dim = 2**base.enlargements, base.to_small.in_channels
    small = height // scale if rows is None else (rows + 2 * base.halo) * 2**base.upsamplings
    small = min(small, height // scale)
    features = dim * small * (width // scale)
    band = min(small, base.band(rows) + 2 * HALO) * scale * width
    return batch * max(8 * features, 2 * features + 4 * base.refine.in_channels * band)


def count_flops(model: PixelDecoderTransformer2DModel, tokens: int, text_tokens: int = 0) -> tuple[float, float]:
    """Floating-point operations of one pass over an image of `tokens` patches: of matrix products, and of attention.

    A multiplication and its addition are two. The adapter and the base, which run once, are left out.
    """
    config = model.config
    dim = config.num_attention_heads * config.attention_head_dim
    attn = config.num_pixel_attention_heads * config.pixel_attention_head_dim
    pixels, d = config.patch_size**2, config.pixel_dim
    layers, stream = config.num_layers, dim * (4 * dim + 3 * int(8 * dim / 3))
    channels = 3 if model.base is None else 6
    weights = tokens * (channels * pixels * dim + layers * stream)
    if config.text_embed_dim is not None:
        weights += text_tokens * (config.text_embed_dim * dim + layers * stream - (stream - 3 * dim * dim))
    if model.adapter is not None:
        gates = len(model.adapter.heads) + config.inject_pixels
        weights += tokens * gates * dim * (dim if config.per_channel_gate else 1)  # of the latents' half once an image
    pixel_block = dim * 6 * d * pixels + 2 * pixels * d * attn + 4 * attn * attn + pixels * 8 * d * d
    weights += tokens * (config.num_pixel_layers * pixel_block + (channels + 3) * d * pixels)
    joint = tokens + text_tokens
    attended = ((layers - 1) * joint + tokens) * joint * dim  # the text asks no more in the last block
    attended += config.num_pixel_layers * tokens**2 * attn
    return 2.0 * weights, 4.0 * attended


def count_base_flops(base: LatentDecoder | None, height: int, width: int, rows: int | None) -> float:
    """Operations of a base's pass over an image of that size in pixels, in bands of so many rows of latent cells."""
    if base is None:
        return 0.0
    cell = 2 ** (base.upsamplings + base.enlargements)
    down, across = math.ceil(height / cell), math.ceil(width / cell)
    if rows is not None:  # with what lies around each band
        down = sum(min(down, top + rows + base.halo) - max(0, top - base.halo) for top in range(0, down, rows))
    return 2.0 * base.products() * down * across


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the parameters; a quantised one is the sum of its parts."""

    def size(tensor: torch.Tensor) -> int:
        if not hasattr(tensor, "__tensor_flatten__"):
            return tensor.numel() * tensor.itemsize
        return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])

    return sum(size(parameter) for parameter in module.parameters())


def must_offload(model: PixelDecoderTransformer2DModel, device: torch.device, max_memory: int | str | None) -> bool:
    """Whether the weights would take more than half of an accelerator's memory, so that blocks must take turns."""
    return device.type != "cpu" and weight_bytes(model) > memory_budget(device, max_memory) / 2


def measure_rates(
    model: PixelDecoderTransformer2DModel, device: torch.device, tokens: int = 4096
) -> tuple[float, float]:
    """FLOP/s of a device in matrix products and in attention, at the network's widths and dtype, in about a second."""
    config = model.config
    dim = config.num_attention_heads * config.attention_head_dim
    x = torch.randn(tokens, dim, device=device, dtype=model.dtype)
    weight = torch.randn(4 * dim, dim, device=device, dtype=model.dtype)
    shape = (1, tokens, config.num_attention_heads, config.attention_head_dim)
    qkv = torch.randn(3, *shape, device=device, dtype=model.dtype)
    with torch.no_grad():
        products = _seconds(lambda: torch.nn.functional.linear(x, weight), device)
        attended = _seconds(lambda: attention(*qkv), device)
    return 8 * tokens * dim * dim / products, 4 * tokens**2 * dim / attended


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few runs."""
    synchronize = getattr(torch, device.type).synchronize
    best, until = math.inf, time.perf_counter() + 0.3
    for run in range(50):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        if run:
            best = min(best, time.perf_counter() - start)
        if run > 1 and time.perf_counter() > until:
            break
    return best


def estimate_seconds(chosen: Plan, rates: tuple[float, float], passes: int) -> float:
    """Time of the base and of `passes` of the network over the image, at rates from `measure_rates`."""
    step = chosen.matrix_flops / rates[0] + chosen.attention_flops / rates[1]
    return OVERHEAD * (passes * step + chosen.base_flops / rates[0])


def duration(seconds: float) -> str:
    """Rounded to two digits: "0.4 s", "45 s", "3 min", "2.5 h"."""
    for unit, length in ("h", 3600), ("min", 60):
        if seconds >= 1.5 * length:
            return f"{float(f'{seconds / length:.2g}'):g} {unit}"
    return f"{float(f'{seconds:.2g}'):g} s"
