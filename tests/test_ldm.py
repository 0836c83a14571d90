"""Real pipelines stopped after every step, against what they do by themselves; and images decoded from them."""

import functools
import math
import re
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    Flux2Pipeline,
    FluxKontextPipeline,
    FluxPipeline,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    QwenImageEditPipeline,
    QwenImagePipeline,
    StableDiffusionXLImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging
from PIL import Image

import families
import more_families
from conftest import Golden
from families import FAMILIES, SIZE, build, kl, save_gemma, sdxl, z_image
from more_families import OTHERS, build_other
from pixeldecoder import PixelDecoderPipeline
from pixeldecoder.autoencoders import decode, encode
from pixeldecoder.latents import SPACES, find_latent_space, normalise, unpack
from pixeldecoder.ldm import (
    _REFUSED,
    _VIDEO,
    decoder_seed,
    generate,
    parse_stop,
    partly_denoise,
    pipeline_latent_space,
    signal_and_noise,
)
from pixeldecoder.loading import _print_license
from pixeldecoder.presets import RELEASED_NEGATIVE_PROMPT
from pixeldecoder.text import PromptEncoder

STEPS = 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arguments(kwargs: dict) -> dict:
    return kwargs if "prompt_embeds" in kwargs else kwargs | {"prompt": "a red cat"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A pipeline, and what its own callback sees after every step of a whole run, with its output."""
    pipe, kwargs = build(request.param)
    kwargs = arguments(kwargs) | {"num_inference_steps": STEPS}
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    output = pipe(**kwargs, generator=seeded(), output_type="latent", callback_on_step_end=look)[0]
    sigmas = pipe.scheduler.sigmas.clone()
    return SimpleNamespace(
        name=request.param, space=SPACES[FAMILIES[request.param][1]], pipe=pipe, kwargs=kwargs, seen=seen,
        output=output, sigmas=sigmas,
    )  # fmt: skip


def truth(family, step: int) -> tuple[torch.Tensor, float]:
    """Normalised latents after a step and their sigma, by the pipeline's own unpacking and the scheduler's sigmas."""
    latents, sigma = family.seen[step - 1], family.sigmas[step].item()
    if family.name == "FLUX.1":
        latents = FluxPipeline._unpack_latents(latents, SIZE["height"], SIZE["width"], 8)
    elif family.name == "Qwen-Image":
        latents = QwenImagePipeline._unpack_latents(latents, SIZE["height"], SIZE["width"], 8)[:, :, 0]
    elif family.name.startswith("FLUX.2"):
        ids = Flux2Pipeline._prepare_latent_ids(torch.zeros(1, 128, 2, 4))
        latents = Flux2Pipeline._unpack_latents_with_ids(latents, ids)
    elif family.name == "SDXL":
        latents, sigma = latents / math.sqrt(sigma**2 + 1), sigma / math.sqrt(sigma**2 + 1)
    return latents, sigma


def denormalised(family, latents: torch.Tensor) -> torch.Tensor:
    """What the autoencoder's `decode` takes."""
    vae = family.pipe.vae
    if family.name == "Qwen-Image":
        mean, std = (torch.tensor(x)[:, None, None] for x in (vae.config.latents_mean, vae.config.latents_std))
        return latents * std + mean
    if family.name.startswith("FLUX.2"):
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        return Flux2Pipeline._unpatchify_latents(latents * std[:, None, None] + vae.bn.running_mean[:, None, None])
    scale, shift = {"SD3": (1.5305, 0.0609), "SDXL": (0.13025, 0.0)}.get(family.name, (0.3611, 0.1159))
    return latents / scale + shift


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_stops(family, step):
    denoiser = family.pipe.unet if family.name == "SDXL" else family.pipe.transformer
    calls = []
    hook = denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        taken = partly_denoise(family.pipe, step, **family.kwargs, generator=seeded())
    finally:
        hook.remove()
    latents, sigma = truth(family, step)
    assert (taken.step, taken.steps, taken.space) == (step, STEPS, family.space)
    assert len(calls) == step  # guidance goes in one batch
    torch.testing.assert_close(taken.latents, latents)
    assert taken.sigma == pytest.approx(sigma, abs=1e-6)
    assert taken.sigma == 0 if step == STEPS else 0 < taken.sigma < 1
    # The mistake of several ports would not pass.
    mistaken = denormalised(family, latents)
    assert mistaken.shape != latents.shape or (mistaken - latents).abs().max() > 0.05


def test_finished_latents_are_the_images(family):
    """The pipeline's image is its autoencoder's decoding of our latents."""
    taken = partly_denoise(family.pipe, 2, finish=True, **family.kwargs, generator=seeded(), output_type="pt")
    assert taken.step == 2
    end = partly_denoise(family.pipe, None, **family.kwargs, generator=seeded())
    raw = denormalised(family, end.latents)
    vae = family.pipe.vae
    with torch.no_grad():
        image = vae.decode(raw[:, :, None])[0][:, :, 0] if family.name == "Qwen-Image" else vae.decode(raw)[0]
    torch.testing.assert_close((image / 2 + 0.5).clamp(0, 1), taken.images, rtol=1e-3, atol=1e-3)


def test_output_of_the_pipeline(family):
    """`output_type="latent"`; FLUX.2-klein's is raw."""
    latents = unpack(family.output, family.space, **SIZE, autoencoder=family.pipe.vae)
    torch.testing.assert_close(latents, truth(family, STEPS)[0], rtol=1e-4, atol=1e-4)
    assert (family.output.shape[1] == 32) == (family.name == "FLUX.2-klein")


def test_normalising_is_the_way_back_of_denormalising(family):
    """By published numbers, where a family has them; FLUX.2's are in its autoencoder's weights."""
    latents, _ = truth(family, STEPS)
    if family.space.name == "flux2":
        with pytest.raises(ValueError, match=r"flux2's numbers are in its autoencoder alone: give normalised ones"):
            normalise(latents, family.space)
    else:
        torch.testing.assert_close(
            normalise(denormalised(family, latents), family.space), latents, rtol=1e-4, atol=1e-4
        )


def test_encoding_is_the_pipelines_own(family):
    vae = family.pipe.vae
    image = torch.rand(1, 3, 32, 64, generator=seeded()) * 2 - 1
    own = SimpleNamespace(
        vae=vae, latent_channels=16, _patchify_latents=Flux2Pipeline._patchify_latents, dtype=torch.float32
    )
    with torch.no_grad():
        if family.name in ("FLUX.1", "Z-Image"):
            expected = FluxKontextPipeline._encode_vae_image(own, image, None)
        elif family.name == "Qwen-Image":
            expected = QwenImageEditPipeline._encode_vae_image(own, image[:, :, None], None)[:, :, 0]
        elif family.name.startswith("FLUX.2"):
            expected = Flux2Pipeline._encode_vae_image(own, image, None)
        else:
            mean = vae.encode(image).latent_dist.mean
            expected = (mean - 0.0609) * 1.5305 if family.name == "SD3" else mean * 0.13025
    found = encode(vae, image)
    torch.testing.assert_close(found, expected)
    assert found.shape[1] == family.space.channels


@pytest.mark.parametrize(
    ("stop", "steps", "expected"),
    [("auto", 4, 4), ("auto", 28, 24), (0.5, 8, 4), ("0.5", 8, 4), ("3", 4, 3), (None, 4, 4), ("sigma=0.7", 8, 4)],
)
def test_stop_kinds(stop, steps, expected):
    pipe, kwargs = build("FLUX.1")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()  # sigmas 1, 1 - 1/n, ... to 1/n, 0
    taken = partly_denoise(pipe, stop, **arguments(kwargs), num_inference_steps=steps)
    if stop == "sigma=0.7":
        sigmas = pipe.scheduler.sigmas.tolist()
        expected = next(k for k, sigma in enumerate(sigmas) if sigma <= 0.7)
        assert sigmas[expected] <= 0.7 < sigmas[expected - 1]
    assert (taken.step, taken.steps) == (expected, steps)


BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(**BETAS),
        EulerAncestralDiscreteScheduler(**BETAS),
        HeunDiscreteScheduler(**BETAS),
        DPMSolverMultistepScheduler(**BETAS),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        UniPCMultistepScheduler(**BETAS),
        DDIMScheduler(**BETAS),
        DDPMScheduler(**BETAS),
        LCMScheduler(**BETAS),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_frames_of_schedulers(scheduler):
    """Latents that a scheduler itself noised."""
    scheduler.set_timesteps(8)
    z, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    for index in (1, 4, 7):
        signal, s = signal_and_noise(scheduler, index)
        expected = scheduler.add_noise(z, noise, scheduler.timesteps[index : index + 1])
        torch.testing.assert_close(signal * z + s * noise, expected, rtol=1e-3, atol=1e-3)
    assert signal_and_noise(scheduler, len(scheduler.timesteps)) == pytest.approx((1, 0), abs=0.05)


SECOND_ORDER = [
    HeunDiscreteScheduler(**BETAS),
    HeunDiscreteScheduler(**BETAS, use_karras_sigmas=True),
    KDPM2DiscreteScheduler(**BETAS),
    FlowMatchHeunDiscreteScheduler(shift=3.0),
]
"""Of two calls to a step."""


@pytest.mark.parametrize("scheduler", SECOND_ORDER, ids=lambda scheduler: type(scheduler).__name__)
def test_noise_after_half_a_step(scheduler):
    """Between the two calls, too: told the true noise, or velocity, a solver stays on the straight line."""
    flow = isinstance(scheduler, FlowMatchHeunDiscreteScheduler)
    scheduler.set_timesteps(10)
    z, noise = torch.randn(1, 4, 2, 2, generator=seeded(1)), torch.randn(1, 4, 2, 2, generator=seeded(2))
    x, levels = noise if flow else z + noise * scheduler.sigmas[0], []
    for index, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(noise - z if flow else noise, timestep, x)[0]
        signal, s = signal_and_noise(scheduler, index + 1)
        torch.testing.assert_close(signal * z + s * noise, x, rtol=1e-4, atol=1e-4)
        levels.append(s)
    assert len(levels) == 19 and levels[-1] == 0 and levels[0] > levels[3] > levels[5] > 0


@pytest.mark.parametrize("scheduler", SECOND_ORDER[:3], ids=lambda scheduler: type(scheduler).__name__)
def test_a_step_is_what_people_asked_for(scheduler):
    """And so as noisy as after the same step of a scheduler of one call to a step."""
    pipe = sdxl(scheduler)
    pipe.set_progress_bar_config(disable=True)
    kwargs = dict(prompt="a cat", num_inference_steps=6, **SIZE)
    karras = dict(use_karras_sigmas=True) if scheduler.config.use_karras_sigmas else {}
    euler = EulerDiscreteScheduler(**BETAS, timestep_spacing=scheduler.config.timestep_spacing, **karras)
    euler.set_timesteps(6)
    for stop in 3, 0.5, 5, None:
        taken = partly_denoise(pipe, stop, **kwargs, generator=seeded())
        step = {0.5: 3, None: 6}.get(stop, stop)
        sigma = euler.sigmas[step].item()
        assert (taken.step, taken.steps) == (step, 6)
        assert taken.sigma == pytest.approx(sigma / math.hypot(1, sigma), rel=1e-3)
    own = pipe(**kwargs, generator=seeded(), output_type="latent")[0]
    torch.testing.assert_close(taken.latents, own, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="makes only 6 steps"):
        partly_denoise(pipe, 7, **kwargs)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler(**BETAS), HeunDiscreteScheduler(**BETAS)])
