"""States that the target has seen say what states behind them draw, and an order head what that changes."""

import math

import pytest
import torch

from backends import backends
from plans import SEEN, VOCABULARY, alone, arguments, assert_same, graph, ints, plan, random_case, strided, with_seen
from simsd_kernels import sample_logits

OP = "plan_block"
LENGTH = 4
SHARP = 1e6  # leaves of the order only the most probable


def seen_by(made, *states, block=0, exact=0, shift=None, pair=None, sharpness=SHARP):
    """The same where the target has seen states of a block of the only slot's: set -> (tokens, log-odds)."""
    sets, tokens, odds = zip(*((bits, t, o) for bits, (t, o) in states), strict=True)
    log_odds = torch.tensor([odds], dtype=torch.float32)
    length = log_odds.shape[2]
    given = {
        "seen_block": torch.full((1, len(states)), block, dtype=torch.int32),
        "seen_exact": torch.full((1, len(states)), exact, dtype=torch.int32),
        "seen_revealed": torch.tensor([sets]),
        "seen_tokens": torch.tensor([tokens]),
        "seen_prob": log_odds.sigmoid(),
        "seen_log_odds": log_odds,
        "seen_entropy": torch.zeros_like(log_odds),
        "seen_sharpness": torch.tensor([sharpness]),
    }
    if shift is not None or pair is not None:
        given["order_shift"] = torch.zeros(1, len(states), length) if shift is None else torch.tensor([shift])
        given["order_pair"] = torch.zeros(1, len(states), length, length) if pair is None else torch.tensor([pair])
    return made | given


def empty(**given):
    """A fresh block of four of which the draft proposes the tokens 1 2 3 4, the first one first."""
    return arguments(
        *(1, 1, LENGTH),
        **{
            "draft_tokens": torch.tensor([[[1, 2, 3, 4]]]),
            "log_odds": torch.tensor([[[4.0, 3.0, 2.0, 1.0]]]),
            "prob": torch.full((1, 1, LENGTH), 0.9),
            "order_sharpness": torch.full((1, 1), SHARP),
            "blocks_left": ints(1),
        }
        | given,
    )


def states(made, backend):
    return [(bits, tokens) for _, bits, tokens in graph(plan(made, backend))]


def test_what_the_target_saw_goes_before_what_is_drafted(backend):
    made = seen_by(empty(), (0, ([5, 6, 7, 8], [0.0, 1.0, 2.0, 3.0])))
    assert states(made, backend) == [
        (0, (None, None, None, None)),
        (8, (None, None, None, 8)),
        (12, (None, None, 7, 8)),
        (14, (None, 6, 7, 8)),
    ]


def test_the_nearest_state_that_leads_to_another_speaks_for_it(backend):
    fresh = (0, ([5, 6, 7, 8], [3.0, 2.0, 1.0, 0.0]))
    near = (1, ([5, 16, 17, 18], [0.0, 1.0, 2.0, 3.0]))
    other_token = (3, ([15, 16, 9, 9], [0.0, 0.0, 2.0, 3.0]))
    other_set = (6, ([5, 6, 7, 9], [3.0, 0.0, 0.0, 2.0]))
    for made in (seen_by(empty(), fresh, near, other_token, other_set), seen_by(empty(), other_set, near, fresh)):
        assert states(made, backend) == [
            (0, (None, None, None, None)),
            (1, (5, None, None, None)),
            (9, (5, None, None, 18)),
            (13, (5, None, 17, 18)),
        ]


def test_where_none_leads_to_a_state_the_draft_speaks(backend):
    made = seen_by(empty(), (2, ([0, 3, 0, 0], [9.0] * 4)), (15, ([1, 2, 3, 4], [9.0] * 4)))
    assert_same(plan(made, backend), plan(empty(), backend))
    nobody = {
        name: value[:, :0] if name != "seen_sharpness" else value for name, value in made.items() if name in SEEN[:8]
    }
    assert_same(plan(made | nobody, backend), plan(empty(), backend))


