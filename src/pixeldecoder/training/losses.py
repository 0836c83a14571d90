"""Predictions and targets in, scalar losses out: pure functions, each a mean over the batch."""

import torch
import torch.nn.functional as F

# BT.601 luma and chroma of RGB in [0, 1]; the chroma channels' offset of 0.5 cancels in differences.
_YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_YCBCR_WEIGHTS = (0.25, 1.0, 1.0)
CHARBONNIER_EPS = 1e-3


def flow_matching(velocity: torch.Tensor, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the velocity, target noise - image (eq. 24); all (B, 3, H, W).

    A network that predicts the clean image gives its velocity as (x_t - x0) / max(t, .05); the target is not clamped.
    """
    return F.mse_loss(velocity.float(), (noise - image).float())


def aux_rgb(
    prediction: torch.Tensor, small: torch.Tensor, weight: torch.Tensor, total: torch.Tensor | None = None
) -> torch.Tensor:
    """Charbonnier distance of luma and chroma, a weighted mean over the samples (eq. 25, 26).

    Args:
        prediction, small: low-resolution images (B, 3, h, w) in [-1, 1].
        weight: of each sample (B,), in [0, 1]: 1 - sigma, and 0 where the latents were dropped.
        total: what the weighted sum is divided by, for samples that are a part of a batch; by default the sum of the
            weights. If all are 0, so is the loss.
    """
    difference = (prediction.float() - small.float()) / 2  # of RGB in [0, 1]
    difference = torch.einsum("ij,bjhw->bihw", _YCBCR.to(difference), difference)
    weighted = difference * difference.new_tensor(_YCBCR_WEIGHTS)[:, None, None]
    distance = ((weighted.square() + CHARBONNIER_EPS**2).sqrt() - CHARBONNIER_EPS).mean(dim=(1, 2, 3))
    return (weight * distance).sum() / (weight.sum() if total is None else total).clamp_min(1e-8)


def repa(projected: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - cosine of projected features and a vision encoder's, both (B, L, C) (eq. 27; REPA, arXiv 2410.06940)."""
    return 1 - F.cosine_similarity(projected.float(), target.float(), dim=-1).mean()


def vsd(student: torch.Tensor, teacher: torch.Tensor, fake_score: torch.Tensor) -> torch.Tensor:
    """Variational score distillation: its gradient on the student's image is w (x0_F - x0_T) (eq. 29).

    Args:
        student: the student's image x_s, with gradient, (B, 3, H, W).
        teacher, fake_score: clean images that these two see in the noised x_s.
    """
    # float64 does not exist on every device.
    dtype = torch.float32 if student.device.type == "mps" else torch.float64
    x, x0_teacher, x0_fake = student.to(dtype), teacher.detach().to(dtype), fake_score.detach().to(dtype)
    with torch.no_grad():
        weight = 1 / ((x - x0_teacher).abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-6)
        target = x - weight * (x0_fake - x0_teacher)
    return 0.5 * F.mse_loss(x, target)


def gan_student(logits_fake: torch.Tensor) -> torch.Tensor:
    """Non-saturating loss of the student (eq. 30); logits of the discriminator on its noised images."""
    return F.softplus(-logits_fake.float()).mean()


def gan_discriminator(logits_fake: torch.Tensor, logits_real: torch.Tensor) -> torch.Tensor:
    """Non-saturating loss of the discriminator (eq. 30)."""
    return F.softplus(logits_fake.float()).mean() + F.softplus(-logits_real.float()).mean()


def approximate_r1(logits_real: torch.Tensor, logits_perturbed: torch.Tensor) -> torch.Tensor:
    """Mean squared change of the logits on real images when a little noise is added to the discriminator's input
    (eq. 31)."""
    return (logits_perturbed.float() - logits_real.float()).square().mean()
