"""From a body to what the engine is asked: prompts as token ids, and settings for each choice."""

from __future__ import annotations

import dataclasses
import re

from simsd.config import GenerationConfig, SamplingParams
from simsd.errors import SimsdError
from simsd.serve.errors import APIError
from simsd.serve.protocol import MAX_CHOICES, ChatRequest, CompletionRequest, Message, Sampling, TokenizeRequest
from simsd.serve.service import Choice, Service

# Fields that are settings of the same name.
_SETTINGS = (
    *("temperature", "top_p", "strategy", "threshold", "entropy_bound", "steps", "verify", "drafter"),
    *("sub_block_length", "order_sharpness", "accept", "rejected_tail", "draft_steps", "end_gate"),
)


@dataclasses.dataclass(frozen=True)
class Ask:
    """What one request wants.

    Attributes:
        prompts: token ids. echoes: each prompt's text, which its choices begin with, or "".
        choices: prompt by prompt, n of each, with the seed of each: those of `simsd.generate`.
        logprobs: whether log-probabilities are wanted; top_logprobs: and of how many other tokens.
    """

    chat: bool
    prompts: list[list[int]]
    echoes: list[str]
    choices: list[Choice]
    stream: bool
    include_usage: bool
    provisional: bool
    logprobs: bool
    top_logprobs: int
    step_map: bool

    def prompt_of(self, choice: int) -> int:
        return choice * len(self.prompts) // len(self.choices)


def read(body: ChatRequest | CompletionRequest, service: Service) -> Ask:
    """Raises APIError where something cannot be honoured, with the field."""
    chat = isinstance(body, ChatRequest)
    wants_logprobs = bool(body.logprobs) if chat else body.logprobs is not None
    top_logprobs = (body.top_logprobs if chat else body.logprobs) or 0
    if chat and top_logprobs and not wants_logprobs:
        raise APIError(400, f"top_logprobs={top_logprobs} needs logprobs=true", param="top_logprobs")
    if top_logprobs > (most := service.engine.config.top_logprobs):
        field = "top_logprobs" if chat else "logprobs"
        message = f"{field} is at most {most} on this server (simsd serve --top-logprobs), got {top_logprobs}"
        raise APIError(400, message, param=field)
    if body.block_length not in (None, served := service.engine.block_length):
        raise APIError(
            400, f"block_length is {served} on this server, got {body.block_length}: leave it out", param="block_length"
        )
    if body.stream_options is not None and not body.stream:
        raise APIError(400, "stream_options needs stream=true", param="stream_options")
    prompts = [encode_chat(body.messages, service)] if chat else encode_prompts(body, service)
    options = body.stream_options
    return Ask(
        chat=chat,
        prompts=prompts,
        echoes=[""] * len(prompts) if chat or not body.echo else echoes(body, prompts, service),
        choices=choices_of(body, prompts, service),
        stream=bool(body.stream),
        include_usage=options is not None and bool(options.include_usage),
        provisional=options is not None and bool(options.provisional),
        logprobs=wants_logprobs,
        top_logprobs=top_logprobs,
        step_map=bool(body.step_map),
    )


def encode_chat(messages: list[Message], service: Service) -> list[int]:
    try:
        return service.engine.target.encode_prompt([message.turn() for message in messages])
    except SimsdError as error:
        raise APIError(400, str(error), param="messages") from None


def encode_prompts(body: CompletionRequest | TokenizeRequest, service: Service) -> list[list[int]]:
    """Text as it is, without a chat template."""
    given, target = body.prompt, service.engine.target
    prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    try:
        ids = [target.tokenizer.backend.encode(one) if isinstance(one, str) else one for one in prompts]
        return [target.encode_prompt(one) for one in ids]
    except SimsdError as error:
        raise APIError(400, str(error), param="prompt") from None


def echoes(body: CompletionRequest, prompts: list[list[int]], service: Service) -> list[str]:
    given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if isinstance(given[0], str):
        return given
    return [service.engine.target.tokenizer.decode(prompt) for prompt in prompts]


def choices_of(body: Sampling, prompts: list[list[int]], service: Service) -> list[Choice]:
    n, config = body.n or 1, service.engine.config
    # More would find no place in the queue, whenever they come.
    most = MAX_CHOICES if config.max_queue is None else min(MAX_CHOICES, config.max_queue + config.max_batch)
    if n * len(prompts) > most:
        message = f"n={n} of {len(prompts)} prompts: this server takes {most} texts at most in one request"
        raise APIError(400, message, param="n" if n > 1 else "prompt")
    settings = {name: value for name in _SETTINGS if (value := getattr(body, name)) is not None}
    if body.top_k is not None:
        settings["top_k"] = max(body.top_k, 0)
    settings["stop"] = body.stop or ()
    settings["end_token_ids"] = end_tokens(body, service)
    if settings.get("verify") == "temporal" and service.engine.draft is None:
        raise APIError(400, "verify='temporal' needs a draft model, and this server has none", param="verify")
    seed = 0 if body.seed is None and not body.temperature else body.seed
    seeds = GenerationConfig(seed=seed, n=n).seeds(len(prompts))
    limits = [limit_of(body, len(prompt), service) for prompt in prompts]
    try:
        return [
            (prompts[i // n], SamplingParams(**settings, max_new_tokens=limits[i // n], seed=seed))
            for i, seed in enumerate(seeds)
        ]
    except SimsdError as error:
        raise refusal(error) from None


def refusal(error: SimsdError) -> APIError:
    """Of a setting: messages of those begin with its name."""
    name = re.split(r"\W", str(error), maxsplit=1)[0]
    return APIError(400, str(error), param=name if name in Sampling.model_fields else None)


def end_tokens(body: Sampling, service: Service) -> tuple[int, ...]:
    target = service.engine.target
    further = body.stop_token_ids or []
    for token in further:
        if not 0 <= token < target.vocab_size:
            message = f"stop_token_ids are ids from 0 to {target.vocab_size - 1}, got {token}"
            raise APIError(400, message, param="stop_token_ids")
    own = () if body.ignore_eos else target.end_token_ids
    return tuple(dict.fromkeys([*own, *further]))


def limit_of(body: Sampling, prompt_tokens: int, service: Service) -> int:
    """Tokens to generate at most: as asked, else as many as there is room for."""
    name = "max_completion_tokens" if getattr(body, "max_completion_tokens", None) is not None else "max_tokens"
    asked, room = getattr(body, name), service.max_model_len - prompt_tokens
    if isinstance(body, ChatRequest) and None not in (body.max_tokens, body.max_completion_tokens):
        if body.max_tokens != body.max_completion_tokens:
            message = f"max_tokens={body.max_tokens} and max_completion_tokens={body.max_completion_tokens}: give one"
            raise APIError(400, message, param="max_tokens")
    if room < (1 if asked is None else asked):
        wants = "" if asked is None else f" and {name} is {asked}"
        raise APIError(
            400,
            f"the prompt has {prompt_tokens} tokens{wants}, but this server's sequences have at most"
            f" {service.max_model_len}: shorten the prompt{f' or lower {name}' if asked else ''}",
            param=name if asked else "messages" if isinstance(body, ChatRequest) else "prompt",
            code="context_length_exceeded",
        )
    return room if asked is None else asked
