"""An engine in, an ASGI app out, and a server of it: routes, limits, token, errors as JSON, counts, an orderly end."""

import asyncio
import base64
import binascii
import functools
import hmac
import logging
import queue
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixeldecoder import __version__
from pixeldecoder.errors import LONGEST
from pixeldecoder.serve import api, remote
from pixeldecoder.serve.engine import Engine
from pixeldecoder.serve.jobs import ClosedError, TooLargeError
from pixeldecoder.serve.service import LEFT, Service, Settings, told

logger = logging.getLogger(__name__)

DEFAULTS = Settings()
OPEN = ("/healthz", "/readyz")
"""Paths that need no token."""
SWALLOWED = 8
"""Times the largest body that is read, and thrown away, so that a client that sends too much can read the answer."""
PATIENCE = 2.0
"""Seconds for the next piece of such a body, which may be shorter than its head says."""
BODY_SECONDS, BODY_RATE = 30.0, 16384
"""That a body may take to come: seconds, and for what has come one more for each so many bytes; a request that has not
come yet takes a place from others."""
DRAIN_SECONDS = 3.0
"""After the last job, in which its client may fetch the result."""
EXAMPLES = """Pictures and latents in, pictures 4 or 8 times larger out.

Errors are JSON, `{"error": {"message", "type", "code"}}`."""


