"""The method written down plainly: no chunks, no caches, the adapter at every step. What is fast must equal it.

It works on a model's configuration and tensors; none of the library's code runs.
"""

import math

import torch
import torch.nn.functional as F


class Oracle:
    """`Oracle(model).decode(latents)` for any configuration of `PixelDecoderTransformer2DModel`."""

    def __init__(self, model: torch.nn.Module):
        self.config = model.config
        self.weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def decode(self, latents, sigma=0.0, text=None, generator=None, times=(0.999, 0.866, 0.634, 0.342)):
        """Latents (B, C, h, w) -> image (B, 3, H, W) by the student's SDE sampler."""
        cell = self.config.scale * self.config.latent_downscale_factor
        height, width = (side * cell for side in latents.shape[-2:])
        shape = (len(latents), 3, height, width)
        x = torch.randn(shape, generator=generator)
        for t, t_next in zip(times, (*times[1:], 0.0), strict=True):
            x0 = x - t * self.velocity(x, t, latents, sigma, text)
            x = (1 - t_next) * x0 + t_next * torch.randn(shape, generator=generator)
        return x.clamp(-1, 1)

    def velocity(self, x, t, latents, sigma, text=None):
        config = self.config
        patch, (height, width) = config.patch_size, x.shape[-2:]
        grid = (height // patch, width // patch)
        injections, pixel_injection = self.adapter(latents, grid)
        base = None if config.base_dim is None else self.base(latents, sigma)
        seen = x if base is None else torch.cat([x, base], dim=1)

        angles = 1000 * t * torch.exp(-math.log(10) * torch.arange(128) / 128)
        time = self.linear("time_embed.linear_1", torch.cat([angles.cos(), angles.sin()])[None, None])
        time = self.linear("time_embed.linear_2", F.silu(time))
        condition = F.silu(time)

        h = self.linear("patch_embed", F.unfold(seen, patch, stride=patch).transpose(1, 2))
        if text is not None:
            positions = self.weights["text_embed.positions"]
            text = text[:, : positions.shape[1]]
            text = self.norm("text_embed.norm", self.linear("text_embed.proj", text)) + positions[:, : text.shape[1]]
        for i in range(config.num_layers):
            if i % config.injection_interval == 0:
                n = i // config.injection_interval
                h = h + self.gate(f"adapter.sigma_gates.{n}", h, injections[n], sigma)
            h, text = self.patch_block(f"patch_blocks.{i}", h, text, condition, grid)

        s = F.silu(time + h)
        if pixel_injection is not None:
            s = s + self.gate("adapter.pixel_sigma_gate", s, pixel_injection, sigma)
        pixels = self.linear("pixel_embed", seen.movedim(1, -1)) + self.pixel_positions(height, width)
        pixels = pixels.reshape(len(x), grid[0], patch, grid[1], patch, -1).transpose(2, 3)
        pixels = pixels.reshape(len(x), grid[0] * grid[1], patch**2, -1)
        for i in range(config.num_pixel_layers):
            pixels = self.pixel_block(f"pixel_blocks.{i}", pixels, s, grid)
        out = self.linear("proj_out", self.norm("norm_out", pixels))
        out = out.reshape(len(x), *grid, patch, patch, 3).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
        if config.prediction_type == "velocity":
            return out
        if base is not None:
            out = out + base
        return (x - out) / max(t, 0.05)

    def adapter(self, z, grid):
        config, r = self.config, self.config.scale * self.config.latent_downscale_factor / self.config.patch_size
        if config.unpack_latents:
            z, r = F.pixel_shuffle(z, 2), r / 2
        if r < 1:
            fold = int(1 / r)
            if z.shape[-2:] != (grid[0] * fold, grid[1] * fold):
                z = F.interpolate(z, size=(grid[0] * fold, grid[1] * fold), mode="bilinear")
            z = F.pixel_unshuffle(z, fold)
        elif z.shape[-2:] != grid:
            z = F.interpolate(z, size=grid, mode="nearest" if r > 1 else "bilinear")
        z = self.conv("adapter.convs.2", F.silu(self.conv("adapter.convs.0", z)))
        for i in range(config.num_adapter_layers):
            y = z
            for norm, conv in (0, 2), (3, 5):
                name = f"adapter.convs.{i + 3}.block"
                weight, bias = (self.weights[f"{name}.{norm}.{leaf}"] for leaf in ("weight", "bias"))
                y = self.conv(f"{name}.{conv}", F.silu(F.group_norm(y, 4, weight, bias)))
            z = z + y
        tokens = z.flatten(2).transpose(1, 2)
        heads = [
            self.linear(f"adapter.heads.{i}", tokens) for i in range(-(-config.num_layers // config.injection_interval))
        ]
        pixel = self.linear("adapter.pixel_head", tokens) if config.inject_pixels else None
        return heads, pixel

    def base(self, z, sigma):
        """TAESD's decoder with a bias for sigma at every size, then enlarged: no bands."""
        stages, steps = (int(math.log2(n)) for n in (self.config.latent_downscale_factor, self.config.scale))
        if self.config.unpack_latents:
            z, stages = F.pixel_shuffle(z, 2), stages - 1
        embedded = F.silu(self.linear("base.sigma_embed.0", torch.full((len(z), 1), float(sigma))))
        biases = self.linear("base.sigma_embed.2", embedded).chunk(stages + 1, dim=1)
        x = F.relu(self.conv("base.conv_in", 3 * torch.tanh(z / 3)))
        for i, bias in enumerate(biases):
            if i > 0:
                x = self.conv(f"base.convs.{i - 1}", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
            x = x + bias[:, :, None, None]
            for block in range(3 if i < stages else 1):
                x = self.tiny_block(f"base.stages.{i}.{block}", x)
        small = 2 * self.conv("base.to_small", x) - 1
        for block in range(2):
            x = self.tiny_block(f"base.detail.{block}", x)
        for i in range(steps):
            x = F.relu(self.conv(f"base.enlarge.{i}", F.interpolate(x, scale_factor=2, mode="bilinear")))
        x = self.conv("base.to_image", F.relu(self.conv("base.refine", x)))
        return x + F.interpolate(small, scale_factor=2**steps, mode="bicubic")

    def tiny_block(self, name, x):
        y = x
        for i in 0, 2, 4:
            y = self.conv(f"{name}.conv.{i}", y if i == 0 else F.relu(y))
        return F.relu(y + x)

    def gate(self, name, tokens, latents, sigma):
        content = self.linear(f"{name}.proj", torch.cat([tokens, latents], dim=-1))
        return torch.sigmoid(content - self.weights[f"{name}.log_alpha"].exp() * sigma) * latents

    def patch_block(self, name, h, text, condition, grid):
        heads = self.config.num_attention_heads
        names = [("image", "to_qkv", "norm_q", "norm_k", "to_out", "mlp", h)]
        if text is not None:
            names.insert(0, ("text", "add_qkv", "norm_added_q", "norm_added_k", "to_add_out", "text_mlp", text))
        parts, mods = [], []
        for stream, qkv, norm_q, norm_k, _, _, x in names:
            mods.append(self.linear(f"{name}.{stream}.adaln", condition).chunk(6, dim=-1))
            y = self.norm(f"{name}.{stream}.norm1", x) * (1 + mods[-1][1]) + mods[-1][0]
            q, k, v = (part.unflatten(-1, (heads, -1)) for part in self.linear(f"{name}.attn.{qkv}", y).chunk(3, -1))
            angles = self.image_angles(grid, q.shape[-1]) if stream == "image" else self.text_angles(*q.shape[1::2])
            q, k = self.norm(f"{name}.attn.{norm_q}", q), self.norm(f"{name}.attn.{norm_k}", k)
            parts.append((rotate(q, angles), rotate(k, angles), v))
        attended = attention(*(torch.cat(x, dim=1) for x in zip(*parts, strict=True)))
        lengths = [x[-1].shape[1] for x in names]
        results = []
        for (stream, _, _, _, out, mlp, x), mod, part in zip(names, mods, attended.split(lengths, 1), strict=True):
            x = x + mod[2] * self.linear(f"{name}.attn.{out}", part)
            y = self.norm(f"{name}.{stream}.norm2", x) * (1 + mod[4]) + mod[3]
            y = F.silu(self.linear(f"{name}.{mlp}.gate_proj", y)) * self.linear(f"{name}.{mlp}.up_proj", y)
            results.append(x + mod[5] * self.linear(f"{name}.{mlp}.down_proj", y))
        return results[-1], results[0] if text is not None else None

    def pixel_block(self, name, pixels, s, grid):
        before = self.linear(f"{name}.adaln_in", s).unflatten(-1, (2, *pixels.shape[2:]))
        after = self.linear(f"{name}.adaln_out", s).unflatten(-1, (4, *pixels.shape[2:]))
        y = self.norm(f"{name}.norm1", pixels) * (1 + before[:, :, 1]) + before[:, :, 0]
        qkv = self.linear(f"{name}.attn.to_qkv", self.linear(f"{name}.compress", y.flatten(2)))
        q, k, v = (part.unflatten(-1, (self.config.num_pixel_attention_heads, -1)) for part in qkv.chunk(3, dim=-1))
        angles = self.image_angles(grid, q.shape[-1])
        q, k = self.norm(f"{name}.attn.norm_q", q), self.norm(f"{name}.attn.norm_k", k)
        y = self.linear(f"{name}.attn.to_out", attention(rotate(q, angles), rotate(k, angles), v))
        pixels = pixels + after[:, :, 0] * self.linear(f"{name}.expand", y).view_as(pixels)
        y = self.norm(f"{name}.norm2", pixels) * (1 + after[:, :, 2]) + after[:, :, 1]
        return pixels + after[:, :, 3] * self.linear(f"{name}.mlp.2", F.gelu(self.linear(f"{name}.mlp.0", y)))

    def image_angles(self, grid, head_dim):
        """(L, hd / 2), one for each pair of channels."""
        reference, half = self.config.rope_reference_size / self.config.patch_size, head_dim / 2
        axes = []
        for size in (grid[1], grid[0]):
            theta = 10000 * (size / reference) ** (half / (half - 2))
            axes.append(torch.linspace(0, 16, size)[:, None] * theta ** (-4 * torch.arange(head_dim // 4) / head_dim))
        x, y = axes[0].expand(grid[0], -1, -1), axes[1][:, None].expand(-1, grid[1], -1)
        return torch.stack([x, y], dim=-1).reshape(grid[0] * grid[1], -1)

    @staticmethod
    def text_angles(length, head_dim):
        return torch.arange(length)[:, None] * 10000 ** (-2 * torch.arange(head_dim // 2) / head_dim)

    def pixel_positions(self, height, width):
        quarter = self.config.pixel_dim // 4
        frequencies = 10000 ** (-torch.arange(quarter) / quarter)
        axes = []
        for size in (width, height):
            angle = torch.arange(size)[:, None] * frequencies
            axes.append(torch.cat([angle.sin(), angle.cos()], dim=-1))
        return torch.cat([axes[0].expand(height, -1, -1), axes[1][:, None].expand(-1, width, -1)], dim=-1)

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name, x):
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], eps=1e-6)

    def conv(self, name, x):
        zeros = name.startswith("base.") or self.config.adapter_padding_mode == "zeros"
        x = F.pad(x, (1, 1, 1, 1), mode="constant" if zeros else "replicate")
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))


def rotate(x, angles):
    """(B, L, heads, hd): neighbouring channels are a pair."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def attention(q, k, v):
    """(B, L, heads, hd) -> (B, L, heads hd); PyTorch's, as a plain implementation takes it, too."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)


def decoder(pipeline, latents, steps):
    """For the benchmark: `--configs oracle:decoder`."""
    assert steps == 4

    def run():
        return (Oracle(pipeline.transformer).decode(latents, generator=torch.Generator().manual_seed(0)) + 1) / 2

    return run
