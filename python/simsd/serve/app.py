"""The endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

import simsd
from simsd.errors import QueueFull, SimsdError
from simsd.serve import protocol
from simsd.serve.answers import Answer
from simsd.serve.errors import APIError
from simsd.serve.exposition import registry_of
from simsd.serve.gate import NOTES, Gate, Settings
from simsd.serve.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from simsd.serve.requests import encode_chat, encode_prompts, read, refusal
from simsd.serve.service import MAX_FAILED, Draining, Running, Service, Stopped

LATER = {"Retry-After": "1"}  # seconds, for those who are refused because of others
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


_IN_JSON = {"application/json": {"schema": _ERROR}}
_REFUSED = {status: {"description": "An error.", "content": _IN_JSON} for status in ("4XX", "5XX")}
_GENERATED = {
    200: {"description": "As OpenAI's API has it; a stream of events.", "content": {"text/event-stream": {}}},
    **_REFUSED,
}


def build_app(service: Service, settings: Settings) -> FastAPI:
    """The server's application; its lifespan starts and closes the service."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    app = FastAPI(title="simsd", version=simsd.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, settings=settings)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allow_origins, allow_methods=["*"], allow_headers=["*"]
        )
    _answer_errors(app)
    _add_generation(app, service, settings)
    _add_information(app, service, settings)
    return app


