"""The pipeline against the reference's samples, and what diffusers users do with it."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxPipeline,
)
from PIL import Image
from safetensors.torch import load_file

from conftest import GOLDEN, TINY, TINY_NANO, Golden, normal, relative, tiny_model, tiny_pipeline
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.flow import student_times
from pixeldecoder.presets import PRESETS, RELEASED_NEGATIVE_PROMPT
from pixeldecoder.sampler import teacher_scheduler

SAMPLES = [
    (path.stem, key)
    for path in sorted(GOLDEN.glob("v1*.safetensors"))
    for key in load_file(path)
    if key.startswith("sample")
]
TEACHER = [key for key in load_file(GOLDEN / "teacher_sampler.safetensors") if not key.endswith("timesteps")]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("case", "key"), SAMPLES)
def test_golden_student(case, key, monkeypatch):
    golden = Golden(case)
    noises = iter(["x", "eps_0", "eps_1", "eps_2", "unused"])

    def named_noise(shape, **kwargs):
        return normal(next(noises), shape)

    for module in ("pipeline", "flow"):
        monkeypatch.setattr(f"pixeldecoder.{module}.randn_tensor", named_noise)
    monkeypatch.setattr("diffusers.schedulers.scheduling_flow_match_lcm.randn_tensor", named_noise)
    schedulers = {"sample_sde": FlowMatchLCMScheduler, "sample_ode": FlowMatchEulerDiscreteScheduler}
    pipeline = PixelDecoderPipeline(golden.model, schedulers[key](shift=1.0))
    steps = []
    images = pipeline(
        golden.latents,
        prompt_embeds=golden.text,
        sigma=golden.sigma,
        output_type="pt",
        callback_on_step_end=lambda pipeline, step, timestep, tensors: steps.append(tensors["image"]),
    ).images
    assert len(steps) == 4
    assert relative(steps[-1], golden.outputs[key]) < 2e-5
    torch.testing.assert_close(images, golden.outputs[key].clamp(-1, 1) / 2 + 0.5, atol=1e-4, rtol=0)


@pytest.mark.parametrize("key", TEACHER)
def test_golden_teacher(key):
    truth = load_file(GOLDEN / "teacher_sampler.safetensors")
    kind, steps, shift, scale = re.fullmatch(r"(\w+)_steps(\d+)_shift(.+)_cfg(.+)", key).groups()
    prediction = {"flow": "flow_prediction", "x_start": "sample"}[kind]
    config = teacher_scheduler().config
    scheduler = DPMSolverMultistepScheduler.from_config(config, flow_shift=float(shift), prediction_type=prediction)
    scheduler.set_timesteps(int(steps))
    scheduler.set_begin_index(0)
    x = normal("teacher_noise", (2, 3, 8, 8))
    for step, timestep in enumerate(scheduler.timesteps):
        t = truth[f"{key}_timesteps"][step] / 1000  # the times the reference's network was given
        assert scheduler.sigmas[step] == pytest.approx(t.item(), abs=1e-6)
        v_c, v_u = (
            torch.tanh(x * (1.3 - t)) + 0.25 * torch.tensor(y).view(2, 1, 1, 1) * t for y in ((1, -0.5), (0.1, 0.1))
        )
        x = scheduler.step(v_u + float(scale) * (v_c - v_u), timestep, x, return_dict=False)[0]
    # The reference loses digits near t = 1; the fewer the steps the more of that is left.
    assert relative(x, truth[key]) < {1: 5e-4, 2: 1e-4, 10: 3e-5, 25: 1e-5, 50: 1e-5}[int(steps)]


def test_teacher_is_fed_unrounded_times_and_the_size_decides_its_shift():
    pipeline = PixelDecoderPipeline(tiny_model(**TINY), teacher_scheduler(), default_num_inference_steps=3)
    times = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args: times.append(args[1].item()))
    embeds = torch.randn(1, 5, 20)
    pipeline(torch.randn(1, 16, 2, 8), prompt_embeds=embeds, output_type="pt")
    shift = 6 * (128 / 2048) ** 0.5  # the root of 64 x 256 pixels is 128
    expected = [1000 * shift * u / (1 + (shift - 1) * u) for u in (0.999, 0.666, 0.333)]
    assert times == pytest.approx(expected, rel=1e-5)


def test_guidance_acts_on_text_alone():
    pipeline = PixelDecoderPipeline(tiny_model(**TINY), FlowMatchEulerDiscreteScheduler(shift=1.0))
    latents, positive, negative = torch.randn(1, 16, 2, 2), torch.randn(1, 5, 20), torch.randn(1, 9, 20)
    given = dict(num_inference_steps=1, output_type="pt", return_dict=False)

    def velocity(embeds, **kwargs):
        steps = []
        pipeline(
            latents,
            prompt_embeds=embeds,
            generator=seeded(3),
            callback_on_step_end=lambda p, i, t, tensors: steps.append(tensors["image"]),
            **given,
            **kwargs,
        )
        return torch.randn(1, 3, 64, 64, generator=seeded(3)) - steps[0]

    v_c, v_u = velocity(positive), velocity(negative)
    guided = velocity(positive, negative_prompt_embeds=negative, guidance_scale=3.0)
    torch.testing.assert_close(guided, v_u + 3 * (v_c - v_u), atol=1e-4, rtol=1e-4)
    calls = []
    pipeline.transformer.register_forward_pre_hook(lambda *args: calls.append(1))
    velocity(positive, guidance_scale=1.0)
    assert len(calls) == 1


def test_one_image_is_the_same_alone_and_in_a_batch():
    pipeline, latents = tiny_pipeline(), torch.randn(3, 16, 2, 3)
    sigma = [0.0, 0.3, 0.6]
    together = pipeline(latents, sigma=sigma, generator=[seeded(i) for i in range(3)], output_type="pt").images
    for i in range(3):
        alone = pipeline(latents[i], sigma=sigma[i], generator=seeded(i), output_type="pt").images
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_seed_decides():
    pipeline, latents = tiny_pipeline(), torch.randn(1, 16, 2, 2)
    first, again, other = (pipeline(latents, generator=seeded(s), output_type="pt").images for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_adapter_runs_once():
    pipeline, calls = tiny_pipeline(), []
    pipeline.transformer.adapter.register_forward_hook(lambda *args: calls.append(1))
    pipeline(torch.randn(1, 16, 2, 2))
    assert len(calls) == 1


def test_output_types():
    pipeline, latents = tiny_pipeline(), torch.randn(2, 16, 2, 3)
    make = {kind: pipeline(latents, generator=seeded(0), output_type=kind).images for kind in ("pil", "np", "pt")}
    assert make["pil"][1].size == (96, 64) and make["np"].shape == (2, 64, 96, 3) and make["pt"].shape == (2, 3, 64, 96)
    assert make["pt"].min() >= 0 and make["pt"].max() <= 1
    for picture, values in zip(make["pil"], make["np"], strict=True):
        assert (np.array(picture) == (values * 255).round()).all()
    raw = pipeline(latents, generator=seeded(0), output_type="latent").images
    assert raw.dtype == torch.float32 and raw.abs().max() > 1  # not clamped
    torch.testing.assert_close((raw / 2 + 0.5).clamp(0, 1), make["pt"])


def test_callback_may_change_the_image():
    images = tiny_pipeline()(
        torch.randn(1, 16, 2, 2),
        output_type="pt",
        callback_on_step_end=lambda p, step, t, tensors: {"image": torch.zeros_like(tensors["image"])},
    ).images
    assert torch.equal(images, torch.full_like(images, 0.5))


def test_student_times():
    assert [student_times(n) for n in (1, 2, 3, 4)] == [
        [1.0],
        [0.999, 0.634],
        [0.999, 0.866, 0.342],
        [0.999, 0.866, 0.634, 0.342],
    ]
    counted = []
    pipeline = tiny_pipeline()
    pipeline(
        torch.randn(1, 16, 2, 2),
        sigmas=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
        callback_on_step_end=lambda p, i, t, tensors: counted.append(t.item()) or {},
    )
    assert counted == pytest.approx([900, 800, 700, 600, 500, 400])


def test_save_and_load(tmp_path):
    pipeline, latents = tiny_pipeline(), torch.randn(1, 16, 2, 2)
    pipeline.save_pretrained(tmp_path)
    loaded = PixelDecoderPipeline.from_pretrained(tmp_path)
    before, after = (p(latents, generator=seeded(0), output_type="pt").images for p in (pipeline, loaded))
    torch.testing.assert_close(before, after)  # weights from a file lie in memory otherwise, and are rounded otherwise
    assert loaded.encoder is not None and loaded.text_encoder is None


def test_prior_makes_images_from_text():
    prior = tiny_model(**(TINY | {"latent_channels": None}))
    pipeline = PixelDecoderPipeline(prior, teacher_scheduler(), default_num_inference_steps=2)
    embeds = torch.randn(1, 5, 20)
    assert pipeline(prompt_embeds=embeds, height=64, width=32).images[0].size == (32, 64)
    with pytest.raises(ValueError, match="multiples of 16, got 60 x None"):
        pipeline(prompt_embeds=embeds, height=60)
    with pytest.raises(ValueError, match="takes no latents"):
        pipeline(torch.randn(1, 16, 2, 2), prompt_embeds=embeds)


def test_to_dtype():
    pipeline, latents = tiny_pipeline(), torch.randn(1, 16, 2, 2)
    exact = pipeline(latents, generator=seeded(0), output_type="pt").images
    rounded = pipeline.to(torch.bfloat16)(latents, generator=seeded(0), output_type="pt").images
    assert pipeline.transformer.dtype == torch.bfloat16 and rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().mean() < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="model offloading needs an accelerator")
def test_model_cpu_offload():
    pipeline, latents = tiny_pipeline(), torch.randn(1, 16, 2, 2)
    exact = pipeline(latents, generator=seeded(0), output_type="pt").images
    pipeline.enable_model_cpu_offload()
    torch.testing.assert_close(
        pipeline(latents, generator=seeded(0), output_type="pt").images.cpu(), exact, atol=1e-3, rtol=1e-3
    )
    assert pipeline.transformer.device.type == "cpu"


@pytest.mark.parametrize("size", [(64, 48), (61, 45)])
def test_upscale(size):
    pipeline, image = tiny_pipeline(), Image.effect_noise(size, 50).convert("RGB")
    kwargs = dict(generator=seeded(0), output_type="pt")
    images = pipeline.upscale(image, **kwargs).images
    assert images.shape == (1, 3, 4 * size[1], 4 * size[0])
    assert pipeline.upscale(image).images[0].size == (4 * size[0], 4 * size[1])
    assert pipeline.upscale(image, output_type="np").images.shape == (1, 4 * size[1], 4 * size[0], 3)
    kwargs["generator"].manual_seed(0)
    (again,) = pipeline.upscale(image, return_dict=False, **kwargs)
    assert torch.equal(again, images)


def test_upscale_adds_real_noise_of_its_own_generator(monkeypatch):
    pipeline, image = tiny_pipeline(), Image.effect_noise((32, 32), 50).convert("RGB")
    seen, encode_latents = [], pipeline.transformer.encode_latents

    def spy(latents, *args, **kwargs):
        seen.append(latents)
        return encode_latents(latents, *args, **kwargs)

    monkeypatch.setattr(pipeline.transformer, "encode_latents", spy)
    pipeline.upscale(image, sigma=0.4, generator=seeded(0), noise_generator=seeded(7))
    clean = pipeline.encode_image(image)
    torch.testing.assert_close(seen[0], 0.6 * clean + 0.4 * torch.randn(clean.shape, generator=seeded(7)))


def test_upscale_tells_the_decoder_sigma():
    pipeline, image = tiny_pipeline(), Image.effect_noise((32, 32), 50).convert("RGB")
    told = []
    hook = lambda module, args, kwargs: told.append(kwargs["sigma"].tolist())  # noqa: E731
    pipeline.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    for sigma in (0.0, 0.4):
        pipeline.upscale(image, sigma=sigma, num_inference_steps=1)
    assert told == [[0.0], pytest.approx([0.4])]


def test_layouts_of_latents():
    """The same numbers packed as FLUX packs them, as an array, and one image's without a batch."""
    pipeline, latents = tiny_pipeline(), torch.randn(2, 16, 4, 6, generator=seeded(3))
    decode = partial(pipeline, num_inference_steps=1, output_type="pt")
    image = decode(latents, generator=seeded(0)).images
    packed = FluxPipeline._pack_latents(latents, 2, 16, 4, 6)
    assert packed.shape == (2, 6, 64)
    size = dict(height=32, width=48)
    assert torch.equal(decode(packed, generator=seeded(0), **size).images, image)
    assert torch.equal(decode(latents.flatten(2).transpose(1, 2), generator=seeded(0), **size).images, image)
    assert torch.equal(decode(latents.numpy(), generator=seeded(0)).images, image)
    alone = decode(latents[0], generator=seeded(0)).images
    assert torch.equal(alone, decode(latents[:1], generator=seeded(0)).images)
    whole = decode((10 * latents).int(), generator=seeded(0)).images
    assert torch.equal(whole, decode((10 * latents).int().float(), generator=seeded(0)).images)


