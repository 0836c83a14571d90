"""A result in; the file of its picture out, with how it was made."""

import hashlib
from typing import Any

from PIL import Image

from pixeldecoder import __version__, provenance
from pixeldecoder.files import image_bytes
from pixeldecoder.pictures import read
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.serve.engine import Engine
from pixeldecoder.serve.jobs import Request, Result

TYPES = {"png": "image/png", "webp": "image/webp", "jpg": "image/jpeg"}
"""Of the files that are made, by their suffix."""


def picture_bytes(image: Image.Image, kind: str, made: dict[str, Any] | None = None) -> bytes:
    """A file of a kind of `TYPES`; what is transparent becomes white in JPEG, which has no alpha."""
    if kind == "jpg" and image.mode == "RGBA":
        image = read(image).flattened()
    return image_bytes(image, f".{kind}", made)


def how_made(
    engine: Engine, request: Request, result: Result, command: str, name: str = "", source: bytes = b"", **facts: Any
) -> dict[str, Any]:
    """What a picture says of how it was made, as those of the command do, so that `pixeldecoder redo` understands it.

    Args:
        command: that does the same.
        name, source: of the file that was sent, and what is in it.
        facts: more of it.
    """
    pipeline, layout = engine.pipelines[request.decoder], result.plan
    made: dict[str, Any] = {"software": f"pixeldecoder {__version__}", "command": command}
    if source:
        digest = hashlib.sha256(source).hexdigest()[: provenance.LENGTH]
        made |= {"source": name, "source_sha256": digest}
    if pipeline.transformer.config.text_embed_dim is not None:
        made["prompt"] = request.prompt
        if pipeline.guides(request.guidance_scale):
            default = pipeline.config.default_negative_prompt
            made["negative_prompt"] = default if request.negative_prompt is None else request.negative_prompt
    scale = pipeline.config.default_guidance_scale if request.guidance_scale is None else request.guidance_scale
    made |= facts | {
        "sigma": result.sigma,
        "size": [*result.picture().size],
        "decoder": request.decoder,
        "decoder_sha256": provenance.weights_hash(request.decoder),
        "seed": request.seed,
        "steps": request.steps or pipeline.config.default_num_inference_steps,
        "guidance_scale": scale,
        "device": pipeline._execution_device.type,
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
    }
    return made if layout is None else made | layout.options()


def license_of(name: str, pipeline: PixelDecoderPipeline) -> str | None:
    """Of a decoder's weights, if it tells; the bundled one's are this project's."""
    return "Apache-2.0" if name == "nano" else pipeline.config.license
