"""Noisy image, time, text and latents in; velocity out: the PiD network (eq. 9 to 19)."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput, apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from pixeldecoder.flow import velocity_of_clean
from pixeldecoder.models.adapter import LatentFeatures, SigmaAwareAdapter, SigmaGate
from pixeldecoder.models.base import LatentDecoder
from pixeldecoder.models.folder import FolderMixin
from pixeldecoder.models.layers import (
    EPS,
    Linear,
    PatchBlock,
    PixelBlock,
    RMSNorm,
    Rotary,
    TextEmbedding,
    image_rotary,
    in_chunks,
    narrow,
    overwrites,
    pixel_positions,
    text_rotary,
    wide,
)

TIME_WIDTH = 256


@dataclass
class PixelDecoderOutput(BaseOutput):
    """What `PixelDecoderTransformer2DModel` returns."""

    sample: torch.Tensor
    """Velocity v = noise - image, (B, 3, H, W), in the dtype of the input; `None` with `features_only`."""
    features: tuple[torch.Tensor, ...] | None = None
    """Image tokens after each block asked for, (B, D, Hp, Wp)."""
    aux_rgb: torch.Tensor | None = None
    """The low-resolution image that the adapter predicts, (B, 3, H/s, W/s)."""


class PixelDecoderTransformer2DModel(FolderMixin, ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
    """PiD's network (arXiv 2605.23902): PixelDiT conditioned on latents through a sigma-aware adapter.

    The defaults are the released v1 decoder for 16-channel latents; v1.5 differs in `adapter_dim=1024`,
    `adapter_padding_mode="replicate"`, `per_channel_gate=False`, `inject_pixels=True`, `aux_rgb=True` and
    `rope_reference_size=2048`.

    Args:
        patch_size: image pixels P to a patch side.
        num_layers: patch blocks N.
        num_attention_heads, attention_head_dim: of the patch blocks; their product is the width D.
        num_pixel_layers: pixel blocks M.
        pixel_dim: channels d of a pixel token, a multiple of 4.
        num_pixel_attention_heads, pixel_attention_head_dim: of the pixel blocks; their product is the width A.
        text_embed_dim: width Dt of the prompt embeddings; `None` for a network without text.
        max_text_length: text tokens Tmax; more are cut off.
        latent_channels: channels C of the latents; `None` for the text-to-image prior, which has no adapter.
        latent_downscale_factor: pixels f of the autoencoder's image to a latent cell side.
        scale: how much larger (s) than the autoencoder's image the output is.
        adapter_dim: width K of the adapter, a multiple of 4.
        num_adapter_layers: residual blocks R of the adapter.
        adapter_padding_mode: of its convolutions.
        injection_interval: latents are injected before every so many-th patch block.
        unpack_latents: undo FLUX.2's 2 x 2 packing first.
        per_channel_gate: D gate values to a token, or one.
        inject_pixels: inject into the pixel pathway, too.
        aux_rgb: has the auxiliary head that predicts the low-resolution image.
        aux_rgb_block: the residual block of the adapter, from 0, whose output that head reads; -1: the last.
        rope_reference_size: image side in pixels for which the rotary frequencies are made.
        prediction_type: what the layers predict, the "velocity" or the clean image ("sample"); `forward` returns the
            velocity either way.
        base_dim: width of the convolutional decoder of the latents (`models.base`) whose image the network sees beside
            the noisy one and adds to; `None`: without it, as all released decoders.

    Raises:
        ValueError: an argument of a wrong type or range, which the message names.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PatchBlock", "PixelBlock", "SigmaAwareAdapter", "LatentDecoder"]
    _repeated_blocks = ["PatchBlock", "PixelBlock"]
    # Adapter and base run before `forward`; the adapter's pixel gate runs later, and its auxiliary head at times.
    _group_offload_block_modules = [
        "adapter", "pixel_head", "pixel_sigma_gate", "aux_rgb_head",
        "base", "conv_in", "to_small", "refine", "to_image",
    ]  # fmt: skip
    # Rounding these shows in the image: gates, time, and everything that works on single pixels. They are small.
    _skip_layerwise_casting_patterns = [
        "norm",
        "sigma_gate",
        "time_embed",
        "pixel_embed",
        "pixel_blocks",
        "proj_out",
        "base",
    ]

    @register_to_config
    def __init__(
        self,
        patch_size: int = 16,
        num_layers: int = 14,
        num_attention_heads: int = 24,
        attention_head_dim: int = 64,
        num_pixel_layers: int = 2,
        pixel_dim: int = 16,
        num_pixel_attention_heads: int = 16,
        pixel_attention_head_dim: int = 72,
        text_embed_dim: int | None = 2304,
        max_text_length: int = 300,
        latent_channels: int | None = 16,
        latent_downscale_factor: int = 8,
        scale: int = 4,
        adapter_dim: int = 512,
        num_adapter_layers: int = 4,
        adapter_padding_mode: Literal["zeros", "replicate"] = "zeros",
        injection_interval: int = 2,
        unpack_latents: bool = False,
        per_channel_gate: bool = True,
        inject_pixels: bool = False,
        aux_rgb: bool = False,
        aux_rgb_block: int = -1,
        rope_reference_size: int = 1024,
        prediction_type: Literal["velocity", "sample"] = "velocity",
        base_dim: int | None = None,
    ):
        super().__init__()
        _check(self.config)
        dim = num_attention_heads * attention_head_dim
        self.base = None
        if base_dim is not None and latent_channels is not None:
            cell = latent_downscale_factor // 2 if unpack_latents else latent_downscale_factor
            channels = latent_channels // 4 if unpack_latents else latent_channels
            self.base = LatentDecoder(channels, cell.bit_length() - 1, scale.bit_length() - 1, base_dim)
        image_channels = 3 if base_dim is None else 6
        self.patch_embed = Linear(image_channels * patch_size**2, dim)
        self.time_embed = TimestepEmbedding(TIME_WIDTH, dim)
        self.text_embed = None if text_embed_dim is None else TextEmbedding(text_embed_dim, dim, max_text_length)
        self.adapter = None
        if latent_channels is not None:
            self.adapter = SigmaAwareAdapter(
                dim, -(-num_layers // injection_interval), latent_channels, latent_downscale_factor, scale, patch_size,
                adapter_dim, num_adapter_layers, adapter_padding_mode, unpack_latents, per_channel_gate, inject_pixels,
                aux_rgb, aux_rgb_block,
            )  # fmt: skip
        self.patch_blocks = nn.ModuleList(
            PatchBlock(dim, num_attention_heads, text_embed_dim is not None) for _ in range(num_layers)
        )
        self.pixel_embed = Linear(image_channels, pixel_dim)
        pixel_attn_dim = num_pixel_attention_heads * pixel_attention_head_dim
        self.pixel_blocks = nn.ModuleList(
            PixelBlock(dim, pixel_dim, pixel_attn_dim, num_pixel_attention_heads, patch_size)
            for _ in range(num_pixel_layers)
        )
        self.norm_out = RMSNorm(pixel_dim, eps=EPS)
        self.proj_out = Linear(pixel_dim, 3)
        self.gradient_checkpointing = False
        self._init_weights()

    def image_rotary(self, height: int, width: int, device: torch.device | None = None) -> tuple[Rotary, Rotary]:
        """Rotary tables (eq. 13) of the patch and of the pixel blocks for an image of `height` x `width` pixels: the
        same at every step and for every tile of one size. Pass them as `image_rotary_emb=`."""
        config = self.config
        grid, reference = (height // config.patch_size, width // config.patch_size), config.rope_reference_size
        patch, pixel = (
            image_rotary(*grid, head_dim, reference / config.patch_size, device or self.device)
            for head_dim in (config.attention_head_dim, config.pixel_attention_head_dim)
        )
        return patch, pixel

    @apply_forward_hook
    @apply_lora_scale("attention_kwargs")
    def encode_latents(
        self,
        latents: torch.Tensor,
        height: int,
        width: int,
        return_aux_rgb: bool = False,
        sigma: torch.Tensor | float | None = None,
        base_rows: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> LatentFeatures:
        """Run the adapter and the base, once per image; pass the result as `latent_features=` at every step.

        Args:
            latents: normalised latents (B, C, h, w), as noisy as their sigma says.
            height, width: of the output image in pixels, multiples of the patch size.
            return_aux_rgb: also predict the low-resolution image.
            sigma: of the latents, a number or (B,); a network with a base must be told.
            base_rows: of latent cells that the base decodes at a time, by default all; fewer take less memory.
            attention_kwargs: as in `forward`.

        Raises:
            ValueError: the model takes no latents, or other channels, or another size, or needs sigma.
        """
        config = self.config
        if self.adapter is None:
            raise ValueError("this model is a prior without an adapter: it takes no latents")
        if latents.ndim != 4 or latents.shape[1] != config.latent_channels:
            raise ValueError(
                f"expected latents of shape (B, {config.latent_channels}, h, w), got {tuple(latents.shape)}: "
                "this decoder is for another latent space, or the latents are packed or unpacked differently"
            )
        if return_aux_rgb and self.adapter.aux_rgb_head is None:
            raise ValueError("return_aux_rgb=True, but this model has no auxiliary RGB head (aux_rgb=False)")
        grid = (height // config.patch_size, width // config.patch_size)
        latents = latents.to(self.dtype)
        features = self.adapter(latents, grid, return_aux_rgb)
        if self.base is not None:
            if sigma is None:
                raise ValueError("this model has a base, which is told the latents' noise: pass sigma, as in `forward`")
            sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).expand(latents.shape[0])
            cells = F.pixel_shuffle(latents, 2) if config.unpack_latents else latents
            side = config.scale * 2**self.base.upsamplings
            size = -(-height // side), -(-width // side)
            if cells.shape[-2:] != size:
                cells = F.interpolate(cells, size=size, mode="bilinear")
            features = features._replace(base=self.base(cells, sigma, base_rows)[..., :height, :width])
        return features

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        sigma: torch.Tensor | float = 0.0,
        latent_features: LatentFeatures | None = None,
        return_features: tuple[int, ...] | None = None,
        features_only: bool = False,
        return_aux_rgb: bool = False,
        chunk_size: int | None = None,
        return_dict: bool = True,
        image_rotary_emb: tuple[Rotary, Rotary] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> PixelDecoderOutput | tuple:
        """Predict the velocity of a noisy image.

        Args:
            hidden_states: noisy image x_t (eq. 1), (B, 3, H, W), of an image in [-1, 1]; float32 is best,
                whatever the dtype of the weights.
            timestep: 1000 t, in [0, 1000], a number or (B,).
            encoder_hidden_states: prompt embeddings (B, T, Dt); `None` for a model without text.
            latents: normalised latents (B, C, h, w); without them the model is the plain text-to-image backbone.
            sigma: noise level of the latents in [0, 1], a number or (B,).
            latent_features: `encode_latents(latents, H, W)`, in place of `latents`.
            return_features: patch blocks (from 0) whose image tokens are wanted.
            features_only: stop after the last of these blocks, without a velocity.
            return_aux_rgb: also return the adapter's auxiliary low-resolution image.
            chunk_size: patches on which everything but attention works at a time, in the pixel blocks; in the patch
                blocks as many more as their tensors are narrower. By default all. Fewer take less memory, and on a CPU
                less time; the numbers stay the same to rounding.
            image_rotary_emb: `image_rotary(H, W)`, made once for all steps of a size; by default made here.
            attention_kwargs: `{"scale": x}` multiplies the strength of LoRA layers by x during this call.

        Raises:
            ValueError: shapes that do not fit the model, text missing or in excess.
        """
        self._check_inputs(
            hidden_states, encoder_hidden_states, latents is not None or latent_features is not None, return_features,
            features_only, return_aux_rgb, chunk_size, image_rotary_emb, attention_kwargs,
        )  # fmt: skip
        batch, _, height, width = hidden_states.shape
        patch, device, dtype = self.config.patch_size, hidden_states.device, self.dtype
        grid = (height // patch, width // patch)
        t = torch.as_tensor(timestep, dtype=torch.float32, device=device).expand(batch)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=device).expand(batch)
        image = hidden_states.to(dtype)
        if latents is not None:
            latent_features = self.encode_latents(latents, height, width, return_aux_rgb, sigma)
        if self.base is not None:
            image = torch.cat([image, latent_features.base.to(dtype)], dim=1)
        rotary, pixel_rotary = image_rotary_emb or self.image_rotary(height, width, device)

        # Time: e_t (B, 1, D) and the condition of the patch blocks, angles in float32 (eq. 9, 10).
        time = get_timestep_embedding(t, TIME_WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0, max_period=10)
        time = self.time_embed(time.to(dtype))[:, None]
        condition = F.silu(time)

        # Text (B, T, D).
        text, text_rope = None, None
        if self.text_embed is not None:
            text = self.text_embed(encoder_hidden_states.to(dtype))
            text_rope = text_rotary(text.shape[1], self.config.attention_head_dim, device)

        # Patches h (B, L, D) meet the text in attention (eq. 12); latents come in through their gates (eq. 14).
        h = self.patch_embed(F.unfold(image, patch, stride=patch).transpose(1, 2))
        features = {}
        # Their tensors are narrower than those of a patch's pixels: so many more at a time.
        patch_chunk = (
            None if chunk_size is None else chunk_size * max(1, patch**2 * self.config.pixel_dim // h.shape[2])
        )
        last = max(return_features) if features_only and return_features else len(self.patch_blocks) - 1
        for i, block in enumerate(self.patch_blocks[: last + 1]):
            if latent_features is not None and i % self.config.injection_interval == 0:
                injection = i // self.config.injection_interval
                injected, gates = latent_features.injections[injection], latent_features.gates
                gate = self.adapter.sigma_gates[injection](
                    narrow(h, dtype), injected, sigma, gates[injection] if gates else None
                )
                h = wide(h)
                h = torch.addcmul(h, gate, injected, out=h if overwrites(h) else None)
            h, text = self._run(block, h, text, condition, rotary, text_rope, i == last, patch_chunk)
            if return_features is not None and i in return_features:
                kept = h.clone() if overwrites(h) else h  # the next block writes over it
                features[i] = kept.transpose(1, 2).unflatten(2, grid)
        wanted = None if return_features is None else tuple(features[i] for i in return_features)
        if features_only:
            result = PixelDecoderOutput(sample=None, features=wanted)  # type: ignore[arg-type]
            return result if return_dict else result.to_tuple()

        # Pixels (B, L, P^2, d): s (B, L, D) conditions those of each patch (eq. 15, 17).
        s = F.silu(time + narrow(h, dtype), inplace=overwrites(h))
        if latent_features is not None and latent_features.pixel is not None:
            gate = self.adapter.pixel_sigma_gate(s, latent_features.pixel, sigma, latent_features.pixel_gate)
            s = torch.addcmul(s, gate, latent_features.pixel)
        pixels = self._pixels(image)
        for block in self.pixel_blocks:
            pixels = self._run(block, pixels, s, pixel_rotary, chunk_size)
        output = in_chunks(chunk_size, lambda x, out: self.proj_out(self.norm_out(x)), pixels)
        output = self._image(output, grid, patch).to(hidden_states.dtype)

        # The velocity, or a clean image and the velocity that it stands for (eq. 3).
        if self.config.prediction_type == "sample":
            if self.base is not None:
                output = output + latent_features.base.to(output.dtype)
            output = velocity_of_clean(hidden_states, output, t / 1000)
        aux_rgb = latent_features.aux_rgb if return_aux_rgb else None
        result = PixelDecoderOutput(sample=output, features=wanted, aux_rgb=aux_rgb)
        return result if return_dict else result.to_tuple()

    def _init_weights(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(("adaln", "adaln_in", "adaln_out")):
                nn.init.trunc_normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, SigmaGate):  # g is about .88, .50, .05 at sigma = 0, .4, 1
                nn.init.trunc_normal_(module.proj.weight, std=0.01)
                nn.init.constant_(module.proj.bias, 2.0)
            elif isinstance(module, SigmaAwareAdapter):
                for head in (*module.heads, *([module.pixel_head] if module.pixel_head is not None else [])):
                    nn.init.zeros_(head.weight)
            elif isinstance(module, TextEmbedding):
                nn.init.trunc_normal_(module.positions, std=0.02)
        nn.init.zeros_(self.proj_out.weight)
        if self.base is not None:
            for module in self.base.modules():
                if isinstance(module, nn.Conv2d):  # wider than elsewhere: there is no norm
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    module.weight.data *= 0.5
            # It starts as a grey image.
            for name in "to_small", "to_image", "sigma_embed.2":
                nn.init.zeros_(self.base.get_parameter(f"{name}.weight"))
            nn.init.constant_(self.base.get_parameter("to_small.bias"), 0.5)

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """As diffusers' `add_adapter`. The usual names of q, k, v and their output layer, "to_q", "add_k_proj",
        "to_out.0"..., mean the layers that hold them here: `to_qkv`, `add_qkv` and `to_out`."""
        if not isinstance(adapter_config.target_modules, str | None):
            adapter_config = copy.copy(adapter_config)
            names = set(adapter_config.target_modules)
            for usual, ours in (
                (r"\bto_[qkv]$", "to_qkv"),
                (r"\badd_[qkv]_proj$", "add_qkv"),
                (r"\bto_out\.0$", "to_out"),
            ):
                names = {re.sub(usual, ours, name) for name in names}
            adapter_config.target_modules = names
        super().add_adapter(adapter_config, adapter_name)

    def _check_inputs(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        has_latents: bool,
        return_features: tuple[int, ...] | None,
        features_only: bool,
        return_aux_rgb: bool,
        chunk_size: int | None,
        image_rotary_emb: tuple[Rotary, Rotary] | None,
        attention_kwargs: dict[str, Any] | None,
    ) -> None:
        """Raises ValueError for what `forward` cannot take."""
        _, channels, height, width = hidden_states.shape
        patch = self.config.patch_size
        if channels != 3 or height % patch or width % patch or not height * width:
            raise ValueError(
                f"expected an image (B, 3, H, W) with H and W multiples of {patch}, got {tuple(hidden_states.shape)}"
            )
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"expected a chunk_size of at least 1 patch, got {chunk_size}")
        if (encoder_hidden_states is None) != (self.text_embed is None):
            expected = "no text (text_embed_dim=None)" if self.text_embed is None else "encoder_hidden_states"
            raise ValueError(f"this model expects {expected}")
        if attention_kwargs:  # "scale" is taken out before
            raise ValueError(f'attention_kwargs: expected "scale" alone, got {", ".join(attention_kwargs)}, too')
        if not has_latents and (return_aux_rgb or self.base is not None):
            what = "this model's base" if self.base is not None else "the auxiliary RGB image"
            raise ValueError(f"{what} is made from latents: pass latents or latent_features")
        if features_only and not return_features:
            raise ValueError("features_only=True: expected return_features, the blocks whose features are wanted")
        count = height // patch * (width // patch)
        if image_rotary_emb is not None and (given := image_rotary_emb[0].shape[1]) != count:
            raise ValueError(f"image_rotary_emb is of {given} patches, the image has {count}")

    def _run(self, block: nn.Module, *args):
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def _pixels(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3 or 6, H, W) -> pixel tokens (B, L, P^2, d) with their places (eq. 16); patches, and the pixels in
        them, go row by row."""
        patch, half = self.config.patch_size, self.config.pixel_dim // 2
        # (B, Hp, Wp, P, P, 3), before the embedding: reordering three channels is cheaper than d.
        x = image.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 3, 5, 1)
        pixels = self.pixel_embed(x)
        column, row = (
            pixel_positions(size, 2 * half, image.device).to(pixels.dtype).unflatten(0, (-1, patch))
            for size in (image.shape[3], image.shape[2])
        )
        pixels[..., :half].add_(column[:, None])
        pixels[..., half:].add_(row[:, None, :, None])
        return pixels.flatten(3, 4).flatten(1, 2)

    @staticmethod
    def _image(pixels: torch.Tensor, grid: tuple[int, int], patch: int) -> torch.Tensor:
        """(B, L, P^2, 3) -> (B, 3, H, W): the inverse."""
        x = pixels.unflatten(1, grid).unflatten(3, (patch, patch))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


_LEAST = dict(
    patch_size=1, num_layers=1, num_attention_heads=1, attention_head_dim=8, num_pixel_layers=1, pixel_dim=4,
    num_pixel_attention_heads=1, pixel_attention_head_dim=8, text_embed_dim=1, max_text_length=1, latent_channels=1,
    latent_downscale_factor=1, scale=1, adapter_dim=4, num_adapter_layers=0, injection_interval=1, aux_rgb_block=-1,
    rope_reference_size=1, base_dim=2,
)  # fmt: skip
_MOST_LAYERS, _MOST = 512, 2**20
"""Of layers, and of anything else: a file that says more would take minutes and gigabytes before it fits no weights."""
_OF_FOUR = ("attention_head_dim", "pixel_attention_head_dim", "pixel_dim", "adapter_dim")
"""Multiples of 4: the heads for 2-D rotary embedding, pixels for their sin-cos table, the adapter for its groups."""
_EITHER = dict(prediction_type=("velocity", "sample"), adapter_padding_mode=("zeros", "replicate"))
_SWITCHES = ("unpack_latents", "per_channel_gate", "inject_pixels", "aux_rgb")


def _check(config: Mapping[str, Any]) -> None:
    """Refuse arguments that no network can have.

    Raises:
        ValueError: naming the first such argument, and what was expected.
    """
    for name, least in _LEAST.items():
        value, step = config[name], 4 if name in _OF_FOUR else 1
        if value is None and name in ("text_embed_dim", "latent_channels", "base_dim"):
            continue
        if type(value) is not int or value < least or value % step:
            kind = "a whole number" if step == 1 else "a multiple of 4"
            raise ValueError(f"{name} is {value!r}: expected {kind}, at least {least}")
        if value > (most := _MOST_LAYERS if name.endswith("_layers") else _MOST):
            raise ValueError(f"{name} is {value}: expected at most {most}")
    for name, values in (_EITHER | dict.fromkeys(_SWITCHES, (True, False))).items():
        if type(config[name]) is not type(values[0]) or config[name] not in values:
            raise ValueError(f"{name} is {config[name]!r}: expected {values[0]!r} or {values[1]!r}")
    if config["aux_rgb_block"] >= config["num_adapter_layers"]:
        raise ValueError(
            f"aux_rgb_block is {config['aux_rgb_block']}: expected less than num_adapter_layers, "
            f"{config['num_adapter_layers']}"
        )
    if config["aux_rgb"] and config["patch_size"] % config["scale"]:
        raise ValueError(f"aux_rgb=True: expected scale {config['scale']} to divide patch_size {config['patch_size']}")
    if config["unpack_latents"] and (config["latent_channels"] or 4) % 4 | config["latent_downscale_factor"] % 2:
        raise ValueError(
            f"unpack_latents=True: expected latent_channels {config['latent_channels']} to be a multiple of 4, "
            f"latent_downscale_factor {config['latent_downscale_factor']} of 2"
        )
    if config["base_dim"] is not None:
        sides = config["scale"], config["latent_downscale_factor"]
        if config["latent_channels"] is None or config["prediction_type"] != "sample":
            raise ValueError('base_dim: expected a network with latents that predicts the image ("sample")')
        if any(side & (side - 1) for side in sides):
            raise ValueError(f"base_dim: expected powers of 2 as scale and latent_downscale_factor, got {sides}")
