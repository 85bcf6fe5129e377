"""Replicas of the server, by Ray Serve: each holds an engine, with the same OpenAI API in front.

serve run simsd.ray.deployment:app model=tiny-target draft=tiny-draft replicas=2
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pydantic
import torch

from simsd.config import EngineConfig
from simsd.errors import SimsdError
from simsd.models.folders import find
from simsd.ray.cluster import EXTRA, check_room, connect, worker_device

try:
    from ray import serve
    from ray.serve.config import BackpressureConfig, HTTPOptions

    from simsd.ray.engine import engine_of
    from simsd.serve.app import build_app
    from simsd.serve.gate import MIB, Settings
    from simsd.serve.service import MAX_FAILED, Service, warm_up
except ImportError as error:
    raise SimsdError(f"{EXTRA} ({error})") from None

NAME = "simsd"  # of the application, among those of the cluster
STARTS = 3  # of a deployment's replicas that fail, before it does
SECONDS_TO_END = 5.0  # of a replica, beside what its requests have


class Arguments(pydantic.BaseModel, extra="forbid"):
    """What `serve run simsd.ray.deployment:app` takes as name=value, and `simsd serve` as options.

    Attributes:
        model, draft: names, checkpoint folders or hub ids, which every node must have; no draft: it drafts for itself.
        replicas: processes, each with an engine. autoscale: "MIN:MAX" of them instead, by the requests that they have.
        device: of a replica: "cpu", "cuda" (one GPU) or "auto": cuda, if there is one where this is read.
        dtype, quantize, family, mask_token_id, shift, revision, local_files_only: see `simsd.load`; draft_family,
        draft_shift, draft_revision: of the draft.
        cpus: of a replica.
        name: that clients ask for; None: the model's. api_key: that they must send. origin: web pages that may ask.
        max_body: MiB of a request. timeout: seconds that a request may take.
        grace: seconds that requests have to end when their replica stops.
        max_queue: requests that may wait at a replica. The rest: see `EngineConfig`.
    """

    model: str = "tiny-target"
    draft: str | None = None
    replicas: int = pydantic.Field(1, ge=1)
    autoscale: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    family: str | None = None
    mask_token_id: int | None = None
    shift: bool | None = None
    draft_family: str | None = None
    draft_shift: bool | None = None
    revision: str | None = None
    draft_revision: str | None = None
    local_files_only: bool | None = None
    cpus: int = pydantic.Field(1, ge=1)
    name: str | None = None
    api_key: str | None = None
    max_body: float = pydantic.Field(4.0, gt=0)
    timeout: float = pydantic.Field(600.0, gt=0)
    grace: float = pydantic.Field(30.0, ge=0)
    origin: tuple[str, ...] = ()
    max_queue: int = 256
    max_batch: int = 32
    max_length: int | None = None
    kv_memory: int | None = None
    block_length: int | None = None
    lookahead: int = EngineConfig.lookahead
    max_rows: int | None = None
    order_head: str = "auto"
    top_logprobs: int = 0

    @property
    def served_name(self) -> str:
        return self.name or self.model

    def engine(self) -> EngineConfig:
        names = [field.name for field in dataclasses.fields(EngineConfig) if field.name in Arguments.model_fields]
        return EngineConfig(**{name: getattr(self, name) for name in names})

    def scale(self) -> tuple[int, int]:
        """Replicas at least and at most. Raises SimsdError for what is no MIN:MAX."""
        if self.autoscale is None:
            return self.replicas, self.replicas
        low, _, high = self.autoscale.partition(":")
        if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
            raise SimsdError(f"autoscale must be MIN:MAX replicas, 1:4 say, got {self.autoscale!r}")
        return int(low), int(high)


@serve.ingress()
class Replica:
    """A server's application on an engine of its own. Ray Serve replaces it when it is not healthy."""

    def __init__(self, arguments: Arguments, device: str) -> None:
        given = arguments
        engine = engine_of(
            given.model, given.draft, given.engine(), {**given.model_dump(), "device": device}, given.cpus
        )
        warm_up(engine)
        self.service = Service(engine)
        self.settings = Settings(
            name=given.served_name,
            api_key=given.api_key,
            max_body_bytes=int(given.max_body * MIB),
            timeout=given.timeout,
            allow_origins=given.origin,
        )

    def __serve_build_asgi_app__(self):
        return build_app(self.service, self.settings)

    def check_health(self) -> None:
        service = self.service
        if service.error is not None or service.failed >= MAX_FAILED:
            why = service.error or service.engine.metrics().last_error
            raise RuntimeError(f"the engine of this replica does not work: {why}")


def app(arguments: Arguments | Mapping[str, Any]) -> serve.Application:
    """The application that `serve run simsd.ray.deployment:app name=value ...` runs.

    Raises:
        SimsdError: a wrong argument, or a model that is not there.
    """
    try:
        arguments = Arguments.model_validate(arguments)
    except pydantic.ValidationError as error:
        wrong = error.errors()[0]
        raise SimsdError(
            f"{wrong['loc'][0]}={wrong['input']}: {wrong['msg']}; see simsd.ray.deployment.Arguments"
        ) from None
    config, (low, high) = arguments.engine(), arguments.scale()
    for model, revision in ((arguments.model, arguments.revision), (arguments.draft, arguments.draft_revision)):
        if model is not None:  # here rather than by replicas that try again and again
            find(model, revision=revision, local_files_only=bool(arguments.local_files_only))
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    scale = {"num_replicas": low}
    if arguments.autoscale is not None:
        limits = {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": config.max_batch}
        scale = {"autoscaling_config": limits}
    deployment = serve.deployment(
        Replica,
        name=NAME,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": 1 if device == "cuda" else 0},
        # What a replica's engine decodes and has waiting; beyond, requests wait for any of them, and are refused.
        max_ongoing_requests=config.max_batch + config.max_queue,
        max_queued_requests=max(high * config.max_queue, 1),  # Ray Serve knows no 0
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        max_constructor_retry_count=STARTS,
        graceful_shutdown_timeout_s=arguments.grace + SECONDS_TO_END,
        **scale,
    )
    return deployment.bind(arguments, device)


def run(arguments: Arguments, host: str, port: int, ready: Callable[[], None]) -> None:
    """Serves on the cluster of RAY_ADDRESS or on one of this machine, until SIGTERM or Ctrl-C.

    Args:
        ready: called once requests are taken.

    Raises:
        SimsdError: what `app` raises, a cluster without what replicas need, or replicas that do not start.
    """
    connect("ray.serve")
    device, (low, _), stop = worker_device(arguments.device, arguments.cpus), arguments.scale(), threading.Event()
    check_room(low, arguments.cpus)
    application = app(arguments.model_copy(update={"device": device}))
    print(f"starting {low} replicas of {arguments.model} ...", file=sys.stderr, flush=True)
    serve.start(http_options=HTTPOptions(host=host, port=port))
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    try:
        serve.run(application, name=NAME, route_prefix="/")
        ready()
        stop.wait()
    except RuntimeError as error:  # Ray Serve's word for replicas that do not start
        raise SimsdError(f"the replicas do not start: {_reason() or error}") from error
    finally:
        serve.delete(NAME)


def _reason() -> str:
    """What ended the last replica: the last line of what Ray Serve knows of it."""
    deployments = serve.status().applications[NAME].deployments
    lines = [line.strip() for deployment in deployments.values() for line in deployment.message.splitlines()]
    return next((line for line in reversed(lines) if line), "").removeprefix("simsd.errors.SimsdError: ")
