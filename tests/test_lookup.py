"""Prompt lookup: proposals against a search in plain Python, and texts that repeat themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import simsd
from simsd.decode.exchange import LOOKUP_DRAFT, MODEL_DRAFT, Commands
from simsd.decode.iteration import Shape
from simsd.decode.lookup import LONGEST, PLACES, SHORTEST, by_lookup, draft_without_model
from simsd.decode.slots import Slots
from simsd_kernels import sample_logits
from simsd_kernels.advance_slots.api import NO_END

LENGTH, VOCABULARY = 4, 32
SETTINGS = {
    **dict.fromkeys(("seed", "top_k", "strategy", "sub_blocks", "end_gate"), 0),
    **{"temperature": 0.0, "top_p": 1.0, "threshold": 0.0, "order_sharpness": (1.0, 0.25, 0.5)},
    **{"schedule": [1] * LENGTH, "steps": LENGTH, "end": 64, "request_epoch": 1, "stop_ids": (-1, -1)},
}


def opened(texts: list[list[int]], shown: list[dict[int, int]] | None = None, blocks: int = 2, **changes) -> Slots:
    """A slot for each text; `shown`: further positions that are revealed, by number in the current block."""
    slots = Slots(len(texts), LENGTH, 64, blocks, 2, torch.device("cpu"))
    slots.ban((), VOCABULARY)
    slots.text.fill_(31)  # what stands behind a text is of no meaning
    for slot, text in enumerate(texts):
        slots.open(slot, text, SETTINGS | {"prompt_len": len(text)} | changes)
        for i, token in (shown[slot] if shown else {}).items():
            slots.text[slot, slots.start[slot] + i] = token
            slots.revealed[slot] |= 1 << i
    return slots


def look(slots: Slots, blocks: int = 2, packed: bool = True, mode: list[int] | None = None, noise: bool = False):
    """Blocks proposed for each slot."""
    commands = Commands(slots.count, "cpu")
    commands.runs.fill_(1)
    commands.mode.copy_(torch.tensor(mode or [LOOKUP_DRAFT] * slots.count))
    by_lookup(slots, commands, Shape(lookahead=blocks, lookup=True, noise=noise), packed)
    depths = slots.proposal_depth.tolist()
    return [slots.draft_tokens[slot, :depth].flatten().tolist() for slot, depth in enumerate(depths)]


FOUND = [
    ("what followed the last tokens", [7, 8, 9, 10, 11, 12, 13, 14, 7, 8, 9], {}, [7, 8, 9, 10, 11, 12, 13, 14]),
    ("the longest match goes first", [1, 2, 3, 4, 5, 2, 3, 6, 1, 2, 3], {}, [1, 2, 3, 4, 5, 2, 3, 6]),
    ("of equals the latest", [2, 3, 4, 9, 2, 3, 5, 8, 2, 3], {}, [2, 3, 5, 8, 2, 3, 5, 8]),
    ("one that agrees with what is revealed", [2, 3, 4, 9, 2, 3, 5, 8, 2, 3], {3: 9}, [2, 3, 4, 9, 2, 3, 5, 8]),
    ("none agrees", [2, 3, 4, 9, 2, 3, 5, 8, 2, 3], {3: 7}, []),
    ("a period shorter than a block goes on", [5, 5, 5], {}, [5] * 8),
    ("a period of three", [1, 2, 3, 1, 2, 3, 1], {}, [2, 3, 1, 2, 3, 1, 2, 3]),
    ("the block that begins", [1, 2, 3, 4, 5, 6, 1, 2], {}, [3, 4, 5, 6, 1, 2, 3, 4]),
    ("one token is not enough", [9, 1, 2, 3, 4, 9], {}, []),
    ("nothing stood there before", [1, 2, 3, 4, 5, 6], {}, []),
    ("a text of one token", [1], {}, []),
    ("no text", [], {}, []),
]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("what", "text", "shown", "proposed"), FOUND, ids=[case[0] for case in FOUND])
def test_what_followed_before_is_proposed(what, text, shown, proposed, packed):
    assert look(opened([text], [shown]), packed=packed) == [proposed]


def replay(text: list[int], shown: dict[int, int], blocks: int) -> list[int]:
    """The same search, place by place."""
    start = len(text) // LENGTH * LENGTH
    block = {i: text[start + i] for i in range(len(text) - start)} | shown
    first = start + next(i for i in range(LENGTH) if i not in block)
    known = text[:start] + [block[i] for i in range(first - start)]

    def size(place: int) -> int:
        n = 0
        while n < min(LONGEST, place) and known[place - 1 - n] == known[first - 1 - n]:
            n += 1
        return n

    def behind(place: int) -> list[int]:
        span = range(start, start + blocks * LENGTH)
        return [known[i] if i < first else known[place + (i - first) % (first - place)] for i in span]

    places = sorted((p for p in range(1, first) if size(p) >= SHORTEST), key=lambda p: (-size(p), -p))[:PLACES]
    for place in places:
        found = behind(place)
        if all(found[i] == token for i, token in block.items()):
            return found
    return []


@st.composite
def batches(draw):
    size = draw(st.integers(1, 4))
    token = st.integers(1, draw(st.integers(2, 4)))
    texts = draw(st.lists(st.lists(token, max_size=40), min_size=size, max_size=size))
    shown = []
    for text in texts:
        free = range(len(text) % LENGTH, LENGTH)
        chosen = draw(st.sets(st.sampled_from(free), max_size=len(free) - 1))
        shown.append({i: draw(token) for i in sorted(chosen)})
    return texts, shown, draw(st.integers(1, 3))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batches(), st.booleans())
def test_a_ragged_batch_finds_what_a_search_by_hand_finds(batch, packed):
    texts, shown, blocks = batch
    expected = [replay(text, more, blocks) for text, more in zip(texts, shown, strict=True)]
    assert look(opened(texts, shown, blocks), blocks, packed) == expected


def test_a_proposal_is_certain_and_falls_with_the_position():
    slots = opened([[1, 2, 3, 1, 2]])
    look(slots)
    assert slots.draft_prob[0].eq(1.0).all() and slots.draft_entropy[0].eq(0.0).all()
    assert slots.draft_log_odds[0].diff(dim=1).eq(-1.0).all()
    assert slots.draft_sharpness[0].tolist() == [0.5, 0.5]
    assert slots.text[0, 4:12].tolist() == slots.draft_tokens[0].flatten().tolist()


@pytest.mark.parametrize("stop_ids, end", [((3, -1), 1), ((9, 8), NO_END), ((-1, 6), 2)])
def test_nothing_is_entered_behind_an_end_token_that_is_looked_up(stop_ids, end):
    """Not one of the prompt's: that is part of the question."""
    slots = opened([[1, 2, 3, 4, 5, 6, 7, 8, 1, 2]], stop_ids=stop_ids)
    assert look(slots) == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert slots.draft_end.tolist() == [2 if stop_ids == (9, 8) else end]


