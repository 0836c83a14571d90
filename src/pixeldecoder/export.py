"""A decoder in, a folder of graphs that run without it out; and such a folder in, a pipeline out that onnxruntime runs.

The graphs: `encode_latents`, once for an image; `velocity`, once for a step; `encode_image` where a decoder has its own
encoder. All take any height, width and number of images.
"""

import io
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from pixeldecoder.files import write_folder
from pixeldecoder.models.adapter import LatentFeatures
from pixeldecoder.models.transformer import PixelDecoderTransformer2DModel
from pixeldecoder.pipeline import PixelDecoderPipeline
from pixeldecoder.portable import MANIFEST, VERSION, open_graph, read_manifest, run_onnx
from pixeldecoder.sampler import set_times

__all__ = ["ENOUGH", "export", "onnx_pipeline", "providers", "run_onnx"]

Format = Literal["onnx", "pt2"]
Precision = Literal["float32", "float16", "int8"]
ENOUGH = 40.0
"""dB that an image of int8 weights must keep to that of float32's."""
SAMPLERS = {"lcm": FlowMatchLCMScheduler, "euler": FlowMatchEulerDiscreteScheduler}
PROVIDERS = {"cuda": "CUDAExecutionProvider", "mps": "CoreMLExecutionProvider", "cpu": "CPUExecutionProvider"}
FASTEST = ("CUDAExecutionProvider", "DmlExecutionProvider", "CoreMLExecutionProvider", "CPUExecutionProvider")
"""onnxruntime's, by what "auto" prefers."""
NOISY = ("torch.onnx", "onnxruntime.quantization")
"""Loggers."""


class EncodeLatents(nn.Module):
    """Latents (B, C, h, w), for a base their sigma (B,) -> what `encode_latents` returns, its tensors one by one."""

    def __init__(self, transformer: PixelDecoderTransformer2DModel):
        super().__init__()
        self.transformer = transformer
        self.cell = transformer.config.scale * transformer.config.latent_downscale_factor

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        height, width = (side * self.cell for side in latents.shape[2:])
        return tuple(tensors(self.transformer.encode_latents(latents, height, width, sigma=sigma)))


class Step(nn.Module):
    """Image (B, 3, H, W) at times t (B,) in [0, 1], latents' sigma (B,) and features -> v (B, 3, H, W)."""

    def __init__(self, transformer: PixelDecoderTransformer2DModel, features: LatentFeatures):
        super().__init__()
        self.transformer = transformer
        self.like = tree_map(lambda x: None if x is None else True, features)  # its shape alone

    def forward(self, image, t, sigma, features, prompt_embeds=None):
        return self.transformer(
            image, 1000 * t, prompt_embeds, sigma=sigma, latent_features=filled(self.like, features), return_dict=False
        )[0]


class OnnxTransformer(PixelDecoderTransformer2DModel):
    """The network by shape alone: its weights are in the graphs of a folder, and onnxruntime computes."""

    sessions: dict[str, Any]
    device = torch.device("cpu")  # type: ignore[assignment]  # where tensors come from and go to

    def encode_latents(self, latents, height, width, sigma=0.0, **kwargs) -> LatentFeatures:
        like = super().encode_latents(latents.to("meta"), height, width, sigma=0.0)
        told = {"latents": latents.float().numpy()}
        if self.base is not None:
            told["sigma"] = torch.as_tensor(sigma, dtype=torch.float32).expand(len(latents)).contiguous().numpy()
        features = self.sessions["encode_latents"].run(None, told)
        return filled(like, [torch.from_numpy(feature) for feature in features])

    def forward(self, hidden_states, timestep, encoder_hidden_states=None, sigma=0.0, latent_features=None, **kwargs):
        batch = len(hidden_states)
        t, sigma = (torch.as_tensor(x, dtype=torch.float32).expand(batch) for x in (timestep / 1000, sigma))
        told = {"image": hidden_states.float(), "t": t, "sigma": sigma}
        told |= {f"features_{i}": feature for i, feature in enumerate(tensors(latent_features))}
        if encoder_hidden_states is not None:
            told["prompt_embeds"] = encoder_hidden_states[:, : self.config.max_text_length].float()
        (v,) = self.sessions["velocity"].run(None, {name: x.contiguous().numpy() for name, x in told.items()})
        return (torch.from_numpy(v),)


def tensors(features: Any) -> list[torch.Tensor]:
    """What `encode_latents` returns, one after the other, without what a network has not."""
    return [x for x in tree_leaves(features) if x is not None]


