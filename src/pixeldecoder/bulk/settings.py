"""What an actor must know to decode rows, as it is sent to it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pixeldecoder.bulk.output import Output

if TYPE_CHECKING:
    from pixeldecoder.pipeline import PixelDecoderPipeline
    from pixeldecoder.plan import Limits


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How rows are decoded. It can be pickled, and so sent to another process."""

    decoder: str
    """Its name."""
    load: "Callable[[], PixelDecoderPipeline]"
    """Places it on its device."""
    limits: "Callable[[], Limits]"
    """Of every decode."""
    device: str
    output: Output
    seed: int
    steps: int | None
    sigma: float | None
    """Of all rows, in place of what each says."""
    latent_space: str | None
    """Of ComfyUI's latents, by default the decoder's."""
    prompt: str
    """Of rows without one of their own."""
    metadata: bool


def row_seed(seed: int, id: str) -> int:
    """Of a row's noise: neither the order of rows nor the number of workers matters."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{id}".encode()).digest()[:8], "big") % 2**63
