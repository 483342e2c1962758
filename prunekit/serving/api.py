"""The HTTP API: OpenAI's image generation over any backend, with its errors, limits, health and metrics."""

import asyncio
import contextlib
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prunekit.runtime.errors import UserError
from prunekit.serving.backend import Backend, DrawingError, Drawn, Job, Refused
from prunekit.serving.limits import MOST_SEED, ServerSettings
from prunekit.serving.observing import Metrics
from prunekit.serving.openai_types import (
    ErrorResponse,
    GenerationRequest,
    ImageData,
    ImagesResponse,
    Model,
    ModelList,
    encoded,
    fault_of,
    request_model,
)
from prunekit.serving.routed_call import DEFAULT_STEPS

GENERATIONS = "/v1/images/generations"
PATHS = (GENERATIONS, "/v1/models", "/health", "/metrics", "/openapi.json", "/")
RANDOM_SEEDS = 2**32  # random seeds are below this number, which every JSON reader reads exactly
CLIENT_GONE = 499  # nginx's status for a client that has left; no client receives it
T = TypeVar("T")
log = logging.getLogger(__name__)


class ApiError(Exception):
    """An error in the form of OpenAI's API.

    headers: headers of the response, with "_" in the place of "-".
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        kind = "authentication_error" if status == 401 else "invalid_request_error" if status < 500 else "server_error"
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def answer(self) -> JSONResponse:
        """Return the error as an HTTP response."""
        return JSONResponse(self.content, self.status, self.headers)


def build(backend: Backend, settings: ServerSettings) -> ASGIApp:
    """Return the ASGI application. Its lifespan starts the backend; the server that runs it must drain the backend."""
    metrics, created = Metrics(backend), int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await backend.start()
        yield

    failures: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 500, 503, 504)
    }
    app = FastAPI(title="prunekit", lifespan=lifespan, docs_url=None, redoc_url=None, responses=failures)
    _add_error_handlers(app)

    async def generate(request: Request, asked: GenerationRequest) -> ImagesResponse:
        """Draw images of a prompt, each by the expert that the router chooses."""
        started = time.perf_counter()
        _check_model(asked.model, backend)
        job = _job(asked, backend, settings)
        drawn = await _unless_gone(request, backend.draw(job), settings.request_seconds)
        metrics.drawn(drawn)
        answer = await _response(asked, job, drawn)
        metrics.latency.observe(time.perf_counter() - started)
        return answer

    generate.__annotations__["asked"] = request_model(settings.limits)
    app.post(GENERATIONS)(generate)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """List the model that is served."""
        return ModelList(data=[Model(id=backend.served.name, created=created)])

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Model:
        """Return the model that is served."""
        _check_model(model, backend)
        return Model(id=backend.served.name, created=created)

    @app.get("/health", responses={503: {"model": None}})
    async def health() -> JSONResponse:
        """Return the server's state, the number of waiting images and the running batches; status 503 if not ready."""
        load = backend.load()
        running = [vars(batch) for batch in load.running]
        content = {"status": backend.state(), "waiting": load.waiting, "running": running}
        return JSONResponse(content, 200 if backend.ready() else 503)

    @app.get("/metrics", response_class=Response)
    async def measured() -> Response:
        """Return counters in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    async def index() -> dict[str, str | list[str]]:
        """Name the model and the paths."""
        return {"model": backend.served.name, "paths": list(PATHS)}

    return Gate(app, settings, metrics)


class Gate:
    """ASGI middleware for every request: it checks the API key, limits the size of the body, and counts responses."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics):
        self.app, self.metrics, self.most = app, metrics, settings.limits.body
        self.key = None if settings.api_key is None else f"Bearer {settings.api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it with 401 or 413."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, length = str(scope["path"]), 0
        shown = path if path in PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(shown, message["status"]).inc()
            await send(message)

        async def limited() -> Message:
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > self.most:
                raise HTTPException(413)
            return message

        headers = dict(scope["headers"])
        given, declared = headers.get(b"authorization", b""), headers.get(b"content-length", b"0")
        if self.key is not None and path.startswith("/v1/") and not hmac.compare_digest(given, self.key):
            error = ApiError(401, "the API key is missing or wrong: send it as a bearer token", None, "invalid_api_key")
            return await error.answer()(scope, receive, counted)
        if declared.isdigit() and int(declared[:20]) > self.most:
            return await _too_large(self.most).answer()(scope, receive, counted)
        return await self.app(scope, limited, counted)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is too large: at most {most:,} bytes")


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return error.answer()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return ApiError(400, *fault_of(error.errors())).answer()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        message = {404: f"there is no {request.url.path} here", 413: "the body is too large"}.get(
            error.status_code, str(error.detail)
        )
        answer = ApiError(error.status_code, message).answer()
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(UserError)
    async def faulty(request: Request, error: UserError) -> Response:
        name, is_value, _ = str(error).partition("=")
        known = is_value and name in GenerationRequest.model_fields
        return ApiError(400, str(error), name if known else None).answer()

    @app.exception_handler(Refused)
    async def busy(request: Request, error: Refused) -> Response:
        return ApiError(503, error.message, code="overloaded", Retry_After=str(error.retry_after)).answer()

    async def failed(request: Request, error: Exception) -> Response:
        return ApiError(500, "the image could not be drawn; the server's log says why").answer()

    for kind in (DrawingError, Exception):  # logged by the backend, and by uvicorn
        app.add_exception_handler(kind, failed)


