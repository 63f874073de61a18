"""The HTTP interface: routes, errors, health and metrics."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from nemo_advrm import __version__
from nemo_advrm.serve import kserve
from nemo_advrm.serve.errors import InvalidSample, Unavailable, error_response
from nemo_advrm.serve.limits import parse_json, parse_length
from nemo_advrm.serve.metrics import Metrics
from nemo_advrm.serve.middleware import BEARER, AdmissionMiddleware, PendingBytes
from nemo_advrm.serve.samples import Sample
from nemo_advrm.serve.schemas import (
    Classification,
    ClassifyResponse,
    DetectorScores,
    Embedding,
    EmbeddingResponse,
    ErrorResponse,
    Info,
    OpenRLHFRequest,
    OpenRLHFResponse,
    PoolingRequest,
    ScoreRequest,
    ScoreResponse,
    SlimeRequest,
    Status,
    Usage,
    first_error,
)
from nemo_advrm.serve.service import ScoringService

_STATUSES = {
    400: "the body cannot be read",
    401: "the bearer token is missing or wrong",
    404: "there is no such model",
    408: "the body did not arrive in time",
    413: "the request is too large, or has too many samples",
    415: "the content type is not application/json",
    422: "the request cannot be scored",
    429: "too many requests are waiting; Retry-After says how long to wait",
    503: "no scores can be given now",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error responses for the OpenAPI document."""
    return {status: {"model": ErrorResponse, "description": _STATUSES[status]} for status in statuses}


_SCORING_ERRORS = _errors(400, 401, 408, 413, 415, 422, 429, 503)


def create_app(service: ScoringService, metrics: Metrics, token: str) -> FastAPI:
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
    app.add_middleware(
        AdmissionMiddleware,  # type: ignore[arg-type]
        options=service.options,
        metrics=metrics,
        token=token,
        pending=PendingBytes(int(service.options.max_pending_mib * 2**20)),
        draining=lambda: service.draining,
    )

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return error_response(InvalidSample(first_error(error.errors())))

    app.include_router(_health_routes(service, metrics))
    # the middleware checks the token; this documents it
    secured = [Depends(BEARER)] if token else []
    app.include_router(_json_routes(service), dependencies=secured)
    models = _model_routes(service)
    app.include_router(models, prefix="/v2/models/{model}", dependencies=secured)
    versioned = "/v2/models/{model}/versions/{version}"
    app.include_router(models, prefix=versioned, dependencies=secured, include_in_schema=False)
    return app


def _counting_route(service: ScoringService) -> type[APIRoute]:
    """A route whose JSON is counted and parsed in a thread before Pydantic validates it."""

    class CountedRequest(Request):
        async def json(self) -> Any:
            return await service.in_thread(parse_json, await self.body(), service.limits)

    class CountingRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_counted(request: Request) -> Response:
                return await handle(CountedRequest(request.scope, request.receive))

            return handle_counted

    return CountingRoute


def _check_ready(service: ScoringService) -> None:
    if not service.ready:
        raise Unavailable("the server is stopping", 5)