def test_a_state_speaks_for_its_own_block_alone(backend):
    two = {"draft_tokens": torch.tensor([[[1, 2], [3, 4]]]), "blocks_left": ints(2)}
    made = seen_by(arguments(1, 2, 2, **two), (0, ([1, 2], [1.0, 0.0])))
    assert {tokens for block, _, tokens in graph(plan(made, backend)) if block == 1} == {
        (None, None),
        (3, None),
        (None, 4),
    }
    made = seen_by(arguments(1, 2, 2, **two), (0, ([5, 6], [1.0, 0.0])), block=1)
    found = graph(plan(made, backend))
    assert {tokens for block, _, tokens in found if block == 0} == {(None, None), (1, None), (None, 2)}
    assert {tokens for block, _, tokens in found if block == 1} == {(None, None), (5, None)}


def test_a_block_that_the_target_has_seen_is_planned_where_nothing_is_drafted(backend):
    """Of the next block its empty state was seen: the plan goes on from there, but not beyond what is drafted."""
    made = arguments(1, 1, 2, draft_tokens=torch.tensor([[[1, 2]]]), blocks_left=ints(3))
    assert {block for block, *_ in graph(plan(made, backend))} == {0, 1}
    found = graph(plan(seen_by(made, (0, ([5, 6], [1.0, 0.0])), block=1), backend))
    assert [tokens for block, _, tokens in found if block == 1] == [(None, None), (5, None)]
    assert {block for block, *_ in found} == {0, 1}


def test_where_a_state_itself_was_seen_the_target_does_the_same_again(backend):
    """Position 1 came as 6 with a chance of a half, and was about as likely to come as position 0: it is certain."""
    saw = (0, ([5, 6, 7, 8], [0.0, 0.1, -1.0, -1.0]))
    made = seen_by(empty(), saw, sharpness=1.0)
    floor = {"min_visit_prob": torch.tensor([0.99])}
    assert states(made | floor, backend) == [(0, (None,) * 4)]
    exact = seen_by(empty(), saw, sharpness=1.0, exact=1)
    assert states(exact | floor, backend) == [(0, (None,) * 4), (2, (None, 6, None, None))]
    assert {bits for bits, _ in states(exact, backend) if bits.bit_count() == 1} == {2}


PEEK = {"peeks": ints(1), "blocks_left": ints(2)}


def test_a_peek_shows_the_next_block_however_improbable_it_is(backend):
    made = empty(**PEEK)
    made["min_visit_prob"] = torch.tensor([0.6])  # two states, nothing of the next block
    without = graph(plan(made | {"peeks": None}, backend))
    assert [(block, bits) for block, bits, _ in without] == [(0, 0), (0, 1), (0, 3), (0, 7)]
    out = plan(made, backend)
    assert graph(out) == [without[0], (1, 0, (None,) * LENGTH), *without[1:]]
    assert out.draft_blocks_in_rows.tolist() == [1]
    assert (out.state_rows[0, 1] >= 0).all()  # its logits are asked for


def test_a_peek_takes_the_place_of_the_least_probable_state(backend):
    made = empty(**PEEK, max_states=3)
    assert [(block, bits) for block, bits, _ in graph(plan(made, backend))] == [(0, 0), (1, 0), (0, 1)]
    # And its rows from whoever is less probable: two blocks of them.
    made = empty(**PEEK, row_budget=ints(3 * LENGTH))
    assert [(block, bits) for block, bits, _ in graph(plan(made, backend))] == [(0, 0), (1, 0), (0, 1)]


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks_left": ints(1)},
        {"proposal_depth": ints(0)},
        {"draft_end": ints(1)},
        {"peeks": ints(0)},
        {"max_states": 1},
        {"start": ints(-1)},
    ],
    ids=str,
)
def test_there_is_no_peek_where_no_block_follows_or_nobody_asks(backend, changes):
    made = empty(**{**PEEK, "min_visit_prob": torch.tensor([0.6])} | changes)
    assert 1 not in {block for block, *_ in graph(plan(made, backend))}


def test_a_block_that_is_there_anyway_is_not_there_twice(backend):
    found = [(block, bits) for block, bits, _ in graph(plan(empty(**PEEK), backend))]
    assert found == [(0, 0), (1, 0), (0, 1), (0, 3), (0, 7)]


