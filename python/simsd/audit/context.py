"""The context check: what a verified state is told, against a forward on that state alone."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from simsd.audit.forwards import Alone, Forward, Watched, decode, plain_logits, tolerance
from simsd.audit.report import FAIL, INCONCLUSIVE, PASS, REPORTED, Check, Subject
from simsd.exact import Exact
from simsd_kernels import Plan

PER_FORWARD = 6  # states looked at in one forward, so that many forwards are


@dataclasses.dataclass
class State:
    """A state among the copies of one forward: `rows` of the logits of its `masked` positions."""

    prefix: list[int]
    block: list[int]
    masked: list[int]
    rows: Tensor
    ahead: int


@dataclasses.dataclass
class Distances:
    states: int = 0
    ahead: int = 0
    largest: float = 0.0
    alone: float = 0.0
    excess: float = 0.0  # largest distance in units of what rounding may do
    identical: int = 0


def exact_context(subject: Subject) -> list[Check]:
    """Rows of copies in the forwards of real exact decoding, several copies, finished blocks and lookahead included."""
    target, found = subject.target, Distances()
    config = subject.exact(lookahead=3)

    def see(loop: Exact, forward: Forward, plan: Plan, ahead: int) -> tuple[Tensor, Tensor]:
        logits, index = forward(plan, ahead)
        for state in states(loop, plan, ahead, index)[: max(0, subject.settings.states - found.states)]:
            verified = logits[state.rows]
            plain = plain_logits(target, state.prefix, [state.block])[0, state.masked]
            single = alone.logits(state.prefix, state.block, state.masked)
            distance = _distance(verified, plain)
            found.states += 1
            found.ahead += state.ahead > 0
            found.largest = max(found.largest, distance)
            found.alone = max(found.alone, _distance(verified, single))
            found.excess = max(found.excess, distance / tolerance(plain))
            found.identical += bool(torch.equal(verified, single))
        return logits, index

    decoder = Watched(see, target, subject.prompts, subject.draft, config, max_batch=subject.settings.batch)
    alone = Alone(target, decoder.capacity)
    decode(decoder)
    return _judge(found)


def states(loop: Exact, plan: Plan, ahead: int, index: Tensor) -> list[State]:
    """Some of the states of a forward: none of those that have nothing masked, none where it has one copy alone."""
    mask_id, length = loop.target.model.mask_token_id, loop.lanes.length
    chosen = []
    for lane, start in enumerate(loop.lanes.starts):
        copies = (plan.block[lane] >= 0).nonzero().flatten().tolist()
        if start < 0 or len(copies) < 2:
            continue
        text = loop.lanes.text[lane, :start].tolist()
        finished = plan.tokens[lane, : ahead * length].tolist()
        step = max(1, len(copies) // PER_FORWARD)
        for c in copies[::-1][::step]:  # from the last: copies of later blocks stand at the end
            k, shown = int(plan.block[lane, c]), int(plan.revealed[lane, c])
            masked = [i for i in range(length) if not shown >> i & 1]
            tokens = plan.states[lane, c].tolist()
            block = [mask_id if i in masked else tokens[i] for i in range(length)]
            rows = index[lane, c, masked].long()
            chosen.append(State(text + finished[: k * length], block, masked, rows, k))
    return chosen


def _distance(a: Tensor, b: Tensor) -> float:
    """A difference that is not a number counts as infinite."""
    largest = float((a.float() - b.float()).abs().max())
    return largest if largest == largest else float("inf")


def _judge(found: Distances) -> list[Check]:
    figures = dataclasses.asdict(found)
    what = f"{found.states} states, {found.ahead} of them in blocks ahead"
    near = f"largest difference {found.largest:.2g}, {found.excess:.2g} of what rounding may do"
    same = f"{found.identical} of {found.states} states bit-identical"
    if found.identical < found.states:
        same += f", largest difference {found.alone:.2g}"
    within = found.excess <= 1
    if found.identical == found.states:
        identical = PASS
    else:
        identical = REPORTED if within else FAIL
    if not found.states:
        within, identical, near, same = None, INCONCLUSIVE, "no forward had several copies", "nothing to compare"
    result = INCONCLUSIVE if within is None else PASS if within else FAIL
    return [
        Check(
            "context", "verified states against a forward of their own", "exact", result, f"{near} ({what})", figures
        ),
        Check("context", "the same, alone in native's loop", "exact", identical, same, figures),
    ]