def test_a_run_may_end_early(scheduler):
    """What SDXL leaves to its refiner is decoded as it is."""
    pipe = sdxl(scheduler)
    pipe.set_progress_bar_config(disable=True)
    kwargs = dict(prompt="a cat", num_inference_steps=8, denoising_end=0.7, **SIZE)
    own = pipe(**kwargs, generator=seeded(), output_type="latent")[0]
    for stop in None, "auto", 1.0:
        taken = partly_denoise(pipe, stop, **kwargs, generator=seeded())
        assert 4 < taken.step == taken.steps < 8 and 0.2 < taken.sigma < 1
        torch.testing.assert_close(taken.latents, own * math.sqrt(1 - taken.sigma**2), rtol=1e-3, atol=1e-3)
    assert partly_denoise(pipe, 2, **kwargs).step == 2
    with pytest.raises(ValueError, match=rf"makes only {taken.steps} steps"):
        partly_denoise(pipe, 7, **kwargs)


def test_other_schedulers_end_in_the_same_frame():
    for scheduler in (DPMSolverMultistepScheduler(**BETAS), DDIMScheduler(**BETAS, clip_sample=False)):
        torch.manual_seed(0)
        pipe = sdxl(scheduler)
        pipe.set_progress_bar_config(disable=True)
        kwargs = dict(prompt="a cat", num_inference_steps=STEPS, **SIZE)
        taken = partly_denoise(pipe, STEPS, **kwargs, generator=seeded())
        own = pipe(**kwargs, generator=seeded(), output_type="latent")[0]
        torch.testing.assert_close(taken.latents, own, rtol=1e-3, atol=1e-3)
        assert partly_denoise(pipe, 2, **kwargs, generator=seeded()).sigma > 0.3