def _add_generation(app: FastAPI, service: Service, settings: Settings) -> None:
    @app.post("/v1/chat/completions", responses=_GENERATED)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await _generate(body, request, service, settings)

    @app.post("/v1/completions", responses=_GENERATED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _generate(body, request, service, settings)

    @app.post("/tokenize", responses=_REFUSED)
    async def tokenize(body: TokenizeRequest) -> dict:
        _check_model(body.model, settings)
        if (body.prompt is None) == (body.messages is None):
            raise APIError(400, "give either prompt or messages", param="prompt")
        encode, given = (encode_prompts, body) if body.messages is None else (encode_chat, body.messages)
        tokens = await _encoded(service, encode, given, service)
        tokens = tokens[0] if body.messages is None else tokens
        return {"count": len(tokens), "max_model_len": service.max_model_len, "tokens": tokens}


def _add_information(app: FastAPI, service: Service, settings: Settings) -> None:
    engine, created = service.engine, int(time.time())
    registry = registry_of(engine)
    model = {
        "id": settings.name,
        "object": "model",
        "created": created,
        "owned_by": "simsd",
        "max_model_len": service.max_model_len,
        "block_length": engine.block_length,
    }

    @app.get("/v1/models", responses=_REFUSED)
    async def models() -> dict:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", responses=_REFUSED)
    async def one_model(name: str) -> dict:
        _check_model(name, settings)
        return model

    @app.get("/health", responses=_REFUSED)
    async def health() -> JSONResponse:
        failing = service.failed >= MAX_FAILED
        state = "stopped" if service.error else "failing" if failing else "draining" if service.draining else "ok"
        error = service.error or (engine.metrics().last_error if failing else None)
        told = {"status": state, "reproducible": reproducible(service), "error": error}
        return JSONResponse(told, 200 if state == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse, responses=_REFUSED)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def reproducible(service: Service) -> bool:
    """Whether a seed gives the same text whatever else runs: both models' forwards are deterministic."""
    models = (service.engine.target, service.engine.draft)
    return all(model.deterministic for model in models if model is not None)


def _check_model(name: str | None, settings: Settings) -> None:
    if name not in (None, settings.name):
        raise APIError(
            404, f"no model {name!r:.80} here: this server has {settings.name!r}", param="model", code="model_not_found"
        )


async def _encoded(service: Service, function: Callable, *arguments: object):
    """Calls it on the thread for prompts."""
    return await asyncio.get_running_loop().run_in_executor(service.encoder, function, *arguments)


async def _generate(
    body: ChatRequest | CompletionRequest, request: Request, service: Service, settings: Settings
) -> Response:
    notes = request.scope[NOTES]
    _check_model(body.model, settings)
    ask = await _encoded(service, read, body, service)
    answer = Answer(ask, service.engine.target.tokenizer, settings.name)
    try:
        running = service.submit(ask.choices, settings.timeout)
    except QueueFull as error:
        raise APIError(429, str(error), code="queue_full", headers=LATER) from None
    except SimsdError as error:
        raise refusal(error) from None
    except Draining:
        raise APIError(503, "the server is stopping: ask again later", headers=LATER) from None
    except Stopped as error:
        raise _stopped(error) from None
    notes |= {"choices": len(ask.choices), "prompt_tokens": sum(map(len, ask.prompts))}
    if ask.stream:
        return _Events(running, answer, notes)

    async def whole() -> Response:
        async for choice, update in running:
            answer.take(choice, update)
            notes["new_tokens"] = answer.new_tokens
        return JSONResponse(answer.whole())

    with running:
        try:
            return await _unless_left(request.receive, whole())
        except Stopped as error:
            raise _stopped(error) from None


def _stopped(error: Stopped) -> APIError:
    return APIError(500, f"the engine has stopped: {error}; see the server's log", code="engine_stopped")


async def _unless_left(receive: Receive, work: Awaitable):
    """What `work` gives. Cancels it and raises ConnectionError where the client leaves before."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ConnectionError("before the answer was complete")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Events(Response):
    """A stream of server-sent events; what is not done is cancelled where the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, running: Running, answer: Answer, notes: dict) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._running, self._answer, self._notes = running, answer, notes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._running:
            await _unless_left(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        answer = self._answer
        try:
            async for choice, update in self._running:
                for chunk in answer.chunks(choice, update):
                    yield _event(chunk)
            if answer.ask.include_usage:
                yield _event(answer.last())
        except (APIError, Stopped) as error:
            told = _stopped(error) if isinstance(error, Stopped) else error
            self._notes["error"] = told.message
            yield _event(told.body())
            return
        finally:
            self._notes["new_tokens"] = answer.new_tokens
        yield b"data: [DONE]\n\n"


def _event(value: dict) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _answer_errors(app: FastAPI) -> None:
    """In OpenAI's shape, and in the log's line."""

    def answer(request: Request, error: APIError) -> JSONResponse:
        request.scope[NOTES]["error"] = error.message
        return error.response()

    @app.exception_handler(APIError)
    async def ours(request: Request, error: APIError) -> JSONResponse:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def wrong_body(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(request, _explained(error.errors()))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return answer(request, APIError(error.status_code, message, headers=error.headers))


_TYPES = frozenset(("str", "int", "float", "bool", "body"))
_OBJECT = "send a JSON object, with Content-Type: application/json"


def _explained(errors: Sequence[dict]) -> APIError:
    """What is wrong with a body, by pydantic's errors: the first one and, of a value that may have several forms, what
    is wrong with it in each."""
    first, path = errors[0], _path(errors[0])
    field = ".".join(path)
    if first["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    if first["type"] == protocol.UNSUPPORTED:
        return APIError(400, first["msg"], param=".".join([*path, first["ctx"]["field"]]), code=protocol.UNSUPPORTED)
    if first["type"] == "missing":
        message = f"{field} is missing" if path else f"the body is missing: {_OBJECT}"
        return APIError(400, message, param=field or None)
    if not path:
        return APIError(400, f"the body is no JSON object: {_OBJECT}")
    reasons = dict.fromkeys(error["msg"] for error in errors if _path(error)[:1] == path[:1])
    reason = "; or: ".join([*reasons][:3])
    return APIError(400, f"{field}: {reason}; got {protocol.printable(repr(first['input'])):.80}", param=field)


def _path(error: dict) -> list[str]:
    """The field that it is about. pydantic names the alternative of a union as well: that is no field of the body."""
    parts = map(str, error["loc"])
    return [protocol.printable(part) for part in parts if part not in _TYPES and "[" not in part]
