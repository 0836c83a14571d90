"""Files of latents and pictures in, pictures out: `/v1`, the server's own way and OpenAI's, at once or as jobs."""

import base64
import binascii
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from pixeldecoder.files import LATENT_SUFFIXES, parse_latents
from pixeldecoder.latents import normalise_file
from pixeldecoder.serve.jobs import Request, Result
from pixeldecoder.serve.results import TYPES, how_made, license_of, picture_bytes
from pixeldecoder.serve.service import Service

MOST_IMAGES = 8
"""Of one request in OpenAI's form."""
File = Annotated[bytes, Field(min_length=1, json_schema_extra={"format": "binary"})]


class Settings(BaseModel):
    """How an image is to be made, and sent."""

    model_config = ConfigDict(extra="forbid")

    decoder: str | None = Field(None, description="By name; by default the server's first.")
    sigma: float | None = Field(None, ge=0, le=1, description="Noise level that latents have, or that a picture's get.")
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, allow_inf_nan=False)
    prompt: str = Field("", description="For a decoder that reads text.")
    negative_prompt: str | None = None
    response_format: Literal["png", "webp", "jpg", "b64_json"] = Field(
        "png", description="A file with how it was made, or JSON with the PNG in base64."
    )
    background: bool = Field(False, description="Answer 202 with a job at once.")
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False, description="Seconds, at most the server's own.")

    def request(self, service: Service, **kwargs: Any) -> Request:
        return Request(
            decoder=service.decoder(self.decoder), seed=self.seed, steps=self.steps, prompt=self.prompt,
            guidance_scale=self.guidance_scale, negative_prompt=self.negative_prompt, **kwargs,
        )  # fmt: skip


class Decode(Settings):
    """Latents of one image."""

    latents: File = Field(
        description="A file of latents, of .safetensors, .npy, .pt or ComfyUI's .latent; base64 in JSON."
    )
    name: str = Field("latents.safetensors", description="Of the file; its suffix tells its kind.")
    latent_space: str | None = Field(None, description="Of ComfyUI's latents; by default the decoder's.")


class Upscale(Settings):
    """A picture."""

    image: File = Field(description="A file of a picture; base64 in JSON.")
    name: str = Field("image", description="Of the file, for the metadata.")


class Edit(BaseModel):
    """OpenAI's image edit, which enlarges the image here; our `sigma`, `seed` and `steps` beside."""

    model_config = ConfigDict(extra="forbid")

    image: File
    prompt: str = ""
    model: str | None = None
    n: int = Field(1, ge=1, le=MOST_IMAGES, description="Images, with seeds that count on.")
    size: str = Field("auto", description='"auto", or the size that the image becomes.')
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "webp", "jpeg"] = "png"
    quality: Literal["auto"] = "auto"
    background: Literal["auto"] = "auto"
    user: str | None = None
    sigma: float = Field(0.0, ge=0, le=1)
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, allow_inf_nan=False)
    negative_prompt: str | None = None