def test_image_to_image_starts_later():
    pipe = sdxl()
    pipe = StableDiffusionXLImg2ImgPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    kwargs = dict(prompt="a cat", image=Image.new("RGB", (64, 32)), strength=0.5, num_inference_steps=8)
    taken = partly_denoise(pipe, 3, **kwargs, height=32, width=64)
    assert (taken.step, taken.steps) == (3, 4)
    sigma = pipe.scheduler.sigmas[7].item()
    assert taken.sigma == pytest.approx(sigma / math.sqrt(1 + sigma**2))
    with pytest.raises(ValueError, match="makes only 4 steps"):
        partly_denoise(pipe, 5, **kwargs)


CHECKPOINTS = {
    "FLUX.1": ("v15_flux", "PiD_v1pt5_res2kto4k_sr4x_official_flux_distill_4step"),
    "FLUX.2": ("v15_flux2", "PiD_v1pt5_res2kto4k_sr4x_official_flux2_distill_4step"),
    "FLUX.2-klein": ("v1_flux2", "PiD_res2k_sr4x_official_flux2_distill_4step"),
    "SD3": ("v1_flux_sd3", "PiD_res2k_sr4x_official_sd3_distill_4step"),
    "SDXL": ("v1_sdxl", "PiD_res2kto4k_sr4x_official_sdxl_distill_4step"),
    "Z-Image": ("v1_flux_sd3", "PiD_res2k_sr4x_official_flux_distill_4step"),
    "Qwen-Image": ("v15_flux", "PiD_v1pt5_res2kto4k_sr4x_official_qwenimage_distill_4step"),
}


