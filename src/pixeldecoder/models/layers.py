"""The two transformer blocks of PixelDiT and their parts: tokens in, tokens out (method: Network, 3, 4, 8)."""

import math

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

EPS = 1e-6
Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines (L, head width), each repeated for the two channels of a pair, float32."""


class PatchBlock(nn.Module):
    """Dual-stream block (MM-DiT) on patch tokens (B, L, D) and text tokens (B, T, D)."""

    def __init__(self, dim: int, heads: int, with_text: bool):
        super().__init__()
        self.image = StreamNorms(dim)
        self.text = StreamNorms(dim) if with_text else None
        self.attn = Attention(dim, heads, with_text)
        self.mlp = SwiGLU(dim)
        self.text_mlp = SwiGLU(dim) if with_text else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        text: torch.Tensor | None,
        condition: torch.Tensor,
        rotary: Rotary,
        text_rotary: Rotary | None,
        is_last: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`condition` c = SiLU(e_t) is (B, 1, D). Nobody reads the text after the last block: it is left as it came."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.image.adaln(condition).chunk(6, dim=-1)
        attn_input = modulate(self.image.norm1(hidden_states), shift, scale)
        if text is None:
            attn_output, _ = self.attn(attn_input, rotary)
        else:
            text_mods = self.text.adaln(condition).chunk(6, dim=-1)
            text_input = modulate(self.text.norm1(text), text_mods[0], text_mods[1])
            attn_output, text_output = self.attn(attn_input, rotary, text_input, text_rotary)
            if not is_last:
                text = text + text_mods[2] * self.attn.to_add_out(text_output)
                text = text + text_mods[5] * self.text_mlp(modulate(self.text.norm2(text), text_mods[3], text_mods[4]))
        hidden_states = hidden_states + gate * attn_output
        hidden_states = hidden_states + mlp_gate * self.mlp(
            modulate(self.image.norm2(hidden_states), mlp_shift, mlp_scale)
        )
        return hidden_states, text


class PixelBlock(nn.Module):
    """PiT block on pixel tokens (B, L, P^2, d): every pixel has its own modulation, patches talk through attention."""

    def __init__(self, dim: int, pixel_dim: int, attn_dim: int, heads: int, patch_size: int):
        super().__init__()
        pixels = patch_size**2
        self.adaln = nn.Linear(dim, 6 * pixel_dim * pixels)
        self.norm1 = nn.RMSNorm(pixel_dim, eps=EPS)
        self.compress = nn.Linear(pixels * pixel_dim, attn_dim)
        self.attn = Attention(attn_dim, heads, with_text=False)
        self.expand = nn.Linear(attn_dim, pixels * pixel_dim)
        self.norm2 = nn.RMSNorm(pixel_dim, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(pixel_dim, 4 * pixel_dim), nn.GELU(), nn.Linear(4 * pixel_dim, pixel_dim))

    def forward(self, pixels: torch.Tensor, condition: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """`condition` s is (B, L, D), one vector per patch."""
        mods = self.adaln(condition).unflatten(-1, (pixels.shape[2], -1))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = mods.chunk(6, dim=-1)
        tokens = self.compress(modulate(self.norm1(pixels), shift, scale).flatten(2))
        tokens = self.expand(self.attn(tokens, rotary)[0])
        pixels = pixels + gate * tokens.view_as(pixels)
        return pixels + mlp_gate * self.mlp(modulate(self.norm2(pixels), mlp_shift, mlp_scale))


class StreamNorms(nn.Module):
    """One stream's norms and adaLN (method: Network, 4): D -> shift, scale, gate for attention, then for the MLP."""

    def __init__(self, dim: int):
        super().__init__()
        self.adaln = nn.Linear(dim, 6 * dim)
        self.norm1 = nn.RMSNorm(dim, eps=EPS)
        self.norm2 = nn.RMSNorm(dim, eps=EPS)


