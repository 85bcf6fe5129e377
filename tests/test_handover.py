"""What becomes of blocks that were drafted while the target went on."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cpu import trace_iteration as tracing
from simsd.decode.exchange import LOOKUP_DRAFT, SELF_DRAFT, Commands
from simsd.decode.handover import adopt, draft_for_itself
from simsd.decode.iteration import Shape
from simsd.decode.slots import Slots
from simsd_kernels.advance_slots.api import NO_END

LENGTH, BLOCKS, VOCABULARY = 4, 4, 32
DRAFTED = [[11, 12, 13, 14], [15, 16, 17, 18], [19, 20, 21, 22], [0, 0, 0, 0]]
SETTINGS = {
    **dict.fromkeys(("seed", "top_k", "strategy", "steps", "sub_blocks", "end_gate"), 0),
    **{
        "temperature": 0.0,
        "top_p": 1.0,
        "threshold": 0.0,
        "order_sharpness": (1.0, 0.25, 0.0),
        "schedule": [1] * LENGTH,
    },
    **{"prompt_len": 8, "end": 40, "stop_ids": (-1,), "request_epoch": 5},
}


def opened(start: int = 8, **settings) -> Slots:
    """Two slots, of which the first has a text of `start` tokens."""
    slots = Slots(2, LENGTH, 40, BLOCKS, 1, torch.device("cpu"))
    slots.ban((), VOCABULARY)
    slots.allow_noise(VOCABULARY, torch.float32)
    slots.open(0, list(range(1, start + 1)), SETTINGS | settings, (start, start - LENGTH))
    return slots


def drafted(depth: int = 3, **settings) -> Slots:
    """What a draft made of it, three blocks ahead: clean keys and values of two of them."""
    slots = opened(**settings)
    slots.draft_tokens[0] = torch.tensor(DRAFTED)
    slots.text[0, 8:20] = torch.tensor(DRAFTED[:3]).flatten()
    for n, field in enumerate((slots.draft_prob, slots.draft_log_odds, slots.draft_entropy), 1):
        field[0] = n + torch.arange(BLOCKS * LENGTH).view(BLOCKS, LENGTH) / 100
    slots.draft_sharpness[0] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    slots.draft_logits[0] = torch.arange(BLOCKS)[:, None, None].float()
    slots.proposal_depth[0], slots.draft_kv_len[0], slots.draft_forwards[0] = depth, 16, 7
    return slots


def commit(slots: Slots, tokens: list[int], shown: int = 0) -> None:
    """The target has taken these tokens; of the last four only `shown` (bits), where that is not 0."""
    whole = len(tokens) - (LENGTH if shown else 0)
    slots.text[0, 8 : 8 + len(tokens)] = torch.tensor(tokens)
    slots.start[0], slots.revealed[0] = 8 + whole, shown


def seen(slots: Slots) -> tuple[int, int, list[list[int]]]:
    depth = int(slots.proposal_depth[0])
    return depth, int(slots.draft_kv_len[0]), slots.draft_tokens[0, :depth].tolist()


STANDS = [
    ("nothing was committed", [], 0, 3, 16),
    ("two positions, as drafted", [11, 0, 13, 0], 0b101, 3, 16),
    ("a block", [11, 12, 13, 14], 0, 2, 16),
    ("a block and a position", [11, 12, 13, 14, 0, 16, 0, 0], 0b10, 2, 16),
    ("two blocks", [11, 12, 13, 14, 15, 16, 17, 18], 0, 1, 16),
]


@pytest.mark.parametrize(("what", "tokens", "shown", "depth", "kv_len"), STANDS, ids=[case[0] for case in STANDS])
def test_a_proposal_that_foresaw_what_was_committed_moves_along(what, tokens, shown, depth, kv_len):
    slots, proposed = opened(), drafted()
    proposed.draft_end[0] = 3
    commit(slots, tokens, shown)
    adopt(slots, proposed, noise=True)
    passed = 3 - depth
    assert seen(slots) == (depth, kv_len, DRAFTED[passed:3])
    for mine, its in zip(slots.proposal(depth), proposed.proposal(BLOCKS), strict=True):
        assert torch.equal(mine[0], its[0, passed:3])
    assert torch.equal(slots.draft_logits[0, :depth], proposed.draft_logits[0, passed:3])
    assert slots.draft_end[0] == depth and slots.draft_forwards[0] == 7
    # The draft goes on behind its own blocks; what is committed stays.
    assert slots.text[0, 8:20].tolist() == sum(DRAFTED[:3], [])


DROPPED = [
    ("another token in the current block", [0, 30, 0, 0], 0b10, 8),
    ("another token in the next block", [11, 12, 13, 14, 30, 0, 0, 0], 0b1, 12),
    ("another block", [11, 12, 13, 30], 0, 8),
    ("another block behind one as drafted", [11, 12, 13, 14, 15, 16, 17, 30], 0, 12),
    ("all of it", [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22], 0, 16),
    ("more than it", [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 0, 0, 0, 0], 0, 16),
]


@pytest.mark.parametrize(("what", "tokens", "shown", "kv_len"), DROPPED, ids=[case[0] for case in DROPPED])
def test_a_stale_proposal_is_dropped(what, tokens, shown, kv_len):
    """The draft's keys and values are the text's up to where the two part."""
    slots, proposed = opened(), drafted()
    commit(slots, tokens, shown)
    text = slots.text.clone()
    adopt(slots, proposed, noise=True)
    assert seen(slots) == (0, kv_len, [])
    assert torch.equal(slots.text, text) and slots.draft_forwards[0] == 7 and slots.draft_end[0] == NO_END


@pytest.mark.parametrize("how", ["another sequence", "the slot was free", "the slot is free", "it began later"])
def test_what_was_drafted_for_another_is_dropped(how):
    slots, proposed = opened(), drafted()
    if how == "another sequence":
        slots = opened(request_epoch=6)
    elif how == "the slot was free":
        proposed.close(0)
    elif how == "the slot is free":
        slots.close(0)
    else:
        proposed = drafted(start=12)
    before = {name: x.clone() for name, x in vars(slots).items() if isinstance(x, torch.Tensor)}
    adopt(slots, proposed, noise=True)
    for name, x in before.items():
        assert torch.equal(x, getattr(slots, name)), name


def test_a_copy_that_went_no_further_takes_nothing_back():
    """A draft that was asked for nothing leaves things as they were: keys and values, too."""
    slots = drafted()
    copy = slots.twin(slots.device)
    copy.allow_noise(VOCABULARY, torch.float32)
    copy.copy(slots, noise=True)
    before = {name: x.clone() for name, x in vars(slots).items() if isinstance(x, torch.Tensor)}
    adopt(slots, copy, noise=True)
    for name, x in before.items():
        assert torch.equal(x, getattr(slots, name)), name


class Logits:
    """A target whose last logits are for one token per position."""

    packed = True

    def __init__(self, tokens: list[int]) -> None:
        self.last_logits = 9.0 * torch.nn.functional.one_hot(torch.tensor(tokens), VOCABULARY).float()


@pytest.mark.parametrize(("tokens", "depth", "kv_len"), [(DRAFTED[0], 3, 16), ([11, 12, 13, 30], 1, 8)])
def test_blocks_behind_one_that_the_target_proposes_otherwise_are_dropped(tokens, depth, kv_len):
    slots, commands = opened(), Commands(2, "cpu")
    adopt(slots, drafted(), noise=False)
    slots.last_rows[0] = torch.arange(LENGTH)
    commands.runs[0], commands.mode[0] = 1, SELF_DRAFT
    slots.steps.fill_(LENGTH)
    draft_for_itself(slots, commands, Logits(tokens), Shape(lookahead=BLOCKS, self_draft=True))
    assert seen(slots) == (depth, kv_len, [tokens, *DRAFTED[1:3]][:depth])


REPEATED = [
    ("one block likewise", DRAFTED[0] + [5, 6, 7, 8], [DRAFTED[0], [5, 6, 7, 8]], 12),
    ("both likewise", DRAFTED[0] + DRAFTED[1], DRAFTED[:3], 16),
    ("none likewise", [11, 12, 13, 30, 5, 6, 7, 8], [[11, 12, 13, 30], [5, 6, 7, 8]], 8),
]


@pytest.mark.parametrize(("what", "before", "blocks", "kv_len"), REPEATED, ids=[case[0] for case in REPEATED])
def test_blocks_behind_what_is_looked_up_stay_where_that_was_drafted_too(what, before, blocks, kv_len):
    slots, commands = opened(), Commands(2, "cpu")
    adopt(slots, drafted(), noise=False)
    # The text begins with what it is to repeat: two tokens, what followed them, and the two again.
    text = [1, 2, *before, 1, 2]
    shift = len(text) - 8
    slots.text[0, shift : shift + 20] = slots.text[0, :20].clone()
    slots.text[0, : len(text)] = torch.tensor(text)
    for field in (slots.start, slots.draft_kv_len, slots.prompt_len):
        field[0] += shift
    commands.runs[0], commands.mode[0] = 1, LOOKUP_DRAFT
    draft_for_itself(slots, commands, Logits([0]), Shape(lookahead=2, lookup=True))
    assert seen(slots) == (len(blocks), kv_len + shift, blocks)


@pytest.mark.parametrize("noise", [False, True])
def test_nothing_waits_for_the_host(noise):
    with tracing.without_a_gpu():
        slots = Slots(3, LENGTH, 40, BLOCKS, 1, torch.device(tracing.DEVICE))
        slots.ban((3, 4), 2 * VOCABULARY)  # fake tensors of one number are computed, which would take a GPU
        slots.allow_noise(VOCABULARY, torch.float32)
        copy = slots.twin(slots.device)
        copy.allow_noise(VOCABULARY, torch.float32)
        with tracing.counted() as launches:
            adopt(slots, copy, noise)
            copy.copy(slots, noise)
    assert launches.calls and not launches.uploads
