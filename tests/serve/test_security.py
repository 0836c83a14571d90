"""Clients that mean no good, on a real server: what they get, and that others are served meanwhile."""

import json
import re
import resource
import socket
from pathlib import Path

import httpx
import pytest
from safetensors.torch import save

from pixeldecoder.serve import http
from pixeldecoder.serve.service import Settings
from serving import flux_pipeline, latents, serving

TOKEN = "a-secret-of-this-server"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def client():
    with serving(flux_pipeline(), settings=Settings(token=TOKEN, max_bytes=100_000), max_pixels=256 * 256) as client:
        yield client


def connect(client: httpx.Client, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)
    connection.sendall(sent)
    return connection


def is_served(client: httpx.Client) -> bool:
    """Whether another client gets an image."""
    files = {"latents": ("z.safetensors", save({"latents": latents(0)}))}
    answer = client.post("/v1/decode", files=files, data={"steps": "1"}, headers=BEARER)
    return answer.status_code == 200 and answer.content.startswith(b"\x89PNG")


def head(length: int) -> bytes:
    lines = (
        f"POST /v1/decode HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    )
    return f"{lines}Content-Length: {length}\r\n\r\n".encode()


def test_a_thousand_idle_connections(client):
    needed, (soft, hard) = 4096, resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard), hard))
    idle = [connect(client) for _ in range(1000)]
    try:
        assert is_served(client)
    finally:
        for connection in idle:
            connection.close()
    assert is_served(client)


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/dec", head(1000), head(1000) + b'{"latents":', b"\x16\x03\x01\0\xff", b"\0" * 99]
)
def test_half_a_request_and_half_a_connection(sent, client):
    """A client that stops in the middle, or closes its way out, holds nobody up, and leaves nothing behind."""
    waiting, closed = connect(client, sent), connect(client, sent)
    closed.shutdown(socket.SHUT_WR)
    assert is_served(client)
    said = closed.recv(65536) if sent else b""
    assert b"Traceback" not in said and TOKEN.encode() not in said
    waiting.close()
    closed.close()
    assert client.engine.waiting == client.engine.running == 0


def test_a_body_that_trickles(client, monkeypatch):
    """It is given up, as each that is on its way takes a place."""
    monkeypatch.setattr(http, "BODY_SECONDS", 0.5)
    connection = connect(client, head(1000) + b"{")
    said = connection.recv(65536)
    assert said.startswith(b"HTTP/1.1 408 ") and b"slower than 16384 bytes a second" in said
    connection.close()
    assert is_served(client)


@pytest.mark.parametrize("size", [70_000, 5_000_000])
def test_large_heads(size, client):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    connection = connect(client)
    try:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * size + b"\r\n\r\n")
        status = int(connection.recv(65536).split()[1])
    except OSError:  # it was hung up
        status = 431
    connection.close()
    assert status in (200, 400, 431) and is_served(client)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_large_bodies(client):
    """Told by their heads, or counted as they come."""
    assert client.post("/v1/decode", content=b"a" * 200_000, headers=BEARER).status_code == 413
    pieces = (b"a" * 50_000 for _ in range(6))
    kind = {"Content-Type": "application/json"}
    assert client.post("/v1/decode", content=pieces, headers=BEARER | kind).status_code == 413


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static-offline-docs/../../etc/passwd",
        "/static-offline-docs/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/v1/models/../../etc/passwd",
        "/v1/models/%2fetc%2fpasswd", "/v1/jobs/..%2f..%2fetc%2fpasswd/result", "//etc/passwd",
        "/page/../../etc/passwd",
    ],
)  # fmt: skip
def test_no_file_of_the_machine(path, client):
    connection = connect(client, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode())
    connection.sendall(f"Authorization: Bearer {TOKEN}\r\n\r\n".encode())
    said = b""
    while piece := connection.recv(65536):
        said += piece
    connection.close()
    assert said.split()[1] in (b"404", b"400") and b"root:" not in said


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer x", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}"]
)
def test_no_token(given, client):
    """Not in a message, either; compared in constant time."""
    answer = client.get("/v1/models", headers={"Authorization": given})
    assert answer.status_code == 401 and TOKEN not in answer.text
    assert re.search(r"hmac\.compare_digest", Path(http.__file__).read_text())


def test_faults_tell_nothing_of_the_inside():
    """Neither at once nor by a job: no path, no class, no text of an exception that is no answer."""
    pipeline = flux_pipeline()

    def fail(*args):
        raise RuntimeError("cannot read /srv/secret/weights.bin")

    pipeline.transformer.register_forward_pre_hook(fail)
    with serving(pipeline) as client:
        client.headers["Connection"] = "close"
        files = {"latents": ("z.safetensors", save({"latents": latents(0)}))}
        answers = [client.post("/v1/decode", files=files)]
        job = client.post("/v1/decode", files=files, data={"background": "true"}).json()["id"]
        told = client.get(f"/v1/jobs/{job}/events").text
        answers += [client.get(f"/v1/jobs/{job}/result")]
        status = client.get(f"/v1/jobs/{job}").json()
    assert [answer.status_code for answer in answers] == [500, 500]
    assert status["status"] == "failed" and "written it down" in status["error"]["message"]
    for text in (told, json.dumps(status), *(answer.text for answer in answers)):
        assert "secret" not in text and "RuntimeError" not in text


@pytest.mark.parametrize("target", [b"/x?\xe7\xff", b"/" + b"x" * 9000, b"/v1/jobs/" + b"x" * 9000, b"/v1/jobs?\xff"])
def test_messages_that_cite_what_was_sent(target, client):
    """Whatever its bytes, and no more of it than anyone reads."""
    bearer = f"Authorization: Bearer {TOKEN}".encode()
    connection = connect(
        client, b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + bearer + b"\r\n\r\n"
    )
    said = b""
    while piece := connection.recv(65536):
        said += piece
    connection.close()
    assert said.split()[1] in (b"400", b"404", b"405") and len(said) < 3000
