"""What a server does not take: settings, bodies, models, paths, pages of others; each with an error that names it."""

from __future__ import annotations

import httpx
import openai
import pytest

from server_process import FRANCE

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
REFUSED = {
    "a penalty": ({"frequency_penalty": 0.5}, "frequency_penalty"),
    "a bias": ({"logit_bias": {"5": 1}}, "logit_bias"),
    "a tool": ({"tools": [TOOL]}, "tools"),
    "JSON mode": ({"response_format": {"type": "json_object"}}, "response_format"),
    "an unknown field": ({"extra_body": {"guided_regex": "a+"}}, "guided_regex"),
    "another block length": ({"extra_body": {"block_length": 8}}, "block_length"),
    "more top_logprobs than OpenAI has": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "more top_logprobs than the server's": ({"logprobs": True, "top_logprobs": 4}, "top_logprobs"),
    "top_logprobs alone": ({"top_logprobs": 1}, "top_logprobs"),
    "no samples": ({"n": 0}, "n"),
    "too many samples": ({"n": 129}, "n"),
    "a cold temperature": ({"temperature": -1}, "temperature"),
    "no mass": ({"top_p": 0}, "top_p"),
    "a seed of 65 bits": ({"seed": 2**63}, "seed"),
    "a seed of text": ({"seed": "7"}, "seed"),
    "an empty stop string": ({"stop": [""]}, "stop"),
    "an unknown strategy": ({"extra_body": {"strategy": "best"}}, "strategy"),
    "a sub-block longer than a block": ({"extra_body": {"sub_block_length": 5}}, "sub_block_length"),
    "fewer steps than sub-blocks": ({"extra_body": {"sub_block_length": 1, "steps": 2}}, "steps"),
    "more steps than a block has": ({"extra_body": {"steps": 5}}, "steps"),
    "temporal settings of exact": ({"extra_body": {"accept": "mrs"}}, "accept"),
    "an id out of the vocabulary": ({"extra_body": {"stop_token_ids": [99999]}}, "stop_token_ids"),
    "a length over the model's": ({"max_tokens": 1000}, "max_tokens"),
    "two lengths": ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    "stream options without a stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "no messages": ({"messages": []}, "messages"),
    "an unknown role": ({"messages": [{"role": "robot", "content": "hello"}]}, "messages.0.role"),
    "a message without content": ({"messages": [{"role": "user"}]}, "messages.0.content"),
    "a picture": ({"messages": IMAGE}, "messages.0.content"),
    "the mask token": ({"messages": [{"role": "user", "content": "<|MASK|>"}]}, "messages"),
    "a prompt over the model's length": ({"messages": [{"role": "user", "content": "hello " * 1000}]}, "messages"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_a_400_that_names_it(client, name):
    change, param = REFUSED[name]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{"model": "tiny-target", "messages": FRANCE} | change)
    error = refused.value.body
    assert error["type"] == "invalid_request_error" and error["param"].startswith(param)
    assert param.split(".")[0] in error["message"] or "prompt" in error["message"]
    assert "\n" not in error["message"] and len(error["message"]) < 300


def test_another_model_and_unknown_paths_are_404(client, server):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4' here: this server has 'tiny-target'"):
        client.chat.completions.create(model="gpt-4", messages=FRANCE)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    answer = httpx.post(f"{server.url}/v1/embeddings", json={})
    assert answer.status_code == 404 and "/v1/embeddings" in answer.json()["error"]["message"]
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "JSON"),
        (b"{", "not JSON"),
        (b"[1]", "JSON object"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "parsing the body"),
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b'{"prompt": "hello", "\\ud800": 1}', "unknown field"),
        (b'{"prompt": "hello", "temperature": NaN}', "temperature"),
        (b'{"prompt": "hello", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "hello", "seed": 1' + b"0" * 400 + b"}", "seed"),
        (b'{"prompt": []}', "prompt"),
        (b'{"prompt": [[]]}', "prompt"),
        (b'{"prompt": [1, "a"]}', "prompt"),
        (b'{"prompt": [-1]}', "token id -1"),
        (b'{"prompt": [true]}', "prompt: Input should be a valid string; or: Input should be a valid integer"),
        (b"{}", "prompt is missing"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_malformed_bodies_are_400_in_openai_s_shape(server, body, message):
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"] and set(error) == {"message", "type", "param", "code"}


def test_pages_of_other_origins_may_not_ask(server):
    asked = httpx.options(
        f"{server.url}/v1/completions",
        headers={"Origin": "http://elsewhere", "Access-Control-Request-Method": "POST"},
    )
    assert asked.status_code == 405 and "access-control-allow-origin" not in asked.headers
