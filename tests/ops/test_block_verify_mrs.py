"""Modified rejection sampling: what it accepts, and the law of what it draws in the place of what it does not."""

from __future__ import annotations

import pytest
import torch

from backends import FLOATS, backends
from chi_squared import assert_distributed
from logits import INF
from verdicts import BELOW_ONE, random_logits, uniform, verify, walk

OP = "block_verify"
many_rows = backends("reference", "cpu", "cuda")  # each is a program of its own in Triton's interpreter


def test_probability_of_the_drafted_token_under_mrs(backend):
    target = random_logits(4, 3, 50)
    draft_ids = torch.tensor([[1, 2, 3]])
    out = verify(
        *(target, draft_ids), temperature=0.8, top_k=40, rule="mrs", draft_logits=target.clone(),
        coin=uniform(4, 3), residual=uniform(4), backend=backend,
    )  # fmt: skip
    assert (out.accepted == 3).all() or (out.bonus >= 0).any()
    judged = torch.where(out.tokens >= 0, out.tokens, out.target_ids)
    expected = (target.double() / 0.8).softmax(dim=2).gather(2, judged[:, :, None]).squeeze(2)
    torch.testing.assert_close(out.prob.double(), expected, rtol=2e-6, atol=2e-6)


def filtered_softmax(logits, temperature, top_k, top_p):
    x = logits.double() / temperature
    ids = sorted(range(len(x)), key=lambda i: (-float(x[i]), i))
    if 0 < top_k < len(ids):
        ids = [i for i in ids if x[i] >= x[ids[top_k - 1]]]
    p = torch.zeros_like(x)
    p[ids] = x[ids].softmax(dim=0)
    if top_p < 1:
        kept, mass = [], 0.0
        for i in ids:
            if kept and mass >= top_p:
                break
            kept.append(i)
            mass += float(p[i])
        p = torch.where(torch.isin(torch.arange(len(x)), torch.tensor(kept)), p, 0.0)
    return p / p.sum()


@many_rows
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.7), (6, 0.9)])
def test_mrs_decides_as_the_plain_loop_does(backend, top_k, top_p):
    batch, length, vocabulary = 60, 4, 12
    target = random_logits(batch, length, vocabulary, seed=1)
    draft = target + random_logits(batch, length, vocabulary, seed=2, scale=1.0)
    draft_ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(3))
    draft_ids = torch.where(uniform(batch, length, seed=6) < 0.7, target.argmax(dim=2), draft_ids)
    coin, residual = uniform(batch, length, seed=4), uniform(batch, seed=5)
    known, drafted = torch.arange(batch) % 3, torch.arange(batch) % 16 | 8
    out = verify(
        *(target, draft_ids), known=known, drafted=drafted, temperature=0.8, top_k=top_k, top_p=top_p, rule="mrs",
        draft_logits=draft, coin=coin, residual=residual, backend=backend,
    )  # fmt: skip
    seen = set()
    for b in range(batch):
        p = [filtered_softmax(row, 0.8, top_k, top_p) for row in target[b]]
        q = [filtered_softmax(row, 0.8, top_k, top_p) for row in draft[b]]

        def accepts(i, b=b, p=p, q=q):
            x = draft_ids[b, i]
            return bool(coin[b, i] * q[i][x] < p[i][x])

        best = target[b].argmax(dim=1).tolist()
        accepted, bonus, tokens = walk(draft_ids[b].tolist(), best, int(known[b]), drafted[b], accepts)
        if bonus >= 0:
            stop = max(i for i in range(length) if tokens[i] >= 0)
            surplus = (p[stop] - q[stop]).clamp(min=0)
            surplus = surplus if surplus.any() else p[stop]
            reached = surplus.cumsum(dim=0)
            bonus = int((reached > residual[b].double() * reached[-1]).nonzero()[0])
            tokens[stop] = bonus
        # What was drafted is drawn from p in the end, accepted or not; what was not, and what is behind, are argmaxes.
        for i in range(length):
            drawn = i >= known[b] and tokens[i] >= 0 and int(drafted[b]) >> i & 1
            expected = float(p[i][tokens[i]].log()) if drawn else 0.0
            assert float(out.draw_logprob[b, i]) == pytest.approx(expected, abs=2e-6), (b, i)
        assert (out.accepted[b], out.bonus[b], out.tokens[b].tolist()) == (accepted, bonus, tokens), b
        assert out.target_ids[b, known[b] :].tolist() == best[known[b] :]
        seen.add((accepted, bonus >= 0))
    assert len(seen) >= 4


