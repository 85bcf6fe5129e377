"""`top_logprobs`: what the target found most probable where it revealed a token, whoever shares a batch or drafts."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

import pretended_cuda
import simsd
import simsd_kernels as kernels
from benchmarks.cpu import trace_iteration as tracing
from recorded import Batch, decode, record, request
from replays import PROMPTS, STRATEGIES, replay_block, temporal_logits
from serving import serve, temporal_jobs, varied_jobs
from simsd import Result, SimsdError
from simsd.decode.exchange import Report
from simsd.decode.iteration import Parts, Shape
from simsd.decode.tops import rank
from stand_ins import MASK, random_sdar
from test_trace_iteration import SHAPES

pytestmark = pytest.mark.usefixtures("one_thread")

STATIC = Parts(packed=False)
NOISE = [{}, {"temperature": 0.7, "seed": 3}, {"temperature": 1.2, "seed": 4, "top_k": 5, "top_p": 0.9}]


@pytest.fixture(scope="module")
def jobs(tiny):
    """With what native decoding alone tells of each."""
    jobs = varied_jobs(tiny[0], per_family=2)
    return [(prompt, own, told(tiny[0], prompt, own)) for prompt, own, _ in jobs]


def told(target, prompt, own: dict, draft=None, **others) -> Result:
    others = {"verify": "none"} | own | others
    return simsd.generate(target, [prompt], draft, top_logprobs=4, max_batch=1, **others)[0]


def recomputed(model, result: Result, count: int, temperature: float) -> list[list[tuple[int, float]]]:
    """By a plain forward of each token's state."""
    text, first, ranked = [*result.prompt_tokens, *result.tokens, *result.cut_tokens], len(result.prompt_tokens), []
    for at, revealed in enumerate(result.revealed_sets(4)[: len(result.tokens)]):
        begin = (first + at) // 4 * 4
        block = [text[begin + i] if revealed >> i & 1 else MASK for i in range(4)]
        with torch.no_grad():
            logits = model.model(torch.tensor([text[:begin] + block])).logits[0, first + at].float()
        logits[MASK] = -math.inf
        best = (logits / (temperature or 1.0)).log_softmax(0).sort(descending=True, stable=True)
        ranked.append(list(zip(best.indices[:count].tolist(), best.values[:count].tolist(), strict=True)))
    return ranked


def close(mine: list, expected: list) -> None:
    for ours, theirs in zip(mine, expected, strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]
        assert [logprob for _, logprob in ours] == pytest.approx([logprob for _, logprob in theirs], abs=1e-4)


def consistent(result: Result, count: int = 4) -> None:
    """One list per token, best first; the token's own entry is `logprobs`'."""
    assert len(result.top_logprobs) == len(result.tokens)
    for token, logprob, ranked in zip(result.tokens, result.logprobs, result.top_logprobs, strict=True):
        assert len(ranked) == count == len({other for other, _ in ranked})
        values = [value for _, value in ranked]
        assert values == sorted(values, reverse=True) and values[0] <= 0.0
        own = [value for other, value in ranked if other == token]
        assert own == [logprob] or (not own and logprob <= values[-1])


