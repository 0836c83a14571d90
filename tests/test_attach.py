"""A pipeline's own call returns the pixel decoder's images, of every family; and then again its own."""

import inspect

import diffusers
import numpy as np
import pytest
import torch

from conftest import TINY_NANO, tiny_pipeline
from families import FAMILIES, build, flux, kl, sdxl
from pixeldecoder import attach, detach
from pixeldecoder.ldm import generate

STEPS = dict(num_inference_steps=3)
GEOMETRY = {"flux2": dict(latent_channels=128, latent_downscale_factor=16), "sdxl": dict(latent_channels=4)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decoder_for(space: str):
    config = TINY_NANO | GEOMETRY.get(space, {})
    decoder = tiny_pipeline(**config)
    decoder.register_to_config(latent_space=space)
    return decoder


@pytest.mark.parametrize("name", FAMILIES)
def test_the_call_returns_what_generate_makes(name):
    pipe, kwargs = build(name)
    decoder = decoder_for(FAMILIES[name][1])
    prompt = {} if "prompt_embeds" in kwargs else {"prompt": "a red cat"}
    own = pipe(**prompt, **kwargs, **STEPS, generator=seeded(7)).images[0]
    truth = generate(pipe, decoder, "a red cat", stop_at=2, seed=7, **kwargs, **STEPS).images[0]
    kind = type(pipe)
    assert attach(pipe, decoder, stop_at=2) is pipe
    assert isinstance(pipe, kind) and type(pipe).__name__ == kind.__name__
    assert inspect.signature(pipe.__call__) == inspect.signature(kind.__call__.__get__(pipe))
    image = pipe(**prompt, **kwargs, **STEPS, generator=seeded(7)).images[0]
    assert image.size == (256, 128) and image.tobytes() == truth.tobytes()
    assert detach(pipe) is pipe and type(pipe) is kind
    again = pipe(**prompt, **kwargs, **STEPS, generator=seeded(7)).images[0]
    assert again.size == own.size == (64, 32) and again.tobytes() == own.tobytes()


def test_own_arguments_callbacks_and_output_types():
    pipe, kwargs = build("FLUX.1")
    decoder, seen = decoder_for("flux"), []
    latent = pipe("a cat", **kwargs, **STEPS, generator=seeded(1), output_type="latent").images
    attach(pipe, decoder, 0.67)

    def look(pipe, step, timestep, tensors):
        seen.append(step)
        return tensors

    def call(**more):
        return pipe("a cat", None, **kwargs, **STEPS, generator=seeded(1), callback_on_step_end=look, **more)

    image = call().images[0]
    assert seen == [0]  # of the two steps that were made, the last ends the run
    array = call(output_type="np").images
    (tensor,) = call(output_type="pt", return_dict=False)
    assert array.shape == (1, 128, 256, 3) and tensor.shape == (1, 3, 128, 256)
    assert np.array_equal((array[0] * 255).round().astype(np.uint8), np.asarray(image))
    assert torch.equal(tensor.permute(0, 2, 3, 1), torch.from_numpy(array))
    assert torch.equal(call(output_type="latent").images, latent) and seen[-3:] == [0, 1, 2]
    two = pipe(["a cat", "a dog"], **kwargs, **STEPS, generator=[seeded(1), seeded(2)]).images
    assert two == generate(
        detach(pipe), decoder, ["a cat", "a dog"], seed=[1, 2], stop_at=0.67, **kwargs, **STEPS
    ).images  # fmt: skip


def test_an_attached_pipeline_is_saved_as_itself(tmp_path):
    pipe = attach(sdxl(), decoder_for("sdxl"))
    pipe.save_pretrained(tmp_path / "saved")
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")) is diffusers.StableDiffusionXLPipeline


def test_nano_by_its_name_and_once_more():
    pipe, kwargs = build("Z-Image")
    kind = type(pipe)
    for _ in range(2):
        attach(pipe)
    assert pipe("a cat", **kwargs, **STEPS, generator=seeded()).images[0].size == (256, 128)
    assert type(detach(detach(pipe))) is kind


def test_an_error_leaves_the_pipeline_attached():
    pipe, kwargs = build("FLUX.1")
    attach(pipe, decoder_for("flux"), stop_at=9)
    with pytest.raises(ValueError, match="makes only 3 steps"):
        pipe("a cat", **kwargs, **STEPS)
    assert pipe("a cat", **kwargs, num_inference_steps=9).images[0].size == (256, 128)


def test_what_does_not_fit():
    pipe = flux()
    with pytest.raises(ValueError, match="the latents are of the flux space"):
        attach(pipe, decoder_for("sdxl"))
    with pytest.raises(ValueError, match='no decoder "other"'):
        attach(pipe, "other")
    with pytest.raises(ValueError, match="stop_at='soon'"):
        attach(pipe, decoder_for("flux"), "soon")
    pipe.vae = kl(16, 9.0, 0.0)
    with pytest.raises(ValueError, match="no known decoder fits"):
        attach(pipe, decoder_for("flux"))
    assert type(pipe) is diffusers.FluxPipeline
    pipe, kwargs = build("FLUX.2")
    text = tiny_pipeline(**TINY_NANO | GEOMETRY["flux2"] | dict(text_embed_dim=20, max_text_length=12))
    with pytest.raises(ValueError, match="the decoder reads text: give a prompt"):
        attach(pipe, text)(**kwargs, **STEPS)
    attach(pipe, text, decoder_kwargs={"prompt_embeds": torch.randn(1, 5, 20)})
    assert pipe(**kwargs, **STEPS).images[0].size == (256, 128)