@many_rows
@pytest.mark.parametrize(
    "top_k, top_p, banned", [(0, 1.0, None), (6, 1.0, None), (0, 0.8, None), (9, 0.9, None), (0, 1.0, [2, 5])]
)
def test_mrs_emits_the_targets_law_for_one_row(backend, top_k, top_p, banned):
    count, vocabulary, temperature = 20_000, 14, 0.9
    target, draft = random_logits(vocabulary, seed=11), random_logits(vocabulary, seed=12)
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    allowed[banned or []] = False
    p, q = (
        filtered_softmax(logits.masked_fill(~allowed, -INF), temperature, top_k, top_p) for logits in (target, draft)
    )
    drawn = torch.multinomial(q, count, replacement=True, generator=torch.Generator().manual_seed(13))
    out = verify(
        target.expand(count, 1, vocabulary),
        drawn[:, None],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        rule="mrs",
        draft_logits=draft.expand(count, 1, vocabulary),
        coin=uniform(count, 1, seed=14),
        residual=uniform(count, seed=15),
        backend=backend,
        **({"banned": banned} if banned else {}),
    )
    assert_distributed(out.tokens[:, 0], p)
    rate = float(torch.minimum(p, q).sum())
    assert float(out.accepted.double().mean()) == pytest.approx(rate, abs=4.5 * (rate * (1 - rate) / count) ** 0.5)


def test_mrs_accepts_everything_from_the_targets_own_twin(backend):
    target = random_logits(8, 4, 2000)
    draft_ids = torch.randint(2000, (8, 4), generator=torch.Generator().manual_seed(0))
    coin = torch.full((8, 4), 1 - 2**-24)
    out = verify(
        *(target, draft_ids), temperature=1.0, rule="mrs", draft_logits=target.clone(), coin=coin,
        residual=uniform(8), backend=backend,
    )  # fmt: skip
    assert (out.accepted == 4).all() and (out.bonus == -1).all() and torch.equal(out.tokens, draft_ids)


def test_mrs_token_that_both_filter_out_is_rejected_and_drawn_from_the_target(backend):
    target = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]])
    draws = []
    for residual in (0.0, 0.5, 0.8, 0.999):
        out = verify(
            *(target, [[3]]), temperature=1.0, top_k=2, rule="mrs", draft_logits=target.clone(),
            coin=torch.zeros(1, 1), residual=torch.tensor([residual]), backend=backend,
        )  # fmt: skip
        assert out.accepted.item() == 0
        draws.append(out.bonus.item())
    assert draws == [0, 0, 1, 1]  # p = (.731, .269)


def test_mrs_at_temperature_zero_is_match(backend):
    target = random_logits(6, 4, 30)
    draft_ids = target.argmax(dim=2)
    draft_ids[::2, 1] = (draft_ids[::2, 1] + 1) % 30
    greedy = verify(target, draft_ids, backend=backend)
    out = verify(
        *(target, draft_ids), rule="mrs", draft_logits=random_logits(6, 4, 30, seed=1), coin=uniform(6, 4),
        residual=uniform(6), backend=backend,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(greedy, out, strict=True))