NUMBERS = {"flux": (0.3611, 0.1159, 16), "sd3": (1.5305, 0.0609, 16), "sdxl": (0.13025, 0.0, 4)}


@pytest.mark.parametrize("space", NUMBERS)
def test_denormalized_latents(space):
    """As the autoencoder's `decode` takes them: z / scaling + shift of normalised z."""
    scaling, shift, channels = NUMBERS[space]
    pipeline = tiny_pipeline(**TINY_NANO | {"latent_channels": channels})
    pipeline.register_to_config(latent_space=space)
    latents = torch.randn(1, channels, 2, 2)
    decode = partial(pipeline, num_inference_steps=1, output_type="pt")
    image = decode(latents, generator=seeded(0)).images
    raw = decode(latents / scaling + shift, generator=seeded(0), denormalized=True).images
    torch.testing.assert_close(raw, image, atol=1e-4, rtol=1e-4)
    pipeline.register_to_config(latent_space="flux2")
    with pytest.raises(ValueError, match="flux2's numbers are in its autoencoder alone: give normalised ones"):
        decode(latents, denormalized=True)


def test_noise_can_be_given():
    pipeline = tiny_pipeline()
    noise = torch.randn(1, 3, 64, 64, generator=seeded(0))
    given = pipeline(LATENTS, noise=noise, num_inference_steps=1, output_type="pt").images
    assert torch.equal(given, pipeline(LATENTS, generator=seeded(0), num_inference_steps=1, output_type="pt").images)
    assert not torch.equal(given, pipeline(LATENTS, noise=-noise, num_inference_steps=1, output_type="pt").images)
    # Between a student's steps it is the generator's, which has drawn none yet.
    both = [
        pipeline(LATENTS, noise=noise, num_inference_steps=2, generator=seeded(s), output_type="pt").images
        for s in (1, 2)
    ]
    assert not torch.equal(*both) and torch.equal(noise, torch.randn(1, 3, 64, 64, generator=seeded(0)))


