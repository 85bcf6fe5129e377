"""What of a drafted block is committed: golden cases, plain loops, the definition on random cases."""

import json
import math
import pathlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import simsd_kernels
from backends import backends, device_of, each_dtype, kernels, sized
from logits import INF
from simsd_kernels import dispatch
from verdicts import DECISIONS, arguments, one_of, random_case, random_logits, sample_logits, uniform, verify, walk

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "greedy_accept.json").read_text())["cases"]
LANES = ("target_logits", "draft_ids", "known", "drafted", "temperature", "top_k", "top_p", "seed", "position")
LANES += ("revealed", "draft_logits", "coin", "residual")
STATISTICS = ("prob", "draw_logprob")
CASES = {"reference": 0, "cpu": 60, "triton": 68, "cuda": 400}
many_rows = backends("reference", "cpu", "cuda")  # each is a program of its own in Triton's interpreter


def random_arguments(seed: int) -> dict:
    target, draft_ids, settings = random_case(seed)
    return arguments(target, draft_ids, **settings)


@kernels
def test_verdicts_are_those_of_the_definition(backend, seed):
    target, draft_ids, settings = random_case(seed)
    out = verify(target, draft_ids, backend=backend, **settings)
    for other in ("reference", "cpu") if backend == "cuda" else ("reference",):
        expected = verify(target, draft_ids, backend=other, **settings)
        for name in DECISIONS:
            assert torch.equal(getattr(out, name), getattr(expected, name)), (other, name)
        for name in STATISTICS:
            torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=5e-6, atol=5e-6, msg=name)
    b = seed % target.shape[0]
    again = verify(target[b : b + 1], draft_ids[b : b + 1], backend=backend, **one_of(b, settings))
    assert all(torch.equal(x[b : b + 1], y) for x, y in zip(out, again, strict=True))


@pytest.mark.parametrize("number", range(len(GOLDEN)))
def test_golden_greedy_acceptance(backend, number):
    case = GOLDEN[number]
    length = len(case["draft_ids"])
    target = random_logits(1, length, 1024, seed=number)
    target[0, torch.arange(length), case["target_argmax"]] = 20.0
    out = verify(target, [case["draft_ids"]], backend=backend)
    assert out.accepted.item() == case["n_accepted"]
    assert out.bonus.item() == (-1 if case["bonus"] is None else case["bonus"])
    assert [token for token in out.tokens[0].tolist() if token >= 0] == case["accepted_ids"]
    assert out.target_ids[0].tolist() == case["target_argmax"]


def test_known_tokens_are_kept_whatever_the_target_says(backend):
    target = torch.zeros(1, 4, 10)
    target[0, :, 3] = 5.0
    out = verify(target, [[7, 999, 3, 3]], known=2, backend=backend)
    assert out.accepted.item() == 2 and out.bonus.item() == -1
    assert out.tokens.tolist() == [[7, 999, 3, 3]] and out.target_ids.tolist() == [[7, 999, 3, 3]]
    assert out.prob[0, :2].tolist() == [1.0, 1.0] and out.draw_logprob[0, :2].tolist() == [0.0, 0.0]
    everything = verify(target, [[7, 999, -5, 3]], known=4, backend=backend)
    assert everything.accepted.item() == 0 and everything.bonus.item() == -1
    assert everything.tokens.tolist() == [[7, 999, -5, 3]] and everything.prob.tolist() == [[1.0] * 4]


