"""The bodies that clients send: OpenAI's fields, and those of this server.

Fields that would change the answer and cannot be honoured are refused by name. The values by which clients say "nothing
special" are taken, and so are fields that say something of the client, not of the text.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from simsd.config import DRAFTERS, MAX_TOP_LOGPROBS, REJECTED_TAILS, RULES, STRATEGIES, VERIFIERS

MAX_N = 128  # samples per prompt
MAX_CHOICES = 512  # of one body: prompts times samples
MAX_STOPS = 16
UNSUPPORTED = "unsupported_parameter"

# Values of fields of others' that ask for nothing. None asks for nothing, whatever the field.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "continue_final_message": (False,),
    "return_token_strs": (False,),
    # of messages, as an answer that is sent back has them
    "tool_calls": ([],),
    "annotations": ([],),
    "reasoning_content": ("",),
}
# Of the client, or of how others serve: no text depends on them.
_IGNORED = frozenset(
    "user metadata store service_tier parallel_tool_calls safety_identifier prompt_cache_key prompt_cache_retention"
    " include_obfuscation verbosity request_id".split()
)


def printable(text: str) -> str:
    """With question marks for halves of characters, which JSON can name and UTF-8 has no bytes for."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _whole_characters(text: str) -> str:
    if printable(text) != text:
        raise PydanticCustomError("half_character", "Input holds half of a surrogate pair, which is no character")
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]


class Body(BaseModel):
    """A JSON object whose fields are known; types are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, revalidate_instances="never")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        """Without what asks for nothing. Raises for a field that asks for something and is not known here."""
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            if name in cls.model_fields:
                kept[name] = value
            elif value is not None and name not in _IGNORED and not _is_neutral(name, value):
                raise PydanticCustomError(
                    UNSUPPORTED, "{reason}", {"field": printable(name), "reason": _refusal(name, value)}
                )
        return kept


def _is_neutral(name: str, value: Any) -> bool:
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL.get(name, ())
    )


def _refusal(name: str, value: Any) -> str:
    if name not in _NEUTRAL:
        return f"unknown field {printable(name)!r:.80}: leave it out"
    neutral = " or ".join(map(repr, _NEUTRAL[name]))
    return f"{name} is not supported: leave it out (or send {neutral}), got {printable(repr(value)):.80}"


class Part(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1)]

    def turn(self) -> dict[str, str]:
        """As chat templates know it."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Body):
    include_usage: bool | None = None
    provisional: bool | None = Field(None, description="Also send the block on its way, in chunks of its own.")


TokenIds = Annotated[list[int], Field(min_length=1)]


class Sampling(Body):
    """What chat and completions share. What is left out is as `simsd.SamplingParams` has it: greedy, exact."""

    model: Text | None = Field(None, description="The served model's name; None: whichever is served.")
    max_tokens: int | None = Field(None, ge=0, description="None: as many as there is room for.")
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1: all.")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(None, ge=1, le=MAX_N)
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[int] | None = Field(None, description="Further end tokens.")
    ignore_eos: bool | None = Field(None, description="Whether the model's own end tokens do not end the text.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    strategy: Literal[STRATEGIES] | None = None
    threshold: float | None = Field(None, ge=0, le=1)
    entropy_bound: float | None = Field(None, ge=0, allow_inf_nan=False)
    steps: int | None = Field(None, ge=1)
    sub_block_length: int | None = Field(None, ge=1)
    verify: Literal[VERIFIERS] | None = None
    drafter: Literal[DRAFTERS] | None = None
    order_sharpness: float | None = Field(None, ge=0, allow_inf_nan=False)
    accept: Literal[RULES] | None = None
    rejected_tail: Literal[REJECTED_TAILS] | None = None
    draft_steps: int | None = Field(None, ge=1)
    end_gate: float | None = Field(None, ge=0, le=1)
    block_length: int | None = Field(None, ge=1, description="The server's own; it is the same for all requests.")
    step_map: bool | None = Field(None, description="Also return token_ids and step_map of each choice.")


class ChatRequest(Sampling):
    """Of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0, description="The same as max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)


class CompletionRequest(Sampling):
    """Of POST /v1/completions. A prompt is text as it is, without a chat template, or token ids; or a list of them."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)


class TokenizeRequest(Body):
    """Of POST /tokenize: `prompt` as completions take it, or `messages` as chat does."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