def checkpoint(folder, case: str, name: str):
    """A tiny network by the golden rule, as a released file."""
    path = folder / name / "model_ema_bf16.pth"
    path.parent.mkdir()
    torch.save({f"net.{key}": value for key, value in Golden(case).state.items()}, path)
    return path


def embeds(decoder: PixelDecoderPipeline, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 6, decoder.transformer.config.text_embed_dim, generator=seeded(5))


@pytest.mark.parametrize("name", FAMILIES)
def test_generate(name, tmp_path):
    """A released file of each family, tiny: loaded from the disk, fed by its pipeline, stopped after 2 of 4 steps."""
    decoder = PixelDecoderPipeline.from_pretrained(checkpoint(tmp_path, *CHECKPOINTS[name]))
    decoder.set_progress_bar_config(disable=True)
    pipe, kwargs = build(name)
    assert decoder.config.latent_space == pipeline_latent_space(pipe).name
    text = embeds(decoder)
    result = generate(
        pipe, decoder, "a red cat", stop_at=2, seed=7, num_inference_steps=STEPS,
        decoder_kwargs={"prompt_embeds": text}, **kwargs,
    )  # fmt: skip
    assert [image.size for image in result.images] == [(256, 128)]
    taken = partly_denoise(pipe, 2, **arguments(kwargs), num_inference_steps=STEPS, generator=[seeded(7)])
    again = decoder(taken.latents, sigma=taken.sigma, prompt_embeds=text, generator=seeded(7 + 2**31)).images[0]
    assert list(again.getdata()) == list(result.images[0].getdata())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_generate_encodes_the_prompt_and_offloads(device, tmp_path):
    """The decoder's text encoder is loaded, used and freed; everything but what runs is off the device."""
    decoder = PixelDecoderPipeline.from_pretrained(checkpoint(tmp_path, *CHECKPOINTS["FLUX.1"])).to(device)
    decoder.set_progress_bar_config(disable=True)
    save_gemma(tmp_path / "gemma")
    decoder.prompt_encoder = PromptEncoder(str(tmp_path / "gemma"))
    pipe, kwargs = build("FLUX.1")
    kwargs |= dict(stop_at=1, num_inference_steps=2, decoder_kwargs={"guidance_scale": 2.0, "negative_prompt": "dog"})
    kept = generate(pipe.to(device), decoder, ["a cat", "red"], **kwargs)
    assert decoder.prompt_encoder._parts is not None
    offloaded = generate(pipe.to("cpu"), decoder, ["a cat", "red"], offload=True, **kwargs)
    assert decoder.prompt_encoder._parts is None
    assert {p.device.type for model in (pipe.transformer, decoder.transformer) for p in model.parameters()} == {"cpu"}
    for one, other in zip(kept.images, offloaded.images, strict=True):
        difference = torch.tensor(list(one.getdata())) - torch.tensor(list(other.getdata()))
        assert difference.abs().max() <= (0 if device == "cpu" else 8)


def test_generate_several(tmp_path):
    """Prompts x images with a seed each; the second alone is the same; compared with the pipeline's own images."""
    decoder = PixelDecoderPipeline.from_pretrained("nano")
    decoder.set_progress_bar_config(disable=True)
    pipe = z_image()
    pipe.set_progress_bar_config(disable=True)
    kwargs = dict(stop_at=1, num_inference_steps=2, negative_prompt="dog", decoder_kwargs={"num_inference_steps": 1})
    both = generate(pipe, decoder, "a cat", seed=3, num_images_per_prompt=2, compare=True, **kwargs, **SIZE)
    assert [image.size for image in both.images] == [(256, 128)] * 2
    assert [image.size for image in both.taken.images] == [(64, 32)] * 2
    alone = generate(pipe, decoder, "a cat", seed=4, **kwargs, **SIZE)
    assert alone.taken.images is None
    difference = torch.tensor(list(alone.images[0].getdata())) - torch.tensor(list(both.images[1].getdata()))
    assert difference.abs().max() <= 2
    arrays = dict(num_inference_steps=1, output_type="np")
    (array,) = generate(pipe, decoder, "a cat", seed=4, **kwargs | {"decoder_kwargs": arrays}, **SIZE).images
    assert abs(array * 255 - np.asarray(alone.images[0])).max() <= 0.51
    numpys = generate(pipe, decoder, "a cat", seed=np.int64(4), **kwargs, **SIZE)
    assert list(numpys.images[0].getdata()) == list(alone.images[0].getdata())
    for seed in [1, 2, 3], 1.5, "12", ["a", "b"], np.zeros(2):
        with pytest.raises(ValueError, match="expected one seed, or one for each of 2 images, whole numbers, got "):
            generate(pipe, decoder, ["a", "b"], seed=seed, **kwargs)
    for name, value in dict(sigma=0.1, latents=None, steps=2).items():
        with pytest.raises(ValueError, match=f"^decoder_kwargs: {name}: expected some of .*num_inference_steps"):
            generate(pipe, decoder, "a", **kwargs | {"decoder_kwargs": {name: value}})