def test_slots_of_another_mode_keep_what_they_have():
    repeating = [1, 2, 3, 1, 2]
    slots = opened([repeating] * 3)
    slots.close(2)
    before = slots.text.clone()
    assert look(slots, mode=[LOOKUP_DRAFT, MODEL_DRAFT, LOOKUP_DRAFT]) == [[2, 3, 1, 2, 3, 1, 2, 3], [], []]
    assert torch.equal(slots.text[1:], before[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 0.3, 1.0, 7.0, 1e30])
def test_with_noise_what_was_looked_up_stands_whatever_is_drawn(temperature, dtype):
    slots = opened([[1, 2, 3, 1, 2], [4, 5, 6]], temperature=temperature)
    slots.allow_noise(VOCABULARY, dtype)
    slots.draft_logits.normal_()
    kept = slots.draft_logits[1].clone()
    (proposed, nothing) = look(slots, noise=True)
    assert nothing == [] and torch.equal(slots.draft_logits[1], kept)
    if temperature == 1e30 and dtype == torch.float16:
        return  # logits of float16 are not above such noise: a poor draft, no error
    rows, draws = 2 * LENGTH, 50
    logits = slots.draft_logits[0].view(rows, VOCABULARY).repeat(draws, 1)
    many = torch.arange(rows * draws)
    out = sample_logits(
        *(logits, torch.full((rows * draws,), temperature), torch.zeros_like(many, dtype=torch.int32)),
        *(torch.ones(rows * draws), many, many.int(), many),
    )
    assert out[0].view(draws, rows).eq(torch.tensor(proposed)).all()
    order = out[2].view(draws, 2, LENGTH)[0]
    assert (order.diff(dim=1) <= 0).all() and (temperature > 1e29 or (order.diff(dim=1) < 0).all())


class Logits:
    """A target whose last logits are for one token per position."""

    packed = True

    def __init__(self, tokens: list[int]) -> None:
        self.last_logits = 9.0 * torch.nn.functional.one_hot(torch.tensor(tokens), VOCABULARY).float()


@pytest.mark.parametrize(
    ("own", "expected"),
    [([3, 4, 5, 6], [3, 4, 5, 6, 1, 2, 3, 4]), ([9, 8, 7, 6], [9, 8, 7, 6])],
    ids=["the text goes on behind it", "it did not stand before"],
)
def test_the_target_s_own_logits_go_first_and_the_text_goes_on_behind_them(own, expected):
    slots = opened([[1, 2, 3, 4, 5, 6, 1, 2]])
    slots.last_rows[0] = torch.arange(LENGTH)
    commands = Commands(1, "cpu")
    commands.runs[0], commands.mode[0] = 1, LOOKUP_DRAFT
    draft_without_model(slots, commands, Logits(own), Shape(lookahead=2, self_draft=True, lookup=True))
    depth = int(slots.proposal_depth[0])
    assert slots.draft_tokens[0, :depth].flatten().tolist() == expected
    assert slots.draft_sharpness[0, :depth].tolist() == [1.0, 0.5][:depth]


QUESTION = "Let x=[3,1,4,1,5]. Write Python for the items of x in reverse."
AGAIN = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "x[::-1]==[5,1,4,1,3]"},
    {"role": "user", "content": QUESTION},
]


@pytest.fixture(scope="module")
def tiny():
    return simsd.load("tiny-target")


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["answered before", "goes round in circles"])
def test_a_text_that_repeats_itself_takes_fewer_forwards(tiny, kind, temperature):
    prompt, more = (AGAIN, {}) if kind == "answered before" else (QUESTION, {"end_token_ids": ()})
    config = {"max_new_tokens": 96, "temperature": temperature, "max_rows": 128} | more
    native, own, found = (
        simsd.generate(tiny, [prompt], **config, **one)[0]
        for one in ({"verify": "none"}, {"drafter": "self"}, {"drafter": "lookup"})
    )
    assert found.tokens == own.tokens == native.tokens and found.step_map == native.step_map
    assert found.stats.target_forwards < own.stats.target_forwards < native.stats.target_forwards
    assert found.stats.draft_forwards == 0


def test_a_draft_model_is_not_asked_and_need_not_be_there(tiny):
    draft = simsd.load("tiny-draft")
    one, other = (simsd.generate(tiny, QUESTION, model, drafter="lookup")[0] for model in (None, draft))
    assert one.tokens == other.tokens and one.stats.draft_forwards == other.stats.draft_forwards == 0
