"""An encoder of one's own, as `averaging:encode`."""

import torch
import torch.nn.functional as F


def encode(image: torch.Tensor) -> torch.Tensor:
    """Image (B, 3, H, W) -> (B, 16, H/8, W/8): means of quarter cells, and one more channel of the first."""
    quarters = F.pixel_unshuffle(F.avg_pool2d(image, 4), 2)
    return torch.cat([quarters, quarters[:, :4]], dim=1)
