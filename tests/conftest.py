"""The rule of the golden numbers, and tiny real components."""

import gzip
import json
import math
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchLCMScheduler
from safetensors.torch import load_file

from pixeldecoder import PixelDecoderPipeline, PixelDecoderTransformer2DModel, TinyLatentEncoder
from pixeldecoder.convert import config_from_reference, convert_reference_state_dict

TESTS = Path(__file__).parent
# Child processes, too, test the checkout that the tests are in, and find its encoder and oracle.
os.environ["PYTHONPATH"] = os.pathsep.join(
    map(str, (TESTS.parent / "src", TESTS, *filter(None, [os.environ.get("PYTHONPATH")])))
)

GOLDEN = TESTS / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("v1*.json"))

TINY = dict(
    num_layers=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_pixel_layers=2,
    pixel_dim=8,
    num_pixel_attention_heads=2,
    pixel_attention_head_dim=12,
    text_embed_dim=20,
    max_text_length=12,
    adapter_dim=32,
    latent_channels=16,
)
TINY_V15 = TINY | dict(
    adapter_padding_mode="replicate",
    per_channel_gate=False,
    inject_pixels=True,
    aux_rgb=True,
    rope_reference_size=2048,
)
TINY_NANO = TINY_V15 | dict(text_embed_dim=None, prediction_type="sample", base_dim=8)


def normal(name: str, shape) -> torch.Tensor:
    """N(name, shape) of the golden rule, float32."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(math.prod(shape))
    return torch.from_numpy(values.reshape(shape)).float()


def golden_parameter(name: str, shape) -> torch.Tensor:
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(math.prod(shape)).reshape(shape)
    if name.endswith("log_alpha"):
        values = math.log(5) + 0.2 * values
    elif len(shape) <= 1:
        values = 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
    elif not name.endswith("y_pos_embedding"):
        values = values / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(values)).float()


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference over the tensor's largest value."""
    assert value.shape == truth.shape
    return ((value - truth).abs().max() / truth.abs().max()).item()


def manifests() -> dict:
    return json.loads(gzip.decompress((GOLDEN / "release_manifests.json.gz").read_bytes()))


class Golden:
    """One golden network with its reference tensors, inputs and outputs."""

    def __init__(self, case: str):
        spec = json.loads((GOLDEN / f"{case}.json").read_text())
        self.kwargs = spec["config"]
        self.state = {name: golden_parameter(name, shape) for name, shape in spec["parameters"].items()}
        self.outputs = load_file(GOLDEN / f"{case}.safetensors")
        self.x, self.text, self.latents = (normal(name, spec["inputs"][name]) for name in ("x", "text", "latent"))
        self.t, self.sigma = self.outputs["t"], self.outputs["sigma"]
        self.model = PixelDecoderTransformer2DModel(**config_from_reference(self.kwargs)).eval()
        self.model.load_state_dict(convert_reference_state_dict(self.state))


def randomized(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Without its zero-initialised layers, which would hide what comes before them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            fan_in = math.prod(parameter.shape[1:])
            parameter.data = torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in)
    return model.eval()


def tiny_model(**config) -> PixelDecoderTransformer2DModel:
    return randomized(PixelDecoderTransformer2DModel(**(config or TINY)))


def tiny_pipeline(**config) -> PixelDecoderPipeline:
    encoder = TinyLatentEncoder(channels=8, num_blocks=(0, 0, 0, 1)).eval()
    pipeline = PixelDecoderPipeline(
        tiny_model(**(config or TINY_NANO)), FlowMatchLCMScheduler(shift=1.0), encoder=encoder
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(autouse=True)
def _seed(monkeypatch, tmp_path_factory):
    torch.manual_seed(0)
    monkeypatch.setenv("PIXELDECODER_CACHE", str(tmp_path_factory.mktemp("cache")))
