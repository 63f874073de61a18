"""The HTTP interface: routes, the one shape of errors, health and metrics."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from nemo_advrm import __version__
from nemo_advrm.serve import kserve
from nemo_advrm.serve.batcher import Busy, Unavailable
from nemo_advrm.serve.bounds import TooLarge, Unreadable, parse_json, parse_length
from nemo_advrm.serve.guard import Guard
from nemo_advrm.serve.metrics import Metrics
from nemo_advrm.serve.pending import PendingBytes
from nemo_advrm.serve.samples import Refused, Sample
from nemo_advrm.serve.schemas import (
    Classification,
    ClassifyAnswer,
    Embedding,
    EmbeddingAnswer,
    ErrorAnswer,
    Info,
    OpenRLHFAnswer,
    OpenRLHFRequest,
    PoolingRequest,
    ScoreAnswer,
    ScoreRequest,
    Status,
)
from nemo_advrm.serve.service import Service

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "the body cannot be read"},
    401: {"model": ErrorAnswer, "description": "the bearer token is missing or wrong"},
    408: {"model": ErrorAnswer, "description": "the body did not arrive in time"},
    413: {"model": ErrorAnswer, "description": "the request is too large, or has too many samples"},
    415: {"model": ErrorAnswer, "description": "the content type is not application/json"},
    422: {"model": ErrorAnswer, "description": "the request cannot be scored"},
    429: {"model": ErrorAnswer, "description": "too much is waiting; Retry-After says for how long to wait"},
    503: {"model": ErrorAnswer, "description": "no scores can be given now"},
}
# what scoring raises, and its status
FAULTS: dict[type[Exception], int] = {
    kserve.BadTensors: 400,
    Unreadable: 400,
    TooLarge: 413,
    Refused: 422,
    Busy: 429,
    Unavailable: 503,
}
_MESSAGE = 500  # characters of an error's message: it may quote the request
_GUARDED: dict[int | str, dict[str, Any]] = {status: _ERRORS[status] for status in (401, 503)}


def create_app(service: Service, metrics: Metrics, token: str) -> FastAPI:
    """The application; its documentation is at ``/docs``, the OpenAPI document at ``/openapi.json``."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await service.batcher.stop()

    app = FastAPI(
        title="nemo_advrm reward server",
        version=__version__,
        description="Scores responses with a reward model or an ensemble; higher is better.",
        lifespan=lifespan,
    )
    app.state.service = service
    app.router.route_class = _counted(service)
    app.add_middleware(
        Guard,  # type: ignore[arg-type]
        metrics=metrics,
        token=token,
        max_body=int(service.options.max_body_mib * 2**20),
        body_seconds=service.options.body_seconds,
        pending=PendingBytes(int(service.options.max_pending_mib * 2**20)),
        draining=lambda: service.draining,
    )
    _add_errors(app)
    _add_health(app, service, metrics)
    _add_json(app, service)
    _add_kserve(app, service)
    return app


def _counted(service: Service) -> type[APIRoute]:
    """Routes whose body is counted and read in a thread before it is validated."""

    class CountedRequest(Request):
        async def json(self) -> Any:
            try:
                return await service.in_thread(parse_json, await self.body(), service.bounds)
            except (TooLarge, Unreadable) as error:  # FastAPI has one word for all others
                raise HTTPException(FAULTS[type(error)], str(error)) from None

    class CountedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def counted(request: Request) -> Response:
                return await handle(CountedRequest(request.scope, request.receive))

            return counted

    return CountedRoute