def test_noise_of_the_decoder_is_not_the_latent_models():
    """For one seed, and for the seeds of images that follow; the same for the same seed."""
    decoder, drawn = PixelDecoderPipeline.from_pretrained("nano"), []
    decoder.set_progress_bar_config(disable=True)
    pipe = z_image()
    pipe.set_progress_bar_config(disable=True)

    def look(decoder, step, timestep, tensors):
        drawn.append(tensors["image"])

    kwargs = dict(stop_at=1, num_inference_steps=2, num_images_per_prompt=2, **SIZE)
    settings = {"callback_on_step_end": look, "sigmas": [1.0], "output_type": "latent"}
    for _ in range(2):
        generate(pipe, decoder, "a cat", seed=3, decoder_kwargs=settings, **kwargs)
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
    count = 3 * 128 * 256
    for seed in (3, 4):
        mine = torch.randn(count, generator=seeded(decoder_seed(seed)))
        for other in (3, 4, 5):
            assert (mine * torch.randn(count, generator=seeded(other))).mean().abs() < 5 / count**0.5


class Repeated:
    """What a decoder is called with, for each of several images."""

    def __init__(self, decoder):
        self.decoder, self.calls = decoder, []

    def __getattr__(self, name):
        return getattr(self.decoder, name)

    def __call__(self, latents, **kwargs):
        self.calls.append(kwargs)
        return ([Image.new("RGB", (8, 8))],)


def test_arguments_for_each_image(tmp_path):
    """Those that an image may have of its own are shared out, everything else goes to each as it is."""
    decoder = Repeated(PixelDecoderPipeline.from_pretrained(checkpoint(tmp_path, *CHECKPOINTS["FLUX.1"])))
    pipe, kwargs = build("FLUX.1")
    kwargs |= dict(stop_at=1, num_inference_steps=2, prompt=["a", "b"], pipe=pipe, decoder=decoder)
    noise, text = torch.randn(2, 3, 128, 256), embeds(decoder, 2)
    given = {"sigmas": [0.9, 0.5], "noise": noise, "negative_prompt": ["c", "d"], "prompt_embeds": text[:1]}
    result = generate(decoder_kwargs=given | {"callback_on_step_end_tensor_inputs": ["image", "image"]}, **kwargs)
    assert len(result.images) == 2 and len(decoder.calls) == 2
    for i, call in enumerate(decoder.calls):
        assert call["sigmas"] == [0.9, 0.5] and call["callback_on_step_end_tensor_inputs"] == ["image", "image"]
        assert torch.equal(call["noise"], noise[i : i + 1]) and torch.equal(call["prompt_embeds"], text[:1])
        assert call["negative_prompt"] == "cd"[i] and "prompt" not in call
        assert call["generator"].initial_seed() == decoder_seed(i)
    decoder.calls.clear()
    generate(decoder_kwargs={"negative_prompt": ("c", "d"), "prompt_embeds": None}, **kwargs)
    assert [(call["prompt"], call["negative_prompt"]) for call in decoder.calls] == [("a", "c"), ("b", "d")]
    with pytest.raises(
        ValueError, match="decoder_kwargs: prompt_embeds: expected one, or one for each of 2 images, got 3"
    ):
        generate(decoder_kwargs={"prompt_embeds": embeds(decoder, 3)}, **kwargs)
    assert len(decoder.calls) == 2


def test_decoders_output_may_be_a_tuple_of_tensors():
    decoder = PixelDecoderPipeline.from_pretrained("nano")
    decoder.set_progress_bar_config(disable=True)
    pipe = z_image()
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 1, "output_type": "pt", "return_dict": False}
    result = generate(pipe, decoder, ["a", "b"], stop_at=1, num_inference_steps=2, decoder_kwargs=settings, **SIZE)
    assert [image.shape for image in result.images] == [(3, 128, 256)] * 2


def test_a_pipeline_that_catches_exceptions_is_stopped():
    pipe, kwargs = build("FLUX.1")
    own = []

    class Careful(FluxPipeline):
        def __call__(self, **given):
            try:
                return super().__call__(**given)
            except Exception as error:
                own.append(error)
                return [Image.new("RGB", (8, 8))], None

    careful_pipe = Careful(**pipe.components)
    careful_pipe.set_progress_bar_config(disable=True)
    taken = partly_denoise(careful_pipe, 1, **arguments(kwargs), num_inference_steps=2)
    assert taken.step == 1 and taken.images is None and not own


