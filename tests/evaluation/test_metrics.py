"""The distance against SqueezeNet built from layers, with random weights."""

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from pixeldecoder.evaluation.metrics import SqueezeNetDistance


class Fire(nn.Module):
    def __init__(self, inputs: int, squeeze: int, expand: int):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], 1).relu()


def pool():
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)


class SqueezeNet(nn.Module):
    """torchvision's `squeezenet1_0`, without the classifier."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, 7, stride=2), nn.ReLU(), pool(),
            Fire(96, 16, 64), Fire(128, 16, 64), Fire(128, 32, 128), pool(),
            Fire(256, 32, 128), Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), pool(),
            Fire(512, 64, 256),
        )  # fmt: skip


def test_distance(tmp_path):
    network = SqueezeNet()
    save_file(network.state_dict(), tmp_path / "squeezenet.safetensors")
    a, b = torch.rand(2, 2, 3, 64, 64) * 2 - 1

    def features(x):
        x = (x * 127.5 + 127.5)[:, [2, 1, 0]] - torch.tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1)
        for number, layer in enumerate(network.features):
            if isinstance(layer, nn.MaxPool2d):
                yield x
            x = layer(x)
            if number == 12:
                yield x

    layers = [
        (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean((1, 2))
        for x, y in zip(features(a), features(b), strict=True)
    ]
    distance = SqueezeNetDistance(tmp_path / "squeezenet.safetensors")
    assert len(layers) == 4
    torch.testing.assert_close(distance(a, b), sum(layers) / 4)
    assert distance(a, a).abs().max() == 0
