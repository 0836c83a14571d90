"""The server as programs see it: /v1, jobs, limits, errors, counts, its end."""

import base64
import contextlib
import gc
import io
import json
import re
import signal
import socket
import threading
import time
import weakref
import zlib

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from conftest import tiny_pipeline
from pixeldecoder.cli import main
from pixeldecoder.files import read_made
from pixeldecoder.serve.service import Settings
from serving import Gate, command, flux_pipeline, latents, photo, serving


@pytest.fixture(scope="module")
def pipeline():
    return flux_pipeline()


@pytest.fixture(scope="module")
def client(pipeline):
    with serving(pipeline, max_pixels=1024 * 1024) as client:
        yield client


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def held(latents: torch.Tensor) -> bytes:
    return save({"latents": latents})


def local(pipeline, **kwargs) -> Image.Image:
    return pipeline(latents(1), **kwargs).images[0]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def near(a: Image.Image, b: Image.Image) -> bool:
    """To rounding: images that were decoded at the same time were decoded together."""
    pixels = [np.asarray(image, np.int16) for image in (a, b)]
    return a.mode == b.mode and a.size == b.size and bool((np.abs(pixels[0] - pixels[1]) <= 1).all())


def told(response: httpx.Response, status: int) -> str:
    """The message of an error."""
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == status
    return response.json()["error"]["message"]


# Decode and upscale


@pytest.mark.parametrize("kind", ["form", "json"])
def test_decode(client, pipeline, kind, tmp_path):
    file = save({"latents": latents(1), "sigma": torch.tensor(0.25), "size": torch.tensor([15, 13])})
    if kind == "form":
        response = client.post("/v1/decode", files={"latents": ("z.safetensors", file)}, data={"seed": 3, "steps": 2})
    else:
        body = {"latents": base64.b64encode(file).decode(), "seed": 3, "steps": 2, "name": "z.safetensors"}
        response = client.post("/v1/decode", json=body)
    assert response.status_code == 200 and response.headers["content-type"] == "image/png"
    truth = local(pipeline, sigma=0.25, num_inference_steps=2, generator=seeded(3)).crop((0, 0, 52, 60))
    assert opened(response.content).tobytes() == truth.tobytes()
    (tmp_path / "a.png").write_bytes(response.content)
    made = read_made(tmp_path / "a.png")
    assert (made["command"], made["source"], made["seed"], made["sigma"], made["steps"]) == (
        "decode", "z.safetensors", 3, 0.25, 2,
    )  # fmt: skip


def test_latents_of_other_kinds(client, pipeline):
    numbers, file = io.BytesIO(), io.BytesIO()
    np.save(numbers, latents(1).numpy())
    torch.save(latents(1), file)
    own = save({"latent_tensor": latents(1)[None] / 0.3611 + 0.1159, "latent_format_version_0": torch.zeros(0)})
    truth = local(pipeline, generator=seeded(0))
    for name, data in ("z.npy", numbers.getvalue()), ("z.pt", file.getvalue()), ("z.latent", own):
        image = opened(client.post("/v1/decode", files={"latents": (name, data)}).content)
        assert near(image, truth), name


@pytest.mark.parametrize("kind", ["png", "webp", "jpg", "b64_json"])
def test_upscale(client, pipeline, kind, tmp_path):
    image = photo(mode="RGBA")
    given = {"sigma": 0.2, "seed": 5, "steps": 1, "response_format": kind}
    response = client.post("/v1/upscale", files={"image": ("../../etc/a.png", png(image))}, data=given)
    assert response.status_code == 200, response.text
    data = base64.b64decode(response.json()["data"][0]["b64_json"]) if kind == "b64_json" else response.content
    truth = pipeline.upscale(image, 0.2, seeded(6), generator=seeded(5), num_inference_steps=1).images[0]
    suffix = "png" if kind == "b64_json" else kind
    assert opened(data).size == (160, 96) and opened(data).format == {"jpg": "JPEG"}.get(suffix, suffix.upper())
    if suffix == "png":
        assert opened(data).tobytes() == truth.tobytes()
    (tmp_path / f"a.{suffix}").write_bytes(data)
    assert read_made(tmp_path / f"a.{suffix}")["source"] == "a.png"  # and no path