def test_a_prior_makes_as_many_images_as_noise_is_given():
    prior = tiny_model(**(TINY | {"latent_channels": None}))
    pipeline = PixelDecoderPipeline(prior, teacher_scheduler(), default_num_inference_steps=1)
    images = pipeline(
        prompt_embeds=torch.randn(1, 5, 20), noise=torch.randn(3, 3, 32, 32), height=32, width=32, output_type="pt"
    ).images
    assert len(images) == 3


def test_lora_strength_of_a_call():
    from peft import LoraConfig

    pipeline = tiny_pipeline()
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_qkv"], init_lora_weights=False))
    decode = partial(pipeline, LATENTS, num_inference_steps=1, output_type="pt")
    images = {scale: decode(generator=seeded(0), attention_kwargs={"scale": scale}).images for scale in (0.0, 0.5, 1.0)}
    assert torch.equal(images[1.0], decode(generator=seeded(0)).images) and not torch.equal(images[0.5], images[1.0])
    pipeline.transformer.delete_adapters("default")
    torch.testing.assert_close(images[0.0], decode(generator=seeded(0)).images)


LATENTS = torch.randn(1, 16, 2, 2)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.randn(1, 4, 2, 2),), {}, r"\(B, 16, h, w\), got \(1, 4, 2, 2\)"),
        ((torch.randn(1, 16, 0, 2),), {}, r"got \(1, 16, 0, 2\)"),
        ((torch.randn(5),), {}, r"got \(5,\)"),
        ((LATENTS * float("nan"),), {}, "64 of 64 values are NaN"),
        ((LATENTS / 0,), {}, "NaN or infinite"),
        ((), {}, "got none"),
        ((LATENTS,), {"sigma": 1.5}, r"sigma in \[0, 1\], got \[?1.5"),
        ((LATENTS,), {"sigma": float("nan")}, r"sigma in \[0, 1\]"),
        ((LATENTS,), {"sigma": [0.1, 0.2]}, "one for each of 1 images"),
        ((LATENTS,), {"num_inference_steps": 5}, "1 to 4 steps, got 5"),
        ((LATENTS,), {"num_inference_steps": 0}, "1 to 4 steps, got 0"),
        ((LATENTS,), {"num_inference_steps": "4"}, "a number of steps, at least 1, got '4'"),
        ((LATENTS,), {"sigmas": [0.2, 0.9]}, "falling"),
        ((LATENTS,), {"sigmas": [0.9, 0.9, 0.5]}, "3 falling sigmas"),
        ((LATENTS,), {"sigmas": [0.9, 0.0]}, "2 falling sigmas"),
        ((LATENTS,), {"sigmas": []}, "0 falling sigmas"),
        ((LATENTS,), {"sigmas": torch.tensor([0.2, 0.9])}, "2 falling sigmas"),
        ((LATENTS,), {"sigmas": [1.1, 0.9]}, "2 falling sigmas"),
        ((LATENTS,), {"sigmas": [float("nan")]}, "1 falling sigmas"),
        ((LATENTS,), {"sigma": "much"}, r"sigma in \[0, 1\], one or one for each image, got 'much'"),
        ((LATENTS,), {"guidance_scale": "much"}, "a guidance_scale such as 5, got 'much'"),
        ((LATENTS,), {"guidance_scale": float("nan")}, "a guidance_scale such as 5, got nan"),
        ((LATENTS,), {"output_type": "jpg"}, '"pil", "np", "pt" or "latent"'),
        ((LATENTS,), {"noise": torch.randn(1, 3, 64, 32)}, r"\(1, 3, 32, 32\), got \(1, 3, 64, 32\)|64, 64"),
        ((LATENTS,), {"noise": torch.full((1, 3, 64, 64), float("nan"))}, "finite values"),
        ((LATENTS,), {"noise": "white"}, "expected noise as a tensor.*got str"),
        (("a photo of a cat",), {}, r"as the first argument, got str: give the prompt as prompt=\.\.\."),
        ((["a cat", "a dog"],), {}, r"got list: give the prompt as prompt="),
        ((Image.new("RGB", (32, 32)),), {}, "got Image: give an image to `upscale`"),
        ((np.array(["a cat"]),), {}, "a tensor, as the first argument, got ndarray"),
        ((torch.randn(1, 4, 64),), {}, "packed ones need the height and width"),
        ((torch.randn(1, 4, 64),), {"height": 32}, "packed ones need the height and width"),
        ((torch.randn(1, 4, 64),), {"height": 32, "width": 48}, r"4 latent tokens do not make.*which has 2 x 3"),
        ((torch.randn(1, 4, 63),), {"height": 32, "width": 32}, "expected 16 channels, or 64 of 2 x 2 cells"),
        ((LATENTS,), {"denormalized": True}, "its latent space is not known"),
        ((LATENTS,), {"tile_size": "big"}, "tile_size is 'big': expected a whole number of pixels"),
        ((LATENTS,), {"tile_size": 64.0}, "tile_size is 64.0: expected a whole number"),
        ((LATENTS,), {"tile_overlap": "auto"}, "tile_overlap is 'auto': expected a whole number of pixels"),
        ((LATENTS,), {"chunk_size": "auto"}, "chunk_size is 'auto': expected a whole number of patches"),
        ((LATENTS,), {"generator": [seeded(0)] * 2}, "one for each of 1 images, got 2"),
        ((LATENTS,), {"callback_on_step_end_tensor_inputs": ["latents"]}, r"some of \['image', 'x0'\]"),
    ],
)
def test_bad_input(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(*args, **kwargs)


def test_sizes_that_patches_do_not_tile():
    """Two cells of 8 pixels to a patch side of 16: the odd one is repeated, and what it makes is cut off."""
    pipeline = PixelDecoderPipeline(tiny_model(**(TINY_NANO | {"scale": 1})), FlowMatchLCMScheduler(shift=1.0))
    latents = torch.randn(1, 16, 3, 4)
    image = pipeline(latents, generator=torch.Generator().manual_seed(0), output_type="pt").images
    padded = torch.cat([latents, latents[:, :, -1:]], dim=2)
    whole = pipeline(padded, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert image.shape == (1, 3, 24, 32) and torch.equal(image, whole[:, :, :24])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, r"expected prompt or prompt_embeds \(B, T, 20\), got none"),
        ({"prompt_embeds": torch.randn(1, 5, 7)}, r"\(1 or 1, T, 20\), got \(1, 5, 7\)"),
        ({"prompt_embeds": [[1.0]]}, r"\(1 or 1, T, 20\), got list"),
        ({"prompt": "a cat", "prompt_embeds": torch.randn(1, 5, 20)}, "got prompt and prompt_embeds: give one"),
        (
            {
                "prompt_embeds": torch.randn(1, 5, 20),
                "negative_prompt": "",
                "guidance_scale": 2.0,
                "negative_prompt_embeds": torch.randn(1, 5, 20),
            },
            "got negative_prompt and negative_prompt_embeds: give one",
        ),
        ({"prompt": []}, r"a list with one for each image, got \[\]"),
        ({"prompt": ["a", None]}, "a list with one for each image"),
    ],
)
def test_bad_text(kwargs, message):
    pipeline = PixelDecoderPipeline(tiny_model(**TINY), FlowMatchLCMScheduler(shift=1.0))
    with pytest.raises(ValueError, match=message):
        pipeline(LATENTS, **kwargs)


