"""`simsd serve`: an OpenAI-compatible server."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simsd.cli import options as opt
from simsd.config import MAX_TOP_LOGPROBS, EngineConfig
from simsd.errors import SimsdError

if TYPE_CHECKING:
    import socket

    from simsd.engine.engine import Engine

LOOPBACK = ("127.0.0.1", "::1", "localhost")
DEFAULTS = EngineConfig()


def _server(name: str, help: str, **more):
    return typer.Option(f"--{name}", help=help, rich_help_panel="Server", **more)


def _engine(name: str, help: str):
    return typer.Option(f"--{name}", help=help, rich_help_panel="Engine")


def serve(
    model: Annotated[str, typer.Argument(help="Built-in name, checkpoint folder or hub id.")] = opt.TARGET,
    draft: opt.Draft = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    quantize: opt.Quantize = None,
    family: opt.Family = None,
    block_length: opt.BlockLength = None,
    mask_token_id: opt.MaskTokenId = None,
    shift: opt.Shift = None,
    draft_family: opt.DraftFamily = None,
    draft_shift: opt.DraftShift = None,
    revision: opt.Revision = None,
    draft_revision: opt.DraftRevision = None,
    local_files_only: opt.LocalFilesOnly = None,
    host: Annotated[str, _server("host", "Address to listen on; the default is for this machine alone.")] = "127.0.0.1",
    port: Annotated[int, _server("port", "0: a free one, which is printed.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, _server("served-model-name", "Name that clients ask for; MODEL if not given.")] = None,
    api_key: Annotated[
        str | None, _server("api-key", "Key that clients must send.", envvar="SIMSD_API_KEY", show_envvar=True)
    ] = None,
    max_queue: Annotated[int, _server("max-queue", "Requests that may wait; more are refused (429).", min=0)] = 256,
    max_body: Annotated[float, _server("max-body", "MiB that a request may have.", min=0.001)] = 4.0,
    timeout: Annotated[float, _server("timeout", "Seconds that a request may take.", min=0.001)] = 600.0,
    grace: Annotated[float, _server("grace", "Seconds that requests have to end when the server stops.", min=0)] = 30.0,
    origin: Annotated[
        list[str] | None, _server("allow-origin", "Web origin that may ask (CORS), or *; may be given more than once.")
    ] = None,
    replicas: Annotated[
        int, _server("replicas", "Processes with an engine each, on a Ray cluster; needs simsd-kernels\\[ray].", min=1)
    ] = 1,
    autoscale: Annotated[
        str | None, _server("autoscale", "Replicas at least and at most, by their load.", metavar="MIN:MAX")
    ] = None,
    max_batch: Annotated[int, _engine("max-batch", "Requests to decode at a time.")] = 32,
    max_length: Annotated[
        int | None, _engine("max-length", "Tokens of the longest sequence; 4096, or the model's if that is less.")
    ] = None,
    kv_memory: Annotated[
        int | None, _engine("kv-memory", "Bytes for keys and values; what max-batch sequences take if not given.")
    ] = None,
    lookahead: opt.Lookahead = DEFAULTS.lookahead,
    max_rows: opt.MaxRows = None,
    order_head: opt.OrderHead = DEFAULTS.order_head,
    top_logprobs: Annotated[
        int, _engine("top-logprobs", f"Most top_logprobs that a request may ask for, up to {MAX_TOP_LOGPROBS}.")
    ] = DEFAULTS.top_logprobs,
) -> None:
    """Serve a model by OpenAI's API: chat, completions, streaming.

    Ctrl-C or SIGTERM: takes no more requests, lets those on their way end (--grace), and exits.
    """
    try:
        from simsd.serve.app import build_app
        from simsd.serve.gate import MIB, Settings
        from simsd.serve.run import listen, run, url_of
        from simsd.serve.service import Service
    except ImportError as error:
        raise SimsdError(f'simsd serve needs pip install "simsd-kernels[serve]": {error}') from None
    config = EngineConfig(
        max_queue=max_queue,
        max_batch=max_batch,
        max_length=max_length,
        kv_memory=kv_memory,
        block_length=block_length,
        lookahead=lookahead,
        max_rows=max_rows,
        order_head=order_head,
        top_logprobs=top_logprobs,
    )
    for option, value in (("max-body", max_body), ("timeout", timeout), ("grace", grace)):
        if not math.isfinite(value):
            raise SimsdError(f"--{option} must be a finite number, got {value}")
    if api_key == "":
        raise SimsdError("--api-key is empty: give one, or leave the option out")
    if host not in LOOPBACK and api_key is None:
        print(f"anybody who reaches {host} may ask: --api-key asks for a key", file=sys.stderr)
    bound = listen(host, port)  # before a model is loaded for nothing
    if replicas > 1 or autoscale is not None:
        _serve_replicas(locals(), bound)
        return
    engine = _engine_of(locals(), config)
    settings = Settings(
        name=name or model,
        api_key=api_key,
        max_body_bytes=int(max_body * MIB),
        timeout=timeout,
        allow_origins=tuple(origin or ()),
    )
    service = Service(engine)

    def ready() -> None:
        print(f"serving {settings.name} at {url_of(bound)}/v1 (Ctrl-C stops)", flush=True)

    run(build_app(service, settings), service, bound, grace, ready)


def _serve_replicas(values: dict[str, Any], bound: socket.socket) -> None:
    """By Ray Serve, with the command's arguments; `bound` is given up for the proxy that listens there."""
    from simsd.ray.deployment import Arguments, run
    from simsd.serve.run import url_of

    given = {name: value for name, value in values.items() if name in Arguments.model_fields and value is not None}
    arguments = Arguments(**given | {"draft": opt.draft_name(values["model"], values["draft"])})
    (host, port), url = bound.getsockname()[:2], url_of(bound)
    bound.close()
    run(arguments, host, port, lambda: print(f"serving {arguments.served_name} at {url}/v1 (Ctrl-C stops)", flush=True))


def _engine_of(values: dict[str, Any], config: EngineConfig) -> Engine:
    """By the command's arguments, loaded and warm; says what it is at."""
    model, draft = values["model"], opt.draft_name(values["model"], values["draft"])
    with _Step(f"loading {model}" + (f" and {draft}" if draft else "")):
        target_model, draft_model = opt.load_models(model, draft, values, config.max_batch)
    with _Step("warming up"):
        from simsd.engine.engine import Engine
        from simsd.serve.service import warm_up

        engine = Engine(target_model, draft_model, config)
        warm_up(engine)
    return engine


class _Step:
    """A line on standard error: what goes on, and how long it took."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        print(f"{self._what} ...", end=" ", file=sys.stderr, flush=True)
        self._began = time.perf_counter()

    def __exit__(self, kind: type | None, *_: object) -> None:
        took = f"{time.perf_counter() - self._began:.1f} s" if kind is None else "failed"
        print(took, file=sys.stderr, flush=True)