@pytest.mark.slow
def test_a_picture_of_the_server_is_made_again_by_the_command(tmp_path, capsys):
    photo((64, 48)).save(tmp_path / "in.png")
    with command("--dtype", "float32") as (_, url):
        files = {"image": ("in.png", (tmp_path / "in.png").read_bytes())}
        response = httpx.post(f"{url}/v1/upscale", files=files, data={"seed": 4, "sigma": 0.1}, timeout=60)
    (tmp_path / "a.png").write_bytes(response.content)
    assert main(["redo", f"{tmp_path}/a.png", f"{tmp_path}/b.png", "--source", f"{tmp_path}/in.png"]) == 0
    assert opened(response.content).tobytes() == Image.open(tmp_path / "b.png").tobytes()


def test_openai_client(client, pipeline):
    ai = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in ai.models.list()] == ["tiny"] and ai.models.retrieve(
        "tiny"
    ).owned_by == "pixeldecoder"
    result = ai.images.edit(
        model="tiny", image=("photo.png", png(photo())), prompt="", n=2, size="auto", response_format="b64_json",
        extra_body={"seed": 5, "sigma": 0.2, "steps": 1},
    )  # fmt: skip
    for seed, one in zip((5, 6), result.data, strict=True):
        truth = pipeline.upscale(photo(), 0.2, seeded(seed + 1), generator=seeded(seed), num_inference_steps=1)
        assert near(opened(base64.b64decode(one.b64_json)), truth.images[0])
    for kwargs, message in (
        (dict(size="1024x1024"), 'size 1024x1024: expected "auto" or 160x96'),
        (dict(mask=png(photo())), "unknown field mask"),
        (dict(response_format="url"), "response_format: Input should be 'b64_json'"),
    ):
        with pytest.raises((openai.BadRequestError, openai.UnprocessableEntityError), match=message):
            ai.images.edit(model="tiny", image=("photo.png", png(photo())), prompt="", **kwargs)
    with pytest.raises(openai.NotFoundError, match='no decoder "other"'):
        ai.images.edit(model="other", image=("photo.png", png(photo())), prompt="")


# Jobs


def events(lines) -> list[tuple[str, dict]]:
    found, name = [], ""
    for line in lines:
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            found.append((name, json.loads(line[6:])))
    return found