@pytest.mark.parametrize("guidance", [None, 1.0, 3.0])
def test_offloading_encodes_the_decoders_own_negative_prompt(tmp_path, guidance):
    """An undistilled decoder is guided by default, away from what it was made with."""
    name = "PiD_v1pt5_res2kto4k_sr4x_official_flux_undistilled"
    decoder = PixelDecoderPipeline.from_pretrained(checkpoint(tmp_path, "v15_flux", name))
    save_gemma(tmp_path / "gemma")
    decoder.prompt_encoder = PromptEncoder(str(tmp_path / "gemma"))
    decoder = Repeated(decoder)
    pipe, kwargs = build("FLUX.1")
    settings = {} if guidance is None else {"guidance_scale": guidance}
    generate(pipe, decoder, "a cat", offload=True, stop_at=1, num_inference_steps=2, decoder_kwargs=settings, **kwargs)
    (call,) = decoder.calls
    known = PromptEncoder(str(tmp_path / "gemma"))
    torch.testing.assert_close(call["prompt_embeds"], known(["a cat"]))
    assert ("negative_prompt_embeds" in call) == (guidance != 1.0)
    if guidance != 1.0:
        torch.testing.assert_close(call["negative_prompt_embeds"], known([RELEASED_NEGATIVE_PROMPT]))
        assert call["negative_prompt_embeds"].shape == (1, 300, 20)