def test_filters_judge_both_sides_of_mrs(backend):
    """top_k = 2 leaves p on ids 0, 1 and q on ids 1, 2: a draft of 2 is rejected, and 0 or 1 takes its place."""
    p = torch.tensor([0.5, 0.3, 0.2]).log().expand(4, 1, 3)
    q = torch.tensor([0.1, 0.5, 0.4]).log().expand(4, 1, 3)
    out = verify(
        p, torch.tensor([[2], [1], [1], [2]]), temperature=1.0, rule="mrs", draft_logits=q, top_k=2,
        coin=torch.tensor([[0.0], [0.67], [0.68], [0.99]]), residual=torch.full((4,), 0.999), backend=backend,
    )  # fmt: skip
    # p = (5, 3, 0) / 8, q = (0, 5, 4) / 9: p(1) / q(1) = 0.675, and the surplus is all on id 0
    assert out.accepted.tolist() == [0, 1, 0, 0] and out.bonus.tolist() == [0, -1, 0, 0]
    torch.testing.assert_close(out.prob[:, 0], torch.tensor([0.5, 0.3, 0.5, 0.5]))
    torch.testing.assert_close(out.draw_logprob[:, 0].exp(), torch.tensor([5.0, 3.0, 5.0, 5.0]) / 8)


def test_residual_draw_visits_every_surplus_token_in_its_share(backend):
    """One block per residual value: the drawn ids are those of the inverse CDF of max(p - q, 0), ids ascending."""
    p = torch.tensor([0.1, 0.4, 0.1, 0.1, 0.3]).log()
    q = torch.tensor([0.5, 0.1, 0.2, 0.1, 0.1]).log()  # surplus: 0, .3, 0, 0, .2
    draws = torch.tensor([0.0, 0.3, 0.59, 0.61, 0.999])
    out = verify(
        p.expand(5, 1, 5), torch.zeros(5, 1, dtype=torch.int64), temperature=1.0, rule="mrs",
        draft_logits=q.expand(5, 1, 5), coin=torch.full((5, 1), 0.9), residual=draws, backend=backend,
    )  # fmt: skip
    assert out.bonus.tolist() == [1, 1, 1, 4, 4]
    torch.testing.assert_close(out.prob[:, 0], torch.tensor([0.4, 0.4, 0.4, 0.3, 0.3]))


def test_without_surplus_the_rejected_position_is_drawn_from_the_target(backend):
    """p = q, and a drafted id that both rule out: it is rejected, and max(p - q, 0) is empty."""
    p = torch.tensor([0.25, 0.5, 0.0, 0.25]).log().expand(4, 1, 4)
    out = verify(
        p, torch.full((4, 1), 2), temperature=1.0, rule="mrs", draft_logits=p, coin=torch.zeros(4, 1),
        residual=torch.tensor([0.0, 0.3, 0.74, 0.76]), backend=backend,
    )  # fmt: skip
    assert out.bonus.tolist() == [0, 1, 1, 3] and out.accepted.tolist() == [0] * 4


@many_rows
@pytest.mark.parametrize("dtypes", [(a, b) for a in FLOATS for b in FLOATS], ids=str)
def test_residual_draw_is_the_inverse_of_the_cumulative_surplus(backend, dtypes):
    """Every residual of a fine grid, on a vocabulary of several segments."""
    vocabulary, count = 2500, 64
    target = random_logits(vocabulary, seed=3).to(dtypes[0])
    draft = random_logits(vocabulary, seed=4).to(dtypes[1])
    p, q = target.float().softmax(dim=0), draft.float().softmax(dim=0)
    surplus = (p - q).clamp(min=0).double()
    rejected = int((q - p).argmax())
    residual = (torch.arange(count) + 0.5) / count
    out = verify(
        *(target.expand(count, 1, vocabulary), torch.full((count, 1), rejected)), temperature=1.0, rule="mrs",
        draft_logits=draft.expand(count, 1, vocabulary), coin=torch.full((count, 1), BELOW_ONE), residual=residual,
        backend=backend,
    )  # fmt: skip
    reached = surplus.cumsum(dim=0)
    expected = torch.searchsorted(reached, residual.double() * reached[-1], right=True)
    assert torch.equal(out.bonus, expected) and (out.accepted == 0).all()