def test_a_job_tells_how_far_it_is(client, pipeline):
    response = client.post(
        "/v1/upscale", files={"image": png(photo())}, data={"seed": 2, "background": "true", "response_format": "webp"}
    )
    assert response.status_code == 202 and response.headers["location"] == f"/v1/jobs/{response.json()['id']}"
    with client.stream("GET", response.headers["location"] + "/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        seen = events(stream.iter_lines())
    assert seen[-1][0] == "done" and seen[-1][1]["status"] == "done" and seen[-1][1]["share"] == 1
    shares = [data["share"] for _, data in seen]
    assert shares == sorted(shares) and all(name == "progress" for name, _ in seen[:-1])
    pictures = [opened(base64.b64decode(data["x0"])) for _, data in seen if "x0" in data]
    assert pictures and all(picture.size == (160, 96) for picture in pictures)
    result = client.get(response.headers["location"] + "/result")
    assert opened(result.content).format == "WEBP" and client.get(response.headers["location"]).json()["step"] == 4


def test_a_job_that_has_ended_holds_its_file_alone(pipeline):
    jobs = []
    with serving(pipeline) as client:
        submit = client.engine.submit

        def noted(*given):
            job = submit(*given)
            jobs.append(weakref.ref(job))
            return job

        client.engine.submit = noted
        places = []
        for file in latents(1), torch.full((16, 2, 2), 3e38):  # which fails
            given = dict(files={"latents": ("z.safetensors", held(file))}, data={"background": "1"})
            places.append(client.post("/v1/decode", **given).headers["location"])
            with client.stream("GET", places[-1] + "/events") as stream:
                assert events(stream.iter_lines())[-1][1]["step"] >= 1
        assert client.get(places[0] + "/result").status_code == 200
        assert client.get(places[1] + "/result").status_code == 400
        gc.collect()
        assert len(jobs) == 2 and [job() for job in jobs] == [None, None]
        assert [client.get(place).json()["status"] for place in places] == ["done", "failed"]


def test_a_job_is_cancelled(pipeline):
    gate = Gate(tiny := tiny_pipeline())
    with serving(tiny) as client:
        body = {"image": base64.b64encode(png(photo())).decode(), "background": True}
        running, waiting = (client.post("/v1/upscale", json=body).headers["location"] for _ in range(2))
        assert gate.entered.wait(60)
        assert client.get(waiting).json()["status"] == "queued"
        assert told(client.get(waiting + "/result"), 409) == "the job is queued: it has no result"
        assert client.delete(waiting).json()["status"] == client.delete(running).json()["status"] == "cancelled"
        with client.stream("GET", running + "/events") as stream:
            assert events(stream.iter_lines())[-1][0] == "cancelled"
        gate.opened.set()
        client.post("/v1/upscale", json=body | {"background": False, "steps": 1})
        assert gate.passes == 2


def test_a_job_that_fails(client):
    file = save({"latents": torch.full((16, 2, 2), 3e38)})
    job = client.post("/v1/decode", files={"latents": ("z.safetensors", file)}, data={"background": "1"}).json()["id"]
    with client.stream("GET", f"/v1/jobs/{job}/events") as stream:
        name, data = events(stream.iter_lines())[-1]
    assert name == "failed" and "NaN or infinite" in data["error"]["message"]
    assert "NaN or infinite" in told(client.get(f"/v1/jobs/{job}/result"), 400)
    assert "no job 7" in told(client.get("/v1/jobs/7/events"), 404)


# Clients that are many, leave or wait


def test_a_full_queue_a_deadline_and_a_client_that_leaves():
    gate = Gate(tiny := tiny_pipeline())
    with serving(tiny, settings=Settings(deadline=1.0), queue_size=1, max_batch=1) as client:
        body = {"image": base64.b64encode(png(photo())).decode(), "steps": 1}
        late = told(client.post("/v1/upscale", json=body | {"timeout": 0.3}), 503)
        assert late == "not done within 0.3 seconds: try again later, or make something smaller"
        gate.entered.clear()
        job = client.post("/v1/upscale", json=body | {"background": True}).headers["location"]  # waits
        full = client.post("/v1/upscale", json=body)
        assert "1 requests wait already" in told(full, 429) and int(full.headers["retry-after"]) >= 1
        client.delete(job)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/upscale", json=body, timeout=0.3)
        until = time.monotonic() + 30
        while client.engine.waiting and time.monotonic() < until:
            time.sleep(0.01)
        assert client.engine.waiting == 0  # its place is free again
        gate.opened.set()
        assert client.post("/v1/upscale", json=body).status_code == 200
        assert gate.passes == 2  # what nobody waited for was not done
        counts = client.get("/metrics").text
    for status in 200, 429, 499, 503:
        assert f'pixeldecoder_requests_total{{method="POST",route="/v1/upscale",status="{status}"}} 1.0' in counts


def test_many_at_once_are_decoded_together(pipeline):
    gate, answers = Gate(tiny := tiny_pipeline()), {}
    with serving(tiny, max_batch=4) as client:

        def ask(seed: int) -> None:
            file = held(latents(seed))
            answers[seed] = httpx.post(
                f"{client.base_url}/v1/decode",
                files={"latents": ("z.safetensors", file)},
                data={"seed": seed},
                timeout=60,
            )

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(9)]
        threads[0].start()
        assert gate.entered.wait(60)  # alone: of two that come at once the first batch may have both
        for thread in threads[1:]:
            thread.start()
        deadline = time.monotonic() + 60
        while client.engine.waiting < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        gate.opened.set()
        for thread in threads:
            thread.join()
        assert client.engine.batches == {1: 1, 4: 2}
        counts = client.get("/metrics").text
    assert 'pixeldecoder_batches_total{images="4"} 2.0' in counts and "pixeldecoder_queue_waiting 0.0" in counts
    truth = tiny_pipeline()
    for seed, response in answers.items():
        assert near(opened(response.content), truth(latents(seed), generator=seeded(seed)).images[0])


# Token and limits


def test_token(pipeline):
    with serving(pipeline, settings=Settings(token="näher")) as client:
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        for headers in (
            {}, {"Authorization": "Bearer naeher"}, {"Authorization": "Bearer x"}, {"Authorization": "Basic !"},
            {"Authorization": "Digest näher".encode()},
        ):  # fmt: skip
            for path in "/v1/models", "/metrics", "/docs", "/nowhere":
                assert "a token is wanted" in told(client.get(path, headers=headers), 401)
        assert client.get("/v1/models", headers={"Authorization": "Bearer näher".encode()}).status_code == 200
        basic = base64.b64encode("anyone:näher".encode())  # as remote_decode sends it for http://anyone:näher@host
        assert client.get("/v1/models", headers={"Authorization": b"Basic " + basic}).status_code == 200