def test_unknown_name():
    with pytest.raises(ValueError, match=r'no decoder "nanoo": .*expected "nano".*PiD_res2k_sr4x_official_flux'):
        PixelDecoderPipeline.from_pretrained("nanoo")


def test_image_too_small_and_no_encoder():
    with pytest.raises(ValueError, match="at least 16 x 16 pixels, got 1 x 1"):
        tiny_pipeline().upscale(Image.new("RGB", (1, 1)))
    pipeline = PixelDecoderPipeline(tiny_model(**TINY_NANO), FlowMatchLCMScheduler(shift=1.0))
    with pytest.raises(ValueError, match="no encoder"):
        pipeline.upscale(Image.new("RGB", (32, 32)))


def test_checkpoint_file_becomes_a_pipeline(tmp_path):
    golden = Golden("v15_flux2")
    file = tmp_path / "PiD_v1pt5_res2kto4k_sr4x_official_flux2_undistilled.pth"
    torch.save({f"net.{name}": tensor for name, tensor in golden.state.items()}, file)
    pipeline = PixelDecoderPipeline.from_pretrained(file)
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    assert (pipeline.config.default_num_inference_steps, pipeline.config.default_guidance_scale) == (25, 5.0)
    assert pipeline.config.default_negative_prompt.startswith("low quality, worst quality, over-saturated, three legs,")
    file = file.rename(tmp_path / "PiD_v1pt5_res2kto4k_sr4x_official_flux2_distill_4step.pth")
    student = PixelDecoderPipeline.from_pretrained(str(file))
    assert isinstance(student.scheduler, FlowMatchLCMScheduler) and student.config.default_negative_prompt == ""
    torch.save({f"net.{name}": tensor.to(torch.float8_e4m3fn) for name, tensor in golden.state.items()}, file)
    assert PixelDecoderPipeline.from_pretrained(file).transformer.dtype == torch.bfloat16  # float8 computes nothing
    assert PixelDecoderPipeline.from_pretrained(file, dtype=torch.float32).transformer.dtype == torch.float32