def create_app(
    engine: Engine, settings: Settings = DEFAULTS, page: Callable[[FastAPI, Service], FastAPI] | None = None
) -> FastAPI:
    """The server of an engine, which is closed with it.

    Args:
        settings: what it allows.
        page: mounts a web page.
    """
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close, drain=False)

    app: Any = FastAPIOffline(title="pixeldecoder", version=__version__, description=EXAMPLES, lifespan=lifespan)
    app.state.service = service
    counts = Counts(engine)
    app.include_router(remote.routes(service))
    app.include_router(api.routes(service))

    @app.get("/healthz", tags=["state"])
    async def healthz() -> dict[str, str]:
        """Whether the process is to be left alone."""
        if not engine.alive:
            raise HTTPException(500, "the engine has stopped")
        return {"status": "ok"}

    @app.get("/readyz", tags=["state"])
    async def readyz() -> dict[str, str]:
        """Whether it takes requests."""
        if service.draining or engine.closed:
            raise ClosedError("the server is being closed: no more requests are taken")
        return {"status": "ready"}

    @app.get("/metrics", tags=["state"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(counts.registry), media_type=CONTENT_TYPE_LATEST)

    for kind, status in ERRORS:
        app.add_exception_handler(kind, _handler(service, status))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    _document_errors(app)
    app.add_middleware(Guard, service=service, counts=counts, paths=tuple(app.openapi()["paths"]))
    if page is not None:
        for path in "/", "/favicon.ico", "/manifest.json":  # gradio asks for the last two at the root
            app.router.add_route(path, functools.partial(_to_page, path), include_in_schema=False)
        app = page(app, service)
    return app


ERRORS: tuple[tuple[type[Exception], int], ...] = (
    (ValueError, 400),
    (TooLargeError, 413),
    (queue.Full, 429),
    (ClosedError, 503),
    (TimeoutError, 503),
    (ClientDisconnect, LEFT),
)


def error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """In OpenAI's form."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return JSONResponse({"error": {"message": message[:LONGEST], "type": kind, "code": status}}, status, headers)


def _to_page(path: str, http: HttpRequest) -> RedirectResponse:
    return RedirectResponse(f"/page{path}")


def _handler(service: Service, status: int) -> Callable[[HttpRequest, Exception], JSONResponse]:
    def handle(http: HttpRequest, raised: Exception) -> JSONResponse:
        headers = {"Retry-After": str(service.retry_after())} if status in (429, 503) else None
        text = told(raised)
        if status == 500 and text.startswith("out of memory"):
            return error(503, text, {"Retry-After": "10"})
        return error(status, text, headers)

    return handle


def _invalid(http: HttpRequest, raised: Any) -> JSONResponse:
    told = []
    for one in raised.errors():
        name = ".".join(str(part) for part in one["loc"] if part not in ("query", "body", "path")) or "the request"
        told.append("unknown field " + name if one["type"] == "extra_forbidden" else f"{name}: {one['msg']}")
    return error(422, "; ".join(told))


def _http_error(http: HttpRequest, raised: Any) -> JSONResponse:
    text, headers = raised.detail, raised.headers
    if (raised.status_code, text) == (404, "Not Found"):
        text = f"no such path: {http.scope['path']}; see /docs"
    elif (raised.status_code, text) == (405, "Method Not Allowed"):
        text = f"{http.scope['path']} takes no {http.method}"
        matching = [
            methods for path, methods in http.app.openapi()["paths"].items() if _matches(path, http.scope["path"])
        ]
        headers = {"Allow": ", ".join(sorted(method.upper() for methods in matching for method in methods))}
    return error(raised.status_code, text, headers)


def _matches(template: str, path: str) -> bool:
    return _pattern(template).match(path) is not None


@functools.cache
def _pattern(template: str) -> re.Pattern:
    return compile_path(template)[0]


def _document_errors(app: FastAPI) -> None:
    """On the OpenAPI page, which is made once."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = made()
            members = {"message": {"type": "string"}, "type": {"type": "string"}, "code": {"type": "integer"}}
            shape = {"type": "object", "properties": {"error": {"type": "object", "properties": members}}}
            content = {"application/json": {"schema": shape | {"required": ["error"]}}}
            for operations in schema["paths"].values():
                for operation in operations.values():
                    for status in (400, 401, 404, 409, 413, 415, 422, 429, 500, 503):
                        operation["responses"][str(status)] = {"description": "An error.", "content": content}
        return app.openapi_schema  # type: ignore[return-value]

    app.openapi = openapi  # type: ignore[method-assign]


class Guard:
    """Before every route: the token, the size of bodies, and room for the request; after it: counts."""

    def __init__(self, app: ASGIApp, service: Service, counts: "Counts", paths: tuple[str, ...]):
        self.app, self.service, self.counts, self.paths, self.busy = app, service, counts, paths, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket" and not self._allowed(scope):
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        begun, status, read, started, coming = time.monotonic(), 500, 0, False, True
        limit = self.service.settings.max_bytes
        headers = dict(scope["headers"])

        async def counting() -> Message:
            nonlocal read, coming
            allowed = begun + BODY_SECONDS + read / BODY_RATE - time.monotonic()
            try:
                message = await (asyncio.wait_for(receive(), max(0.0, allowed)) if coming else receive())
            except TimeoutError:
                raise HTTPException(408, f"a body slower than {BODY_RATE} bytes a second") from None
            coming = bool(message.get("more_body"))
            read += len(message.get("body", b""))
            if read > limit:
                await _swallow(receive, message, SWALLOWED * limit)
                raise HTTPException(413, f"a body of more than {limit} bytes, which is the most that is taken here")
            return message

        async def noting(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
            await send(message)

        posted = scope["method"] == "POST" and not scope["path"].startswith("/page")
        self.busy += posted
        try:
            response = self._refuse(scope, headers, limit, posted)
            if response is not None:
                if response.status_code == 413:
                    await _swallow(receive, {"more_body": True}, SWALLOWED * limit)
                await response(scope, receive, noting)
            else:
                await self.app(scope, counting, noting)
        except (
            Exception
        ) as raised:  # here, as what uvicorn sees of it ends the connection, and the next request with it
            if started:
                raise
            logger.error("a fault of ours", exc_info=raised)
            await _handler(self.service, 500)(HttpRequest(scope), raised)(scope, receive, noting)
        finally:
            self.busy -= posted
            other = "page" if scope["path"].startswith("/page") else "other"
            route = next((path for path in self.paths if _matches(path, scope["path"])), other)
            self.counts.note(scope["method"], route, status, time.monotonic() - begun)

    def _refuse(self, scope: Scope, headers: dict[bytes, bytes], limit: int, posted: bool) -> Response | None:
        engine = self.service.engine
        if not self._allowed(scope):
            told = {"WWW-Authenticate": 'Basic realm="pixeldecoder", Bearer'}
            return error(401, "a token is wanted: Authorization: Bearer TOKEN, or Basic with it as the password", told)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            return error(413, f"a body of {int(length)} bytes: at most {limit} are taken here")
        if posted:
            waits = engine.waiting >= engine.queue_size
            # Bodies are held from when they are read: not many more than can wait.
            if waits or self.busy > 2 * (engine.queue_size + engine.max_batch):
                text = f"{engine.queue_size} requests wait already: try again later"
                return error(429, text, {"Retry-After": str(self.service.retry_after())})
        return None

    def _allowed(self, scope: Scope) -> bool:
        token = self.service.settings.token
        if token is None or scope["path"] in OPEN:
            return True
        kind, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif kind.lower() != b"bearer":
            return False
        return hmac.compare_digest(given.strip(), token.encode())


async def _swallow(receive: Receive, message: Message, most: int) -> None:
    """What is still on its way, unless it does not come."""
    with suppress(TimeoutError):
        while message.get("more_body") and most > 0:
            message = await asyncio.wait_for(receive(), PATIENCE)
            most -= len(message.get("body", b""))


class Counts(Collector):
    """What /metrics tells."""

    def __init__(self, engine: Engine):
        self.engine, self.registry = engine, CollectorRegistry()
        names = ("method", "route", "status")
        self.requests = Counter("pixeldecoder_requests", "Requests.", names, registry=self.registry)
        self.seconds = Histogram(
            "pixeldecoder_request_seconds", "From a request's first byte to its response's last.", ("route",),
            registry=self.registry, buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
        )  # fmt: skip
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def note(self, method: str, route: str, status: int, seconds: float) -> None:
        self.requests.labels(method, route, status).inc()
        self.seconds.labels(route).observe(seconds)

    def collect(self) -> Iterator[Any]:
        yield GaugeMetricFamily("pixeldecoder_queue_waiting", "Requests that wait.", self.engine.waiting)
        yield GaugeMetricFamily("pixeldecoder_queue_size", "Requests that may wait.", self.engine.queue_size)
        yield GaugeMetricFamily("pixeldecoder_running", "Requests on the device.", self.engine.running)
        batches = CounterMetricFamily("pixeldecoder_batches", "Batches, by their number of images.", labels=["images"])
        for images, count in sorted(self.engine.batches.items()):
            batches.add_metric([str(images)], count)
        yield batches


class Server(uvicorn.Server):
    """Ends in order at SIGTERM: refuses what is new, does what waits, gives clients time to fetch it, and leaves. At a
    second signal it leaves at once."""

    def __init__(self, app: FastAPI, drain: float = 60.0):
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", server_header=False, timeout_keep_alive=30, timeout_graceful_shutdown=5
            )
        )
        self.service, self.drain = app.state.service, drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leaving: asyncio.Task | None = None

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for server in self.servers:
            for one in server.sockets:
                host, port = one.getsockname()[:2]
                print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    def handle_exit(self, sig: int, frame: Any) -> None:
        loop = self._loop
        if self.service.draining or loop is None:
            super().handle_exit(sig, frame)
            return
        self.service.draining = True

        async def leave() -> None:
            try:
                await asyncio.wait_for(self.service.drain(), self.drain)
                if self.service.jobs:
                    await asyncio.sleep(DRAIN_SECONDS)
            except TimeoutError:
                logger.warning(f"not all was done within {self.drain:g} seconds")
            super(Server, self).handle_exit(sig, frame)

        def start() -> None:
            self._leaving = loop.create_task(leave())

        loop.call_soon_threadsafe(start)  # this is a signal's handler