@pytest.mark.parametrize("noise", NOISE, ids=["greedy", "noise", "filtered"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy["strategy"])
def test_tops_are_those_of_a_plain_forward_on_the_state_of_each_token(target, draft, strategy, noise):
    for prompt in PROMPTS[:4]:
        own = {"max_new_tokens": 14, "end_token_ids": (), **strategy, **noise}
        exact = simsd.generate(target, [prompt], draft, top_logprobs=20, drafter="model", **own)[0]
        consistent(exact, 20)
        close(exact.top_logprobs, recomputed(target, exact, 20, own.get("temperature", 0.0)))


@pytest.mark.parametrize("drafter", ["model", "self", "auto"])
@pytest.mark.parametrize("kind", ["packed", "static", "captured", "beside"])
def test_tops_are_native_decodings_bit_for_bit(tiny, jobs, kind, drafter, monkeypatch):
    """Whoever drafts, joins and leaves, with reports one iteration late, and with a draft beside the target."""
    if kind == "captured":
        pretended_cuda.pretend(monkeypatch)
    parts = Parts() if kind in ("packed", "beside") else STATIC
    engine = simsd.Engine(
        *tiny,
        **{"max_batch": 4, "max_length": 128, "max_rows": 64, "top_logprobs": 4, "parts": parts},
        draft_device="cpu" if kind == "beside" else None,
    )
    results = serve(engine, jobs, cancels=(1, 3), drafter=drafter)
    assert sum(result.stats.accepted for result in results.values()) > 0 or drafter == "auto"
    for job, result in results.items():
        alone = jobs[job][2]
        count = len(result.tokens)
        assert count == len(alone.tokens) or job in (1, 3)
        assert result.tokens == alone.tokens[:count]
        assert result.top_logprobs == alone.top_logprobs[:count]
        consistent(result)


def test_settings_of_a_text_do_not_depend_on_whether_tops_are_told(tiny, jobs):
    for prompt, own, alone in jobs[:4]:
        (without,) = simsd.generate(tiny[0], [prompt], None, verify="none", max_batch=1, **own)
        assert without.top_logprobs == []
        assert (without.tokens, without.logprobs) == (alone.tokens, alone.logprobs)


def test_temporal_tops_are_those_of_the_verification_that_judged_each_token(target, draft):
    config = simsd.GenerationConfig(verify="temporal", max_new_tokens=14, end_token_ids=(), top_logprobs=4)
    for prompt in PROMPTS:
        (result,) = simsd.generate(target, [prompt], draft, config)
        consistent(result)
        text, expected = list(prompt), []
        while len(expected) < len(result.tokens):
            start = len(text) // 4 * 4
            known = text[start:]
            block, taken, _ = replay_block(draft, text[:start], known, config)
            logits = temporal_logits(target, text[:start], known, block, taken)
            for i in range(len(known), 4):
                best = logits[i].log_softmax(0).sort(descending=True, stable=True)
                expected.append(list(zip(best.indices[:4].tolist(), best.values[:4].tolist(), strict=True)))
                text.append(expected[-1][0][0])
                if text[-1] != block[i]:
                    break
        close(result.top_logprobs, expected[: len(result.tokens)])
        assert "bonus" in result.origins or "drafted" in result.origins


@pytest.mark.parametrize("accept", ["match", "mrs"])
@pytest.mark.parametrize("rejected_tail", ["truncate", "target_argmax_all", "draft_argmax"])
def test_temporal_tops_do_not_depend_on_the_batch(tiny, jobs, accept, rejected_tail):
    judged = {"accept": accept, "rejected_tail": rejected_tail, "end_gate": 0.3}
    temporal = [(prompt, own | judged, None) for prompt, own, _ in temporal_jobs(tiny, jobs, count=5)]
    config = {"max_batch": 4, "max_length": 128, "top_logprobs": 4}
    results = serve(simsd.Engine(*tiny, **config), temporal)
    for job, (prompt, own, _) in enumerate(temporal):
        alone = told(tiny[0], prompt, own, draft=tiny[1])
        assert results[job].tokens == alone.tokens and results[job].top_logprobs == alone.top_logprobs
        consistent(results[job])


def test_one_record_of_an_iteration_tells_them_whatever_is_accepted():
    target, draft = (simsd.load(random_sdar(seed).model, deterministic=True) for seed in (0, 0))
    common = {"lookahead": 2, "states": 6, "logits_rows": 3 * 6 * 4, "draft_blocks": 2}
    shapes = [Shape(**common, noise=True), Shape(states=1, logits_rows=12, noise=True)]
    draw, jobs = random.Random(1), []
    for _ in range(30):
        own = {"max_new_tokens": draw.randint(1, 20), **draw.choice(STRATEGIES), **draw.choice(NOISE[:2])}
        prompt = [draw.randrange(60) for _ in range(draw.randint(1, 20))]
        jobs.append((prompt, own, told(target, prompt, own)))
    batches = [Batch(target, draft, shapes, 3, 64, top_logprobs=4) for _ in range(2)]
    graphs = {shape: record(batches[0], shape) for shape in shapes}
    requests = [request(n, target, prompt, **own) for n, (prompt, own, _) in enumerate(jobs)]
    decoded = decode(batches[1], lambda shape: graphs[shape](*batches[1].tensors), requests, seed=3)
    assert decoded.accepted > 0
    for mine, (_, _, alone) in zip(decoded.requests, jobs, strict=True):
        assert mine.new == alone.tokens and mine.top_logprobs == alone.top_logprobs


@pytest.mark.parametrize("ending", ["stop string", "end token", "limit", "prompt in the middle of a block"])
def test_there_is_one_list_per_token_however_a_text_ends(tiny, ending):
    own = {
        "stop string": {"stop": "Paris"},
        "end token": {},
        "limit": {"max_new_tokens": 3},
        "prompt in the middle of a block": {"max_new_tokens": 2},
    }[ending]
    prompt = [5, 6, 7, 8, 9] if "middle" in ending else "What is the capital of France?"
    (result,) = simsd.generate(tiny[0], [prompt], tiny[1], top_logprobs=4, **own)
    consistent(result)
    assert result.tokens


def test_equals_come_by_the_lower_id_whatever_their_sign():
    logits = torch.tensor([[1.0, 2.0, 2.0, -0.0, 0.0, 2.0], [-3.0, -3.0, -1.0, -3.0, -2.0, -3.0]])
    temperature, banned = torch.zeros(2), kernels.banned_mask([1], 6)
    tops = rank(logits, torch.tensor([2, 0]), temperature, banned, 4)
    assert tops.ids.tolist() == [[2, 5, 0, 3], [2, 4, 0, 3]]
    assert tops.margin.tolist() == [[0.0, 0.0, -1.0, -2.0], [2.0, 1.0, 0.0, 0.0]]
    tops = rank(logits.bfloat16(), torch.tensor([0, 2]), torch.tensor([0.5, 2.0]), banned, 3)
    assert tops.ids.tolist() == [[2, 5, 0], [2, 4, 0]]
    assert tops.margin.tolist() == [[2.0, 2.0, 0.0], [0.0, -0.5, -1.0]]


def test_a_vocabulary_smaller_than_what_is_asked_for_is_told_whole():
    target = random_sdar(0, vocab_size=16, mask_token_id=15, eos_token_id=14)
    (result,) = simsd.generate(target, [[1, 2]], max_new_tokens=6, top_logprobs=20, end_token_ids=())
    for ranked in result.top_logprobs:
        assert sorted(token for token, _ in ranked) == list(range(15))  # the mask token is never generated
        assert sum(math.exp(logprob) for _, logprob in ranked) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("given", [-1, 21, 1.5, True, "3", None])
def test_what_cannot_be_asked_for_is_refused(target, given):
    with pytest.raises(SimsdError, match=r"top_logprobs must be an integer in 0..20, got "):
        simsd.Engine(target, top_logprobs=given)


def test_it_is_a_setting_of_the_engine_and_not_of_a_request(target):
    engine = simsd.Engine(target, top_logprobs=2, max_length=64)
    with pytest.raises(SimsdError, match="unknown setting 'top_logprobs'"):
        engine.add([1, 2], top_logprobs=3)


def test_results_come_back_from_json_and_from_before_there_were_any(target):
    (result,) = simsd.generate(target, [[5, 3]], max_new_tokens=6, top_logprobs=2)
    values = json.loads(json.dumps(result.to_dict()))
    assert Result.from_dict(values) == result and isinstance(Result.from_dict(values).top_logprobs[0][0], tuple)
    del values["top_logprobs"]
    assert Result.from_dict(values).top_logprobs == []


@pytest.mark.parametrize("name", SHAPES)
def test_no_iteration_reads_uploads_or_takes_a_launch_where_none_are_told(name):
    """`trace` raises where the host reads."""

    def launches(count: int):
        return tracing.trace("1.7B", "1.7B", SHAPES[name], batch=3, layers=1, top_logprobs=count)

    told, off = launches(5), launches(0)
    assert not told.uploads and any("decode/tops.py" in call.place for call in told.calls)
    assert not [call for call in off.calls if "tops" in call.place]


def test_a_report_without_them_is_not_a_byte_longer():
    text = 4 * 4  # two drafted blocks, what they lead to, and the current one
    off, on = (Report.allocate(3, 2, 4, "cpu", top_logprobs=count)._whole for count in (0, 5))
    assert off.shape == (3, 16 + 5 * text + 4)
    assert on.shape == (3, 16 + 5 * text + 4 + 2 * 5 * text)


def test_the_command_line_tells_them_in_json_alone(run, assert_one_line_error):
    code, out, _ = run("generate", "What is the capital of France?", "--json", "--top-logprobs", 2)
    answer = json.loads(out)
    assert code == 0 and len(answer["top_logprobs"]) == len(answer["tokens"])
    assert [ranked[0][0] for ranked in answer["top_logprobs"]] == answer["tokens"]  # it is greedy
    assert_one_line_error(run("generate", "hi", "--top-logprobs", 2), "--top-logprobs are told in JSON: add --json")
    too_many = run("generate", "hi", "--json", "--top-logprobs", 21)
    assert_one_line_error(too_many, "top_logprobs must be an integer in 0..20, got 21")
