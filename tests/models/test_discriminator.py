"""The discriminator's two golden configurations."""

import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import GOLDEN, golden_parameter, normal, relative
from pixeldecoder import PixelDecoderDiscriminator


@pytest.mark.parametrize("case", ["disc_pool", "disc_patch3"])
def test_golden(case):
    spec = json.loads((GOLDEN / f"{case}.json").read_text())
    config = spec["config"]
    count = len(config["feature_indices"])
    model = PixelDecoderDiscriminator(
        config["inner_dim"], count, config.get("num_conv_layers", 2), config.get("patch_logits", False)
    )
    state = {name: golden_parameter(name, shape) for name, shape in spec["parameters"].items()}
    model.load_state_dict({name.removeprefix("cls_pred_"): tensor for name, tensor in state.items()})
    features = tuple(normal(f"{case}{i}", (2, 32, 8, 12)) for i in range(count))
    assert relative(model(features), load_file(GOLDEN / "losses.safetensors")[case]) < 2e-6


def test_save_and_load(tmp_path):
    model, features = PixelDecoderDiscriminator(32, 2), (torch.randn(1, 32, 8, 8), torch.randn(1, 32, 8, 8))
    model.save_pretrained(tmp_path)
    assert torch.equal(PixelDecoderDiscriminator.from_pretrained(tmp_path)(features), model(features))


def test_number_of_features():
    with pytest.raises(ValueError, match="expected 2 feature maps, got 1"):
        PixelDecoderDiscriminator(32, 2)((torch.randn(1, 32, 8, 8),))
