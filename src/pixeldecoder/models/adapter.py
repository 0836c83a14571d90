"""Normalised latents in, what is added to the transformer's tokens out (eq. 14, 15, 18, 19)."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pixeldecoder.models.layers import Linear, overwrites


class LatentFeatures(NamedTuple):
    """What the latents say, computed once per image: independent of time and of sigma."""

    injections: tuple[torch.Tensor, ...]
    """For each injected block (B, L, D)."""
    pixel: torch.Tensor | None
    """For the pixel pathway (B, L, D), v1.5 only."""
    aux_rgb: torch.Tensor | None
    """The low-resolution image that the latents stand for, (B, 3, H/s, W/s) in [-1, 1], where it was asked for."""
    gates: tuple[torch.Tensor | None, ...] = ()
    """For each injection what its gate makes of it, (B, L, 1) or (B, L, D), where it can apart from the tokens."""
    pixel_gate: torch.Tensor | None = None
    """The same for the pixel pathway."""


class SigmaAwareAdapter(nn.Module):
    """Convolutions on the patch grid, a zero-initialised head for each injection, and the gates.

    Args are those of `PixelDecoderTransformer2DModel`; `dim` is the transformer's width D.
    """

    def __init__(
        self,
        dim: int,
        num_injections: int,
        latent_channels: int,
        latent_downscale_factor: int,
        scale: int,
        patch_size: int,
        adapter_dim: int,
        num_adapter_layers: int,
        adapter_padding_mode: Literal["zeros", "replicate"],
        unpack_latents: bool,
        per_channel_gate: bool,
        inject_pixels: bool,
        aux_rgb: bool,
        aux_rgb_block: int,
    ):
        super().__init__()
        self.unpack_latents = unpack_latents
        # f in pixels of the VAE's image; halved where packed latents are unpacked to 1/2 of their cell size.
        f = latent_downscale_factor // 2 if unpack_latents else latent_downscale_factor
        channels = latent_channels // 4 if unpack_latents else latent_channels
        if (scale * f) % patch_size and patch_size % (scale * f):
            raise ValueError(
                f"a latent cell covers {scale * f} output pixels (scale {scale} x {f}): expected a multiple or a "
                f"divisor of patch_size {patch_size}"
            )
        self.fold = max(1, patch_size // (scale * f))
        self.resize = "nearest" if scale * f > patch_size else "bilinear"  # r > 1 (eq. 18), or a mismatch where r = 1
        # -1: the last features; else those after a residual block, which the input and three layers come before.
        self.aux_rgb_output = aux_rgb_block if aux_rgb_block < 0 else aux_rgb_block + 4

        def conv(inputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, adapter_dim, 3, padding=1, padding_mode=adapter_padding_mode)

        self.convs = nn.Sequential(conv(channels * self.fold**2), nn.SiLU(), conv(adapter_dim))
        for _ in range(num_adapter_layers):
            self.convs.append(ResidualConvs(adapter_dim, conv))
        self.heads = nn.ModuleList(Linear(adapter_dim, dim) for _ in range(num_injections))
        self.pixel_head = Linear(adapter_dim, dim) if inject_pixels else None
        # The gates sit here because their weights belong to the adapter; the transformer applies them.
        gate_dim = dim if per_channel_gate else 1
        self.sigma_gates = nn.ModuleList(SigmaGate(dim, gate_dim) for _ in range(num_injections))
        self.pixel_sigma_gate = SigmaGate(dim, gate_dim) if inject_pixels else None
        self.aux_rgb_head = AuxRGBHead(adapter_dim, patch_size // scale) if aux_rgb else None

    def forward(self, latents: torch.Tensor, grid: tuple[int, int], return_aux_rgb: bool = False) -> LatentFeatures:
        """Latents (B, C, h, w) and the patch grid (Hp, Wp) -> features."""
        if self.unpack_latents:
            latents = F.pixel_shuffle(latents, 2)  # packed channel order (c, dy, dx)
        if self.fold > 1:  # r < 1: several cells in a patch
            cells = (grid[0] * self.fold, grid[1] * self.fold)
            if latents.shape[-2:] != cells:
                latents = F.interpolate(latents, size=cells, mode="bilinear")
            latents = F.pixel_unshuffle(latents, self.fold)
        elif latents.shape[-2:] != grid:
            latents = F.interpolate(latents, size=grid, mode=self.resize)
        outputs = [latents]
        for layer in self.convs:
            outputs.append(layer(outputs[-1]))
        tokens = outputs[-1].flatten(2).transpose(1, 2)
        injections = tuple(head(tokens) for head in self.heads)
        pixel = self.pixel_head(tokens) if self.pixel_head is not None else None
        return LatentFeatures(
            injections=injections,
            pixel=pixel,
            aux_rgb=self.aux_rgb_head(outputs[self.aux_rgb_output]) if return_aux_rgb else None,
            gates=tuple(gate(None, latents) for gate, latents in zip(self.sigma_gates, injections, strict=True)),
            pixel_gate=self.pixel_sigma_gate(None, pixel) if self.pixel_sigma_gate is not None else None,
        )


class ResidualConvs(nn.Module):
    def __init__(self, dim: int, conv: Callable[[int], nn.Conv2d]):
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(4, dim), nn.SiLU(), conv(dim), nn.GroupNorm(4, dim), nn.SiLU(), conv(dim)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x)


class SigmaGate(nn.Module):
    """g (eq. 19), one value per token or D, by which the latent features are multiplied before they are added."""

    def __init__(self, dim: int, gate_dim: int):
        super().__init__()
        self.dim = dim
        self.proj = Linear(2 * dim, gate_dim)
        self.log_alpha = nn.Parameter(torch.full((1,), math.log(5)))  # not a scalar, which FSDP2 refuses

    def forward(
        self,
        hidden_states: torch.Tensor | None,
        latents: torch.Tensor,
        sigma: torch.Tensor | None = None,
        projected: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Tokens and latent features (B, L, D), sigma (B,) -> g.

        Without tokens: what the layer makes of the latents alone, the same at every step, to be given as `projected`;
        `None` where it cannot be split, as it has a LoRA or is brought to the device when called.
        """
        if hidden_states is None:
            plain = type(self.proj) is Linear and "forward" not in vars(self.proj)
            return F.linear(latents, self.proj.weight[:, self.dim :], self.proj.bias) if plain else None
        if projected is None:
            content = self.proj(torch.cat([hidden_states, latents], dim=-1))
        else:
            content = F.linear(hidden_states, self.proj.weight[:, : self.dim])
            content = content.add_(projected) if overwrites(content) else content + projected
        noise = (self.log_alpha.float().exp() * sigma.float()).to(content.dtype)[:, None, None]
        return content.sub_(noise).sigmoid_() if overwrites(content) else torch.sigmoid(content - noise)


class AuxRGBHead(nn.Module):
    """Features (B, K, Hp, Wp) -> RGB (B, 3, Hp n, Wp n), n = P / s pixels to a patch side."""

    def __init__(self, dim: int, pixels: int):
        super().__init__()
        self.pixels = pixels
        self.norm = nn.LayerNorm(dim)
        self.proj_in = Linear(dim, dim)
        self.proj_out = Linear(dim, 3 * pixels**2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = self.proj_out(F.silu(self.proj_in(self.norm(features.movedim(1, -1)))))
        return F.pixel_shuffle(x.movedim(-1, 1), self.pixels)  # channel order (3, dy, dx)