def test_the_documented_lines_run(monkeypatch):
    """docs/latent-spaces.md, with tiny models in place of the Hub's."""
    text = (Path(__file__).parents[1] / "docs" / "latent-spaces.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    pipe, decoder, loaded = z_image(), PixelDecoderPipeline.from_pretrained("nano"), []
    for part in (pipe, decoder):
        part.set_progress_bar_config(disable=True)
        monkeypatch.setattr(part, "to", lambda device, part=part: part, raising=False)
    call = functools.partial(pipe.__call__, **SIZE)
    monkeypatch.setattr(type(pipe), "__call__", lambda self, **kwargs: call(**kwargs))

    def load(made, name, **kwargs):
        assert not {"torch_dtype"} & set(kwargs)
        loaded.append(name)
        return made

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", functools.partial(load, pipe))
    monkeypatch.setattr(PixelDecoderPipeline, "from_pretrained", functools.partial(load, decoder))
    saved = []
    monkeypatch.setattr(Image.Image, "save", lambda image, path: saved.append((path, image.size)))
    exec(block, {})
    assert len(loaded) == 2 and saved == [("image.png", (256, 128))]


def test_lora_and_other_arguments_pass(tmp_path):
    pipe, kwargs = build("FLUX.1")
    kwargs = arguments(kwargs) | {"num_inference_steps": 2}
    plain, guided = (partly_denoise(pipe, 1, **kwargs, generator=seeded(), guidance_scale=g) for g in (3.5, 1.0))
    assert not torch.equal(plain.latents, guided.latents)
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with_lora = partly_denoise(pipe, 1, **kwargs, generator=seeded(), guidance_scale=3.5)
    assert not torch.equal(plain.latents, with_lora.latents)


def test_the_scheduler_is_left_as_it_was():
    pipe, kwargs = build("FLUX.1")
    partly_denoise(pipe, 1, **arguments(kwargs), num_inference_steps=2)
    with pytest.raises(RuntimeError):  # the pipeline's own error comes through
        partly_denoise(pipe, 1, **arguments(kwargs) | {"height": -1}, num_inference_steps=2)
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("stop", [0, -1, "0", 1.5, 0.0, "sigma=1.5", "sigma=", "soon", "sigma=1", float("nan")])
def test_bad_stops(stop):
    with pytest.raises(ValueError, match="expected a step"):
        parse_stop(stop)


def test_stop_outside_the_run():
    pipe, kwargs = build("FLUX.1")
    with pytest.raises(ValueError, match=r"stop_at=5: the latent model makes only 4 steps: give 1 to 4"):
        partly_denoise(pipe, 5, **arguments(kwargs), num_inference_steps=4)


def test_decoder_of_another_family(tmp_path):
    pipe, _ = build("SD3")
    nano = PixelDecoderPipeline.from_pretrained("nano")
    with pytest.raises(ValueError, match=r"the decoder decodes flux, but the latents are of the sd3 space.*such as"):
        generate(pipe, nano, "a cat")
    pipe, _ = build("SDXL")
    unknown = PixelDecoderPipeline(nano.transformer, nano.scheduler)
    with pytest.raises(ValueError, match=r"decodes 16 channels at 1/8 size, but the latents are of the sdxl space"):
        generate(pipe, unknown, "a cat")
    prior = PixelDecoderPipeline.from_pretrained(prior_file(tmp_path))
    with pytest.raises(ValueError, match="text-to-image prior"):
        generate(pipe, prior, "a cat")


def prior_file(folder):
    golden = Golden("v15_flux")
    path = folder / "PixelDiT_finetune_2kto4k" / "model_ema_bf16.pth"
    path.parent.mkdir()
    adapters = ("lq_proj.", "pit_lq_gate.")
    torch.save({f"net.{k}": v for k, v in golden.state.items() if not k.startswith(adapters)}, path)
    return path


def test_released_prior_and_teacher(tmp_path):
    """Text to image without latents; an undistilled teacher, sampled by DPM-Solver++ with guidance."""
    prior = PixelDecoderPipeline.from_pretrained(prior_file(tmp_path))
    prior.set_progress_bar_config(disable=True)
    assert prior.config.default_num_inference_steps == 50 and prior.config.default_guidance_scale == 2.75
    text = dict(prompt_embeds=embeds(prior), negative_prompt_embeds=embeds(prior) * 0)
    image = prior(height=32, width=64, num_inference_steps=3, **text).images[0]
    assert image.size == (64, 32)
    name = "PiD_v1pt5_res2kto4k_sr4x_official_flux_undistilled"
    teacher = PixelDecoderPipeline.from_pretrained(checkpoint(tmp_path, "v15_flux", name))
    assert (teacher.config.default_num_inference_steps, teacher.config.default_guidance_scale) == (25, 5.0)
    pipe, kwargs = build("FLUX.1")
    result = generate(
        pipe, teacher, "a cat", num_inference_steps=2, decoder_kwargs=text | {"num_inference_steps": 3}, **kwargs
    )
    assert result.images[0].size == (256, 128) and isinstance(teacher.scheduler, DPMSolverMultistepScheduler)


def test_the_licence_is_printed_once(tmp_path, caplog):
    """When the file is loaded, and when what was made of it is."""
    path = checkpoint(tmp_path, *CHECKPOINTS["SD3"])
    _print_license.cache_clear()
    logging.enable_propagation()
    try:
        for _ in range(2):
            decoder = PixelDecoderPipeline.from_pretrained(path)
        decoder.save_pretrained(tmp_path / "folder")
        assert caplog.text.count("NVIDIA non-commercial licence") == 1
        for _ in range(2):
            loaded = PixelDecoderPipeline.from_pretrained(tmp_path / "folder")
        assert caplog.text.count("NVIDIA non-commercial licence") == 2
    finally:
        logging.disable_propagation()
    assert loaded.config.latent_space == "sd3"


def test_unknown_autoencoders():
    pipe, kwargs = build("FLUX.1")
    pipe.vae = kl(4, 0.18215, None)
    with pytest.raises(ValueError, match=r"AutoencoderKL \(latent_channels 4, scaling_factor 0.18215\).*latent_space="):
        partly_denoise(pipe, 1, **arguments(kwargs))
    with pytest.raises(ValueError, match='no latent space "fluxx"'):
        find_latent_space(None, "fluxx")
    assert find_latent_space(pipe.vae, "sdxl") is SPACES["sdxl"]


@pytest.mark.parametrize(
    ("shape", "space", "message"),
    [
        ((1, 16, 5, 4, 8), "qwenimage", "5 frames of a video"),
        ((1, 9, 64), "flux", "9 latent tokens do not make an image of 32 x 64 pixels, which has 2 x 4"),
        ((1, 4, 4, 8), "flux", "not of the flux space: expected 16 channels"),
        ((1, 8, 32), "flux", "expected 16 channels"),
        ((1, 32, 4, 8), "flux2", "raw ones: give its autoencoder"),
    ],
)
def test_bad_latents(shape, space, message):
    with pytest.raises(ValueError, match=message):
        unpack(torch.zeros(shape), SPACES[space], **SIZE)
    with pytest.raises(ValueError, match="give the height and width"):
        unpack(torch.zeros(1, 8, 64), SPACES["flux"])


def test_layouts_of_video_autoencoders():
    z = torch.randn(1, 16, 4, 8)
    for latents in (z[:, :, None], z[:, :, None].permute(0, 2, 3, 4, 1)):
        assert torch.equal(unpack(latents, SPACES["qwenimage"]), z)


@pytest.mark.parametrize(
    "name", ["ChromaPipeline", "BriaPipeline", "LongCatImagePipeline", "OvisImagePipeline", "NucleusMoEImagePipeline"]
)
def test_packing_of_pipelines_that_share_a_space(name):
    """By their own packing; which space it is, their autoencoder's configuration tells."""
    z = torch.randn(2, 16, 4, 8)
    patch = (2,) if name == "NucleusMoEImagePipeline" else ()
    packed = getattr(diffusers, name)._pack_latents(z, 2, 16, 4, 8, *patch)
    assert packed.shape == (2, 8, 64)
    assert torch.equal(unpack(packed, SPACES["flux"], **SIZE), z)


# The rest of diffusers' pipelines

FAST = ("Anima", "Bria FIBO 2", "Flux inpainting", "Krea 2")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
)
def test_every_other_pipeline(name):
    """Stopped after a step, and at the end, where its own image is what its autoencoder makes of our latents."""
    if name == "OmniGen":
        pytest.importorskip("torchvision")
    pipe, kwargs, space = build_other(name)
    kwargs |= {"num_inference_steps": 3}
    calls = []
    denoiser = pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
    hook = denoiser.register_forward_pre_hook(lambda *_: calls.append(1))

    def denoised(stop, **more):
        torch.manual_seed(0)  # some encode the picture that they are given by it
        return partly_denoise(pipe, stop, **kwargs, generator=seeded(), **more)

    first = denoised(1)
    few = len(calls)
    calls.clear()
    again = denoised(1, finish=True, output_type="pt")
    assert 0 < few < len(calls)
    hook.remove()
    torch.testing.assert_close(first.latents, again.latents)
    end = denoised(None)
    assert first.space.name == space and (first.step, end.step) == (1, end.steps)
    assert 0.05 < first.sigma < 1 and end.sigma < 0.06 and (first.latents - end.latents).abs().max() > 1e-3
    vae, z = pipe.vae, end.latents
    if name == "SD3 inpainting":  # diffusers leaves the shift out when it decodes
        image = vae.decode(z / vae.config.scaling_factor).sample.clamp(-1, 1)
    elif space == "qwenimage":  # Wan's autoencoder, too
        mean, std = (torch.tensor(x)[:, None, None] for x in (vae.config.latents_mean, vae.config.latents_std))
        image = vae.decode((z * std + mean)[:, :, None]).sample[:, :, 0].clamp(-1, 1)
    else:
        image = decode(vae, z)
    own = torch.as_tensor(np.asarray(again.images)).reshape(image.shape)
    torch.testing.assert_close(image / 2 + 0.5, own, atol=2e-3, rtol=0)


