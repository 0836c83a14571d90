"""Frozen encoders against their documented formulas; noise frames."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderRAE, AutoencoderTiny
from PIL import Image
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from conftest import Golden, golden_parameter
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.autoencoders import load_autoencoder, load_image_encoder
from pixeldecoder.flow import add_noise
from pixeldecoder.latents import SPACES, find_latent_space

IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def tiny_kl(**kwargs) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        **kwargs,
    ).eval()


def saved(model, tmp_path, **kwargs):
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        return load_image_encoder(str(tmp_path), **kwargs)(IMAGE)


@pytest.mark.parametrize("shift, scale", [(0.1159, 0.3611), (None, 0.13025)])
def test_kl(tmp_path, shift, scale):
    vae = tiny_kl(shift_factor=shift, scaling_factor=scale)
    z = saved(vae, tmp_path)
    mean = vae.encode(IMAGE).latent_dist.mean
    torch.testing.assert_close(z, (mean - (shift or 0)) * scale)


def test_kl_in_a_pipeline_folder(tmp_path):
    vae = tiny_kl(scaling_factor=2.0)
    vae.save_pretrained(tmp_path / "vae")
    torch.testing.assert_close(load_image_encoder(str(tmp_path))(IMAGE), vae.encode(IMAGE).latent_dist.mean * 2)


def test_flux2(tmp_path):
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    z = saved(vae, tmp_path)
    mean = vae.encode(IMAGE).latent_dist.mean
    b, c, h, w = mean.shape  # packed by hand: channel order (c, dy, dx)
    packed = mean.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
    # The layer's own normalisation, in evaluation mode.
    torch.testing.assert_close(z, vae.bn(packed), rtol=1e-4, atol=1e-5)


def test_qwen_image(tmp_path):
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0],
    ).eval()  # fmt: skip
    z = saved(vae, tmp_path)
    mean = vae.encode(IMAGE[:, :, None]).latent_dist.mean[:, :, 0]
    for channel in range(4):
        expected = (mean[:, channel] - 0.1 * (channel + 1)) / (channel + 1)
        torch.testing.assert_close(z[:, channel], expected)


def test_tiny(tmp_path):
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=16, upsampling_scaling_factor=2,
    ).eval()  # fmt: skip
    torch.testing.assert_close(saved(vae, tmp_path), vae.encode(IMAGE).latents)


def test_rae(tmp_path):
    vae = AutoencoderRAE(
        encoder_type="dinov2", encoder_hidden_size=64, encoder_patch_size=14, encoder_num_hidden_layers=1,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=16, patch_size=16, encoder_input_size=28,
        encoder_norm_mean=[0.5] * 3, encoder_norm_std=[0.5] * 3, latents_mean=0.5, latents_std=2.0,
    ).eval()  # fmt: skip
    z = saved(vae, tmp_path)
    # Normalised with mean and std .5, its own input is ours again: in [-1, 1].
    own = F.interpolate(IMAGE, size=28, mode="bicubic")
    tokens = vae.encoder(own).last_hidden_state[:, -4:]
    expected = (tokens.transpose(1, 2).unflatten(2, (2, 2)) - 0.5) / 2
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)


def siglip(size=224):
    vision = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=size, patch_size=14
    )
    text = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()


def test_siglip(tmp_path):
    """As Scale-RAE: 224 px of a 256 px image, features before the last norm, then a norm without gain."""
    model = siglip()
    for parameter in model.vision_model.parameters():
        parameter.data *= 0.05  # features small enough for the norm's epsilon to show
    model.save_pretrained(tmp_path)
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1)) * 2 - 1
    z = load_image_encoder(str(tmp_path))(image)
    with torch.no_grad():
        small = F.interpolate(image, 224, mode="bicubic", antialias=True)
        assert small.abs().max() > 1  # and it is not clamped
        vision = model.vision_model
        vision.post_layernorm = torch.nn.Identity()  # what is asked for is what it would have normalised
        tokens = vision(small).last_hidden_state
    tokens = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(z, tokens.transpose(1, 2).reshape(1, 32, 16, 16), rtol=1e-5, atol=3e-6)
    assert load_image_encoder(str(tmp_path))(image[..., :128]).shape == (1, 32, 16, 8)


def checkpoint(folder, case, name, channels):
    """A tiny network by the golden rule, with the family's real number of channels."""
    first = "lq_proj.latent_proj.0.weight"
    state = Golden(case).state
    state[first] = golden_parameter(first, (len(state[first]), channels, 3, 3))
    path = folder / name / "model_ema_bf16.pth"
    path.parent.mkdir()
    torch.save({f"net.{key}": value for key, value in state.items()}, path)
    return PixelDecoderPipeline.from_pretrained(path)