def test_positions_never_drafted_take_the_targets_token_and_are_not_counted(backend):
    target = torch.zeros(1, 4, 10)
    target[0, :, 3] = 5.0
    out = verify(target, [[3, 8, 3, 8]], drafted=0b0101, backend=backend)
    assert out.accepted.item() == 2 and out.bonus.item() == -1 and out.tokens.tolist() == [[3, 3, 3, 3]]
    stopped = verify(target, [[3, 8, 5, 8]], drafted=0b0101, backend=backend)
    assert stopped.accepted.item() == 1 and stopped.bonus.item() == 3 and stopped.tokens.tolist() == [[3, 3, 3, -1]]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_probabilities_are_the_targets_before_filtering(backend, temperature):
    target = random_logits(5, 6, 700)
    key = {"seed": 3} if temperature else {}
    plain = verify(target, torch.zeros(5, 6, dtype=torch.int64), temperature=temperature, backend=backend, **key)
    draft = plain.target_ids.clone()
    draft[:, 3] += 1  # rejected there
    out = verify(
        *(target, draft), known=1, temperature=temperature, top_k=700, top_p=1.0, banned=[699], backend=backend, **key
    )
    target[..., 699] = -INF
    p = (target.double() / (temperature or 1.0)).softmax(dim=2)
    judged = torch.where(out.tokens >= 0, out.tokens, out.target_ids)
    expected = p.gather(2, judged[:, :, None]).squeeze(2)
    expected[:, 0] = 1.0
    torch.testing.assert_close(out.prob.double(), expected, rtol=2e-6, atol=2e-6)
    assert (out.tokens[:, 4:] == -1).all() and (out.target_ids[:, 4:] >= 0).all()


def test_match_at_temperature_draws_as_sample_logits_does(backend):
    batch, length, vocabulary = 3, 5, 321
    target = random_logits(batch, length, vocabulary)
    seed, position = torch.tensor([1, 2, -3]), torch.arange(40, 40 + length).expand(batch, length)
    revealed = torch.arange(batch * length).view(batch, length) * 12345678901
    top_k, top_p, temperature = torch.tensor([0, 5, 0]), torch.tensor([1.0, 1.0, 0.8]), torch.tensor([0.9, 1.3, 0.5])
    rows = lambda value, dtype: value.to(dtype).repeat_interleave(length)  # noqa: E731
    drawn = sample_logits(
        target.flatten(0, 1),
        rows(temperature, torch.float32),
        rows(top_k, torch.int32),
        rows(top_p, torch.float32),
        rows(seed, torch.int64),
        position.flatten().int(),
        revealed.flatten(),
        simsd_kernels.banned_mask([0, 7], target.shape[2]),
        backend=backend,
    )
    expected = drawn.token.view(batch, length)
    draft = expected.clone()
    draft[1, 2] += 1
    out = verify(
        *(target, draft), temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, position=position,
        revealed=revealed, banned=[0, 7], backend=backend,
    )  # fmt: skip
    assert torch.equal(out.target_ids, expected)
    assert out.accepted.tolist() == [5, 2, 5] and out.bonus.tolist() == [-1, expected[1, 2].item(), -1]
    torch.testing.assert_close(out.prob, drawn.prob.view(batch, length), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.draw_logprob, drawn.draw_logprob.view(batch, length), rtol=1e-6, atol=1e-6)


@many_rows
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_match_walks_as_the_plain_loop_does(backend, data):
    batch, length, vocabulary = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 6)), 3
    target = random_logits(batch, length, vocabulary, seed=data.draw(st.integers(0, 50)))
    if data.draw(st.booleans()):
        target = target.round()  # ties
    draft = data.draw(st.lists(st.integers(0, 2), min_size=batch * length, max_size=batch * length))
    draft = torch.tensor(draft, dtype=torch.int64).view(batch, length)
    known = torch.tensor([data.draw(st.integers(0, length)) for _ in range(batch)])
    drafted = torch.tensor([data.draw(st.integers(0, 63)) for _ in range(batch)])
    out = verify(target, draft, known=known, drafted=drafted, backend=backend)
    for b in range(batch):
        best = [int((row == row.max()).nonzero()[0]) for row in target[b]]
        accepted, bonus, tokens = walk(
            draft[b].tolist(), best, int(known[b]), drafted[b], lambda i, b=b, best=best: draft[b, i] == best[i]
        )
        assert (out.accepted[b], out.bonus[b], out.tokens[b].tolist()) == (accepted, bonus, tokens)