VIDEO = [
    "AllegroPipeline", "AnimateDiffPipeline", "CogVideoXPipeline", "HeliosPipeline", "HunyuanVideoPipeline",
    "HunyuanVideo15Pipeline", "I2VGenXLPipeline", "Kandinsky5T2VPipeline", "LTX2Pipeline", "LTXPipeline",
    "LattePipeline", "MochiPipeline", "MotifVideoPipeline", "SanaVideoPipeline", "SkyReelsV2Pipeline",
    "StableVideoDiffusionPipeline", "WanAnimatePipeline", "WanImageToVideoPipeline", "WanVACEPipeline",
]  # fmt: skip


@pytest.mark.parametrize("name", VIDEO)
def test_video_is_refused(name):
    """By the class, before anything of it is looked at."""
    pipe = object.__new__(getattr(diffusers, name))
    with pytest.raises(
        ValueError, match=f"{name} makes video: expected a pipeline of images. Frames would need a decoder"
    ):
        pipeline_latent_space(pipe)


@pytest.mark.parametrize("name", ["Ideogram4Pipeline", "Cosmos2TextToImagePipeline", "VisualClozePipeline"])
def test_images_in_a_form_of_their_own_are_refused(name):
    with pytest.raises(ValueError, match=f"no known decoder fits {name}: it"):
        pipeline_latent_space(object.__new__(getattr(diffusers, name)))


def test_every_pipeline_of_diffusers_is_run_or_left_out_by_name():
    """Of those whose autoencoder could be one of ours, by what their files say."""
    docs = (Path(__file__).parents[1] / "docs" / "latent-spaces.md").read_text()
    left = re.findall(r"`([\w*!\[\]]+)`", docs[docs.index("Left out, of all classes") :].split("\n\n")[0])
    ours = r"\bAutoencoder(KL|KLFlux2|KLQwenImage|KLWan|Tiny)\b"
    run = {name for room in (families, more_families) for name in vars(room)} | {"StableDiffusionXLImg2ImgPipeline"}
    missing, seen = [], 0
    for file in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py"):
        for name, body in re.findall(r"^class (\w*Pipeline\w*)\((.*?)(?=^class |\Z)", file.read_text(), re.M | re.S):
            if name in run or name.endswith("Output") or not re.search(ours, body):
                continue
            seen += 1
            if name.startswith((*_REFUSED, *_VIDEO)) or any(fnmatchcase(name, pattern) for pattern in left):
                continue
            missing.append(name)
    assert not missing and seen > 50


def test_no_pipeline_of_images_is_refused_as_video():
    pipes = [build_other(name)[0] for name in FAST] + [build(name)[0] for name in FAMILIES]
    assert {pipeline_latent_space(pipe).name for pipe in pipes} <= set(SPACES)
