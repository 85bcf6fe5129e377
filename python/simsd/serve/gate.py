"""What stands before the endpoints: limits, the API key, and a line of the log for each request."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import json
import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from simsd.serve.errors import APIError

log = logging.getLogger("simsd.serve")
MIB = 2**20
OPEN_PATHS = ("/health",)  # without a key: what asks them has none
NOTES = "simsd.notes"  # of a scope: what an endpoint adds to the log's line


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a server.

    Attributes:
        name: the served model's. api_key: that clients must send as a bearer token, None for none.
        max_body_bytes: of a request. timeout: seconds after which a request ends with what it has, and that a body
            may take to arrive, or a part of an answer to be taken.
        allow_origins: of web pages that may ask ("*" for all).
    """

    name: str
    api_key: str | None = None
    max_body_bytes: int = 4 * MIB
    timeout: float = 600.0
    allow_origins: tuple[str, ...] = ()


class Gate:
    """ASGI middleware. The body is read here, bounded in size and time; what follows gets it in one piece."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, notes = time.perf_counter(), 0, scope.setdefault(NOTES, {})

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            try:
                async with asyncio.timeout(self._settings.timeout):
                    await send(message)
            except TimeoutError:
                raise ConnectionError("the client takes nothing") from None

        try:
            try:
                body = await self._admitted(scope, receive)
            except APIError as error:
                notes["error"] = error.message
                await error.response()(scope, receive, watched)
                return
            await self._app(scope, _in_one_piece(body, receive), watched)
        except ConnectionError as error:
            notes["left"] = error
        except Exception as error:
            log.exception("a bug in the server: %s", type(error).__name__)
            if status:
                raise  # the client notices that the answer is not complete
            await APIError(500, f"a bug in the server: {type(error).__name__}; see its log").response()(
                scope, receive, watched
            )
        finally:
            log.info("%s", _line(scope, status, time.perf_counter() - began, notes))

    async def _admitted(self, scope: Scope, receive: Receive) -> bytes:
        """The body. Raises APIError where the request is not let in."""
        headers = dict(scope["headers"])
        if self._key is not None and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._key):
                what = "wrong API key" if given else "no API key"
                message = f"{what}: send the server's as the header 'Authorization: Bearer KEY'"
                raise APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._settings.max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._settings.timeout):
                return await self._read(receive)
        except TimeoutError:
            raise APIError(408, f"the body took longer than {self._settings.timeout:g} s to arrive") from None

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError("while it sent the body")
            body += message.get("body", b"")
            if len(body) > self._settings.max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> APIError:
        most = self._settings.max_body_bytes
        return APIError(413, f"a body is at most {most} bytes on this server", headers={"Connection": "close"})


def _in_one_piece(body: bytes, receive: Receive) -> Receive:
    """Gives the body, then what `receive` does: that the client has left."""
    pieces = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return pieces.pop() if pieces else await receive()

    return next_message


def _line(scope: Scope, status: int, seconds: float, notes: dict) -> str:
    outcome = "left" if "left" in notes else str(status)
    # Paths and messages come from clients: on one line, whatever they hold.
    path = json.dumps(scope["path"], ensure_ascii=True)[1:-1]
    details = "".join(f" {name}={json.dumps(value, default=str)}" for name, value in notes.items())
    client = scope.get("client")
    return f"{client[0] if client else '-'} {scope['method']} {path} {outcome} {seconds:.3f}s{details}"