def test_garbage_where_nothing_was_drafted_does_not_matter(backend):
    target, draft = random_logits(3, 4, 40), random_logits(3, 4, 40, seed=1)
    coin, residual = uniform(3, 4), uniform(3)
    draft_ids = draft.argmax(dim=2)
    settings = {"known": 1, "drafted": 0b1010, "temperature": 1.0, "rule": "mrs", "coin": coin, "residual": residual}
    clean = verify(target, draft_ids, draft_logits=draft, backend=backend, **settings)
    poisoned_ids, poisoned = draft_ids.clone(), draft.clone()
    poisoned_ids[:, 2], poisoned[:, 2], poisoned[:, 0] = -9, math.nan, math.nan
    again = verify(target, poisoned_ids, draft_logits=poisoned, backend=backend, **settings)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


def test_row_with_nothing_finite_takes_the_lowest_allowed_id(backend):
    target = torch.full((1, 2, 20), math.nan)
    out = verify(target, [[1, 5]], banned=[0], backend=backend)
    assert out.accepted.item() == 1 and out.bonus.item() == 1 and out.prob.tolist() == [[0.0, 0.0]]
    assert out.draw_logprob.tolist() == [[-INF, -INF]]
    drawn = verify(
        *(target, [[5, 5]]), temperature=1.0, rule="mrs", draft_logits=torch.zeros(1, 2, 20), coin=torch.zeros(1, 2),
        residual=torch.zeros(1), banned=[0], backend=backend,
    )  # fmt: skip
    assert drawn.accepted.item() == 0 and drawn.bonus.item() == 1 and drawn.draw_logprob.tolist() == [[-INF, -INF]]


@backends("cpu", "cuda")
@each_dtype
@pytest.mark.parametrize("rule", ["match", "mrs"])
@pytest.mark.parametrize("batch, length, vocabulary", [(5, 7, 3), (4, 4, 130), (3, 64, 515), (1, 2, 151936)])
@pytest.mark.parametrize("top_k, top_p", [(None, None), (20, 0.9)])
def test_same_verdicts_as_the_reference(backend, dtype, rule, batch, length, vocabulary, top_k, top_p):
    target = random_logits(batch, length, vocabulary, seed=vocabulary, scale=4.0).to(dtype)
    draft = (target + random_logits(batch, length, vocabulary, seed=5, scale=0.5)).to(dtype)
    given = {
        "known": torch.arange(batch) % 2,
        "drafted": ~(torch.arange(batch) % 5),
        "temperature": (torch.arange(batch) % 3 * 0.5 + 0.5) * (torch.arange(batch) % 4 < 3),
        "top_k": top_k,
        "top_p": top_p,
        "rule": rule,
        "banned": [1],
        "draft_logits": draft,
        "coin": uniform(batch, length),
        "residual": uniform(batch),
    }
    if rule == "match":
        given |= {"seed": 5, "revealed": 3}
    draft_ids = verify(target, torch.zeros(batch, length, dtype=torch.int64), backend="reference", **given).target_ids
    draft_ids = torch.where(uniform(batch, length, seed=9) < 0.8, draft_ids, (draft_ids + 1) % vocabulary)
    expected = verify(target, draft_ids, backend="reference", **given)
    out = verify(target, draft_ids, backend=backend, **given)
    for name in DECISIONS:
        assert torch.equal(getattr(out, name), getattr(expected, name)), name
    for name in STATISTICS:
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=5e-6, atol=5e-6, msg=name)


