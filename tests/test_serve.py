"""`simsd serve` as a process, asked by the official client: texts, streams, seeds, log-probabilities, errors."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import httpx
import openai
import pytest

import simsd
from server_process import FRANCE, eventually
from simsd.seeds import sample_seed

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = [{"role": "user", "content": "Tom has 12 apples. Tom buys 5 more. How many apples does Tom have now?"}]
CHATS = [FRANCE, COUNT, [{"role": "user", "content": "Compute 3 + 4."}]]


def generated(tiny, prompts, **settings) -> list[simsd.Result]:
    return simsd.generate(tiny[0], prompts, tiny[1], **settings)


def streamed(stream) -> tuple[dict[int, str], dict[int, object], list]:
    """Texts and last choices by index, and all chunks."""
    texts, last, chunks = {}, {}, list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            new = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (new or "")
            if choice.finish_reason is not None:
                last[choice.index] = choice
    return texts, last, chunks


SETTINGS = {
    "greedy": ({}, {}),
    "drawn": ({"temperature": 0.9, "seed": 11, "top_p": 0.9}, {"extra_body": {"top_k": 20}}),
    "a negative seed": ({"temperature": 1.3, "seed": -5}, {}),
    "dynamic": ({}, {"extra_body": {"strategy": "low_confidence_dynamic", "threshold": 0.7}}),
    "sub-blocks": ({}, {"extra_body": {"sub_block_length": 2, "steps": 2}}),
    "two steps, native": ({}, {"extra_body": {"steps": 2, "verify": "none"}}),
    "temporal": ({}, {"extra_body": {"verify": "temporal", "rejected_tail": "truncate_no_bonus"}}),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_chat_s_text_is_that_of_generate(client, tiny, name, stream):
    given, more = SETTINGS[name]
    expected = generated(tiny, [COUNT], max_new_tokens=60, **given, **more.get("extra_body", {}))[0]
    answer = client.chat.completions.create(
        model="tiny-target", messages=COUNT, max_tokens=60, stream=stream, **given, **more
    )
    if stream:
        texts, last, _ = streamed(answer)
        assert (texts, last[0].finish_reason) == ({0: expected.text}, "stop")
    else:
        (choice,) = answer.choices
        assert (choice.message.content, choice.message.role) == (expected.text, "assistant")
        assert (choice.finish_reason, choice.ended_by, choice.seed) == ("stop", "end", given.get("seed", 0))
        assert answer.usage.prompt_tokens == len(expected.prompt_tokens)
        assert answer.usage.completion_tokens == len(expected.tokens)
        assert answer.usage.total_tokens == len(expected.prompt_tokens) + len(expected.tokens)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_n_samples_have_the_seeds_of_generate_and_each_comes_again_alone(client, tiny, stream):
    given = {"temperature": 3.0, "max_tokens": 24}
    expected = generated(tiny, [FRANCE], n=3, seed=7, temperature=3.0, max_new_tokens=24)
    answer = client.chat.completions.create(model="tiny-target", messages=FRANCE, n=3, seed=7, stream=stream, **given)
    if stream:
        texts, choices, _ = streamed(answer)
    else:
        choices = dict(enumerate(answer.choices))
        texts = {index: choice.message.content for index, choice in choices.items()}
    assert texts == {index: result.text for index, result in enumerate(expected)}
    assert len(set(texts.values())) > 1
    seeds = [choices[index].seed for index in range(3)]
    assert seeds == [sample_seed(7, index) for index in range(3)]
    alone = client.chat.completions.create(model="tiny-target", messages=FRANCE, seed=seeds[2], **given)
    assert alone.choices[0].message.content == texts[2]


def test_without_a_seed_a_fresh_one_is_returned_and_gives_the_text_again(client):
    given = {"model": "tiny-target", "messages": COUNT, "temperature": 3.0, "max_tokens": 30}
    first, second = (client.chat.completions.create(**given).choices[0] for _ in range(2))
    assert first.seed != second.seed
    again = client.chat.completions.create(**given, seed=first.seed).choices[0]
    assert again.message.content == first.message.content


def test_concurrent_requests_have_the_texts_that_they_have_alone(server, tiny):
    jobs = [(CHATS[i % 3], {"temperature": float(i % 4), "seed": i, "max_tokens": 8 + i}) for i in range(24)]

    async def ask(client, chat, given, stream) -> str:
        made = await client.chat.completions.create(model="tiny-target", messages=chat, stream=stream, **given)
        if not stream:
            return made.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in made])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, *job, i % 2 == 0) for i, job in enumerate(jobs)))

    texts = asyncio.run(all_of_them())
    for (chat, given), text in zip(jobs, texts, strict=True):
        settings = {"temperature": given["temperature"], "seed": given["seed"], "max_new_tokens": given["max_tokens"]}
        assert text == generated(tiny, [chat], **settings)[0].text


def test_completions_take_text_ids_and_lists_without_a_chat_template(client, tiny):
    text = "<|user|>What is the capital of France?<|end|><|assistant|>"
    ids = tiny[0].encode_prompt(FRANCE)
    expected = generated(tiny, [ids], max_new_tokens=20)[0].text
    for prompt in (text, ids, [text], [ids]):
        (choice,) = client.completions.create(model="tiny-target", prompt=prompt, max_tokens=20).choices
        assert choice.text == expected and choice.finish_reason == "stop"
    answer = client.completions.create(model="tiny-target", prompt=[ids, [325, 267]], max_tokens=20, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text == expected for choice in answer.choices[:2]] == [True, True]
    assert answer.usage.prompt_tokens == len(ids) + 2


def test_stop_strings_and_tokens_end_the_text(client, tiny):
    create = client.chat.completions.create
    given = {"model": "tiny-target", "messages": FRANCE}
    choice = create(**given, stop=[" is", "France"]).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.ended_by) == ("The capital of ", "stop", "stop")
    assert create(**given, stop=" is").choices[0].message.content == "The capital of France"
    assert streamed(create(**given, stop=" is", stream=True))[0] == {0: "The capital of France"}
    (token,) = tiny[0].tokenizer.backend.encode(" is")
    choice = create(**given, extra_body={"stop_token_ids": [token]}).choices[0]
    assert (choice.message.content, choice.ended_by) == ("The capital of France is", "end")


def test_lengths(client):
    create = client.chat.completions.create
    given = {"model": "tiny-target", "messages": FRANCE}
    for name in ("max_tokens", "max_completion_tokens"):
        answer = create(**given, **{name: 3})
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)
    to_the_end = create(**given, extra_body={"ignore_eos": True})
    assert to_the_end.usage.total_tokens == 1000 and to_the_end.choices[0].ended_by == "length"


def test_chat_logprobs_are_those_of_the_reveal_whole_and_streamed(client, tiny):
    expected = generated(tiny, [FRANCE], temperature=0.7, seed=3, max_new_tokens=24)[0]
    given = {"model": "tiny-target", "messages": FRANCE, "temperature": 0.7, "seed": 3, "logprobs": True}
    whole = client.chat.completions.create(**given, max_tokens=24).choices[0].logprobs.content
    stream = client.chat.completions.create(**given, max_tokens=24, stream=True)
    parts = [entry for c in stream for choice in c.choices if choice.logprobs for entry in choice.logprobs.content]
    for entries in (whole, parts):
        assert [entry.logprob for entry in entries] == expected.logprobs
        assert "".join(entry.token for entry in entries).removesuffix("<|end|>") == expected.text
        assert bytes(b for entry in entries for b in entry.bytes).decode().startswith(expected.text)


def test_completion_logprobs_and_echo(client, tiny):
    prompt = "<|user|>Compute 3 + 4.<|end|><|assistant|>"
    ids = tiny[0].tokenizer.backend.encode(prompt)
    expected = generated(tiny, [ids], max_new_tokens=12)[0]
    given = {"model": "tiny-target", "prompt": prompt, "max_tokens": 12, "logprobs": 0}
    shown = client.completions.create(**given).choices[0].logprobs
    assert shown.token_logprobs == expected.logprobs and shown.text_offset[0] == 0
    echoed = client.completions.create(**given, echo=True).choices[0]
    assert echoed.text == prompt + expected.text
    assert echoed.logprobs.token_logprobs == [None] * len(ids) + expected.logprobs
    for token, offset in zip(echoed.logprobs.tokens[: len(ids)], echoed.logprobs.text_offset, strict=False):
        assert echoed.text[offset:].startswith(token)
    chunks = list(client.completions.create(**given, echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == echoed.text
    seen = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [offset for part in seen for offset in part.text_offset] == echoed.logprobs.text_offset


def test_top_logprobs_are_the_most_probable_tokens_of_the_reveal(client, tiny):
    """Fewer than the server has room for, whole and streamed, of a chat and of completions."""
    ids, settings = tiny[0].encode_prompt(FRANCE), {"temperature": 2.0, "seed": 3}
    expected = generated(tiny, [ids], max_new_tokens=24, top_logprobs=2, **settings)[0].top_logprobs
    assert expected[0][0][1] > expected[0][1][1]
    text = tiny[0].tokenizer.decode
    chat = {"model": "tiny-target", "messages": FRANCE, "max_tokens": 24, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**chat, **settings).choices[0].logprobs.content
    stream = client.chat.completions.create(**chat, **settings, stream=True)
    parts = [entry for c in stream for choice in c.choices if choice.logprobs for entry in choice.logprobs.content]
    for entries in (whole, parts):
        told = [[(other.token, other.logprob) for other in entry.top_logprobs] for entry in entries]
        assert told == [[(text([id], skip_special_tokens=False), p) for id, p in best] for best in expected]
    given = {"model": "tiny-target", "prompt": ids, "max_tokens": 24, "logprobs": 2}
    shown = client.completions.create(**given, **settings).choices[0].logprobs
    assert [set(best.values()) for best in shown.top_logprobs] == [{p for _, p in best} for best in expected]


def test_a_stream_s_usage_and_chunks(client):
    given = {"model": "tiny-target", "messages": FRANCE, "n": 2, "stream": True}
    *chunks, last = client.chat.completions.create(**given, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    assert last.usage.completion_tokens == 16
    assert all(chunk.usage is None and chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    firsts = {choice.index: choice.delta.role for chunk in reversed(chunks) for choice in chunk.choices}
    assert firsts == {0: "assistant", 1: "assistant"}
    assert all(chunk.choices for chunk in client.chat.completions.create(**given))  # nobody asked for the usage


def test_provisional_text_is_told_apart_and_not_in_the_content(client):
    given = {"model": "tiny-target", "messages": COUNT, "max_tokens": 60}
    expected = client.chat.completions.create(**given).choices[0].message.content
    texts, _, chunks = streamed(
        client.chat.completions.create(**given, stream=True, stream_options={"provisional": True})
    )
    assert texts == {0: expected}
    shown = [chunk.choices[0] for chunk in chunks if hasattr(chunk.choices[0], "provisional")]
    assert shown and all(choice.delta.content is None for choice in shown)
    assert any(piece and piece in expected for choice in shown for piece in choice.provisional)
    plain = client.chat.completions.create(**given, stream=True)
    assert not any(hasattr(chunk.choices[0], "provisional") for chunk in plain)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_the_step_map_is_returned_on_request(client, tiny, stream):
    expected = generated(tiny, [FRANCE], max_new_tokens=16)[0]
    given = {"model": "tiny-target", "messages": FRANCE, "max_tokens": 16}
    answer = client.chat.completions.create(**given, stream=stream, extra_body={"step_map": True})
    choice = streamed(answer)[1][0] if stream else answer.choices[0]
    assert (choice.token_ids, choice.step_map) == (expected.tokens, expected.step_map)


def test_values_that_clients_send_by_habit_change_nothing(client):
    given = {"model": "tiny-target", "messages": FRANCE}
    plain = client.chat.completions.create(**given).choices[0].message
    neutral = {
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "user": "somebody",
        "metadata": {"a": "b"},
        "store": False,
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "modalities": ["text"],
        "seed": None,
        "stop": None,
        "logprobs": False,
        "top_logprobs": 0,
        "stream_options": None,
    }
    assert client.chat.completions.create(**given, **neutral).choices[0].message.content == plain.content
    # An answer sent back as the client has it, and text in parts.
    follow_up = [*FRANCE, plain.model_dump(), {"role": "user", "content": [{"type": "text", "text": "Compute 3 + 4."}]}]
    assert client.chat.completions.create(model="tiny-target", messages=follow_up).choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_leaves_frees_its_slot(server, stream):
    body = {"messages": FRANCE, "max_tokens": 900, "ignore_eos": True, "stream": stream, "n": 8}
    before = server.metric('requests_finished_total{reason="cancelled"}') if _cancelled(server) else 0
    timeout = httpx.Timeout(60, read=60 if stream else 0.7)
    with httpx.Client(timeout=timeout) as client:
        if stream:
            with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{server.url}/v1/chat/completions", json=body)
    eventually(lambda: server.metric("requests_running") == server.metric("requests_waiting") == 0)
    assert server.metric('requests_finished_total{reason="cancelled"}') - before == 8


def _cancelled(server) -> bool:
    return 'reason="cancelled"' in httpx.get(f"{server.url}/metrics").text


def test_models_tokens_health_and_metrics(server, client, tiny):
    (model,) = client.models.list()
    assert (model.id, model.max_model_len, model.block_length) == ("tiny-target", 1000, 4)
    assert client.models.retrieve("tiny-target") == model
    ids = tiny[0].encode_prompt(FRANCE)
    by_chat = httpx.post(f"{server.url}/tokenize", json={"model": "tiny-target", "messages": FRANCE})
    assert by_chat.json() == {"count": len(ids), "max_model_len": 1000, "tokens": ids}
    by_text = httpx.post(f"{server.url}/tokenize", json={"prompt": "What is the capital of France?"})
    assert by_text.json()["tokens"] == ids[1:-2]  # without the turn around it
    for body in ({}, {"prompt": "a", "messages": FRANCE}):
        assert httpx.post(f"{server.url}/tokenize", json=body).status_code == 400
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "reproducible": True, "error": None}
    before = server.metric("generated_tokens_total")
    client.chat.completions.create(model="tiny-target", messages=FRANCE, max_tokens=5)
    assert server.metric("generated_tokens_total") - before == 5
    assert server.metric("slots") == 8


def test_a_line_of_the_log_for_each_request(server, client):
    client.chat.completions.create(model="tiny-target", messages=FRANCE, max_tokens=5)
    httpx.get(f"{server.url}/no%0Asuch%20path")
    lines = server.log.read_text().splitlines()
    pattern = r"127\.0\.0\.1 POST /v1/chat/completions 200 [\d.]+s choices=1 prompt_tokens=10 new_tokens=5$"
    assert re.search(pattern, lines[-2]), lines[-2]
    assert "404" in lines[-1] and "such path" in lines[-1]


def test_the_guide_s_examples_run(server, capsys):
    guide = (Path(__file__).parents[1] / "docs/serve.md").read_text(encoding="utf-8")
    examples = re.findall(r"```py\n(.*?)```", guide, re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example.replace("http://127.0.0.1:8000", server.url), "serve.md", "exec"), {})  # noqa: S102
    assert "Paris" in capsys.readouterr().out
    for body in re.findall(r"curl .*?-d '(\{.*?\})'", guide, re.DOTALL):
        json.loads(body)
