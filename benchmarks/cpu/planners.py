"""Ways of choosing the states that the target sees, as others have published them, for `traces.replay`.

All draft from what the target's last forward told of the state before (no second model), and all may go on to the next
block as our engine does, which spares them a forward for each block: what is compared is which states they choose.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable
from fractions import Fraction

from .traces import Block, Seen, State, cost, masked, put

Children = Callable[[State], Iterable[tuple[State, float]]]
Node = tuple[tuple[int, int], ...]  # ranks of positions and of their tokens, revealed in that order


def best_first(block: Block, root: State, children: Children, room: int) -> list[State]:
    """The states likeliest to be visited per row that they cost: each time the best of those that the states taken
    lead to. A state that several lead to counts as the likeliest of them."""
    taken: list[State] = []
    candidates: dict[State, float] = {}
    state, reach = root, 1.0
    while True:
        for child, probability in children(state):
            if child not in taken and (masked(child) or block.leads_on(child)):
                candidates[child] = max(candidates.get(child, 0.0), reach * probability)
        if not candidates:
            return taken
        state = max(candidates, key=lambda s: candidates[s] / cost(s))  # the first of equals
        reach = candidates.pop(state)
        room -= cost(state)
        if room < 0:
            return taken
        taken.append(state)
        if not masked(state):  # one finished block has rows
            candidates = {s: p for s, p in candidates.items() if masked(s)}


def self_chain(block: Block, seen: Seen, root: State, room: int) -> list[State]:
    """One chain, in the order of the last logits' confidence.

    "Self Speculative Decoding for Diffusion LLMs" (arXiv 2510.04147). The chain of FreeDave (arXiv 2510.00294) has the
    same states: each reveals one more of the most confident positions of one forward. (Its eager mode, whose forwards
    carry the next blocks masked behind every state, is left out.)
    """

    def children(state: State) -> list[tuple[State, float]]:
        left, drawn = masked(state), seen.draw(state)
        if not left:
            return []
        at = max(left, key=lambda i: drawn.log_odds[i])
        return [(put(state, at, drawn.token[at]), 1.0)]

    return best_first(block, root, children, room)


def order_tree(block: Block, seen: Seen, root: State, room: int) -> list[State]:
    """A tree of orders, one token for each position, best-first by the product of probabilities.

    The shape of the trees of "On the SPOT" (arXiv 2610.22543), not its drafter, whose learned order is another: here a
    position is next with a softmax of the last log-odds, and as drawn with its probability.
    """

    def children(state: State) -> list[tuple[State, float]]:
        left, drawn = masked(state), seen.draw(state)
        most = max((drawn.log_odds[i] for i in left), default=0.0)
        # An infinity (of whatever sign) is as good as any number that far away.
        weight = {i: math.exp(max(min(drawn.log_odds[i], 1e30) - min(most, 1e30), -700.0)) for i in left}
        total = sum(weight.values())
        return [(put(state, i, drawn.token[i]), weight[i] / total * drawn.prob[i]) for i in left]

    return best_first(block, root, children, room)


class CalibratedGraph:
    """A graph of ranks that calibration prompts have chosen: a node tells which positions are revealed, as ranks by
    confidence, and which of their likeliest tokens.

    Of Spiffy (arXiv 2509.18085): directed draft graphs of the target's own distribution, calibrated offline. As there,
    nodes of equal content are one, whatever the order, and those are kept that calibration visits most: here greedily,
    each time the node at which most texts would go on, per row. Beyond the paper, each number of masked positions has
    a graph of its own. With noise a node has an order, which decides what is drawn, and one token for each position.
    """

    def __init__(self, texts: Iterable[list[Block]]) -> None:
        """`texts`: of calibration prompts, decoded at the temperature that it is made for."""
        journeys: dict[int, list[list[Node]]] = collections.defaultdict(list)
        for text in texts:
            for block in text:
                for at in range(1, len(block.path) - 1):
                    journey = _journey(block, at)
                    journeys[len(masked(block.path[at]))].append(journey)
        self._nodes = {left: _ranked(left, found) for left, found in journeys.items()}

    def __call__(self, block: Block, seen: Seen, root: State, room: int) -> list[State]:
        """A `Planner`."""
        ranks, taken = _by_confidence(seen, root), []
        for node in self._nodes.get(len(ranks), ()):
            state = root
            for position, token in node:
                at = ranks[position]
                state = put(state, at, seen.likeliest[at][token] if token else seen.draw(state).token[at])
            if state in taken or (not masked(state) and (_finished(taken) or not block.leads_on(state))):
                continue
            room -= cost(state)
            if room < 0:
                break
            taken.append(state)
        return taken


def _finished(states: list[State]) -> bool:
    return any(not masked(state) for state in states)


def _by_confidence(seen: Seen, root: State) -> list[int]:
    """The masked positions of `root`, the most confident first."""
    log_odds = seen.draw(root).log_odds
    return sorted(masked(root), key=lambda i: -log_odds[i])


def _journey(block: Block, at: int) -> list[Node]:
    """The nodes that native decoding passes from path[at] on, until one that no graph names or that leads nowhere."""
    root, seen = block.path[at], block.seen[at - 1]
    ranks, nodes, node = _by_confidence(seen, root), [], ()
    for before, after in zip(block.path[at:], block.path[at + 1 :], strict=False):
        (changed,) = (i for i in masked(before) if after[i] != before[i])
        tokens = [seen.draw(before).token[changed], *(seen.likeliest[changed][1:] if seen.likeliest else ())]
        if after[changed] not in tokens or not (masked(after) or block.leads_on(after)):
            break
        node = (*node, (ranks.index(changed), tokens.index(after[changed])))
        nodes.append(tuple(sorted(node)) if seen.likeliest else node)
    return nodes


def _ranked(left: int, journeys: list[list[Node]]) -> list[Node]:
    """Nodes, best first: each time the one at which most journeys stand, per row, which then go on to their next."""
    waiting: dict[Node, list[tuple[list[Node], int]]] = collections.defaultdict(list)

    def arrive(journey: list[Node], step: int) -> None:
        if step < len(journey):
            waiting[journey[step]].append((journey, step))

    for journey in journeys:
        arrive(journey, 0)
    ranked: list[Node] = []
    while waiting:
        best = max(waiting, key=lambda node: Fraction(len(waiting[node]), 1 if len(node) < left else 2))
        ranked.append(best)
        for journey, step in waiting.pop(best):
            arrive(journey, step + 1)
    return ranked