def test_result_does_not_depend_on_batch_strides_or_threads(backend, threads):
    batch, length = sized((6, 5), interpreted=(2, 3))
    target, draft = random_logits(batch, length, 300), random_logits(batch, length, 300, seed=1)
    draft_ids = target.argmax(dim=2)
    settings = {"temperature": 1.0, "rule": "mrs", "top_k": 30}
    settings |= {"coin": uniform(batch, length), "residual": uniform(batch)}
    whole = verify(target, draft_ids, draft_logits=draft, backend=backend, **settings)
    strided = torch.empty(length, 300, 2 * batch)[:, :, ::2].permute(2, 0, 1).copy_(target)
    threads(1)
    again = verify(strided, draft_ids, draft_logits=draft, backend=backend, **settings)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for b in range(batch):
        one = {name: value[b : b + 1] if torch.is_tensor(value) else value for name, value in settings.items()}
        alone = verify(target[b : b + 1], draft_ids[b : b + 1], draft_logits=draft[b : b + 1], backend=backend, **one)
        for name in DECISIONS:
            assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[b]), name


@pytest.mark.parametrize("rule", ["match", "mrs"])
@pytest.mark.parametrize("batch, length", [(0, 4), (3, 0), (0, 0)])
def test_empty_batches_and_blocks_are_fine(backend, rule, batch, length):
    target = torch.zeros(batch, length, 9)
    extra = {"draft_logits": target, "coin": torch.zeros(batch, length), "residual": torch.zeros(batch)}
    out = verify(
        *(target, torch.zeros(batch, length, dtype=torch.int64)), rule=rule, backend=backend,
        **(extra if rule == "mrs" else {}),
    )  # fmt: skip
    assert out.accepted.tolist() == [0] * batch and out.bonus.tolist() == [-1] * batch
    assert out.tokens.shape == out.target_ids.shape == (batch, length)
    assert out.prob.shape == out.draw_logprob.shape == (batch, length)
    assert [value.dtype for value in out] == [torch.int32, *[torch.int64] * 3, *[torch.float32] * 2]


def good_arguments(rule="mrs"):
    """Two blocks of four over nine ids."""
    made = arguments(
        *(torch.zeros(2, 4, 9), torch.zeros(2, 4, dtype=torch.int64)),
        temperature=1.0, top_k=0, top_p=1.0, seed=0, rule=rule, banned=[8],
    )  # fmt: skip
    return {
        **made,
        "draft_logits": torch.zeros(2, 4, 9),
        "coin": torch.zeros(2, 4),
        "residual": torch.zeros(2),
    }


