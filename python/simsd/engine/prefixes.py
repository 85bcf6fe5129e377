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
        parent: None of the root of all, which has no tokens.
        tokens: the unit's; with those of its parents, the key.
        pages: of the unit, in order. end: tokens up to its end.
        users: sequences that run on it.
        in_target, in_draft: whether the model has computed them.
        launched: iterations that had been launched when the last user left.
        following: the units that are known to come behind it.
    """

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

    A sequence runs on a path: the root, and nodes that follow each other.

    Attributes:
        unit: tokens of a node.
    """

    def __init__(self, pool: PagePool, page_size: int, block_length: int, enabled: bool = True) -> None:
        """Not `enabled`: no path has anything but the root."""
        self.pool, self.unit, self._page_size = pool, math.lcm(page_size, block_length), page_size
        self._enabled = enabled
        self._root = Prefix(None, (), [], 0, in_target=True, in_draft=True)
        # In the order in which they became idle, every node before its parent: a sequence that runs on one runs on all
        # its parents, and leaves the last first. So the first one has nobody behind it.
        self._idle: dict[Prefix, None] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no text to come could share anything."""
        return not self._root.following

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
        """The path of the longest beginning of `tokens` that there is."""
        path, node = [], self._root
        while node is not None:
            path.append(node)
            node = node.following.get(self._unit_of(tokens, node.end))
        return path

    def enter(self, path: Sequence[Prefix]) -> None:
        """One more sequence runs on these nodes."""
        for node in path[1:]:
            node.users += 1
            self._idle.pop(node, None)

    def extend(self, path: list[Prefix], tokens: Sequence[int], pages: list[int]) -> None:
        """Adds nodes to a path that one sequence runs on, for its tokens behind it; up to what is known otherwise.

        Args:
            pages: of the sequence, those of `path` among them.
        """
        each = self.unit // self._page_size
        while self._enabled:
            last, unit = path[-1], self._unit_of(tokens, path[-1].end)
            if len(unit) < self.unit or unit in last.following:
                return
            first = last.end // self._page_size
            last.following[unit] = Prefix(last, unit, pages[first : first + each], last.end + self.unit, users=1)
            path.append(last.following[unit])

    def pages_of(self, path: Sequence[Prefix]) -> list[int]:
        return [page for node in path for page in node.pages]

    def computed(self, path: Sequence[Prefix], in_target: int, in_draft: int) -> None:
        """As many tokens of a path have their keys and values in place, the target's and the draft's."""
        for node in path:
            node.in_target |= node.end <= in_target
            node.in_draft |= node.end <= in_draft

    def leave(self, path: Sequence[Prefix], launched: int) -> None:
        """A sequence that ran on these nodes is gone, after as many iterations were launched."""
        for node in reversed(path[1:]):
            node.users -= 1
            if node.users == 0:
                node.launched = launched
                if node.in_target and path[0] is self._root:
                    self._idle[node] = None
                else:
                    self._drop(node)

    def discard(self, path: Sequence[Prefix]) -> None:
        """Nobody else is to run on these nodes: what they hold may be wrong."""
        for node in path[1:]:
            node.in_target = False
            self._unlink(node)

    def forget(self) -> None:
        """Nothing of what is here serves a text to come: the models have changed. Who runs on it goes on."""
        for node in self._idle:
            self.pool.retire(node.pages, node.launched)
        self._idle.clear()
        self._root = Prefix(None, (), [], 0, in_target=True, in_draft=True)

    def keep_only(self, paths: Iterable[Sequence[Prefix]]) -> None:
        """After an interrupt, which may have come anywhere: the sequences that run on these are all there are."""
        users = collections.Counter(node for path in paths for node in path[1:])
        known = [node for node in users if node.parent.following.get(node.tokens) is node]
        self._idle.clear()
        self._root.following.clear()
        for node in users:
            node.users = users[node]
            node.following.clear()
            node.parent.following.clear()
        for node in known:
            node.parent.following[node.tokens] = node

    def _drop(self, node: Prefix) -> None:
        self._unlink(node)
        self.pool.retire(node.pages, node.launched)

    def _unlink(self, node: Prefix) -> None:
        if node.parent.following.get(node.tokens) is node:
            del node.parent.following[node.tokens]

    def _unit_of(self, tokens: Sequence[int], first: int) -> tuple[int, ...]:
        return tuple(tokens[first : first + self.unit])
