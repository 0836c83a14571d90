"""Feature maps of the teacher in, real-or-fake logits out: DMD2's discriminator (eq. 30)."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from pixeldecoder.models.folder import FolderMixin


class PixelDecoderDiscriminator(FolderMixin, ModelMixin, ConfigMixin):
    """One convolutional head for each feature map (B, D, Hp, Wp); the heads' logits are concatenated.

    Args:
        feature_dim: channels D of the feature maps.
        num_features: number of feature maps, and of heads.
        num_layers: convolutions in a head. 1: halve the size and the width once, then one channel; each further pair
            repeats the first, the width halved again but not below 64.
        patch_logits: keep one logit to a position instead of their mean.
    """

    @register_to_config
    def __init__(self, feature_dim: int, num_features: int = 1, num_layers: int = 2, patch_logits: bool = False):
        super().__init__()
        self.heads = nn.ModuleList(self._head(feature_dim, num_layers) for _ in range(num_features))

    @staticmethod
    def _head(dim: int, num_layers: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for layer in range(num_layers - 1):
            width = dim // 2 if layer == 0 else max(dim // 2, 64)
            groups = width // 4 if width <= 32 else next(g for g in range(32, 0, -1) if width % g == 0)
            layers += [nn.Conv2d(dim, width, 4, stride=2, padding=1), nn.GroupNorm(groups, width), nn.LeakyReLU(0.2)]
            dim = width
        return nn.Sequential(*layers, nn.Conv2d(dim, 1, 1))

    def forward(self, features: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Feature maps, each (B, D, Hp, Wp) -> logits (B, heads), or (B, all positions) with `patch_logits`.

        Raises:
            ValueError: another number of feature maps than heads.
        """
        if len(features) != len(self.heads):
            raise ValueError(f"expected {len(self.heads)} feature maps, got {len(features)}")
        logits = [head(feature).flatten(1) for head, feature in zip(self.heads, features, strict=True)]
        if not self.config.patch_logits:
            logits = [logit.mean(dim=1, keepdim=True) for logit in logits]
        return torch.cat(logits, dim=1)