@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 1), (0.0, 1), (None, 1), (1.5, 2)])
def test_guidance_of_one_and_less_is_none(guidance, passes):
    pipeline = PixelDecoderPipeline(tiny_model(**TINY), FlowMatchLCMScheduler(shift=1.0))
    calls = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    embeds = dict(prompt_embeds=torch.randn(1, 5, 20), negative_prompt_embeds=torch.randn(1, 5, 20))
    pipeline(LATENTS, guidance_scale=guidance, num_inference_steps=1, **embeds)
    assert len(calls) == passes


@pytest.mark.parametrize(("scheduler", "steps"), [(FlowMatchLCMScheduler(shift=1.0), 5), (teacher_scheduler(), 0)])
def test_check_steps(scheduler, steps):
    pipeline = PixelDecoderPipeline(tiny_model(**TINY_NANO), scheduler)
    pipeline.check_steps(4)
    with pytest.raises(ValueError, match=f"got {steps}"):
        pipeline.check_steps(steps)


def test_what_sampling_needs_is_in_the_presets():
    """Teachers and prior were guided away from a prompt; students are not guided."""
    for preset in PRESETS.values():
        assert (preset.negative_prompt == RELEASED_NEGATIVE_PROMPT) == (preset.guidance_scale > 1)
        assert (preset.negative_prompt == "") == preset.distilled


