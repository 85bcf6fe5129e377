"""Pages of equal beginnings, which sequences share and which stay until the memory is needed."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence

from simsd.engine.pages import PagePool


@dataclasses.dataclass(eq=False)
class Prefix:
    """The keys and values of a unit of tokens behind those of `parent`; immutable once written.

    Attributes:
        root: the first of its parents, which is no text's: None of that one itself.
        tokens: the unit's; with those of its parents, the key.
        pages: of the unit, in order. end: tokens up to its end.
        users: sequences that run on it.
        in_target, in_draft: whether the model has computed them.
        launched: iterations that had been launched when the last user left.
        following: the units that are known to come behind it.
    """

    root: Prefix | None
    parent: Prefix | None
    tokens: tuple[int, ...]
    pages: list[int]
    end: int
    users: int = 0
    in_target: bool = False
    in_draft: bool = False
    launched: int = 0
    following: dict[tuple[int, ...], Prefix] = dataclasses.field(default_factory=dict)


class PrefixCache:
    """Beginnings of texts in a tree, a node for each unit of lcm(page, block) tokens.

    Clean keys and values see their own block whole and everything before it: those of a unit depend on the tokens up to
    its end and on nothing else, whoever computes them. What nobody runs on any more is idle: it stays until its pages
    are needed, and the one that has been idle for longest goes first.

    Attributes:
        unit: tokens of a node.
    """

    def __init__(self, pool: PagePool, page_size: int, block_length: int) -> None:
        self.pool, self.unit, self._page_size = pool, math.lcm(page_size, block_length), page_size
        self._root = Prefix(None, None, (), [], 0)
        # In the order in which they became idle, every node before its parent: a sequence that runs on one runs on all
        # its parents, and leaves the last first. So the first one has nobody behind it.
        self._idle: dict[Prefix, None] = {}

    @property
    def idle_pages(self) -> int:
        return len(self._idle) * self.unit // self._page_size

    @property
    def available(self) -> int:
        """Pages that `take` has."""
        return self.pool.free + self.idle_pages

    def take(self, count: int) -> list[int] | None:
        """Pages of the pool, for which idle ones make room; None where there are not as many."""
        while self.pool.free < count and self._idle:
            node = next(iter(self._idle))
            del self._idle[node]
            self._drop(node)
        return self.pool.take(count)

    def find(self, tokens: Sequence[int]) -> list[Prefix]:
        """The nodes of the longest beginning of `tokens` that there is, in order."""
        path, node = [], self._root
        while (node := node.following.get(self._unit_of(tokens, node.end))) is not None:
            path.append(node)
        return path

    def enter(self, path: Iterable[Prefix]) -> None:
        """One more sequence runs on these nodes."""
        for node in path:
            node.users += 1
            self._idle.pop(node, None)

    def extend(self, path: list[Prefix], tokens: Sequence[int], pages: list[int]) -> None:
        """Adds nodes for the units of `tokens` behind `path` to it, in use by one sequence and not computed yet.

        Args:
            pages: of the sequence, those of `path` among them.
        """
        node = path[-1] if path else self._root
        each = self.unit // self._page_size
        while len(unit := self._unit_of(tokens, node.end)) == self.unit:
            first = node.end // self._page_size
            added = Prefix(self._root, node, unit, pages[first : first + each], node.end + self.unit, users=1)
            node.following[unit] = node = added
            path.append(node)

    def leave(self, path: list[Prefix], launched: int) -> None:
        """A sequence that ran on these nodes is gone, after as many iterations were launched."""
        for node in reversed(path):
            node.users -= 1
            if node.users == 0:
                node.launched = launched
                if node.in_target and node.root is self._root:
                    self._idle[node] = None
                else:
                    self._drop(node)

    def forget(self) -> None:
        """Nothing of what is here serves a text to come: the models have changed. Who runs on it goes on."""
        for node in self._idle:
            self.pool.retire(node.pages, node.launched)
        self._idle.clear()
        self._root = Prefix(None, None, (), [], 0)

    def keep_only(self, paths: Iterable[Sequence[Prefix]]) -> None:
        """After an interrupt, which may have come anywhere: the sequences that run on these are all there are."""
        users = collections.Counter(node for path in paths for node in path)
        self._idle.clear()
        for node in (self._root, *users):
            node.users = users[node]
            node.following.clear()
        for node in users:
            node.parent.following[node.tokens] = node

    def _drop(self, node: Prefix) -> None:
        node.parent.following.pop(node.tokens, None)
        self.pool.retire(node.pages, node.launched)

    def _unit_of(self, tokens: Sequence[int], first: int) -> tuple[int, ...]:
        return tuple(tokens[first : first + self.unit])
