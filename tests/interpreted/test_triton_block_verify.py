"""The Triton kernels of block_verify against the reference, and their noise against the reference's integers."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
import triton
import triton.language as tl

import simsd_kernels
from simsd_kernels import noise
from simsd_kernels.block_verify.triton import CHUNK
from simsd_kernels.triton_noise import gumbel, noise_words

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "greedy_accept.json").read_text())["cases"]
INF = float("inf")


@triton.jit
def write_noise(p_seed, p_position, p_revealed, p_word, p_gumbel, QUADS: tl.constexpr):
    i_row = tl.program_id(0)
    b_word = noise_words(
        tl.load(p_seed + i_row), tl.load(p_position + i_row), tl.load(p_revealed + i_row), tl.arange(0, QUADS)
    )
    o_v = i_row * QUADS * 4 + tl.arange(0, QUADS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(p_word + o_v, b_word.to(tl.int64))
    tl.store(p_gumbel + o_v, gumbel(b_word))


def test_noise_is_that_of_every_backend_bit_for_bit():
    seed = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
    position = torch.tensor([0, -1, 2**31 - 1, 7, 40000, 12], dtype=torch.int32)
    revealed = torch.tensor([0, -1, 2**62 + 3, -(2**63), 0b1011, 1 << 40])
    word, variate = torch.empty(6, 1024, dtype=torch.int64), torch.empty(6, 1024)
    write_noise[(6,)](seed, position, revealed, word, variate, QUADS=256)
    expected = noise.words(seed, position, revealed, 1024)
    assert torch.equal(word, expected)
    torch.testing.assert_close(variate, noise.gumbel(expected), rtol=4e-7, atol=4e-7)


@triton.jit
def write_gumbel(p_word, p_gumbel, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_gumbel + o, gumbel(tl.load(p_word + o).to(tl.uint32)))


def test_gumbel_is_accurate_in_both_tails():
    word = torch.tensor(
        [0, 1, 2, 3, 100, 5000, 1 << 20, 1 << 31, 2**32 - 129, 2**32 - 128, 2**32 - 2, 2**32 - 1] + [9] * 4
    )
    variate = torch.empty(16)
    write_gumbel[(1,)](word, variate, N=16)
    u = ((word.double().float() + 0.5) * 2.0**-32).clamp(max=noise.LARGEST_UNIFORM).double()
    torch.testing.assert_close(variate.double(), -torch.log(-torch.log1p(-u)), rtol=1e-6, atol=1e-6)


def verify(target, draft_ids, known, drafted, temperature, backend, **rest):
    batch = target.shape[0]
    return simsd_kernels.block_verify(
        target, draft_ids, torch.as_tensor(known).expand(batch).int(), torch.as_tensor(drafted).expand(batch).clone(),
        torch.as_tensor(temperature).expand(batch).float(), **rest, backend=backend,
    )  # fmt: skip


def assert_same(out, expected):
    for name in ("accepted", "bonus", "tokens", "target_ids"):
        got, want = getattr(out, name), getattr(expected, name)
        assert got.dtype == want.dtype and torch.equal(got, want), name
    torch.testing.assert_close(out.prob, expected.prob, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("number", range(0, len(GOLDEN)))
def test_golden_greedy_acceptance(number):
    case = GOLDEN[number]
    length = len(case["draft_ids"])
    target = torch.randn(1, length, 1024, generator=torch.Generator().manual_seed(number))
    target[0, torch.arange(length), case["target_argmax"]] = 20.0
    out = verify(target, torch.tensor([case["draft_ids"]]), 0, -1, 0.0, "triton")
    assert out.accepted.item() == case["n_accepted"]
    assert out.bonus.item() == (-1 if case["bonus"] is None else case["bonus"])
    assert [token for token in out.tokens[0].tolist() if token >= 0] == case["accepted_ids"]
    assert out.target_ids[0].tolist() == case["target_argmax"]


FILTERS = {
    "top_k": torch.tensor([0, 1, 2, 5, 40, 1000], dtype=torch.int32),
    "top_p": torch.tensor([1.0, 0.0, 0.3, 0.8, 0.8, 0.97]),
}


def random_case(seed, rule, batch, length, vocabulary, dtype, temperature, filters=()):
    """Drafts that mostly agree; each sequence with its own known positions, drafted set, temperature and filters."""
    generator = torch.Generator().manual_seed(seed)
    target = (torch.randn(batch, length, vocabulary, generator=generator) * 2).to(dtype)
    if seed % 3 == 0:
        target = (target * 2).round() / 2  # ties
    draft = (target.float() + torch.randn(target.shape, generator=generator) * 0.7).to(dtype)
    rest = {"rule": rule}
    for name, values in FILTERS.items():
        if name in filters:
            rest[name] = values[torch.randint(len(values), (batch,), generator=generator)]
    if seed % 2:
        rest["banned_ids"] = torch.tensor([0, vocabulary - 1, vocabulary // 2])[: vocabulary - 1]
    if rule == "mrs":
        rest |= {
            "draft_logits": draft,
            "coin": torch.rand(batch, length, generator=generator),
            "residual": torch.rand(batch, generator=generator),
        }
    elif max(temperature) > 0:
        rest |= {
            "seed": torch.randint(-(2**62), 2**62, (batch,), generator=generator),
            "position": torch.randint(0, 4096, (batch, length), generator=generator, dtype=torch.int32),
            "revealed": torch.randint(-(2**62), 2**62, (batch, length), generator=generator),
        }
    known = torch.randint(0, length + 1, (batch,), generator=generator) // 2
    drafted = torch.randint(-(2**62), 2**62, (batch,), generator=generator)
    temperature = torch.tensor(temperature)[torch.arange(batch) % len(temperature)]
    zeros = torch.zeros(batch, length, dtype=torch.int64)
    agreed = verify(target, zeros, known, drafted, temperature, "reference", **rest).target_ids
    other = torch.randint(0, vocabulary, (batch, length), generator=generator)
    draft_ids = torch.where(torch.rand(batch, length, generator=generator) < 0.15, other, agreed)
    return (target, draft_ids, known, drafted, temperature), rest


# batch, L, V, dtype, temperatures
CASES = [
    (1, 1, 1, torch.float32, (0.0,)),
    (2, 4, 3, torch.float32, (0.0, 0.7)),
    (3, 5, 257, torch.bfloat16, (0.9,)),
    (4, 8, 1000, torch.float16, (1.0, 0.0, 0.3)),
    (2, 17, 130, torch.float32, (1.3,)),
    (2, 3, CHUNK, torch.float32, (0.8,)),
    (2, 4, 2 * CHUNK + 5, torch.bfloat16, (0.6, 0.0)),
    (1, 64, 61, torch.float32, (1.0,)),
    (5, 2, 19, torch.float16, (0.0, 2.0)),
    (1, 2, 20 * CHUNK + 1, torch.float32, (0.0,)),
]


@pytest.mark.parametrize("rule", ["match", "mrs"])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_random_blocks_as_the_reference(number, rule):
    arguments, rest = random_case(number, rule, *CASES[number])
    assert_same(verify(*arguments, "triton", **rest), verify(*arguments, "reference", **rest))


@pytest.mark.parametrize("rule", ["match", "mrs"])
@pytest.mark.parametrize("number", range(24))
def test_random_blocks_under_filters_as_the_reference(number, rule):
    batch, length = ((2, 2), (3, 1), (1, 3), (1, 2))[number % 4]
    vocabulary = (3, 40, 300, CHUNK + 3, 1, 128)[number % 6]
    dtype = (torch.float32, torch.bfloat16, torch.float16)[number // 2 % 3]
    filters = (("top_k",), ("top_p",), ("top_k", "top_p"))[number // 4 % 3]
    shape = (batch, length, vocabulary)
    arguments, rest = random_case(
        number, rule, *shape, dtype, ((0.7, 0.0), (1.0,), (1.6, 0.4))[number // 6 % 3], filters
    )
    assert_same(verify(*arguments, "triton", **rest), verify(*arguments, "reference", **rest))


def test_filters_judge_both_sides_of_mrs():
    """top_k = 2 leaves p on ids 0, 1 and q on ids 1, 2: a draft of 2 is rejected, and 0 or 1 takes its place."""
    p = torch.tensor([0.5, 0.3, 0.2]).log().expand(4, 1, 3)
    q = torch.tensor([0.1, 0.5, 0.4]).log().expand(4, 1, 3)
    out = verify(
        p, torch.tensor([[2], [1], [1], [2]]), 0, -1, 1.0, "triton", rule="mrs", draft_logits=q,
        top_k=torch.full((4,), 2, dtype=torch.int32), coin=torch.tensor([[0.0], [0.67], [0.68], [0.99]]),
        residual=torch.full((4,), 0.999),
    )  # fmt: skip
    # p = (5, 3, 0) / 8, q = (0, 5, 4) / 9: p(1) / q(1) = 0.675, and the surplus is all on id 0
    assert out.accepted.tolist() == [0, 1, 0, 0] and out.bonus.tolist() == [0, -1, 0, 0]
    torch.testing.assert_close(out.prob[:, 0], torch.tensor([0.5, 0.3, 0.5, 0.5]))


def test_filters_do_not_touch_greedy_verification():
    arguments, rest = random_case(0, "match", 2, 3, 40, torch.float32, (0.0,))
    filters = {"top_k": torch.ones(2, dtype=torch.int32), "top_p": torch.zeros(2)}
    assert_same(verify(*arguments, "triton", **rest, **filters), verify(*arguments, "triton", **rest))


def test_match_draws_what_the_sampler_draws():
    arguments, rest = random_case(6, "match", 2, 3, 500, torch.bfloat16, (0.8,), ("top_k", "top_p"))
    target, *_, temperature = arguments
    out = verify(target, torch.zeros(2, 3, dtype=torch.int64), 0, 0, temperature, "triton", **rest)
    per_row = lambda value: value.repeat_interleave(3)  # noqa: E731
    sampled = simsd_kernels.sample_logits(
        target.flatten(0, 1), per_row(temperature.float()), per_row(rest["top_k"]), per_row(rest["top_p"]),
        per_row(rest["seed"]), rest["position"].flatten(), rest["revealed"].flatten(), backend="triton",
    )  # fmt: skip
    assert torch.equal(out.tokens.flatten(), sampled.token)
    torch.testing.assert_close(out.prob.flatten(), sampled.prob, rtol=2e-6, atol=0)


def test_any_strides():
    arguments, rest = random_case(2, "mrs", 2, 4, 70, torch.float32, (0.8,))
    target, *others = arguments
    rest["draft_logits"] = rest["draft_logits"].transpose(1, 2).contiguous().transpose(1, 2)
    rest["coin"] = rest["coin"].t().contiguous().t()
    rest["residual"] = rest["residual"].repeat_interleave(2)[::2]
    strided = torch.stack((target, -target), -1)[..., 0]
    assert_same(verify(strided, *others, "triton", **rest), verify(target, *others, "reference", **rest))


def test_residual_draw_visits_every_surplus_token_in_its_share():
    """One block per residual value: the drawn ids are those of the inverse CDF of max(p - q, 0), ids ascending."""
    p = torch.tensor([0.1, 0.4, 0.1, 0.1, 0.3]).log()
    q = torch.tensor([0.5, 0.1, 0.2, 0.1, 0.1]).log()  # surplus: 0, .3, 0, 0, .2
    draws = torch.tensor([0.0, 0.3, 0.59, 0.61, 0.999])
    out = verify(
        p.expand(5, 1, 5), torch.zeros(5, 1, dtype=torch.int64), 0, -1, 1.0, "triton", rule="mrs",
        draft_logits=q.expand(5, 1, 5), coin=torch.full((5, 1), 0.9), residual=draws,
    )  # fmt: skip
    assert out.bonus.tolist() == [1, 1, 1, 4, 4]
    torch.testing.assert_close(out.prob[:, 0], torch.tensor([0.4, 0.4, 0.4, 0.3, 0.3]))


def test_ties_between_chunks_of_the_vocabulary_go_to_the_lowest_id():
    target = torch.zeros(1, 2, 18 * CHUNK)
    target[0, 0, [CHUNK - 1, CHUNK, 17 * CHUNK]] = 1.0
    target[0, 1, [16 * CHUNK + 3, 17 * CHUNK]] = 1.0
    out = verify(target, torch.zeros(1, 2, dtype=torch.int64), 0, 0, 0.0, "triton")
    assert out.target_ids.tolist() == [[CHUNK - 1, 16 * CHUNK + 3]]


def test_without_surplus_the_rejected_position_is_drawn_from_the_target():
    """p = q, and a drafted id that both rule out: it is rejected, and max(p - q, 0) is empty."""
    p = torch.tensor([0.25, 0.5, 0.0, 0.25]).log().expand(4, 1, 4)
    out = verify(
        p, torch.full((4, 1), 2), 0, -1, 1.0, "triton", rule="mrs", draft_logits=p, coin=torch.zeros(4, 1),
        residual=torch.tensor([0.0, 0.3, 0.74, 0.76]),
    )  # fmt: skip
    assert out.bonus.tolist() == [0, 1, 1, 3] and out.accepted.tolist() == [0] * 4


@pytest.mark.parametrize("rule", ["match", "mrs"])
def test_rows_with_nothing_finite_and_nan_logits(rule):
    arguments, rest = random_case(1, rule, 2, 3, 40, torch.float32, (0.8,))
    target = arguments[0]
    target[0] = -INF
    target[1, 1, ::3] = float("nan")
    target[1, 2, 5] = INF
    assert_same(verify(*arguments, "triton", **rest), verify(*arguments, "reference", **rest))


def test_draft_logits_of_positions_never_drafted_do_not_matter():
    arguments, rest = random_case(4, "mrs", 2, 4, 50, torch.float32, (0.8,))
    target, draft_ids, _, _, temperature = arguments
    arguments = (target, draft_ids, 0, 0b0101, temperature)
    poisoned = rest["draft_logits"].clone()
    poisoned[:, 1::2] = float("nan")
    expected = verify(*arguments, "triton", **rest)
    assert_same(verify(*arguments, "triton", **rest | {"draft_logits": poisoned}), expected)


@pytest.mark.parametrize("batch, length", [(0, 4), (3, 0)])
def test_empty_batches_and_blocks(batch, length):
    shape = torch.zeros(batch, length, dtype=torch.int64)
    out = verify(torch.zeros(batch, length, 7), shape, 0, 0, 0.0, "triton")
    assert_same(out, verify(torch.zeros(batch, length, 7), shape, 0, 0, 0.0, "reference"))


def test_float64_is_refused_by_name():
    with pytest.raises(RuntimeError, match="triton: supports float32, .*got target_logits of torch.float64"):
        verify(torch.zeros(1, 1, 3).double(), torch.zeros(1, 1, dtype=torch.int64), 0, 0, 0.0, "triton")
