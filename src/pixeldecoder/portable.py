"""A folder of ONNX graphs and latents in, images out, by numpy and onnxruntime alone: made to be copied and ported."""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = "manifest.json"
"""Names the graphs of a folder, and says how to sample with them."""
VERSION = 1
"""Of graphs and manifest: their inputs, outputs and keys."""


def run_onnx(
    folder: str | Path,
    latents: np.ndarray,
    normal: Callable[[tuple[int, ...]], np.ndarray],
    sigma: float | Sequence[float] = 0.0,
    prompt_embeds: np.ndarray | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> np.ndarray:
    """Decode latents with what `pixeldecoder export` wrote.

    Args:
        latents: normalised, (B, C, h, w).
        normal: a shape -> N(0, 1), such as `np.random.default_rng(0).standard_normal`.
        sigma: noise level of the latents in [0, 1], one, or one for each image.
        prompt_embeds: (B, T, Dt), for a decoder with text; tokens beyond its `max_text_length` are cut off.
        providers: onnxruntime's, the first that can is taken.

    Returns:
        Images (B, 3, H, W) in [-1, 1].

    Raises:
        ValueError: no such folder, graphs of another version, latents of another space, a sigma that is none, no text
            where it is needed.
    """
    manifest = read_manifest(folder)
    encode, velocity = (open_graph(folder, manifest, name, providers) for name in ("encode_latents", "velocity"))
    if latents.ndim != 4 or latents.shape[1] != manifest["latent_channels"]:
        raise ValueError(f"expected latents (B, {manifest['latent_channels']}, h, w), got {latents.shape}")
    batch, cell = len(latents), manifest["scale"] * manifest["latent_downscale_factor"]
    height, width = (side * cell for side in latents.shape[2:])
    whole = manifest["cells"]  # to a patch: latents are padded to whole patches, and the image is cut again
    padded = np.pad(latents, ((0, 0), (0, 0), *((0, -side % whole) for side in latents.shape[2:])), mode="edge")
    shape = (batch, 3, *(side * cell for side in padded.shape[2:]))
    names = [output.name for output in encode.get_outputs()]
    levels = np.asarray(sigma, np.float32)
    if levels.shape not in ((), (batch,)) or not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"expected sigma in [0, 1], one or one for each of {batch} images, got {sigma}")
    levels = np.ascontiguousarray(np.broadcast_to(levels, batch))
    read = {"latents": padded.astype(np.float32), "sigma": levels}  # sigma for a base
    read = {node.name: read[node.name] for node in encode.get_inputs()}
    told = dict(zip(names, encode.run(None, read), strict=True)) | {"sigma": levels}  # once for all steps
    if manifest["text_embed_dim"] is not None:
        if prompt_embeds is None or prompt_embeds.shape[2:] != (manifest["text_embed_dim"],):
            raise ValueError(f"this decoder reads text: expected prompt_embeds (B, T, {manifest['text_embed_dim']})")
        longest = manifest["transformer"]["max_text_length"]
        told["prompt_embeds"] = prompt_embeds[:, :longest].astype(np.float32)
    image = normal(shape).astype(np.float32)
    for t, after in pairwise([*manifest["times"], 0.0]):
        (v,) = velocity.run(None, {"image": image, "t": np.full(batch, t, np.float32), **told})
        if manifest["sampler"] == "lcm":  # a clean image, and fresh noise
            image = (1 - after) * (image - t * v) + after * normal(shape)
        else:  # Euler
            image = image + (after - t) * v
        image = image.astype(np.float32)
    return image[..., :height, :width].clip(-1, 1)


def read_manifest(folder: str | Path, format: str = "onnx") -> dict[str, Any]:
    """What `pixeldecoder export` wrote of the graphs in a folder.

    Raises:
        ValueError: no such folder, or graphs of another version or format.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version, found = manifest["version"], manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{folder}: expected a folder that `pixeldecoder export` wrote, with {MANIFEST}") from None
    if (version, found) != (VERSION, format):
        raise ValueError(
            f"{folder}: {found} graphs of version {version}, expected {format} of version {VERSION}: export them again"
        )
    return manifest


def open_graph(folder: str | Path, manifest: dict[str, Any], name: str, providers: Sequence[str]) -> Any:
    """One graph of a folder, by its name in the manifest, as onnxruntime's session.

    Raises:
        ValueError: a provider that is not there, or a graph that cannot be read.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if missing := [provider for provider in providers if provider not in available]:
        raise ValueError(f"onnxruntime has no {missing[0]} here: expected some of {', '.join(available)}")
    path = Path(folder) / manifest["graphs"][name]
    try:
        session = onnxruntime.InferenceSession(path, providers=list(providers))
    except Exception as error:  # onnxruntime has classes of its own, which are no ValueErrors
        raise ValueError(f"{path}: not a readable graph: {' '.join(str(error).split())[:200]}") from None
    if session.get_providers()[0] != providers[0]:  # it says so on stderr, and goes on with the next
        raise ValueError(f"onnxruntime's {providers[0]} does not work here: a library that it needs is missing")
    return session