def test_bodies_that_are_too_large(pipeline):
    with serving(pipeline, settings=Settings(max_bytes=10_000)) as client:
        message = told(client.post("/v1/upscale", files={"image": b"0" * 20_000}), 413)
        assert re.fullmatch(r"a body of 2\d+ bytes: at most 10000 are taken here", message)

        def chunks():
            for _ in range(20):
                yield b"0" * 1000

        headers = {"Content-Type": "application/json"}
        assert "more than 10000 bytes" in told(client.post("/v1/upscale", content=chunks(), headers=headers), 413)
        path = "/decode?shape=1&shape=2&shape=3&dtype=float32"
        assert "more than 10000 bytes" in told(client.post(path, content=chunks()), 413)
        assert client.get("/healthz").status_code == 200


def bomb() -> bytes:
    """A PNG of 60000 x 60000 pixels in 1 kB."""

    def chunk(kind, data):
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    head = (60000).to_bytes(4) * 2 + bytes((8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10000))) + chunk(b"IEND", b"")
    )


HUGE = (2**40).to_bytes(8, "little") + b'{"latents":{}}'


@pytest.mark.parametrize(
    ("path", "files", "data", "status", "message"),
    [
        ("upscale", {"image": b"no picture"}, {}, 400, "image: not a readable image"),
        ("upscale", {"image": png(photo())[:-30]}, {}, 400, "image"),
        ("upscale", {"image": bomb()}, {}, 400, "too large to be opened safely"),
        ("upscale", {"image": png(Image.new("RGB", (600, 600)))}, {}, 413, "2400 x 2400 px would be made, more than"),
        ("upscale", {"image": png(Image.new("RGB", (8, 8)))}, {}, 400, "at least 16 x 16 pixels, got 8 x 8"),
        ("upscale", {"image": png(photo())}, {"colour": "red"}, 422, "unknown field colour"),
        ("upscale", {"image": png(photo())}, {"sigma": "nan"}, 422, "sigma: "),
        ("upscale", {"image": png(photo())}, {"seed": -1}, 422, "seed: Input should be greater than or equal to 0"),
        ("upscale", {"image": png(photo())}, {"steps": "many"}, 422, "steps: Input should be a valid integer"),
        ("upscale", {"image": png(photo())}, {"decoder": "../.."}, 404, 'no decoder "../.."'),
        ("upscale", {}, {"sigma": 0}, 422, "image: Field required"),
        ("upscale", {"image": b""}, {}, 422, "image: Data should have at least 1 byte"),
        ("decode", {"latents": ("z.safetensors", held(latents(0)))}, {"latent_space": "rgb"}, 400, "no latent space"),
        ("decode", {"latents": ("z.zip", b"123")}, {}, 400, "expected one that ends in .safetensors"),
        ("decode", {"latents": ("../../z.safetensors", HUGE)}, {}, 400, "latents.safetensors: not a readable file"),
        ("decode", {"latents": ("z.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, "
          b"'shape': (99999, 99999, 999), }".ljust(126) + b"\n")}, {}, 400, "latents.npy: not a readable array"),
        ("decode", {"latents": ("z.pt", b"cos\nsystem\n(S'true'\ntR.")}, {}, 400, "latents.pt: "),
        ("decode", {"latents": ("z.safetensors", held(torch.zeros(4, 2, 2)))}, {}, 400, "expected latents"),
        ("decode", {"latents": ("z.safetensors", held(torch.zeros(2, 16, 2, 2)))}, {}, 400, "one by one"),
        ("decode", {"latents": ("z.safetensors", held(torch.full((16, 2, 2), torch.nan)))}, {}, 400, "finite"),
    ],
)  # fmt: skip
def test_bad_input(client, path, files, data, status, message):
    response = client.post(f"/v1/{path}", files=files, data=data) if files else client.post(f"/v1/{path}", data=data)
    assert message in told(response, status)
    assert client.get("/readyz").status_code == 200


def test_a_fault_of_ours_is_told_without_its_text():
    """And leaves the connection to the next request."""
    tiny = tiny_pipeline()
    said = ["a secret of /home/me", "CUDA out of memory. Tried to allocate 2 GiB"]

    def fail(*args):
        raise RuntimeError(said[0])

    with serving(tiny) as client:
        hook = tiny.transformer.register_forward_pre_hook(fail)
        given = dict(files={"image": png(photo())}, data={"steps": 1})
        assert (
            told(client.post("/v1/upscale", **given), 500)
            == "something is wrong in the server, which has written it down"
        )
        said.pop(0)
        full = client.post("/v1/upscale", **given)
        assert told(full, 503) == "out of memory: try a smaller image, or later" and full.headers["retry-after"]
        hook.remove()
        assert client.post("/v1/upscale", **given).status_code == 200