REFUSED = [
    ("target_logits", torch.zeros(2, 4), ValueError, r"target_logits must be \[B, L, V\].*got \[2, 4\]"),
    ("target_logits", torch.zeros(2, 65, 9), ValueError, "L must be at most 64, got 65"),
    ("target_logits", torch.zeros(2, 4, 0), ValueError, "at least one vocabulary entry"),
    ("target_logits", torch.zeros(2, 4, 9, dtype=torch.int32), TypeError, "target_logits must be .*got torch.int32"),
    ("draft_ids", torch.zeros(2, 3, dtype=torch.int64), ValueError, r"draft_ids must be \[B, L\] = \[2, 4\]"),
    ("draft_ids", torch.zeros(2, 4, dtype=torch.int32), TypeError, "draft_ids must be torch.int64"),
    ("draft_ids", torch.full((2, 4), 9), ValueError, r"draft_ids must be in \[0, 9\) where drafted, got 9"),
    ("known", torch.tensor([0, 5], dtype=torch.int32), ValueError, r"known must be in \[0, 4\], got 5"),
    ("known", torch.tensor([0, -1], dtype=torch.int32), ValueError, r"known must be in \[0, 4\], got -1"),
    ("known", torch.zeros(2, dtype=torch.int64), TypeError, "known must be torch.int32"),
    ("drafted", torch.zeros(2, 4, dtype=torch.bool), ValueError, r"drafted must be \[B\]"),
    ("temperature", torch.full((2,), -1.0), ValueError, "temperature must be finite and >= 0, got -1.0"),
    ("temperature", 1.0, TypeError, "temperature must be a tensor, got float"),
    ("top_k", torch.full((2,), -1, dtype=torch.int32), ValueError, "top_k must be >= 0"),
    ("top_p", torch.full((2,), 1.5), ValueError, r"top_p must be in \[0, 1\]"),
    ("seed", torch.zeros(2), TypeError, "seed must be torch.int64, got torch.float32"),
    ("position", torch.zeros(2, dtype=torch.int32), ValueError, r"position must be \[B, L\]"),
    ("revealed", torch.zeros(2, 4, dtype=torch.int32), TypeError, "revealed must be torch.int64"),
    (
        "draft_logits",
        torch.zeros(2, 4, 8),
        ValueError,
        r"draft_logits must be \[B, L, V\] = \[2, 4, 9\], got \[2, 4, 8\]",
    ),
    ("draft_logits", None, ValueError, "rule 'mrs' needs .*missing: draft_logits"),
    ("coin", None, ValueError, "missing: coin"),
    ("coin", torch.ones(2, 4), ValueError, r"coin must be in \[0, 1\), got 1.0"),
    ("residual", None, ValueError, "missing: residual"),
    ("residual", torch.tensor([0.5, -0.1]), ValueError, r"residual must be in \[0, 1\), got -0.1"),
    (
        "banned",
        torch.tensor([8]),
        TypeError,
        r"banned must be torch.int32 \[1\], as simsd_kernels.banned_mask\(ids, 9\)",
    ),
    ("rule", "exact", ValueError, "rule must be one of match, mrs, got 'exact'"),
    ("coin", torch.zeros(2, 4, device="meta"), ValueError, "one device.*coin on meta"),
]


@pytest.mark.parametrize("missing", ["seed", "position", "revealed"])
def test_match_refuses_half_a_noise_key(missing):
    with pytest.raises(ValueError, match=f"seed, position and revealed go together, but {missing} is missing"):
        simsd_kernels.block_verify(**{**good_arguments("match"), missing: None})


def test_match_at_temperature_needs_the_noise_key():
    given = {**good_arguments("match"), "seed": None, "position": None, "revealed": None}
    with pytest.raises(ValueError, match="temperature must be 0 for rule 'match' without seed, .*got 1.0"):
        simsd_kernels.block_verify(**given)
    given["temperature"] = torch.zeros(2)
    simsd_kernels.block_verify(**given)


@pytest.mark.parametrize("rule", ["match", "mrs"])
def test_opcheck(rule):
    torch.library.opcheck(torch.ops.simsd.block_verify.default, (), good_arguments(rule))


@kernels
def test_float64_is_refused_by_name(backend):
    with pytest.raises(RuntimeError, match=f"{backend}: supports float32, .*got target_logits of torch.float64"):
        verify(torch.zeros(1, 1, 3).double(), torch.zeros(1, 1, dtype=torch.int64), backend=backend)


def test_filters_do_not_touch_greedy_verification(backend):
    target = random_logits(2, 3, 40)
    draft_ids = torch.where(uniform(2, 3) < 0.7, target.argmax(dim=2), 7)
    plain = verify(target, draft_ids, backend=backend)
    assert all(map(torch.equal, verify(target, draft_ids, top_k=1, top_p=0.0, backend=backend), plain))


def test_ties_between_pieces_of_a_long_row_go_to_the_lowest_id(backend):
    target = torch.zeros(1, 2, 18 * 4096)
    target[0, 0, [4095, 4096, 17 * 4096]] = 1.0
    target[0, 1, [16 * 4096 + 3, 17 * 4096]] = 1.0
    out = verify(target, torch.zeros(1, 2, dtype=torch.int64), drafted=0, backend=backend)
    assert out.target_ids.tolist() == [[4095, 16 * 4096 + 3]]


