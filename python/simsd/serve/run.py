"""A server process: a socket, uvicorn on it, and a graceful end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from simsd.errors import SimsdError
from simsd.serve.service import Service

BACKLOG = 2048
SECONDS_TO_TAKE = 5.0  # that clients have for the last of their answers when the server stops


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises SimsdError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SimsdError(f"cannot listen on {host}, port {port}: {reason}; choose another --host or --port") from None
    return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """One that says when it takes requests, and lets those on their way end before it stops."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._grace, self._ready = service, grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self._service.drain(self._grace))
        await super().shutdown(sockets)
        draining.cancel()


def run(app: FastAPI, service: Service, bound: socket.socket, grace: float, ready: Callable[[], None]) -> None:
    """Serves until SIGTERM or Ctrl-C; then requests have `grace` seconds to end, and end with what they have.

    Args:
        ready: called once requests are taken.

    Raises:
        SimsdError: it could not start.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("simsd.serve")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        backlog=BACKLOG,
        lifespan="on",
        timeout_graceful_shutdown=int(grace + SECONDS_TO_TAKE) + 1,
    )
    # uvicorn raises the signals that ended it once more when it is done; here they are the way to stop, no failure.
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    server = _Server(config, service, grace, ready)
    server.run(sockets=[bound])
    if not server.started:
        raise SimsdError("the server could not start: see above")