class SwiGLU(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        width = int(2 * 4 * dim / 3)
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.up_proj = nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class AttentionProcessor:
    """Attention through diffusers' dispatcher, so that `set_attention_backend` decides what runs."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "Attention",
        hidden_states: torch.Tensor,
        rotary: Rotary,
        text: torch.Tensor | None = None,
        text_rotary: Rotary | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = attn.to_qkv(hidden_states).unflatten(-1, (3, attn.heads, -1)).unbind(2)
        query = apply_rotary_emb(attn.norm_q(query), rotary, sequence_dim=1)
        key = apply_rotary_emb(attn.norm_k(key), rotary, sequence_dim=1)
        if text is not None:
            text_query, text_key, text_value = attn.add_qkv(text).unflatten(-1, (3, attn.heads, -1)).unbind(2)
            text_query = apply_rotary_emb(attn.norm_added_q(text_query), text_rotary, sequence_dim=1)
            text_key = apply_rotary_emb(attn.norm_added_k(text_key), text_rotary, sequence_dim=1)
            query = torch.cat([text_query, query], dim=1)
            key = torch.cat([text_key, key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        output = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        ).flatten(2)
        if text is None:
            return attn.to_out(output), None
        return attn.to_out(output[:, text.shape[1] :]), output[:, : text.shape[1]]


class Attention(nn.Module, AttentionModuleMixin):
    """Self-attention, or joint attention over [text, image]; fused bias-free qkv, q and k normalised per head."""

    _default_processor_cls = AttentionProcessor
    _available_processors = [AttentionProcessor]
    _supports_qkv_fusion = False

    def __init__(self, dim: int, heads: int, with_text: bool):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm_q = nn.RMSNorm(dim // heads, eps=EPS)
        self.norm_k = nn.RMSNorm(dim // heads, eps=EPS)
        self.to_out = nn.Linear(dim, dim)
        if with_text:
            self.add_qkv = nn.Linear(dim, 3 * dim, bias=False)
            self.norm_added_q = nn.RMSNorm(dim // heads, eps=EPS)
            self.norm_added_k = nn.RMSNorm(dim // heads, eps=EPS)
            self.to_add_out = nn.Linear(dim, dim)
        self.set_processor(AttentionProcessor())

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: Rotary,
        text: torch.Tensor | None = None,
        text_rotary: Rotary | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the image output (B, L, D) and the text's before its output layer, which the last block skips."""
        return self.processor(self, hidden_states, rotary, text, text_rotary)


class TextEmbedding(nn.Module):
    """Prompt embeddings (B, T, Dt) -> text tokens (B, min(T, Tmax), D) (method: Network, 3)."""

    def __init__(self, text_embed_dim: int, dim: int, max_length: int):
        super().__init__()
        self.proj = nn.Linear(text_embed_dim, dim)
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.positions = nn.Parameter(torch.zeros(1, max_length, dim))

    def forward(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        prompt_embeds = prompt_embeds[:, : self.positions.shape[1]]
        return self.norm(self.proj(prompt_embeds)) + self.positions[:, : prompt_embeds.shape[1]]


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale) + shift


def image_rotary(height: int, width: int, head_dim: int, reference: float, device: torch.device) -> Rotary:
    """2-D RoPE, NTK-aware, for a grid of height x width patches; `reference` is the grid the frequencies are made for.

    Angles alternate x, y, x, y...; neighbouring channels form a pair (method: "2-D RoPE, NTK-aware").
    """
    axis_dim = head_dim / 2
    k = torch.arange(head_dim // 4, dtype=torch.float32, device=device)
    angles = []
    for size in (width, height):
        theta = 10000 * (size / reference) ** (axis_dim / (axis_dim - 2))
        positions = torch.linspace(0, 16, size, device=device)
        angles.append(positions[:, None] * theta ** (-4 * k / head_dim))
    x, y = angles
    angle = torch.stack([x[None].expand(height, -1, -1), y[:, None].expand(-1, width, -1)], dim=-1)
    return _pairs(angle.reshape(height * width, -1))


def text_rotary(length: int, head_dim: int, device: torch.device) -> Rotary:
    """1-D RoPE of text: positions 0 to T - 1, frequencies 10000^(-2i / hd)."""
    i = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    positions = torch.arange(length, dtype=torch.float32, device=device)
    return _pairs(positions[:, None] * 10000 ** (-2 * i / head_dim))


def _pairs(angle: torch.Tensor) -> Rotary:
    angle = angle.repeat_interleave(2, dim=-1)
    return angle.cos(), angle.sin()


def pixel_positions(height: int, width: int, dim: int, device: torch.device) -> torch.Tensor:
    """Fixed sin-cos table (H, W, d) of the whole image: the first half encodes the column, the second the row
    (method: Network, 7)."""
    quarter = dim // 4
    frequencies = torch.exp(-math.log(10000) * torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    column, row = (
        torch.cat([angle.sin(), angle.cos()], dim=-1)
        for size in (width, height)
        for angle in [torch.arange(size, dtype=torch.float32, device=device)[:, None] * frequencies]
    )
    return torch.cat([column[None].expand(height, -1, -1), row[:, None].expand(-1, width, -1)], dim=-1)