def test_a_pair_brings_a_position_forward_once_the_other_is_revealed(backend):
    saw = (0, ([5, 6, 7, 8], [3.0, 2.0, 1.0, 0.0]))
    pair = torch.zeros(1, LENGTH, LENGTH)
    pair[0, 3, 0] = 5.0  # position 3, when 0 is revealed
    found = states(seen_by(empty(), saw, pair=pair.tolist()), backend)
    assert [bits for bits, _ in found] == [0, 0b0001, 0b1001, 0b1011]


def test_a_shift_counts_behind_the_state_that_was_seen_not_there(backend):
    saw = (0, ([5, 6, 7, 8], [3.0, 2.0, 1.0, 0.0]))
    found = states(seen_by(empty(), saw, shift=[[0.0, 0.0, 0.0, 5.0]]), backend)
    assert [bits for bits, _ in found] == [0, 0b0001, 0b1001, 0b1011]


def test_changed_log_odds_say_how_probable_a_token_is(backend):
    """The second reveal is visited with sigmoid(seen + shift) of the first's."""
    saw = (0, ([5, 6], [math.log(3.0), 0.0]))
    drafted = torch.tensor([[[5, 6]]])  # what the block is finished with
    made = arguments(1, 1, 2, blocks_left=ints(2), max_states=4, draft_tokens=drafted)
    made = seen_by(made, saw, shift=[[0.0, 1.0]])
    finished = 0.75 / (1 + math.exp(-1.0))  # no state, but leads to the next block's first: two times 2 rows
    for floor, count in ((0.75 * 1.001, 1), (0.75 * 0.999, 2), (finished / 2 * 1.001, 2), (finished / 2 * 0.999, 3)):
        assert len(states(made | {"min_visit_prob": torch.tensor([floor])}, backend)) == count


def test_the_order_is_believed_as_far_as_the_sharpness_says(backend):
    saw = (0, ([5, 6, 7, 8], [3.0, 2.0, 1.0, 0.0]))
    assert len(states(seen_by(empty(), saw, sharpness=0.0), backend)) == 2**LENGTH - 1
    assert len(states(seen_by(empty(), saw, sharpness=SHARP), backend)) == LENGTH


