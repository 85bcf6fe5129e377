"""Log-probabilities of tokens as they were revealed (`Result.logprobs`), in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence

from simsd.models.tokenizer import Tokenizer
from simsd.text import REPLACEMENT

Candidates = Sequence[tuple[int, float]]  # token id and log-probability, best first


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], logprobs: Sequence[float], candidates: Sequence[Candidates]
) -> dict:
    """`candidates`: of each token the most probable ones; they may be none."""
    content = [
        _entry(tokenizer, token, logprob) | {"top_logprobs": [_entry(tokenizer, *other) for other in others]}
        for token, logprob, others in zip(tokens, logprobs, candidates, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    logprobs: Sequence[float | None],
    candidates: Sequence[Candidates],
    offset: int,
) -> dict:
    """`offset`: characters of the choice's text before the first token. Tokens of a prompt have None."""
    texts, offsets = [], []
    for token in tokens:
        texts.append(token_text(tokenizer, token))
        offsets.append(offset)
        offset += len(texts[-1])
    top = [{token_text(tokenizer, token): logprob for token, logprob in others} or None for others in candidates]
    return {"tokens": texts, "token_logprobs": list(logprobs), "top_logprobs": top, "text_offset": offsets}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Of a token by itself; special tokens have their names."""
    return tokenizer.decode([token], skip_special_tokens=False)


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict:
    text = token_text(tokenizer, token)
    # A part of a character has no text of its own: its bytes are not told.
    return {"token": text, "logprob": logprob, "bytes": None if REPLACEMENT in text else list(text.encode())}
