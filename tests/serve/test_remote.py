"""diffusers' own client, as it is, against the running server."""

import io
import re
import warnings

import httpx
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image, ImageChops

from pixeldecoder.latents import SPACES, denormalise, normalise
from pixeldecoder.pipeline import postprocess
from pixeldecoder.serve.results import picture_bytes
from serving import flux_pipeline, latents, photo, serving

FLUX = dict(scaling_factor=0.3611, shift_factor=0.1159)
PROCESSOR = VaeImageProcessor()


@pytest.fixture(scope="module")
def pipeline():
    return flux_pipeline()


@pytest.fixture(scope="module")
def url(pipeline):
    with serving(pipeline) as client:
        yield str(client.base_url)


def local(pipeline, z, seeds=(0,), sigma=0.0, **kwargs) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(z, sigma=sigma, generator=generators, output_type="latent", **kwargs).images


def bytes_of(image: torch.Tensor) -> torch.Tensor:
    """(B, H, W, C), uint8."""
    return (postprocess(image, "pt") * 255).round().byte().permute(0, 2, 3, 1)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Of a batch the server decodes the images together or apart: to rounding."""
    return tuple(a.shape) == tuple(b.shape) and bool((a.float() - b.float()).abs().max() <= tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(output_type="pil", return_type="pil", image_format="jpg"),
        dict(output_type="pil", return_type="pil", image_format="png"),
        dict(output_type="pil", return_type="pil", processor=PROCESSOR),
        dict(output_type="pil", return_type="pt", processor=PROCESSOR),
        dict(output_type="pt", return_type="pil", partial_postprocess=True),
        dict(output_type="pt", return_type="pt", partial_postprocess=True),
        dict(output_type="pt", return_type="pt"),
        dict(output_type="pt", return_type="pil", processor=PROCESSOR),
        dict(output_type="pt", return_type="pt", processor=PROCESSOR),
    ],
    ids=lambda kwargs: (
        "-".join(str(value) for key, value in kwargs.items() if key != "processor")
        + ("-processor" if "processor" in kwargs else "")
    ),
)
def test_every_combination_of_decode(url, pipeline, kwargs, batch, dtype):
    z = torch.stack([latents(i, 2, 3) for i in range(batch)]).to(dtype)
    truth = local(pipeline, z.float(), range(batch))
    plain, processor = kwargs["output_type"] == "pil", "processor" in kwargs
    if plain and not processor and batch > 1:
        with pytest.raises(RuntimeError, match="2 latents cannot become one file"):
            remote_decode(f"{url}/decode", z, **FLUX, **kwargs)
        return
    out = remote_decode(f"{url}/decode", z, **FLUX, **kwargs)
    if kwargs["return_type"] == "pt":
        if kwargs.get("partial_postprocess"):
            assert out.dtype == torch.uint8 and same(out, bytes_of(truth), 1)
        elif plain:
            assert same(out, postprocess(truth, "pt"), 1e-3)
        else:
            assert same(out, truth.clamp(-1, 1), 1e-3)
        return
    if not plain and processor:  # the client gives the first one alone
        out, truth = [out], truth[:1]
    out = out if isinstance(out, list) else [out]
    got = torch.stack([torch.tensor(list(image.tobytes())).reshape(image.height, image.width, 3) for image in out])
    assert [image.size for image in out] == [(96, 64)] * len(truth)
    if kwargs.get("image_format") == "jpg":
        again = Image.open(io.BytesIO(picture_bytes(postprocess(truth, "pil")[0], "jpg"))).convert("RGB")
        assert out[0].format == "jpeg" and ImageChops.difference(out[0], again).getextrema() == ((0, 0),) * 3
    else:
        assert same(got, bytes_of(truth), 1)


def test_factors_say_that_latents_are_normalised(url, pipeline):
    """Without any they are an autoencoder's own: this is where other servers' colours drift."""
    z = latents(1)[None]
    own = denormalise(z, SPACES["flux"])
    assert torch.allclose(normalise(own, SPACES["flux"]), z, atol=1e-6) and not torch.allclose(own, z, atol=0.1)
    truth, kwargs = local(pipeline, z).clamp(-1, 1), dict(output_type="pt", return_type="pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(remote_decode(f"{url}/decode", z, **kwargs), truth, 1e-4)  # do_scaling, the client's default
    assert same(remote_decode(f"{url}/decode", own, do_scaling=False, **kwargs), truth, 1e-4)
    assert same(remote_decode(f"{url}/decode", z, **FLUX, **kwargs), truth, 1e-4)
    with pytest.raises(RuntimeError, match=r"scaling_factor 0.13025, but the decoder is for the flux space"):
        remote_decode(f"{url}/decode", z, scaling_factor=0.13025, **kwargs)
    with pytest.raises(RuntimeError, match=r"shift_factor 0\.0609"):
        remote_decode(f"{url}/decode", z, scaling_factor=0.3611, shift_factor=0.0609, **kwargs)


def test_extras_travel_in_the_endpoint(url, pipeline):
    z, kwargs = latents(1)[None], dict(output_type="pt", return_type="pt", **FLUX)
    endpoint = f"{url}/decode?sigma=.3&seed=7&prompt=a%20cat&steps=2"
    truth = local(pipeline, z, [7], 0.3, num_inference_steps=2)
    assert same(remote_decode(endpoint, z, **kwargs), truth.clamp(-1, 1), 1e-4)


def test_packed_latents_and_a_video_of_one_frame(url, pipeline):
    z, kwargs = torch.randn(1, 16, 4, 6), dict(output_type="pt", return_type="pt", **FLUX)
    packed = torch.nn.functional.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2).contiguous()  # as the client needs it
    truth = local(pipeline, z).clamp(-1, 1)
    assert same(remote_decode(f"{url}/decode", packed, height=32, width=48, **kwargs), truth, 1e-4)
    assert same(remote_decode(f"{url}/decode", z[:, :, None], **kwargs), truth, 1e-4)
    with pytest.raises(RuntimeError, match="3 frames of a video"):
        remote_decode(f"{url}/decode", z[:, :, None].repeat(1, 1, 3, 1, 1), **kwargs)


def test_video_is_refused_by_name(url):
    with pytest.raises(RuntimeError, match="output_type mp4: expected pil or pt"):
        remote_decode(f"{url}/decode", latents(0)[None], output_type="mp4", return_type="mp4", **FLUX)


@pytest.mark.parametrize("image", [photo(), photo(mode="L"), torch.rand(2, 3, 24, 40) * 2 - 1])
@pytest.mark.parametrize("factors", [FLUX, {}])
def test_encode(url, pipeline, image, factors):
    given = image.convert("RGB") if isinstance(image, Image.Image) else image
    truth = pipeline.encode_image(given)
    truth = truth if factors else denormalise(truth, SPACES["flux"])
    assert same(remote_encode(f"{url}/encode", image, **factors), truth, 1e-4)


def test_there_and_back(url, pipeline):
    z = remote_encode(f"{url}/encode", photo(), **FLUX)
    image = remote_decode(f"{url}/decode", z, image_format="png", **FLUX)
    assert image.tobytes() == pipeline.upscale(photo(), generator=torch.Generator().manual_seed(0)).images[0].tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(shape=[1, 16, 2, 3]), r"a tensor \[1, 16, 2, 3\] of float32 has 384 bytes, got 256"),
        (dict(shape=[1, 16, 65536, 65536]), "has 274877906944 bytes, got 256"),
        (dict(shape=[1, 4, 4, 4]), r"expected latents of shape \(B, 16, h, w\)"),
        (dict(shape=[64, 1, 1, 1]), r"expected latents of shape \(B, 16, h, w\)"),
        (dict(shape=[16, 2, 2]), "are packed: give the height and width"),
        (dict(shape=[64]), "shape: List should have at least 3 items"),
        (dict(shape=[1, 16, 2, -2]), "shape.3: Input should be greater than or equal to 1"),
        (dict(dtype="float64"), "dtype: Input should be 'float16', 'float32' or 'bfloat16'"),
        (dict(dtype="float16"), "has 128 bytes, got 256"),
        (dict(sigma="2"), "sigma: Input should be less than or equal to 1"),
        (dict(steps="9"), "1 to 4 steps, got 9"),
        (dict(colour="red"), "unknown field colour"),
        (dict(seed=[1, 2]), "seed is there twice: expected it once"),
        (dict(decoder="other"), 'no decoder "other": expected one of tiny'),
    ],
)
def test_bad_requests_are_told_in_json(url, change, message):
    body = latents(0).numpy().tobytes()
    query = dict(shape=[1, 16, 2, 2], dtype="float32", output_type="pt", do_scaling=True) | change
    response = httpx.post(f"{url}/decode", params=query, content=body)
    assert 400 <= response.status_code < 500
    told = response.json()["error"]["message"]
    assert re.search(message, told), told


def test_a_batch_larger_than_the_queue(url):
    z = torch.zeros(65, 16, 1, 1)
    with pytest.raises(RuntimeError, match="a batch of 65: at most 64 are taken at a time"):
        remote_decode(f"{url}/decode", z, output_type="pt", return_type="pt", **FLUX)