@pytest.mark.parametrize(("dtype", "advice"), [(torch.float16, "use bfloat16 or float32"), (torch.float32, "damaged")])
def test_an_image_that_is_not_finite_is_an_error(dtype, advice):
    pipeline = tiny_pipeline().to(dtype)
    pipeline.transformer.proj_out.bias.data[1] = torch.inf
    for output_type in "pil", "latent":
        with pytest.raises(ValueError, match=rf"^4096 of the image's 12288 values are NaN or infinite.*{advice}"):
            pipeline(torch.zeros(1, 16, 2, 2), num_inference_steps=1, output_type=output_type)


@pytest.mark.parametrize(
    "image", [[], np.zeros((32, 32, 3), "uint8"), "a.png", Path("a.png"), torch.zeros(1, 3, 32, 32)]
)
def test_only_a_picture_is_enlarged(image):
    with pytest.raises(ValueError, match=r"^expected a picture, as PIL's Image.open gives it, got \S+"):
        tiny_pipeline().upscale(image)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "tensor of floats (B, 3, H, W), got (1, 3, 32, 32) torch.uint8"),
        (torch.arange(3072.0).view(1, 3, 32, 32) / 12, "expected a picture in [-1, 1], got values from 0"),
        (torch.full((1, 3, 32, 32), torch.nan), "got values from nan to nan"),
        (torch.zeros(3, 32, 32), "got (3, 32, 32) torch.float32"),
        (np.zeros((1, 3, 32, 32)), "got ndarray"),
        (Path("a.png"), "got PosixPath"),
    ],
)
def test_only_a_picture_is_encoded(image, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_pipeline().encode_image(image)


@pytest.mark.parametrize("generator", [5, "0", [1], [None, 2], (torch.Generator(),), np.random.default_rng()])
def test_what_is_no_generator(generator):
    prior = tiny_pipeline(**TINY | dict(latent_channels=None, text_embed_dim=None))
    for pipeline, latents in (tiny_pipeline(), torch.zeros(1, 16, 2, 2)), (prior, None):
        with pytest.raises(ValueError, match=r"^expected a torch\.Generator, or a list with one for each image, got "):
            pipeline(latents, generator=generator, height=32, width=32)


def test_an_image_is_enlarged_in_tiles_by_its_encoder_too(monkeypatch):
    """A memory that the decoder is content with, but not its encoder, which sees the image in tiles."""
    pipeline, image = tiny_pipeline(), Image.effect_noise((600, 520), 50).convert("RGB")
    whole = pipeline.encode_image(image)
    shapes = []
    pipeline.encoder.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[-2:])))
    monkeypatch.setattr("pixeldecoder.plan.held_memory", lambda device: 10**9)
    budget = 10**9 + 96 * 2**20 + 24 * 600 * 520 + 5 * 8 * 4 * 320 * 320
    tiled = pipeline.encode_image(image, max_memory=budget)
    assert len(shapes) > 1 and max(map(max, shapes)) <= 320
    assert tiled.shape == whole.shape and (tiled - whole).abs().mean() < 0.02 * whole.abs().mean()
    with pytest.raises(ValueError, match=r"^to encode 600 x 520 px would take 1\.1\d GB with .* tiles, but 1\.00 GB"):
        pipeline.encode_image(image, max_memory="1GB")
