"""The network against the reference's numbers, and in the hands of diffusers."""

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import CASES, TINY, TINY_NANO, TINY_V15, Golden, manifests, relative, tiny_model
from oracle import Oracle
from pixeldecoder import PixelDecoderTransformer2DModel
from pixeldecoder.convert import config_from_reference, export_reference_state_dict
from pixeldecoder.models.layers import _blockwise_attention, attention, pad_heads


def inputs(batch=2, height=64, width=96, channels=16, cell=32):
    return dict(
        hidden_states=torch.randn(batch, 3, height, width),
        timestep=torch.tensor([999.0, 342.0])[:batch],
        encoder_hidden_states=torch.randn(batch, 7, 20),
        latents=torch.randn(batch, channels, height // cell, width // cell),
        sigma=torch.tensor([0.0, 0.35])[:batch],
    )


# The reference's float32 rounding depends on the processor: it was met to 2e-5, 2e-6 on one machine, and is to 2.8e-5
# 3.1e-6 on another (AMD EPYC), where our own float32 is within 5e-6 of our float64. The smallest known mistake, one
# rounding of the time embedding's angles, makes 1e-4.
OUTPUT, FEATURE = 4e-5, 4e-6


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_golden(case):
    golden = Golden(case)
    has_aux = "aux_rgb" in golden.outputs
    output = golden.model(
        golden.x,
        golden.t,
        golden.text,
        latents=golden.latents,
        sigma=golden.sigma,
        return_features=(1, 3),
        return_aux_rgb=has_aux,
    )
    assert relative(output.sample, golden.outputs["velocity"]) < OUTPUT
    for index, feature in enumerate(output.features):
        assert relative(feature, golden.outputs[f"feature_{index}"]) < FEATURE
    if has_aux:
        assert relative(output.aux_rgb, golden.outputs["aux_rgb"]) < OUTPUT
    plain = golden.model(golden.x, golden.t, golden.text).sample
    assert relative(plain, golden.outputs["velocity_without_latent"]) < OUTPUT


@pytest.mark.parametrize("name", list(manifests()))
def test_release_manifest(name):
    manifest = manifests()[name]
    with torch.device("meta"):
        model = PixelDecoderTransformer2DModel(**config_from_reference(manifest["config"]))
    exported = {key: list(tensor.shape) for key, tensor in export_reference_state_dict(model.state_dict()).items()}
    assert exported == manifest["parameters"]
    assert sum(p.numel() for p in model.parameters()) == manifest["num_parameters"]


def test_gate_starts_as_the_paper_says():
    gate = PixelDecoderTransformer2DModel(**TINY).adapter.sigma_gates[0]
    tokens = torch.zeros(3, 1, 32)
    opening = gate(tokens, torch.full((3, 1, 32), 1e-6), torch.tensor([0.0, 0.4, 1.0]))
    assert opening.mean(dim=(1, 2)).tolist() == pytest.approx([0.88, 0.50, 0.05], abs=5e-3)


def test_new_network_ignores_latents_and_predicts_nothing():
    model = PixelDecoderTransformer2DModel(**TINY_V15)
    assert torch.equal(model(**inputs()).sample, torch.zeros(2, 3, 64, 96))
    model.proj_out = tiny_model(**TINY_V15).proj_out
    given = inputs()
    with_latents = model(**given).sample
    assert torch.equal(with_latents, model(**(given | {"latents": None})).sample) and with_latents.std() > 0


@pytest.mark.parametrize("config", [TINY, TINY_V15, TINY_NANO], ids=["v1", "v1.5", "nano"])
@torch.no_grad()
def test_adapter_once_is_adapter_every_step(config):
    model, given = tiny_model(**config), inputs()
    if config["text_embed_dim"] is None:
        given["encoder_hidden_states"] = None
    features = model.encode_latents(given["latents"], 64, 96, sigma=given["sigma"])
    cached = model(**(given | {"latents": None, "latent_features": features})).sample
    assert torch.equal(cached, model(**given).sample)


@pytest.mark.parametrize(
    "config",
    [TINY, TINY | dict(scale=1), TINY_V15 | dict(latent_channels=64, unpack_latents=True), TINY_NANO],
    ids=["v1", "folded", "v1.5", "nano"],
)
@torch.no_grad()
def test_chunks_change_nothing(config):
    model = tiny_model(**config)
    cell = model.config.latent_downscale_factor * model.config.scale
    given = inputs(batch=1, height=96, width=160, channels=config["latent_channels"]) | {
        "latents": torch.randn(1, config["latent_channels"], 96 // cell, 160 // cell), "sigma": 0.35
    }  # fmt: skip
    if config["text_embed_dim"] is None:
        given["encoder_hidden_states"] = None
    whole = model(**given).sample
    plain = Oracle(model).velocity(
        given["hidden_states"], 0.999, given["latents"], 0.35, given["encoder_hidden_states"]
    )
    assert relative(whole, plain) < 1e-5
    # In float64, where products of other shapes round no differently; float32 is judged on nano.
    model, given = model.double(), {k: v.double() if torch.is_tensor(v) else v for k, v in given.items()}
    whole = model(**given).sample
    for size in (1, 2, 7, 16, 59, 60, 1000):  # of 60 patches
        assert relative(model(**given, chunk_size=size).sample, whole) < 1e-7


def test_chunks_have_the_same_gradients():
    model, given = tiny_model(**TINY_V15), inputs()
    grads = []
    for size in (None, 5):
        model.zero_grad()
        model(**given, chunk_size=size).sample.square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4, msg=name)


def test_features_only():
    """They and their gradients are those of a whole pass; what comes after the last of them does not run."""
    model, given = tiny_model(**TINY_V15), inputs()
    given["hidden_states"].requires_grad_()
    runs = []
    for block in model.patch_blocks:
        block.register_forward_hook(lambda block, *_: runs.append(block))
    found = []
    for features_only in (False, True):
        output = model(**given, return_features=(2, 0), features_only=features_only)
        sum(feature.square().sum() for feature in output.features).backward()
        found.append((*output.features, given["hidden_states"].grad))
        given["hidden_states"].grad = None
    assert len(found[0]) == 3 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert output.sample is None and runs == [*model.patch_blocks, *model.patch_blocks[:3]]
    (features,) = model(**given, return_features=(2, 0), features_only=True, return_dict=False)
    assert torch.equal(features[1], found[0][1])


@torch.no_grad()
def test_whole_pixel_modulation_never_exists():
    """Nothing that a chunked forward allocates is as large as the modulation of all pixels."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            tensors = output if isinstance(output, (tuple, list)) else (output,)
            self.size = max([self.size, *(x.numel() for x in tensors if isinstance(x, torch.Tensor))])
            return output

    model, given = tiny_model(**TINY_NANO), inputs(height=256, width=256) | {"encoder_hidden_states": None}
    sizes = []
    for chunk_size in (None, 16):
        with Largest() as largest:
            model(**given, chunk_size=chunk_size)
        sizes.append(largest.size)
    pixels = 2 * 256 * 256 * TINY["pixel_dim"]
    assert sizes[0] == 4 * pixels and sizes[1] == pixels


@torch.no_grad()
def test_bfloat16_attention_on_a_cpu():
    query, key, value = (torch.randn(2, 300, 3, 24) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    bfloat16 = [x.bfloat16() for x in (query, key, value)]
    padded = _blockwise_attention(*pad_heads(*bfloat16), scale=24**-0.5)[..., :24]
    for blocks in attention(*bfloat16), padded:
        assert (blocks - exact.transpose(1, 2)).std() / exact.std() < 0.01


@torch.no_grad()
def test_clean_image_prediction_is_returned_as_velocity():
    velocity_model, image_model = tiny_model(**TINY), tiny_model(**TINY, prediction_type="sample")
    given = inputs() | {"timestep": torch.tensor([500.0, 20.0])}
    x0 = velocity_model(**given).sample  # the same weights: what the layers put out
    expected = (given["hidden_states"] - x0) / torch.tensor([0.5, 0.05])[:, None, None, None]
    torch.testing.assert_close(image_model(**given).sample, expected)


def test_latents_of_another_size_are_resized():
    for scale, size in (4, (2, 4)), (2, (3, 5)), (1, (5, 9)):  # upsampled, the same, folded; never exactly the grid's
        model = tiny_model(**TINY, scale=scale)
        given = inputs() | {"latents": torch.randn(2, 16, *size)}
        assert model(**given).sample.isfinite().all()


def test_float32_input_survives_a_bfloat16_network():
    model, given = tiny_model(**TINY_NANO), inputs() | {"encoder_hidden_states": None}
    exact = model(**given).sample
    rounded = model.to(torch.bfloat16)(**given).sample
    assert rounded.dtype == torch.float32
    assert (rounded - exact).std() / exact.std() < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.randn(2, 3, 60, 96)}, "multiples of 16"),
        ({"latents": torch.randn(2, 4, 2, 3)}, r"\(B, 16, h, w\), got \(2, 4, 2, 3\)"),
        ({"encoder_hidden_states": None}, "expects encoder_hidden_states"),
        ({"return_aux_rgb": True}, "no auxiliary RGB head"),
        ({"features_only": True}, "expected return_features"),
    ],
)
def test_wrong_input(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**(inputs() | change))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attention_head_dim": 6}, "multiple of 4"),
        ({"prediction_type": "epsilon"}, "velocity"),
        ({"base_dim": 8}, 'predicts the image \\("sample"\\)'),
        ({"base_dim": 8, "prediction_type": "sample", "latent_channels": None}, "a network with latents"),
        ({"base_dim": 8, "prediction_type": "sample", "latent_downscale_factor": 14}, r"powers of 2 .* got \(4, 14\)"),
        ({"base_dim": 1}, "base_dim is 1: expected a whole number, at least 2"),
        ({"scale": 3}, "multiple or a divisor of patch_size"),
        ({"patch_size": 0}, "patch_size is 0: expected a whole number, at least 1"),
        ({"patch_size": "x"}, "patch_size is 'x': expected a whole number"),
        ({"patch_size": 16.0}, "patch_size is 16.0: expected a whole number"),
        ({"num_layers": -1}, "num_layers is -1"),
        ({"num_layers": True}, "num_layers is True"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"attention_head_dim": 4}, "attention_head_dim is 4: expected a multiple of 4, at least 8"),
        ({"num_pixel_layers": 0}, "num_pixel_layers is 0"),
        ({"pixel_dim": 6}, "pixel_dim is 6: expected a multiple of 4, at least 4"),
        ({"num_pixel_attention_heads": 0}, "num_pixel_attention_heads is 0"),
        ({"pixel_attention_head_dim": 18}, "pixel_attention_head_dim is 18: expected a multiple of 4"),
        ({"text_embed_dim": 0}, "text_embed_dim is 0"),
        ({"max_text_length": None}, "max_text_length is None"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"latent_downscale_factor": -8}, "latent_downscale_factor is -8"),
        ({"scale": 0}, "scale is 0"),
        ({"scale": -4}, "scale is -4"),
        ({"adapter_dim": 30}, "adapter_dim is 30: expected a multiple of 4"),
        ({"num_adapter_layers": -1}, "num_adapter_layers is -1: expected a whole number, at least 0"),
        ({"adapter_padding_mode": "reflect"}, "adapter_padding_mode is 'reflect': expected 'zeros' or 'replicate'"),
        ({"injection_interval": 0}, "injection_interval is 0"),
        ({"unpack_latents": "yes"}, "unpack_latents is 'yes': expected True or False"),
        ({"per_channel_gate": 1}, "per_channel_gate is 1: expected True or False"),
        ({"inject_pixels": None}, "inject_pixels is None"),
        ({"aux_rgb": []}, r"aux_rgb is \[\]"),
        ({"aux_rgb_block": -2}, "aux_rgb_block is -2: expected a whole number, at least -1"),
        ({"aux_rgb_block": 4}, "aux_rgb_block is 4: expected less than num_adapter_layers, 4"),
        ({"rope_reference_size": 0}, "rope_reference_size is 0"),
        ({"prediction_type": ["sample"]}, r"prediction_type is \['sample'\]"),
        ({"aux_rgb": True, "scale": 32}, "expected scale 32 to divide patch_size 16"),
        ({"unpack_latents": True, "latent_channels": 18}, "latent_channels 18 to be a multiple of 4"),
        ({"unpack_latents": True, "latent_downscale_factor": 1}, "latent_downscale_factor 1 of 2"),
    ],
)
def test_wrong_config(config, message):
    with pytest.raises(ValueError, match=message) as error:
        PixelDecoderTransformer2DModel(**(TINY | config))
    assert "\n" not in str(error.value)


def test_smallest_config():
    """What is at the edge of the ranges works."""
    model = tiny_model(
        patch_size=1, num_layers=1, num_attention_heads=1, attention_head_dim=8, num_pixel_layers=1, pixel_dim=4,
        num_pixel_attention_heads=1, pixel_attention_head_dim=8, text_embed_dim=1, max_text_length=1, latent_channels=1,
        latent_downscale_factor=1, scale=1, adapter_dim=4, num_adapter_layers=0, injection_interval=1,
        rope_reference_size=1, aux_rgb=True,
    )  # fmt: skip
    output = model(
        torch.randn(1, 3, 2, 1), 500.0, torch.randn(1, 3, 1), latents=torch.randn(1, 1, 2, 1), return_aux_rgb=True
    )
    assert output.sample.shape == output.aux_rgb.shape == (1, 3, 2, 1) and output.sample.isfinite().all()


def test_save_and_load(tmp_path):
    model, given = tiny_model(**TINY_V15), inputs()
    model.save_pretrained(tmp_path)
    loaded = PixelDecoderTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.config.inject_pixels
    assert torch.equal(loaded(**given).sample, model(**given).sample)


@torch.no_grad()
def test_layerwise_casting():
    model, given = tiny_model(), inputs()
    exact = model(**given).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.patch_blocks[0].attn.to_qkv.weight.dtype == torch.float8_e4m3fn
    assert model.pixel_blocks[0].adaln_in.weight.dtype == torch.float32  # errors here are seen at once
    difference = model(**given).sample - exact
    assert 1e-6 < difference.std() / exact.std() < 0.2


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@torch.no_grad()
def test_group_offload(offload_type):
    model, given = tiny_model(**TINY_V15), inputs()
    exact = model(**given).sample
    model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1, use_stream=False
    )
    features = model.encode_latents(given["latents"], 64, 96)
    sample = model(**(given | {"latents": None, "latent_features": features})).sample
    torch.testing.assert_close(sample, exact, atol=1e-5 if offload_type == "leaf_level" else 0, rtol=0)


def test_gradient_checkpointing():
    model, given = tiny_model(**TINY_V15).train(), inputs()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(**given).sample.square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 100
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@torch.no_grad()
def test_regional_compilation():
    model, given = tiny_model(), inputs()
    exact = model(**given).sample
    model.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(model(**given).sample, exact, atol=1e-5, rtol=1e-4)


def test_attention_backend():
    model, given = tiny_model(), inputs()
    exact = model(**given).sample
    with attention_backend("native"):  # `set_attention_backend` also changes what every other model uses: put it back
        model.set_attention_backend("_native_math")
        assert model.pixel_blocks[0].attn.processor._attention_backend == "_native_math"
        torch.testing.assert_close(model(**given).sample, exact, atol=1e-5, rtol=1e-4)


def test_lora():
    peft = pytest.importorskip("peft")
    model, given = tiny_model(), inputs()
    exact = model(**given).sample
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_qkv", "to_out"], init_lora_weights=False))
    changed = model(**given).sample
    assert relative(changed, exact) > 1e-3
    model.disable_adapters()
    torch.testing.assert_close(model(**given).sample, exact)


def test_device_map_keeps_blocks_whole():
    names = {type(module).__name__ for module in tiny_model(**TINY_NANO).modules()}
    assert set(PixelDecoderTransformer2DModel._no_split_modules) <= names
    assert set(PixelDecoderTransformer2DModel._repeated_blocks) <= names


@pytest.mark.parametrize("config", [TINY, TINY_V15, TINY_NANO | dict(base_dim=None)])
@torch.no_grad()
def test_sums_that_float16_does_not_hold(config):
    """One channel of image and text, and all pixels, grow beyond its 65504, the pixels as nano's do; layers that read
    the image unnormalised have nothing of that channel, as massive activations are for attention alone.
    A base's rounding would grow as much."""
    model, given = tiny_model(**config), inputs()
    if config["text_embed_dim"] is None:
        given["encoder_hidden_states"] = None
    patches, pixels = model.patch_blocks[0], model.pixel_blocks[0]
    for norms, mlp in (patches.image, patches.mlp), (patches.text, patches.text_mlp):
        if mlp is not None:
            norms.adaln.weight[-32] *= 10_000  # gate of the first channel
            mlp.down_proj.weight[0] *= 10_000
    pixels.adaln_out.weight[: 16**2 * model.config.pixel_dim] *= 1000  # gate
    pixels.expand.weight *= 1000
    gates = [*model.adapter.sigma_gates, *filter(None, [model.adapter.pixel_sigma_gate])]
    for layer in (*(x for block in model.pixel_blocks for x in (block.adaln_in, block.adaln_out)),
                  *(gate.proj for gate in gates)):  # fmt: skip
        layer.weight[:, 0] = 0
    seen = []
    for block in patches, pixels:
        block.register_forward_hook(lambda block, args, out: seen.append(out if isinstance(out, tuple) else (out,)))
    truth = model(**given).sample
    sums = [x for out in seen for x in out if x is not None]
    assert min(x.abs().max() for x in sums) > 65504 and len(sums) == (3 if config["text_embed_dim"] else 2)
    output = model.half()(**given).sample
    assert output.dtype == torch.float32 and relative(output, truth) < 0.02
    chunked = model(**given, chunk_size=5).sample
    assert relative(chunked, output) < 0.02