def test_a_body_that_is_shorter_than_its_head_says(client):
    """The server waits neither for what does not come, nor calls it a fault of its own that a client left."""
    for length, status in (10**15, b"413"), (1000, b""):
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=30) as one:
            head = f"POST /v1/upscale HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}"
            one.sendall(head.encode() + b"\r\n\r\n{")
            if status:
                assert one.recv(1000).split()[1] == status
    line = 'pixeldecoder_requests_total{method="POST",route="/v1/upscale",status="499"}'
    until = time.monotonic() + 30
    while line not in (counts := client.get("/metrics").text) and time.monotonic() < until:
        time.sleep(0.05)
    assert line in counts and 'status="500"' not in counts


def test_pages_that_are_open_take_no_place_from_requests():
    gate = Gate(tiny := tiny_pipeline())
    with serving(tiny, queue_size=1, max_batch=1) as client:
        body = {"image": base64.b64encode(png(photo())).decode(), "background": True, "steps": 1}
        job = client.post("/v1/upscale", json=body).headers["location"]
        assert gate.entered.wait(60)
        with contextlib.ExitStack() as stack:
            for _ in range(6):  # more than twice of what may wait and run
                stack.enter_context(client.stream("GET", job + "/events"))
            assert client.post("/v1/upscale", json=body).status_code == 202
            gate.opened.set()


def test_bad_bodies(client):
    headers = {"Content-Type": "application/json"}
    for content in b"{", b"[1]", b'{"image": "?"}', b"[" * 100_000, b'{"image": 1}', b"\xff":
        response = client.post("/v1/upscale", content=content, headers=headers)
        assert response.status_code in (400, 422) and told(response, response.status_code)
    assert "expected multipart/form-data" in told(client.post("/v1/upscale", content=b"x"), 415)
    assert told(client.post("/v1/upscale", content=b"x", headers={"Content-Type": "multipart/form-data"}), 400)
    assert "no such path: /v1/nothing" in told(client.get("/v1/nothing"), 404)
    assert "/v1/upscale takes no GET" in told(client.get("/v1/upscale"), 405)
    assert "takes no DELETE" in told(client.delete("/decode"), 405)


def test_the_page_of_openapi_needs_no_network(client):
    page = client.get("/docs")
    assert page.status_code == 200 and not re.search(r"(src|href)=\"(https?:)?//", page.text)
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/decode", "/encode", "/v1/decode", "/v1/upscale", "/v1/images/edits"} <= set(paths)


# The command


def test_the_end_in_order(pipeline, tmp_path):
    """What was taken is done, what is new is refused, and then the server leaves."""
    pipeline.save_pretrained(tmp_path / "tiny")
    with command("--dtype", "float32", "--device", "cpu", "--decoder", f"{tmp_path}/tiny") as (process, url):
        assert url.startswith("http://127.0.0.1:")
        with httpx.Client(base_url=url, timeout=60) as client:
            body = {"image": base64.b64encode(png(photo((96, 96)))).decode(), "background": True}
            jobs = [client.post("/v1/upscale", json=body | {"seed": seed}).headers["location"] for seed in range(3)]
            process.send_signal(signal.SIGTERM)
            until = time.monotonic() + 30
            while client.get("/readyz").status_code != 503 and time.monotonic() < until:
                time.sleep(0.01)
            assert client.get("/healthz").status_code == 200
            refused = client.post("/v1/upscale", json=body)
            assert "being closed" in told(refused, 503) and refused.headers["retry-after"]
            for job in jobs:
                with client.stream("GET", job + "/events") as stream:
                    assert events(stream.iter_lines())[-1][0] == "done"
                assert opened(client.get(job + "/result").content).size == (384, 384)
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGTERM) and "Traceback" not in errors, errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--port", "99999"], "--port 99999: expected 0 to 65535"),
        (["--max-bytes", "much"], "--max-bytes: much: expected bytes"),
        (["--deadline", "0"], "--deadline 0"),
        (["--queue-size", "0"], "--queue-size 0: expected at least 1"),
        (["--decoder", "nano", "other"], 'no decoder "other"'),
        (["--host", "203.0.113.1"], "--host 203.0.113.1 --port 8000: cannot be listened at"),
    ],
)
def test_bad_options(args, message, capsys):
    assert main(["serve", *args]) == 2
    assert message in capsys.readouterr().err
