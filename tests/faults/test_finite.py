"""NaN and infinite values, and the names of the layers that they come from."""

import re

import pytest
import torch

from conftest import TINY_NANO, tiny_model, tiny_pipeline
from pixeldecoder.models.finite import first_not_finite

LATENTS = torch.zeros(1, 16, 2, 2)
LAYERS = [name for name, layer in tiny_model(**TINY_NANO).named_modules() if not [*layer.children()] and name]


@pytest.mark.parametrize("index", range(3))
def test_weights(index):
    pipeline = tiny_pipeline()
    names = [name for name, weight in pipeline.transformer.named_parameters()]
    name = names[(index * 37 + 5) % len(names)]
    pipeline.transformer.get_parameter(name).data.view(-1)[0] = torch.nan
    told = rf"first in the weights transformer\.{re.escape(name)}, in 1 of"
    if pipeline.transformer.get_parameter(name).numel():
        assert re.search(told, f"first in {first_not_finite({'transformer': pipeline.transformer}, lambda: None)}")


def test_of_a_decode():
    pipeline = tiny_pipeline()
    pipeline.transformer.proj_out.bias.data[1] = torch.inf
    with pytest.raises(ValueError, match=r"in float32 \(the first in the weights transformer\.proj_out\.bias, in 1 of"):
        pipeline(LATENTS, num_inference_steps=1)


def make_nan(module, args, result):
    return result * torch.nan if torch.is_tensor(result) else None


@pytest.mark.slow
def test_activations():
    """Layers in turn make them, of weights that are sound; a layer that the decode does not run is not found."""
    found, tried = 0, LAYERS[::12]
    for name in tried:
        pipeline = tiny_pipeline()
        layer = pipeline.transformer.get_submodule(name)
        layer.register_forward_hook(
            lambda module, args, result: result * torch.nan if torch.is_tensor(result) else None
        )
        try:
            pipeline(LATENTS, num_inference_steps=1)
        except ValueError as error:
            found += 1
            assert f"(the first in the result of transformer.{name} (" in str(error)
    assert found > len(tried) / 2


def test_large_weights_overflow_in_half_precision():
    pipeline = tiny_pipeline().to(torch.float16)
    layer = next(name for name in LAYERS if name.endswith("to_out"))
    pipeline.transformer.get_submodule(layer).weight.data.fill_(6e4)
    with pytest.raises(ValueError, match=rf"in float16 \(the first in the result of transformer\.{layer} .*: use bfl"):
        pipeline(LATENTS + 1, num_inference_steps=1)


def test_hooks_are_gone_afterwards():
    pipeline = tiny_pipeline()
    pipeline.transformer.proj_out.bias.data[1] = torch.inf
    with pytest.raises(ValueError):
        pipeline(LATENTS, num_inference_steps=1)
    assert not any(module._forward_hooks for module in pipeline.transformer.modules())