def _health_routes(service: ScoringService, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health/live", tags=["health"])
    async def live() -> Status:
        """The process answers."""
        return Status(status="live")

    @router.get("/health/ready", tags=["health"], responses=_errors(503))
    async def ready() -> Status:
        """Requests are scored; 503 while the server drains."""
        _check_ready(service)
        return Status(status="ready")

    @router.get("/v2/health/live", tags=["KServe v2"])
    async def kserve_live() -> dict[str, bool]:
        return {"live": True}

    @router.get("/v2/health/ready", tags=["KServe v2"], responses=_errors(503))
    async def kserve_ready() -> dict[str, bool]:
        _check_ready(service)
        return {"ready": True}

    @router.get("/metrics", include_in_schema=False)
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _json_routes(service: ScoringService) -> APIRouter:
    router, name = APIRouter(route_class=_counting_route(service)), service.options.name

    @router.get("/v1/info", tags=["scores"], responses=_errors(401, 503))
    async def info() -> Info:
        preparer = service.preparer
        return Info(
            model=name,
            reward=service.reward,
            members=list(service.members),
            tokenizer=preparer.fingerprint if preparer.takes_tokens else None,
            prompt_lengths=True,
            max_samples=service.options.max_samples,
            version=__version__,
        )

    @router.get("/v2", tags=["KServe v2"], responses=_errors(401, 503))
    async def server() -> dict[str, Any]:
        return {"name": "nemo_advrm", "version": __version__, "extensions": ["binary_tensor_data"]}

    @router.post("/v1/score", tags=["scores"], responses=_SCORING_ERRORS)
    async def score(request: ScoreRequest) -> ScoreResponse:
        """Score conversations given as messages, as text or as tokens."""
        scores = await service.score([sample.sample() for sample in request.samples])
        members = [s.members for s in scores] if request.members else None
        detectors = {
            detector: DetectorScores(
                z=[s.detectors[detector].z for s in scores], beyond=[s.detectors[detector].beyond for s in scores]
            )
            for detector in scores[0].detectors
        }
        rewards = [s.reward for s in scores]
        return ScoreResponse(model=name, scores=rewards, members=members, detectors=detectors or None)

    @router.post("/get_reward", tags=["other frameworks"], responses=_SCORING_ERRORS)
    async def openrlhf(request: OpenRLHFRequest) -> OpenRLHFResponse:
        """OpenRLHF's `--reward.remote_url` (`--remote_rm_url` in older versions)."""
        scores = await service.score([Sample("text", response=text) for text in request.query])
        rewards = [s.reward for s in scores]
        return OpenRLHFResponse(rewards=rewards, scores=rewards)

    @router.post("/remote_rm", tags=["other frameworks"], responses=_SCORING_ERRORS)
    async def slime(request: SlimeRequest) -> float:
        """slime's `--rm-type remote_rm`: one sample; the body of the answer is its reward, a number."""
        return (await service.score([request.sample()]))[0].reward

    @router.post("/classify", tags=["other frameworks"], responses=_SCORING_ERRORS)
    async def classify(request: PoolingRequest) -> ClassifyResponse:
        """vLLM's classification interface, as verl calls it."""
        samples = request.samples()
        scores = await service.score(samples)
        return ClassifyResponse(
            id=f"classify-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=name,
            data=[Classification(index=i, probs=[s.reward]) for i, s in enumerate(scores)],
            usage=Usage.of(samples),
        )

    @router.post("/v1/embeddings", tags=["other frameworks"], responses=_SCORING_ERRORS)
    async def embeddings(request: PoolingRequest) -> EmbeddingResponse:
        """SGLang's interface for reward models, as verl calls it: the embedding is one number, the reward."""
        samples = request.samples()
        data = [Embedding(index=i, embedding=[s.reward]) for i, s in enumerate(await service.score(samples))]
        return EmbeddingResponse(model=name, data=data, usage=Usage.of(samples))

    return router


def _model_routes(service: ScoringService) -> APIRouter:
    """KServe's routes of one model, to be included with and without a version in the address."""
    name = service.options.name

    def check_model(model: str, version: str = "1") -> None:
        if model != name or version != "1":
            raise HTTPException(404, f"there is no model {model} of version {version}; it is {name}, version 1")

    router = APIRouter(tags=["KServe v2"], responses=_errors(401, 404, 503), dependencies=[Depends(check_model)])

    @router.get("")
    async def metadata() -> dict[str, Any]:
        return kserve.metadata(name)

    @router.get("/ready")
    async def ready() -> dict[str, Any]:
        _check_ready(service)
        return {"name": name, "ready": True}

    @router.get("/config")
    async def config() -> dict[str, Any]:
        return kserve.configuration(name, service.options.max_samples)

    @router.post("/infer", include_in_schema=False)  # OpenAPI cannot describe JSON followed by binary tensors
    async def infer(http: Request) -> Response:
        length = http.headers.get(kserve.HEADER_LENGTH)
        head_length = None if length is None else parse_length(length, kserve.HEADER_LENGTH)
        body = await http.body()
        request, samples = await service.in_thread(kserve.read_request, body, head_length, service.limits)
        # Triton queues requests and its clients never retry, so this waits for room in the queue instead of a 429
        scores = await service.score(samples, wait_for_room=True)
        content, headers = kserve.write_response(name, request, [s.reward for s in scores])
        return Response(content, headers=headers)

    return router