@pytest.mark.parametrize("logits", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("head", [False, True])
def test_a_slot_gets_the_same_plan_alone_and_in_company(backend, head, logits):
    changed = 0
    for number in range(30):
        made = with_seen(random_case(number, logits), number, head=head)
        made["row_budget"] = ints(10**6)
        made["logits_rows"] = made["text"].shape[0] * made["max_states"] * made["draft_tokens"].shape[2]
        out = plan(made, backend)
        changed += not torch.equal(out.states, plan(made | dict.fromkeys(SEEN), backend).states)
        for b in range(made["text"].shape[0]):
            assert torch.equal(plan(alone(made, b), backend).states[0], out.states[b])
    assert changed > 5


def noisy(temperature=0.8, strategy="low_confidence_static", **given):
    """A fresh block of four, drawn from logits with noise, of which the target has seen the empty state and that with
    position 1 revealed as 6."""
    generator = torch.Generator().manual_seed(1)
    made = empty(
        draft_logits=torch.randn(1, 1, LENGTH, VOCABULARY, generator=generator),
        temperature=torch.tensor([temperature]),
        seed=torch.tensor([5]),
        rules=[([1] * LENGTH, strategy, 0.9)],
    )
    tokens, odds = [5, 6, 7, 8], [3.0, 2.0, 1.0, 0.0]
    made = seen_by(made, (0, (tokens, odds)), (0b0010, (tokens, odds)))
    return made | {
        "seen_rows": ints([0, 1, 2, 3], [4, -1, 5, 6])[None],
        "seen_logits": torch.randn(7, VOCABULARY, generator=generator) * 3,
        **given,
    }


def drawn(made, rows, bits):
    """Tokens and log-odds that these rows of the logits seen give in the state `bits` of the only block."""
    first = int(made["start"][0])
    out = sample_logits(
        made["seen_logits"][rows],
        made["temperature"].expand(LENGTH),
        torch.zeros(LENGTH, dtype=torch.int32),
        torch.ones(LENGTH),
        made["seed"].expand(LENGTH),
        torch.arange(first, first + LENGTH, dtype=torch.int32),
        torch.full((LENGTH,), bits),
        backend="reference",
    )
    return out.token.tolist(), out.log_odds


def test_with_noise_each_state_draws_its_own_from_the_logits_of_the_nearest_one_seen(backend):
    made = noisy(temperature=5.0)
    found = states(made, backend)
    before, known = 0, (None,) * LENGTH
    assert found[0] == (before, known)
    for bits, tokens in found[1:]:
        near = [4, 0, 5, 6] if before & 0b0010 and known[1] == 6 else [0, 1, 2, 3]
        token, log_odds = drawn(made, near, before)
        log_odds[[i for i in range(LENGTH) if before >> i & 1]] = -math.inf
        best = int(log_odds.argmax())
        assert bits == before | 1 << best and tokens[best] == token[best]
        before, known = bits, tokens
    assert len(found) == LENGTH
    assert states(noisy(temperature=5.0, seed=torch.tensor([6])), backend) != found


@pytest.mark.parametrize("temperature, strategy", [(0.0, "low_confidence_static"), (0.8, "sequential")])
def test_states_that_share_draws_take_those_of_the_state_seen(backend, temperature, strategy):
    made = noisy(temperature, strategy)
    shown = {tokens[i] for _, tokens in states(made, backend) for i in range(LENGTH)} - {None}
    assert shown == {5, 6, 7}  # the last one finishes the block


def test_there_is_a_peek_with_noise_too(backend):
    made = noisy(peeks=ints(1), end=ints(4 * LENGTH))
    assert [(block, bits) for block, bits, _ in graph(plan(made, backend))][1] == (1, 0)


@backends("cpu", "cuda")
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("number", range(120))
def test_same_plan_with_draws_of_each_state_as_the_reference_to_the_last_bit(backend, number, head):
    made = with_seen(random_case(number, logits=True), number, head=head)
    if number % 4 == 1:  # rows and ids with gaps between them
        wide = torch.zeros(made["seen_logits"].shape[0], 2 * VOCABULARY + 3)
        wide[:, : 2 * VOCABULARY : 2] = made["seen_logits"]
        made["seen_logits"] = wide[:, : 2 * VOCABULARY : 2]
    if number % 5 == 0:
        dtype = (torch.bfloat16, torch.float16)[number % 2]
        made |= {name: made[name].to(dtype) for name in ("draft_logits", "seen_logits")}
    assert_same(plan(strided(made) if number % 3 == 0 else made, backend), plan(made, "reference"))


@backends("cpu", "cuda")
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("number", range(120))
def test_same_plan_as_the_reference_to_the_last_bit(backend, number, head):
    made = with_seen(random_case(number), number, head=head)
    if number % 5 == 0:
        for name in ("seen_prob", "seen_log_odds", "seen_entropy", "order_shift", "order_pair"):
            if made[name] is not None:
                made[name].view(-1)[number % 3 :: 3] = math.nan
                made[name].view(-1)[number % 7 :: 7] = math.inf
    assert_same(plan(strided(made) if number % 3 == 0 else made, backend), plan(made, "reference"))


REFUSED = [
    ({"seen_tokens": None}, ValueError, "states seen need all of seen_block, .*got no seen_tokens"),
    ({"seen_sharpness": None}, ValueError, "got no seen_sharpness"),
    (dict.fromkeys(SEEN[:8]), ValueError, "states seen need all of"),
    ({"order_pair": None}, ValueError, "order_shift and order_pair come together, got only order_shift"),
    (
        {"draft_logits": torch.zeros(1, 1, 4, 9), "temperature": torch.zeros(1)},
        *(ValueError, "seen_rows goes with draft_logits and states seen, got no seen_rows"),
    ),
    ({"seen_logits": torch.zeros(3, 9)}, ValueError, "seen_logits goes with draft_logits and .* got some seen_logits"),
    ({"seen_block": None}, ValueError, "got no seen_block"),
    ({"seen_exact": torch.zeros(1, 2, dtype=torch.int32)}, ValueError, r"seen_exact must be \[B, M\]"),
    ({"seen_revealed": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, "M"),
    ({"seen_revealed": torch.zeros(1, 1, dtype=torch.int32)}, TypeError, "seen_revealed must be torch.int64"),
    ({"seen_prob": torch.zeros(1, 1, 3)}, ValueError, r"seen_prob must be \[B, M, L\]"),
    ({"seen_entropy": torch.zeros(1, 1, 4).double()}, TypeError, "seen_entropy must be torch.float32"),
    ({"seen_sharpness": torch.tensor([-1.0])}, ValueError, "seen_sharpness must be finite and >= 0, got -1.0"),
    ({"order_pair": torch.zeros(1, 1, 4)}, ValueError, r"order_pair must be \[B, M, L, L\]"),
]


@pytest.mark.parametrize("changes, error, message", REFUSED)
def test_what_does_not_fit_together_is_refused(backend, changes, error, message):
    good = seen_by(empty(), (0, ([5, 6, 7, 8], [3.0, 2.0, 1.0, 0.0])), shift=[[0.0] * LENGTH])
    plan(good, backend)
    with pytest.raises(error, match=message):
        plan(good | changes, backend)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"seen_rows": None}, ValueError, "got no seen_rows"),
        ({"seen_logits": None}, ValueError, "got no seen_logits"),
        ({"seen_logits": torch.zeros(7, VOCABULARY).half()}, TypeError, "must be of draft_logits' dtype torch.float32"),
        ({"seen_logits": torch.zeros(7, 9)}, ValueError, "V"),
        ({"seen_logits": torch.zeros(0, VOCABULARY)}, ValueError, "must have R >= 1"),
        ({"seen_rows": torch.zeros(1, 2, 3).int()}, ValueError, r"seen_rows must be \[B, M, L\]"),
    ],
)
def test_logits_that_do_not_fit_are_refused(backend, changes, error, message):
    with pytest.raises(error, match=message):
        plan(noisy() | changes, backend)


