"""Two pictures in, how differently a network sees them out; its weights come from files.

torchmetrics and pyiqa have LPIPS as well, but both build its network by torchvision, which no other part needs, and
fetch the weights themselves.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pixeldecoder.files import read_tensors


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

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1], twice -> (B,)."""
        return self.between(self.features(image), self.features(truth))

    @staticmethod
    def between(features: list[torch.Tensor], truth: list[torch.Tensor]) -> torch.Tensor:
        """Two images' features -> (B,)."""
        distances = [(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(features, truth, strict=True)]
        return torch.stack(distances).mean(dim=0)

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, W) in [-1, 1] -> the four layers' (B, C, h, w), of unit length, with gradient if it has one."""
        x = ((image.float() + 1) * 127.5).flip(1) - self.mean  # blue, green, red, as it was trained
        x = x.contiguous(memory_format=torch.channels_last)  # a third less time on a CPU
        x = self._conv("features.0", x, stride=2)
        features = [x]
        for layer in range(2, 13):
            if layer in self.POOLS:
                x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
                continue
            squeezed = self._conv(f"features.{layer}.squeeze", x)
            wide = self._conv(f"features.{layer}.expand3x3", squeezed, padding=1)
            x = torch.cat([self._conv(f"features.{layer}.expand1x1", squeezed), wide], dim=1)
            if layer + 1 in self.POOLS or layer == 12:
                features.append(x)
        return [F.normalize(x, dim=1) for x in features]

    def _conv(self, name: str, x: torch.Tensor, **kwargs) -> torch.Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **kwargs).relu()


class LPIPS:
    """Learned perceptual distance v0.1 (arXiv 1801.03924), of AlexNet or VGG-16.

    Args:
        backbone: ImageNet weights of torchvision's `alexnet` or `vgg16`.
        linear: the metric's own layers, `lin{i}.model.1.weight`.

    Raises:
        ValueError: linear layers of another network.
    """

    # For the kernel of the first layer: strides and paddings by layer (1 and 1 elsewhere), poolings, layers compared.
    NETS = {
        11: ({0: (4, 2), 3: (1, 2)}, {2: 3, 5: 3}, (1, 4, 7, 9, 11)),
        3: ({}, {4: 2, 9: 2, 16: 2, 23: 2}, (3, 8, 15, 22, 29)),
    }

    def __init__(self, backbone: Path, linear: Path, device: torch.device | str = "cpu"):
        self.weights, linears = (
            {name: tensor.float().to(device) for name, tensor in read_tensors(path).items()}
            for path in (backbone, linear)
        )
        first = self.weights.get("features.0.weight", torch.zeros(1, 1, 0)).shape[-1]
        if first not in self.NETS:
            raise ValueError(f"{backbone}: expected torchvision's alexnet or vgg16")
        self.convs, self.pools, self.taps = self.NETS[first]
        self.linears = [linears[f"lin{i}.model.1.weight"] for i in range(len(self.taps))]
        for tap, weight in zip(self.taps, self.linears, strict=True):
            if weight.shape[1] != (width := len(self.weights[f"features.{tap - 1}.bias"])):
                raise ValueError(f"{linear}: made for another network than {backbone}: {weight.shape[1]} for {width}")
        self.mean = torch.tensor([-0.030, -0.088, -0.188], device=device)[:, None, None]
        self.std = torch.tensor([0.458, 0.448, 0.450], device=device)[:, None, None]

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1], twice -> (B,)."""
        x, distance = (torch.cat([image, truth]).float() - self.mean) / self.std, torch.zeros(())
        for layer in range(self.taps[-1]):
            if layer in self.pools:
                x = F.max_pool2d(x, self.pools[layer], stride=2)
            if f"features.{layer}.weight" not in self.weights:
                continue
            weight, bias = (self.weights[f"features.{layer}.{part}"] for part in ("weight", "bias"))
            stride, padding = self.convs.get(layer, (1, 1))
            x = F.conv2d(x, weight, bias, stride, padding).relu()
            if layer + 1 in self.taps:
                a, b = (x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)).chunk(2)
                linear = self.linears[self.taps.index(layer + 1)]
                distance = distance.to(x) + F.conv2d((a - b).square(), linear).mean(dim=(1, 2, 3))
        return distance
