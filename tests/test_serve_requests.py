"""Bodies as clients send them, and what the engine is asked."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

import simsd
from simsd.seeds import sample_seed
from simsd.serve import protocol
from simsd.serve.errors import APIError
from simsd.serve.protocol import ChatRequest, CompletionRequest, Message
from simsd.serve.requests import read
from simsd.serve.service import Service

pytestmark = pytest.mark.usefixtures("one_thread")

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def service():
    return Service(simsd.Engine("tiny-target", "tiny-draft", max_batch=2, max_length=100, max_queue=10))


def chat(**fields) -> ChatRequest:
    return ChatRequest.model_validate({"messages": HELLO} | fields)


NEUTRAL = [(name, value) for name, values in protocol._NEUTRAL.items() for value in values]


@pytest.mark.parametrize(("name", "value"), NEUTRAL, ids=[f"{name}={value!r}" for name, value in NEUTRAL])
def test_a_neutral_value_is_taken_and_another_one_refused(name, value):
    assert chat(**{name: value}) == chat() == chat(**{name: None})
    other = (not value) if isinstance(value, bool) else "another"
    with pytest.raises(ValidationError, match=f"{name} is not supported: leave it out"):
        chat(**{name: other})


@pytest.mark.parametrize(
    ("name", "value"), [("frequency_penalty", False), ("repetition_penalty", True), ("skip_special_tokens", 1)]
)
def test_a_truth_value_is_no_number(name, value):
    with pytest.raises(ValidationError, match="is not supported"):
        chat(**{name: value})


def test_fields_of_the_client_are_ignored_and_unknown_ones_refused():
    assert chat(user="me", metadata={"a": "b"}, service_tier="auto", unknown=None) == chat()
    with pytest.raises(ValidationError, match="unknown field 'temprature': leave it out"):
        chat(temprature=1)


@pytest.mark.parametrize("field", ["n", "max_tokens", "seed", "temperature", "stream", "stop_token_ids"])
@pytest.mark.parametrize("value", ["1", [None], {}])
def test_types_are_not_converted(field, value):
    with pytest.raises(ValidationError):
        chat(**{field: value})


def test_a_turn_is_as_templates_know_it():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert Message(role="user", content=[protocol.Part(**part) for part in parts]).turn()["content"] == "a\nb"
    assert Message(role="developer", content="be brief").turn() == {"role": "system", "content": "be brief"}


def test_settings_are_those_of_the_request_and_else_the_package_s_own(service):
    ask = read(chat(max_tokens=9), service)
    (prompt, params), own = ask.choices[0], service.engine.target.end_token_ids
    assert params == simsd.SamplingParams(max_new_tokens=9, end_token_ids=own)
    fields = {"temperature": 0.5, "top_p": 0.9, "strategy": "entropy_bounded", "entropy_bound": 0.2, "steps": 2}
    fields |= {"sub_block_length": 3}
    more = {"verify": "temporal", "accept": "mrs", "rejected_tail": "draft_argmax", "end_gate": 0.1, "draft_steps": 2}
    ((_, params),) = read(chat(max_tokens=9, seed=3, top_k=-1, **fields, **more), service).choices
    assert params == simsd.SamplingParams(max_new_tokens=9, end_token_ids=own, seed=3, **fields, **more)
    ((_, params),) = read(chat(stop="x", stop_token_ids=[7, 7], ignore_eos=True), service).choices
    assert (params.stop, params.end_token_ids, params.max_new_tokens) == (("x",), (7,), 100 - len(prompt))


def test_seeds_are_those_of_generate(service):
    body = CompletionRequest.model_validate({"prompt": ["a", "b"], "n": 2, "seed": 5, "temperature": 1})
    ask = read(body, service)
    assert [params.seed for _, params in ask.choices] == [5, sample_seed(5, 1)] * 2
    assert [ask.prompt_of(choice) for choice in range(4)] == [0, 0, 1, 1]
    fresh = read(CompletionRequest.model_validate({"prompt": ["a", "b"], "temperature": 1}), service)
    assert len({params.seed for _, params in fresh.choices}) == 2


def test_more_texts_than_ever_find_a_place_are_refused(service):
    assert len(read(CompletionRequest.model_validate({"prompt": ["a"] * 12}), service).choices) == 12
    with pytest.raises(APIError, match="12 texts at most") as refused:
        read(CompletionRequest.model_validate({"prompt": ["a"] * 13}), service)
    assert refused.value.param == "prompt"


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"max_tokens": 100}, "max_tokens"), ({"max_completion_tokens": 100}, "max_completion_tokens")],
    ids=["max_tokens", "max_completion_tokens"],
)
def test_what_has_no_room_is_refused_with_the_figures(service, fields, param):
    with pytest.raises(APIError, match=rf"and {param} is 100, but .* at most 100: .*lower {param}") as refused:
        read(chat(**fields), service)
    assert (refused.value.param, refused.value.code) == (param, "context_length_exceeded")