def _check_model(name: str | None, backend: Backend) -> None:
    if name is not None and name != backend.served.name:
        text = f"the model {name[:80]!r} is not served here; {backend.served.name!r} is"
        raise ApiError(404, text, "model", "model_not_found")


def _job(asked: GenerationRequest, backend: Backend, settings: ServerSettings) -> Job:
    """Return the job of a request, with defaults for the fields that the request leaves out.

    Raises:
        UserError: the prompt is blank, the seeds are too large, or the size is not allowed.

    """
    count, served = asked.n or 1, backend.served
    if not asked.prompt.strip():
        raise UserError("prompt='': say what the image shows")
    first = secrets.randbelow(RANDOM_SEEDS) if asked.seed is None else asked.seed
    if first + count - 1 > MOST_SEED:
        raise UserError(f"seed={first}: the seeds of {count} images go beyond {MOST_SEED}")
    return Job(
        asked.prompt,
        tuple(range(first, first + count)),
        DEFAULT_STEPS if asked.num_inference_steps is None else asked.num_inference_steps,
        float(served.guidance if asked.guidance_scale is None else asked.guidance_scale),
        asked.pixels(served.size, served.multiple, settings.limits),
        asked.negative_prompt,
    )


async def _response(asked: GenerationRequest, job: Job, drawn: Drawn) -> ImagesResponse:
    kind = asked.output_format or "png"
    texts = await asyncio.gather(
        *(asyncio.to_thread(encoded, picture.image, kind, asked.output_compression) for picture in drawn.pictures)
    )
    data = [
        ImageData(b64_json=text, expert=drawn.expert, macs=picture.macs, seed=picture.seed)
        for text, picture in zip(texts, drawn.pictures, strict=True)
    ]
    height, width = job.size
    return ImagesResponse(created=int(time.time()), data=data, output_format=kind, size=f"{width}x{height}")


async def _unless_gone(request: Request, work: Awaitable[T], seconds: float) -> T:
    """Return the result of work; cancel the work and raise ApiError if the client leaves or `seconds` have passed."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        if tasks[1].done():
            raise ApiError(CLIENT_GONE, "the client left")
        raise ApiError(HTTPStatus.GATEWAY_TIMEOUT, f"not drawn within {seconds:g} s", code="timeout")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
