"""The two transformer blocks of PixelDiT and their parts: tokens in, tokens out (eq. 11 to 13, 16, 17)."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

EPS = 1e-6
ONEDNN: tuple[torch.dtype, ...] = (torch.float32,) if torch.backends.mkldnn.is_available() else ()
"""What oneDNN multiplies on this machine."""
if ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported():  # on x86 where there is AVX-512
    ONEDNN = (*ONEDNN, torch.bfloat16)
Rotary = torch.Tensor
"""Cosines and sines (1, L, head width / 2, 2) of the angles by which pairs of channels are turned, float32."""


def overwrites(x: torch.Tensor) -> bool:
    """Whether layers may write over what was made of `x`, which saves passes over memory: not where a gradient is
    recorded, a graph is traced, or autocast mixes dtypes."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # before what PyTorch 2.6 cannot trace
        return False
    device = x.device.type
    return not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))


def wide(x: torch.Tensor) -> torch.Tensor:
    """Sums over the blocks leave float16's range, and there are float32; what a layer reads is normalised first."""
    return x.float() if x.dtype == torch.float16 else x


def narrow(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """For a layer of that dtype that reads it as it is: what float16 cannot hold, as its largest number."""
    return x.clip(-65504, 65504).to(dtype) if dtype == torch.float16 else x


class Linear(nn.Linear):
    """`nn.Linear` that on a CPU takes oneDNN's product with all that belongs to it, where PyTorch takes MKL's in
    float32, which on an AMD EPYC is 1.1 to 1.3 times as slow, and writes the bias first in bfloat16."""

    def forward(self, x: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        """(..., in) -> (..., out), after its GELU, if asked for."""
        weight = self.weight
        if (
            x.device.type == "cpu"
            and x.dtype == weight.dtype
            and x.dtype in ONEDNN
            and type(weight) is nn.Parameter  # and not quantised
            and overwrites(x)
        ):
            return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "gelu" if gelu else "none", [], "none")
        y = super().forward(x)
        return F.gelu(y) if gelu else y


class GELULinear(nn.Sequential):
    """Linear, GELU, Linear, the first two as one operation where nothing has taken the layer's place."""

    def __init__(self, dim: int, width: int):
        super().__init__(Linear(dim, width), nn.GELU(), Linear(width, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, _, last = self
        return last(first(x, gelu=True)) if type(first) is Linear else super().forward(x)


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` that in float16 reads float32 (`wide`), too, and takes fewer passes on a CPU, with gradients and
    without."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, on_cpu = self.weight, x.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and overwrites(x):
            y = x.to(torch.promote_types(x.dtype, torch.float32))
            factor = _rms(y, self.eps)
            return torch.mul(y, factor, out=None if y is x else y).mul_(weight).to(weight.dtype)
        if on_cpu and x.dtype == weight.dtype == torch.float32 and type(weight) is nn.Parameter:
            return _RMSNormFunction.apply(x, weight, self.eps)
        if weight.dtype != torch.float16:
            return super().forward(x)
        return F.rms_norm(x.float(), self.normalized_shape, weight.float(), self.eps).to(torch.float16)


def _rms(x: torch.Tensor, eps: float | None) -> torch.Tensor:
    """What divides (..., D) by its root mean square, (..., 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNormFunction(torch.autograd.Function):
    """y = x r w with r = (mean(x^2) + eps)^(-1/2): dx = r (g w - n mean(g w n)) with n = x r."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        factor = _rms(x, eps)
        normal = x * factor
        ctx.save_for_backward(normal, weight, factor)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        normal, weight, factor = ctx.saved_tensors
        product = grad * normal
        mean = F.linear(product, weight[None]).div_(len(weight))
        grad_x = torch.addcmul(grad * weight, normal, mean, value=-1).mul_(factor)
        return grad_x, product.flatten(0, -2).sum(0), None


class Block(nn.Module):
    """Work on single tokens, then attention, then work on single tokens."""

    _on_tokens = ("before_attention", "after_attention")

    def compile(self, **kwargs) -> None:
        """`torch.compile` what works on single tokens: no number of chunks, and no attention kernel, recompiles it."""
        for name in self._on_tokens:
            setattr(self, name, _compiled(getattr(self, name), **kwargs))

    def __getstate__(self) -> dict[str, Any]:
        """As `nn.Module` does, without what is compiled, which belongs to these weights: copies and pickles are not."""
        return {key: value for key, value in super().__getstate__().items() if key not in self._on_tokens}


class PatchBlock(Block):
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
        chunk_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(eq. 12). `condition` is c, (B, 1, D). The last block returns the text unchanged, as nothing reads it.

        Where no gradient is recorded, the new tokens are written over the old ones.
        """
        overwrite = overwrites(hidden_states)
        if overwrite:
            hidden_states = wide(hidden_states)
        mods = self.image.adaln(condition).chunk(6, dim=-1)
        text_mods: tuple[torch.Tensor, ...] = ()
        length = 0 if text is None else text.shape[1]
        text_qkv = image_qkv = None
        if overwrite:
            qkv = self.attn.empty_qkv(condition, length + hidden_states.shape[1])
            text_qkv, image_qkv = qkv[:, :length], qkv[:, length:]
        if text is not None and text_rotary is not None:
            text_mods = self.text.adaln(condition).chunk(6, dim=-1)
            text_qkv = self.attn.project_text(modulate(self.text.norm1(text), *text_mods[:2]), text_rotary, text_qkv)
        image_qkv = in_chunks(
            chunk_size, lambda h, r, out: self.before_attention(h, r, *mods[:2], out=out), hidden_states, rotary,
            out=image_qkv,
        )  # fmt: skip
        if not overwrite:
            qkv = image_qkv if text_qkv is None else torch.cat([text_qkv, image_qkv], dim=1)
        attended = self.attn(qkv, length if is_last else 0)
        if text is not None and not is_last:
            text = torch.addcmul(wide(text), wide(text_mods[2]), self.attn.to_add_out(attended[:, :length]))
            text_mlp = self.text_mlp(modulate(self.text.norm2(text), *text_mods[3:5]))
            text = torch.addcmul(text, wide(text_mods[5]), text_mlp)
            attended = attended[:, length:]
        hidden_states = in_chunks(
            chunk_size, lambda h, a, out: self.after_attention(h, a, *mods[2:], out=out), hidden_states, attended,
            out=hidden_states if overwrite else None,
        )  # fmt: skip
        return hidden_states, text

    def before_attention(
        self,
        hidden_states: torch.Tensor,
        rotary: Rotary,
        shift: torch.Tensor,
        scale: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.attn.project(modulate(self.image.norm1(hidden_states), shift, scale), rotary, out)

    def after_attention(
        self,
        hidden_states: torch.Tensor,
        attended: torch.Tensor,
        gate: torch.Tensor,
        mlp_shift: torch.Tensor,
        mlp_scale: torch.Tensor,
        mlp_gate: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden_states = torch.addcmul(wide(hidden_states), wide(gate), self.attn.to_out(attended), out=out)
        mlp = self.mlp(modulate(self.image.norm2(hidden_states), mlp_shift, mlp_scale))
        return torch.addcmul(hidden_states, wide(mlp_gate), mlp, out=out)


class PixelBlock(Block):
    """PiT block on pixel tokens (B, L, P^2, d): every pixel has its own modulation, and patches attend to each other.

    That modulation is six times the size of the pixels; it lives for one chunk of patches at a time.
    """

    def __init__(self, dim: int, pixel_dim: int, attn_dim: int, heads: int, patch_size: int):
        super().__init__()
        pixels = patch_size**2
        # Rows (shift and scale, P^2, d) before attention, (gate, shift, scale and gate, P^2, d) after it.
        self.adaln_in = Linear(dim, 2 * pixel_dim * pixels)
        self.adaln_out = Linear(dim, 4 * pixel_dim * pixels)
        self.norm1 = RMSNorm(pixel_dim, eps=EPS)
        self.compress = Linear(pixels * pixel_dim, attn_dim)
        self.attn = Attention(attn_dim, heads, with_text=False)
        self.expand = Linear(attn_dim, pixels * pixel_dim)
        self.norm2 = RMSNorm(pixel_dim, eps=EPS)
        self.mlp = GELULinear(pixel_dim, 4 * pixel_dim)

    def forward(
        self, pixels: torch.Tensor, condition: torch.Tensor, rotary: Rotary, chunk_size: int | None = None
    ) -> torch.Tensor:
        """(eq. 17). `condition` is s, (B, L, D), one vector per patch. Where no gradient is recorded, the new pixels
        are written over the old ones."""
        qkv = out = None
        if overwrites(pixels):
            pixels = out = wide(pixels)
            qkv = self.attn.empty_qkv(condition, pixels.shape[1])
        qkv = in_chunks(chunk_size, self.before_attention, pixels, condition, rotary, out=qkv)
        return in_chunks(chunk_size, self.after_attention, pixels, condition, self.attn(qkv), out=out)

    def before_attention(
        self, pixels: torch.Tensor, condition: torch.Tensor, rotary: Rotary, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        shift, scale = self.adaln_in(condition).unflatten(-1, (2, *pixels.shape[2:])).unbind(2)
        return self.attn.project(self.compress(modulate(self.norm1(pixels), shift, scale).flatten(2)), rotary, out)

    def after_attention(
        self,
        pixels: torch.Tensor,
        condition: torch.Tensor,
        attended: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        gate, shift, scale, mlp_gate = self.adaln_out(condition).unflatten(-1, (4, *pixels.shape[2:])).unbind(2)
        expanded = self.expand(self.attn.to_out(attended)).view_as(pixels)
        pixels = torch.addcmul(wide(pixels), wide(gate), expanded, out=out)
        return torch.addcmul(pixels, wide(mlp_gate), self.mlp(modulate(self.norm2(pixels), shift, scale)), out=out)


def in_chunks(
    size: int | None,
    function: Callable[..., torch.Tensor],
    *tensors: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`function` of tensors (B, L, ...), at most `size` of L at a time: what it makes in between never exists whole.
    Its results, (B, L, ...), too, it writes into `out`, or they are joined."""
    length = tensors[0].shape[1]
    if size is None or length <= size:
        return function(*tensors, out=out)
    pieces = [
        function(*(x[:, i : i + size] for x in tensors), out=None if out is None else out[:, i : i + size])
        for i in range(0, length, size)
    ]
    return torch.cat(pieces, dim=1) if out is None else out


def _compiled(function: Callable[..., torch.Tensor], **kwargs) -> Callable[..., torch.Tensor]:
    """`torch.compile`. Views are copied on their way in: what they are views of, and how it is strided, would be
    compiled in, and every size and number of chunks would compile again."""

    def plain(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(plain, x))
        if not isinstance(x, torch.Tensor) or not x._is_view() or torch.is_grad_enabled():
            return x
        return x.clone(memory_format=torch.contiguous_format)

    compiled = torch.compile(function, **kwargs)

    def call(*args, out: torch.Tensor | None = None) -> torch.Tensor:
        result = compiled(*map(plain, args))
        return result if out is None else out.copy_(result)

    return call


class StreamNorms(nn.Module):
    """One stream's norms and adaLN (eq. 11, 12): D -> shift, scale, gate for attention, then for the MLP."""

    def __init__(self, dim: int):
        super().__init__()
        self.adaln = Linear(dim, 6 * dim)
        self.norm1 = RMSNorm(dim, eps=EPS)
        self.norm2 = RMSNorm(dim, eps=EPS)


class SwiGLU(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        width = int(2 * 4 * dim / 3)
        self.gate_proj = Linear(dim, width, bias=False)
        self.up_proj = Linear(dim, width, bias=False)
        self.down_proj = Linear(width, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if overwrites(x):
            inner = F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x))
        else:
            inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(narrow(inner, x.dtype))


class AttentionProcessor:
    """The attention kernel: diffusers' where `set_attention_backend` or DIFFUSERS_ATTN_BACKEND names one, else ours."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "Attention", query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(B, L, heads, head width) each."""
        active, _ = _AttentionBackendRegistry.get_active_backend()
        if self._attention_backend or self._parallel_config or active != AttentionBackendName.NATIVE:
            return dispatch_attention_fn(
                query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
            )
        return attention(query, key, value)


class Attention(nn.Module, AttentionModuleMixin):
    """Self-attention, or joint attention over [text, image]; fused bias-free qkv, q and k normalised per head."""

    _default_processor_cls = AttentionProcessor
    _available_processors = [AttentionProcessor]
    _supports_qkv_fusion = False

    def __init__(self, dim: int, heads: int, with_text: bool):
        super().__init__()
        self.heads = heads
        self.to_qkv = Linear(dim, 3 * dim, bias=False)
        self.norm_q = RMSNorm(dim // heads, eps=EPS)
        self.norm_k = RMSNorm(dim // heads, eps=EPS)
        self.to_out = Linear(dim, dim)
        if with_text:
            self.add_qkv = Linear(dim, 3 * dim, bias=False)
            self.norm_added_q = RMSNorm(dim // heads, eps=EPS)
            self.norm_added_k = RMSNorm(dim // heads, eps=EPS)
            self.to_add_out = Linear(dim, dim)
        self.set_processor(AttentionProcessor())

    def empty_qkv(self, like: torch.Tensor, length: int) -> torch.Tensor:
        """(B, L, 3, heads, head width), of the dtype of `like` (B, ...)."""
        return like.new_empty(len(like), length, 3, self.heads, *self.norm_q.normalized_shape)

    def project(self, hidden_states: torch.Tensor, rotary: Rotary, out: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (B, L, D) -> queries, keys and values (B, L, 3, heads, head width), rotated."""
        return self._normalize(self.to_qkv(hidden_states), self.norm_q, self.norm_k, rotary, out)

    def project_text(self, text: torch.Tensor, rotary: Rotary, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._normalize(self.add_qkv(text), self.norm_added_q, self.norm_added_k, rotary, out)

    def _normalize(
        self, qkv: torch.Tensor, norm_q: nn.Module, norm_k: nn.Module, rotary: Rotary, out: torch.Tensor | None
    ) -> torch.Tensor:
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key = norm_q(query), norm_k(key)
        if out is None:
            return torch.stack([rotate(query, rotary), rotate(key, rotary), value], dim=2)
        rotate(query, rotary, out[:, :, 0])
        rotate(key, rotary, out[:, :, 1])
        out[:, :, 2] = value
        return out

    def forward(self, qkv: torch.Tensor, skip: int = 0) -> torch.Tensor:
        """(B, L, 3, heads, head width) -> what is attended to (B, L, D), before the output layers; not by the first
        `skip` tokens, to which others attend alone."""
        query, key, value = qkv.unbind(2)
        return self.processor(self, query[:, skip:], key, value).flatten(2)


def rotate(x: torch.Tensor, rotary: Rotary, out: torch.Tensor | None = None) -> torch.Tensor:
    """Turn the pairs of channels of (B, L, heads, head width), in float32, and into `out` where it is given."""
    pairs, rotary = x.unflatten(-1, (-1, 2)), rotary[:, :, None]
    if out is not None and x.device.type in ("cuda", "meta") and x.itemsize == 2:
        return _rotate_parts(pairs, rotary, out)
    pairs = pairs.to(torch.promote_types(x.dtype, torch.float32))
    if torch.compiler.is_compiling() or x.device.type == "mps":  # compilers fuse real numbers alone
        (even, odd), (cos, sin) = pairs.unbind(-1), rotary.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary))
    turned = turned.flatten(-2)
    return turned.to(x.dtype) if out is None else out.copy_(turned)


def _rotate_parts(pairs: torch.Tensor, rotary: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Without a float32 copy: GPUs convert as they load and store."""
    (even, odd), (cos, sin) = pairs.unbind(-1), rotary.unbind(-1)
    turned_even, turned_odd = out.unflatten(-1, (-1, 2)).unbind(-1)
    torch.mul(even, cos, out=turned_even).addcmul_(odd, sin, value=-1)
    torch.mul(odd, cos, out=turned_odd).addcmul_(even, sin)
    return out


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Softmax attention of (B, L, heads, head width), by the fastest kernel that is right on the device."""
    width = query.shape[-1]
    scale = width**-0.5
    if torch.version.hip is not None and query.device.type == "cuda":
        # AMD's fused kernels gave black and NaN images at width 72; zeros up to a power of 2 change nothing.
        query, key, value = pad_heads(query, key, value)
    blockwise = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if blockwise and not torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a graph keeps one operation
        return _blockwise_attention(query, key, value, scale)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    kernels = _KERNELS[1:] if torch.is_grad_enabled() else _KERNELS
    with sdpa_kernel(kernels, set_priority=True) if query.device.type == "cuda" else nullcontext():
        output = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return output.transpose(1, 2)[..., :width]


_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,  # the fastest on Hopper, for inference; where it cannot run, the next does
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def pad_heads(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Zeros to a head width that is a power of 2, at least 64."""
    width = tensors[0].shape[-1]
    wider = max(64, 1 << (width - 1).bit_length())
    return tuple(F.pad(x, (0, wider - width)) for x in tensors)


def _blockwise_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Rows of scores that fit the cache, by plain matrix products, which on a CPU without AMX make bfloat16 attention
    1.7 times faster than PyTorch's fused kernel does (16,384 tokens, AMD EPYC with AVX512-BF16)."""
    batch, length, heads, _ = query.shape
    output = torch.empty_like(query)
    rows = max(32, 2**21 // key.shape[1])  # 4 MiB of scores
    for b in range(batch):
        for head in range(heads):
            keys = key[b, :, head].T.contiguous() * scale
            values = value[b, :, head].contiguous()
            for start in range(0, length, rows):
                scores = query[b, start : start + rows, head] @ keys
                output[b, start : start + rows, head] = scores.softmax(dim=-1) @ values
    return output


class TextEmbedding(nn.Module):
    """Prompt embeddings (B, T, Dt) -> text tokens (B, min(T, Tmax), D)."""

    def __init__(self, text_embed_dim: int, dim: int, max_length: int):
        super().__init__()
        self.proj = Linear(text_embed_dim, dim)
        self.norm = RMSNorm(dim, eps=EPS)
        self.positions = nn.Parameter(torch.zeros(1, max_length, dim))

    def forward(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        prompt_embeds = prompt_embeds[:, : self.positions.shape[1]]
        return self.norm(self.proj(prompt_embeds)) + self.positions[:, : prompt_embeds.shape[1]]


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Of tokens just normalised (eq. 11), which may be overwritten."""
    return torch.addcmul(shift, x, 1 + scale, out=x if overwrites(x) else None)


def image_rotary(height: int, width: int, head_dim: int, reference: float, device: torch.device) -> Rotary:
    """2-D RoPE, NTK-aware (eq. 13), for a grid of height x width patches; the frequencies are made for `reference`.

    Angles alternate x, y, x, y...; neighbouring channels form a pair.
    """
    axis_dim = head_dim / 2
    k = torch.arange(head_dim // 4, dtype=torch.float32, device=device)
    angles = []
    for size in (width, height):
        theta = 10000 * (size / reference) ** (axis_dim / (axis_dim - 2))
        positions = torch.arange(size, device=device) * 16 / max(size - 1, 1)  # `linspace`, of any size when traced
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
    return torch.stack([angle.cos(), angle.sin()], dim=-1)[None]


def pixel_positions(length: int, dim: int, device: torch.device) -> torch.Tensor:
    """One axis of the fixed table (eq. 16), (length, d/2)."""
    quarter = dim // 4
    frequencies = torch.exp(-math.log(10000) * torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
