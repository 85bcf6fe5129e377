"""One record of an iteration serves whatever happens: a CUDA graph of it can be replayed for every acceptance."""

from __future__ import annotations

import collections
import random

import pytest

import simsd
from recorded import Batch, constants, decode, record, request
from simsd import GenerationConfig
from simsd.decode.iteration import Shape
from simsd.decode.temporal import Temporal
from stand_ins import disturbed, random_sdar

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, CAPACITY, BLOCK = 4, 64, 4
STATES = 6
DRAFTS = {"stranger": (0.0, 0.2), "relative": (0.3, 0.8), "twin": (0.85, 1.0)}  # accepted of what was judged
COMMON = {"lookahead": 2, "states": STATES, "logits_rows": COUNT * STATES * BLOCK, "draft_blocks": 2}
SHAPES = {
    "native": Shape(states=1, logits_rows=COUNT * BLOCK, noise=True, filters=(True, True)),
    "greedy": Shape(**COMMON),
    "noise": Shape(**COMMON, noise=True, filters=(True, True)),
    "self": Shape(**COMMON | {"draft_blocks": 0}, self_draft=True, keeps_logits=True, noise=True, filters=(True, True)),
    "lookup": Shape(
        **COMMON | {"draft_blocks": 0},
        lookup=True,
        self_draft=True,
        keeps_logits=True,
        noise=True,
        filters=(True, True),
    ),
    "both": Shape(**COMMON, draft_steps=2, self_draft=True, keeps_logits=True, noise=True, filters=(True, True)),
}


def deterministic(model: simsd.LoadedModel) -> simsd.LoadedModel:
    return simsd.load(model.model, deterministic=True)


@pytest.fixture(scope="module")
def target():
    return deterministic(random_sdar(0))


@pytest.fixture(scope="module")
def drafts():
    models = {"stranger": random_sdar(1), "relative": disturbed(random_sdar(0), 0.02), "twin": random_sdar(0)}
    return {name: deterministic(model) for name, model in models.items()}


STRATEGIES = (
    {"strategy": "sequential"},
    {"strategy": "low_confidence_static"},
    {"strategy": "low_confidence_dynamic", "threshold": 0.4},
    {"strategy": "entropy_bounded", "entropy_bound": 1.0},
)


def settings(draw: random.Random, noise: bool) -> dict:
    """Of one request: no two slots need agree on anything."""
    chosen = {
        "max_new_tokens": draw.randint(1, 24),
        "steps": draw.choice((None, 1, 2, 3, 4)),
        **draw.choice(STRATEGIES),
    }
    if draw.random() < 0.5:
        chosen["end_token_ids"] = draw.sample(range(60), 2)
    if noise and draw.random() < 0.7:
        chosen |= {"temperature": draw.choice((0.3, 0.8, 1.2)), "seed": draw.randrange(2**40)}
        chosen |= draw.choice(({}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.9}))
    return chosen


@pytest.fixture(scope="module")
def jobs(target):
    """Prompts, settings and what native decoding makes of each alone, by whether noise is allowed."""
    made = {}
    for noise, count in ((False, 30), (True, 200)):
        draw = random.Random(int(noise))
        made[noise] = []
        for _ in range(count):
            prompt = [draw.randrange(60) for _ in range(draw.randint(1, 30))]
            given = settings(draw, noise)
            (result,) = simsd.generate(target, [prompt], None, GenerationConfig(verify="none", **given))
            made[noise].append((prompt, given, result))
    return made