def routes(service: Service) -> APIRouter:
    """Everything below `/v1`."""
    router = APIRouter(prefix="/v1")

    @router.post("/decode", **_described(Decode, "latents"))
    async def decode(http: HttpRequest) -> Response:
        """Latents to an image 4 or 8 times larger than their autoencoder's."""
        body = await _body(http, Decode, "latents")
        request = await run_in_threadpool(_latents_request, service, body)
        return await _answer(service, http, body, request, "decode", body.latents)

    @router.post("/upscale", **_described(Upscale, "image"))
    async def upscale(http: HttpRequest) -> Response:
        """A picture to one 4 or 8 times larger, by way of its latents."""
        body = await _body(http, Upscale, "image")
        request = body.request(service, image=body.image, sigma=body.sigma or 0.0)
        return await _answer(service, http, body, request, "upscale", body.image)

    @router.post("/images/edits", **_described(Edit, "image"))
    async def edit(http: HttpRequest) -> Response:
        """As OpenAI's: `client.images.edit(model="nano", image=open("photo.png", "rb"), prompt="")`."""
        body = await _body(http, Edit, "image")
        request = Request(
            decoder=service.decoder(body.model), image=body.image, sigma=body.sigma, steps=body.steps,
            guidance_scale=body.guidance_scale, prompt=body.prompt, negative_prompt=body.negative_prompt,
        )  # fmt: skip
        requests = [replace(request, seed=(body.seed + index) % 2**63) for index in range(body.n)]
        results = await service.answer(http, requests)
        sizes = {f"{image.width}x{image.height}" for image in (result.picture() for result in results)}
        if body.size != "auto" and body.size not in sizes:
            raise ValueError(f'size {body.size}: expected "auto" or {", ".join(sizes)}, as this image becomes that')
        kind = body.output_format.replace("jpeg", "jpg")
        files = [
            await run_in_threadpool(_file, service, one, result, "upscale", "image", body.image, kind)
            for one, result in zip(requests, results, strict=True)
        ]
        data = [{"b64_json": base64.b64encode(file).decode()} for file in files]
        return JSONResponse(
            {"created": int(time.time()), "data": data, "output_format": body.output_format, "size": sizes.pop()}
        )

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """The decoders."""
        return {"object": "list", "data": [_model(service, name) for name in service.engine.pipelines]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return _model(service, service.decoder(name))

    @router.get("/jobs/{id}")
    async def status(id: str) -> dict[str, Any]:
        """How far a job is."""
        return service.job(id).status()

    @router.delete("/jobs/{id}")
    async def cancel(id: str) -> dict[str, Any]:
        """Cancel a job, which stops after the tile at hand."""
        background = service.job(id)
        if background.job is not None:
            background.job.cancel()
        return background.status()

    @router.get(
        "/jobs/{id}/events", response_class=StreamingResponse, responses={200: {"content": {"text/event-stream": {}}}}
    )
    async def events(id: str) -> StreamingResponse:
        """Server-sent events: "progress", with the picture in the making as "x0", a JPEG in base64; at last the end."""
        background = service.job(id)
        return StreamingResponse(service.events(background), media_type="text/event-stream")

    @router.get("/jobs/{id}/result", response_class=Response, responses={200: _files()})
    async def result(id: str) -> Response:
        """What a job made."""
        background = service.job(id)
        if background.error is not None:
            raise background.error
        if background.response is None:
            raise HTTPException(409, f"the job is {background.state}: it has no result")
        return background.response

    return router


def _latents_request(service: Service, body: Decode) -> Request:
    request = body.request(service)
    suffix = Path(body.name).suffix.lower()
    if suffix not in LATENT_SUFFIXES:
        raise ValueError(f"name {body.name!r}: expected one that ends in {', '.join(LATENT_SUFFIXES)}")
    held = parse_latents(body.latents, suffix)
    if len(held.tensor) != 1:
        raise ValueError(f"expected the latents of one image, got {len(held.tensor)}: send them one by one")
    space = service.engine.pipelines[request.decoder].config.latent_space
    latents = normalise_file(held, space, body.latent_space, request.decoder)
    sigma = body.sigma if body.sigma is not None else 0.0 if held.sigma is None else float(held.sigma[0])
    return replace(request, latents=latents, sigma=sigma, size=held.size)


async def _answer(
    service: Service, http: HttpRequest, body: Decode | Upscale, request: Request, command: str, source: bytes
) -> Response:
    async def respond(result: Result) -> Response:
        kind = "png" if body.response_format == "b64_json" else body.response_format
        file = await run_in_threadpool(_file, service, request, result, command, body.name, source, kind)
        if body.response_format != "b64_json":
            return Response(file, media_type=TYPES[kind])
        return JSONResponse({"created": int(time.time()), "data": [{"b64_json": base64.b64encode(file).decode()}]})

    if body.background:
        background = await service.start(request, respond, body.timeout)
        return JSONResponse(background.status(), 202, {"Location": f"/v1/jobs/{background.id}"})
    return await respond((await service.answer(http, [request], body.timeout))[0])


def _file(
    service: Service, request: Request, result: Result, command: str, name: str, source: bytes, kind: str
) -> bytes:
    made = how_made(service.engine, request, result, command, Path(name).name, source)
    return picture_bytes(result.picture(), kind, made)


async def _body(http: HttpRequest, model: type[BaseModel], file: str) -> Any:
    """A form, or JSON with the file in base64."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    data: dict[str, Any] = {}
    if kind == "application/json":
        try:
            data = json.loads(await http.body())
            if isinstance(data, dict) and isinstance(data.get(file), str):
                data[file] = base64.b64decode(data[file].partition(";base64,")[2] or data[file], validate=True)
        except (ValueError, RecursionError, binascii.Error) as error:
            raise ValueError(f"the body is not JSON with {file} in base64: {error}") from None
    elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        async with http.form(max_files=4, max_fields=32) as form:
            for key, value in form.multi_items():
                key = file if key == f"{file}[]" else key
                if key in data:
                    raise ValueError(f"{key} is there twice: expected it once")
                data[key] = value
                if isinstance(value, UploadFile):
                    data[key] = await value.read()
                    if "name" in model.model_fields and value.filename:
                        data.setdefault("name", value.filename)
    else:
        raise HTTPException(415, f"content type {kind or 'none'!r}: expected multipart/form-data or application/json")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _model(service: Service, name: str) -> dict[str, Any]:
    pipeline = service.engine.pipelines[name]
    config = pipeline.transformer.config
    return {
        "id": name, "object": "model", "created": 0, "owned_by": "pixeldecoder",
        "latent_space": pipeline.config.latent_space, "latent_channels": config.latent_channels,
        "scale": config.scale, "reads_text": config.text_embed_dim is not None,
        "license": license_of(name, pipeline),
    }  # fmt: skip


def _files() -> dict[str, Any]:
    binary: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
    content = {kind: binary for kind in TYPES.values()} | {"application/json": {}}
    return {"content": content, "description": "The picture, with how it was made."}


def _described(model: type[BaseModel], file: str) -> dict[str, Any]:
    """For the OpenAPI page: the same fields as a form and as JSON."""
    form = model.model_json_schema()
    coded = json.loads(json.dumps(form))
    coded["properties"][file]["format"] = "byte"
    for schema in form, coded:
        schema["properties"][file].pop("minLength", None)
    content = {"multipart/form-data": {"schema": form}, "application/json": {"schema": coded}}
    answers: dict[int | str, Any] = {200: _files()}
    if "background" in model.model_fields and model is not Edit:
        answers[202] = {"description": "The job.", "content": {"application/json": {}}}
    return {
        "response_class": Response, "responses": answers,
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }  # fmt: skip
