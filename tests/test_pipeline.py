"""The pipeline against the reference's samples, and what diffusers users do with it."""

import re

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from PIL import Image
from safetensors.torch import load_file

from conftest import GOLDEN, TINY, TINY_NANO, Golden, normal, relative, tiny_model, tiny_pipeline
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.pipeline import student_times, teacher_scheduler

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

    monkeypatch.setattr("pixeldecoder.pipeline.randn_tensor", named_noise)
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
    assert make["pil"][0].getpixel((5, 7)) == tuple((make["np"][0, 7, 5] * 255).round().astype(int))
    assert isinstance(pipeline(latents, return_dict=False), tuple)


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


def test_upscale_adds_real_noise_of_its_own_generator(monkeypatch):
    pipeline, image = tiny_pipeline(), Image.effect_noise((32, 32), 50).convert("RGB")
    seen, encode_latents = [], pipeline.transformer.encode_latents

    def spy(latents, *args):
        seen.append(latents)
        return encode_latents(latents, *args)

    monkeypatch.setattr(pipeline.transformer, "encode_latents", spy)
    pipeline.upscale(image, sigma=0.4, generator=seeded(0), noise_generator=seeded(7))
    clean = pipeline.encode_image(image)
    torch.testing.assert_close(seen[0], 0.6 * clean + 0.4 * torch.randn(clean.shape, generator=seeded(7)))


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
        ((LATENTS,), {"sigmas": [0.2, 0.9]}, "falling"),
        ((LATENTS,), {"output_type": "latent"}, '"pil", "np" or "pt"'),
        ((LATENTS,), {"generator": [seeded(0)] * 2}, "one for each of 1 images, got 2"),
        ((LATENTS,), {"callback_on_step_end_tensor_inputs": ["latents"]}, r"some of \['image'\]"),
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
    ],
)
def test_bad_text(kwargs, message):
    pipeline = PixelDecoderPipeline(tiny_model(**TINY), FlowMatchLCMScheduler(shift=1.0))
    with pytest.raises(ValueError, match=message):
        pipeline(LATENTS, **kwargs)


def test_unknown_name():
    with pytest.raises(ValueError, match=r'no decoder "nanoo": expected "nano".*PiD_res2k_sr4x_official_flux'):
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
    file = file.rename(tmp_path / "PiD_v1pt5_res2kto4k_sr4x_official_flux2_distill_4step.pth")
    assert isinstance(PixelDecoderPipeline.from_pretrained(str(file)).scheduler, FlowMatchLCMScheduler)