@pytest.mark.parametrize("space", ["dinov2", "siglip"])
def test_vision_encoders_decoders(tmp_path, space):
    """Image to latents to larger image, by reference checkpoints of the families that have no pipeline in diffusers."""
    if space == "dinov2":
        AutoencoderRAE(
            encoder_type="dinov2", encoder_hidden_size=768, encoder_patch_size=14, encoder_num_hidden_layers=1,
            decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=16, patch_size=16, encoder_input_size=28,
        ).save_pretrained(tmp_path / "encoder")  # fmt: skip
    else:
        config = SiglipVisionConfig(
            hidden_size=1152, intermediate_size=32, num_hidden_layers=1, num_attention_heads=8, image_size=28,
            patch_size=14,
        )  # fmt: skip
        SiglipVisionModel(config).save_pretrained(tmp_path / "encoder")
    case = {"dinov2": "v1_dinov2", "siglip": "v1_siglip_8x"}[space]
    decoder = checkpoint(tmp_path, case, SPACES[space].preset, SPACES[space].channels)
    decoder.set_progress_bar_config(disable=True)
    assert decoder.config.latent_space == space
    encoder = load_image_encoder(str(tmp_path / "encoder"))
    embeds = torch.randn(1, 4, 20)
    photo = Image.new("RGB", (32, 32), "red")
    scale = {"dinov2": 4, "siglip": 8}[space]
    image = decoder.upscale(photo, sigma=0.2, encoder=encoder, prompt_embeds=embeds).images[0]
    assert image.size == (32 * scale, 32 * scale)
    if space == "dinov2":  # which sees one size alone
        assert find_latent_space(AutoencoderRAE.from_pretrained(tmp_path / "encoder")) is SPACES["dinov2"]
        with pytest.raises(ValueError, match="images of one size only"):
            decoder.upscale(Image.new("RGB", (48, 32)), encoder=encoder, prompt_embeds=embeds)
    with pytest.raises(ValueError, match="of another latent space"):
        decoder.upscale(photo, encoder=load_image_encoder("nano"), prompt_embeds=embeds)
    with pytest.raises(ValueError, match=f"no encoder of its own.*{SPACES[space].encoder}"):
        decoder.upscale(photo, prompt_embeds=embeds)


def test_upscale_noises_in_the_frame_of_the_space(tmp_path, monkeypatch):
    decoder = checkpoint(tmp_path, "v1_sdxl", SPACES["sdxl"].preset, 4)
    decoder.set_progress_bar_config(disable=True)
    seen = []
    own = decoder.transformer.encode_latents
    monkeypatch.setattr(decoder.transformer, "encode_latents", lambda z, *a, **k: seen.append(z) or own(z, *a, **k))
    clean = torch.randn(1, 4, 4, 4)
    for sigma in (0.0, 0.6):
        generator = torch.Generator().manual_seed(2)
        decoder.upscale(
            Image.new("RGB", (32, 32)), sigma=sigma, noise_generator=generator, encoder=lambda image: clean,
            prompt_embeds=torch.randn(1, 4, 20),
        )  # fmt: skip
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(seen[0], clean)
    torch.testing.assert_close(seen[1], 0.8 * clean + 0.6 * noise)


def test_callable():
    assert load_image_encoder("averaging:encode")(IMAGE).shape == (1, 16, 4, 4)


def test_a_latent_space_by_name(tmp_path, monkeypatch):
    """Its usual autoencoder, wherever an encoder is asked for."""
    vae = tiny_kl(scaling_factor=2.0)
    vae.save_pretrained(tmp_path / "vae")
    asked = []
    monkeypatch.setattr("pixeldecoder.autoencoders.download", lambda name, patterns: asked.append(name) or tmp_path)
    mean = vae.encode(IMAGE).latent_dist.mean
    for name, space in SPACES.items():
        torch.testing.assert_close(load_image_encoder(name)(IMAGE), 2 * mean)
        assert asked.pop() == space.encoder
    assert type(load_autoencoder("sd3")).__name__ == "AutoencoderKL"


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_kl().save_pretrained(tmp_path / "vae")
    assert load_image_encoder("~/vae")(IMAGE).shape == (1, 4, 16, 16)


def test_loading_warns_of_nothing(tmp_path, recwarn):
    tiny_kl().save_pretrained(tmp_path / "kl")
    for name in ("nano", str(tmp_path / "kl")):
        load_image_encoder(name, dtype=torch.bfloat16)
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


@pytest.mark.parametrize(
    "name, message",
    [
        ("./nothing", "no encoder.*no such folder"),
        ("averaging:decode", "module:function"),
        ("nowhere:encode", "module:function"),
        ("nothing", 'no encoder "nothing": no such folder: expected "nano"'),
    ],
)
def test_unknown(name, message):
    with pytest.raises(ValueError, match=message):
        load_image_encoder(name)


def test_another_class(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match="VQModel: expected one of AutoencoderKL,"):
        load_image_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a diffusers autoencoder"):
        load_image_encoder(str(tmp_path))


def test_noise_frames():
    z, noise, sigma = torch.full((2, 1, 1, 1), 2.0), torch.ones(2, 1, 1, 1), torch.tensor([0.0, 0.6])
    assert add_noise(z, noise, sigma).flatten().tolist() == pytest.approx([2, 0.8 + 0.6])
    vp = add_noise(z, noise, sigma, "variance-preserving")
    assert vp.flatten().tolist() == pytest.approx([2, 1.6 + 0.6])
