"""diffusers' `remote_decode` and `remote_encode`, whose clients stay as they are: requests in, responses out.

The protocol is that of `diffusers.utils.remote_utils`. A factor, or `do_scaling`, says that latents are normalised, as
a VAE's server would undo it; without any they are what a VAE's `decode` takes.
"""

import json
import math
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Depends, Query
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from pixeldecoder.latents import SPACES, check_factors, denormalise
from pixeldecoder.pipeline import postprocess
from pixeldecoder.serve.jobs import Request, TooLargeError
from pixeldecoder.serve.results import TYPES, picture_bytes
from pixeldecoder.serve.service import Service

DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}
Dtype = Literal["float16", "float32", "bfloat16"]
Side = Annotated[int, Field(ge=1, le=2**20)]
TENSOR = "tensor/binary"


class Common(BaseModel):
    """What decoding and encoding share."""

    model_config = ConfigDict(extra="forbid")

    scaling_factor: float | None = Field(None, allow_inf_nan=False, description="Of the autoencoder.")
    shift_factor: float | None = Field(None, allow_inf_nan=False, description="Of the autoencoder.")
    decoder: str | None = Field(None, description="By name; by default the server's first.")
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False, description="Seconds, at most the server's own.")


class Decode(Common):
    """The query of `remote_decode`, and our extras, which are given in its endpoint: `/decode?sigma=0.3&seed=7`."""

    shape: list[Side] = Field(min_length=3, max_length=5)
    dtype: Dtype
    output_type: Literal["pil", "pt", "mp4"] = "pil"
    image_format: Literal["jpg", "png"] = "jpg"
    partial_postprocess: bool = False
    do_scaling: bool = Field(False, description="The latents are normalised.")
    height: Side | None = Field(None, description="Of the latent model's image in pixels, for packed latents.")
    width: Side | None = None
    sigma: float = Field(0.0, ge=0, le=1, description="Noise level of the latents.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of the first image; the next ones count on.")
    steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, allow_inf_nan=False)
    prompt: str = ""
    negative_prompt: str | None = None


class Encode(Common):
    """The query of `remote_encode`."""

    shape: list[Side] | None = Field(None, min_length=4, max_length=4, description="Of a tensor; none of a picture.")
    dtype: Dtype | None = None


def routes(service: Service) -> APIRouter:
    """`/decode` and `/encode`."""
    router = APIRouter(tags=["diffusers"], dependencies=[Depends(_once)])

    @router.post("/decode", **_described(TENSOR, "image/jpeg", "image/png"))
    async def decode(http: HttpRequest, query: Annotated[Decode, Query()]) -> Response:
        """Latents as bytes to an image, for `diffusers.utils.remote_utils.remote_decode`."""
        if query.output_type == "mp4":
            raise ValueError("output_type mp4: expected pil or pt, as the decoder makes images and no video")
        as_tensor = query.output_type == "pt" or TENSOR in http.headers.get("accept", "")
        latents = _latents(query, await http.body())
        _check_count(service, len(latents))
        if len(latents) > 1 and not as_tensor:
            raise ValueError(
                f"{len(latents)} latents cannot become one file: send them one by one, ask for output_type pt, or give "
                "a processor"
            )
        decoder, _ = _decoder(service, query)
        given = query.scaling_factor is not None or query.shift_factor is not None
        request = Request(
            decoder=decoder, sigma=query.sigma, steps=query.steps, guidance_scale=query.guidance_scale,
            prompt=query.prompt, negative_prompt=query.negative_prompt, denormalized=not (given or query.do_scaling),
            height=query.height if latents.ndim == 3 else None, width=query.width if latents.ndim == 3 else None,
        )  # fmt: skip
        requests = [replace(request, latents=z, seed=(query.seed + i) % 2**63) for i, z in enumerate(latents.split(1))]
        results = await service.answer(http, requests, query.timeout)
        image = torch.cat([result.image for result in results])  # type: ignore[misc]
        if not as_tensor:
            data = await run_in_threadpool(picture_bytes, results[0].picture(), query.image_format)
            return Response(data, media_type=TYPES[query.image_format])
        if query.output_type == "pil":
            tensor: Any = postprocess(image, "pt")
        elif query.partial_postprocess:
            tensor = (postprocess(image, "pt") * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        else:
            tensor = image.clamp(-1, 1)
        if tensor.dtype != torch.uint8 and query.dtype != "float32":  # bfloat16 would show in a picture
            tensor = tensor.half()
        return _response(tensor)

    @router.post("/encode", **_described(TENSOR))
    async def encode(http: HttpRequest, query: Annotated[Encode, Query()]) -> Response:
        """A picture to latents, for `diffusers.utils.remote_utils.remote_encode`: normalised if factors are given."""
        body = await http.body()
        if (query.shape is None) != (query.dtype is None):
            raise ValueError("expected shape and dtype of a tensor, or neither of a picture")
        images: list[bytes | torch.Tensor] = [body]
        if query.shape is not None and query.dtype is not None:
            _check_count(service, query.shape[0])
            images = [*_tensor(body, query.shape, query.dtype).float().split(1)]
        decoder, space = _decoder(service, query)
        results = await service.answer(
            http, [Request(decoder=decoder, image=image, encode=True) for image in images], query.timeout
        )
        latents = torch.cat([result.latents for result in results])  # type: ignore[misc]
        if query.scaling_factor is None and query.shift_factor is None:
            latents = denormalise(latents, space)
        return _response(latents)

    return router


async def _once(http: HttpRequest) -> None:
    """Of the query, only `shape` is repeated."""
    names = [name for name, _ in http.query_params.multi_items() if name != "shape"]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is there twice: expected it once")


def _decoder(service: Service, query: Common):
    """Its name and latent space; raises ValueError if the query's factors are those of another."""
    name = service.decoder(query.decoder)
    space = SPACES.get(service.engine.pipelines[name].config.latent_space or "")
    check_factors(space, query.scaling_factor, query.shift_factor)
    return name, space


def _check_count(service: Service, count: int) -> None:
    if count > service.engine.queue_size:
        raise TooLargeError(f"a batch of {count}: at most {service.engine.queue_size} are taken at a time")


def _latents(query: Decode, body: bytes) -> torch.Tensor:
    """(B, C, h, w), or packed (B, n, C)."""
    latents = _tensor(body, query.shape, query.dtype)
    if latents.ndim == 5:
        if latents.shape[2] != 1:
            raise ValueError(
                f"latents {query.shape} are {latents.shape[2]} frames of a video: expected those of images"
            )
        latents = latents[:, :, 0]
    if latents.ndim == 3 and (query.height is None or query.width is None):
        raise ValueError(f"latents {query.shape} are packed: give the height and width of the latent model's image")
    return latents


def _tensor(body: bytes, shape: list[int], dtype: Dtype) -> torch.Tensor:
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if len(body) != expected:
        raise ValueError(f"a tensor {shape} of {dtype} has {expected} bytes, got {len(body)}")
    return torch.frombuffer(bytearray(body), dtype=DTYPES[dtype]).reshape(shape)


def _response(tensor: Any) -> Response:
    headers = {"shape": json.dumps(list(tensor.shape)), "dtype": str(tensor.dtype).removeprefix("torch.")}
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return Response(data, media_type=TENSOR, headers=headers)


def _described(*answers: str) -> dict[str, Any]:
    """For the OpenAPI page: bytes in, whatever they are called, and bytes out."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        "response_class": Response,
        "responses": {200: {"content": dict.fromkeys(answers, binary), "description": "A tensor, or a picture."}},
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/octet-stream": binary}}},
    }