@kernels
def test_a_long_row_is_judged_as_by_the_reference(backend):
    target, draft_ids = random_logits(1, 2, 20 * 4096 + 1), torch.tensor([[5, 20 * 4096]])
    out, expected = (verify(target, draft_ids, backend=name) for name in (backend, "reference"))
    assert all(torch.equal(getattr(out, name), getattr(expected, name)) for name in DECISIONS)
    torch.testing.assert_close(out.prob, expected.prob, rtol=2e-6, atol=2e-7)


def test_a_draft_that_was_drawn_by_sample_logits_is_accepted_whole(backend):
    batch, length, vocabulary = 3, 5, 1500
    target = random_logits(batch, length, vocabulary)
    rows = batch * length
    revealed = torch.arange(rows) * 987654321
    drawn = sample_logits(
        target.flatten(0, 1), torch.full((rows,), 0.8), torch.zeros(rows, dtype=torch.int32), torch.full((rows,), 0.9),
        torch.full((rows,), 5), torch.arange(length, dtype=torch.int32).repeat(batch), revealed, backend=backend,
    )  # fmt: skip
    out = verify(
        *(target, drawn.token.view(batch, length)), temperature=0.8, top_p=0.9, seed=5,
        revealed=revealed.view(batch, length), backend=backend,
    )  # fmt: skip
    assert (out.accepted == length).all()
    torch.testing.assert_close(out.prob.flatten(), drawn.prob, rtol=2e-6, atol=0)
    torch.testing.assert_close(out.draw_logprob.flatten(), drawn.draw_logprob, rtol=2e-6, atol=0)
    assert backend != "cuda" or torch.equal(out.prob.flatten(), drawn.prob)
    assert backend != "cuda" or torch.equal(out.draw_logprob.flatten(), drawn.draw_logprob)


@backends("cuda")
def test_values_that_the_api_refuses_are_harmless(backend):
    good = {**arguments(random_logits(2, 4, 50), torch.zeros(2, 4, dtype=torch.int64), temperature=1.0, rule="mrs")}
    good |= {"draft_logits": random_logits(2, 4, 50, seed=1), "coin": uniform(2, 4), "residual": uniform(2)}
    operator, device = dispatch.operator("block_verify", backend), device_of(backend)

    def call(**changes):
        given = {name: x.to(device) if torch.is_tensor(x) else x for name, x in {**good, **changes}.items()}
        return [x.cpu() for x in operator(**given)]

    odd_ids = torch.tensor([[2**40, -1, 50, 3]]).expand(2, 4).clone()
    out = call(draft_ids=odd_ids, known=torch.tensor([-3, 9], dtype=torch.int32))
    assert out[0].tolist() == [0, 0] and out[1][1].item() == -1
    assert 0 <= out[1][0].item() < 50 and torch.equal(out[2][1], odd_ids[1])
    late = call(residual=torch.tensor([1.0, math.nan]))
    assert ((late[2] >= -1) & (late[2] < 50)).all()


@backends("emulation")
def test_known_rows_are_not_read_nor_draft_rows_that_were_not_drafted(counted):
    batch, length, vocabulary = 2, 4, 2048
    target, draft = random_logits(batch, length, vocabulary), random_logits(batch, length, vocabulary, seed=1)
    draft_ids, coin = target.argmax(dim=2), torch.zeros(batch, length)  # a coin of 0 accepts
    settings = {"temperature": 1.0, "rule": "mrs", "coin": coin, "residual": uniform(batch), "draft_logits": draft}
    settings |= {"known": torch.tensor([1, 3]), "drafted": 0b0110}
    drawn = counted(lambda: verify(target, draft_ids, backend="cuda", **settings))
    assert drawn["loaded_bytes"] == (3 + 1 + 2 + 0) * vocabulary * 4
    greedy = counted(lambda: verify(target, draft_ids, known=1, backend="cuda"))
    assert greedy["loaded_bytes"] == 2 * 3 * vocabulary * 4
