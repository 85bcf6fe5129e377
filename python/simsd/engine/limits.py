"""Which requests an engine takes."""

from __future__ import annotations

import math

from simsd.config import EngineConfig, SamplingParams, integer
from simsd.engine.pages import Places
from simsd.engine.scheduler import Scheduler
from simsd.errors import QueueFull, SimsdError
from simsd.values import is_integer, plain


def check_room(prompt_tokens: int, needed: int, params: SamplingParams, capacity: int, places: Places) -> None:
    """`needed`, `capacity`: positions of the request and of the engine's longest one. What all pages together could not
    hold would wait forever."""
    wanted = f"{prompt_tokens} prompt tokens + max_new_tokens {params.max_new_tokens}, in whole blocks {needed}"
    if needed > capacity:
        raise SimsdError(
            f"{wanted}, exceed the engine's max_length {capacity}: raise it, shorten the prompt or lower max_new_tokens"
        )
    if needed > (room := places.pages * places.page_size):
        raise SimsdError(
            f"{wanted}, exceed the {room} tokens that the engine has memory for ({places.pages} pages of"
            f" {places.page_size}): raise kv_memory, shorten the prompt or lower max_new_tokens"
        )


def check_gate(params: SamplingParams, ends: tuple[int, ...], room: int | None) -> None:
    """End tokens that the device has no `room` for are found by the host, but are not gated."""
    if room is not None and params.verify == "temporal" and params.end_gate > 0 and len(ends) > room:
        raise SimsdError(
            f"end_gate={params.end_gate:g} with {len(ends)} end tokens: this engine, by its first requests, has"
            f" room for {room}; give fewer end_token_ids, no end_gate, or use another engine"
        )


def check_queue(scheduler: Scheduler, config: EngineConfig) -> None:
    if config.max_queue is None:
        return
    waiting = sum(request.finish_reason is None for request in scheduler.waiting)
    running = sum(occupant.request.finish_reason is None for _, occupant in scheduler.occupied)
    free = config.max_batch - running
    if waiting >= config.max_queue + free:
        raise QueueFull(
            f"the queue is full: {waiting} requests wait, {free} of {config.max_batch} slots are free and"
            f" max_queue is {config.max_queue}; add it again later"
        )


def seconds_left(deadline: object) -> float:
    """The seconds that a request has; infinitely many where it has no deadline."""
    seconds = plain(deadline)
    if seconds is None:
        return math.inf
    if not (is_integer(seconds) or isinstance(seconds, float)) or not seconds > 0:
        raise SimsdError(f"deadline must be a number of seconds above 0, or None, got {deadline!r:.80}")
    return float(seconds)


def checked_priority(priority: object) -> int:
    integer("priority", plain(priority), -(2**63), 2**63 - 1)
    return plain(priority)