def _error(status: int, message: str, **headers: str) -> Response:
    # ASCII: a message may quote text that UTF-8 cannot carry
    content = json.dumps({"error": message if len(message) <= _MESSAGE else f"{message[:_MESSAGE]}.."})
    return Response(content, status, {name.replace("_", "-"): v for name, v in headers.items()}, "application/json")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return _error(422, f"{place}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def known(_: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail), **(error.headers or {}))

    async def fault(_: Request, error: Exception) -> Response:
        wait = {Busy: getattr(error, "retry_after", 1), Unavailable: 1}.get(type(error))
        return _error(FAULTS[type(error)], str(error), **({} if wait is None else {"Retry_After": str(wait)}))

    for kind in FAULTS:
        app.add_exception_handler(kind, fault)


def _add_health(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/health/live", tags=["health"])
    async def live() -> Status:
        """The process answers."""
        return Status(status="live")

    @app.get("/health/ready", tags=["health"], responses={503: _ERRORS[503]}, response_model=Status)
    async def ready() -> Status | Response:
        """Requests are scored; 503 while the server drains."""
        return Status(status="ready") if service.ready else _error(503, service.unready_because, Retry_After="5")

    @app.get("/metrics", tags=["health"], include_in_schema=False)
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/info", tags=["scores"], responses=_GUARDED)
    async def info() -> Info:
        preparer = service.preparer
        return Info(
            model=service.options.name,
            reward=service.reward,
            members=list(service.members),
            tokenizer=preparer.fingerprint if preparer.takes_tokens else None,
            prompt_lengths=True,
            max_samples=service.options.max_samples,
            version=__version__,
        )


def _add_json(app: FastAPI, service: Service) -> None:
    @app.post("/v1/score", tags=["scores"], responses=_ERRORS)
    async def score(request: ScoreRequest) -> ScoreAnswer:
        """Score conversations given as messages, as text or as tokens."""
        scored = await service.score([sample.sample() for sample in request.samples])
        return ScoreAnswer(
            model=service.options.name,
            scores=[s.reward for s in scored],
            members=[s.members for s in scored] if request.members else None,
        )

    @app.post("/get_reward", tags=["other frameworks"], responses=_ERRORS)
    async def openrlhf(request: OpenRLHFRequest) -> OpenRLHFAnswer:
        """OpenRLHF's `--remote_rm_url`."""
        scored = await service.score([Sample("text", response=text) for text in request.query])
        rewards = [s.reward for s in scored]
        return OpenRLHFAnswer(rewards=rewards, scores=rewards)

    @app.post("/classify", tags=["other frameworks"], responses=_ERRORS)
    async def classify(request: PoolingRequest) -> ClassifyAnswer:
        """vLLM's classification interface, as verl asks it."""
        samples = request.samples()
        scored = await service.score(samples)
        return ClassifyAnswer(
            id=f"classify-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=service.options.name,
            data=[Classification(index=i, probs=[s.reward]) for i, s in enumerate(scored)],
            usage=service.usage(samples),
        )

    @app.post("/v1/embeddings", tags=["other frameworks"], responses=_ERRORS)
    async def embeddings(request: PoolingRequest) -> EmbeddingAnswer:
        """SGLang's way to ask a reward model, as verl does: the embedding has one number, the reward."""
        samples = request.samples()
        scored = await service.score(samples)
        data = [Embedding(index=i, embedding=[s.reward]) for i, s in enumerate(scored)]
        return EmbeddingAnswer(model=service.options.name, data=data, usage=service.usage(samples))


def _add_kserve(app: FastAPI, service: Service) -> None:
    name, limit = service.options.name, service.options.max_samples
    missing = {**_GUARDED, 404: {"model": ErrorAnswer, "description": "there is no such model"}}

    def check(model: str, version: str = "1") -> None:
        if model != name or version != "1":
            raise HTTPException(404, f"there is no model {model} of version {version}; it is {name}, version 1")

    @app.get("/v2", tags=["KServe v2"], responses=_GUARDED)
    async def server() -> dict[str, Any]:
        return {"name": "nemo_advrm", "version": __version__, "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live", tags=["KServe v2"])
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", tags=["KServe v2"], responses={503: _ERRORS[503]}, response_model=None)
    async def ready() -> Response:
        return _ready(service)

    for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        shown = prefix.endswith("{model}")

        @app.get(prefix, tags=["KServe v2"], responses=missing, include_in_schema=shown)
        async def metadata(model: str, version: str = "1") -> dict[str, Any]:
            check(model, version)
            return kserve.metadata(name)

        @app.get(f"{prefix}/ready", tags=["KServe v2"], responses=missing, include_in_schema=shown, response_model=None)
        async def model_ready(model: str, version: str = "1") -> Response:
            check(model, version)
            return _ready(service)

        @app.get(f"{prefix}/config", tags=["KServe v2"], responses=missing, include_in_schema=shown)
        async def config(model: str, version: str = "1") -> dict[str, Any]:
            check(model, version)
            return kserve.configuration(name, limit)

        @app.post(f"{prefix}/infer", tags=["KServe v2"], include_in_schema=False)
        async def infer(request: Request, model: str, version: str = "1") -> Response:
            check(model, version)
            length = request.headers.get(kserve.HEADER_LENGTH)
            split = None if length is None else parse_length(length, kserve.HEADER_LENGTH)
            wanted = await service.in_thread(kserve.read_request, await request.body(), split, service.bounds)
            scored = await service.score(wanted.samples)
            content, headers = kserve.write_answer(name, wanted, [s.reward for s in scored])
            return Response(content, headers=headers)


def _ready(service: Service) -> Response:
    if service.ready:
        return Response("{}", media_type="application/json")
    return _error(503, service.unready_because, Retry_After="5")