def filled(features: Any, with_tensors: Sequence[torch.Tensor]) -> Any:
    """`features` with other tensors in their places: the way back of `tensors`."""
    leaves, spec = tree_flatten(features)
    rest = iter(with_tensors)
    return tree_unflatten([None if x is None else next(rest) for x in leaves], spec)


@torch.no_grad()
def export(pipeline: PixelDecoderPipeline, folder: Path, format: Format = "onnx", precision: Precision = "float32"):
    """Write a decoder's graphs and their manifest into a new folder, whole or not at all.

    Args:
        pipeline: on the CPU, in any dtype.
        format: "onnx", for onnxruntime and what else reads it; "pt2", for `torch.export.load`.
        precision: of the weights; "int8", ONNX's alone, leaves inputs, outputs and sums in float32.

    Raises:
        ValueError: a network with parts that no graph has, or that loses too much in int8.
    """
    model, config = pipeline.transformer, pipeline.transformer.config
    sampler = next((name for name, kind in SAMPLERS.items() if isinstance(pipeline.scheduler, kind)), None)
    if model.adapter is None:
        raise ValueError("a text-to-image prior decodes no latents: expected a decoder")
    if sampler is None:
        kind = type(pipeline.scheduler).__name__
        raise ValueError(f"a decoder sampled by {kind} is not exported: expected a student, of 1 to 4 steps")
    odd = [name for name, x in model.named_parameters() if "lora_" in name or type(x) is not nn.Parameter]
    if odd:
        raise ValueError(
            f"expected plain weights, got {odd[0]}: fuse LoRAs first, and leave quantisation to the export"
        )
    if precision == "int8" and format != "onnx":
        raise ValueError("int8 weights are made by onnxruntime's quantiser: expected format onnx")
    dtype = torch.float16 if precision == "float16" else torch.float32
    model = model.to(dtype).eval()

    # A size of which no two numbers are equal: what is equal in the example would be in all that is traced from it.
    cell = config.scale * config.latent_downscale_factor
    cells = config.patch_size // math.gcd(cell, config.patch_size)
    latents = torch.zeros(2, config.latent_channels, 3 * cells, 5 * cells)
    image = torch.zeros(2, 3, *(side * cell for side in latents.shape[2:]))
    like = model.encode_latents(latents, *image.shape[2:], sigma=0.0)
    features = tensors(like)
    size, each = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, {0: Dim.AUTO}
    told: dict[str, Any] = {"image": image, "t": torch.ones(2), "sigma": torch.zeros(2), "features": features}
    dynamic: dict[str, Any] = {"image": size, "t": each, "sigma": each}
    # A gate has one value to a token, and no more.
    dynamic["features"] = [{i: Dim.AUTO for i, side in enumerate(x.shape) if side > 1} for x in features]
    if config.text_embed_dim is not None:  # whoever runs the graphs cuts off tokens that the network would
        told["prompt_embeds"] = torch.zeros(2, 7, config.text_embed_dim)
        dynamic["prompt_embeds"] = {0: Dim.AUTO, 1: Dim.AUTO}
    names = [f"features_{i}" for i in range(len(features))]
    read, read_sizes = {"latents": latents}, {"latents": size}
    if model.base is not None:
        read["sigma"], read_sizes["sigma"] = torch.zeros(2), each
    graphs = {
        "encode_latents": (EncodeLatents(model), read, read_sizes, names),
        "velocity": (Step(model, like), told, dynamic, ["velocity"]),
    }
    if pipeline.encoder is not None:
        pixels = config.latent_downscale_factor
        picture = torch.zeros(2, 3, 6 * pixels, 10 * pixels)
        graphs["encode_image"] = (pipeline.encoder.float().eval(), {"image": picture}, {"image": size}, ["latents"])
    steps, (height, width) = pipeline.config.default_num_inference_steps, image.shape[2:]
    scheduler = set_times(pipeline.scheduler, steps, None, height, width, image.device)
    own = {key: value for key, value in pipeline.config.items() if key.startswith(("default_", "latent_", "license"))}
    manifest = {
        "version": VERSION,
        "format": format,
        "precision": precision,
        "graphs": {name: f"{name}.{format}" for name in graphs},
        "sampler": sampler,
        "times": scheduler.sigmas[:-1].tolist(),
        "cells": cells,
        **{key: config[key] for key in ("scale", "patch_size", "latent_channels", "latent_downscale_factor")},
        "text_embed_dim": config.text_embed_dim,
        "latent_space": pipeline.config.latent_space,
        "license": pipeline.config.license,
        "pipeline": own | {"trained_size": pipeline.config.trained_size},
        "scheduler": dict(scheduler.config),
        "transformer": {key: value for key, value in config.items() if not key.startswith("_")},
    }  # fmt: skip

    def write(folder: Path) -> None:
        for name, (module, arguments, shapes, outputs) in graphs.items():
            program = torch.export.export(module, (), arguments, dynamic_shapes=shapes)
            path = folder / manifest["graphs"][name]
            if format == "pt2":
                # A graph keeps all of its network's weights, the other graph's too.
                inputs = program.graph.find_nodes(op="placeholder")
                for spec, node in zip(program.graph_signature.input_specs, inputs, strict=True):
                    if spec.target in program.state_dict and not node.users:
                        program.state_dict[spec.target] = nn.Parameter(torch.empty(0))
                buffer = io.BytesIO()  # on a full disk PyTorch's own writer ends the process
                torch.export.save(program, buffer)
                path.write_bytes(buffer.getbuffer())
                continue
            with _quiet():
                flat = [key for key in arguments if key != "features"]
                if "features" in arguments:
                    flat[3:3] = names
                onnx = torch.onnx.export(program, dynamo=True, verbose=False, input_names=flat, output_names=outputs)
                onnx.save(path)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if precision == "int8":
            _quantize(folder, manifest)

    write_folder(folder, write)


