"""Two batches of images in, a distance for each pair out."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


class SqueezeNetDistance:
    """How differently SqueezeNet 1.0 sees two images; not calibrated, to be compared with itself alone.

    Features before each pooling and the last ones, channels scaled to unit length at every position, squared difference
    averaged over positions and summed over channels, mean over layers.

    Args:
        path: ImageNet weights under torchvision's names, `.safetensors`.
    """

    POOLS = (2, 6, 11)

    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        self.weights = {name: tensor.float().to(device) for name, tensor in load_file(path).items()}
        self.mean = torch.tensor([104.0, 117.0, 123.0], device=device)[:, None, None]

    def __call__(self, image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1], twice -> (B,)."""
        distances = []
        for a, b in zip(self._features(image), self._features(truth), strict=True):
            a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
            distances.append((a - b).square().sum(dim=1).mean(dim=(1, 2)))
        return torch.stack(distances).mean(dim=0)

    @torch.no_grad()
    def _features(self, image: torch.Tensor) -> list[torch.Tensor]:
        x = ((image.float() + 1) * 127.5).flip(1) - self.mean  # blue, green, red, as it was trained
        x = self._conv("features.0", x, stride=2)
        found = [x]
        for layer in range(2, 13):
            if layer in self.POOLS:
                x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
                continue
            squeezed = self._conv(f"features.{layer}.squeeze", x)
            wide = self._conv(f"features.{layer}.expand3x3", squeezed, padding=1)
            x = torch.cat([self._conv(f"features.{layer}.expand1x1", squeezed), wide], dim=1)
            if layer + 1 in self.POOLS or layer == 12:
                found.append(x)
        return found

    def _conv(self, name: str, x: torch.Tensor, **kwargs) -> torch.Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **kwargs).relu()