def replays(target, draft, shapes, jobs, **changes):
    """The requests decoded by replays, in a batch that the records have never seen; each text is the job's."""
    seen = Batch(target, draft, shapes, COUNT, CAPACITY)
    graphs = {shape: record(seen, shape) for shape in shapes}
    batch = Batch(target, draft, shapes, COUNT, CAPACITY)
    requests = [request(n, target, prompt, **given) for n, (prompt, given, _) in enumerate(jobs)]
    decoded = decode(batch, lambda shape: graphs[shape](*batch.tensors), requests, **changes)
    for mine, (_, _, alone) in zip(decoded.requests, jobs, strict=True):
        count = len(mine.new) if mine.finish_reason == "cancelled" else len(alone.tokens)
        assert mine.new == alone.tokens[:count]
        assert mine.steps == alone.step_map[:count]
        assert mine.probs == alone.probs[:count]
        assert mine.finish_reason in ("cancelled", alone.finish_reason)
    return decoded


@pytest.mark.parametrize("name", DRAFTS)
def test_one_record_serves_every_acceptance(target, drafts, jobs, name):
    """Requests of mixed settings join, end and are cancelled meanwhile."""
    decoded = replays(target, drafts[name], [SHAPES["noise"]], jobs[True], seed=1, cancels=0.02)
    low, high = DRAFTS[name]
    assert low <= decoded.accepted / decoded.judged <= high, (decoded.accepted, decoded.judged)
    assert decoded.iterations > 100
    reasons = collections.Counter(mine.finish_reason for mine in decoded.requests)
    assert set(reasons) == {"end", "length", "cancelled"} and min(reasons.values()) >= 4, reasons


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "noise"])
def test_texts_are_native_decodings_in_every_shape(target, drafts, jobs, shape):
    decoded = replays(target, drafts["relative"], [SHAPES[shape]], jobs[SHAPES[shape].noise][:30], seed=2)
    assert (decoded.accepted > 0) == (shape != "native")


@pytest.mark.parametrize("name", DRAFTS)
def test_which_shape_an_iteration_has_does_not_show(target, drafts, jobs, name):
    """A tuner picks shapes by the clock; a proposal may stand that is deeper than the next shape."""
    shapes = [*SHAPES.values(), Shape(**COMMON | {"lookahead": 1, "draft_blocks": 1}, noise=True, filters=(True, True))]
    shapes.remove(SHAPES["greedy"])  # knows no noise
    decoded = replays(target, drafts[name], shapes, jobs[True][:100], seed=5, cancels=0.02)
    assert decoded.iterations > 100


@pytest.mark.parametrize(
    ("accept", "rejected_tail", "end_gate"),
    [("match", "truncate", 0.0), ("match", "draft_argmax", 0.5), ("mrs", "truncate_no_bonus", 0.0)],
)
def test_temporal_texts_are_what_they_would_be_alone(target, drafts, accept, rejected_tail, end_gate):
    draw = random.Random(7)
    judged = {"accept": accept, "rejected_tail": rejected_tail, "end_gate": end_gate}
    temporal = []
    for _ in range(30):
        prompt = [draw.randrange(60) for _ in range(draw.randint(1, 30))]
        given = settings(draw, noise=True) | {"steps": None, "verify": "temporal", **judged}
        (result,) = simsd.generate(target, [prompt], drafts["relative"], GenerationConfig(**given))
        temporal.append((prompt, given, result))
    rule = Temporal(accept, rejected_tail, gates=end_gate > 0)
    shape = Shape(lookahead=1, draft_steps=BLOCK, noise=True, filters=(True, True), temporal=rule)
    decoded = replays(target, drafts["relative"], [shape], temporal, seed=4, cancels=0.02)
    assert 0 < decoded.accepted < decoded.judged
    for mine, (_, _, alone) in zip(decoded.requests, temporal, strict=True):
        count = len(mine.new)
        assert (mine.origins, mine.logprobs) == (alone.origins[:count], alone.logprobs[:count])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_record_holds_nothing_but_weights(target, drafts, shape):
    graph = record(Batch(target, drafts["relative"], [SHAPES[shape]], COUNT, CAPACITY), SHAPES[shape])
    storages = {
        x.untyped_storage().data_ptr() for model in (target, drafts["relative"]) for x in model.model.parameters()
    }
    odd = [x for x in constants(graph) if x.untyped_storage().data_ptr() not in storages]
    assert constants(graph) and not odd