@backends("reference", "cpu")
@pytest.mark.parametrize("row", [-1, 7])
def test_a_row_of_logits_that_is_not_there_is_refused(backend, row):
    rows = ints([0, 1, row, 3], [4, -1, 5, 6])[None]
    with pytest.raises(ValueError, match=rf"seen_rows must be in \[0, 7\) where masked, got {row}"):
        plan(noisy(seen_rows=rows), backend)
    with pytest.raises(RuntimeError, match=rf"seen_rows must be in \[0, 7\) where masked, got {row}"):
        torch.ops.simsd.plan_block.default(*(noisy() | {"seen_rows": rows}).values())


@backends("cpu", "cuda")
@pytest.mark.parametrize("logits", [False, True], ids=["given", "drawn"])
def test_compiled_op_refuses_states_that_are_not_whole(backend, logits):
    good = seen_by(empty(), (0, ([5, 6, 7, 8], [3.0, 2.0, 1.0, 0.0])), shift=[[0.0] * LENGTH])
    if logits:
        good = noisy(order_shift=torch.zeros(1, 2, LENGTH), order_pair=torch.zeros(1, 2, LENGTH, LENGTH))
    for name in SEEN if logits else set(SEEN) - {"seen_rows", "seen_logits"}:
        with pytest.raises((RuntimeError, ValueError), match="plan_block: "):
            torch.ops.simsd.plan_block(**good | {name: None})


@pytest.mark.parametrize(
    "peeks, error, message",
    [
        (torch.zeros(2, dtype=torch.int32), ValueError, r"peeks must be \[B\] = \[1\], got \[2\]"),
        (torch.zeros(1), TypeError, "peeks must be torch.int32"),
    ],
)
def test_peeks_of_another_shape_or_dtype_are_refused(backend, peeks, error, message):
    with pytest.raises(error, match=message):
        plan(empty(peeks=peeks), backend)


@pytest.mark.parametrize("logits", [False, True], ids=["given", "drawn"])
def test_opcheck(logits):
    made = with_seen(noisy() if logits else arguments(batch=2, ahead=2, max_states=4), 0, count=3)
    torch.library.opcheck(torch.ops.simsd.plan_block, (), made)