def _quantize(folder: Path, manifest: dict[str, Any]) -> None:
    """The matrices of the velocity's graph in int8, each column in blocks of its own scale.

    Raises:
        ValueError: the image then keeps less than `ENOUGH` dB.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    generator = np.random.default_rng(0)
    latents = generator.standard_normal((1, manifest["latent_channels"], 4 * manifest["cells"], 4 * manifest["cells"]))
    text = manifest["text_embed_dim"] and generator.standard_normal((1, 8, manifest["text_embed_dim"]))

    def decoded() -> np.ndarray:
        return run_onnx(folder, latents, np.random.default_rng(0).standard_normal, prompt_embeds=text)

    exact, path = decoded(), folder / manifest["graphs"]["velocity"]
    quantizer = MatMulNBitsQuantizer(onnx.load(path), bits=8, block_size=32, is_symmetric=True, accuracy_level=1)
    with _quiet():
        quantizer.process()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=path.with_suffix(".onnx.data").exists())
    kept = 10 * math.log10(4 / max(float(np.square(decoded() - exact).mean()), 1e-12))
    if kept < ENOUGH:
        raise ValueError(f"int8 weights keep {kept:.1f} dB of this decoder's image, expected {ENOUGH:g}: use float16")


def providers(device: str = "auto") -> list[str]:
    """onnxruntime's providers for a device, the first to be tried first.

    Raises:
        ValueError: there is none for it.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    wanted = [name for name in FASTEST if name in available] if device == "auto" else [PROVIDERS[device]]
    if wanted[0] not in available:
        raise ValueError(
            f"--device {device}: this onnxruntime has no {wanted[0]}, only {', '.join(available)}: install the package "
            "of onnxruntime for it, such as onnxruntime-gpu"
        )
    return list(dict.fromkeys([*wanted, PROVIDERS["cpu"]]))


def onnx_pipeline(folder: Path, device: str = "auto") -> PixelDecoderPipeline:
    """A pipeline whose network onnxruntime runs: everything else, tiles and noise too, is as with the network itself.

    Args:
        folder: what `export` wrote, in ONNX.
        device: "cpu", "cuda", "mps" or "auto", the fastest there is.

    Raises:
        ValueError: no such folder, graphs of another version, or no provider for the device.
    """
    manifest = read_manifest(folder)
    with torch.device("meta"):
        model = OnnxTransformer(**manifest["transformer"])
    model.to(torch.float16 if manifest["precision"] == "float16" else torch.float32).eval()
    names = ("encode_latents", "velocity")
    model.sessions = {name: open_graph(folder, manifest, name, providers(device)) for name in names}
    scheduler = SAMPLERS[manifest["sampler"]].from_config(manifest["scheduler"])
    return PixelDecoderPipeline(model, scheduler, **manifest["pipeline"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporter and quantiser tell of every part."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in NOISY}
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
