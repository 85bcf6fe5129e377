"""What a draft's logits propose: the very tokens that denoising on them gives, and nothing in other slots."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arguments import Pick, copy_of, same_bits, strided
from backends import FLOATS, backends, callable_of, needs_compiled_ops
from proposals import NO_END, STATISTICS, TENSORS, VOCABULARY, WRITTEN, as_one_by_one, propose, random_case, slot
from simsd_kernels import banned_mask, dispatch
from simsd_kernels.propose_block import reference

propose_block = callable_of("propose_block")
LANES = tuple(name for name in TENSORS if name not in ("logits", "banned"))


@given(
    number=st.integers(0, 2**32),
    noise=st.integers(0, 1),
    length=st.integers(1, 6),
    apart=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=40, deadline=None)
def test_block_is_denoised_as_by_sample_logits_and_reveal(backend, number, noise, length, apart, dtype):
    case = random_case(number, noise, length=length, dtype=dtype, filters=number % 2 == 0)
    as_one_by_one(strided(case) if apart else case, backend)


@pytest.mark.parametrize("noise", [0, 1])
def test_block_of_64_is_denoised_as_by_sample_logits_and_reveal(backend, noise):
    case = random_case(4, noise, batch=2, length=64)
    case["steps"].clamp_(max=5)
    case["step"].clamp_(max=4)
    case["rows"][0] = torch.arange(64)
    case["start"][0] = 64
    as_one_by_one(case, backend)


def test_proposal_is_the_drafts_first_choice_at_temperature_zero(backend):
    case = propose(slot(block=1), backend)
    assert case["draft_tokens"].tolist() == [[[-9] * 4, [5, 6, 7, 8]]]
    assert case["text"].tolist() == [[1] * 8 + [5, 6, 7, 8] + [1] * 8]
    assert case["proposal_depth"].item() == 2 and case["draft_end"].item() == NO_END
    assert bool((case["prob"][0, 0] == -9).all()) and bool((case["prob"][0, 1] > 0.9).all())
    assert case["log_odds"][0, 1].tolist() == sorted(case["log_odds"][0, 1].tolist(), reverse=True)
    assert case["entropy"][0, 1].tolist() == sorted(case["entropy"][0, 1].tolist())


def test_revealed_tokens_are_kept_and_need_no_logits(backend):
    case = slot(revealed=torch.tensor([0b0101]), rows=torch.tensor([[-1, 1, -1, 3]], dtype=torch.int32))
    case["text"][0, 4:8] = torch.tensor([2, 1, 3, 1])
    propose(case, backend)
    assert case["draft_tokens"][0, 0].tolist() == [2, 6, 3, 8] == case["text"][0, 4:8].tolist()
    assert (case["prob"][0, 0] == -9).tolist() == [True, False, True, False]


@pytest.mark.parametrize("noise", [0, 1])
def test_block_that_is_all_revealed_is_proposed_as_it_is(backend, noise):
    case = slot(
        revealed=torch.tensor([0b1111]), noise=noise, temperature=torch.tensor([float(noise)]), seed=torch.tensor([1])
    )
    case["text"][0, 4:8] = torch.tensor([2, 9, 3, 1])
    propose(case, backend)
    assert case["draft_tokens"][0, 0].tolist() == [2, 9, 3, 1] == case["text"][0, 4:8].tolist()
    assert (case["proposal_depth"].item(), case["draft_end"].item()) == (1, 1)
    assert bool((case["prob"] == -9).all())


@pytest.mark.parametrize("number", range(8))
def test_noise_of_a_position_is_that_of_what_is_revealed_before_it(backend, number):
    """At high temperature a second step draws anew, unless the order is fixed."""
    flat = {"logits": torch.zeros(4, 1000), "temperature": torch.tensor([1.0]), "seed": torch.tensor([number])}
    tokens = {}
    for strategy in ("sequential", "low_confidence_static"):
        for steps in (1, 4):
            case = slot(rules=([4 // steps] * steps, strategy, 0.5), noise=1, **copy_of(flat))
            tokens[strategy, steps] = propose(case, backend)["draft_tokens"][0, 0].tolist()
    assert tokens["sequential", 1] == tokens["sequential", 4]
    assert tokens["low_confidence_static", 1] != tokens["low_confidence_static", 4]


@pytest.mark.parametrize("noise", [0, 1])
@pytest.mark.parametrize("step, steps", [(4, 4), (0, 0), (7, 2)])
def test_block_without_a_step_left_gets_its_first_draw(backend, noise, step, steps):
    case = slot(noise=noise, rules=([1] * steps, "low_confidence_static", 0.5), seed=torch.tensor([1]))
    case["temperature"] += 1e-3 * noise
    case["step"] += step
    propose(case, backend)
    assert case["draft_tokens"][0, 0].tolist() == [5, 6, 7, 8] == case["text"][0, 4:8].tolist()
    assert case["proposal_depth"].item() == 1


@pytest.mark.parametrize(
    "idle", [{"rows": torch.full((1, 4), -1, dtype=torch.int32)}, {"start": torch.tensor([-4], dtype=torch.int32)}]
)
@pytest.mark.parametrize("noise", [0, 1])
def test_slot_that_takes_no_part_keeps_everything(backend, idle, noise):
    case = slot(noise=noise, **copy_of(idle), seed=torch.tensor([1]))
    before = copy_of(case)
    propose(case, backend)
    assert all(same_bits(case[name], before[name]) for name in WRITTEN)


@pytest.mark.parametrize(
    "stop, prompt_len, revealed, end",
    [(7, 0, 0, 1), (7, 6, 0, 1), (7, 7, 0, 77), (1, 0, 0b1, 1), (-1, 0, 0, 77), (9, 0, 0, 77)],
    ids=["drafted", "first behind the prompt", "in the prompt", "revealed before", "none", "another"],
)
def test_draft_that_ends_the_text_says_so(backend, stop, prompt_len, revealed, end):
    case = slot(
        stop_ids=torch.tensor([[-1, stop]]),
        prompt_len=torch.tensor([prompt_len], dtype=torch.int32),
        revealed=torch.tensor([revealed]),
        draft_end=torch.tensor([77], dtype=torch.int32),
    )
    assert propose(case, backend)["draft_end"].item() == end


@pytest.mark.parametrize("noise", [0, 1])
def test_slot_is_the_same_alone_and_in_company(backend, noise):
    case = random_case(11, noise, batch=7)
    shared = ("logits", "banned", "block", "noise")
    alone = [
        {name: value if name in shared or value is None else value[b : b + 1].clone() for name, value in case.items()}
        for b in range(7)
    ]
    propose(case, backend)
    for b, one in enumerate(alone):
        propose(one, backend)
        assert all(same_bits(one[name][0], case[name][b]) for name in WRITTEN)


@pytest.mark.parametrize("noise", [0, 1])
@pytest.mark.parametrize("batch, length, stops", [(0, 4, 2), (3, 0, 2), (0, 0, 2), (3, 4, 0)])
def test_empty_batches_blocks_and_stop_ids_are_fine(backend, batch, length, stops, noise):
    case = slot(noise=noise, seed=torch.tensor([1]), top_k=torch.tensor([3], dtype=torch.int32))
    for name in set(TENSORS) - {"logits", "banned", "top_p"}:
        shape = [batch, *case[name].shape[1:]]
        if name == "stop_ids":
            shape[1] = stops
        elif len(shape) > 1 and name != "text":
            shape[-1] = length
        case[name] = case[name].new_zeros(shape)
    propose(case, backend)
    assert case["proposal_depth"].tolist() == [1 if length else 0] * batch


def test_no_logits_at_all_are_fine_where_nobody_takes_part(backend):
    case = slot(logits=torch.zeros(0, VOCABULARY), rows=torch.full((1, 4), -1, dtype=torch.int32))
    assert propose(case, backend)["proposal_depth"].item() == 0


def test_logits_without_a_number_propose_the_lowest_id_that_is_allowed(backend):
    case = slot(logits=torch.full((4, VOCABULARY), math.nan), banned=banned_mask([0, 1], VOCABULARY))
    propose(case, backend)
    assert case["draft_tokens"][0, 0].tolist() == [2] * 4 and case["prob"][0, 0].tolist() == [0.0] * 4


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def random_arguments(seed):
    pick = Pick(seed)
    sizes = {"batch": pick(1, 3, 8), "length": pick(1, 2, 3, 4, 32, 64)}
    return random_case(seed, seed % 2, **sizes, dtype=pick(*FLOATS), filters=seed % 3 > 0)


def good_arguments():
    """All of them given."""
    options = {"seed": torch.tensor([1]), "top_k": int32(0), "top_p": torch.ones(1)}
    return slot(**options, banned=banned_mask([0], VOCABULARY))


REFUSED = [
    ("logits", torch.zeros(4, 3, dtype=torch.int64), TypeError, "logits must be .*got torch.int64"),
    ("logits", torch.zeros(4, 0), ValueError, "logits must have V >= 1"),
    ("logits", torch.zeros(1, 4, 3), ValueError, r"logits must be \[N, V\]"),
    ("rows", torch.zeros(1, 4, dtype=torch.int64), TypeError, "rows must be torch.int32"),
    ("rows", torch.zeros(1, 65, dtype=torch.int32), ValueError, "draft_tokens must be"),
    ("rows", int32([0, 1, 2, 4]), ValueError, "rows must be at most 3, got 4"),
    ("rows", int32([0, -1, 2, 3]), ValueError, r"rows must be in \[0, 4\) at masked positions, got -1"),
    ("text", torch.zeros(1, 20), TypeError, "text must be torch.int64"),
    ("text", torch.zeros(2, 20, dtype=torch.int64), ValueError, r"text must be \[B, T\] = \[1, 20\]"),
    ("start", int32(17), ValueError, "block's last position must be within the text of 20 tokens, got 21"),
    ("start", torch.zeros(1), TypeError, "start must be torch.int32"),
    ("revealed", int32(0), TypeError, "revealed must be torch.int64"),
    ("step", 1, TypeError, "step must be a tensor, got int"),
    ("draft_tokens", torch.zeros(1, 2, 3, dtype=torch.int64), ValueError, r"draft_tokens must be \[B, K, L\]"),
    ("draft_tokens", torch.zeros(1, 0, 4, dtype=torch.int64), ValueError, r"prob must be \[B, K, L\] = \[1, 0, 4\]"),
    ("prob", torch.zeros(1, 2, 4).double(), TypeError, "prob must be torch.float32"),
    ("entropy", torch.zeros(1, 3, 4), ValueError, r"entropy must be \[B, K, L\] = \[1, 2, 4\]"),
    ("proposal_depth", torch.zeros(1, dtype=torch.int64), TypeError, "proposal_depth must be torch.int32"),
    ("draft_end", torch.zeros(2, dtype=torch.int32), ValueError, r"draft_end must be \[B\] = \[1\]"),
    ("stop_ids", torch.zeros(1, dtype=torch.int64), ValueError, r"stop_ids must be \[B, E\]"),
    ("stop_ids", torch.zeros(1, 2, dtype=torch.int32), TypeError, "stop_ids must be torch.int64"),
    ("temperature", torch.tensor([-1.0]), ValueError, "temperature must be finite and >= 0, got -1"),
    ("temperature", torch.tensor([1.0]), ValueError, "temperature must be 0 where noise is 0, got 1"),
    ("steps", int32(5), ValueError, r"steps must be in \[0, 4\], got 5"),
    ("strategy", int32(4), ValueError, r"strategy must be in \[0, 3\], got 4"),
    ("schedule", torch.zeros(1, 3, dtype=torch.int32), ValueError, r"schedule must be \[B, L\]"),
    ("top_k", int32(-1), ValueError, "top_k must be >= 0"),
    ("top_p", torch.tensor([1.5]), ValueError, r"top_p must be in \[0, 1\]"),
    ("seed", int32(1), TypeError, "seed must be torch.int64"),
    ("banned", torch.tensor([VOCABULARY - 1]), TypeError, r"as simsd_kernels.banned_mask\(ids, .* torch.int64 \[1\]"),
    ("banned", torch.zeros(VOCABULARY, dtype=torch.int32), ValueError, "banned must be .* makes it, got torch.int32"),
    ("block", 2, ValueError, r"block must be in \[0, 1\], got 2"),
    ("block", -1, ValueError, r"block must be in \[0, 1\], got -1"),
    ("block", 0.0, TypeError, "block must be an integer, got 0.0"),
    ("noise", 2, ValueError, r"noise must be in \[0, 1\], got 2"),
    ("noise", True, TypeError, "noise must be an integer, got True"),
    ("step", torch.zeros(1, dtype=torch.int32, device="meta"), ValueError, "one device.*step on meta"),
]


def test_settings_of_a_slot_that_takes_no_part_do_not_matter():
    stale = {"seed": torch.tensor([1]), "temperature": torch.tensor([1.0])}
    case = slot(rows=torch.full((1, 4), -1, dtype=torch.int32), **stale)
    assert propose(case)["proposal_depth"].item() == 0


def test_noise_without_a_seed_is_refused():
    with pytest.raises(ValueError, match="temperature must be 0 without seed, got 1"):
        propose_block(**slot(noise=1, temperature=torch.tensor([1.0])))


def test_logits_in_float64_are_for_the_reference_alone():
    case = slot()
    case["logits"] = case["logits"].double()
    assert propose(case, "reference")["draft_tokens"][0, 0].tolist() == [5, 6, 7, 8]
    with pytest.raises(RuntimeError, match="got logits of torch.float64"):
        propose_block(**case, backend="cpu")


@needs_compiled_ops
@pytest.mark.parametrize(
    "name, wrong",
    [
        *(("block", block) for block in (-1, 2, 2**40)),
        *(("rows", int32([0, row, 2, 3])) for row in (-1, 4, 2**31 - 1)),
        *(("start", int32(start)) for start in (17, 2**31 - 1)),
        ("temperature", torch.tensor([1.0])),
        ("banned", torch.zeros(9, dtype=torch.int32)),
    ],
)
def test_compiled_op_reads_and_writes_nowhere_else(name, wrong):
    case = slot(seed=torch.tensor([1]), **{name: wrong})
    before = copy_of(case)
    with pytest.raises(RuntimeError, match="propose_block: "):
        torch.ops.simsd.propose_block(**case)
    assert all(same_bits(case[other], before[other]) for other in WRITTEN)


@needs_compiled_ops
@pytest.mark.parametrize("name", ["step", "steps", "strategy", "schedule", "revealed", "prompt_len", "proposal_depth"])
@pytest.mark.parametrize("number", [-(2**31), -1, 5, 2**31 - 1])
def test_compiled_op_survives_any_number_and_the_definition_agrees(name, number):
    case = random_case(6, 1, batch=4)
    case["rows"].clamp_(min=0)
    case[name] = torch.full_like(case[name], number)
    expected = copy_of(case)
    torch.ops.simsd.propose_block(**case)
    reference.propose_block(**expected)
    for other in WRITTEN:
        if other in STATISTICS:
            torch.testing.assert_close(case[other], expected[other], rtol=5e-6, atol=5e-6)
        else:
            assert torch.equal(case[other], expected[other]), other


@pytest.mark.parametrize("noise", [0, 1])
def test_opcheck(noise):
    torch.library.opcheck(torch.ops.simsd.propose_block, tuple(random_case(2, noise).values()))


@backends("cuda")
@pytest.mark.parametrize("number", range(300))
def test_block_is_denoised_as_by_the_loop_and_as_on_the_cpu(number):
    dtype = FLOATS[number % 3]
    case = random_case(number, number % 2, length=1 + number % 6, dtype=dtype, filters=number % 4 < 2)
    by_cpu = propose(copy_of(case), "cpu")
    case = strided(case) if number % 5 == 0 else case
    as_one_by_one(case, "cuda")
    for name in WRITTEN:
        if case[name].is_floating_point():
            torch.testing.assert_close(case[name], by_cpu[name], rtol=5e-6, atol=5e-6)
        else:
            assert torch.equal(case[name], by_cpu[name]), name


@pytest.mark.parametrize("noise", [0, 1])
@pytest.mark.parametrize("length", [33, 64])
def test_long_block_is_denoised_as_by_sample_logits_and_reveal(backend, noise, length):
    case = random_case(4, noise, batch=2, length=length)
    case["steps"].clamp_(max=3)
    case["step"].clamp_(max=2)
    as_one_by_one(case, backend)


@backends("emulation")
@pytest.mark.parametrize(
    "noise, contiguous, banned, launches",
    [(0, True, [], 3), (0, False, [], 4), (0, True, [0], 3), (1, True, [], 1 + 4 * 3), (1, True, [0], 1 + 4 * 3)],
)
def test_launches_are_two_of_draws_and_a_small_one_a_round(counted, noise, contiguous, banned, launches):
    case = slot(noise=noise, seed=torch.tensor([1]), banned=banned_mask(banned, VOCABULARY))
    case["rows"] = case["rows"] if contiguous else strided(case)["rows"]
    assert counted(lambda: propose(case, "cuda"))["launches"] == launches


@backends("emulation")
def test_missing_row_ends_the_launch():
    with pytest.raises(RuntimeError, match=r"rows must be in \[0, N\) at masked positions"):
        dispatch.operator("propose_block", "cuda")(**slot(rows=int32([0, -1, 2, 3])))
