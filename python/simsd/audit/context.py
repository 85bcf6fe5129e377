"""The context check: what a verified state is told, against a forward on that state alone."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from simsd.audit.forwards import Alone, Forward, decode, plain_logits, tolerance, watching
from simsd.audit.report import FAIL, INCONCLUSIVE, PASS, REPORTED, Check, Subject
from simsd.decode.iteration import Shape
from simsd.decode.slots import Slots
from simsd.engine.decoder import Decoder
from simsd_kernels import Plan

PER_FORWARD = 6  # states looked at in one forward, so that many forwards are


@dataclasses.dataclass
class State:
    """A state among those of one forward: `rows` of the logits of its `masked` positions."""

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
    """Rows of states in the forwards of real exact decoding, several states, finished blocks and lookahead included."""
    target, found = subject.target, Distances()
    config = subject.exact(lookahead=3)

    def see(slots: Slots, shape: Shape, forward: Forward, plan: Plan) -> Tensor:
        logits = forward(plan)
        for state in states(slots, shape, plan, target.mask_token_id)[: max(0, subject.settings.states - found.states)]:
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
        return logits

    batch = subject.settings.batch
    decoder = Decoder(target, subject.prompts, subject.draft, config, max_batch=batch, parts=watching(see))
    alone = Alone(target, decoder.capacity)
    decode(decoder)
    return _judge(found)


def states(slots: Slots, shape: Shape, plan: Plan, mask_id: int) -> list[State]:
    """Some of the states of a forward: none of those that have nothing masked, none where there is one alone."""
    length = slots.length
    before = (shape.pending + shape.lookahead) * length  # rows before those of states
    chosen = []
    for slot in range(slots.count):
        there = (plan.block[slot] >= 0).nonzero().flatten().tolist()
        if len(there) < 2:
            continue
        text = slots.text[slot, : int(slots.start[slot])].tolist()
        finished = plan.tokens[slot, shape.pending * length : before].tolist()
        step = max(1, len(there) // PER_FORWARD)
        for c in there[::-1][::step]:  # from the last: states of later blocks stand at the end
            k, shown = int(plan.block[slot, c]), int(plan.state_revealed[slot, c])
            masked = [i for i in range(length) if not shown >> i & 1]
            tokens = plan.states[slot, c].tolist()
            block = [mask_id if i in masked else tokens[i] for i in range(length)]
            rows = plan.state_rows[slot, c, masked].long()
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
