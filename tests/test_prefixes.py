"""The cache of prefixes: what is found, who runs on it, and which pages go first where memory is short."""

from __future__ import annotations

import random

import pytest

from simsd.engine.pages import PagePool
from simsd.engine.prefixes import PrefixCache

PAGE = 16


class Sequences:
    """Sequences that come and go over a pool of pages."""

    def __init__(self, pages: int, block_length: int = 4) -> None:
        self.pool = PagePool(pages)
        self.cache = PrefixCache(self.pool, PAGE, block_length)

    def enter(self, tokens: list[int], computed: bool = True):
        """(its path, its pages, pages that it has of others); None where memory is short."""
        path = self.cache.find(tokens)
        self.cache.enter(path)
        shared = [page for node in path for page in node.pages]
        own = self.cache.take(-(-len(tokens) // PAGE) - len(shared))
        if own is None:
            self.cache.leave(path, 0)
            return None
        self.cache.extend(path, tokens, shared + own)
        if computed:
            for node in path:
                node.in_target = True
        return path, shared + own, shared

    def leave(self, sequence) -> None:
        path, pages, _ = sequence
        self.cache.leave(path, 0)
        self.pool.retire(pages[sum(len(node.pages) for node in path) :], 0)


def text(*units: int, unit: int = PAGE, rest: int = 5) -> list[int]:
    return [token for one in units for token in [one] * unit] + [99] * rest


def test_a_beginning_is_shared_as_far_as_it_is_equal():
    sequences = Sequences(20)
    first = sequences.enter(text(1, 2, 3))
    second = sequences.enter(text(1, 2, 4))
    assert second[2] == first[1][:2] and not set(second[1][2:]) & set(first[1])
    assert sequences.pool.free == 20 - 4 - 2


@pytest.mark.parametrize(("block_length", "unit"), [(4, 16), (16, 16), (32, 32), (64, 64), (6, 48), (1, 16), (5, 80)])
def test_a_unit_is_whole_pages_and_whole_blocks(block_length, unit):
    """Keys and values of a block depend on its last token, which a page more, or less, may not hold."""
    sequences = Sequences(40, block_length)
    assert sequences.cache.unit == unit
    tokens = [7] * (2 * unit)
    first = sequences.enter(tokens)
    other = [*tokens[:-1], 8]
    assert sequences.enter(other)[2] == first[1][: unit // PAGE]
    assert sequences.enter(tokens[:-1])[2] == first[1][: unit // PAGE]
    assert sequences.enter([8, *tokens[1:]])[2] == []


def test_what_is_idle_stays_until_memory_is_needed_and_the_oldest_goes_first():
    sequences = Sequences(6)
    one, two = sequences.enter(text(1, 2, rest=0)), sequences.enter(text(3, 4, rest=0))
    sequences.leave(one)
    sequences.leave(two)
    assert sequences.pool.free == 2 and sequences.cache.available == 6
    sequences.leave(sequences.enter(text(1, 2, rest=0)))  # now `two` is the one that was idle for longest
    assert sequences.enter(text(5, 6, 7, rest=0)) is not None  # takes the end of `two`
    assert [node.tokens[0] for node in sequences.cache.find(text(3, 4))[1:]] == [3]
    assert [node.tokens[0] for node in sequences.cache.find(text(1, 2))[1:]] == [1, 2]


def test_what_somebody_runs_on_is_never_taken():
    sequences = Sequences(5)
    running = sequences.enter(text(1, 2, rest=0))
    sequences.leave(sequences.enter(text(1, 2, 3, rest=0)))
    assert sequences.enter(text(4, 5, 6, 7, rest=0)) is None
    assert sequences.cache.find(text(1, 2)) == running[0]
    assert sequences.enter(text(4, 5, 6, rest=0)) is not None
    assert len(sequences.cache.find(text(1, 2, 3))) == 1 + 2


def test_what_was_not_computed_is_gone_with_who_should_have():
    sequences = Sequences(4)
    sequences.leave(sequences.enter(text(1, 2), computed=False))
    assert len(sequences.cache.find(text(1, 2))) == 1 and sequences.pool.free == 4


def test_pages_wait_for_the_last_iteration_that_wrote_to_them():
    pool = PagePool(1)
    cache = PrefixCache(pool, PAGE, 4)
    path = cache.find([])
    cache.extend(path, text(1, rest=0), cache.take(1))
    path[1].in_target = True
    cache.leave(path, launched=3)
    assert cache.available == 1
    assert cache.take(1) is None
    pool.reclaim(3)
    assert cache.take(1) == [0]


def test_changed_models_share_nothing_with_what_was_before():
    sequences = Sequences(10)
    running, done = sequences.enter(text(1, 2, rest=0)), sequences.enter(text(3, rest=0))
    sequences.leave(done)
    sequences.cache.forget()
    assert len(sequences.cache.find(text(1, 2))) == len(sequences.cache.find(text(3))) == 1
    anew = sequences.enter(text(1, 2, rest=0))
    assert anew[2] == []
    sequences.leave(running)
    assert sequences.cache.find(text(1, 2)) == anew[0]
    sequences.leave(anew)
    assert sequences.cache.available == 10 and sequences.pool.free == 8


def test_after_an_interrupt_those_who_run_are_all_there_is():
    sequences = Sequences(10)
    one, two = sequences.enter(text(1, 2, rest=0)), sequences.enter(text(1, 3, rest=0))
    sequences.leave(sequences.enter(text(1, 4, rest=0)))
    sequences.cache.enter(sequences.cache.find(text(1, 2)))  # of one that never came to be
    sequences.cache.keep_only([one[0], sequences.cache.find([]), two[0]])
    sequences.pool.recount(page for sequence in (one, two) for page in sequence[1])
    assert sequences.pool.free == 7
    assert sequences.cache.find(text(1, 2)) == one[0] and len(sequences.cache.find(text(1, 4))) == 2
    sequences.leave(one)
    sequences.leave(two)
    assert sequences.cache.available == 10


def test_what_may_be_wrong_is_not_found_again_after_an_interrupt_either():
    sequences = Sequences(10)
    one, two = sequences.enter(text(1, 2, rest=0)), sequences.enter(text(1, 3, rest=0))
    sequences.cache.discard(one[0])
    sequences.leave(one)
    sequences.cache.keep_only([two[0]])
    sequences.pool.recount(two[1])
    assert len(sequences.cache.find(text(1, 3))) == 1
    sequences.leave(two)
    assert sequences.cache.available == 10


@pytest.mark.parametrize("seed", range(20))
def test_no_page_is_lost_or_has_two_owners(seed):
    draw, sequences, running = random.Random(seed), Sequences(24), []
    for _ in range(400):
        if running and draw.random() < 0.45:
            sequences.leave(running.pop(draw.randrange(len(running))))
        elif draw.random() < 0.03:
            sequences.cache.forget()
        else:
            units = [draw.randrange(2) for _ in range(draw.randrange(1, 5))]
            entered = sequences.enter(text(*units, rest=draw.randrange(20)), computed=draw.random() < 0.8)
            running += [] if entered is None else [entered]
        nodes = {node: None for path, *_ in running for node in path}
        owned = [page for node in nodes for page in node.pages]
        owned += [page for path, pages, _ in running for page in pages[sum(len(node.pages) for node in path) :]]
        assert len(owned) == len(set(owned))
        assert sequences.cache.available == 24 - len(owned)
    for sequence in running:
        sequences.leave(sequence)
    assert sequences.cache.available == 24 and sorted(sequences.cache.take(24)) == list(range(24))
